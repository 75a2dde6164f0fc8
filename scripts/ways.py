"""Count of the files that a call enters, traced on real processes: `python scripts/ways.py`.

Four ways of the data: a relayed call from its socket to the upstream and the audit row, a permit
from `acquire` to its grant, a job from `POST /submit` to its webhook, and `tidegate limits set`
until the limit is in force. Each runs in processes as they are deployed (`tidegate serve`,
`tidegate worker`, the command line), on a real Valkey and PostgreSQL, with the emulator upstream.

*Files* are the modules of `tidegate` in which a function is entered. *Changes* are the entries into
a file other than that of the entry before, with the tasks of a process laid one after another in
the order of their first entries. Imports do not count, nor do functions that run in an idle process
too; between `acquire` and its grant, which takes a millisecond, every function counts. Of several
runs the one with the fewest changes counts, and in it only the functions that every run entered:
other work that falls into a run only adds to it.

An earlier count at ee32f61, whose rules were not written down, set the goals. This one comes within
5 % of it for the files of a relayed call and of a job and for the changes of an acquisition, and
not elsewhere: so the goals are the same ratios of what this script measures there.

    way                       counted at ee32f61   goal      measured at ee32f61   goal here
    relayed call              68 files, 172        22,  70   66 files, 182         21,  74
    acquire to grant          13,  53               5,  25   16,  55                6,  26
    submit to webhook         84, 202              30, 100   85, 292               30, 145
    limits set to in force    32,  67              15,  35   46, 250               22, 131

`--python` traces the checkout of another interpreter. Needs Python 3.12 (`sys.monitoring`).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
RUNS = 5
MOST_RUNS = 40  # of a way that is over its bound until then
_IDLE_S = 6.0
_QUIET_S = 0.5
_WITHIN_S = 60.0
_OPERATOR = "of-the-operator-of-a-traced-deployment"
_SETTINGS = {
    "GEMINI_API_KEY": "test-key",
    "KEY_OF_OPENAI": "test-key",
    "ADMIN_TOKEN": _OPERATOR,
    "SEMAPHORE_TIMEOUT": "6",
    "CLAIM_LEASE_MS": "4000",
    "LOG_FORMAT": "json",
    "WEBHOOK_ALLOW_PRIVATE": "true",
    "WEBHOOK_SECRET": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
}

# When, process and task, file, function.
Entry = tuple[int, str, str, str]


@dataclass(frozen=True, slots=True)
class Goal:
    """What a way is to come to, at most."""

    files: int
    changes: int


@dataclass(frozen=True, slots=True)
class Way:
    """A traced way: the entries of its smallest run, in order, tasks one after another."""

    entries: tuple[Entry, ...]

    @property
    def files(self) -> int:
        return len({file for _, _, file, _ in self.entries})

    @property
    def changes(self) -> int:
        names = [file for _, _, file, _ in self.entries]
        return sum(one != other for one, other in itertools.pairwise(names))

    def is_within(self, bound: Goal) -> bool:
        return self.files <= bound.files and self.changes <= bound.changes


GOALS = {
    "relayed call": Goal(21, 74),
    "acquire to grant": Goal(6, 26),
    "submit to webhook": Goal(30, 145),
    "limits set to in force": Goal(22, 131),
}


# In a traced process.


class Recorder:
    """Entries of functions of `tidegate` in this process, while it is switched on.

    Orders come as lines through a socket, each answered by a line of JSON. `idle` and `learn` note
    and return the functions that run in between, as those of an idle process. `start` and `stop`
    return the entries of others in between; `quiet` the seconds since the last of them.
    """

    def __init__(self, source: str) -> None:
        self.on = False
        self.entries: list[Entry] = []
        self._source = source
        self._idle: set[tuple[str, str]] = set()
        self._last = time.monotonic()
        self._importing: dict[int, int] = {}
        # Of Python 3.12: the checks look at this file as 3.11 would.
        self._monitoring: Any = vars(sys)["monitoring"]
        self._tool = self._monitoring.DEBUGGER_ID
        self._monitoring.use_tool_id(self._tool, "ways")
        events = self._monitoring.events
        self._monitoring.register_callback(self._tool, events.PY_START, self._entered)
        self._monitoring.register_callback(self._tool, events.PY_RETURN, self._imported)
        self._monitoring.set_events(self._tool, events.PY_START)

    def start(self) -> None:
        self.entries = []
        self._last = time.monotonic()
        self.on = True

    def stop(self) -> list[Entry]:
        self.on = False
        return [entry for entry in self.entries if entry[2:] not in self._idle]

    def serve(self, control: socket.socket) -> None:
        """Take orders until the other end closes."""
        with control, control.makefile("rw") as lines:
            for line in lines:
                lines.write(json.dumps(self._obey(line.strip())) + "\n")
                lines.flush()

    def _obey(self, order: str) -> object:
        if order in ("idle", "start"):
            self.start()
        elif order == "learn":
            self._idle = {entry[2:] for entry in self.stop()}
            return [*self._idle]
        elif order == "quiet":
            return time.monotonic() - self._last
        elif order == "stop":
            return self.stop()
        return None

    def _entered(self, code: Any, offset: int) -> object:
        if not code.co_filename.startswith(self._source):
            return self._monitoring.DISABLE
        thread = threading.get_ident()
        if code.co_name == "<module>":
            if not code.co_filename.endswith("__main__.py"):
                self._importing[thread] = self._importing.get(thread, 0) + 1
                events = self._monitoring.events
                self._monitoring.set_local_events(self._tool, code, events.PY_RETURN)
            return None
        if not self.on or self._importing.get(thread):
            return None
        file, function = code.co_filename[len(self._source) + 1 :], code.co_qualname
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no event loop in this thread
            task = None
        whose = f"{os.getpid()} {thread} {id(task) if task else 0}"
        self.entries.append((time.monotonic_ns(), whose, file, function))
        if (file, function) not in self._idle:
            self._last = time.monotonic()
        return None

    def _imported(self, code: Any, offset: int, value: object) -> None:
        self._importing[threading.get_ident()] -= 1


def traced(source: str, fd: int, arguments: list[str]) -> None:
    """Run a module with arguments as `python -m` does, and take orders meanwhile."""
    recorder = Recorder(source)
    control = socket.socket(fileno=fd)
    if arguments == ["acquire"]:
        asyncio.run(_acquire(recorder, control))
        return
    if arguments[0] == "now":  # a command that ends by itself is traced whole
        recorder.start()
        del arguments[0]
        sys.argv = arguments
        try:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        finally:
            control.sendall(json.dumps(recorder.stop()).encode() + b"\n")
            control.close()
        return
    threading.Thread(target=recorder.serve, args=(control,), daemon=True).start()
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


async def _acquire(recorder: Recorder, control: socket.socket) -> None:
    """Acquire a free permit, and return the entries between the call and the grant, of each run."""
    from tidegate.limiter import Limiter, PoolPolicy

    runs: list[list[Entry]] = []
    # A limit for each run: a permit released a moment ago is granted again without a round trip.
    limits = [f"model:m{number}" for number in range(RUNS + 1)]
    policy = PoolPolicy(dict.fromkeys(limits, 5))
    async with Limiter.from_url(os.environ["REDIS_URL"], pool="ways", policy=policy) as limiter:
        for limit in limits:
            recorder.start()
            async with limiter.acquire(limit, deadline_ms=30_000):
                runs.append(recorder.stop())
    del runs[0]  # it waited for the connection
    control.sendall(json.dumps(runs).encode() + b"\n")
    control.close()


# In the process that measures.


class Child:
    """A traced process and the socket that it takes orders from."""

    def __init__(
        self, python: Path, arguments: list[str], env: dict[str, str], folder: Path
    ) -> None:
        ours, theirs = socket.socketpair()
        source = source_of(python)
        with (folder / "traced.log").open("ab") as log, theirs:
            self.process = subprocess.Popen(
                [python, __file__, "--traced", str(theirs.fileno()), source, *arguments],
                cwd=folder,
                env=env,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._control = ours
        ours.settimeout(_WITHIN_S)
        self._lines = ours.makefile("rw")

    def order(self, order: str) -> Any:
        self._lines.write(order + "\n")
        self._lines.flush()
        return self.read()

    def read(self) -> Any:
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"the traced process ended with {self.process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._lines.close()
        self._control.close()


def source_of(python: Path) -> str:
    """Folder of the package `tidegate` that an interpreter imports."""
    if python == Path(sys.executable):
        return str(ROOT / "src/tidegate")
    find = "import importlib.util as u; print(*u.find_spec('tidegate').submodule_search_locations)"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
    return found.stdout.strip()


class Deployment:
    """An API and a worker, traced, with the emulator upstream; used as a context manager."""

    def __init__(self, folder: Path, redis_url: str, database_url: str, python: Path) -> None:
        from tidegate.embedded.servers import free_port

        self._folder, self._python = folder, python
        self._stack = ExitStack()
        self._port = free_port()
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        urls = {"REDIS_URL": redis_url, "DATABASE_URL": database_url, "PORT": str(self._port)}
        self._env = kept | _SETTINGS | urls | {"DATA_DIR": str(folder / "data")}
        self._idle: set[tuple[str, ...]] = set()
        self._delivered = 0
        self._limit = 5
        self._chats = 0

    def __enter__(self) -> Deployment:
        with ExitStack() as stack:
            emulator = stack.enter_context(self._emulator())
            self._env["GEMINI_BASE_URL"] = emulator
            (self._folder / "tidegate.toml").write_text(
                "[upstreams.openai]\n"
                f'dialects = {{ openai = "{emulator}/v1" }}\n'
                'key = "KEY_OF_OPENAI"\n'
                'models = ["gpt-*"]\n'
            )
            self._webhook = stack.enter_context(self._receiver())
            self._api = stack.enter_context(self.child("tidegate", "serve"))
            wait_until(self._ready, "a ready API")
            self._worker = stack.enter_context(self.child("tidegate", "worker"))
            self._both = (self._api, self._worker)
            for _ in range(3):
                self.chat()
                self.submit()
            for child in self._both:
                child.order("idle")
            time.sleep(_IDLE_S)
            for child in self._both:
                self._idle |= {tuple(function) for function in child.order("learn")}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def chat(self) -> None:
        body = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "Hello."}]}
        self._post("/v1/chat/completions", body)

    def submit(self) -> None:
        """A job, until its webhook has come."""
        before = self._delivered
        self._post("/submit", {"text": "Hello.", "type": "text_only", "webhook_url": self._webhook})
        wait_until(lambda: self._delivered > before, "a webhook")

    def set_limit(self) -> list[Entry]:
        """The entries of the command; it is in force when the processes are quiet again."""
        self._limit += 1
        arguments = ("now", "tidegate", "limits", "set", f"kind:text_only={self._limit}")
        with self.child(*arguments) as command:
            entries: list[Entry] = command.read()
            if command.process.wait(_WITHIN_S):
                raise RuntimeError("`tidegate limits set` failed")
        return entries

    def trace_chat(self) -> list[Entry]:
        """Every other one right after another call: a call reads what remains of limits where none
        has for a second, and counts something else where one has."""
        self._chats += 1
        if self._chats % 2:
            self.chat()
        return self.trace(self.chat)

    def trace_limit(self) -> list[Entry]:
        entries = self.trace(self.set_limit)
        if not self.is_set():
            raise RuntimeError("quiet processes, and the limit is not in force")
        return entries

    def is_set(self) -> bool:
        """Whether the limit that was set last is in force at the API."""
        limits = json.loads(self._ask("/admin/limits"))["limits"]
        bounds = {limit["limit"]: limit["bound"] for limit in limits}
        return bool(bounds["kind:text_only"] == self._limit)

    def trace(self, do: Callable[[], list[Entry] | None]) -> list[Entry]:
        """The entries in API and worker while `do` runs and until nothing follows any more."""
        for child in self._both:
            child.order("start")
        own = do() or []
        wait_until(
            lambda: all(child.order("quiet") > _QUIET_S for child in self._both), "quiet processes"
        )
        entries = [*own, *(entry for child in self._both for entry in child.order("stop"))]
        return [entry for entry in entries if tuple(entry[2:]) not in self._idle]

    @contextmanager
    def child(self, *arguments: str) -> Iterator[Child]:
        child = Child(self._python, list(arguments), self._env, self._folder)
        try:
            yield child
        finally:
            child.end()

    @contextmanager
    def _emulator(self) -> Iterator[str]:
        place = self._folder / "emulator.port"
        arguments = ["--host", "127.0.0.1", "--port", "0", "--port-file", str(place)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tidegate.emulator", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: place.exists() and place.read_text().strip(), "an emulator")
            yield f"http://127.0.0.1:{place.read_text().strip()}"
        finally:
            process.terminate()
            process.wait(_WITHIN_S)

    @contextmanager
    def _receiver(self) -> Iterator[str]:
        deployment = self

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(200)
                self.end_headers()
                deployment._delivered += 1

            def log_message(self, format: str, *args: object) -> None:
                """Nothing to standard error."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _ready(self) -> bool:
        try:
            self._ask("/health/ready")
        except (URLError, OSError):
            return False
        return True

    def _post(self, path: str, body: object) -> None:
        self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"authorization": f"Bearer {_OPERATOR}", "content-type": "application/json"}
        request = Request(f"http://127.0.0.1:{self._port}{path}", body, headers)
        with urlopen(request, timeout=_WITHIN_S) as response:
            content: bytes = response.read()
        return content


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Until it is true; RuntimeError after a minute."""
    deadline = time.monotonic() + _WITHIN_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {what} within {_WITHIN_S:.0f} s")
        time.sleep(0.05)


def measure(
    folder: Path,
    redis_url: str,
    database_url: str,
    python: Path = Path(sys.executable),
    *,
    bounds: Mapping[str, Goal] | None = None,
) -> dict[str, Way]:
    """The four ways, on an empty Valkey and a migrated database; takes half a minute. A way with a
    bound is traced until it is within it, up to `MOST_RUNS` runs: what a busy machine adds differs
    from run to run, and what the code needs is in each."""
    bounds = bounds or {}

    def way(name: str, trace: Callable[[], list[Entry]]) -> Way:
        runs = [trace() for _ in range(1 if name in bounds else RUNS)]
        while name in bounds and not smallest(runs).is_within(bounds[name]):
            if len(runs) == MOST_RUNS:
                break
            runs.append(trace())
        return smallest(runs)

    with Deployment(folder, redis_url, database_url, python) as deployment:
        relayed = way("relayed call", deployment.trace_chat)
        submitted = way("submit to webhook", lambda: deployment.trace(deployment.submit))
        limited = way("limits set to in force", deployment.trace_limit)
        with deployment.child("acquire") as process:
            acquired = smallest(process.read())
    return {
        "relayed call": relayed,
        "acquire to grant": acquired,
        "submit to webhook": submitted,
        "limits set to in force": limited,
    }


def smallest(runs: list[list[Entry]]) -> Way:
    """The run with the fewest changes, without the functions that another run did not need."""
    needed = set.intersection(*({(entry[2], entry[3]) for entry in run} for run in runs))
    ways = [way_of([entry for entry in run if (entry[2], entry[3]) in needed]) for run in runs]
    return min(ways, key=lambda way: way.changes)


def way_of(entries: list[Entry]) -> Way:
    """The tasks one after another, in the order of their first entries."""
    first: dict[str, int] = {}
    ordered = sorted(entries, key=lambda entry: entry[0])
    for entry in ordered:
        first.setdefault(entry[1], entry[0])
    return Way(tuple(sorted(ordered, key=lambda entry: (first[entry[1]], entry[0]))))


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the files that a call enters.")
    parser.add_argument("--order", action="store_true", help="print the entries in their order")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), metavar="PATH")
    given = parser.parse_args()
    from tidegate.embedded.servers import PostgresServer, ValkeyServer

    # Its servers end with it, however it is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="ways-") as name:
        folder = Path(name)
        valkey, postgres = ValkeyServer(folder / "valkey"), PostgresServer(folder / "postgres")
        try:
            valkey.start()
            postgres.start()
            urls = {"DATABASE_URL": postgres.url(), "REDIS_URL": valkey.url}
            env = os.environ | _SETTINGS | urls
            command = [given.python, "-m", "tidegate", "migrate"]
            subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
            ways = measure(folder, valkey.url, postgres.url(), given.python)
        finally:
            valkey.stop()
            postgres.stop()
    print(f"{'way':<24} {'files':>11} {'changes':>13}")
    for name, way in ways.items():
        goal = GOALS[name]
        print(f"{name:<24} {way.files:>5} ({goal.files:>3}) {way.changes:>7} ({goal.changes:>3})")
    if given.order:
        for name, way in ways.items():
            print(f"\n{name}")
            for file, entered in itertools.groupby(way.entries, key=lambda entry: entry[2]):
                print(f"  {file:<32} {' '.join(function for *_, function in entered)}")


if __name__ == "__main__":
    if not hasattr(sys, "monitoring"):
        sys.exit("scripts/ways.py needs Python 3.12 or newer")
    if sys.argv[1:2] == ["--traced"]:
        traced(sys.argv[3], int(sys.argv[2]), sys.argv[4:])
    else:
        main()
