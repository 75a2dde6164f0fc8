"""Processes under test: started, paused and killed; a permit probe and a job worker.

    python -m tidegate.verify.processes probe|worker

Orders come as one line of JSON on stdin, because they contain URLs with passwords. The probe prints
one line per event without buffering, so that a kill loses nothing:
MONOTONIC_NS WHAT CALL TENANT EPOCH. WHAT is ask, begin, end, leave, lost (a lease), over (rejected
by the provider) or failed; EPOCH is the permit's when the call begins. The worker is the product's
own, in a pool of the verification; it claims no job of another pool and no batch, and sends no
webhook. SIGTERM or the end of stdin ends either in order.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Self, get_args

from tidegate.checker import Event, What
from tidegate.emulator.client import PlainCall, plain_caller
from tidegate.errors import AdmissionError, LeaseLost
from tidegate.limiter import Limiter
from tidegate.policy.format import of_plain
from tidegate.settings import load
from tidegate.telemetry import logging as telemetry
from tidegate.verify.plan import finish

_END_S = 10.0
_WHATS = set(get_args(What))


class ProcessFamily:
    """A context manager for processes that run one program of this module.

    `events` are ordered by time. `seen` counts all other words that were printed, by process and
    word.
    """

    def __init__(self, program: str, module: str = "tidegate.verify.processes") -> None:
        self._command = (sys.executable, "-P", "-m", module, program)
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._events: list[Event] = []
        self._open: dict[tuple[str, int], Event] = {}
        self.seen: Counter[tuple[str, str]] = Counter()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        # Run to the end: the keys that are removed next belong to these processes.
        await finish(self._end_all())

    @property
    def names(self) -> Sequence[str]:
        return list(self._processes)

    async def start(self, name: str, orders: Mapping[str, Any], env: Mapping[str, str]) -> None:
        """Start a process in a session of its own, so that Ctrl-C does not reach it."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **env},
            start_new_session=True,
        )
        self._processes[name] = process
        self._reading[name] = asyncio.create_task(self._receive(name, process))
        assert process.stdin is not None
        process.stdin.write(json.dumps(orders).encode() + b"\n")
        await process.stdin.drain()

    def signal(self, name: str, how: signal.Signals) -> None:
        self._processes[name].send_signal(how)

    async def kill(self, name: str) -> int:
        """Send SIGKILL; return when its connections were closed, in monotonic ns."""
        process = self._processes[name]
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        at_ns = time.monotonic_ns()
        await asyncio.shield(self._reading[name])
        # Removed last: if this is cancelled earlier, leaving the context kills the process again.
        del self._processes[name], self._reading[name]
        self._end_calls(name, at_ns)
        return at_ns

    async def end(self, name: str) -> int | None:
        """Send SIGTERM; return the exit status, or None if the process had to be killed."""
        process = self._processes[name]
        for how in (signal.SIGCONT, signal.SIGTERM):
            with suppress(ProcessLookupError):  # the process has already ended
                process.send_signal(how)
        try:
            async with asyncio.timeout(_END_S):
                status = await process.wait()
        except TimeoutError:
            status = None
        await self.kill(name)
        return status

    async def _end_all(self) -> None:
        await asyncio.gather(*(self.end(name) for name in self.names))

    def ended(self) -> list[str]:
        """Return the names of processes that ended by themselves."""
        return [name for name, one in self._processes.items() if one.returncode is not None]

    def events(self) -> list[Event]:
        """Return all events so far."""
        return sorted(self._events, key=lambda event: event.at_ns)

    def has_begun(self, name: str) -> bool:
        """Return whether a process has begun its work."""
        return any(event.worker == name for event in self._events)

    def told(self, what: str, name: str = "") -> int:
        """Return how often a word was printed, by one process or by all."""
        return sum(n for (who, word), n in self.seen.items() if word == what and name in ("", who))

    async def _receive(self, name: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            at, what, number, tenant, epoch = line.decode().split()
            if what not in _WHATS:
                self.seen[name, what] += 1
                continue
            event = Event(
                int(at),
                what,  # type: ignore[arg-type]
                name,
                int(number),
                tenant,
                ("",),
                epoch=int(epoch),
            )
            self._events.append(event)
            if what in ("ask", "begin"):
                self._open[name, event.call] = event
            else:
                self._open.pop((name, event.call), None)

    def _end_calls(self, name: str, at_ns: int) -> None:
        """End the process's open calls, and remove its waiters."""
        for key, event in [one for one in self._open.items() if one[0][0] == name]:
            what: What = "end" if event.what == "begin" else "leave"
            self._events.append(event._replace(at_ns=at_ns, what=what))
            del self._open[key]


_STDIN = 0
_AT_ONCE = 65_536


def read_orders() -> dict[str, Any]:
    """Read the first line of stdin and nothing after it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(_STDIN, 1)
        if not byte:
            raise EOFError("no orders came")
        line += byte
    found: dict[str, Any] = json.loads(line)
    return found


def on_end(stop: Callable[[], object]) -> None:
    """Call `stop` on SIGTERM and at the end of stdin."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)

    def on_readable() -> None:
        if not os.read(_STDIN, _AT_ONCE):
            loop.remove_reader(_STDIN)
            stop()

    loop.add_reader(_STDIN, on_readable)


# A rejection is quick, so the permit is held about as long as a call takes: this keeps the load as
# announced.
_REFUSED_S = 0.12


@dataclass(frozen=True, slots=True)
class ProbeOrders:
    """Orders of a probe.

    policy: as in a file. tasks: per tenant. mark: text that every prompt contains.
    """

    url: str
    pool: str
    upstream: str
    name: str
    policy: dict[str, object]
    tenants: Sequence[str]
    tasks: int
    limit: str
    mark: str


class Probe:
    """The tasks of a process that requests permits without end."""

    def __init__(self, limiter: Limiter, call: PlainCall, orders: ProbeOrders) -> None:
        self._limiter = limiter
        self._call = call
        self._orders = orders
        self._numbers = count(1)

    async def want(self, tenant: str) -> None:
        """Make one call after another without end."""
        while True:
            number = next(self._numbers)
            report("ask", number, tenant)
            begun = False
            try:
                async with self._limiter.acquire(self._orders.limit, tenant=tenant) as permit:
                    await permit.confirm()
                    begun = True
                    report("begin", number, tenant, permit.fence[0])
                    try:
                        status = await self._call(f"{self._orders.mark} {number}")
                        if status != 200:
                            report("over" if status == 429 else "failed", number, tenant)
                            await asyncio.sleep(_REFUSED_S)
                    finally:
                        report("end", number, tenant)
            except LeaseLost:
                report("lost", number, tenant)
            except AdmissionError:
                await asyncio.sleep(0.05)
            finally:
                if not begun:
                    report("leave", number, tenant)


def report(what: str, number: int, tenant: str, epoch: int = 0) -> None:
    os.write(1, f"{time.monotonic_ns()} {what} {number} {tenant} {epoch}\n".encode())


async def run_probe(orders: ProbeOrders) -> None:
    me = asyncio.current_task()
    assert me is not None
    on_end(me.cancel)
    telemetry.configure_logging("json", "error", process=orders.name)
    limiter = Limiter.from_url(
        orders.url,
        pool=orders.pool,
        policy=of_plain(orders.policy),
        instance_id=orders.name,
        on_conflict="keep",
    )
    with suppress(asyncio.CancelledError):
        async with plain_caller(orders.upstream) as call, limiter:
            probe = Probe(limiter, call, orders)
            async with asyncio.TaskGroup() as group:
                for tenant in orders.tenants:
                    for _ in range(orders.tasks):
                        group.create_task(probe.want(tenant))


async def run_worker(pool: str, name: str, policy: dict[str, object]) -> None:
    """Run a worker of `pool` with the settings of its environment."""
    from tidegate.app import run_worker_of

    stop = asyncio.Event()
    on_end(stop.set)
    config = load()
    telemetry.configure_logging(config.log_format, "error", process=name)
    await run_worker_of(pool, of_plain(policy), config, name, stop)


if __name__ == "__main__":
    atexit.register(gc.freeze)  # garbage collection at exit takes half as long as the start
    if sys.argv[1] == "probe":
        asyncio.run(run_probe(ProbeOrders(**read_orders())))
    else:
        asyncio.run(run_worker(**read_orders()))
