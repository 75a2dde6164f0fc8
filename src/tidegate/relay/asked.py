"""What a native body asks for, as far as admission must know: model, kind, pieces, bounds. Pure.

Invariant: a field that is not known here never makes a request wrong; the body itself is passed on
as it came.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import orjson

from tidegate.call import Kind
from tidegate.demand.pieces import InputPieces, input_pieces
from tidegate.errors import InvalidRequest, PayloadTooLarge
from tidegate.relay.content import NOTHING_SHORTENED, Content
from tidegate.relay.paths import Dialect, Endpoint, Operation
from tidegate.relay.spelling import check_ends, check_spelling

# Of objects, lists and what stands in them: each costs many times its bytes once it is parsed, and
# the event loop stands still for it. A body of 80 MB could hold so many as to take 2 GB.
MOST_PARTS = 2_000_000
_TEXT = rb'"(?:[^"\\]++|\\.)*+"'
# Everything is taken for good: nothing is tried twice, nor remembered.
_TOO_MANY_PARTS = re.compile(
    rb'(?:[^",\[{]*+(?:%b[^",\[{]*+)*+[,\[{]){%d}+' % (_TEXT, MOST_PARTS + 1), re.DOTALL
)
# `"model":`, in whatever case and however escaped.
NAMES_MODEL = re.compile(
    rb'"(?:m|\\u00[46]d)(?:o|\\u00[46]f)(?:d|\\u00[46]4)(?:e|\\u00[46]5)(?:l|\\u00[46]c)"\s*:',
    re.IGNORECASE,
)
_OUTPUT_BOUNDS = ("max_completion_tokens", "max_output_tokens", "max_tokens", "maxOutputTokens")
_BOUNDS_NAMES = frozenset(_OUTPUT_BOUNDS)
# Each is as long as the bound, and paid for; of `best_of` one is shown.
_ANSWERS = ("n", "best_of", "candidateCount", "candidate_count")


@dataclass(slots=True)
class Asked:
    """A native request. model: as the client names it; empty where it leaves that to the provider.
    kind: what limits it falls under. images: how many pictures it makes. pieces: of its input, with
    a first guess of their LLM tokens. wants_usage: whether a stream must be asked to tell its
    usage."""

    model: str
    kind: Kind
    streams: bool = False
    images: int = 0
    pieces: InputPieces = field(default_factory=lambda: input_pieces({}))
    max_output_tokens: int | None = None
    wants_usage: bool = False


def has_too_many_parts(body: bytes) -> bool:
    """Whether JSON holds more than `MOST_PARTS` commas, lists and objects, outside of its texts."""
    if len(body) <= MOST_PARTS or sum(map(body.count, (b",", b"[", b"{"))) <= MOST_PARTS:
        return False
    return _TOO_MANY_PARTS.match(body) is not None


def check_parts(body: bytes) -> None:
    """Raises PayloadTooLarge for JSON that would become too much once it is parsed."""
    if has_too_many_parts(body):
        allowed = f"at most {MOST_PARTS} values"
        raise PayloadTooLarge("body", "the body holds too many values", allowed=allowed)


def parsed(body: bytes) -> dict[str, Any]:
    """The body as a JSON object; raises InvalidRequest and PayloadTooLarge."""
    check_parts(body)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as broken:
        raise InvalidRequest("body", f"the body is not JSON: {broken}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body", "the body is not a JSON object", allowed="a JSON object")
    return value


def asked_of(
    endpoint: Endpoint, body: Mapping[str, Any], whole: Mapping[str, Sized] = NOTHING_SHORTENED
) -> Asked:
    """What a request asks for; `whole` has the texts for which shorter ones stand in the body.
    Raises InvalidRequest where it names no model, or what can't be held to it."""
    check_spelling(body)
    check_ends(body)
    model = body.get("model") if endpoint.model is None else endpoint.model
    if model is None and _has_usual_model(endpoint, body):
        model = ""
    elif not isinstance(model, str) or not 1 <= len(model) <= 200:
        wrong = "model is missing" if model is None else "model is not the name of a model"
        raise InvalidRequest("model", wrong, allowed="a text of 1 to 200 characters")
    content = Content(endpoint.dialect, model, whole)
    content.over(body)
    settings = _settings(endpoint.dialect, body)
    images = _images(endpoint, model, body, settings)
    kind = Kind.MULTI_MODAL if content.files else Kind.TEXT_ONLY
    stream = body.get("stream")
    if stream is not None and type(stream) is not bool and endpoint.model is None:
        # Some servers take 1 or "yes" for true: they would stream what is not taken for a stream.
        raise InvalidRequest("stream", "stream is neither true nor false", allowed="true or false")
    streams = endpoint.streams or stream is True
    return Asked(
        model=model,
        kind=Kind.IMAGE_GENERATION if images else kind,
        streams=streams,
        images=images,
        pieces=content.pieces(endpoint.operation is Operation.INFER),
        max_output_tokens=_bound(settings, endpoint.operation),
        wants_usage=streams and _hides_usage(endpoint, body),
    )


def _has_usual_model(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Whether a call may leave the model to the provider: OpenAI has one for pictures, and a saved
    prompt names its own."""
    if endpoint.path == "/responses":
        return isinstance(body.get("prompt"), Mapping)
    return endpoint.path == "/images/generations"


def _settings(dialect: Dialect, body: Mapping[str, Any]) -> Mapping[str, Any]:
    if dialect is not Dialect.GEMINI:
        return body
    found = body.get("generationConfig", body.get("generation_config"))
    return found if isinstance(found, Mapping) else {}


def _images(
    endpoint: Endpoint, model: str, body: Mapping[str, Any], settings: Mapping[str, Any]
) -> int:
    """How many pictures the answer will hold; 0 where it is not asked for any."""
    if endpoint.operation is Operation.IMAGES:
        return _whole(body.get("n"), 1)
    if endpoint.operation is not Operation.INFER:
        return 0
    wanted = settings.get(
        "responseModalities", settings.get("response_modalities", body.get("modalities"))
    )
    if isinstance(wanted, list):
        return int(any(isinstance(one, str) and one.lower() == "image" for one in wanted))
    return int("-image" in model or _may_draw(endpoint, body))


def _may_draw(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Whether the model of a response may call the tool that makes pictures."""
    tools = body.get("tools")
    if endpoint.path != "/responses" or not isinstance(tools, list):
        return False
    return any(isinstance(one, Mapping) and one.get("type") == "image_generation" for one in tools)


def _bound(settings: Mapping[str, Any], operation: Operation) -> int | None:
    if operation is Operation.EMBED:
        return 1
    if _BOUNDS_NAMES.isdisjoint(settings):
        return None
    # Of several names the greatest: which of them counts is the upstream's choice.
    named = [value for name in _OUTPUT_BOUNDS if type(value := settings.get(name)) is int]
    bound = max(named, default=0)
    return bound * max(_answers(settings.get(name)) for name in _ANSWERS) if bound > 0 else None


def _answers(value: object) -> int:
    """How many answers are made, by a field that may say so."""
    return value if type(value) is int and value > 0 else 1


def _whole(value: object, usual: int) -> int:
    sound = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 100
    return value if sound and isinstance(value, int) else usual


def _hides_usage(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Chat completions stream no usage unless they are asked to. Of options that are none, or say
    neither yes nor no, the provider itself is to say so."""
    if endpoint.path not in ("/chat/completions", "/completions"):
        return False
    options = body.get("stream_options")
    if options is None:
        return True
    return isinstance(options, Mapping) and options.get("include_usage") in (None, False)
