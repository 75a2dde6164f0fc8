"""Live changes of upstreams on record: their revisions, and the processes that apply them.

    proposed ──► every process prepares it ──► in force ──► every process has it
        └── one can't: refused, with the reason

A process that was not seen for `GONE_AFTER_MS` is not waited for: it has ended, or will read the
changes before it takes part again.

Invariants: a revision that is in force is never changed; one of two concurrent changes is refused,
or made over the other; no secret is on record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import asyncpg
import orjson

from tidegate.errors import UpstreamsChanged
from tidegate.store.database import Connections, sql
from tidegate.store.records import clean, record_action, record_of

SEEN_EVERY_MS = 2_000
GONE_AFTER_MS = 7_000
MOST_REVISIONS = 1_000
_TIMEOUT_MS = 2_000


@dataclass(frozen=True, slots=True)
class UpstreamRevision:
    """Live changes to upstreams at one revision. action: a description of the change. in_force_at:
    None while it is proposed, or if it was refused."""

    revision: int
    upstreams: Mapping[str, Any]
    action: str = ""
    set_by: str = ""
    reason: str = ""
    created_at: datetime | None = None
    in_force_at: datetime | None = None
    refused: str | None = None


NONE_YET = UpstreamRevision(0, {})


@dataclass(frozen=True, slots=True)
class UpstreamProcess:
    """A process that follows the changes. revision: the one it has in force. prepared: the one it
    has prepared. problems, proposed_problems: why it cannot set up some of their upstreams, by
    name."""

    instance_id: str
    role: str
    revision: int = 0
    prepared: int = 0
    problems: Mapping[str, str] = field(default_factory=dict)
    proposed_problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AtUpstream:
    """What lives at one upstream: resources of callers, calls in the background, open batches."""

    resources: int
    background: int
    batches: int


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest revisions; `proposed` is 0 for none."""

    in_force: int
    proposed: int


Propose = Callable[[UpstreamRevision], Mapping[str, Any] | None]


class UpstreamRevisions:
    """The tables of live changes. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def see(self, process: UpstreamProcess) -> Seen:
        """Record that a process lives, with its state; return the newest revisions."""
        row = await self._connections.row(
            "see_upstreams",
            process.instance_id,
            process.role,
            process.revision,
            process.prepared,
            _json(process.problems),
            _json(process.proposed_problems),
            timeout_ms=_TIMEOUT_MS,
        )
        assert row is not None
        in_force, proposed = row["in_force"] or 0, row["proposed"] or 0
        return Seen(in_force, proposed if proposed > in_force else 0)

    async def leave(self, instance_id: str) -> None:
        """Record that a process ends."""
        await self._connections.execute("leave_upstreams", instance_id, timeout_ms=_TIMEOUT_MS)

    async def get(self, revision: int) -> UpstreamRevision | None:
        rows = await self._connections.rows(
            "get_upstream_revision", revision, timeout_ms=_TIMEOUT_MS
        )
        return _revision(rows[0]) if rows else None

    async def newest(self) -> UpstreamRevision:
        """Return the revision in force; number 0 before any change."""
        found = await self.history(1)
        return found[0] if found else NONE_YET

    async def history(self, most: int) -> list[UpstreamRevision]:
        """Return revisions that were in force, the current one first."""
        rows = await self._connections.rows(
            "get_upstream_revisions", min(most, MOST_REVISIONS), timeout_ms=_TIMEOUT_MS
        )
        return [_revision(row) for row in rows]

    async def propose(
        self, action: str, propose: Propose, *, set_by: str, reason: str, in_force: bool
    ) -> UpstreamRevision:
        """Record what `propose` makes of the newest revision, while no other process can do so;
        return the newest itself if it makes nothing. in_force: without preparation.

        `propose` must be pure: it may be called again after a commit with a lost reply. Raises what
        it raises, and UpstreamsChanged while another change is being prepared.
        """
        found: list[UpstreamRevision] = []

        async def work(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("lock_upstreams"))
            newest = await connection.fetchrow(sql("get_upstream_revisions"), 1)
            now = NONE_YET if newest is None else _revision(newest)
            made = propose(now)
            found[:] = [now]
            if made is None:
                return
            for other in await connection.fetch(sql("proposed_upstreams")):
                if not in_force:
                    message = f"a change by {other['set_by']} is being prepared: try again"
                    raise UpstreamsChanged(message)
                await connection.execute(
                    sql("decide_upstream_revision"), other["revision"], "another change came first"
                )
            number = await connection.fetchval(
                sql("add_upstream_revision"),
                _json(made),
                clean(action),
                clean(set_by),
                clean(reason),
                in_force,
            )
            await connection.execute(sql("prune_upstream_revisions"), MOST_REVISIONS)
            row = await connection.fetchrow(sql("get_upstream_revision"), number)
            after = {"action": action, "reason": reason}
            await record_action(
                connection, "upstreams.change", action, after=after, revision=number
            )
            found[:] = [_revision(row)]

        await self._connections.run(work, timeout_ms=_TIMEOUT_MS)
        await self.notify()
        return found[0]

    async def decide(self, revision: int, refused: str | None = None) -> bool:
        """Put a proposal in force, or refuse it; False if that was decided already."""

        async def work(connection: asyncpg.Connection) -> bool:
            await connection.execute(sql("lock_upstreams"))
            row = await connection.fetchrow(sql("decide_upstream_revision"), revision, refused)
            return row is not None

        done = await self._connections.run(work, timeout_ms=_TIMEOUT_MS)
        await self.notify()
        return done

    async def notify(self) -> None:
        await self._connections.execute("notify_upstreams", timeout_ms=_TIMEOUT_MS)

    async def processes(self) -> list[UpstreamProcess]:
        """Return the live processes."""
        rows = await self._connections.rows(
            "get_upstream_processes", GONE_AFTER_MS, timeout_ms=_TIMEOUT_MS
        )
        return [
            record_of(
                UpstreamProcess,
                row,
                problems=orjson.loads(row["problems"]),
                proposed_problems=orjson.loads(row["proposed_problems"]),
            )
            for row in rows
        ]

    async def at(self, upstream: str) -> AtUpstream:
        """Return what lives at an upstream."""
        rows = await self._connections.rows("count_at_upstream", upstream, timeout_ms=_TIMEOUT_MS)
        return record_of(AtUpstream, rows[0])


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _revision(row: Any) -> UpstreamRevision:
    return record_of(UpstreamRevision, row, upstreams=orjson.loads(row["upstreams"]))
