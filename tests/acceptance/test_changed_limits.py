"""Changing RATE_LIMITS and restarting, with a Valkey that goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.fleet import Fleet
from tests.load import Load
from tests.scenarios import SLOW

pytestmark = pytest.mark.slow


async def test_a_restart_with_other_limits_puts_them_in_force_for_all(tmp_path: Path) -> None:
    async with Fleet(tmp_path, apis=1, workers=1) as fleet:
        await fleet.control.set_behaviour(**SLOW)
        load = Load(fleet)
        await load.submit(30)
        await load.assert_all_succeeded()
        await fleet.assert_never_over(reached=True)
        await fleet.control.reset()
        await fleet.control.set_behaviour(**SLOW)
        # A rolling restart: the old worker goes on while the new one brings new limits.
        old = fleet.workers[0]
        fleet.settings["RATE_LIMITS"] = '{"text_only": 2, "multi_modal": 1, "image_generation": 1}'
        fleet.start_worker()
        await fleet.ready(fleet.start_api())
        old.signal(signal.SIGTERM)
        assert await old.ended() == 0
        again = Load(fleet, "again")
        await again.submit(30)
        await again.assert_all_succeeded()
        truth = await fleet.truth()
        highest = [truth[kind].max_in_flight for kind in ("text_only", "multi_modal")]
        assert highest == [2, 1]
