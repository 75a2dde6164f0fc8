"""Parts of a usage beside its LLM tokens: cache writes, audio, images, video, searches, cost. Pure.

The names are those of OpenAI and the providers that speak its dialect (Azure, OpenRouter, xAI,
Perplexity, Mistral, Alibaba, LiteLLM), of Anthropic and of Gemini.

Invariant: never raises; a figure that is no whole number from 0 on, or too large, is left out, as
is a part that is 0. What is read here is a provider's `usage` alone, or the items and queries of
its searches at their known place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from tidegate.call import Usage, UsageDetails

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
        written = _count(taken, "cache_write_tokens") or _count(taken, "cache_creation_tokens")
        written = written or _count(taken, "cache_creation_input_tokens")
        audio, image = _count(taken, "audio_tokens"), _count(taken, "image_tokens")
        video = _count(taken, "video_tokens")
    if given:
        said_audio, said_image = _count(given, "audio_tokens"), _count(given, "image_tokens")
        said_video = _count(given, "video_tokens")
    searches = cost = None
    if not _BESIDE_TOKENS.isdisjoint(raw):
        written = written or _count(raw, "cache_creation_input_tokens")
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
    written = _count(raw, "cache_creation_input_tokens")
    split = raw.get("cache_creation") if written else None
    short = hour = None
    if type(split) is dict:
        short = _count(split, "ephemeral_5m_input_tokens")
        hour = _count(split, "ephemeral_1h_input_tokens")
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
    told = _count(web, "num_requests") if type(web) is dict else None
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
        if type(used) is dict and (count := _count(used, "web_search_requests")):
            return count
    used = raw.get("server_side_tool_usage_details")  # xAI's
    if type(used) is dict:
        both = (_count(used, "web_search_calls") or 0) + (_count(used, "x_search_calls") or 0)
        if both:
            return both
    return _count(raw, "num_search_queries") or _count(raw, "num_sources_used")


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


def _count(raw: Mapping[str, Any], name: str) -> int | None:
    value = raw.get(name)
    return value if type(value) is int and 0 < value <= MOST_TOKENS else None
