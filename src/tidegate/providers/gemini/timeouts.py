"""How long the provider may take. Owns the names of the phases of an upstream call."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.errors import UpstreamTimeout


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Bounds of one upstream call. connect: until the request is sent (TLS included); first_byte:
    from sending to the first byte of the answer's body; idle: between two pieces of it; total: all
    of it, and the only one that counts time spent waiting for a slow sink.
    """

    connect_ms: int
    first_byte_ms: int
    idle_ms: int
    total_ms: int

    def of(self, phase: str) -> int:
        """The limit of `connect`, `first_byte`, `idle` or `total`, in ms."""
        limits = {
            "connect": self.connect_ms,
            "first_byte": self.first_byte_ms,
            "idle": self.idle_ms,
            "total": self.total_ms,
        }
        return limits[phase]

    def ran_out(self, phase: str) -> UpstreamTimeout:
        return out_of_time(phase, self.of(phase))


def out_of_time(phase: str, limit_ms: int) -> UpstreamTimeout:
    return UpstreamTimeout(f"the provider took longer than {limit_ms} ms ({phase})", phase=phase)
