"""The last figures, and their quantile, against a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.admission.estimator import REMEMBERED, Window


@given(st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=3 * REMEMBERED))
def test_it_holds_the_last_figures(figures: list[float]) -> None:
    window = Window(figures)
    last = figures[-REMEMBERED:]
    assert list(window.by_time) == last
    assert len(window) == len(last)
    assert window.upper(0.999) == max(last)
    assert Window(window.by_time).upper(0.95) == window.upper(0.95)
    assert min(last) <= window.upper(0.5) <= max(last)


def test_its_upper_figure_is_between_those_that_are_nearest() -> None:
    window = Window(map(float, range(64)))
    # One in 20 of 65: 3.25 from the largest on.
    assert window.upper(0.95) == 61 * 0.75 + 60 * 0.25
    assert Window([3.0, 1.0, 2.0]).upper(0.95) == 3.0
