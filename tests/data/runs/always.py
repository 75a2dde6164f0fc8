"""A test for a run of `scripts/suite.py` that fails alone too."""


def test_fails() -> None:
    raise AssertionError("whatever runs beside it")
