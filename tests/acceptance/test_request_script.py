"""`scripts/test_requests.zsh` of README.md under both shells, against the running product."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tidegate.embedded.servers import free_port

if TYPE_CHECKING:
    from tests.product import Product

pytest_plugins = ["tests.product"]

SCRIPT = Path(__file__).parents[2] / "scripts" / "test_requests.zsh"
SHELLS = ("bash", "zsh")
LIMITS = {"0": 5, "1": 3, "2": 2}


def run(
    shell: str, *arguments: str, base_url: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    place = {"BASE_URL": base_url} if base_url else {}
    return subprocess.run(
        [shell, str(SCRIPT), *arguments],
        env={"PATH": os.environ["PATH"], "TMPDIR": os.environ["TMPDIR"], **place, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("kind", ["0", "1", "2"])
def test_it_follows_each_request_to_its_end_and_sums_up(
    shell: str, kind: str, product: Product, tmp_path: Path
) -> None:
    done = run(shell, kind, "6", base_url=product.base_url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.search(r"done +6 of 6", done.stdout)
    assert re.search(r"failed +0", done.stdout)
    assert re.search(r"slowest +\d+\.\d+ s \([0-9a-f-]{36}\)", done.stdout)
    at_once = re.search(r"concurrent +(\d+) at most", done.stdout)
    assert at_once is not None
    assert 1 <= int(at_once[1]) <= LIMITS[kind]
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


@pytest.mark.parametrize("shell", SHELLS)
def test_one_request_is_fired_when_no_count_is_given(shell: str, product: Product) -> None:
    done = run(shell, "0", base_url=f"{product.base_url}/")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"done +1 of 1", done.stdout)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_gateway_that_is_not_there_is_a_failure(shell: str) -> None:
    port = free_port()
    done = run(shell, "0", "3", PORT=str(port))
    assert (done.returncode, done.stdout) == (1, "")
    help_text = "start it with `make run`, or set BASE_URL or PORT"
    assert done.stderr == f"nothing answers at http://localhost:{port}: {help_text}\n"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "arguments",
    [(), ("3",), ("text",), ("0", "0"), ("0", "-1"), ("0", "two"), ("0", "1", "2")],
)
def test_wrong_arguments_give_the_usage(shell: str, arguments: tuple[str, ...]) -> None:
    done = run(shell, *arguments, base_url="http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: scripts/test_requests.zsh TYPE [COUNT]")


def test_it_can_be_started_by_its_name() -> None:
    assert os.access(SCRIPT, os.X_OK)
    assert SCRIPT.read_text().startswith("#!/usr/bin/env zsh\n")
