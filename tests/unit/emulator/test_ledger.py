"""The counters add up at every moment, whatever happens."""

from __future__ import annotations

from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from tidegate.emulator.settings import KINDS
from tidegate.emulator.state import (
    MOST_MODELS,
    OTHER_MODELS,
    Billed,
    CallLedger,
    Ending,
    LoggedCall,
)

endings: list[Ending] = ["finished", "failed", "client_gone"]
step = st.one_of(
    st.tuples(st.just("start"), st.sampled_from(KINDS)),
    st.tuples(st.just("refuse"), st.sampled_from(KINDS)),
    st.tuples(st.just("end"), st.sampled_from(endings)),
    st.tuples(st.just("end_again"), st.sampled_from(endings)),
    st.tuples(st.just("reset"), st.just("")),
)


def check(ledger: CallLedger, running: list[LoggedCall]) -> None:
    for kind in KINDS:
        stats = ledger.of(kind)
        assert stats.arrived == stats.started + sum(stats.refused.values())
        ended = stats.finished + stats.failed + stats.client_gone
        assert stats.started == ended + stats.in_flight
        assert stats.in_flight == sum(call.kind == kind for call in running)
        assert stats.max_in_flight >= stats.in_flight
    assert ledger.in_flight_total == sum(call.kind != "other" for call in running)


@given(st.lists(step, max_size=60))
def test_arrivals_are_refused_running_or_ended_and_never_two_of_these(
    steps: list[tuple[str, str]],
) -> None:
    ledger, running, ended = CallLedger(10), list[LoggedCall](), list[LoggedCall]()
    billed: dict[str, int] = {}
    for what, value in steps:
        if what == "start":
            call = ledger.arrive(value, "m", "generate", "x")
            ledger.start(call)
            running.append(call)
        elif what == "refuse":
            ledger.refuse(ledger.arrive(value, "m", "generate", "x"), "some limit", over=True)
        elif what == "end" and running:
            ended.append(running.pop(0))
            ledger.charge(ended[-1], 2, 3)
            ledger.end(ended[-1], next(item for item in endings if item == value))
            billed[value] = billed.get(value, 0) + 1
        elif what == "end_again" and ended:
            ledger.charge(ended[-1], 7, 7)
            ledger.end(ended[-1], next(item for item in endings if item == value))
        elif what == "reset":
            ledger.reset()
            billed.clear()
        check(ledger, running)
        expected = {ending: asdict(Billed(n, 2 * n, 3 * n)) for ending, n in billed.items()}
        assert ledger.to_json()["tokens"].get("m", {}) == expected


def test_totals_are_kept_for_a_bounded_number_of_models() -> None:
    ledger = CallLedger(10)
    for number in range(MOST_MODELS + 5):
        call = ledger.arrive("text_only", f"m{number}", "generate", "x")
        ledger.start(call)
        ledger.charge(call, 2, 3)
        ledger.end(call, "finished")
        ledger.charge(call, 9, 9)
    tokens = ledger.to_json()["tokens"]
    assert len(tokens) == MOST_MODELS + 1
    assert tokens[OTHER_MODELS]["finished"]["calls"] == 5
    assert tokens["m7"]["finished"]["output_tokens"] == 3
