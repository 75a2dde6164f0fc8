"""What a call hears for which room comes too late."""

from __future__ import annotations

import pytest

from tidegate.errors import LimitPaused, LimitUsedUp
from tidegate.limiter.messages import too_early, too_late
from tidegate.limiter.policy import FOR_EVER_MS, Limit, Quota, Rate


@pytest.mark.parametrize(
    ("limit", "used", "said"),
    [
        (
            Quota(200),
            200,
            "Daily limit rpd:x is used up (200 of 200 requests). "
            "It resets at 00:00 America/Los_Angeles, in 6 h 50 min.",
        ),
        (
            Quota(1000, "output_tokens", "UTC"),
            900,
            "Daily limit rpd:x has no room for 300 output tokens more (900 of 1000 are used). "
            "It resets at 00:00 UTC, in 6 h 50 min.",
        ),
        (
            Rate(60, 60_000),
            60,
            "Limit rpd:x is used up (60 of 60 requests a minute). There is room in 6 h 50 min.",
        ),
        (
            Rate(5, 86_400_000, "images"),
            7,
            "Limit rpd:x is used up (7 of 5 images in 24 h). There is room in 6 h 50 min.",
        ),
    ],
)
def test_a_refusal_says_what_is_used_and_when_there_is_room(
    limit: Limit, used: int, said: str
) -> None:
    error = too_early("rpd:x", limit, 24_639_397, used, 300)
    assert isinstance(error, LimitUsedUp)
    assert (error.message, error.limit, error.retry_after_ms) == (said, "rpd:x", 24_639_397)


def test_one_request_is_no_plural() -> None:
    error = too_early("rpd:x", Quota(2), 60_000, 1, 1, ahead=1)
    said = "Daily limit rpd:x has no room for 1 request more (1 of 2 are used), and 1 call comes "
    assert error.message.startswith(said)


def test_a_refusal_of_an_even_flow_says_that_it_is_one() -> None:
    error = too_early("rpm:x", Rate(6, 60_000, pace_ms=10_000), 10_000, 1)
    said = "Limit rpm:x spreads what it admits evenly and has no room for 1 request more now (1 of "
    assert error.message == f"{said}6 are used). There is room in 10 s."


def test_a_pause_says_for_how_long() -> None:
    error = too_early("model:x", None, 185_000, -1)
    assert isinstance(error, LimitPaused)
    assert error.message == (
        "Limit model:x is paused for 3 min 5 s more, longer than this call may wait."
    )
    for_ever = too_early("kind:x", Rate(1, 1000), FOR_EVER_MS, -1)
    assert for_ever.message.startswith("Limit kind:x is paused until it is resumed, ")
    assert (error.retry_after_ms, for_ever.retry_after_ms) == (185_000, None)


def test_a_deadline_that_came_says_when_there_is_room_where_that_is_known() -> None:
    limit = Rate(60, 60_000)
    certain, guessed = (too_late("rpm:x", limit, 1_000, 4_000.0, 60, 1, x) for x in (False, True))
    assert certain.retry_after_ms == guessed.retry_after_ms == 4_000
    assert (certain.is_estimate, guessed.is_estimate) == (False, True)
    assert guessed.message.endswith("There is room in about 4 s, which is an estimate.")
    unknown = too_late("rpm:x", limit, 1_000, -20.0, 60, 1, False)
    assert (unknown.code, unknown.retry_after_ms) == ("deadline_exceeded", 1_000)
