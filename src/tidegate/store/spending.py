"""What this process has spent and may not be in the totals yet. Pure.

Invariant: a charge counts from when it is noted until totals that certainly hold it are known; for
a moment it may count twice, never not at all. What can't be written counts until it can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from uuid import UUID

from tidegate.call import Charge

MOST_OPEN = 100_000


class Spending:
    """One per process. A refresh is `begin`, reading the totals, then `end`."""

    def __init__(self) -> None:
        self._open: dict[UUID, tuple[str, int, int]] = {}  # noted, not yet written
        self._sums: tuple[Counter[str], Counter[str]] = (Counter(), Counter())  # micros, tokens
        self._recent: list[tuple[str, int, int]] = []  # written since the last refresh began
        self._settling: list[tuple[str, int, int]] = []  # written before it began

    def __repr__(self) -> str:
        return f"<Spending open={len(self._open)} written={len(self._recent)}>"

    def of(self, tenant_id: str) -> tuple[int, int]:
        """Millionths of money, and LLM tokens."""
        micros, tokens = self._sums
        return micros[tenant_id], tokens[tenant_id]

    def note(self, request_id: UUID, tenant_id: str, charge: Charge) -> None:
        one = (tenant_id, charge.cost_micros or 0, charge.tokens)
        if not any(one[1:]) or len(self._open) >= MOST_OPEN:
            return
        self._open[request_id] = one
        self._add(one, 1)

    def written(self, ids: Iterable[UUID | str]) -> None:
        """These are committed; others than those noted here are passed over."""
        if not self._open:
            return
        for given in ids:
            one = self._open.pop(given if isinstance(given, UUID) else UUID(given), None)
            if one is not None:
                self._recent.append(one)

    def begin(self) -> None:
        """The totals are about to be read."""
        self._settling += self._recent
        self._recent = []

    def end(self) -> None:
        """They were read: what was written before `begin` is in them."""
        for one in self._settling:
            self._add(one, -1)
        self._settling = []

    def _add(self, one: tuple[str, int, int], sign: int) -> None:
        tenant_id, *amounts = one
        for counter, amount in zip(self._sums, amounts, strict=True):
            counter[tenant_id] += sign * amount
            if not counter[tenant_id]:
                del counter[tenant_id]
