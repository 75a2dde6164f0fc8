"""One thing that was looked at: how it was found, and how to mend it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """`skipped` could not be looked at, or need not be; another finding says why."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """check: its stable name, `room.what`. found: in words. mend: what to do about it."""

    check: str
    state: State
    found: str
    mend: str = ""

    @property
    def room(self) -> str:
        return self.check.partition(".")[0]


def ok(check: str, found: str) -> Finding:
    return Finding(check, State.OK, found)


def warn(check: str, found: str, mend: str) -> Finding:
    return Finding(check, State.WARN, found, mend)


def fail(check: str, found: str, mend: str) -> Finding:
    return Finding(check, State.FAIL, found, mend)


def skipped(check: str, why: str) -> Finding:
    return Finding(check, State.SKIPPED, why)
