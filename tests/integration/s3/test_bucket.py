"""Files in a bucket, through the whole product, at a server that really speaks S3."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import aiohttp
import pytest

from tests.gateway import PNG, Gateway, Opener
from tests.integration.s3.conftest import BUCKET, S3Server, point_to
from tests.waiting import wait_until
from tidegate.doctor import examine
from tidegate.doctor.checks import State
from tidegate.errors import NotFound, StoreUnavailable
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.database import Connections
from tidegate.store.retention import Retention, Whose
from tidegate.supervisor.maintenance import ExportFormat, RecordExport

_URL = f"s3://{BUCKET}"


async def _upload(gateway: Gateway, data: bytes, **fields: str) -> tuple[int, dict[str, Any]]:
    form = aiohttp.FormData({"data": "Describe this", **fields})
    form.add_field("file", data, filename="a.txt", content_type="text/plain")
    async with gateway.http.post(f"{gateway.url}/submit", data=form) as response:
        return response.status, await response.json()


async def _bytes_of(gateway: Gateway, url: str) -> bytes:
    async with gateway.http.get(gateway.url + url) as response:
        assert response.status == 200
        return await response.read()


async def _blobs_status(gateway: Gateway) -> tuple[str, str | None]:
    _, body = await gateway.get("/health/dependencies")
    return body["blobs"]["status"], body["blobs"]["detail"]


async def test_uploads_and_pictures_live_in_the_bucket(open_gateway: Opener, s3: S3Server) -> None:
    gateway = await open_gateway(blob_url=_URL)
    record = await gateway.end_of(await gateway.submit(data="Describe this", file=PNG))
    assert record["status"] == "succeeded"
    (upload,) = record["files"]
    assert await _bytes_of(gateway, upload["url"]) == PNG
    drawn = await gateway.end_of(await gateway.submit(data="Generate an image of a fox"))
    (image,) = drawn["images"]
    picture = await _bytes_of(gateway, image["url"])
    assert picture.startswith(b"\x89PNG")
    assert sorted(s3.sizes().values()) == sorted([len(PNG), len(picture)])
    assert await _blobs_status(gateway) == ("ok", None)


async def test_a_large_file_is_sent_in_parts(open_gateway: Opener, s3: S3Server) -> None:
    gateway = await open_gateway(blob_url=_URL, worker=False)
    data = os.urandom(4_000_000).hex().encode() * 3
    status, body = await _upload(gateway, data)
    assert status == 202, body
    ((key, size_bytes),) = s3.sizes().items()
    assert size_bytes == len(data)
    assert s3.parts(key) > 1
    (file,) = (await gateway.status(body["request_id"]))["files"]
    assert await _bytes_of(gateway, file["url"]) == data


async def test_a_path_in_the_bucket_is_all_that_is_seen(tmp_path: Path, s3: S3Server) -> None:
    key, other = new_key(datetime.now(UTC)), new_key(datetime.now(UTC))
    inside, whole = (Blobs.from_url(url, tmp_path) for url in (f"{_URL}/our/own", _URL))
    await inside.put(key, b"x")
    await whole.put(other, b"another's")
    assert set(s3.sizes()) == {f"our/own/{key}", other}
    assert await inside.days() == [key.partition("/")[0]]
    assert [keys async for keys in inside.keys_of(key.partition("/")[0])] == [[key]]
    await inside.delete([key])
    assert set(s3.sizes()) == {other}


async def test_exports_are_in_the_bucket_and_no_days_of_blobs(
    database_url: str, tmp_path: Path, s3: S3Server
) -> None:
    blobs, connections = Blobs.from_url(_URL, tmp_path), Connections(database_url)
    connections.start()
    now = datetime.now(UTC)
    await blobs.put(new_key(now), b"x")
    files = {}
    for file_format in get_args(ExportFormat):
        export = RecordExport(connections, blobs, tmp_path, file_format)
        one = await export.write(now.date() - timedelta(days=1))
        files[one.key] = one.size_bytes
    await connections.aclose()
    assert len(files) == 2
    assert files.items() <= s3.sizes().items()
    written = await blobs.written("exports/record")
    assert written.keys() == files.keys()
    assert all(abs(at - now) < timedelta(minutes=10) for at in written.values())
    assert await blobs.days() == [f"{now:%Y-%m-%d}"]


async def test_prune_and_erase_delete_there(
    open_gateway: Opener, s3: S3Server, tmp_path: Path
) -> None:
    gateway = await open_gateway(blob_url=_URL, worker=False)
    blobs = Blobs.from_url(_URL, tmp_path)
    status, _ = await _upload(gateway, b"mine", subject="ann")
    assert status == 202
    await _upload(gateway, b"another's", subject="bob")
    orphan = new_key(datetime.now(UTC) - timedelta(days=40))
    await blobs.put(orphan, b"left behind")
    assert gateway.config.database_url is not None
    connections = Connections(gateway.config.database_url.get_secret_value())
    try:
        retention = Retention(connections, blobs, tmp_path / "spill")
        await retention.prune(30)
        assert orphan not in s3.sizes()
        assert sorted(s3.sizes().values()) == [4, 9]
        whose = Whose("default", "ann")
        await retention.erase(whose)
        assert list(s3.sizes().values()) == [9]
    finally:
        await connections.aclose()


async def test_while_the_bucket_is_away_nothing_is_lost_and_nothing_is_paid_for(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = S3Server(tmp_path)
    own.start()
    own.make_bucket()
    point_to(own, monkeypatch)
    try:
        gateway = await open_gateway(blob_url=_URL)
        waits = await gateway.submit(data="Generate an image of a fox [first]")
        await gateway.end_of(waits)
        own.stop()
        status, body = await _upload(gateway, b"a file")
        assert (status, body["code"]) == (503, "store_unavailable"), "told, and not half taken"
        assert "does not answer" in body["detail"]
        assert await _blobs_status(gateway) == (
            "failed",
            "the blob store failed: it does not answer",
        )
        refused = await gateway.stream(text="Generate an image of a hare [streamed]")
        assert refused.problem["code"] == "store_unavailable"
        text = await gateway.end_of(await gateway.submit(data="Explain the tide"))
        assert text["status"] == "succeeded", "what needs no file goes on"
        drawn = await gateway.submit(data="Generate an image of a fox [second]")
        await wait_until(lambda: gateway.calls("[second]"), 20)
        own.start()
        own.make_bucket()
        record = await gateway.end_of(drawn, 30)
        assert record["status"] == "succeeded"
        assert len(await _bytes_of(gateway, record["images"][0]["url"])) in own.sizes().values()
        assert len(await gateway.calls("[second]")) <= 2
        assert not await gateway.calls("[streamed]"), "no picture is asked for with nowhere to go"
        assert await _blobs_status(gateway) == ("ok", None)
    finally:
        own.stop()


async def test_what_is_wrong_with_a_bucket_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3Server
) -> None:
    """As at the start of every process, and by /health/dependencies."""

    async def said(url: str) -> str:
        with pytest.raises(StoreUnavailable) as failed:
            await Blobs.from_url(url, tmp_path).ping()
        return failed.value.message.removeprefix("the blob store failed: ")

    assert await said("s3://nowhere") == "there is no such bucket"
    blobs = Blobs.from_url("s3://nowhere", tmp_path)
    with pytest.raises(StoreUnavailable):
        await blobs.put("k", b"x")
    assert blobs.unavailable
    with pytest.raises(NotFound):
        await Blobs.from_url(_URL, tmp_path).get("k")
    strict = S3Server(tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="1")
    strict.start()
    try:
        strict.make_bucket()
        monkeypatch.setenv("AWS_ENDPOINT_URL", strict.url)
        refused = "it rejects the credentials, or they lack a permission (403)"
        assert await said(_URL) == refused
    finally:
        strict.stop()


async def test_a_process_that_starts_with_wrong_credentials_says_so(
    open_gateway: Opener, s3: S3Server, capfd: pytest.CaptureFixture[str]
) -> None:
    gateway = await open_gateway(blob_url="s3://nowhere", worker=False)
    assert await _blobs_status(gateway) == (
        "failed",
        "the blob store failed: there is no such bucket",
    )
    said = await asyncio.to_thread(capfd.readouterr)
    assert "blobs_away" in said.out + said.err


async def test_doctor_tries_the_bucket_and_leaves_nothing_in_it(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"BLOB_URL": _URL, "DATA_DIR": "data", "PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    found = {one.check: one for one in await examine()}
    assert found["files.bucket"].state is State.OK
    assert s3.sizes() == {}
    assert found["valkey.reach"].state is State.SKIPPED, "bundled, and none was started"
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv("BLOB_URL", "s3://another-bucket")
    found = {one.check: one for one in await examine()}
    assert found["files.bucket"].state is State.FAIL
