"""Which limits a call falls under, and in which band it waits."""

from __future__ import annotations

import pytest

from tidegate.admission.demand import MOST_PRIORITY, NO_TAGS, CallTags, Reach, band_of
from tidegate.limiter import DEFAULT_BANDS, Band, PoolPolicy, Quota, Rate
from tidegate.policy.format import of_plain

POLICY = of_plain(
    {
        "limits": {
            "pool:total": 50,
            "kind:text_only": 5,
            "kind:image_generation": 2,
            "model:m": 20,
            "model:models/other": 20,
            "tenant:acme": 3,
            "rpm:m": 60,
            "tpm:m": 1_000_000,
            "rpd:m": 10_000,
            "rps:total": 9,
            "itpm:kind/text_only": 5_000,
            "rpm:tenant/acme": 6,
            "ipm:m": 4,
            "ipd:total": 400,
            "aspm:m": 60,
        }
    }
)


def test_a_call_falls_under_all_that_name_its_kind_model_tenant_or_everybody() -> None:
    limits = Reach(POLICY).limits("text_only", "m", "acme", 0)
    assert limits[0] == "kind:text_only"
    assert set(limits) == {
        *("kind:text_only", "pool:total", "model:m", "tenant:acme"),
        *("rpm:m", "tpm:m", "rpd:m", "rps:total", "itpm:kind/text_only", "rpm:tenant/acme"),
    }
    assert len(limits) == len(set(limits))


def test_another_call_falls_under_what_is_its_own() -> None:
    assert set(Reach(POLICY).limits("multi_modal", "x", "default", 0)) == {
        *("kind:multi_modal", "pool:total", "rps:total"),
    }


def test_limits_on_images_bind_only_those_who_make_some() -> None:
    with_images = set(Reach(POLICY).limits("image_generation", "m", "default", 1))
    assert {"ipm:m", "ipd:total"} <= with_images
    without = set(Reach(POLICY).limits("image_generation", "m", "default", 0))
    assert with_images - without == {"ipm:m", "ipd:total"}


def test_limits_on_audio_bind_only_calls_with_some() -> None:
    with_audio = set(Reach(POLICY).limits("multi_modal", "m", "default", False, True))
    without = set(Reach(POLICY).limits("multi_modal", "m", "default", False, False))
    assert with_audio - without == {"aspm:m"}
    assert "ipm:m" not in with_audio


def test_the_same_call_always_asks_for_its_limits_in_the_same_order() -> None:
    """They name the lane that it waits in."""
    turned = PoolPolicy(dict(reversed(list(POLICY.limits.items()))))
    for call in (("text_only", "m", "acme", 0), ("image_generation", "m", "x", 1)):
        assert Reach(POLICY).limits(*call) == Reach(turned).limits(*call)


def test_a_model_is_the_same_with_and_without_its_folder() -> None:
    reach = Reach(POLICY)
    assert "model:models/other" in reach.limits("text_only", "other", "x", 0)
    assert "rpm:m" in reach.limits("text_only", "models/m", "x", 0)


def test_the_limit_of_the_kind_is_asked_for_even_where_the_policy_has_none() -> None:
    assert Reach(PoolPolicy({})).limits("text_only", "m", "x", 0) == ("kind:text_only",)


def test_limits_of_other_scopes_bind_nobody() -> None:
    policy = PoolPolicy({"kind:text_only": 1, "gpu:a": 3, "pool:some": 1, "model:m": Rate(5, 1000)})
    limits = Reach(policy).limits("text_only", "m", "a", 0)
    assert limits == ("kind:text_only", "model:m")


def test_it_is_the_unit_that_says_whether_a_limit_is_on_images() -> None:
    policy = PoolPolicy({"rpd:m": Quota(5, unit="images"), "model:m": 3})
    assert Reach(policy).limits("text_only", "m", "x", 0) == ("kind:text_only", "model:m")


@pytest.mark.parametrize(
    ("priority", "band"),
    [(-100, "low"), (-1, "low"), (0, "normal"), (1, "high"), (100, "high"), (1_000, "high")],
)
def test_a_priority_is_a_band(priority: int, band: str) -> None:
    assert band_of(priority, DEFAULT_BANDS) == band


def test_many_bands_share_the_priorities_above_and_below() -> None:
    bands = tuple(Band(name) for name in ("a", "b", "normal", "d", "e", "f", "g"))
    found = [band_of(priority, bands) for priority in range(-MOST_PRIORITY, MOST_PRIORITY + 1)]
    assert found == ["g"] * 25 + ["f"] * 25 + ["e"] * 25 + ["d"] * 25 + ["normal"] + [
        *["b"] * 50,
        *["a"] * 50,
    ]


@pytest.mark.parametrize("names", [("only",), ("normal",), ("x", "y"), ("normal", "z")])
def test_every_priority_has_a_band_and_a_higher_one_never_a_lower(names: tuple[str, ...]) -> None:
    bands = tuple(Band(name) for name in names)
    places = [names.index(band_of(priority, bands)) for priority in range(-101, 102)]
    assert places == sorted(places, reverse=True)


def test_the_models_of_a_pattern_share_its_limits() -> None:
    policy = of_plain(
        {
            "limits": {
                "itpm:claude-opus-4*": 30_000,
                "rpm:claude-*": 50,
                "rpm:claude-opus-4-5": 9,
                "model:claude-opus-4*": 4,
            }
        }
    )
    reach = Reach(policy, kinds_optional=True)
    opus = reach.limits("text_only", "claude-opus-4-5", "t", 0)
    assert set(opus) == set(policy.limits)
    assert set(reach.limits("text_only", "claude-haiku", "t", 0)) == {"rpm:claude-*"}
    assert reach.limits("text_only", "gpt-5", "t", 0) == ()
    # A client that names a pattern as its model is bound by that pattern's limits once.
    assert sorted(reach.limits("text_only", "claude-*", "t", 0)) == ["rpm:claude-*"]


OF_CALLERS = of_plain(
    {
        "limits": {
            "kind:text_only": 5,
            "rpm:key/k1": 2,
            "key:k1": 1,
            "tif:key/k2": 900,
            "rpm:user/acme/ann": 3,
            "user:acme/ann": 1,
            "rpm:user/acme/Bob%20Smith": 4,
            "rpm:user/acme/a%3Db": 5,
            "rpm:key/jwt:ann@example.com": 5,
            "rpm:user/team%2Fa/b/c": 5,
            "conversation:acme/c1": 1,
            "rpm:total": 60,
        }
    }
)


def limits_of(tenant: str, tags: CallTags, model: str = "m") -> set[str]:
    reach = Reach(OF_CALLERS)
    found = reach.limits("text_only", model, tenant, False, False, reach.named(tenant, tags))
    return set(found) - {"kind:text_only", "rpm:total"}


def test_a_call_falls_under_the_limits_of_its_key_user_and_conversation() -> None:
    assert limits_of("acme", ("k1", "ann", "c1")) == {
        *("rpm:key/k1", "key:k1", "rpm:user/acme/ann", "user:acme/ann", "conversation:acme/c1")
    }
    assert limits_of("acme", ("k2", None, None)) == {"tif:key/k2"}
    assert limits_of("acme", ("k3", "bob", "c2")) == set()
    assert limits_of("acme", NO_TAGS) == set()


def test_users_and_conversations_are_those_of_one_tenant() -> None:
    assert limits_of("other", (None, "ann", "c1")) == set()
    # A slash in a name makes of one tenant's user none of another's.
    assert limits_of("team/a", (None, "b/c", None)) == {"rpm:user/team%2Fa/b/c"}
    assert limits_of("team", (None, "a/b/c", None)) == set()
    assert limits_of("team%2Fa", (None, "b/c", None)) == set()


def test_names_are_escaped_where_an_id_can_not_have_their_letters() -> None:
    assert limits_of("acme", (None, "Bob Smith", None)) == {"rpm:user/acme/Bob%20Smith"}
    assert limits_of("acme", (None, "Bob%20Smith", None)) == set()
    assert limits_of("acme", (None, "a=b", None)) == {"rpm:user/acme/a%3Db"}
    assert limits_of("acme", ("jwt:ann@example.com", None, None)) == {"rpm:key/jwt:ann@example.com"}


@pytest.mark.parametrize("model", ["key/k1", "user/acme/ann", "conversation/acme/c1"])
def test_a_model_that_is_called_as_a_caller_is_takes_no_limit_of_that_caller(model: str) -> None:
    assert limits_of("other", NO_TAGS, model) == set()
    assert limits_of("other", NO_TAGS, f"models/{model}") == set()


def test_what_is_kept_of_a_policy_does_not_grow_by_names_that_it_does_not_have() -> None:
    reach = Reach(OF_CALLERS)
    for number in range(50):
        named = reach.named("acme", (f"k{number + 3}", f"user {number}", f"c {number}"))
        reach.limits("text_only", "m", "acme", False, False, named)
    assert reach.limits.cache_info().currsize == 1
    assert Reach(POLICY).named("acme", ("k1", "ann", "c1")) == ()


def test_a_policy_says_what_its_calls_have_to_be_estimated_for() -> None:
    def reach(limits: dict[str, object]) -> Reach:
        return Reach(of_plain({"limits": limits}))

    assert not reach({"rpm:m": 5}).counts_tokens
    assert reach({"usdpm:m": 5}).counts_tokens
    assert reach({"usdpm:m": 5}).counts_money
    assert not reach({"itpm:m": 5}).counts_cache
    assert reach({"uitpm:m": 5}).counts_cache
    assert reach({"tpm:m": {"bound": 5, "weights": {"cached": 0}}}).counts_cache
