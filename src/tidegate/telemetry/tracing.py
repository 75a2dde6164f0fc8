"""Trace context of a call: its parent, and the span ids of its attempts upstream. Pure.

W3C Trace Context, https://www.w3.org/TR/trace-context/. A `Trail` collects while the call runs;
`tidegate.metrics.otel` makes the spans after its end.

Invariant: without a collector nothing is made up: a client's own traceparent goes on to the
upstream as it came, and where a client gives none, nothing does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from os import urandom
from urllib.parse import urlsplit
from uuid import UUID

from tidegate.errors import UpstreamError

HEADER = b"traceparent"
_SHAPE = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
_LONGEST = 55
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class Parent:
    """What a traceparent says: ids as numbers, and whether its trace is recorded."""

    trace_id: int
    span_id: int
    sampled: bool
    text: str


def parent_of(text: str | None) -> Parent | None:
    """None for what is no traceparent; of a later version what is known of it."""
    if text is None:
        return None
    found = _SHAPE.match(text.strip())
    if found is None or found["version"] == "ff":
        return None
    rest = text.strip()[_LONGEST:]
    if rest and (found["version"] == "00" or not rest.startswith("-")):
        return None
    trace_id, span_id = int(found["trace"], 16), int(found["span"], 16)
    if not trace_id or not span_id:
        return None
    return Parent(trace_id, span_id, bool(int(found["flags"], 16) & _SAMPLED), found[0])


def parent_in(headers: Iterable[tuple[bytes, bytes]]) -> Parent | None:
    """Of a request's headers, whose names are in lower case."""
    for name, value in headers:
        if name == HEADER:
            return parent_of(value.decode("latin-1"))
    return None


@dataclass(slots=True)
class Try:
    """One call upstream. Times are in ns since 1970; ended_ns is 0 while it runs. address: host and
    port. status: of its HTTP answer, 0 without one. code: of the error, None where it worked."""

    span_id: int
    began_ns: int
    upstream: str
    model: str
    address: str = ""
    ended_ns: int = 0
    status: int = 0
    code: str | None = None


@dataclass(slots=True)
class Trail:
    """A call in its trace. recorded: spans will be made of it; else it only passes on what its
    parent said."""

    trace_id: int
    span_id: int
    parent: Parent | None
    recorded: bool
    tries: list[Try] = field(default_factory=list)

    @property
    def trace(self) -> str:
        """The trace's id, as it stands in logs."""
        return f"{self.trace_id:032x}"

    def begin(self, upstream: str, model: str, address: str = "") -> str:
        """A try begins; returns the traceparent that goes with it."""
        if not self.recorded:
            return self.parent.text if self.parent is not None else self._as(self.span_id)
        one = Try(_new_span_id(), time.time_ns(), upstream, model, address)
        self.tries.append(one)
        return self._as(one.span_id)

    def end(self, error: UpstreamError | None, *, worked: bool, status: int = 0) -> None:
        """The last try has ended: it worked, failed by `error`, or was called off."""
        if self.tries:
            one = self.tries[-1]
            one.ended_ns = time.time_ns()
            one.status = status or (0 if error is None else error.status or 0)
            one.code = None if worked else "cancelled" if error is None else error.code

    def _as(self, span_id: int) -> str:
        return f"00-{self.trace_id:032x}-{span_id:016x}-{int(self.recorded):02x}"


Sampler = Callable[[int, Parent | None], bool]


class Tracing:
    """One per process. `sampler` says which traces are recorded; without one, none is."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._sampler = sampler
        self.on = sampler is not None

    def trail(self, request_id: UUID, parent: Parent | None) -> Trail | None:
        """Of a request; the same wherever it is asked for. None where there is nothing to pass on
        and nothing to record."""
        if self._sampler is None and parent is None:
            return None
        trace_id = request_id.int if parent is None else parent.trace_id
        recorded = self._sampler is not None and self._sampler(trace_id, parent)
        # A UUIDv7's last 64 bits are random but for two, of which one is set: never zero.
        return Trail(trace_id, request_id.int & 0xFFFF_FFFF_FFFF_FFFF, parent, recorded)


def address_of(url: str) -> str:
    """Host and port of a URL, as a `Try` has them."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _new_span_id() -> int:
    return int.from_bytes(urandom(8), "big") or 1
