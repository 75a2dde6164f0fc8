"""Diagnostics of a pool's server, and the removal of a pool.

`examine` joins no pool and writes nothing. `forget_pool` removes all keys of a pool, as an empty
restart would; living processes join again. It computes the names of the keys instead of scanning.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from uuid import uuid4

import msgpack
from redis.exceptions import RedisError

from tidegate.errors import ConfigError, LimiterUnavailable
from tidegate.limiter._compat import close_now
from tidegate.limiter.connection import Link, LinkDown
from tidegate.limiter.flow import flow_of
from tidegate.limiter.messages import SHAPES, Keyspace, load, pack
from tidegate.limiter.policy import PoolPolicy
from tidegate.limiter.topology import Server
from tidegate.limiter.views import Snapshot, read_pool

_ANSWER_S = 2.0
_PINGS = 21
_LOOK_AGAIN_S = 0.05
# Commands that connections send themselves, outside of scripts.
_OWN = ("client|setinfo", "ping", "info", "ssubscribe")
_CALL = re.compile(r"\bp?call\(\s*'(\w+)'(?:,\s*'(SHARDNUMSUB)')?")


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a check of a pool's server found.

    facts: fields of INFO. round_trip_ms: a median. clock_ahead_ms: how far the server's clock is
    ahead of ours, to the precision of a round trip. denied: commands that the limiter needs and
    this user may not run. pushes: "" if sharded publish and subscribe work, else the reason.
    snapshot: the pool, or None if scripts do not run, with the reason in `unread`.
    """

    facts: dict[str, str]
    round_trip_ms: float
    clock_ahead_ms: float
    denied: tuple[str, ...]
    pushes: str
    snapshot: Snapshot | None
    unread: str


@cache
def commands() -> tuple[str, ...]:
    """Return every command that the limiter runs, as `command` or `command|subcommand`."""
    found = set(_OWN)
    scripts = files("tidegate.limiter").joinpath("lua")
    for part in (*scripts.iterdir(), *scripts.joinpath("lib").iterdir()):
        if not part.name.endswith(".lua"):
            continue
        for command, inner in _CALL.findall(part.read_text(encoding="utf-8")):
            found.add(f"{command}|{inner}".lower() if inner else command.lower())
    return tuple(sorted(found))


def check_server_url(variable: str, url: str) -> None:
    """Raise ConfigError, which names `variable`, for an invalid URL. Does no I/O."""
    try:
        Server(url, Keyspace("check").meta)
    except ConfigError as error:
        raise ConfigError(variable, error.value, error.allowed) from None


async def examine(url: str, pool: str) -> ServerReport:
    """Check the server of `pool`.

    Raises LimiterUnavailable if it does not answer, and ConfigError for an invalid URL or a server
    that may evict permits.
    """
    keys = Keyspace(pool)
    link = Link(url, keys.meta)
    try:
        raw = await link.command(("INFO",), _ANSWER_S)
        round_trip_ms, ahead_ms = await _clocks(link)
        denied, unread, snapshot = await _scripts(link, keys)
        return ServerReport(
            facts=_facts(raw),
            round_trip_ms=round_trip_ms,
            clock_ahead_ms=ahead_ms,
            denied=denied,
            pushes=await _pushes(url, link, keys),
            snapshot=snapshot,
            unread=unread,
        )
    except LinkDown as down:
        why = "not in time" if isinstance(down.__cause__, TimeoutError) else str(down)
        raise LimiterUnavailable("Valkey does not answer", limit="", reason=why) from down
    finally:
        await link.aclose()


async def look_until(
    url: str, pool: str, condition: Callable[[Snapshot], bool], within_s: float
) -> Snapshot:
    """Return the pool as soon as `condition` returns True for it, or its state after `within_s`.

    Raises LimiterUnavailable if it could not be read at all, and ConfigError as `examine`.
    """
    keys, until = Keyspace(pool), time.monotonic() + within_s
    link, found = Link(url, keys.meta), None
    try:
        while (left_s := until - time.monotonic()) > 0:
            found = await read_pool(_inspecting(link, keys, left_s), "up")
            if condition(found):
                break
            await asyncio.sleep(min(_LOOK_AGAIN_S, left_s))
    except LinkDown as down:
        if found is None:
            why = str(down)
            raise LimiterUnavailable("Valkey does not answer", limit="", reason=why) from down
    finally:
        await link.aclose()
    if found is None:
        raise LimiterUnavailable("no time was left to query Valkey", limit="")
    return found


def _inspecting(link: Link, keys: Keyspace, within_s: float) -> Callable[[bytes], Awaitable[bytes]]:
    """Return a function that runs `inspect` over a link."""

    async def run(request: bytes) -> bytes:
        return await link.run(load("inspect"), (keys.meta, keys.layout), request, within_s)

    return run


def _facts(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


async def _clocks(link: Link) -> tuple[float, float]:
    """Return the median round trip and how far the server's clock is ahead, both in ms."""
    trips, offsets = [], []
    for _ in range(_PINGS):
        began, began_at = time.perf_counter(), time.time()
        await link.command(("PING",), _ANSWER_S)
        trips.append((time.perf_counter() - began) * 1000)
        with suppress(LinkDown):  # reported with the other denied commands
            began_at = time.time()
            seconds, micros = await link.command(("TIME",), _ANSWER_S)
            middle = (began_at + time.time()) / 2
            offsets.append((int(seconds) + int(micros) / 1e6 - middle) * 1000)
    return statistics.median(trips), statistics.median(offsets) if offsets else 0.0


async def _scripts(link: Link, keys: Keyspace) -> tuple[tuple[str, ...], str, Snapshot | None]:
    """Return denied commands, the reason why the pool cannot be read, and the pool."""
    try:
        packed = pack({"commands": list(commands())})
        answer = await link.run(load("acl"), (keys.meta,), packed, _ANSWER_S)
    except LinkDown as refused:
        return (), str(refused), None
    denied = tuple(msgpack.unpackb(answer))
    try:
        return denied, "", await read_pool(_inspecting(link, keys, _ANSWER_S), "up")
    except LinkDown as refused:
        return denied, str(refused), None


async def _pushes(url: str, link: Link, keys: Keyspace) -> str:
    """Return "" if a message published to our channel arrives, as grants do; else the reason."""
    channel = keys.channel(f"doctor-{uuid4().hex}")
    try:
        connection = await Server(url, channel).connect(_ANSWER_S)
    except (OSError, TimeoutError, RedisError) as failed:
        return f"no second connection: {failed}"
    try:
        async with asyncio.timeout(_ANSWER_S):
            await connection.send_command("SSUBSCRIBE", channel, check_health=False)
            await connection.read_response()
            receivers = await link.command(("SPUBLISH", channel, "doctor"), _ANSWER_S)
            message = await connection.read_response()
        return "" if receivers == 1 and message[2] == b"doctor" else "the message did not come back"
    except (OSError, TimeoutError, RedisError, LinkDown) as failed:
        return str(failed) or "no answer in time"
    finally:
        close_now(connection)


_DEADLINE_S = 2.0


async def forget_pool(
    url: str, pool: str, policy: PoolPolicy, *, sids: Iterable[str], tenants: Iterable[str]
) -> int:
    """Remove every key of a pool whose waiters need one limit each; return how many there were.

    These are the keys of its limits, and of the given sessions and tenants. Raises
    LimiterUnavailable.
    """
    keys = Keyspace(pool)
    link = Link(url, keys.meta)
    names = sorted(_names(keys, policy, list(sids), list(tenants)))
    try:
        return int(await link.command(("UNLINK", *names), _DEADLINE_S))
    except LinkDown as error:
        raise LimiterUnavailable(str(error), limit="", retry_after_ms=1000) from error
    finally:
        await link.aclose()


def _names(keys: Keyspace, policy: PoolPolicy, sids: list[str], tenants: list[str]) -> set[str]:
    """Return all key names that the shapes in `messages.py` can take."""
    bands = range(1, len(policy.bands) + 1)
    of_band = [f"{limit}|{band}" for limit, band in product(policy.limits, bands)]
    flows = [flow_of(band, tenant, (limit,))
             for band, tenant, limit in product(bands, tenants, policy.limits)]  # fmt: skip
    endings: dict[str, Iterable[str]] = {
        "park:": of_band,
        "past:": of_band,
        "progress:": of_band,
        "line:": [f"{one}|{tenant}" for one, tenant in product(of_band, tenants)],
        **dict.fromkeys(("log:", "rate:", "quota:", "charged:"), policy.limits),
        **dict.fromkeys(("session:", "owed:", "note:", "stalled:"), sids),
        "queue:": [f"{sid}|{flow}" for sid, flow in product(sids, flows)],
    }
    found = {keys.layout}
    for shape in SHAPES:
        if shape.name != "layout":
            found |= {f"{keys.prefix}{shape.name}{end}" for end in endings.get(shape.name, ("",))}
    return found
