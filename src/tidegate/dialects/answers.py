"""Facts of answers in any dialect: usage, finish reason, ids, and visible output. Pure.

Only known places are read: the outermost object of a whole answer, or an event of a stream. An
answer that is too long to parse is read at its start and end. Visible output is counted also for
answers that were cut; text that a stream repeats at its end counts once. The gateway requests usage
events of chat completion streams; a client that has not requested one does not receive it.

Invariants: unreported usage is unknown, never zero; text of a request or a model is never taken for
usage, because quotes and line ends in it are escaped; parsing never raises; a figure that is not a
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

from tidegate.admission.charges import is_complete, is_zero, received_tokens
from tidegate.call import UNKNOWN_USAGE, Usage, UsageDetails
from tidegate.dialects.spec import AnswerFacts, DialectSpec, JsonObject, OutputEvents
from tidegate.prices.rates import STANDARD_TIERS
from tidegate.record import TAIL_BYTES, CallRecord

MOST_TOKENS = 10**12  # a larger count is no plausible one, and its sums fit no column
HEAD_BYTES = 4_096
PARSED_BYTES = 262_144
LONGEST_READ_BYTES = 2_000_000
_LONGEST_TEXT = 200
_LONGEST_TIER = 40
_LONGEST_EVENT_BYTES = 65_536
# If a stream reports its usage, one of its last events has it.
_LAST_EVENTS = 8
_FIRST_EVENTS = 4
_MOST_CANDIDATES = 64
_DECODER = json.JSONDecoder()
_BOM = b"\xef\xbb\xbf"  # some servers begin JSON with it
_BETWEEN = re.compile(r"[\s,]*")  # between the objects of a list


def object_of(value: Any) -> JsonObject:
    """Return `value` if it is an object, otherwise an empty one."""
    return value if type(value) is dict else {}


def objects_in(value: Any) -> list[JsonObject]:
    """Return the objects of a list; empty if `value` is not a list."""
    return [one for one in value if type(one) is dict] if type(value) is list else []


def part_of(raw: Any, *names: str) -> JsonObject:
    """Return the first of these members that is an object; empty if none is."""
    if type(raw) is dict:
        for name in names:
            value = raw.get(name)
            if type(value) is dict:
                return value
    return {}


def count_of(raw: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these members that is a count, or None."""
    for name in names:
        value = raw.get(name)
        if type(value) is float and value.is_integer():
            value = int(value)  # some servers write 7 as 7.0
        if type(value) is int and 0 <= value <= MOST_TOKENS:
            return value
    return None


def positive_of(raw: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these members that is a count above 0, or None."""
    for name in names:
        value = raw.get(name)
        if type(value) is int and 0 < value <= MOST_TOKENS:
            return value
    return None


def with_searches(usage: Usage, searches: int, files: int = 0) -> Usage:
    """Return the usage with the searches that its answer shows, if they are more than it reports.

    files: searches of stored files, which no usage reports.
    """
    details = usage.details or UsageDetails()
    if searches <= (details.searches or 0) and not files:
        return usage
    most = max(searches, details.searches or 0) or None
    return replace(usage, details=replace(details, searches=most, file_searches=files or None))


def tier_of(raw: Mapping[str, Any]) -> str | None:
    """Return the processing tier that an answer or its usage reports; None for the usual one."""
    tier = raw.get("service_tier")
    if type(tier) is not str or not 0 < len(tier) <= _LONGEST_TIER:
        return None
    tier = tier.lower()
    return None if tier in STANDARD_TIERS else tier


def with_tier(usage: Usage, tier: str | None) -> Usage:
    """Return the usage with a tier that its answer reports elsewhere."""
    if tier is None:
        return usage
    return replace(usage, details=replace(usage.details or UsageDetails(), tier=tier))


@cache
def value_pattern(name: str) -> re.Pattern[bytes]:
    """Return the pattern of a short string in the member `name`."""
    return re.compile(rb'"%b"\s*:\s*"([^"\\]{1,200})"' % name.encode())


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """Places of facts in the answers of a dialect.

    `usage`, `identity`, `version` and `finish` name members of an answer; `finish` is one of the
    last of `choices`, if that is set. `usage_of` parses a usage, `event_usage` finds it in an
    event. `joined`: for streams that report a part of it in the event with their id, returns the
    usage from that and the last one, and whether the stream was cut.
    """

    usage: str
    identity: str
    version: str
    finish: str
    choices: str | None
    usage_of: Callable[[Mapping[str, Any]], Usage]
    event_usage: Callable[[JsonObject], JsonObject]
    joined: Callable[[JsonObject, JsonObject, bool], JsonObject] | None = None


def whole_object(answer: bytes, parsed: JsonObject | None = None) -> JsonObject | None:
    """Return an answer that is an object of moderate size; None for any other. `parsed`: the
    answer, if it is an object that was parsed before."""
    answer = answer.removeprefix(_BOM)
    if len(answer) <= PARSED_BYTES and answer.startswith(b"{"):
        if parsed is not None:
            return parsed
        try:
            return object_of(orjson.loads(answer))
        except orjson.JSONDecodeError:  # cut off
            return None
    return None


def object_facts(form: AnswerForm, whole: JsonObject) -> AnswerFacts:
    """Return the facts of a whole answer."""
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
    """Return the facts of a stream, of a list, or of an object that is long or was cut."""
    start = answer[:HEAD_BYTES].removeprefix(_BOM).lstrip()[:1]
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
        # If `omitted`, the last `TAIL_BYTES` are contiguous.
        floor = max(0, answer.find(b"\n", len(answer) - TAIL_BYTES)) if omitted else 0
        usages = (form.event_usage(event) for event in last_events(answer, floor))
        raw = next(filter(None, usages), {})
        if form.joined is not None:
            raw = form.joined(part_of(begun, form.usage), raw, cut)
    usage = form.usage_of(raw) if raw else UNKNOWN_USAGE
    if raw and start == b"{" and answer.find(b'"service_tier"') >= 0:
        usage = with_tier(usage, _reported_tier(answer))
    return AnswerFacts(
        usage,
        last_value(form.finish, answer),
        short_text(begun.get(form.identity)) or _scanned(form.identity, answer),
        short_text(begun.get(form.version)) or _scanned(form.version, answer),
    )


def _reported_tier(answer: bytes) -> str | None:
    """Return the tier that a complete, long object reports; from its last bytes if it is too long
    to parse."""
    if len(answer) > LONGEST_READ_BYTES:
        return tier_of(outermost("service_tier", b'"', answer[-TAIL_BYTES:]))
    with suppress(orjson.JSONDecodeError):
        return tier_of(object_of(orjson.loads(answer)))
    return None


def outermost(name: str, opening: bytes, tail: bytes) -> JsonObject:
    """Return the rest of a complete object from its outermost member `name` on, given its last
    bytes. opening: the first byte of the member's value.

    The text after a key closes as many objects and lists as the key is nested in. So the text from
    a key on, with a brace put before it, is an object only if the key is outermost.
    """
    pattern = rb'"%b"\s*:\s*%b' % (name.encode(), re.escape(opening))
    places = [found.start() for found in re.finditer(pattern, tail)]
    for place in reversed(places[-_MOST_CANDIDATES:]):
        with suppress(orjson.JSONDecodeError):
            return object_of(orjson.loads(b"{" + tail[place:]))
    return {}


def _list_usage(form: AnswerForm, answer: bytes) -> JsonObject:
    """Return the last usage that a complete object of a list reports; the list may be cut."""
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
    """Yield the last events of a stream that contain a usage, parsed, the last one first.

    Line ends within JSON are escaped, so that a line that begins with `data:` is a line of the
    stream.
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
        if line.find(b'"usage') >= 0:
            with suppress(orjson.JSONDecodeError):  # cut off
                yield object_of(orjson.loads(line))
        if place < 0:
            return
        end = place


def _first_event(answer: bytes, identity: str) -> JsonObject:
    """Return the message with which a stream begins, or its first event with an id."""
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
    """Return the last match in the end of an answer."""
    found = None
    for found in pattern.finditer(answer, max(0, len(answer) - TAIL_BYTES)):  # noqa: B007
        pass
    return matched_text(found)


def last_value(name: str, answer: bytes) -> str | None:
    """Return the last short string in the member `name` in the end of an answer. Searched from
    behind, since a stream repeats its members in each event."""
    key, pattern = b'"%b"' % name.encode(), value_pattern(name)
    floor, end = max(0, len(answer) - TAIL_BYTES), len(answer)
    while (place := answer.rfind(key, floor, end)) >= 0:
        if (found := pattern.match(answer, place)) is not None:
            return matched_text(found)
        end = place + len(key) - 1
    return None


def _scanned(name: str, answer: bytes) -> str | None:
    """Return the first value of the member `name` in the start of an answer, otherwise the last one
    in its end."""
    first = value_pattern(name).search(answer, 0, HEAD_BYTES)
    return matched_text(first) or last_value(name, answer)


def matched_text(found: re.Match[bytes] | None) -> str | None:
    return found[1].decode("utf-8", "replace") if found else None


def short_text(value: Any) -> str | None:
    """Return a short string, or None. A number becomes a string: Google writes enumerations as
    numbers on request."""
    if type(value) is int:
        value = str(value)
    return value if type(value) is str and 0 < len(value) <= _LONGEST_TEXT else None


# A longer stream is sampled at places spread evenly over it, and the result is extrapolated.
_READ_BYTES = 2_000_000
_READ_PLACES = 16
# Fields of a model's text, thoughts and tool calls in all dialects, for answers that cannot be
# parsed; a text that was cut extends to the cut.
_OUTPUT = re.compile(
    rb'"(?:content|text|delta|thinking|reasoning|reasoning_content|refusal|arguments|partial_json'
    rb'|code)"\s*:\s*("(?:[^"\\]|\\.)*+"?)',
    re.DOTALL,
)
# The beginning of a stream of events, whatever its first line is.
_EVENTS = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:data|event|id|retry)?:")
_BYTES_A_TOKEN = 4
_ARGUMENTS = re.compile(rb'"(?:input|args)"\s*:\s*(?=\{)')
_MOST_OBJECTS, _LONGEST_OBJECT_BYTES = 64, 65_536


@dataclass(slots=True)
class VisibleOutput:
    """The estimated tokens received, images included, and the number of images."""

    tokens: int = 0
    images: int = 0


def visible_output(dialect: DialectSpec, answer: bytes, answer_bytes: int) -> VisibleOutput:
    """Return the output in an answer. `answer` is the kept part of its `answer_bytes`."""
    answer = answer.removeprefix(_BOM)
    if answer[:256].lstrip()[:1] in (b"{", b"["):
        images = dialect.image_count(answer)
        texts, scale = "".join(_texts_in(answer)), answer_bytes / len(answer)
        return VisibleOutput(received_tokens(texts, scale=scale, images=images), images)
    if _EVENTS.match(answer) is None:  # unknown form: estimated by its size
        return VisibleOutput(tokens_by_size(answer_bytes))
    output, read_bytes = OutputEvents(), 0
    for part in _parts(answer):
        read_bytes += len(part)
        for line in part.split(b"\n"):
            if line.startswith(b"data:"):
                try:
                    event = orjson.loads(line[5:])
                except orjson.JSONDecodeError:  # cut off; or the end marker of the stream
                    output.texts += _texts_in(line[5:])
                    continue
                if type(event) is dict:
                    dialect.add_output(event, output)
    texts = max("".join(output.texts), "".join(output.repeated), key=len)
    images = output.unnamed_images + len(output.images)
    scale = answer_bytes / max(1, read_bytes)
    return VisibleOutput(received_tokens(texts, scale=scale, images=images), images)


def tokens_by_size(answer_bytes: int) -> int:
    """Return the estimated tokens of an answer that cannot be read."""
    return -(-answer_bytes // _BYTES_A_TOKEN)


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """Contents of an answer. images, visible: None if they were not read."""

    facts: AnswerFacts
    images: int | None
    visible: VisibleOutput | None


def read_answer(
    dialect: DialectSpec, record: CallRecord, *, whole: bool, counted: bool, images: bool
) -> ReadAnswer:
    """Read all that accounting needs from a record's answer in one function, which runs in a thread
    if the answer is large. whole: the answer is complete. counted: a model made it. images: images
    were requested."""
    text = record.text
    facts = dialect.answer_facts(text, omitted=record.omitted_bytes > 0, cut=not whole)
    is_known = whole and is_complete(facts.usage) and not is_zero(facts.usage)
    has_visible = counted and not is_known
    return ReadAnswer(
        facts,
        dialect.image_count(text) if images else None,
        visible_output(dialect, text, record.text_bytes) if has_visible else None,
    )


def _parts(stream: bytes) -> Iterator[bytes]:
    """Yield the stream, or samples of it that consist of whole lines."""
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
    """Return a model's texts in an answer that is not parsed field by field."""
    texts: list[str] = []
    for found in _OUTPUT.finditer(data):
        text = found[1]
        try:
            texts.append(str(orjson.loads(text)))
        except orjson.JSONDecodeError:  # cut, half of a surrogate pair, or an unknown protocol
            texts.append(text.strip(b'"').decode("utf-8", "replace"))
    for found in islice(_ARGUMENTS.finditer(data), _MOST_OBJECTS):
        called = data[found.end() : found.end() + _LONGEST_OBJECT_BYTES].decode("utf-8", "replace")
        try:
            texts.append(called[: _DECODER.raw_decode(called)[1]])
        except (ValueError, RecursionError):  # cut, or long
            texts.append(called)
    return texts


def as_text(value: Any) -> str:
    """Return the JSON of an object that a model has written."""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # nested too deeply to serialize
        return repr(value)


# An event ends with an empty line; both kinds of line end are in use. The \r before the first \n is
# left out, since a pattern that begins with one certain byte is found ten times as fast.
_END = re.compile(rb"\n\r?\n")
_ENDS = (b"\n\n", b"\r\n\r\n")
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
# Not null: other events without choices have that, such as results of a requested moderation.
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
# A usage event that also reports an error is sent to the client.
_ERROR = re.compile(rb'"error"\s*:\s*[{"]')
_LONGEST_HELD_BYTES = 1_000_000


def asking_for_usage(raw: bytes, body: JsonObject) -> bytes:
    """Return the body with `stream_options.include_usage` set, and its other bytes unchanged if
    possible."""
    if "stream_options" not in body:
        start = raw.index(b"{") + 1
        return b'%b"stream_options":{"include_usage":true},%b' % (raw[:start], raw[start:])
    options = {**object_of(body["stream_options"]), "include_usage": True}
    # Parsed from the bytes again: the parsed form of a large body lacks its files.
    return orjson.dumps({**orjson.loads(raw), "stream_options": options})


class WithoutUsageEvent:
    """Removes the usage event from a stream, piece by piece."""

    def __init__(self) -> None:
        self._held = b""
        self._through = False

    def take(self, piece: bytes) -> bytes:
        """Return the complete events of this piece and of the kept bytes, without the usage
        event."""
        if self._through:
            return piece
        if not self._held and piece.endswith(_ENDS) and not _is_usage(piece):
            return piece  # the usual case: whole events, and none to remove
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
        """Return the kept bytes of a stream that ended within an event."""
        held, self._held = self._held, b""
        return held


def _is_usage(event: bytes) -> bool:
    """Return whether the bytes contain the usage event."""
    if event.find(b'"usage"') < 0 or _NO_CHOICES.search(event) is None:
        return False
    return _USAGE.search(event) is not None
