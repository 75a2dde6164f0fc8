"""The ground truth: who is being served, who was, and how it ended.

Invariant: for every kind, arrived = started + refused, and started = finished + failed +
client_gone + in_flight, at every moment. An entry ends once; a second end changes nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, Literal

from tidegate.providers.emulator.settings import KINDS

Ending = Literal["finished", "failed", "client_gone", "refused"]
PROMPT_CHARS = 200
MOST_MODELS = 1000  # with totals of their own: a client may name any
OTHER_MODELS = "(others)"


@dataclass(slots=True)
class KindStats:
    """Counts of one kind. `over` are those refused by a concurrency limit, also in `refused`."""

    arrived: int = 0
    started: int = 0
    finished: int = 0
    failed: int = 0  # ended by a fault that was ordered
    client_gone: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    over: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by the limit's name
    bytes: int = 0  # of answers sent


@dataclass(slots=True)
class Billed:
    """LLM tokens of ended calls: `output_tokens` with the thoughts among them.

    Of a finished call this is the usage that the client was told (in a stream that does not tell
    it: what it would have told). Of one that broke off it is the input, and the output that had
    been sent, or nothing when no byte of an answer had been; a whole answer counts in full from
    its first byte on, since all of it had been made.
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    thoughts_tokens: int = 0

    def add(self, other: Billed) -> None:
        self.calls += other.calls
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.thoughts_tokens += other.thoughts_tokens


@dataclass(slots=True)
class LoggedCall:
    """One call. Times are ns of the wall clock; `outcome` is None while it is in flight.

    Its LLM tokens are as `Billed` counts them, so far.
    """

    id: int
    kind: str
    model: str
    method: str
    prompt: str  # its first 200 characters
    prompt_sha: str  # SHA-256 of the whole, hexadecimal
    started_ns: int
    ended_ns: int | None = None
    outcome: Ending | None = None
    limit: str | None = None  # which limit refused it
    fault: str | None = None  # which fault it was given
    bytes: int = 0
    dialect: str = "gemini"
    input_tokens: int = 0
    output_tokens: int = 0
    thoughts_tokens: int = 0
    traceparent: str = ""  # as the request bore it


class Ledger:
    def __init__(self, log_size: int) -> None:
        self._stats = {kind: KindStats() for kind in KINDS}
        self._billed: dict[str, dict[str, Billed]] = {}
        self._log: deque[LoggedCall] = deque(maxlen=log_size)
        self._last_id = 0
        self._in_flight_total = 0
        self._max_in_flight_total = 0

    def of(self, kind: str) -> KindStats:
        return self._stats[kind]

    @property
    def in_flight_total(self) -> int:
        """In flight over all kinds but `other`."""
        return self._in_flight_total

    def arrive(
        self, kind: str, model: str, method: str, prompt: str, dialect: str = "gemini"
    ) -> LoggedCall:
        """Log an arrival; `start` or `refuse` must follow at once."""
        self._last_id += 1
        digest = sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
        call = LoggedCall(
            self._last_id, kind, model, method, prompt[:PROMPT_CHARS], digest, time.time_ns()
        )
        call.dialect = dialect
        self._log.append(call)
        self._stats[kind].arrived += 1
        return call

    def refuse(self, call: LoggedCall, limit: str, *, over: bool) -> None:
        stats = self._stats[call.kind]
        stats.refused[limit] = stats.refused.get(limit, 0) + 1
        stats.over += over
        call.limit = limit
        call.outcome, call.ended_ns = "refused", time.time_ns()

    def start(self, call: LoggedCall) -> None:
        stats = self._stats[call.kind]
        stats.started += 1
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        if call.kind != "other":
            self._in_flight_total += 1
            self._max_in_flight_total = max(self._max_in_flight_total, self._in_flight_total)

    def end(self, call: LoggedCall, outcome: Ending) -> None:
        """End a started call. Idempotent: the first ending stands."""
        if call.outcome is not None:
            return
        call.outcome, call.ended_ns = outcome, time.time_ns()
        if call.input_tokens or call.output_tokens:
            self._bill(call, outcome)
        stats = self._stats[call.kind]
        stats.in_flight -= 1
        if call.kind != "other":
            self._in_flight_total -= 1
        match outcome:
            case "finished":
                stats.finished += 1
            case "client_gone":
                stats.client_gone += 1
            case _:
                stats.failed += 1

    def charge(
        self, call: LoggedCall, input_tokens: int, output_tokens: int, thoughts_tokens: int = 0
    ) -> None:
        """What the call costs with the bytes that go out next; the last word stands at its end."""
        if call.outcome is None:
            call.input_tokens = input_tokens
            call.output_tokens = output_tokens
            call.thoughts_tokens = thoughts_tokens

    def _bill(self, call: LoggedCall, outcome: Ending) -> None:
        known = call.model in self._billed or len(self._billed) < MOST_MODELS
        by_outcome = self._billed.setdefault(call.model if known else OTHER_MODELS, {})
        cost = Billed(1, call.input_tokens, call.output_tokens, call.thoughts_tokens)
        by_outcome.setdefault(outcome, Billed()).add(cost)

    def sent(self, call: LoggedCall, count_bytes: int) -> None:
        call.bytes += count_bytes
        self._stats[call.kind].bytes += count_bytes

    def would_peak(self, kind: str) -> bool:
        """Whether one more in flight would be a new maximum, of its kind or over all."""
        stats = self._stats[kind]
        return (
            stats.in_flight >= stats.max_in_flight
            or self._in_flight_total >= self._max_in_flight_total
        )

    def calls(self, since: int = 0) -> Iterator[LoggedCall]:
        """The log in order of arrival, from the first with an id above `since`."""
        return (call for call in self._log if call.id > since)

    def reset(self) -> None:
        """Forget what has ended. Calls in flight stay in flight, so that their end still counts."""
        self._billed.clear()
        running = [call for call in self._log if call.outcome is None]
        self._log.clear()
        self._log.extend(running)
        for kind, old in self._stats.items():
            count = old.in_flight
            self._stats[kind] = KindStats(
                arrived=count, started=count, in_flight=count, max_in_flight=count
            )
        self._max_in_flight_total = self._in_flight_total

    def to_json(self) -> dict[str, Any]:
        return {
            "kinds": {kind: asdict(stats) for kind, stats in self._stats.items()},
            "in_flight": self._in_flight_total,
            "max_in_flight": self._max_in_flight_total,
            "last_id": self._last_id,
            "tokens": {
                model: {outcome: asdict(billed) for outcome, billed in by_outcome.items()}
                for model, by_outcome in self._billed.items()
            },
        }
