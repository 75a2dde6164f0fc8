"""What a quiet tenant waits for at a GPU server under three times its load, direct and through us.

    python -m bench.selfhosted [--server emulated|llama] [--seconds 60] [--only direct,4,latency]

Noisy callers, three for each slot, call again as soon as they are answered; a quiet tenant has one
call every two seconds. All are streams with prompts that nobody has sent before. Through Tidegate
by fixed limits and by those that find the concurrency themselves. The bars: the quiet tenant's p99
of the time to first token is at most 1.5 times that of its calls alone plus one call's time in a
slot, and the throughput at least 0.95 of the best fixed limit's. A call has its slot from the
beginning of its prompt: measured where as many calls are admitted as there are slots, from the
admission to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory

import aiohttp

from bench.gateway.product import Product
from bench.grid import Grid, show
from bench.limits.stage import await_ready, emulator_process
from bench.machine import describe
from bench.selfhosted.llama import MODEL, llama_server

SLOTS = 4
OVERLOAD = 3
QUIET_EVERY_S, QUIET_TOKENS = 2.0, 50
NOISY_TOKENS, PROMPT_WORDS = 100, 40
WARM_UP_S = 10.0
ALONE = "quiet alone"
DIRECT = "direct"
MOST_TIMES_ALONE, LEAST_THROUGHPUT = 1.5, 0.95
LIMITS: Mapping[str, str] = {
    "2": "2",
    "4": "4",
    "6": "6",
    "8": "8",
    "refusals": "{ bound = 24, adaptive = { minimum = 2 } }",
    "latency": '{ bound = 24, adaptive = { minimum = 2, by = "latency" } }',
}
POLICY = """
[upstreams.local]
provider = "llama.cpp"
base_url = "{url}"
models = ["{model}"]
[upstreams.local.limits]
"pool:total" = {limit}
"""
WORDS = ("tide", "gate", "river", "stone", "bridge", "water", "wind", "salt", "sand", "shore")


@dataclass(slots=True)
class Measured:
    """Of one run. Times to the first token of each tenant's calls; of the noisy also those at the
    server, and of them those from the first token, when they surely have a slot."""

    name: str
    quiet_s: list[float] = field(default_factory=list)
    noisy_s: list[float] = field(default_factory=list)
    at_server_s: list[float] = field(default_factory=list)
    in_slot_s: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: int = 0
    lasted_s: float = 1.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.lasted_s


@dataclass(frozen=True, slots=True)
class Timed:
    """One call: until its first token, from then to its end, and at the server in all."""

    first_s: float
    in_slot_s: float
    at_server_s: float
    tokens: int


async def call(
    session: aiohttp.ClientSession, url: str, tenant: str, random: Random, tokens: int
) -> Timed | None:
    """None where it failed."""
    words = " ".join(random.choices(WORDS, k=PROMPT_WORDS))
    content = f"{random.getrandbits(48):x} {words}"
    sent = {
        "model": MODEL,
        "stream": True,
        "max_tokens": tokens,
        "messages": [{"role": "user", "content": content}],
    }
    began, first_s, count = time.monotonic(), None, 0
    headers = {"x-tidegate-tenant": tenant}
    async with session.post(f"{url}/v1/chat/completions", json=sent, headers=headers) as answer:
        if answer.status != 200:
            await answer.read()
            return None
        queued_s = float(answer.headers.get("x-tidegate-queue-ms", 0)) / 1000
        async for line in answer.content:
            if b'"content":"' in line and b'"content":""' not in line:
                count += 1
                if first_s is None:
                    first_s = time.monotonic() - began
    if first_s is None:
        return None
    lasted_s = time.monotonic() - began
    return Timed(first_s, lasted_s - first_s, lasted_s - queued_s, count)


async def measure(name: str, url: str, seconds: float, *, noisy: int, seed: int) -> Measured:
    """Load it, and look away while it warms up."""
    found, begins = Measured(name), time.monotonic() + (WARM_UP_S if noisy else 0)
    ends = begins + seconds
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # as the server closes them
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def made(tenant: str, random: Random, tokens: int, into: list[float]) -> None:
            one = await call(session, url, tenant, random, tokens)
            if not begins <= time.monotonic() <= ends:
                return
            if one is None:
                found.failed += 1
                return
            into.append(one.first_s)
            found.tokens += one.tokens
            if tenant == "noisy":
                found.in_slot_s.append(one.in_slot_s)
                found.at_server_s.append(one.at_server_s)

        async def noise(number: int) -> None:
            random = Random(seed * 1_000 + number)
            while time.monotonic() < ends:
                await made("noisy", random, NOISY_TOKENS, found.noisy_s)

        async def quietly() -> None:
            random, calls = Random(seed), []
            while time.monotonic() < ends:
                calls.append(
                    asyncio.create_task(made("quiet", random, QUIET_TOKENS, found.quiet_s))
                )
                await asyncio.sleep(QUIET_EVERY_S)
            await asyncio.gather(*calls)

        await asyncio.gather(quietly(), *(noise(number) for number in range(noisy)))
    found.lasted_s = seconds
    return found


@asynccontextmanager
async def serving(kind: str, folder: Path) -> AsyncIterator[str]:
    if kind == "llama":
        async with llama_server(folder, slots=SLOTS) as server:
            yield server.url
        return
    program, url = await asyncio.to_thread(
        emulator_process, folder, {"gpu": {"slots": SLOTS, "cache_tokens": 0}}
    )
    try:
        yield url
    finally:
        await asyncio.to_thread(program.stop)


@contextmanager
def through(url: str, limit: str) -> Iterator[str]:
    policy = POLICY.format(url=url, model=MODEL, limit=limit)
    with Product(url, apis=1, policy=policy, settings={"STREAM_WAIT_MS": "600000"}) as product:
        gateway = f"http://127.0.0.1:{product.port}"
        await_ready(product.program, gateway)
        yield gateway


def share(values: Sequence[float], part: float) -> float:
    """A percentile: the worst one where there are few."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else float("nan")


def judged(found: Sequence[Measured]) -> tuple[Grid, bool]:
    alone = next(one for one in found if one.name == ALONE)
    fixed = [one for one in found if one.name.isdecimal()]
    best = max((one.tokens_per_s for one in fixed), default=float("nan"))
    as_slots = next((one for one in fixed if one.name == str(SLOTS)), None)
    rows, all_hold = [], True
    for one in found:
        p99 = share(one.quiet_s, 0.99)
        slot_s = share(one.in_slot_s if as_slots is None else as_slots.at_server_s, 0.5)
        bar = MOST_TIMES_ALONE * share(alone.quiet_s, 0.99) + slot_s
        part = one.tokens_per_s / best
        verdict = ""
        if one.name not in (ALONE, DIRECT):
            holds = p99 <= bar and part >= LEAST_THROUGHPUT
            verdict = "holds" if holds else "missed"
            if one.name in (str(SLOTS), "latency"):
                all_hold = all_hold and holds
        rows.append(
            (
                one.name,
                str(len(one.quiet_s)),
                f"{share(one.quiet_s, 0.5):.2f}",
                f"{p99:.2f}",
                "" if one.name in (ALONE, DIRECT) else f"{bar:.2f}",
                f"{share(one.noisy_s, 0.5):.2f}" if one.noisy_s else "",
                f"{median(one.in_slot_s):.2f}" if one.in_slot_s else "",
                f"{median(one.at_server_s):.2f}" if one.at_server_s else "",
                f"{one.tokens_per_s:.0f}",
                "" if one.name in (ALONE, DIRECT) else f"{part:.2f}",
                str(one.failed),
                verdict,
            )
        )
    headers = (
        "limit",
        "quiet calls",
        "quiet p50 s",
        "quiet p99 s",
        "bar s",
        "noisy p50 s",
        "after the first token s",
        "at the server s",
        "tokens/s",
        "of the best fixed",
        "failed",
        "",
    )
    return Grid("Time to first token of a quiet tenant", headers, rows), all_hold


async def run(options: argparse.Namespace) -> bool:
    names = options.only.split(",") if options.only else [DIRECT, *LIMITS]
    found: list[Measured] = []
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-selfhosted-")))
        url = await stack.enter_async_context(serving(options.server, folder))
        noisy = OVERLOAD * SLOTS
        found.append(await measure(ALONE, url, min(options.seconds, 40.0), noisy=0, seed=1))
        for seed, name in enumerate(names, 2):
            if name == DIRECT:
                found.append(await measure(name, url, options.seconds, noisy=noisy, seed=seed))
            else:
                with through(url, LIMITS[name]) as gateway:
                    found.append(
                        await measure(name, gateway, options.seconds, noisy=noisy, seed=seed)
                    )
            print(f"{name}: {found[-1].tokens_per_s:.0f} tokens/s", file=sys.stderr, flush=True)
    grid, holds = judged(found)
    show([grid])
    return holds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.selfhosted", description=__doc__)
    parser.add_argument("--server", choices=("emulated", "llama"), default="emulated")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", help=f"of {DIRECT}, {', '.join(LIMITS)}, by commas")
    options = parser.parse_args(arguments)
    command = ["python", "-m", "bench.selfhosted", "--server", options.server]
    print("\n".join(describe(f"{SLOTS} slots", command)))
    return 0 if asyncio.run(run(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
