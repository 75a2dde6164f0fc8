"""Changes of a deployment, as the page lists them and marks them in charts.

Invariant: nothing is read here. An event has a time, the pool that it concerns, or `EVERY_POOL`,
and a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from tidegate.dashboard.rollup import EVERY_POOL
from tidegate.limiter import format_span
from tidegate.policy.rollout import changed_keys, differences
from tidegate.store.operator_actions import RequestedPause
from tidegate.store.provider.upstreams import UpstreamRevision
from tidegate.store.records import PolicyRecord

MOST_REVISIONS = 20
MOST_CHANGES = 3
MOST_SHOWN_CHANGES = 100
_LONGEST_WORDS = 300

Frame = dict[str, Any]


def revisions_page(records: Sequence[PolicyRecord]) -> list[Frame]:
    """Return each revision with the keys that it changed; those of the oldest one are not known."""
    found = []
    for record, before in pairwise(records):
        changed = changed_keys(before.policy, record.policy)
        listed = changed[:MOST_SHOWN_CHANGES]
        found.append(
            {
                "revision": record.revision,
                "at": record.created_at,
                "set_by": record.set_by,
                "origin": record.origin,
                "reason": record.reason,
                "changes": [{"key": key, "before": old, "after": new} for key, old, new in listed],
                "more": len(changed) - len(listed),
            }
        )
    return found


def policy_events(pool: str, records: Sequence[PolicyRecord]) -> list[Frame]:
    """Return each revision with its changes; those of the oldest one are not known."""
    return [
        {
            "at": record.created_at.timestamp(),
            "pool": pool,
            "kind": record.origin,
            "words": _event_words(pool, record, before),
        }
        for record, before in pairwise(records)
        if record.created_at is not None
    ]


def _event_words(pool: str, record: PolicyRecord, before: PolicyRecord) -> str:
    changed = differences(before.policy, record.policy)
    words = "; ".join(changed[:MOST_CHANGES])[:_LONGEST_WORDS] or "nothing"
    more = f" and {len(changed) - MOST_CHANGES} more" if len(changed) > MOST_CHANGES else ""
    reason = f": {record.reason}" if record.reason else ""
    return f"{record.set_by} set {words}{more} in {pool}{reason}"


def pause_events(pauses: Iterable[RequestedPause]) -> list[Frame]:
    """Return each pause of a limit by an operator, and each end of one."""
    return [
        {"at": one.at.timestamp(), "pool": one.pool, "kind": "pause", "words": _pause_words(one)}
        for one in pauses
    ]


def _pause_words(one: RequestedPause) -> str:
    if one.is_end:
        return f"{one.by} resumed {one.limit} in {one.pool}"
    how_long = "until it is resumed" if one.for_ms is None else f"for {format_span(one.for_ms)}"
    reason = f": {one.reason}" if one.reason else ""
    return f"{one.by} paused {one.limit} in {one.pool} {how_long}{reason}"


_UPSTREAM_ACTIONS = {
    "add": "added the upstream",
    "set": "changed the upstream",
    "drain": "drained the upstream",
    "resume": "resumed the upstream",
    "remove": "removed the upstream",
    "rollback": "restored all upstreams of revision",
}


def upstream_events(records: Iterable[UpstreamRevision]) -> list[Frame]:
    """Return each change of upstreams that is in force; one of all of them is of no pool."""
    found = []
    for one in records:
        verb, _, name = one.action.partition(" ")
        if one.in_force_at is None:
            continue
        reason = f": {one.reason}" if one.reason else ""
        found.append(
            {
                "at": one.in_force_at.timestamp(),
                "pool": EVERY_POOL if verb == "rollback" else name,
                "kind": "upstreams",
                "words": f"{one.set_by} {_UPSTREAM_ACTIONS.get(verb, verb)} {name}{reason}",
            }
        )
    return found
