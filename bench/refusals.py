"""How fast a call is refused that can't be admitted before its deadline, and how true it is told.

    python -m bench.refusals [--apis 2] [--calls 1000] [--at-once 2]

A rate of two requests in ten minutes is used up, and so many calls wait for it. Then calls with a
later deadline than theirs, by which there is no room, come over HTTP, on open connections: each
must be refused by that limit, with its Retry-After. The same of a day quota and of a day's budget
that are used up; and of the first refusals of fifty budgets, in each process, which find that they
are. Bare sockets, since the client shares the machine with what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from bench.machine import cpu_ns, describe
from tests.fleet import Fleet
from tests.waiting import wait_until

WINDOW_MS, BOUND, DAY_TOKENS = 600_000, 2, 1_000
OWN_TOKENS, BUDGETS = 300, 50
WITHIN_MS = 20.0
SOON_MS = 100_000
# Between two calls of one connection, so that the client does not fill the machine.
PAUSE_S = 0.02
# Until the call before is settled, for what it returns of its reservation is waited for.
SETTLED_S = 0.4
# Of the Retry-After.
SHARE, SLACK_S = 0.02, 1.0


@dataclass(frozen=True, slots=True)
class Cause:
    """What refuses the calls of a model, under the name that the refusal has of it."""

    name: str
    model: str
    limit: str

    def request(self, deadline_ms: int, subject: str = "ann") -> bytes:
        said = [{"role": "user", "content": "Say hello"}]
        body = json.dumps({"model": self.model, "messages": said, "max_tokens": 100}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"x-tidegate-subject: {subject}\r\n"
            f"x-tidegate-deadline-ms: {deadline_ms}\r\n\r\n"
        )
        return head.encode() + body


RATE = Cause("rate", "gemini-2.5-flash", "rpm:gemini-2.5-flash")
QUOTA = Cause("day quota", "gemini-2.5-pro", "rpd:gemini-2.5-pro")
BUDGET = Cause("budget", "gemini-2.5-flash-lite", "small")
FIRST = Cause("budget, at first", "gemini-2.0-flash", "own")
POLICY = f"""
[limits]
"kind:text_only" = 1000
"{RATE.limit}" = {{ bound = {BOUND}, window_ms = {WINDOW_MS} }}
"{QUOTA.limit}" = {{ bound = {BOUND}, zone = "UTC" }}
"""
SMALL = {"tokens": DAY_TOKENS, "period": "day", "zone": "UTC", "model": BUDGET.model}
OWN = {**SMALL, "tokens": OWN_TOKENS, "model": FIRST.model, "each": ["subject"]}


@dataclass(slots=True)
class Answers:
    """taken_ms of each; told: the Retry-After in seconds and when it was told; wrong: whatever else
    was answered."""

    cause: Cause
    taken_ms: list[float] = field(default_factory=list)
    told: list[tuple[float, float]] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)

    def note(self, head: bytes, body: bytes, taken_ms: float, *, ignored: bool = False) -> None:
        if ignored and head.startswith(b"HTTP/1.1 200"):
            return
        self.taken_ms.append(taken_ms)
        limit = json.loads(body).get("error", {}).get("limit")
        if not head.startswith(b"HTTP/1.1 429") or limit != self.cause.limit:
            self.wrong[f"{head[:12].decode()} {limit}"] += 1
        _, _, rest = head.lower().partition(b"retry-after: ")
        if rest:
            self.told.append((float(rest.split(b"\r\n")[0]), time.monotonic()))


@dataclass(frozen=True, slots=True)
class RefusedCalls:
    """by: the cause's name. waiting: how many others. within: the share refused in less than 20 ms.
    cpu_ms: of ours, a call. true: the share with a Retry-After right within 2 % or 1 s. wrong:
    other answers."""

    by: str
    waiting: int
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    within: float
    cpu_ms: float
    true: float
    wrong: str


def _last_ms(waiters: int) -> int:
    """When the last of those that wait is admitted."""
    return waiters // BOUND * WINDOW_MS


async def _one(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    deadline_ms: int,
    into: Answers,
    subject: str = "",
) -> None:
    """One call; with a subject, an answer other than a refusal does not count."""
    started = time.perf_counter()
    writer.write(into.cause.request(deadline_ms, subject or "ann"))
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    taken_ms = (time.perf_counter() - started) * 1000
    into.note(head, body, taken_ms, ignored=bool(subject))


async def _refused(
    fleet: Fleet, cause: Cause, calls: int, at_once: int, deadline_ms: int
) -> Answers:
    urls = [urlsplit(url) for url in fleet.apis]
    found, left = Answers(cause), iter(range(calls))

    async def caller(number: int, left: Iterator[int]) -> None:
        url = urls[number % len(urls)]
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        for _ in left:
            await asyncio.sleep(PAUSE_S)
            await _one(reader, writer, deadline_ms, found)
        writer.close()

    await asyncio.gather(*(caller(number, left) for number in range(at_once)))
    return found


async def _waiters(fleet: Fleet, count: int) -> list[asyncio.StreamWriter]:
    """Calls that have time, one on each connection."""
    urls = [urlsplit(url) for url in fleet.apis]
    writers = []
    for number in range(count):
        url = urls[number % len(urls)]
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(RATE.request(_last_ms(count) + SOON_MS))
        writers.append(writer)
    return writers


async def _waiting(fleet: Fleet) -> tuple[int, int]:
    """How much of the limit is used, and how many wait for it."""
    async with fleet.http.get(f"{fleet.url}/admin/limits") as response:
        shown = (await response.json())["limits"]
    limit = next(one for one in shown if one["limit"] == RATE.limit)
    return limit["used"], limit["waiting"]


async def measure(apis: int, calls: int, at_once: int) -> AsyncIterator[RefusedCalls]:
    """Of so many calls: by a rate with none, few and many others waiting, by a quota, a budget."""
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder) / "policy.toml"
        policy.write_text(POLICY)
        settings = {"TIDEGATE_POLICY": str(policy)}
        async with Fleet(Path(folder) / "fleet", apis=apis, workers=0, settings=settings) as fleet:
            async for one in _by_rate(fleet, calls, at_once):
                yield one
            async with fleet.http.put(f"{fleet.url}/admin/budgets/small", json=SMALL) as answer:
                answer.raise_for_status()
            for cause in (QUOTA, BUDGET):
                await _use_up(fleet, cause)
                yield await _measured(fleet, cause, calls, at_once)
            async with fleet.http.put(f"{fleet.url}/admin/budgets/own", json=OWN) as answer:
                answer.raise_for_status()
            yield await _first(fleet)


async def _by_rate(fleet: Fleet, calls: int, at_once: int) -> AsyncIterator[RefusedCalls]:
    used_at = time.monotonic()
    for waiters in (0, BOUND, 20 * BOUND):
        writers = await _waiters(fleet, waiters + (BOUND if not waiters else 0))

        async def is_full(waiters: int = waiters) -> bool:
            return await _waiting(fleet) == (BOUND, waiters)

        await wait_until(is_full, 30, "all that wait")
        # The room comes with the window after the last one that the waiters fill.
        room_at = used_at + (1 + waiters // BOUND) * WINDOW_MS / 1000
        yield await _measured(fleet, RATE, calls, at_once, waiters, room_at)
        if waiters:
            for writer in writers:
                writer.close()

            async def is_empty() -> bool:
                return await _waiting(fleet) == (BOUND, 0)

            await wait_until(is_empty, 30, "no call that waits")


async def _use_up(fleet: Fleet, cause: Cause) -> None:
    """Make calls until each process refuses one."""
    for url in map(urlsplit, fleet.apis):
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        made = Answers(cause)
        while not made.told:
            await _one(reader, writer, SOON_MS, made)
        writer.close()


async def _first(fleet: Fleet) -> RefusedCalls:
    """Use up a budget of its own for each of so many subjects; each process refuses one call."""
    pids = [child.process.pid for child in fleet.apis.values()]
    before_ns, found = sum(map(cpu_ns, pids)), Answers(FIRST)
    connections = [
        await asyncio.open_connection(url.hostname, url.port) for url in map(urlsplit, fleet.apis)
    ]
    for number in range(BUDGETS):
        for reader, writer in connections:
            known = len(found.taken_ms)
            while len(found.taken_ms) == known:
                await asyncio.sleep(SETTLED_S)
                await _one(reader, writer, SOON_MS, found, f"subject-{number}")
    for _, writer in connections:
        writer.close()
    cpu_ms = (sum(map(cpu_ns, pids)) - before_ns) / 1e6 / len(found.taken_ms)
    return _judged(found, 0, cpu_ms, _midnight_at())


def _midnight_at() -> float:
    """The end of the day in UTC, by the monotonic clock."""
    now = datetime.now(UTC)
    ends = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return time.monotonic() + (ends - now).total_seconds()


async def _measured(
    fleet: Fleet,
    cause: Cause,
    calls: int,
    at_once: int,
    waiters: int = 0,
    room_at: float | None = None,
) -> RefusedCalls:
    """room_at: by the monotonic clock; at midnight where it is left out."""
    room_at = room_at or _midnight_at()
    pids = [child.process.pid for child in fleet.apis.values()]
    before_ns = sum(map(cpu_ns, pids))
    found = await _refused(fleet, cause, calls, at_once, _last_ms(waiters) + 3 * SOON_MS)
    cpu_ms = (sum(map(cpu_ns, pids)) - before_ns) / 1e6 / calls
    return _judged(found, waiters, cpu_ms, room_at)


def _judged(found: Answers, waiters: int, cpu_ms: float, room_at: float) -> RefusedCalls:
    taken = sorted(found.taken_ms)
    p50_ms, p90_ms, p99_ms = (
        taken[min(len(taken) - 1, int(len(taken) * share))] for share in (0.5, 0.9, 0.99)
    )
    true = sum(
        abs(told_s - (room_at - told_at)) <= max(SLACK_S, SHARE * (room_at - told_at))
        for told_s, told_at in found.told
    )
    return RefusedCalls(
        by=found.cause.name,
        waiting=waiters,
        calls=len(taken),
        p50_ms=p50_ms,
        p90_ms=p90_ms,
        p99_ms=p99_ms,
        within=sum(one < WITHIN_MS for one in taken) / len(taken),
        cpu_ms=cpu_ms,
        true=true / len(taken),
        wrong=", ".join(f"{count} x {what}" for what, count in found.wrong.items()) or "0",
    )


def _row(one: RefusedCalls) -> str:
    times = f"{one.p50_ms:.1f} | {one.p90_ms:.1f} | {one.p99_ms:.1f} | {one.within:.1%}"
    rest = f"{one.cpu_ms:.2f} | {one.true:.1%} | {one.wrong}"
    return f"| {one.by} | {one.waiting} | {one.calls} | {times} | {rest} |"


async def _print(apis: int, calls: int, at_once: int) -> None:
    async for one in measure(apis, calls, at_once):
        print(_row(one), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--apis", type=int, default=2)
    parser.add_argument("--calls", type=int, default=1_000)
    parser.add_argument("--at-once", type=int, default=2)
    given = parser.parse_args()
    print("\n".join(describe("", sys.argv)))
    heads = (
        "by|waiting|refused|p50 ms|p90 ms|p99 ms|below 20 ms|CPU ms of ours|Retry-After true|other"
    )
    print(f"|{heads}|\n|{'---|' * 10}", flush=True)
    asyncio.run(_print(given.apis, given.calls, given.at_once))


if __name__ == "__main__":
    main()
