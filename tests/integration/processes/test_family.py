"""Children of a supervisor: kept running, stopped in order, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from tests.integration.embedded.traces import Traces
from tests.waiting import wait_until
from tidegate.supervisor.supervisor import Child, Family

_IDLE = "import signal; signal.pause()"
# Says that it runs, and on SIGTERM that it has finished.
_ORDERLY = """
import pathlib, signal, sys
folder = pathlib.Path(sys.argv[1])
def finish(*_):
    (folder / "finished").touch()
    sys.exit()
signal.signal(signal.SIGTERM, finish)
(folder / "started").touch()
while True:
    signal.pause()
"""
# Says that it is ready, and what it is called.
_NAMED = """
import os, pathlib, signal, sys
from tidegate.supervisor.supervisor import report_ready
signal.signal(signal.SIGUSR1, lambda *_: sys.exit())
(pathlib.Path(sys.argv[1]) / os.environ["TIDEGATE_CHILD"]).touch()
report_ready()
signal.pause()
"""
_STUBBORN = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(pathlib.Path(sys.argv[1]) / "started").touch()
while True:
    signal.pause()
"""
_SUPERVISOR = """
import asyncio, os, sys
from tidegate.supervisor.supervisor import Child, Family
child = Child("child", (sys.executable, "-c", sys.argv[1], sys.argv[2]))
asyncio.run(Family([child], environment=os.environ).run())
"""
_FOLLOWER = """
import os, pathlib, signal, sys
from tidegate.supervisor.supervisor import LIFELINE
from tidegate.supervisor.roles import follow_lifeline
folder = pathlib.Path(sys.argv[1])
def finish(*_):
    (folder / "finished").touch()
    os._exit(0)
signal.signal(signal.SIGTERM, finish)
follow_lifeline(int(os.environ[LIFELINE]), grace_s=5)
(folder / "started").touch()
while True:
    signal.pause()
"""


def _child(program: str, *arguments: str) -> Child:
    return Child("child", (sys.executable, "-c", program, *arguments))


def _family(*children: Child, grace_s: float = 20.0) -> Family:
    return Family(children, environment=os.environ, grace_s=grace_s)


async def test_a_child_that_dies_is_started_again(traces: Traces) -> None:
    family = _family(_child(_IDLE), Child("other", (sys.executable, "-c", _IDLE)))
    running = asyncio.create_task(family.run())
    await wait_until(lambda: len(family.pids) == 2)
    before = family.pids
    os.kill(before["child"], signal.SIGKILL)
    await wait_until(lambda: family.pids.get("child") not in (None, before["child"]))
    assert family.pids["other"] == before["other"], "the others are left alone"
    family.stop()
    await running
    assert family.failure is None
    await traces.none_left()


async def test_stop_lets_children_finish_and_leaves_none(tmp_path: Path, traces: Traces) -> None:
    family = _family(_child(_ORDERLY, str(tmp_path)))
    running = asyncio.create_task(family.run())
    await wait_until((tmp_path / "started").exists)
    family.stop()
    await running
    assert (tmp_path / "finished").exists()
    assert not traces.pids(" -c ")


async def test_a_signal_stops_the_family(tmp_path: Path, traces: Traces) -> None:
    family = _family(_child(_ORDERLY, str(tmp_path)))
    running = asyncio.create_task(family.run())
    await wait_until((tmp_path / "started").exists)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 10)
    assert (tmp_path / "finished").exists()


async def test_a_second_stop_ends_what_does_not_want_to_end(tmp_path: Path, traces: Traces) -> None:
    family = _family(_child(_STUBBORN, str(tmp_path)), grace_s=600)
    running = asyncio.create_task(family.run())
    await wait_until((tmp_path / "started").exists)
    family.stop()
    family.stop()
    await asyncio.wait_for(running, 10)
    assert not traces.pids(" -c ")


async def test_a_family_that_never_settles_gives_up_and_says_who_failed(traces: Traces) -> None:
    broken = Child("api-1", (sys.executable, "-c", "raise SystemExit(1)"))
    family = _family(broken, _child(_IDLE))
    await asyncio.wait_for(family.run(), 30)
    assert family.failure == "the api-1 process ended with exit code 1 at its start"
    assert not traces.pids(" -c ")


async def test_a_child_that_cannot_live_with_its_settings_is_not_tried_again(
    tmp_path: Path, traces: Traces
) -> None:
    program = "import os, sys; os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)); sys.exit(2)"
    family = _family(_child(program, str(tmp_path / "once")))
    await asyncio.wait_for(family.run(), 30)
    assert family.failure == "the child process ended with exit code 2 at its start"


async def test_children_stop_in_order_when_their_supervisor_is_killed(
    tmp_path: Path, traces: Traces
) -> None:
    program = [sys.executable, "-c", _SUPERVISOR, _FOLLOWER, str(tmp_path)]
    supervisor = await asyncio.create_subprocess_exec(*program)
    await wait_until((tmp_path / "started").exists)
    supervisor.kill()
    await supervisor.wait()
    await wait_until((tmp_path / "finished").exists, what="an orderly end of the child")
    await traces.none_left()


async def test_who_replaces_another_counts_under_a_name_of_its_own(tmp_path: Path) -> None:
    gone: list[str] = []
    child = Child("api-1", (sys.executable, "-c", _NAMED, str(tmp_path)))
    family = Family([child], environment=os.environ, on_ended=gone.append)
    running = asyncio.create_task(family.run())

    async def renewed(name: str, ended: int) -> None:
        """By one that is called so; `ended` are gone then."""
        (tmp_path / name).unlink(missing_ok=True)
        family.renew()
        await wait_until((tmp_path / name).exists, 20, name)
        await wait_until(lambda: len(gone) == ended and not family.renewing, 20, f"{ended} gone")

    await wait_until((tmp_path / "api-1").exists)
    await renewed("api-1.2", 1)
    await renewed("api-1", 2)
    family.stop()
    await running
    assert gone[:2] == ["api-1", "api-1.2"]
