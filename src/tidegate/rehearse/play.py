"""One trace under one policy, or under several side by side; and how much of a figure is chance.

Who comes first among those that arrive together decides who waits, and a queue that hardly empties
hands that on to all that come after: two real runs of one trace differ in this way too. So the same
trace can be played again with each call moved a little. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

from tidegate.limiter.limits import PoolPolicy
from tidegate.rehearse.findings import Findings, Group, GroupSpread, Spread, findings_of
from tidegate.rehearse.stage import Setting, Stage
from tidegate.rehearse.trace import Arrival

# As far as a network and a busy machine move a call between two runs.
LATER_MS = 5.0
LONGER = 0.01


def rehearse(
    name: str,
    arrivals: Sequence[Arrival],
    policy: PoolPolicy,
    setting: Setting,
    *,
    plays: int = 1,
    seed: int = 1,
) -> Findings:
    """What a policy does to a trace; with several `plays` also how far they are apart.

    The first play is of the trace as it is, each other one of its calls moved by a chance that
    `seed` decides: up to LATER_MS later, and by LONGER longer or shorter.
    """
    first = findings_of(name, Stage(policy, setting).play(arrivals))
    if plays == 1:
        return first
    chance = Random(seed)
    found = [first]
    for _ in range(plays - 1):
        moved = _moved(arrivals, chance)
        found.append(findings_of(name, Stage(policy, setting).play(moved)))
    return replace(first, plays=plays, spreads=_spreads(found))


def compare(
    arrivals: Sequence[Arrival],
    policies: Mapping[str, PoolPolicy],
    setting: Setting,
    *,
    plays: int = 1,
    seed: int = 1,
) -> list[Findings]:
    """The same trace, in the same order, under each policy; arguments as of `rehearse`."""
    return [
        rehearse(name, arrivals, policy, setting, plays=plays, seed=seed)
        for name, policy in policies.items()
    ]


def _moved(arrivals: Sequence[Arrival], chance: Random) -> list[Arrival]:
    moved = [
        replace(
            arrival,
            time_ms=arrival.time_ms + chance.uniform(0, LATER_MS),
            duration_ms=arrival.duration_ms * chance.uniform(1 - LONGER, 1 + LONGER),
        )
        for arrival in arrivals
    ]
    return sorted(moved, key=lambda arrival: arrival.time_ms)


def _spreads(found: Sequence[Findings]) -> list[GroupSpread]:
    wholes = [Group("", one.calls, one.admitted, 0, one.refused, one.waits) for one in found]
    each = [{group.name: group for group in one.tenants} for one in found]
    return [_spread(wholes), *(_spread([one[name] for one in each]) for name in each[0])]


def _spread(groups: Sequence[Group]) -> GroupSpread:
    def over(figure: Callable[[Group], float | None]) -> Spread | None:
        values = [value for group in groups if (value := figure(group)) is not None]
        if len(values) < len(groups):
            return None
        return Spread(sum(values) / len(values), min(values), max(values))

    refused = over(lambda group: sum(group.refused.values()))
    assert refused is not None
    return GroupSpread(
        groups[0].name,
        over(lambda group: group.waits.mean_ms),
        over(lambda group: group.waits.p95_ms),
        refused,
    )
