"""Uploads to `/v1/files`: which forms are taken, and that no part is kept in another form."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.http.asgi import MULTIPART, multipart, request, settings, text
from tidegate.call import new_id
from tidegate.errors import InvalidRequest
from tidegate.http.batches import Uploaded, file_view, is_batch_path, read_upload
from tidegate.http.body import BodyBudget, BodyMemory, MemoryBound, Spool, incoming_of
from tidegate.store.batches import INPUT, BatchFile

LINES = b'{"custom_id": "one"}\n{"custom_id": "two"}\n'
FORM = multipart(text("purpose", "batch"), ("file", LINES, "lines.jsonl", "text/plain"))


async def read(raw: bytes, content_type: str, folder: Path, *more: str) -> Uploaded:
    uploaded = Uploaded(Spool(folder))
    hold = BodyBudget(BodyMemory(), MemoryBound(10**9, 10**9, shared=False), "t")
    try:
        incoming = incoming_of(request(raw, content_type), settings(folder))
        await read_upload(incoming, [content_type, *more], uploaded, hold)
        return uploaded
    finally:
        hold.release()


@pytest.mark.parametrize("content_type", [MULTIPART, MULTIPART.replace("multipart", "Multipart")])
async def test_a_file_is_kept_as_it_was_sent(content_type: str, tmp_path: Path) -> None:
    uploaded = await read(FORM, content_type, tmp_path)
    assert (uploaded.name, uploaded.lines, uploaded.spool.data) == ("lines.jsonl", 2, LINES)


async def test_a_file_in_base64_is_refused_and_not_kept_as_that(tmp_path: Path) -> None:
    encoded = FORM.replace(b"text/plain", b"text/plain\r\nContent-Transfer-Encoding: base64")
    with pytest.raises(InvalidRequest, match="encoded"):
        await read(encoded, MULTIPART, tmp_path)


async def test_a_second_content_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="more than one Content-Type"):
        await read(FORM, MULTIPART, tmp_path, MULTIPART)


def test_a_file_of_ours_is_known_by_its_id_and_one_of_azure_is_not_taken_for_it() -> None:
    ours = file_view(BatchFile(new_id(), "acme", INPUT, "in.jsonl", 2, 1, "key"))["id"]
    azure = "file-655111ec9cfc44489d9af078f08116ef"  # of a UUID too, of version 4

    def is_ours(file_id: str) -> bool:
        path = f"/v1/files/{file_id}/content"
        return is_batch_path({"path": path, "headers": [], "query_string": b""})

    assert (is_ours(ours), is_ours(azure)) == (True, False)
