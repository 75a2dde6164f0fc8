"""What a process that serves does at a signal, with real signals."""

from __future__ import annotations

import os
import signal

import pytest

from tests.waiting import wait_until
from tidegate.supervisor.roles import on_signals
from tidegate.supervisor.supervisor import LEAVE_SIGNAL, LIFELINE


class Done:
    """What was done, in order."""

    def __init__(self, leave_ms: int) -> None:
        self.did: list[str] = []
        on_signals(
            lambda: self.did.append("stop"),
            leave=lambda: self.did.append("leave"),
            leave_ms=leave_ms,
            hurry=lambda: self.did.append("hurry"),
        )

    async def after(self, sent: signal.Signals, count: int) -> list[str]:
        os.kill(os.getpid(), sent)
        await wait_until(lambda: len(self.did) >= count, what=f"{count} steps")
        return self.did


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
async def test_who_does_not_leave_softly_refuses_waiting_calls_before_it_stops(
    sent: signal.Signals,
) -> None:
    assert await Done(60_000).after(sent, 2) == ["hurry", "stop"]


async def test_a_child_that_its_supervisor_stops_does_so_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LIFELINE, "7")
    assert await Done(60_000).after(signal.SIGTERM, 2) == ["hurry", "stop"]


async def test_one_that_leaves_lets_its_waiting_calls_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LIFELINE, "7")
    assert await Done(1).after(LEAVE_SIGNAL, 2) == ["leave", "stop"]


async def test_a_second_signal_ends_its_patience() -> None:
    done = Done(60_000)
    assert await done.after(signal.SIGTERM, 1) == ["leave"]
    assert await done.after(signal.SIGINT, 3) == ["leave", "hurry", "stop"]


async def test_the_end_of_leaving_is_no_signal_and_calls_survive_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LIFELINE, "7")  # replaced, and then its supervisor stops
    done = Done(1)
    assert await done.after(LEAVE_SIGNAL, 2) == ["leave", "stop"]
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "it would die of the next one"
    assert await done.after(signal.SIGTERM, 4) == ["leave", "stop", "hurry", "stop"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a third one ends it"
