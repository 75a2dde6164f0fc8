"""Budgets on PostgreSQL under random calls, time, kills and changes, against a plain list."""

from __future__ import annotations

import os

import pytest

from tests.integration.store.spending import Spending

PARTS = 4
STEPS = int(os.environ.get("TIDEGATE_MODEL_STEPS", "160")) // PARTS
SEED = int(os.environ.get("TIDEGATE_MODEL_SEED", "0"))


@pytest.mark.parametrize("part", range(PARTS))
async def test_budgets_agree_with_a_plain_list(
    database_url: str, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    spending = Spending(database_url, SEED * PARTS + part)
    await spending.start(monkeypatch)
    try:
        await spending.play(STEPS)
        assert spending.admitted
    except BaseException as failed:
        failed.add_note("\n".join(spending.steps))
        raise
    finally:
        await spending.aclose()
