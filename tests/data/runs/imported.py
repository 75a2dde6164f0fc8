"""Run beside others (`-n2`), tests find themselves imported by the process that theirs was forked
from."""

from __future__ import annotations

import os

from tests.waiting import promised_s

IMPORTED_BY = os.getpid()


def test_was_imported_before_the_fork() -> None:
    assert os.getpid() != IMPORTED_BY


PROMISED_S = promised_s(1.0)


def test_what_was_promised_at_import_is_as_wide_as_later() -> None:
    assert promised_s(1.0) == PROMISED_S
