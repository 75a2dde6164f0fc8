"""What stays in the prompt cache of agents' conversations over several accounts, and at what wait.

    python -m bench.stickiness [--turns 60] [--agents 6] [--at-once 2] [--first 0]

Agents hold conversations through two API processes, one call at a time each: over one account that
has room for all, over three that share it, and over three with a new name of the conversation for
each call and nothing that a cache is worth, which is a choice by lot. Accounts keep prefixes of
conversations, as Anthropic does. Tokens are counted at the emulated providers; waits are those that
answers report. `bench.simulated_stays` has the same in virtual time.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import aiohttp

from bench import grid
from bench.gateway.product import Product
from bench.limits.load import ANSWER, drawn
from bench.limits.stage import BEHAVIOUR, await_ready, emulator_process
from bench.machine import describe
from tidegate.emulator.client import EmulatorControl

MODEL, KEY = "claude-opus-4-6", "MEASURED_KEY"
ACCOUNTS = 3
LOT: Mapping[str, str] = {"CACHE_WAIT_US_PER_TOKEN": "0"}
_INPUT, _UNCACHED, _PLENTY = "input_tokens", "uncached_input_tokens", 10**10
SYSTEM_CHARS, TURN_CHARS = 16_000, 1_200
LEAST_CACHED, MOST_WAIT = 0.95, 1.2
# A wait of this much in a whole conversation is none.
UNNOTICED_MS = 250.0


@dataclass(frozen=True, slots=True)
class Conversations:
    """Of one run. cached: of all input tokens, the share that the providers' caches had. waits_ms:
    of each conversation in all."""

    name: str
    cached: float
    waits_ms: Sequence[float]
    failed: int


def policy(urls: Sequence[str], at_once: int) -> str:
    return "\n".join(
        f"[upstreams.account{number}]\nprovider = 'anthropic'\nbase_url = '{url}'\nkey = '{KEY}'\n"
        f"models = ['claude-*']\n[upstreams.account{number}.limits]\n'pool:total' = {at_once}\n"
        for number, url in enumerate(urls)
    )


@contextmanager
def standing(
    accounts: int, at_once: int, settings: Mapping[str, str]
) -> Iterator[tuple[str, list[str]]]:
    """The gateway before so many emulated accounts; its address and theirs."""
    limits = [{"models": "*", "unit": unit, "bound": _PLENTY} for unit in (_INPUT, _UNCACHED)]
    account = {"provider": "anthropic", "limits": limits, "cache": "prefix"}
    with ExitStack() as stack:
        urls = []
        for _ in range(accounts):
            folder = stack.enter_context(TemporaryDirectory(prefix="bench-stickiness-"))
            program, url = emulator_process(Path(folder), {**BEHAVIOUR, "account": account})
            stack.callback(program.stop)
            urls.append(url)
        product = stack.enter_context(
            Product(
                urls[0],
                apis=2,
                policy=policy(urls, at_once),
                settings={KEY: "measured", **settings},
            )
        )
        gateway = f"http://127.0.0.1:{product.port}"
        await_ready(product.program, gateway)
        yield gateway, urls


async def converse(
    session: aiohttp.ClientSession, url: str, agent: int, turns: int, *, by_lot: bool
) -> tuple[float, int]:
    """One agent's conversation; what it waited in all, in ms, and how many calls failed."""
    random, said, waited_ms, failed = Random(agent), [], 0.0, 0
    system = _text(Random(0), SYSTEM_CHARS)
    for turn in range(turns):
        said.append(_text(random, TURN_CHARS))
        call = drawn("anthropic", MODEL, said, 4096, streamed=True, system=system)
        name = f"{agent} {turn}" if by_lot else f"{agent}"
        headers = {"anthropic-version": "2023-06-01", "x-tidegate-conversation": name}
        async with session.post(url + call.path, json=call.body, headers=headers) as answer:
            await answer.read()
            waited_ms += float(answer.headers.get("x-tidegate-queue-ms", 0))
            failed += answer.status != 200
        said.append(ANSWER)
    return waited_ms, failed


def _text(random: Random, chars: int) -> str:
    return "".join(random.choices("etaoin shrdlu cmfwyp", k=chars))


async def measure(
    gateway: str, urls: Sequence[str], name: str, options: argparse.Namespace, *, by_lot: bool
) -> Conversations:
    controls = [EmulatorControl(url) for url in urls]
    try:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # either API process
        async with aiohttp.ClientSession(connector=connector) as session:
            # On a Valkey that has just begun, unknown processes could hold permits for a lease.
            first = (converse(session, gateway, -agent, 1, by_lot=True) for agent in range(1, 13))
            await asyncio.gather(*first)
            for control in controls:
                await control.reset()
            held = await asyncio.gather(
                *(
                    converse(session, gateway, agent, options.turns, by_lot=by_lot)
                    for agent in range(options.first, options.first + options.agents)
                )
            )
        books = [await control.account() for control in controls]
    finally:
        for control in controls:
            await control.close()
    counted = {_INPUT: 0, _UNCACHED: 0}
    for limit in (limit for book in books for limit in book["limits"]):
        counted[limit["unit"]] += limit["counted"]
    share = 1 - counted[_UNCACHED] / max(1, counted[_INPUT])
    return Conversations(name, share, [waited for waited, _ in held], sum(bad for _, bad in held))


def run(options: argparse.Namespace) -> list[Conversations]:
    at_once: int = options.at_once  # of each account; of the only one, as many together
    plans = (
        ("one account", 1, at_once * ACCOUNTS, False),
        ("three accounts", ACCOUNTS, at_once, False),
        ("three accounts by lot", ACCOUNTS, at_once, True),
    )
    found = []
    for name, accounts, places, by_lot in plans:
        with standing(accounts, places, LOT if by_lot else {}) as (gateway, urls):
            found.append(asyncio.run(measure(gateway, urls, name, options, by_lot=by_lot)))
    return found


def missed(found: Sequence[Conversations]) -> Iterator[str]:
    one, sticky, lot = found
    if sticky.cached < LEAST_CACHED * one.cached:
        yield f"{sticky.cached / one.cached:.1%} of one account's cached tokens"
    longest = max(sticky.waits_ms)
    if longest > max(MOST_WAIT * max(lot.waits_ms), UNNOTICED_MS):
        yield f"a conversation waited {longest:.0f} ms, by lot {max(lot.waits_ms):.0f} ms"
    yield from (f"{each.name}: {each.failed} calls failed" for each in found if each.failed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stickiness", description=__doc__)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--agents", type=int, default=6)
    parser.add_argument("--at-once", type=int, default=2, help="places of each account")
    parser.add_argument("--first", type=int, default=0, help="number of the first agent: its name")
    options = parser.parse_args()
    about = describe("emulated accounts", ["python -m bench.stickiness", *sys.argv[1:]])
    found = run(options)
    print("\n".join(about))
    rows = [
        [
            one.name,
            f"{one.cached:.1%}",
            f"{sum(one.waits_ms) / len(one.waits_ms):.0f}",
            f"{max(one.waits_ms):.0f}",
        ]
        for one in found
    ]
    headers = ("accounts", "of the input cached", "mean wait of a conversation, ms", "longest")
    grid.show([grid.Grid("Agents' conversations over several accounts", headers, rows)])
    lines = list(missed(found))
    for line in lines:
        print(f"missed: {line}")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
