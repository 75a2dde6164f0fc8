"""OpenTelemetry: spans and metrics by its conventions for generative AI.

Spans are made from ended calls, with the times and ids that a call has collected in its `Trail`,
and sent by threads of the SDK. Importing this module imports the SDK (the extra `otel`): only
`connected` does so, if an endpoint is set.

Invariant: an unavailable collector does not delay calls and is logged once, and the data waiting
for it is bounded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from tidegate import __version__
from tidegate.metrics.instruments import (
    CALL_BUCKETS_S,
    MOST_MODELS,
    PROVIDERS,
    TOKEN_BUCKETS,
    Known,
)
from tidegate.record import REFUSED, RETRIED, CallRecord
from tidegate.telemetry.logging import GenAI, Log, get_logger
from tidegate.telemetry.tracing import Parent, Trail, Try

_CLOSE_WITHIN_MS = 3_000
_SCOPE = InstrumentationScope("tidegate", __version__)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_NS_PER_MS = 1_000_000

log = get_logger()


class CollectorState:
    """The state of the collector, logged when it changes."""

    def __init__(self) -> None:
        self._unavailable = False

    def report(self, succeeded: bool) -> None:
        """Record whether an export succeeded."""
        if succeeded == self._unavailable:
            self._unavailable = not succeeded
            if self._unavailable:
                log.warning(Log.COLLECTOR_AWAY)
            else:
                log.info(Log.COLLECTOR_BACK)


class _Spans(OTLPSpanExporter):
    def __init__(self, state: CollectorState) -> None:
        super().__init__()
        self._state = state

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        self._state.report(result is SpanExportResult.SUCCESS)
        return result


class _Metrics(OTLPMetricExporter):
    def __init__(self, state: CollectorState) -> None:
        super().__init__()
        self._state = state

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = 10_000, **more: Any
    ) -> MetricExportResult:
        result = super().export(metrics_data, timeout_millis, **more)
        self._state.report(result is MetricExportResult.SUCCESS)
        return result


class Collector:
    """Exports calls to a collector, configured by the standard's own variables (OTEL_*)."""

    def __init__(self, service: str, instance_id: str) -> None:
        # They would log an unavailable collector repeatedly.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        # The environment names the service only: several processes have the same variables.
        resource = Resource.create(
            {
                "service.name": service,
                "service.version": __version__,
                **OTELResourceDetector().detect().attributes,
                "service.instance.id": instance_id,
            }
        )
        state = CollectorState()
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(_Spans(state))
        self._provider.add_span_processor(self._processor)
        self._resource = resource
        self._models = Known(MOST_MODELS)
        views = [
            View(instrument_name=name, aggregation=ExplicitBucketHistogramAggregation(buckets))
            for name, buckets in (
                (GenAI.OPERATION_DURATION, CALL_BUCKETS_S),
                (GenAI.TOKEN_USAGE, TOKEN_BUCKETS),
                (GenAI.FIRST_CHUNK, CALL_BUCKETS_S),
            )
        ]
        self._meters = MeterProvider(
            [PeriodicExportingMetricReader(_Metrics(state))],
            resource=resource,
            shutdown_on_exit=False,
            views=views,
        )
        meter = self._meters.get_meter("tidegate", __version__)
        self._duration = meter.create_histogram(GenAI.OPERATION_DURATION, unit="s")
        self._tokens = meter.create_histogram(GenAI.TOKEN_USAGE, unit="{token}")
        self._first_chunk = meter.create_histogram(GenAI.FIRST_CHUNK, unit="s")

    def samples(self, trace_id: int, parent: Parent | None) -> bool:
        """Return whether a trace is recorded, by OTEL_TRACES_SAMPLER."""
        context = None
        if parent is not None:
            flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
            spans = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
            context = set_span_in_context(NonRecordingSpan(spans))
        decided = self._provider.sampler.should_sample(context, trace_id, GenAI.CALL)
        return decided.decision is Decision.RECORD_AND_SAMPLE

    def take(self, batch: Sequence[CallRecord]) -> None:
        """Record ended calls. Listens to `CallListeners`."""
        for one in batch:
            if one.status != REFUSED:
                self._measure(one)
            if one.trail is not None and self._is_recorded(one.trail):
                for span in self._spans_of(one, one.trail):
                    self._processor.on_end(span)

    def _is_recorded(self, trail: Trail) -> bool:
        if trail.recorded is None:
            return self.samples(trail.trace_id, trail.parent)
        return trail.recorded

    def close(self) -> None:
        """Send the waiting data, for a few seconds at most. Blocks: call it in a thread."""
        # The SDK ignores timeouts: each running export may take as long as its requests. A daemon
        # thread does not delay the end of the process, which discards what was not sent in time.
        closing = threading.Thread(target=self._close, name="collector", daemon=True)
        closing.start()
        closing.join(_CLOSE_WITHIN_MS / 1000)

    def _close(self) -> None:
        self._processor.force_flush(_CLOSE_WITHIN_MS)
        self._meters.shutdown(_CLOSE_WITHIN_MS)
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def _measure(self, one: CallRecord) -> None:
        if one.upstream_ms is None:
            return
        about: dict[str, Any] = {
            GenAI.OPERATION: one.operation,
            GenAI.PROVIDER: PROVIDERS.get(one.dialect, one.dialect),
            GenAI.REQUEST_MODEL: self._models.of(one.model or "", learns=one.status == "succeeded"),
        }
        failed = {} if one.status == "succeeded" else {GenAI.ERROR: one.code or one.status}
        self._duration.record(one.upstream_ms / 1000, about | failed)
        if one.streamed and one.answer.first_byte_ms is not None and not failed:
            self._first_chunk.record(one.answer.first_byte_ms / 1000, about)
        usage = one.charge.usage
        for sort, tokens in (("input", usage.input_tokens), ("output", usage.output_tokens)):
            if tokens:
                self._tokens.record(tokens, about | {GenAI.TOKEN_TYPE: sort})

    def _spans_of(self, one: CallRecord, trail: Trail) -> list[ReadableSpan]:
        """Return the spans of the attempts, and the span of the call once it has ended."""
        logical = SpanContext(trail.trace_id, trail.span_id, is_remote=False, trace_flags=_SAMPLED)
        spans = [self._try(one, logical, number, tried) for number, tried in enumerate(trail.tries)]
        if one.queue_ms is not None and trail.tries:
            until_ns = trail.tries[0].began_ns
            since_ns = until_ns - round(one.queue_ms * _NS_PER_MS)
            spans.append(
                self._span(GenAI.QUEUE, SpanKind.INTERNAL, logical, None, since_ns, until_ns)
            )
        if one.status != RETRIED:
            ends = [round(one.ended_at.timestamp() * 1e9)]
            ended_ns = max(ends + [tried.ended_ns for tried in trail.tries])
            began_ns = ended_ns
            if one.received_at is not None:
                began_ns = min(round(one.received_at.timestamp() * 1e9), ended_ns)
            spans.append(self._call(one, trail, logical, began_ns, ended_ns))
        return spans

    def _call(
        self, one: CallRecord, trail: Trail, own: SpanContext, began_ns: int, ended_ns: int
    ) -> ReadableSpan:
        parent = None
        if trail.parent is not None:
            parent = SpanContext(
                trail.trace_id, trail.parent.span_id, is_remote=True, trace_flags=_SAMPLED
            )
        attributes = _about(one) | _answered(one)
        code = None if one.status == "succeeded" else one.code or one.status
        name = f"{one.operation} {one.model}" if one.model else one.operation
        return self._span(name, SpanKind.CLIENT, parent, own, began_ns, ended_ns, attributes, code)

    def _try(self, one: CallRecord, logical: SpanContext, number: int, tried: Try) -> ReadableSpan:
        own = SpanContext(logical.trace_id, tried.span_id, is_remote=False, trace_flags=_SAMPLED)
        attributes = _about(one) | {
            GenAI.REQUEST_MODEL: tried.model,
            GenAI.UPSTREAM: tried.upstream,
            GenAI.TRY: number + 1,
        }
        if tried.address:
            host, _, port = tried.address.rpartition(":")
            attributes |= {GenAI.SERVER: host, GenAI.SERVER_PORT: int(port)}
        if tried.status:
            attributes[GenAI.HTTP_STATUS] = tried.status
        ended_ns = max(tried.ended_ns, tried.began_ns)
        name = f"{one.operation} {tried.model}"
        return self._span(
            name, SpanKind.CLIENT, logical, own, tried.began_ns, ended_ns, attributes, tried.code
        )

    def _span(
        self,
        name: str,
        kind: SpanKind,
        parent: SpanContext | None,
        own: SpanContext | None,
        began_ns: int,
        ended_ns: int,
        attributes: dict[str, Any] | None = None,
        code: str | None = None,
    ) -> ReadableSpan:
        if own is None:
            assert parent is not None
            span_id = self._provider.id_generator.generate_span_id()
            own = SpanContext(parent.trace_id, span_id, is_remote=False, trace_flags=_SAMPLED)
        values = dict(attributes or {})
        if code is not None:
            values[GenAI.ERROR] = code
        return ReadableSpan(
            name=name,
            context=own,
            parent=parent,
            resource=self._resource,
            attributes=values,
            kind=kind,
            status=Status(StatusCode.UNSET if code is None else StatusCode.ERROR),
            start_time=began_ns,
            end_time=ended_ns,
            instrumentation_scope=_SCOPE,
        )


def _about(one: CallRecord) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        GenAI.OPERATION: one.operation,
        GenAI.PROVIDER: PROVIDERS.get(one.dialect, one.dialect),
        GenAI.TENANT: one.tenant_id,
        GenAI.SOURCE: one.source,
    }
    if one.model:
        attributes[GenAI.REQUEST_MODEL] = one.model
    if one.streamed:
        attributes[GenAI.STREAM] = True
    return attributes


def _answered(one: CallRecord) -> dict[str, Any]:
    answer, usage = one.answer, one.charge.usage
    written = None if usage.details is None else usage.details.cache_write_tokens
    values: dict[str, Any] = {
        GenAI.REQUEST_ID: None if one.request_id is None else str(one.request_id),
        GenAI.RESPONSE_ID: answer.response_id,
        GenAI.RESPONSE_MODEL: answer.model_version,
        GenAI.FINISH_REASONS: (answer.finish_reason,) if answer.finish_reason else None,
        GenAI.INPUT: usage.input_tokens,
        GenAI.OUTPUT: usage.output_tokens,
        GenAI.CACHED: usage.cached_tokens,
        GenAI.CACHE_WRITES: written,
        GenAI.THOUGHTS: usage.thoughts_tokens,
        GenAI.QUEUE_MS: one.queue_ms,
        GenAI.TRIES: one.attempts or None,
    }
    if one.streamed and answer.first_byte_ms is not None:
        values[GenAI.RESPONSE_FIRST_CHUNK] = answer.first_byte_ms / 1000
    return {name: value for name, value in values.items() if value is not None}
