"""Entry point of the emulator as its own process: `python -m tidegate.emulator`."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidegate.emulator.dialect import Fault
from tidegate.emulator.server import run_emulator
from tidegate.emulator.settings import Behaviour, EmulatorSettings
from tidegate.errors import ConfigError, InvalidRequest

BEHAVIOUR_VARIABLE = "TIDEGATE_EMULATOR_BEHAVIOUR"
FAULTS_VARIABLE = "TIDEGATE_EMULATOR_FAULTS"


def parse(arguments: Sequence[str]) -> tuple[EmulatorSettings, Path | None]:
    """Return the settings and the port file. Raises ConfigError; exits on wrong usage, as argparse
    does."""
    parser = argparse.ArgumentParser(prog="tidegate emulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8090, help="0 takes a free one")
    parser.add_argument("--port-file", type=Path, help="gets the port when it is ready")
    parser.add_argument("--seed", type=int, default=1, help="of latencies and probabilities")
    parser.add_argument("--first-byte-ms", type=float, help="delay before an answer")
    parser.add_argument("--between-ms", type=float, help="delay between chunks of an answer")
    parser.add_argument(
        "--account",
        help="a provider's name (openai, anthropic, gemini, azure, bedrock, groq) or JSON, fields "
        "of AccountSpec: counts limits as the provider does",
    )
    parser.add_argument(
        "--gpu",
        help="be a GPU server of one's own: llama.cpp, vllm, sglang, tgi, ollama, or JSON, fields "
        "of GpuSpec",
    )
    parser.add_argument(
        "--behaviour",
        default=os.environ.get(BEHAVIOUR_VARIABLE, "{}"),
        help=f"JSON, fields of Behaviour (or {BEHAVIOUR_VARIABLE})",
    )
    parser.add_argument(
        "--faults",
        default=os.environ.get(FAULTS_VARIABLE, "[]"),
        help=f"JSON, a list of faults (or {FAULTS_VARIABLE})",
    )
    given = parser.parse_args(arguments)
    changes = _json("--behaviour", given.behaviour, dict)
    for name in ("first_byte_ms", "between_ms"):
        if (value := getattr(given, name)) is not None:
            changes[name] = value
    for name in ("account", "gpu"):
        if (value := getattr(given, name)) is not None:
            named = not value.startswith("{")
            changes[name] = value if named else _json(f"--{name}", value, dict)
    faults = _json("--faults", given.faults, list)
    try:
        behaviour = Behaviour().changed(changes)
        for fault in faults:
            Fault.parse(fault)
    except InvalidRequest as invalid:
        raise ConfigError(invalid.field, "(given)", invalid.message) from None
    settings = EmulatorSettings(given.host, given.port, behaviour, tuple(faults), seed=given.seed)
    return settings, given.port_file


def _json(name: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, kind):
        what = "an object" if kind is dict else "a list"
        raise ConfigError(name, text, f"must be JSON: {what}")
    return value


async def serve(settings: EmulatorSettings, port_file: Path | None) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with run_emulator(settings) as emulator:
        if port_file is not None:
            # Renamed into place, so that no reader sees a part of the number.
            fresh = port_file.with_name(f"{port_file.name}.{os.getpid()}")
            fresh.write_text(f"{emulator.port}\n", encoding="utf-8")
            fresh.replace(port_file)
        sys.stderr.write(f"emulated provider at {emulator.url}\n")
        await stop.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        settings, port_file = parse(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as invalid:
        sys.stderr.write(f"{invalid}\n")
        return 2
    atexit.register(gc.freeze)  # a collection at exit would take half as long as the start
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(settings, port_file))
    else:
        uvloop.run(serve(settings, port_file))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
