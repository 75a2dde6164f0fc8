"""What a worker knows of the ready jobs, and how far back it looks for what is due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from tidegate.store.notifications import ALL_S, MARGIN_S, Lookback
from tidegate.store.queue import Ready

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def came(xmax: int, *minutes: int, jobs: int = 0) -> list[dict[str, Any]]:
    """What a reading brings: jobs of one queue, each named by the minute in which it was made."""
    return [
        {
            "xmax": xmax,
            "under_way": [],
            "tenant_id": "t" if minutes else None,
            "priority": 0,
            "jobs": jobs or len(minutes),
            "made_at": [BEGAN + timedelta(minutes=minute) for minute in minutes],
            "ids": [UUID(int=minute) for minute in minutes],
            "due_at": [BEGAN + timedelta(minutes=minute + 10) for minute in minutes],
            "longest": timedelta(minutes=10),
            "overtaking": 0,
            "hidden_at": None,
        }
    ]


def due(xmax: int, *given: tuple[int, int], jobs: int = 0, overtaking: int = 0) -> list[Any]:
    """As `came`, of jobs by the minutes in which they were made and are due."""
    (row,) = came(xmax, *(made for made, _ in given), jobs=jobs)
    longest = max(timedelta(minutes=due - made) for made, due in given)
    due_at = [BEGAN + timedelta(minutes=due) for _, due in given]
    return [row | {"due_at": due_at, "longest": longest, "overtaking": overtaking}]


def named(ready: Ready) -> list[int]:
    (turn,) = ready.turns(["t"], 500)
    return [one.int for one in turn.early]


def swept(xmax: int) -> Ready:
    ready = Ready()
    ready.read(came(xmax))
    ready.swept(ready.unswept[1], came(xmax), 0.001)
    assert ready.is_swept
    return ready


def test_few_jobs_are_known_by_name_and_forgotten_when_they_are_gone() -> None:
    ready = swept(100)
    ready.read(came(110, 1, 2, 3))
    (turn,) = ready.turns(["t"], 16)
    assert turn.early == (UUID(int=1), UUID(int=2), UUID(int=3))
    assert turn.since is None
    ready.settle(turn, None, [UUID(int=2)])
    assert ready.turns(["t"], 16)[0].early == (UUID(int=2),)
    ready.settle(ready.turns(["t"], 16)[0], None, [])
    assert ready.tenants_after("") == []


def test_a_long_queue_begins_at_the_last_that_is_named() -> None:
    ready = swept(100)
    ready.read(came(110, 1, 2, 3, jobs=1000))
    (turn,) = ready.turns(["t"], 16)
    assert turn.since == BEGAN + timedelta(minutes=3)
    assert turn.early == (UUID(int=1), UUID(int=2), UUID(int=3))[:2]


def test_more_early_ones_than_a_claim_takes_go_before_the_rest() -> None:
    ready = swept(100)
    ready.read(came(110, 50, jobs=1000))
    ready.read(came(111, 1, 2, 3))
    (turn,) = ready.turns(["t"], 1)
    assert turn.early == (UUID(int=1), UUID(int=2))
    assert turn.since is None
    ready.settle(turn, None, [])
    assert ready.turns(["t"], 1)[0].since == BEGAN + timedelta(minutes=50)


def test_jobs_that_are_due_before_older_ones_are_named_and_claimed_first() -> None:
    ready = swept(100)
    ready.read(due(110, (0, 10), (1, 11), (5, 8), jobs=1000, overtaking=1))
    assert named(ready) == [5, 0]
    ready.read(due(111, (20, 22), (21, 31), (22, 40), (23, 24)))
    assert named(ready) == [5, 0, 20, 23]  # no more than the usual time is given to 21 and 22


def test_jobs_that_are_all_due_after_the_same_time_are_claimed_by_age() -> None:
    ready = swept(100)
    ready.read(due(110, (0, 60), (1, 61), jobs=1000))
    ready.read(due(111, (20, 80), (21, 81)))
    assert named(ready) == [0]
    ready.begin_sweep()
    ready.swept(ready.unswept[1], due(111, (0, 60), (1, 61), jobs=1000), 0.001)
    assert named(ready) == [0]
    assert not ready.is_hungry


def test_what_overtook_jobs_that_are_gone_is_claimed_by_age_after_a_sweep() -> None:
    ready = swept(100)
    ready.read(due(110, (0, 1440), (1, 2), jobs=1000))
    ready.read(due(111, (20, 80)))
    assert named(ready) == [1, 20, 0]
    ready.settle(ready.turns(["t"], 16)[0], BEGAN + timedelta(minutes=1), [])
    ready.begin_sweep()
    ready.swept(ready.unswept[1], due(111, (30, 90), (31, 91), jobs=1000), 0.001)
    ready.read(due(112, (40, 100)))
    assert 40 not in named(ready)


def test_more_jobs_that_overtake_than_are_named_call_for_a_sweep() -> None:
    ready = swept(100)
    ready.read(due(110, (0, 10), (1, 11), jobs=1000))
    for first in range(460, 60, -40):
        ready.read(due(111, *((made, made + 5) for made in range(first, first + 40))))
    assert named(ready)[1:129] == list(range(100, 228))
    hungry = [ready.is_hungry]
    (turn,) = ready.turns(["t"], 500)
    ready.settle(turn, turn.since, turn.early[-1:])
    hungry.append(ready.is_hungry)
    ready.begin_sweep()
    assert [*hungry, ready.is_hungry] == [False, True, False]


def test_more_jobs_that_overtake_those_of_an_earlier_step_call_for_another_sweep() -> None:
    ready = Ready()
    ready.read(came(1000))
    ready.not_swept()
    ready.swept(ready.unswept[1], due(1000, (0, 10), (1, 11), jobs=1000), 1.0)
    assert not ready.is_hungry
    ready.swept(ready.unswept[1], due(1000, (20, 22), (21, 23), jobs=1000), 1.0)
    assert named(ready) == [0, 20, 21]
    assert ready.is_hungry


def test_what_a_sweep_finds_while_a_claim_is_under_way_stands() -> None:
    ready = swept(100)
    ready.read(came(110, 50, jobs=1000))
    (turn,) = ready.turns(["t"], 16)
    ready.begin_sweep()
    ready.swept(ready.unswept[1], came(110, 7, jobs=1000), 0.001)
    ready.settle(turn, BEGAN + timedelta(minutes=60), [])
    assert ready.turns(["t"], 16)[0].since == BEGAN + timedelta(minutes=7)


def test_a_server_that_has_not_come_as_far_is_swept_anew() -> None:
    ready = swept(1000)
    ready.read(came(900))
    assert not ready.is_swept
    assert ready.unread[0] == 900
    assert ready.unswept[:2] == (0, 900)


def test_a_sweep_that_takes_too_long_goes_on_in_shorter_steps() -> None:
    ready = Ready()
    ready.read(came(1000))
    assert ready.unswept[:2] == (0, 1000)
    ready.not_swept()
    assert ready.unswept[:2] == (0, 125)
    ready.swept(125, came(1000), 0.001)
    assert ready.unswept[:2] == (125, 375)
    ready.swept(375, came(1000), 1.0)
    assert ready.unswept[:2] == (375, 500)


def test_searches_from_the_beginning_take_a_fiftieth_of_the_time() -> None:
    clock = [1000.0]
    lookback = Lookback(lambda: clock[0])
    whole_s = 0.0
    for _ in range(1000):
        look = lookback.begin()
        if look.is_whole:
            assert look.back_s == ALL_S
            clock[0] += 0.5
            whole_s += 0.5
        else:
            assert MARGIN_S <= look.back_s < MARGIN_S + 2
        lookback.end(look, complete=True)
        clock[0] += 1
    assert 0.01 < whole_s / (clock[0] - 1000) < 0.021


def test_a_hurried_search_leaves_the_long_ones_to_others() -> None:
    clock = [1000.0]
    lookback = Lookback(lambda: clock[0])
    first = lookback.begin(hurried=True)
    assert first.is_whole  # nothing is known yet
    clock[0] += 0.1
    lookback.end(first, complete=True)
    clock[0] += 100
    assert not lookback.begin(hurried=True).is_whole
    assert lookback.begin().is_whole


def test_a_search_that_found_more_than_it_took_is_repeated_from_there() -> None:
    clock = [1000.0]
    lookback = Lookback(lambda: clock[0])
    lookback.end(lookback.begin(), complete=True)
    clock[0] += 0.5
    look = lookback.begin()
    lookback.end(look, complete=False)
    clock[0] += 0.25
    assert lookback.begin().back_s == MARGIN_S + 0.75
