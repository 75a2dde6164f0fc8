"""An environment that holds the built wheel and what it requires, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
UV = Path(sys.executable).with_name("uv")


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run to the end, without a word to anybody's screen."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def done(*command: str | Path, cwd: Path = ROOT) -> str:
    """The output of a command that must succeed."""
    finished = run(*command, cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@dataclass(frozen=True, slots=True)
class Installed:
    """The environment; `locked` is what uv.lock names for the plain package."""

    folder: Path
    locked: frozenset[str]

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def command(self) -> Path:
        return self.folder / "bin" / "tidegate"

    def packages(self) -> frozenset[str]:
        listed = done(UV, "pip", "list", "--quiet", "--format=freeze", "--python", self.python)
        return frozenset(line.partition("==")[0].split(" @ ")[0] for line in listed.splitlines())


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """`pip install tidegate` of the wheel that this checkout builds, with the lock's versions."""
    folder = tmp_path_factory.mktemp("plain")
    done(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (wheel,) = folder.glob("*.whl")
    wanted = folder / "wanted.txt"
    wanted.write_text(
        done(UV, "export", "--quiet", "--frozen", "--no-dev", "--no-emit-project", "--no-hashes")
    )
    done(UV, "venv", "--quiet", "--python", sys.executable, folder / "venv")
    plain = Installed(folder / "venv", _names_here(wanted.read_text()))
    install = (UV, "pip", "install", "--quiet", "--python", plain.python, "-c", wanted, wheel)
    # From uv's cache where it can: a test should need no package index.
    if run(*install, "--offline").returncode != 0:
        done(*install)
    return plain


def _names_here(requirements: str) -> frozenset[str]:
    """The packages of a requirements file that this platform and this Python need."""
    from packaging.requirements import Requirement

    lines = [line for line in requirements.splitlines() if line and not line.startswith((" ", "#"))]
    parsed = [Requirement(line) for line in lines]
    return frozenset(one.name for one in parsed if one.marker is None or one.marker.evaluate())
