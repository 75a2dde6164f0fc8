"""Connections to PostgreSQL: a small pool, hard deadlines, and the knowledge of being away.

Invariant: nothing here waits longer than its deadline, whatever the server does. A connection that
failed, ran out of time or was used by a cancelled caller is never used again half-way through a
transaction. While PostgreSQL is away callers are told at once, and one probe looks for its return.

Every piece of work is one transaction and no statement is prepared by name, so that PgBouncer in
transaction mode may stand in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import asyncpg

from tidegate.errors import StoreUnavailable, TidegateError
from tidegate.telemetry import Log, get_logger

T = TypeVar("T")
Work = Callable[[asyncpg.Connection], Awaitable[T]]

CONNECT_TIMEOUT_MS = 1_500
COMMAND_TIMEOUT_MS = 5_000
SLOW_MS = 1_000  # after this the probe looks whether the server still answers
PROBE_TIMEOUT_MS = 1_000
PROBE_EVERY_MS = 200
_TRIES = 3
# One round trip. A frozen client must not hold locks for ever, nor a lost one its statement; and
# since the statistics of a queue are always stale, no plan may come to scan it whole.
_BEGIN = (
    "BEGIN; SET LOCAL jit = off; SET LOCAL enable_seqscan = off; "
    "SET LOCAL statement_timeout = {timeout_ms}; "
    "SET LOCAL idle_in_transaction_session_timeout = 10000"
)

# Worth another try on another connection: the work itself was not at fault.
_TRANSIENT = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # asyncpg's word for a connection whose end was announced between two statements.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shutdown, crash of a neighbour, starting up, cancelled
    asyncpg.InsufficientResourcesError,  # too many connections, disk full
    asyncpg.TransactionRollbackError,  # deadlock
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,  # a server that has been demoted
)
# A connection that was cut: says nothing yet of the server.
_CUT = (
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    ConnectionResetError,
)
# The server is there but is not the one we need (yet).
_UNFIT = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InsufficientPrivilegeError,
)


class _Commit:
    """Of one try. Once it is `sent` the transaction may be committed, whatever is heard of it."""

    sent = False


class Connections:
    """At most `size` connections, opened as needed."""

    def __init__(self, url: str, *, size: int = 10) -> None:
        self._url = url
        self._slots = asyncio.Semaphore(size)
        self._idle: list[asyncpg.Connection] = []
        self._busy: set[asyncpg.Connection] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self._probe: asyncio.Task[None] | None = None
        self._away: str | None = None  # why, while away
        self._closed = False
        self.on_back: list[Callable[[], None]] = []

    @property
    def away(self) -> bool:
        return self._away is not None

    def __repr__(self) -> str:
        return f"<Connections busy={len(self._busy)} idle={len(self._idle)} away={self._away!r}>"

    def start(self) -> None:
        """Begin to connect in the background; PostgreSQL may come later."""
        self._suspect()

    async def aclose(self, timeout_ms: int = 2_000) -> None:
        """Let work under way end within `timeout_ms`, then cut it off and close everything."""
        self._closed = True
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
        self, work: Work[T], *, timeout_ms: int = COMMAND_TIMEOUT_MS, repeatable: bool = True
    ) -> T:
        """Run `work` in a transaction and commit; repeats it when the connection was at fault.

        `repeatable`: whether a repeat is right where the first transaction was committed and the
        reply was lost. Where it is not, such as for a claim that takes whatever is ready, the work
        is repeated only as long as no COMMIT was sent. Raises StoreUnavailable, at once while
        PostgreSQL is known to be away; unrepeatable work may be committed then. A cancelled caller
        leaves at once; the transaction ends by itself within its deadline, either way.
        """
        if self._closed or self._away is not None:
            await asyncio.sleep(0)  # a caller that tries in a loop must not starve the others
        if self._closed:
            raise StoreUnavailable("the store is closed")
        if self._away is not None:
            raise StoreUnavailable(f"PostgreSQL is away: {self._away}")
        task = asyncio.create_task(self._run(work, timeout_ms, repeatable))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_abandoned)
            raise

    async def ping(self, timeout_ms: int) -> None:
        """One round trip on a connection of its own; raises StoreUnavailable."""
        try:
            connection = await self._answered(timeout_ms / 1000)
        except (*_TRANSIENT, *_UNFIT) as failed:
            raise StoreUnavailable(f"PostgreSQL does not answer: {failed}") from failed
        connection.terminate()

    async def dedicated(self) -> asyncpg.Connection:
        """A connection outside the pool, for LISTEN; the caller terminates it."""
        if self._away is not None:
            raise StoreUnavailable(f"PostgreSQL is away: {self._away}")
        try:
            return await self._connect(CONNECT_TIMEOUT_MS / 1000)
        except (*_TRANSIENT, *_UNFIT) as failed:
            raise StoreUnavailable(f"PostgreSQL does not answer: {failed}") from failed

    async def _run(self, work: Work[T], timeout_ms: int, repeatable: bool) -> T:
        deadline = asyncio.get_running_loop().time() + timeout_ms / 1000
        tries = 0
        while True:
            tries += 1
            commit = _Commit()
            try:
                return await self._transaction(work, deadline, timeout_ms, commit)
            except _UNFIT as unfit:
                raise StoreUnavailable(_unfit_words(unfit)) from unfit
            except _TRANSIENT as failed:
                late = asyncio.get_running_loop().time() >= deadline
                if late or tries == _TRIES:
                    self._suspect()
                if late or self.away or tries == _TRIES or self._closed:
                    raise StoreUnavailable(f"PostgreSQL failed: {_words(failed)}") from failed
                if commit.sent and not repeatable:
                    said = f"the reply to a COMMIT was lost: {_words(failed)}"
                    raise StoreUnavailable(said) from failed

    async def _transaction(
        self, work: Work[T], deadline: float, timeout_ms: int, commit: _Commit
    ) -> T:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout_at(deadline):
            await self._slots.acquire()
        try:
            connection = await self._take(deadline)
            # Not by cancelling the query: asyncpg would then open a connection to cancel it,
            # which a frozen server never closes.
            watchdog = loop.call_at(deadline, connection.terminate)
            doubt = loop.call_later(SLOW_MS / 1000, self._suspect)
            self._busy.add(connection)
            try:
                await connection.execute(_BEGIN.format(timeout_ms=timeout_ms))
                result = await work(connection)
                commit.sent = True
                await connection.execute("COMMIT")
            except BaseException as failed:
                cut_off = connection.is_closed()
                connection.terminate()
                if cut_off and isinstance(failed, AttributeError):
                    # What asyncpg makes of an end between two steps of one statement.
                    raise asyncpg.InterfaceError("the connection was cut off") from failed
                raise
            finally:
                watchdog.cancel()
                doubt.cancel()
                self._busy.discard(connection)
            if self._closed or self.away:
                connection.terminate()
            else:
                self._idle.append(connection)
            return result
        finally:
            self._slots.release()

    async def _take(self, deadline: float) -> asyncpg.Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        left = deadline - asyncio.get_running_loop().time()
        try:
            return await self._connect(min(CONNECT_TIMEOUT_MS / 1000, max(left, 0.001)))
        except asyncpg.TooManyConnectionsError:
            raise  # it answers, and those that we have go on working
        except _CUT:
            self._suspect()
            raise
        except (*_TRANSIENT, *_UNFIT) as failed:
            self._gone(_words(failed))
            raise

    async def _connect(self, timeout_s: float) -> asyncpg.Connection:
        return await asyncpg.connect(
            self._url,
            timeout=timeout_s,
            statement_cache_size=0,
            server_settings={"application_name": "tidegate"},
        )

    async def _answered(self, timeout_s: float) -> asyncpg.Connection:
        """A new connection on which the server has answered, within `timeout_s` all in all.

        Raises what asyncpg raises, and TimeoutError. PgBouncer lets its clients in by itself
        while the server behind it is gone: only the answer to a statement is the server's.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        connection = await self._connect(timeout_s)
        watchdog = loop.call_at(deadline, connection.terminate)
        try:
            await connection.execute("SELECT 1")
        except BaseException as failed:
            connection.terminate()
            if isinstance(failed, Exception) and loop.time() >= deadline:
                raise TimeoutError from failed
            raise
        finally:
            watchdog.cancel()
        return connection

    def _gone(self, reason: str) -> None:
        if self._away is None:
            get_logger().warning(Log.STORE_AWAY, reason=reason)
        self._away = reason
        while self._idle:
            self._idle.pop().terminate()
        for connection in self._busy:
            connection.terminate()
        self._suspect()

    def _suspect(self) -> None:
        if self._probe is None and not self._closed:
            self._probe = asyncio.create_task(self._look())

    async def _look(self) -> None:
        """Try to connect until it works; the first failure makes PostgreSQL `away`."""
        cuts_left = 2
        try:
            while True:
                try:
                    self._idle.append(await self._answered(PROBE_TIMEOUT_MS / 1000))
                    break
                except asyncpg.TooManyConnectionsError:
                    break
                except (*_TRANSIENT, *_UNFIT) as failed:
                    cuts_left -= isinstance(failed, _CUT)
                    if cuts_left < 0 or not isinstance(failed, _CUT):
                        self._gone(_words(failed))
                await asyncio.sleep(PROBE_EVERY_MS / 1000)
        finally:
            self._probe = None
        if self._away is not None:
            self._away = None
            get_logger().info(Log.STORE_BACK)
            for tell in self.on_back:
                tell()


class ReadTurns:
    """A tenant's reads of single requests, `most` of them at a time in this process: however many
    of its clients poll, the other connections are for everybody else."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, tenant_id: str, timeout_ms: int) -> AsyncIterator[None]:
        """Wait for a turn, no longer than that. Raises StoreUnavailable."""
        turns = self._of.get(tenant_id)
        if turns is None:
            turns = self._of[tenant_id] = asyncio.Semaphore(self._most)
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await turns.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"too many reads of tenant {tenant_id} wait here") from None
        try:
            yield
        finally:
            turns.release()


def _abandoned(task: asyncio.Task[Any]) -> None:
    """Its caller has left: an outage concerns nobody any more, and what else it raised is logged
    here, where asyncio would complain of an exception that was never retrieved."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, TidegateError):
        get_logger().error(Log.INTERNAL_ERROR, where="store", error=repr(error))


def _words(error: BaseException) -> str:
    if isinstance(error, TidegateError):
        return error.message
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else repr(error))


def _unfit_words(error: asyncpg.PostgresError) -> str:
    unmigrated = isinstance(error, (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError))
    mend = "; `tidegate migrate` brings its schema up to date" if unmigrated else ""
    return f"the database is not ready for us: {error}{mend}"
