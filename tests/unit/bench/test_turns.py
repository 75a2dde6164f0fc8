"""Two checkouts that are measured in turns."""

from __future__ import annotations

from bench.against import Turns


def test_the_two_loads_of_a_turn_are_compared_with_one_another() -> None:
    """A machine that is half as fast in one turn changes no ratio."""
    turns = Turns("a call", here=[100, 200, 110], there=[100, 200, 100])
    assert turns.row() == ["a call", "100", "110", "1.000", "-", "<= 1.05", "met"]
    slower = Turns("a call", here=[107, 212, 106], there=[100, 200, 100])
    assert slower.row()[3:] == ["1.060", "-", "<= 1.05", "missed"]


def test_the_error_is_that_of_the_starts() -> None:
    """Turns of one start have the same two processes, which differ by themselves."""
    turns = Turns("a call", here=[100] * 10 + [104] * 10, there=[100] * 20)
    assert turns.row()[3:5] == ["1.020", "0.020"]
