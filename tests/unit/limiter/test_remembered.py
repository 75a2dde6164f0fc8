"""What a process remembers of its pool: the server's clock, as well as can be known."""

from __future__ import annotations

from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.remembered import AHEAD_KEPT, Remembered
from tidegate.limiter.wire import Whole

POLICY = PoolPolicy({})


def told(now_ms: int) -> Whole:
    return Whole(now_ms, [], [], 0, 0, [], [], None, (1, []))


def test_a_moment_of_the_server_is_as_early_as_the_quickest_of_the_last_comparisons_allows() -> (
    None
):
    remembered = Remembered()
    assert remembered.here(1_000_005) == float("-inf")
    for at, took_ms in enumerate((3, 90, 2, 40)):
        sent_ms = at * 1000.0
        remembered.learn(
            told(1_000_000 + int(sent_ms) + took_ms),
            POLICY,
            sent_ms,
            sent_ms + 100,
            recovering=False,
        )
    assert remembered.here(1_000_012) == 10
    for _ in range(AHEAD_KEPT):
        remembered.learn(told(1_010_009), POLICY, 10_000.0, 10_020.0, recovering=False)
    assert remembered.here(1_010_012) == 10_003


def test_another_epoch_may_have_another_clock() -> None:
    remembered = Remembered()
    remembered.learn(told(1_000_000), POLICY, 0.0, 1.0, recovering=False)
    remembered.forget_version()
    assert remembered.here(1_000_000) == float("-inf")
