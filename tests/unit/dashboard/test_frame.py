"""A moment of a pool, bounded whatever its size."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import orjson

from tidegate.dashboard.changes import (
    MOST_SHOWN_CHANGES,
    pause_events,
    policy_events,
    revisions_page,
    upstream_events,
)
from tidegate.dashboard.feed import (
    LIMITS_PAGE,
    MOST_BUDGETS,
    MOST_FOUND,
    MOST_LIMITS,
    MOST_PROCESSES,
    MOST_TENANTS,
    NO_GROUP,
    Grouping,
    budgets_frame,
    limits_page,
    pool_frame,
    upstream_frame,
    weights_in,
)
from tidegate.limiter import (
    Adaptive,
    Concurrency,
    LimitView,
    PoolPolicy,
    QueueView,
    Quota,
    Rate,
    SessionView,
    Snapshot,
    TenantView,
)
from tidegate.metrics.process import Note, UpstreamFound
from tidegate.prices.budgets import Budget
from tidegate.spine.routing import DRAINED
from tidegate.store.budgets import BudgetBook
from tidegate.store.operator_actions import RequestedPause
from tidegate.store.provider.upstreams import UpstreamRevision
from tidegate.store.records import PolicyRecord

GROUPINGS: tuple[Grouping, ...] = ("tenant", "model", "kind")


def limit(name: str, sort: str = "c", *, waiting: int = 0, paused_ms: int = 0) -> LimitView:
    return LimitView(name, sort, 10, 4, waiting, 1, 8, 0, paused_ms, "ann: why", 0, 3)


def snapshot(**named: object) -> Snapshot:
    usual: dict[str, object] = {
        "limits": {},
        "sessions": 1,
        "epoch": 1,
        "revision": 7,
        "recovering_ms": 0,
        "state": "up",
    }
    return Snapshot(**{**usual, **named})  # type: ignore[arg-type]


def test_each_sort_of_limit_says_what_it_is() -> None:
    policy = PoolPolicy(
        {
            "kind:a": Concurrency(10, adaptive=Adaptive()),
            "tpm:total": Rate(10, 60_000, "tokens", shadow=True),
            "rpd:total": Quota(10, zone="UTC"),
        }
    )
    views = [limit("kind:a"), limit("tpm:total", "r"), limit("rpd:total", "q")]
    frame = pool_frame("p", snapshot(limits={one.limit: one for one in views}), policy)
    first, quota, rate = frame["limits"]
    assert (first["sort"], first["adaptive"], first["current"]) == ("concurrency", True, 8)
    assert (rate["sort"], rate["unit"], rate["window_ms"], rate["shadow"]) == (
        *("rate", "tokens", 60_000),
        True,
    )
    assert (quota["sort"], quota["zone"], quota["reserved"]) == ("quota", "UTC", 3)
    assert frame["revision"] == 7


def test_of_a_crowd_the_most_pressed_are_shown_and_the_rest_counted() -> None:
    many = 10 * MOST_LIMITS
    limits = {f"tenant:t{n:05}": limit(f"tenant:t{n:05}") for n in range(many)}
    limits["z:paused"] = limit("z:paused", paused_ms=5)
    limits["z:crowded"] = limit("z:crowded", waiting=9)
    tenants = tuple(TenantView(f"t{n:05}", n, 1) for n in range(many))
    processes = tuple(SessionView(f"s{n}", f"api-{n}", 1_000, n, False) for n in range(many))
    queues = (
        QueueView("s1", "api-1", 1, f"t{many - 1:05}", ("a:a",), "a:a", 2, 1),
        QueueView("s2", "api-2", 1, f"t{many - 1:05}", ("a:b",), "a:b", 5, 1),
        QueueView("s2", "api-2", 1, "t00001", ("a:b",), None, 1, 1),
    )
    whole = snapshot(limits=limits, tenants=tenants, processes=processes, queues=queues)
    frame = pool_frame("p", whole, PoolPolicy({}))
    assert len(frame["limits"]) == MOST_LIMITS
    assert frame["more_limits"] == many + 2 - MOST_LIMITS
    assert frame["paused_limits"] == 1
    assert {"z:paused", "z:crowded"} <= {one["limit"] for one in frame["limits"]}
    assert (len(frame["tenants"]), frame["more_tenants"]) == (MOST_TENANTS, many - MOST_TENANTS)
    assert (frame["tenants"][0]["waiting"], frame["tenants"][0]["held_up_by"]) == (many - 1, "a:b")
    assert (len(frame["processes"]), frame["more_processes"]) == (
        MOST_PROCESSES,
        many - MOST_PROCESSES,
    )
    assert frame["waiting"] == sum(range(many))
    assert len(orjson.dumps(frame)) < 60_000


def test_an_upstream_is_shown_as_the_process_finds_it_that_finds_it_worst() -> None:
    well, tried = UpstreamFound("ok"), UpstreamFound("trying", faults=9, why="it was 503")
    out, refused = UpstreamFound("out", faults=5, why="it was cut"), UpstreamFound("out", True)
    notes = [
        Note(f"api-{number}", upstreams={"gemini": found})
        for number, found in enumerate((well, tried, out))
    ]
    notes.append(Note("of another file", upstreams={"other": refused}))
    frame = upstream_frame("gemini", notes)
    assert (frame["state"], frame["detail"]) == ("out", "it was cut")
    assert (frame["processes"], frame["out_in"], frame["key_refused"]) == (3, 2, False)
    assert [one["process"] for one in frame["found"]] == ["api-2", "api-1"]
    assert upstream_frame("other", notes)["key_refused"]
    assert not upstream_frame("other", notes)["unpaid"]
    notes.append(Note("api-4", upstreams={"other": replace(refused, unpaid=True)}))
    assert upstream_frame("other", notes)["unpaid"]
    crowd = [Note(f"api-{number}", upstreams={"gemini": out}) for number in range(2 * MOST_FOUND)]
    frame = upstream_frame("gemini", crowd)
    assert (len(frame["found"]), frame["out_in"]) == (MOST_FOUND, 2 * MOST_FOUND)
    drained = UpstreamFound("out", why=f"no upstream takes calls now: {DRAINED}")
    for found, is_drained in (([well, drained], True), ([drained, out], False), ([well], False)):
        notes = [Note(f"api-{at}", upstreams={"spare": one}) for at, one in enumerate(found)]
        assert upstream_frame("spare", notes)["drained"] is is_drained


def test_paused_budgets_come_first_and_the_rest_is_counted() -> None:
    budgets = [
        Budget("day", "usd", 5_000_000, "day", tenant="acme", at_end="fall_back", fallback="m"),
        Budget("people", "tokens", 100, "rolling", window_s=5_400, each=("tenant", "subject")),
    ]
    reset_at = datetime(2026, 11, 25, tzinfo=UTC)
    day = BudgetBook("day", "", "usd", 5_000_000, 790_000, 0, 20_000, reset_at, None)
    person = BudgetBook("people", '["acme", null]', "tokens", 100, 3, 0, 0, None, None)
    paused = replace(person, scope='["acme", "ann"]', paused_since=reset_at)
    many = [replace(person, scope=f'["t{n}", "x"]') for n in range(MOST_BUDGETS)]
    gone = replace(day, budget="gone")
    frame = budgets_frame(budgets, [day, gone, person, *many, paused])
    first, second, third, *_ = frame["budgets"]
    assert (first["name"], first["scope"], first["paused_since"]) == (
        "people",
        ["acme", "ann"],
        reset_at,
    )
    assert first["words"] == "each tenant, each subject, in 90 min"
    assert second == {
        "name": "day",
        "scope": [],
        "each": (),
        "words": "tenant acme, a day",
        "fallback": "m",
        "unit": "usd",
        "amount": 5_000_000,
        "spent": 790_000,
        "estimated": 0,
        "held": 20_000,
        "reset_at": reset_at,
        "paused_since": None,
    }
    assert third["scope"] == ["acme", None]
    assert (len(frame["budgets"]), frame["paused"], frame["more"]) == (MOST_BUDGETS, 1, 3)
    assert budgets_frame([], []) == {"budgets": [], "paused": 0, "more": 0}


def test_all_limits_are_found_by_pages_groups_and_words() -> None:
    policy = PoolPolicy({})
    views = [limit(f"tenant:t{number:03}", waiting=number % 2) for number in range(60)]
    views += [limit("model:m"), limit("rpm:m"), limit("kind:text_only", waiting=4)]
    pools = [("gemini", snapshot(limits={one.limit: one for one in views}), policy)]
    first = limits_page(pools, "none", "", 0)
    assert (first["total"], len(first["limits"])) == (63, LIMITS_PAGE)
    seen = [
        one["limit"]
        for offset in range(0, 63, LIMITS_PAGE)
        for one in limits_page(pools, "none", "", offset)["limits"]
    ]
    assert sorted(seen) == sorted(one.limit for one in views)
    found = limits_page(pools, "none", "TENANT t01", 0)
    assert [one["limit"] for one in found["limits"]] == [f"tenant:t01{n}" for n in range(10)]
    by_model = limits_page(pools, "model", ":m", 0)
    assert by_model["groups"] == [{"group": "m", "limits": 2, "waiting": 0, "full": 0}]
    by_kind = limits_page(pools, "kind", "", 0)
    assert by_kind["groups"] == [{"group": NO_GROUP, "limits": 62, "waiting": 30, "full": 0}]
    last = limits_page(pools, "kind", "", 50)
    assert last["groups"][-1] == {"group": "text_only", "limits": 1, "waiting": 4, "full": 0}


def test_limits_of_users_are_grouped_with_those_of_their_tenant() -> None:
    names = ("rpm:tenant/acme", "user:acme/ann", "conversation:acme/c1", "rpm:key/k1", "rpm:m")
    views = {name: limit(name) for name in names}
    pools = [("gemini", snapshot(limits=views), PoolPolicy({}))]
    groups = {
        group: {one["group"]: one["limits"] for one in limits_page(pools, group, "", 0)["groups"]}
        for group in GROUPINGS
    }
    assert groups["tenant"] == {"acme": 3, NO_GROUP: 2}
    assert groups["model"] == {"m": 1, NO_GROUP: 4}
    assert groups["kind"] == {NO_GROUP: 5}


def test_a_limit_names_the_tenants_that_wait_most_for_it() -> None:
    queues = tuple(
        QueueView("s", "p", 0, tenant, ("kind:a",), "kind:a", count, 1)
        for tenant, count in (("a", 1), ("b", 9), ("c", 3), ("d", 2), ("b", 1))
    )
    views = {"kind:a": limit("kind:a", waiting=16), "kind:b": limit("kind:b")}
    frame = pool_frame("gemini", snapshot(limits=views, queues=queues), PoolPolicy({}))
    assert [one["tenants"] for one in frame["limits"]] == [[("b", 10), ("c", 3), ("d", 2)], []]
    assert frame["all_limits"] == 2
    pools = [("gemini", snapshot(limits=views, queues=queues), PoolPolicy({}))]
    listed = limits_page(pools, "none", "", 0)["limits"]
    assert [one["tenants"] for one in listed] == [one["tenants"] for one in frame["limits"]]


def test_a_change_of_limits_is_told_with_who_and_why() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    records = [
        PolicyRecord(3, "live", "c", {"limits": {"kind:a": 4}}, "ann", "too slow", at),
        PolicyRecord(2, "deployment", "b", {"limits": {"kind:a": 2}}, "api-1", "", at),
        PolicyRecord(1, "deployment", "a", {"limits": {"kind:a": 1}}, "api-1", "", at),
    ]
    assert [one["words"] for one in policy_events("gemini", records)] == [
        "ann set limits.kind:a: 2 -> 4 in gemini: too slow",
        "api-1 set limits.kind:a: 1 -> 2 in gemini",
    ]


def test_pauses_and_changes_of_upstreams_are_told_with_who_and_why() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    pauses = [
        RequestedPause(at, "bob", "openai", "rpm:x", is_end=True, for_ms=None, reason=""),
        RequestedPause(at, "ann", "openai", "rpm:x", is_end=False, for_ms=90_000.0, reason="why"),
        RequestedPause(at, "ann", "openai", "rpm:x", is_end=False, for_ms=None, reason=""),
    ]
    assert [one["words"] for one in pause_events(pauses)] == [
        "bob resumed rpm:x in openai",
        "ann paused rpm:x in openai for 1 min 30 s: why",
        "ann paused rpm:x in openai until it is resumed",
    ]
    revisions = [
        UpstreamRevision(4, {}, "rollback 1", "ann", "", at, at),
        UpstreamRevision(3, {}, "drain gpu-1", "ann", "sold", at, None, "a process lacks its key"),
        UpstreamRevision(2, {}, "set gpu-1", "bob", "heavier", at, at),
    ]
    assert [(one["pool"], one["words"]) for one in upstream_events(revisions)] == [
        ("", "ann restored all upstreams of revision 1"),
        ("gpu-1", "bob changed the upstream gpu-1: heavier"),
    ]


def test_a_revision_shows_each_key_that_it_changed_as_far_as_they_are_shown() -> None:
    many = {f"tenant:{number:03}": number + 1 for number in range(MOST_SHOWN_CHANGES + 5)}
    records = [
        PolicyRecord(3, "live", "c", {"limits": {"kind:a": 4}, "weights": {"t": 2}}, "ann"),
        PolicyRecord(2, "live", "b", {"limits": {"kind:a": 2}}, "bob", "why"),
        PolicyRecord(1, "deployment", "a", {"limits": {"kind:a": 2, **many}}, "api-1"),
    ]
    newest, older = revisions_page(records)
    assert newest["changes"] == [
        {"key": "limits.kind:a", "before": 2, "after": 4},
        {"key": "weights.t", "before": None, "after": 2},
    ]
    assert (older["set_by"], older["reason"]) == ("bob", "why")
    assert (len(older["changes"]), older["more"]) == (MOST_SHOWN_CHANGES, 5)


def test_a_tenant_of_other_weights_in_other_pools_has_none_over_all() -> None:
    pools = [PoolPolicy({}, weights={"a": 3, "b": 2}), PoolPolicy({}, weights={"a": 3, "c": 1})]
    assert weights_in(pools[:1]) == {"a": 3, "b": 2}
    assert weights_in(pools) == {"a": 3, "b": None, "c": 1}
