"""What of a policy is one tenant's, and changes that leave the others alone."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.errors import ConfigError
from tidegate.policy.format import Share, is_of, share_edit, share_of, without

PLAIN: dict[str, Any] = {
    "limits": {
        "kind:text_only": 5,
        "tenant:acme": 3,
        "rpm:tenant/acme": 60,
        "tenant:acme2": 9,
        "rpm:acme": 7,
    },
    "weights": {"acme": 4, "acme2": 2},
}


def test_a_share_is_a_weight_and_the_limits_that_bind_it_alone() -> None:
    assert share_of(PLAIN, "acme") == Share(4, {"tenant:acme": 3, "rpm:tenant/acme": 60})
    assert share_of(PLAIN, "nobody") == Share(1, {})
    assert not is_of("rpm:acme", "acme")
    assert not is_of("kind:text_only", "text_only")


def test_a_change_sets_and_removes_only_its_own() -> None:
    edit = share_edit("acme", weight=9, limits={"tenant:acme": None, "tpm:tenant/acme": 10})
    assert edit is not None
    changed = edit(PLAIN)
    assert share_of(changed, "acme") == Share(9, {"rpm:tenant/acme": 60, "tpm:tenant/acme": 10})
    assert share_of(changed, "acme2") == share_of(PLAIN, "acme2")
    assert PLAIN["weights"] == {"acme": 4, "acme2": 2}, "the old policy is left as it was"


def test_a_tenant_can_be_taken_out_whole() -> None:
    left = without("acme")(PLAIN)
    assert left["weights"] == {"acme2": 2}
    assert sorted(left["limits"]) == ["kind:text_only", "rpm:acme", "tenant:acme2"]


def test_nothing_to_change_is_no_change() -> None:
    assert share_edit("acme") is None
    assert share_edit("acme", limits={}) is None


@pytest.mark.parametrize("limit", ["kind:text_only", "tenant:other", "rpm:total", "rpm:acme", "x"])
def test_the_limits_of_others_are_out_of_reach(limit: str) -> None:
    with pytest.raises(ConfigError, match="rpm:tenant/acme"):
        share_edit("acme", limits={limit: 1})
    with pytest.raises(ConfigError, match="from 1 to 1000"):
        share_edit("acme", weight=0)
