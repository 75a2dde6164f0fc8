"""The body that goes to an upstream: as it came, unless it must differ. Pure."""

from __future__ import annotations

from typing import Any

import orjson

from tidegate.errors import InvalidRequest
from tidegate.relay.call import NativeCall
from tidegate.relay.targets import Target
from tidegate.relay.usage_event import asking_for_usage


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
    raw = call.body
    if call.endpoint.model is None and body.get("model") != target.model and "model" in body:
        body = {**body, "model": target.model}
        raw = orjson.dumps(body)
    return asking_for_usage(raw, body) if ask_usage else raw
