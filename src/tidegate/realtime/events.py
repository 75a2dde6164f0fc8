"""Events of realtime sessions: what client messages request, and what providers report.

OpenAI's Realtime API and Gemini Live have one JSON object per message. A provider's usage is at a
known place in it: `response.usage` of `response.done`, `usage` of a completed transcription,
`usageMetadata` beside Gemini's content. The usage of a turn covers the whole context, so that the
usage of a session is the sum over its turns.

Invariants: usage is never read from a client's message, and a count that is too large is ignored; a
client's message that two servers could read differently (a repeated name, or one in another case)
is rejected; the model of a session never changes. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Protocol

import orjson

from tidegate.call import Caller, Usage, UsageDetails
from tidegate.dialects import DIALECTS
from tidegate.dialects.answers import MOST_TOKENS
from tidegate.dialects.parsing import has_too_many_parts
from tidegate.dialects.resources import Reference, early_text
from tidegate.errors import Forbidden, InvalidRequest

Message = str | bytes
Facts = dict[str, Any]

# Tokens of a second of audio: of OpenAI's input and output, and of Gemini's (25 or 32, by model).
_IN_TOKENS, _OUT_TOKENS, _GEMINI_TOKENS = 10, 20, 25
# Characters of base64 in a second of 16-bit PCM at 24 kHz, in which both answer.
_AUDIO_SECOND_CHARS = 64_000
_OUT_CHARS = _AUDIO_SECOND_CHARS / _OUT_TOKENS
_GEMINI_OUT_CHARS = _AUDIO_SECOND_CHARS / _GEMINI_TOKENS
_TEXT_CHARS = 4

# Bytes of a second of audio: of 16-bit PCM at 24 kHz, OpenAI's default, and of telephone formats.
# At Gemini each piece names its rate, by default 16 kHz.
_PCM_BYTES, _TELEPHONE_BYTES = 48_000, 8_000
_MOST_REQUESTED = 64
_TELEPHONE = re.compile(r"g711|pcm[ua]", re.IGNORECASE)
_RATE = re.compile(r"rate\s*=\s*(\d{1,6})", re.IGNORECASE)
_USUAL_RATE, _MOST_RATE = 16_000, 48_000


@dataclass(frozen=True, slots=True)
class ClientEvent:
    """A request in a client's message.

    message: as it is forwarded. begins_turn: the provider answers it with a turn. about_tokens:
    estimate of its input. audio_seconds: of audio in it. joins: it may be answered together with
    input that came before the turn began. continues: a turn in progress waits for it. event_id: the
    id of it that errors name, if any.
    """

    message: Message
    begins_turn: bool = False
    about_tokens: float = 0.0
    audio_seconds: float = 0.0
    joins: bool = False
    continues: bool = False
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """Usage that a provider reports. model: the model that used it, if not the session's.
    ends_turn: it is the usage of a turn."""

    usage: Usage
    model: str | None = None
    ends_turn: bool = True


@dataclass(slots=True)
class Reported:
    """The report in a provider's message. refuses: it rejects a client's message, which begins no
    turn; `about` is the id of that message, None if the provider does not name it. shown: the
    message as the client gets it, if it differs."""

    begins_turn: bool = False
    refuses: bool = False
    about: str | None = None
    ends_turn: bool = False
    spent: list[Spent] = field(default_factory=list)
    about_tokens: float = 0.0  # estimate of its output
    model: str | None = None  # of the session
    shown: Message | None = None


NOTHING = Reported()


class Events(Protocol):
    """Parser of the events of a session in its dialect."""

    def client_event(self, message: Message, found: Facts | None = None) -> ClientEvent:
        """Return the request in a client's message, which has been read as `found` if that is
        given. Raises InvalidRequest and Forbidden for a message that is not forwarded."""

    def reported(self, message: Message) -> Reported:
        """Return the report in a provider's message; most have none."""


# Names that decide the meaning of a message; a lenient server would read them in any case.
_NAMES = frozenset(("type", "session", "response", "model", "transcription", "setup"))
_FORMS = "one JSON object, each of its names once and in lower case"
# Values and keys in a message: the tools of a session have some thousands.
MOST_PARTS = 50_000
_HEAD_CHARS = 65_536


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> Facts:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidRequest("message", "a message has a name twice", allowed=_FORMS)
    for name in found:
        if name not in _NAMES and name.lower() in _NAMES:
            reason = f"a message names {name[:40]!a} in upper case"
            raise InvalidRequest("message", reason, allowed=_FORMS)
    return found


def read(message: Message) -> Facts:
    """Return the object of a client's message. Raises InvalidRequest."""
    raw = message.encode("utf-8", "replace") if isinstance(message, str) else message
    if has_too_many_parts(raw, MOST_PARTS):
        allowed = f"at most {MOST_PARTS} values"
        raise InvalidRequest("message", "a message holds too many values", allowed=allowed)
    try:
        found = json.loads(message, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidRequest("message", "a message is not JSON", allowed=_FORMS) from None
    if type(found) is not dict:
        raise InvalidRequest("message", "a message is not an object", allowed=_FORMS)
    try:
        orjson.dumps(found)  # it may have to be serialized again, whole or in an error
    except orjson.JSONEncodeError as error:
        reason = f"a message is not JSON that every server reads: {error}"
        raise InvalidRequest("message", reason, allowed=_FORMS) from None
    return found


# A dialect reads some fields only beside others of a whole request, which a message is not.
_OF_NO_REQUEST: Facts = {"message": None}


def references_in(dialect: str, message: Message) -> Sequence[Reference]:
    """Return the resources that a client's message names. Raises InvalidRequest and NotFound."""
    raw = message.encode("utf-8", "replace") if isinstance(message, str) else message
    return DIALECTS[dialect].references(_OF_NO_REQUEST, raw)


def event_id_of(message: Message) -> str | None:
    """Return the client's id of a message of OpenAI's, for the error that answers it; of a long
    message only if its beginning has it."""
    if len(message) > _HEAD_CHARS:
        head = message[:_HEAD_CHARS]
        raw = head.encode("utf-8", "replace") if isinstance(head, str) else head
        found: Any = early_text(raw, "event_id")
    else:
        found = _of_provider(message).get("event_id")
    return found[:200] if type(found) is str else None


def _of_provider(message: Message) -> Facts:
    """Return the object of a provider's message; empty if it is not an object."""
    try:
        found = orjson.loads(message)
    except orjson.JSONDecodeError:
        return {}
    return found if type(found) is dict else {}


def _dumped(event: Facts, like: Message) -> Message:
    """Return a message with this object, as text or bytes as `like` is."""
    dumped = orjson.dumps(event)
    return dumped.decode() if isinstance(like, str) else dumped


def about_text(message: Message) -> float:
    """Return an estimate of the tokens of a message of text."""
    return len(message) / _TEXT_CHARS


def _has(message: Message, *names: str) -> bool:
    if isinstance(message, str):
        return any(name in message for name in names)
    return any(name.encode() in message for name in names)


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def _count(table: Any, name: str) -> int | None:
    return _whole(table.get(name)) if type(table) is dict else None


def _table(value: Any) -> Facts:
    return value if type(value) is dict else {}


def add_usage(one: Usage, other: Usage) -> Usage:
    """Return the sum of two usages; figures that neither reports stay unknown."""
    details = None
    if one.details is not None or other.details is not None:
        left, right = one.details or UsageDetails(), other.details or UsageDetails()
        summed: dict[str, Any] = {
            name: _sum(getattr(left, name), getattr(right, name)) for name in _SUMMED
        }
        details = UsageDetails(**summed)
    return Usage(
        input_tokens=_sum(one.input_tokens, other.input_tokens),
        output_tokens=_sum(one.output_tokens, other.output_tokens),
        thoughts_tokens=_sum(one.thoughts_tokens, other.thoughts_tokens),
        cached_tokens=_sum(one.cached_tokens, other.cached_tokens),
        total_tokens=_sum(one.total_tokens, other.total_tokens),
        details=details,
    )


_SUMMED = (
    "input_audio_tokens",
    "input_image_tokens",
    "input_video_tokens",
    "output_audio_tokens",
    "output_image_tokens",
    "output_video_tokens",
    "searches",
    "input_audio_seconds",
)


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is other is None else (one or 0) + (other or 0)


def openai_usage(reported: Any) -> Usage | None:
    """Return the usage of `response.done` or of a transcription; None if none is reported. Cached
    audio has only the price of cached input, so that the separate audio count leaves out cached
    audio."""
    table = _table(reported)
    if table.get("type") == "duration":
        seconds = table.get("seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            return None
        if not 0 <= seconds < 10**9:
            return None
        return Usage(0, 0, details=UsageDetails(input_audio_seconds=ceil(seconds)))
    input_tokens, output_tokens = _count(table, "input_tokens"), _count(table, "output_tokens")
    if input_tokens is None and output_tokens is None:
        return None
    inputs, outputs = _table(table.get("input_token_details")), table.get("output_token_details")
    cached = _table(inputs.get("cached_tokens_details"))
    details = UsageDetails(
        input_audio_tokens=_left(inputs, cached, "audio_tokens"),
        input_image_tokens=_left(inputs, cached, "image_tokens"),
        output_audio_tokens=_count(outputs, "audio_tokens") or None,
    )
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=_count(inputs, "cached_tokens"),
        total_tokens=_count(table, "total_tokens"),
        details=None if details == UsageDetails() else details,
    )


def _left(table: Facts, cached: Facts, name: str) -> int | None:
    found = _count(table, name)
    return None if not found else max(0, found - (_count(cached, name) or 0)) or None


def gemini_usage(reported: Any) -> Usage | None:
    """Return the usage of `usageMetadata`; tokens that a tool gave the model count as input."""
    table = _table(reported)
    input_tokens = _count(table, "promptTokenCount")
    output_tokens = _count(table, "responseTokenCount")
    if output_tokens is None:
        output_tokens = _count(table, "candidatesTokenCount")
    total = _count(table, "totalTokenCount")
    if input_tokens is output_tokens is total is None:
        return None
    of_tools = _count(table, "toolUsePromptTokenCount")
    inputs = _modalities(table, "promptTokensDetails")
    outputs: dict[str, int] = {}
    for name in ("responseTokensDetails", "candidatesTokensDetails"):
        outputs = outputs or _modalities(table, name)
    details = UsageDetails(
        input_audio_tokens=inputs.get("AUDIO"),
        input_image_tokens=inputs.get("IMAGE"),
        input_video_tokens=inputs.get("VIDEO"),
        output_audio_tokens=outputs.get("AUDIO"),
        output_image_tokens=outputs.get("IMAGE"),
    )
    if input_tokens is not None:
        input_tokens += of_tools or 0
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        thoughts_tokens=_count(table, "thoughtsTokenCount"),
        cached_tokens=_count(table, "cachedContentTokenCount"),
        total_tokens=total,
        details=None if details == UsageDetails() else details,
    )


def _modalities(table: Facts, name: str) -> dict[str, int]:
    found: dict[str, int] = {}
    listed = table.get(name)
    for one in listed if type(listed) is list else ():
        count = _count(one, "tokenCount")
        if count:
            modality = str(one.get("modality"))
            found[modality] = found.get(modality, 0) + count
    return found


_MOST_QUOTES = 16
_PUNCTUATION = "{}[]:, \t\r\n"
_APPEND = re.compile(r'"type"\s*:\s*"input_audio_buffer\.append"')
_DELTA = ".delta"
_TYPE_CHARS = 400
# OpenAI names the type first. Anything but an id before it is parsed, since a model, or a client by
# its metadata, can write `.delta` into any event.
_FIRST = r'\s*\{\s*(?:"event_id"\s*:\s*"[^"\\]*"\s*,\s*)?"type"\s*:\s*"([^"\\]*)"'
_TYPE = re.compile(_FIRST)
_TYPE_BYTES = re.compile(_FIRST.encode())
_TRANSCRIPT = "conversation.item.input_audio_transcription."


_TURN_ID = "tidegate_turn_"


class OpenAIEvents:
    """OpenAI's events. `named`: the client's name of the model, `model` the upstream's.
    transcribes: the session only makes transcripts: its model is that of the transcripts, and each
    of them is a turn.

    An `error` names the client's message that caused it by `error.event_id`, if that message has an
    `event_id`. So a message that requests a turn gets an id if it has none, which the client never
    sees. At OpenAI an error without an id is then about no turn; other servers name no message.
    """

    def __init__(
        self, caller: Caller, named: str, model: str, *, transcribes: bool = False
    ) -> None:
        self._only_transcribes = transcribes
        self._caller = caller
        self._named = named
        self._model = model
        self._transcribes: str | None = None
        self._second_bytes = _PCM_BYTES
        self._requested: list[tuple[Any, int]] = []  # requested audio formats without an answer yet
        self._named_turns = 0  # requests of turns to which an id was added

    def client_event(self, message: Message, found: Facts | None = None) -> ClientEvent:
        if found is None and isinstance(message, str) and self._is_audio(message):
            seconds = _longest(message.split('"')) * 3 / 4 / self._least_second_bytes
            return ClientEvent(message, False, seconds * _IN_TOKENS, seconds)
        event = read(message) if found is None else found
        kind = event.get("type")
        if type(kind) is not str:
            raise InvalidRequest("type", "a message names no type", allowed="an event's type")
        begins_turn = kind == self._begins
        event_id = event.get("event_id")
        lacks_id = begins_turn and (type(event_id) is not str or not event_id)
        if lacks_id:
            self._named_turns += 1
            event_id = event["event_id"] = f"{_TURN_ID}{self._named_turns}"
        if self._check(event) or lacks_id:
            message = _dumped(event, message)
        if kind == "session.update":
            self._note_request(event)
        seconds = _sound_chars(event) * 3 / 4 / self._least_second_bytes
        is_sound = kind.startswith("input_audio")
        about = seconds * _IN_TOKENS if is_sound else about_text(message)
        event_id = event_id if type(event_id) is str else None
        return ClientEvent(message, begins_turn, about, seconds, event_id=event_id)

    @property
    def _begins(self) -> str:
        """Return the type of messages that request a turn."""
        return "input_audio_buffer.commit" if self._only_transcribes else "response.create"

    @staticmethod
    def _is_audio(message: str) -> bool:
        """Return whether a message is only audio: base64 has neither a quote nor a backslash."""
        return (
            _is_plain(message)
            and message.lower().count('"type"') == 1  # the type is its own
            and _APPEND.search(message) is not None
        )

    @property
    def _least_second_bytes(self) -> int:
        """Return the lowest rate of the current audio format and of those that may apply by the
        time of a message."""
        return min([self._second_bytes, *(one for _, one in self._requested)])

    def _note_request(self, event: Facts) -> None:
        """Note an audio format that the client requests, with its id of the message."""
        form = _form_of(_table(event.get("session")))
        if form:
            self._requested.append((event.get("event_id"), _second_bytes_of(form)))
            if len(self._requested) > _MOST_REQUESTED:
                oldest = self._requested[:2]
                self._requested[:2] = [min(oldest, key=lambda one: one[1])]

    def _note_form(self, session: Facts) -> None:
        """Note the format of the client's audio that the provider reports."""
        self._second_bytes = _second_bytes_of(_form_of(session))
        forms = [one for _, one in self._requested]
        if self._second_bytes in forms:  # answers are in order
            del self._requested[: forms.index(self._second_bytes) + 1]

    def _note_refusal(self, event: Facts) -> None:
        about = _table(event.get("error")).get("event_id")
        if about is not None:
            self._requested = [one for one in self._requested if one[0] != about]

    def _check(self, event: Facts) -> bool:
        """Check the models that an event names. Return whether one of them was replaced in it."""
        changed = self._only_transcribes and self._name_model(event)
        for place, table, model in _models_in(event):
            if place.endswith("transcription.model") and not self._only_transcribes:
                if not self._caller.may_ask(model):
                    allowed = ", ".join(self._caller.models or ())
                    reason = f"this tenant is not allowed to use {model[:200]}"
                    raise Forbidden(reason, field=place, allowed=allowed)
                self._transcribes = model
            elif model not in (self._named, self._model):
                reason = f"the model of a realtime session can't be changed to {model[:200]}"
                raise InvalidRequest(place, reason, allowed=self._named)
            elif model != self._model:
                table["model"] = self._model
                changed = True
        return changed

    def _name_model(self, event: Facts) -> bool:
        """Add the model of transcripts if a client leaves it to the provider."""
        session, changed = _table(event.get("session")), False
        inner = _table(_table(session.get("audio")).get("input")).get("transcription")
        for one in (inner, session.get("input_audio_transcription")):
            if type(one) is dict and one.get("model") is None:
                one["model"], changed = self._model, True
        return changed

    def reported(self, message: Message) -> Reported:
        head = message[:_TYPE_CHARS]
        if _has(head, _DELTA) and _is_delta(message):
            if _has(head, _TRANSCRIPT) and not self._only_transcribes:
                return NOTHING  # it belongs to no turn
            audio = _has(head, "audio.delta")
            about = len(message) / _OUT_CHARS if audio else max(1.0, len(message) / 200)
            return Reported(about_tokens=about)
        if not _has(
            message, "response.created", "response.done", "transcription.", '"error"', '"session.'
        ):
            return NOTHING
        event = _of_provider(message)
        match event.get("type"):
            case "response.created":
                return Reported(begins_turn=True)
            case "response.done":
                usage = openai_usage(_table(event.get("response")).get("usage"))
                spent = [] if usage is None else [Spent(usage)]
                return Reported(ends_turn=True, spent=spent)
            case "conversation.item.input_audio_transcription.completed":
                usage = openai_usage(event.get("usage"))
                if self._only_transcribes:
                    amounts = [] if usage is None else [Spent(usage)]
                    return Reported(ends_turn=True, spent=amounts, about_tokens=1)
                if usage is None:
                    return NOTHING
                used = Spent(usage, self._transcribes or "unknown", ends_turn=False)
                return Reported(spent=[used])
            case "conversation.item.input_audio_transcription.failed":
                is_turn = self._only_transcribes
                return Reported(ends_turn=True, about_tokens=1) if is_turn else NOTHING
            case "error":
                self._note_refusal(event)
                error = _table(event.get("error"))
                named = error.get("event_id")
                if type(named) is not str or not named:
                    return Reported(refuses=True)
                shown = None
                if named.startswith(_TURN_ID):
                    error["event_id"] = None  # as the client left it
                    shown = _dumped(event, message)
                return Reported(refuses=True, about=named, shown=shown)
            case "session.created" | "session.updated":
                session = _table(event.get("session"))
                self._note_form(session)
                model = session.get("model")
                return Reported(model=model if type(model) is str else None)
        return NOTHING


def _is_plain(message: str) -> bool:
    """Return whether a message is a few texts without escapes, with nothing but punctuation between
    them: a lenient server would read names without quotes or in single ones."""
    if "\\" in message or message.count('"') > _MOST_QUOTES:
        return False
    return not any(one.strip(_PUNCTUATION) for one in message.split('"')[::2])


def _is_delta(message: Message) -> bool:
    """Return whether the type of a provider's message is that of a piece of output."""
    if isinstance(message, str):
        first = _TYPE.match(message)
        kind: Any = first[1] if first is not None else _of_provider(message).get("type")
    else:
        begin = _TYPE_BYTES.match(message)
        kind = begin[1].decode("utf-8", "replace") if begin is not None else None
        kind = _of_provider(message).get("type") if begin is None else kind
    return type(kind) is str and kind.endswith(_DELTA)


def _form_of(session: Facts) -> Any:
    """Return the audio format that a session names, in the GA or the beta form."""
    stated = _table(_table(session.get("audio")).get("input")).get("format")
    return stated or session.get("input_audio_format")


def _second_bytes_of(form: Any) -> int:
    """Return the bytes of a second of audio in a format; of PCM by default."""
    name = str(form.get("type")) if type(form) is dict else str(form)
    if _TELEPHONE.search(name) is not None:
        return _TELEPHONE_BYTES
    return 2 * (_count(form, "rate") or _PCM_BYTES // 2)


def _sound_chars(event: Facts) -> int:
    """Return the base64 characters of audio in a message: beside its type, in its item, or in the
    input of a response with its own context."""
    items = [event.get("item"), *_rows(_table(event.get("response")).get("input"))]
    parts = [part for item in items for part in _rows(_table(item).get("content"))]
    return sum(_longest([_table(one).get("audio")]) for one in (event, *parts))


def _models_in(event: Facts) -> Iterator[tuple[str, Facts, str]]:
    """Yield each text below `session` and `response` that names a model, with its place. Schemas
    and arguments of tools are left out: such names in them choose no model."""
    below: list[tuple[str, Facts]] = [
        (name, event[name]) for name in ("session", "response") if type(event.get(name)) is dict
    ]
    while below:
        place, table = below.pop()
        for name, value in table.items():
            where = f"{place}.{name}"
            if name == "model":
                if type(value) is not str:
                    raise InvalidRequest(where, f"{where} is not a text", allowed="a model's name")
                yield where, table, value
            elif type(value) is dict and name not in ("tools", "metadata", "prompt"):
                below.append((where, value))


def _rows(value: Any) -> list[Any]:
    return value if type(value) is list else []


def _longest(texts: Sequence[Any]) -> int:
    """Return the length of the longest text, which is the base64 if there is any."""
    return max((len(one) for one in texts if type(one) is str), default=0)


_OF_TOOLS = ("response", "args")  # results and arguments of tools, of any form


def _is_audio(mime: str) -> bool:
    return mime.lstrip().lower().startswith("audio/")


def _gemini_sound(value: Facts) -> float:
    """Return the seconds of all audio below a value: of realtime input, parts of contents, and
    results of tools. A piece named `audio` needs no type."""
    below: list[tuple[bool, Any]] = [(False, value)]
    seconds = 0.0
    while below:
        is_sound, one = below.pop()
        if type(one) is list:
            below.extend((False, inner) for inner in one)
        elif type(one) is dict:
            mimes = [one[name] for name in ("mimeType", "mime_type") if type(one.get(name)) is str]
            mimes = [mime for mime in mimes if _is_audio(mime)] or ([""] if is_sound else [])
            chars = _longest([one.get("data")])
            seconds += max((_gemini_seconds(chars, mime) for mime in mimes), default=0.0)
            named = ((name, inner) for name, inner in one.items() if name not in _OF_TOOLS)
            below.extend((name == "audio", inner) for name, inner in named)
    return seconds


def _gemini_seconds(chars: int, mime: str) -> float:
    """Return the seconds of 16-bit PCM in base64."""
    stated = _RATE.search(mime)
    rate = min(int(stated[1]), _MOST_RATE) if stated is not None else _USUAL_RATE
    return chars * 3 / 4 / (2 * (rate or _USUAL_RATE))


# Tokens of a picture at the usual resolution: ai.google.dev/gemini-api/docs, page "tokens".
_PICTURE_TOKENS = 258


def _about_input(message: Message, seconds: float) -> float:
    """Return an estimate of the tokens of a piece of audio or of a picture."""
    return max(seconds * _GEMINI_TOKENS, _PICTURE_TOKENS * _has(message, '"image/'))


_REALTIME_INPUT = re.compile(r'\s*\{\s*"(?:realtimeInput|realtime_input)"\s*:')
_NO_INPUT = frozenset(
    (
        *("clientcontent", "client_content", "toolresponse", "tool_response", "setup"),
        *("realtimeinput", "realtime_input", "text"),
        *("activitystart", "activity_start", "activityend", "activity_end"),
    )
)
_LONGEST_NAME = 20
_SNAKE = {
    "client_content": "clientContent",
    "realtime_input": "realtimeInput",
    "tool_response": "toolResponse",
}
_OF_CLIENT = ("clientContent", "realtimeInput", "toolResponse")


# What precedes a model's name, as Google's SDK writes it for Gemini's API and for Vertex.
_PROJECT = "(?:projects/[^/]{1,100}/locations/[^/]{1,100}/)?"
_MODEL = re.compile(f"^{_PROJECT}(?:publishers/google/)?models/")
_RESUMPTIONS = ("sessionResumption", "session_resumption")


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message of a session of Gemini Live. model: as the client names it. handle: of the
    session that it resumes, with its field; None if it begins one."""

    body: Facts
    model: str
    handle: tuple[str, str] | None = None

    @classmethod
    def of(cls, message: Message) -> Setup:
        """Parse a message. Raises InvalidRequest."""
        event = read(message)
        setup = event.get("setup")
        if type(setup) is not dict or len(event) != 1:
            reason = "the first message of a realtime session must be its setup"
            raise InvalidRequest("setup", reason, allowed='{"setup": {"model": ...}}')
        model = setup.get("model")
        name = _MODEL.sub("", model) if type(model) is str else ""
        if not name:
            raise InvalidRequest("setup.model", "setup names no model", allowed="models/<model>")
        handles = [
            (f"setup.{name}.handle", handle)
            for name in _RESUMPTIONS
            if (handle := _table(setup.get(name)).get("handle")) is not None
        ]
        for place, handle in handles:
            if type(handle) is not str or len(handles) > 1:
                raise InvalidRequest(place, f"{place} is not one text", allowed="one handle")
        return cls(event, name, handles[0] if handles else None)

    def message(self, model: str, handle: str | None = None) -> str:
        """Return the message with the upstream's whole name of the model. handle: the provider's,
        if the session is resumed."""
        setup = {**self.body["setup"], "model": model}
        for name in _RESUMPTIONS:
            if handle is not None and _table(setup.get(name)).get("handle") is not None:
                setup[name] = {**setup[name], "handle": handle}
        return orjson.dumps({"setup": setup}).decode()


def transcribing(model: str) -> str:
    """Return the message that sets the model of a session that only transcribes."""
    audio = {"input": {"transcription": {"model": model}}}
    update = {"type": "session.update", "session": {"type": "transcription", "audio": audio}}
    return orjson.dumps(update).decode()


class GeminiEvents:
    """Gemini Live's events, after the setup. sign: returns a handle for resumption as the client
    gets it; None if sessions cannot be resumed."""

    def __init__(self, sign: Callable[[str], str] | None = None) -> None:
        self._sign = sign
        self._is_active = False  # the client signals the begin and end of its input
        self._queries: set[str] = set()  # web searches of the current turn
        self._is_open = False  # output of a turn has come, and the turn is not complete
        self._is_told = False  # and its usage has come too: what follows belongs to it

    def client_event(self, message: Message, found: Facts | None = None) -> ClientEvent:
        event = self._client_event(message, found)
        self._is_told = self._is_told and not event.begins_turn
        return event

    def _client_event(self, message: Message, found: Facts | None) -> ClientEvent:
        if found is None and isinstance(message, str) and self._is_input(message):
            parts = message.split('"')
            mimes = [one for one in parts if _is_audio(one)]
            if not mimes and "audio" in parts:
                mimes = [""]
            seconds = max((_gemini_seconds(_longest(parts), one) for one in mimes), default=0.0)
            return ClientEvent(message, False, _about_input(message, seconds), seconds)
        event = read(message) if found is None else found
        names = [_SNAKE.get(name, name) for name in event]
        if len(names) != 1 or names[0] not in _OF_CLIENT:
            named = ", ".join(event)[:100]
            allowed = f"one of {', '.join(_OF_CLIENT)}"
            raise InvalidRequest("message", f"a message has {named or 'nothing'}", allowed=allowed)
        value, about = _table(next(iter(event.values()))), len(message) / _TEXT_CHARS
        if names[0] == "toolResponse":
            sound = _gemini_sound(value)
            return ClientEvent(message, True, about, sound, joins=True, continues=True)
        if names[0] == "clientContent":
            ends = value.get("turnComplete", value.get("turn_complete"))
            return ClientEvent(message, ends is True, about, _gemini_sound(value))
        sound, text = _gemini_sound(value), value.get("text")
        about = _about_input(message, sound)
        about += len(text) / _TEXT_CHARS if type(text) is str else 0
        begins = self._begins_answer(value)
        return ClientEvent(message, begins, about, sound, joins=True)

    def _begins_answer(self, value: Facts) -> bool:
        """Return whether the model answers now: to text, or to the end of the client's input."""
        if any(value.get(name) is not None for name in ("activityEnd", "activity_end")):
            self._is_active = False
            return True
        if any(value.get(name) is not None for name in ("activityStart", "activity_start")):
            self._is_active = True
        return type(value.get("text")) is str and not self._is_active

    @staticmethod
    def _is_input(message: str) -> bool:
        """Return whether a message is one piece of audio or of pictures, which is not parsed."""
        first = _REALTIME_INPUT.match(message)
        if first is None or not _is_plain(message):
            return False
        texts = message[first.end() :].split('"')
        names = [one.lower() for one in texts if len(one) <= _LONGEST_NAME]
        return names.count("data") == 1 and _NO_INPUT.isdisjoint(names)

    def reported(self, message: Message) -> Reported:
        if self._sign is not None and _has(message, '"sessionResumptionUpdate"'):
            event = _of_provider(message)
            update = _table(event.get("sessionResumptionUpdate"))
            if type(handle := update.get("newHandle")) is str and handle:
                update["newHandle"] = self._sign(handle)
                return replace(self._report(message), shown=_dumped(event, message))
        return self._report(message)

    def _report(self, message: Message) -> Reported:
        is_output = _has(message, '"modelTurn"', '"toolCall"')
        if not _has(message, '"usageMetadata"', '"webSearchQueries"', '"turnComplete"'):
            if not is_output or self._is_told:
                return NOTHING
            self._is_open = True
            audio = _has(message[:400], '"inlineData"')
            return Reported(about_tokens=len(message) / (_GEMINI_OUT_CHARS if audio else 100))
        event = _of_provider(message)
        spent, usage = self._searched(event), gemini_usage(event.get("usageMetadata"))
        if usage is not None:
            spent.append(Spent(usage))
        self._is_open = self._is_open or is_output
        self._is_told = self._is_open and (self._is_told or usage is not None)
        if _table(event.get("serverContent")).get("turnComplete") is True:
            self._is_open = self._is_told = False
        return Reported(spent=spent)

    def _searched(self, event: Facts) -> list[Spent]:
        """Return the searches of a turn, each once: a message may repeat those of an earlier
        one."""
        content = _table(event.get("serverContent"))
        named = _rows(_table(content.get("groundingMetadata")).get("webSearchQueries"))
        new = {one for one in named if type(one) is str and one} - self._queries
        self._queries |= new
        if content.get("turnComplete") is True:
            self._queries = set()
        if not new:
            return []
        return [Spent(Usage(0, 0, details=UsageDetails(searches=len(new))), ends_turn=False)]
