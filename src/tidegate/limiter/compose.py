"""Puts a batch into the words of the wire. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf
from typing import Any

from tidegate.limiter.entries import Batch
from tidegate.limiter.flow import Flow


def compose(
    batch: Batch,
    wanting: Sequence[Flow],
    looking: Sequence[Flow],
    at_ms: float,
    *,
    pauses: bool = False,
) -> dict[str, Any]:
    """The fields of a `SyncRequest` that a batch fills; `wanting` are the flows to be hinted at,
    `looking` those to be looked at; `pauses`: some limit is paused.

    `held` is of the join; `quotas` are the zones of the day quotas that the flows need. The
    answer's hints count flows in the order of `flows`, from 1.
    """
    numbers: dict[str, int] = {}
    quotas: dict[str, str] = {}
    firm: set[str] = set()

    def number(flow: Flow | None) -> int:
        if flow is None:
            return 0
        if flow.quotas:
            quotas.update(flow.quotas)
        if flow.firm:
            firm.update(flow.firm)
        return numbers.setdefault(flow.key, len(numbers) + 1)

    return {
        "held": [
            (h.ticket, number(h.flow), h.seq, h.hard_left_ms(at_ms), h.cost_ms) for h in batch.held
        ],
        "transfers": [
            (
                t.source,
                t.heir.ticket,
                t.heir.seq,
                t.heir.hard_left_ms(at_ms),
                number(t.heir.flow),
                t.member,
                t.outcome,
                t.took_ms,
            )
            for t in batch.transfers
        ],
        "releases": [
            (r.ticket, number(r.flow), r.outcome, r.took_ms, r.actual) for r in batch.releases
        ],
        "settles": batch.settles,
        "cancels": [(ticket, number(flow), member) for ticket, flow, member in batch.cancels],
        "enqueues": [(number(w.flow), w.member) for w in batch.enqueues],
        "wants": [(number(flow), round(flow.cost_ms)) for flow in wanting],
        "looks": [number(flow) for flow in looking],
        "lefts": _lefts(batch, at_ms, pauses=pauses),
        "flows": list(numbers),
        "quotas": quotas,
        "firm": sorted(firm),
    }


def _lefts(batch: Batch, at_ms: float, *, pauses: bool) -> list[int]:
    """By enqueue, for how long it may wait, where time alone may keep it from its turn; nothing
    where all are 0."""
    lefts = [
        max(1, ceil(w.deadline_ms - at_ms))
        if (w.flow.rates or pauses) and w.deadline_ms != inf and not w.once
        else 0
        for w in batch.enqueues
    ]
    return lefts if any(lefts) else []
