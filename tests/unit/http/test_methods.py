"""What `Allow` names: the methods of all routes that have a path."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, FastAPI
from starlette.staticfiles import StaticFiles

from tidegate.http.problems import allow, methods_in


def app(folder: Path) -> FastAPI:
    routes = APIRouter()
    routes.add_api_route("/one/{name}", lambda: None, methods=["GET"])
    routes.add_api_route("/one/{name}", lambda: None, methods=["PATCH", "DELETE"])
    made = FastAPI()
    made.include_router(routes, prefix="/llm")
    made.mount("/static", StaticFiles(directory=folder))
    return made


def test_the_methods_of_all_routes_of_a_path_are_named(tmp_path: Path) -> None:
    routes = app(tmp_path).routes
    scope = {"type": "http", "method": "POST", "root_path": "", "headers": []}
    known = {
        path: methods_in(routes, {**scope, "path": path})
        for path in ("/llm/one/x", "/static/x.css", "/one/x")
    }
    assert known == {
        "/llm/one/x": ("GET", "PATCH", "DELETE"),
        "/static/x.css": ("GET",),
        "/one/x": (),
    }
    assert allow(known["/llm/one/x"]) == "GET, HEAD, PATCH, DELETE, OPTIONS"
    assert allow(("POST",)) == "POST, OPTIONS"
