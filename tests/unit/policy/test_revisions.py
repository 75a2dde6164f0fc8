"""Which policy is in force: pure decisions, then whole histories of deployments and people."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tidegate.errors import ConfigError
from tidegate.limiter import PoolPolicy
from tidegate.policy import rollout as revisions
from tidegate.policy.format import Plain, digest, to_plain, with_tenants
from tidegate.policy.rollout import Conflict, Decision, Found, Origin, Revision, differences
from tidegate.policy.tenants import share_edit


def plain(limit: int) -> Plain:
    return {"limits": {"kind:text_only": limit}}


@dataclass
class Pool:
    """A limiter's memory, and the record beside it; either can be lost."""

    found: PoolPolicy
    record: list[Revision] = field(default_factory=list)

    @property
    def head(self) -> Revision | None:
        return self.record[-1] if self.record else None

    @property
    def limit(self) -> int:
        return self.found.bound("kind:text_only")

    def take(self, decision: Decision) -> Decision:
        numbers = [revision.number for revision in self.record]
        assert all(new.number not in numbers for new in decision.new)
        self.record.extend(decision.new)
        if decision.force.number > self.found.revision:
            self.found = decision.force.pool_policy
        return decision

    def start(self, limit: int, **more: Any) -> Decision:
        """`more`: limits of tenants that the deployment's file names too."""
        wanted = {"limits": {**plain(limit)["limits"], **more.pop("limits", {})}, **more}
        deployed = {r.requested_digest for r in self.record if r.origin is Origin.DEPLOYMENT}
        seen = digest(wanted) in deployed
        before = revisions.requested_before(
            [revisions.record_of(one) for one in reversed(self.record)]
        )
        found = Found(self.found)
        return self.take(revisions.start(self.head, seen, found, wanted, "api-1", before))

    def set(self, limit: int) -> Decision:
        return self.take(
            revisions.change(
                self.head, Found(self.found), lambda _: plain(limit), set_by="ann", reason="more"
            )
        )

    def give(self, tenant: str, **share: Any) -> Decision:
        """As `tidegate tenants set` does."""
        edit = share_edit(tenant, **share)
        assert edit is not None
        return self.take(
            revisions.change(self.head, Found(self.found), edit, set_by="ann", reason="")
        )

    def deploy_again(self, limit: int, **more: Any) -> Decision:
        """As `tidegate limits set --deployed` does. `more` as of `start`."""
        wanted = {"limits": plain(limit)["limits"] | more}
        return self.take(
            revisions.change(
                self.head,
                Found(self.found),
                partial(with_tenants, wanted),
                set_by="ann",
                reason="",
                origin=Origin.DEPLOYMENT,
                deployed=wanted,
            )
        )

    def watch(self) -> Decision:
        return self.take(revisions.watch(self.head, Found(self.found, "bob")))

    def lose_valkey(self, starting: int) -> None:
        """An empty Valkey takes what the next process starts with."""
        head = self.head
        self.found = head.pool_policy if head else replace(self.found, limits=plain(starting))


def new_pool(limit: int = 5) -> Pool:
    return Pool(PoolPolicy({"kind:text_only": limit}))


def test_the_first_start_puts_its_policy_on_record() -> None:
    pool = new_pool(5)
    assert pool.start(5).conflict is None
    assert [(r.number, r.origin, r.policy) for r in pool.record] == [(1, "deployment", plain(5))]
    assert pool.start(5).new == ()


def test_a_new_deployment_wins_and_its_restart_changes_nothing() -> None:
    pool = new_pool(5)
    pool.start(5)
    pool.start(7)
    assert (pool.limit, pool.found.revision) == (7, 2)
    assert pool.start(7).new == ()


def test_an_older_deployment_never_comes_back_by_itself() -> None:
    pool = new_pool(5)
    for limit in (5, 7, 9):
        pool.start(limit)
    for older in (5, 7, 5):
        assert pool.start(older).conflict is Conflict.OLDER
        assert (pool.limit, pool.found.revision) == (9, 3)


def test_what_was_set_live_stays_whatever_is_deployed() -> None:
    pool = new_pool(5)
    pool.start(5)
    pool.set(3)
    for deployed, conflict in ((5, Conflict.KEPT), (8, Conflict.LIVE)):
        assert pool.start(deployed).conflict is conflict
        assert pool.limit == 3
    assert pool.start(3).conflict is None
    assert len(pool.record) == 2


def test_what_a_tenant_was_given_stays_and_new_deployments_still_win() -> None:
    pool = new_pool(5)
    pool.start(5)
    pool.give("acme", weight=4, limits={"tenant:acme": 2})
    assert (pool.head, pool.found.weights) == (pool.record[-1], {"acme": 4})
    assert pool.start(5).conflict is None
    assert pool.start(7).conflict is None
    assert pool.limit == 7
    assert pool.start(5).conflict is Conflict.OLDER
    assert (pool.found.weights, pool.found.bound("tenant:acme")) == ({"acme": 4}, 2)
    pool.give("acme", limits={"tenant:acme": None})
    assert pool.start(7).conflict is None
    assert "tenant:acme" not in pool.found.limits


def test_what_a_file_says_of_a_tenant_is_the_files() -> None:
    pool = new_pool(5)
    pool.start(5, limits={"tenant:acme": 3})
    pool.give("other", weight=2)
    pool.give("acme", limits={"tenant:acme": 9})
    assert pool.start(5, limits={"tenant:acme": 3}).conflict is Conflict.OLDER
    assert pool.found.bound("tenant:acme") == 9
    pool.start(5, limits={"tenant:acme": 4})
    assert (pool.found.bound("tenant:acme"), pool.found.weights) == (4, {"other": 2})


def test_where_no_tenant_was_given_anything_a_file_takes_away_what_it_gave() -> None:
    pool = new_pool(5)
    pool.start(5, limits={"tenant:acme": 3}, weights={"acme": 2})
    pool.start(5, weights={"other": 3})
    assert ("tenant:acme" in pool.found.limits, pool.found.weights) == (False, {"other": 3})


def test_a_file_takes_away_what_it_gave_whatever_others_were_given_live() -> None:
    pool = new_pool(5)
    pool.start(5, limits={"tenant:acme": 3, "rpm:tenant/acme": 60}, weights={"acme": 2, "b": 2})
    pool.give("other", weight=7, limits={"tenant:other": 4})
    for limit in (6, 8):  # also by a deployment that has come in beside what was given
        pool.start(limit, limits={"tenant:acme": 3, "rpm:tenant/acme": 60}, weights={"acme": 2})
        assert pool.found.weights == {"acme": 2, "other": 7}
    pool.give("acme", limits={"rpm:tenant/acme": 30})
    pool.start(8, limits={})
    assert pool.found.weights == {"other": 7}
    assert set(pool.found.limits) == {"kind:text_only", "tenant:other", "rpm:tenant/acme"}
    assert pool.found.bound("rpm:tenant/acme") == 30, "given live"
    assert pool.start(8).conflict is None


def test_a_file_takes_away_what_was_written_into_it_after_it_was_given_live() -> None:
    pool = new_pool(5)
    pool.start(5)
    pool.give("acme", limits={"tenant:acme": 3})
    pool.start(5, limits={"tenant:acme": 3})
    assert pool.start(5, limits={"tenant:acme": 3}).new == ()
    pool.give("other", weight=7)
    pool.start(6)
    assert "tenant:acme" not in pool.found.limits
    pool.set(3)
    pool.give("other", weight=7)
    pool.deploy_again(6, **{"tenant:acme": 2})
    pool.start(7)
    assert ("tenant:acme" in pool.found.limits, pool.found.weights) == (False, {"other": 7})


def test_to_go_back_to_the_deployments_policy_takes_nothing_from_tenants() -> None:
    pool = new_pool(5)
    pool.start(5)
    pool.set(3)
    pool.give("acme", weight=4, limits={"rpm:tenant/acme": 60})
    assert pool.start(8).conflict is Conflict.LIVE
    pool.deploy_again(8)
    assert (pool.limit, pool.found.weights) == (8, {"acme": 4})
    assert "rpm:tenant/acme" in pool.found.limits
    assert pool.start(8).conflict is None
    assert pool.start(9).conflict is None
    assert (pool.limit, pool.found.weights) == (9, {"acme": 4})


def test_a_person_may_go_back_to_the_deployments_policy_and_new_ones_win_again() -> None:
    pool = new_pool(5)
    pool.start(5)
    pool.set(3)
    decision = revisions.change(
        pool.head,
        Found(pool.found),
        lambda _: plain(5),
        set_by="ann",
        reason="",
        origin=Origin.DEPLOYMENT,
    )
    pool.take(decision)
    assert pool.limit == 5
    pool.start(6)
    assert pool.limit == 6


def test_a_change_that_changes_nothing_is_no_revision() -> None:
    pool = new_pool(5)
    pool.start(5)
    assert pool.set(5).new == ()
    assert pool.head is not None
    assert pool.head.origin is Origin.DEPLOYMENT


def test_a_change_that_is_not_sound_is_refused() -> None:
    pool = new_pool(5)
    pool.start(5)
    with pytest.raises(ConfigError, match="kind:text_only"):
        pool.set(-1)
    assert len(pool.record) == 1


def test_a_pool_from_before_there_was_a_record_goes_on_it_first() -> None:
    pool = Pool(PoolPolicy({"kind:text_only": 4}, revision=6))
    pool.start(5)
    assert [(r.number, r.policy) for r in pool.record] == [(6, plain(4)), (7, plain(5))]
    assert (pool.limit, pool.found.revision) == (5, 7)


def test_a_change_made_past_the_record_is_put_on_it_as_live() -> None:
    pool = new_pool(5)
    pool.start(5)
    pool.found = PoolPolicy({"kind:text_only": 2}, revision=4)
    pool.watch()
    assert pool.head is not None
    assert (pool.head.number, pool.head.origin, pool.head.policy) == (4, Origin.LIVE, plain(2))
    assert pool.head.set_by == "bob"
    assert pool.start(6).conflict is Conflict.LIVE


def test_of_two_with_one_number_the_one_on_record_is_in_force() -> None:
    pool = new_pool(5)
    pool.start(5)
    pool.set(3)
    pool.found = PoolPolicy({"kind:text_only": 9}, revision=2)
    pool.start(5)
    assert (pool.limit, pool.found.revision) == (3, 3)


def test_a_record_of_a_later_version_does_not_grow_for_what_this_one_cannot_read() -> None:
    policy = {"limits": {"kind:text_only": {"bound": 5, "burst": 2}}, "later": 1}
    head = Revision(3, Origin.LIVE, policy, "ann")
    found = Found(head.pool_policy)
    assert revisions.watch(head, found).new == ()
    assert revisions.start(head, False, found, plain(8), "api-1").new == ()


def test_differences_are_told_key_by_key() -> None:
    before = {"limits": {"a:b": 1, "c:d": {"bound": 2}}, "pool": {"lease_ms": 500}}
    after = {"limits": {"a:b": 2, "c:d": {"bound": 2}, "e:f": 3}, "weights": {"acme": 4}}
    assert differences(before, after) == [
        "limits.a:b: 1 -> 2",
        "limits.e:f: none -> 3",
        "pool.lease_ms: 500 -> none",
        "weights.acme: none -> 4",
    ]
    assert differences(before, before) == []


class Histories(RuleBasedStateMachine):
    """Deployments start and restart in any order, people set limits, Valkey is lost."""

    @initialize(limit=st.integers(1, 4))
    def begin(self, limit: int) -> None:
        self.pool = new_pool(limit)
        self.pool.start(limit)
        self.ever_deployed = {limit}
        self.live: int | None = None
        self.newest = limit

    @rule(limit=st.integers(1, 4))
    def start(self, limit: int) -> None:
        self.pool.start(limit)
        if limit not in self.ever_deployed and self.live is None:
            self.newest = limit
            self.ever_deployed.add(limit)

    @rule(limit=st.integers(5, 8))
    def set_live(self, limit: int) -> None:
        self.pool.set(limit)
        self.live = limit

    @rule(limit=st.integers(1, 4))
    def lose_valkey(self, limit: int) -> None:
        self.pool.lose_valkey(limit)

    @rule(limit=st.integers(5, 8))
    def set_past_the_record(self, limit: int) -> None:
        number = self.pool.found.revision + 1
        self.pool.found = PoolPolicy({"kind:text_only": limit}, revision=number)
        self.live = limit

    @rule()
    def watch(self) -> None:
        self.pool.watch()
        before = list(self.pool.record)
        self.pool.watch()
        assert self.pool.record == before

    @invariant()
    def the_right_one_is_in_force_and_numbers_grow(self) -> None:
        if not hasattr(self, "pool"):
            return
        record = self.pool.record
        numbers = [revision.number for revision in record]
        assert numbers == sorted(set(numbers))
        expected = self.newest if self.live is None else self.live
        assert self.pool.limit == expected
        self.pool.watch()
        head = self.pool.head
        assert head is not None
        assert to_plain(self.pool.found) == head.policy
        assert self.pool.found.revision == head.number


Histories.TestCase.settings = settings(stateful_step_count=30)
TestHistories = Histories.TestCase


def test_a_difference_is_written_as_a_command_takes_it() -> None:
    before = {"limits": {"rpm:total": 60}, "pool": {"fair_by": "calls"}}
    limit = {"bound": 100, "shape": "bucket", "adaptive": True, "models": ["a", "b"]}
    after = {"limits": {"rpm:total": limit}, "pool": {"fair_by": "cost"}}
    assert differences(before, after) == [
        'limits.rpm:total: 60 -> {bound=100, shape="bucket", adaptive=true, models=["a", "b"]}',
        "pool.fair_by: calls -> cost",
    ]
