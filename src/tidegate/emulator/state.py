"""State of the emulator: calls in flight, the ledger of all calls, files, client presence.

Every served call passes `serving`, which checks limits, counts the call, and counts its end once.
The kernel is asked whether clients are still connected, because a gateway can close one call and
open the next before the event loop sees the disconnect, or reads the request of the closed one.

Invariants: for every kind, arrived = started + refused and started = finished + failed +
client_gone + in_flight at every moment; file contents are hashed as they arrive and never kept,
except JSON lines, which a batch may need.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import select
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from random import Random
from secrets import token_hex
from typing import Any, Literal, TypeVar

from aiohttp import web

from tidegate.emulator.account import AccountCharge, AccountLimitReached, ProviderAccount
from tidegate.emulator.batches import BatchStore, ProviderBatchLine
from tidegate.emulator.content import Attached, get
from tidegate.emulator.counting import CallSize
from tidegate.emulator.dialect import (
    FaultOrders,
    Json,
    LimitGate,
    LimitReached,
    LimitRefusal,
    Refused,
    rfc3339,
)
from tidegate.emulator.rate_limits import rate_limit_headers
from tidegate.emulator.settings import KINDS, EmulatorSettings

Ending = Literal["finished", "failed", "client_gone", "refused"]
PROMPT_CHARS = 200
MOST_MODELS = 1000  # models with their own totals: a client may name any
OTHER_MODELS = "(others)"


@dataclass(slots=True)
class KindStats:
    """Counts of a kind. `over` are refused by a concurrency limit, also in `refused`."""

    arrived: int = 0
    started: int = 0
    finished: int = 0
    failed: int = 0  # ended by an injected fault
    client_gone: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    over: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by the limit's name
    bytes: int = 0  # of answers sent


@dataclass(slots=True)
class Billed:
    """Tokens of ended calls; `output_tokens` includes the thoughts.

    For a finished call these are those of the usage in its answer (or that would be in a stream
    that omits it). For a call that broke off they are the input and the output sent, or nothing if
    no byte of an answer was sent; an answer that is not streamed counts in full from its first
    byte.
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    thoughts_tokens: int = 0

    def add(self, other: Billed) -> None:
        self.calls += other.calls
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.thoughts_tokens += other.thoughts_tokens


@dataclass(slots=True)
class LoggedCall:
    """A call. Times are ns of the wall clock; `outcome` is None while it is in flight.

    Its tokens are counted as in `Billed`, so far.
    """

    id: int
    kind: str
    model: str
    method: str
    prompt: str  # its first 200 characters
    prompt_sha: str  # SHA-256 of the whole, hexadecimal
    started_ns: int
    ended_ns: int | None = None
    outcome: Ending | None = None
    limit: str | None = None  # the limit that refused it
    fault: str | None = None  # the injected fault
    bytes: int = 0
    dialect: str = "gemini"
    input_tokens: int = 0
    output_tokens: int = 0
    thoughts_tokens: int = 0
    traceparent: str = ""  # from the request
    cached_tokens: int = 0  # of the input, read from the account's prompt cache
    cache_write_tokens: int = 0  # of the input, written to it
    tier: str = ""  # the processing tier that is billed: `batch`, `flex`; empty for the usual one


class CallLedger:
    """The calls of the emulator: counts by type and model, and a log of the last calls."""

    def __init__(self, log_size: int) -> None:
        self._stats = {kind: KindStats() for kind in KINDS}
        self._billed: dict[str, dict[str, Billed]] = {}
        self._log: deque[LoggedCall] = deque(maxlen=log_size)
        self._last_id = 0
        self._in_flight_total = 0
        self._max_in_flight_total = 0

    def of(self, kind: str) -> KindStats:
        return self._stats[kind]

    @property
    def in_flight_total(self) -> int:
        """Return the calls in flight over all kinds but `other`."""
        return self._in_flight_total

    def arrive(
        self, kind: str, model: str, method: str, prompt: str, dialect: str = "gemini"
    ) -> LoggedCall:
        """Log an arrival; `start` or `refuse` must follow immediately."""
        self._last_id += 1
        digest = sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
        call = LoggedCall(
            self._last_id, kind, model, method, prompt[:PROMPT_CHARS], digest, time.time_ns()
        )
        call.dialect = dialect
        self._log.append(call)
        self._stats[kind].arrived += 1
        return call

    def refuse(self, call: LoggedCall, limit: str, *, over: bool) -> None:
        stats = self._stats[call.kind]
        stats.refused[limit] = stats.refused.get(limit, 0) + 1
        stats.over += over
        call.limit = limit
        call.outcome, call.ended_ns = "refused", time.time_ns()

    def start(self, call: LoggedCall) -> None:
        stats = self._stats[call.kind]
        stats.started += 1
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        if call.kind != "other":
            self._in_flight_total += 1
            self._max_in_flight_total = max(self._max_in_flight_total, self._in_flight_total)

    def pass_over(self, call: LoggedCall) -> None:
        """Count a call whose client disconnected before its request was read: never in flight."""
        stats = self._stats[call.kind]
        stats.started += 1
        stats.client_gone += 1
        call.outcome, call.ended_ns = "client_gone", call.started_ns

    def end(self, call: LoggedCall, outcome: Ending) -> None:
        """End a started call. Idempotent: the first ending is kept."""
        if call.outcome is not None:
            return
        call.outcome, call.ended_ns = outcome, time.time_ns()
        if call.input_tokens or call.output_tokens:
            self._bill(call, outcome)
        stats = self._stats[call.kind]
        stats.in_flight -= 1
        if call.kind != "other":
            self._in_flight_total -= 1
        match outcome:
            case "finished":
                stats.finished += 1
            case "client_gone":
                stats.client_gone += 1
            case _:
                stats.failed += 1

    def charge(
        self, call: LoggedCall, input_tokens: int, output_tokens: int, thoughts_tokens: int = 0
    ) -> None:
        """Set the cost of the call, including the bytes sent next; the last value is billed."""
        if call.outcome is None:
            call.input_tokens = input_tokens
            call.output_tokens = output_tokens
            call.thoughts_tokens = thoughts_tokens

    def add_batch_line(self, line: ProviderBatchLine, dialect: str) -> None:
        """Log and bill a succeeded line of a batch, which is never in flight."""
        work, answered = line.work, line.answered
        if work is None or answered is None:
            raise ValueError("only a line that has its answer is billed")
        call = self.arrive(work.kind, work.model, work.method, work.prompt, dialect)
        call.tier = "batch"
        self.charge(call, work.input_tokens, answered.output_tokens, answered.thoughts_tokens)
        call.outcome, call.ended_ns = "finished", call.started_ns
        stats = self._stats[work.kind]
        stats.started += 1
        stats.finished += 1
        self._bill(call, "finished")

    def _bill(self, call: LoggedCall, outcome: Ending) -> None:
        known = call.model in self._billed or len(self._billed) < MOST_MODELS
        by_outcome = self._billed.setdefault(call.model if known else OTHER_MODELS, {})
        cost = Billed(1, call.input_tokens, call.output_tokens, call.thoughts_tokens)
        by_outcome.setdefault(outcome, Billed()).add(cost)

    def sent(self, call: LoggedCall, count_bytes: int) -> None:
        call.bytes += count_bytes
        self._stats[call.kind].bytes += count_bytes

    def calls(self, since: int = 0) -> Iterator[LoggedCall]:
        """Yield the log in order of arrival, from the first call with an id above `since`."""
        return (call for call in self._log if call.id > since)

    def reset(self) -> None:
        """Forget ended calls. Calls in flight are kept, so that their end still counts."""
        self._billed.clear()
        running = [call for call in self._log if call.outcome is None]
        self._log.clear()
        self._log.extend(running)
        for kind, old in self._stats.items():
            count = old.in_flight
            self._stats[kind] = KindStats(
                arrived=count, started=count, in_flight=count, max_in_flight=count
            )
        self._max_in_flight_total = self._in_flight_total

    def to_json(self) -> dict[str, Any]:
        return {
            "kinds": {kind: asdict(stats) for kind, stats in self._stats.items()},
            "in_flight": self._in_flight_total,
            "max_in_flight": self._max_in_flight_total,
            "last_id": self._last_id,
            "tokens": {
                model: {outcome: asdict(billed) for outcome, billed in by_outcome.items()}
                for model, by_outcome in self._billed.items()
            },
        }


class ConnectionWatch:
    """Watches connections for clients that disconnect. Without epoll none is noticed early."""

    def __init__(self) -> None:
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._call_of: dict[int, int] = {}  # file descriptor -> call id

    def watch(self, request: web.BaseRequest, call_id: int) -> int:
        """Start to watch a call's connection; return a handle for `forget`, -1 if it has no
        connection."""
        transport = request.transport
        sock = None if transport is None else transport.get_extra_info("socket")
        if sock is None or self._epoll is None:
            return -1
        fd: int = sock.fileno()
        try:
            self._epoll.register(fd, select.EPOLLRDHUP)
        except FileExistsError:
            self._epoll.modify(fd, select.EPOLLRDHUP)
        self._call_of[fd] = call_id
        return fd

    def forget(self, fd: int, call_id: int) -> None:
        # A newer connection may have the same number, and stays watched.
        if self._epoll is None or self._call_of.get(fd) != call_id:
            return
        del self._call_of[fd]
        try:
            self._epoll.unregister(fd)
        except OSError:
            return  # the connection is closed, and the kernel has removed it already

    @staticmethod
    def has_departed(request: web.BaseRequest) -> bool:
        """Return whether the request's client has disconnected already. Never blocks."""
        transport = request.transport
        sock = None if transport is None else transport.get_extra_info("socket")
        if sock is None or not hasattr(select, "POLLRDHUP"):
            return False
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def departed(self) -> list[int]:
        """Return the ids of watched calls whose client has disconnected. Never blocks."""
        if self._epoll is None:
            return []
        found = self._epoll.poll(0)
        return [self._call_of[fd] for fd, _ in found if fd in self._call_of]

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None


MAX_FILES = 10_000
FILE_LIFETIME_S = 48 * 3600
# Google's file URIs have its own address, whatever address was called.
_URIS = "https://generativelanguage.googleapis.com"
_FORBIDDEN = "You do not have permission to access the File {name} or it may not exist."


@dataclass(slots=True)
class StoredFile:
    """An uploaded file; of its content only JSON lines are kept."""

    name: str  # files/abc
    mime_type: str
    display_name: str
    created_ns: int = field(default_factory=time.time_ns)
    size_bytes: int = 0
    active_ns: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    content: bytearray | None = None  # of JSON lines only

    def to_json(self) -> Json:
        body = {
            "name": self.name,
            "mimeType": self.mime_type,
            "sizeBytes": str(self.size_bytes),
            "createTime": rfc3339(self.created_ns),
            "updateTime": rfc3339(max(self.active_ns, self.created_ns)),
            "expirationTime": rfc3339(self.created_ns + FILE_LIFETIME_S * 10**9),
            "sha256Hash": base64.b64encode(self.digest.digest()).decode(),
            "uri": f"{_URIS}/v1beta/{self.name}",
            "state": "ACTIVE" if time.time_ns() >= self.active_ns else "PROCESSING",
            "source": "UPLOADED",
        }
        return body | ({"displayName": self.display_name} if self.display_name else {})


class FileStore:
    """The uploaded files of the emulator, and resumable uploads in progress."""

    def __init__(self) -> None:
        self._files: dict[str, StoredFile] = {}
        self._uploads: dict[str, StoredFile] = {}

    def clear(self) -> None:
        self._files.clear()
        self._uploads.clear()

    def begin(self, headers: Mapping[str, str], body: Any) -> str:
        """Start a resumable upload and return its id."""
        file = get(body, "file") if isinstance(body, dict) else None
        file = file if isinstance(file, dict) else {}
        name = str(file.get("name") or f"files/{token_hex(6)}")
        if not name.startswith("files/"):
            raise Refused(400, "* CreateFileRequest.file.name: must begin with `files/`")
        if name in self._files:
            raise Refused(400, f"Requested entity already exists: {name}")
        if len(self._files) + len(self._uploads) >= MAX_FILES:
            raise Refused(429, "Too many files are stored.")
        declared = headers.get("X-Goog-Upload-Header-Content-Type", "application/octet-stream")
        mime_type = str(get(file, "mimeType") or declared)
        label = str(get(file, "displayName") or headers.get("X-Goog-Upload-File-Name", ""))
        upload_id = token_hex(16)
        content = bytearray() if "jsonl" in mime_type else None
        self._uploads[upload_id] = StoredFile(name, mime_type, label, content=content)
        return upload_id

    async def receive(
        self,
        upload_id: str,
        headers: Mapping[str, str],
        content: AsyncIterator[bytes],
        processing_ms: int,
    ) -> StoredFile | None:
        """Store a piece. Return the file if its command contains `finalize`, otherwise None."""
        file = self._uploads.get(upload_id)
        if file is None:
            raise Refused(404, "Upload not found.")
        offset = headers.get("X-Goog-Upload-Offset", "0")
        if offset != str(file.size_bytes):
            raise Refused(400, f"Offset {offset} is not {file.size_bytes}, where we are.")
        async for piece in content:
            file.digest.update(piece)
            file.size_bytes += len(piece)
            if file.content is not None:
                file.content += piece
        if "finalize" not in headers.get("X-Goog-Upload-Command", "finalize"):
            return None
        del self._uploads[upload_id]
        file.active_ns = time.time_ns() + processing_ms * 1_000_000
        self._files[file.name] = file
        return file

    def find(self, name: str) -> StoredFile:
        """Return a file. Raises Refused 403, as Gemini does for a file that does not exist."""
        file = self._files.get(name)
        if file is None:
            raise Refused(403, _FORBIDDEN.format(name=name.removeprefix("files/")))
        return file

    def delete(self, name: str) -> Json:
        """Remove a file and return the body of the answer, which is empty."""
        del self._files[self.find(name).name]
        return {}

    def page(self, size: int, token: str) -> tuple[list[StoredFile], str]:
        """Return up to `size` files after the one named by `token`, and the next page's token."""
        names = sorted(self._files)
        later = [name for name in names if name > token]
        chosen = later[:size]
        return [self._files[name] for name in chosen], chosen[-1] if len(later) > size else ""

    def look_up(self, uri: str) -> Attached:
        """Return the file of a `fileUri`; URIs of other hosts are accepted unread."""
        _, marker, name = uri.partition("/v1beta/files/")
        if not uri:
            raise Refused(400, "Invalid value at 'file_data.file_uri': it is empty")
        if not marker:
            return Attached("application/octet-stream", None, uri)
        file = self.find(f"files/{name}")
        if time.time_ns() < file.active_ns:
            raise Refused(
                400, f"The File {name} is not in an ACTIVE state and usage is not allowed."
            )
        return Attached(file.mime_type, file.size_bytes, uri)


_LONGEST_TRACEPARENT = 100
T = TypeVar("T")


class EmulatorState:
    """The state of an emulator: its calls, limits, files, batches and injected faults."""

    def __init__(
        self, settings: EmulatorSettings, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.settings = settings
        self.clock_ns = clock_ns
        self.ledger = CallLedger(settings.log_size)
        self.presence = ConnectionWatch()
        self.files = FileStore()
        self.stored: dict[str, dict[str, Json]] = defaultdict(dict)  # by kind and name
        self.random = Random(settings.seed)
        self.batches = BatchStore(self.now_ns, self.random, self.ledger.add_batch_line)
        self.kept: dict[str, object] = {}  # state that a front keeps for its account, by its name
        self.behaviour = settings.behaviour
        self.faults = FaultOrders(settings.faults, self.random)
        self._gate = LimitGate(self.behaviour.concurrency, self.behaviour.rates)
        self.account = self._new_account()
        self._charges: dict[int, tuple[ProviderAccount, AccountCharge]] = {}  # by call id
        self._in_flight: dict[int, LoggedCall] = {}
        self._work: set[asyncio.Task[Any]] = set()
        self._call_on: dict[object, LoggedCall] = {}  # aiohttp's protocol of a connection -> call

    def reset(self) -> None:
        """Reset to the start: counters, log, windows, files, faults, behaviour, random numbers."""
        self.ledger.reset()
        self.files.clear()
        self.stored.clear()
        self.batches.clear()
        self.kept.clear()
        self.random.seed(self.settings.seed)
        self.behaviour = self.settings.behaviour
        self.faults.replace(self.settings.faults)
        self._gate = LimitGate(self.behaviour.concurrency, self.behaviour.rates)
        self.account = self._new_account()

    def change_behaviour(self, changes: Mapping[str, Any]) -> None:
        """Replace some fields; windows restart only if a limit is among them."""
        self.behaviour = self.behaviour.changed(changes)
        if changes.keys() & {"concurrency", "rates"}:
            self._gate = LimitGate(self.behaviour.concurrency, self.behaviour.rates)
        if "account" in changes:
            self._change_account()

    def now_ns(self) -> int:
        """Return the time of batches: by the account's clock, which may be scaled, if there is
        one."""
        return self.clock_ns() if self.account is None else self.account.now_ns()

    def _new_account(self) -> ProviderAccount | None:
        spec = self.behaviour.account
        return None if spec is None else ProviderAccount(spec, self.clock_ns)

    def _change_account(self) -> None:
        """Apply the behaviour's account; the use so far is kept if its limits are the same."""
        spec = self.behaviour.account
        if spec is None or self.account is None or not self.account.change(spec):
            self.account = self._new_account()

    def account_of(self, dialect: str) -> ProviderAccount | None:
        """Return the account for calls in this dialect."""
        account = self.account
        return account if account is not None and account.governs(dialect) else None

    def keep_prompt(self, call: LoggedCall, texts: Sequence[str]) -> None:
        """Put an admitted call's prompt into the account's prompt cache."""
        if call.id in self._charges:
            self._charges[call.id][0].keep_prompt(call.model, texts)

    def made(self, call: LoggedCall) -> None:
        """Count the output of a call so far, if its account counts output as it is made."""
        if call.id in self._charges:
            account, charge = self._charges[call.id]
            account.made(charge, call.output_tokens)

    def rate_limit_headers(self, call: LoggedCall) -> dict[str, str]:
        """Return the headers of a call's answer that report its account's limits."""
        if call.id not in self._charges:
            return {}
        account, charge = self._charges[call.id]
        views = account.views(call.model, charge)
        return rate_limit_headers(account.spec.headers, views, account.now_ns())

    @contextmanager
    def serving(
        self,
        request: web.BaseRequest,
        *,
        kind: str,
        model: str,
        method: str,
        prompt: str,
        size: CallSize,
        dialect: str = "gemini",
        outlives_client: bool = False,
    ) -> Iterator[LoggedCall]:
        """Count a call while the block runs. `outlives_client`: it continues without its client.

        Raises LimitReached or AccountLimitReached if a limit refuses it.
        """
        self._notice_departed()
        call = self.ledger.arrive(kind, model, method, prompt, dialect)
        call.traceparent = request.headers.get("traceparent", "")[:_LONGEST_TRACEPARENT]
        call.cached_tokens, call.cache_write_tokens = size.cached, size.cache_write
        continues = self.behaviour.works_on or outlives_client
        has_departed = not continues and self.presence.has_departed(request)
        refusal = None if has_departed else self._refusal(kind, size.input)
        if refusal is not None:
            self.ledger.refuse(call, refusal.limit, over=refusal.rate is None)
            raise LimitReached(refusal, model)
        self._charge(call, size)
        if has_departed:
            self.ledger.pass_over(call)
        else:
            self.ledger.start(call)
        self._in_flight[call.id] = call
        protocol, fd = request.protocol, -1
        if not continues:
            self._call_on[protocol] = call
            fd = self.presence.watch(request, call.id)
        try:
            yield call
        except (asyncio.CancelledError, ConnectionError):
            self.ledger.end(call, "client_gone")
            raise
        except BaseException:  # of any type: the log of calls notes how this one ended
            self.ledger.end(call, "failed")
            raise
        finally:
            self.ledger.end(call, "finished")
            self.settle(call)
            self.presence.forget(fd, call.id)
            del self._in_flight[call.id]
            self._call_on.pop(protocol, None)

    def _charge(self, call: LoggedCall, size: CallSize) -> None:
        """Count a call for its account's limits. Token counting and lists of models are free."""
        account = self.account_of(call.dialect)
        if account is None or (call.kind == "other" and call.method != "embed"):
            return
        try:
            self._charges[call.id] = (account, account.admit(call.model, size))
        except AccountLimitReached as reached:
            self.ledger.refuse(call, reached.refusal.limit.name, over=False)
            raise

    def settle(self, call: LoggedCall) -> None:
        """Correct the count of an ended call to its actual use. Idempotent."""
        if call.id in self._charges:
            account, charge = self._charges.pop(call.id)
            account.made(charge, call.output_tokens)
            account.end(charge, answered=bool(call.input_tokens or call.output_tokens))

    def work_on(self, answer: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Answer in a task that continues when its client disconnects."""
        task = asyncio.create_task(answer)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def end_work(self) -> None:
        """Cancel work that continues without a client."""
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)

    def connection_lost(self, protocol: object) -> None:
        """Note that this connection has ended."""
        if protocol in self._call_on:
            self.ledger.end(self._call_on[protocol], "client_gone")

    def _refusal(self, kind: str, input_tokens: int) -> LimitRefusal | None:
        in_flight = self.ledger.of(kind).in_flight
        full = self._gate.full(kind, in_flight, self.ledger.in_flight_total)
        return full or self._gate.spend(kind, input_tokens, self.clock_ns())

    def _notice_departed(self) -> None:
        for call_id in self.presence.departed():
            if call_id in self._in_flight:
                self.ledger.end(self._in_flight[call_id], "client_gone")
