"""One stage: a Valkey of its own, worker processes, and what both cost.

Invariant: leaving the stage ends every process that it started, whatever state those are in.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import redis

from bench import machine
from bench.environments import ROOT
from bench.limiter import calllog
from bench.limiter.calllog import Kind, Record
from bench.limiter.orders import Orders
from bench.limiter.trace import Trace
from bench.machine import cpu_ns
from bench.peers.catalogue import Entry, interpreter
from tidegate.embedded.servers import ValkeyServer

READY_S = 20.0
# Some peers keep a connection for each waiting task.
MOST_CLIENTS = 15_000
MOST_FILES = 20_000
PART_HOLDER_S = 5.0
SETTLE_S = 0.1
SHARED_MEMORY = Path("/dev/shm")


class NeverReady(Exception):
    """The workers of a limiter did not start; the message says what they printed."""


@dataclass(frozen=True, slots=True)
class Cost:
    """All that was spent up to one moment."""

    at_ns: int
    workers_cpu_ns: int
    valkey_cpu_ns: int
    script_calls: int
    script_cpu_us: int
    reads: int
    harness_cpu_ns: int
    machine_busy_ns: int

    def others(self, later: Cost) -> float:
        """The part of the machine that went, up to `later`, to what is not ours."""
        busy_ns = later.machine_busy_ns - self.machine_busy_ns
        for own in ("workers_cpu_ns", "valkey_cpu_ns", "harness_cpu_ns"):
            busy_ns -= getattr(later, own) - getattr(self, own)
        return max(0.0, busy_ns / (later.at_ns - self.at_ns) / (os.cpu_count() or 1))


class Stage:
    def __init__(self, entry: Entry, orders: Orders) -> None:
        self.entry = entry
        self.killed_ns: dict[int, int] = {}
        self._python = interpreter(entry)
        self._folder = tempfile.TemporaryDirectory(
            prefix="bench-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        )
        self._path = Path(self._folder.name)
        self.valkey = ValkeyServer(self._path / "valkey")
        self._client = redis.Redis.from_url(self.valkey.url)
        self._workers: list[subprocess.Popen[bytes]] = []
        self._orders = replace(
            orders, adapter=entry.adapter, threads=entry.threads, url=self.valkey.url
        )

    def __enter__(self) -> Self:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MOST_FILES)), hard))
        self.valkey.start()
        # One connection of ours is open before the workers may have taken them all.
        self._client.config_set("maxclients", MOST_CLIENTS)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()
        self._client.close()
        self.valkey.stop()
        self._folder.cleanup()

    # Workers

    def start_workers(self) -> None:
        """All of them, until each has its tasks under way. Raises NeverReady."""
        for number in range(self._orders.workers):
            log = self._log(number)
            calllog.create(log)
            self._workers.append(self._spawn(replace(self._orders, number=number, log=str(log))))
        deadline_s = time.monotonic() + READY_S
        for number in range(self._orders.workers):
            while not any(record.kind == Kind.READY for record in calllog.read(self._log(number))):
                if self._workers[number].poll() is not None or time.monotonic() > deadline_s:
                    raise NeverReady(self.said(number))
                time.sleep(0.02)

    def await_calls(self, warm_s: float) -> None:
        """Until the first calls have begun, or `READY_S` has gone by, and `warm_s` longer."""
        deadline_s = time.monotonic() + READY_S
        while not any(map(self._begun, range(self._orders.workers))):
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.02)
        time.sleep(warm_s)

    def _begun(self, number: int) -> bool:
        return any(record.kind == Kind.BEGAN for record in calllog.read(self._log(number)))

    def _spawn(self, orders: Orders) -> subprocess.Popen[bytes]:
        paths = [str(ROOT), str(ROOT / "src")] if self.entry.ours else [str(ROOT)]
        return subprocess.Popen(
            [str(self._python), "-m", "bench.limiter.worker", json.dumps(asdict(orders))],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            cwd=self._path,
            stdout=self._printed(orders.number).open("w"),
            stderr=self._complaints(orders.number).open("w"),
        )

    def run_rounds(self, timeout_s: float) -> list[float]:
        """One worker that only acquires and releases; seconds of each batch. Raises NeverReady."""
        log = self._log(0)
        calllog.create(log)
        worker = self._spawn(replace(self._orders, log=str(log)))
        self._workers.append(worker)
        try:
            worker.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise NeverReady(f"not done within {timeout_s:.0f} s") from error
        if worker.returncode:
            raise NeverReady(self.said(0))
        batches: list[float] = json.loads(self._printed(0).read_text())
        return batches

    def said(self, number: int) -> str:
        """The last line that a worker printed."""
        lines = self._complaints(number).read_text().strip().splitlines()
        return lines[-1] if lines else "nothing was said"

    def alive(self) -> int:
        return sum(worker.poll() is None for worker in self._workers)

    def busiest(self) -> int:
        """The worker with the most open calls."""
        return max(range(self._orders.workers), key=self._open_calls)

    def part_holder(self) -> int:
        """A worker that holds some of the permits, while others hold some as well."""
        deadline_s = time.monotonic() + PART_HOLDER_S
        while True:
            opened = {number: self._open_calls(number) for number in range(self._orders.workers)}
            holders = [number for number, calls in opened.items() if calls]
            if len(holders) > 1 or time.monotonic() > deadline_s:
                return min(holders, key=opened.__getitem__, default=0)
            time.sleep(0.05)

    def kill(self, number: int) -> int:
        """Kill -9 of a worker; returns when."""
        self.killed_ns[number] = time.monotonic_ns()
        self._workers[number].kill()
        self._workers[number].wait()
        return self.killed_ns[number]

    def signal(self, number: int, what: signal.Signals) -> int:
        """Send it; returns when."""
        self._workers[number].send_signal(what)
        return time.monotonic_ns()

    def _open_calls(self, number: int) -> int:
        kinds = [record.kind for record in calllog.read(self._log(number))]
        return kinds.count(Kind.BEGAN) - kinds.count(Kind.ENDED)

    # What was seen

    def trace(self) -> Trace:
        return Trace.of(self._records(), self.killed_ns)

    def _records(self) -> list[list[Record]]:
        """Up to now, from all workers alike. What bears an earlier time may come a moment later."""
        now_ns = time.monotonic_ns()
        time.sleep(SETTLE_S)
        return [
            [record for record in calllog.read(self._log(number)) if record.at_ns <= now_ns]
            for number in range(self._orders.workers)
        ]

    def _log(self, number: int) -> Path:
        return self._path / f"calls-{number}"

    def _printed(self, number: int) -> Path:
        return self._path / f"stdout-{number}"

    def _complaints(self, number: int) -> Path:
        return self._path / f"stderr-{number}"

    def cost(self) -> Cost:
        stats: Mapping[str, Any] = self._client.info("stats")
        commands: Mapping[str, Any] = self._client.info("commandstats")
        scripts = [
            fields
            for name, fields in commands.items()
            if name.startswith(("cmdstat_evalsha", "cmdstat_eval", "cmdstat_fcall"))
        ]
        return Cost(
            at_ns=time.monotonic_ns(),
            workers_cpu_ns=sum(
                cpu_ns(worker.pid) for worker in self._workers if worker.poll() is None
            ),
            valkey_cpu_ns=cpu_ns(self.valkey.pid),
            script_calls=sum(fields["calls"] for fields in scripts),
            script_cpu_us=sum(fields["usec"] for fields in scripts),
            reads=stats["total_reads_processed"],
            harness_cpu_ns=time.process_time_ns(),
            machine_busy_ns=machine.busy_ns(),
        )

    def connections(self) -> int:
        """Open connections to Valkey, without our own."""
        return int(self._client.info("clients")["connected_clients"]) - 1

    def valkey_version(self) -> str:
        server = self._client.info("server")
        return str(server.get("valkey_version", server["redis_version"]))
