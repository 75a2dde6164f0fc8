"""Batches in a worker: validation of the input, calls of the lines, assembly of the output.

Invariants: each step is claimed and can be repeated by another worker; a line is marked in
PostgreSQL before its call and ended after it, both fenced by its claim; only a few lines are in
memory; a valid line has a unique custom_id, names a model and requests no stream.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from uuid import UUID

import orjson

from tidegate.call import (
    DEFAULT_POOL,
    Caller,
    Classification,
    ClassifiedBy,
    Kind,
    Status,
    Tier,
    new_id,
)
from tidegate.dialects import endpoint_in
from tidegate.dialects.parsing import MOST_PARTS, has_too_many_parts
from tidegate.dialects.requests import in_tier, names_tier
from tidegate.errors import (
    BudgetExceeded,
    BudgetReserved,
    CallPreempted,
    ClaimLost,
    DeadlineExceeded,
    InvalidRequest,
    LastTryWaits,
    LeaseLost,
    LimiterUnavailable,
    NotFound,
    QueueFull,
    QuotaExceeded,
    ShuttingDown,
    StoreUnavailable,
    TidegateError,
    UpstreamTierBusy,
)
from tidegate.jobs.calls import (
    Feeder,
    Lacking,
    LastTries,
    OwnLimits,
    forever,
    is_of_upstream,
    retry_wait_ms,
    run_loops,
    targets_of,
    until_review,
)
from tidegate.jobs.outages import ClaimDepth, Held, Key, Turn
from tidegate.jobs.tiers import TierOffers
from tidegate.limiter import Permit
from tidegate.record import RETRIED, CallRecord, Failure
from tidegate.settings import Config
from tidegate.spine.detached import (
    LONGEST_BYTES,
    collected,
    detached_call,
    endpoint_named,
    wrapped_facts,
)
from tidegate.spine.models import is_lacking
from tidegate.spine.native import Relay
from tidegate.spine.run import CallFailed
from tidegate.store.batches import (
    MOST_LINES,
    OUTPUT,
    PRIORITY,
    Batch,
    BatchFile,
    BatchLine,
    ambiguous_of,
)
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.notifications import BATCHES, PULSED_MS
from tidegate.store.records import ClaimedJob, Json
from tidegate.store.store import Store
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import Trail

WINDOW = 128
MOST_BYTES = 32_000_000  # of the bodies in one claim
_STRAYS_EVERY_S = 5.0
_UNAVAILABLE_S = 0.25
_IDLE_MS = 500
_PUT_OFF_A_S, _PUT_OFF_AT_ONCE = 200.0, 1_000.0
_AGAIN_MS = 500.0
_SPENT_MS = 2_000.0  # before a batch with a spent budget is called again
_MADE_ROOM_MS = 2_000
EARLY_S = 30.0  # before its batch expires: a line that was put off is found seconds later
_NO_FLEX = "the flex tier has no capacity at the moment"
_LAST_RECORDS_S = 8.0
# Errors that do not concern the line: it can be called later.
_LATER = (
    LimiterUnavailable,
    QueueFull,
    StoreUnavailable,
    LeaseLost,
    ShuttingDown,
    DeadlineExceeded,  # the batch expires as a whole
    BudgetExceeded,  # the whole batch waits
    BudgetReserved,
)


@dataclass(slots=True)
class _ActiveLine:
    """A line with its task: it waits for admission, is called, then its end is written. job: the
    line as a job whose tier has been chosen, if its tenant allows several."""

    line: BatchLine
    record: CallRecord
    job: ClaimedJob | None = None
    is_over: bool = False
    turn: Turn | None = None

    @property
    def request_id(self) -> UUID:
        return self.line.id

    @property
    def lapses(self) -> int:
        return self.line.lapses

    @property
    def waits(self) -> bool:
        return self.record.waits and not self.is_over

    @property
    def is_called(self) -> bool:
        return not self.record.waits and not self.is_over


class LineCaller:
    """Calls one process's share of the lines of all batches."""

    def __init__(
        self,
        config: Config,
        store: Store,
        relay: Relay,
        held: Held,
        last_tries: LastTries,
        own_limits: OwnLimits,
        offers: TierOffers,
    ) -> None:
        self._held, self._last_tries, self._own_limits = held, last_tries, own_limits
        self._offers = offers
        self._outages = held.outages
        self._config = config
        self._store = store
        self._relay = relay
        self._strays_released_at = time.monotonic()
        window = ClaimDepth(a_s=_PUT_OFF_A_S, at_once=_PUT_OFF_AT_ONCE)
        self._lacking = Lacking()
        self._feeder = Feeder(
            store.notifications,
            BATCHES,
            held,
            window,
            self._window,
            claim=self._claim,
            waits_ms=lambda claimed: self._waits_ms(claimed, window.put_off),
            release=self._release,
            work=self._guarded,
            idle_ms=_IDLE_MS,
            passes_over=lambda: bool(self._full()),
        )

    @property
    def any(self) -> bool:
        """Whether this process has claimed lines."""
        return bool(self._feeder.tasks)

    async def feed(self) -> None:
        """Claim lines and call them, until cancelled."""
        await self._feeder.run()

    async def _claim(self, most: int) -> list[_ActiveLine]:
        if not await self._store.open_batches.has_own():
            return []
        await self._lacking.yield_claim()
        await self.leave_held_up()
        now = time.monotonic()
        if now - self._strays_released_at > _STRAYS_EVERY_S:
            self._strays_released_at = now
            await self._store.batch_lines.release_strays(
                one.line for one in self._feeder.tasks.values()
            )
        lines = await self._store.batch_lines.claim(most, MOST_BYTES, self._full())
        return [_ActiveLine(line, _record_of(line, self._trail_of(line))) for line in lines]

    def _held_by_own(self) -> list[BatchLine]:
        """Return the lines that wait for a limit of their own key or tenant, the newest last."""
        if not self._own_limits:
            return []
        waiting = [one.line for one in self._feeder.tasks.values() if one.waits]
        return [line for line in waiting if self._own_limits.of_line(line) is not None]

    def _full(self) -> list[str]:
        """Return the keys and tenants of which no more lines are claimed now."""
        return self._own_limits.filling_lines(self._held_by_own(), WINDOW)

    def _window(self) -> int:
        """Return the window, enlarged by the lines that wait for limits of their own."""
        return WINDOW + min(WINDOW, len(self._held_by_own()))

    async def share_window(self) -> None:
        """Return lines to the queue for a while if more of them wait for limits of their own keys
        and tenants than the window holds: the newest of the key or tenant with the most, as many as
        the next claim needs."""
        if self._own_limits or self._feeder.needs_room():
            await self._own_limits.look()
        over, held = self._feeder.needs_room(), self._held_by_own()
        if over and len(held) > WINDOW:
            whose = [self._own_limits.of_line(line) for line in held]
            ((largest, _),) = Counter(whose).most_common(1)
            of_it = [line.id for line, one in zip(held, whose, strict=True) if one == largest]
            waits_ms = dict.fromkeys(of_it[-over:], _MADE_ROOM_MS)
            await self._give_up(lambda one: one.waits and one.line.id in waits_ms, waits_ms)

    def _trail_of(self, line: BatchLine) -> Trail | None:
        return self._relay.spine.tracing.trail(line.id, None)

    def _waits_ms(self, claimed: Iterable[_ActiveLine], before: int = 0) -> dict[UUID, int]:
        """Return when to claim again those lines that no upstream can take."""
        return self._held.waits_ms(
            ((one.request_id, self._targets_of(one.line)) for one in claimed), before
        )

    async def _release(self, claimed: Iterable[_ActiveLine], waits_ms: Mapping[UUID, int]) -> None:
        lines = [one.line for one in claimed]
        await self._until_done(partial(self._store.batch_lines.release, lines, waits_ms=waits_ms))

    def _targets_of(self, line: BatchLine) -> tuple[Key, ...]:
        return targets_of(self._relay, line.endpoint, _model_of(line))

    def _is_lacking(self, line: BatchLine) -> bool:
        """Whether only upstreams that this process could not set up serve the line."""
        targets = self._relay.spine.targets
        if not targets.deployment.missing:
            return False
        return is_lacking(targets, _model_of(line)) and not self._targets_of(line)

    async def leave_held_up(self) -> None:
        """Return waiting lines of batches whose tenant's budget is spent: they are called later."""
        over = await self._store.batch_lines.held_up()
        if over:
            await self._give_up(lambda one: one.waits and one.line.batch_id in over)

    async def leave_held(self) -> None:
        """Return waiting lines that no upstream can take: they would occupy slots of others."""
        waits_ms = self._waits_ms(one for one in self._feeder.tasks.values() if one.waits)
        await self._give_up(lambda one: one.waits and one.line.id in waits_ms, waits_ms)

    async def leave_ended(self) -> None:
        """Return waiting lines of batches that take no more calls: admission may take long."""
        ids = {one.line.batch_id for one in self._feeder.tasks.values() if one.waits}
        if ids and (over := await self._store.batch_lines.over(ids)):
            await self._give_up(lambda one: one.waits and one.line.batch_id in over)

    async def drain(self) -> None:
        """Return waiting lines; those being called may end within the grace period."""
        await self._give_up(lambda one: one.waits)
        if self._feeder.tasks:
            await asyncio.wait(
                set(self._feeder.tasks), timeout=self._config.shutdown_grace_ms / 1000
            )
        await self._give_up(lambda one: one.waits or one.is_called)
        if self._feeder.tasks:
            await asyncio.wait(set(self._feeder.tasks), timeout=_LAST_RECORDS_S)

    async def _give_up(
        self, whether: Callable[[_ActiveLine], bool], waits_ms: Mapping[UUID, int] | None = None
    ) -> None:
        chosen = {task: one for task, one in self._feeder.tasks.items() if whether(one)}
        for task in chosen:
            task.cancel()
        if not chosen:
            return
        await asyncio.wait(chosen)
        lines = [one.line for one in chosen.values()]
        counted = {one.line.id: one.record.attempts - one.record.faults for one in chosen.values()}
        try:
            await self._store.batch_lines.release(lines, waits_ms=waits_ms, counted=counted)
        except StoreUnavailable as unavailable:  # they return when this process is gone
            log.debug(Log.STORE_AWAY, detail=unavailable.message)

    async def _guarded(self, one: _ActiveLine) -> None:
        """Run a line's task; the line must not stay claimed once the task has ended."""
        try:
            await self._call(one)
        except Exception:  # the top of a task: logged, and the line ends as failed
            log.exception(Log.INTERNAL_ERROR, request_id=str(one.line.id))
            error = TidegateError("an internal error; it has been logged")
            await self._finish(one.line, _record_of(one.line, None), error, None)
        finally:
            self._last_tries.over(one)

    async def _call(self, one: _ActiveLine) -> None:
        line, record = one.line, one.record
        if self._is_lacking(line):  # a worker that has the upstream's key takes it
            release, later = self._store.batch_lines.release, {line.id: self._lacking.leave_ms()}
            counted = {line.id: 0}
            await self._until_done(partial(release, [line], waits_ms=later, counted=counted))
            return
        error: TidegateError | None = None
        words: CallFailed | None = None
        try:
            await self._collect(one)
        except ClaimLost:
            # Another worker has claimed it, which `release` does not affect, or its batch is being
            # cancelled.
            self._outages.left(one.turn)
            await self._until_done(lambda: self._store.batch_lines.release([line]))
            return
        except CallFailed as failed:
            error, words = failed.error, failed
        except TidegateError as own:
            error = own
        gave_way = isinstance(error, CallPreempted)
        if gave_way:
            self._outages.left(one.turn)
        elif one.turn is not None or is_of_upstream(error):
            turn = one.turn or Turn(self._targets_of(line))
            self._held.ended(turn, record.upstream, error)
        tier_ms = None if one.job is None else self._offers.ended(one.job, record, error)
        if error is not None and tier_ms is not None:  # the tier has refused it, or left it no time
            wait_ms: float | None = max(tier_ms, error.retry_after_ms or 0)
        else:
            wait_ms = None if error is None else self._wait_ms(line, record, error)
        if error is not None and wait_ms is not None:
            if isinstance(error, BudgetExceeded):
                self._store.batch_lines.hold_up(line.batch_id, wait_ms)
            waits_ms = {line.id: wait_ms}
            used = record.attempts - record.faults - gave_way
            counted = {line.id: used if tier_ms is None else 0}
            spent = Failure.of(error) if isinstance(error, QuotaExceeded) else None
            await self._until_done(
                lambda: self._store.batch_lines.release(
                    [line], waits_ms=waits_ms, counted=counted, gave_way=gave_way, failure=spent
                )
            )
            if record.attempts:
                record.end(RETRIED, Failure.of(error))
                self._store.listeners.note(record)
            return
        await self._finish(line, record, error, words)

    async def _collect(self, one: _ActiveLine) -> None:
        line = one.line

        async def admitted(_permit: Permit | None) -> None:
            self._last_tries.begin(one)
            if one.turn is None and self._outages.is_any:
                one.turn = self._outages.enter(self._targets_of(line))
            record = one.record
            await self._store.batch_lines.begin(line, record.upstream, record.model)

        clock = self._store.notifications.clock
        left = line.expires_at - clock.now()
        try:
            await self._place(one)
            call = detached_call(
                request_id=line.id,
                path=line.endpoint,
                body=line.body.encode(),
                caller=Caller(line.tenant_id, line.key_id, line.models),
                priority=PRIORITY,
                deadline_ms=round(left.total_seconds() * 1000),
                trail=one.record.trail,
                most_tries=self._config.max_attempts - line.attempts,
                preempted=line.preemptions,
                headers=line.call_headers,
            )
            if one.job is None:
                await collected(self._relay, call, one.record, admitted)
                return
            if one.job.tier is Tier.FLEX:
                call.body = in_tier(call.body, call.endpoint.dialect, Tier.FLEX)
            await until_review(one.job, clock, collected(self._relay, call, one.record, admitted))
        except asyncio.CancelledError:
            self._outages.left(one.turn)
            raise
        finally:
            one.is_over = True

    async def _place(self, one: _ActiveLine) -> None:
        """Choose the processing tier of a line whose tenant allows several. Raises UpstreamTierBusy
        while the tier has no capacity, InvalidRequest, StoreUnavailable."""
        line = one.line
        if not line.in_flex or names_tier(body := orjson.loads(line.body)):
            return
        kind = wrapped_facts(endpoint_named(line.endpoint), body).kind
        job = _job_of(line, kind, _model_of(line))
        if (choice := await self._offers.choice(job, kind, is_line=True)) is None:
            return
        one.job = replace(job, tier=choice.tier, revisit_at=choice.revisit_at)
        if choice.tier is Tier.FLEX:
            keys = self._targets_of(line)
            busy_ms = await self._offers.wait_ms(one.job, kind, *keys, is_line=True)
            if busy_ms:
                raise UpstreamTierBusy(_NO_FLEX, retry_after_ms=busy_ms)

    def _wait_ms(self, line: BatchLine, record: CallRecord, error: TidegateError) -> float | None:
        """Return the time until the line is called again; None if it has failed."""
        if isinstance(error, BudgetExceeded) and error.never_fits:
            return None
        if isinstance(error, BudgetExceeded):
            return min(_SPENT_MS, error.retry_after_ms or _SPENT_MS)
        if isinstance(error, CallPreempted):
            return 0
        if isinstance(error, LastTryWaits):
            return error.retry_after_ms
        if isinstance(error, _LATER):
            return _AGAIN_MS
        if is_of_upstream(error):
            return self._held.wait_ms(self._targets_of(line))
        attempts = line.attempts + record.attempts - record.faults
        return retry_wait_ms(error, max(1, attempts), self._config.max_attempts)

    async def _finish(
        self,
        line: BatchLine,
        record: CallRecord,
        error: TidegateError | None,
        words: CallFailed | None,
    ) -> None:
        status_code: int | None = None
        answer: str | None = None
        if error is None:
            status_code, answer = record.http_status, record.result
        elif words is not None and words.status and words.body:
            status_code, answer = words.status, words.body.decode("utf-8", "replace")
        failure = None if error is None else Failure.of(error)
        record.http_status = status_code or 0
        record.end(Status.SUCCEEDED if failure is None else Status.FAILED, failure)
        call = await self._store.audit.prepare(record)
        await self._until_done(
            lambda: self._store.batch_lines.end(
                line, call, status_code=status_code, answer=answer, failure=failure
            )
        )

    async def _until_done(self, write: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await write()
                return
            except StoreUnavailable:
                await asyncio.sleep(_UNAVAILABLE_S)


def _record_of(line: BatchLine, trail: Trail | None) -> CallRecord:
    endpoint, _ = endpoint_in("POST", line.endpoint, (), b"")
    return CallRecord(
        "batch",
        line.tenant_id,
        datetime.now(UTC),
        line.id,
        endpoint=line.endpoint,
        dialect=endpoint.dialect.value if endpoint else "",
        operation=endpoint.name if endpoint else "",
        request=line.body.encode(),
        priority=PRIORITY,
        key_id=line.key_id,
        trail=trail,
        earlier_attempts=line.attempts,
        lapses=line.lapses,
    )


def _job_of(line: BatchLine, kind: Kind, model: str) -> ClaimedJob:
    """Return the line as a job, for the choice of its tier: only flex is allowed beside live."""
    return ClaimedJob(
        request_id=line.id,
        claim=line.claim,
        attempts=line.attempts,
        created_at=datetime.now(UTC),
        prompt=line.body,
        classification=Classification(kind, ClassifiedBy.CALLER, ""),
        attachments=(),
        image_uri=None,
        model=model,
        priority=PRIORITY,
        deadline_at=line.expires_at - timedelta(seconds=EARLY_S),
        tenant_id=line.tenant_id,
        pool=DEFAULT_POOL,
        endpoint=line.endpoint,
        key_id=line.key_id,
        tiers_allowed=(Tier.FLEX,),
    )


MOST_ERRORS = 100
_LONGEST_ID = 512


@dataclass(frozen=True, slots=True)
class Sound:
    """A valid line. body: JSON in ASCII with escapes or UTF-8, without line ends."""

    line: int
    custom_id: str
    body: str


@dataclass(slots=True)
class Check:
    """Validates one file. `errors`: the first hundred; `lines`: those that are not blank."""

    endpoint: str
    lines: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether reading further lines is pointless."""
        return len(self.errors) >= MOST_ERRORS or self.lines > MOST_LINES

    def take(self, number: int, raw: bytes) -> Sound | None:
        """Check line `number`, counted from 1; a byte order mark in line 1 is skipped."""
        if number == 1:
            raw = raw.removeprefix(BOM_UTF8)
        if not raw.strip():
            return None
        self.lines += 1
        if self.lines > MOST_LINES:
            self._add_error("too_many_lines", None, f"a batch has at most {MOST_LINES} lines", None)
            return None
        if has_too_many_parts(raw):
            message = f"this line holds too many values: {MOST_PARTS} are taken"
            self._add_error("invalid_json_line", number, message, None)
            return None
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as broken:
            self._add_error("invalid_json_line", number, f"this line is not JSON: {broken}", None)
            return None
        if not isinstance(value, dict):
            self._add_error("invalid_json_line", number, "this line is not a JSON object", None)
            return None
        return self._sound(number, value)

    def end(self) -> None:
        """Complete the check at the end of the file."""
        if not self.lines:
            self._add_error("empty_file", None, "the input file has no lines", None)

    def _sound(self, number: int, value: dict[str, Any]) -> Sound | None:
        custom_id, body = value.get("custom_id"), value.get("body")
        if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _LONGEST_ID:
            message = f"custom_id must be a text of 1 to {_LONGEST_ID} characters"
            self._add_error("missing_custom_id", number, message, "custom_id")
            return None
        if "\x00" in custom_id:
            self._add_error("invalid_custom_id", number, "a NUL is in custom_id", "custom_id")
            return None
        if custom_id in self._seen:
            message = f"the custom_id {custom_id[:64]!r} is there already"
            self._add_error("duplicate_custom_id", number, message, "custom_id")
            return None
        self._seen.add(custom_id)
        if value.get("method") != "POST":
            self._add_error("invalid_method", number, "method must be POST", "method")
            return None
        if value.get("url") != self.endpoint:
            message = f"url must be the batch's endpoint, {self.endpoint}"
            self._add_error("mismatched_url", number, message, "url")
            return None
        if not isinstance(body, dict):
            self._add_error("invalid_body", number, "body must be an object", "body")
            return None
        try:
            wrapped_facts(endpoint_named(self.endpoint), body)
        except InvalidRequest as invalid:
            param = invalid.field if invalid.field.startswith("body") else f"body.{invalid.field}"
            self._add_error("invalid_body", number, invalid.message, param)
            return None
        try:
            return Sound(number, custom_id, orjson.dumps(body).decode())
        except orjson.JSONEncodeError:
            self._add_error("invalid_body", number, "body is nested too deeply", "body")
            return None

    def _add_error(self, code: str, line: int | None, message: str, param: str | None) -> None:
        self.errors.append({"code": code, "line": line, "message": message, "param": param})


def _model_of(line: BatchLine) -> str:
    return str(orjson.loads(line.body).get("model") or "")  # validated when the batch was submitted


_UNTOUCHED = {
    "expired": ("batch_expired", "the batch expired before this line was called"),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this line was called"),
}


def output_line(row: Any, ends_as: str) -> tuple[bool, bytes]:
    """Return whether a line succeeded, and its line in the batch's output."""
    response = error = None
    # A waiting line's failure is only what it waits for.
    failure = orjson.loads(row["failure"]) if row["failure"] and row["state"] == "failed" else None
    request_id = UUID(int=row["id"].int).hex
    if row["answer"] is not None:
        response = {
            "status_code": row["status_code"],
            "request_id": request_id,
            "body": _body(row["answer"]),
        }
    elif failure is not None:
        error = {"code": failure["code"], "message": failure["message"]}
    else:
        code, message = _UNTOUCHED.get(ends_as, ("not_called", "this line was not called"))
        if row["attempts"]:
            message = ambiguous_of(row, ends_as).message
        error = {"code": code, "message": message}
    line = {
        "id": f"batch_req_{request_id}",
        "custom_id": row["custom_id"],
        "response": response,
        "error": error,
    }
    return row["state"] == "succeeded", orjson.dumps(line) + b"\n"


def _body(answer: str) -> Any:
    """Return JSON verbatim except for line ends between values, anything else as a string."""
    try:
        orjson.loads(answer)
    except orjson.JSONDecodeError:
        return answer
    return orjson.Fragment(answer.replace("\r", " ").replace("\n", " "))


class OutputWriter:
    """A temporary file of output lines: in its `with` block, `write` and then `keep`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = 0
        self._file: BinaryIO | None = None
        self._path = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    async def write(self, lines: list[bytes]) -> None:
        """Append lines. Raises StoreUnavailable if the disk is full."""
        if lines:
            self._lines += len(lines)
            try:
                await asyncio.to_thread(self._write, b"".join(lines))
            except OSError as failed:
                raise StoreUnavailable(f"no room for a batch's file: {failed.strerror}") from failed

    async def keep(self, batch: Batch, what: str, blobs: Blobs) -> BatchFile | None:
        """Store the file in the blob store; None if nothing was written."""
        if self._file is None:
            return None
        size_bytes = await asyncio.to_thread(self._flushed)
        key = new_key(datetime.now(UTC))
        await blobs.put(key, self._path)
        kind = "msgbatch" if batch.is_of_messages else "batch"
        name = f"{kind}_{batch.batch_id.hex}_{what}.jsonl"
        return BatchFile(new_id(), batch.tenant_id, OUTPUT, name, size_bytes, self._lines, key)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix="upload-", dir=self._folder)
            self._path, self._file = Path(name), os.fdopen(handle, "wb")
        assert self._file is not None
        self._file.write(data)

    def _flushed(self) -> int:
        assert self._file is not None
        self._file.flush()
        return self._file.tell()


_POLL_EVERY_S = 0.5
_CHUNK_LINES = 500
_CHUNK_BYTES = 4_000_000

log = get_logger()


class BatchRunner:
    """One process's share of all batches."""

    def __init__(
        self,
        config: Config,
        store: Store,
        blobs: Blobs,
        relay: Relay,
        held: Held,
        last_tries: LastTries,
        own_limits: OwnLimits,
        offers: TierOffers,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._folder = config.data_dir / "tmp"
        self._lines = LineCaller(config, store, relay, held, last_tries, own_limits, offers)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then finish the lines being called within the grace."""
        loops = (self._lines.feed, self._conduct)
        rest = partial(asyncio.sleep, _POLL_EVERY_S)
        try:
            await run_loops(stop, [forever(loop, rest) for loop in loops])
        finally:
            await self._lines.drain()

    async def _conduct(self) -> None:
        """Process whole batches, one after another: expiry, validation, assembly."""
        while True:
            mark = self._store.notifications.work_mark(BATCHES)
            idle_ms = PULSED_MS
            if await self._store.open_batches.has_own() or self._lines.any:
                await self._see_to_all()
                idle_ms = round(_POLL_EVERY_S * 1000)
            await self._store.notifications.wait_work(idle_ms, mark, BATCHES)

    async def _see_to_all(self) -> None:
        await self._store.batches.expire()
        await self._lines.leave_ended()
        await self._lines.leave_held_up()
        await self._lines.leave_held()
        await self._lines.share_window()
        await self._store.batch_lines.retake()
        failed: list[UUID] = []
        while (batch := await self._store.batches.take(failed)) is not None:
            try:
                await (
                    self._validate(batch) if batch.status == "validating" else self._assemble(batch)
                )
                await self._forget_input(batch)
            except ClaimLost:
                continue
            except StoreUnavailable:
                raise
            except Exception:  # logged, and tried again after the others
                log.exception(Log.WORKER_LOOP_FAILED, batch=str(batch.batch_id))
                failed.append(batch.batch_id)
            finally:
                await self._store.batches.free(batch)

    async def _forget_input(self, batch: Batch) -> None:
        """Delete an input file whose owner deleted it before the batch had read it."""
        if not await self._store.batches.needs_blob(batch.input_blob):
            await self._blobs.delete([batch.input_blob])

    async def _validate(self, batch: Batch) -> None:
        check = await self._read(batch)
        if check.errors:
            await self._store.batches.refuse(batch, check.errors)
        else:
            await self._store.batches.begin(batch, check.lines)

    async def _read(self, batch: Batch) -> Check:
        """Validate the input, and add its lines while it has no errors."""
        check = Check(batch.endpoint)
        ready: list[Json] = []
        size_bytes = number = 0
        try:
            async for raw in lines_of(self._blobs.stream(batch.input_blob)):
                number += 1
                sound = check.take(number, raw)
                if check.is_over:
                    break
                if sound is None or check.errors:
                    continue
                ready.append(
                    {
                        "line": sound.line,
                        "id": new_id(),
                        "custom_id": sound.custom_id,
                        "body": sound.body,
                    }
                )
                size_bytes += len(sound.body)
                if len(ready) >= _CHUNK_LINES or size_bytes > _CHUNK_BYTES:
                    await self._store.batches.add_lines(batch, ready)
                    ready, size_bytes = [], 0
            check.end()
        except NotFound:
            message = "the input file is no longer stored"
            check.errors.append(
                {
                    "code": "file_not_found",
                    "line": None,
                    "message": message,
                    "param": "input_file_id",
                }
            )
        if ready and not check.errors:
            await self._store.batches.add_lines(batch, ready)
        return check

    async def _assemble(self, batch: Batch) -> None:
        if "in_progress_at" not in batch.times:
            await self._read(batch)  # validation was interrupted: the results must name every line
        with OutputWriter(self._folder) as output, OutputWriter(self._folder) as errors:
            last = 0
            while rows := await self._store.batches.lines_after(batch, last, _CHUNK_LINES):
                last = rows[-1]["line"]
                lines = [output_line(row, batch.ends_as) for row in rows]
                await output.write([line for succeeded, line in lines if succeeded])
                await errors.write([line for succeeded, line in lines if not succeeded])
            files = (
                await output.keep(batch, "output", self._blobs),
                await errors.keep(batch, "error", self._blobs),
            )
            try:
                await self._store.batches.end(batch, *files)
            except ClaimLost:
                await self._blobs.delete([one.blob_key for one in files if one is not None])
                raise


async def lines_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of a file that is read in pieces; a line that is too long is cut off."""
    begun: list[bytes] = []
    room_bytes = LONGEST_BYTES
    async for piece in pieces:
        *ends, rest = piece.split(b"\n")
        for end in ends:
            yield b"".join((*begun, end[:room_bytes]))
            begun, room_bytes = [], LONGEST_BYTES
        if part := rest[:room_bytes]:
            begun.append(part)
            room_bytes -= len(part)
    if begun:
        yield b"".join(begun)
