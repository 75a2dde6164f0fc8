"""What the model and the Lua once disagreed about after the clock was set back."""

from __future__ import annotations

from tests.property.policies import LEASE_MS, Shape
from tests.property.server import Server
from tests.property.test_limiter_model import PoolMachine
from tests.property.test_rates import LIMIT, MINUTE_MS, Bench
from tidegate.limiter import Concurrency, Rate
from tidegate.limiter.simulation import Paces

GATE = "upstream:u"
SHAPE = Shape(
    a=0,
    b=1,
    all=1,
    bands=0,
    weights=0,
    hold=False,
    cancel=False,
    hand_off=True,
    queue_max=3,
    shadow=False,
    adaptive=None,
    reap_closed_ms=0,
    wild="",
)


def test_a_gate_that_a_session_reports_replaces_a_pause_that_a_clock_set_back_has_ended(
    server: Server,
) -> None:
    PoolMachine.server, PoolMachine.steps = server, 0
    state = PoolMachine()
    pace = Paces(500, 8, 2_251_799_813_685_248, 1000, 50, 2000)
    kinds = [(1, "t1", ("kind:a",))]
    state.begin(strict=False, shape=SHAPE, pace=pace, settled=True, kinds=kinds)
    state.close_a_gate_or_open_it(after_ms=0, for_ms=1000, most_ms=8000, name=GATE, what="close")
    for _ in range(7):
        state.a_third_of_a_lease_passes_and_everybody_compares_all()
    state.pause_a_limit_or_end_its_pause(after_ms=30_000, for_ms=0, name="kind:a", ramp_ms=1)
    state.a_misfortune(by_ms=-100_000, what="clock jumped", who=0)
    state.pause_a_limit_or_end_its_pause(after_ms=0, for_ms=10_000, name=GATE, ramp_ms=1)
    state.a_third_of_a_lease_passes_and_everybody_compares_all()
    state.teardown()


def test_a_log_keeps_its_order_if_the_clock_was_set_back_while_the_limit_was_no_rate(
    server: Server,
) -> None:
    """Calls that were admitted later than now, by the clock before, count from now on."""
    bench = Bench(server)
    bench.say()
    rate = Rate(100, MINUTE_MS, slack_ms=0)
    bench.put_in_force(rate)
    bench.end(bench.ask(1), 1)
    bench.put_in_force(Concurrency(5))
    bench.world.jump(-80_000)
    for _ in range(4):
        bench.wait(LEASE_MS // 2)
    bench.put_in_force(rate)
    bench.wait(10_000)
    bench.end(bench.ask(1), 1)
    assert bench.world.look_back(LIMIT, 5_000) == 1
    assert bench.world.look_back(LIMIT, 15_000) == 2
    bench.wait(MINUTE_MS - 9_000)
    assert bench.spent == 1
    bench.world.close()
