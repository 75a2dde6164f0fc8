"""Trace context of a call: its parent, the span ids of its attempts, and the collector.

W3C Trace Context, https://www.w3.org/TR/trace-context/. A `Trail` collects data while the call
runs; `tidegate.metrics.otel` makes the spans after its end.

Invariant: without a collector no ids are generated: a client's own traceparent is forwarded to the
upstream unchanged, and without one none is sent.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import urandom
from pathlib import Path
from urllib.parse import unquote, urlsplit
from uuid import UUID

from tidegate.errors import ConfigError, UpstreamError
from tidegate.settings import from_dotenv

HEADER = b"traceparent"
_SHAPE = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
_LONGEST = 55
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class Parent:
    """A parsed traceparent: its ids as numbers, and whether its trace is recorded."""

    trace_id: int
    span_id: int
    sampled: bool
    text: str


def parent_of(text: str | None) -> Parent | None:
    """Parse a traceparent; None if it is invalid. Of a later version the known fields are read."""
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
    """Return the parent in a request's headers, whose names are in lower case."""
    for name, value in headers:
        if name == HEADER:
            return parent_of(value.decode("latin-1"))
    return None


@dataclass(slots=True)
class Try:
    """An upstream call. Times are in ns since 1970; ended_ns is 0 while it runs. address: host and
    port. status: of its HTTP answer, 0 without one. code: of the error, None on success."""

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
    """A call in its trace. recorded: spans are made of it; otherwise only its parent is forwarded.
    None if this is decided at its end: for a job that ends in the database."""

    trace_id: int
    span_id: int
    parent: Parent | None
    recorded: bool | None
    tries: list[Try] = field(default_factory=list)

    @classmethod
    def of(cls, request_id: UUID, parent: Parent | None, recorded: bool | None = None) -> Trail:
        """Return the trail of a request; the same in every process."""
        trace_id = request_id.int if parent is None else parent.trace_id
        # The last 64 bits of a UUIDv7 are random except two, of which one is set: never zero.
        return cls(trace_id, request_id.int & 0xFFFF_FFFF_FFFF_FFFF, parent, recorded)

    @property
    def trace(self) -> str:
        """Return the trace's id as in logs."""
        return f"{self.trace_id:032x}"

    def begin(self, upstream: str, model: str, address: str = "") -> str:
        """Begin an attempt and return its traceparent."""
        if not self.recorded:
            return self.parent.text if self.parent is not None else self._as(self.span_id)
        one = Try(_new_span_id(), time.time_ns(), upstream, model, address)
        self.tries.append(one)
        return self._as(one.span_id)

    def end(self, error: UpstreamError | None, *, worked: bool, status: int = 0) -> None:
        """End the last attempt: it worked, failed with `error`, or was cancelled."""
        if self.tries:
            one = self.tries[-1]
            one.ended_ns = time.time_ns()
            one.status = status or (0 if error is None else error.status or 0)
            one.code = None if worked else "cancelled" if error is None else error.code

    def _as(self, span_id: int) -> str:
        return f"00-{self.trace_id:032x}-{span_id:016x}-{int(bool(self.recorded)):02x}"


Sampler = Callable[[int, Parent | None], bool]


class Tracing:
    """Decides which calls are traced; one object per process. `sampler` selects the recorded
    traces; without one, none is recorded."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._sampler = sampler
        self.on = sampler is not None

    def trail(self, request_id: UUID, parent: Parent | None) -> Trail | None:
        """Return the trail of a request, always the same; None if there is nothing to forward and
        nothing to record."""
        if self._sampler is None and parent is None:
            return None
        trail = Trail.of(request_id, parent, False)
        if self._sampler is not None:
            trail.recorded = self._sampler(trail.trace_id, parent)
        return trail


def address_of(url: str) -> str:
    """Return host and port of a URL, as in a `Try`."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _new_span_id() -> int:
    return int.from_bytes(urandom(8), "big") or 1


_OTEL = "OTEL_"
_EXPORTERS = ("OTEL_EXPORTER_OTLP", "OTEL_EXPORTER_OTLP_TRACES", "OTEL_EXPORTER_OTLP_METRICS")
_OFF = "OTEL_SDK_DISABLED"
_COUNTS = (
    *("OTEL_BSP_SCHEDULE_DELAY", "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
    *("OTEL_BSP_EXPORT_TIMEOUT", "OTEL_METRIC_EXPORT_INTERVAL", "OTEL_METRIC_EXPORT_TIMEOUT"),
)
_LIMITS = (
    *("OTEL_ATTRIBUTE_COUNT_LIMIT", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT"),
    *("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"),
    *("OTEL_SPAN_EVENT_COUNT_LIMIT", "OTEL_SPAN_LINK_COUNT_LIMIT"),
    *("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT"),
)
_SAMPLER = "OTEL_TRACES_SAMPLER"
_SAMPLERS = ("always_on", "always_off", "traceidratio")
_CHOICES = {
    _OFF: ("true", "false"),
    _SAMPLER: (*_SAMPLERS, *(f"parentbased_{one}" for one in _SAMPLERS)),
    "OTEL_METRICS_EXEMPLAR_FILTER": ("always_on", "always_off", "trace_based"),
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": ("cumulative", "delta", "lowmemory"),
}
_MOST_QUEUED, _MOST_SENT = 2_048, 512  # the usual sizes of the queue and of an export
_LONGEST_SHOWN = 200


def collector_variables(dotenv: Path = Path(".env")) -> dict[str, str]:
    """Return OpenTelemetry's variables: from the environment, otherwise from `.env`. Raises
    ConfigError."""
    written = from_dotenv(dotenv)
    return {
        name: value for name, value in {**written, **os.environ}.items() if name.startswith(_OTEL)
    }


def names_collector(environ: Mapping[str, str]) -> bool:
    """Return whether these variables name a destination of spans and metrics."""
    if environ.get(_OFF, "").strip().lower() == "true":
        return False
    return any(environ.get(f"{one}_ENDPOINT", "").strip() for one in _EXPORTERS)


def check_collector(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for a value that the SDK fails on, or ignores without a message; do nothing
    if no collector is named."""
    variables = {name: value.strip() for name, value in environ.items() if value.strip()}
    _check_one_of(variables, _OFF)
    if not names_collector(variables):
        return
    for exporter in _EXPORTERS:
        _check_exporter(variables, exporter)
    for name in _CHOICES:
        _check_one_of(variables, name)
    for name in _COUNTS:
        _check_number(variables, name, 1)
    for name in _LIMITS:
        if variables.get(name, "").lower() != "none":
            _check_number(variables, name, 0)
    queue, sent = "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"
    most = int(variables.get(queue, _MOST_QUEUED))
    if int(variables.get(sent, _MOST_SENT)) > most:
        name = sent if sent in variables else queue
        raise ConfigError(name, variables[name], f"{sent} must be at most {queue}, which is {most}")
    if variables.get(_SAMPLER, "").lower().endswith("traceidratio"):
        _check_share(variables, "OTEL_TRACES_SAMPLER_ARG")
    _check_pairs(variables, "OTEL_RESOURCE_ATTRIBUTES", hidden=False)


def _check_exporter(variables: Mapping[str, str], exporter: str) -> None:
    endpoint, timeout = f"{exporter}_ENDPOINT", f"{exporter}_TIMEOUT"
    if (url := variables.get(endpoint)) is not None and not _is_http(url):
        printable = url.rpartition("@")[2][:_LONGEST_SHOWN]  # without a password
        raise ConfigError(endpoint, printable, "must be http:// or https:// and a host")
    if timeout in variables and not _number(variables[timeout]) > 0:
        raise ConfigError(
            timeout, variables[timeout][:_LONGEST_SHOWN], "must be a number of seconds"
        )
    _check_one_of(variables, f"{exporter}_PROTOCOL", ("http/protobuf",))
    _check_one_of(variables, f"{exporter}_COMPRESSION", ("none", "gzip", "deflate"))
    _check_pairs(variables, f"{exporter}_HEADERS", hidden=True)
    for name in (f"{exporter}_CERTIFICATE", f"{exporter}_CLIENT_CERTIFICATE"):
        _check_file(variables, name)
    _check_file(variables, f"{exporter}_CLIENT_KEY")


def _check_one_of(variables: Mapping[str, str], name: str, allowed: tuple[str, ...] = ()) -> None:
    allowed = allowed or _CHOICES[name]
    if name in variables and variables[name].lower() not in allowed:
        raise ConfigError(name, variables[name][:_LONGEST_SHOWN], f"must be {' or '.join(allowed)}")


def _check_number(variables: Mapping[str, str], name: str, least: int) -> None:
    text = variables.get(name)
    if text is not None and not (text.isdecimal() and text.isascii() and int(text) >= least):
        raise ConfigError(name, text[:_LONGEST_SHOWN], f"must be a whole number from {least}")


def _check_share(variables: Mapping[str, str], name: str) -> None:
    if name in variables and not 0 <= _number(variables[name]) <= 1:
        raise ConfigError(name, variables[name][:_LONGEST_SHOWN], "must be a number from 0 to 1")


def _check_pairs(variables: Mapping[str, str], name: str, *, hidden: bool) -> None:
    for pair in filter(str.strip, variables.get(name, "").split(",")):
        key, equals, _ = unquote(pair).partition("=")
        if not key.strip() or not equals:
            printable = "(hidden)" if hidden else variables[name][:_LONGEST_SHOWN]
            raise ConfigError(name, printable, "must be name=value, with a comma between two")


def _check_file(variables: Mapping[str, str], name: str) -> None:
    if name in variables and not Path(variables[name]).is_file():
        raise ConfigError(name, variables[name][:_LONGEST_SHOWN], "must be an existing file")


def _number(text: str) -> float:
    """Return a number, or NaN, for which all comparisons are false."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _is_http(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError:
        return False
