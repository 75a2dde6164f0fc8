"""The limiter as its users see it: permits of a pool, shared by all processes through Valkey.

Owns the tasks, the thread and the three connections of one process in one pool. Invariant: what
`acquire` let in is counted in the pool until the body has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Self, Unpack

from tidegate.limiter.clock import Clock
from tidegate.limiter.courier import Courier
from tidegate.limiter.decorate import AcquireOptions, P, R, limited
from tidegate.limiter.demand import Demand
from tidegate.limiter.desk import Desk
from tidegate.limiter.flow import Tokens, tokens_of
from tidegate.limiter.heartbeat import STALLED_S, Heartbeat, tell_loop
from tidegate.limiter.keys import Keyspace
from tidegate.limiter.ledger import Ledger
from tidegate.limiter.limits import DEFAULT_HARD_MS, PoolPolicy
from tidegate.limiter.link import Link
from tidegate.limiter.listener import Listener
from tidegate.limiter.observer import Observer, State
from tidegate.limiter.operations import Operations
from tidegate.limiter.permit import Acquisition, Attempt
from tidegate.limiter.precedence import OnConflict, WrittenPolicy
from tidegate.limiter.snapshot import LocalPermit, LocalQueue, LocalState

logger = logging.getLogger("tidegate.limiter")

MAX_WAITERS = 100_000
# With `reap_closed_ms`: how often a process looks whose connection is closed, at most.
MIN_LOOK_MS = 25
# How long a closing limiter waits for bodies that it has cancelled.
CLOSE_BODIES_S = 1.0
# How long it tries to tell the server, so that nothing waits for its lease: at least.
GOODBYE_S = 1.0


class Limiter(Operations):
    """Permits of one pool for this process. Enter it, or call `start` and `aclose`."""

    def __init__(
        self,
        url: str,
        *,
        pool: str,
        policy: PoolPolicy,
        instance_id: str | None = None,
        observer: Observer | None = None,
        on_conflict: OnConflict = "raise",
        max_waiters: int = MAX_WAITERS,
        stalled_s: float = STALLED_S,
        clock: Clock | None = None,
    ) -> None:
        self.pool = pool
        self.instance_id = instance_id
        self._url = url
        self._keys = Keyspace(pool)
        self._observer = observer if observer is not None else Observer()
        self._stalled_s = stalled_s
        self._clock = clock or Clock()
        self._ledger = Ledger()
        self._link = Link(url, self._keys.meta)
        written = WrittenPolicy(pool, policy, on_conflict)
        self._courier = Courier(
            *(self._link, self._keys, written, self._ledger, self._observer),
            instance_id or "",
            self._clock,
        )
        self._session = self._courier.session
        self._heartbeat: Heartbeat | None = None
        self._listener: Listener | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._carrying: asyncio.Task[None] | None = None
        desk = partial(Desk, self._ledger, self._session, self._observer)
        self._desk = desk(max_waiters, self._clock, pool)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        pool: str,
        policy: PoolPolicy,
        instance_id: str | None = None,
        observer: Observer | None = None,
        on_conflict: OnConflict = "raise",
        clock: Clock | None = None,
    ) -> Limiter:
        """A limiter of `pool` at `url` (`redis://`, `rediss://` or `unix://`).

        `instance_id` only names the process for people: every start is a new session, which
        takes over nothing of an earlier one. `on_conflict`: what is done where the pool has
        another policy in force. `clock` is for tests.
        """
        limiter = partial(cls, url, pool=pool, policy=policy, on_conflict=on_conflict)
        return limiter(instance_id=instance_id, observer=observer, clock=clock)

    def __repr__(self) -> str:
        return f"<Limiter {self.pool} {self._session.state} {self._ledger!r}>"

    @property
    def session(self) -> str:
        """The name of this process's session in the pool."""
        return self._session.sid

    @property
    def policy(self) -> PoolPolicy:
        """The policy in force, as far as this process knows."""
        return self._session.policy

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Enter the pool. Starts in the state `away` when Valkey does not answer.

        Raises PolicyConflict, and ConfigError for a server that may evict our keys, or a pool
        that a process of another layout uses.
        """
        loop = asyncio.get_running_loop()
        courier, session = self._courier, self._session
        self._heartbeat = Heartbeat(
            self._url,
            session.sid,
            self._keys,
            session.lease,
            self._clock,
            tell_changed=lambda: tell_loop(loop, session.refresh),
            tell_paused=lambda: tell_loop(loop, session.paused),
            stalled_s=self._stalled_s,
        )
        self._listener = Listener(
            self._url,
            self._keys.channel(session.sid),
            session.lease,
            session.take_push,
            session.refresh,
            lambda: self._link.server,
            self._clock,
        )
        self._carrying = asyncio.create_task(courier.run(), name="tidegate-courier")
        self._tasks = [
            asyncio.create_task(self._listener.run(), name="tidegate-listener"),
            asyncio.create_task(self._pulse(), name="tidegate-pulse"),
        ]
        session.refresh()
        self._heartbeat.start()
        try:
            async with asyncio.timeout(max(2 * session.lease.deadline_s(), 0.5)):
                await courier.joined.wait()
        except TimeoutError:
            logger.warning("limiter: starting without Valkey: %s", self.last_error)
        except asyncio.CancelledError:
            await self._stop()
            raise
        if session.fatal is not None:
            await self._stop()
            raise session.fatal

    async def _pulse(self) -> None:
        """Shows the heartbeat that the loop lives, compares all with Valkey, watches the lease."""
        lease, compared_ms = self._session.lease, self._clock.now_ms()
        while True:
            every_ms = lease.lease_ms / 3
            if self.policy.reap_closed_ms:
                every_ms = min(every_ms, max(MIN_LOOK_MS, self.policy.reap_closed_ms / 4))
            await self._clock.sleep(min(lease.lease_ms / 12, every_ms) / 1000)
            if self._heartbeat is not None:
                self._heartbeat.loop_is_alive()
            self._session.check_lapse()
            self._session.admit_locally()
            if self._clock.now_ms() - compared_ms >= every_ms * 0.95:
                compared_ms = self._clock.now_ms()
                self._session.refresh()

    # -- permits

    def acquire(
        self,
        *limits: str,
        tenant: str = "default",
        priority: str | None = None,
        tokens: int | Tokens | None = None,
        images: int = 0,
        deadline_ms: int | None = None,
        hard_ms: int | None = None,
    ) -> Acquisition:
        """`async with limiter.acquire("kind:text_only", deadline_ms=30_000) as permit:`

        Entering waits for all of `limits` together, at most `deadline_ms`; leaving gives the permit
        back without a round trip. `tenant` is whose share it is; `priority` the name of a band;
        `tokens` and `images` an estimate for limits that count them. `hard_ms` is the longest that
        the call can last: with `on_expiry = "hold"` the permit of a dead process counts for that
        long (10 minutes if not given).

        Raises on entering: DeadlineExceeded, LimiterUnavailable (Valkey is away at the deadline),
        DemandImpossible (an unknown limit, or one of 0), QueueFull, ShuttingDown; ConfigError for
        an unknown priority or a tenant's name that can't be one; ValueError for a limit of tokens
        without `tokens`. Cancelling the wait takes the ticket out; a permit that was granted in
        that moment is given back.
        Raises on leaving: LeaseLost, when the session was lost while the body ran; the body is
        cancelled then.
        """
        wanted, hard_ms = None if tokens is None else tokens_of(tokens), hard_ms or DEFAULT_HARD_MS
        demand = Demand(limits, tenant, priority, wanted, images, deadline_ms, hard_ms)
        return self.acquire_for(demand)

    def acquire_for(self, demand: Demand) -> Acquisition:
        """As `acquire`, for a demand that is there already."""
        return Acquisition(self._desk, demand)

    def try_acquire(
        self,
        *limits: str,
        tenant: str = "default",
        priority: str | None = None,
        tokens: int | Tokens | None = None,
        images: int = 0,
        hard_ms: int | None = None,
    ) -> Attempt:
        """`async with limiter.try_acquire("kind:x") as permit:` where `permit` is None if it can't
        be had at once, which takes no longer than the server's next answer, or while Valkey
        is away. Otherwise as `acquire`."""
        wanted = None if tokens is None else tokens_of(tokens)
        bound_ms = hard_ms or DEFAULT_HARD_MS
        demand = Demand(limits, tenant, priority, wanted, images, None, bound_ms, once=True)
        return self.try_acquire_for(demand)

    def try_acquire_for(self, demand: Demand) -> Attempt:
        """As `try_acquire`, for a demand that is there already: one that takes the first answer."""
        if demand.deadline_ms is None:
            within_ms = max(1, round(2000 * self._session.lease.deadline_s()))
            demand = replace(demand, deadline_ms=within_ms)
        return Attempt(self.acquire_for(demand))

    def limited(
        self, *limits: str, **options: Unpack[AcquireOptions]
    ) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]:
        """A decorator: each call of the coroutine function runs under a permit. Options as
        `acquire` takes them."""
        return limited(self, *limits, **options)

    # -- what can be seen

    @property
    def state(self) -> State:
        """Whether Valkey answers this process."""
        return self._session.state

    @property
    def permits_held(self) -> int:
        """How many permits this process holds."""
        return len(self._ledger.held)

    @property
    def waiters(self) -> int:
        """How many calls of this process wait for a permit."""
        return len(self._ledger.waiting)

    def local_state(self) -> LocalState:
        """This process's part, without I/O. The cost grows with the limits that are in use here;
        `state`, `permits_held` and `waiters` cost nothing."""
        return LocalState(
            state=self._session.state,
            held=self._ledger.held_of.copy(),
            waiting=self._ledger.waiting_of.copy(),
            silent_ms=self._session.lease.silent_ms(),
            sessions=self._session.sessions,
            revision=self.policy.revision,
            permits=len(self._ledger.held),
            waiters=len(self._ledger.waiting),
        )

    @property
    def last_error(self) -> str:
        """Why Valkey was last found to be away."""
        return self._session.last_error or "no answer yet"

    def local_permits(self, most: int) -> list[LocalPermit]:
        """The permits of this process, the oldest first, without I/O."""
        at = self._session.lease.now_ms()
        oldest = islice(self._ledger.held.values(), most)  # in the order of their grants
        return [
            LocalPermit(
                seq=one.seq,
                tenant=one.flow.tenant,
                limits=one.flow.limits,
                held_ms=round(at - one.held_from_ms),
                waited_ms=round(one.waited_ms),
                left_ms=one.hard_left_ms(at),
            )
            for one in oldest
        ]

    def local_queues(self, most: int) -> list[LocalQueue]:
        """The waiters of this process by flow, the longest queues first, without I/O."""
        at = self._session.lease.now_ms()
        return [
            LocalQueue(
                flow.band,
                flow.tenant,
                flow.limits,
                len(flow.waiting),
                round(at - next(iter(flow.waiting.values())).asked_ms),
            )
            for flow in self._ledger.longest_queues(most)
        ]

    async def joined(self) -> None:
        """Return once the pool has answered for the first time; while Valkey is away, wait."""
        await self._courier.joined.wait()

    # -- the end

    def turn_away(self) -> None:
        """Refuse with ShuttingDown what waits, and what asks from now on; bodies run on."""
        self._desk.turn_away()

    async def aclose(self, grace_ms: int = 0) -> None:
        """End the session, so that what it held is free. Waiters get ShuttingDown; bodies may end
        within `grace_ms`, then they are cancelled with LeaseLost and given one second more."""
        if self._desk.closing:
            return
        self._desk.closing = True
        self._desk.turn_away()
        try:
            if not await self._wait_idle(grace_ms / 1000):
                self._ledger.fence()
                await self._wait_idle(CLOSE_BODIES_S)
            await self._say_goodbye()
        finally:
            await self._stop()

    async def _wait_idle(self, timeout_s: float) -> bool:
        """True once nothing is held."""
        idle = self._desk.idle
        idle.clear()
        self._desk.check_idle()
        if idle.is_set():
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await idle.wait()
        except TimeoutError:
            return False
        return True

    async def _say_goodbye(self) -> None:
        if self._carrying is None:
            return
        # Perhaps it is away only because we stood still and missed its last answer.
        calls = 1 if self._session.away else 2
        self._session.leave()
        timeout_s = max(calls * self._session.lease.deadline_s(), GOODBYE_S)
        await asyncio.wait({self._carrying}, timeout=timeout_s)

    async def _stop(self) -> None:
        self._desk.closing = True
        self._courier.stop_timers()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        tasks = [*self._tasks, self._carrying] if self._carrying is not None else self._tasks
        await _end(tasks)
        await self._link.aclose()
        if self._heartbeat is not None:
            await asyncio.to_thread(self._heartbeat.join, 1.0)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel until all have ended: a cancellation that meets a deadline inside a client library
    can be taken for the deadline."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=0.5)
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("limiter: a task had failed", exc_info=error)
