"""Run beside others (`-n2`), tests find themselves imported by the process that theirs was forked
from."""

from __future__ import annotations

import os

IMPORTED_BY = os.getpid()


def test_was_imported_before_the_fork() -> None:
    assert os.getpid() != IMPORTED_BY
