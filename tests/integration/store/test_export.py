"""Files of the record for a warehouse: what they hold, and what becomes of them in the middle."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pyarrow
import pyarrow.parquet
import pytest

from tests.integration.store.conftest import MakeStore
from tests.waiting import wait_until
from tidegate.call import Answer, Charge, Usage, UsageDetails, UsageState, new_id
from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.record import CallRecord, Failure
from tidegate.settings import load
from tidegate.store import database as partitions
from tidegate.store.blobs import Blobs
from tidegate.store.retention import Whose
from tidegate.store.store import Store
from tidegate.supervisor import maintenance
from tidegate.supervisor.maintenance import (
    EXPORTED,
    EXPORTED_BODIES,
    ExportFormat,
    RecordExport,
)
from tidegate.supervisor.supervisor import DailyWork, run_command

ROOT = Path(__file__).parents[3]
NOON = time(12, tzinfo=UTC)


def yesterday() -> date:
    """The last day that may be summed up, which the one before is not until ten past midnight."""
    return (datetime.now(UTC) - timedelta(days=1, minutes=11)).date()


def call(at: datetime, subject: str, **changes: Any) -> CallRecord:
    usage = Usage(5, 9, 2, 1, 17, UsageDetails(searches=3))
    values: dict[str, Any] = {
        "source": "relay",
        "request_id": new_id(),
        "tenant_id": "acme",
        "pool": "gemini",
        "endpoint": "/v1/chat/completions",
        "status": "succeeded",
        "http_status": 200,
        "received_at": at,
        "finished_at": at + timedelta(seconds=2),
        "subject": subject,
        "key_id": "k1",
        "request": b'{"what": "was asked"}',
        "pieces": [b'{"what": "was answered"}'],
        "answer_bytes": 24,
        "model": "m",
        "charge": Charge(UsageState.TOLD, usage, None, 100),
        "answer": Answer(model_version="m-9"),
    }
    return CallRecord(**{**values, **changes})


@pytest.fixture
async def day(store: Store, peek: asyncpg.Connection) -> date:
    """Yesterday, with two calls of ann and one of bob that failed."""
    noon = datetime.combine(yesterday(), NOON)
    async with peek.transaction():
        await partitions._make(peek, "audit", noon.date())
        await partitions._make(peek, "bodies", noon.date())
    store.audit.put(call(noon, "ann"))
    store.audit.put(call(noon + timedelta(hours=11, minutes=59), "ann", streamed=True))
    failed = Failure("upstream_error", "it failed")
    store.audit.put(call(noon, "bob", status="failed", http_status=502, failure=failed))
    store.audit.put(call(datetime.now(UTC), "of another day"))
    await wait_until(lambda: peek.fetchval("SELECT count(*) = 4 FROM audit"), 20)
    return noon.date()


def export(store: Store, folder: Path, file_format: ExportFormat, **options: Any) -> RecordExport:
    return RecordExport(store.connections, store.blobs, folder, file_format, **options)


def rows_in(data: bytes, file_format: ExportFormat) -> list[dict[str, Any]]:
    """As JSON has them, the first column's order."""
    if file_format == "jsonl":
        rows = [orjson.loads(line) for line in gzip.decompress(data).splitlines()]
    else:
        found = pyarrow.parquet.read_table(BytesIO(data)).to_pylist()
        rows = orjson.loads(orjson.dumps(found))
    return sorted(rows, key=lambda row: (row["subject"], row["finished_at"]))


async def test_a_day_is_read_back_from_jsonl_and_parquet_alike(
    store: Store, day: date, tmp_path: Path
) -> None:
    (tmp_path / "growing").mkdir()
    read: dict[str, list[dict[str, Any]]] = {}
    for file_format in ("jsonl", "parquet"):
        files = export(store, tmp_path / "growing", file_format)
        one = await files.write(day)
        assert one.calls == 3
        data = await store.blobs.get(one.key)
        assert len(data) == one.size_bytes
        read[file_format] = rows_in(data, file_format)
        assert (await files.write(day)).key == one.key
        if file_format == "jsonl":
            assert await store.blobs.get(one.key) == data  # the same rows, the same bytes
    assert read["jsonl"] == read["parquet"]
    first, _, bobs = read["jsonl"]
    assert tuple(first) == tuple(EXPORTED)
    assert (first["tenant"], first["key"], first["subject"]) == ("acme", "k1", "ann")
    assert (first["model"], first["model_version"], first["upstream"]) == ("m", "m-9", "gemini")
    assert (first["input_tokens"], first["searches"], first["cost_micros"]) == (5, 3, 100)
    assert first["submitted_at"] == f"{day}T12:00:00+00:00"
    assert (bobs["status"], bobs["error_code"], bobs["streamed"]) == (
        *("failed", "upstream_error"),
        False,
    )
    assert "asked" not in orjson.dumps(read).decode()
    assert not os.listdir(tmp_path / "growing")
    assert "exports" not in await store.blobs.days()

    file = export(store, tmp_path, "parquet").key_of(day)
    schema = pyarrow.parquet.read_schema(BytesIO(await store.blobs.get(file)))
    assert schema.names == list(EXPORTED)
    assert schema.field("queue_ms").type == pyarrow.float64()
    assert schema.field("finished_at").type == pyarrow.timestamp("us", tz="UTC")
    assert b"millionths" in schema.field("cost_micros").metadata[b"description"]


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
async def test_no_other_user_reads_a_file_while_it_is_written(
    store: Store,
    day: date,
    tmp_path: Path,
    file_format: ExportFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any user of the machine may list the folder, if an earlier version has made it."""
    written, put = list[int](), store.blobs.put
    await export(store, tmp_path, file_format).write(day)

    async def noted(key: str, data: Path | bytes) -> None:
        written.extend(one.stat().st_mode & 0o777 for one in os.scandir(tmp_path))
        await put(key, data)

    monkeypatch.setattr(store.blobs, "put", noted)
    before = os.umask(0o022)
    try:
        await export(store, tmp_path, file_format).write(day)
    finally:
        os.umask(before)
    assert written[:2] == [0o600, 0o600], "the file, and that of before"


async def test_bodies_are_in_a_file_only_where_they_are_asked_for(
    store: Store, day: date, tmp_path: Path
) -> None:
    one = await export(store, tmp_path, "parquet", with_bodies=True).write(day)
    first, *_ = rows_in(await store.blobs.get(one.key), "parquet")
    assert tuple(first) == (*EXPORTED, *EXPORTED_BODIES)
    assert first["request_body"] == '{"what": "was asked"}'
    assert first["response_body"] == '{"what": "was answered"}'


async def test_who_is_erased_leaves_the_file_with_the_next_export(
    store: Store, day: date, tmp_path: Path
) -> None:
    files = export(store, tmp_path, "jsonl")
    assert await files.due() == [day]
    await store.usage.sum_days()
    one = await files.write(day)
    assert await files.due() == []
    await store.retention.erase(Whose("acme", "ann"))
    assert await files.due() == [day]
    await store.usage.sum_days()  # takes the mark; the file is older than the sums
    assert await files.due() == [day]
    await files.write(day)
    assert [row["subject"] for row in rows_in(await store.blobs.get(one.key), "jsonl")] == ["bob"]


@pytest.mark.parametrize("tenant", ["acme", None])
async def test_who_is_erased_leaves_the_file_that_alone_has_their_calls(
    store: Store, day: date, peek: asyncpg.Connection, tmp_path: Path, tenant: str | None
) -> None:
    files = export(store, tmp_path, "jsonl", retention_days=0)
    one = await files.write(day)
    await peek.execute("DELETE FROM audit WHERE tenant_id = 'acme'")
    await store.usage.sum_days()
    await files.write(day)
    assert await files.due() == []
    await store.retention.erase(Whose(tenant, "ann"))
    assert await files.due() == [day], "no row of the day has changed"
    assert await export(store, tmp_path, "jsonl").due() == [], "where no tenant's day has expired"
    await files.write(day)
    assert [row["subject"] for row in rows_in(await store.blobs.get(one.key), "jsonl")] == ["bob"]
    assert await files.due() == []


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
async def test_a_day_that_others_keep_loses_no_call_to_their_retention(
    store: Store, day: date, peek: asyncpg.Connection, tmp_path: Path, file_format: ExportFormat
) -> None:
    store.audit.put(call(datetime.combine(day, NOON), "cid", tenant_id="long"))
    await wait_until(lambda: peek.fetchval("SELECT count(*) = 5 FROM audit"), 20)
    files = export(store, tmp_path, file_format)
    first = await files.write(day)
    whole = rows_in(await store.blobs.get(first.key), file_format)
    assert [row["subject"] for row in whole] == ["ann", "ann", "bob", "cid"]
    # As far as a run of prune comes that is cut off, and then as its end leaves it.
    for gone, left in (("subject = 'bob'", whole), ("tenant_id = 'acme'", whole)):
        await peek.execute(f"DELETE FROM audit WHERE {gone}")
        await export(store, tmp_path, file_format, retention_days=0).write(day)
        assert rows_in(await store.blobs.get(first.key), file_format) == left
    assert (await files.write(day)).calls == 4  # also where its tenant's days are unknown
    await store.retention.erase(Whose("acme", "ann"))
    await files.write(day)
    assert rows_in(await store.blobs.get(first.key), file_format) == whole[2:]
    await store.blobs.put(first.key, b"no such file")
    with pytest.raises(StoreUnavailable, match="which alone may have calls of the day"):
        await export(store, tmp_path, file_format, retention_days=0).write(day)
    assert await store.blobs.get(first.key) == b"no such file"
    assert not await asyncio.to_thread(lambda: [*tmp_path.glob("*before*")])


async def test_a_day_without_a_partition_of_its_own_has_a_file_too(
    store: Store, day: date, peek: asyncpg.Connection, tmp_path: Path
) -> None:
    """Its calls are in the default partition, as where no process could make one in time."""
    first, between, before = (day - timedelta(days=days) for days in (4, 2, 6))
    async with peek.transaction():
        await partitions._make(peek, "audit", first)
    for at in (between, before):  # of the earlier one the partition was deleted
        store.audit.put(call(datetime.combine(at, NOON), "late"))
    await wait_until(lambda: peek.fetchval("SELECT count(*) >= 2 FROM audit_default"), 20)
    files = export(store, tmp_path, "jsonl")
    assert await files.due() == [first, between, day]
    assert (await files.write(between)).calls == 1


async def test_a_bucket_whose_clock_is_ahead_hides_no_change(
    store: Store, day: date, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, written = export(store, tmp_path, "jsonl"), store.blobs.written

    async def ahead(folder: str) -> dict[str, datetime]:
        return {key: at + timedelta(hours=1) for key, at in (await written(folder)).items()}

    monkeypatch.setattr(store.blobs, "written", ahead)
    await store.usage.sum_days()
    for whose in ("ann", "bob"):
        await files.write(day)
        assert await files.due() == []
        await store.retention.erase(Whose("acme", whose))
        await store.usage.sum_days()
        assert await files.due() == [day]
    await files.write(day)
    assert await files.due() == []
    assert len(await written("exports/states")) == 1
    assert await export(store, tmp_path, "parquet").due() == [day]


async def test_a_change_while_a_day_is_written_has_it_written_again(
    store: Store, day: date, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, put = export(store, tmp_path, "jsonl"), store.blobs.put
    puts: list[str] = []

    async def erased_meanwhile(key: str, source: bytes | Path) -> None:
        if not puts:
            await store.retention.erase(Whose("acme", "ann"))
        puts.append(key)
        await put(key, source)

    monkeypatch.setattr(store.blobs, "put", erased_meanwhile)
    assert (await files.write(day)).calls == 1
    assert puts.count(files.key_of(day)) == 2


@pytest.mark.parametrize(
    ("setting", "options", "file"),
    [
        ("off", (), "calls.jsonl.gz"),
        ("parquet", (), "calls.parquet"),
        ("parquet", ("--format", "jsonl"), "calls.jsonl.gz"),
    ],
)
async def test_the_format_of_the_command_is_that_of_the_setting(
    store: Store,
    day: date,
    database_url: str,
    tmp_path: Path,
    setting: str,
    options: tuple[str, ...],
    file: str,
) -> None:
    environment = environment_of(database_url, tmp_path) | {"RECORD_EXPORT": setting}
    command = ("export", "record", "--from", f"{day}", "--to", f"{day}", "--json", *options)
    exporting = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tidegate", *command), env=environment, stdout=subprocess.PIPE
    )
    said, _ = await exporting.communicate()
    assert exporting.returncode == 0
    (made,) = orjson.loads(said)
    assert Path(made["key"]).name == file
    assert await Blobs.from_url("", tmp_path).written("exports") != {}


async def test_days_that_have_left_the_record_keep_their_files(
    store: Store, day: date, database_url: str, tmp_path: Path
) -> None:
    blobs = Blobs.from_url("", tmp_path)
    gone = day - timedelta(days=40)
    key = export(store, tmp_path, "jsonl").key_of(gone)
    await blobs.put(key, b"the file of before")
    config = load(environment_of(database_url, tmp_path), dotenv=None)
    made = await asyncio.to_thread(maintenance.export_record, config, (gone, day), "jsonl")
    assert [one.day for one in made] == [day]
    assert await blobs.get(key) == b"the file of before"


def environment_of(database_url: str, data_dir: Path) -> dict[str, str]:
    return {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "DATABASE_URL": database_url,
        "DATA_DIR": str(data_dir),
        "GEMINI_API_KEY": "test",
        "REDIS_URL": "redis://127.0.0.1:1",
        "PYTHONPATH": "src",
    }


async def test_an_export_that_is_killed_leaves_the_file_of_before(
    store: Store,
    day: date,
    database_url: str,
    peek: asyncpg.Connection,
    tmp_path: Path,
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    environment = environment_of(database_url, data_dir)
    command = ("export", "record", "--from", f"{day}", "--to", f"{day}", "--bodies")
    blobs = Blobs.from_url("", data_dir)
    key = export(store, tmp_path, "jsonl").key_of(day)

    def begun() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "tidegate", *command], env=environment)

    def is_growing() -> bool:
        return bool(list((data_dir / "tmp").glob("upload-export-*")))

    for before in (None, b"the file of before"):
        if before is not None:
            await blobs.put(key, before)
        async with peek.transaction():
            await peek.execute("LOCK TABLE bodies IN ACCESS EXCLUSIVE MODE")
            exporting = begun()
            await wait_until(is_growing, 60)
            exporting.send_signal(signal.SIGKILL)
            exporting.wait(30)
        if before is None:
            assert await blobs.written("exports") == {}
        else:
            assert await blobs.get(key) == before
        for left in (data_dir / "tmp").glob("upload-export-*"):
            left.unlink()
    assert await run_command(command, environment) == 0
    rows = rows_in(await blobs.get(key), "jsonl")
    assert [row["subject"] for row in rows] == ["ann", "ann", "bob"]


def test_the_columns_are_documented() -> None:
    page = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
    for name, (_, text) in {**EXPORTED, **EXPORTED_BODIES}.items():
        assert re.search(rf"^\| `{name}` \| [^|]+ \| {re.escape(text)} \|$", page, re.MULTILINE), (
            name
        )


def test_parquet_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"tidegate\[export\]"):
        maintenance._pyarrow()


async def test_daily_work_prunes_once_a_day_and_tries_again_what_failed(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection, tmp_path: Path
) -> None:
    store = await make_store(database_url)
    old = datetime.now(UTC) - timedelta(days=40)
    store.audit.put(call(old, "ann"))
    await wait_until(lambda: peek.fetchval("SELECT count(*) = 1 FROM audit"), 20)
    now = datetime(2026, 11, 29, 2, 59, tzinfo=UTC)
    ran: list[tuple[str, ...]] = []
    environment: Mapping[str, str] = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "DATABASE_URL": "postgresql://127.0.0.1:1/nobody",
        "DATA_DIR": str(tmp_path),
        "REDIS_URL": "redis://127.0.0.1:1",
        "PYTHONPATH": "src",
        "GEMINI_API_KEY": "test",
    }

    async def run(command: tuple[str, ...]) -> int:
        ran.append(command)
        return await run_command(command, environment)

    daily = DailyWork(lambda: [("prune",)], run, now=lambda: now)
    await daily.run_due()
    assert ran == []
    now += timedelta(minutes=1)
    await daily.run_due()  # PostgreSQL is not where it is expected
    assert len(ran) == 1
    environment = {**environment, "DATABASE_URL": database_url}
    await daily.run_due()
    assert len(ran) == 2
    assert await peek.fetchval("SELECT count(*) FROM audit") == 0
    await daily.run_due()
    assert len(ran) == 2
    now += timedelta(days=1)
    await daily.run_due()
    assert len(ran) == 3
