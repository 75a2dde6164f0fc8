"""Mock of Anthropic's API, made from the types of its SDK: `python anthropic_mock.py PORT`.

Runs in the environment of the SDK's tests, and needs nothing but the SDK and aiohttp. Each method
of a resource says by its own code which path it calls, which fields it sends and which type it
expects; the mock answers that path with a value of that type. What is no request of the SDK's is
refused, so that a gateway that adds or drops a field is seen.
"""

from __future__ import annotations

import ast
import inspect
import json
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from importlib import import_module
from types import ModuleType, NoneType
from typing import Any, Literal, get_args, get_origin

import anthropic.resources
from aiohttp import web
from anthropic._models import BaseModel
from anthropic._resource import SyncAPIResource

HEALTH = "/health"
MOST_DEPTH = 12
_METHODS = {
    "_get": "GET",
    "_get_api_list": "GET",
    "_post": "POST",
    "_put": "PUT",
    "_patch": "PATCH",
    "_delete": "DELETE",
}
_NAME = "[^/]+"
# In the order of a stream; what the type lists besides comes before the end.
_ORDER = ("message_start", "content_block_start", "content_block_delta", "content_block_stop")
_END = ("message_delta", "message_stop")


@dataclass(frozen=True, slots=True)
class Route:
    """One request of the SDK's. fields: which its body may have, None where it is no JSON;
    required: those that it must have."""

    method: str
    path: re.Pattern[str]
    is_beta: bool
    answers: Any
    events: Any
    fields: frozenset[str] | None
    required: frozenset[str]


class Refusal(Exception):
    """Status and message of an answer with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def example(of: Any, name: str = "", depth: int = 0) -> Any:
    """A value of a type, as JSON has it."""
    if hasattr(of, "__value__"):  # an alias by `type`
        of = of.__value__
    origin, inner = get_origin(of), get_args(of)
    if origin is not None and str(origin).endswith("Annotated"):
        return example(inner[0], name, depth)
    if isinstance(of, type) and issubclass(of, BaseModel):
        return _object(of, depth)
    if of is Any or of is object:
        return {}
    if origin is Literal:
        return inner[0]
    if origin in (list, tuple, set):
        return [example(inner[0], name, depth + 1)] if inner and depth < MOST_DEPTH else []
    if origin is dict:
        return {"key": example(inner[1], name, depth + 1)} if depth < MOST_DEPTH else {}
    if inner and NoneType in inner and depth >= MOST_DEPTH:
        return None
    if inner:  # a union: the first that is something
        return example(next(one for one in inner if one is not NoneType), name, depth)
    return _SIMPLE[of](name)


_SIMPLE: dict[Any, Callable[[str], Any]] = {
    str: lambda name: name or "text",
    int: lambda _name: 1,
    float: lambda _name: 1.5,
    bool: lambda _name: True,
    datetime: lambda _name: "2026-01-02T03:04:05Z",
    date: lambda _name: "2026-01-02",
    NoneType: lambda _name: None,
    dict: lambda _name: {},
    list: lambda _name: [],
}
# Of a page: there is no other.
_OF_PAGES = {"has_more": False, "next_page": None}


def _object(model: type[BaseModel], depth: int) -> dict[str, Any]:
    return {
        field.alias or name: _OF_PAGES[name]
        if name in _OF_PAGES
        else example(field.annotation, name, depth + 1)
        for name, field in model.model_fields.items()
    }


def events(of: Any) -> list[dict[str, Any]]:
    """A stream's events, one of each sort."""
    while not (found := [one for one in get_args(of) if _is_model(one)]):
        of = get_args(of)[0] if get_args(of) else of.__value__
    told = {one["type"]: one for one in map(example, found)}
    between = [name for name in told if name not in _ORDER + _END]
    return [told[name] for name in (*_ORDER, *between, *_END) if name in told]


def _is_model(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, BaseModel)


def routes() -> list[Route]:
    """Of all resources of the SDK."""
    found: list[Route] = []
    package = anthropic.resources
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = import_module(info.name)
        for kind in list(vars(module).values()):
            is_own = isinstance(kind, type) and kind.__module__ == info.name
            if is_own and issubclass(kind, SyncAPIResource):
                found += _routes_of(module, kind)
    # A word of a path goes before a name that stands there.
    return sorted(found, key=lambda one: one.path.pattern.count(_NAME))


def _routes_of(module: ModuleType, kind: type) -> Iterator[Route]:
    for function in vars(kind).values():
        if not inspect.isfunction(function):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr in _METHODS and call.args:
                route = _route(module, function, call)
                if route is not None:
                    yield route


def _route(module: ModuleType, function: Any, call: ast.Call) -> Route | None:
    template = call.args[0]
    if isinstance(template, ast.Call):
        template = template.args[0]
    if not isinstance(template, ast.Constant):
        return None
    named = {one.arg: one.value for one in call.keywords}
    path, _, query = str(template.value).partition("?")
    pattern = re.sub(r"\\{\w+\\}|\{\w+\}", _NAME, re.escape(path))
    body, fields = named.get("body"), None
    if isinstance(body, ast.Dict):
        fields = frozenset(str(ast.literal_eval(one)) for one in body.keys if one is not None)
    parameters = inspect.signature(function).parameters.values()
    missing = {one.name for one in parameters if one.default is inspect.Parameter.empty}
    return Route(
        method=_METHODS[call.func.attr],  # type: ignore[attr-defined]
        path=re.compile(pattern),
        is_beta="beta" in module.__name__.split(".") or "beta=true" in query,
        answers=_value(module, named.get("page") or named.get("cast_to")),
        events=_value(module, named.get("stream_cls")),
        fields=fields,
        required=frozenset() if fields is None else fields & missing,
    )


def _value(module: ModuleType, node: ast.expr | None) -> Any:
    if node is None:
        return None
    try:
        return eval(ast.unparse(node), vars(module))  # an expression of the SDK's own
    except NameError:  # a type variable of the method's, such as that of a parsed answer
        return None


class Answers:
    """Answers each request by the first route that it fits."""

    def __init__(self, known: Sequence[Route]) -> None:
        self._known = known

    async def serve(self, request: web.Request) -> web.Response:
        if request.path == HEALTH:
            return web.json_response({})
        try:
            kind, data = self._answer(request, await request.read())
        except Refusal as refused:
            print(f"{refused.status} {request.method} {request.path_qs}: {refused}", flush=True)
            error = {"type": "invalid_request_error", "message": str(refused)}
            body = {"type": "error", "error": error}
            return web.json_response(body, status=refused.status)
        headers = {"content-type": kind, "request-id": "req_of_the_mock"}
        return web.Response(body=data, headers=headers)

    def _answer(self, request: web.Request, raw: bytes) -> tuple[str, bytes]:
        """The type and the bytes. Raises Refusal."""
        if "x-api-key" not in request.headers and "authorization" not in request.headers:
            raise Refusal(401, "there is no key")
        if "anthropic-version" not in request.headers:
            raise Refusal(400, "anthropic-version is missing")
        route = self._route(request)
        body = None if route.fields is None else _checked(route, raw)
        if body is not None and body.get("stream") is True and route.events is not None:
            told = (
                f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in events(route.events)
            )
            return "text/event-stream", "".join(told).encode()
        if "Binary" in str(route.answers):
            return "application/octet-stream", b"the bytes of a file"
        return "application/json", json.dumps(example(route.answers)).encode()

    def _route(self, request: web.Request) -> Route:
        is_beta = request.query.get("beta") == "true" or "anthropic-beta" in request.headers
        found = [
            one
            for one in self._known
            if one.method == request.method and one.path.fullmatch(request.path)
        ]
        if not found:
            raise Refusal(404, "no method of the SDK calls this")
        return next((one for one in found if one.is_beta == is_beta), found[0])


def _checked(route: Route, raw: bytes) -> dict[str, Any]:
    """The body of a request. Raises Refusal."""
    assert route.fields is not None
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not an object")
    if more := body.keys() - route.fields:
        raise Refusal(400, f"the SDK sends no {', '.join(sorted(more))}")
    if missing := route.required - body.keys():
        raise Refusal(400, f"the SDK always sends {', '.join(sorted(missing))}")
    return body


def main() -> None:
    answers = Answers([one for one in routes() if one.answers is not None])
    application = web.Application(client_max_size=100_000_000)
    application.router.add_route("*", "/{path:.*}", answers.serve)
    web.run_app(application, host="127.0.0.1", port=int(sys.argv[1]), print=None)


if __name__ == "__main__":
    main()
