"""Load of self-hosted servers, from their own pages: running and waiting requests, slots.

vLLM, SGLang, TGI and llama.cpp have `/metrics`; llama.cpp also reports its slots in `/props`. The
pages are read only on request, and every few seconds at most: llama.cpp checks for disconnected
clients only after a second without any result, and such a page counts as a result.

Invariants: requests go to the upstream's own origin with its credentials, and are bounded in time
and size; no answer of a server raises an exception.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import orjson
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tidegate.errors import UpstreamError
from tidegate.policy.deployment import Upstream
from tidegate.upstream.transport import RelayWire

_MOST_BYTES = 2_000_000
_FRESH_S = 5.0
_WITHIN_S = 0.5
_RUNNING = (
    "llamacpp:requests_processing",
    "vllm:num_requests_running",
    "sglang:num_running_reqs",
    "tgi_batch_current_size",
)
_WAITING = (
    "llamacpp:requests_deferred",
    "vllm:num_requests_waiting",
    "sglang:num_queue_reqs",
    "tgi_queue_size",
)
_KV_USED = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")
_KV_TOKENS = "sglang:max_total_num_tokens"
_KV_BLOCKS = "vllm:cache_config_info"
_NAMES = (*_RUNNING, *_WAITING, *_KV_USED, _KV_TOKENS, _KV_BLOCKS)
# A negative, infinite, undefined or larger count is ignored.
_MOST_COUNTED = 10**12
_MOST_DIGITS = 12


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """The load that a server reports; None for what it does not report.

    slots: the number of requests that it computes concurrently. kv_tokens: the capacity of its KV
    cache. kv_used: the used fraction of that.
    """

    running: int | None = None
    waiting: int | None = None
    slots: int | None = None
    kv_tokens: int | None = None
    kv_used: float | None = None

    @property
    def is_known(self) -> bool:
        return self != ServerLoad()

    def __str__(self) -> str:
        parts = []
        if self.running is not None:
            of = "" if self.slots is None else f" of {self.slots}"
            parts.append(f"{self.running}{of} at work")
        elif self.slots is not None:
            parts.append(f"{self.slots} at a time")
        if self.waiting is not None:
            parts.append(f"{self.waiting} waiting")
        if self.kv_tokens is not None:
            parts.append(f"a KV cache of {self.kv_tokens:,} tokens")
        if self.kv_used is not None:
            parts.append(f"{self.kv_used:.0%} of it taken")
        return ", ".join(parts)


async def server_load(wire: RelayWire, upstream: Upstream) -> ServerLoad:
    """Read the load of a server. Never raises for anything that the server or the network does."""
    metrics = await _page(wire, upstream, "/metrics")
    load = load_in(metrics.decode("utf-8", "replace"))
    props = await _page(wire, upstream, "/props") if upstream.provider == "llama.cpp" else b""
    if (slots := _slots_in(props)) is not None:
        load = ServerLoad(load.running, load.waiting, slots, load.kv_tokens, load.kv_used)
    return load


class ServerLoads:
    """Loads of all self-hosted servers that a process knows. One object per process."""

    def __init__(self, wire: RelayWire, known: Callable[[], Iterable[Upstream]]) -> None:
        self._wire = wire
        self._known = known
        self._read_at = float("-inf")
        self._loads: Mapping[str, ServerLoad] = {}
        self._reading = asyncio.Lock()

    async def get(self) -> Mapping[str, ServerLoad]:
        """Return loads by the upstream's name, a few seconds old at most. Servers that report
        nothing are left out."""
        async with self._reading:
            if time.monotonic() - self._read_at > _FRESH_S:
                own = [one for one in self._known() if one.is_own]
                found = await asyncio.gather(*(self._read(one) for one in own))
                loads = zip(own, found, strict=True)
                self._loads = {one.name: load for one, load in loads if load.is_known}
                self._read_at = time.monotonic()
        return self._loads

    async def _read(self, upstream: Upstream) -> ServerLoad:
        try:
            async with asyncio.timeout(_WITHIN_S):
                return await server_load(self._wire, upstream)
        except TimeoutError:
            return ServerLoad()


async def _page(wire: RelayWire, upstream: Upstream, path: str) -> bytes:
    """Return a page at the server's own root, beside its API; empty if there is none."""
    dialect, base = next(iter(upstream.base_urls.items()))
    access, at = upstream.access(dialect), urlsplit(base)
    try:
        place = wire.place(f"{at.scheme}://{at.netloc}{path}", access)
        exchange = await wire.open("GET", place, [(b"accept-encoding", b"identity")], None)
        try:
            return await exchange.read(_MOST_BYTES) if exchange.status == 200 else b""
        finally:
            exchange.close()
            await asyncio.sleep(0)
    except UpstreamError:
        return b""


def load_in(metrics: str) -> ServerLoad:
    """Return the load in a page of metrics in Prometheus' format: the sum over models or ranks, and
    for the KV cache the fullest one."""
    found: dict[str, list[Sample]] = {}
    for sample in _samples(metrics):
        if 0 <= sample.value <= _MOST_COUNTED:  # false for NaN
            found.setdefault(sample.name, []).append(sample)
    used = [sample.value for name in _KV_USED for sample in found.get(name, ())]
    return ServerLoad(
        running=_sum_of_one(found, _RUNNING),
        waiting=_sum_of_one(found, _WAITING),
        kv_tokens=_kv_tokens(found),
        kv_used=max(used, default=None),
    )


def _samples(metrics: str) -> Iterator[Sample]:
    """Yield the samples of the metrics that are read here. Pages are long, so other lines are not
    parsed; a line that cannot be parsed is skipped."""
    for line in metrics.splitlines():
        if line.startswith(_NAMES):
            with suppress(ValueError, KeyError, IndexError):  # not a sample, or another format
                for family in text_string_to_metric_families(line + "\n"):
                    yield from family.samples


def _sum_of_one(found: Mapping[str, list[Sample]], names: tuple[str, ...]) -> int | None:
    for name in names:
        if name in found:
            return round(sum(sample.value for sample in found[name]))
    return None


def _kv_tokens(found: Mapping[str, list[Sample]]) -> int | None:
    if _KV_TOKENS in found:
        return round(sum(sample.value for sample in found[_KV_TOKENS]))
    tokens = 0
    for sample in found.get(_KV_BLOCKS, ()):
        blocks, size = sample.labels.get("num_gpu_blocks", ""), sample.labels.get("block_size", "")
        if all(one.isdecimal() and len(one) <= _MOST_DIGITS for one in (blocks, size)):
            tokens += int(blocks) * int(size)
    return tokens if 0 < tokens <= _MOST_COUNTED else None


def _slots_in(props: bytes) -> int | None:
    try:
        value = orjson.loads(props)
    except orjson.JSONDecodeError:
        return None
    slots = value.get("total_slots") if isinstance(value, dict) else None
    return slots if type(slots) is int and 0 < slots <= _MOST_COUNTED else None
