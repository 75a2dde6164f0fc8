"""Carries what the session has to say to Valkey and back: the only caller of `sync` and `tend`.

While one call is under way the next batch collects; it leaves when the first returns. What nobody
waits for, such as the news that a permit was passed on inside this process, waits some milliseconds
for company. Invariant: one call at a time.
"""

from __future__ import annotations

import asyncio
import logging

from tidegate.errors import ConfigError
from tidegate.limiter.clock import Clock, Timer
from tidegate.limiter.keys import Keyspace
from tidegate.limiter.lease import Lease
from tidegate.limiter.ledger import Ledger
from tidegate.limiter.link import Link, LinkDown
from tidegate.limiter.observer import Observer
from tidegate.limiter.outbox import SPARE_MS
from tidegate.limiter.precedence import WRITTEN_BY, WrittenPolicy
from tidegate.limiter.scripts import load
from tidegate.limiter.session import Session
from tidegate.limiter.snapshot import read_change
from tidegate.limiter.wire import SyncReply

logger = logging.getLogger("tidegate.limiter")

LINGER_S = 0.03
LINGER_IDLE_S = SPARE_MS / 1000


class Courier:
    """See the module. `joined` is set once the pool has answered, with the written policy in force
    unless what is in force is to be kept; or when it never will."""

    def __init__(
        self,
        link: Link,
        keys: Keyspace,
        written: WrittenPolicy,
        ledger: Ledger,
        observer: Observer,
        name: str,
        clock: Clock,
    ) -> None:
        self.joined = asyncio.Event()
        self._wake = asyncio.Event()
        self._link = link
        self._keys = (keys.meta, keys.layout)
        self._history = f"{keys.prefix}history"
        # Until this process has joined for the first time with it.
        self._written = None if written.on_conflict == "keep" else written
        self._sync = load("sync", clock=clock.server_time)
        self._tend = load("tend", clock=clock.server_time)
        self._clock = clock
        self._ledger = ledger
        self._observer = observer
        self._timers: dict[str, Timer] = {}
        self._linger: Timer | None = None
        self.session = Session(
            written.policy,
            ledger,
            observer,
            Lease(written.policy.lease_ms, clock.now_ms),
            name=name,
            wake=self._kick,
            alarm=self._set_alarm,
            settled=self._settled,
        )
        if self._written is not None:
            self.session.policy_by = WRITTEN_BY

    def _settled(self) -> None:
        session = self.session
        if self._written is None or session.fatal or self._written.is_in(session.policy):
            self._written = None
            self.joined.set()
        else:
            # Another process was faster: decide against what it brought, and join again.
            session.set_policy(session.policy, session.policy_by)

    def _kick(self) -> None:
        if self._wake.is_set():
            return
        if self.session.something_urgent():
            self._wake.set()
        elif self._linger is None:
            delay_s = LINGER_IDLE_S if self._ledger.idle else LINGER_S
            self._linger = self._clock.call_later(delay_s, self._go)

    def _go(self) -> None:
        self._linger = None
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled, the session has left, or a fault that no retry mends."""
        session, retry_s = self.session, 0.0
        while session.fatal is None:
            await self._wake.wait()
            self._wake.clear()
            try:
                left = await self._exchange()
                retry_s = 0.0
            except LinkDown as error:
                session.failed(str(error))
                retry_s = min(max(retry_s * 2, 0.01), session.lease.lease_ms / 6000)
                await self._clock.sleep(retry_s)
                session.refresh()
                continue
            except ConfigError as error:
                session.die(error)
                continue
            except Exception as fault:
                logger.exception("limiter: a fault of its own")
                session.failed(f"{type(fault).__name__}: {fault}")
                retry_s = session.lease.lease_ms / 6000
                await self._clock.sleep(retry_s)
                session.refresh()
                continue
            if left:
                return
        for waiter in list(self._ledger.waiting.values()):
            self._ledger.refuse(waiter, session.fatal, session.lease.now_ms())

    async def _exchange(self) -> bool:
        """One call, if there is something to say; true if it ended the session."""
        session = self.session
        if not session.something_to_say():
            return False
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        deadline_s = session.lease.deadline_s()
        server = self._link.server or await self._link.connect(deadline_s)
        if self._written is not None:
            rows = await self._link.command(("LRANGE", self._history, "0", "-1"), deadline_s)
            session.policy = self._written.among([read_change(row) for row in rows])
        batch, request = session.prepare(server.run, server.uptime_ms)
        script = self._sync if session.is_ordinary(request) else self._tend
        sent_ms = session.lease.now_ms()
        try:
            raw = await self._link.run(script, self._keys, request.pack(), deadline_s)
        except BaseException:
            session.unanswered(batch)
            raise
        self._observer.synced(session.lease.now_ms() - sent_ms, len(batch))
        left = session.answered(batch, request, SyncReply.unpack(raw), sent_ms)
        if not left and len(self._ledger.outbox):
            self._kick()  # what was kept back has its time
        return left

    def _set_alarm(self, name: str, in_ms: float) -> None:
        """Come back when a lease, a hold, a rate or the quiet time after a loss runs out."""
        old = self._timers.get(name)
        if old is not None:
            old.cancel()
        delay_s = (in_ms + 1) / 1000
        self._timers[name] = self._clock.call_later(delay_s, self.session.refresh)

    def stop_timers(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._linger is not None:
            self._linger.cancel()
