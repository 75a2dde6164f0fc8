"""The commands as a user runs them, on real parts."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from tests.integration.embedded.traces import Traces
from tests.waiting import wait_until
from tidegate.embedded.servers import free_port
from tidegate.supervisor.supervisor import MOST_FILES

_ROOT = Path(__file__).parents[3]


def _get(url: str) -> Any:
    """The JSON of an answer of 200, or None."""
    try:
        with urlopen(url, timeout=30) as answer:
            return json.load(answer)
    except (URLError, OSError):
        return None


def _text(url: str, data_dir: Path) -> str:
    """What an operator is told."""
    key = (data_dir / "operator.key").read_text(encoding="ascii").strip()
    shown = Request(url, headers={"Authorization": f"Bearer {key}"})
    with urlopen(shown, timeout=30) as answer:
        text: bytes = answer.read()
        return text.decode()


def _submit(place: str, prompt: str) -> str:
    request = Request(
        f"{place}/submit",
        json.dumps({"data": prompt}).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["request_id"])


def _outcome(place: str, request_id: str) -> str | None:
    """How the job ended, or None while it has not."""
    status = _get(f"{place}/status/{request_id}?wait=20")
    found = None if status is None else str(status["status"])
    return found if found not in ("queued", "running") else None


@contextmanager
def _running(
    tmp_path: Path, name: str, *command: str, **settings: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process, and the file of all that it says; ended at the end however the test went. It is
    started with 1,024 open files, as by many shells."""
    said = tmp_path / f"{name}.out"
    with said.open("wb") as file:
        process = subprocess.Popen(
            ["sh", "-c", 'ulimit -Sn 1024; exec "$@"', "sh", sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "LOG_FORMAT": "json", **settings},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process, said
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.mark.slow
async def test_up_shows_its_page_survives_a_killed_child_and_leaves_nothing(
    tmp_path: Path, data_dir: Path, traces: Traces
) -> None:
    port = free_port()
    place = f"http://localhost:{port}"
    settings = {"PORT": str(port), "DATA_DIR": str(data_dir)}
    # A user's file that is named like a module which the processes need.
    (tmp_path / "html.py").write_text("raise SystemExit('not this one')\n")
    with _running(tmp_path, "up", "-P", "-m", "tidegate", "up", **settings) as (up, said):
        await wait_until(lambda: "Ctrl-C stops everything" in said.read_text(), 60, "the page")
        page = said.read_text()
        assert f"Tidegate 0.1.0   {place}" in page
        assert (
            "text_only 5, multi_modal 3, image_generation 2 concurrent calls, over all processes\n"
            in page
        )
        assert "No provider key, such as GEMINI_API_KEY: answers come from the built-in" in page
        assert len(re.findall(r"^ +curl .*localhost", page, re.MULTILINE)) == 4
        assert page.index("/v1/chat/completions") < page.index("/submit"), "an SDK's call first"
        marks = re.findall(r"^  ✓ (.*?) +\d+\.\d s$", page, re.MULTILINE)
        assert marks[0] == "Bundled PostgreSQL and Valkey"
        assert marks[1].startswith("Database schema 00")
        assert marks[2:] == ["API and workers"]
        assert "\x1b[" not in page, "plain text where there is no terminal"
        request_id = _submit(place, "Why is the sea salty?")
        assert await wait_until(lambda: _outcome(place, request_id), 30) == "succeeded"
        for pid in (api := traces.pids("tidegate serve")):
            os.kill(pid, signal.SIGKILL)
        assert len(api) == 1
        await wait_until(lambda: traces.pids("tidegate serve") not in ([], api), 20)
        await wait_until(lambda: _get(f"{place}/health/ready"), 30, "readiness again")
        job = 'tidegate_calls_total{kind="text_only",model="gemini-2.5-flash",pool="gemini",'
        job += 'source="job",status="succeeded"} 1.0'
        metrics = f"{place}/metrics"
        await wait_until(lambda: job in _text(metrics, data_dir), 20, "the worker's job is told")
        assert '{process="worker-1"}' in _text(metrics, data_dir)
        up.send_signal(signal.SIGINT)
        assert up.wait(40) == 0
    assert "Nothing is left running" in said.read_text()
    assert not traces.postgres()
    assert not traces.pids("valkey-server")
    await traces.none_left(timeout_s=20)


@pytest.mark.slow
async def test_app_and_worker_find_each_other_and_either_survives_the_other(
    tmp_path: Path, data_dir: Path, traces: Traces
) -> None:
    port = free_port()
    place = f"http://localhost:{port}"
    settings = {"PORT": str(port), "DATA_DIR": str(data_dir)}
    app, worker = str(_ROOT / "run_app.py"), str(_ROOT / "run_worker.py")
    with _running(tmp_path, "worker", worker, **settings) as (working, _):
        with _running(tmp_path, "app", app, **settings) as (serving, _):
            await wait_until(lambda: _get(f"{place}/health/ready"), 60, "readiness")
            for process in (serving, working) if sys.platform == "linux" else ():
                soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
                assert soft == min(hard, MOST_FILES)
            first = _submit(place, "Why is the sea salty?")
            assert await wait_until(lambda: _outcome(place, first), 30) == "succeeded"
            # One key, though both began where there was none.
            assert '"kind:text_only"' in _text(f"{place}/admin/limits", data_dir)
            serving.kill()
            serving.wait()
        assert working.poll() is None
        with _running(tmp_path, "app2", app, **settings):
            await wait_until(lambda: _get(f"{place}/health/ready"), 60, "readiness")
            assert _outcome(place, first) == "succeeded"
            assert '"kind:text_only"' in _text(f"{place}/admin/limits", data_dir)
            working.kill()
            working.wait()
            second = _submit(place, "Who waits for a worker?")
            with _running(tmp_path, "worker2", worker, **settings):
                assert await wait_until(lambda: _outcome(place, second), 40) == "succeeded"
    await traces.none_left()


@pytest.mark.parametrize("command", ["up", "serve"])
async def test_a_taken_port_stops_the_start_with_one_line(
    command: str, tmp_path: Path, data_dir: Path, traces: Traces
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        settings = {"PORT": port, "DATA_DIR": str(data_dir)}
        with _running(tmp_path, command, "-m", "tidegate", command, **settings) as (process, said):
            assert process.wait(20) == 2
    assert said.read_text() == (
        f"tidegate: PORT={port}: is in use by another program; "
        "choose another port, or 0 for any free one\n"
    )
    assert data_dir.name not in os.listdir(tmp_path), "nothing was started"


async def test_a_port_that_a_tidegate_has_is_said_to_be_its(tmp_path: Path, data_dir: Path) -> None:
    settings = {"PORT": str(free_port()), "DATA_DIR": str(data_dir)}
    with _running(tmp_path, "up", "-m", "tidegate", "up", **settings) as (_, said):
        await wait_until(lambda: "Ctrl-C stops everything" in said.read_text(), 60, "the page")
        with _running(tmp_path, "again", "-m", "tidegate", "up", **settings) as (again, refusal):
            assert again.wait(20) == 2
        assert "is in use by a Tidegate that runs already" in refusal.read_text()
