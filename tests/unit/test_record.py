"""The one record of a call: what it keeps of an answer, and what another try forgets."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime

import pytest

from tidegate import record as module
from tidegate.call import NO_CHARGE, UNKNOWN_CHARGE, Answer, Media, Usage
from tidegate.errors import UpstreamUnavailable
from tidegate.record import RETRIED, ActiveCall, CallRecord, Failure

AT = datetime(2026, 5, 1, tzinfo=UTC)


def record() -> CallRecord:
    return CallRecord("relay", "acme", AT, endpoint="/v1/chat/completions", request=b"{}")


def test_an_answer_is_kept_as_it_came() -> None:
    call = record()
    for piece in (b"data: 1\n\n", b"data: 2\n\n"):
        call.keep(piece)
    assert call.response == call.text == call.body == b"data: 1\n\ndata: 2\n\n"
    assert (call.text_bytes, call.omitted_bytes) == (18, 0)
    assert call.result == "data: 1\n\ndata: 2\n\n"
    assert call.size_bytes == 1_000 + 2 + 18


def test_of_a_long_answer_the_middle_is_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 10)
    monkeypatch.setattr(module, "TAIL_BYTES", 4)
    call = record()
    for piece in (b"0123456789", b"abcd", b"efgh", b"ij"):
        call.keep(piece)
    assert (call.answer_bytes, call.text_bytes) == (20, 20)
    assert call.omitted_bytes == 20 - len(call.body)
    assert call.body.endswith(b"ghij"), "the end, where the usage is"


def test_a_compressed_answer_is_read_decoded_and_one_that_cannot_be_is_stored_as_it_came() -> None:
    call = record()
    call.coding = b"gzip"
    call.keep(gzip.compress(b'{"id": 1}'))
    assert call.text == call.response == b'{"id": 1}'
    other = record()
    other.coding = b"br"
    other.keep(b"\x01\x02")
    assert (other.text, other.response) == (b"", b"\x01\x02")


def test_another_try_forgets_the_answer_and_keeps_what_was_counted() -> None:
    call = record()
    call.waits, call.sent, call.coding = False, True, b"gzip"
    call.attempts, call.faults = 2, 1
    call.note_throttled("openai", "pool")
    call.failed = UpstreamUnavailable("gone")
    call.keep(b"half")
    answer = call.answer
    answer.text.append("half")
    answer.pictures.append(Media("image/png", b"x"))
    answer.usage, answer.finish_reason, answer.first_byte_ms = Usage(1, 2), "stop", 5.0
    answer.response_id, answer.model_version = "r", "m"
    call.charge = UNKNOWN_CHARGE
    call.begin_again()
    assert call.waits
    assert not (call.sent)
    assert not (call.coding)
    assert not (call.pieces)
    assert not (call.answer_bytes)
    assert call.charge == NO_CHARGE
    assert answer == Answer()
    assert (call.attempts, call.throttled, call.faults) == (2, 1, 1)
    assert call.failed is not None


def test_the_end_has_the_time_of_the_last_call_or_its_own() -> None:
    call = record()
    call.finished_at = AT
    call.end(RETRIED, Failure("upstream_unavailable", "gone"))
    assert (call.status, call.code, call.ended_at) == ("retried", "upstream_unavailable", AT)
    never = record()
    never.end("expired")
    assert never.code is None
    assert never.ended_at > AT
    assert not never.was_admitted


def test_a_call_in_progress_shows_what_it_waits_for_and_then_what_it_holds() -> None:
    call = record()
    call.waits_for = ("gemini", ("kind:text_only",))
    waiting = ActiveCall.of(call)
    assert (waiting.admitted_at, waiting.pool, waiting.upstream) == (None, "gemini", None)
    assert waiting.limits == ("kind:text_only",)
    call.waits, call.admitted_at, call.upstream, call.pool = False, AT, "second", "second"
    running = ActiveCall.of(call)
    assert (running.admitted_at, running.pool, running.upstream) == (AT, "second", "second")
