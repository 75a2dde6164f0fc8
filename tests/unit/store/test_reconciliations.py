"""What a comparison with a provider reads of the record."""

from __future__ import annotations

from datetime import date
from typing import Any

from tidegate.store.database import COMMAND_TIMEOUT_MS, Connections
from tidegate.store.provider.reconciliations import Reconciliations


class _Slow(Connections):
    """Connections to a large log: a query that has no time of its own would be cut off."""

    def __init__(self) -> None:
        super().__init__("postgresql://u@127.0.0.1:1/d")
        self.waits_ms: list[int] = []

    async def rows(
        self,
        name: str,
        *values: Any,
        timeout_ms: int = COMMAND_TIMEOUT_MS,
        repeatable: bool = True,
    ) -> list[Any]:
        self.waits_ms.append(timeout_ms)
        return []

    async def row(self, name: str, *values: Any, timeout_ms: int = COMMAND_TIMEOUT_MS) -> Any:
        self.waits_ms.append(timeout_ms)
        return {"deleted": 0}


async def test_a_month_of_a_large_log_is_read_to_its_end() -> None:
    connections = _Slow()
    record = Reconciliations(connections)
    assert await record.ours("openai", date(2026, 12, 1)) == {}
    assert await record.deleted("openai", date(2026, 12, 1)) == 0
    assert len(connections.waits_ms) == 3
    assert min(connections.waits_ms) >= 300_000
