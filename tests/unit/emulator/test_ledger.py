"""The counters add up at every moment, whatever happens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.providers.emulator.ledger import Ending, Ledger, LoggedCall
from tidegate.providers.emulator.settings import KINDS

endings: list[Ending] = ["finished", "failed", "client_gone"]
step = st.one_of(
    st.tuples(st.just("start"), st.sampled_from(KINDS)),
    st.tuples(st.just("refuse"), st.sampled_from(KINDS)),
    st.tuples(st.just("end"), st.sampled_from(endings)),
    st.tuples(st.just("end_again"), st.sampled_from(endings)),
    st.tuples(st.just("reset"), st.just("")),
)


def check(ledger: Ledger, running: list[LoggedCall]) -> None:
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
    ledger, running, ended = Ledger(10), list[LoggedCall](), list[LoggedCall]()
    for what, value in steps:
        if what == "start":
            call = ledger.arrive(value, "m", "generate", "x")
            ledger.start(call)
            running.append(call)
        elif what == "refuse":
            ledger.refuse(ledger.arrive(value, "m", "generate", "x"), "some limit", over=True)
        elif what == "end" and running:
            ended.append(running.pop(0))
            ledger.end(ended[-1], next(item for item in endings if item == value))
        elif what == "end_again" and ended:
            ledger.end(ended[-1], next(item for item in endings if item == value))
        elif what == "reset":
            ledger.reset()
        check(ledger, running)
