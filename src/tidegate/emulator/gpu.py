"""GPU server under emulation: its size and speed, and who computes, who waits, how long. Pure.

The pace is the measured one of llama.cpp's server with a model of 37 million parameters on one CPU
core: with four slots a prompt of 1,022 tokens takes 1.0 s to process, one of 4,022 takes 7.3 s, and
replies are generated at 169 tokens a second from one slot, 311 from four.

Time is that of the server's own clock, in seconds, and is always an argument. As in llama.cpp, the
requests of a step advance together: a step that processes a long prompt delays all replies.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

from tidegate.errors import InvalidRequest

CHARS_PER_TOKEN = 4
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


class ServerBusy(Exception):
    """The bound on waiting requests is reached."""


class ContextExceeded(Exception):
    """A prompt that does not fit into a slot."""


@dataclass(slots=True, eq=False)
class Work:
    """A request. `is_lost` returns whether its client has disconnected; `changed` is called at each
    change.

    `made_tokens` of the reply are generated; it is `done` when all are, or when it was `dropped`.
    """

    prompt: str
    input_tokens: int
    reply_tokens: int
    streamed: bool
    arrived_s: float
    is_lost: Callable[[], bool]
    changed: Callable[[], None]
    cached_tokens: int = 0
    read_tokens: int = 0
    made_tokens: int = 0
    dropped: bool = False
    first_token_s: float | None = None

    @property
    def is_read(self) -> bool:
        return self.read_tokens >= self.input_tokens

    @property
    def done(self) -> bool:
        return self.dropped or self.made_tokens >= self.reply_tokens

    @property
    def kv_tokens(self) -> int:
        """Return the tokens that it reserves in the KV cache."""
        return self.input_tokens + self.reply_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the server: the tokens processed of each prompt, and the replies that get a
    token."""

    duration_s: float
    reads: tuple[tuple[Work, int], ...]
    writes: tuple[Work, ...]


@dataclass(slots=True)
class ServerCounts:
    """Totals since the start, as the server's own metrics report them."""

    requests: int = 0
    refused: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    made_tokens: int = 0
    dropped: int = 0
    most_waiting: int = 0


@dataclass(slots=True)
class Schedule:
    """The state of the server. `running` are in the order in which they got their slots."""

    spec: GpuSpec
    running: list[Work] = field(default_factory=list)
    waiting: deque[Work] = field(default_factory=deque)
    counts: ServerCounts = field(default_factory=ServerCounts)
    _last_result_s: float = 0.0
    _prompts: OrderedDict[str, int] = field(default_factory=OrderedDict)  # the oldest first
    _prompts_tokens: int = 0

    @property
    def kv_tokens(self) -> int:
        return sum(work.kv_tokens for work in self.running)

    def add(self, work: Work) -> None:
        """Enqueue a request, and start it if there is a slot. Raises ContextExceeded and
        ServerBusy."""
        if work.input_tokens >= self.spec.context_tokens:
            raise ContextExceeded
        room = self.spec.context_tokens - work.input_tokens
        work.reply_tokens = min(work.reply_tokens, room)
        if work.kv_tokens > self.spec.most_kv_tokens:
            raise ContextExceeded
        self.waiting.append(work)
        self._start_next()
        bound = self.spec.most_waiting
        if bound is not None and len(self.waiting) > bound:
            self.waiting.pop()
            self.counts.refused += 1
            raise ServerBusy
        self.counts.requests += 1
        self.counts.most_waiting = max(self.counts.most_waiting, len(self.waiting))

    def next_step(self) -> Step | None:
        """Return the next step; None if there is nothing to do."""
        self._start_next()
        if not self.running:
            return None
        spec, room = self.spec, self.spec.batch_tokens
        writes = tuple(work for work in self.running if work.is_read)
        reads: list[tuple[Work, int]] = []
        duration_s = (spec.step_ms + spec.slot_ms * len(writes)) / 1e3
        for work in self.running:
            if work.is_read or not room:
                continue
            count = min(room, work.input_tokens - work.read_tokens)
            room -= count
            reads.append((work, count))
            end = work.read_tokens + count
            pairs = end * end - work.read_tokens * work.read_tokens
            duration_s += count * spec.read_us / 1e6 + pairs * spec.attend_ns / 1e9
        return Step(duration_s, tuple(reads), writes)

    def finish(self, step: Step, now_s: float) -> None:
        """Apply the results of a step; drop requests whose clients are seen to have
        disconnected."""
        for work in step.writes:
            if not work.dropped:  # dropped while the step ran
                self._made_token(work, now_s)
        for work, count in step.reads:
            if work.dropped:
                continue
            work.read_tokens += count
            self.counts.read_tokens += count
            if work.is_read:
                self._keep_prompt(work)
                self._made_token(work, now_s)
        self.drop_lost(now_s)
        self._start_next()

    def _made_token(self, work: Work, now_s: float) -> None:
        work.made_tokens += 1
        self.counts.made_tokens += 1
        if work.first_token_s is None:
            work.first_token_s = now_s
        if work.streamed or work.done:
            self._last_result_s = now_s
        if work.done:
            self.running.remove(work)
        work.changed()

    def drop_lost(self, now_s: float) -> None:
        """Free the slots of requests whose clients are seen to have disconnected."""
        for work in (*self.running, *self.waiting):
            if self._notices(work, now_s) and work.is_lost():
                self.drop(work)

    def drop(self, work: Work) -> None:
        """End a request now. Idempotent."""
        if work.done:
            return
        work.dropped = True
        self.counts.dropped += 1
        if work in self.running:
            self.running.remove(work)
        else:
            self.waiting.remove(work)
        work.changed()
        self._start_next()

    def _notices(self, work: Work, now_s: float) -> bool:
        if self.spec.notices != "late":
            return self.spec.notices == "at_once"
        if work.streamed and work.made_tokens:
            return True  # noticed by the piece that cannot be sent
        since_s = max(self._last_result_s, work.arrived_s)
        return (now_s - since_s) * 1e3 >= self.spec.check_ms

    def _start_next(self) -> None:
        """Start waiting requests in order: one that does not fit blocks all later ones."""
        while self.waiting and len(self.running) < self.spec.slots:
            work = self.waiting[0]
            if self.running and self.kv_tokens + work.kv_tokens > self.spec.most_kv_tokens:
                return
            self.running.append(self.waiting.popleft())
            work.cached_tokens = work.read_tokens = self._cached_tokens(work)
            self.counts.cached_tokens += work.cached_tokens

    def _cached_tokens(self, work: Work) -> int:
        """Return the cached tokens of a prompt. At least one token is processed, since its result
        is needed."""
        longest = max((_common_chars(work.prompt, one) for one in self._prompts), default=0)
        return min(longest // CHARS_PER_TOKEN, work.input_tokens - 1)

    def _keep_prompt(self, work: Work) -> None:
        if not self.spec.cache_tokens:
            return
        self._prompts_tokens -= self._prompts.pop(work.prompt, 0)
        self._prompts[work.prompt] = work.input_tokens
        self._prompts_tokens += work.input_tokens
        while self._prompts_tokens > self.spec.cache_tokens:
            _, tokens = self._prompts.popitem(last=False)
            self._prompts_tokens -= tokens


def _common_chars(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
