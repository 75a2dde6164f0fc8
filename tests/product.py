"""The whole product, started as a user starts it: `tidegate up` on a free port, one for a run.

A test module takes part with `pytest_plugins = ["tests.product"]` and the fixture `product`.
It is shared and healthy: a test that stops or overloads a deployment starts a `Fleet` of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.clusters import let_in
from tests.waiting import wait_until
from tidegate.embedded.servers import free_port
from tidegate.settings import Config

READY_WITHIN_S = 60
STOPPED_WITHIN_S = 40


@dataclass(frozen=True, slots=True)
class Product:
    """A running deployment. `log` is the file of all that it has written."""

    base_url: str
    data_dir: Path
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def operator_key(self) -> str:
        return (self.data_dir / "operator.key").read_text(encoding="ascii").strip()

    @property
    def place(self) -> str:
        """Host and port, as in `localhost:8000`."""
        return self.base_url.removeprefix("http://")

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def environment(data_dir: Path, port: int, **settings: str) -> dict[str, str]:
    """The variables of this process without any setting of ours, and those of the deployment."""
    names = {field.upper() for field in Config.model_fields}
    foreign = {
        name: value
        for name, value in os.environ.items()
        if name.removesuffix("_FILE") not in names and not name.lower().endswith("_proxy")
    }
    ours = {"DATA_DIR": str(data_dir), "HOST": "127.0.0.1", "PORT": str(port)}
    return foreign | ours | {"LOG_FORMAT": "json"} | settings


@contextmanager
def started(folder: Path, *arguments: str, **settings: str) -> Iterator[Product]:
    """`tidegate up` in an empty folder; ready inside the block, stopped cleanly after it."""
    let_in(folder)
    port = free_port()
    log = folder / "product.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tidegate", "up", *arguments],
            cwd=folder,
            env=environment(folder / "data", port, **settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    product = Product(f"http://127.0.0.1:{port}", folder / "data", process, log)
    try:
        asyncio.run(wait_until(lambda: _is_ready(product), READY_WITHIN_S, "readiness"))
        yield product
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOPPED_WITHIN_S)
        assert status == 0, f"ended with {status}: {product.said()[-2000:]}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """One deployment with the bundled servers and the emulator, shared by the tests of a run."""
    named = {"ALLOWED_HOSTS": "gateway.example"}  # as which a browser is led to it
    with started(tmp_path_factory.mktemp("product"), **named) as running:
        yield running


def _is_ready(product: Product) -> bool:
    ended = product.process.poll()
    if ended is not None:
        pytest.fail(f"the product ended with {ended}: {product.said()[-2000:]}")
    try:
        with urlopen(f"{product.base_url}/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
