"""What people and adapters see of a pool and do to it, beside asking for permits.

Each is one call of a script, or travels with the session's next one. Raises LimiterUnavailable
when Valkey does not answer within a third of the lease.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack

from tidegate.errors import LimiterUnavailable, TidegateError
from tidegate.limiter.clock import Clock
from tidegate.limiter.keys import Keyspace
from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.link import Link, LinkDown
from tidegate.limiter.scripts import ScriptName, load
from tidegate.limiter.session import Session
from tidegate.limiter.snapshot import (
    Change,
    PermitView,
    Place,
    Snapshot,
    Why,
    read_change,
    read_place,
    read_snapshot,
)
from tidegate.limiter.wire import InspectReply, pack

# A pause "until further notice" ends in a hundred years.
FOR_EVER_MS = 100 * 365 * 86_400_000
RAMP_MS = 10_000


class Operations:
    """The part of a `Limiter` that is not about its own permits."""

    _link: Link
    _keys: Keyspace
    _session: Session
    _clock: Clock

    async def _run(self, name: ScriptName, request: dict[str, Any], tries: int = 2) -> bytes:
        """Twice, since the connection may have been closed while it was not used: all that is
        asked here may be asked again."""
        keys = (self._keys.meta, self._keys.layout)
        deadline_s = self._session.lease.deadline_s()
        script = load(name, clock=self._clock.server_time)
        while True:
            try:
                return await self._link.run(script, keys, pack(request), deadline_s)
            except LinkDown as error:
                tries -= 1
                if not tries:
                    raise LimiterUnavailable(str(error), limit="", retry_after_ms=1000) from error

    async def _act(self, request: dict[str, Any]) -> int:
        """Carries the run that we know of: on another server, whose past may be lost, nobody is let
        in by this."""
        server = self._link.server
        request = {**request, "run": server.run if server else ""}
        return int(msgpack.unpackb(await self._run("act", request))[0])

    async def snapshot(self, *, permits: bool = False) -> Snapshot:
        """The pool as Valkey sees it; with each permit in use if asked for."""
        raw = await self._run("inspect", {"permits": permits})
        return read_snapshot(InspectReply.unpack(raw), self._session.state)

    async def permits(self) -> tuple[PermitView, ...]:
        """Every permit in use, by process."""
        return (await self.snapshot(permits=True)).permits

    async def tell(self, note: bytes, keep_ms: int) -> None:
        """Leave a word for the other processes of the pool, in the place of the last one; it is
        forgotten after `keep_ms`."""
        request = {"sid": self._session.sid, "note": note, "keep_ms": keep_ms, "most": 0}
        # Once: it is told again soon, and what waits behind it is more urgent.
        await self._run("notes", request, tries=1)

    async def told(self, most: int) -> dict[str, bytes]:
        """What the processes of the pool have told, by session: of `most` of them at most."""
        request = {"sid": "", "note": b"", "keep_ms": 0, "most": most}
        rows = msgpack.unpackb(await self._run("notes", request), raw=True)
        return {sid.decode(): note for sid, note in rows}

    async def place(self, session: str, ticket: int) -> Place | None:
        """How far from its turn a ticket of a session is; None if it does not wait."""
        raw = await self._run("place", {"sid": session, "ticket": str(ticket)})
        return read_place(msgpack.unpackb(raw))

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
        for_ms: int = FOR_EVER_MS,
        reason: str = "",
        by: str = "",
        ramp_ms: int = RAMP_MS,
    ) -> bool:
        """Let nobody in under `limit` for a time, over all processes at once.

        Afterwards calls come back over `ramp_ms`. A pause that would end later stays: False then.
        """
        said = f"{by}: {reason}" if reason else by
        request = {
            "verb": "pause", "limit": limit, "for_ms": max(1, for_ms), "ramp_ms": max(1, ramp_ms),
            "said": said,
        }  # fmt: skip
        self._session.stop_handing_on()
        done = bool(await self._act(request))
        if done:
            self._session.remembered.pause(
                limit, self._session.lease.now_ms() + for_ms, ramp_ms, said
            )
        self._session.refresh()
        return done

    async def close_gate(
        self, limit: str, *, for_ms: int, most_ms: int, tried: bool, reason: str = "", by: str = ""
    ) -> bool:
        """Admit nobody under `limit`, in all processes, until `open_gate`, but one call at a time
        that tries it: after `for_ms`, and after each that failed (`tried`) twice as long, up to
        `most_ms`. Only a try makes it last longer; False where it stays as it was."""
        said = f"{by}: {reason}" if reason else by
        request = {
            "verb": "close", "limit": limit, "for_ms": max(1, for_ms), "most_ms": max(1, most_ms),
            "tried": tried, "said": said,
        }  # fmt: skip
        self._session.stop_handing_on()
        done = bool(await self._act(request))
        if done:
            self._session.remembered.pause(limit, self._session.lease.now_ms() + for_ms, 0, said)
        self._session.refresh()
        return done

    async def open_gate(self, limit: str, *, ramp_ms: int = RAMP_MS) -> bool:
        """End what `close_gate` began; calls come back over `ramp_ms`. False if it was open."""
        request = {"verb": "open", "limit": limit, "ramp_ms": max(1, ramp_ms)}
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
        """For how long still nobody is let in under one of these limits, as this process last
        heard, some seconds ago at most; 0 where none is paused. Without I/O."""
        return self._session.remembered.paused_ms(limits, self._session.lease.now_ms())

    def tell_of_pauses(self, told: Callable[[], None]) -> None:
        """Call `told` whenever this process hears of pauses, or hears again that they go on, until
        `tell_no_more`. It must neither block nor raise."""
        self._session.remembered.watchers.add(told)

    def tell_no_more(self, told: Callable[[], None]) -> None:
        self._session.remembered.watchers.discard(told)

    async def resume(self, limit: str, *, by: str = "") -> bool:
        """End a pause now, without a ramp. False if there was none."""
        request = {"verb": "resume", "limit": limit, "said": by}
        done = bool(await self._act(request))
        self._session.remembered.pauses.pop(limit, None)
        self._session.refresh()
        return done

    async def revoke(self, session: str) -> int:
        """Take back all that a process holds whose death is certain, named by its session or its
        `instance_id`. If it lives it finds its session gone, and cancels its calls. Returns how
        many sessions were ended."""
        return await self._act({"verb": "revoke", "sid": session})

    async def history(self) -> list[Change]:
        """The last policies, the newest first."""
        try:
            rows = await self._link.command(
                ("LRANGE", f"{self._keys.prefix}history", "0", "-1"),
                self._session.lease.deadline_s(),
            )
        except LinkDown as error:
            raise LimiterUnavailable(str(error), limit="", retry_after_ms=1000) from error
        return [read_change(row) for row in rows]

    async def ping(self, timeout_ms: int) -> None:
        """Raises LimiterUnavailable unless Valkey answers within `timeout_ms`."""
        try:
            await self._link.ping(timeout_ms / 1000)
        except LinkDown as error:
            raise LimiterUnavailable(str(error), limit="", retry_after_ms=1000) from error

    async def set_policy(self, policy: PoolPolicy, *, by: str = "") -> None:
        """Put a policy with a higher revision in force for the whole pool, at once or as soon as
        Valkey answers. Nothing is revoked: a limit that was lowered drains."""
        if policy.revision <= self._session.policy.revision:
            raise TidegateError(f"revision {self._session.policy.revision} is in force already")
        self._session.set_policy(policy, by)
