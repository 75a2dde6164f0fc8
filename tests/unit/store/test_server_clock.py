"""PostgreSQL's clock as a process knows it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tidegate.store.notifications import AGREE_S, ServerClock

AT = datetime(2026, 12, 1, tzinfo=UTC)


def test_the_servers_clock_goes_on_from_the_middle_of_the_last_reading() -> None:
    now = [100.0]
    clock = ServerClock(lambda: now[0])
    assert abs(clock.now() - datetime.now(UTC)) < timedelta(minutes=1), "none was read yet"
    begun = clock.begin()
    now[0] += 2
    clock.read(begun, AT)
    assert clock.now() == AT + timedelta(seconds=1)
    now[0] += 3_600
    assert clock.now() == AT + timedelta(seconds=3_601)
    clock.read(clock.begin(), AT)
    assert clock.now() == AT, "it was set back"


def test_the_clock_of_the_process_is_used_while_both_agree() -> None:
    now = [100.0]
    clock = ServerClock(lambda: now[0], lambda: AT)
    for apart_s, used in ((AGREE_S / 2, AT), (-AGREE_S / 2, AT), (3.0, AT + timedelta(seconds=3))):
        clock.read(clock.begin(), AT + timedelta(seconds=apart_s))
        assert clock.now() == used
    clock.read(clock.begin(), AT)
    assert clock.now() == AT, "it was set right"
