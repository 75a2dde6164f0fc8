"""Whether a caller may ask a model, and every other model that its body names. Pure.

Invariant: a model that a body names beside its own, for a tool or to fall back to, is one that the
caller's tenant may ask; unknown fields that name a model are held to that too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tidegate.call import Caller
from tidegate.errors import Forbidden, InvalidRequest
from tidegate.relay.paths import Endpoint

_MOST_VALUES = 100_000
# Fields that name models; so does any that ends in `_model`.
_NAMES = frozenset(
    (
        *("model", "models", "modelname", "model_name", "fallbacks", "fallback_models"),
        *("allowed_models", "fallbackmodels", "allowedmodels"),
    )
)
# What a model reads or writes, where `model` is a word like any other; schemas name fields so.
_CONTENT = frozenset(
    (
        *("messages", "input", "contents", "content", "parts", "prompt", "metadata", "system"),
        *("instructions", "systeminstruction", "system_instruction", "user", "stop", "logit_bias"),
        *("schema", "json_schema", "input_schema", "parametersjsonschema", "properties"),
        *("responseschema", "response_schema", "responsejsonschema", "input_examples"),
        *("functiondeclarations", "function_declarations", "labels"),
    )
)
_OF_CLIENTS = ("function", "custom")  # tools that the client runs itself
_MAYBE_NAME = re.compile(rb"model|fallbacks", re.IGNORECASE)
_ESCAPE = re.compile(rb"\\u00[46]")  # of a letter
_TOOLS = re.compile(r"(?:.*\.)?tools")


def check_model(caller: Caller, model: str, field: str = "model") -> None:
    """Raises Forbidden for a model that is not among those of the caller's tenant."""
    if not caller.may_ask(model):
        allowed = ", ".join(caller.models or ()) or "no model"
        asked = f"the model {model[:200]}" if model else "without naming a model"
        raise Forbidden(
            f"tenant {caller.tenant_id} may not ask {asked}; allowed: {allowed}",
            field=field,
            allowed=allowed,
        )


def check_body(caller: Caller, endpoint: Endpoint, body: Mapping[str, Any]) -> None:
    """Raises Forbidden for a model within a body that the caller may not ask, and InvalidRequest
    where a body of Gemini's dialect names another model than its path."""
    if endpoint.model is not None:
        for field, named in _named_again(body):
            if named.rpartition("/")[2] != endpoint.model:
                raise InvalidRequest(
                    field,
                    f"{field} names another model than the path",
                    allowed=f"models/{endpoint.model}",
                )
    if caller.models is not None:
        for field, model in _models_in(body):
            check_model(caller, model, field)


def check_names(caller: Caller, raw: bytes) -> None:
    """Raises InvalidRequest where an object of a body names models twice in one field: parsers do
    not agree on which of them is meant, so that another one could be asked than was checked."""
    if caller.models is None or (not _ESCAPE.search(raw) and len(_MAYBE_NAME.findall(raw)) < 2):
        return

    def check(pairs: list[tuple[str, Any]]) -> None:
        named = [name for name, _ in pairs if _names_models(name.casefold())]
        for name in named:
            if named.count(name) > 1:
                said = f"{name} is named more than once in an object"
                raise InvalidRequest(name, said, allowed=f"one {name}")

    try:
        json.loads(raw, object_pairs_hook=check, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "the body is nested too deeply") from None


def _names_models(folded: str) -> bool:
    return folded in _NAMES or folded.endswith("_model")


def _named_again(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where bodies of Gemini's dialect name the model of the path once more."""
    if type(named := body.get("model")) is str:
        yield "model", named
    for name in ("generateContentRequest", "generate_content_request"):
        request = body.get(name)
        if type(request) is dict and type(named := request.get("model")) is str:
            yield f"{name}.model", named
    requests = body.get("requests")
    for request in requests if type(requests) is list else ():
        if type(request) is dict and type(named := request.get("model")) is str:
            yield "requests.model", named


def _models_in(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every model that a body names, with its field; without recursion, since how deep a body is
    is its client's choice. Raises InvalidRequest for one that is too large for that."""
    left: list[tuple[str, Any]] = [("", body)]
    for _ in range(_MOST_VALUES):
        if not left:
            return
        path, value = left.pop()
        if type(value) is list:
            left += [(path, one) for one in value]
        elif isinstance(value, Mapping) and not _is_of_client(path, value):
            for name, inner in value.items():
                folded = name.casefold()
                if folded in _CONTENT:
                    continue
                field = f"{path}.{name}" if path else name
                if _names_models(folded):
                    for one in inner if type(inner) is list else (inner,):
                        if type(one) is str:
                            yield field, one
                        else:
                            left.append((field, one))
                elif type(inner) in (dict, list):
                    left.append((field, inner))
    raise InvalidRequest("body", "the body holds too many values beside its content")


def _is_of_client(path: str, value: Mapping[str, Any]) -> bool:
    """Whether this is a tool that the client runs. Elsewhere, such as beside `model` itself, a
    `type` says nothing of the sort."""
    return value.get("type") in _OF_CLIENTS and _TOOLS.fullmatch(path) is not None
