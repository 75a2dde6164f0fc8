"""Schedule of a GPU server: who computes, who waits, how long each step takes. Pure.

Time is that of the server's own clock, in seconds, and is always an argument. As in llama.cpp, the
requests of a step advance together: a step that processes a long prompt delays all replies.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tidegate.emulator.gpu import GpuSpec

CHARS_PER_TOKEN = 4


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
