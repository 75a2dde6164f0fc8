"""What must hold when a soak is over: the provider's own log against our record."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg

from chaos.soak.clients import Call, Clients
from chaos.soak.faults import KILLS
from chaos.soak.watch import Watch
from tests.fleet import Fleet
from tests.waiting import wait_until
from tidegate.emulator.state import LoggedCall

_MOST_GROWTH = 1.10
_SLACK = {"resident MB": 12.0, "open files": 12.0, "connections": 6.0}
_CUT_NEAR_S = 1.0
_RECORDED_WITHIN_S = 20.0
_ENDED = ("succeeded", "failed", "cancelled", "expired", "dead")


@dataclass
class Served:
    """The provider's calls by mark, read while they are still in its log."""

    fleet: Fleet
    calls: defaultdict[str, dict[int, LoggedCall]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    _settled: int = 0

    async def run(self) -> None:
        while True:
            await self.read()
            await asyncio.sleep(2)

    async def read(self) -> None:
        found = await self.fleet.control.calls(since=self._settled)
        for call in found:
            if call.kind != "classifier" and call.prompt.startswith("["):
                self.calls[call.prompt[1:].split("]", 1)[0]][call.id] = call
        open_ids = [call.id for call in found if call.outcome is None]
        newest = max((call.id for call in found), default=self._settled)
        self._settled = min(open_ids, default=newest + 1) - 1


async def settle(fleet: Fleet) -> None:
    """Wait until the provider is idle, all jobs have ended and all records are written."""

    async def quiet() -> bool:
        return (await fleet.truth()).in_flight == 0

    await wait_until(quiet, 120, "an idle provider")
    connection = await asyncpg.connect(fleet.postgres.url())
    try:

        async def ended() -> bool:
            open_jobs: int = await connection.fetchval(
                "SELECT count(*) FROM requests WHERE status <> ALL($1)", list(_ENDED)
            )
            return open_jobs == 0

        await wait_until(ended, 180, "the end of all jobs")
    finally:
        await connection.close()


async def problems(
    fleet: Fleet, clients: Clients, served: Served, watch: Watch, limits: Mapping[str, int]
) -> list[str]:
    """Every broken promise in a line of its own."""
    found = await _over(fleet, limits)
    found += await _unlike_the_bill(fleet, clients, served)
    found += _wrong_ends(clients, served)
    found += _grown(watch)
    return found


async def _over(fleet: Fleet, limits: Mapping[str, int]) -> list[str]:
    truth = await fleet.truth()
    return [
        f"{kind}: {truth[kind].max_in_flight} in flight, {limit} allowed"
        for kind, limit in limits.items()
        if truth[kind].max_in_flight > limit
    ]


def _wrong_ends(clients: Clients, served: Served) -> list[str]:
    found = []
    for call in clients.calls:
        if call.end not in ("wrong", "cut") or _was_killed(call):
            continue
        # The provider broke off, and nobody could know before the answer had begun.
        if any(one.fault for one in served.calls[call.mark].values()):
            continue
        found.append(f"{call.way} {call.mark} ended {call.end}: {call.status} {call.said}")
    return found


def _was_killed(call: Call) -> bool:
    at_s = KILLS.at_s.get(call.url)
    return at_s is not None and call.began_s - _CUT_NEAR_S <= at_s <= call.ended_s + _CUT_NEAR_S


async def _unlike_the_bill(fleet: Fleet, clients: Clients, served: Served) -> list[str]:
    """Whole answers are on record once, with the LLM tokens that the provider counted."""
    await served.read()
    found = ["not looked yet"]
    until_s = time.monotonic() + _RECORDED_WITHIN_S
    while found and time.monotonic() < until_s:
        found = await _unlike(fleet, clients, served)
    return found


async def _unlike(fleet: Fleet, clients: Clients, served: Served) -> list[str]:
    connection = await asyncpg.connect(fleet.postgres.url())
    try:
        rows = await connection.fetch(
            "SELECT request_id, status, failure, usage_state, input_tokens, "
            "output_tokens + coalesce(thoughts_tokens, 0) AS output_tokens FROM audit"
        )
    finally:
        await connection.close()
    record: defaultdict[UUID, list[asyncpg.Record]] = defaultdict(list)
    for row in rows:
        record[row["request_id"]].append(row)
    found = []
    for call in clients.calls:
        if call.end != "whole" or call.way == "leaver":
            continue
        mine = record[UUID(call.request_id)]
        finished = [one for one in served.calls[call.mark].values() if one.outcome == "finished"]
        if _was_killed(call) and (not mine or "process_died" in (mine[0]["failure"] or "")):
            continue  # what was told in a process's last moment may be lost with it
        if len(mine) != 1:
            found.append(f"{call.way} {call.mark}: {len(mine)} records")
        elif mine[0]["status"] == "succeeded" and not _is_billed(mine[0], finished):
            found.append(f"{call.way} {call.mark}: {dict(mine[0])} for {finished}")
        elif mine[0]["status"] != "succeeded" and call.way != "job":
            how = f"{mine[0]['status']} ({mine[0]['failure']})"
            found.append(f"{call.way} {call.mark}: whole, and recorded as {how}")
    return found


def _is_billed(row: asyncpg.Record, finished: list[LoggedCall]) -> bool:
    told = (row["input_tokens"], row["output_tokens"])
    return any(told == (one.input_tokens, one.output_tokens) for one in finished)


def _grown(watch: Watch) -> list[str]:
    found = []
    for name, seen in watch.seen.items():
        before, after = seen.growth()
        slack = next(value for word, value in _SLACK.items() if word in name)
        if after > before * _MOST_GROWTH + slack:
            found.append(f"{name} grew from {before:.0f} to {after:.0f}")
    return found
