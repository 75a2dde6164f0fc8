"""Supervisor of several processes: started, restarted, replaced, stopped.

A child reports its readiness to the supervisor (by a pipe) and to systemd (`Type=notify`).
`tidegate up` prepares everything, then becomes `supervise` by an exec, so that the 40 MB of its
imports do not stay in a process that only waits. Therefore this module imports little.

Invariants: when `run` returns no child is left; a child that outlives a killed supervisor notices
it by the end of its lifeline; during a replacement never fewer processes run than before.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, NoReturn

from tidegate.embedded.lease import Folder, ServersLease
from tidegate.embedded.servers import ServerFailed
from tidegate.errors import ConfigError
from tidegate.telemetry import logging as telemetry
from tidegate.telemetry.logging import NAMED, SHARED, Log, get_logger

if TYPE_CHECKING:
    from tidegate.settings import Config

LIFELINE = "TIDEGATE_LIFELINE_FD"
_READY_WITHIN_S = 60.0

Process = asyncio.subprocess.Process


READY_PIPE = "TIDEGATE_READY_FD"
_SYSTEMD = "NOTIFY_SOCKET"
_WATCHDOG, _WATCHED = "WATCHDOG_USEC", "WATCHDOG_PID"


def report_ready() -> None:
    """Report, once, that this process accepts requests or jobs."""
    pipe = os.environ.pop(READY_PIPE, "")
    if pipe:
        _write_and_close(int(pipe))
    _notify_systemd("READY=1")


def report_stopping() -> None:
    """Report that this process is stopping, so that its end is not taken for a crash."""
    _notify_systemd("STOPPING=1")


@contextmanager
def living() -> Iterator[None]:
    """Notify systemd's watchdog from the event loop during the block, if the unit has one
    (`WatchdogSec`) for this process."""
    every_s = _watchdog_s() / 2
    if not every_s:
        yield
        return
    notifying = asyncio.create_task(_notify_watchdog(every_s), name="watchdog")
    try:
        yield
    finally:
        notifying.cancel()


async def _notify_watchdog(every_s: float) -> None:
    while True:
        _notify_systemd("WATCHDOG=1")
        await asyncio.sleep(every_s)


def _watchdog_s() -> float:
    """Return the watchdog's timeout; 0 without a watchdog, or if it watches only the parent."""
    span_us = os.environ.get(_WATCHDOG, "")
    if not span_us.isdecimal() or os.environ.get(_WATCHED) != str(os.getpid()):
        return 0.0
    return int(span_us) / 1_000_000


def _write_and_close(pipe: int) -> None:
    try:
        os.write(pipe, b"1")
    except BrokenPipeError:
        return  # the supervisor has ended, which the lifeline reports
    finally:
        os.close(pipe)


def _notify_systemd(state: str) -> None:
    address = os.environ.get(_SYSTEMD, "")
    if not address.startswith(("/", "@")) or not hasattr(socket, "AF_UNIX"):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        try:
            sender.sendto(state.encode(), address)
        except OSError:
            return  # no listener (any more), which is not an error of this process


STATE_SIGNAL = signal.SIGQUIT  # to any process: log your state; passed on to all children
LEAVE_SIGNAL = signal.SIGUSR1  # to a child: it was replaced, and leaves in order
RENEW_SIGNAL = signal.SIGUSR2  # to the supervisor: replace all children, one by one
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_BLOCKED = (*_SIGNALS, STATE_SIGNAL)
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SETTLED_S = 10.0
_MARGIN_S = 5.0
_TOO_OFTEN = 5
_INVALID_CONFIG = 2


@dataclass(frozen=True, slots=True)
class Child:
    """A process; `argv` contains no secret, since every user of the machine can read it."""

    name: str
    argv: tuple[str, ...]


class Family:
    """The children of a supervisor."""

    def __init__(
        self,
        children: Sequence[Child],
        *,
        environment: Mapping[str, str],
        pass_fds: Sequence[int] = (),
        grace_s: float = 20.0,
        on_stopping: Callable[[], None] = lambda: None,
        on_ended: Callable[[str], None] = lambda _name: None,
        reread: Callable[[], Mapping[str, str] | Awaitable[Mapping[str, str]]] | None = None,
    ) -> None:
        """`grace_s`: for children whose environment has no SHUTDOWN_GRACE_MS. `reread` returns the
        environment of replacing children; if it raises ConfigError, nothing is replaced. `on_ended`
        is called with the name of each ended process: the child's, with a number appended if an
        older one was still running."""
        self._children = children
        self._environment = environment
        self._pass_fds = pass_fds
        self._grace_s = grace_s
        self._on_stopping = on_stopping
        self._reread = reread
        self._on_ended = on_ended
        self._names: set[str] = set()  # of the processes that exist
        self._spans_s: dict[Process, tuple[float, float]] = {}  # time to leave, and to finish
        self._waiting: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._renew_again = False
        self._lifeline = -1
        self._running: dict[str, Process] = {}
        self._stop = asyncio.Event()
        self._hasten = asyncio.Event()
        self._settled = False
        self.failure: str | None = None

    @property
    def pids(self) -> dict[str, int]:
        """Return the pids of the running processes, by their children's names."""
        return {name: process.pid for name, process in self._running.items()}

    @property
    def environment(self) -> Mapping[str, str]:
        """Return the environment of the next process: that of the last renewal, if there was
        one."""
        return self._environment

    def settled(self) -> None:
        """Mark the start as successful: from now on a child that dies is always restarted."""
        self._settled = True

    def stop(self) -> None:
        """Begin to stop; a second call ends the wait for the children."""
        if self._stop.is_set():
            self._hasten.set()
            return
        self._stop.set()
        if self._renewing is not None:
            self._renewing.cancel()  # otherwise its new processes would be left running
        self._on_stopping()

    @property
    def renewing(self) -> bool:
        return self._renewing is not None and not self._renewing.done()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    async def run(self) -> None:
        """Run the children until `stop`, a signal, or a child that cannot start.

        `failure` is then the reason, or None. Cancellation stops the children in order.
        """
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(RENEW_SIGNAL, self.renew)
        loop.add_signal_handler(STATE_SIGNAL, self._pass_state_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)  # blocked before the exec, if any
        self._lifeline, holds = os.pipe()
        try:
            async with asyncio.TaskGroup() as tasks:
                for child in self._children:
                    tasks.create_task(self._keep(child))
        finally:
            if self._renewing is not None:
                if not self.stopping:
                    self._renewing.cancel()
                await asyncio.gather(self._renewing, return_exceptions=True)
            os.close(self._lifeline)
            os.close(holds)
            for number in (*_SIGNALS, RENEW_SIGNAL, STATE_SIGNAL):
                loop.remove_signal_handler(number)

    def renew(self) -> None:
        """Replace every child by a new process, with the current code and settings.

        One child at a time: the new process replaces the old one when it is ready, and only then
        the old one leaves. The renewal stops at the first process that does not become ready. A
        request during a renewal starts another one after it.
        """
        if self.renewing:
            self._renew_again = True
        elif not self.stopping:
            self._renewing = asyncio.create_task(self._renew_all())

    async def _renew_all(self) -> None:
        self._renew_again = True
        while self._renew_again and not self.stopping:
            self._renew_again = False
            before = self._environment
            try:
                self._environment = await self._read_again()
            except ConfigError as invalid:
                get_logger().error(Log.RENEWAL_STOPPED, reason=str(invalid))
                return
            get_logger().info(Log.RENEWING, children=[child.name for child in self._children])
            for child in self._children:
                if not await self._renew(child):
                    self._environment = before
                    return
            get_logger().info(Log.RENEWED)

    async def _read_again(self) -> Mapping[str, str]:
        if self._reread is None:
            return self._environment
        found = self._reread()
        return await found if isinstance(found, Awaitable) else found

    async def _renew(self, child: Child) -> bool:
        """Replace a child's process, and return whether that succeeded."""
        process, pipe = await self._born(child)
        try:
            why = await _not_ready(process, pipe)
            if why is not None:
                await self._end(process)
        except BaseException:  # for cancellation too: the new process must not outlive its renewal
            await self._end(process)
            raise
        finally:
            os.close(pipe)
        if why is not None:
            get_logger().error(Log.RENEWAL_STOPPED, child=child.name, reason=why)
            return False
        old = self._running.get(child.name)
        self._running[child.name] = process
        if old is not None and old.returncode is None:
            old.send_signal(LEAVE_SIGNAL)
            await self._end(old, is_leaving=True)
        return True

    async def _keep(self, child: Child) -> None:
        deaths = 0
        while not self.stopping:
            born = time.monotonic()
            process = self._running.get(child.name)  # possibly the replacement of one that died
            if process is None:
                process = self._running[child.name] = await self._spawn(child, {}, ())
            try:
                code = await self._ended_or_stop(process)
            finally:
                latest = self._running.get(child.name, process)
                if latest is process or self.stopping:
                    self._running.pop(child.name, None)
                    await asyncio.gather(*(self._end(one) for one in {process, latest}))
            if code is None:
                return
            if latest is not process:
                continue
            deaths = 1 if time.monotonic() - born > _SETTLED_S else deaths + 1
            get_logger().error(
                Log.CHILD_DIED, child=child.name, pid=process.pid, exit_code=code, deaths=deaths
            )
            if not self._settled and (code == _INVALID_CONFIG or deaths >= _TOO_OFTEN):
                self.failure = f"the {child.name} process ended with exit code {code} at its start"
                self.stop()
                return
            await self._pause(_BACKOFF_S[min(deaths, len(_BACKOFF_S)) - 1])

    async def _born(self, child: Child) -> tuple[Process, int]:
        """Start a process that is not the child's yet. Return it with the pipe that reports its
        readiness."""
        read_end, write_end = os.pipe()
        try:
            process = await self._spawn(child, {READY_PIPE: str(write_end)}, (write_end,))
        except BaseException:  # for cancellation too: the pipe has no other reader
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        return process, read_end

    async def _spawn(
        self, child: Child, environment: Mapping[str, str], pass_fds: Sequence[int]
    ) -> Process:
        name, settings = self._free_name(child), self._environment
        process = await asyncio.create_subprocess_exec(
            *child.argv,
            stdin=asyncio.subprocess.DEVNULL,
            env={
                **settings,
                LIFELINE: str(self._lifeline),
                NAMED: name,
                **environment,
            },
            pass_fds=[*self._pass_fds, self._lifeline, *pass_fds],
            # In a session of its own: a terminal's Ctrl-C is for the supervisor only, which stops
            # the children.
            start_new_session=True,
        )
        get_logger().debug(Log.CHILD_STARTED, child=child.name, pid=process.pid)
        self._names.add(name)
        grace_s = int(settings.get("SHUTDOWN_GRACE_MS") or self._grace_s * 1000) / 1000
        self._spans_s[process] = int(settings.get("LEAVE_MS") or 0) / 1000, grace_s
        task = asyncio.create_task(self._until_ended(process, name))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return process

    def _free_name(self, child: Child) -> str:
        """Return a name that no existing process has: counters are kept by name."""
        tries = (f"{child.name}.{number}" for number in count(2))
        return next(name for name in chain((child.name,), tries) if name not in self._names)

    async def _until_ended(self, process: Process, name: str) -> None:
        await process.wait()
        self._names.discard(name)
        del self._spans_s[process]
        self._on_ended(name)

    def _pass_state_signal(self) -> None:
        for process in self._running.values():
            if process.returncode is None:
                process.send_signal(STATE_SIGNAL)

    async def _ended_or_stop(self, process: Process) -> int | None:
        """Return the exit code of a process that ended by itself; None if it is to be stopped."""
        ended = asyncio.create_task(process.wait())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
            return None if self.stopping else process.returncode
        finally:
            ended.cancel()
            stop.cancel()

    async def _end(self, process: Process, *, is_leaving: bool = False) -> None:
        """Stop a process in order, or by force after its grace period; `is_leaving`: it is leaving
        already."""
        if process.returncode is not None:
            return
        leave_s, grace_s = self._spans_s[process]
        if not is_leaving:
            process.terminate()
        ended = asyncio.create_task(process.wait())
        hasten = asyncio.create_task(self._hasten.wait())
        await asyncio.wait(
            {ended, hasten},
            timeout=(leave_s if is_leaving else 0.0) + grace_s + _MARGIN_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        hasten.cancel()
        if not ended.done():
            process.kill()
        await ended

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return


async def _not_ready(process: Process, pipe: int) -> str | None:
    """Wait until a process reports by its pipe that it is ready, and return None. Return the reason
    if it ends or takes too long."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(pipe, readable.set)
    try:
        async with asyncio.timeout(_READY_WITHIN_S):
            await readable.wait()
    except TimeoutError:
        return f"not ready within {_READY_WITHIN_S:g} s"
    finally:
        loop.remove_reader(pipe)
    if os.read(pipe, 1):
        return None
    return f"ended with exit code {await process.wait()} at its start"


_SUPERVISION = "TIDEGATE_SUPERVISION_FD"


@dataclass(frozen=True, slots=True)
class Supervision:
    """The parameters of a supervisor, as JSON in a descriptor that is passed through an exec.

    environment: of the children, with secrets. lease: of the bundled servers, its descriptor and
    its `idle_s`. announcer: the process that shows the page, and the pipe by which it reports that
    all is ready. base: values that a reread of the settings must not change, or that it fills in.
    stopping, stopped: lines for the page.
    """

    children: list[tuple[str, list[str]]]
    environment: dict[str, str]
    listener: int
    data_dir: str
    lease: tuple[int, float] | None
    counts: str
    announcer: tuple[int, int]
    base: dict[str, Any]
    log_format: Any
    log_level: Any
    stopping: str
    stopped: str

    def begin(self) -> NoReturn:
        """Become the supervisor: the same process with its descriptors and its command line,
        without its imports. Raises OSError if that fails."""
        inherited = [self.listener, self.announcer[1], *([self.lease[0]] if self.lease else [])]
        # A file without a name: an environment or an argument would expose the secrets.
        with _nameless() as written:
            written.write(json.dumps(asdict(self)).encode())
            written.flush()
            written.seek(0)
            for one in (*inherited, written.fileno()):
                os.set_inheritable(one, True)
            environment = {**os.environ, _SUPERVISION: str(written.fileno())}
            arguments = [sys.executable, "-P", "-m", "tidegate", *sys.argv[1:]]
            signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)  # until there are handlers again
            try:
                os.execve(sys.executable, arguments, environment)
            finally:  # reached only on failure
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)


def _nameless() -> IO[bytes]:
    in_memory = getattr(os, "memfd_create", None)  # on Linux
    return os.fdopen(in_memory("supervision"), "w+b") if in_memory else TemporaryFile()


def supervise() -> int:
    """Supervise the processes of a `Supervision` until a signal, and return the exit code."""
    with os.fdopen(int(os.environ.pop(_SUPERVISION)), "rb") as written:
        order = Supervision(**json.load(written))
    telemetry.configure_logging(
        order.log_format, order.log_level, process="supervisor", has_page=True
    )
    lease = None
    if order.lease is not None:
        descriptor, idle_s = order.lease
        lease = ServersLease(Folder(Path(order.data_dir)), descriptor, {}, idle_s)
    failure = ""
    try:
        failure = asyncio.run(_supervise(order))
    finally:
        shutil.rmtree(order.counts, ignore_errors=True)
        try:
            if lease is not None:
                with _busy("stopping the bundled servers"):
                    lease.close()
        except ServerFailed as failed:
            failure = failure or str(failed)
    if failure:
        sys.stderr.write(f"tidegate: {failure}\n")
        return 1
    _show(order.stopped)
    return 0


async def _supervise(order: Supervision) -> str:
    """Return why supervision failed; empty on success."""
    pid, read_end = order.announcer
    loop = asyncio.get_running_loop()

    is_announcing = True

    def stopping() -> None:
        report_stopping()
        if is_announcing:
            os.kill(pid, signal.SIGINT)
        _show(order.stopping)

    family = Family(
        [Child(name, tuple(argv)) for name, argv in order.children],
        environment=order.environment,
        pass_fds=[order.listener, *([order.lease[0]] if order.lease else [])],
        on_stopping=stopping,
        on_ended=lambda name: _forget(name, order.counts),
        reread=lambda: _reread(order),
    )

    def on_announced() -> None:
        if os.read(read_end, 1):
            family.settled()
            report_ready()
            return
        nonlocal is_announcing
        is_announcing = False
        loop.remove_reader(read_end)
        os.waitpid(pid, 0)  # it has ended

    loop.add_reader(read_end, on_announced)
    daily = daily_work(family, on_failed=lambda: _count_failure(order.counts))
    working = asyncio.create_task(daily.run(), name="daily work")
    try:
        await family.run()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    if family.failure is None:
        return ""
    return f"{family.failure}; its log above says why"


def _count_failure(counts: str) -> None:
    from tidegate.metrics.instruments import count_problem  # imported late, as below

    with suppress(OSError):  # for example a full disk: the failure is logged anyway
        count_problem(Log.DAILY_WORK_FAILED.value, "supervisor", counts)


def _forget(name: str, counts: str) -> None:
    from tidegate.metrics.instruments import forget  # rarely used, and its import takes 4 MB

    forget(name, counts)


async def _reread(order: Supervision) -> dict[str, str]:
    """Return the environment of new children, read by a process from the current settings. Raises
    ConfigError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from tidegate.supervisor.up import read_again; read_again()",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    found, _ = await process.communicate(json.dumps(order.base).encode())
    if process.returncode:
        raise ConfigError("the settings", None, "could not be read, as the log above says")
    answer = json.loads(found)
    if "wrong" in answer:
        raise ConfigError(*answer["wrong"])
    return {**answer["environment"], SHARED: order.counts}


def _show(line: str) -> None:
    with suppress(BrokenPipeError):
        sys.stdout.write(line)
        sys.stdout.flush()


def _busy(what: str) -> AbstractContextManager[object]:
    if not sys.stdout.isatty():
        return nullcontext()
    from rich.console import Console

    return Console().status(f"[bright_black]{what}[/]", spinner_style="cyan")


DAILY_AT = time_of_day(3, 0)  # UTC
_CHECK_EVERY_S = 60.0


class DailyWork:
    """The commands that `tidegate up` runs once a day beside its processes: prune, and the export
    of the record if it is configured. (Workers do the reconciliation.)"""

    def __init__(
        self,
        commands: Callable[[], Sequence[tuple[str, ...]]],
        run: Callable[[tuple[str, ...]], Awaitable[int]],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        on_failed: Callable[[], None] = lambda: None,
    ) -> None:
        """run: runs a command and returns its exit status, or raises OSError if it could not
        start."""
        self._commands, self._run, self._now, self._on_failed = commands, run, now, on_failed
        self._done: dict[tuple[str, ...], date] = {}

    async def run_due(self) -> None:
        """Run each command that is due: from 3:00 UTC on, if it has not succeeded on this day."""
        now = self._now()
        if now.time() < DAILY_AT:
            return
        for command in self._commands():
            if self._done.get(command) == now.date():
                continue
            status: int | str
            try:
                status = await self._run(command)
            except OSError as refused:  # no memory, or too many processes
                status = str(refused)
            if status == 0:
                self._done[command] = now.date()
                get_logger().info(Log.DAILY_WORK_DONE, command=" ".join(command))
            else:
                get_logger().warning(
                    Log.DAILY_WORK_FAILED, command=" ".join(command), status=status
                )
                self._on_failed()

    async def run(self) -> None:
        """Check each minute until cancelled. Cancellation stops a running command."""
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            await self.run_due()


def daily_commands(settings: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return the arguments of the daily `tidegate` commands."""
    commands: list[tuple[str, ...]] = [("prune",)]
    if (record_export := settings.get("RECORD_EXPORT") or "off") != "off":
        commands.append(("export", "record", "--format", record_export))
    return commands


async def run_command(command: tuple[str, ...], environment: Mapping[str, str]) -> int:
    """Run a command of `tidegate` in a process and return its exit status. Cancellation stops
    it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "tidegate",
        *command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


def daily_work(
    family: Family,
    run: Callable[[tuple[str, ...], Mapping[str, str]], Awaitable[int]] = run_command,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    on_failed: Callable[[], None] = lambda: None,
) -> DailyWork:
    """Return the daily work of a family, with the settings that its processes have at the time."""

    def settings() -> dict[str, str]:
        return {name: value for name, value in family.environment.items() if name != SHARED}

    return DailyWork(
        lambda: daily_commands(settings()),
        lambda command: run(command, settings()),
        now=now,
        on_failed=on_failed,
    )


# Of open files and connections of a process, where the system's hard limit allows so many.
MOST_FILES = 65_536


def open_files_of(soft: int, hard: int) -> int:
    """Return the limit of open files that a process sets itself, from its limits at the start."""
    most = MOST_FILES if hard < 0 else min(hard, MOST_FILES)  # a negative one is no limit
    return soft if soft < 0 else max(soft, most)


_BACKLOG = 2048


def listen(config: Config, *, for_worker: bool = False) -> socket.socket:
    """Return a socket that listens on HOST and PORT, or WORKER_PORT. Raises ConfigError if that
    fails."""
    name, port = "PORT", config.port
    if for_worker and config.worker_port is not None:
        name, port = "WORKER_PORT", config.worker_port
    family, address = _address(config, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and address[0] == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as refused:
        listener.close()
        raise _explained(config, refused, name, port) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of the socket for clients on this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("127.0.0.1", "::1", "0.0.0.0", "::"):
        return f"http://localhost:{port}"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _address(config: Config, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    host = config.host.strip("[]")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as unknown:
        raise _explained(config, unknown, "PORT", port) from None
    # `localhost` has two addresses; clients that try the other one first fall back to this one.
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, (str(address[0]), port)


ANSWER_S = 1.0
_PROBE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def serves_tidegate(host: str, port: int) -> bool:
    """Return whether a Tidegate answers at an address to listen on."""
    place = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))
    try:
        with socket.create_connection((place, port), ANSWER_S) as caller:
            caller.sendall(_PROBE)
            answer = caller.makefile("rb").read(2000)
    except OSError:
        return False
    return answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b'\r\n\r\n{"status":"ok"}')


def _explained(config: Config, refused: OSError, name: str, port: int) -> ConfigError:
    match refused.errno:
        case errno.EADDRINUSE:
            own = serves_tidegate(config.host, port)
            whose = "a Tidegate that runs already" if own else "another program"
            why = f"is in use by {whose}; choose another port, or 0 for any free one"
            return ConfigError(name, str(port), why)
        case errno.EACCES:
            why = "may not be opened by this user; ports from 1024 on may"
            return ConfigError(name, str(port), why)
    return ConfigError("HOST", config.host, f"must be an address of this machine: {refused}")
