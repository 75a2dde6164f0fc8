"""Limiter: permits of a pool that all processes share through Valkey.

Owns the tasks, the thread and the three connections of one process in one pool. Errors:
LimiterUnavailable if Valkey does not answer within a third of the lease.

Invariants: an admitted call is counted in the pool until its body ends; every waiter gets a
permit or an error, once; a permit is returned without an await.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from math import ceil
from secrets import token_hex
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, Required, Self, TypedDict, TypeVar, Unpack

import msgpack

from tidegate.errors import DemandImpossible, LimiterUnavailable, TidegateError
from tidegate.limiter.connection import (
    STALLED_S,
    ExchangeLoop,
    Heartbeat,
    Link,
    LinkDown,
    Listener,
    tell_loop,
)
from tidegate.limiter.estimates import WaitingLine, read_line
from tidegate.limiter.messages import InspectReply, Keyspace, ScriptName, load, pack
from tidegate.limiter.permit import Acquisition, PermitIssuer, TryAcquisition, misused
from tidegate.limiter.policy import (
    DEFAULT_HARD_MS,
    FOR_EVER_MS,
    Change,
    Demand,
    Limit,
    OnConflict,
    PoolPolicy,
    Tokens,
    WrittenPolicy,
    as_policy,
    read_change,
    tokens_of,
    unknown_limit,
    whole_ms,
)
from tidegate.limiter.queue import LocalQueue
from tidegate.limiter.session import Clock, Observer, State
from tidegate.limiter.views import (
    LocalPermit,
    LocalQueueView,
    LocalState,
    PermitView,
    Place,
    Snapshot,
    Why,
    read_place,
    read_pool,
)

RAMP_MS = 10_000
# For how long the server knows a request of an operator again: longer than its repeat may take.
KEEP_ONCE_MS = 1_000


P = ParamSpec("P")
R = TypeVar("R")


class AttemptOptions(TypedDict, total=False):
    """The keywords of `Limiter.try_acquire`."""

    tenant: str
    priority: str | None
    tokens: int | Tokens | None
    images: int
    hard_ms: int | None


class AcquireOptions(AttemptOptions, total=False):
    """The keywords of `Limiter.acquire`."""

    timeout: float | timedelta | None
    deadline_ms: int | None


class LimiterOptions(TypedDict, total=False):
    """The keywords of `Limiter.from_url`.

    policy: or a mapping of limits. instance_id: only names the process for people; every start is
        a new session, which takes over nothing of an earlier one. on_conflict: what is done where
        the pool has another policy in force. clock: for tests.
    """

    pool: str
    policy: Required[PoolPolicy | Mapping[str, int | Limit]]
    instance_id: str | None
    observer: Observer | None
    on_conflict: OnConflict
    clock: Clock | None


def limited(
    limiter: Limiter, *limits: str, **options: Unpack[AcquireOptions]
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """Decorate a coroutine function: each call of it waits for a permit and runs while it holds it.

    Takes what `Limiter.acquire` takes; its errors leave the call, and when the permit is lost the
    function is cancelled and the call raises LeaseLost. Raises TypeError for anything but a
    coroutine function: what a plain function or a generator returns would outlive the permit.
    """

    def decorate(
        function: Callable[P, Coroutine[Any, Any, R]],
    ) -> Callable[P, Coroutine[Any, Any, R]]:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{function!r} is no coroutine function")

        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> R:
            async with limiter.acquire(*limits, **options):
                return await function(*args, **kwargs)

        return call

    check_names(limits)
    return decorate


def check_names(limits: tuple[object, ...]) -> None:
    """Raises TypeError for a decorator that was written without its limits."""
    if not limits or callable(limits[0]):
        raise TypeError('name the limits: @limiter.limited("openai", timeout=30)')


logger = logging.getLogger("tidegate.limiter")


def deadline_of(timeout: float | timedelta | None, deadline_ms: int | None) -> int | None:
    """The deadline of a call in ms, from seconds or a `timedelta`, or as it is given; `inf` is
    none."""
    if timeout is None:
        is_usual = deadline_ms is None or type(deadline_ms) is int
        return deadline_ms if is_usual else whole_ms("deadline_ms", deadline_ms or 0)
    if deadline_ms is not None:
        raise TypeError("give timeout (seconds) or deadline_ms, not both")
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if not isinstance(seconds, int | float):
        raise TypeError(f"timeout is a number of seconds or a timedelta, not {timeout!r}")
    return None if seconds * 1000 > FOR_EVER_MS else ceil(max(seconds, 0.0) * 1000)


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except LinkDown as error:
        said = str(error)
        if not said.startswith("Valkey"):
            said = f"Valkey is unavailable: {said}"
        raise LimiterUnavailable(said, limit="", retry_after_ms=1000) from error


def guarded(observer: Observer) -> Observer:
    """An observer whose faults are logged: a permit or a wait must not be lost by one."""
    if type(observer) is Observer:
        return observer
    made = Observer()
    for name in ("state_changed", "fenced", "recovered", "admitted", "refused", "synced"):
        setattr(made, name, _logged(getattr(observer, name)))
    return made


def _logged(call: Callable[..., None]) -> Callable[..., None]:
    def report(*args: object) -> None:
        try:
            call(*args)
        except Exception:  # a user's code, on which no permit may depend
            logger.exception("limiter: an observer failed")

    return report


MAX_WAITERS = 100_000
# With `reap_closed_ms`: how often a process looks whose connection is closed, at most.
MIN_LOOK_MS = 25
# How long a closing limiter waits for bodies that it has cancelled.
CLOSE_BODIES_S = 1.0
# How long it tries to tell the server, so that nothing waits for its lease: at least.
GOODBYE_S = 1.0
# How often the pool is looked at while a new policy reaches its processes.
_KNOWN_FIRST_S, _KNOWN_EVERY_S = 0.05, 0.5


class Limiter:
    """Permits of one pool for this process. Enter it, or call `start` and `aclose`."""

    def __init__(
        self,
        url: str,
        *,
        pool: str = "default",
        policy: PoolPolicy | Mapping[str, int | Limit],
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
        self._stalled_s = stalled_s
        self._clock = clock or Clock()
        self._made_in_pid = os.getpid()
        self._queue = LocalQueue()
        self._link = Link(url, self._keys.meta)
        self._exchanges = ExchangeLoop(
            self._link,
            self._keys,
            WrittenPolicy(pool, as_policy(policy), on_conflict),
            self._queue,
            guarded(observer or Observer()),
            instance_id or "",
            self._clock,
        )
        self._session = self._exchanges.session
        self._heartbeat: Heartbeat | None = None
        self._listener: Listener | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._exchanging: asyncio.Task[None] | None = None
        self._issuer = PermitIssuer(
            self._queue, self._session, max_waiters, self._clock, self._exchanges.wake, pool
        )

    @classmethod
    def from_url(cls, url: str, **options: Unpack[LimiterOptions]) -> Self:
        """A limiter of `pool` at `url` (`redis://`, `rediss://` or `unix://`), or in the memory of
        this process alone, for unit tests (`memory://`)."""
        return cls(url, **options)

    def __repr__(self) -> str:
        return f"<Limiter {self.pool} {self._session.state} {self._queue!r}>"

    @property
    def session(self) -> str:
        """The name of this process's session in the pool."""
        return self._session.sid

    @property
    def epoch(self) -> int:
        """Of the pool, as far as this process knows: a higher one begins when Valkey has lost its
        data. 0 before the pool has answered."""
        return self._session.lease.identity.epoch

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

    def __enter__(self) -> NoReturn:
        misused("`async with` on a Limiter; for threads take a SyncLimiter")

    def __exit__(self, *_: object) -> None:
        """Never reached: without it Python would not call `__enter__`."""

    async def start(self) -> None:
        """Enter the pool. Starts in the state `away` when Valkey does not answer.

        Raises PolicyConflict, and ConfigError for a server that may evict our keys, or a pool
        that a process of another layout uses; RuntimeError where it was started or closed before.
        """
        if self._issuer.loop is not None or self._issuer.closing:
            raise RuntimeError("a Limiter is opened once: make another one")
        loop = self._issuer.loop = asyncio.get_running_loop()
        exchanges, session = self._exchanges, self._session
        if os.getpid() != self._made_in_pid:
            session.sid = token_hex(8)  # others that were forked from the same one have theirs
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
            self._is_idle,
        )
        self._exchanging = asyncio.create_task(exchanges.run(), name="tidegate-exchanges")
        self._tasks = [
            asyncio.create_task(self._listener.run(), name="tidegate-listener"),
            asyncio.create_task(self._pulse(), name="tidegate-pulse"),
        ]
        session.refresh()
        self._heartbeat.start()
        try:
            async with asyncio.timeout(max(2 * session.lease.deadline_s(), 0.5)):
                await exchanges.joined.wait()
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
            # With nothing to fence or to admit there is no lapse to see before the next comparison.
            steps = 1 if self._is_idle() and self.state == "up" else 4
            await self._clock.sleep(min(lease.lease_ms / (3 * steps), every_ms) / 1000)
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
        timeout: float | timedelta | None = None,
        deadline_ms: int | None = None,
        hard_ms: int | None = None,
    ) -> Acquisition:
        """`async with limiter.acquire("openai", timeout=30) as permit:`

        Entering waits for all of `limits` together, at most `timeout` seconds, or `deadline_ms`,
        and confirms the permit; leaving releases it without a round trip. With 0 or less it takes
        what is free in the server's next answer, and waits for no other call. `tenant` is whose
        share it is; `priority` the name of a band; `tokens` and `images` an estimate for limits
        that count them. `hard_ms` is the longest that the call can last: with `on_expiry = "hold"`
        the permit of a dead process counts for that long (10 minutes if not given).

        Raises on entering: DeadlineExceeded, LimiterUnavailable (Valkey is away at the deadline),
        DemandImpossible (an unknown limit, or one of 0), QueueFull, ShuttingDown; ConfigError for
        an unknown priority or a tenant's name that can't be one; ValueError for a limit of tokens
        without `tokens`. Cancelling the wait takes the ticket out; a permit that was granted in
        that moment is returned.
        Raises on leaving: LeaseLost, when the session was lost while the body ran; the body is
        cancelled then.
        """
        wanted, hard_ms = None if tokens is None else tokens_of(tokens), hard_ms or DEFAULT_HARD_MS
        within_ms = deadline_of(timeout, deadline_ms)
        demand = Demand(limits, tenant, priority, wanted, images, within_ms, hard_ms)
        if within_ms is not None and within_ms <= 0:
            demand = self._soon(replace(demand, deadline_ms=None, once=True))
        return Acquisition(self._issuer, demand, True)

    def acquire_for(self, demand: Demand) -> Acquisition:
        """As `acquire`, for a demand that is there already, and whose permit is confirmed by its
        user."""
        return Acquisition(self._issuer, demand)

    def try_acquire(
        self,
        *limits: str,
        tenant: str = "default",
        priority: str | None = None,
        tokens: int | Tokens | None = None,
        images: int = 0,
        hard_ms: int | None = None,
    ) -> TryAcquisition:
        """`async with limiter.try_acquire("kind:x") as permit:` where `permit` is None if it can't
        be had now, which takes no longer than the server's next answer: also while Valkey is
        away, and where the queue is full. Otherwise as `acquire`."""
        wanted = None if tokens is None else tokens_of(tokens)
        bound_ms = hard_ms or DEFAULT_HARD_MS
        demand = Demand(limits, tenant, priority, wanted, images, None, bound_ms, once=True)
        return TryAcquisition(Acquisition(self._issuer, self._soon(demand), True))

    def try_acquire_for(self, demand: Demand) -> TryAcquisition:
        """As `try_acquire`, for a demand that is there already: one that takes the first answer,
        and whose permit is confirmed by its user."""
        return TryAcquisition(self.acquire_for(self._soon(demand)))

    def _soon(self, demand: Demand) -> Demand:
        if demand.deadline_ms is not None:
            return demand
        within_ms = max(1, round(2000 * self._session.lease.deadline_s()))
        return replace(demand, deadline_ms=within_ms)

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
        return len(self._queue.held)

    def _is_idle(self) -> bool:
        return not self._queue.held and not self._queue.waiting

    @property
    def waiters(self) -> int:
        """How many calls of this process wait for a permit."""
        return len(self._queue.waiting)

    def local_state(self) -> LocalState:
        """This process's part, without I/O. The cost grows with the limits that are in use here;
        `state`, `permits_held` and `waiters` cost nothing."""
        return LocalState(
            state=self._session.state,
            held=self._queue.held_of.copy(),
            waiting=self._queue.waiting_of.copy(),
            silent_ms=self._session.lease.silent_ms(),
            sessions=self._session.sessions,
            revision=self.policy.revision,
            permits=len(self._queue.held),
            waiters=len(self._queue.waiting),
        )

    @property
    def last_error(self) -> str:
        """Why Valkey was last found to be away."""
        return self._session.last_error or "no answer yet"

    def local_permits(self, most: int) -> list[LocalPermit]:
        """The permits of this process, the oldest first, without I/O."""
        at = self._session.lease.now_ms()
        oldest = islice(self._queue.held.values(), most)  # in the order of their grants
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

    def local_queues(self, most: int) -> list[LocalQueueView]:
        """The waiters of this process by flow, the longest queues first, without I/O."""
        at = self._session.lease.now_ms()
        return [
            LocalQueueView(
                flow.band,
                flow.tenant,
                flow.limits,
                len(flow.waiting),
                round(at - next(iter(flow.waiting.values())).asked_ms),
            )
            for flow in self._queue.longest_queues(most)
        ]

    async def joined(self) -> None:
        """Return once the pool has answered for the first time; while Valkey is away, wait."""
        await self._exchanges.joined.wait()

    async def in_force(self) -> None:
        """Return once Valkey has the policy that was set last, or a newer one; while Valkey is
        unavailable, wait. Raises ConfigError where that has ended the session."""
        await self._exchanges.joined.wait()
        if self._session.fatal is not None:
            raise copy(self._session.fatal)

    async def known_everywhere(self) -> None:
        """Return once every process of the pool knows the policy that was set last, or a newer one,
        so that a call which is made afterwards is bound by it. One that is paused or cut off is
        waited for until its lease has ended; one of a version that does not report what it knows
        is not. Raises as `in_force`, and LimiterUnavailable."""
        await self.in_force()
        wait_s = _KNOWN_FIRST_S
        while True:
            known = await self._known_revisions()
            if not any(0 < revision < self.policy.revision for revision in known):
                return
            await self._clock.sleep(wait_s)
            wait_s = min(2 * wait_s, _KNOWN_EVERY_S)

    async def _known_revisions(self) -> list[int]:
        """The revision of the policy that each living process knows."""
        request, known = {"permits": False, "of": "sessions"}, []
        while True:
            reply = InspectReply.unpack(await self._run("inspect", request))
            known += [revision for _, _, left_ms, *_, revision in reply.sessions if left_ms > 0]
            if reply.place is None:
                return known
            request = {**request, "place": reply.place}

    # -- the pool

    async def _run(
        self, name: ScriptName, request: dict[str, Any] | bytes, tries: int = 2
    ) -> bytes:
        """Twice, since the connection may have been closed while it was not used: all that is
        asked here may be asked again, also where the first reply alone was lost."""
        self._issuer.check_open()
        keys = (self._keys.meta, self._keys.layout)
        deadline_s = self._session.lease.deadline_s()
        script = load(name, clock=self._clock.server_time)
        packed = request if isinstance(request, bytes) else pack(request)
        with _unavailable():
            for _ in range(tries - 1):
                with suppress(LinkDown):
                    return await self._link.run(script, keys, packed, deadline_s)
            return await self._link.run(script, keys, packed, deadline_s)

    async def _act(self, request: dict[str, Any]) -> int:
        """Carries the run that we know of: on another server, whose past may be lost, nobody is let
        in by this."""
        server = self._link.server
        request = {**request, "run": server.run if server else "", "once": token_hex(8)}
        request["keep_ms"] = 2 * self._session.lease.lease_ms + KEEP_ONCE_MS
        return int(msgpack.unpackb(await self._run("admin", request))[0])

    async def snapshot(
        self,
        *,
        permits: bool = False,
        limits: Sequence[str] | None = None,
        since_ms: Mapping[str, int] | None = None,
    ) -> Snapshot:
        """The pool as Valkey sees it; with each permit in use if asked for. With `limits` nothing
        but what is used of these, which takes no work at the others. A large pool is read in parts,
        each of its own moment. since_ms: how long ago the time of `LimitView.lately` began, by
        limit; the part of the window that this moment lies in is counted whole."""
        run, state = self._inspect, self._session.state
        return await read_pool(run, state, permits=permits, limits=limits, since_ms=since_ms)

    async def _inspect(self, request: bytes) -> bytes:
        return await self._run("inspect", request)

    async def permits(self) -> tuple[PermitView, ...]:
        """Every permit in use, by process."""
        return (await self.snapshot(permits=True)).permits

    async def tell(self, note: bytes, keep_ms: int) -> None:
        """Leave a note for the other processes of the pool, in the place of the last one; it is
        forgotten after `keep_ms`."""
        request = {"note": note, "keep_ms": keep_ms, "most": 0, "claim": ""}
        # Once: it is sent again soon, and what waits behind it is more urgent.
        await self._run("notes", request | {"sid": self._session.sid}, tries=1)

    async def told(self, most: int) -> dict[str, bytes]:
        """The notes of the processes of the pool, by session: of `most` of them at most."""
        request = {"sid": "", "note": b"", "keep_ms": 0, "most": most, "claim": ""}
        rows = msgpack.unpackb(await self._run("notes", request), raw=True)
        return {sid.decode(): note for sid, note in rows}

    async def claim(self, name: str, keep_ms: int) -> bool:
        """Claim a name among the processes of the pool: True for the first one within `keep_ms`."""
        request = {"sid": self._session.sid, "note": b"", "most": 0}
        # Once: a repeat after a lost reply would find its own claim.
        packed = await self._run("notes", request | {"claim": name, "keep_ms": keep_ms}, tries=1)
        return bool(msgpack.unpackb(packed)[0])

    async def place(self, session: str, ticket: int) -> Place | None:
        """How far from its turn a ticket of a session is; None if it does not wait."""
        request = {"sid": session, "ticket": str(ticket), "limit": "", "band": 0, "tenant": ""}
        return read_place(msgpack.unpackb(await self._run("position", request)))

    async def place_of(self, tenant: str, limits: Sequence[str], waited_ms: float) -> Place | None:
        """The place of a call of this process that has waited for these limits for `waited_ms` at
        most: that of the first such call. None where none waits."""
        asked_ms = self._session.lease.now_ms() - waited_ms
        waiter = self._queue.first_since(tenant, tuple(limits), asked_ms)
        return None if waiter is None else await self.place(self.session, waiter.ticket)

    async def line(self, limit: str, band: int, tenant: str) -> WaitingLine:
        """The waiters of a tenant and band at a limit, as a call that does not wait there yet finds
        them. `band` counts from 1, the highest."""
        request = {"sid": "", "ticket": "", "limit": limit, "band": band, "tenant": tenant}
        raw = await self._run("position", request)
        return read_line(msgpack.unpackb(raw)[7])

    async def why(self, session: str, ticket: int) -> Why | None:
        """Why a ticket waits: which limit holds it up, and who has it; None if it does not wait.

        `session` is a session or the `instance_id` of its process.
        """
        snapshot = await self.snapshot(permits=True)
        sids = [p.sid for p in snapshot.processes if session in (p.sid, p.name)]
        for sid in sids:
            place = await self.place(sid, ticket)
            if place is not None:
                limit = snapshot.limits.get(place.held_up_by or "")
                holders = tuple(p for p in snapshot.permits if place.held_up_by in p.limits)
                return Why(place, limit, holders)
        return None

    async def penalise(
        self,
        limit: str,
        *,
        for_ms: float = FOR_EVER_MS,
        reason: str = "",
        by: str = "",
        ramp_ms: int = RAMP_MS,
    ) -> bool:
        """Admit no call under `limit` for a time, in all processes.

        Afterwards calls come back over `ramp_ms`, all together with 0. A pause that would end later
        stays: False then. Raises DemandImpossible for a limit that the policy does not name, and
        LimiterUnavailable.
        """
        if self.policy.binding(limit) is None:
            raise DemandImpossible(unknown_limit(limit, self.policy, self.pool), limit=limit)
        said = f"{by}: {reason}" if reason else by
        ramp_ms = max(1, whole_ms("ramp_ms", ramp_ms))  # a pause without a ramp is a gate
        request = {"verb": "pause", "ramp_ms": ramp_ms}
        return await self._pause(limit, whole_ms("for_ms", for_ms), ramp_ms, said, request)

    async def _pause(
        self, limit: str, for_ms: int, ramp_ms: int, said: str, request: dict[str, Any]
    ) -> bool:
        session = self._session
        session.stop_handing_on()
        request |= {"limit": limit, "for_ms": max(1, for_ms), "said": said}
        done = bool(await self._act(request))
        if done:
            session.remembered.pause(limit, session.lease.now_ms() + for_ms, ramp_ms, said)
        session.refresh()
        return done

    async def close_gate(
        self, limit: str, *, for_ms: int, most_ms: int, tried: bool, reason: str = "", by: str = ""
    ) -> bool:
        """Admit nobody under `limit`, in all processes, until `open_gate`, but one call at a time
        that tries it: after `for_ms`, and after each that failed (`tried`) twice as long, up to
        `most_ms`. Only a try makes it last longer; False where it stays as it was."""
        said = f"{by}: {reason}" if reason else by
        request = {"verb": "close", "most_ms": max(1, most_ms), "tried": tried}
        return await self._pause(limit, for_ms, 0, said, request)

    async def open_gate(self, limit: str, *, ramp_ms: int = RAMP_MS) -> bool:
        """End what `close_gate` began; calls come back over `ramp_ms`. False if it was open."""
        ramp_ms = max(1, ramp_ms)
        request = {"verb": "open", "limit": limit, "ramp_ms": ramp_ms}
        done = bool(await self._act(request))
        self._session.remembered.opened(limit, self._session.lease.now_ms(), ramp_ms)
        self._session.refresh()
        return done

    @property
    def has_pauses(self) -> bool:
        """Whether anything is paused, or comes back from a pause."""
        return bool(self._session.remembered.pauses)

    def paused_of(self, limits: Sequence[str]) -> tuple[str, ...]:
        """Those of these limits that are paused or come back from a pause, as this process last
        heard. Without I/O."""
        remembered = self._session.remembered
        return (
            remembered.paused_of(limits, self._session.lease.now_ms()) if remembered.pauses else ()
        )

    def gate(self, limit: str) -> tuple[int, str] | None:
        """None where a gate is open, as this process last heard; else for how many ms still
        nobody may try, and what was said when it was closed. Without I/O."""
        remembered = self._session.remembered
        return remembered.gate(limit, self._session.lease.now_ms()) if remembered.pauses else None

    def pauses(self) -> Mapping[str, int]:
        """All limits that are paused, as this process last heard, with the ms that are left."""
        at = self._session.lease.now_ms()
        remembered = self._session.remembered
        return {name: max(0, ms) for name, ms, _, _ in remembered.paused(at)}

    def paused_ms(self, limits: Sequence[str]) -> int:
        """For how long still no call is admitted under one of these limits, as this process last
        heard, some seconds ago at most; 0 where none is paused. Without I/O."""
        return self._session.remembered.paused_ms(limits, self._session.lease.now_ms())

    def tell_of_pauses(self, told: Callable[[], None]) -> None:
        """Call `told` whenever this process hears of pauses, or hears again that they go on, until
        `tell_no_more`. It must neither block nor raise."""
        self._session.remembered.watchers.add(told)

    def tell_no_more(self, told: Callable[[], None]) -> None:
        self._session.remembered.watchers.discard(told)

    def tell_all(self) -> None:
        """Call what `tell_of_pauses` was given: the user of the limiter holds calls up itself."""
        for told in tuple(self._session.remembered.watchers):
            told()

    async def resume(self, limit: str, *, by: str = "") -> bool:
        """End a pause now, without a ramp. False if there was none."""
        request = {"verb": "resume", "limit": limit, "said": by}
        done = bool(await self._act(request))
        self._session.remembered.pauses.pop(limit, None)
        self._session.refresh()
        return done

    async def charge(
        self,
        limit: str,
        amount: int,
        *,
        evenly: bool = False,
        bound: int | None = None,
        recorded: bool = False,
    ) -> bool:
        """Count `amount` of a rate or day quota as spent now, without a call: what others have used
        that share the limit outside of the pool. It may exceed the bound. evenly: as if spent
        evenly over the rate's last window, so that it ceases to count evenly, and not at one
        moment. bound: what is charged is the difference from this bound to what an account has
        left. Nothing is charged once another one is in force, and when a lower one is put in force
        as much of the charge ends as it is lower. recorded: the amount is all that is on record of
        a day quota's day; what is counted already is a part of it. False if nothing is charged, or
        there is no such limit, or while Valkey may have lost data."""
        how = {"evenly": evenly, "bound": bound, "recorded": recorded}
        request = {"verb": "charge", "limit": limit, "amount": amount, **how}
        return bool(await self._act(request))

    async def hold(self, name: str, limits: Mapping[str, int], for_ms: int) -> None:
        """Count a call that outlives its process under these limits, with what it takes of each,
        even above them, until `revoke(name)`, for `for_ms` at most. A repeat only extends that
        time. `name` must be no session's. Raises LimiterUnavailable, also while Valkey may have
        lost data."""
        lane = sorted(limits)
        request = {"verb": "hold", "sid": name, "lane": " ".join(lane), "for_ms": for_ms}
        if not await self._act({**request, "amounts": [max(1, limits[one]) for one in lane]}):
            raise LimiterUnavailable("Valkey has lost data", limit="", retry_after_ms=1000)
        self._session.refresh()  # it is remembered here, in case Valkey loses it

    async def revoke(self, session: str) -> int:
        """Take back all that a process holds whose death is certain, named by its session or its
        `instance_id`. If it lives it finds its session gone, and cancels its calls. Returns how
        many sessions were ended."""
        return await self._act({"verb": "revoke", "sid": session})

    async def history(self) -> list[Change]:
        """The last policies, the newest first."""
        self._issuer.check_open()
        command = ("LRANGE", f"{self._keys.prefix}history", "0", "-1")
        with _unavailable():
            rows = await self._link.command(command, self._session.lease.deadline_s())
        return [read_change(row) for row in rows]

    async def ping(self, timeout_ms: int) -> None:
        """Raises LimiterUnavailable unless Valkey answers within `timeout_ms`."""
        self._issuer.check_open()
        with _unavailable():
            await self._link.ping(timeout_ms / 1000)

    async def set_policy(self, policy: PoolPolicy, *, by: str = "") -> None:
        """Put a policy with a higher revision in force for the whole pool, now or as soon as
        Valkey answers, which `in_force` waits for. Nothing is revoked: a limit that was lowered
        drains."""
        if not isinstance(policy, PoolPolicy):
            raise TypeError(
                "set_policy takes a PoolPolicy of a higher revision, such as dataclasses.replace("
                "limiter.policy, limits={...}, revision=limiter.policy.revision + 1)"
            )
        if policy.revision <= self._session.policy.revision:
            raise TidegateError(f"revision {self._session.policy.revision} is in force already")
        if self._session.fatal is None:
            self._exchanges.joined.clear()
        self._session.set_policy(policy, by)

    # -- the end

    def turn_away(self) -> None:
        """Refuse with ShuttingDown what waits, and what asks from now on; bodies run on."""
        self._issuer.turn_away()

    async def aclose(self, grace_ms: int = 0) -> None:
        """End the session, so that what it held is free. Waiters get ShuttingDown; bodies may end
        within `grace_ms`, then they are cancelled with LeaseLost and given one second more."""
        if self._issuer.closing:
            return
        self._issuer.closing = True
        self._issuer.turn_away()
        try:
            if not await self._wait_idle(grace_ms / 1000):
                self._queue.fence()
                await self._wait_idle(CLOSE_BODIES_S)
            await self._say_goodbye()
        finally:
            await self._stop()

    async def _wait_idle(self, timeout_s: float) -> bool:
        """True once nothing is held."""
        idle = self._issuer.idle
        idle.clear()
        self._issuer.check_idle()
        if idle.is_set():
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await idle.wait()
        except TimeoutError:
            return False
        return True

    async def _say_goodbye(self) -> None:
        if self._exchanging is None:
            return
        # Perhaps it is away only because we stood still and missed its last answer.
        calls = 1 if self._session.state == "away" else 2
        self._session.leave()
        timeout_s = max(calls * self._session.lease.deadline_s(), GOODBYE_S)
        await asyncio.wait({self._exchanging}, timeout=timeout_s)

    async def _stop(self) -> None:
        self._issuer.closing = True
        self._exchanges.stop_timers()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        tasks = [*self._tasks, self._exchanging] if self._exchanging is not None else self._tasks
        await _end(tasks)
        self._issuer.closed = True
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
                logger.error("limiter: a task failed", exc_info=error)
