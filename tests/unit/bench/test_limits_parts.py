"""Parts of the limits' benchmark that run beside one another."""

from __future__ import annotations

from pathlib import Path

from bench.limits.parts import Figures, Part, run_beside


def _never() -> Figures:
    raise AssertionError("one of many parts is measured in a process of its own")


def test_a_part_whose_process_fails_is_marked_so_and_loses_no_other(tmp_path: Path) -> None:
    parts = {name: Part(("--of", str(tmp_path / name)), _never) for name in ("one", "two", "three")}
    figures = dict(run_beside(parts, 2, ()))
    assert figures == {name: {"failed": "its process ended with 1"} for name in parts}


def test_a_part_alone_is_measured_in_this_process() -> None:
    parts = {"alone": Part(("--scenario", "mix"), lambda: {"calls": 5})}
    assert list(run_beside(parts, 3, ())) == [("alone", {"calls": 5})]
