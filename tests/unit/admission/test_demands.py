"""What a call asks the limiter for, and what it is settled for."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest

from tidegate.admission.demand import CallDemand, Demands
from tidegate.admission.estimator import Modality
from tidegate.call import Call, Kind, Usage
from tidegate.limiter import PoolPolicy, Tokens
from tidegate.policy.format import of_plain

POLICY = of_plain(
    {
        "limits": {
            "kind:text_only": 5,
            "kind:image_generation": 2,
            "kind:classifier": 1,
            "model:m": 9,
            "itpm:m": 1_000,
            "ipm:m": 3,
        }
    }
)


def call(kind: Kind = Kind.TEXT_ONLY, *, tenant_id: str = "default", priority: int = 0) -> Call:
    return Call(uuid4(), "a" * 400, kind, "m", tenant_id=tenant_id, priority=priority)


def demand() -> CallDemand:
    return Demands().of(call(), POLICY)


def reserved(asked: CallDemand) -> Tokens:
    assert asked.tokens is not None
    return asked.tokens


def test_a_call_asks_for_its_limits_its_tokens_and_its_place() -> None:
    asked = Demands().of(call(tenant_id="acme", priority=50), POLICY)
    assert asked.limits == ("kind:text_only", "model:m", "itpm:m")
    assert (asked.tenant, asked.priority, asked.images) == ("acme", "high", 0)
    assert reserved(asked).input >= 300
    assert reserved(asked).output >= 800


def test_one_that_makes_an_image_asks_for_one() -> None:
    asked = Demands().of(call(Kind.IMAGE_GENERATION), POLICY)
    assert asked.images == 1
    assert "ipm:m" in asked.limits
    assert reserved(asked).output >= 1_290


def test_the_classifiers_question_falls_under_its_own_limit_and_the_models() -> None:
    asked = Demands().of_question("is it a picture?", "m", POLICY, max_output_tokens=512)
    assert asked.limits == ("kind:classifier", "model:m", "itpm:m")
    assert asked.priority == "normal"
    assert reserved(asked).output == 512


def test_another_policy_is_seen_at_once() -> None:
    demands = Demands()
    assert "model:m" in demands.of(call(), POLICY).limits
    other = PoolPolicy({"kind:text_only": 5, "pool:total": 3})
    assert demands.of(call(), other).limits == ("kind:text_only", "pool:total")
    assert "model:m" in demands.of(call(), POLICY).limits


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_not_known_stays_reserved(whole: bool) -> None:
    asked = demand()
    assert asked.used(Usage(), whole=whole) is None
    only_input = asked.used(Usage(input_tokens=90), whole=whole)
    assert only_input == Tokens(90, reserved(asked).output)
    only_total = asked.used(Usage(total_tokens=90), whole=whole)
    assert only_total is None


def test_a_whole_answer_is_settled_for_what_it_used() -> None:
    usage = Usage(input_tokens=90, output_tokens=10, thoughts_tokens=5, total_tokens=105)
    assert demand().used(usage, whole=True) == Tokens(90, 15)


def test_of_a_cut_answer_the_provider_may_have_made_more_than_it_told() -> None:
    asked = demand()
    cut = Usage(input_tokens=90, output_tokens=10)
    assert asked.used(cut, whole=False) == Tokens(90, reserved(asked).output)
    long = Usage(input_tokens=90, output_tokens=100_000)
    assert asked.used(long, whole=False) == Tokens(90, 100_000)


def test_a_whole_answer_teaches_both_sides_and_a_cut_one_its_input() -> None:
    demands = Demands()
    asked = demands.of(call(), POLICY)
    usage = Usage(input_tokens=90, output_tokens=10)
    demands.learn(asked, usage, whole=False)
    assert {one.part: one.calls for one in demands.estimator.error()} == {"input": 1}
    demands.learn(asked, usage, whole=True)
    assert {one.part: one.calls for one in demands.estimator.error()} == {
        "input": 2,
        "output:text_only": 1,
    }


def test_more_than_was_reserved_is_settled_and_teaches() -> None:
    demands = Demands()
    asked = demands.of(call(), POLICY)
    came = Usage(input_tokens=100, output_tokens=50_000)
    assert asked.used(Usage(), came, whole=False) == Tokens(reserved(asked).input, 50_000)
    told = Usage(input_tokens=90, output_tokens=1)
    assert asked.used(told, came, whole=False) == Tokens(90, 50_000)
    demands.learn(asked, Usage(), came, whole=False)
    assert reserved(demands.of(call(), POLICY)).output > 3 * reserved(asked).output


def test_nobody_teaches_a_reservation_below_the_first_guess_nor_that_of_another() -> None:
    demands = Demands()
    before = reserved(demands.of(call(tenant_id="other"), POLICY))
    for _ in range(300):
        demands.learn(demands.of(call(tenant_id="acme"), POLICY), Usage(1, 1), whole=True)
    assert reserved(demands.of(call(tenant_id="other"), POLICY)) == before
    taught = reserved(demands.of(call(tenant_id="acme"), POLICY))
    assert (taught.input, taught.output) == (100, 800)
    bounded = demands.of_native(
        *("m", "text_only", {Modality.LATIN: 100.0}, POLICY),
        tenant="acme",
        priority=0,
        max_output_tokens=20,
    )
    assert reserved(bounded) == Tokens(100, 20)


def native(demands: Demands, policy: PoolPolicy) -> CallDemand:
    pieces = {Modality.LATIN: 100.0}
    return demands.of_native("m", "text_only", pieces, policy, tenant="acme", priority=0)


def test_a_native_request_is_estimated_where_a_limit_counts_tokens() -> None:
    demands = Demands()
    assert all(native(demands, POLICY).tokens is not None for _ in range(20))


def test_where_none_does_it_learns_from_some() -> None:
    demands, policy = Demands(), PoolPolicy({"kind:text_only": 5})
    asked = [native(demands, policy) for _ in range(80)]
    known = [one for one in asked if one.tokens is not None]
    assert len(known) == 5
    assert asked[0] is known[0]
    for one in asked:
        assert one.used(Usage(90, 10), whole=True) in (None, Tokens(90, 10))
        demands.learn(one, Usage(90, 10), whole=True)
    assert {track.calls for track in demands.estimator.error()} == {5}


def test_a_pool_whose_kinds_are_optional_needs_no_limit_on_them() -> None:
    optional = Demands(kinds_optional=True)
    assert native(optional, PoolPolicy({"pool:total": 5})).limits == ("pool:total",)
    assert native(optional, PoolPolicy({})).limits == ()
    assert native(Demands(), PoolPolicy({})).limits == ("kind:text_only",)


@pytest.mark.parametrize("model", ["tenant/acme", "kind/image_generation", "total"])
def test_a_model_that_is_called_as_a_tenant_is_takes_no_limit_of_that_tenant(model: str) -> None:
    limits = {"kind:text_only": 5, "tenant:acme": 2, "rpm:tenant/acme": 60, "rpm:total": 100}
    policy = of_plain({"limits": limits | {"rpm:kind/image_generation": 9}})
    asked = Demands().of(replace(call(tenant_id="other"), model=model), policy)
    assert asked.limits == ("kind:text_only", "rpm:total")


def test_a_call_takes_the_limits_of_its_key_and_user_and_our_question_none() -> None:
    limits = {"kind:text_only": 5, "rpm:key/k1": 2, "rpm:user/acme/ann": 3, "kind:classifier": 1}
    policy, tags = of_plain({"limits": limits}), ("k1", "ann", None)
    demands = Demands()
    own = ("kind:text_only", "rpm:key/k1", "rpm:user/acme/ann")
    assert demands.of(call(tenant_id="acme"), policy, tags).limits == own
    assert demands.of(call(tenant_id="acme"), policy).limits == own[:1]
    asked = demands.of_question("a", "m", policy, tenant="acme", max_output_tokens=9)
    assert asked.limits == ("kind:classifier",)


def test_each_model_of_a_list_is_bound_with_the_folder_or_without() -> None:
    limits = {"kind:text_only": 5, "rpm:models/a,models/b": 9}
    policy = of_plain({"limits": limits})
    for model in ("a", "b", "models/b"):
        asked = Demands().of(replace(call(), model=model), policy)
        assert asked.limits == tuple(limits), model
