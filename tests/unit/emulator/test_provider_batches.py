"""Batches of the providers' batch APIs: pace, states, expiry, cancelling, queue, on a set clock."""

from __future__ import annotations

from random import Random

import pytest

from tidegate.emulator.batches import (
    BatchStore,
    LineAnswer,
    LineWork,
    ProviderBatch,
    ProviderBatchLine,
)
from tidegate.emulator.dialect import Refused
from tidegate.emulator.settings import BatchPace, Behaviour
from tidegate.errors import InvalidRequest

MS = 1_000_000
DAY_S = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.ns = 10**18

    def __call__(self) -> int:
        return self.ns

    def pass_ms(self, ms: float) -> None:
        self.ns += round(ms * MS)


class Bench:
    def __init__(self) -> None:
        self.clock = Clock()
        self.billed: list[str] = []
        self.store = BatchStore(
            self.clock, Random(1), lambda line, _: self.billed.append(line.custom_id)
        )

    def create(self, count: int, pace: BatchPace, *, window_s: float = DAY_S) -> ProviderBatch:
        work = LineWork("text_only", "m", "hi", 3, lambda: LineAnswer({"ok": True}, 5))
        lines = [ProviderBatchLine(f"line-{number}", work) for number in range(count)]
        batch = self.store.create("batch_", "openai", "m", lines, pace, window_s, {})
        self.store.advance()
        return batch

    def after(self, ms: float) -> None:
        self.clock.pass_ms(ms)
        self.store.advance()


def pace(**changes: object) -> BatchPace:
    return BatchPace.parse(changes)


def test_a_batch_goes_through_its_states_at_its_pace() -> None:
    bench = Bench()
    steps = pace(validating_ms=10, delay_ms=100, line_ms=20, finalizing_ms=30)
    batch = bench.create(3, steps)
    seen: list[tuple[str, int]] = []
    for ms in (0, 10, 120, 20, 20, 29, 1):
        bench.after(ms)
        seen.append((batch.state, batch.count("succeeded")))
    assert seen == [
        ("validating", 0),
        ("in_progress", 0),
        ("in_progress", 1),
        ("in_progress", 2),
        ("finalizing", 3),
        ("finalizing", 3),
        ("completed", 3),
    ]
    assert bench.billed == ["line-0", "line-1", "line-2"]
    assert batch.ended_ns == batch.created_ns + 200 * MS


def test_a_clock_that_stands_still_ends_nothing() -> None:
    bench = Bench()
    batch = bench.create(2, pace(line_ms=1))
    for _ in range(3):
        bench.store.advance()
    assert (batch.state, bench.billed) == ("in_progress", [])


def test_a_batch_that_stalls_expires_with_the_part_that_is_done() -> None:
    bench = Bench()
    batch = bench.create(4, pace(line_ms=10, expired_share=1, partial_share=0.5, window_s=1))
    bench.after(999)
    assert (batch.state, batch.count("succeeded")) == ("in_progress", 2)
    bench.after(1)
    assert batch.state == "expired"
    assert [line.state for line in batch.lines] == ["succeeded"] * 2 + ["expired"] * 2
    assert bench.billed == ["line-0", "line-1"]


def test_a_batch_that_is_too_slow_for_its_window_expires() -> None:
    bench = Bench()
    batch = bench.create(3, pace(line_ms=600), window_s=1)
    bench.after(5_000)
    assert [line.state for line in batch.lines] == ["succeeded", "expired", "expired"]
    assert (batch.state, batch.ended_ns) == ("expired", batch.expires_ns)


def test_a_cancelled_batch_keeps_what_it_had_done_until_then() -> None:
    bench = Bench()
    batch = bench.create(4, pace(line_ms=10, cancelling_ms=15))
    bench.after(10)
    bench.store.cancel(batch)
    states = [batch.state]
    bench.store.cancel(batch)
    bench.after(100)
    states.append(batch.state)
    assert states == ["cancelling", "cancelled"]
    assert [line.state for line in batch.lines] == ["succeeded"] * 2 + ["canceled"] * 2


def test_lines_that_fail_are_not_billed() -> None:
    bench = Bench()
    batch = bench.create(3, pace(failed_share=1))
    assert (batch.state, batch.count("errored"), bench.billed) == ("completed", 3, [])


def test_tokens_are_enqueued_until_the_batch_ends() -> None:
    bench = Bench()
    batch = bench.create(2, pace(line_ms=10, finalizing_ms=10))
    bench.after(20)
    assert (batch.state, batch.enqueued_tokens("m"), batch.enqueued_tokens("n")) == (
        "finalizing",
        6,
        0,
    )
    bench.after(10)
    assert (batch.state, batch.enqueued_tokens("m")) == ("completed", 0)


def test_a_failed_validation_ends_a_batch_before_its_first_line() -> None:
    bench = Bench()
    work = LineWork("text_only", "m", "hi", 3, lambda: LineAnswer({}, 5))
    lines, errors = [ProviderBatchLine("a", work)], [{"code": "duplicate_custom_id"}]
    batch = bench.store.create("b_", "openai", "m", lines, pace(validating_ms=5), DAY_S, {}, errors)
    bench.after(4)
    assert batch.state == "validating"
    bench.after(100)
    assert (batch.state, bench.billed) == ("failed", [])


def test_the_store_finds_a_batch_in_its_own_dialect_alone() -> None:
    bench = Bench()
    batch = bench.create(1, pace())
    assert bench.store.find(batch.id, "openai", "gone") is batch
    with pytest.raises(Refused, match="gone"):
        bench.store.find(batch.id, "anthropic", "gone")
    bench.store.delete(batch)
    with pytest.raises(Refused, match="gone"):
        bench.store.find(batch.id, "openai", "gone")


def test_a_refused_line_ends_with_its_own_error() -> None:
    bench = Bench()
    refused = Refused(400, "model: Field required")
    lines = [ProviderBatchLine("bad", None, refused)]
    batch = bench.store.create("b_", "openai", "m", lines, pace(), DAY_S, {})
    bench.store.advance()
    assert (batch.lines[0].state, batch.lines[0].refused) == ("errored", refused)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("line_ms", -1),
        ("failed_share", 1.1),
        ("window_s", 0),
        ("enqueued_tokens", 1.5),
        ("delay_ms", "soon"),
        ("lines", 1),
    ],
)
def test_a_bad_pace_is_refused_with_its_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Behaviour().changed({"batches": {field: value}})
    assert "batches" in refused.value.field
    assert field in refused.value.message


def test_a_pace_is_shown_as_it_was_set() -> None:
    given = {"delay_ms": {"uniform": [1, 2]}, "line_ms": 3, "enqueued_tokens": 10}
    behaviour = Behaviour().changed({"batches": given})
    shown = behaviour.to_json()["batches"]
    assert {name: shown[name] for name in given} == given
    assert Behaviour().changed({"batches": shown}) == behaviour
