"""What the limiter tells its host: small callbacks, called on the loop, which must not block."""

from __future__ import annotations

from typing import Literal

State = Literal["up", "away", "recovering"]


class Observer:
    """Derive from it and override what you need; every method does nothing by default."""

    def state_changed(self, old: State, new: State) -> None:
        """Valkey went away, came back, or is quiet for a lease after a loss."""

    def fenced(self, held: int) -> None:
        """Our session is gone: `held` running calls were cancelled."""

    def recovered(self, epoch: int) -> None:
        """We joined a new epoch of the pool and told it what we hold."""

    def admitted(self, limit: str, waited_ms: float) -> None:
        """A waiter got its permit."""

    def refused(self, limit: str, code: str) -> None:
        """A waiter was told no; `code` is that of the error."""

    def synced(self, took_ms: float, entries: int) -> None:
        """One call of the script returned."""
