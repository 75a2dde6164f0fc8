"""Emulated GPU server: slots, KV cache and queue; here its size, its speed and its API's variant.

The pace is the measured one of llama.cpp's server with a model of 37 million parameters on one CPU
core: with four slots a prompt of 1,022 tokens takes 1.0 s to process, one of 4,022 takes 7.3 s, and
replies are generated at 169 tokens a second from one slot, 311 from four.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from tidegate.errors import InvalidRequest

Software = Literal["llama.cpp", "vllm", "sglang", "tgi", "ollama"]
Noticing = Literal["late", "at_once", "never"]
SOFTWARE = ("llama.cpp", "vllm", "sglang", "tgi", "ollama")
NOTICING = ("late", "at_once", "never")


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """A GPU server. `software` selects the wording of its messages.

    At most `slots` requests compute concurrently, and together they reserve at most `kv_tokens` of
    the KV cache (None: as much as the slots can use); each has at most `context_tokens` for its
    prompt and its reply. The others wait in the order of their arrival, without a bound and without
    a message; or, with `most_waiting`, until that many wait: then the server is busy.

    A prompt is processed at `read_us` a token and `attend_ns` for each pair of tokens, at most
    `batch_tokens` in one step. Every step adds one token to each reply in progress, and takes
    `step_ms` plus `slot_ms` for each of those. `cache_tokens` of earlier prompts are kept: the
    prefix that a prompt shares with one of them is not processed again. A reply has as many tokens
    as the request allows, or `reply_tokens`.

    `notices` is when a disconnected client is noticed: `late` is at the next piece of a stream that
    has begun, otherwise after `check_ms` without a result for any client. `closes_streams`: the
    connection is closed after each streamed answer, without announcing it. `loading_ms`: how long
    the server only reports that it is loading. `speed` is the speed of its clock.
    """

    software: Software = "llama.cpp"
    slots: int = 4
    context_tokens: int = 8_192
    kv_tokens: int | None = None
    most_waiting: int | None = None
    read_us: float = 694.0
    attend_ns: float = 279.0
    batch_tokens: int = 2_048
    step_ms: float = 3.6
    slot_ms: float = 2.3
    cache_tokens: int = 32_768
    reply_tokens: int = 100
    notices: Noticing = "late"
    check_ms: float = 1_000.0
    closes_streams: bool = True
    loading_ms: float = 0.0
    speed: float = 1.0

    @property
    def most_kv_tokens(self) -> int:
        return self.slots * self.context_tokens if self.kv_tokens is None else self.kv_tokens

    @classmethod
    def parse(cls, value: Any) -> Self | None:
        """Parse JSON, or a name of `software`. Raises InvalidRequest naming the field."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"software": value}
        known_fields("gpu", value, tuple(item.name for item in fields(cls)))
        assert isinstance(value, Mapping)
        software = value.get("software", "llama.cpp")
        usual = cls()
        if software != "llama.cpp":
            usual = replace(usual, notices="at_once", closes_streams=False)
        return replace(usual, **{name: _sound(name, item) for name, item in value.items()})


_BOUNDS: Mapping[str, tuple[float, float]] = {
    "read_us": (0, 1e7),
    "attend_ns": (0, 1e7),
    "step_ms": (0.001, 1e5),
    "slot_ms": (0, 1e5),
    "check_ms": (1, 1e6),
    "loading_ms": (0, 1e8),
    "speed": (0.01, 10_000),
}
_LEAST = {"slots": 1, "context_tokens": 2, "batch_tokens": 1, "reply_tokens": 1}


def _sound(name: str, value: Any) -> Any:
    field = f"gpu.{name}"
    for known, allowed in (("software", SOFTWARE), ("notices", NOTICING)):
        if name == known:
            if value not in allowed:
                raise InvalidRequest(field, f"{field}: {value!r} is none of {', '.join(allowed)}")
            return value
    if name == "closes_streams":
        if not isinstance(value, bool):
            raise InvalidRequest(field, f"{field}: {value!r} is neither true nor false")
        return value
    if name in _BOUNDS:
        return number(field, value, *_BOUNDS[name])
    if value is None and name in ("kv_tokens", "most_waiting"):
        return None
    return whole(field, value, _LEAST.get(name, 0), 10**9)


def number(name: str, value: Any, low: float, high: float) -> float:
    """Return `value` as a number within bounds. Raises InvalidRequest naming the field."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(name, f"{name}: {value!r} is not a number from {low:g} to {high:g}")
    return value


def whole(name: str, value: Any, low: int, high: int) -> int:
    """Return `value` as an int within bounds. Raises InvalidRequest naming the field."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(name, f"{name}: {value!r} is not a whole number from {low} to {high}")
    return value


def known_fields(name: str, table: Any, allowed: tuple[str, ...]) -> None:
    """Raise InvalidRequest unless `table` is an object with only these fields."""
    if not isinstance(table, Mapping):
        raise InvalidRequest(name, f"{name}: {table!r} is not an object")
    if unknown := set(table) - set(allowed):
        raise InvalidRequest(name, f"{name}: {min(unknown)!r} is none of {', '.join(allowed)}")
