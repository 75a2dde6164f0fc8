"""An emulator of providers' APIs: its own process, enforced limits, faults on order, ground truth.

Invariant: what it counts is what really arrived here. The counters and the call log are kept by
the server that answers, never by a client, so that tests and benchmarks can trust them.
"""

from tidegate.providers.emulator.client import EmulatorControl
from tidegate.providers.emulator.run import Emulator, run_emulator
from tidegate.providers.emulator.settings import Behaviour, EmulatorSettings, RateLimit

__all__ = [
    "Behaviour",
    "Emulator",
    "EmulatorControl",
    "EmulatorSettings",
    "RateLimit",
    "run_emulator",
]
