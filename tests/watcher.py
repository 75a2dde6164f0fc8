"""Nothing that a run of the tests starts outlives the run by more than `END_WITHIN_S`.

    python -S tests/watcher.py COMMAND...

The watcher is an ancestor of all that the command starts, and the kernel gives it every process
beneath that lost its parent (`PR_SET_CHILD_SUBREAPER`): a detached keeper and its servers stay in
its tree however they were started, and with whatever environment. When the command ends, or one of
its owners does (the process that started it, `make`), the watcher ends its whole tree.

Invariant: this program imports nothing of ours and lives in a session of its own, so that what ends
a run (Ctrl-C, `kill -9` of a process group or by the name of a program) does not end it too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

END_WITHIN_S = 10.0
# Where PostgreSQL's clusters lie whose folders its user may not enter (`embedded/servers.py`).
CLUSTERS = Path("/var/lib/tidegate")
SHARED = "clusters"  # the folder of those that no test has to itself, in that of a run
KILLED = 128 + signal.SIGKILL
TESTS_FAILED = 1
_LEAVES_ALONE_S = 2.0
_KILLED_AFTER_S = 4.0
_TICK_MS = 50
_LOOKS_MS = 500
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of every process beneath this one that loses its own."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """End this process by SIGKILL when the process that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def call_itself_watcher() -> None:
    """Show this process under that name, as `ps` shows it."""
    _prctl(_PR_SET_NAME, b"watcher")


def descendants(of: int, spared: Collection[int] = ()) -> list[int]:
    """Every process below one, parents before children, but for the trees of `spared`."""
    below: dict[int, list[int]] = {}
    for pid, parent in _processes():
        below.setdefault(parent, []).append(pid)
    found: list[int] = []
    left = [of]
    while left:
        children = [pid for pid in below.get(left.pop(0), ()) if pid not in spared]
        found += children
        left += children
    return found


def end_descendants(leaves_alone_s: float, spared: Collection[int] = ()) -> list[str]:
    """End every process below this one, but for the trees of `spared`; the programs that did not
    end by themselves while they were left alone."""
    began_s = time.monotonic()
    asked: dict[int, str] = {}
    while left := descendants(os.getpid(), spared):
        after_s = time.monotonic() - began_s
        if after_s > END_WITHIN_S:  # it is in the kernel, and ends when the kernel lets it
            break
        if after_s > _KILLED_AFTER_S:
            _signal(left, signal.SIGKILL)
        elif after_s >= leaves_alone_s:
            for pid in set(left) - set(asked):
                asked[pid] = _name(pid)
                # SIGTERM lets PostgreSQL wait for its clients.
                postgres = asked[pid] == "postgres"
                _signal([pid], signal.SIGCONT, signal.SIGQUIT if postgres else signal.SIGTERM)
        select.poll().poll(_TICK_MS)
        _reap()
    return sorted(asked.values())


_ended: dict[int, int] = {}


def watch(child: int, owners: Sequence[int], *, ends_orphans: bool) -> int:
    """Wait for the end of a child, or of one of the `owners` (descriptors of processes); the exit
    status as a shell reports it.

    `ends_orphans`: end what lost its parent while the child goes on.
    """
    heard, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    events = select.poll()
    for descriptor in (heard, *owners):
        events.register(descriptor, select.POLLIN)
    while True:
        _reap()
        status = _ended.get(child)
        if status is not None:
            return status if status >= 0 else 128 - status
        if ends_orphans and set(_children()) - {child}:
            end_descendants(0, spared=[child])
        ready = {descriptor for descriptor, _ in events.poll(_LOOKS_MS)}
        if ready & set(owners) or (ready and signal.SIGTERM in os.read(heard, 4096)):
            return KILLED


def finish(status: int, folder: Path | None) -> None:
    """After the end of a run: end what it left, and remove its temporary folder. The folders of
    tests that failed stay, until the next run of this checkout."""
    left = end_descendants(0 if status == KILLED else _LEAVES_ALONE_S)
    if left and status != KILLED:
        sys.stderr.write(f"\nended {len(left)} processes that were left: {', '.join(left)}\n")
    if folder is not None:  # it may be in memory
        shutil.rmtree(folder / SHARED, ignore_errors=True)
    if folder is not None and status != TESTS_FAILED:
        remove_clusters(folder)
        shutil.rmtree(folder, ignore_errors=True)


def remove_clusters(folder: Path) -> None:
    """Remove the clusters that lie elsewhere and belong to the temporary folder of a run."""
    for belongs in CLUSTERS.glob("data-*/belongs-to"):
        try:
            owner = Path(belongs.read_text(encoding="utf-8").strip())
        except (FileNotFoundError, PermissionError):  # another run removed it in this moment
            continue
        if owner.is_relative_to(folder):
            shutil.rmtree(belongs.parent, ignore_errors=True)


def _prctl(what: int, value: int | bytes) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(what, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _reap() -> None:
    """Keep the exit status of each child that ended, of those that were adopted too: the one that
    is waited for may end while others are being ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _ended[pid] = os.waitstatus_to_exitcode(status)


def _children() -> list[int]:
    """As the kernel lists them: one that it passes over while another ends, it lists the next time.
    Looking through all processes twice a second would take a hundredth of a core."""
    return list(map(int, Path("/proc/thread-self/children").read_text().split()))


def _processes() -> Iterator[tuple[int, int]]:
    """The number of every process and of its parent; a zombie's too, which is no process any more
    for its parent alone."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield int(entry), int(stat.rpartition(b")")[2].split()[1])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "?"


def _signal(pids: Collection[int], *signals: signal.Signals) -> None:
    for pid in pids:
        for how in signals:
            try:
                os.kill(pid, how)
            except (ProcessLookupError, PermissionError):
                break


def _started(command: Sequence[str]) -> int:
    """A child that runs the command with our input and output, which we leave to it."""
    pid = os.fork()
    if not pid:
        die_with_parent()
        os.execvp(command[0], list(command))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return pid


def main() -> int:
    """Watch over a command, or over a child that this process had before it became this program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", type=int)
    parser.add_argument("--owners", type=int, nargs="*", default=[])
    parser.add_argument("--ends-orphans", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    call_itself_watcher()
    adopt_orphans()
    owners = given.owners or [os.pidfd_open(os.getppid())]
    child = given.child or _started(given.command)
    with contextlib.suppress(PermissionError):  # it has a group of its own already
        os.setsid()
    status = watch(child, owners, ends_orphans=given.ends_orphans)
    finish(status, given.folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
