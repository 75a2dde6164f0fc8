"""Usage of an answer as the provider reports it, and the removal of unrequested usage events. Pure.

Usage is read at its known place alone (`usage`, `response.usage`, `message.usage`,
`usageMetadata`). Details are cache writes, audio, image and video tokens, searches and the
provider's own cost, in the names of OpenAI and compatible providers (Azure, OpenRouter, xAI,
Perplexity, Mistral, Alibaba, LiteLLM), Anthropic and Gemini. The gateway requests usage events of
chat completion streams; a client that has not requested one does not receive it.

Invariants: unreported usage is unknown, never zero; text of a request or a model is never taken
for usage; parsing never raises; a figure that is no whole number or is too large is skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson

from tidegate.call import UNKNOWN_USAGE, Usage, UsageDetails
from tidegate.dialects.routes import Dialect

MOST_TOKENS = 10**12  # more is no count of one call, and no column could hold the sums
_MOST_ITEMS = 10_000
_MOST_MODALITIES = 64
_MICROS = 1_000_000
_TICKS_A_MICRO = 10_000  # xAI's ticks: 10^10 are a dollar
_MOST_DOLLARS = 1_000_000
_MOST_TICKS = _MOST_DOLLARS * _MICROS * _TICKS_A_MICRO
# Beside the tokens in OpenAI's dialect: who asks for these looks further.
_BESIDE_TOKENS = frozenset(
    (
        *("cost", "cost_in_usd_ticks", "server_tool_use", "server_tool_use_details"),
        *("server_side_tool_usage_details", "num_search_queries", "num_sources_used"),
        "cache_creation_input_tokens",
    )
)
# Google's modalities by name, and by number where it writes its enumerations so.
_AUDIO = frozenset(("AUDIO", 4))
_IMAGE = frozenset(("IMAGE", 2))
_VIDEO = frozenset(("VIDEO", 3))

Modalities = Iterable[tuple[Any, Any]]


def openai_details(
    raw: Mapping[str, Any], taken: Mapping[str, Any], given: Mapping[str, Any]
) -> UsageDetails | None:
    """Of a usage in OpenAI's dialect. `taken` and `given` are its details of input and output."""
    if _BESIDE_TOKENS.isdisjoint(raw) and not (_has_parts(taken) or _has_parts(given)):
        return None  # as of most calls
    written = audio = image = video = said_audio = said_image = said_video = None
    if taken:
        written = _detail_count(taken, "cache_write_tokens") or _detail_count(
            taken, "cache_creation_tokens"
        )
        written = written or _detail_count(taken, "cache_creation_input_tokens")
        audio, image = _detail_count(taken, "audio_tokens"), _detail_count(taken, "image_tokens")
        video = _detail_count(taken, "video_tokens")
    if given:
        said_audio, said_image = (
            _detail_count(given, "audio_tokens"),
            _detail_count(given, "image_tokens"),
        )
        said_video = _detail_count(given, "video_tokens")
    searches = cost = None
    if not _BESIDE_TOKENS.isdisjoint(raw):
        written = written or _detail_count(raw, "cache_creation_input_tokens")
        searches, cost = _searches(raw), _cost_micros(raw)
    parts = (audio, image, video, said_audio, said_image, said_video)
    if written or searches or cost is not None or any(parts):
        return UsageDetails(written, None, None, *parts, searches, cost)
    return None


def _has_parts(details: Mapping[str, Any]) -> Any:
    of = details.get
    return details and (
        of("audio_tokens")
        or of("image_tokens")
        or of("video_tokens")
        or of("cache_write_tokens")
        or of("cache_creation_tokens")
        or of("cache_creation_input_tokens")
    )


def anthropic_details(raw: Mapping[str, Any]) -> UsageDetails | None:
    """Of a usage of Anthropic's."""
    written = _detail_count(raw, "cache_creation_input_tokens")
    split = raw.get("cache_creation") if written else None
    short = hour = None
    if type(split) is dict:
        short = _detail_count(split, "ephemeral_5m_input_tokens")
        hour = _detail_count(split, "ephemeral_1h_input_tokens")
    searches = _searches(raw) if "server_tool_use" in raw else None
    if written or searches:
        return UsageDetails(written, short, hour, searches=searches)
    return None


def gemini_details(raw: Mapping[str, Any]) -> UsageDetails | None:
    """Of a `usageMetadata` of Gemini's."""
    taken, given = raw.get("promptTokensDetails"), raw.get("candidatesTokensDetails")
    by_tools = raw.get("toolUsePromptTokensDetails")
    if _is_text(taken) and not by_tools and (not given or _is_text(given)):
        return None  # as of most calls
    return modality_details([*_pairs(taken), *_pairs(by_tools)], _pairs(given))


def _is_text(rows: Any) -> bool:
    """Whether a list of tokens by modality has those of text alone."""
    if type(rows) is not list or len(rows) != 1:
        return False
    only = rows[0]
    return type(only) is dict and only.get("modality") == "TEXT"


def modality_details(taken: Modalities, given: Modalities) -> UsageDetails | None:
    """Of the tokens of input and output by modality."""
    parts = (*_by_modality(taken), *_by_modality(given))
    return UsageDetails(None, None, None, *parts) if any(parts) else None


def audio_in(details: UsageDetails | None, tokens: int) -> UsageDetails:
    """`details` with so many tokens of audio in the input, which no field of theirs reports."""
    return replace(details or UsageDetails(), input_audio_tokens=tokens)


def with_searches(usage: Usage, searches: int) -> Usage:
    """The usage with the searches that its answer shows, where it reports fewer itself."""
    details = usage.details or UsageDetails()
    if searches <= (details.searches or 0):
        return usage
    return replace(usage, details=replace(details, searches=searches))


def searches_of_response(response: Mapping[str, Any]) -> int:
    """How many searches of the web a response of OpenAI's reports, or else shows as its items."""
    used = response.get("tool_usage")
    web = used.get("web_search") if type(used) is dict else None
    told = _detail_count(web, "num_requests") if type(web) is dict else None
    items = response.get("output")
    if told or type(items) is not list:
        return told or 0
    return sum(map(_is_search, items[:_MOST_ITEMS]))


def queries_of(chunk: Any) -> set[str]:
    """What Gemini searched the web for, by the grounding of one answer or of a piece of it."""
    found: set[str] = set()
    candidates = chunk.get("candidates") if type(chunk) is dict else None
    for candidate in candidates if type(candidates) is list else ():
        grounding = candidate.get("groundingMetadata") if type(candidate) is dict else None
        queries = grounding.get("webSearchQueries") if type(grounding) is dict else None
        if type(queries) is list:
            found.update(one for one in queries[:_MOST_ITEMS] if type(one) is str and one)
    return found


def _is_search(item: Any) -> bool:
    """Opening a page that was found, or looking into it, is no search of its own."""
    if type(item) is not dict or item.get("type") != "web_search_call":
        return False
    action = item.get("action")
    return type(action) is not dict or action.get("type") in (None, "search")


def _searches(raw: Mapping[str, Any]) -> int | None:
    for name in ("server_tool_use", "server_tool_use_details"):  # Anthropic's, OpenRouter's
        used = raw.get(name)
        if type(used) is dict and (count := _detail_count(used, "web_search_requests")):
            return count
    used = raw.get("server_side_tool_usage_details")  # xAI's
    if type(used) is dict:
        both = (_detail_count(used, "web_search_calls") or 0) + (
            _detail_count(used, "x_search_calls") or 0
        )
        if both:
            return both
    return _detail_count(raw, "num_search_queries") or _detail_count(raw, "num_sources_used")


def _cost_micros(raw: Mapping[str, Any]) -> int | None:
    ticks = raw.get("cost_in_usd_ticks")
    if type(ticks) is int and 0 <= ticks <= _MOST_TICKS:
        return (ticks + _TICKS_A_MICRO // 2) // _TICKS_A_MICRO
    cost = raw.get("cost")
    if type(cost) is dict:  # Perplexity's
        cost = cost.get("total_cost")
    if isinstance(cost, bool) or not isinstance(cost, int | float):
        return None
    if not 0 <= cost <= _MOST_DOLLARS:  # nor what is no number
        return None
    return int(cost * _MICROS + 0.5)


def _pairs(rows: Any) -> list[tuple[Any, Any]]:
    if type(rows) is not list:
        return []
    return [
        (one.get("modality"), one.get("tokenCount"))
        for one in rows[:_MOST_MODALITIES]
        if type(one) is dict
    ]


def _by_modality(pairs: Modalities) -> tuple[int | None, int | None, int | None]:
    audio = image = video = 0
    for modality, tokens in pairs:
        if type(tokens) is not int or not 0 < tokens <= MOST_TOKENS:
            continue
        if type(modality) not in (str, int):
            continue
        if modality in _AUDIO:
            audio += tokens
        elif modality in _IMAGE:
            image += tokens
        elif modality in _VIDEO:
            video += tokens
    return audio or None, image or None, video or None


def _detail_count(raw: Mapping[str, Any], name: str) -> int | None:
    value = raw.get(name)
    return value if type(value) is int and 0 < value <= MOST_TOKENS else None


HEAD_BYTES = 4_096
TAIL_BYTES = 65_536
_LONGEST_LIST_BYTES = 2_000_000
# Of a stream: the usage stands in one of its last events, where it is told at all.
_LAST_EVENTS = 8
_FIRST_EVENTS = 4
_MOST_CANDIDATES = 64
_PLACES = {
    Dialect.OPENAI: "usage",
    Dialect.ANTHROPIC: "usage",
    Dialect.GEMINI: "usageMetadata",
}
_DETAILS = frozenset(
    (
        *("completion_tokens_details", "output_tokens_details"),
        *("prompt_tokens_details", "input_tokens_details"),
    )
)
_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s,]*")  # the objects of a list
_KEYS = {
    Dialect.OPENAI: re.compile(rb'"usage"\s*:\s*\{'),
    Dialect.ANTHROPIC: re.compile(rb'"usage"\s*:\s*\{'),
    Dialect.GEMINI: re.compile(rb'"usageMetadata"\s*:\s*\{'),
}
# One that a response made by calling a tool; an event or two before repeat it.
_CALLED_PICTURE = re.compile(
    rb'"id"\s*:\s*"([^"\\]{1,200})"\s*,\s*"type"\s*:\s*"image_generation_call"'
    rb'[^{}]{0,2000}?"result"\s*:\s*"[^"]'
)
_PICTURES = {
    Dialect.OPENAI: re.compile(rb'"b64_json"\s*:\s*"|"url"\s*:\s*"'),
    Dialect.GEMINI: re.compile(rb'"inlineData"\s*:\s*\{'),
}


def usage_in(dialect: Dialect, answer: bytes, omitted: bool, cut: bool) -> dict[str, Any] | None:
    """The usage of an answer in the provider's words; None where it tells none. `omitted`: its
    middle is missing; its last `TAIL_BYTES` are in one piece. `cut`: it may not have come to its
    end, so that an object of its inside may be the last that came."""
    start = answer[:HEAD_BYTES].lstrip()[:1]
    if start == b"{":
        return None if cut else _of_outermost(dialect, answer[-TAIL_BYTES:])
    if start == b"[":
        tail = answer[-TAIL_BYTES:].rstrip()
        ended = tail.endswith(b"]") and not cut
        found = _of_outermost(dialect, tail[:-1]) if ended else None
        return _of_list(dialect, answer) if found is None and not omitted else found
    floor = answer.find(b"\n", len(answer) - TAIL_BYTES) if omitted else 0
    raw = None
    for event in last_events(answer, max(0, floor)):
        if (raw := _of_event(dialect, event)) is not None:
            break
    if dialect is Dialect.ANTHROPIC:
        # The input is told in the first event of a stream, the output in the last.
        begun = _of_start(answer)
        return _merged(begun, raw) if begun and raw else raw or begun
    return raw


def _of_outermost(dialect: Dialect, tail: bytes) -> dict[str, Any] | None:
    """The usage of an object that has come to its end, of which these are the last bytes.

    What follows a key closes as many objects and lists as the key is in. So only of a key of the
    outermost object the rest is an object once more when a brace is put before it.
    """
    key = _PLACES[dialect]
    places = [found.start() for found in _KEYS[dialect].finditer(tail)]
    for place in reversed(places[-_MOST_CANDIDATES:]):
        try:
            found = orjson.loads(b"{" + tail[place:])[key]
        except orjson.JSONDecodeError:
            continue
        if type(found) is dict:
            return found
    return None


def _of_list(dialect: Dialect, answer: bytes) -> dict[str, Any] | None:
    """The last usage that a whole object of a list tells; the list may be cut."""
    if len(answer) > _LONGEST_LIST_BYTES:
        return None
    text = answer.decode("utf-8", "replace")
    place, raw = text.index("[") + 1, None
    while (gap := _BETWEEN.match(text, place)) is not None:
        try:
            value, place = _DECODER.raw_decode(text, gap.end())
        except (ValueError, RecursionError):
            break
        if type(value) is dict and type(told := value.get(_PLACES[dialect])) is dict:
            raw = told
    return raw


def last_events(answer: bytes, floor: int = 0) -> Iterator[Any]:
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
                yield orjson.loads(line)
        if place < 0:
            return
        end = place


def _merged(begun: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """A later figure counts, but for one that is null."""
    return begun | {name: value for name, value in raw.items() if value is not None}


def _of_start(answer: bytes) -> dict[str, Any] | None:
    """The usage that `message_start` tells, among the first events of a stream."""
    for line in answer[:TAIL_BYTES].split(b"\n", 4 * _FIRST_EVENTS):
        if line.startswith(b"data:") and b'"message_start"' in line:
            try:
                message = part_of(orjson.loads(line[5:]), "message")
            except (orjson.JSONDecodeError, AttributeError):
                return None
            return part_of(message, "usage") or None
    return None


def _of_event(dialect: Dialect, event: Any) -> dict[str, Any] | None:
    """The usage of one event of a stream, at the places where providers tell it."""
    if type(event) is not dict:
        return None
    if dialect is Dialect.GEMINI:
        return part_of(event, "usageMetadata") or None
    if dialect is Dialect.ANTHROPIC:
        return part_of(event, "usage") or None
    if found := part_of(event, "usage") or part_of(part_of(event, "response"), "usage"):
        return found
    choices = event.get("choices")  # Groq's place, and Moonshot's
    last = choices[-1] if type(choices) is list and choices else None
    return part_of(part_of(event, "x_groq"), "usage") or part_of(last, "usage") or None


def pictures_in(dialect: Dialect, body: bytes) -> int:
    """How many pictures a whole answer holds."""
    if dialect is Dialect.OPENAI and b'"image_generation_call"' in body:
        return len(set(_CALLED_PICTURE.findall(body)))
    pattern = _PICTURES.get(dialect)
    return 0 if pattern is None else len(pattern.findall(body))


def usage_at(dialect: Dialect, whole: dict[str, Any]) -> Usage:
    """The usage of a whole answer that was parsed."""
    raw = whole.get(_PLACES[dialect])
    return usage_of(dialect, raw) if type(raw) is dict else UNKNOWN_USAGE


def usage_of(dialect: Dialect, raw: Mapping[str, Any]) -> Usage:
    """The usage in a provider's own words. Where they do not add up, their total counts."""
    if dialect is Dialect.GEMINI:
        return _gemini(raw)
    return _anthropic(raw) if dialect is Dialect.ANTHROPIC else _openai(raw)


def _openai(raw: Mapping[str, Any]) -> Usage:
    taken = _count(raw, "prompt_tokens", "input_tokens")
    given = _count(raw, "completion_tokens", "output_tokens")
    total = _count(raw, "total_tokens")
    thoughts = cached = None
    of_taken: dict[str, Any] = {}
    of_given: dict[str, Any] = {}
    if not _DETAILS.isdisjoint(raw):
        of_given = part_of(raw, "completion_tokens_details", "output_tokens_details")
        thoughts = _count(of_given, "reasoning_tokens") if of_given else None
        of_taken = part_of(raw, "prompt_tokens_details", "input_tokens_details")
        cached = _count(of_taken, "cached_tokens") if of_taken else None
    if cached is None:  # Moonshot's and Together's name, Mistral's; DeepSeek's
        cached = _count(raw, "cached_tokens", "num_cached_tokens")
        cached = _count(raw, "prompt_cache_hit_tokens") if cached is None else cached
    details = openai_details(raw, of_taken, of_given)
    if taken is not None and total is not None and total > taken + (given or 0):
        if given is not None and "prompt_audio_seconds" in raw:
            # Mistral's input beside the text.
            details = audio_in(details, total - given - taken)
            taken = total - given
        else:
            # An embedding's input is all; xAI leaves the thoughts out of the output, and Gemini
            # tells in OpenAI's dialect of none.
            if thoughts is None and given is not None:
                thoughts = total - taken - given
            given = total - taken
    elif given is None and taken is not None and total is not None:
        given = 0
    if given is not None and thoughts is not None:
        # They are in it; ours are apart.
        thoughts = min(thoughts, given)
        given -= thoughts
    return Usage(
        input_tokens=taken,
        output_tokens=given,
        thoughts_tokens=thoughts,
        cached_tokens=cached,
        total_tokens=total,
        details=details,
    )


def _gemini(raw: Mapping[str, Any]) -> Usage:
    taken, total = _count(raw, "promptTokenCount"), _count(raw, "totalTokenCount")
    tools = _count(raw, "toolUsePromptTokenCount")
    given, thoughts = _count(raw, "candidatesTokenCount"), _count(raw, "thoughtsTokenCount")
    if given is None and total is not None and taken is not None:
        # It leaves out what is 0.
        given = max(0, total - taken - (thoughts or 0) - (tools or 0))
    return Usage(
        input_tokens=taken if taken is None or tools is None else taken + tools,
        output_tokens=given,
        thoughts_tokens=thoughts,
        cached_tokens=_count(raw, "cachedContentTokenCount"),
        total_tokens=total,
        details=gemini_details(raw),
    )


def _anthropic(raw: Mapping[str, Any]) -> Usage:
    fresh, given = _count(raw, "input_tokens"), _count(raw, "output_tokens")
    written = _count(raw, "cache_creation_input_tokens") or 0
    cached = _count(raw, "cache_read_input_tokens")
    taken = None if fresh is None else fresh + written + (cached or 0)
    total = None if taken is None or given is None else taken + given
    thoughts = _count(part_of(raw, "output_tokens_details"), "thinking_tokens")
    if given is not None and thoughts is not None:
        thoughts = min(thoughts, given)
        given -= thoughts
    return Usage(taken, given, thoughts, cached, total, anthropic_details(raw))


def part_of(raw: Any, *names: str) -> dict[str, Any]:
    """The first of these members that is an object; empty where there is none."""
    if type(raw) is dict:
        for name in names:
            value = raw.get(name)
            if type(value) is dict:
                return value
    return {}


def _count(raw: Mapping[str, Any], name: str, other: str | None = None) -> int | None:
    value = raw.get(name)
    if type(value) is int and 0 <= value <= MOST_TOKENS:
        return value
    return None if other is None else _count(raw, other)


# An event ends with an empty line; providers write either kind of line.
_END = re.compile(rb"\r?\n\r?\n")
_ENDS = (b"\n\n", b"\r\n\r\n")
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
# Null beside what has no choices either, such as the results of a moderation that was asked for.
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
# Where a usage event tells an error too, it is for the client.
_ERROR = re.compile(rb'"error"\s*:\s*[{"]')
_LONGEST_EVENT_BYTES = 1_000_000


def asking_for_usage(raw: bytes, body: dict[str, Any]) -> bytes:
    """The body with `stream_options.include_usage`; otherwise as it came, where that can be."""
    if "stream_options" not in body:
        start = raw.index(b"{") + 1
        return b'%b"stream_options":{"include_usage":true},%b' % (raw[:start], raw[start:])
    options = body["stream_options"]
    asked = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    # From the bytes, since a large body is parsed without its files.
    return orjson.dumps({**orjson.loads(raw), "stream_options": asked})


class WithoutUsageEvent:
    """Give it the stream piece by piece; what it returns is for the client."""

    def __init__(self) -> None:
        self._held = b""
        self._through = False

    def take(self, piece: bytes) -> bytes:
        """The whole events in it, and in what was held back before."""
        if self._through:
            return piece
        if not self._held and piece.endswith(_ENDS) and not _is_usage(piece):
            return piece  # as nearly all are: whole events, and nothing in them to take out
        data = self._held + piece
        ends = [found.end() for found in _END.finditer(data)]
        whole, self._held = (data[: ends[-1]], data[ends[-1] :]) if ends else (b"", data)
        if len(self._held) > _LONGEST_EVENT_BYTES:  # not a stream of events: none of our business
            self._through = True
            whole, self._held = whole + self._held, b""
        if not _is_usage(whole):
            return whole
        starts = [0, *ends[:-1]]
        events = (whole[start:end] for start, end in zip(starts, ends, strict=True))
        return b"".join(event for event in events if not _is_usage(event) or _ERROR.search(event))

    def rest(self) -> bytes:
        """What was left when the stream ended, without the end of an event."""
        held, self._held = self._held, b""
        return held


def _is_usage(event: bytes) -> bool:
    """Whether it is the usage event, or holds it."""
    if b'"usage"' not in event or _NO_CHOICES.search(event) is None:
        return False
    return _USAGE.search(event) is not None
