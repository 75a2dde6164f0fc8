"""Maintenance of the record by commands: prune, erase, requeue, reconcile, export, backup, restore.

Backup and restore use PostgreSQL's own `pg_dump` and `pg_restore`.

Invariants: a file with the final name is a complete dump, and from its first byte on only its owner
can read it; a restore needs a database without our tables, and is atomic. Passwords are passed to
the programs in their environment, never as arguments.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from gzip import GzipFile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

import orjson

from tidegate.call import new_id
from tidegate.embedded import servers
from tidegate.embedded.lease import opened, try_lock
from tidegate.errors import ConfigError, NotFound, StoreUnavailable
from tidegate.http.body import PREFIX
from tidegate.policy.deployment import deployed_upstreams
from tidegate.settings import Config, secret
from tidegate.store.database import revision_at, settle_restored
from tidegate.store.retention import RecordByDay, RecordDay
from tidegate.supervisor.services import (
    database_url_of,
    live_changes,
    make_folders,
    prepared,
    with_record,
)
from tidegate.telemetry.logging import Log, get_logger

if TYPE_CHECKING:
    from tidegate.jobs.reconciliation import ReconcileReport
    from tidegate.store.blobs import Blobs
    from tidegate.store.database import Connections
    from tidegate.store.jobs import Requeue, RequeueReport
    from tidegate.store.retention import Cutoffs, EraseReport, PruneReport, Retention, Whose

# Messages of pg_restore about the file, not about the server.
_NO_WHOLE_DUMP = ("input file", "valid archive")


def prune(config: Config, days: int | None) -> PruneReport:
    """Delete requests that ended more than `days` (by default RETENTION_DAYS) ago, and the parts of
    uploads that killed processes left on this machine."""
    from tidegate.http.body import remove_leftovers

    make_folders(config)

    async def work(connections: Connections) -> PruneReport:
        await asyncio.to_thread(remove_leftovers, config.data_dir / "tmp")
        retention = _retention(config, connections)
        return await retention.prune(days or config.retention_days, config.operator_log_days)

    return with_record(config, work)


def erase(config: Config, whose: Whose, *, dry_run: bool) -> EraseReport:
    """Erase all data of a subject or tenant, or only count it."""
    make_folders(config)

    async def work(connections: Connections) -> EraseReport:
        return await _retention(config, connections).erase(whose, dry_run=dry_run)

    return with_record(config, work)


def reconcile(
    config: Config, provider: str, upstream: str | None, day: date, *, dry_run: bool
) -> ReconcileReport:
    """Compare a day's record with the provider's usage and costs; with `dry_run` nothing is
    corrected or stored. Raises ConfigError, UpstreamError and StoreUnavailable."""
    from tidegate.jobs import reconciliation
    from tidegate.store.provider.reconciliations import Reconciliations
    from tidegate.upstream.transport import RelayWire
    from tidegate.upstream.usage_api import USAGE_TIMEOUTS

    name = reconciliation.usage_provider(provider)

    async def work(connections: Connections) -> ReconcileReport:
        deployment = deployed_upstreams(config, await live_changes(connections))
        found = reconciliation.upstream_of(deployment, name, upstream)
        others = reconciliation.others_of(deployment.upstreams, found, name)
        account = reconciliation.account_of(found, name, secret)
        wire = RelayWire(USAGE_TIMEOUTS)
        await wire.start()
        try:
            record = Reconciliations(connections)
            return await reconciliation.reconcile(
                record, wire, found, account, day, others=others, dry_run=dry_run
            )
        finally:
            await wire.aclose()

    return with_record(config, work)


def _retention(config: Config, connections: Connections) -> Retention:
    from tidegate.store.blobs import Blobs
    from tidegate.store.retention import Retention

    blobs = Blobs.from_url(config.blob_url, config.data_dir)
    return Retention(connections, blobs, config.data_dir / "spill")


def requeue(config: Config, order: Requeue, *, by: str | None) -> RequeueReport:
    """Queue failed jobs again, for an operator; without `by` only count them."""
    from tidegate.store.jobs import StuckWork
    from tidegate.store.notifications import Notifications

    async def work(connections: Connections) -> RequeueReport:
        notifications = Notifications(connections)
        try:
            stuck = StuckWork(connections, notifications)
            if by is None:
                return await stuck.preview(order)
            report = await stuck.requeue_all(order)
            get_logger().warning(Log.JOBS_REQUEUED, jobs=report.requeued, by=by)
            return report
        finally:
            await notifications.aclose()

    return with_record(config, work)


def back_up(config: Config, file: Path) -> int:
    """Write the record into a new `file` and return its size in bytes. Processes may run meanwhile.

    Raises ConfigError if the file exists or cannot be created, and StoreUnavailable if the backup
    failed.
    """
    if file.exists():
        raise ConfigError(str(file), None, "exists already; nothing is overwritten")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise ConfigError(str(file), None, "must be in an existing, writable folder")
    with _partial_of(file) as partial, prepared(config, only={"postgres"}) as ground:
        url = database_url_of(ground.config)
        _run(_program("pg_dump", config), url, "--format=custom", f"--file={partial.resolve()}")
        partial.rename(file)
    return file.stat().st_size


@contextmanager
def _partial_of(file: Path) -> Iterator[Path]:
    """Yield the file in which a backup grows, of this process alone; the file of a killed run is
    reused. A backup that fails or is interrupted leaves none."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        # Created here, since pg_dump would use the umask: the file has all prompts and answers.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as failed:
        raise ConfigError(str(partial), None, f"can't be created: {failed.strerror}") from None
    with opened(descriptor):
        is_own = try_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, partial)
        if not is_own or file.exists():
            raise ConfigError(str(file), None, "is being written by another backup")
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise ConfigError(str(partial), None, "belongs to another user; remove it")
        os.fchmod(descriptor, 0o600)
        try:
            yield partial
        except BaseException:  # for Ctrl-C too: the file has a part of all prompts and answers
            partial.unlink(missing_ok=True)
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one at a path, which another process may have removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def restore(config: Config, file: Path) -> None:
    """Fill an empty database from a file of `back_up`.

    Raises ConfigError for an incomplete dump or a database that is not empty, and StoreUnavailable
    if the restore failed; the database is then as empty as before.
    """
    if not file.is_file():
        raise ConfigError(str(file), None, "does not exist")
    with prepared(config, only={"postgres"}) as ground:
        url = database_url_of(ground.config)
        if (revision := asyncio.run(revision_at(url))) is not None:
            raise ConfigError(
                "DATABASE_URL",
                None,
                f"names a database that holds data (revision {revision}): "
                "restore into an empty one",
            )
        options = ("--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges")
        try:
            _run(_program("pg_restore", config), url, *options, str(file.resolve()))
        except StoreUnavailable as failed:
            if any(words in failed.message for words in _NO_WHOLE_DUMP):
                allowed = f"must be a whole dump: {failed.message}"
                raise ConfigError(str(file), None, allowed) from None
            raise
        asyncio.run(settle_restored(url))


def _program(name: str, config: Config) -> str:
    """Return the bundled program for the bundled server, which has the same version; otherwise the
    system's."""
    if config.embedded:
        return str(servers.binaries_of(None) / name)
    found = shutil.which(name)
    if found is None:
        raise ConfigError(name, None, "is not in PATH: install PostgreSQL's client programs")
    return found


def without_password(url: str) -> tuple[str, str | None]:
    """Return a PostgreSQL URL without its password, and the password, wherever the URL has it."""
    parts, password = urlsplit(url), None
    if parts.password:
        password = unquote(parts.password)
        user, _, place_of = parts.netloc.rpartition("@")
        parts = parts._replace(netloc=f"{user.partition(':')[0]}@{place_of}")
    query = parse_qsl(parts.query, keep_blank_values=True)
    for name, value in query:
        password = value if name == "password" else password
    if parameters := [pair for pair in query if pair[0] != "password"]:
        parts = parts._replace(query=urlencode(parameters, quote_via=quote))
    else:
        parts = parts._replace(query="")
    return urlunsplit(parts), password


def _run(program: str, url: str, *options: str) -> None:
    url, password = without_password(url)
    environment = dict(os.environ)
    if password is not None:
        environment["PGPASSWORD"] = password
    command = [program, *options[:-1], f"--dbname={url}", options[-1]]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode != 0:
        output = done.stderr.decode(errors="replace").strip()[-500:]
        raise StoreUnavailable(f"{Path(program).name} failed: {output}")


_EXPORTS = "exports/record"
# For each file an empty blob, whose name has the time at which the day was summed up: the bucket's
# clock differs from the database's.
_STATES = "exports/states"
_GROUP_ROWS, _GROUP_BYTES = 100_000, 32_000_000  # of a row group of Parquet, which is in memory
_PAGE_ROWS = 1_000  # of the previous file
_MOST_TRIES = 5

ExportFormat = Literal["jsonl", "parquet"]
_FILES: dict[ExportFormat, str] = {"jsonl": "calls.jsonl.gz", "parquet": "calls.parquet"}
# Columns of an exported call, in their order: type, and description. Times are UTC.
EXPORTED: Mapping[str, tuple[str, str]] = {
    "request_id": ("text", "Id of the request: a UUID"),
    "tenant": ("text", "Tenant"),
    "key": ("text", "Beginning of the API key; null: none was shown"),
    "subject": ("text", "User of the tenant, as the caller named it; null once there is none"),
    "source": (
        "text",
        "job, stream, relay (a native call), batch (a line), judge (the classifier)",
    ),
    "status": ("text", "succeeded, failed, cancelled, expired, dead, refused, retried"),
    "kind": ("text", "text_only, multi_modal, image_generation; null where it was not classified"),
    "model": ("text", "Model that was called"),
    "model_version": ("text", "Model that answered, as the provider named it"),
    "upstream": ("text", "Account that was called last"),
    "endpoint": ("text", "Path of a native call"),
    "http_status": ("int", "Status of the answer of a native call"),
    "streamed": ("bool", "Whether the answer was a stream"),
    "priority": ("int", "Priority, -100 to 100"),
    "attempts": ("int", "Calls that were made for it"),
    "submitted_at": ("time", "Received"),
    "admitted_at": ("time", "Admitted by the limits"),
    "finished_at": ("time", "Ended"),
    "queue_ms": ("float", "Wait for the limits, in ms"),
    "upstream_ms": ("float", "Call of the provider, in ms"),
    "first_byte_ms": ("float", "Until the first byte of the answer's body, in ms"),
    "input_tokens": ("int", "Tokens, the cached ones included; null: not known"),
    "output_tokens": ("int", "Tokens, without thoughts"),
    "thoughts_tokens": ("int", "Tokens"),
    "cached_tokens": ("int", "Tokens of the input that came from the provider's cache"),
    "total_tokens": ("int", "Tokens, as the provider counted them"),
    "cache_write_tokens": ("int", "Tokens of the input that were written to the cache"),
    "input_audio_tokens": ("int", "Tokens"),
    "input_image_tokens": ("int", "Tokens"),
    "input_video_tokens": ("int", "Tokens"),
    "output_audio_tokens": ("int", "Tokens"),
    "output_image_tokens": ("int", "Tokens"),
    "output_video_tokens": ("int", "Tokens"),
    "searches": ("int", "Searches of the web by the provider"),
    "images": ("int", "Images made"),
    "cost_micros": ("int", "Cost in millionths of a US dollar; null: no price is known"),
    "provider_cost_micros": ("int", "What the provider itself charged, in the same unit"),
    "usage_state": ("text", "told, partial, estimated, unknown, none: docs/accounting.md"),
    "finish_reason": ("text", "Why the answer ended, in the provider's words"),
    "error_code": ("text", "Code of the failure: docs/errors.md"),
    "error_message": ("text", "Message of the failure"),
    "conversation": ("text", "Conversation of the call"),
    "trace_id": ("text", "W3C trace, 32 hexadecimal digits"),
    "response_id": ("text", "Id that the provider gave its answer"),
}
EXPORTED_BODIES: Mapping[str, tuple[str, str]] = {
    "request_body": ("text", "Body of the request as it is kept; null: none is"),
    "response_body": ("text", "Body of the answer as it is kept; null: none is"),
}


@dataclass(frozen=True, slots=True)
class ExportedDay:
    """An exported file, by its key in the blob store."""

    day: date
    key: str
    calls: int
    size_bytes: int


def export_record(
    config: Config,
    days: tuple[date, date] | None,
    file_format: ExportFormat,
    *,
    with_bodies: bool = False,
) -> list[ExportedDay]:
    """Export the record of each of these days into a file of the blob store. Without `days`, export
    each past day that has no file yet, or whose record has changed since its file was written. Days
    that are not on record, or no longer, are left out: they keep their files.

    Raises ConfigError if the format needs a package that is not installed, and StoreUnavailable;
    files of earlier days are written then. A day's file is written as a whole, and a repeat
    replaces it.
    """
    from tidegate.store.blobs import Blobs

    if file_format == "parquet":
        _pyarrow()
    make_folders(config, "tmp")
    blobs = Blobs.from_url(config.blob_url, config.data_dir)
    folder = config.data_dir / "tmp"

    async def work(connections: Connections) -> list[ExportedDay]:
        export = RecordExport(
            connections,
            blobs,
            folder,
            file_format,
            with_bodies=with_bodies,
            retention_days=config.retention_days,
        )
        chosen = await (export.due() if days is None else export.on_record(*days))
        return [await export.write(day) for day in chosen]

    return with_record(config, work)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        allowed = "needs pyarrow: pip install 'tidegate[export]', or use jsonl"
        raise ConfigError("format", "parquet", allowed) from None
    return pyarrow


@dataclass(frozen=True, slots=True)
class _Expired:
    """The tenants for which a day has expired, and how often each tenant's calls were erased."""

    cutoffs: Cutoffs
    erased: Mapping[str | None, int]

    def erasures(self, day: date) -> int:
        """Return the number of erasures that change only a day's file: of calls that may be nowhere
        else."""
        if day >= self.cutoffs.last_due:
            return 0
        return sum(
            count
            for tenant, count in self.erased.items()
            if tenant is None or self.cutoffs.is_over(tenant, day)
        )


class RecordExport:
    """Files of the record by day. A day's file has the calls that were recorded for that UTC day:
    native calls and streams by their receipt, jobs by their end.

    If a call is added, corrected or erased while its day is written, the day is written again.
    Calls of a day that has expired for their tenant are copied from the previous file, unless they
    were erased.
    """

    def __init__(
        self,
        connections: Connections,
        blobs: Blobs,
        folder: Path,
        file_format: ExportFormat,
        *,
        with_bodies: bool = False,
        retention_days: int = 30,
    ) -> None:
        """folder: of the file while it is written."""
        self._record, self._blobs = RecordByDay(connections, blobs), blobs
        self._folder, self._format = folder, file_format
        self._columns = {**EXPORTED, **(EXPORTED_BODIES if with_bodies else {})}
        self._with_bodies, self._retention_days = with_bodies, retention_days

    def key_of(self, day: date) -> str:
        """Return the key of a day's file in the blob store."""
        return f"{_EXPORTS}/day={day}/{_FILES[self._format]}"

    async def due(self) -> list[date]:
        """Return the past days without a file, or whose record has changed since."""
        written = await self._blobs.written(_EXPORTS)
        states = await self._blobs.written(_STATES)
        expired = await self._expired()
        return [
            one.day
            for one in await self._record.days()
            if self._is_due(one, written, states, expired.erasures(one.day))
        ]

    async def on_record(self, first: date, last: date) -> list[date]:
        """Return the past days on record from `first` to `last`."""
        return [one.day for one in await self._record.days() if first <= one.day <= last]

    def _is_due(
        self,
        one: RecordDay,
        written: Mapping[str, datetime],
        states: Collection[str],
        erasures: int,
    ) -> bool:
        at = written.get(self.key_of(one.day))
        if at is None or one.has_changed:
            return True
        folder = self._states_of(one.day)
        if _state_key(folder, one.summed_at, erasures) in states:
            return False
        if any(state.startswith(folder) for state in states):
            return True
        return one.summed_at is not None and at < one.summed_at

    def _states_of(self, day: date) -> str:
        return f"{_STATES}/day={day}/{_FILES[self._format]}/"

    async def _expired(self) -> _Expired:
        cutoffs = await self._record.cutoffs(self._retention_days)
        return _Expired(cutoffs, await self._record.erasures())

    async def _note_state(self, day: date, summed_at: datetime | None, erasures: int) -> None:
        folder = self._states_of(day)
        key = _state_key(folder, summed_at, erasures)
        await self._blobs.put(key, b"")
        await self._blobs.delete((await self._blobs.written(folder.rstrip("/"))).keys() - {key})

    async def write(self, day: date) -> ExportedDay:
        """Write a day's file. If this raises StoreUnavailable, the previous file is unchanged.
        Cancellation leaves either the previous or the complete new file."""
        path = self._folder / f"{PREFIX}export-{new_id()}"
        before, key = path.with_name(f"{path.name}-before"), self.key_of(day)
        for _ in range(_MOST_TRIES):
            state, expired = await self._record.state(day), await self._expired()
            try:
                for file in (path, before):  # each is then opened as it is
                    file.touch(mode=0o600, exist_ok=False)
                calls = await self._fill(path, before, day, expired.cutoffs)
                size_bytes = path.stat().st_size
                await self._blobs.put(key, path)
            finally:
                path.unlink(missing_ok=True)
                before.unlink(missing_ok=True)
            if await self._record.state(day) == state:
                await self._note_state(day, state[1], expired.erasures(day))
                get_logger().info(Log.RECORD_EXPORTED, day=f"{day}", key=key, calls=calls)
                return ExportedDay(day, key, calls, size_bytes)
        raise StoreUnavailable(f"the record of {day} changed {_MOST_TRIES} times while it was read")

    async def _fill(self, path: Path, before: Path, day: date, cutoffs: Cutoffs) -> int:
        calls, tenants = 0, set[str]()
        has_before = await self._copy(day, before)

        def is_of_before(tenant: str) -> bool:
            """Return whether a tenant's calls are taken from the previous file and not from the
            record, where an interrupted run of prune may have left only some."""
            return has_before and (cutoffs.is_over(tenant, day) or tenant not in tenants)

        with _file_of(self._format, path, self._columns) as add:

            async def put(page: list[dict[str, Any]]) -> int:
                rows = [{name: one.get(name) for name in self._columns} for one in page]
                await asyncio.to_thread(add, rows)
                return len(rows)

            async for page in self._record.calls(day, with_bodies=self._with_bodies):
                tenants |= {one["tenant"] for one in page}
                calls += await put([one for one in page if not is_of_before(one["tenant"])])
            pages = _rows_in(self._format, before) if has_before else iter(())
            try:
                while (page := await asyncio.to_thread(next, pages, [])) != []:
                    old = [one for one in page if is_of_before(one["tenant"])]
                    calls += await put(await self._record.unerased(old)) if old else 0
            except (OSError, EOFError, ValueError, zlib.error) as broken:
                if day < cutoffs.last_due:
                    problem = (
                        f"{self.key_of(day)}, which alone may have calls of the day, can't be read"
                    )
                    raise StoreUnavailable(f"{problem}: {broken}; move it elsewhere") from broken
        return calls

    async def _copy(self, day: date, path: Path) -> bool:
        """Copy the current file of a day, and return whether there is one."""
        try:
            with path.open("wb") as file:
                async for piece in self._blobs.stream(self.key_of(day)):
                    file.write(piece)
        except NotFound:
            return False
        return True


def _rows_in(file_format: ExportFormat, path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the calls in a file, page by page."""
    if file_format == "parquet":
        for batch in _pyarrow().parquet.ParquetFile(path).iter_batches(_PAGE_ROWS):
            yield batch.to_pylist()
        return
    with GzipFile(path) as lines:
        while some := list(islice(lines, _PAGE_ROWS)):
            yield [orjson.loads(line) for line in some]


def _state_key(folder: str, summed_at: datetime | None, erasures: int) -> str:
    summed = "new" if summed_at is None else f"{summed_at.astimezone(UTC):%Y%m%dT%H%M%S.%f}"
    return f"{folder}{summed}-{erasures}" if erasures else f"{folder}{summed}"


@contextmanager
def _file_of(
    file_format: ExportFormat, path: Path, columns: Mapping[str, tuple[str, str]]
) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yield a function that adds rows to a new file, which is complete when the block ends."""
    if file_format == "parquet":
        file = _ParquetFile(path, columns)
        yield file.add
        file.close()
        return
    # Without a name and a time in the file: the same rows give the same bytes.
    with path.open("wb") as raw, GzipFile("", "wb", 6, raw, mtime=0) as lines:
        yield lambda rows: lines.writelines(
            orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows
        )


class _ParquetFile:
    """A Parquet file that is written by row groups; at most one group is in memory."""

    def __init__(self, path: Path, columns: Mapping[str, tuple[str, str]]) -> None:
        self._arrow = arrow = _pyarrow()
        types = {
            "text": arrow.string(),
            "int": arrow.int64(),
            "float": arrow.float64(),
            "bool": arrow.bool_(),
            "time": arrow.timestamp("us", tz="UTC"),
        }
        self._schema = arrow.schema(
            [
                arrow.field(name, types[kind], metadata={"description": text})
                for name, (kind, text) in columns.items()
            ]
        )
        self._writer = arrow.parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._waiting: list[Any] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._waiting.append(self._arrow.RecordBatch.from_pylist(rows, schema=self._schema))
        size_bytes = sum(one.nbytes for one in self._waiting)
        if size_bytes >= _GROUP_BYTES or sum(map(len, self._waiting)) >= _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            table = self._arrow.Table.from_batches(self._waiting, schema=self._schema)
            self._writer.write_table(table, row_group_size=len(table))
            self._waiting = []
