"""JSON bodies of the admin routes, read only after their sender was let in.

FastAPI would read a body whole before it asks who sends it. Invariant: at most `MOST_BYTES` are
read, and nothing that a page of another site could send without asking first is taken.
"""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from tidegate.errors import InvalidRequest, UnsupportedMedia
from tidegate.http.body import Body
from tidegate.http.services import services_of

MOST_BYTES = 1_000_000
_JSON = "application/json"
_NUL = rb"\u0000"  # the only way in which JSON can have it

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_json(request: Request, model: type[ModelT]) -> ModelT:
    """The body as `model`; an empty one is an empty object.

    Raises InvalidRequest with the path of the field, UnsupportedMedia, PayloadTooLarge and
    RequestTimeout.
    """
    body = Body(request, services_of(request).config)
    raw = await body.read(MOST_BYTES, field="body")
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if raw and media != _JSON:
        raise UnsupportedMedia("Content-Type", "the body must be JSON", allowed=_JSON)
    if not raw and media not in ("", _JSON):
        raise UnsupportedMedia("Content-Type", "an empty body has no type but JSON", allowed=_JSON)
    try:
        found = model.model_validate_json(raw or b"{}")
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "body"
        raise InvalidRequest(where, f"{where}: {first['msg']}") from None
    if _NUL in raw and (nul := _nul_in(orjson.loads(raw))) is not None:
        where = ".".join(nul) or "body"
        raise InvalidRequest(where, f"{where} has a NUL character in it")
    return found


def _nul_in(value: Any, path: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """The path of the first text with a NUL, which PostgreSQL can't hold."""
    if isinstance(value, str):
        return path if "\0" in value else None
    if isinstance(value, dict):
        if any("\0" in name for name in value):
            return path
        inner = list(value.items())
    else:
        inner = list(enumerate(value)) if isinstance(value, list) else []
    found = (_nul_in(item, (*path, str(name))) for name, item in inner)
    return next((one for one in found if one is not None), None)


def described(model: type[BaseModel]) -> dict[str, Any]:
    """What the API's description says of the body."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": False, "content": {_JSON: {"schema": schema}}}}
