"""Stage of a run: the emulated provider as a process, and our product before it.

Invariant: leaving it ends all that it started.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from bench.environments import ROOT
from bench.gateway.processes import Program
from bench.gateway.product import Product
from bench.limits.accounts import KEY_VARIABLE, MeasuredProvider
from bench.limits.load import ANSWER, CLIENTS
from tidegate.emulator.__main__ import BEHAVIOUR_VARIABLE

APIS, WORKERS = 2, 2
READY_S = 60.0
OPERATORS_KEY = "the-operator-of-a-measured-gateway"
WAIT_MS = 300_000  # of a live call, so that the backlog stays full
ANSWER_MS = 60.0  # until an answer begins; longer ones need as many more clients
BEHAVIOUR = {
    "first_byte_ms": {"lognormal": [ANSWER_MS, 0.3]},
    "between_ms": 10,
    "chunks": 4,
    "answer": ANSWER,
}


class NotStarted(Exception):
    """A process of the stage is not ready; the message is its output."""


@dataclass(frozen=True, slots=True)
class LimitsStage:
    """What runs: the provider's and the gateway's address, and the gateway itself. clients: of each
    model, as many as keep the queue full."""

    provider_url: str
    gateway_url: str
    product: Product
    clients: int

    def command(self, *arguments: str, **settings: str) -> float:
        """Seconds that `tidegate` took with these arguments, as a person runs it. Raises
        NotStarted with what it printed where it failed."""
        began_s = time.monotonic()
        done = subprocess.run(
            (sys.executable, "-m", "tidegate", *arguments),
            cwd=self.product.folder,
            env={**self.product.environment(), **settings},
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise NotStarted((done.stdout + done.stderr).strip())
        return time.monotonic() - began_s


@contextmanager
def standing(
    provider: MeasuredProvider,
    window_s: float,
    *,
    answer_ms: float = ANSWER_MS,
    at_first: bool = False,
    **account: Any,
) -> Iterator[LimitsStage]:
    """Emulator and product while the block runs, `at_first` with limits as 0.1.0 has them.

    Raises NotStarted.
    """
    begins_ms = {"first_byte_ms": {"lognormal": [answer_ms, 0.3]}}
    behaviour = {**BEHAVIOUR, **begins_ms, "account": provider.account(window_s, **account)}
    with TemporaryDirectory(prefix="bench-limits-") as folder:
        emulator, provider_url = emulator_process(Path(folder), behaviour)
        try:
            upstream_url = provider_url + _BASES[provider.dialect]
            policy = provider.toml(window_s, upstream_url, at_first=at_first)
            settings = {
                "STREAM_WAIT_MS": str(WAIT_MS),
                KEY_VARIABLE: "measured",
                "ADMIN_TOKEN": OPERATORS_KEY,
            }
            with Product(
                provider_url, apis=APIS, workers=WORKERS, policy=policy, settings=settings
            ) as product:
                url = f"http://127.0.0.1:{product.port}"
                await_ready(product.program, url)
                clients = CLIENTS * max(1, round(answer_ms / ANSWER_MS / 10))
                yield LimitsStage(provider_url, url, product, clients)
        finally:
            emulator.stop()


_BASES = {"openai": "/v1", "anthropic": "", "gemini": ""}


def emulator_process(folder: Path, behaviour: dict[str, Any]) -> tuple[Program, str]:
    port_file = folder / "port"
    program = Program(
        (
            sys.executable,
            "-m",
            "tidegate.emulator",
            "--port",
            "0",
            "--port-file",
            port_file,
        ),
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            BEHAVIOUR_VARIABLE: json.dumps(behaviour),
        },
        log=folder / "emulator.log",
    )
    deadline_s = time.monotonic() + READY_S
    while not port_file.exists():
        if time.monotonic() > deadline_s or not program.alive:
            said = program.said()
            program.stop()
            raise NotStarted(said)
        time.sleep(0.05)
    return program, f"http://127.0.0.1:{port_file.read_text().strip()}"


def await_ready(program: Program, url: str) -> None:
    deadline_s = time.monotonic() + READY_S
    while True:
        try:
            with urlopen(f"{url}/health/ready", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            pass
        if time.monotonic() > deadline_s or not program.alive:
            raise NotStarted(program.said())
        time.sleep(0.1)
