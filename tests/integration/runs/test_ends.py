"""Whatever ends a run of tests, nothing that it started lives on for more than 10 s."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import watcher
from tests.waiting import promised_s, wait_until
from tidegate.embedded.servers import ProcessIdentity, command_of, identify

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
ENDLESS = "tests/data/runs/endless.py"
PYTEST = (sys.executable, "-m", "pytest", "-q", ENDLESS)


def test_clusters_that_lie_elsewhere_go_with_the_folder_of_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root a run left 10 GB in /var/lib/tidegate."""
    monkeypatch.setattr(watcher, "CLUSTERS", tmp_path / "clusters")
    run, other = tmp_path / "tests-1", tmp_path / "tests-10"
    for name, owner in (("data-a", run / "t" / "own0"), ("data-b", other / "t"), ("data-c", run)):
        cluster = tmp_path / "clusters" / name / "cluster"
        cluster.mkdir(parents=True)
        (cluster.parent / "belongs-to").write_text(str(owner), encoding="utf-8")
    watcher.remove_clusters(run)
    assert [one.name for one in (tmp_path / "clusters").iterdir()] == ["data-b"]


@dataclass(slots=True)
class Run:
    """A run of pytest, in a session of its own, and its temporary folder."""

    process: subprocess.Popen[bytes]
    log: Path
    folder: Path = Path()
    processes: list[ProcessIdentity] = field(default_factory=list)

    @property
    def tree(self) -> list[int]:
        return [self.process.pid, *watcher.descendants(self.process.pid)]

    def deepest(self, words: str) -> int:
        """The deepest process of the run whose command line holds these words."""
        return [pid for pid in self.tree if words in command_of(pid)][-1]

    def adopts(self, orphan: int) -> int:
        """The watcher that a process was given to when it lost its parent."""
        return [pid for pid in self.tree if orphan in watcher.descendants(pid)][-1]

    def left(self) -> list[str]:
        return [command_of(process.pid) for process in self.processes if process.alive]


Runs = Callable[..., Awaitable[Run]]


def environment() -> dict[str, str]:
    """The variables of this process without those of the run that it belongs to."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def process_of(
    command: Sequence[str], env: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    with log.open("wb") as said:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=said, stderr=said, start_new_session=True
        )


@pytest.fixture
async def begin(tmp_path: Path) -> AsyncIterator[Runs]:
    """Start a run, and wait until its servers are there."""
    begun: list[Run] = []
    at, log = tmp_path / "at", tmp_path / "said"

    async def started(*command: str, services: str = "valkey") -> Run:
        env = environment() | {"RUN_IS_AT": str(at), "RUN_STARTS": services}
        run = Run(process_of(command, env, log), log)
        begun.append(run)
        await wait_until(lambda: at.exists() and at.read_text(), 60, f"a run; see {log}")
        run.folder = Path(at.read_text())
        run.processes = [found for pid in run.tree if (found := identify(pid))]
        programs = " ".join(run.left())
        for program in ("embedded.keeper", "valkey-server", "signal.pause", *services.split()):
            assert program in programs
        return run

    yield started
    for run in begun:
        for pid in run.tree if run.process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        run.process.wait(20)


async def nothing_is_left(run: Run) -> None:
    try:
        await wait_until(lambda: not run.left(), promised_s(watcher.END_WITHIN_S), "the end of all")
    except AssertionError as error:
        raise AssertionError(f"{error}: {run.left()}\n{run.log.read_text()}") from None
    assert not run.folder.exists(), run.log.read_text()


async def test_kill_9_of_pytest(begin: Runs) -> None:
    run = await begin(*PYTEST, "-n0", services="valkey postgres")
    run.process.kill()
    await nothing_is_left(run)


async def test_kill_9_of_the_watcher(begin: Runs) -> None:
    run = await begin(*PYTEST, "-n0")
    os.kill(run.deepest("watcher.py"), signal.SIGKILL)
    await nothing_is_left(run)
    assert run.process.wait(10) == watcher.KILLED


@pytest.mark.parametrize(("count", "words"), [(1, "exec(eval("), (2, "preloaded.py")])
async def test_kill_9_of_a_process_beside_others(begin: Runs, count: int, words: str) -> None:
    """The run goes on without it, and reports that its test failed."""
    run = await begin(*PYTEST, f"-n{count}")
    below = watcher.descendants(run.adopts(run.deepest("signal.pause")))
    os.kill(next(pid for pid in below if words in command_of(pid)), signal.SIGKILL)
    await wait_until(lambda: not run.left(), promised_s(watcher.END_WITHIN_S), "the end of all")
    assert run.process.wait(10) == watcher.TESTS_FAILED


@pytest.mark.parametrize(
    ("how", "status"),
    [(signal.SIGINT, pytest.ExitCode.INTERRUPTED), (signal.SIGKILL, -signal.SIGKILL)],
)
async def test_a_signal_to_all_of_a_group(begin: Runs, how: signal.Signals, status: int) -> None:
    """The tests hear Ctrl-C once, whoever passes it on to them."""
    run = await begin(*PYTEST, "-n1")
    os.killpg(run.process.pid, how)
    await nothing_is_left(run)
    assert run.process.wait(10) == status


@pytest.mark.parametrize(
    ("how", "status"),
    [(signal.SIGINT, pytest.ExitCode.INTERRUPTED), (signal.SIGTERM, watcher.KILLED)],
)
async def test_a_signal_to_pytest_alone(begin: Runs, how: signal.Signals, status: int) -> None:
    run = await begin(*PYTEST, "-n0")
    run.process.send_signal(how)
    await nothing_is_left(run)
    assert run.process.wait(10) == status


async def test_kill_9_of_make(begin: Runs, tmp_path: Path) -> None:
    """It runs a shell, that the suite, and that pytest."""
    (tmp_path / "Makefile").write_text("all:\n\t@$(TESTS); true\n")
    suite = f"{sys.executable} scripts/suite.py --reruns {tmp_path}/reruns -n1 {ENDLESS}"
    run = await begin("make", "-f", str(tmp_path / "Makefile"), f"TESTS={suite}")
    run.process.kill()
    await nothing_is_left(run)


# A child that ends while an orphan is being ended, which takes its time: it hears no SIGTERM.
STUBBORN = """
import os, signal
from tests import watcher

watcher.adopt_orphans()
read, write = os.pipe()
if not (child := os.fork()):
    os.close(write)
    os.read(read, 1)
    os._exit(3)
ready, go = os.pipe()
if not (parent := os.fork()):
    if not os.fork():
        signal.signal(signal.SIGTERM, lambda *_: os.write(write, b"."))
        os.write(go, b".")
        while True:
            signal.pause()
    os.read(ready, 1)  # a signal before would end it without a word
    os._exit(0)
os.waitpid(parent, 0)
print(watcher.watch(child, [os.pidfd_open(os.getppid())], ends_orphans=True))
"""


def test_a_run_that_ends_while_its_orphans_are_ended_is_over() -> None:
    command = [sys.executable, "-c", STUBBORN]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=30, check=True)
    assert ended.stdout.split() == [b"3"]


def test_what_a_run_in_the_background_starts_hears_sigint() -> None:
    """A shell starts its background programs deaf to it, and they would start theirs so."""
    deaf = 'trap "" INT QUIT HUP; exec "$@"'
    command = ["sh", "-c", deaf, "sh", *PYTEST[:-1], "tests/data/runs/deaf.py"]
    done = subprocess.run(
        [*command, "-n0"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
