"""Batches of the providers' own batch APIs: their lines, their states, and the pace of the work.

    validating > in progress > finalizing > completed
        |             |   \\> expired      (lines that were not reached in the window)
        \\> failed     \\> cancelling > cancelled

Nothing runs in the background: `BatchStore.advance` updates every batch to the time of the given
clock, so that a scaled or frozen clock scales or freezes the batches with it.

Invariants: a line ends once, and is billed only if it succeeds; the results of a batch are
available from the moment it ends; tokens count as enqueued from the creation of a batch until it
ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from secrets import token_hex
from typing import Any, Literal, Self

from tidegate.emulator.dialect import Json, Refused
from tidegate.emulator.settings import BatchPace

LineState = Literal["processing", "succeeded", "errored", "expired", "canceled"]
BatchState = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
ENDED: tuple[BatchState, ...] = ("failed", "completed", "expired", "cancelled")
_MS = 1_000_000
_S = 1_000_000_000
MOST_BATCHES = 10_000
MOST_FILES = 20_000


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """An answer's body, and its tokens as the ledger bills them."""

    body: Json
    output_tokens: int
    thoughts_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LineWork:
    """A line's parsed request: what it counts, and how its answer is composed."""

    kind: str
    model: str
    prompt: str
    input_tokens: int
    answer: Callable[[], LineAnswer]
    method: str = "batch"


@dataclass(slots=True)
class ProviderBatchLine:
    """A request of a batch. `refused` is the error of a request that the provider refuses."""

    custom_id: str
    work: LineWork | None
    refused: Refused | None = None
    metadata: Json | None = None
    state: LineState = "processing"
    answered: LineAnswer | None = None
    ended_ns: int = 0

    @classmethod
    def of(
        cls, custom_id: str, parsed: Callable[[], LineWork], metadata: Json | None = None
    ) -> Self:
        """Return the line of a request, parsed by `parsed`, or with its refusal."""
        try:
            return cls(custom_id, parsed(), None, metadata)
        except Refused as refused:
            return cls(custom_id, None, refused, metadata)

    @property
    def input_tokens(self) -> int:
        return 0 if self.work is None else self.work.input_tokens


@dataclass(slots=True)
class ProviderBatch:
    """A batch. `errors` fail it in validation; `facts` are the parameters of its creator.

    Times are ns on the emulator's clock; a time in the future is 0.
    """

    id: str
    dialect: str
    model: str
    lines: Sequence[ProviderBatchLine]
    facts: Mapping[str, Any]
    errors: Sequence[Json]
    created_ns: int
    validated_ns: int
    started_ns: int
    line_ns: int
    finalizing_ns: int
    cancelling_ns: int
    expires_ns: int
    reachable: int  # lines that are processed if there is time; others are never reached
    done: int = 0
    cancel_ns: int = 0
    processed_ns: int = 0
    ended_ns: int = 0
    state: BatchState = "validating"
    files: dict[str, str] = field(default_factory=dict)  # result files by their use

    def due_ns(self, index: int) -> int:
        return self.started_ns + (index + 1) * self.line_ns

    def count(self, *states: LineState) -> int:
        return sum(line.state in states for line in self.lines)

    def enqueued_tokens(self, model: str) -> int:
        """Return the input tokens that the batch keeps in the queue of a model."""
        if self.state in ENDED:
            return 0
        of_model = (line for line in self.lines if line.work and line.work.model == model)
        return sum(line.input_tokens for line in of_model)


@dataclass(frozen=True, slots=True)
class JsonLinesFile:
    """A file of JSON lines, kept whole: the input of a batch or its results."""

    id: str
    filename: str
    purpose: str
    data: bytes
    created_ns: int
    expires_after_s: int | None = None


Record = Callable[[ProviderBatchLine, str], None]  # a succeeded line and its dialect


class BatchStore:
    """All batches and their files. `record` adds each succeeded line to the ledger."""

    def __init__(self, clock_ns: Callable[[], int], random: Random, record: Record) -> None:
        self._clock_ns = clock_ns
        self._random = random
        self._record = record
        self._batches: dict[str, ProviderBatch] = {}
        self._open: dict[str, ProviderBatch] = {}
        self._files: dict[str, JsonLinesFile] = {}

    def clear(self) -> None:
        self._batches.clear()
        self._open.clear()
        self._files.clear()

    def now_ns(self) -> int:
        return self._clock_ns()

    def create(
        self,
        prefix: str,
        dialect: str,
        model: str,
        lines: Sequence[ProviderBatchLine],
        pace: BatchPace,
        window_s: float,
        facts: Mapping[str, Any],
        errors: Sequence[Json] = (),
    ) -> ProviderBatch:
        """Enqueue a batch; `window_s` is the provider's own, used if the pace sets none.

        Raises Refused (429) if the emulator holds too many.
        """
        if len(self._batches) >= MOST_BATCHES:
            raise Refused(429, "Too many batches are stored.")
        now_ns = self._clock_ns()
        validated_ns = now_ns + round(pace.validating_ms * _MS)
        stuck = pace.expired_share > 0 and self._random.random() < pace.expired_share
        for line in lines:
            failing = pace.failed_share > 0 and self._random.random() < pace.failed_share
            if failing and line.refused is None:
                line.refused = Refused(500, "The server had an error processing this request.")
        batch = ProviderBatch(
            id=f"{prefix}{token_hex(12)}",
            dialect=dialect,
            model=model,
            lines=lines,
            facts=facts,
            errors=errors,
            created_ns=now_ns,
            validated_ns=validated_ns,
            started_ns=validated_ns + round(pace.delay_ms.draw_ms(self._random) * _MS),
            line_ns=round(pace.line_ms * _MS),
            finalizing_ns=round(pace.finalizing_ms * _MS),
            cancelling_ns=round(pace.cancelling_ms * _MS),
            expires_ns=now_ns + round((pace.window_s or window_s) * _S),
            reachable=round(len(lines) * pace.partial_share) if stuck else len(lines),
        )
        self._batches[batch.id] = self._open[batch.id] = batch
        return batch

    def find(self, batch_id: str, dialect: str, missing: str) -> ProviderBatch:
        """Return a batch. Raises Refused (404) with the message `missing`."""
        batch = self._batches.get(batch_id)
        if batch is None or batch.dialect != dialect:
            raise Refused(404, missing)
        return batch

    def delete(self, batch: ProviderBatch) -> None:
        del self._batches[batch.id]
        self._open.pop(batch.id, None)

    def newest(self, dialect: str) -> list[ProviderBatch]:
        """Return the batches of a dialect, the newest first."""
        found = [batch for batch in self._batches.values() if batch.dialect == dialect]
        return found[::-1]

    def open(self, dialect: str) -> Iterator[ProviderBatch]:
        return (batch for batch in self._open.values() if batch.dialect == dialect)

    def cancel(self, batch: ProviderBatch) -> None:
        """Begin to cancel a batch that has not ended. Idempotent."""
        if batch.state not in ENDED and not batch.cancel_ns:
            batch.cancel_ns = self._clock_ns()
            self._advance(batch, batch.cancel_ns)

    def keep(self, file: JsonLinesFile) -> None:
        """Store a file. Raises Refused (429) if the emulator holds too many."""
        if len(self._files) >= MOST_FILES:
            raise Refused(429, "Too many files are stored.")
        self._files[file.id] = file

    def file(self, file_id: str) -> JsonLinesFile | None:
        return self._files.get(file_id)

    def forget_file(self, file_id: str) -> None:
        del self._files[file_id]

    def files(self) -> list[JsonLinesFile]:
        """Return all files, the newest first."""
        return list(self._files.values())[::-1]

    def advance(self) -> None:
        """Update all batches to the current time."""
        if not self._open:
            return
        now_ns = self._clock_ns()
        for batch in list(self._open.values()):
            self._advance(batch, now_ns)

    def _advance(self, batch: ProviderBatch, now_ns: int) -> None:
        if batch.errors:
            if now_ns >= batch.validated_ns:
                self._end(batch, "failed", batch.validated_ns)
            return
        stop_ns = batch.cancel_ns + batch.cancelling_ns if batch.cancel_ns else batch.expires_ns
        self._process(batch, min(now_ns, stop_ns, batch.expires_ns))
        finished_ns = batch.processed_ns + batch.finalizing_ns
        if batch.done == len(batch.lines) and now_ns >= finished_ns <= stop_ns:
            self._end(batch, "completed", finished_ns)
        elif batch.cancel_ns and now_ns >= stop_ns:
            self._give_up(batch, "canceled", stop_ns)
            self._end(batch, "cancelled", stop_ns)
        elif now_ns >= batch.expires_ns:
            self._give_up(batch, "expired", batch.expires_ns)
            self._end(batch, "expired", batch.expires_ns)
        elif batch.cancel_ns:
            batch.state = "cancelling"
        elif now_ns < batch.validated_ns:
            batch.state = "validating"
        else:
            batch.state = "finalizing" if batch.done == len(batch.lines) else "in_progress"

    def _process(self, batch: ProviderBatch, until_ns: int) -> None:
        """Process the lines that are due."""
        while batch.done < batch.reachable and batch.due_ns(batch.done) <= until_ns:
            line = batch.lines[batch.done]
            line.ended_ns = batch.processed_ns = batch.due_ns(batch.done)
            batch.done += 1
            if line.work is None or line.refused is not None:
                line.state = "errored"
                continue
            line.state, line.answered = "succeeded", line.work.answer()
            self._record(line, batch.dialect)

    @staticmethod
    def _give_up(batch: ProviderBatch, state: LineState, at_ns: int) -> None:
        for line in batch.lines[batch.done :]:
            line.state, line.ended_ns = state, at_ns

    def _end(self, batch: ProviderBatch, state: BatchState, at_ns: int) -> None:
        batch.state, batch.ended_ns = state, at_ns
        self._open.pop(batch.id, None)
