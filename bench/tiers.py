"""What waiting saves, and that nothing is late: 1,000 jobs due in a day, an hour and a minute.

    python -m bench.tiers [--jobs 1000] [--only "24 h"]

Two API processes, two workers and an emulated OpenAI, whose batches and flex tier are as slow as
announced; each group has a fleet of its own, on a clock that is scaled as a whole: deadlines,
windows, and the provider's times are divided by the scale, which is 1 for jobs due in a minute. By
the limit 1,000 live calls take about a sixth of a minute. The costs are the emulator's own: every
call and every line of a batch that it billed, at the public price of its tier, over the same jobs
at the usual price.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from bench.gateway.product import Product
from bench.limits.stage import await_ready, emulator_process
from bench.machine import describe
from tidegate.emulator.client import EmulatorControl
from tidegate.emulator.state import LoggedCall
from tidegate.prices.rates import catalog

MODEL, AT_ONCE, CALL_MS = "gpt-5", 20, 200.0
DAY_MS, HOUR_MS, MINUTE_MS = 86_400_000, 3_600_000, 60_000
CANCEL_MS, FLEX_MS = 10 * MINUTE_MS, 15 * MINUTE_MS
PROMPT = "Summarise what the tide does to a harbour. " * 20
ANSWER = "word " * 120
_SUBMITTING = 32
_KEY = "MEASURED_KEY"
_LEARN = 8  # live calls before, from which the workers learn how long one takes
_ENDS = ("succeeded", "failed", "expired", "cancelled", "dead")


@dataclass(frozen=True, slots=True)
class DueGroup:
    """Jobs that are due after the same time. scale: how much faster its clock is."""

    name: str
    due_ms: int
    scale: int

    def scaled(self, ms: float) -> int:
        return max(1, round(ms / self.scale))


GROUPS = (
    DueGroup("24 h", DAY_MS, 720),
    DueGroup("1 h", HOUR_MS, 60),
    DueGroup("1 min", MINUTE_MS, 1),
)


@dataclass(frozen=True, slots=True)
class GroupResult:
    """late: not succeeded by its deadline. share: what was billed over the usual price."""

    late: int
    share: float
    tiers: Mapping[str, int]
    longest: float


def behaviour(group: DueGroup) -> dict[str, Any]:
    """A provider whose flex calls take 30 s more, a fifth of them without capacity, and whose
    batches end after 2 h or so."""
    return {
        "answer": ANSWER,
        "first_byte_ms": {"*": {"lognormal": [CALL_MS, 0.3]}},
        "flex": {"delay_ms": {"lognormal": [group.scaled(30_000), 0.5]}, "busy_share": 0.2},
        "batches": {
            "delay_ms": {"lognormal": [min(HOUR_MS, group.scaled(2 * HOUR_MS)), 0.5]},
            "cancelling_ms": group.scaled(CANCEL_MS / 2),
            "window_s": max(0.001, DAY_MS / group.scale / 1_000),
        },
    }


def policy(provider_url: str) -> str:
    return f"""
[upstreams.measured]
provider = "openai"
base_url = "{provider_url}/v1"
key = "{_KEY}"
models = ["gpt-*"]

[upstreams.measured.limits]
"pool:total" = {AT_ONCE}
"""


def settings(group: DueGroup) -> dict[str, str]:
    return {
        _KEY: "measured",
        "FLEX_WITHIN_MS": str(group.scaled(FLEX_MS)),
        "PROVIDER_BATCH_WINDOW_MS": str(group.scaled(DAY_MS)),
        "PROVIDER_BATCH_CANCEL_MS": str(group.scaled(CANCEL_MS)),
        "PROVIDER_BATCH_GATHER_MS": str(group.scaled(MINUTE_MS)),
        "PROVIDER_BATCH_POLL_MS": str(group.scaled(MINUTE_MS)),
    }


def dollars(calls: list[LoggedCall], *, usual: bool = False) -> Fraction:
    """What calls cost at the public prices of their tiers, or in the usual one."""
    total, today = Fraction(), datetime.now(UTC).date()
    for call in calls:
        price = catalog().find("openai", call.model, today, "" if usual else call.tier)
        assert price is not None
        total += call.input_tokens * Fraction(str(price.input or 0))
        total += call.output_tokens * Fraction(str(price.output or 0))
    return total


class Submitter:
    """Submits jobs to a gateway and waits for their ends."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url
        self._room = asyncio.Semaphore(_SUBMITTING)

    async def submit(self, number: int, **more: Any) -> str:
        body = {"model": MODEL, "messages": [{"role": "user", "content": f"{number}: {PROMPT}"}]}
        job = {"endpoint": "/v1/chat/completions", "body": body, **more}
        async with self._room, self._http.post(f"{self._url}/submit", json=job) as answer:
            assert answer.status == 202, await answer.text()
            return str((await answer.json())["request_id"])

    async def end_of(self, request_id: str) -> dict[str, Any]:
        while True:
            url = f"{self._url}/status/{request_id}?wait=20"
            async with self._room, self._http.get(url) as answer:
                record: dict[str, Any] = await answer.json()
            if answer.status == 200 and record["status"] in _ENDS:
                return record


async def measured(group: DueGroup, jobs: int, gateway: str, provider: str) -> GroupResult:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as http, EmulatorControl(provider) as control:
        submitter = Submitter(http, gateway)
        first = [await submitter.submit(number) for number in range(_LEARN)]
        for request_id in first:
            await submitter.end_of(request_id)
        began = (await control.stats()).last_id
        due_ms = group.scaled(group.due_ms)
        more = {"tiers": ["live", "flex", "batch"], "deadline_ms": due_ms}
        ids = await asyncio.gather(*(submitter.submit(n, **more) for n in range(jobs)))
        records = [await submitter.end_of(one) for one in ids]
        calls = [one for one in await control.calls(began) if one.input_tokens]
    late, longest, tiers = 0, timedelta(), Counter[str]()
    for record in records:
        tiers[record.get("tier", "live")] += 1
        taken = _moment(record["finished_at"]) - _moment(record["submitted_at"])
        longest = max(longest, taken)
        late += record["status"] != "succeeded" or taken > timedelta(milliseconds=due_ms)
    one_each = {call.prompt_sha: call for call in calls}
    share = dollars(calls) / dollars([*one_each.values()], usual=True)
    return GroupResult(late, float(share), tiers, longest.total_seconds() * group.scale)


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def run(group: DueGroup, jobs: int) -> GroupResult:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-tiers-")))
        emulator, provider = emulator_process(folder, behaviour(group))
        stack.callback(emulator.stop)
        product = stack.enter_context(
            Product(
                provider,
                apis=2,
                workers=2,
                policy=policy(provider),
                settings=settings(group),
            )
        )
        gateway = f"http://127.0.0.1:{product.port}"
        await_ready(product.program, gateway)
        return asyncio.run(measured(group, jobs, gateway, provider))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1_000)
    parser.add_argument("--only", default="", help="of the groups: 24 h, 1 h or 1 min")
    given = parser.parse_args()
    print("\n".join(describe("", sys.argv)))
    print("| due in | jobs | clock | late | cost of live | live, flex, batch | slowest |")
    print(f"|{'---|' * 7}")
    for group in GROUPS:
        if given.only in group.name:
            result = run(group, given.jobs)
            tiers = ", ".join(str(result.tiers.get(name, 0)) for name in ("live", "flex", "batch"))
            print(
                f"| {group.name} | {given.jobs} | x {group.scale} | {result.late} | "
                f"{result.share:.1%} | {tiers} | {result.longest / 60:.1f} min |",
                flush=True,
            )


if __name__ == "__main__":
    main()
