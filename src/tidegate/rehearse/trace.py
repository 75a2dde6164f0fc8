"""Who asks for what, and when: a trace, as CSV with a head or as JSON lines. Pure.

    time_ms,tenant,kind,model,duration_ms,input_tokens,output_tokens,priority,deadline_ms
    0,acme,text_only,gemini-2.5-flash,830,1200,300,0,30000

`time_ms` is needed, and one of `duration_ms` and `output_tokens`; of the rest what is not there is
as usual. Invariant: a trace that was read is sound, in order of time, and begins at 0.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from io import StringIO
from typing import Any

from tidegate.call import DEFAULT_TENANT, Kind
from tidegate.errors import ConfigError
from tidegate.limiter.limits import check_tenant
from tidegate.policy.scopes import KIND_NAMES

MOST_CALLS = 500_000
MOST_MS = 31 * 86_400_000
_KNOWN = (
    *("time_ms", "tenant", "kind", "model", "duration_ms", "input_tokens", "output_tokens"),
    *("images", "priority", "deadline_ms"),
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One call. `duration_ms` is how long the provider takes; `deadline_ms` bounds its wait, None
    for as long as needed; `images` are those that it makes."""

    time_ms: float
    tenant: str = DEFAULT_TENANT
    kind: str = Kind.TEXT_ONLY.value
    model: str = ""
    duration_ms: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    images: int = 0
    priority: int = 0
    deadline_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a call takes that only its tokens are known of."""

    first_ms: float = 400.0
    tokens_per_s: float = 150.0

    def duration_ms(self, output_tokens: int) -> float:
        return self.first_ms + output_tokens / self.tokens_per_s * 1000


class Usual:
    """What a trace leaves out: the model of each kind."""

    def __init__(self, models: Mapping[str, str], pace: Pace) -> None:
        self._models = models
        self._pace = pace

    def arrival(self, place: str, row: Mapping[str, Any]) -> Arrival:
        """One row. Raises ConfigError that names `place` and the field."""
        unknown = [key for key in row if key not in _KNOWN]
        if unknown:
            raise ConfigError(
                f"{place}: {unknown[0]}", "", f"is not known; known: {', '.join(_KNOWN)}"
            )
        read = _Row(place, row)
        tenant, kind = read.text("tenant", DEFAULT_TENANT), read.text("kind", Kind.TEXT_ONLY.value)
        try:
            check_tenant(tenant)
        except ConfigError as wrong:
            raise ConfigError(f"{place}: tenant", tenant, wrong.allowed) from None
        if kind not in KIND_NAMES:
            raise ConfigError(f"{place}: kind", kind, f"must be one of {', '.join(KIND_NAMES)}")
        output_tokens = round(read.number("output_tokens", 0.0))
        if not (read.has("duration_ms") or read.has("output_tokens")):
            raise ConfigError(f"{place}: duration_ms", "(not set)", "or output_tokens must be set")
        made = int(kind == Kind.IMAGE_GENERATION)
        return Arrival(
            time_ms=read.number("time_ms"),
            tenant=tenant,
            kind=kind,
            model=read.text("model", self._models.get(kind, "")),
            duration_ms=read.number("duration_ms", self._pace.duration_ms(output_tokens)),
            input_tokens=round(read.number("input_tokens", 0.0)),
            output_tokens=output_tokens,
            images=round(read.number("images", made)),
            priority=round(read.number("priority", 0.0, low=-100, high=100)),
            deadline_ms=round(read.number("deadline_ms")) if read.has("deadline_ms") else None,
        )


class _Row:
    def __init__(self, place: str, row: Mapping[str, Any]) -> None:
        self._place = place
        self._row = row

    def has(self, name: str) -> bool:
        return self._row.get(name) not in (None, "")

    def text(self, name: str, usual: str) -> str:
        return str(self._row[name]) if self.has(name) else usual

    def number(
        self, name: str, usual: float | None = None, *, low: float = 0, high: float = MOST_MS
    ) -> float:
        value = self._row[name] if self.has(name) else usual
        allowed = f"must be a number from {low:g} to {high:.0f}"
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            shown = "(not set)" if value is None else str(value)
            raise ConfigError(f"{self._place}: {name}", shown, allowed) from None
        if not low <= number <= high:  # also false for what is no number
            raise ConfigError(f"{self._place}: {name}", str(value), allowed)
        return number


def read_trace(name: str, text: str, usual: Usual) -> list[Arrival]:
    """The arrivals of a file called `name`, in order of time, the first at 0.

    JSON lines where the text begins with `{`, else CSV. Raises ConfigError with the file, the line
    and the field.
    """
    rows = _json_rows(name, text) if text.lstrip().startswith("{") else _csv_rows(text)
    found: list[Arrival] = []
    for line, row in rows:
        if len(found) >= MOST_CALLS:
            raise ConfigError(name, f"(more than {MOST_CALLS} calls)", "is too long")
        found.append(usual.arrival(f"{name}: line {line}", row))
    if not found:
        raise ConfigError(name, "(empty)", "must hold at least one call")
    return from_zero(found)


def from_zero(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """In order of time, the first one at 0."""
    found = sorted(arrivals, key=lambda arrival: arrival.time_ms)
    first_ms = found[0].time_ms if found else 0.0
    return [replace(arrival, time_ms=arrival.time_ms - first_ms) for arrival in found]


def write_trace(arrivals: Iterable[Arrival]) -> str:
    """As CSV that `read_trace` reads."""
    text = StringIO()
    names = [one.name for one in fields(Arrival)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for arrival in arrivals:
        values = (getattr(arrival, name) for name in names)
        writer.writerow(f"{value:.3f}" if isinstance(value, float) else value for value in values)
    return text.getvalue()


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(StringIO(text), restkey="(too many values)")
    for row in reader:
        yield reader.line_num, row


def _json_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ConfigError(f"{name}: line {number}", line[:40], "must be a JSON object")
        yield number, row
