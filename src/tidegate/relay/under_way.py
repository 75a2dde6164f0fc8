"""The calls of clients that a process has open, streams and native ones: they come on the record
only once they have ended.

Invariant: a call costs no more here than to be put into a dictionary and taken out again; what is
told of it is read from it when somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Literal

from tidegate.relay.call import Life, NativeCall

MOST_CHARS = 200

Source = Literal["relay", "stream"]


@dataclass(frozen=True, slots=True)
class CallUnderWay:
    """How a call stands. admitted_at: None while it waits, for its first try or for another one.
    pool and limits: what it waits for or has, as far as it has come."""

    request_id: str
    tenant: str
    source: Source
    received_at: datetime
    admitted_at: datetime | None = None
    endpoint: str | None = None
    kind: str | None = None
    model: str | None = None
    upstream: str | None = None
    pool: str = ""
    limits: tuple[str, ...] = ()


Look = Callable[[], CallUnderWay]


class UnderWay:
    """One per process. What is entered is told by the function that is given."""

    def __init__(self) -> None:
        self._calls: dict[object, Look] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"<UnderWay calls={len(self._calls)}>"

    def enter(self, call: object, look: Look) -> None:
        """`call` is known by being itself."""
        self._calls[call] = look

    def leave(self, call: object) -> None:
        self._calls.pop(call, None)

    def oldest(self, most: int) -> list[CallUnderWay]:
        """Those that are here for the longest time, the oldest first."""
        return [look() for look in islice(self._calls.values(), most)]


def look_at(call: NativeCall, life: Life, path: str) -> CallUnderWay:
    """A native call as it stands; `path` is the one that was asked."""
    pool, limits = life.queue
    target = None if life.waits else life.target
    return CallUnderWay(
        request_id=str(call.request_id),
        tenant=call.caller.tenant_id,
        source="relay",
        received_at=call.received_at,
        admitted_at=None if life.waits else life.admitted_at,
        endpoint=shortened(path),
        kind=life.kind.value if life.kind else None,
        model=shortened(life.model if target is None else target.model),
        upstream=target.upstream.name if target else None,
        pool=target.upstream.pool if target else pool,
        limits=limits,
    )


def shortened(text: str | None) -> str | None:
    """A text of a client's, which may be as long as its body."""
    return None if text is None else text[:MOST_CHARS]
