"""Roles of who operates: no route is without one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from tidegate import dashboard
from tidegate.call import OperatorRole
from tidegate.dashboard.routes import install
from tidegate.http import guards
from tidegate.http.guards import BODY_ROUTES, ROLES, admit_admin, checked_operator
from tidegate.http.server import build
from tidegate.http.services import Services

STATIC = Path(dashboard.__file__).parent / "static"


def never() -> AbstractAsyncContextManager[Services]:
    raise AssertionError("nothing is opened")


def calls_of(dependant: Dependant) -> Iterator[Any]:
    for one in dependant.dependencies:
        yield one.call
        yield from calls_of(one)


def guarded() -> set[tuple[str, str]]:
    """Every route that asks for who operates, as method and path."""
    app = build(never)
    install(app)
    guardians = {admit_admin, checked_operator, guards._reader_of_record}
    return {
        (method, route.path)
        for route in app.routes
        if isinstance(route, APIRoute) and guardians & set(calls_of(route.dependant))
        for method in route.methods or ()
    }


def classified() -> dict[tuple[str, str], OperatorRole]:
    return {
        (method, path): role for path, methods in ROLES.items() for method, role in methods.items()
    }


def test_every_route_of_operators_has_a_role_and_every_role_a_route() -> None:
    routes = guarded()
    assert len(routes) > 50
    assert routes == set(classified())
    assert {path for _, path in routes} >= BODY_ROUTES


def test_every_route_below_admin_is_guarded() -> None:
    app = build(never)
    below = {
        (method, route.path)
        for route in app.routes
        if isinstance(route, APIRoute) and route.path.startswith("/admin")
        for method in route.methods or ()
    }
    assert below <= guarded()


def test_a_viewer_reads_and_changes_nothing() -> None:
    others = {
        ("POST", "/admin/requests/requeue"),  # counts, and asks for operator to do what it counts
        ("POST", "/admin/limits/rehearse"),  # simulates, and changes nothing
        ("GET", "/admin/actions"),  # has addresses of people
    }
    for (method, path), role in classified().items():
        if (method, path) in others:
            continue
        assert (role is OperatorRole.VIEWER) == (method == "GET"), (method, path)


def test_roles_include_those_before_them() -> None:
    for at, role in enumerate(OperatorRole):
        assert [role.includes(other) for other in OperatorRole] == [n <= at for n in range(3)]
    assert OperatorRole.of(["infer", "read"]) is None
    assert OperatorRole.of(["viewer", "operator", "infer"]) is OperatorRole.OPERATOR


def test_every_action_of_the_page_names_a_role() -> None:
    """`needs:` beside the button; what a module sends by another method than GET is an action."""
    sends = re.compile(r"\b(?:post|put|patch|remove)\(\s*[`\"](?:admin|\$\{path)")
    acting = [path for path in STATIC.rglob("*.js") if sends.search(path.read_text("utf-8"))]
    assert len(acting) > 5
    for path in acting:
        assert re.search(r"\bneeds: \"(operator|admin)\"", path.read_text("utf-8")), path.name
