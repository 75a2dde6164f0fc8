"""Request facts for admission: model, kind, input pieces and bounds of a native body. Pure.

One walk over the parsed body serves all dialects: every string counts as text, and files are
recognised by the few shapes that the dialects use, only where a provider accepts files. Tools that
a provider runs, and state that it keeps, select a separate track of the estimator.

Invariants: an unknown field never makes a request invalid; the body is forwarded unchanged; a body
that names an admission field twice, or in another case, is rejected, because JSON parsers disagree
on its meaning.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Callable, Mapping, Sized
from functools import partial
from itertools import islice
from math import ceil
from typing import Any

import orjson

from tidegate.admission.charges import CacheWrite
from tidegate.admission.estimator import (
    InputPieces,
    Learning,
    Modality,
    Rules,
    dimensions,
    input_pieces,
    pieces_of_file,
    pieces_of_texts,
    unseen_file,
)
from tidegate.call import Kind
from tidegate.dialects.parsing import (
    HEAD_CHARS,
    LARGE_BYTES,
    MARK,
    MOST_WALKED,
    NOTHING_SHORTENED,
    count_in,
    holds,
)
from tidegate.dialects.resources import has_escaped_key
from tidegate.dialects.spec import (
    WITHOUT_OUTPUT,
    Dialect,
    Endpoint,
    JsonObject,
    Operation,
    RequestFacts,
    whole_in,
)
from tidegate.errors import InvalidRequest
from tidegate.prices.rates import STANDARD_TIERS
from tidegate.record import PROMPT_HEAD_CHARS

TOOLS = frozenset(("tools", "functions"))
# A page that a tool finds has about 2,500 tokens (platform.claude.com/docs/en/agents-and-tools/
# tool-use/web-fetch-tool); state that a provider keeps is assumed to have at least as many.
ADDED_TOKENS = 2_500.0
ADDED_BY = {Learning.HOSTED: Modality.HOSTED, Learning.STATE: Modality.STATE}
_MOST_TOOLS = 1_000  # no provider accepts as many
_OWN = frozenset(("function", "custom", "namespace"))
_HOSTED = frozenset(
    ("web_search_options", "search_parameters", "search_settings", "plugins", "mcp_servers")
)
_STATE = frozenset(
    (
        *("previous_response_id", "conversation", "cachedContent", "cached_content"),
        *("context_management", "container", "previous_interaction_id", "environment"),
        "previousInteractionId",
    )
)
_TELLING = TOOLS | _HOSTED | _STATE | {"prompt"}


def tools_in(body: Mapping[str, Any]) -> list[Any]:
    """Return all tools that a request names."""
    if TOOLS.isdisjoint(body):
        return []
    found: list[Any] = []
    for name in TOOLS:
        some = body.get(name)
        if some:
            found += some if type(some) is list else (some,)
    return found


def learning_of(
    body: Mapping[str, Any], tools: list[Any], is_hosted: Callable[[JsonObject], bool]
) -> Learning:
    """Return the estimator's track of a request, if it has no files."""
    if _TELLING.isdisjoint(body):
        return Learning.TEXT
    for tool in islice(tools, _MOST_TOOLS):
        if type(tool) is dict and is_hosted(tool):
            return Learning.HOSTED
    if not _HOSTED.isdisjoint(body) and any(map(body.get, _HOSTED)):
        return Learning.HOSTED
    if not _STATE.isdisjoint(body) and any(map(body.get, _STATE)):
        return Learning.STATE
    # A prompt that is an object is stored at the provider.
    return Learning.STATE if type(body.get("prompt")) is dict else Learning.TEXT


def is_hosted_tool(tool: JsonObject) -> bool:
    """Return whether the provider runs a tool, by the declarations of OpenAI and Anthropic."""
    kind = tool.get("type")
    return type(kind) is str and kind not in _OWN


# Names of fields do not count, except the properties of a schema, which the model reads, and names
# that are long enough to hide a text.
_LONG_NAME_CHARS = 200
_FEW_WORDS_CHARS = 200  # longest type, name or detail level of a file
_DATA_URL = re.compile(r"data:(?P<mime>[\w.+-]+/[\w.+-]+)?[^,]{0,100};base64,")
_INLINE_MIME = ("mimeType", "mime_type", "media_type")
_URI = ("fileUri", "file_uri", "file_id", "image_url", "url", "uri")
_LINKED = ("image", "audio", "video", "document")  # contents of an interaction
_OF_FILES = frozenset(("data", *_URI))
# Fields in which a file may be a data URL; elsewhere a data URL is plain text.
_OF_URLS = frozenset(
    (
        *("url", "image_url", "video_url", "audio_url", "file_url", "document_url", "file_data"),
        *("data", "fileUri", "file_uri", "uri", "image", "images", "mask", "input_audio"),
    )
)
# Arguments and results of functions, and schemas: a model reads all of them as text.
_AS_TEXT = frozenset(
    (
        *("input", "args", "arguments", "response", "parameters", "parametersJsonSchema"),
        *("parameters_json_schema", "input_schema", "inputSchema", "json_schema", "schema"),
        *("responseSchema", "response_schema", "responseJsonSchema", "response_json_schema"),
    )
)
# Fields that only the provider can read: their characters are not text.
_SEALED = frozenset(("signature", "thoughtSignature", "thought_signature", "encrypted_content"))
# A list of pictures in base64, as Ollama takes them.
_PICTURES = "images"
# Audio as base64 or a URL, as Mistral takes it; OpenAI's is an object.
_SOUND = "input_audio"
_BESIDE_TEXTS = _OF_FILES | _SEALED | {_PICTURES, _SOUND}
_LOOKED_AT = _BESIDE_TEXTS | _OF_URLS | _AS_TEXT | {"properties"}
_SEALED_TOKENS_A_LETTER = 0.25


def _other_values(value: Mapping[str, Any], key: str) -> list[Any]:
    """Return the values beside an object's file: input too, except short texts about the file."""
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


class Content:
    """Collects the texts and files of a body, without recursion: the client chooses its depth."""

    def __init__(
        self, rules: Rules, is_hosted: Callable[[JsonObject], bool], whole: Mapping[str, Sized]
    ) -> None:
        self.files = 0
        self._whole = whole
        self._rules = rules
        self._is_hosted = is_hosted
        self._texts: list[str] = []
        self._plain: list[Any] = []
        self._sealed_chars = 0
        self._pieces: dict[Modality, float] = {}
        self._numbers = 0
        self._values = 0
        self._tools = 0
        self._learning = Learning.TEXT

    def pieces(self, infers: bool) -> InputPieces:
        """Return the pieces of the input. infers: a model runs, whose overhead is added."""
        found = pieces_of_texts(self._texts)
        # Input that the client has tokenized; sealed fields.
        if more := self._numbers + self._sealed_chars * _SEALED_TOKENS_A_LETTER:
            found[Modality.LATIN] = found.get(Modality.LATIN, 0.0) + more
        for modality, tokens in self._pieces.items():
            found[modality] = found.get(modality, 0.0) + tokens
        content = found or {Modality.LATIN: 1.0}
        if not infers:
            return input_pieces(content)
        added = {Modality.CALL: self._rules.call}
        if self._tools:
            added[Modality.TOOLS] = self._rules.tools
        learning = self._learning
        if learning is not Learning.TEXT:
            added[ADDED_BY[learning]] = ADDED_TOKENS
        elif self.files:
            learning = Learning.FILES
        return input_pieces(content, added, learning, self._tools)

    @property
    def audio_seconds(self) -> int:
        """Return the estimated length of all recordings."""
        tokens = self._pieces.get(Modality.AUDIO) if self.files else None
        return ceil(tokens / self._rules.audio_second) if tokens else 0

    def over(self, body: Mapping[str, Any]) -> None:
        tools = tools_in(body)
        self._learning = learning_of(body, tools, self._is_hosted)
        if tools:
            self._over(tools)
            self._tools = 1 + sum(map(len, self._texts))
        body = dict(body)
        for name in TOOLS:
            body.pop(name, None)
        self._take_urls(body)
        self._over(list(body.values()))

    def _over(self, left: list[Any]) -> None:
        """Count the files, then everything that is text in any form."""
        self._walk(left, self._object)
        self._walk(self._plain, self._values_of)
        self._plain = []

    def _walk(self, left: list[Any], over_object: Callable[[JsonObject, list[Any]], None]) -> None:
        texts = self._texts
        for count in range(self._values, MOST_WALKED):
            if not left:
                self._values = count
                return
            value = left.pop()
            sort = type(value)  # values of a parsed body are never subclasses
            if sort is str:
                texts.append(str(self._whole.get(value, value)) if self._whole else value)
            elif sort is dict:
                if value and max(map(len, value)) > _LONG_NAME_CHARS:
                    texts += value
                if _LOOKED_AT.isdisjoint(value):
                    left += value.values()
                else:
                    over_object(value, left)
            elif sort is list:
                if value and type(value[0]) is int:
                    others = [one for one in value if type(one) is not int]
                    self._numbers += len(value) - len(others)
                    left += others
                else:
                    left += value
        self._values = MOST_WALKED
        if left:  # beyond any usual size: the rest counts as its JSON text
            texts.append(_written(left))

    def _values_of(self, value: JsonObject, left: list[Any]) -> None:
        """Collect the values of an object that is text, and the names in a schema."""
        if type(names := value.get("properties")) is dict:
            self._texts += names
        left += value.values()

    def _take_urls(self, value: JsonObject) -> None:
        """Count the files that an object holds as data URLs, and remove them from it."""
        for key in _OF_URLS.intersection(value):
            held = value[key]
            if type(held) is str:
                if self._is_file(held):
                    del value[key]
            elif type(held) is list:
                value[key] = [one for one in held if not self._is_file(one)]

    def _is_file(self, value: Any) -> bool:
        """Return whether a value is a file in a data URL, and count it if so."""
        if type(value) is not str or (url := _DATA_URL.match(value)) is None:
            return False
        self._file(url["mime"] or "application/octet-stream", value, url.end())
        return True

    def _object(self, value: JsonObject, left: list[Any]) -> None:
        if type(names := value.get("properties")) is dict:
            self._texts += names
        if not _AS_TEXT.isdisjoint(value):
            value = dict(value)
            for key in _AS_TEXT.intersection(value):
                if type(value[key]) is dict:
                    self._plain.append(value.pop(key))
        if not _OF_URLS.isdisjoint(value):
            value = dict(value)
            self._take_urls(value)
        if _BESIDE_TEXTS.isdisjoint(value):
            left += value.values()
            return
        if not _SEALED.isdisjoint(value):
            value = self._unsealed(value)
        if _PICTURES in value and self._are_pictures(value[_PICTURES]):
            value = {name: one for name, one in value.items() if name != _PICTURES}
        if type(sound := value.get(_SOUND)) is str:
            self._take_sound(sound)
            value = {name: one for name, one in value.items() if name != _SOUND}
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
                left += _other_values(value, "data")
                return
        for key in _URI:
            uri = value.get(key)
            if key == "uri" and value.get("type") not in _LINKED:
                continue  # a source that was read, not a file
            if isinstance(uri, str) and not uri.startswith("data:"):
                self._linked(value)
                left += _other_values(value, key)
                return
        left += value.values()

    def _unsealed(self, value: JsonObject) -> JsonObject:
        sealed = [name for name in value if name in _SEALED and type(value[name]) is str]
        self._sealed_chars += sum(len(value[name]) for name in sealed)
        return {name: one for name, one in value.items() if name not in sealed}

    def _take_sound(self, sound: str) -> None:
        if sound.startswith(("https:", "http:")):
            self.files += 1
            self._add(unseen_file("audio/*", self._rules))
        else:
            self._file("audio/*", sound, 0)

    def _are_pictures(self, values: Any) -> bool:
        """Return whether all values begin as pictures do, and count them if so."""
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
        self._add(pieces_of_file(mime, decoded, size_bytes, self._rules))

    def _linked(self, value: JsonObject) -> None:
        """Count a file that is stored elsewhere: its type is known, its size is not."""
        self.files += 1
        mime = next((value[key] for key in _INLINE_MIME if isinstance(value.get(key), str)), None)
        is_picture = "image_url" in value or "url" in value
        usual = "image/*" if is_picture else "application/pdf"
        self._add(unseen_file(mime or usual, self._rules))

    def _add(self, pieces: Mapping[Modality, float]) -> None:
        for modality, tokens in pieces.items():
            self._pieces[modality] = self._pieces.get(modality, 0.0) + tokens


_READ = frozenset(
    (
        *("model", "models", "stream", "stream_options", "background", "deferred", "n"),
        *("max_tokens", "max_completion_tokens", "max_output_tokens", "service_tier", "tools"),
        *("generationConfig", "generation_config", "agent", "previous_interaction_id"),
        *("cachedContent", "cached_content"),
        *("store", "previous_response_id", "conversation", "serviceTier", "speed", "inference_geo"),
    )
)
_SAME_FIELDS = (("generationConfig", "generation_config"), ("serviceTier", "service_tier"))
_WRITTEN = {name: b'"%b"' % name.encode() for name in _READ}
# Go's parser also folds letters beyond ASCII: a long s equals an s.
_FOLDED = {name.casefold(): name for name in _READ}
# Fields that request work which continues after the answer: OpenAI's, and xAI's.
_GO_ON = ("background", "deferred")
_GOING_ON = frozenset(_GO_ON)
_BACKGROUNDS = ("transparent", "opaque", "auto")  # a picture's: a field of the same name
_DEFERRED = (Dialect.OPENAI, "/chat/completions")
_IN_BACKGROUND = {
    Dialect.OPENAI: ("/responses",),
    Dialect.GEMINI: tuple(f"/{version}/interactions" for version in ("v1", "v1beta", "v1alpha")),
}


def admission_field(name: str) -> str | None:
    """Return the admission field that `name` is in some spelling; None for any other name."""
    return _FOLDED.get(name.casefold())


def check_spelling(body: Mapping[str, Any]) -> None:
    """Raise InvalidRequest if a field is written in another case."""
    for key in body:
        if key not in _READ and (name := _FOLDED.get(key.casefold())) is not None:
            message = f"{key[:64]!a} is {name} in another case, which servers read differently"
            raise InvalidRequest(name, message, allowed=name)
    for name, other in _SAME_FIELDS:
        if name in body and other in body:
            raise InvalidRequest(name, f"{name} is named more than once", allowed=f"one {name}")


def check_named_once(raw: bytes, body: Mapping[str, Any]) -> None:
    """Raise InvalidRequest if the outermost object of `raw`, parsed as `body`, has a field
    twice."""
    # Checking each key is slow: for nearly all bodies, counting their names is enough.
    counted = raw.count if len(raw) <= LARGE_BYTES else partial(count_in, raw)
    for key in body:
        if (needle := _WRITTEN.get(key)) is not None and counted(needle) > 1:
            break
    else:
        is_plain = len(raw) <= LARGE_BYTES and raw.find(b"\\u00") < 0  # the usual case
        if is_plain or not has_escaped_key(raw):
            return
    outermost: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        outermost[:] = [name for name, _ in pairs]  # the outermost object ends last

    try:
        json.loads(raw, object_pairs_hook=note, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "the body is nested too deeply") from None
    for name in _READ:
        if outermost.count(name) > 1:
            raise InvalidRequest(name, f"{name} is named more than once", allowed=f"one {name}")


def runs_in_background(endpoint: Endpoint, body: Mapping[str, Any]) -> bool:
    """Return whether a response, an interaction or a completion of xAI's runs in the background,
    where a worker follows it. Raises InvalidRequest for other work that continues after its answer:
    it would hold no permit and be charged to no tenant."""
    if _GOING_ON.isdisjoint(body):
        return False
    paths = _IN_BACKGROUND.get(endpoint.dialect, ())
    if body.get("background") is True and endpoint.path in paths:
        refuse_to_go_on(body, "deferred")
        return True
    if endpoint.path in paths and type(body.get("background")) not in (bool, type(None)):
        message = "background is neither true nor false"
        raise InvalidRequest("background", message, allowed="true or false")
    if body.get("deferred") is True and (endpoint.dialect, endpoint.path) == _DEFERRED:
        refuse_to_go_on(body, "background")
        if body.get("stream") not in (None, False):
            raise InvalidRequest("stream", "a deferred completion can't stream", allowed="false")
        return True
    is_pictures = endpoint.operation is Operation.IMAGES and body.get("background") in _BACKGROUNDS
    refuse_to_go_on(body, *(("deferred",) if is_pictures else ()))
    return False


def refuse_to_go_on(body: Mapping[str, Any], *names: str) -> None:
    """Raise InvalidRequest if one of these fields (by default of all) starts such work."""
    for name in names or _GO_ON:
        if body.get(name) not in (None, False):
            raise InvalidRequest(
                name,
                f"{name} starts work that continues after its answer, outside every limit and "
                "budget, and is not supported; submit it as a job or in a batch instead",
                allowed="false",
            )


# `"model":` in any case, with any escapes.
NAMES_MODEL = re.compile(
    rb'"(?:m|\\u00[46]d)(?:o|\\u00[46]f)(?:d|\\u00[46]4)(?:e|\\u00[46]5)(?:l|\\u00[46]c)"\s*:',
    re.IGNORECASE,
)
_OUTPUT_BOUNDS = ("max_completion_tokens", "max_output_tokens", "max_tokens", "maxOutputTokens")
_BOUNDS_NAMES = frozenset(_OUTPUT_BOUNDS)
# Each answer is as long as the bound and is charged; of `best_of` one is returned.
_ANSWERS = ("n", "best_of", "candidateCount", "candidate_count")


def request_facts(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    whole: Mapping[str, Sized] = NOTHING_SHORTENED,
    *,
    rules_of: Callable[[str], Rules],
    is_hosted: Callable[[JsonObject], bool] = is_hosted_tool,
    settings: Mapping[str, Any] | None = None,
    has_default_model: bool = False,
    may_draw: bool = False,
    hides_usage: bool = False,
) -> RequestFacts:
    """Return the facts of a request in any dialect.

    rules_of: token counts of a model's files. settings: the object with bounds and modalities, by
    default the body itself. has_default_model: the provider chooses a model if none is named.
    may_draw: the model has a tool that generates images. hides_usage: a stream reports its usage
    only on request. Raises InvalidRequest for a request that names no model, or to which limits
    cannot be applied.
    """
    check_spelling(body)
    in_background = runs_in_background(endpoint, body)
    model = body.get("model") if endpoint.model is None else endpoint.model
    if model is None and has_default_model:
        model = ""
    elif not isinstance(model, str) or not 1 <= len(model) <= 200:
        message = "model is missing" if model is None else "model is not the name of a model"
        raise InvalidRequest("model", message, allowed="a text of 1 to 200 characters")
    content = Content(rules_of(model), is_hosted, whole)
    content.over(body)
    settings = body if settings is None else settings
    images = _images(endpoint, model, body, settings, may_draw)
    kind = Kind.MULTI_MODAL if content.files else Kind.TEXT_ONLY
    stream = body.get("stream")
    if stream is not None and type(stream) is not bool and not endpoint.model_in_path:
        # Some servers take 1 or "yes" for true: they would stream an answer handled as whole.
        raise InvalidRequest("stream", "stream is neither true nor false", allowed="true or false")
    streams = endpoint.streams or stream is True
    return RequestFacts(
        model=model,
        kind=Kind.IMAGE_GENERATION if images else kind,
        streams=streams,
        images=images,
        pieces=content.pieces(endpoint.operation is Operation.INFER),
        max_output_tokens=_bound(settings, endpoint.operation),
        runs_in_background=in_background,
        wants_usage=streams and hides_usage,
        audio_seconds=content.audio_seconds,
        characters=_characters(body) if endpoint.operation is Operation.SPEAK else 0,
        prompt_head=prompt_head(body),
    )


_MOST_TURNS = 20
_PROMPTS = ("messages", "input", "contents", "prompt", "query")


def prompt_head(body: Mapping[str, Any]) -> str:
    """Return the beginning of the user's last text, in any dialect: earlier texts are common to all
    calls of a conversation. Empty if the last messages have none, as after results of tools."""
    for name in _PROMPTS:
        content = body.get(name)
        if type(content) is str:
            return content[:PROMPT_HEAD_CHARS]
        if type(content) is list:
            for turn in content[: -_MOST_TURNS - 1 : -1]:
                if head := _head_of(turn):
                    return head
            return ""
    return ""


def _head_of(turn: Any) -> str:
    """Return the beginning of a message's text, if it is the user's."""
    if type(turn) is str:
        return turn[:PROMPT_HEAD_CHARS]
    if type(turn) is not dict or turn.get("role", "user") != "user":
        return ""
    content = turn.get("content", turn.get("parts"))
    if type(content) is str:
        return content[:PROMPT_HEAD_CHARS]
    if type(content) is not list:
        return ""
    texts = (part.get("text") for part in content[:_MOST_TURNS] if type(part) is dict)
    return "\n".join(text[:PROMPT_HEAD_CHARS] for text in texts if type(text) is str)[
        :PROMPT_HEAD_CHARS
    ]


def _characters(body: Mapping[str, Any]) -> int:
    """Return the number of characters that a request wants spoken."""
    text = body.get("input")
    return len(text) if type(text) is str else 0


def cache_write_of(raw: bytes, body: Mapping[str, Any]) -> CacheWrite | None:
    """Return the cache to which a request, parsed as `body`, has its input written, or None. The
    write is charged also if the client disconnects before the usage is reported."""
    if len(raw) > LARGE_BYTES:
        return _cache_write_in(body) if holds(raw, *_CACHE_WRITES) else None
    if max(map(raw.find, _CACHE_WRITES)) < 0:  # the usual case
        return None
    try:
        text = orjson.dumps(body)  # without escapes in names
    except orjson.JSONEncodeError:  # nested too deeply to serialize
        return "1h"
    if b'"cache_control":' not in text and b'"cachePoint":' not in text:
        return None
    return "1h" if b'"ttl":"1h"' in text else "5m"


def _cache_write_in(body: Mapping[str, Any]) -> CacheWrite | None:
    """Return the cache that a large body names, which is not serialized again in one step."""
    is_named = is_long = False
    left: list[Any] = [body]
    while left:
        value = left.pop()
        if type(value) is dict:
            is_named = is_named or not _CACHES.isdisjoint(value)
            is_long = is_long or value.get("ttl") == "1h"
            value = value.values()
        left += [one for one in value if type(one) in (dict, list)]
    if not is_named:
        return None
    return "1h" if is_long else "5m"


_CACHES = frozenset(("cache_control", "cachePoint"))
_CACHE_WRITES = (b"cache_control", b"cachePoint", b"\\u00")
_OPENINGS = ("tools", "system", "instructions", "systemInstruction", "system_instruction")
_TURNS = ("messages", "input", "contents")


def conversation_of(body: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return two digests of what a conversation's calls share, valid in this process: of the tools
    and the system prompt, and of these with the first user message. None without messages, or if
    they are nested too deeply to serialize."""
    if (parts := _opening(body)) is None:
        return None
    opening = hash(parts[0])
    return opening, hash((opening, parts[1]))


def opening_of(body: Mapping[str, Any]) -> bytes:
    """Return the beginning that a conversation's calls share, as text that is equal in all
    processes; empty without messages, or if they are nested too deeply to serialize."""
    if (parts := _opening(body)) is not None:
        return b"\n".join(parts).replace(MARK, b"")
    text = body.get("input")
    if not isinstance(text, str):
        return b""
    try:
        return orjson.dumps([*map(body.get, _OPENINGS), text])
    except orjson.JSONEncodeError:
        return b""


def _opening(body: Mapping[str, Any]) -> tuple[bytes, bytes] | None:
    turns: Any = None
    for name in _TURNS:
        if type(turns := body.get(name)) is list:
            break
    if not turns or type(turns) is not list:
        return None
    systems, first = [], turns[-1]
    for turn in turns:
        if type(turn) is not dict or turn.get("role") not in ("system", "developer"):
            first = turn
            break
        systems.append(turn)
    try:
        return orjson.dumps([*map(body.get, _OPENINGS), systems]), orjson.dumps(first)
    except orjson.JSONEncodeError:  # nested too deeply to serialize
        return None


def _images(
    endpoint: Endpoint,
    model: str,
    body: Mapping[str, Any],
    settings: Mapping[str, Any],
    may_draw: bool,
) -> int:
    """Return how many images the answer holds; 0 if none is requested."""
    if endpoint.operation is Operation.IMAGES:
        return min(_answers(body.get("n")), _MOST_IMAGES)
    if endpoint.operation is not Operation.INFER:
        return 0
    modalities = settings.get(
        "responseModalities", settings.get("response_modalities", body.get("modalities"))
    )
    if isinstance(modalities, list):
        return int(any(isinstance(one, str) and one.lower() == "image" for one in modalities))
    return int("-image" in model or may_draw)


def _bound(settings: Mapping[str, Any], operation: Operation) -> int | None:
    if operation in WITHOUT_OUTPUT:
        return 1
    if _BOUNDS_NAMES.isdisjoint(settings):
        return None
    # Of several names the largest counts: the upstream chooses which one it reads.
    bounds = [value for name in _OUTPUT_BOUNDS if (value := settings.get(name)) is not None]
    named = [bound for value in bounds if (bound := whole_in(value)) is not None]
    if len(named) < len(bounds) or max(named, default=0) < 1:
        return None
    return max(named) * max(_answers(settings.get(name)) for name in _ANSWERS)


def _answers(value: object) -> int:
    """Return the number of answers that a field requests."""
    return max(1, whole_in(value) or 1)


_MOST_IMAGES = 10_000


_TIERS = ("service_tier", "serviceTier")
LONGEST_TIER = 40


def requested_tier(body: Mapping[str, Any]) -> str:
    """Return the requested processing tier, by its name in any dialect; empty for none."""
    named = (body.get(name) for name in _TIERS)
    short = (one for one in named if type(one) is str and len(one) <= LONGEST_TIER)
    return next(short, "").lower()


def names_tier(body: Mapping[str, Any]) -> bool:
    """Return whether a body requests a processing tier other than the usual one."""
    return requested_tier(body) not in STANDARD_TIERS


def in_tier(body: bytes, dialect: Dialect, tier: str) -> bytes:
    """Return the body of a call with a processing tier requested."""
    fields = {name: value for name, value in orjson.loads(body).items() if name not in _TIERS}
    if dialect is Dialect.BEDROCK:
        return orjson.dumps({**fields, "serviceTier": {"type": tier}})
    name = "serviceTier" if dialect is Dialect.GEMINI else "service_tier"
    return orjson.dumps({**fields, name: tier})
