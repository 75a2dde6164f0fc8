"""What of a native body is input: its texts and files, and a first guess of their LLM tokens. Pure.

One walk over the parsed body serves all dialects: every text counts as text, whatever field it is
in, and files are known by the few shapes that dialects give them. Invariant: a file is one where a
provider takes files, and nowhere else, so that no text is counted as the file that it looks like.
"""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Callable, Mapping, Sized
from typing import Any

import orjson

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
from tidegate.errors import InvalidRequest
from tidegate.relay.hosted import ADDED_BY, ADDED_TOKENS, TOOLS, learning_of, tools_in
from tidegate.relay.paths import Dialect

# Enough to find a picture's size in, and a multiple of 4 characters.
HEAD_CHARS = 65_536
MOST_WALKED = 200_000
NOTHING_SHORTENED: Mapping[str, Sized] = {}
# Names of fields are not counted, but for those of a schema's properties, which the model reads,
# and those that would be a place to put a text.
_LONG_NAME_CHARS = 200
_FEW_WORDS_CHARS = 200  # a file's type, its name, how closely to look
_DATA_URL = re.compile(r"data:(?P<mime>[\w.+-]+/[\w.+-]+)?[^,]{0,100};base64,")
_INLINE_MIME = ("mimeType", "mime_type", "media_type")
_URI = ("fileUri", "file_uri", "file_id", "image_url", "url")
_OF_FILES = frozenset(("data", *_URI))
# Where a file is given as a data URL; elsewhere what looks like one is a text.
_OF_URLS = frozenset(
    (
        *("url", "image_url", "video_url", "audio_url", "file_url", "document_url", "file_data"),
        *("data", "fileUri", "file_uri", "uri", "image", "images", "mask"),
    )
)
# Arguments and answers of functions, and schemas: a model reads all of them as text.
_AS_TEXT = frozenset(
    (
        *("input", "args", "arguments", "response", "parameters", "parametersJsonSchema"),
        *("parameters_json_schema", "input_schema", "inputSchema", "json_schema", "schema"),
        *("responseSchema", "response_schema", "responseJsonSchema", "response_json_schema"),
    )
)
# What a provider has sealed for itself: no letters of it are a text.
_SEALED = frozenset(("signature", "thoughtSignature", "thought_signature", "encrypted_content"))
# Pictures in base64 and nothing beside, as Ollama takes them.
_PICTURES = "images"
_BESIDE_TEXTS = _OF_FILES | _SEALED | {_PICTURES}
_LOOKED_AT = _BESIDE_TEXTS | _OF_URLS | _AS_TEXT | {"properties"}
_SEALED_TOKENS_A_LETTER = 0.25


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


class Content:
    """Finds the texts and files of a body, without recursion: its depth is the client's choice."""

    def __init__(self, dialect: Dialect, model: str, whole: Mapping[str, Sized]) -> None:
        self.files = 0
        self._whole = whole
        self._dialect = dialect
        self._model = model
        self._texts: list[str] = []
        self._plain: list[Any] = []
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
        self._take_urls(body)
        self._over(list(body.values()))

    def _over(self, left: list[Any]) -> None:
        """Files too; then what is text in whatever it is written."""
        self._walk(left, self._object)
        self._walk(self._plain, self._values_of)
        self._plain = []

    def _walk(
        self, left: list[Any], over_object: Callable[[dict[str, Any], list[Any]], None]
    ) -> None:
        texts = self._texts
        for seen in range(self._values, MOST_WALKED):
            if not left:
                self._values = seen
                return
            value = left.pop()
            sort = type(value)  # of a parsed body: no subclasses
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
        if left:  # as much as nobody writes by hand: what is left counts as it would be written
            texts.append(_written(left))

    def _values_of(self, value: dict[str, Any], left: list[Any]) -> None:
        """Of an object that is text; the names in a schema are text too."""
        if type(names := value.get("properties")) is dict:
            self._texts += names
        left += value.values()

    def _take_urls(self, value: dict[str, Any]) -> None:
        """Count the files that an object holds as data URLs, and take them out of it."""
        for key in _OF_URLS.intersection(value):
            held = value[key]
            if type(held) is str:
                if self._is_file(held):
                    del value[key]
            elif type(held) is list:
                value[key] = [one for one in held if not self._is_file(one)]

    def _is_file(self, value: Any) -> bool:
        """Whether it is a file in a data URL; if so it is counted."""
        if type(value) is not str or (url := _DATA_URL.match(value)) is None:
            return False
        self._file(url["mime"] or "application/octet-stream", value, url.end())
        return True

    def _object(self, value: dict[str, Any], left: list[Any]) -> None:
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
