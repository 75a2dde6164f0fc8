"""Emulated GPU server: slots, KV cache and queue; here its size, its speed and its API's variant.

The pace is that of llama.cpp's server with a model of 37 million parameters on one core of a
processor, as measured: with four slots a prompt of 1,022 tokens takes 1.0 s to read, one of 4,022
takes 7.3 s, and replies come at 169 tokens a second from one slot, 311 from four.
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
    """A GPU server. `software` is whose words it uses.

    At most `slots` requests compute at the same time, and together they reserve at most `kv_tokens`
    of the KV cache (None: as much as the slots can use); each has at most `context_tokens` for its
    prompt and its reply. The others wait in the order of their arrival: without a bound and in
    silence, or, with `most_waiting`, until that many wait; then it is busy.

    One prompt is read at `read_us` a token and `attend_ns` for each pair of tokens, at most
    `batch_tokens` in one step; every step adds one token to each reply that is being written, and
    takes `step_ms` and `slot_ms` for each of those. `cache_tokens` of old prompts are kept: what a
    prompt has in common with one of them, from its beginning, is not read again. A reply has as
    many tokens as the request allows, or `reply_tokens`.

    `notices` is when a client that has left is noticed: `late` is at the next piece of a stream
    that has begun, else once `check_ms` have passed without a result for anybody. `closes_streams`:
    the connection is closed behind each streamed answer, without a word of it. `loading_ms`: so
    long it only says that it is loading. `speed` is how much faster its clock runs.
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
        """From JSON, or a name of `software`; raises InvalidRequest naming the field."""
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
    """`value` as a number within bounds; raises InvalidRequest naming the field."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(name, f"{name}: {value!r} is not a number from {low:g} to {high:g}")
    return value


def whole(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int within bounds; raises InvalidRequest naming the field."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(name, f"{name}: {value!r} is not a whole number from {low} to {high}")
    return value


def known_fields(name: str, table: Any, allowed: tuple[str, ...]) -> None:
    """Raises InvalidRequest unless `table` is an object with none but these fields."""
    if not isinstance(table, Mapping):
        raise InvalidRequest(name, f"{name}: {table!r} is not an object")
    if unknown := set(table) - set(allowed):
        raise InvalidRequest(name, f"{name}: {min(unknown)!r} is none of {', '.join(allowed)}")
