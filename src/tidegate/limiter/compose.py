"""Puts a batch into the words of the wire. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tidegate.limiter.entries import Batch
from tidegate.limiter.flow import Flow


def compose(batch: Batch, wanting: Sequence[Flow], at_ms: float) -> dict[str, Any]:
    """The fields of a `SyncRequest` that a batch fills; `wanting` are the flows to be hinted at.

    `held` is of the join. The answer's hints count flows in the order of `flows`, from 1.
    """
    numbers: dict[str, int] = {}

    def number(flow: Flow | None) -> int:
        return 0 if flow is None else numbers.setdefault(flow.key, len(numbers) + 1)

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
        "flows": list(numbers),
    }
