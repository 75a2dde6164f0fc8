"""What this process has in hand: the task of each job, how far it has come, and what is called off.

Invariant: a job is called off only while its call is open; once the call is over, how it ended is
recorded as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum, auto

from tidegate.store.records import ClaimedJob

Tasks = dict[asyncio.Task[None], ClaimedJob]


class Stage(Enum):
    """How far a job has come in this process; it decides what a stop or a cancel does to it."""

    WAITING = auto()  # handed back at once
    CALLING = auto()  # admitted: has the grace to end
    RECORDING = auto()  # its call is over: must not be repeated, and takes only a moment


class Stages:
    """Of the jobs whose tasks `tasks` gives; one that it was told nothing of is waiting."""

    def __init__(self, tasks: Callable[[], Tasks]) -> None:
        self.tasks = tasks
        self._stages: dict[tuple[object, int], Stage] = {}
        self._called_off: set[tuple[object, int]] = set()

    def enter(self, job: ClaimedJob, stage: Stage) -> None:
        self._stages[_key(job)] = stage

    def leave(self, job: ClaimedJob) -> None:
        """It waits again, or this process is done with it."""
        self._stages.pop(_key(job), None)
        self._called_off.discard(_key(job))

    def at(self, *stages: Stage) -> Tasks:
        return {
            task: job
            for task, job in self.tasks().items()
            if self._stages.get(_key(job), Stage.WAITING) in stages
        }

    def call_off(self, task: asyncio.Task[None], job: ClaimedJob) -> None:
        """Cancel the call of a job that is at CALLING, for its owner."""
        if _key(job) not in self._called_off:
            self._called_off.add(_key(job))
            task.cancel()

    def is_called_off(self, job: ClaimedJob) -> bool:
        return _key(job) in self._called_off


def _key(job: ClaimedJob) -> tuple[object, int]:
    return job.request_id, job.claim


def end_cancelling() -> None:
    """The current task was cancelled to end its call, and goes on."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
