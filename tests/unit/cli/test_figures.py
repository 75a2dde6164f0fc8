"""Figures and ids that commands show and take: time left, parts of ids, and rows of limits."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tidegate.cli.batch import RunProgress, bar
from tidegate.cli.terminal import is_short_id, whole_id
from tidegate.errors import ConfigError, NotFound

IDS = ("01a21a73-1111-7000-8000-0000000000aa", "01a21a73-2222-7000-8000-0000000000bb")
ROW = {"status": "succeeded", "usage": None, "cost_micros": None}


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as the run sees it."""
    now = [0.0]
    monkeypatch.setattr("tidegate.cli.batch.time.monotonic", lambda: now[0])
    return now


def test_the_time_left_does_not_jump_when_calls_come_in_bursts(at: list[float]) -> None:
    """A hundred a minute, of which all come in its first second, as a limit of a minute admits."""
    tally, told = RunProgress(10_000, 0, began=0.0), []
    for minute in range(50):
        at[0] = minute * 60 + 1.0
        for _ in range(100):
            tally.count(ROW)
        for second in (5, 20, 40, 59):
            at[0] = minute * 60 + second
            if minute >= 5:
                left_s = tally.left_s
                assert left_s is not None
                told.append(left_s / (6_000 - minute * 60 - second))
    assert max(told) < 1.35
    assert min(told) > 0.75


def test_no_time_is_told_at_the_beginning_nor_when_nothing_moves(at: list[float]) -> None:
    tally = RunProgress(1_000, 500, began=0.0)
    at[0] = 1.0
    for _ in range(9):
        tally.count(ROW)
    told = [tally.left_s]  # less than a fiftieth of what this run has to do
    tally.count(ROW)
    told.append(tally.left_s)
    at[0] = 21.0  # nothing ends, so that it takes longer
    told.append(tally.left_s)
    assert told == [None, pytest.approx(49), pytest.approx(49 * 21)]


@pytest.mark.parametrize("part", ["01A21A73-1", "00aa", IDS[0], "000000aa"])
def test_a_part_of_an_id_is_enough(part: str) -> None:
    assert is_short_id(part)
    assert whole_id(part, IDS, "the newest 2") == IDS[0]


def test_a_part_that_fits_several_or_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"fits several of the newest 2: {IDS[0]}, {IDS[1]}"):
        whole_id("01a21a73", IDS, "the newest 2")
    with pytest.raises(NotFound, match="neither the beginning"):
        whole_id("ffff", IDS, "the newest 2")


@pytest.mark.parametrize("text", ["aaa", "worker-1/17", "xyzw", "01a21a73 "])
def test_other_texts_are_no_ids(text: str) -> None:
    assert not is_short_id(text)


def test_a_narrow_terminal_shows_the_whole_reason_with_its_way_out() -> None:
    tally = RunProgress(10, submitted=3, waiting="waiting for a budget: " + "x " * 60 + "WAY OUT")
    written = io.StringIO()
    Console(width=40, file=written).print(bar("a.jsonl", tally))
    assert "WAY OUT; 3 submitted" in " ".join(written.getvalue().split())
