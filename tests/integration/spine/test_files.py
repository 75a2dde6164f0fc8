"""`GET /files/{file_id}`: the bytes, and headers that make a stranger's file harmless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateway import PNG, Gateway, Opener
from tidegate.errors import StoreUnavailable
from tidegate.store.blobs import Blobs


async def _upload(gateway: Gateway, name: str, content_type: str, data: bytes) -> str:
    """The URL of an uploaded file."""
    form = aiohttp.FormData({"data": "Describe this"})
    form.add_field("file", data, filename=name, content_type=content_type)
    async with gateway.http.post(f"{gateway.url}/submit", data=form) as response:
        body = await response.json()
        assert response.status == 202, body
    (file,) = (await gateway.status(body["request_id"]))["files"]
    return str(file["url"])


async def _fetch(gateway: Gateway, url: str) -> tuple[aiohttp.ClientResponse, bytes]:
    async with gateway.http.get(gateway.url + url) as response:
        return response, await response.read()


def _assert_safe(headers: Any) -> None:
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"].startswith("private")


async def test_a_picture_is_shown_and_named_with_its_extension(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    record = await gateway.end_of(await gateway.submit(data="Generate an image of a fox"))
    (image,) = record["images"]
    response, data = await _fetch(gateway, image["url"])
    assert (response.status, response.content_type) == (200, "image/png")
    assert data.startswith(b"\x89PNG")
    assert len(data) == image["size_bytes"] == int(response.headers["content-length"])
    disposition = response.headers["content-disposition"]
    assert disposition.startswith("inline; ")
    assert disposition.endswith(".png")
    _assert_safe(response.headers)


UPLOADS = [
    ("a.png", "image/png", PNG, "inline"),
    ("script.txt", "text/plain", b"<script>alert(1)</script>", "attachment"),
    ('quo"te; Ümläut\u202e.txt', "text/plain", b"plain words", "attachment"),
]


async def test_an_upload_comes_back_as_it_was_but_never_runs(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    for name, content_type, data, how in UPLOADS:
        response, body = await _fetch(gateway, await _upload(gateway, name, content_type, data))
        assert (response.status, body) == (200, data)
        assert response.content_type == content_type
        disposition = response.headers["content-disposition"]
        assert disposition.startswith(f"{how}; filename*=UTF-8''")
        assert disposition.isascii()
        assert '"' not in disposition
        _assert_safe(response.headers)


async def test_a_large_file_comes_whole(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    data = b"The tide turns. " * 200_000
    response, body = await _fetch(gateway, await _upload(gateway, "a.txt", "text/plain", data))
    assert response.status == 200
    assert body == data


async def test_a_file_whose_bytes_are_gone_is_a_404_and_not_a_broken_200(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False)
    url = await _upload(gateway, "a.png", "image/png", PNG)
    key = await gateway.database.fetchval("SELECT blob_key FROM files")
    await gateway.services.blobs.delete([key])
    response, body = await _fetch(gateway, url)
    assert (response.status, response.content_type) == (404, "application/problem+json")
    assert key.encode() not in body


async def test_a_file_that_cannot_be_read_now_is_a_503(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    url = await _upload(gateway, "a.png", "image/png", PNG)

    async def away(self: Blobs, key: str) -> Any:
        for failure in [StoreUnavailable("the blob store failed")]:
            raise failure
        yield b""

    monkeypatch.setattr(Blobs, "stream", away)
    response, _ = await _fetch(gateway, url)
    assert (response.status, response.content_type) == (503, "application/problem+json")
    assert "retry-after" in response.headers


async def test_a_job_that_ends_in_the_queue_is_on_record_with_its_file(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    form = aiohttp.FormData({"data": "Describe this"})
    form.add_field("file", b"name,height", filename="tides.csv", content_type="text/csv")
    async with gateway.http.post(f"{gateway.url}/submit", data=form) as answer:
        job = (await answer.json())["request_id"]
    async with gateway.http.delete(f"{gateway.url}/requests/{job}") as answer:
        assert answer.status == 200
    async with gateway.http.get(f"{gateway.url}/requests/{job}/request") as answer:
        asked = await answer.json(content_type=None)
    (file,) = asked.pop("files")
    assert (file["name"], file["mime_type"], file["size_bytes"]) == ("tides.csv", "text/csv", 11)
    assert (asked["prompt"], asked["image_uri"]) == ("Describe this", None)
