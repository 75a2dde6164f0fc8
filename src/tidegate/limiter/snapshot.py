"""What can be seen of a pool: the whole of it by asking Valkey, this process's part without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tidegate.limiter.observer import State


@dataclass(frozen=True, slots=True)
class LimitView:
    """One limit over all processes. `used` counts permits held, `lapsing` included."""

    limit: str
    bound: int
    used: int
    waiting: int
    lapsing: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A pool as Valkey sees it. `recovering_ms` is the quiet time left after a loss."""

    limits: Mapping[str, LimitView]
    sessions: int
    epoch: int
    revision: int
    recovering_ms: int
    state: State


@dataclass(frozen=True, slots=True)
class LocalState:
    """This process alone. `silent_ms` since Valkey last confirmed our session; inf for never."""

    state: State
    held: Mapping[str, int]
    waiting: Mapping[str, int]
    silent_ms: float
    sessions: int
    revision: int
