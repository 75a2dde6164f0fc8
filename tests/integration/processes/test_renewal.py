"""Children that are replaced one by one: the next is ready before the last one leaves."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.integration.embedded.traces import Traces
from tests.waiting import wait_until
from tidegate.errors import ConfigError
from tidegate.supervisor import supervisor
from tidegate.supervisor.supervisor import RENEW_SIGNAL, Child, Family, daily_work

# Notes each stage of its life, in one file for all. A file `broken` keeps it from becoming ready.
_NOTING = """
import os, pathlib, signal, sys
from tidegate.supervisor.supervisor import report_ready
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
def note(stage):
    with (folder / "notes").open("a") as notes:
        notes.write(f"{name} {os.environ.get('GENERATION', '')} {stage}\\n")
def leave(*_):
    note("left")
    os._exit(0)
signal.signal(signal.SIGUSR1, leave)
signal.signal(signal.SIGTERM, leave)
if (folder / "broken").exists():
    sys.exit(3)
if (folder / "stuck").exists():
    note("stuck")
    while True:
        signal.pause()
note("ready")
report_ready()
while True:
    signal.pause()
"""


def _notes(folder: Path) -> list[str]:
    notes = folder / "notes"
    return notes.read_text().splitlines() if notes.exists() else []


@asynccontextmanager
async def _family(
    folder: Path,
    *names: str,
    program: str = _NOTING,
    changed: Mapping[str, str] = MappingProxyType({}),
    grace_s: float = 20.0,
) -> AsyncIterator[Family]:
    """A running family, whose environments have the next number each, and later ones `changed`."""
    generation = iter("123456789")

    def reread() -> Mapping[str, str]:
        if (folder / "wrong").exists():
            raise ConfigError("PORT", "x", "must be a number")
        return {**os.environ, **changed, "GENERATION": next(generation)}

    argv = (sys.executable, "-c", program, str(folder))
    children = [Child(name, (*argv, name)) for name in names]
    first = {**os.environ, "GENERATION": "0"}
    family = Family(children, environment=first, reread=reread, grace_s=grace_s)
    running = asyncio.create_task(family.run())
    await wait_until(lambda: len(_notes(folder)) == len(names), 20)
    yield family
    family.stop()
    await asyncio.wait_for(running, 20)


async def test_each_is_replaced_after_the_next_is_ready(tmp_path: Path, traces: Traces) -> None:
    async with _family(tmp_path, "a", "b") as family:
        before = family.pids
        os.kill(os.getpid(), RENEW_SIGNAL)
        await wait_until(lambda: "b 0 left" in _notes(tmp_path), 20)
        assert set(before.values()).isdisjoint(family.pids.values())
        assert _notes(tmp_path)[2:] == ["a 1 ready", "a 0 left", "b 1 ready", "b 0 left"]
        os.kill(family.pids["a"], signal.SIGKILL)  # the new settings are those of the next as well
        await wait_until(lambda: _notes(tmp_path)[-1] == "a 1 ready" and "a" in family.pids, 20)
    await traces.none_left()


async def test_the_daily_work_has_the_settings_of_the_last_renewal(
    tmp_path: Path, traces: Traces
) -> None:
    ran: list[tuple[str, str]] = []
    now = datetime(2026, 11, 29, 4, tzinfo=UTC)

    async def run(command: tuple[str, ...], environment: Mapping[str, str]) -> int:
        ran.append((" ".join(command), environment["GENERATION"]))
        return 0

    async with _family(tmp_path, "a", changed={"RECORD_EXPORT": "jsonl"}) as family:
        daily = daily_work(family, run, now=lambda: now)
        await daily.run_due()
        assert ran == [("prune", "0")]
        family.renew()
        await wait_until(lambda: not family.renewing, 20)
        now += timedelta(days=1)
        await daily.run_due()
        assert ran[1:] == [("prune", "1"), ("export record --format jsonl", "1")]
        (tmp_path / "broken").touch()
        family.renew()
        await wait_until(lambda: not family.renewing, 20)
        now += timedelta(days=1)
        await daily.run_due()
        assert ran[3:] == [("prune", "1"), ("export record --format jsonl", "1")]
    await traces.none_left()


async def test_a_process_has_as_long_to_finish_as_its_own_settings_say(
    tmp_path: Path, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_MARGIN_S", 0.0)
    changed = {"SHUTDOWN_GRACE_MS": "60000"}
    async with _family(tmp_path, "a", program=_SLOW, changed=changed, grace_s=0.01) as family:
        (tmp_path / "go").touch()
        family.renew()
        await wait_until(lambda: not family.renewing, 20)
    assert _notes(tmp_path)[-1] == "a 1 ends"
    await traces.none_left()


async def test_one_that_does_not_start_leaves_the_old_in_place(
    tmp_path: Path, traces: Traces
) -> None:
    async with _family(tmp_path, "a", "b") as family:
        before = family.pids
        (tmp_path / "wrong").touch()
        family.renew()
        await wait_until(lambda: not family.renewing)
        (tmp_path / "wrong").unlink()
        (tmp_path / "broken").touch()
        family.renew()
        await wait_until(lambda: not family.renewing, 20)
        assert family.pids == before
        (tmp_path / "broken").unlink()
        os.kill(before["a"], signal.SIGKILL)  # it is started again with the settings that worked
        await wait_until(lambda: _notes(tmp_path)[2:] == ["a 0 ready"], 20)
    await traces.none_left()


async def test_stop_during_a_renewal_leaves_none(tmp_path: Path, traces: Traces) -> None:
    async with _family(tmp_path, "a") as family:
        (tmp_path / "stuck").touch()
        family.renew()
        await wait_until(lambda: _notes(tmp_path)[-1] == "a 1 stuck", 20)
    await traces.none_left()


# Once stopped, the first ends when there is a file `end`; the next is ready when there is `go`.
_SLOW = """
import os, pathlib, signal, sys, time
from tidegate.supervisor.supervisor import report_ready
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
def note(stage):
    with (folder / "notes").open("a") as notes:
        notes.write(f"{name} {os.environ.get('GENERATION', '')} {stage}\\n")
def until(file):
    while not (folder / file).exists():
        time.sleep(0.01)
is_first = os.environ["GENERATION"] == "0"
def finish(*_):
    note("stops")
    until("end") if is_first else time.sleep(0.2)
    note("ends")
    os._exit(0)
signal.signal(signal.SIGTERM, finish)
note("started")
if not is_first:
    until("go")
report_ready()
while True:
    signal.pause()
"""


async def test_stop_ends_a_renewal_while_old_processes_still_finish(
    tmp_path: Path, traces: Traces
) -> None:
    async with _family(tmp_path, "a", "b", program=_SLOW) as family:
        family.renew()
        await wait_until(lambda: _notes(tmp_path)[-1] == "a 1 started", 20)
        family.stop()
        await wait_until(lambda: {"a 0 stops", "b 0 stops"} <= set(_notes(tmp_path)), 20)
        (tmp_path / "go").touch()
        await wait_until(lambda: not family.renewing, 20)
        (tmp_path / "end").touch()
    assert not [note for note in _notes(tmp_path) if note.startswith("b 1")]
    assert "a 1 stops" in _notes(tmp_path), "none is left to its lifeline"
    await traces.none_left()
