"""Erasing leaves nothing of a subject or a tenant: not in a table, a blob, or on a disk."""

from __future__ import annotations

import asyncio
import zlib
from base64 import b64encode
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from os import urandom
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import pytest

from tests.gateway import PNG, Gateway, Opener
from tests.integration.tenants.asking import ask
from tests.waiting import wait_until
from tests.zones import set_clock
from tidegate.call import new_id
from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.http import native, stream
from tidegate.store import audit
from tidegate.store.audit import ENCODING
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.database import Connections
from tidegate.store.records import Json
from tidegate.store.retention import EraseReport, Retention, Whose
from tidegate.store.spill import Spill
from tidegate.store.store import Store

SECRET = "Rumpelstiltskin"
SUBJECT = "patient-4711"
RECORDED = "SELECT request_id FROM audit"
TABLES = (
    "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
)


def long_text() -> str:
    """What does not get small, so that its body goes to the blobs."""
    return SECRET + b64encode(urandom(30_000)).decode()


async def called_chat(gateway: Gateway, text: str, **headers: str) -> str:
    """The id of a native call that was answered."""
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    url = f"{gateway.url}/v1/chat/completions"
    async with gateway.http.post(url, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        await response.read()
        return response.headers["x-tidegate-request-id"]


async def traces(gateway: Gateway, text: str) -> set[str]:
    """Where `text` is to be found, packed or not."""
    found = set()
    for row in await gateway.database.fetch(TABLES):
        table = row["relname"]
        count = await gateway.database.fetchval(
            f"SELECT count(*) FROM {table} t WHERE t::text LIKE '%' || $1 || '%'", text
        )
        if count:
            found.add(table)
        if table.startswith(("bodies", "native_keys")):
            column = "data" if table.startswith("bodies") else "answer"
            packed = await gateway.database.fetch(f"SELECT {column} AS data FROM {table}")
            found |= {table for one in packed if one["data"] and text in unpacked(one["data"])}
    return found | ({"disk"} if is_on_disk(gateway.config.data_dir, text) else set())


def is_on_disk(folder: Path, text: str) -> bool:
    files = (path for path in folder.rglob("*") if path.is_file())
    return any(text in unpacked(path.read_bytes()) for path in files)


def unpacked(data: bytes) -> str:
    with suppress(zlib.error):
        data = zlib.decompress(data)
    return data.decode("utf-8", "replace")


async def everything(gateway: Gateway, subject: str | None, text: str) -> list[str]:
    """One of each sort of request about `subject`; what is on record names `text`."""
    given = {} if subject is None else {"subject": subject}
    job = await gateway.submit(data=text, type="multi_modal", file=PNG + text.encode(), **given)
    await gateway.end_of(job)
    stream = await gateway.stream(data=text, type="text_only", **given)
    headers = {} if subject is None else {"x-tidegate-subject": subject}
    keyed = headers | {"Idempotency-Key": f"{text}-{new_id()}"[-60:]}
    native = [await called_chat(gateway, text, **each) for each in (headers, keyed)]
    ids = [job, stream.request_id, *native]
    for request_id in ids:
        await gateway.audit(request_id)
    return ids


async def test_nothing_of_a_subject_is_left_and_all_of_others(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    ids = await everything(gateway, SUBJECT, SECRET)
    ids += await everything(gateway, SUBJECT, long_text())
    others = await everything(gateway, "another", "Kunigunde")
    others += await everything(gateway, None, "Kunigunde")
    assert {"requests", "disk"} <= await traces(gateway, SECRET)
    before = await gateway.services.store.usage.totals((), *_today())
    path = f"/admin/subjects/{SUBJECT}"
    _, counted = await ask(gateway, "DELETE", f"{path}?dry_run=true", {})
    assert (counted["requests"], counted["calls"], counted["done"]) == (4, 8, False)
    assert await traces(gateway, SECRET)
    _, report = await ask(gateway, "DELETE", path, {})
    assert report["done"]
    assert (report["requests"], report["calls"], report["answers"]) == (4, 8, 2)
    assert await traces(gateway, SECRET) == await traces(gateway, SUBJECT) == set()
    for request_id in ids:
        assert (await gateway.get(f"/status/{request_id}"))[0] == 404
    for request_id in others:
        assert (await gateway.get(f"/status/{request_id}"))[0] == 200
    assert await gateway.services.store.usage.totals((), *_today()) == before
    # Whoever is erased may come again.
    again = await gateway.submit(data="I am back", subject=SUBJECT, type="text_only")
    assert (await gateway.end_of(again))["status"] == "succeeded"
    _, report = await ask(gateway, "DELETE", f"{path}?tenant=somebody-else", {})
    assert (report["requests"], report["calls"]) == (0, 0)


async def test_a_queued_and_a_running_job_are_erased_with_what_they_bring(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1})
    await gateway.upstream.set_behaviour(first_byte_ms=1_500)
    for _ in range(2):
        await gateway.submit(data=f"{SECRET}?", type="text_only", subject=SUBJECT)
    await gateway.in_flight(1)
    about = {"x-tidegate-subject": SUBJECT}
    call = asyncio.create_task(called_chat(gateway, SECRET, **about))
    await wait_until(lambda: gateway.waiting >= 1, 20, "a call that waits")
    _, report = await ask(gateway, "DELETE", f"/admin/subjects/{SUBJECT}", {})
    assert (report["requests"], report["calls"]) == (2, 0)
    assert await call
    await gateway.in_flight(0)
    await gateway.submit(data="Another", type="text_only")
    await wait_until(
        lambda: gateway.database.fetchval("SELECT count(*) = 1 FROM audit"), 20, "the last record"
    )
    assert await traces(gateway, SECRET) == set()


async def test_a_whole_tenant_is_erased(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    acme = {"x-tidegate-tenant": "acme"}
    for headers, text in ((acme, SECRET), ({}, "Kunigunde")):
        await called_chat(gateway, text, **headers)
    await wait_until(lambda: gateway.database.fetchval("SELECT count(*) = 2 FROM audit"), 20)
    report = await gateway.services.store.retention.erase(Whose("acme"), dry_run=False, within_s=20)
    assert (report.calls, report.done) == (1, True)
    assert await traces(gateway, SECRET) == set()
    assert await gateway.database.fetchval("SELECT count(*) FROM audit") == 1


async def test_a_run_that_was_cut_short_is_taken_up_again(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await called_chat(gateway, SECRET, **{"x-tidegate-subject": SUBJECT})
    await wait_until(lambda: gateway.database.fetchval("SELECT count(*) = 1 FROM audit"), 20)
    store = gateway.services.store
    cut = await store.retention.erase(Whose(None, SUBJECT), dry_run=False, within_s=0)
    assert (cut.calls, cut.done) == (0, False)
    whole = await store.retention.erase(Whose(None, SUBJECT), dry_run=False, within_s=20)
    assert (whole.calls, whole.done) == (1, True)


async def erase(url: str, folder: Path, whose: Whose) -> EraseReport:
    connections = Connections(url)
    connections.start()
    try:
        blobs = Blobs.from_url("", folder)
        return await Retention(connections, blobs, folder / "spill").erase(whose)
    finally:
        await connections.aclose()


async def spilled(gateway: Gateway, folder: Path) -> dict[str, str]:
    """What a process of another host left on its disk, of a call about the subject and another.
    The key of each one's body, which is a blob there."""
    await called_chat(gateway, SECRET, **{"x-tidegate-subject": SUBJECT})
    row = await wait_until(lambda: gateway.database.fetchrow("SELECT * FROM audit"), 20)
    spill, blobs = Spill(folder, 1_000_000), Blobs.from_url("", folder.parent)
    keys = {subject: new_key(datetime.now(UTC)) for subject in (SUBJECT, "another")}
    for subject, key in keys.items():
        await blobs.put(key, zlib.compress(subject.encode()))
        new = {**row, "id": new_id(), "request_id": new_id(), "subject": subject, "failure": None}
        new = {name: str(one) if isinstance(one, UUID) else one for name, one in new.items()}
        body = {name: new[name] for name in ("id", "created_at", "tenant_id", "pool")}
        body |= {"role": "request", "encoding": ENCODING, "size_bytes": 9, "blob_key": key}
        entry: Json = {"op": "relay", "row": new, "attempt": None, "files": [], "bodies": [body]}
        await spill.keep(entry)
    spill.close()
    return keys


@pytest.mark.parametrize("reached", [True, False])
async def test_what_waits_on_a_disk_is_erased_or_dropped_when_it_is_written(
    open_gateway: Opener, database_url: str, tmp_path: Path, reached: bool
) -> None:
    gateway = await open_gateway(worker=False)
    folder = tmp_path / "there"
    keys = await spilled(gateway, folder / "spill")
    whose = Whose(None, SUBJECT)
    report = await erase(database_url, folder if reached else tmp_path / "here", whose)
    assert report.spilled == (1 if reached else 0)
    assert not (reached and (folder / "blobs" / keys[SUBJECT]).exists())
    store = Store(
        database_url,
        instance_id="later",
        blobs=Blobs.from_url("", folder),
        spill_dir=folder / "spill",
        spill_max_bytes=1_000_000,
        audit_full="block",
        claim_lease_ms=1_000,
    )
    await store.start()
    left = "SELECT array_agg(subject) FROM audit"
    try:
        await wait_until(lambda: not list((folder / "spill").glob("*.spill")), 20, "the replay")
        assert await gateway.database.fetchval(left) == ["another"]
        kept = {key for key in keys.values() if (folder / "blobs" / key).exists()}
        assert kept == {keys["another"]}
    finally:
        await store.aclose()


async def test_erasing_does_not_wait_long_for_a_backup(
    open_gateway: Opener, database_url: str, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False)
    whose = Whose(None, SUBJECT)
    async with gateway.database.acquire() as backup, backup.transaction():
        await backup.fetch("SELECT * FROM erased")
        with pytest.raises(StoreUnavailable, match="in use"):
            await erase(database_url, tmp_path, whose)
    assert (await erase(database_url, tmp_path, whose)).done


async def test_wrong_subjects_are_refused(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    for path in ("/submit", "/stream"):
        for wrong in ("", " ", "x" * 201, "a\nb", 7):
            body = {"data": "Why?", "subject": wrong}
            status, problem = await ask(gateway, "POST", path, {}, body)
            assert (status, problem["field"]) == (400, "subject"), wrong
    assert await gateway.database.fetchval("SELECT count(*) FROM requests") == 0


def _today() -> tuple[date, date]:
    today = datetime.now(UTC).date()
    return today, today


async def test_a_subject_is_the_same_in_a_header_and_in_a_wrapped_call(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway()
    name, body = "Jürgen Müller", {"model": "m", "messages": [{"role": "user", "content": SECRET}]}
    await called_chat(gateway, SECRET, **{"x-tidegate-subject": name})
    wrapped = await gateway.submit(endpoint="/v1/chat/completions", body=body, subject=name)
    assert (await gateway.end_of(wrapped))["status"] == "succeeded"

    async def recorded() -> bool:
        found = await gateway.database.fetch("SELECT subject FROM audit")
        return len(found) == 2

    await wait_until(recorded, 20, "both are on record")
    status, report = await ask(gateway, "DELETE", f"/admin/subjects/{quote(name)}", {})
    assert (status, report["requests"], report["calls"]) == (200, 1, 2)
    assert await traces(gateway, SECRET) == set()


@pytest.mark.parametrize(("tenant", "subject"), [(None, "\udcff"), ("a\0b", None), (None, None)])
def test_what_can_be_nobodys_name_is_refused(tenant: str | None, subject: str | None) -> None:
    with pytest.raises(ConfigError):
        Whose(tenant, subject)


async def test_a_running_stream_is_erased_with_the_files_that_were_sent(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_behaviour(first_byte_ms=1_500)
    sent: dict[str, Any] = {"data": "Describe it", "type": "multi_modal", "subject": SUBJECT}
    call = asyncio.create_task(gateway.stream(**sent, file=PNG + SECRET.encode()))
    await gateway.in_flight(1)
    assert await traces(gateway, SECRET) == {"disk"}
    _, report = await ask(gateway, "DELETE", f"/admin/subjects/{SUBJECT}", {})
    assert report["done"]
    assert (await call).names[-1] == "done"
    assert await gateway.database.fetchval("SELECT count(*) FROM requests") == 0

    async def is_gone() -> bool:
        return await traces(gateway, SECRET) == set()

    await wait_until(is_gone, 10, "nothing of it is left")


@pytest.mark.parametrize("ahead", [timedelta(hours=1), timedelta(hours=-1)])
async def test_an_erasure_goes_by_the_clock_of_postgresql(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch, ahead: timedelta
) -> None:
    """What was received before it leaves no record, what comes later has one."""
    set_clock(monkeypatch, ahead, (native, stream, audit))
    gateway = await open_gateway(worker=False)
    named = {"x-tidegate-subject": SUBJECT}
    await gateway.upstream.set_behaviour(first_byte_ms=3_500)
    early = asyncio.gather(
        called_chat(gateway, SECRET, **named),
        gateway.stream(data=SECRET, type="text_only", subject=SUBJECT),
    )
    await gateway.in_flight(2)
    _, report = await ask(gateway, "DELETE", f"/admin/subjects/{SUBJECT}", {})
    assert report["done"]
    before, streamed = await early
    await gateway.upstream.set_behaviour(first_byte_ms=0)
    later = await called_chat(gateway, "Hello", **named)
    await gateway.audit(later)
    await gateway.audit(await called_chat(gateway, "Hello"))  # the records before are written
    ids = {str(row["request_id"]) for row in await gateway.database.fetch(RECORDED)}
    assert later in ids
    assert not ids & {before, streamed.request_id}
