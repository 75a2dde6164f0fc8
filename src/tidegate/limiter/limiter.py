"""Limiter: permits of a pool that all processes share through Valkey.

It owns the tasks, the thread and the three connections of one process in one pool. Its methods
raise LimiterUnavailable if Valkey does not answer within a third of the lease.

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
from typing import Any, NoReturn, ParamSpec, Required, Self, TypedDict, TypeVar, Unpack, get_args

import msgpack

from tidegate.errors import ConfigError, DemandImpossible, LimiterUnavailable, TidegateError
from tidegate.limiter.connection import (
    STALLED_S,
    ExchangeLoop,
    Heartbeat,
    Link,
    LinkDown,
    Listener,
    call_on_loop,
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
    check_name,
    is_taken,
    read_change,
    tokens_of,
    unknown_limit,
    whole,
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
# How long the server remembers an operator's request: longer than a repeat may take.
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

    policy: or a mapping of limits. instance_id: a name of the process for people; every start is
        a new session, which inherits nothing from an earlier one. on_conflict: what happens if
        the pool has another policy in force. clock: for tests."""

    pool: str
    policy: Required[PoolPolicy | Mapping[str, int | Limit]]
    instance_id: str | None
    observer: Observer | None
    on_conflict: OnConflict
    clock: Clock | None


def limited(
    limiter: Limiter, *limits: str, **options: Unpack[AcquireOptions]
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """Decorate a coroutine function: each call waits for a permit and runs while it holds one.

    Takes the options of `Limiter.acquire`, whose errors the call raises. If the permit is lost, the
    function is cancelled and the call raises LeaseLost. Raises TypeError for anything but a
    coroutine function: the result of a plain function or a generator would outlive the permit."""

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
    """Raise TypeError for a decorator without limits."""
    if not limits or callable(limits[0]):
        raise TypeError('name the limits: @limiter.limited("openai", timeout=30)')


logger = logging.getLogger("tidegate.limiter")


def deadline_of(timeout: float | timedelta | None, deadline_ms: int | None) -> int | None:
    """Return a deadline in ms, from seconds, a `timedelta` or ms; None for `inf`."""
    if timeout is None:
        is_usual = deadline_ms is None or type(deadline_ms) is int
        return deadline_ms if is_usual else whole_ms("deadline_ms", deadline_ms or 0)
    if deadline_ms is not None:
        raise TypeError("give timeout (seconds) or deadline_ms, not both")
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if not isinstance(seconds, int | float):
        raise TypeError(f"timeout is a number of seconds or a timedelta, not {timeout!r}")
    if seconds != seconds:
        raise ValueError(f"timeout is a number of seconds, not {timeout!r}")
    return None if seconds * 1000 > FOR_EVER_MS else ceil(max(seconds, 0.0) * 1000)


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except LinkDown as error:
        what, _, why = str(error).partition(": ")
        if not what.startswith("Valkey"):
            what, why = "Valkey is unavailable", str(error)
        raise LimiterUnavailable(what, limit="", retry_after_ms=1000, reason=why or None) from error


def guarded(observer: Observer) -> Observer:
    """Return an observer whose errors are logged, so that they cost no permit and no wait."""
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
        except Exception:  # the user's code must not affect permits
            logger.exception("limiter: an observer failed")

    return report


MAX_WAITERS = 100_000
# With `reap_closed_ms`: the shortest interval at which a process looks for closed connections.
MIN_LOOK_MS = 25
# How long a closing limiter waits for bodies that it has cancelled.
CLOSE_BODIES_S = 1.0
# How long it tries at least to end the session, so that no waiter waits for its lease.
GOODBYE_S = 1.0
# How often the pool is inspected while a new policy reaches its processes.
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
        check_name("pool", pool)
        if on_conflict not in get_args(OnConflict):
            raise ConfigError("on_conflict", str(on_conflict), "one of raise, replace, keep")
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
        self._link.on_unanswered = self._session.unanswered_command
        self._heartbeat: Heartbeat | None = None
        self._listener: Listener | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._exchanging: asyncio.Task[None] | None = None
        self._issuer = PermitIssuer(
            self._queue, self._session, max_waiters, self._clock, self._exchanges.wake, pool
        )

    @classmethod
    def from_url(cls, url: str, **options: Unpack[LimiterOptions]) -> Self:
        """Return a limiter of `pool` at `url` (`redis://`, `rediss://` or `unix://`), or in the
        memory of this process alone, for unit tests (`memory://`)."""
        return cls(url, **options)

    def __repr__(self) -> str:
        return f"<Limiter {self.pool} {self._session.state} {self._queue!r}>"

    def __reduce__(self) -> NoReturn:  # a copy would share the session, and so each permit
        raise TypeError("a Limiter can't be copied or pickled: make one in each process")

    @property
    def session(self) -> str:
        """The name of this process's session in the pool."""
        return self._session.sid

    @property
    def epoch(self) -> int:
        """The pool's epoch as known here, 0 before the pool has answered: a new one begins each
        time Valkey has lost its data."""
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
        """Join the pool. Starts in the state `away` if Valkey does not answer.

        Raises PolicyConflict; ConfigError for a server that may evict our keys, or a pool in use by
        another layout; RuntimeError if the limiter was started or closed before."""
        if self._issuer.loop is not None or self._issuer.closing:
            raise RuntimeError("a Limiter is opened once: make another one")
        loop = self._issuer.loop = asyncio.get_running_loop()
        exchanges, session = self._exchanges, self._session
        if os.getpid() != self._made_in_pid:
            session.sid = token_hex(8)  # forks of one process would share theirs
        self._heartbeat = Heartbeat(
            self._url,
            session.sid,
            self._keys,
            session.lease,
            self._clock,
            on_changed=lambda: call_on_loop(loop, session.refresh),
            on_paused=lambda: call_on_loop(loop, session.paused),
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
        """Signal the heartbeat that the loop runs, compare with Valkey, and watch the lease."""
        lease, compared_ms = self._session.lease, self._clock.now_ms()
        while True:
            every_ms = lease.lease_ms / 3
            if self.policy.reap_closed_ms:
                every_ms = min(every_ms, max(MIN_LOOK_MS, self.policy.reap_closed_ms / 4))
            # If idle there is nothing to fence or admit, so no lapse to detect between comparisons.
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
        share the call counts in; `priority` the name of a band; `tokens` and `images` an estimate
        for limits that count them. `hard_ms` is the longest that the call can last: with
        `on_expiry = "hold"` a dead process's permit counts for that long (10 minutes by default).

        Raises on entering: DeadlineExceeded, LimiterUnavailable (Valkey unavailable at the
        deadline), DemandImpossible (an unknown limit, or one of 0), QueueFull, ShuttingDown;
        ConfigError for an unknown priority or an invalid tenant name; ValueError for a limit of
        tokens without `tokens`. Cancelling the wait removes the ticket; a permit granted at that
        moment is returned.

        Raises on leaving: LeaseLost, if the session was lost while the body ran, which is then
        cancelled.
        """
        counts = None if tokens is None else tokens_of(tokens)
        hard_ms = DEFAULT_HARD_MS if hard_ms is None else hard_ms
        within_ms = deadline_of(timeout, deadline_ms)
        images = images if type(images) is int else whole("images", images)
        demand = Demand(limits, tenant, priority, counts, images, within_ms, hard_ms)
        if within_ms is not None and within_ms <= 0:
            demand = self._soon(replace(demand, deadline_ms=None, once=True))
        return Acquisition(self._issuer, demand, True)

    def acquire_for(self, demand: Demand) -> Acquisition:
        """Return an acquisition for an existing demand; its user confirms the permit."""
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
        """`async with limiter.try_acquire("kind:x") as permit:` where `permit` is None if none is
        available now, also while Valkey is unavailable and if the queue is full. It waits only for
        the server's next answer. Otherwise as `acquire`."""
        counts = None if tokens is None else tokens_of(tokens)
        bound_ms = DEFAULT_HARD_MS if hard_ms is None else hard_ms
        images = images if type(images) is int else whole("images", images)
        demand = Demand(limits, tenant, priority, counts, images, None, bound_ms, once=True)
        return TryAcquisition(Acquisition(self._issuer, self._soon(demand), True))

    def try_acquire_for(self, demand: Demand) -> TryAcquisition:
        """Return an attempt for an existing demand, which must take the first answer; its user
        confirms the permit."""
        return TryAcquisition(self.acquire_for(self._soon(demand)))

    def _soon(self, demand: Demand) -> Demand:
        if demand.deadline_ms is not None:
            return demand
        within_ms = max(1, round(2000 * self._session.lease.deadline_s()))
        return replace(demand, deadline_ms=within_ms)

    def limited(
        self, *limits: str, **options: Unpack[AcquireOptions]
    ) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]:
        """Return a decorator: each call of the coroutine function runs under a permit. Options
        as of `acquire`."""
        return limited(self, *limits, **options)

    # -- state

    @property
    def state(self) -> State:
        """Whether Valkey answers this process: `up`, `away`, or `recovering` after a loss."""
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
        """Return this process's state, without I/O. The cost grows with the limits in use here;
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
        """Why Valkey was last considered unavailable."""
        return self._session.last_error or "no answer yet"

    def local_permits(self, most: int) -> list[LocalPermit]:
        """Return the permits of this process, the oldest first, without I/O."""
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
        """Return the waiters of this process by flow, the longest queues first, without I/O."""
        at = self._session.lease.now_ms()
        return [
            LocalQueueView(
                flow.band,
                flow.tenant,
                flow.limits,
                len(flow.waiting),
                round(at - next(iter(flow.waiting.values())).requested_ms),
            )
            for flow in self._queue.longest_queues(most)
        ]

    async def joined(self) -> None:
        """Return once the pool has answered for the first time; wait while Valkey is
        unavailable."""
        await self._exchanges.joined.wait()

    async def in_force(self) -> None:
        """Return once Valkey has the policy that was set last, or a newer one; wait while Valkey is
        unavailable. Raises ConfigError if that has ended the session."""
        await self._exchanges.joined.wait()
        if self._session.fatal is not None:
            raise copy(self._session.fatal)

    async def known_everywhere(self) -> None:
        """Return once every process of the pool has the policy that was set last, or a newer
        one, so that it applies to all later calls. A paused or disconnected process is waited
        for until its lease ends; one of a version that does not report its revision is not
        waited for. Raises as `in_force`, and LimiterUnavailable."""
        await self.in_force()
        wait_s = _KNOWN_FIRST_S
        while True:
            known = await self._known_revisions()
            if not any(0 < revision < self.policy.revision for revision in known):
                return
            await self._clock.sleep(wait_s)
            wait_s = min(2 * wait_s, _KNOWN_EVERY_S)

    async def _known_revisions(self) -> list[int]:
        """Return the policy revision that each living process has."""
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
        """Run a script, twice if the first try fails: an idle connection may have been closed. All
        requests here may be repeated, even if only the first reply was lost."""
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
        """Run an operator's request. It carries the server's run as known here, so that no call is
        admitted by it on another server, whose past may be lost."""
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
        """Return the pool as Valkey has it, with each permit in use if `permits`. With `limits`,
        only the use of these, which is cheap whatever the number of others. A large pool is
        read in parts, each of its own moment. since_ms: by limit, how long ago the period of
        `LimitView.lately` began; the bucket that contains this moment is counted whole."""
        run, state = self._inspect, self._session.state
        return await read_pool(run, state, permits=permits, limits=limits, since_ms=since_ms)

    async def _inspect(self, request: bytes) -> bytes:
        return await self._run("inspect", request)

    async def permits(self) -> tuple[PermitView, ...]:
        """Return every permit in use, by process."""
        return (await self.snapshot(permits=True)).permits

    async def tell(self, note: bytes, keep_ms: int) -> None:
        """Leave a note for the other processes of the pool in place of the last one; it expires
        after `keep_ms`."""
        request = {"note": note, "keep_ms": keep_ms, "most": 0, "claim": ""}
        # One try: the note is sent again soon, and requests behind it are more urgent.
        await self._run("notes", request | {"sid": self._session.sid}, tries=1)

    async def told(self, most: int) -> dict[str, bytes]:
        """Return the notes of at most `most` processes of the pool, by session."""
        request = {"sid": "", "note": b"", "keep_ms": 0, "most": most, "claim": ""}
        rows = msgpack.unpackb(await self._run("notes", request), raw=True)
        return {sid.decode(): note for sid, note in rows}

    async def claim(self, name: str, keep_ms: int) -> bool:
        """Claim a name among the processes of the pool: True for the first one within `keep_ms`."""
        request = {"sid": self._session.sid, "note": b"", "most": 0}
        # One try: a repeat after a lost reply would find its own claim.
        packed = await self._run("notes", request | {"claim": name, "keep_ms": keep_ms}, tries=1)
        return bool(msgpack.unpackb(packed)[0])

    async def place(self, session: str, ticket: int) -> Place | None:
        """Return how far a session's ticket is from its admission; None if it does not wait."""
        request = {"sid": session, "ticket": str(ticket), "limit": "", "band": 0, "tenant": ""}
        return read_place(msgpack.unpackb(await self._run("position", request)))

    async def place_of(self, tenant: str, limits: Sequence[str], waited_ms: float) -> Place | None:
        """Return the place of this process's first call that has waited for these limits for at
        most `waited_ms`, or None."""
        requested_ms = self._session.lease.now_ms() - waited_ms
        waiter = self._queue.first_since(tenant, tuple(sorted(set(limits))), requested_ms)
        return None if waiter is None else await self.place(self.session, waiter.ticket)

    async def line(self, limit: str, band: int, tenant: str) -> WaitingLine:
        """Return the waiters of a tenant and band at a limit, as a new call would find them. `band`
        counts from 1, the highest."""
        request = {"sid": "", "ticket": "", "limit": limit, "band": band, "tenant": tenant}
        raw = await self._run("position", request)
        return read_line(msgpack.unpackb(raw)[7])

    async def why(self, session: str, ticket: int) -> Why | None:
        """Return why a ticket waits: the blocking limit and who holds it; None if it does not wait.

        `session` is a session or the `instance_id` of its process."""
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

        Afterwards calls resume over `ramp_ms`, all together with 0. Returns False if a pause that
        ends later is in force, which stays. Raises DemandImpossible for a limit that the policy
        does not name, and LimiterUnavailable."""
        if self.policy.binding(limit) is None:
            raise DemandImpossible(unknown_limit(limit, self.policy, self.pool), limit=limit)
        full_reason = f"{by}: {reason}" if reason else by
        ramp_ms = max(1, whole_ms("ramp_ms", ramp_ms))  # 0 would make it a gate
        request = {"verb": "pause", "ramp_ms": ramp_ms}
        return await self._pause(limit, whole_ms("for_ms", for_ms), ramp_ms, full_reason, request)

    async def _pause(
        self, limit: str, for_ms: int, ramp_ms: int, reason: str, request: dict[str, Any]
    ) -> bool:
        session = self._session
        session.stop_handing_on()
        request |= {"limit": limit, "for_ms": max(1, for_ms), "said": reason}
        done = bool(await self._act(request))
        if done:
            session.remembered.pause(limit, session.lease.now_ms() + for_ms, ramp_ms, reason)
        session.refresh()
        return done

    async def close_gate(
        self, limit: str, *, for_ms: int, most_ms: int, tried: bool, reason: str = "", by: str = ""
    ) -> bool:
        """Admit no call under `limit` in all processes until `open_gate`, except for one probe at a
        time: after `for_ms`, and after each failed probe (`tried`) twice as long, up to `most_ms`.
        Only a probe extends a closed gate; returns False if it stays as it was."""
        full_reason = f"{by}: {reason}" if reason else by
        request = {"verb": "close", "most_ms": max(1, most_ms), "tried": tried}
        return await self._pause(limit, for_ms, 0, full_reason, request)

    async def open_gate(self, limit: str, *, ramp_ms: int = RAMP_MS) -> bool:
        """Open a closed gate; calls resume over `ramp_ms`. Returns False if it was open."""
        ramp_ms = max(1, ramp_ms)
        request = {"verb": "open", "limit": limit, "ramp_ms": ramp_ms}
        done = bool(await self._act(request))
        self._session.remembered.opened(limit, self._session.lease.now_ms(), ramp_ms)
        self._session.refresh()
        return done

    @property
    def has_pauses(self) -> bool:
        """Whether any limit is paused or resumes from a pause."""
        return bool(self._session.remembered.pauses)

    def paused_of(self, limits: Sequence[str]) -> tuple[str, ...]:
        """Return those of these limits that are paused or resume from a pause, as last heard here.
        Does no I/O."""
        remembered = self._session.remembered
        return (
            remembered.paused_of(limits, self._session.lease.now_ms()) if remembered.pauses else ()
        )

    def gate(self, limit: str) -> tuple[int, str] | None:
        """Return None for an open gate, as last heard here; else the ms until a probe is
        allowed, and the reason given on closing. Does no I/O."""
        remembered = self._session.remembered
        return remembered.gate(limit, self._session.lease.now_ms()) if remembered.pauses else None

    def pauses(self) -> Mapping[str, int]:
        """Return all paused limits with the ms that are left, as last heard here."""
        at = self._session.lease.now_ms()
        remembered = self._session.remembered
        return {name: max(0, ms) for name, ms, _, _ in remembered.paused(at)}

    def paused_ms(self, limits: Sequence[str]) -> int:
        """Return how long no call is admitted under one of these limits, as last heard here, at
        most some seconds ago; 0 if none is paused. Does no I/O."""
        return self._session.remembered.paused_ms(limits, self._session.lease.now_ms())

    def limits_of(self, demand: Demand) -> tuple[str, ...]:
        """Return the limits that a call waits for: not the rates of which it takes nothing, such as
        one of images for a call without any. Does no I/O."""
        policy = self._session.policy
        return tuple(name for name in demand.limits if is_taken(policy.limit(name), demand))

    def watch_pauses(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever this process hears of pauses, or again that they continue, until
        `unwatch_pauses`. It must neither block nor raise."""
        self._session.remembered.watchers.add(listener)

    def unwatch_pauses(self, listener: Callable[[], None]) -> None:
        self._session.remembered.watchers.discard(listener)

    def notify_watchers(self) -> None:
        """Call all callbacks of `watch_pauses`, for a user that delays calls itself."""
        for listener in tuple(self._session.remembered.watchers):
            listener()

    async def resume(self, limit: str, *, by: str = "") -> bool:
        """End a pause now, without a ramp. Returns False if there was none."""
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
        """Count `amount` of a rate or day quota as spent now without a call: use of the limit by
        others outside of the pool. It may exceed the bound. evenly: as if spent evenly over
        the rate's last window, so that it expires evenly instead of at one moment. bound: the
        amount is the difference from this bound to what the account has left. Nothing is
        charged if another bound is in force by now; if a lower one is put in force later, as
        much of the charge ends. recorded: the amount is the recorded total of a day quota's
        day; what is counted already is part of it. Returns False if nothing is charged: no
        such limit, or Valkey may have lost data."""
        how = {"evenly": evenly, "bound": bound, "recorded": recorded}
        request = {"verb": "charge", "limit": limit, "amount": amount, **how}
        return bool(await self._act(request))

    async def hold(self, name: str, limits: Mapping[str, int], for_ms: int) -> None:
        """Count a call that outlives its process under these limits, with its amount of each, even
        beyond their bounds, until `revoke(name)`, for at most `for_ms`. A repeat only extends the
        time. `name` must not be a session's. Raises LimiterUnavailable, also while Valkey may have
        lost data."""
        lane = sorted(limits)
        request = {"verb": "hold", "sid": name, "lane": " ".join(lane), "for_ms": for_ms}
        if not await self._act({**request, "amounts": [max(1, limits[one]) for one in lane]}):
            raise LimiterUnavailable("Valkey has lost data", limit="", retry_after_ms=1000)
        self._session.refresh()  # so that it is remembered here in case Valkey loses it

    async def revoke(self, session: str) -> int:
        """Release everything held by a process that is certainly dead, named by its session or its
        `instance_id`. If it lives after all, it finds its session gone and cancels its calls.
        Returns how many sessions were ended."""
        return await self._act({"verb": "revoke", "sid": session})

    async def history(self) -> list[Change]:
        """Return the last policies, newest first."""
        self._issuer.check_open()
        command = ("LRANGE", f"{self._keys.prefix}history", "0", "-1")
        with _unavailable():
            rows = await self._link.command(command, self._session.lease.deadline_s())
        return [read_change(row) for row in rows]

    async def ping(self, timeout_ms: int) -> None:
        """Raise LimiterUnavailable unless Valkey answers within `timeout_ms`."""
        self._issuer.check_open()
        with _unavailable():
            await self._link.ping(timeout_ms / 1000)

    async def set_policy(self, policy: PoolPolicy, *, by: str = "") -> None:
        """Put a policy with a higher revision in force for the whole pool, now or once Valkey
        answers, which `in_force` waits for. No permit is revoked: under a lowered limit
        running calls drain."""
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

    # -- closing

    def turn_away(self) -> None:
        """Reject waiting and future calls with ShuttingDown; running bodies continue."""
        self._issuer.turn_away()

    async def aclose(self, grace_ms: int = 0) -> None:
        """End the session and free what it held. Waiters get ShuttingDown. Bodies may end within
        `grace_ms`; then they are cancelled with LeaseLost and get one more second."""
        grace_ms = whole_ms("grace_ms", grace_ms)
        if self._issuer.closing:
            return
        self._issuer.closing = True
        self._issuer.turn_away()
        try:
            if not await self._wait_idle(grace_ms / 1000):
                self._queue.fence()
                await self._wait_idle(CLOSE_BODIES_S)
            await self._leave_pool()
        finally:
            await self._stop()

    async def _wait_idle(self, timeout_s: float) -> bool:
        """Return True once nothing is held, False after `timeout_s`."""
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

    async def _leave_pool(self) -> None:
        if self._exchanging is None:
            return
        # It may seem unavailable only because we were suspended and missed its last answer.
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
    """Cancel until all tasks have ended: a client library may take a cancellation that coincides
    with a deadline for the deadline."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=0.5)
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("limiter: a task failed", exc_info=error)
