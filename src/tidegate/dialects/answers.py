"""Facts of answers in any dialect: usage, finish reason, ids, and visible output. Pure.

Only known places are read: the outermost object of a whole answer, or an event of a stream. An
answer that is too long to parse is read at its start and end. Visible output is counted also for
answers that were cut; text that a stream repeats at its end counts once. The gateway requests usage
events of chat completion streams; a client that has not requested one does not receive it.

Invariants: unreported usage is unknown, never zero; text of a request or a model is never taken
for usage, because quotes and line ends in it are escaped; parsing never raises; a figure that is no
whole number or is too large is skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

import orjson

from tidegate.admission.charges import came_tokens, is_complete
from tidegate.call import UNKNOWN_USAGE, Usage, UsageDetails
from tidegate.dialects.spec import AnswerFacts, DialectSpec, JsonObject, OutputEvents
from tidegate.prices.rates import STANDARD_TIERS
from tidegate.record import TAIL_BYTES, CallRecord

MOST_TOKENS = 10**12  # more is no count of one call, and no column could hold the sums
HEAD_BYTES = 4_096
PARSED_BYTES = 262_144
LONGEST_READ_BYTES = 2_000_000
_LONGEST_TEXT = 200
_LONGEST_TIER = 40
_LONGEST_EVENT_BYTES = 65_536
# The usage of a stream stands in one of its last events, if it is reported.
_LAST_EVENTS = 8
_FIRST_EVENTS = 4
_MOST_CANDIDATES = 64
_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s,]*")  # the objects of a list


def object_of(value: Any) -> JsonObject:
    """`value` if it is an object, else an empty one."""
    return value if type(value) is dict else {}


def objects_in(value: Any) -> list[JsonObject]:
    """The objects of a list; none of what is no list."""
    return [one for one in value if type(one) is dict] if type(value) is list else []


def part_of(raw: Any, *names: str) -> JsonObject:
    """The first of these members that is an object; empty where there is none."""
    if type(raw) is dict:
        for name in names:
            value = raw.get(name)
            if type(value) is dict:
                return value
    return {}


def count_of(raw: Mapping[str, Any], *names: str) -> int | None:
    """The first of these members that is a count."""
    for name in names:
        value = raw.get(name)
        if type(value) is int and 0 <= value <= MOST_TOKENS:
            return value
    return None


def positive_of(raw: Mapping[str, Any], *names: str) -> int | None:
    """The first of these members that is a count above 0."""
    for name in names:
        value = raw.get(name)
        if type(value) is int and 0 < value <= MOST_TOKENS:
            return value
    return None


def with_searches(usage: Usage, searches: int, files: int = 0) -> Usage:
    """The usage with the searches that its answer shows, where it reports fewer itself. files:
    those of stored files, which no usage reports."""
    details = usage.details or UsageDetails()
    if searches <= (details.searches or 0) and not files:
        return usage
    most = max(searches, details.searches or 0) or None
    return replace(usage, details=replace(details, searches=most, file_searches=files or None))


def tier_of(raw: Mapping[str, Any]) -> str | None:
    """The processing tier that an answer or its usage reports, None for the usual one."""
    tier = raw.get("service_tier")
    if type(tier) is not str or not 0 < len(tier) <= _LONGEST_TIER:
        return None
    tier = tier.lower()
    return None if tier in STANDARD_TIERS else tier


def with_tier(usage: Usage, tier: str | None) -> Usage:
    """The usage with the tier that its answer reports elsewhere."""
    if tier is None:
        return usage
    return replace(usage, details=replace(usage.details or UsageDetails(), tier=tier))


@cache
def value_pattern(name: str) -> re.Pattern[bytes]:
    """Pattern of a short text in the member `name`."""
    return re.compile(rb'"%b"\s*:\s*"([^"\\]{1,200})"' % name.encode())


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """Places of facts in the answers of one dialect.

    `usage`, `identity`, `version` and `finish` name members of an answer; the last one is in the
    last of `choices` where these have a name. `usage_of` reads a usage, `event_usage` finds it in
    an event. `begins_with_usage`: a stream reports some of it in the event that has its id.
    """

    usage: str
    identity: str
    version: str
    finish: str
    choices: str | None
    usage_of: Callable[[Mapping[str, Any]], Usage]
    event_usage: Callable[[JsonObject], JsonObject]
    begins_with_usage: bool = False


def whole_object(answer: bytes) -> JsonObject | None:
    """An answer that is an object of moderate size; None for any other."""
    if len(answer) <= PARSED_BYTES and answer.startswith(b"{"):
        with suppress(orjson.JSONDecodeError):  # cut off
            return object_of(orjson.loads(answer))
    return None


def object_facts(form: AnswerForm, whole: JsonObject) -> AnswerFacts:
    """Facts of a whole answer."""
    raw = whole.get(form.usage)
    usage = form.usage_of(raw) if type(raw) is dict else UNKNOWN_USAGE
    finish = None
    if form.choices is None:
        finish = whole.get(form.finish)
    elif type(choices := whole.get(form.choices)) is list and choices:
        last = choices[-1]
        finish = last.get(form.finish) if type(last) is dict else None
    return AnswerFacts(
        usage,
        short_text(finish),
        short_text(whole.get(form.identity)),
        short_text(whole.get(form.version)),
    )


def scanned_facts(form: AnswerForm, answer: bytes, *, omitted: bool, cut: bool) -> AnswerFacts:
    """Facts of a stream, of a list, or of an object that is long or was cut."""
    start = answer[:HEAD_BYTES].lstrip()[:1]
    begun = _first_event(answer, form.identity)
    if start == b"{":
        raw = {} if cut else part_of(outermost(form.usage, b"{", answer[-TAIL_BYTES:]), form.usage)
    elif start == b"[":
        tail = answer[-TAIL_BYTES:].rstrip()
        ended = tail.endswith(b"]") and not cut
        raw = part_of(outermost(form.usage, b"{", tail[:-1]), form.usage) if ended else {}
        if not raw and not omitted:
            raw = _list_usage(form, answer)
    else:
        # `omitted`: the last `TAIL_BYTES` are in one piece.
        floor = max(0, answer.find(b"\n", len(answer) - TAIL_BYTES)) if omitted else 0
        usages = (form.event_usage(event) for event in last_events(answer, floor))
        raw = next(filter(None, usages), {})
        if form.begins_with_usage:
            later = {name: value for name, value in raw.items() if value is not None}
            raw = part_of(begun, form.usage) | later
    usage = form.usage_of(raw) if raw else UNKNOWN_USAGE
    if raw and start == b"{" and b'"service_tier"' in answer:
        usage = with_tier(usage, _tier_beside(answer))
    return AnswerFacts(
        usage,
        last_match(value_pattern(form.finish), answer),
        short_text(begun.get(form.identity)) or _scanned(value_pattern(form.identity), answer),
        short_text(begun.get(form.version)) or _scanned(value_pattern(form.version), answer),
    )


def _tier_beside(answer: bytes) -> str | None:
    """The tier that a long object reports, which has come to its end: of one that is too long to be
    parsed, in its last bytes."""
    if len(answer) > LONGEST_READ_BYTES:
        return tier_of(outermost("service_tier", b'"', answer[-TAIL_BYTES:]))
    with suppress(orjson.JSONDecodeError):
        return tier_of(object_of(orjson.loads(answer)))
    return None


def outermost(name: str, opening: bytes, tail: bytes) -> JsonObject:
    """What begins with member `name` of an object that has come to its end, of which these are the
    last bytes. opening: of its value.

    What follows a key closes as many objects and lists as the key is in. So only of a key of the
    outermost object the rest is an object once more when a brace is put before it.
    """
    pattern = rb'"%b"\s*:\s*%b' % (name.encode(), re.escape(opening))
    places = [found.start() for found in re.finditer(pattern, tail)]
    for place in reversed(places[-_MOST_CANDIDATES:]):
        with suppress(orjson.JSONDecodeError):
            return object_of(orjson.loads(b"{" + tail[place:]))
    return {}


def _list_usage(form: AnswerForm, answer: bytes) -> JsonObject:
    """The last usage that a whole object of a list reports; the list may be cut."""
    raw: JsonObject = {}
    if len(answer) > LONGEST_READ_BYTES:
        return raw
    text = answer.decode("utf-8", "replace")
    place = text.index("[") + 1
    while (gap := _BETWEEN.match(text, place)) is not None:
        try:
            value, place = _DECODER.raw_decode(text, gap.end())
        except (ValueError, RecursionError):
            break
        raw = part_of(value, form.usage) or raw
    return raw


def last_events(answer: bytes, floor: int = 0) -> Iterator[JsonObject]:
    """The last events of a stream that hold a usage, each parsed, the last one first.

    Inside of JSON line ends are escaped, so a line that begins with `data:` is one of the stream.
    """
    end = len(answer)
    for _ in range(_LAST_EVENTS):
        place = answer.rfind(b"\ndata:", floor, end)
        begin = place + 6
        if place < 0:
            if floor or not answer.startswith(b"data:"):
                return
            begin = 5
        line_end = answer.find(b"\n", begin)
        line = answer[begin : line_end if line_end >= 0 else len(answer)]
        if b'"usage' in line:
            with suppress(orjson.JSONDecodeError):  # cut off
                yield object_of(orjson.loads(line))
        if place < 0:
            return
        end = place


def _first_event(answer: bytes, identity: str) -> JsonObject:
    """The message that a stream begins, or its first event with an id."""
    place = 0
    for _ in range(_FIRST_EVENTS):
        start = place if answer.startswith(b"data:", place) else answer.find(b"\ndata:", place) + 1
        end = answer.find(b"\n", start, start + _LONGEST_EVENT_BYTES)
        if end < 0 or not answer.startswith(b"data:", start):
            break
        place = end
        try:
            event = orjson.loads(answer[start + 5 : end])
        except orjson.JSONDecodeError:
            continue
        if message := part_of(event, "message"):
            return message
        if type(event) is dict and event.get(identity):
            return event
    return {}


def last_match(pattern: re.Pattern[bytes], answer: bytes) -> str | None:
    """The last match in the end of an answer."""
    found = None
    for found in pattern.finditer(answer, max(0, len(answer) - TAIL_BYTES)):  # noqa: B007
        pass
    return matched_text(found)


def _scanned(pattern: re.Pattern[bytes], answer: bytes) -> str | None:
    """The first match in the start of an answer, else the last in its end."""
    return matched_text(pattern.search(answer, 0, HEAD_BYTES)) or last_match(pattern, answer)


def matched_text(found: re.Match[bytes] | None) -> str | None:
    return found[1].decode("utf-8", "replace") if found else None


def short_text(value: Any) -> str | None:
    """A short text; a number, as Google writes its enumerations on request, as one."""
    if type(value) is int:
        value = str(value)
    return value if type(value) is str and 0 < len(value) <= _LONGEST_TEXT else None


# A longer stream is read in places spread evenly over it, and what they hold stands for the rest.
_READ_BYTES = 2_000_000
_READ_PLACES = 16
# The fields of a model's text, thoughts and tool calls in all dialects, where an
# answer cannot be parsed; a text that was cut goes up to where it was.
_OUTPUT = re.compile(
    rb'"(?:content|text|delta|thinking|reasoning|reasoning_content|refusal|arguments|partial_json'
    rb'|code)"\s*:\s*("(?:[^"\\]|\\.)*+"?)',
    re.DOTALL,
)
# How a stream of events begins, whatever its first line says.
_EVENTS = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:data|event|id|retry)?:")
_BYTES_A_TOKEN = 4
_ARGUMENTS = re.compile(rb'"(?:input|args)"\s*:\s*(?=\{)')
_MOST_OBJECTS, _LONGEST_OBJECT_BYTES = 64, 65_536


@dataclass(slots=True)
class VisibleOutput:
    """About how many tokens came, images among them, and how many images."""

    tokens: int = 0
    images: int = 0


def visible_output(dialect: DialectSpec, answer: bytes, answer_bytes: int) -> VisibleOutput:
    """Output in an answer. `answer` is what was kept of `answer_bytes`."""
    if not answer:
        return VisibleOutput()
    if answer[:256].lstrip()[:1] in (b"{", b"["):
        images = dialect.image_count(answer)
        texts, scale = "".join(_texts_in(answer)), answer_bytes / len(answer)
        return VisibleOutput(came_tokens(texts, scale=scale, images=images), images)
    if _EVENTS.match(answer) is None:  # in an unknown form: as much as it is
        return VisibleOutput(-(-answer_bytes // _BYTES_A_TOKEN))
    output, read_bytes = OutputEvents(), 0
    for part in _parts(answer):
        read_bytes += len(part)
        for line in part.split(b"\n"):
            if line.startswith(b"data:"):
                try:
                    event = orjson.loads(line[5:])
                except orjson.JSONDecodeError:  # cut off; or the end of the stream, without output
                    output.texts += _texts_in(line[5:])
                    continue
                if type(event) is dict:
                    dialect.add_output(event, output)
    texts = max("".join(output.texts), "".join(output.repeated), key=len)
    images = output.unnamed_images + len(output.images)
    scale = answer_bytes / max(1, read_bytes)
    return VisibleOutput(came_tokens(texts, scale=scale, images=images), images)


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """What an answer says. images, came: None where they were not looked for."""

    facts: AnswerFacts
    images: int | None
    came: VisibleOutput | None


def read_answer(
    dialect: DialectSpec, record: CallRecord, *, whole: bool, counted: bool, images: bool
) -> ReadAnswer:
    """All that accounting looks for in the answer of a record, in one go: of a large one in a
    thread of its own. `whole`: it came to its end; `counted`: a model has made it; `images`: some
    were requested."""
    text = record.text
    facts = dialect.answer_facts(text, omitted=record.omitted_bytes > 0, cut=not whole)
    has_visible = counted and not (whole and is_complete(facts.usage))
    return ReadAnswer(
        facts,
        dialect.image_count(text) if images else None,
        visible_output(dialect, text, record.text_bytes) if has_visible else None,
    )


def _parts(stream: bytes) -> Iterator[bytes]:
    """The stream, or places of it that begin and end with whole lines."""
    if len(stream) <= _READ_BYTES:
        yield stream
        return
    end = 0
    for number in range(_READ_PLACES):
        start = stream.rfind(b"\ndata:", 0, number * len(stream) // _READ_PLACES + 1) + 1
        start = max(start, end)
        end = stream.find(b"\n", start + _READ_BYTES // _READ_PLACES)
        if end < 0:
            yield stream[start:]
            return
        yield stream[start:end]


def _texts_in(data: bytes) -> list[str]:
    """Texts of a model in an answer that is not read field by field."""
    texts: list[str] = []
    for found in _OUTPUT.finditer(data):
        text = found[1]
        try:
            texts.append(str(orjson.loads(text)))
        except orjson.JSONDecodeError:  # cut, half of a surrogate pair, or of no known protocol
            texts.append(text.strip(b'"').decode("utf-8", "replace"))
    for found in islice(_ARGUMENTS.finditer(data), _MOST_OBJECTS):
        called = data[found.end() : found.end() + _LONGEST_OBJECT_BYTES].decode("utf-8", "replace")
        try:
            texts.append(called[: _DECODER.raw_decode(called)[1]])
        except (ValueError, RecursionError):  # cut, or long
            texts.append(called)
    return texts


def as_text(value: Any) -> str:
    """JSON of a value that a model has written as an object."""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # nested deeper than can be written
        return repr(value)


# An event ends with an empty line; providers write either kind of line.
_END = re.compile(rb"\r?\n\r?\n")
_ENDS = (b"\n\n", b"\r\n\r\n")
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
# Null beside what has no choices either, such as the results of a requested moderation.
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
# Where a usage event reports an error too, it is for the client.
_ERROR = re.compile(rb'"error"\s*:\s*[{"]')
_LONGEST_HELD_BYTES = 1_000_000


def asking_for_usage(raw: bytes, body: JsonObject) -> bytes:
    """The body with `stream_options.include_usage`; otherwise unchanged, where that is possible."""
    if "stream_options" not in body:
        start = raw.index(b"{") + 1
        return b'%b"stream_options":{"include_usage":true},%b' % (raw[:start], raw[start:])
    options = {**object_of(body["stream_options"]), "include_usage": True}
    # From the bytes, since a large body is parsed without its files.
    return orjson.dumps({**orjson.loads(raw), "stream_options": options})


class WithoutUsageEvent:
    """Filter of a stream: takes it piece by piece and returns what is for the client."""

    def __init__(self) -> None:
        self._held = b""
        self._through = False

    def take(self, piece: bytes) -> bytes:
        """The whole events in it, and in what was held back before."""
        if self._through:
            return piece
        if not self._held and piece.endswith(_ENDS) and not _is_usage(piece):
            return piece  # nearly all: whole events, and nothing in them to remove
        data = self._held + piece
        ends = [found.end() for found in _END.finditer(data)]
        whole, self._held = (data[: ends[-1]], data[ends[-1] :]) if ends else (b"", data)
        if len(self._held) > _LONGEST_HELD_BYTES:  # not a stream of events
            self._through = True
            whole, self._held = whole + self._held, b""
        if not _is_usage(whole):
            return whole
        starts = [0, *ends[:-1]]
        events = (whole[start:end] for start, end in zip(starts, ends, strict=True))
        return b"".join(event for event in events if not _is_usage(event) or _ERROR.search(event))

    def rest(self) -> bytes:
        """The rest of a stream that ended within an event."""
        held, self._held = self._held, b""
        return held


def _is_usage(event: bytes) -> bool:
    """Whether it is the usage event, or holds it."""
    if b'"usage"' not in event or _NO_CHOICES.search(event) is None:
        return False
    return _USAGE.search(event) is not None
