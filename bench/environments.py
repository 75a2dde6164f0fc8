"""Where the programs of others are installed, each into a place of its own below `.bench/`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".bench"


# The Python whose `tidegate` is measured as ours, if not the one that runs the benchmark.
OURS_PYTHON = "BENCH_OURS_PYTHON"


def ours_python() -> Path:
    """The interpreter of the checkout that is measured, in its `.venv/bin`."""
    return Path(os.environ.get(OURS_PYTHON, sys.executable))


class EnvironmentMissing(Exception):
    """What is to be measured cannot be had on this machine; the message says why."""


def python_with(
    name: str,
    wanted: Sequence[str],
    oldest: tuple[int, int] = (3, 11),
    *,
    newest: tuple[int, int] = (3, 99),
    compiled: bool = True,
) -> Path:
    """The interpreter of a virtual environment that has exactly `wanted` and what those need.
    `compiled` to byte code, for what is measured; else only what needs no compiler is installed.
    Raises EnvironmentMissing."""
    folder = CACHE / name
    digest = hashlib.sha256(
        "\n".join([*wanted, str(oldest), *([str(newest)] if newest < (3, 99) else [])]).encode()
    ).hexdigest()
    stamp, found = folder / "installed", folder / "bin" / "python"
    if not (stamp.exists() and stamp.read_text() == digest and found.exists()):
        _install(folder, found, wanted, _base_python(oldest, newest), compiled=compiled)
        stamp.write_text(digest)
    return found


def node_modules_with(name: str, wanted: Mapping[str, str], pinned: Mapping[str, str]) -> Path:
    """The folder of npm packages in exactly the versions of `wanted`; `pinned` are those of what
    they need. Raises EnvironmentMissing."""
    folder = CACHE / name
    stamp, found = folder / "installed", folder / "node_modules"
    asked = json.dumps({"private": True, "dependencies": {**wanted}, "overrides": {**pinned}})
    if not (stamp.exists() and stamp.read_text() == asked and found.is_dir()):
        npm = program("npm", "npm")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(asked)
        options = ("--no-audit", "--no-fund", "--omit=dev", "--ignore-scripts", "--silent")
        run([npm, "install", *options], folder)
        stamp.write_text(asked)
    return found


def program(name: str, package: str) -> str:
    """A program of the system. Raises EnvironmentMissing, with the Debian package that has it."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin")
    if found is None:
        raise EnvironmentMissing(f"{name} is not installed (on Debian: apt install {package})")
    return found


def run(command: Sequence[str | Path], folder: Path) -> None:
    """Raises EnvironmentMissing with the last line that the command said."""
    settings = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    settings.pop("VIRTUAL_ENV", None)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=settings, cwd=folder
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or str(command[0])).splitlines()
        raise EnvironmentMissing(said[-1])


def _install(
    folder: Path, python: Path, wanted: Sequence[str], base: str, *, compiled: bool
) -> None:
    uv = Path(sys.executable).with_name("uv")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    run([uv, "venv", "--quiet", "--no-config", "--python", base, folder], folder.parent)
    install: list[str | Path] = [
        uv,
        "pip",
        "install",
        "--quiet",
        "--compile-bytecode" if compiled else "--only-binary=:all:",
        "--python",
        python,
    ]
    run([*install, *wanted], folder.parent)


def _base_python(oldest: tuple[int, int], newest: tuple[int, int]) -> str:
    """Our own where it will do, so that most run on the same one as we; else the oldest."""
    if oldest <= sys.version_info[:2] <= newest:
        return str(Path(sys.executable).resolve())
    for minor in range(oldest[1], min(newest[1], 19) + 1):
        found = shutil.which(f"python3.{minor}")
        if found and _runs(found):
            return found
    until = f" to {newest[0]}.{newest[1]}" if newest < (3, 99) else " or newer"
    raise EnvironmentMissing(f"needs Python {oldest[0]}.{oldest[1]}{until}, and there is none")


def _runs(python: str) -> bool:
    return not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode
