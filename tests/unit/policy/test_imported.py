"""Limits of an account as limits of a policy: groups, ids, units, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.errors import ConfigError
from tidegate.limiter import PoolPolicy, Quota, Rate
from tidegate.policy.format import of_plain, to_plain, with_tenants, without_tenants
from tidegate.policy.imported import ModelClass, class_name, import_of, limits_of, one_class_each


@pytest.mark.parametrize(
    ("models", "others", "name"),
    [
        (["gpt-5"], ["gpt-5-mini"], "gpt-5"),
        (["claude-opus-4-1", "claude-opus-4-6"], ["claude-sonnet-4-5"], "claude-opus-4-*"),
        (["claude-opus-4", "claude-opus-4-1"], ["claude-opus-3"], "claude-opus-4*"),
        (["gpt-4o", "gpt-4o-2024-08-06"], ["gpt-5"], "gpt-4o*"),
        # No pattern fits them alone.
        (["gpt-4o", "gpt-4o-2024-08-06"], ["gpt-4o-mini"], "gpt-4o,gpt-4o-2*"),
        (["a-b-1", "a-c-1"], [], "a-b-1,a-c-1"),
    ],
)
def test_a_class_is_named_by_the_plainest_name_that_fits_it_alone(
    models: list[str], others: list[str], name: str
) -> None:
    assert class_name(models, others) == name


def test_a_class_that_no_id_can_name_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="--shared PATTERN"):
        class_name([f"model{number}" for number in range(50)], [])


def test_snapshots_share_with_their_model_and_others_only_where_it_is_stated() -> None:
    classes = [
        ModelClass(("gpt-4o",), {"rpm": 500}),
        ModelClass(("gpt-4o-2024-08-06",), {"rpm": 500}),
        ModelClass(("gpt-5",), {"rpm": 600, "tpm": 9}),
        ModelClass(("gpt-5-mini",), {"rpm": 500, "tpm": 9}),
    ]
    assert [one.models for one in one_class_each(classes, [])] == [
        ("gpt-4o", "gpt-4o-2024-08-06"),
        ("gpt-5",),
        ("gpt-5-mini",),
    ]
    limits = limits_of(one_class_each(classes, ["gpt-5*"]), "openai")
    assert {name: value["bound"] for name, value in limits.items()} == {
        "rpm:gpt-4o*": 500,
        "rpm:gpt-5*": 500,  # the lower one
        "tpm:gpt-5*": 9,
    }
    with pytest.raises(ConfigError, match="must match models"):
        one_class_each(classes, ["gpt-6*"])


def test_input_counts_cached_tokens_where_the_provider_reports_it_so() -> None:
    classes = [
        ModelClass(("new",), {"itpm": 5}),
        ModelClass(("old",), {"itpm": 5}, {"itpm": "input_tokens"}),
    ]
    policy = of_plain({"limits": limits_of(classes, "anthropic")})
    new, old = policy.limit("itpm:new"), policy.limit("itpm:old")
    assert isinstance(new, Rate)
    assert isinstance(old, Rate)
    assert (new.unit, old.unit) == ("uncached_input_tokens", "input_tokens")
    assert (new.shape, old.shape) == ("bucket", "bucket")
    assert new.source == old.source == "imported"


TOLD = {
    "rpm:gpt-5": {"bound": 500, "source": "imported"},
    "itpm:gpt-5": {"bound": 9, "source": "imported"},
}


def test_a_limit_that_a_person_set_is_kept_unless_it_is_to_be_replaced() -> None:
    now: dict[str, Any] = {"uitpm:gpt-5": 7, "pool:total": 64}
    change = import_of(TOLD, now)
    assert change.kept == {"uitpm:gpt-5": 9}
    assert change.edit({"limits": now})["limits"] == {**now, "rpm:gpt-5": TOLD["rpm:gpt-5"]}
    change = import_of(TOLD, now, replace=True)
    assert change.kept == {}
    assert change.edit({"limits": now})["limits"] == {"pool:total": 64, **TOLD}


def test_a_second_import_changes_what_the_account_has_changed() -> None:
    old = {"bound": 1, "source": "imported"}
    now = {"rpm:gpt-5": old, "rpm:gone": old, "rpm:mine": 3}
    change = import_of(TOLD, now)
    assert change.remove == ("rpm:gone",)
    after = change.edit({"limits": now})["limits"]
    assert after == {"rpm:mine": 3, **TOLD}
    again = import_of(TOLD, to_plain(of_plain({"limits": after}))["limits"])
    assert (again.set, again.remove) == ({}, ())


def test_imported_limits_stay_while_deployments_change() -> None:
    deployed = {"limits": {"pool:total": 64}}
    now = {"limits": {**deployed["limits"], **TOLD}}
    assert without_tenants(now) == without_tenants(deployed)
    changed = {"limits": {"pool:total": 8, "rpm:gpt-5": 60}}
    kept = with_tenants(changed, now)["limits"]
    assert kept == {"pool:total": 8, "rpm:gpt-5": 60, "itpm:gpt-5": TOLD["itpm:gpt-5"]}


def test_the_source_of_a_limit_survives_its_record_and_its_packing() -> None:
    policy = PoolPolicy(
        {
            "rpm:a": Rate(5, 60_000, source="imported"),
            "tpm:a": Rate(5, 60_000, "tokens", pace_ms=9, source="learned"),
            "rpd:a": Quota(5, source="learned"),
            "rpm:b": Rate(5, 60_000),
        }
    )
    assert PoolPolicy.unpack(policy.pack()) == policy
    assert of_plain(to_plain(policy)) == policy
    with pytest.raises(ConfigError, match="must be one of set, imported, learned"):
        of_plain({"limits": {"rpm:a": {"bound": 5, "source": "guessed"}}})
