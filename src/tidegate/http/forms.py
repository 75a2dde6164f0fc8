"""A request's body, in any of three encodings, made into one checked `Submission`.

Invariant: all or nothing. Either the whole body was sound and its files are in the blob store, or
an error is raised and neither a temporary file nor a blob of it is left, cancelled or not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Never
from urllib.parse import parse_qsl

import anyio
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from tidegate.call import Attachment, Kind, new_id
from tidegate.config import Config
from tidegate.errors import InvalidRequest, StoreUnavailable, UnsupportedMedia
from tidegate.http.body import Body, too_long
from tidegate.http.fields import FIELDS, Fields, from_form, read_fields
from tidegate.http.incoming import Hold, Pace
from tidegate.http.multipart import Form, MultipartReader, Upload, boundary_of
from tidegate.providers.addresses import Address, is_public
from tidegate.relay.asked import check_parts
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.records import NewJob

CONTENT_TYPES = (
    "application/json, multipart/form-data (for files) or application/x-www-form-urlencoded"
)
CLEAN_UP_S = 10.0
_CONTENT_TYPES_KEPT = 64
_PARSED_AT_ONCE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Submission:
    """What a caller asks for. `prompt` may be empty when there is a file or an `image_uri`."""

    prompt: str
    attachments: tuple[Attachment, ...]
    image_uri: str | None
    kind: Kind | None
    model: str | None
    priority: int
    deadline_ms: int | None
    webhook_url: str | None = None
    subject: str | None = None
    digests: tuple[str, ...] = ()  # SHA-256 of each attachment, where they were asked for
    endpoint: str | None = None  # of a native call; `prompt` is then its body, as JSON


@dataclass(frozen=True, slots=True)
class Wrapping:
    """How JSON that names an `endpoint` is taken: `most_bytes` of it, read by `take`."""

    take: Callable[[Mapping[str, Any], Config], Submission]
    most_bytes: int


async def read_submission(
    request: Request,
    config: Config,
    blobs: Blobs,
    *,
    is_allowed: Callable[[Address], bool] = is_public,
    pace: Pace | None = None,
    as_job: bool = False,
    digests: bool = False,
    wrapping: Wrapping | None = None,
    hold: Hold | None = None,
) -> Submission:
    """Read, check and keep one request; what of it is in memory counts in `hold`, which the caller
    gives back.

    `as_job`: whether it is one that others may be told the end of. `digests`: whether to take those
    of its files. `wrapping`: where a JSON body may name an `endpoint`.

    The files of the Submission are in `blobs`; a caller that does not go on to record it deletes
    them. Raises InvalidRequest, PayloadTooLarge, UnsupportedMedia, FetchRefused, RequestTimeout,
    StoreUnavailable, QueueFull, or starlette's ClientDisconnect. A cancelled read leaves nothing
    behind.
    """
    kind = _encoding(request)
    body = Body(request, config, pace=pace)
    form = Form()
    try:
        if kind == "multipart":
            boundary = boundary_of(request.headers["content-type"])
            reader = MultipartReader(boundary, config, config.data_dir / "tmp")
            await reader.read(body, form, hold)
            values = from_form(form.values)
        elif kind == "json":
            found = await _from_json(body, config, wrapping, hold)
            if isinstance(found, Submission):
                return found
            values = found
        else:
            most_bytes = _text_body_bytes(config)
            values = from_form(_parse_pairs(await body.read(most_bytes, field="body", hold=hold)))
        fields = read_fields(values, config, is_allowed=is_allowed)
        if not (fields.prompt or fields.image_uri or form.uploads):
            raise InvalidRequest(
                "data",
                "there is neither a prompt nor a file",
                allowed="a text in 'data' (or 'text'), a file in 'file', or an 'image_uri'",
            )
        if fields.webhook_url is not None and not as_job:
            raise InvalidRequest("webhook_url", "only a job has a webhook", allowed="POST /submit")
        taken = [await upload.spool.sha256() for upload in form.uploads if digests]
        return _submission(fields, await _keep(form.uploads, blobs), tuple(taken))
    finally:
        if kind == "multipart":
            await _to_the_end(form.close())


async def _from_json(
    body: Body, config: Config, wrapping: Wrapping | None, hold: Hold | None
) -> dict[str, Any] | Submission:
    """The values of a prompt, or what wraps a call."""
    text_bytes = _text_body_bytes(config)
    if wrapping is None:
        return _parse_json(await body.read(text_bytes, field="body", hold=hold))
    most_bytes = max(text_bytes, wrapping.most_bytes)
    raw = await body.read(most_bytes, field="body", hold=hold)
    if len(raw) <= _PARSED_AT_ONCE_BYTES or hold is None:
        return _read_json(raw, config, wrapping.take)
    async with hold.turn:
        found = await asyncio.to_thread(_read_json, raw, config, wrapping.take)
    if isinstance(found, Submission):
        hold.reach(len(found.prompt))  # what is held from here on
    elif len(raw) > text_bytes:
        raise too_long("body", text_bytes)
    return found


def _read_json(
    raw: bytes, config: Config, take: Callable[[Mapping[str, Any], Config], Submission]
) -> dict[str, Any] | Submission:
    check_parts(raw)
    values = _parse_json(raw)
    return take(values, config) if "endpoint" in values else values


def _submission(
    fields: Fields, attachments: tuple[Attachment, ...], digests: tuple[str, ...]
) -> Submission:
    return Submission(
        prompt=fields.prompt,
        attachments=attachments,
        image_uri=fields.image_uri,
        kind=fields.kind,
        model=fields.model,
        priority=fields.priority,
        deadline_ms=fields.deadline_ms,
        webhook_url=fields.webhook_url,
        subject=fields.subject,
        digests=digests,
    )


def _encoding(request: Request) -> str:
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        raise UnsupportedMedia(
            "Content-Encoding", f"{packed[:32]!r} bodies are not taken", allowed="identity"
        )
    if len(request.headers.getlist("content-type")) > 1:
        raise UnsupportedMedia(
            "Content-Type", "there is more than one Content-Type", allowed=CONTENT_TYPES
        )
    return _encoding_of(request.headers.get("content-type"))


@lru_cache(_CONTENT_TYPES_KEPT)
def _encoding_of(content_type: str | None) -> str:
    said, options = parse_options_header(content_type)
    media = said.decode("latin-1")
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii", b"ascii"):
        raise UnsupportedMedia(
            "Content-Type", "only text in UTF-8 is taken", allowed="charset=utf-8"
        )
    if media == "multipart/form-data":
        return "multipart"
    if media == "application/x-www-form-urlencoded":
        return "pairs"
    if media == "application/json" or (
        media.startswith("application/") and media.endswith("+json")
    ):
        return "json"
    problem = f"{media[:64]!r} is not taken" if media else "there is no Content-Type"
    raise UnsupportedMedia("Content-Type", problem, allowed=CONTENT_TYPES)


def _text_body_bytes(config: Config) -> int:
    """The longest body that can hold a prompt within its limit: \\ud83d\\ude00 is 12 for one."""
    return min(config.max_body_bytes, config.max_prompt_chars * 12 + 65_536)


def _decode(raw: bytes) -> str:
    if not raw.strip():
        raise InvalidRequest("body", "the body is empty")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as broken:
        raise InvalidRequest(
            "body", f"the body is not UTF-8: byte {broken.start}", allowed="text in UTF-8"
        ) from None


def _parse_json(raw: bytes) -> dict[str, Any]:
    text = _decode(raw)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as broken:
        where = f"line {broken.lineno}, column {broken.colno}"
        raise InvalidRequest("body", f"invalid JSON: {broken.msg} at {where}") from None
    except RecursionError:
        raise InvalidRequest("body", "the JSON is nested too deeply") from None
    except ValueError as unfit:
        # Python refuses to read numbers of more than 4300 digits.
        raise InvalidRequest("body", "invalid JSON: a number is too long") from unfit
    if not isinstance(value, dict):
        raise InvalidRequest("body", "the JSON must be an object", allowed='{"data": "..."}')
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidRequest("body", f"{name[:64]!a} is there more than once")
        found[name] = value
    return found


def _no_constant(name: str) -> Never:
    raise InvalidRequest("body", f"invalid JSON: {name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _parse_pairs(raw: bytes) -> dict[str, str]:
    text = _decode(raw)
    if text.lstrip().startswith("{"):
        raise UnsupportedMedia(
            "Content-Type",
            "the body looks like JSON but is sent as a form",
            allowed='the header "Content-Type: application/json"',
        )
    try:
        pairs = parse_qsl(
            text,
            keep_blank_values=True,
            errors="strict",
            max_num_fields=len(FIELDS) + 1,
        )
    except UnicodeDecodeError:
        raise InvalidRequest("body", "the form is not text in UTF-8") from None
    except ValueError:
        raise InvalidRequest("body", "the form has too many fields") from None
    values: dict[str, str] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidRequest(name[:64], f"{name[:64]!r} is there more than once")
        values[name] = value
    return values


async def discard(asked: Submission | NewJob, blobs: Blobs) -> None:
    """Delete the files of what will not be recorded. Not cut off by cancellation."""
    keys = [attachment.blob_key for attachment in asked.attachments]
    if keys:
        await _to_the_end(blobs.delete(keys))


async def _keep(uploads: list[Upload], blobs: Blobs) -> tuple[Attachment, ...]:
    """Put every upload into the blob store, or none."""
    now = datetime.now(UTC)
    kept: list[Attachment] = []
    try:
        for upload in uploads:
            attachment = Attachment(
                file_id=new_id(),
                name=upload.name or "file",
                mime_type=upload.mime_type,
                size_bytes=upload.spool.size_bytes,
                blob_key=new_key(now),
            )
            kept.append(attachment)
            # A put that is cut off may still land: let it end, so that deleting comes after it.
            await _to_the_end(_put(attachment.blob_key, upload, blobs))
    except BaseException as failed:
        try:
            await _to_the_end(blobs.delete([attachment.blob_key for attachment in kept]))
        except StoreUnavailable as left:
            failed.add_note(f"blobs are left behind: {left}")
        raise
    return tuple(kept)


async def _put(key: str, upload: Upload, blobs: Blobs) -> None:
    if upload.spool.path is None:
        await blobs.put(key, upload.spool.data)
    else:
        await blobs.put_file(key, upload.spool.path)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end though we are cancelled meanwhile, then pass the cancellation on."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        # A scope of anyio, such as starlette's, cancels again and again: hence the shield.
        with anyio.move_on_after(CLEAN_UP_S, shield=True):
            await asyncio.wait([task])
        if task.done() and not task.cancelled() and (failed := task.exception()):
            raise asyncio.CancelledError from failed
        raise
