"""Budgets: what may be spent, reserved before a call and charged after it, in all processes.

    reserve (durable) ──► call ──► settle, in the transaction of the call's audit row
         │                              told: the charge; cut or unknown: the bound, as an estimate
         └── refused: spent, held by other calls, or paused

PostgreSQL has the books. Before a call is sent, its greatest possible cost is reserved in all of
its budgets, or in none; `reserve_budgets` and `settle_budgets` (migrations r0038 and r0039) decide
under the locks of the books. Reservations that arrive during a commit are written together by the
next one.

Invariants: spent + held never exceeds the amount of a budget, except for calls that cost more than
they had reserved; reservations of a process that dies stay charged, as an estimate; a call without
a budget waits for nothing here.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from heapq import heappop, heappush
from operator import gt
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import UNKNOWN_CHARGE, CallCost, Caller, Charge, UsageState, new_id
from tidegate.errors import ConfigError, NotFound, QuotaExceeded, StoreUnavailable
from tidegate.prices.budgets import (
    BRIEFLY_S,
    Binding,
    Book,
    Budget,
    BudgetWaiter,
    KnownRefusals,
    Refusal,
    Unit,
    check_budget,
    check_extra,
    check_same,
    needs_of,
    refused_by,
    scope_of,
    scope_text,
    scope_values,
    with_end_of,
)
from tidegate.store.database import Connections, GroupWriter, sql
from tidegate.store.notifications import Steadiness, next_beat_s
from tidegate.store.provider.settlements import (
    Reservation,
    Settlement,
    correct_holds,
    settle_holds,
)
from tidegate.store.records import (
    Json,
    changed_once,
    counts_of,
    done_once,
    record_action,
    record_of,
)
from tidegate.telemetry.logging import Log, get_logger

MOST_BUDGETS = 10_000
MOST_BOOKS = 1_000
_LOOK_EVERY_S = 0.25
_REVISION_EVERY_S = 0.7
_EXTRAS_EVERY_S = 30.0
_FORGET_EVERY_S = 600.0
_PUSHED_REVISION_EVERY_S = 30.0
_FLUSH_AFTER_S = 0.5  # a settlement that no audit row has written by then is written alone
_SEEN_EVERY_S = 5.0
DEAD_AFTER_S = 30.0
_STRAYS_AFTER_S = 60.0
_ROOM_EVERY_S = 0.25
# When a waiting call is first tried, how often those of the same books, and the time in between.
_TRY_AFTER_S, _TRY_EVERY_S, _TRY_APART_S = 0.005, 1.0, 0.02
_REMEMBERED_S = 60.0
_SEED_TIMEOUT_MS = 60_000
_READ_TIMEOUT_MS = 2_000
_MOST_ORPHANS = 500
_DOUBTFUL = frozenset((UsageState.PARTIAL, UsageState.ESTIMATED, UsageState.UNKNOWN))

_Write = Callable[[bytes], Awaitable[list[asyncpg.Record]]]

log = get_logger()


@dataclass(frozen=True, slots=True)
class BudgetBook:
    """The spending of a budget in the current period, for one scope: the values of its `each` as a
    JSON array, empty without `each`. `estimated`: a part of `spent`; `held`: reserved."""

    budget: str
    scope: str
    unit: Unit
    amount: int
    spent: int
    estimated: int
    held: int
    reset_at: datetime | None
    paused_since: datetime | None


# Such as of a value out of range: another attempt would fail too.
_UNWRITABLE = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    orjson.JSONEncodeError,
)


def plain_book(book: BudgetBook) -> Json:
    """Return a book as JSON shows it."""
    return asdict(book) | {"scope": scope_values(book.scope)}


_OF_PEOPLE = ("subject", "conversation")


def _unnamed(dimension: str, value: str | None) -> str | None:
    """Return a value for actions of operators, which no erasure reaches: for a person a digest,
    which the record of the erasure has too."""
    if value is None or dimension not in _OF_PEOPLE:
        return value
    return f"{dimension} {sha256(value.encode()).hexdigest()[:16]}"


def _as_logged(budget: Budget) -> Json:
    return asdict(budget) | {one: _unnamed(one, getattr(budget, one)) for one in _OF_PEOPLE}


def _scope_words(each: Sequence[str], scope: str) -> str:
    return scope_text([_unnamed(*one) for one in zip(each, scope_values(scope), strict=False)])


class BudgetRecords:
    """Budgets on record, to be read and changed. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def revision(self) -> int:
        row = await self._connections.row("budget_revision", timeout_ms=_READ_TIMEOUT_MS)
        return 0 if row is None else int(row["revision"])

    async def all(self) -> tuple[int, list[Budget]]:
        """Return the revision, and the budgets in force at this revision or a later one."""

        async def read(connection: asyncpg.Connection) -> tuple[int, list[asyncpg.Record]]:
            revision: int = await connection.fetchval(sql("budget_revision"))
            return revision, await connection.fetch(sql("list_budgets"), MOST_BUDGETS)

        revision, found = await self._connections.run(read, timeout_ms=_READ_TIMEOUT_MS)
        return revision, [_budget(row) for row in found]

    async def set(self, budget: Budget, *, by: str) -> bool:
        """Add a budget, or change amount, end, doubt and alerts of the existing one; its scope,
        unit and period cannot change. A new budget starts with the recorded spending of its period.
        Return whether it is new. Raises ConfigError."""
        check_budget(budget)
        _, is_new = await self.change(budget.name, lambda _: budget, by=by)
        return is_new

    async def change(
        self, name: str, edit: Callable[[Budget | None], Budget], *, by: str
    ) -> tuple[Budget, bool]:
        """Set the budget that `edit` returns for the existing one, None if there is none; no other
        change comes between. Return the budget, and whether it is new. Raises what `edit` raises,
        and ConfigError."""

        async def write(connection: asyncpg.Connection) -> tuple[Budget, bool]:
            was = await connection.fetchrow(sql("get_budget"), name)
            budget = edit(None if was is None else _budget(was))
            is_new = await set_budget(connection, budget)
            before, after = None if was is None else _as_logged(_budget(was)), _as_logged(budget)
            await record_action(connection, "budget.set", name, before=before, after=after)
            return budget, is_new

        once = changed_once(write)
        budget, is_new = await self._connections.run(once, timeout_ms=_SEED_TIMEOUT_MS)
        log.warning(Log.BUDGET_CHANGED, budget=name, by=by, amount=budget.amount)
        return budget, is_new

    async def remove(self, name: str, *, by: str) -> None:
        """Remove a budget with its books. Raises NotFound."""

        async def write(connection: asyncpg.Connection) -> list[asyncpg.Record] | None:
            removed = await connection.fetch(sql("drop_budget"), name)
            await drop_books(connection, removed)
            if removed:
                await record_action(connection, "budget.remove", name)
            return removed or None

        if await self._connections.run(done_once(write)) is None:
            raise NotFound(f"there is no budget {name}")
        log.warning(Log.BUDGET_CHANGED, budget=name, by=by, amount=None)

    async def resume(
        self, name: str, *, scope: str | None, extra: int, unit: Unit | None = None, by: str
    ) -> list[str]:
        """End the pauses of a budget, and allow `extra` more in the current period, or for the
        length of a rolling one. Return the scopes that were paused or extended. Raises NotFound,
        also for a scope without a book, and ConfigError for an `extra` of another unit."""

        async def write(connection: asyncpg.Connection) -> list[str] | None:
            of_name = "SELECT unit, each FROM budgets WHERE name = $1"
            known = await connection.fetchrow(of_name, name)
            if known is None:
                return None
            check_extra(name, known["unit"], unit)
            done = [
                row["scope"] for row in await connection.fetch(sql("resume_budget"), name, scope)
            ]
            if extra:
                more = await connection.fetch(sql("extend_budget"), name, scope, extra)
                done += [row["scope"] for row in more if row["scope"] not in done]
            if scope is not None and not done:
                of_it = "SELECT 1 FROM budget_books WHERE budget = $1 AND scope = $2 LIMIT 1"
                if await connection.fetchval(of_it, name, scope) is None:
                    message = f"the budget {name} has no amount for {scope or '(all)'}"
                    if len(scope_values(scope)) != len(each := known["each"]) and each:
                        message += f": it has one for each {' and '.join(each)}"
                    raise NotFound(message)
            await connection.execute(sql("count_budget_change"))
            after = {"scope": scope and _scope_words(known["each"], scope), "extra": extra}
            await record_action(connection, "budget.resume", name, after=after)
            return done

        done = await self._connections.run(write)
        if done is None:
            raise NotFound(f"there is no budget {name}")
        log.warning(Log.BUDGET_CHANGED, budget=name, by=by, resumed=len(done), extra=extra)
        return done

    async def correct(self, request_id: UUID, *, micros: int, tokens: int) -> int:
        """Charge a request its known cost instead of an estimate; return the number of changed
        books."""

        return await self._connections.run(
            lambda connection: correct_holds(connection, {request_id: micros}, tokens=tokens)
        )

    async def books(self, name: str | None = None, scope: str | None = None) -> list[BudgetBook]:
        """Return books of the current periods, the most used first, up to `MOST_BOOKS`."""
        found = await self._connections.rows("budget_books", name, scope, MOST_BOOKS)
        return [record_of(BudgetBook, row) for row in found]

    async def reset_of(self, book: BudgetBook) -> datetime | None:
        """Return when a spent budget has room for the smallest call; None if that is unknown."""
        if book.reset_at is not None:
            return book.reset_at
        values = book.budget, book.scope, book.spent + 1 - book.amount
        found: datetime | None = await self._connections.run(
            lambda connection: connection.fetchval(sql("rolling_budget_reset"), *values)
        )
        return found


async def set_budget(
    connection: asyncpg.Connection, budget: Budget, *, keep_end: bool = False
) -> bool:
    """Write a budget in the caller's transaction; return whether it is new. keep_end: keep end,
    doubt and alerts of an existing one. Raises ConfigError."""
    before = await connection.fetchrow(sql("get_budget"), budget.name)
    if before is not None:
        check_same(_budget(before), budget)
        budget = with_end_of(_budget(before), budget) if keep_end else budget
    elif await connection.fetchval("SELECT count(*) FROM budgets") >= MOST_BUDGETS:
        allowed = f"one of up to {MOST_BUDGETS:,} budgets: remove one, or have one with `each`"
        raise ConfigError("name", budget.name, allowed)
    else:
        await _check_zone(connection, budget)
    row = asdict(budget)
    del row["created_at"]
    is_new = bool(await connection.fetchval(sql("set_budget"), orjson.dumps(row).decode()))
    if is_new:
        await _seed(connection, budget)
    elif budget.at_end != "pause":
        await connection.execute(sql("resume_budget"), budget.name, None)
    await connection.execute(sql("count_budget_change"))
    return is_new


async def _check_zone(connection: asyncpg.Connection, budget: Budget) -> None:
    """Raise ConfigError for a zone that PostgreSQL does not know: each call would fail there."""
    try:
        await connection.execute(sql("read_clock_of_zone"), budget.zone)
    except asyncpg.InvalidParameterValueError:
        allowed = "a time zone that PostgreSQL knows, such as Europe/Berlin"
        raise ConfigError("zone", budget.zone, allowed) from None


async def drop_books(connection: asyncpg.Connection, removed: Sequence[asyncpg.Record]) -> None:
    """Remove the books of budgets that were removed in this transaction."""
    if names := [row["name"] for row in removed]:
        await connection.execute(sql("lock_budget_books"))
        units = [row["unit"] for row in removed]
        await connection.execute(sql("drop_budget_books"), names, units)
        await connection.execute(sql("count_budget_change"))


async def _seed(connection: asyncpg.Connection, budget: Budget) -> None:
    if budget.conversation is not None or "conversation" in budget.each:
        return  # not on record
    by_days = budget.zone == "UTC" and budget.period != "rolling"
    by_days = by_days and budget.key is budget.subject is None and budget.each in ((), ("tenant",))
    name = "seed_budget_by_days" if by_days else "seed_budget_by_calls"
    models: list[str] = []
    if budget.model is not None:  # by the rule that selects the budgets of a call
        known = [row["model"] for row in await connection.fetch(sql("models_with_usage"))]
        models = [one for one in known if budget.is_of_model(one)]
    await connection.execute(sql(name), budget.name, models, timeout=_SEED_TIMEOUT_MS / 1000)


class Budgets:
    """Budgets of one process: which ones apply to a call, and what its calls have reserved."""

    def __init__(
        self,
        connections: Connections,
        *,
        instance_id: str,
        folder: Path | None = None,
        clock: Callable[[], float] = Steadiness.clock,
    ) -> None:
        """folder: stores the last budgets read, for a start in an outage. clock: includes time in
        which the machine was suspended, since other processes then count this one as dead."""
        self._file = None if folder is None else folder / "budgets.json"
        self.records = BudgetRecords(connections)
        self._connections = connections
        self._instance_id = instance_id
        self._clock = clock
        self._revision: int | None = None
        self._rules: tuple[Budget, ...] = ()
        self._static = lru_cache(10_000)(self._bound_statically)
        self._reservations: GroupWriter[Reservation, Refusal | None] = GroupWriter(
            self._reserve_all
        )
        self._open: dict[UUID, UUID] = {}  # reservations, with their requests
        self._overdue: set[UUID] = set()  # those that may have been charged as a dead process's
        self.is_pushed: Callable[[], bool] = lambda: False  # whether changes are notified
        self.wall: Callable[[], datetime] = lambda: datetime.now(UTC)  # PostgreSQL's time, if known
        self._pending: dict[UUID | None, list[tuple[float, Settlement]]] = {}
        self._refusals = KnownRefusals(lambda: self.wall())
        self._waiters: dict[int, BudgetWaiter] = {}
        self._trials: list[tuple[float, int]] = []  # a heap of times and waiters
        self._trying: asyncio.Task[None] | None = None
        self._freed: deque[asyncio.Future[None]] = deque()
        self._renewed_at = -math.inf
        self._is_warm = False
        self._refuses = False  # whether the last batch of reservations had a refused one
        self._steadiness = Steadiness(round(DEAD_AFTER_S * 1000))
        self._reading = asyncio.Lock()
        self._change = asyncio.Event()

    @property
    def any(self) -> bool:
        """Whether a budget may apply to a call, as far as this process knows; then `binding` tells.
        Also true while the budgets were never read."""
        return bool(self._rules) or self._revision is None

    @property
    def held(self) -> int:
        """The number of reservations of this process."""
        return len(self._open)

    # Which budgets apply to a call

    async def known(self) -> None:
        """Wait until the budgets have been read once. If PostgreSQL has been unavailable since
        before the start, those that this host last read apply. Raises StoreUnavailable."""
        if self._revision is not None:
            return
        try:
            await self.refresh()
        except StoreUnavailable:
            if (found := self._read_file()) is None:
                raise
            self._rules = found
            self._static.cache_clear()

    async def refresh(self) -> None:
        """Read the budgets if they have changed. Raises StoreUnavailable."""
        async with self._reading:
            if self._revision is not None and await self.records.revision() == self._revision:
                return
            revision, found = await self.records.all()
            self._rules, self._revision = tuple(found), revision
            self._static.cache_clear()
            self._refusals.clear()
            BudgetWaiter.renew(self._waiters.values(), found)
            self._write_file()
            self.wake()

    def _write_file(self) -> None:
        if self._file is None:
            return
        rules = [asdict(one) for one in self._rules]
        new = self._file.with_suffix(f".{self._instance_id}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new.touch(mode=0o600)
            new.write_bytes(orjson.dumps(rules))
            new.replace(self._file)
        except OSError as failed:  # only a start in an outage needs the file
            log.warning(Log.BUDGETS_NOT_KEPT, detail=str(failed))

    def _read_file(self) -> tuple[Budget, ...] | None:
        try:
            rows = orjson.loads(b"" if self._file is None else self._file.read_bytes())
            return tuple(_budget(row) for row in rows)
        except (OSError, ValueError, TypeError):
            return None

    def changed(self) -> None:
        """Read the budgets soon, as one of them may have changed."""
        self._change.set()

    def binding(
        self,
        caller: Caller,
        model: str,
        subject: str | None = None,
        conversation: str | None = None,
    ) -> tuple[Binding, ...]:
        """Return the known budgets that apply to a call; usually none."""
        if not self._rules:
            return ()
        found = self._static(caller.tenant_id, caller.key_id, model)
        if not found:
            return ()
        values = {
            "tenant": caller.tenant_id,
            "key": caller.key_id,
            "subject": subject,
            "conversation": conversation,
        }
        return tuple(
            Binding(one, scope_of(one, values))
            for one in found
            if one.subject in (None, subject) and one.conversation in (None, conversation)
        )

    def _bound_statically(self, tenant: str, key: str | None, model: str) -> tuple[Budget, ...]:
        return tuple(one for one in self._rules if one.binds(tenant, key, model))

    # Before a call

    def refusal(self, bindings: Sequence[Binding], cost: CallCost) -> QuotaExceeded | None:
        """Return why a call cannot be made, if this process knows for certain; without I/O. Raises
        BudgetUnbounded."""
        return self._refusals.of(needs_of(bindings, cost), self._clock())

    async def check(
        self,
        caller: Caller,
        model: str = "",
        subject: str | None = None,
        conversation: str | None = None,
    ) -> None:
        """Reject a submission whose budget has nothing left, or is paused. A budget that pauses
        when it is spent is paused by the first call that it refuses, not here. Raises
        BudgetExceeded, BudgetPaused and StoreUnavailable."""
        if not self.any:
            return
        await self.known()
        tags = {"subject": subject, "conversation": conversation}
        unknown = {name for name, value in tags.items() if value is None}
        found = []
        for binding in self.binding(caller, model, subject, conversation):
            if binding.budget.at_end == "fall_back" or unknown.intersection(binding.budget.each):
                continue
            for book in await self.records.books(binding.budget.name, binding.scope):
                why = "paused" if book.paused_since else "spent"
                is_out = book.spent >= book.amount and binding.budget.at_end != "pause"
                if book.paused_since is None and not is_out:
                    continue
                reset_at = None if book.paused_since else await self.records.reset_of(book)
                details = book.amount, book.spent, book.held, reset_at
                found.append(Refusal(binding, why, *details, 0.0))
        # As of those that refuse a call, the one that is reset last.
        if last := max(reversed(found), key=lambda one: one.ends_at(1), default=None):
            raise refused_by(last, None, self.wall())

    async def reserve(self, bindings: Sequence[Binding], request_id: UUID, cost: CallCost) -> UUID:
        """Durably reserve a call's greatest cost in all of its budgets; `settle` must follow with
        the returned id.

        Raises BudgetExceeded and BudgetPaused if it does not fit, BudgetReserved if calls in
        progress have reserved the rest, BudgetUnbounded, and StoreUnavailable. If it is cancelled
        or raises, nothing stays reserved.
        """
        needs = needs_of(bindings, cost)
        if (error := self._refusals.of(needs, self._clock())) is not None:
            raise error
        hold = new_id()
        self._open[hold] = request_id
        try:
            order = self._reservations.put(
                Reservation(hold, request_id, needs), 100 + 100 * len(needs)
            )
        except StoreUnavailable:
            del self._open[hold]
            raise
        try:
            refused = await asyncio.shield(order)
        except asyncio.CancelledError:
            order.add_done_callback(lambda _: self._void(hold, request_id, order))
            raise
        except BaseException:  # a commit with a lost reply may hold the reservation
            self.settle(hold, None)
            raise
        if refused is not None:
            del self._open[hold]
            raise refused_by(refused, refused.need, self.wall())
        return hold

    def _void(self, hold: UUID, request_id: UUID, order: asyncio.Future[Refusal | None]) -> None:
        """Void a reservation whose caller was cancelled while it was written."""
        if order.cancelled() or order.exception() is not None or order.result() is None:
            self.settle(hold, None)
        else:
            self._open.pop(hold, None)

    async def _reserve_all(
        self, requests: Sequence[Reservation], write: _Write | None = None
    ) -> list[Refusal | Exception | None]:
        """Write reservations in one transaction, by `_written` or another function."""
        books: dict[Book, int] = {}
        bindings: list[Binding] = []
        calls: list[Json] = []
        for request in requests:
            binds = []
            for binding, need in request.needs:
                place = books.get(binding.book)
                if place is None:
                    place = books[binding.book] = len(bindings)
                    bindings.append(binding)
                binds.append([place, need])
            calls.append(
                {"id": str(request.hold), "request": str(request.request_id), "binds": binds}
            )
        payload = orjson.dumps({"books": list(books), "calls": calls})
        revision = self._revision
        self._note_overdue(but={request.hold for request in requests})
        rows = await (write or self._written)(payload)
        is_newest = revision == self._revision  # else a known change of the budgets may allow it
        results: list[Refusal | Exception | None] = [None] * len(requests)
        for row in rows:
            binding = bindings[row["book"]]
            need = next(n for one, n in requests[row["call"]].needs if one == binding)
            refused = self._refused(binding, need, row)
            results[row["call"]] = refused
            if refused.why != "held" and is_newest:
                self._refusals.add(refused, requests[row["call"]].needs, self._clock())
        self._refuses = bool(rows)
        if rows:
            self._notify_waiters()
        return results

    async def _written(self, payload: bytes) -> list[asyncpg.Record]:
        """Write reservations; return a row for each refused one. If none was refused lately, that
        takes one round trip. The reasons of refusals take a repeat, which changes nothing that is
        reserved."""
        sent_at = self._clock()
        is_fresh = sent_at - self._renewed_at < _SEEN_EVERY_S
        if is_fresh and not self._refuses:
            whole = sql("reserve_budgets_whole")
            values = {"asked": payload.hex(), "instance": self._instance_id.encode().hex()}
            if not await self._connections.run_message(whole.format(**values)):
                return []

        async def work(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            if not is_fresh:
                await connection.execute(sql("see_budget_instance"), self._instance_id)
            found: list[asyncpg.Record] = await connection.fetch(
                sql("reserve_budgets"), payload.decode(), self._instance_id
            )
            return found

        rows = await self._connections.run(work)
        if not is_fresh:
            self._renewed_at = sent_at
        return rows

    def _refused(self, binding: Binding, need: int, row: asyncpg.Record) -> Refusal:
        now, budget = self._clock(), binding.budget
        # A budget with a pause begins it when it refuses a call for which the others have left no
        # room.
        is_brief = budget.period == "rolling" or (row["why"], budget.at_end) == ("spent", "pause")
        for_s = BRIEFLY_S if is_brief else _REMEMBERED_S
        if row["reset_at"] is not None:
            for_s = min(for_s, (row["reset_at"] - self.wall()).total_seconds())
        return Refusal(
            binding,
            row["why"],
            row["amount"],
            row["spent"],
            row["held"],
            row["reset_at"],
            now + for_s,
            need,
        )

    def watch(
        self,
        bindings: Sequence[Binding],
        cost: CallCost,
        notify: Callable[[QuotaExceeded], None],
    ) -> Callable[[], None]:
        """Call `notify` once the call cannot be made any more; the returned function ends that.

        Calls of other processes may have spent the budget, so a waiter that stays is tried.
        """
        waiter = BudgetWaiter(needs_of(bindings, cost), notify)
        self._waiters[id(waiter)] = waiter
        heappush(self._trials, (self._clock() + _TRY_AFTER_S, id(waiter)))
        if self._trying is None:
            self._trying = asyncio.create_task(self._try_waiters())

        def end() -> None:
            self._waiters.pop(id(waiter), None)

        return end

    async def _try_waiters(self) -> None:
        """Try now and then whether waiters' reservations would be refused, while there are any."""
        tried: dict[tuple[Book, ...], tuple[float, list[int]]] = {}
        try:
            while self._waiters:
                at, number = self._trials[0]
                if (left_s := at - self._clock()) > 0:
                    await asyncio.sleep(min(left_s, _TRY_APART_S))
                    continue
                heappop(self._trials)
                waiter = self._waiters.get(number)
                if waiter is None:  # it waits no more
                    continue
                now, needs = self._clock(), [need for _, need in waiter.needs]
                heappush(self._trials, (now + _TRY_EVERY_S, number))
                tried = {one: last for one, last in tried.items() if now - last[0] < _TRY_EVERY_S}
                books = tuple(one.book for one, _ in waiter.needs)
                _, most = tried.get(books, (now, [-1] * len(books)))
                if any(map(gt, needs, most)):
                    tried[books] = now, list(map(max, needs, most))
                    trial = Reservation(new_id(), new_id(), waiter.needs)
                    with suppress(StoreUnavailable):
                        await self._reserve_all([trial], self._tried)
                    await asyncio.sleep(_TRY_APART_S)
        finally:
            self._trying = None
            self._trials.clear()

    async def _tried(self, payload: bytes) -> list[asyncpg.Record]:
        """Return as `_written`, but roll back a reservation that succeeds."""

        async def work(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            await connection.execute("SAVEPOINT before_trial")
            found: list[asyncpg.Record] = await connection.fetch(
                sql("reserve_budgets"), payload.decode(), self._instance_id
            )
            if not found:
                await connection.execute("ROLLBACK TO SAVEPOINT before_trial")
            return found

        return await self._connections.run(work)

    def _notify_waiters(self) -> None:
        for waiter in list(self._waiters.values()):
            if (error := self._refusals.of(waiter.needs, self._clock())) is not None:
                waiter.notify(error)

    async def room(self, within_s: float) -> None:
        """Wait until a reservation is settled in this process, for a quarter of a second at
        most."""
        future = asyncio.get_running_loop().create_future()
        self._freed.append(future)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(within_s, _ROOM_EVERY_S)):
                    await future
        finally:
            with suppress(ValueError):
                self._freed.remove(future)

    def held_by(self, request_id: UUID) -> UUID | None:
        """Return the reservation of the last attempt of a call of this process, if any."""
        held = reversed(self._open.items())
        return next((hold for hold, owner in held if owner == request_id), None)

    def detach_hold(self, hold: UUID) -> None:
        """Detach a reservation from this process, which cannot settle it any more."""
        self._open.pop(hold, None)
        self._overdue.discard(hold)

    # After a call

    def settle(self, hold: UUID, charge: Charge | None, request_id: UUID | None = None) -> None:
        """Charge the reservation of an ended call; None if the call was not made. Written with the
        call's audit row, or else within a second. request_id: of a call of another process."""
        self._note_overdue()
        request_id = request_id or self._open.get(hold)
        if charge is None:
            one = Settlement(hold, request_id, 0, 0, False)
        else:
            tokens = None if charge == UNKNOWN_CHARGE else charge.tokens
            given = [charge.cost_micros, tokens]
            micros, tokens = counts_of(given)  # as on record: what no call can cost is unknown
            doubt = charge.state in _DOUBTFUL or [micros, tokens] != given
            one = Settlement(hold, request_id, micros, tokens, doubt)
        self._pending.setdefault(request_id, []).append((self._clock(), one))

    @property
    def is_settling(self) -> bool:
        """Whether charges wait to be written."""
        return bool(self._pending)

    async def settle_in(
        self, connection: asyncpg.Connection, request_ids: Iterable[UUID | str]
    ) -> None:
        """Write the charges of these requests in the caller's transaction. They are written again
        within a second, which changes nothing, since the transaction may not be committed."""
        if not self._pending:
            return
        found = [
            one
            for request_id in request_ids
            for _, one in self._pending.get(
                request_id if isinstance(request_id, UUID) else UUID(request_id), ()
            )
        ]
        await settle_holds(connection, found)

    async def flush(self, after_s: float = 0.0) -> None:
        """Write charges that have waited for so long, one by one if they cannot be written
        together. Raises StoreUnavailable."""
        now = self._clock()
        due = [one for found in self._pending.values() for at, one in found if now - at >= after_s]
        if not due:
            return
        overdue = self._overdue.intersection(one.hold for one in due)

        async def write(connection: asyncpg.Connection, settlements: Sequence[Settlement]) -> None:
            await settle_holds(connection, settlements)
            if overdue:  # a budget that others know as spent may have room again
                await connection.execute(sql("count_budget_change"))

        unwritten = await self._each_or_all(due, write)
        self._overdue -= overdue
        for one in due:
            if one.hold not in unwritten:  # else it stays charged, and is no stray
                self._open.pop(one.hold, None)
            # A concurrent flush may have written it, which changes nothing.
            pending = self._pending.pop(one.request_id, ())
            if left := [(at, other) for at, other in pending if other is not one]:
                self._pending[one.request_id] = left
        self.wake()

    async def _each_or_all(
        self,
        settlements: Sequence[Settlement],
        write: Callable[[asyncpg.Connection, Sequence[Settlement]], Awaitable[None]],
    ) -> set[UUID]:
        """Write settlements in one transaction; if a value cannot be written, each alone, and the
        one with that value as an estimate of its reservation. Return the reservations that cannot
        be written even so. Raises StoreUnavailable."""
        try:
            await self._connections.run(lambda connection: write(connection, settlements))
        except _UNWRITABLE as failed:
            if len(settlements) > 1:
                alone = [await self._each_or_all([one], write) for one in settlements]
                return set().union(*alone)
            (one,) = settlements
            log.error(Log.BUDGET_UNWRITABLE, hold=str(one.hold), detail=str(failed))
            if one.micros is None and one.tokens is None:
                return {one.hold}
            held = Settlement(one.hold, one.request_id, None, None, True)
            return await self._each_or_all([held], write)
        return set()

    def _note_overdue(self, but: Collection[UUID] = ()) -> None:
        """Note the reservations, except some, if this process was silent for so long that others
        count it as dead."""
        if self._clock() - self._renewed_at > DEAD_AFTER_S and self._open:
            self._overdue.update(self._open.keys() - but)

    def wake(self) -> None:
        """Wake calls that wait for room in a budget, since something was settled."""
        while self._freed:
            future = self._freed.popleft()
            if not future.done():
                future.set_result(None)

    # Upkeep

    async def run(self) -> None:
        """Read changes, write pending settlements, and charge reservations of dead processes."""
        read_at = beaten_at = ended_at = forgot_at = -math.inf
        while True:
            now = self._clock()
            try:
                every_s = _PUSHED_REVISION_EVERY_S if self.is_pushed() else _REVISION_EVERY_S
                if self._change.is_set() or now - read_at >= every_s:
                    self._change.clear()
                    read_at = now
                    await self.refresh()
                    await self.warm()
                await self.flush(_FLUSH_AFTER_S)
                if self._rules and now - beaten_at >= _SEEN_EVERY_S:
                    beaten_at = now
                    await self._renew_holds()
                if now - ended_at >= _EXTRAS_EVERY_S and any(one.window_s for one in self._rules):
                    ended_at = now
                    await self.end_extras()
                if self._rules and now - forgot_at >= _FORGET_EVERY_S:
                    forgot_at = now
                    await self.forget_books()
            except StoreUnavailable as error:  # reservations stay as they are
                self._steadiness.missed()
                log.debug(Log.STORE_AWAY, detail=error.message)
            except Exception:  # the top of a task: logged, and the loop continues
                log.exception(Log.INTERNAL_ERROR, where="budgets")
            with suppress(TimeoutError):
                is_idle = self.is_pushed() and not self._pending
                async with asyncio.timeout(next_beat_s(1.0) if is_idle else _LOOK_EVERY_S):
                    await self._change.wait()

    async def warm(self) -> None:
        """Prepare for the first refusal once there are budgets. Raises StoreUnavailable."""
        if self._rules and not self._is_warm:
            self._is_warm = True
            await self._connections.execute("warm_budgets")

    async def end_extras(self) -> None:
        """End the extra amounts of rolling budgets once a window has passed since. Raises
        StoreUnavailable."""

        async def write(connection: asyncpg.Connection) -> None:
            if await connection.fetch(sql("lock_ended_extras")):
                await connection.execute(sql("end_extras"))  # as they are under the lock

        await self._connections.run(write)

    async def forget_books(self) -> None:
        """Delete books of periods that ended long ago, and books without an entry, as of refused
        calls. Raises StoreUnavailable."""
        await self._connections.execute("forget_budget_books")

    async def aclose(self) -> None:
        """Write pending settlements; those that cannot be written stay charged as reserved."""
        with suppress(StoreUnavailable):
            await self.flush()

    async def _renew_holds(self) -> None:
        sent_at = Steadiness.clock()
        self._note_overdue()
        if self._open:
            await self._connections.execute("see_budget_instance", self._instance_id)
            self._renewed_at = self._clock()
            await self._void_strays()
        else:
            await self._connections.execute("forget_budget_instances")
        self._steadiness.beaten(sent_at)
        if self._steadiness.may_judge:
            await self.charge_orphans()

    async def _void_strays(self) -> None:
        """Void reservations that this process does not know of, since their reply was lost."""
        own = self._instance_id, list(self._open), _STRAYS_AFTER_S
        rows = await self._connections.rows("stray_budget_holds", *own)
        if strays := [Settlement(row["id"], None, 0, 0, False) for row in rows]:
            await self._each_or_all(strays, settle_holds)

    async def charge_orphans(self) -> int:
        """Charge reservations of dead processes, as estimates; return their number. Raises
        StoreUnavailable."""
        rows = await self._connections.rows("orphaned_budget_holds", DEAD_AFTER_S, _MOST_ORPHANS)
        orphans = [Settlement(row["id"], None, None, None, True) for row in rows]
        if orphans:
            await self._each_or_all(orphans, settle_holds)
            log.warning(Log.BUDGET_ESTIMATED, holds=len(orphans))
        return len(orphans)


def _budget(row: Mapping[str, Any]) -> Budget:
    return record_of(Budget, row, each=tuple(row["each"]), alerts=tuple(row["alerts"]))
