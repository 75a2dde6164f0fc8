"""What one worker process is told, as JSON on its command line."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Orders:
    """One worker of `workers`, with `tasks` tasks that each acquire, make a call, and release.

    adapter: a module of `bench.peers`. log: the file of `CallLog`. window_ms: the limit is a rate
    of `bound` in so long a window; 0 means that it is a concurrency. jitter_ms: a call begins up to
    so much later than it was admitted. options: for the adapter.
    rounds: instead of calls, one task acquires and releases so often, and the time is printed.
    """

    adapter: str
    url: str
    log: str
    bound: int
    tasks: int
    call_ms: float
    number: int = 0
    workers: int = 4
    threads: bool = False
    uvloop: bool = True
    lease_ms: int = 3000
    window_ms: int = 0
    jitter_ms: int = 0
    vary: float = 0.0
    rounds: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def call_s(self) -> float:
        """How long the next call takes."""
        if not self.vary:
            return self.call_ms / 1000
        return self.call_ms / 1000 * random.uniform(1 - self.vary, 1 + self.vary)

    @property
    def part_of_bound(self) -> int:
        """This worker's part when the bound is dealt out to all."""
        return self.bound // self.workers + (self.number < self.bound % self.workers)
