"""Refusal: the common form of a provider's error, and the wait that it asks for. Pure.

The wait comes from headers, error details or sentences, and is bounded to 0 to
`MAX_RETRY_AFTER_MS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

# throttled: too much for now. unpaid: the account has no money left. key: the key is dead.
# busy: a server of one's own has no room at the moment, which is no fault. never: the same request
# would be refused again. of_thing: about something that the request names.
What = Literal["throttled", "unpaid", "key", "busy", "never", "of_thing"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """unit: what there was too much of. wait_ms: until when, beside what every dialect says of it.
    per_day: whether it was too much for a day. day_quota: for the day until midnight. of_account:
    whether it binds more than the model that was asked for.
    """

    what: What
    unit: str | None = None
    wait_ms: int | None = None
    per_day: bool = False
    day_quota: bool = False
    of_account: bool = False


@dataclass(frozen=True, slots=True)
class Said:
    """A provider's refusal as it came: the error object of the body, headers in lower case."""

    status: int
    error: Mapping[str, Any]
    headers: Mapping[str, str]
    now: datetime

    @property
    def message(self) -> str:
        """Its text, cut to what is worth searching."""
        return str(self.error.get("message", ""))[:4_000]

    @property
    def words(self) -> frozenset[str]:
        """Its type and code."""
        return frozenset(str(self.error.get(name)) for name in ("type", "code"))

    @property
    def details(self) -> list[dict[str, Any]]:
        """Google's list; empty where the details are something else."""
        found = self.error.get("details")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


MAX_RETRY_AFTER_MS = 86_400_000
_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
_DURATION = re.compile(r"^\s*(\d{1,9}(?:\.\d{1,9})?)\s*s?\s*$")
# A span of time as Go writes it, and with it OpenAI: 17ms, 1.5s, 6m0s, 1h2m3s.
_SPAN = re.compile(
    rf"(?=\d)(?:({_NUMBER})d)?(?:({_NUMBER})h)?(?:({_NUMBER})m(?!s))?(?:({_NUMBER})s)?(?:({_NUMBER})ms)?"
)
_SPANS_MS = (86_400_000, 3_600_000, 60_000, 1_000, 1)
_IN_MESSAGE = re.compile(
    r"\b(?:retry|try again) (?:in|after)\s+([\d.]{1,20}\s?[dhms][\d.dhms]{0,60})", re.IGNORECASE
)
# As Azure says it, and Anthropic of a month's limit.
_SECONDS = re.compile(r"\bretry after\s+(\d{1,6}) seconds?\b", re.IGNORECASE)
_DAY = re.compile(r"\bregain access on\s+(\d{4}-\d\d-\d\d)(?:\s+at\s+(\d\d:\d\d))?", re.IGNORECASE)


def retry_after_ms(
    error: Mapping[str, Any], details: list[dict[str, Any]], headers: Mapping[str, str]
) -> int | None:
    """None where nothing says how long."""
    for detail in details:
        if str(detail.get("@type", "")).endswith("RetryInfo"):
            found = _DURATION.match(str(detail.get("retryDelay", "")))
            if found:
                return bounded_ms(float(found[1]) * 1000)
    message = str(error.get("message", ""))[:4_000]
    if seconds := _SECONDS.search(message):
        return bounded_ms(float(seconds[1]) * 1000)
    said = _IN_MESSAGE.search(message)
    if said and (ms := span_ms(said[1])) is not None:
        return bounded_ms(ms)
    if re.fullmatch(_NUMBER, header := headers.get("retry-after-ms", "").strip()):
        return bounded_ms(float(header))
    return _of_header(headers.get("retry-after", ""))


def until_date_ms(message: str, now: datetime) -> int | None:
    """Until the day from which the account may spend again, in a sentence."""
    found = _DAY.search(message[:4_000])
    if found is None:
        return None
    return until_ms(f"{found[1]}T{found[2] or '00:00'}:00+00:00", now)


def until_ms(moment: str, now: datetime) -> int | None:
    """Until a moment as RFC 3339 writes it."""
    try:
        at = datetime.fromisoformat(moment.strip())
    except ValueError:
        return None
    at = at.replace(tzinfo=at.tzinfo or UTC)
    return bounded_ms((at - now).total_seconds() * 1000)


def span_ms(text: str) -> float | None:
    """None where it is not a span of time; a bare number is one of seconds."""
    text = text.replace(" ", "").lower().rstrip(".")
    if re.fullmatch(_NUMBER, text):
        return float(text) * 1000
    found = _SPAN.fullmatch(text)
    if found is None:
        return None
    parts = zip(found.groups(), _SPANS_MS, strict=True)
    return sum(float(part) * unit_ms for part, unit_ms in parts if part is not None)


def bounded_ms(value: float) -> int:
    """Whole, not below 0 and not over a day."""
    return min(max(0, round(value)), MAX_RETRY_AFTER_MS)


def _of_header(header: str) -> int | None:
    """Seconds, or a date."""
    found = _DURATION.match(header)
    if found:
        return bounded_ms(float(found[1]) * 1000)
    try:
        at = parsedate_to_datetime(header)
        left = at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)
    except (ValueError, TypeError, OverflowError):
        return None
    return bounded_ms(left.total_seconds() * 1000)
