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


def test_a_slow_reading_replaces_no_exact_one() -> None:
    """As of a process that was busy for seconds while the answer waited for it."""
    now = [100.0]
    clock = ServerClock(lambda: now[0], lambda: AT)
    behind = AT + timedelta(hours=1)

    def read(took_s: float, server_time: datetime) -> None:
        begun = clock.begin()
        now[0] += took_s
        clock.read(begun, server_time)

    read(0.002, behind)
    assert abs(clock.now() - behind) <= timedelta(milliseconds=2)
    # PostgreSQL answered at once, and this process saw it three seconds later.
    read(3.0, behind)
    assert abs(clock.now() - behind - timedelta(seconds=3)) <= timedelta(milliseconds=5)
    # Its clock was set meanwhile.
    read(3.0, behind + timedelta(minutes=1))
    assert abs(clock.now() - behind - timedelta(seconds=61.5)) <= timedelta(seconds=0.1)
    read(0.002, behind + timedelta(minutes=2))
    assert abs(clock.now() - behind - timedelta(minutes=2)) <= timedelta(milliseconds=2)


def test_a_slow_reading_makes_no_difference_between_clocks_that_agree() -> None:
    now, wall = [100.0], [AT]
    clock = ServerClock(lambda: now[0], lambda: wall[0])
    begun = clock.begin()
    now[0] += 5
    wall[0] += timedelta(seconds=5)
    clock.read(begun, AT)
    assert clock.now() == wall[0]
