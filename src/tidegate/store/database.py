"""Connections to PostgreSQL, named statements, group commit, migrations, partitions.

Every unit of work is one transaction without named prepared statements, so that PgBouncer may run
in transaction mode.

Invariants: nothing waits longer than its deadline; a connection that failed or was used by a
cancelled caller is not reused; in an outage callers fail immediately and one probe looks for the
end; every write gets exactly one answer; migrations run once, under an advisory lock; an insert
never fails for lack of a partition.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from importlib.resources import files
from itertools import count
from math import ceil
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

import asyncpg

from tidegate.errors import ConfigError, StoreUnavailable, TidegateError
from tidegate.telemetry.logging import Log, get_logger

T = TypeVar("T")
Work = Callable[[asyncpg.Connection], Awaitable[T]]
Begin = Literal["always", "if needed", "never"]

CONNECT_TIMEOUT_MS = 1_500
COMMAND_TIMEOUT_MS = 5_000
SLOW_MS = 1_000  # after this time a probe tests whether the server still answers
PROBE_TIMEOUT_MS = 1_000
PROBE_EVERY_MS = 200
_TRIES = 3
_OPEN_AFTER_S = 0.01  # most transactions end sooner, and a new backend costs more
_TRIM_AFTER_S = 10.0
_CLOSE_WITHIN_S, _STEP_S = 1.0, 0.01
# In one round trip. A frozen client must not hold locks, nor a lost client its statement, for ever.
# The statistics of a queue are always stale, so no plan may fall back to a sequential scan.
_LOCAL = (
    "SET LOCAL jit = off; SET LOCAL enable_seqscan = off; SET LOCAL "
    "statement_timeout = {timeout_ms}; SET LOCAL idle_in_transaction_session_timeout = 10000"
)
_BEGIN = f"BEGIN; {_LOCAL}"
# For a session whose statements are each a transaction of its own.
_SESSION = _LOCAL.replace("SET LOCAL", "SET").format(timeout_ms=COMMAND_TIMEOUT_MS)

# Retried on another connection: the work itself was not at fault.
_TRANSIENT = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # asyncpg raises it if the connection's end was announced between two statements.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shutdown, crash of another backend, start-up, cancelled
    asyncpg.InsufficientResourcesError,  # too many connections, disk full
    asyncpg.TransactionRollbackError,  # deadlock
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,  # a demoted server
    asyncpg.LockNotAvailableError,  # a `lock_timeout` of the database or the role
    asyncpg.PostgresSystemError,  # its disk failed
)
# The connection was cut: no evidence about the server yet.
_CUT = (
    *(asyncpg.InterfaceError, asyncpg.InternalClientError, asyncpg.PostgresConnectionError),
    *(asyncpg.AdminShutdownError, ConnectionResetError),
)
# The server is reachable but lacks our schema or rights (yet).
_UNFIT = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InsufficientPrivilegeError,
)

_numbers = count(1)
# A plan for an earlier schema, and a statement that another server has, or lacks.
_STALE = (
    *(asyncpg.InvalidCachedStatementError, asyncpg.InvalidSQLStatementNameError),
    asyncpg.DuplicatePreparedStatementError,
)
# Reported by a server, not by PgBouncer, while it accepts no writes.
NO_WRITES = "PostgreSQL accepts no writes"
_READ_ONLY = ("in_hot_standby", "default_transaction_read_only")


class DatabaseSession(asyncpg.Connection):  # type: ignore[misc]
    """A connection that prepares the statements of `PREPARED` once. Other statements are parsed
    twice and planned each time, which costs PostgreSQL more than running them for a few rows. Only
    for direct connections: a pooler gives its client another server each time."""

    shares_servers = False  # a pooler reports a server's process as its own
    _is_direct: bool | None = None
    _is_set = False  # for statements outside a transaction
    _statements: Mapping[str, asyncpg.prepared_stmt.PreparedStatement] = {}

    async def fetch(self, query: str, *values: Any, **more: Any) -> Any:
        if query.startswith("LISTEN "):  # of `add_listener`: one round trip, and parsed once
            return await super().execute(query)
        if (statement := await self._prepared(query)) is None:
            return await super().fetch(query, *values, **more)
        return await statement.fetch(*values, **more)

    async def fetchrow(self, query: str, *values: Any, **more: Any) -> Any:
        if (statement := await self._prepared(query)) is None:
            return await super().fetchrow(query, *values, **more)
        return await statement.fetchrow(*values, **more)

    async def execute(self, query: str, *values: Any, **more: Any) -> Any:
        if (statement := await self._prepared(query)) is None:
            return await super().execute(query, *values, **more)
        await statement.fetch(*values, **more)
        return statement.get_statusmsg()

    def forget(self) -> None:
        """Discard all prepared statements."""
        self._statements = {}

    async def runs_alone(self) -> bool:
        """Whether one statement may run without BEGIN and COMMIT, which are two more round trips:
        only in a direct session, which then gets the settings of a transaction permanently."""
        if await self._has_server() and not self._is_set:
            await super().execute(_SESSION)
            self._is_set = True
        return await self._has_server()

    async def _has_server(self) -> bool:
        if self._is_direct is None:  # a pooler reports a process number of its own
            query = f"SELECT WHERE pg_backend_pid() = {self.get_server_pid()}"  # one round trip
            self._is_direct = await super().execute(query) == "SELECT 1"
        return self._is_direct and not DatabaseSession.shares_servers

    async def _prepared(self, query: str) -> asyncpg.prepared_stmt.PreparedStatement | None:
        if query not in PREPARED or not await self._has_server():
            return None
        if (statement := self._statements.get(query)) is None:
            statement = await self.prepare(query, name=f"{PREPARED[query]}_{next(_numbers)}")
            self._statements = {**self._statements, query: statement}
        return statement


class _Commit:
    """State of one attempt. Once COMMIT was `sent`, the transaction may be committed."""

    sent = False


class Connections:
    """A pool of at most `size` connections. It opens one at a time, and only for a caller that has
    waited for `_OPEN_AFTER_S` while all are busy: waiters take the first free connection, so that a
    burst opens no more than it keeps busy. Connections unused for ten seconds are closed, except
    one: each is a process of PostgreSQL."""

    def __init__(self, url: str, *, size: int = 10, patience_ms: int = 0) -> None:
        """patience_ms: the least time that any work has, and that a new connection has to answer
        after another one was slow; otherwise PostgreSQL counts as unavailable."""
        self._url = url
        self._patience_ms = patience_ms
        self._slots = asyncio.Semaphore(size)
        self._idle: list[DatabaseSession] = []  # the last one used is taken next
        self._least_idle = 0  # the fewest idle since the last trim
        self._trimming: asyncio.TimerHandle | None = None
        self._busy: set[DatabaseSession] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self._probe: asyncio.Task[None] | None = None
        self._opening = False
        self._waiting: list[asyncio.Future[None]] = []
        self._down: str | None = None  # the reason while away
        self._trouble: str | None = None  # why the newest connection cannot write, or is missing
        self._closed = False
        self.on_back: list[Callable[[], None]] = []

    @property
    def unavailable(self) -> bool:
        return self._down is not None

    def start(self) -> None:
        """Start connecting in the background; PostgreSQL may become available later."""
        self._suspect()

    async def aclose(self, timeout_ms: int = 2_000) -> None:
        """Wait for work in progress for `timeout_ms`, then cut it off and close everything."""
        self._closed = True
        if self._trimming is not None:
            self._trimming.cancel()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_ms / 1000)
        for connection in [*self._busy, *self._idle]:
            connection.terminate()
        self._idle.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def run(
        self,
        work: Work[T],
        *,
        timeout_ms: int = COMMAND_TIMEOUT_MS,
        repeatable: bool = True,
        begin: Begin = "always",
    ) -> T:
        """Run `work` in a transaction and commit; repeat it if the connection failed.

        `repeatable`: whether the work may run again after a commit whose reply was lost. If not,
        such as for a claim of any ready rows, it is only repeated while no COMMIT was sent. begin:
        "never" for work that is a transaction by itself, "if needed" for a single statement, which
        PostgreSQL makes one. Raises StoreUnavailable, immediately while PostgreSQL is known to be
        unavailable; unrepeatable work may then be committed. A cancelled caller returns
        immediately; the transaction ends by itself within its deadline, either way.
        """
        if self._closed or self._down is not None:
            await asyncio.sleep(0)  # a caller that retries in a loop must not starve the others
        if self._closed:
            raise StoreUnavailable("the store is closed")
        if self._down is not None:
            raise StoreUnavailable("PostgreSQL is unavailable", reason=self._down)
        most_ms = max(timeout_ms, self._patience_ms)
        task = asyncio.create_task(self._run(work, most_ms, repeatable, begin))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_abandoned)
            raise

    async def rows(
        self, name: str, *values: Any, timeout_ms: int = COMMAND_TIMEOUT_MS, repeatable: bool = True
    ) -> list[asyncpg.Record]:
        """Return all rows of the statement `name`, in its own transaction; raises as `run` does."""
        return await self.run(
            lambda connection: connection.fetch(sql(name), *values),
            timeout_ms=timeout_ms,
            repeatable=repeatable,
            begin="if needed" if repeatable else "always",
        )

    async def row(
        self, name: str, *values: Any, timeout_ms: int = COMMAND_TIMEOUT_MS
    ) -> asyncpg.Record | None:
        """Return the first row of the statement `name`, in its own transaction."""
        return await self.run(
            lambda one: one.fetchrow(sql(name), *values), timeout_ms=timeout_ms, begin="if needed"
        )

    async def execute(self, name: str, *values: Any, timeout_ms: int = COMMAND_TIMEOUT_MS) -> int:
        """Run the statement `name` in its own transaction; return the number of affected rows."""
        done: str = await self.run(
            lambda one: one.execute(sql(name), *values), timeout_ms=timeout_ms, begin="if needed"
        )
        return count_in(done)

    async def run_message(self, statement: str, *, timeout_ms: int = COMMAND_TIMEOUT_MS) -> int:
        """Run a statement with its values in its text as one message, which begins, runs and
        commits in one round trip. Return the number of affected rows; rows are not read. May be
        repeated; raises what `run` raises."""
        message = f"{_LOCAL.format(timeout_ms=timeout_ms)}; {statement}"
        done: str = await self.run(
            lambda connection: connection.execute(message), timeout_ms=timeout_ms, begin="never"
        )
        return count_in(done)

    async def ping(self, timeout_ms: int) -> None:
        """Make one round trip on a new connection. Raises StoreUnavailable, also for a server that
        accepts no writes."""
        try:
            connection = await self._answered(timeout_ms / 1000)
        except (*_TRANSIENT, *_UNFIT) as failed:
            raise StoreUnavailable("PostgreSQL does not answer", reason=_words(failed)) from failed
        try:
            require_writes(connection)
        finally:
            connection.terminate()

    async def check_writes(self, timeout_ms: int) -> None:
        """Raise StoreUnavailable if PostgreSQL accepts no writes."""

        async def check(connection: asyncpg.Connection) -> None:
            await connection.execute("SELECT 1")  # its answer follows a changed setting
            require_writes(connection)

        await self.run(check, timeout_ms=timeout_ms)

    async def dedicated(self) -> DatabaseSession:
        """Return a connection outside the pool, for LISTEN; the caller terminates it."""
        if self._down is not None:
            raise StoreUnavailable("PostgreSQL is unavailable", reason=self._down)
        try:
            return await self._connect(_Patience(CONNECT_TIMEOUT_MS / 1000))
        except (*_TRANSIENT, *_UNFIT) as failed:
            raise StoreUnavailable("PostgreSQL does not answer", reason=_words(failed)) from failed

    async def _run(self, work: Work[T], timeout_ms: int, repeatable: bool, begin: Begin) -> T:
        deadline = asyncio.get_running_loop().time() + timeout_ms / 1000
        tries = 0
        while True:
            tries += 1
            commit = _Commit()
            try:
                return await self._transaction(work, deadline, timeout_ms, commit, begin)
            except _UNFIT as unfit:
                raise _unready(unfit) from unfit
            except _STALE as stale:
                if not isinstance(stale, asyncpg.InvalidCachedStatementError):
                    DatabaseSession.shares_servers = True
                for session in (*self._idle, *self._busy):
                    session.forget()
                if tries == _TRIES:
                    raise StoreUnavailable("PostgreSQL failed", reason=_words(stale)) from stale
            except _TRANSIENT as failed:
                late = asyncio.get_running_loop().time() >= deadline
                reason = f"no answer within {timeout_ms} ms" if late else _words(failed)
                if late or tries == _TRIES:
                    self._suspect()
                if late or self.unavailable or tries == _TRIES or self._closed:
                    raise StoreUnavailable("PostgreSQL failed", reason=reason) from failed
                if commit.sent and not repeatable:
                    raise StoreUnavailable("a COMMIT's reply was lost", reason=reason) from failed

    async def _transaction(
        self, work: Work[T], deadline: float, timeout_ms: int, commit: _Commit, begin: Begin
    ) -> T:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout_at(deadline):
            await self._slots.acquire()
        try:
            connection = await self._take(deadline)
            # Without cancelling the query: asyncpg would open a connection for that, which a frozen
            # server never closes.
            watchdog = loop.call_at(deadline, connection.terminate)
            doubt = loop.call_later(SLOW_MS / 1000, self._suspect)
            self._busy.add(connection)
            try:
                is_one = begin == "if needed" and timeout_ms <= COMMAND_TIMEOUT_MS
                if begin == "never" or (is_one and await connection.runs_alone()):
                    commit.sent = True
                    result = await work(connection)
                else:
                    await connection.execute(_BEGIN.format(timeout_ms=timeout_ms))
                    result = await work(connection)
                    commit.sent = True
                    await connection.execute("COMMIT")
            except BaseException as failed:
                # Cancellation too: the connection is within a transaction.
                cut_off = connection.is_closed()
                connection.terminate()
                if cut_off and isinstance(failed, AttributeError):
                    # asyncpg raises it if the connection ends within a statement.
                    raise asyncpg.InterfaceError("the connection was cut off") from failed
                raise
            finally:
                watchdog.cancel()
                doubt.cancel()
                self._busy.discard(connection)
            if self._closed or self.unavailable:
                connection.terminate()
            else:
                self._free(connection)
            return result
        finally:
            self._slots.release()

    async def _take(self, deadline: float) -> DatabaseSession:
        loop = asyncio.get_running_loop()
        opens_at: float | None = None
        while True:
            while self._idle:
                connection = self._idle.pop()
                self._least_idle = min(self._least_idle, len(self._idle))
                if not connection.is_closed():
                    return connection
            is_first_coming = self._probe is not None and not self._busy
            may_open = not (self._opening or is_first_coming)
            waits = loop.create_future()
            opening: asyncio.TimerHandle | None = None
            if may_open:
                opens_at = opens_at or loop.time() + (_OPEN_AFTER_S if self._busy else 0.0)
                if loop.time() >= opens_at:
                    if (opened := await self._opened(deadline)) is not None:
                        return opened
                    opens_at = loop.time() + PROBE_EVERY_MS / 1000
                    continue
                opening = loop.call_at(opens_at, _wake, waits)
            self._waiting.append(waits)
            try:
                async with asyncio.timeout_at(deadline):
                    await waits
            finally:
                if opening is not None:
                    opening.cancel()
            if self._down is not None:
                raise StoreUnavailable("PostgreSQL is unavailable", reason=self._down)

    def _free(self, connection: asyncpg.Connection) -> None:
        self._idle.append(connection)
        if self._trimming is None and len(self._idle) > 1:
            self._trim_later()
        self._wake_waiters()

    def _trim_later(self) -> None:
        self._least_idle = len(self._idle)
        self._trimming = asyncio.get_running_loop().call_later(_TRIM_AFTER_S, self._trim)

    def _trim(self) -> None:
        unused = self._idle[: max(0, self._least_idle - 1)]
        del self._idle[: len(unused)]
        for connection in unused:
            task = asyncio.ensure_future(connection.close(timeout=_CLOSE_WITHIN_S))
            self._tasks.add(task)
            task.add_done_callback(self._closed_one)
        self._trimming = None
        if len(self._idle) > 1:
            self._trim_later()

    def _closed_one(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failed := task.exception()) is not None:
            get_logger().debug(Log.STORE_AWAY, detail=str(failed))

    def _wake_waiters(self) -> None:
        """Wake all waiters for a connection, to take or open one."""
        for waits in self._waiting:
            _wake(waits)
        self._waiting.clear()

    async def _opened(self, deadline: float) -> DatabaseSession | None:
        """Return a new connection; None if the server has no room for more than are open."""
        left = deadline - asyncio.get_running_loop().time()
        self._opening = True
        try:
            return await self._connect(_Patience(min(CONNECT_TIMEOUT_MS / 1000, left)))
        except (*_TRANSIENT, *_UNFIT) as failed:
            if _is_full(failed) and (self._busy or self._idle):
                return None
            if isinstance(failed, _CUT):
                self._suspect()
            elif _is_full(failed):
                self._note_trouble(f"{_words(failed)}; raise max_connections: docs/servers.md")
            else:
                self._mark_down(_words(failed))
            raise
        finally:
            self._opening = False
            self._wake_waiters()

    async def _connect(self, patience: _Patience) -> DatabaseSession:
        more: Any = {"server_settings": {"application_name": "tidegate"}}
        more |= {"connection_class": DatabaseSession, "statement_cache_size": 0}
        session: DatabaseSession = await patience.wait(asyncpg.connect(self._url, **more))
        refusal = _refusal_of_writes(session)
        self._note_trouble(refusal and f"{refusal}; DATABASE_URL must lead to the primary")
        return session

    def _note_trouble(self, trouble: str | None) -> None:
        if trouble is not None and self._trouble is None:
            get_logger().warning(Log.STORE_AWAY, reason=trouble)
        elif trouble is None and self._trouble is not None:
            get_logger().info(Log.STORE_BACK)
        self._trouble = trouble

    async def _answered(self, timeout_s: float) -> DatabaseSession:
        """Return a new connection on which the server has answered, within `timeout_s` in total.

        Raises what asyncpg raises, and TimeoutError. PgBouncer accepts clients by itself while its
        server is unavailable: only the answer to a statement is the server's.
        """
        patience = _Patience(timeout_s)
        connection = await self._connect(patience)
        try:
            await patience.wait(connection.execute("SELECT 1"), connection.terminate)
        except BaseException:  # cancellation too: the connection must not stay open
            connection.terminate()
            raise
        return connection

    def _mark_down(self, reason: str) -> None:
        if self._down is None:
            get_logger().warning(Log.STORE_AWAY, reason=reason)
        self._down = reason
        for connection in (*self._idle, *self._busy):
            connection.terminate()
        self._idle.clear()
        self._wake_waiters()
        self._suspect()

    def _suspect(self) -> None:
        if self._probe is None and not self._closed:
            self._probe = asyncio.create_task(self._probe_until_up())

    async def _probe_until_up(self) -> None:
        """Try to connect until it works; the first failure makes PostgreSQL `unavailable`."""
        cuts_left = 2
        try:
            while True:
                try:
                    self._free(await self._answered((self._patience_ms or PROBE_TIMEOUT_MS) / 1000))
                    break
                except (*_TRANSIENT, *_UNFIT) as failed:
                    if _is_full(failed):
                        break
                    cuts_left -= isinstance(failed, _CUT)
                    if cuts_left < 0 or not isinstance(failed, _CUT):
                        self._mark_down(_words(failed))
                await asyncio.sleep(PROBE_EVERY_MS / 1000)
        finally:
            self._probe = None
            self._wake_waiters()
        if self._down is not None:
            self._down = None
            get_logger().info(Log.STORE_BACK)
            for notify in self.on_back:
                notify()


def _is_full(error: BaseException) -> bool:
    """Whether PostgreSQL, or PgBouncer, answers but has no room for another connection."""
    at_bouncer = isinstance(error, asyncpg.ProtocolViolationError) and "connections" in str(error)
    return at_bouncer or isinstance(error, asyncpg.TooManyConnectionsError)


class _Patience:
    """A timeout that does not count time in which the event loop is blocked or gets no CPU: the
    server's answer may have arrived unread."""

    def __init__(self, timeout_s: float) -> None:
        self._steps = max(1, ceil(timeout_s / _STEP_S))

    async def wait(self, work: Awaitable[T], give_up: Callable[[], object] | None = None) -> T:
        """Return the result of `work` within the remaining time; otherwise, or if cancelled, call
        `give_up` and cancel `work`. Raises TimeoutError."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done() and self._steps > 0:
                self._steps -= 1
                await asyncio.wait({task}, timeout=_STEP_S)
            if task.done():
                return task.result()
            raise TimeoutError
        finally:
            if not task.done() and give_up is not None:
                give_up()
            task.cancel()


def require_writes(connection: asyncpg.Connection) -> None:
    """Raise StoreUnavailable if the server has reported that it accepts no writes."""
    if (refusal := _refusal_of_writes(connection)) is not None:
        raise StoreUnavailable(refusal)


def _refusal_of_writes(connection: asyncpg.Connection) -> str | None:
    states = {name: getattr(connection.get_settings(), name, "off") for name in _READ_ONLY}
    return next((f"{NO_WRITES}: {name} is on" for name in states if states[name] == "on"), None)


def _wake(waits: asyncio.Future[None]) -> None:
    if not waits.done():
        waits.set_result(None)


def _abandoned(task: asyncio.Task[Any]) -> None:
    """Handle the result for a cancelled caller: ignore an outage, log any other error, which
    asyncio would report as never retrieved."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, TidegateError):
        get_logger().error(Log.INTERNAL_ERROR, component="store", error=repr(error))


def _words(error: BaseException) -> str:
    if isinstance(error, TidegateError):
        return error.message
    full = "it has no connection left for this process: " if _is_full(error) else ""
    no_text = "no answer in time" if isinstance(error, TimeoutError) else repr(error)
    return full + (str(error) or no_text)


def _unready(error: asyncpg.PostgresError) -> StoreUnavailable:
    unmigrated = isinstance(error, (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError))
    remedy = "; `tidegate migrate` brings its schema up to date" if unmigrated else ""
    return StoreUnavailable("the database is not ready", reason=f"{error}{remedy}")


_HEAD = re.compile(r"^-- name: (?P<name>\w+)\n-- (?P<does>.+)\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Query:
    name: str
    does: str
    sql: str


def _load(text: str) -> dict[str, Query]:
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {
        head["name"]: Query(head["name"], head["does"], text[head.end() : end].strip())
        for head, end in zip(heads, ends, strict=True)
    }


QUERIES = {
    name: query
    for file in (files("tidegate.store") / "sql").iterdir()
    for name, query in _load(file.read_text(encoding="utf-8")).items()
}


# Frequent statements, with generic plans: such a plan locks all partitions if values select them.
PREPARED = {
    QUERIES[name].sql: name
    for name in (
        *("came", "claim", "end_requests", "add_audit", "add_bodies", "add_usage", "get_erased"),
        *("submit_requests", "notify", "pulse", "claim_batch_lines", "begin_batch_lines"),
        *("end_batch_lines", "count_batch_lines", "add_batch_lines", "batches_held_up"),
        *("reserve_budgets", "settle_budgets", "see_upstreams", "beat", "release_strays"),
        *("get_policies", "silent_workers"),
    )
}


def sql(name: str) -> str:
    """Return the text of the statement `name`."""
    return QUERIES[name].sql


def count_in(done: str) -> int:
    """Return the number of affected rows from a command tag such as `DELETE 3`."""
    return int(done.rpartition(" ")[2])


Row = TypeVar("Row")
Result = TypeVar("Result")

MAX_ROWS = 500
MAX_BATCH_BYTES = 8_000_000
MAX_WAITING = 20_000


class GroupWriter(Generic[Row, Result]):
    """Passes batches to `commit`, which returns one result or exception per row. Batches are
    bounded in rows, and in bytes if sizes are given."""

    def __init__(
        self, commit: Callable[[Sequence[Row]], Awaitable[Sequence[Result | Exception]]]
    ) -> None:
        self._commit = commit
        self._waiting: deque[tuple[Row, asyncio.Future[Result], int]] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def write(self, row: Row, size_bytes: int = 0) -> Result:
        """Wait until `row` is committed. A cancelled caller's row may still be written."""
        return await self.put(row, size_bytes)

    def put(self, row: Row, size_bytes: int = 0) -> asyncio.Future[Result]:
        """Queue `row`; the future is done once the row is committed. Raises StoreUnavailable."""
        if len(self._waiting) >= MAX_WAITING:
            raise StoreUnavailable("too many writes are waiting for PostgreSQL")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future, size_bytes))
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
        return future

    async def aclose(self) -> None:
        """Wait until all rows are written; each batch has its own deadline."""
        while self._task is not None:
            await asyncio.wait({self._task})

    async def _drain(self) -> None:
        try:
            while self._waiting:
                await self._settle(self._next())
        finally:
            self._task = None

    def _next(self) -> list[tuple[Row, asyncio.Future[Result]]]:
        batch: list[tuple[Row, asyncio.Future[Result]]] = []
        size_bytes = 0
        while self._waiting and len(batch) < MAX_ROWS and size_bytes < MAX_BATCH_BYTES:
            row, future, of_row = self._waiting.popleft()
            batch.append((row, future))
            size_bytes += of_row
        return batch

    async def _settle(self, batch: list[tuple[Row, asyncio.Future[Result]]]) -> None:
        results: Sequence[Result | Exception]
        try:
            results = await self._commit([row for row, _ in batch])
        except StoreUnavailable as error:
            results = [copy(error) for _ in batch]
        except Exception as failed:  # noqa: BLE001 -- raised in the caller whose row it is
            if len(batch) > 1:
                for pair in batch:
                    await self._settle([pair])
                return
            results = [failed]
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


TABLES = ("attempts", "audit", "bodies")
DAYS_AHEAD = 7
# An attempt's row grows once, at its end: with room in its page, no index is updated.
_SETTINGS = {"attempts": "WITH (fillfactor = 40)", "audit": "", "bodies": ""}
PARTITIONS_LOCK = 7_423_001  # advisory lock for making or dropping partitions


def name_of(table: str, day: date) -> str:
    return f"{table}_{day:%Y%m%d}"


def day_of(name: str) -> date | None:
    """Return the day of a partition's name; None for the default partition."""
    stamp = name.rpartition("_")[2]
    if not stamp.isdigit():
        return None
    return datetime.strptime(stamp, "%Y%m%d").replace(tzinfo=UTC).date()


async def make_ahead(connection: asyncpg.Connection, today: date) -> list[str]:
    """Make missing partitions of today and the next days; runs in a transaction.

    Return the names of those made. Raises LockNotAvailableError if a table is in use for long.
    """
    days = [today + timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)]
    needed = {name_of(table, day): (table, day) for table in TABLES for day in days}
    if not await connection.fetch(sql("missing_partitions"), [*needed]):
        return []
    await connection.execute(sql("lock_partitions"), PARTITIONS_LOCK)
    missing = [row["name"] for row in await connection.fetch(sql("missing_partitions"), [*needed])]
    await connection.execute(sql("wait_briefly"))
    for name in missing:
        await _make(connection, *needed[name])
    return sorted(missing)


async def _make(connection: asyncpg.Connection, table: str, day: date) -> None:
    start = datetime.combine(day, datetime.min.time(), UTC)
    end = start + timedelta(days=1)
    place = {"table": table, "partition": name_of(table, day)}
    await connection.execute(sql("lock_writers").format(**place))
    await connection.execute(sql("create_partition").format(**place, settings=_SETTINGS[table]))
    await connection.execute(sql("fill_partition").format(**place), start, end)
    bounds = {"start": start.isoformat(), "end": end.isoformat()}
    await connection.execute(sql("attach_partition").format(**place, **bounds))


HEAD = "0040"  # the revision that this code needs; a test compares it with the migrations
FIRST = "0012"  # of version 0.1.0; no release had those before
UNRELEASED = "at revision {}, which no release had: it cannot be upgraded"
START_EMPTY = "export what you need of it with pg_dump, then start with an empty database"
_LOCK = 7_423_000
_CONNECT_TIMEOUT_S = 5.0


async def revision_of(connection: asyncpg.Connection) -> str | None:
    """Return the revision of the database, None before any migration; runs in a transaction."""
    if await connection.fetchval("SELECT to_regclass('alembic_version') IS NULL"):
        return None
    revision: str | None = await connection.fetchval("SELECT version_num FROM alembic_version")
    return revision


async def _revision_alone(connection: asyncpg.Connection) -> str | None:
    # Outside a transaction PgBouncer may parse a statement on one server and run it on another.
    async with connection.transaction():
        return await revision_of(connection)


async def _connected(url: str) -> asyncpg.Connection:
    try:
        return await asyncpg.connect(url, timeout=_CONNECT_TIMEOUT_S, statement_cache_size=0)
    except asyncpg.ClientConfigurationError as error:  # not an outage, and does not pass
        raise ConfigError("DATABASE_URL", None, f"can't be used: {error.args[0]}") from None
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as failed:
        check_files(url, failed)
        at = f" at {host}" if (host := urlsplit(url).hostname) else ""
        raise StoreUnavailable(f"PostgreSQL{at} does not answer", reason=_words(failed)) from failed


def check_files(url: str, failed: BaseException) -> None:
    """Raise ConfigError if a connection failed for a file that DATABASE_URL names in its query:
    asyncpg does not report which."""
    if not isinstance(failed, (FileNotFoundError, PermissionError)):
        return
    for name, path in parse_qsl(urlsplit(url).query):
        if name in ("sslrootcert", "sslcert", "sslkey", "sslcrl") and not os.access(path, os.R_OK):
            why = f"can't be used: {name} names {path}, which cannot be read: {failed.strerror}"
            raise ConfigError("DATABASE_URL", None, why) from None


async def row_alone(
    connection: DatabaseSession, name: str, *values: object, timeout_ms: int
) -> asyncpg.Record:
    """Return the one row of a statement, in a transaction on a connection outside the pool."""
    if await connection.runs_alone():
        row = await connection.fetchrow(sql(name), *values)
    else:
        await connection.execute(_BEGIN.format(timeout_ms=timeout_ms))
        row = await connection.fetchrow(sql(name), *values)
        await connection.execute("COMMIT")
    assert row is not None
    return row


async def revision_at(url: str) -> str | None:
    """Return the revision of a database, None without a schema. Raises StoreUnavailable."""
    connection = await _connected(url)
    try:
        return await _revision_alone(connection)
    finally:
        await connection.close()


async def settle_restored(url: str) -> None:
    """Adapt restored rows to their new server. Raises StoreUnavailable."""
    connection = await _connected(url)
    try:
        await connection.execute(sql("settle_restored"))
        await connection.execute("ANALYZE")
    finally:
        await connection.close()


def steps() -> Iterator[tuple[str, str]]:
    """Yield each revision with the SQL that leads to it from the previous one."""
    folder = files("tidegate.store") / "migrations"
    found = (step for step in folder.iterdir() if step.name.endswith(".sql"))
    for step in sorted(found, key=lambda step: step.name):
        yield step.name[1:5], step.read_text(encoding="utf-8")


async def upgrade(connection: asyncpg.Connection, until: str = HEAD) -> None:
    """Run the missing steps up to a revision, all or none. Other processes wait for the end."""
    async with connection.transaction():
        await connection.execute(f"SELECT pg_advisory_xact_lock({_LOCK})")
        await connection.execute(sql("wait_briefly"))
        before = await revision_of(connection)
        await connection.execute(sql("create_revision"))
        for revision, step in steps():
            if (before or "") < revision <= until:
                await connection.execute(step)
                await connection.execute("DELETE FROM alembic_version")
                await connection.execute(f"INSERT INTO alembic_version VALUES ('{revision}')")


async def migrate(url: str) -> str | None:
    """Run the missing steps and make partitions ahead.

    Return the new revision, None if there was nothing to do. Raises StoreUnavailable if PostgreSQL
    is unreachable or a table is in use, ConfigError for a wrong URL, a database from before the
    first release, or a user without the rights. A failure leaves everything unchanged.
    """
    connection = await _connected(url)
    try:
        before = await _revision_alone(connection)
        if before is not None and before < FIRST:
            names = f"names a database {UNRELEASED.format(before)}; {START_EMPTY}"
            raise ConfigError("DATABASE_URL", None, names)
        if before is None or before < HEAD:
            await upgrade(connection)
        async with connection.transaction():
            after = await revision_of(connection)
            await make_ahead(connection, datetime.now(UTC).date())
    except asyncpg.InsufficientPrivilegeError as refused:
        names = f"names a user that may not change the schema: {refused}; migrate as its owner"
        raise ConfigError("DATABASE_URL", None, names) from refused
    except (asyncpg.LockNotAvailableError, *_TRANSIENT) as failed:
        is_locked = isinstance(failed, asyncpg.LockNotAvailableError)
        why = "a table is in use, perhaps by a backup" if is_locked else _words(failed)
        raise StoreUnavailable("the schema can't be changed now", reason=why) from failed
    finally:
        await connection.close(timeout=_CONNECT_TIMEOUT_S)
    if after == before:
        return None
    get_logger().info(Log.MIGRATED, before=before, after=after)
    return after
