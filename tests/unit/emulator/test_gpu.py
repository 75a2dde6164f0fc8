"""The schedule of a GPU server, on a clock moved by its own steps."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.emulator.gpu import ContextExceeded, GpuSpec, Schedule, ServerBusy, Work
from tidegate.errors import InvalidRequest


class Bench:
    """A server and its time."""

    def __init__(self, **fields: Any) -> None:
        spec = GpuSpec.parse(fields)
        assert spec is not None
        self.schedule = Schedule(spec)
        self.now_s = 0.0
        self.gone: set[str] = set()

    def add(self, prompt: str, read: int, reply: int, *, streamed: bool = True) -> Work:
        work = Work(
            prompt=prompt,
            input_tokens=read,
            reply_tokens=reply,
            streamed=streamed,
            arrived_s=self.now_s,
            is_lost=lambda: prompt in self.gone,
            changed=lambda: None,
        )
        self.schedule.add(work)
        return work

    def step(self) -> bool:
        if (step := self.schedule.next_step()) is None:
            return False
        self.now_s += step.duration_s
        self.schedule.finish(step, self.now_s)
        return True

    def until_done(self, work: Work) -> float:
        """Seconds until a request is done."""
        began_s = self.now_s
        while not work.done and self.step():
            pass
        assert work.done
        return self.now_s - began_s


@pytest.mark.parametrize(
    ("tokens", "measured_s"), [(31, 0.05), (122, 0.10), (1_022, 1.0), (2_022, 2.5), (4_022, 7.3)]
)
def test_it_reads_a_prompt_as_fast_as_the_real_server_does(tokens: int, measured_s: float) -> None:
    bench = Bench()
    assert bench.until_done(bench.add("a", tokens, 1)) == pytest.approx(measured_s, abs=0.1)


@pytest.mark.parametrize(("slots", "measured"), [(1, 169), (4, 311)])
def test_slots_share_the_time_of_a_step(slots: int, measured: float) -> None:
    bench = Bench()
    works = [bench.add(str(place), 1, 400) for place in range(slots)]
    seconds = bench.until_done(works[-1])
    assert slots * 400 / seconds == pytest.approx(measured, rel=0.1)


def test_the_rest_waits_in_its_order_and_in_silence() -> None:
    bench = Bench(slots=2)
    works = [bench.add(str(place), 10, 5) for place in range(300)]
    assert len(bench.schedule.waiting) == 298
    for work in works:
        bench.until_done(work)
        assert not any(later.done for later in works[works.index(work) + 2 :])


def test_a_long_prompt_keeps_the_others_words_waiting() -> None:
    bench = Bench()
    writing = bench.add("short", 10, 100)
    bench.step()
    made = writing.made_tokens
    bench.add("long", 2_000, 1)
    before_s = bench.now_s
    bench.step()
    assert writing.made_tokens == made + 1
    assert bench.now_s - before_s > 2


def test_what_was_read_before_is_not_read_again() -> None:
    bench = Bench(cache_tokens=5_000)
    first = "system " * 600
    bench.until_done(bench.add(first, 1_050, 1))
    again = bench.add(first + "and more", 1_060, 1)
    assert bench.until_done(again) < 0.1
    assert again.cached_tokens == 1_050
    bench.until_done(bench.add("x" * 16_000, 4_000, 1))  # displaces it
    assert bench.add(first, 1_050, 1).cached_tokens == 0


def test_the_kv_cache_bounds_beside_the_slots() -> None:
    bench = Bench(slots=8, kv_tokens=1_000, context_tokens=1_000)
    works = [bench.add(str(place), 300, 100) for place in range(3)]
    assert bench.schedule.running == works[:2]
    assert bench.schedule.kv_tokens == 800
    small = bench.add("small", 10, 10)
    assert small in bench.schedule.waiting  # behind the third, though it had room
    with pytest.raises(ContextExceeded):
        bench.add("large", 1_000, 1)


def test_a_bound_on_those_who_wait_makes_it_busy() -> None:
    bench = Bench(software="vllm", slots=1, most_waiting=1)
    bench.add("a", 10, 5)
    bench.add("b", 10, 5)
    with pytest.raises(ServerBusy):
        bench.add("c", 10, 5)
    assert (bench.schedule.counts.requests, bench.schedule.counts.refused) == (2, 1)


def test_who_leaves_a_stream_frees_the_slot_with_the_next_piece() -> None:
    bench = Bench(slots=1)
    work = bench.add("a", 10, 400)
    bench.step()
    bench.gone.add("a")
    bench.step()
    assert work.dropped
    assert not bench.schedule.running


def test_what_is_dropped_while_a_step_runs_gets_nothing_of_it() -> None:
    bench = Bench()
    writing = bench.add("a", 10, 2)
    bench.step()
    assert writing.made_tokens == 1
    reading = bench.add("c", 10, 1)
    step = bench.schedule.next_step()
    assert step is not None
    bench.schedule.drop(writing)
    bench.schedule.drop(reading)
    bench.schedule.finish(step, bench.now_s + step.duration_s)
    assert (writing.made_tokens, reading.made_tokens) == (1, 0)
    assert not bench.schedule.running


def test_who_leaves_a_plain_call_is_noticed_after_a_second_alone() -> None:
    bench = Bench(slots=1)
    work = bench.add("a", 10, 400, streamed=False)
    bench.gone.add("a")
    assert bench.until_done(work) == pytest.approx(1.0, abs=0.05)
    assert work.dropped


def test_who_leaves_a_plain_call_beside_a_stream_is_never_noticed() -> None:
    bench = Bench(slots=2)
    bench.add("stream", 10, 1_000)
    left = bench.add("plain", 10, 400, streamed=False)
    bench.gone.add("plain")
    assert bench.until_done(left) > 2
    assert not left.dropped


@pytest.mark.parametrize(("notices", "dropped"), [("at_once", True), ("never", False)])
def test_others_notice_immediately_or_never(notices: str, dropped: bool) -> None:
    bench = Bench(notices=notices)
    work = bench.add("a", 10, 400, streamed=False)
    bench.gone.add("a")
    bench.until_done(work)
    assert work.dropped is dropped


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"slots": 0}, "gpu.slots"),
        ({"software": "tensorrt"}, "gpu.software"),
        ("other", "gpu.software"),
        ({"speed": True}, "gpu.speed"),
        ({"closes_streams": 1}, "gpu.closes_streams"),
        ({"slot": 1}, "gpu"),
    ],
)
def test_what_is_wrong_is_named(given: object, field: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        GpuSpec.parse(given)
    assert wrong.value.field == field
