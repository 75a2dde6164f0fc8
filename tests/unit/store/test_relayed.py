"""What is told of a native call to those who count calls, field by field."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime

from tidegate.call import Charge, Usage, UsageDetails, UsageState, new_id
from tidegate.store.audit import RelayRecord, observed_of
from tidegate.store.records import Failure
from tidegate.store.states import Status
from tidegate.telemetry.events import Observed

RECEIVED, ENDED = datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 5, 2, tzinfo=UTC)


def test_a_record_tells_those_who_count_calls_all_that_they_ask_for() -> None:
    record = RelayRecord(
        request_id=new_id(),
        tenant_id="acme",
        pool="gemini",
        endpoint="/v1/chat/completions",
        status=Status.FAILED,
        http_status=502,
        received_at=RECEIVED,
        finished_at=ENDED,
        request=b"{}",
        response=b"[]",
        kind="text_only",
        model="m",
        tries=2,
        queue_ms=1.5,
        upstream_ms=2.5,
        first_byte_ms=0.5,
        charge=Charge(UsageState.TOLD, Usage(1, 2, 3, 4, 10, UsageDetails(7)), 5, 6),
        finish_reason="stop",
        response_id="r",
        model_version="m-2",
        failure=Failure("upstream_unavailable", "away"),
        streamed=True,
        upstream="first",
        dialect="openai",
        operation="chat",
        throttled=1,
    )
    same = (
        *("tenant_id", "pool", "kind", "model", "upstream", "dialect", "operation", "streamed"),
        *("http_status", "queue_ms", "upstream_ms", "first_byte_ms", "throttled", "request_id"),
        *("response_id", "model_version", "finish_reason", "received_at", "finished_at", "trail"),
    )
    expected = {
        **{name: getattr(record, name) for name in same},
        "source": "relay",
        "status": "failed",
        "code": "upstream_unavailable",
        "attempts": 2,
        "input_tokens": 1,
        "output_tokens": 2,
        "thoughts_tokens": 3,
        "cached_tokens": 4,
        "cache_write_tokens": 7,
        "cost_micros": 6,
    }
    told = observed_of(record)
    assert {one.name: getattr(told, one.name) for one in fields(Observed)} == expected


def test_a_call_that_was_never_made_waited_for_nothing() -> None:
    record = RelayRecord(
        *(new_id(), "acme", "", "/v1/messages", Status.FAILED, 503, RECEIVED, ENDED, b"{}", b""),
        queue_ms=7.0,
    )
    told = observed_of(record)
    assert (told.queue_ms, told.upstream_ms, told.attempts) == (None, None, 0)
