"""Maintenance of the record by commands: prune, erase, requeue, reconcile, backup and restore.

Backup and restore are those of PostgreSQL's own `pg_dump` and `pg_restore`.

Invariants: a file with the wanted name is a whole dump, and from its first byte on nobody but its
owner can read it; a restore goes into a database that has no tables of ours, and is all there or
nothing of it. Passwords reach the programs by their environment, never by their arguments.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

from tidegate.embedded import servers as place
from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.policy.deployment import deployed_upstreams
from tidegate.settings import Config, secret
from tidegate.store.database import revision_at, settle_restored
from tidegate.supervisor.services import database_url_of, prepared, with_record
from tidegate.telemetry.logging import Log, get_logger

if TYPE_CHECKING:
    from datetime import date

    from tidegate.jobs.reconciliation import ReconcileReport
    from tidegate.store.database import Connections
    from tidegate.store.jobs import Requeue, RequeueReport
    from tidegate.store.retention import EraseReport, PruneReport, Retention, Whose

# How pg_restore complains of the file and not of the server.
_NO_WHOLE_DUMP = ("input file", "valid archive")


def prune(config: Config, days: int | None) -> PruneReport:
    """Delete what ended more than `days` (or RETENTION_DAYS) ago, and the parts of uploads that
    processes left on this machine when they were killed."""
    from tidegate.http.body import remove_leftovers

    async def work(connections: Connections) -> PruneReport:
        await asyncio.to_thread(remove_leftovers, config.data_dir / "tmp")
        retention = _retention(config, connections)
        return await retention.prune(days or config.retention_days, config.operator_log_days)

    return with_record(config, work)


def erase(config: Config, whose: Whose, *, dry_run: bool) -> EraseReport:
    """Erase all of a subject or tenant, or only count it."""

    async def work(connections: Connections) -> EraseReport:
        return await _retention(config, connections).erase(whose, dry_run=dry_run)

    return with_record(config, work)


def reconcile(
    config: Config, provider: str, upstream: str | None, day: date, *, dry_run: bool
) -> ReconcileReport:
    """Compare a day's record with what the provider counts and charges; with `dry_run` nothing is
    corrected or kept. Raises ConfigError, UpstreamError and StoreUnavailable."""
    from tidegate.jobs import reconciliation
    from tidegate.store.statistics import Reconciliations
    from tidegate.upstream.transport import RelayWire
    from tidegate.upstream.usage_api import USAGE_TIMEOUTS

    name = reconciliation.usage_provider(provider)
    found = reconciliation.upstream_of(deployed_upstreams(config), name, upstream)
    account = reconciliation.account_of(found, name, secret)

    async def work(connections: Connections) -> ReconcileReport:
        wire = RelayWire(USAGE_TIMEOUTS)
        await wire.start()
        try:
            record = Reconciliations(connections)
            return await reconciliation.reconcile(
                record, wire, found, account, day, dry_run=dry_run
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
    """Write the record into a new `file`; its size in bytes. Processes may go on meanwhile.

    Raises ConfigError for a file that is there or cannot be, and StoreUnavailable where it failed.
    """
    if file.exists():
        raise ConfigError(str(file), None, "exists already; nothing is overwritten")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise ConfigError(str(file), None, "must be in an existing, writable folder")
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)  # of a run that was cut short
    try:
        # Made here, since pg_dump would make it as the umask says: it is all prompts and answers.
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as failed:
        raise ConfigError(str(partial), None, f"can't be created: {failed.strerror}") from None
    with prepared(config, only={"postgres"}) as ground:
        url = database_url_of(ground.config)
        _run(_program("pg_dump", config), url, "--format=custom", f"--file={partial.resolve()}")
    partial.rename(file)
    return file.stat().st_size


def restore(config: Config, file: Path) -> None:
    """Fill an empty database from a file of `back_up`.

    Raises ConfigError for a file that is no whole dump or a database that is not empty, and
    StoreUnavailable where it failed; the database is then as empty as before.
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
    """The bundled one for the bundled server, whose version it has; else that of the system."""
    if config.embedded:
        return str(place.binaries_of(None) / name)
    found = shutil.which(name)
    if found is None:
        raise ConfigError(name, None, "is not in PATH: install PostgreSQL's client programs")
    return found


def _run(program: str, url: str, *options: str) -> None:
    parts = urlsplit(url)
    environment = dict(os.environ)
    if parts.password:
        environment["PGPASSWORD"] = unquote(parts.password)
        user, _, place_of = parts.netloc.rpartition("@")
        parts = parts._replace(netloc=f"{user.partition(':')[0]}@{place_of}")
    command = [program, *options[:-1], f"--dbname={urlunsplit(parts)}", options[-1]]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise StoreUnavailable(f"{Path(program).name} failed: {said}")
