"""Every run of pytest has a watcher (`tests/watcher.py`), however it was started.

The process that was started as pytest waits for the watcher, the watcher for a copy of that process
which runs the tests. Each process of pytest-xdist has a watcher of its own, so that what a process
that crashed had started ends while the run goes on. Linux alone knows how to adopt a process:
elsewhere a run has no watcher.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import execnet
import pytest

from tests import preloaded, watcher

ROOT = Path(__file__).parents[1]
_IN_MEMORY = Path("/dev/shm")
_MEMORY_BYTES = 4 << 30
_OWNERS = {"make", "gmake", "watcher"}
_SUITE = b"scripts/suite.py"
_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Go on below a watcher, with a temporary folder that goes when the run has ended."""
    _let_children_hear_signals()
    _keep_compiled_tests()
    if sys.platform != "linux" or hasattr(config, "workerinput"):
        return
    _remove_old_folders()
    folder = Path(tempfile.mkdtemp(prefix="tests-", dir=_IN_MEMORY if _has_memory() else None))
    folder.chmod(0o755)
    (folder / "run").write_text(f"{os.getpid()} {ROOT}")
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        _go_on_below_a_watcher(folder, ends_orphans=bool(config.getoption("tx", [])))
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    if config.option.basetemp is None:
        config.option.basetemp = folder / "t"


def pytest_xdist_setupnodes(config: pytest.Config, specs: list[execnet.XSpec]) -> None:
    """Start each process beside others below a watcher."""
    if sys.platform != "linux":
        return
    local = [spec for spec in specs if spec.popen and not spec.python]
    folder = Path(os.environ["TMPDIR"])
    if len(local) > 1 and preloaded.can_preload(folder):
        command = preloaded.preload(folder, config.args)
    else:
        command = [sys.executable, "-S", watcher.__file__, sys.executable]
    for spec in local:  # as they are: xdist has named and counted these very ones
        spec.python = shlex.join(command)


def _has_memory() -> bool:
    """Whether there is plenty of memory for all files of a run: the servers make and remove dozens
    for each test, which costs a file system on a disk a third of PostgreSQL's time."""
    if "TMPDIR" in os.environ or not os.access(_IN_MEMORY, os.W_OK | os.X_OK):
        return False
    space = os.statvfs(_IN_MEMORY)
    free_bytes = min(
        space.f_bavail * space.f_frsize, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    return free_bytes >= _MEMORY_BYTES


def _let_children_hear_signals() -> None:
    """A background shell starts programs deaf to these signals, and so would be all that the tests
    start. A signal that is handled here, by doing nothing, is heard by a program started here."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def _keep_compiled_tests() -> None:
    """To compile all tests again takes each of the processes beside others ten seconds."""
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _go_on_below_a_watcher(folder: Path, *, ends_orphans: bool) -> None:
    """Returns in the process that runs the tests."""
    watcher.adopt_orphans()
    owners = [os.pidfd_open(pid) for pid in (os.getpid(), *_started_by())]
    heard, said = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    watching = os.fork()
    if watching:
        os.close(said)
        _wait(watching, int(os.read(heard, 64)), folder)
    tests = os.fork()
    if tests:
        os.write(said, str(tests).encode())
        for owner in owners:
            os.set_inheritable(owner, True)
        options = ["--child", str(tests), "--folder", str(folder)]
        options += ["--ends-orphans"] if ends_orphans else []
        options += ["--owners", *map(str, owners)]
        os.execv(sys.executable, [sys.executable, "-S", watcher.__file__, *options])
    watcher.die_with_parent()
    if not _has_terminal():
        os.setpgid(0, 0)
    for descriptor in (heard, said, *owners):
        os.close(descriptor)


def _wait(watching: int, tests: int, folder: Path) -> None:
    """Until the watcher has ended. Ctrl-C that this process alone hears goes to the tests (a
    terminal signals all of them itself); any other signal ends the run.

    Without a terminal the tests have a process group of their own: they hear Ctrl-C once, also
    where somebody sends it to the whole group of this process. Twice is not the same: the second
    one breaks into what pytest does about the first.
    """
    interrupt = os.kill if _has_terminal() else os.killpg
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_ENDING, signal.SIGCHLD})
    while True:
        came = signal.sigwaitinfo({*_ENDING, signal.SIGCHLD})
        if came.si_signo != signal.SIGCHLD:
            if came.si_signo != signal.SIGINT:
                os.kill(watching, signal.SIGTERM)
            elif came.si_code <= 0:
                interrupt(tests, signal.SIGINT)
            continue
        pid, status = os.waitpid(watching, os.WNOHANG)
        if pid:
            break
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        code = watcher.KILLED
        watcher.finish(code, folder)
    os._exit(code)


def _has_terminal() -> bool:
    """Whether this session has a terminal, which signals a process group at Ctrl-C."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def _started_by() -> list[int]:
    """The processes above this one up to the topmost that runs tests, such as `make`. Whatever is
    above them may end, as a shell that was left does."""
    above: list[int] = []
    found = 0
    for pid in _ancestors():
        above.append(pid)
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if name in _OWNERS or _SUITE in Path(f"/proc/{pid}/cmdline").read_bytes():
            found = len(above)
    return above[:found]


def _ancestors() -> Iterator[int]:
    pid = os.getppid()
    while pid > 1:
        yield pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _remove_old_folders() -> None:
    """Those of runs of this checkout that ended, which stayed for a look at what had failed."""
    places = (_IN_MEMORY, Path(tempfile.gettempdir()))
    for run in chain.from_iterable(place.glob("tests-*/run") for place in places):
        try:
            pid, _, checkout = run.read_text().partition(" ")
        except (FileNotFoundError, PermissionError):
            continue
        if checkout == str(ROOT) and not Path(f"/proc/{pid}").exists():
            watcher.remove_clusters(run.parent)
            shutil.rmtree(run.parent, ignore_errors=True)
