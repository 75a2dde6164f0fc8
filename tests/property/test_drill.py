"""Timers and certain refusals under random calls and limits, on the model alone, in virtual time.

What holds here holds for the Lua, which the other property tests step beside the model.
"""

from __future__ import annotations

import os

import pytest

from tests.property.drill import Drill

pytestmark = pytest.mark.slow

PARTS = 4
STEPS = 120
DRILLS = int(os.environ.get("TIDEGATE_MODEL_STEPS", "20000")) // 125
SEED = int(os.environ.get("TIDEGATE_MODEL_SEED", "0")) * DRILLS


@pytest.mark.timeout(max(120, DRILLS))
@pytest.mark.parametrize("part", range(PARTS))
def test_no_timer_is_late_and_no_certain_refusal_is_wrong(part: int) -> None:
    """A timer that comes early costs a look, one that comes late keeps calls waiting."""
    certain = sum(Drill(SEED + number).play(STEPS).certain for number in range(part, DRILLS, PARTS))
    assert certain > DRILLS // PARTS
