"""Three tenants of different weights with keys, whose streams want more than there is, and a batch
of one of them beside those.

The clients are a closed loop, since a share is that of what is scarce. What the provider saw is the
truth for calls, tokens and what they cost; the queue's times are those that the answers tell.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from chaos.history import window_maximum
from tests.fleet import Fleet
from tests.waiting import wait_until
from tidegate.checker import Event, in_flight
from tidegate.emulator.state import LoggedCall

WEIGHTS = {"small": 1, "middle": 2, "large": 4}
LIMIT = 8
CLIENTS = 12  # of each tenant, over all API processes
LEAST_SHARE = 0.05  # of the band "low", as delivered
MODEL, BATCH_MODEL = "gemini-2.5-flash", "gemini-2.5-flash-lite"
# The batch is that of `middle`. Alone it meets the tenant's own limit and its model's rate.
BATCH_TENANT, BATCH_MARK = "middle", "batch"
TENANT_LIMIT = 6
RATE, RATE_WINDOW_NS = 75, 1_000_000_000
BATCH_SAYS = "Say word{} [batch]"
_ADMIN = {"Authorization": "Bearer of-the-operator-alone"}
_POLICY = f"""
[limits]
"kind:text_only" = {LIMIT}
"tenant:{BATCH_TENANT}" = {TENANT_LIMIT}
"rps:{BATCH_MODEL}" = {{ bound = {RATE}, slack_ms = 200 }}
[weights]
small = 1
middle = 2
large = 4
[upstreams.gemini.prices]
"*" = {{ input = 0.30, output = 2.50 }}
"""


def policy_in(folder: Path) -> dict[str, str]:
    """Settings of a fleet with this policy."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "policy.toml"
    path.write_text(_POLICY)
    return {
        "TIDEGATE_POLICY": str(path),
        "CLASSIFIER": "keywords",
        "AUTH": "on",
        "ADMIN_TOKEN": "of-the-operator-alone",
    }


async def keys_of(fleet: Fleet) -> dict[str, str]:
    """Make the tenants; a key of each, which all API processes know."""
    keys: dict[str, str] = {}
    for tenant in WEIGHTS:
        url = f"{fleet.url}/admin"
        async with fleet.http.put(f"{url}/tenants/{tenant}", json={}, headers=_ADMIN) as made:
            assert made.status == 200, await made.text()
        async with fleet.http.post(
            f"{url}/keys", json={"tenant": tenant}, headers=_ADMIN
        ) as answer:
            assert answer.status == 201, await answer.text()
            keys[tenant] = (await answer.json())["key"]
    return keys


@dataclass
class Seen:
    """Of the time in which all tenants wanted more: calls that began, and how long they waited."""

    begun: Counter[str] = field(default_factory=Counter)
    waits_ms: list[float] = field(default_factory=list)

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.begun + other.begun, self.waits_ms + other.waits_ms)

    @property
    def calls(self) -> int:
        """Streams, without lines of the batch."""
        return sum(self.begun[tenant] for tenant in WEIGHTS)

    @property
    def shares(self) -> dict[str, float]:
        return {tenant: self.begun[tenant] / self.calls for tenant in WEIGHTS}

    @property
    def p95_ms(self) -> float:
        waits = sorted(self.waits_ms)
        return waits[len(waits) * 95 // 100]

    @property
    def furthest_off(self) -> float:
        """How far a share is from what it should be, as a part of that."""
        whole = sum(WEIGHTS.values())
        return max(abs(self.shares[t] * whole / w - 1) for t, w in WEIGHTS.items())

    @property
    def low_share(self) -> float:
        """The part of all calls that were lines of the batch."""
        return self.begun[BATCH_MARK] / self.begun.total()


async def run(fleet: Fleet, keys: dict[str, str], *, seconds: float) -> Seen:
    """Streams of all tenants for so long, beside whatever else there is."""
    before = (await fleet.truth()).last_id
    seen, until = Seen(), time.monotonic() + seconds
    began_ns = time.time_ns() + int(seconds * 0.15e9)
    clients = [
        _client(fleet, tenant, keys[tenant], number, until, seen.waits_ms)
        for tenant in WEIGHTS
        for number in range(CLIENTS)
    ]
    await asyncio.gather(*clients)
    ended_ns = time.time_ns() - int(seconds * 0.05e9)
    seen.begun = Counter(
        _mark(call)
        for call in await fleet.control.calls(since=before)
        if began_ns <= call.started_ns <= ended_ns
    )
    return seen


async def set_pace(fleet: Fleet) -> None:
    """How long the provider takes: 65 to 105 ms for each answer."""
    await fleet.control.set_behaviour(first_byte_ms={"uniform": [40, 80]}, between_ms=5, chunks=6)


async def _client(
    fleet: Fleet, tenant: str, key: str, number: int, until: float, waits_ms: list[float]
) -> None:
    """One stream after the other; every second client wants to be told the usage."""
    url = list(fleet.apis)[number % len(fleet.apis)]
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Tell me of the tide [{tenant}]"}],
        "stream": True,
        "stream_options": {"include_usage": number // len(fleet.apis) % 2 == 0},
    }
    warm = time.monotonic() + (until - time.monotonic()) * 0.15
    while time.monotonic() < until:
        async with fleet.http.post(
            f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}
        ) as response:
            said = await response.read()
            assert response.status == 200, said
            assert said.endswith(b"data: [DONE]\n\n")
            assert b'"error"' not in said
            if time.monotonic() > warm:
                waits_ms.append(float(response.headers["x-tidegate-queue-ms"]))


def _mark(call: LoggedCall) -> str:
    return call.prompt.split("[", 1)[1].split("]", 1)[0]


def _tenant(call: LoggedCall) -> str:
    mark = _mark(call)
    return BATCH_TENANT if mark == BATCH_MARK else mark


async def assert_never_over(fleet: Fleet) -> dict[str, int]:
    """The most that there ever was of each limit, as the provider saw it."""
    events = _events(await fleet.control.calls())
    tenant, rate = f"tenant:{BATCH_TENANT}", f"rps:{BATCH_MODEL}"
    most = {
        "kind:text_only": (await fleet.truth())["text_only"].max_in_flight,
        tenant: in_flight(events, tenant).peak(),
        rate: window_maximum(events, rate, RATE_WINDOW_NS).calls,
    }
    allowed = {"kind:text_only": LIMIT, tenant: TENANT_LIMIT, rate: RATE}
    assert all(most[limit] <= bound for limit, bound in allowed.items()), (most, allowed)
    return most


def _events(calls: Sequence[LoggedCall]) -> list[Event]:
    events: list[Event] = []
    for call in calls:
        assert call.outcome == "finished", call
        limits = (f"tenant:{_tenant(call)}", f"rps:{call.model}")
        begin = Event(call.started_ns, "begin", "emulator", call.id, limits=limits)
        events += [begin, begin._replace(at_ns=call.ended_ns or 0, what="end")]
    return sorted(events, key=lambda event: event.at_ns)


async def assert_totals_are_exact(fleet: Fleet, keys: dict[str, str]) -> None:
    """`GET /usage` of each tenant is what the provider billed it, to the token and the
    millionth of money."""
    billed: dict[str, Counter[str]] = defaultdict(Counter)
    for call in await fleet.control.calls():
        billed[_tenant(call)].update(
            requests=1,
            input_tokens=call.input_tokens,
            output_tokens=call.output_tokens - call.thoughts_tokens,
            thoughts_tokens=call.thoughts_tokens,
            # Rounded once a call: 0.30 and 2.50 of money for a million.
            cost_micros=(call.input_tokens * 30 + call.output_tokens * 250 + 50) // 100,
        )
    assert set(billed) == set(WEIGHTS)
    since = datetime.now(UTC).date() - timedelta(days=1)
    url = f"{fleet.url}/usage?since={since}"
    for tenant, expected in billed.items():
        headers = {"Authorization": f"Bearer {keys[tenant]}"}

        async def recorded(
            least: int = expected["requests"], headers: dict[str, str] = headers
        ) -> dict[str, int] | None:
            async with fleet.http.get(url, headers=headers) as response:
                total: dict[str, int] = (await response.json())["total"]
                return total if total["requests"] >= least else None

        total = await wait_until(recorded, 30, f"the record of each call of {tenant}")
        assert {name: total[name] for name in expected} == dict(expected), tenant
        assert [total[name] for name in ("partial", "estimated", "unknown", "unpriced")] == [0] * 4


async def settled(fleet: Fleet) -> None:
    """Between two runs: nothing is in flight any more."""

    async def idle() -> bool:
        return (await fleet.truth()).in_flight == 0

    await wait_until(idle, 30, "an idle provider")
