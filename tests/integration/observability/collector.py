"""A collector that takes OTLP over HTTP, as the real ones do, and keeps what it was sent."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Received:
    """All that came so far."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.resources: list[dict[str, str]] = []
        self.metrics: dict[str, Any] = {}

    def named(self, start: str) -> list[Span]:
        return [span for span in self.spans if span.name.startswith(start)]

    async def take_traces(self, request: web.Request) -> web.Response:
        sent = ExportTraceServiceRequest.FromString(await _body(request))
        for resource in sent.resource_spans:
            said = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.resources.append(said)
            self.services.add(said["service.name"])
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return _answer(ExportTraceServiceResponse())

    async def take_metrics(self, request: web.Request) -> web.Response:
        sent = ExportMetricsServiceRequest.FromString(await _body(request))
        for resource in sent.resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics |= {one.name: one for one in scope.metrics}
        return _answer(ExportMetricsServiceResponse())


async def _body(request: web.Request) -> bytes:
    raw = await request.read()
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def _answer(message: Any) -> web.Response:
    return web.Response(body=message.SerializeToString(), content_type="application/x-protobuf")


def attributes_of(span: Span) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in span.attributes:
        sort = one.value.WhichOneof("value")
        found[one.key] = None if sort is None else getattr(one.value, sort)
    return found


@asynccontextmanager
async def collecting() -> AsyncIterator[Received]:
    """A collector on a free port of this machine."""
    received = Received()
    app = web.Application()
    app.router.add_post("/v1/traces", received.take_traces)
    app.router.add_post("/v1/metrics", received.take_metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    received.url = f"http://{host}:{port}"
    try:
        yield received
    finally:
        await runner.cleanup()
