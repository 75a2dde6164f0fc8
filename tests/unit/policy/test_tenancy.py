"""What of a policy is one tenant's, and changes that leave the others alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tidegate.errors import ConfigError, PolicyChanged
from tidegate.limiter import PoolPolicy
from tidegate.policy.format import (
    Plain,
    is_of,
    with_tenants,
    without_tenants,
)
from tidegate.policy.tenants import Share, TenantChange, set_tenant, share_edit, share_of, without
from tidegate.store.tenants import Tenant

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


def test_a_tenant_is_taken_out_with_its_keys_users_and_conversations() -> None:
    limits = {
        "kind:text_only": 5,
        "tenant:acme": 3,
        "rpm:key/k1": 2,
        "key:k2": 2,
        "rpm:user/acme/ann": 2,
        "conversation:acme/c1": 2,
        "user:acme%2Fa/ann": 2,
        "rpm:user/acme2/ann": 2,
        "rpm:key/k3": 2,
    }
    left = without("acme", ["k1", "k2"])({"limits": limits})
    kept = ["kind:text_only", "rpm:key/k3", "rpm:user/acme2/ann", "user:acme%2Fa/ann"]
    assert sorted(left["limits"]) == kept
    slashed = without("acme/a")({"limits": limits})["limits"]
    assert limits.keys() - slashed.keys() == {"user:acme%2Fa/ann"}


def test_limits_of_keys_and_users_stay_while_deployments_change() -> None:
    given = {"rpm:key/k1": 2, "user:acme/ann": 1, "conversation:acme/c1": 1}
    now = {"limits": {"kind:text_only": 5, "rpm:m": 9, **given}}
    deployed: dict[str, Any] = {"limits": {"kind:text_only": 6}}
    assert with_tenants(deployed, now) == {"limits": {"kind:text_only": 6, **given}}
    assert without_tenants(now) == {"limits": {"kind:text_only": 5, "rpm:m": 9}}


def test_nothing_to_change_is_no_change() -> None:
    assert share_edit("acme") is None
    assert share_edit("acme", limits={}) is None


@pytest.mark.parametrize("limit", ["kind:text_only", "tenant:other", "rpm:total", "rpm:acme", "x"])
def test_the_limits_of_others_are_out_of_reach(limit: str) -> None:
    with pytest.raises(ConfigError, match="rpm:tenant/acme"):
        share_edit("acme", limits={limit: 1})
    with pytest.raises(ConfigError, match="from 1 to 1000"):
        share_edit("acme", weight=0)


async def test_a_change_is_checked_against_what_is_on_record() -> None:
    newest = {"limits": {}, "weights": {"acme": 4}}
    changed: list[Plain] = []

    class Records:
        async def change(self, edit: Callable[[Plain], Plain], **_: object) -> None:
            changed.append(edit(newest))

        async def check(self, *_: object) -> None:
            pass

        async def knows(self, name: str) -> bool:
            return name == "team/.."

        async def set(self, *_: object, **__: object) -> Tenant:
            return cast(Tenant, SimpleNamespace(tenant_id="acme"))

    records = Records()
    limiter = SimpleNamespace(policy=PoolPolicy({}))  # that of before
    control = cast(Any, SimpleNamespace(limiter=limiter, keeper=records, tenants=records))
    for seen in (4, 1):
        wanted = TenantChange({}, weight=5, expected={"weight": seen})
        with nullcontext() if seen == 4 else pytest.raises(PolicyChanged):
            await set_tenant(control, "acme", wanted, by="ann")
    assert [one["weights"] for one in changed] == [{"acme": 5}]

    # A name that no new tenant may have is that of an old one.
    await set_tenant(control, "team/..", TenantChange({}, disabled=True), by="ann")
    with pytest.raises(ConfigError):
        await set_tenant(control, "team/.", TenantChange({}, disabled=True), by="ann")
