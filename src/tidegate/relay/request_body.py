"""The body that goes to an upstream: as it came, unless it must differ. Pure.

Invariant: where only the model's name differs, all other bytes stay as they came, so that no number
loses its digits on the way.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from tidegate.errors import InvalidRequest
from tidegate.relay.asked import NAMES_MODEL
from tidegate.relay.call import NativeCall
from tidegate.relay.paths import Operation
from tidegate.relay.targets import Target
from tidegate.relay.usage_event import asking_for_usage

_TEXT = re.compile(rb'\s*("(?:[^"\\]|\\.)*")')
# Below other objects there may be more models, such as a tool's parameter of that name.
_MOST_MODELS = 8
# Whose bodies name the model of the path again, which must be the same.
_NAMES_IT_AGAIN = (Operation.EMBED, Operation.COUNT)


def body_for(
    call: NativeCall, body: dict[str, Any], target: Target, *, ask_usage: bool
) -> bytes | None:
    """The bytes of the client, but with the upstream's name for the model, and asking a stream
    for its usage. None for a request without a body. Raises InvalidRequest."""
    if not call.body:
        return None
    try:
        return _changed(call, body, target, ask_usage)
    except orjson.JSONEncodeError:  # what can be read can be nested deeper than what can be written
        allowed = "at most 250 levels"
        raise InvalidRequest("body", "the body is nested too deeply", allowed=allowed) from None


def _changed(call: NativeCall, body: dict[str, Any], target: Target, ask_usage: bool) -> bytes:
    raw, named = call.body, call.endpoint.model
    if named is not None:
        again = call.endpoint.operation in _NAMES_IT_AGAIN and named != target.model
        return _named_again(raw, named, target.model) if again else raw
    if target.model and body.get("model") != target.model:
        with_model = _with_model if "model" in body else _naming_model
        body = {**body, "model": target.model}
        raw = with_model(raw, target.model) or _rewritten(raw, "model", target.model)
    return asking_for_usage(raw, body) if ask_usage else raw


def _with_model(raw: bytes, model: str) -> bytes | None:
    """The same with another value of the outermost `model`; None where it is not found. There is
    one such field, and its value is a text."""
    found = [one.end() for one in NAMES_MODEL.finditer(raw)]
    if len(found) > _MOST_MODELS:
        return None
    name = orjson.dumps(model)
    for end in found:
        if (text := _TEXT.match(raw, end)) is None:
            continue
        changed = raw[: text.start(1)] + name + raw[text.end(1) :]
        if len(found) == 1 or orjson.loads(changed)["model"] == model:
            return changed
    return None


def _rewritten(raw: bytes, name: str, value: Any) -> bytes:
    """With another value of a field: from the bytes, since a large body is parsed without files."""
    return orjson.dumps({**orjson.loads(raw), name: value})


def _naming_model(raw: bytes, model: str) -> bytes:
    """The same with a model that it did not name."""
    start = raw.index(b"{") + 1
    return b'%b"model":%b,%b' % (raw[:start], orjson.dumps(model), raw[start:])


def _named_again(raw: bytes, named: str, model: str) -> bytes:
    names = rb'("model"\s*:\s*"(?:models/)?)%b(?=")' % re.escape(named.encode())
    name = orjson.dumps(model)[1:-1]
    return re.sub(names, lambda found: found[1] + name, raw)
