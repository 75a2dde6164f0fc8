"""A SyncLimiter that a program uses where it cannot work: it raises, and never waits for itself."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import pytest

from tidegate.limiter import Limiter, Observer, ShuttingDown, SyncLimiter

POLICY = {"openai": 1}

ABANDONED = """
from tidegate.limiter import SyncLimiter

limiter = SyncLimiter.from_url("memory://", policy={"openai": 2})
limiter.start()

def within_a_permit():
    with limiter.acquire("openai"):
        yield

def within_a_limiter():
    with SyncLimiter.from_url("memory://", policy={"openai": 2}) as inner:
        with inner.acquire("openai"):
            yield

suspended = [within_a_permit(), within_a_limiter()]
for generator in suspended:
    next(generator)
print("ends", flush=True)
"""


def test_a_generator_that_holds_a_permit_does_not_keep_its_program_from_ending() -> None:
    """Python closes it when the thread of the limiter runs no more."""
    ended = subprocess.run(
        [sys.executable, "-c", ABANDONED], capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ends\n", "")


class Asking(Observer):
    """Asks its limiter about an admission, on the limiter's own thread."""

    def __init__(self) -> None:
        self.limiter: SyncLimiter | None = None
        self.answers: list[BaseException] = []

    def admitted(self, *_: object) -> None:
        assert self.limiter is not None
        for call in (self.limiter.local_state, self._acquire):
            try:
                call()
            except RuntimeError as error:
                self.answers.append(error)

    def _acquire(self) -> None:
        assert self.limiter is not None
        with self.limiter.acquire("openai"):
            pass


def test_an_observer_that_would_wait_for_its_own_thread_is_refused() -> None:
    observer = Asking()
    limiter = SyncLimiter.from_url("memory://", policy=POLICY, observer=observer)
    observer.limiter = limiter
    limiter.start()

    def hold() -> None:
        with limiter.acquire("openai", timeout=10):
            pass

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    thread.join(15)
    assert not thread.is_alive()
    limiter.close()
    assert len(observer.answers) == 2
    assert all("its own thread" in str(error) for error in observer.answers)


def test_a_generator_that_is_collected_on_the_limiters_thread_returns_its_permit() -> None:
    """Python collects a cycle on any thread, and this one would wait for itself."""
    with SyncLimiter.from_url("memory://", policy=POLICY) as limiter:

        def within_a_permit() -> Generator[None, None, None]:
            with limiter.acquire("openai", timeout=10):
                yield

        async def collect() -> None:
            suspended.pop().close()

        suspended = [within_a_permit()]
        next(suspended[0])
        collected = limiter.submit(collect)
        assert collected.result(10) is None
        with limiter.acquire("openai", timeout=10):
            pass


def test_a_limiter_that_is_closed_on_its_own_thread_ends() -> None:
    limiter = SyncLimiter.from_url("memory://", policy=POLICY)
    limiter.start()

    async def close(_: Limiter) -> None:
        limiter.close()

    with suppress(ShuttingDown):  # the reply may come after the end
        limiter.run(close)
    limiter.close()
    assert not limiter._thread.is_alive()


@pytest.mark.parametrize("was_started", [True, False])
def test_a_limiter_that_was_closed_is_not_opened_again(was_started: bool) -> None:
    limiter = SyncLimiter.from_url("memory://", policy=POLICY)
    if was_started:
        limiter.start()
        with pytest.raises(RuntimeError, match="opened once"):
            limiter.start()
    limiter.close()
    with pytest.raises(RuntimeError, match="opened once"):
        limiter.start()


@pytest.mark.parametrize("grace", ["5", None])
def test_a_grace_that_is_no_time_is_named_and_closes_nothing(grace: Any) -> None:
    with SyncLimiter.from_url("memory://", policy=POLICY) as limiter:
        with pytest.raises(TypeError, match="grace_ms is a number of milliseconds"):
            limiter.close(grace)
        with limiter.acquire("openai", timeout=5):
            pass
