"""What a native body asks for, as far as admission must know: model, kind, pieces, bounds. Pure.

One walk over the parsed body serves all dialects: every text counts as text, whatever field it is
in, and files are known by the few shapes that dialects give them. Invariant: a field that nobody
here knows never makes a request wrong; the body itself is passed on as it came.
"""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import orjson

from tidegate.call import Kind
from tidegate.demand.dimensions import dimensions
from tidegate.demand.pieces import (
    InputPieces,
    Learning,
    Modality,
    input_pieces,
    pieces_of_file,
    pieces_of_texts,
    unseen_file,
)
from tidegate.demand.rules import rules_of
from tidegate.errors import InvalidRequest, PayloadTooLarge
from tidegate.relay.hosted import ADDED_BY, ADDED_TOKENS, TOOLS, learning_of, tools_in
from tidegate.relay.paths import Dialect, Endpoint, Operation
from tidegate.relay.spelling import check_ends, check_spelling

# Enough to find a picture's size in, and a multiple of 4 characters.
HEAD_CHARS = 65_536
MOST_WALKED = 200_000
NOTHING_SHORTENED: Mapping[str, Sized] = {}
# Names of fields are not counted, but for those of a schema's properties, which the model reads,
# and those that would be a place to put a text.
_LONG_NAME_CHARS = 200
_FEW_WORDS_CHARS = 200  # a file's type, its name, how closely to look
# Of objects, lists and what stands in them: each costs many times its bytes once it is parsed, and
# the event loop stands still for it. A body of 80 MB could hold so many as to take 2 GB.
MOST_PARTS = 2_000_000
_TEXT = rb'"(?:[^"\\]++|\\.)*+"'
# Everything is taken for good: nothing is tried twice, nor remembered.
_TOO_MANY_PARTS = re.compile(
    rb'(?:[^",\[{]*+(?:%b[^",\[{]*+)*+[,\[{]){%d}+' % (_TEXT, MOST_PARTS + 1), re.DOTALL
)
_DATA_URL = re.compile(r"data:(?P<mime>[\w.+-]+/[\w.+-]+)?[^,]{0,100};base64,")
_INLINE_MIME = ("mimeType", "mime_type", "media_type")
_URI = ("fileUri", "file_uri", "file_id", "image_url", "url")
_OF_FILES = frozenset(("data", *_URI))
# What a provider has sealed for itself: no letters of it are a text.
_SEALED = frozenset(("signature", "thoughtSignature", "thought_signature", "encrypted_content"))
# Pictures in base64 and nothing beside, as Ollama takes them.
_PICTURES = "images"
_BESIDE_TEXTS = _OF_FILES | _SEALED | {_PICTURES}
_LOOKED_AT = _BESIDE_TEXTS | {"properties"}
_SEALED_TOKENS_A_LETTER = 0.25
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
    walk = _Walk(endpoint.dialect, model, whole)
    walk.over(body)
    settings = _settings(endpoint.dialect, body)
    images = _images(endpoint, model, body, settings)
    kind = Kind.MULTI_MODAL if walk.files else Kind.TEXT_ONLY
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
        pieces=walk.pieces(endpoint.operation is Operation.INFER),
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


def _beside(value: Mapping[str, Any], key: str) -> list[Any]:
    """What an object says beside its file: it is input too, but for the few words on the file."""
    return [
        one
        for name, one in value.items()
        if name != key and (type(one) is not str or len(one) > _FEW_WORDS_CHARS)
    ]


def _written(values: list[Any]) -> str:
    try:
        return orjson.dumps(values).decode()
    except orjson.JSONEncodeError:
        allowed = "at most 250 levels"
        raise InvalidRequest("body", "the body is nested too deeply", allowed=allowed) from None


def _decoded(head: str) -> bytes:
    try:
        return b64decode(head + "=" * (-len(head) % 4))
    except (NotBase64, ValueError):
        return b""


class _Walk:
    """Finds the texts and files of a body, without recursion: its depth is the client's choice."""

    def __init__(self, dialect: Dialect, model: str, whole: Mapping[str, Sized]) -> None:
        self.files = 0
        self._whole = whole
        self._dialect = dialect
        self._model = model
        self._texts: list[str] = []
        self._sealed_chars = 0
        self._pieces: dict[Modality, float] = {}
        self._numbers = 0
        self._values = 0
        self._tools = 0
        self._learning = Learning.TEXT

    def pieces(self, infers: bool) -> InputPieces:
        """`infers`: a model is asked, and the provider puts its own words around the request."""
        found = pieces_of_texts(self._texts)
        # An input that was cut into LLM tokens by the client; what is sealed.
        if more := self._numbers + self._sealed_chars * _SEALED_TOKENS_A_LETTER:
            found[Modality.LATIN] = found.get(Modality.LATIN, 0.0) + more
        for modality, tokens in self._pieces.items():
            found[modality] = found.get(modality, 0.0) + tokens
        content = found or {Modality.LATIN: 1.0}
        if not infers:
            return input_pieces(content)
        rules = rules_of(self._dialect, self._model)
        added = {Modality.CALL: rules.call}
        if self._tools:
            added[Modality.TOOLS] = rules.tools
        learning = self._learning
        if learning is not Learning.TEXT:
            added[ADDED_BY[learning]] = ADDED_TOKENS
        elif self.files:
            learning = Learning.FILES
        return input_pieces(content, added, learning, self._tools)

    def over(self, body: Mapping[str, Any]) -> None:
        tools = tools_in(body)
        self._learning = learning_of(self._dialect, body, tools)
        if tools:
            self._over(tools)
            self._tools = 1 + sum(map(len, self._texts))
            body = dict(body)
            for name in TOOLS:
                body.pop(name, None)
        self._over(list(body.values()))

    def _over(self, left: list[Any]) -> None:
        texts = self._texts
        for seen in range(self._values, MOST_WALKED):
            if not left:
                self._values = seen
                return
            value = left.pop()
            sort = type(value)  # of a parsed body: no subclasses
            if sort is str:
                if value[:5] == "data:":
                    self._url(value)
                else:
                    texts.append(str(self._whole.get(value, value)) if self._whole else value)
            elif sort is dict:
                if value and max(map(len, value)) > _LONG_NAME_CHARS:
                    texts += value
                if _LOOKED_AT.isdisjoint(value):
                    left += value.values()
                else:
                    self._object(value, left)
            elif sort is list:
                if value and type(value[0]) is int:
                    others = [one for one in value if type(one) is not int]
                    self._numbers += len(value) - len(others)
                    left += others
                else:
                    left += value
        self._values = MOST_WALKED
        if left:  # as much as nobody writes by hand: what is left counts as it would be written
            texts.append(_written(left))

    def _url(self, text: str) -> None:
        if (url := _DATA_URL.match(text)) is not None:
            self._file(url["mime"] or "application/octet-stream", text, url.end())
        else:
            self._texts.append(str(self._whole.get(text, text)))

    def _object(self, value: dict[str, Any], left: list[Any]) -> None:
        if "properties" in value and type(value["properties"]) is dict:
            self._texts += value["properties"]
        if _BESIDE_TEXTS.isdisjoint(value):
            left += value.values()
            return
        if not _SEALED.isdisjoint(value):
            value = self._unsealed(value)
        if _PICTURES in value and self._are_pictures(value[_PICTURES]):
            value = {name: one for name, one in value.items() if name != _PICTURES}
        if _OF_FILES.isdisjoint(value):
            left += value.values()
            return
        data = value.get("data")
        if isinstance(data, str):
            mime = next((value[key] for key in _INLINE_MIME if key in value), None)
            if mime is None and isinstance(value.get("format"), str):
                mime = f"audio/{value['format']}"
            if isinstance(mime, str):
                self._file(mime, data, 0)
                left += _beside(value, "data")
                return
        for key in _URI:
            uri = value.get(key)
            if isinstance(uri, str) and not uri.startswith("data:"):
                self._linked(value)
                left += _beside(value, key)
                return
        left += value.values()

    def _unsealed(self, value: dict[str, Any]) -> dict[str, Any]:
        sealed = [name for name in value if name in _SEALED and type(value[name]) is str]
        self._sealed_chars += sum(len(value[name]) for name in sealed)
        return {name: one for name, one in value.items() if name not in sealed}

    def _are_pictures(self, values: Any) -> bool:
        """Whether all begin as pictures do; if so they are counted."""
        if type(values) is not list or not all(type(one) is str for one in values):
            return False
        if not all(dimensions(_decoded(one[:HEAD_CHARS])) for one in values):
            return False
        for one in values:
            self._file("image/*", one, 0)
        return True

    def _file(self, mime: str, text: str, start: int) -> None:
        self.files += 1
        size_bytes = (len(self._whole.get(text, text)) - start) * 3 // 4
        decoded = _decoded(text[start : start + HEAD_CHARS])
        rules = rules_of(self._dialect, self._model)
        self._add(pieces_of_file(mime, decoded, size_bytes, rules))

    def _linked(self, value: dict[str, Any]) -> None:
        """A file that is somewhere else: its sort is known, its size is not."""
        self.files += 1
        mime = next((value[key] for key in _INLINE_MIME if isinstance(value.get(key), str)), None)
        is_picture = "image_url" in value or "url" in value
        rules = rules_of(self._dialect, self._model)
        self._add(unseen_file(mime or ("image/*" if is_picture else "application/pdf"), rules))

    def _add(self, pieces: Mapping[Modality, float]) -> None:
        for modality, tokens in pieces.items():
            self._pieces[modality] = self._pieces.get(modality, 0.0) + tokens
