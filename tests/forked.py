"""Processes of ours, forked from one that has imported all of it: a test that needs one pays for a
fork, and not for two seconds of imports.

They are processes like any other, with their own pid, environment, folder and signals. Started for
real, by `python -m tidegate`, are those of `tests/integration/{processes,packaging}`, and all where
the system knows no messages with descriptors (anything but Linux).

Invariant: none outlives the process that asked for it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import platform
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

from tests.preloaded import FORKS_AT

ROOT = Path(__file__).parent.parent
_IMPORTED = (
    *("tidegate.cli", "tidegate.app", "tidegate.supervisor.api", "tidegate.http.server"),
    *("tidegate.http.uvicorn_protocol", "tidegate.dashboard.routes"),
    *("tidegate.jobs.worker", "tidegate.jobs.webhooks"),
    *("tidegate.upstream.gemini", "tidegate.upstream.gemini_transport"),
    *("tidegate.emulator.server", "google.genai", "google.auth.aio.credentials"),
    *("uvicorn", "uvloop"),
    *("uvicorn.lifespan.off", "encodings.idna"),
    *("httpcore2", "truststore", "obstore.store"),  # else imported by the first call or start
)
_LARGEST_ORDER = 1 << 18
_START_S = 60.0
_FORKS = platform.system() == "Linux"


def started(
    arguments: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdout: IO[bytes],
    stderr: IO[bytes],
    stdin: IO[bytes] | None = None,
    held_back: Collection[int] = (),
) -> Forked | subprocess.Popen[bytes]:
    """A process that runs a module with arguments, as `python -m` would; without `stdin` it has
    nothing to read. Signals of `held_back` wait until it lets them through."""
    if _FORKS:
        streams = (stdout, stderr, stdin)
        return Forked(arguments, cwd, env, *streams, held_back=held_back)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=cwd,
            env=dict(env),
            stdin=stdin or subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Forked:
    """What it offers is of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        stdout: IO[bytes],
        stderr: IO[bytes],
        stdin: IO[bytes] | None = None,
        *,
        held_back: Collection[int] = (),
    ) -> None:
        self._nursery = _nursery()
        self.returncode: int | None = None
        order: dict[str, Any] = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}
        order["held_back"] = [int(one) for one in held_back]
        with open(os.devnull, "rb") as nothing:
            self.pid = self._nursery.bear(order, [stdin or nothing, stdout, stderr])

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.ended(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises TimeoutExpired."""
        end_s = time.monotonic() + (1e6 if timeout is None else timeout)
        while self.poll() is None:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            self.returncode = self._nursery.ended(self.pid, min(left_s, 0.5))
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, how: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended a moment ago
                os.kill(self.pid, how)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Nursery:
    """The process that has imported everything, seen from the one that asks it for others."""

    def __init__(self) -> None:
        self._socket = _asked(os.environ.get(FORKS_AT, "")) or _started_alone()
        self._lock = threading.Lock()
        self._ended: dict[int, int] = {}
        atexit.register(self._socket.close)

    def bear(self, order: Mapping[str, Any], streams: Sequence[IO[bytes]]) -> int:
        with self._lock:
            message = [json.dumps(order).encode()]
            socket.send_fds(self._socket, message, [stream.fileno() for stream in streams])
            while True:
                news = self._read(_START_S)
                if news is None:
                    raise TimeoutError("no process was forked in time")
                if "born" in news:
                    return int(news["born"])

    def ended(self, pid: int, within_s: float) -> int | None:
        """Its exit status, as soon as it has ended, within a time."""
        with self._lock:
            while pid not in self._ended and self._read(within_s):
                pass  # of another
            return self._ended.pop(pid, None)

    def _read(self, within_s: float) -> dict[str, Any] | None:
        if not select.select([self._socket], [], [], within_s)[0]:
            return None
        data = self._socket.recv(_LARGEST_ORDER)
        if not data:
            raise RuntimeError("the process from which others are forked has ended")
        news: dict[str, Any] = json.loads(data)
        if "ended" in news:
            self._ended[news["ended"]] = news["status"]
        return news


@cache
def _nursery() -> _Nursery:
    return _Nursery()


def _asked(place: str) -> socket.socket | None:
    """The socket to a nursery of this process's own, forked from that of the whole run."""
    if not place:
        return None
    asked = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        asked.connect(place)
    except (FileNotFoundError, ConnectionError):
        asked.close()
        return None
    return asked


def _started_alone() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    _started_by_us.append(process)
    return ours


_started_by_us: list[subprocess.Popen[bytes]] = []


def serve_all(place: Path) -> None:
    """Fork a nursery for each process that asks for one, until standard input ends. It imports
    nothing before the first asks."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(place))
        listening.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a nursery ended
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            _import_all()
            control, _ = listening.accept()
            if not os.fork():
                listening.close()
                _serve(control)
                os._exit(0)
            control.close()


@cache
def _import_all() -> None:
    sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "src")) if path not in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    gc.disable()  # while it imports
    for name in _IMPORTED:
        import_module(name)
    use_once()
    gc.collect()
    gc.freeze()
    gc.enable()


def use_once() -> None:
    """Make what each process else makes at its first use, in 0.4 s of a core for an API: the
    operators' routes, the words of the classifier, and the models of Google's SDK."""
    import anyio
    from google.genai import types

    from tidegate.app import create_app
    from tidegate.classify.vocabulary import vocabulary
    from tidegate.settings import Config
    from tidegate.upstream.gemini_transport import Settings

    assert create_app(Config).routes
    vocabulary()
    answer = (types.GenerateContentResponse, types.Candidate, types.Content, types.Part)
    for model in (*answer, types.HttpOptions, types.HttpResponse, Settings):
        model.model_rebuild()
    anyio.run(anyio.sleep, 0)  # imports its backend


def _serve(control: socket.socket) -> None:
    alive: set[int] = set()
    heard, wake = socket.socketpair()
    heard.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    while True:
        ready = select.select([control, heard], [], [])[0]
        if heard in ready:
            heard.recv(4096)
            for pid, status in _reaped():
                alive.discard(pid)
                control.send(json.dumps({"ended": pid, "status": status}).encode())
        if control in ready:
            data, streams, _, _ = socket.recv_fds(control, _LARGEST_ORDER, 3)
            if not data:
                break
            order = json.loads(data)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, order["held_back"])
            pid = os.fork()
            if not pid:
                for mine in (control, heard, wake):
                    mine.close()
                _become(order, streams)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for stream in streams:
                os.close(stream)
            alive.add(pid)
            control.send(json.dumps({"born": pid}).encode())
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def _reaped() -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if not pid:
            return found
        found.append((pid, os.waitstatus_to_exitcode(status)))


def _become(order: Mapping[str, Any], streams: Sequence[int]) -> NoReturn:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    module, *sys.argv[1:] = order["arguments"]
    code = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
        else:
            code = ended.code or 0
    finally:
        leave(code)


def leave(code: int) -> NoReturn:
    """End this process as Python ends, without taking down what the kernel takes down anyway."""
    failed, failure, where = sys.exc_info()
    if failed is not None and failure is not None:
        sys.excepthook(failed, failure, where)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _import_all()
    _serve(socket.socket(fileno=int(sys.argv[1])))
