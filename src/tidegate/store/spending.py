"""What this process has spent and may not be in the totals yet, and what it reserves. Pure.

Invariant: a charge counts from when it is noted until totals that certainly hold it are known; for
a moment it may count twice, never not at all. What can't be written counts until it can. What is
reserved for a call counts until the call is settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from uuid import UUID

from tidegate.call import Charge

MOST_OPEN = 100_000
_One = tuple[str, int, int]  # tenant, micros, tokens


class _Sums:
    """Millionths of money and LLM tokens by tenant."""

    def __init__(self) -> None:
        self._counters: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def of(self, tenant_id: str) -> tuple[int, int]:
        micros, tokens = self._counters
        return micros[tenant_id], tokens[tenant_id]

    def add(self, one: _One, sign: int) -> None:
        tenant_id, *amounts = one
        for counter, amount in zip(self._counters, amounts, strict=True):
            counter[tenant_id] += sign * amount
            if not counter[tenant_id]:
                del counter[tenant_id]


class Spending:
    """One per process. A refresh is `begin`, reading the totals, then `end`."""

    def __init__(self) -> None:
        self._open: dict[UUID, _One] = {}  # noted, not yet written
        self._sums = _Sums()
        self._recent: list[_One] = []  # written since the last refresh began
        self._settling: list[_One] = []  # written before it began
        self._reserved: dict[UUID, _One] = {}
        self._reserved_sums = _Sums()

    def __repr__(self) -> str:
        return (
            f"<Spending reserved={len(self._reserved)} open={len(self._open)}"
            f" written={len(self._recent)}>"
        )

    def of(self, tenant_id: str) -> tuple[int, int]:
        """Millionths of money, and LLM tokens."""
        return self._sums.of(tenant_id)

    def reserved(self, tenant_id: str) -> tuple[int, int]:
        """The same for its calls under way."""
        return self._reserved_sums.of(tenant_id)

    def reserve(self, request_id: UUID, tenant_id: str, micros: int, tokens: int) -> None:
        """A call is about to be made, which will cost about so much."""
        self._release(request_id)
        one = self._reserved[request_id] = (tenant_id, micros, tokens)
        self._reserved_sums.add(one, 1)

    def settle(self, request_id: UUID, tenant_id: str, charge: Charge) -> None:
        """The call is over: what it is charged counts instead of what was reserved."""
        self._release(request_id)
        self.forget(request_id)
        one = (tenant_id, charge.cost_micros or 0, charge.tokens)
        if not any(one[1:]) or len(self._open) >= MOST_OPEN:
            return
        self._open[request_id] = one
        self._sums.add(one, 1)

    def forget(self, request_id: UUID) -> None:
        """What was noted of a request is charged to nobody: another try of it follows."""
        if (one := self._open.pop(request_id, None)) is not None:
            self._sums.add(one, -1)

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
            self._sums.add(one, -1)
        self._settling = []

    def _release(self, request_id: UUID) -> None:
        if (one := self._reserved.pop(request_id, None)) is not None:
            self._reserved_sums.add(one, -1)
