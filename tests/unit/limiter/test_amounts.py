"""What a call takes of each sort of limit, by hand."""

from __future__ import annotations

import pytest

from tidegate.errors import ConfigError, DemandImpossible
from tidegate.limiter import (
    Adaptive,
    CallUse,
    Concurrency,
    Demand,
    PoolPolicy,
    Quota,
    Ramp,
    Rate,
    Tokens,
    Weights,
)
from tidegate.limiter.flow import Flow
from tidegate.limiter.policy import (
    LEAST_USE,
    MAX_BOUND,
    MOST_USE,
    NOTHING,
    Limit,
    amount_of,
    amount_to_reserve,
    use_by_cost,
)

MINUTE_MS = 60_000
USED = CallUse(Tokens(1000, 50, cached=900, cache_write=60), 2, 30, 790_000)


@pytest.mark.parametrize(
    ("unit", "amount"),
    [
        ("requests", 1),
        ("tokens", 1050),
        ("input_tokens", 1000),
        ("uncached_input_tokens", 100),
        ("output_tokens", 50),
        ("images", 2),
        ("audio_seconds", 30),
        ("usd", 790_000),
    ],
)
def test_each_unit_counts_its_own(unit: str, amount: int) -> None:
    assert amount_of(Rate(9, MINUTE_MS, unit), USED) == amount  # type: ignore[arg-type]
    assert amount_of(Quota(9, unit), USED) == amount  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("use", "micros"),
    [
        (USED, 790_000),
        (CallUse(Tokens(1000, 50), cost_micros=None), 1050),
        (CallUse(Tokens(1000, 50), cost_micros=0), 1050),
        (CallUse(cost_micros=3), LEAST_USE),
        (CallUse(cost_micros=0), LEAST_USE),
        (NOTHING, LEAST_USE),
        (CallUse(cost_micros=10**12), MOST_USE),
        (CallUse(), None),
        (Demand(("kind:x",), cost_micros=790), 790),
        (Demand(("kind:x",), tokens=Tokens(100, 20), cost_micros=0), 120),
        (Demand(("kind:x",), cost_micros=0), None),
    ],
)
def test_shares_of_cost_count_micro_dollars_or_tokens(
    use: CallUse | Demand, micros: int | None
) -> None:
    assert use_by_cost(use) == micros


def test_weights_count_each_part_of_a_call() -> None:
    limit = Rate(9, MINUTE_MS, "tokens", weights=Weights(1, 0.1, 1.25, 5))
    assert amount_of(limit, USED) == 40 + 90 + 75 + 250
    assert amount_of(Rate(9, MINUTE_MS, "tokens", weights=Weights(0.5, 0, 0, 0)), USED) == 20


def test_a_limit_reserves_what_is_probable_the_most_or_the_larger() -> None:
    demand = Demand(("tpm:m",), tokens=Tokens(100, 20), most=Tokens(100, 4000), larger_tokens=4000)
    reserves = [
        amount_to_reserve(Rate(9, MINUTE_MS, "tokens", reserve=reserve), demand)
        for reserve in ("predicted", "bound", "max_tokens", "larger")
    ]
    assert reserves == [120, 4100, 4100, 4000]
    weighed = Rate(9, MINUTE_MS, "tokens", weights=Weights(1, 0, 1, 5), reserve="max_tokens")
    assert amount_to_reserve(weighed, demand) == 4100
    small = Demand(("tpm:m",), tokens=Tokens(100, 20, 40), most=Tokens(100, 30, 40))
    assert amount_to_reserve(weighed, small) == 60 + 5 * 20
    unbounded = Demand(("tpm:m",), tokens=Tokens(100, 20), larger_tokens=90)
    assert amount_to_reserve(Rate(9, MINUTE_MS, "tokens", reserve="bound"), unbounded) == 120
    assert amount_to_reserve(Rate(9, MINUTE_MS, "tokens", reserve="larger"), unbounded) == 90


def test_a_call_takes_its_tokens_of_what_may_be_in_flight_until_it_ends() -> None:
    flow = Flow(1, "t", ("kind:a", "tif:m"))
    limits: dict[str, int | Limit] = {
        "kind:a": 3,
        "tif:m": Concurrency(5000, unit="tokens_in_flight", reserve="bound"),
    }
    flow.refresh(PoolPolicy(limits))
    demand = Demand(flow.limits, tokens=Tokens(100, 20), most=Tokens(100, 4000))
    assert flow.amounts(demand) == "1,4100"
    assert flow.amount_under("tif:m", flow.amounts(demand)) == 4100
    assert flow.actual(CallUse(Tokens(90, 10))) == "", "nothing is settled: it is all released"
    assert not flow.plain, "its permits fit no other call"
    flow.refresh(PoolPolicy({**limits, "tif:m": Concurrency(5000, unit="tokens_in_flight")}))
    assert flow.amounts(demand) == "1,120"
    assert flow.amounts(Demand(flow.limits, tokens=Tokens())) == "1,1"
    with pytest.raises(ValueError, match="say tokens="):
        flow.amounts(Demand(flow.limits))


def test_more_tokens_than_may_ever_be_in_flight_are_impossible() -> None:
    flow = Flow(1, "t", ("tif:m",))
    flow.refresh(PoolPolicy({"tif:m": Concurrency(5000, unit="tokens_in_flight")}))
    with pytest.raises(DemandImpossible) as raised:
        flow.amounts(Demand(flow.limits, tokens=Tokens(4000, 1001)))
    assert raised.value.limit == "tif:m"
    said = "limit 'tif:m' admits 5000 tokens in flight at a time: this call alone has up to 5001"
    assert raised.value.message == said
    with pytest.raises(DemandImpossible):  # one that waits when the limit is lowered
        flow.check_amounts("5001")
    flow.check_amounts("")  # it asked before the limit counted tokens


@pytest.mark.parametrize("bound", [0, 5000])
def test_a_limit_in_shadow_rejects_no_call_for_its_size(bound: int) -> None:
    flow = Flow(1, "t", ("tif:m",))
    limit = Concurrency(bound, shadow=True, unit="tokens_in_flight")
    flow.refresh(PoolPolicy({"tif:m": limit}))
    assert flow.amounts(Demand(flow.limits, tokens=Tokens(4000, 1001))) == "5001"
    flow.check_amounts("5001")
    assert flow.amounts(Demand(flow.limits, tokens=Tokens(4000, 10**30))) == str(MAX_BOUND)


@pytest.mark.parametrize(
    ("limit", "key"),
    [
        (Rate(9, MINUTE_MS, "requests", weights=Weights(1, 1, 1, 1)), "tpm:m.weights"),
        (Rate(9, MINUTE_MS, "tokens", weights=Weights(1, -1, 1, 1)), "tpm:m.weights.cached"),
        (Rate(9, MINUTE_MS, "tokens", reserve="most"), "tpm:m.reserve"),  # type: ignore[arg-type]
        (Concurrency(9, unit="tokens"), "tpm:m.unit"),  # type: ignore[arg-type]
        (Concurrency(9, reserve="bound"), "tpm:m.reserve"),
        (Concurrency(9, False, Adaptive(1), "tokens_in_flight"), "tpm:m.adaptive"),
        (Rate(9, MINUTE_MS, shape="leaky"), "tpm:m.shape"),  # type: ignore[arg-type]
        (Rate(9, MINUTE_MS, pace_ms=0), "tpm:m.pace_ms"),
        (Rate(9, MINUTE_MS, pace_ms=MINUTE_MS + 1), "tpm:m.pace_ms"),
        (Rate(9, MINUTE_MS, ramp=Ramp(0, 1)), "tpm:m.ramp.percent_per_minute"),
        (Rate(9, MINUTE_MS, ramp=Ramp(50, 0)), "tpm:m.ramp.start"),
    ],
)
def test_what_can_not_be_is_refused_by_its_key(limit: Limit, key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        PoolPolicy({"tpm:m": limit})
    assert raised.value.variable == key


def test_a_policy_packs_and_unpacks_all_of_a_limit() -> None:
    policy = PoolPolicy(
        {
            "tpm:m": Rate(9, MINUTE_MS, "tokens", 7, True, Weights(1, 0, 1, 5), "bound", False),
            "itpm:m": Rate(9, MINUTE_MS, "input_tokens", pace_ms=1000, ramp=Ramp(50, 3)),
            "otpm:m": Rate(9, MINUTE_MS, "output_tokens", shape="bucket"),
            "rpd:m": Quota(9, "usd", reserve="larger"),
            "rpm:m": Rate(9, MINUTE_MS),
            "tif:m": Concurrency(9, unit="tokens_in_flight", reserve="bound"),
            "kind:a": Concurrency(9, True, Adaptive(2)),
            "model:m": Concurrency(9, adaptive=Adaptive(2, "latency")),
        }
    )
    assert PoolPolicy.unpack(policy.pack()) == policy
