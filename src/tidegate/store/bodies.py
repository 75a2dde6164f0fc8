"""The bodies of audit rows: compressed JSON, inline when small, else a blob.

Invariant: a body is never lost for want of the blob store; it then stays in its row.
"""

from __future__ import annotations

import asyncio
import zlib
from base64 import b64encode
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import orjson

from tidegate.errors import StoreUnavailable
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.records import AttemptResult, ClaimedJob, Json, NewJob
from tidegate.store.rows import cleaned

INLINE_BYTES = 8192
ENCODING = "zlib"
WORTH_A_THREAD_BYTES = 50_000
_QUICK = 1  # a level of zlib: native bodies are compressed on the processor that relays
_SAMPLED_BYTES, _SAMPLE_BYTES, _WORTH_IT = 262_144, 16_384, 0.7
# A window that holds a small body whole, and tables to fit: by default zlib prepares 256 KB each
# time, which for a small body is several times the work itself. The result is as small.
_SMALL_BYTES = 4096
_SMALL_WINDOW_BITS = 12
_SMALL_TABLES = 5
_BLOB_TIMEOUT_S = 5.0


def request_body(
    prompt: str, image_uri: str | None, model: str | None, files: list[Json]
) -> dict[str, Any]:
    return {"prompt": prompt, "image_uri": image_uri, "model": model, "files": files}


def body_of_job(job: NewJob | ClaimedJob) -> dict[str, Any]:
    files = [
        {
            "file_id": file.file_id,
            "name": file.name,
            "mime_type": file.mime_type,
            "size_bytes": file.size_bytes,
        }
        for file in job.attachments
    ]
    if job.endpoint is not None:  # of a large body the file alone: `prompt` is a piece of it
        return {"endpoint": job.endpoint} | ({"files": files} if files else {"body": job.prompt})
    return request_body(job.prompt, job.image_uri, job.model, files)


def body_of_result(result: AttemptResult) -> dict[str, Any]:
    files = [
        {
            "file_id": picture.file_id,
            "mime_type": picture.mime_type,
            "size_bytes": picture.size_bytes,
        }
        for picture in result.pictures
    ]
    return {"text": result.text, "files": files, "finish_reason": result.finish_reason}


def inline_row(role: str, body: dict[str, Any]) -> Json:
    """The row of a body, whatever its size, without its id and owner."""
    raw = orjson.dumps(cleaned(body))
    return _row(role, len(raw), data=b64encode(_packed(raw)).decode())


async def row_of(role: str, body: dict[str, Any], blobs: Blobs) -> Json:
    """The row of a body; a large one goes to the blobs first."""
    raw = orjson.dumps(cleaned(body))
    if len(raw) > WORTH_A_THREAD_BYTES:
        packed = await asyncio.to_thread(_packed, raw)
    else:
        packed = _packed(raw)
    if len(packed) > INLINE_BYTES:
        key = new_key(datetime.now(UTC))
        # Else kept inline instead, as the invariant says.
        with suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(_BLOB_TIMEOUT_S):
                await blobs.put(key, packed)
            return _row(role, len(raw), blob_key=key)
    return _row(role, len(raw), data=b64encode(packed).decode())


def _packed(raw: bytes) -> bytes:
    if len(raw) > _SMALL_BYTES:
        return zlib.compress(raw)
    packer = zlib.compressobj(wbits=_SMALL_WINDOW_BITS, memLevel=_SMALL_TABLES)
    return packer.compress(raw) + packer.flush()


def _row(role: str, size_bytes: int, data: str | None = None, blob_key: str | None = None) -> Json:
    return {
        "role": role,
        "encoding": ENCODING,
        "size_bytes": size_bytes,
        "data": data,
        "blob_key": blob_key,
    }


def as_kept(raw: bytes) -> tuple[str, bytes]:
    """A native body in the encoding in which it is kept."""
    if len(raw) > _SAMPLED_BYTES and not _shrinks(raw):
        return "raw", raw
    return "zlib-raw", zlib.compress(raw, _QUICK)


def _shrinks(raw: bytes) -> bool:
    """Whether it is worth compressing, by a look at three places. A file in base64 would lose a
    quarter, and take half a second of the processor for 20 MB."""
    step = len(raw) // 4
    samples = [raw[at : at + _SAMPLE_BYTES] for at in (step, 2 * step, 3 * step)]
    size = sum(len(zlib.compress(one, _QUICK)) for one in samples)
    return size < _WORTH_IT * sum(map(len, samples))


def unpack(encoding: str, packed: bytes) -> Any:
    """The JSON value of a stored body; a native one as the text that travelled."""
    if encoding == "raw":
        return packed.decode("utf-8", "replace")
    if encoding == "zlib-raw":
        return zlib.decompress(packed).decode("utf-8", "replace")
    if encoding != ENCODING:
        raise ValueError(f"a body in the unknown encoding {encoding!r}")
    return orjson.loads(zlib.decompress(packed))
