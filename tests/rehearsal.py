"""A trace played for real, beside what `tidegate rehearse` says of it.

Real: a gateway process, Valkey, PostgreSQL, and the emulator, which takes for each call as long as
the trace says. What the provider saw is the truth for calls and their use of the limits; how long
each waited is what the answers tell.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from tests.fleet import Fleet
from tests.tenancy import keys_of
from tests.waiting import wait_until
from tidegate.emulator.state import LoggedCall
from tidegate.limiter import PoolPolicy
from tidegate.policy.format import of_plain
from tidegate.rehearse.load import Arrival, TokenPace, Usual, load_of
from tidegate.rehearse.report import Findings, waits_of
from tidegate.store.database import Connections

ADMIN_TOKEN = "of-the-operator-alone"
LIMIT = "kind:text_only"
BOUND = 6
MODEL = "gemini-2.5-flash"
# Of tenants named as in `tests.tenancy`, which makes them and their keys.
WEIGHTS = {"small": 1, "middle": 1, "large": 3}
POLICY: dict[str, Any] = {"limits": {LIMIT: BOUND}, "weights": WEIGHTS}
_MEDIAN_MS, _P95_MS = 400, 1000
_TOML = f"""
[limits]
"{LIMIT}" = {BOUND}
[weights]
small = 1
middle = 1
large = 3
"""


def described(seconds: float) -> dict[str, Any]:
    """A load that is more than there is. Two tenants want more than they can have, and give up in
    time; the third has what is due to it, and comes all at once.

    Whoever wants a little more than there is and never gives up has a queue that grows as long as
    the load lasts, and whoever is refused but seldom is refused by chance: no two plays of that are
    alike within a tenth, real or not. Of this one, 20 plays lie within a twentieth of their mean.
    """
    lasts = {"median": _MEDIAN_MS, "p95": _P95_MS}
    return {
        "lasts": f"{seconds}s",
        "arrivals": [
            {"tenant": "small", "per_second": 6.5, "duration_ms": lasts, "deadline_ms": 1500},
            {"tenant": "middle", "per_second": 4.0, "duration_ms": lasts, "deadline_ms": 3000},
            {
                "tenant": "large",
                "pattern": "bursts",
                "burst": 20,
                "every": "3s",
                "duration_ms": lasts,
            },
        ],
    }


def trace_of(seconds: float, seed: int = 1) -> list[Arrival]:
    return load_of(described(seconds)).draw(Usual({"text_only": MODEL}, TokenPace()), seed)


def policy() -> PoolPolicy:
    return of_plain(POLICY)


def settings_in(folder: Path) -> dict[str, str]:
    """Settings of a fleet with this policy."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "policy.toml"
    path.write_text(_TOML)
    return {
        "TIDEGATE_POLICY": str(path),
        "AUTH": "on",
        "ADMIN_TOKEN": ADMIN_TOKEN,
        "RETENTION_DAYS": "1",
    }


_SYNC = r"^tidegate_limiter_sync_seconds_(sum|count)\{.*\} (\S+)$"
_OPEN = "SELECT request_id, upstream_ms FROM audit WHERE request_id = ANY($1::uuid[])"


@dataclass
class Seen:
    """Of the real run: waits in ms and refusals by tenant, and the part of the limit in use; when
    each call was really sent, in ms, and for how long it was open by the record; what a question to
    Valkey took, by the gateways' own metrics."""

    waits_ms: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    used: float = 0.0
    sent_ms: dict[int, float] = field(default_factory=dict)
    took_ms: dict[int, float] = field(default_factory=dict)
    ids: dict[UUID, int] = field(default_factory=dict)
    round_trip_ms: float = 0.0

    def all_waits_ms(self) -> list[float]:
        return [wait_ms for waits_ms in self.waits_ms.values() for wait_ms in waits_ms]


async def play(fleet: Fleet, arrivals: Sequence[Arrival]) -> Seen:
    """Send each call of the trace at its time, and wait for the last answer."""
    keys = await keys_of(fleet)
    await fleet.control.set_behaviour(first_byte_ms=0, between_ms=0, chunks=1)
    for number, arrival in enumerate(arrivals):
        await fleet.control.set_fault(
            "slow_first_token",
            match=_mark(number),
            delay_ms=round(arrival.duration_ms),
            count=1,
        )
    seen = Seen({tenant: [] for tenant in WEIGHTS}, dict.fromkeys(WEIGHTS, 0))
    began = asyncio.get_running_loop().time()
    began_ns = time.time_ns()
    async with asyncio.TaskGroup() as group:
        for number, arrival in enumerate(arrivals):
            group.create_task(_send(fleet, keys, began, number, arrival, seen))

    async def at_rest() -> bool:
        return (await fleet.truth()).in_flight == 0

    await wait_until(at_rest, 20, "the provider at rest")
    span_ns = int(arrivals[-1].time_ms * 1e6)
    calls = await fleet.control.calls()
    seen.took_ms = await _recorded(fleet, seen)
    seen.round_trip_ms = await _round_trip_ms(fleet)
    seen.used = _used(calls, began_ns, began_ns + span_ns)
    return seen


def as_it_was(arrivals: Sequence[Arrival], seen: Seen) -> list[Arrival]:
    """The trace as it was really played: a busy machine sends a little later, and answers come a
    little later, than was wanted. As a trace from the record has it."""
    return [
        replace(
            arrival,
            time_ms=seen.sent_ms[number],
            duration_ms=seen.took_ms.get(number, arrival.duration_ms),
        )
        for number, arrival in enumerate(arrivals)
    ]


async def _recorded(fleet: Fleet, seen: Seen) -> dict[int, float]:
    """How long each call was open, once all are on record."""
    connections = Connections(fleet.postgres.url())
    connections.start()
    try:

        async def whole() -> dict[UUID, float] | None:
            rows = await connections.run(lambda one: one.fetch(_OPEN, list(seen.ids)))
            found = {UUID(int=row["request_id"].int): row["upstream_ms"] for row in rows}
            return found if len(found) == len(seen.ids) else None

        found = await wait_until(whole, 20, "the record of all calls")
        return {seen.ids[request_id]: took_ms for request_id, took_ms in found.items()}
    finally:
        await connections.aclose()


async def _round_trip_ms(fleet: Fleet) -> float:
    """The mean over all processes."""
    told = {"sum": 0.0, "count": 0.0}
    for url in fleet.apis:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        async with fleet.http.get(f"{url}/metrics", headers=headers) as response:
            text = await response.text()
        for what, value in re.findall(_SYNC, text, re.MULTILINE):
            told[what] += float(value)
    return told["sum"] / told["count"] * 1000


def _mark(number: int) -> str:
    return f"[{number}]"


async def _send(
    fleet: Fleet, keys: dict[str, str], began: float, number: int, arrival: Arrival, seen: Seen
) -> None:
    loop = asyncio.get_running_loop()
    urls = list(fleet.apis)
    headers = {"Authorization": f"Bearer {keys[arrival.tenant]}"}
    headers["x-tidegate-deadline-ms"] = str(arrival.deadline_ms or 60_000)
    message = {"role": "user", "content": f"Tell me of the tide {_mark(number)}"}
    body = {"model": arrival.model, "messages": [message]}
    due = asyncio.Event()
    loop.call_at(began + arrival.time_ms / 1000, due.set)
    await due.wait()
    seen.sent_ms[number] = (loop.time() - began) * 1000
    url = f"{urls[number % len(urls)]}/v1/chat/completions"
    async with fleet.http.post(url, json=body, headers=headers) as response:
        said = await response.read()
        if response.status == 200:
            wait_ms = float(response.headers["x-tidegate-queue-ms"])
            seen.waits_ms[arrival.tenant].append(wait_ms)
            seen.ids[UUID(response.headers["x-tidegate-request-id"])] = number
        else:
            assert response.status in (429, 503), said
            seen.refused[arrival.tenant] += 1


def _used(calls: Sequence[LoggedCall], since_ns: int, until_ns: int) -> float:
    spans = (
        min(call.ended_ns or until_ns, until_ns) - max(call.started_ns, since_ns) for call in calls
    )
    return sum(max(0, span_ns) for span_ns in spans) / (BOUND * (until_ns - since_ns))


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure, as it was foretold and as it was. `within`: how much it may be off, as a part."""

    figure: str
    foretold: float
    was: float
    within: float

    @property
    def off(self) -> float:
        """As a part of what was."""
        return abs(self.foretold - self.was) / self.was if self.was else float(self.foretold > 0)

    @property
    def agrees(self) -> bool:
        return self.off <= self.within


def compared(found: Findings, seen: Seen, *, within: float = 0.1) -> list[Compared]:
    """Mean and p95 of all waits and of each tenant's, shares, refusals and use, within a part of
    what was. Of several plays the mean is what is foretold."""
    rows: list[Compared] = []

    def add(figure: str, foretold: float | None, was: float | None) -> None:
        assert foretold is not None
        assert was is not None
        rows.append(Compared(figure, foretold, was, within))

    for spread in found.spreads:
        real = waits_of(seen.waits_ms[spread.name] if spread.name else seen.all_waits_ms())
        for what, foretold, was in (
            ("mean", spread.mean_ms, real.mean_ms),
            ("p95", spread.p95_ms, real.p95_ms),
        ):
            assert foretold is not None
            add(f"wait {what} ms, {spread.name or 'all'}", foretold.mean, was)
        refused = seen.refused[spread.name] if spread.name else sum(seen.refused.values())
        add(f"refused, {spread.name or 'all'}", spread.refused.mean, refused)
    admitted = sum(map(len, seen.waits_ms.values()))
    for group in found.tenants:
        was = len(seen.waits_ms[group.name]) / admitted
        add(f"share of calls, {group.name}", group.admitted / found.admitted, was)
    [limit] = [one for one in found.limits if one.limit == LIMIT]
    add(f"used of {LIMIT}", limit.used, seen.used)
    return rows


def shown(rows: Sequence[Compared]) -> str:
    lines = [f"{'':34} {'foretold':>9} {'was':>9} {'off':>6}"]
    lines += [
        f"{one.figure:34} {one.foretold:9.3g} {one.was:9.3g} {one.off:6.1%}"
        f"{'' if one.agrees else '  DIFFERS'}"
        for one in rows
    ]
    return "\n".join(lines)


_RECORDED = """
    INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status, kind, model,
        classified_by, classified_reason, priority, attempts, lapses, instance_id, submitted_at,
        admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens)
    SELECT id, at, id, tenant, 'gemini', 'relay', 'succeeded', 'text_only', 'gemini-2.5-flash',
        'body', '', 0, 1, 0, 'i', at, at + interval '3 seconds', at + interval '5 seconds', 3000,
        2000, 800, 200
    FROM generate_series(0, $2::int - 1) AS n,
        LATERAL (SELECT
            $1::timestamptz + n / 40 * interval '1 minute' + n % 40 * interval '50 ms' AS at,
            CASE WHEN n % 4 = 3 THEN 'globex' WHEN n % 8 = 1 THEN 'initech' ELSE 'acme' END
                AS tenant) AS drawn,
        LATERAL (SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7'
            || substr(replace(gen_random_uuid()::text, '-', ''), 14))::uuid AS id) AS named
"""


async def put_on_record(database: asyncpg.Pool, begins_at: datetime, calls: int) -> None:
    """Calls of 2 s from a moment on, 40 within 2 s each minute, each of which waited 3 s. Their ids
    are in the order of their times, as all ids are: else they would be listed before newer ones."""
    await database.execute(_RECORDED, begins_at, calls)
