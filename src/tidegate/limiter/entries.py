"""What a process keeps of its waiters and permits, and what one call of the script carries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from tidegate.limiter.flow import Flow


@dataclass(slots=True, eq=False)
class Waiter:
    """A ticket in the queue. `deadline_ms` and `asked_ms` are of the lease's clock; `member` is the
    ticket as the server keeps it; `stamp` its place there, 0 while unknown. `once`: it takes the
    first answer for its last."""

    ticket: int
    flow: Flow
    member: str
    hard_ms: int
    cost_ms: int
    asked_ms: float
    deadline_ms: float
    future: asyncio.Future[Holding]
    once: bool = False
    sent: bool = False
    stamp: int = 0

    @property
    def amounts(self) -> str:
        return self.member.rpartition("|")[2]


@dataclass(slots=True, eq=False)
class Holding:
    """A permit in use. `admitted_ms` is when the server let it in, at the earliest; `on_fence`
    cancels the body that uses it."""

    ticket: int
    flow: Flow
    epoch: int
    seq: int
    cost_ms: int
    held_from_ms: float
    admitted_ms: float
    hard_until_ms: float
    waited_ms: float
    fenced: bool = False
    on_fence: Callable[[], None] | None = None

    def hard_left_ms(self, now_ms: float) -> int:
        return max(1, int(self.hard_until_ms - now_ms))


@dataclass(slots=True)
class Release:
    """A permit given back. `sent` once it has been in a batch, which may have arrived."""

    ticket: int
    flow: Flow
    epoch: int
    seq: int
    outcome: int
    took_ms: int
    actual: str
    sent: bool = False


# Not frozen, as all else of its kind: each call would pay for that.
@dataclass(slots=True)
class Transfer:
    """A permit passed on inside the process: what the server counts under `source` is `heir`'s.
    The call before ended by `outcome` after `took_ms`. Nobody changes it."""

    source: int
    heir: Holding
    member: str
    outcome: int
    took_ms: int


@dataclass(slots=True)
class Batch:
    """What one call of the script carries; kept until it is known to have arrived."""

    joining: bool = False
    held: list[Holding] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    settles: list[tuple[int, str]] = field(default_factory=list)
    cancels: list[tuple[int, Flow | None, str]] = field(default_factory=list)
    enqueues: list[Waiter] = field(default_factory=list)

    def __len__(self) -> int:
        said = len(self.transfers) + len(self.releases) + len(self.settles)
        return said + len(self.cancels) + len(self.enqueues)


@dataclass(slots=True)
class Counts:
    """How often things happened since the start; the tests' and benchmarks' ground."""

    admitted: int = 0
    handed_on: int = 0
    recycled: int = 0
    local: int = 0
    strays: int = 0
    fenced: int = 0


@dataclass(slots=True)
class Traffic:
    """Counts since the start."""

    syncs: int = 0
    failures: int = 0
    pushes: int = 0
    joins: int = 0
