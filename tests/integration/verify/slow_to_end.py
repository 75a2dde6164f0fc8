"""A process under test that takes its time to end, for `test_family.py`."""

from __future__ import annotations

import signal
import time

_TAKES_S = 0.5


def tell(what: str) -> None:
    print(time.monotonic_ns(), what, 0, "-", 0, flush=True)  # noqa: T201


signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
tell("up")
signal.sigwait({signal.SIGTERM})
tell("ending")
signal.sigtimedwait({signal.SIGUSR1}, _TAKES_S)
tell("ended")
