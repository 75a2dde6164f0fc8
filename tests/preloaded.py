"""The processes of pytest-xdist, forked from one that has imported all tests.

    python tests/preloaded.py DESCRIPTOR PATHS...    the process that is forked
    python -S tests/preloaded.py SOCKET OPTIONS...   what pytest-xdist starts for each process

To import the tests, the product and its libraries takes three seconds of a core. What pytest-xdist
starts gives its input and output to a fork instead, and lives as long as that. Each fork is below a
watcher (`tests/watcher.py`), as a process that is not forked is. Beside them live the forks that
the tests start (`tests/forked.py`): from a process of their own, which no test has changed.

Invariant: where there is nothing to fork, or it ended, a process imports all by itself.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

ROOT = Path(__file__).parents[1]
FORKS_AT = "PYTEST_FORKS_AT"  # the variable that says where `tests/forked.py` has one to fork
_BORN = b"born"
_STREAMS = 3
_FOLDER_BYTES = 90
# Named by tests as plugins of pytest, which rewrites the assertions of these as well.
_PLUGINS = ("tests.product",)
# Imported within functions, by tests of several folders: more than a second of a core each time.
_LATE = ("anthropic", "azure.identity.aio")


def can_preload(folder: Path) -> bool:
    """Whether the path of a socket in the folder is short enough."""
    return len(os.fsencode(folder)) <= _FOLDER_BYTES


def preload(folder: Path, paths: Sequence[str]) -> list[str]:
    """Start a process to be forked, which imports the tests of these paths; the command that
    pytest-xdist starts instead of Python. The process ends with this one."""
    place, forks = folder / "preloaded", folder / "forks"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(str(place))
    listening.listen(64)
    os.environ[FORKS_AT] = str(forks)
    with listening:
        _kept.append(
            subprocess.Popen(
                [sys.executable, __file__, str(listening.fileno()), *paths],
                stdin=subprocess.PIPE,
                pass_fds=[listening.fileno()],
            )
        )
    return [sys.executable, "-S", __file__, str(place)]


_kept: list[subprocess.Popen[bytes]] = []


def _launch(place: str, options: Sequence[str]) -> NoReturn:
    """Give this process's streams to a fork, and end as it ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ours:
        try:
            ours.connect(place)
            socket.send_fds(ours, [b"."], [0, 1, 2])
            born = ours.recv(16) == _BORN
        except ConnectionError:
            born = False
        if born:
            for stream in (0, 1):
                os.close(stream)
            os._exit(int(ours.recv(16) or b"1"))
    watcher = str(ROOT / "tests/watcher.py")
    os.execv(sys.executable, [sys.executable, "-S", watcher, sys.executable, *options])


def _serve(listening: socket.socket, paths: Sequence[str]) -> None:
    """Fork for each that asks, until the process that started this one has ended."""
    _start_forks(listening)
    _import_tests(paths)
    heard, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listening.setblocking(False)
    while True:
        ready = select.select([listening, sys.stdin, heard], [], [])[0]
        if sys.stdin in ready:
            return
        if heard in ready:
            os.read(heard, 4096)
            _reap()
        if listening in ready:
            asking, _ = listening.accept()
            asking.setblocking(True)
            _, streams, _, _ = socket.recv_fds(asking, 16, _STREAMS)
            if len(streams) == _STREAMS and not os.fork():
                listening.close()
                os.close(heard)
                os.close(wakes)
                _become_watcher(asking, streams)
            asking.close()
            for stream in streams:
                os.close(stream)


def _start_forks(listening: socket.socket) -> None:
    """A process of its own, before this one imports anything, as few tests need it."""
    if os.fork():
        return
    listening.close()
    from tests.forked import serve_all

    serve_all(Path(os.environ[FORKS_AT]))
    os._exit(0)


def _import_tests(paths: Sequence[str]) -> None:
    """Import them as pytest will, which finds them imported then. One that fails fails again, and
    is reported, where it is collected."""
    import gc

    from _pytest.config import _prepareconfig
    from _pytest.pathlib import ImportMode, import_path

    gc.disable()
    # As in each fork: what modules promise is wider beside other tests (`promised_s`).
    os.environ["PYTEST_XDIST_WORKER"] = "gw0"
    config = _prepareconfig(["-n0", *paths])  # from here on their assertions are rewritten
    config.pluginmanager.rewrite_hook.mark_rewrite(*_PLUGINS)
    for path in paths:
        named = Path(path.partition("::")[0]).resolve()  # pytest names modules by where they are
        for module in sorted(named.rglob("test_*.py")) if named.is_dir() else [named]:
            known = set(sys.modules)
            try:
                import_path(
                    module, mode=ImportMode.importlib, root=ROOT, consider_namespace_packages=False
                )
            except BaseException:  # noqa: BLE001  also what pytest raises to skip a module
                for name in set(sys.modules) - known:
                    del sys.modules[name]
    config._ensure_unconfigure()
    if str(ROOT / "tests") in {str(Path(path).resolve()) for path in paths}:
        for late in _LATE:
            with suppress(ImportError):
                import_module(late)
        from tests.forked import use_once

        use_once()
    _look_for_constants()
    gc.collect()
    gc.freeze()
    gc.enable()


def _look_for_constants() -> None:
    """Have Hypothesis look for the constants of all files of ours, which it draws now and then, and
    else looks for in each process."""
    from hypothesis import given, settings, strategies

    @settings(max_examples=100, database=None, derandomize=True, deadline=None)
    @given(strategies.lists(strategies.integers(), min_size=5))
    def draw(_: list[int]) -> None:
        """Until a constant is drawn."""

    draw()


def _become_watcher(asking: socket.socket, streams: Sequence[int]) -> NoReturn:
    from tests import watcher

    status = watcher.KILLED
    try:
        signal.set_wakeup_fd(-1)
        peer = struct.unpack("iII", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        owners = [os.pidfd_open(pid) for pid in (os.getppid(), peer[0])]
        watcher.call_itself_watcher()
        watcher.adopt_orphans()
        child = os.fork()
        if not child:
            watcher.die_with_parent()
            asking.close()
            for owner in owners:
                os.close(owner)
            _become_process(streams)
        for stream in streams:
            os.close(stream)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(nothing, stream)
        os.setsid()
        asking.send(_BORN)
        status = watcher.watch(child, owners, ends_orphans=False)
        watcher.finish(status, None)
        asking.send(str(status).encode())
    finally:
        os._exit(status)


def _become_process(streams: Sequence[int]) -> NoReturn:
    """What `python -u -c` with the line of execnet's would be."""
    from tests.forked import leave

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    code = 1
    try:
        exec(eval(sys.stdin.readline()), vars(main))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        leave(code)


def _reap() -> None:
    while True:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                return
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    if sys.argv[1].isdigit():
        _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
    else:
        _launch(sys.argv[1], sys.argv[2:])
