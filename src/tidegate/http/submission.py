"""Submission: the checked fields and files of a request, from JSON, form or multipart.

A job can wrap a native call (`endpoint` and `body`) that could also be relayed immediately.

Invariants: after an error or a cancellation neither a temporary file nor a blob remains; at most a
small slice of a body is in memory besides its texts; accepted values can be stored in PostgreSQL
(no NUL, no lone surrogates) and used in a provider's URL.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, Never, TypeVar
from urllib.parse import parse_qsl

import anyio
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from tidegate.call import Attachment, Caller, Kind, Tier, new_id
from tidegate.dialects.parsing import check_parts, parsed
from tidegate.dialects.requests import names_tier
from tidegate.errors import InvalidRequest, PayloadTooLarge, StoreUnavailable, UnsupportedMedia
from tidegate.http.body import (
    WITH_ITS_HEAD_BYTES,
    BodyBudget,
    Multipart,
    Pace,
    Part,
    PartHead,
    Spool,
    check_size,
    count_in,
    incoming_of,
)
from tidegate.http.file_types import TypeCheck, safe_name
from tidegate.settings import Config
from tidegate.spine.bodies import aside
from tidegate.spine.detached import LONGEST_BYTES, endpoint_named, wrapped_facts
from tidegate.spine.prompt import PromptRequest
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.records import NewJob
from tidegate.upstream.fetch import Address, check_uri, is_public

PROMPT_FIELDS = ("data", "text")
FIELDS = (
    *PROMPT_FIELDS,
    *("image_uri", "type", "model", "priority", "deadline_ms", "webhook_url", "subject", "tiers"),
    "conversation",
)
FILE_FIELDS = ("file", "files")
MAX_PRIORITY = 100
MAX_DEADLINE_MS = 7 * 86_400_000
MAX_TAG_CHARS = 200

T = TypeVar("T")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_LISTS = ("tiers",)  # in a form: values separated by commas


@dataclass(frozen=True, slots=True)
class Submission:
    """A checked request. `prompt` may be empty if there is a file or an `image_uri`.

    digests: SHA-256 of each attachment, if requested. endpoint: of a native call; `prompt` is then
    its body, as JSON. tiers: those allowed besides the usual one; None if unspecified.
    """

    prompt: str = ""
    attachments: tuple[Attachment, ...] = ()
    image_uri: str | None = None
    kind: Kind | None = None
    model: str | None = None
    priority: int = 0
    deadline_ms: int | None = None
    webhook_url: str | None = None
    subject: str | None = None
    conversation: str | None = None
    digests: tuple[str, ...] = ()
    endpoint: str | None = None
    tiers: tuple[Tier, ...] | None = None


def ask_of(submission: Submission, caller: Caller) -> PromptRequest:
    """Return the prompt of a submission in the form that its classification and its call need."""
    return PromptRequest(
        prompt=submission.prompt,
        attachments=submission.attachments,
        image_uri=submission.image_uri,
        kind=submission.kind,
        tenant_id=caller.tenant_id,
    )


def read_fields(
    values: Mapping[str, Any],
    config: Config,
    *,
    is_allowed: Callable[[Address], bool] = is_public,
) -> Submission:
    """Check `values` by name and return the submission. None counts as absent. Raises
    InvalidRequest naming the field."""
    for name in values:
        check_known(name)
    given = {name: value for name, value in values.items() if value is not None}
    return Submission(
        prompt=_prompt(given, config.max_prompt_chars),
        image_uri=_optional(given, "image_uri", partial(_image_uri, is_allowed)),
        kind=_optional(given, "type", _kind),
        model=_optional(given, "model", _model),
        priority=_integer("priority", given.get("priority", 0), -MAX_PRIORITY, MAX_PRIORITY),
        deadline_ms=_optional(
            given, "deadline_ms", lambda value: _integer("deadline_ms", value, 1, MAX_DEADLINE_MS)
        ),
        webhook_url=_optional(given, "webhook_url", partial(_webhook_url, config)),
        tiers=_optional(given, "tiers", _tiers),
        subject=_optional(given, "subject", partial(_tag, "subject")),
        conversation=_optional(given, "conversation", partial(_tag, "conversation")),
    )


def _optional(given: Mapping[str, Any], name: str, check: Callable[[Any], T]) -> T | None:
    return check(given[name]) if name in given else None


def from_form(pairs: Mapping[str, str]) -> dict[str, Any]:
    """Convert a form's texts to the values of JSON: numbers and lists are parsed, empty texts
    dropped."""
    values: dict[str, Any] = {}
    for name, text in pairs.items():
        if name in PROMPT_FIELDS:
            values[name] = text
        elif not (given := text.strip()):
            check_known(name)
        elif name in _LISTS:
            values[name] = [one.strip() for one in given.split(",")]
        else:
            is_number = name in ("priority", "deadline_ms") and _INTEGER.fullmatch(given)
            values[name] = int(given) if is_number else given
    return values


def check_known(name: str) -> None:
    """Raise InvalidRequest for an unknown field."""
    if name in FIELDS:
        return
    label = name if name.isprintable() and len(name) <= 64 else ascii(name[:64])
    allowed = ", ".join(FIELDS)
    if name in FILE_FIELDS:
        raise InvalidRequest(
            name,
            f"{name!r} must be a file, sent as multipart/form-data with a file name",
            allowed=f"curl -F '{name}=@path'; values are {allowed}",
        )
    raise InvalidRequest(label, f"there is no field {label!r}", allowed=allowed)


def field_too_long(field: str, limit: int) -> PayloadTooLarge:
    """Return the error for a prompt in `field` that is over its limit."""
    return PayloadTooLarge(
        field,
        f"{field!r} is longer than {limit} characters",
        allowed=f"a prompt of at most {limit} characters",
    )


def _prompt(given: Mapping[str, Any], limit: int) -> str:
    if all(name in given for name in PROMPT_FIELDS):
        raise InvalidRequest("text", "'data' and 'text' mean the same: send one of them")
    for name in PROMPT_FIELDS:
        if name in given:
            prompt = _text(name, given[name])
            if len(prompt) > limit:
                raise field_too_long(name, limit)
            return prompt if prompt.strip() else ""
    return ""


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field, f"{field!r} must be a text, not {_json_name(value)}")
    if "\0" in value:
        raise InvalidRequest(field, f"{field!r} has a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            field, f"{field!r} has an unpaired surrogate", allowed="text in Unicode"
        ) from None
    return value


def _kind(value: Any) -> Kind:
    try:
        return Kind(_text("type", value))
    except ValueError:
        raise InvalidRequest(
            "type", f"there is no type {value[:64]!r}", allowed=", ".join(Kind)
        ) from None


def _model(value: Any) -> str:
    name = _text("model", value)
    if len(name) > 128 or not _MODEL.fullmatch(name):
        raise InvalidRequest(
            "model",
            f"{name[:64]!r} is not a valid model name",
            allowed="letters, digits, '.', '_', '-', and '/' between them; at most 128",
        )
    return name


def _integer(field: str, value: Any, lowest: int, highest: int) -> int:
    allowed = f"a whole number from {lowest} to {highest}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(field, f"{field!r} must be a whole number", allowed=allowed)
    if not lowest <= value <= highest:
        raise InvalidRequest(field, f"{field!r} is out of range", allowed=allowed)
    return value


def _image_uri(is_allowed: Callable[[Address], bool], value: Any) -> str:
    uri = _text("image_uri", value)
    check_uri(uri, is_allowed)
    return uri


def _webhook_url(config: Config, value: Any) -> str:
    url = _text("webhook_url", value)
    if config.webhook_secret is None:
        raise InvalidRequest(
            "webhook_url",
            "webhooks are disabled",
            allowed="no webhook_url while WEBHOOK_SECRET is not set",
        )
    private = config.webhook_allow_private
    check_uri(url, lambda address: private or is_public(address), field="webhook_url")
    return url


def _tag(name: str, value: Any) -> str:
    tag = _text(name, value).strip()
    if not 1 <= len(tag) <= MAX_TAG_CHARS or not tag.isprintable():
        allowed = f"1 to {MAX_TAG_CHARS} printable characters"
        raise InvalidRequest(name, f"'{name}' must be {allowed}", allowed=allowed)
    return tag


def _tiers(value: Any) -> tuple[Tier, ...]:
    """Return the tiers besides the usual one, which is always allowed, in order from fast to
    slow."""
    allowed = f"a list of {', '.join(Tier)}, such as {json.dumps([*Tier])}"
    if not isinstance(value, list) or not value:
        raise InvalidRequest("tiers", "'tiers' must be a list of processing tiers", allowed=allowed)
    for name in value:
        if not isinstance(name, str) or name not in set(Tier):
            label = ascii(name)[:66]
            raise InvalidRequest("tiers", f"there is no processing tier {label}", allowed=allowed)
    return tuple(tier for tier in Tier if tier in value and tier is not Tier.LIVE)


def _json_name(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


MAX_VALUE_BYTES = 8192


@dataclass(slots=True)
class Upload:
    """A file of a form: `spool` holds its bytes."""

    name: str
    spool: Spool
    check: TypeCheck
    mime_type: str = ""


@dataclass(slots=True)
class Form:
    """The parts of a form so far. `close` removes the uploads' files, which count in its `hold`."""

    values: dict[str, str] = field(default_factory=dict)
    uploads: list[Upload] = field(default_factory=list)

    @property
    def held_bytes(self) -> int:
        """Return how many bytes are in memory."""
        texts = sum(map(len, self.values.values()))
        return texts + sum(upload.spool.held_bytes for upload in self.uploads)

    @property
    def spooled_bytes(self) -> int:
        """Return the size of all uploads."""
        return sum(upload.spool.size_bytes for upload in self.uploads)

    async def close(self, hold: BodyBudget | None) -> None:
        for upload in self.uploads:
            await upload.spool.close()
        if hold is not None:
            hold.spool(0)


class FormReader:
    """Reads the parts of a body into a `Form` that the caller closes in any case."""

    def __init__(self, config: Config, form: Form, hold: BodyBudget | None) -> None:
        self._config = config
        self._form = form
        self._hold = hold
        self._heads = 0
        self._field: str | None = None
        self._text = bytearray()
        self._upload: Upload | None = None

    async def take(self, part: Part) -> None:
        """Add a part to the form, and count its bytes in memory in `hold`. Raises InvalidRequest or
        a related error at the first fault, and QueueFull."""
        if isinstance(part, PartHead):
            self._begin(part)
        elif part is None:
            await self._end()
        elif self._upload is not None:
            await self._take_file(part, self._upload)
        elif self._field is not None:
            self._take_text(part, self._field)
        count_in(self._hold, self._form.held_bytes + len(self._text), WITH_ITS_HEAD_BYTES)
        if self._hold is not None:
            self._hold.spool(self._form.spooled_bytes)

    def _begin(self, head: PartHead) -> None:
        self._heads += 1
        if self._heads > len(FIELDS) + self._config.max_files + 1:
            raise self._too_many_files()
        kind, options = head.disposition()
        if kind != b"form-data" or not options.get(b"name"):
            raise InvalidRequest("body", "a part of the multipart body has no name")
        name = options[b"name"].decode("utf-8", "replace")
        if name in FILE_FIELDS and b"filename" in options:
            declared = head.headers.get("content-type", b"").decode("latin-1")
            self._begin_file(name, options[b"filename"].decode("utf-8", "replace"), declared)
            return
        if name in FILE_FIELDS and b"filename*" in head.headers["content-disposition"].lower():
            raise InvalidRequest(
                name, f"{name!r} has its file name only in filename*", allowed="also filename"
            )
        check_known(name)
        if b"filename" in options:
            raise InvalidRequest(
                name,
                f"{name!r} must be a text, not a file",
                allowed=f"files are sent as {' or '.join(FILE_FIELDS)}",
            )
        if name in self._form.values:
            raise InvalidRequest(name, f"{name!r} is given more than once")
        self._field = name

    def _begin_file(self, field: str, raw_name: str, declared: str) -> None:
        name = safe_name(raw_name.replace("%22", '"')) if raw_name else ""
        check = TypeCheck(name or "file", declared, field=field)
        self._upload = Upload(name, Spool(self._config.data_dir / "tmp"), check)
        self._form.uploads.append(self._upload)
        # A browser sends a nameless, empty part for a file input without a file.
        if name and len(self._form.uploads) > self._config.max_files:
            raise self._too_many_files()

    async def _take_file(self, data: bytes, upload: Upload) -> None:
        if len(self._form.uploads) > self._config.max_files:
            raise self._too_many_files()
        limit = self._config.max_file_bytes
        if upload.spool.size_bytes + len(data) > limit:
            raise PayloadTooLarge(
                "file",
                f"{upload.name or 'file'!r} is larger than {limit} bytes",
                allowed=f"files of at most {limit} bytes",
            )
        upload.check.feed(data)
        await upload.spool.write(data)

    def _take_text(self, data: bytes, field: str) -> None:
        self._text += data
        if field in PROMPT_FIELDS:
            # UTF-8 needs at most four bytes for a character; the exact count follows at the end.
            if len(self._text) > self._config.max_prompt_chars * 4:
                raise field_too_long(field, self._config.max_prompt_chars)
        elif len(self._text) > MAX_VALUE_BYTES:
            raise PayloadTooLarge(field, f"{field!r} is longer than {MAX_VALUE_BYTES} bytes")

    async def _end(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            if not upload.name and upload.spool.size_bytes == 0:
                self._form.uploads.remove(upload)
                return
            upload.mime_type = upload.check.finish()
            await upload.spool.finish()
        elif self._field is not None:
            try:
                self._form.values[self._field] = self._text.decode("utf-8")
            except UnicodeDecodeError:
                raise UnsupportedMedia(
                    self._field, f"{self._field!r} is not text in UTF-8", allowed="UTF-8"
                ) from None
            self._field = None
            self._text.clear()

    def _too_many_files(self) -> PayloadTooLarge:
        limit = self._config.max_files
        return PayloadTooLarge(
            "file", f"more than {limit} files in one request", allowed=f"at most {limit} files"
        )


CONTENT_TYPES = (
    "application/json, multipart/form-data (for files) or application/x-www-form-urlencoded"
)
CLEAN_UP_S = 10.0
_CONTENT_TYPES_KEPT = 64
_PARSED_AT_ONCE_BYTES = 256 * 1024


async def read_submission(
    request: Request,
    config: Config,
    blobs: Blobs,
    *,
    is_allowed: Callable[[Address], bool] = is_public,
    pace: Pace | None = None,
    as_job: bool = False,
    digests: bool = False,
    hold: BodyBudget | None = None,
) -> Submission:
    """Read, check and store the content of a request; its bytes in memory count in `hold`, which
    the caller releases.

    `as_job`: it may have a webhook, and its JSON may wrap a native call. `digests`: compute those
    of its files.

    The files of the Submission are in `blobs`; a caller that does not record the submission deletes
    them. Raises InvalidRequest, PayloadTooLarge, UnsupportedMedia, FetchRefused, RequestTimeout,
    StoreUnavailable, QueueFull, or starlette's ClientDisconnect. A cancelled read leaves nothing
    behind.
    """
    kind = _encoding(request)
    form = Form()
    try:
        if kind == "multipart":
            parser = Multipart(request.headers["content-type"])
            body = incoming_of(request, config, pace=pace)
            await parser.read(body, FormReader(config, form, hold).take)
            submission = read_fields(from_form(form.values), config, is_allowed=is_allowed)
        else:
            wraps = as_job and kind == "json"
            raw = await _text_body(request, config, pace, hold, wraps=wraps)
            if kind == "pairs":
                values = from_form(_parse_pairs(raw))
                submission = read_fields(values, config, is_allowed=is_allowed)
            elif wraps and hold is not None and len(raw) > _PARSED_AT_ONCE_BYTES:
                submission = await _from_large_json(raw, config, is_allowed, hold)
            else:
                submission = _from_json(raw, config, is_allowed, wraps=wraps)
        if not (submission.prompt or submission.image_uri or form.uploads):
            raise InvalidRequest(
                "data",
                "there is neither a prompt nor a file",
                allowed="a text in 'data' (or 'text'), a file in 'file', or an 'image_uri'",
            )
        if submission.webhook_url is not None and not as_job:
            raise InvalidRequest("webhook_url", "only a job has a webhook", allowed="POST /submit")
        if submission.tiers is not None and not as_job:
            why = "only a job can wait for a processing tier"
            raise InvalidRequest("tiers", why, allowed="POST /submit")
        if not form.uploads:
            return submission
        taken = [await upload.spool.sha256() for upload in form.uploads if digests]
        attachments = await _store(form.uploads, blobs)
        return replace(submission, attachments=attachments, digests=tuple(taken))
    finally:
        if form.uploads:
            await _to_the_end(form.close(hold))


async def _text_body(
    request: Request, config: Config, pace: Pace | None, hold: BodyBudget | None, *, wraps: bool
) -> bytes:
    text_bytes = _text_body_bytes(config)
    most_bytes = max(text_bytes, LONGEST_BYTES) if wraps else text_bytes
    most_bytes = min(most_bytes, config.max_body_bytes)
    body = incoming_of(request, config, max_bytes=most_bytes, pace=pace, in_memory=True)
    return await body.whole(hold, free_bytes=WITH_ITS_HEAD_BYTES)


async def _from_large_json(
    raw: bytes, config: Config, is_allowed: Callable[[Address], bool], hold: BodyBudget
) -> Submission:
    """Run `_from_json` in a thread, one at a time: the values take several times the size of the
    JSON."""
    async with hold.turn:
        read = partial(_from_json, raw, config, is_allowed, wraps=True)
        submission = await asyncio.to_thread(read)
    if submission.endpoint is not None:
        hold.reach(len(submission.prompt))  # from here on only the prompt is in memory
    return submission


def _from_json(
    raw: bytes, config: Config, is_allowed: Callable[[Address], bool], *, wraps: bool
) -> Submission:
    """Return a prompt, or, if `wraps`, the native call that the JSON contains."""
    if wraps:
        check_parts(raw)
    values = _parse_json(raw)
    if wraps and "endpoint" in values:
        return _wrapped(values, config)
    most_bytes = _text_body_bytes(config)
    if len(raw) > most_bytes:  # it was read up to the bound of a native call
        check_size(len(raw), most_bytes)
    return read_fields(values, config, is_allowed=is_allowed)


def _encoding(request: Request) -> str:
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        raise UnsupportedMedia(
            "Content-Encoding", f"{packed[:32]!r} bodies are not supported", allowed="identity"
        )
    if len(request.headers.getlist("content-type")) > 1:
        raise UnsupportedMedia(
            "Content-Type", "there is more than one Content-Type", allowed=CONTENT_TYPES
        )
    return _encoding_of(request.headers.get("content-type"))


@lru_cache(_CONTENT_TYPES_KEPT)
def _encoding_of(content_type: str | None) -> str:
    media_type, options = parse_options_header(content_type)
    media = media_type.decode("latin-1")
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii", b"ascii"):
        raise UnsupportedMedia("Content-Type", "only UTF-8 is supported", allowed="charset=utf-8")
    if media == "multipart/form-data":
        return "multipart"
    if media == "application/x-www-form-urlencoded":
        return "pairs"
    if media == "application/json" or (
        media.startswith("application/") and media.endswith("+json")
    ):
        return "json"
    problem = (
        f"the media type {media[:64]!r} is not supported" if media else "there is no Content-Type"
    )
    raise UnsupportedMedia("Content-Type", problem, allowed=CONTENT_TYPES)


def _text_body_bytes(config: Config) -> int:
    """Return the size of the longest body for a prompt within its limit: an escaped pair such as
    \\ud83d\\ude00 takes 12 bytes for one character."""
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
        # Python rejects numbers of more than 4300 digits.
        raise InvalidRequest("body", "invalid JSON: a number is too long") from unfit
    if not isinstance(value, dict):
        raise InvalidRequest("body", "the JSON must be an object", allowed='{"data": "..."}')
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidRequest("body", f"{name[:64]!a} is given more than once")
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
            raise InvalidRequest(name[:64], f"{name[:64]!r} is given more than once")
        values[name] = value
    return values


async def discard(submission: Submission | NewJob, blobs: Blobs) -> None:
    """Delete the files of a submission that is not recorded, also if cancelled meanwhile."""
    keys = [attachment.blob_key for attachment in submission.attachments]
    if keys:
        await _to_the_end(blobs.delete(keys))


async def _store(uploads: list[Upload], blobs: Blobs) -> tuple[Attachment, ...]:
    """Put all uploads into the blob store, or none."""
    now = datetime.now(UTC)
    stored: list[Attachment] = []
    try:
        for upload in uploads:
            attachment = Attachment(
                file_id=new_id(),
                name=upload.name or "file",
                mime_type=upload.mime_type,
                size_bytes=upload.spool.size_bytes,
                blob_key=new_key(now),
            )
            stored.append(attachment)
            # A cancelled put may still succeed: wait for it, so that the deletion comes after it.
            await _to_the_end(_put(attachment.blob_key, upload, blobs))
    except BaseException as failed:  # cancellation too: no blob may remain without a request
        try:
            await _to_the_end(blobs.delete([attachment.blob_key for attachment in stored]))
        except StoreUnavailable as left:
            failed.add_note(f"blobs are left behind: {left}")
        raise
    return tuple(stored)


async def _put(key: str, upload: Upload, blobs: Blobs) -> None:
    if upload.spool.path is None:
        await blobs.put(key, upload.spool.data)
    else:
        await blobs.put(key, upload.spool.path)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end even if cancelled meanwhile, then raise the cancellation."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        # A scope of anyio, such as starlette's, cancels repeatedly: hence the shield.
        with anyio.move_on_after(CLEAN_UP_S, shield=True):
            await asyncio.wait([task])
        if task.done() and not task.cancelled() and (failed := task.exception()):
            raise asyncio.CancelledError from failed
        raise


ENDPOINT, WRAPPED_BODY = "endpoint", "body"
MOST_IN_ROW_BYTES = 256 * 1024
_HEAD_CHARS = 2_000
_JOB_FIELDS = ("priority", "deadline_ms", "webhook_url", "subject", "conversation", "tiers")


def _wrapped(values: Mapping[str, Any], config: Config) -> Submission:
    """Return the submission of a native call as a job. Raises InvalidRequest."""
    for name in values:
        if name not in (ENDPOINT, WRAPPED_BODY, *_JOB_FIELDS):
            raise InvalidRequest(
                name[:64],
                f"{name[:64]!a} can't be combined with 'endpoint'",
                allowed=", ".join((ENDPOINT, WRAPPED_BODY, *_JOB_FIELDS)),
            )
    path, body = values.get(ENDPOINT), values.get(WRAPPED_BODY)
    if not isinstance(body, dict):
        allowed = "the body of the call"
        raise InvalidRequest(WRAPPED_BODY, "'body' must be an object", allowed=allowed)
    facts = wrapped_facts(endpoint_named(path), body)
    submission = read_fields({name: values.get(name) for name in _JOB_FIELDS}, config)
    if names_tier(body):  # it takes precedence, also over the tenant's tiers
        if submission.tiers:
            why = "'tiers' can't be combined with a processing tier in 'body'"
            raise InvalidRequest("tiers", why, allowed="'tiers', or service_tier in 'body'")
        submission = replace(submission, tiers=())
    # Only ASCII, so that PostgreSQL can store any text.
    prompt = json.dumps(body, separators=(",", ":"))
    parsed(prompt.encode())  # as the worker parses it: Python accepts more than JSON allows
    return replace(
        submission,
        prompt=prompt,
        kind=facts.kind,
        model=facts.model,
        endpoint=path,
    )


async def with_body_as_file(job: NewJob, blobs: Blobs) -> NewJob:
    """Return the job as it is stored: a large body of a call becomes its only file, and `prompt`
    the body's beginning. Raises StoreUnavailable; the file is then removed with other orphans."""
    if job.endpoint is None or len(job.prompt) <= MOST_IN_ROW_BYTES:
        return job
    now = datetime.now(UTC)
    data = await aside(len(job.prompt), job.prompt.encode)
    attachment = Attachment(new_id(), "body.json", "application/json", len(data), new_key(now))
    await blobs.put(attachment.blob_key, data)
    # For display only. It must not be valid JSON: a worker of a version without such files takes it
    # for the body, and has to fail instead of making another call.
    return replace(job, prompt=job.prompt[:_HEAD_CHARS], attachments=(attachment,))


_PROPERTIES: dict[str, Any] = {
    "data": {"type": "string", "description": "The prompt"},
    "text": {"type": "string", "description": "Another name for `data`"},
    "image_uri": {"type": "string", "format": "uri", "description": "A public picture to fetch"},
    "type": {
        "type": "string",
        "enum": ["text_only", "multi_modal", "image_generation"],
        "description": "Skips classification",
    },
    "model": {"type": "string", "description": "Instead of the model configured for the type"},
    "priority": {"type": "integer", "minimum": -100, "maximum": 100, "default": 0},
    "deadline_ms": {
        "type": "integer",
        "minimum": 1,
        "description": "From receipt to admission; later the request expires",
    },
    "subject": {
        "type": "string",
        "minLength": 1,
        "maxLength": 200,
        "description": "Whom it is about, so that it can be erased: see docs/accounting.md",
    },
    "conversation": {
        "type": "string",
        "minLength": 1,
        "maxLength": 200,
        "description": "The conversation that it belongs to, whose budgets bind it: see "
        "docs/money.md",
    },
}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}

_TIERS: dict[str, Any] = {
    "type": "array",
    "items": {"type": "string", "enum": [*Tier]},
    "minItems": 1,
    "description": "Processing tiers that it may be put into: the cheapest that makes its deadline "
    "is taken. `live` always may be. See docs/jobs.md",
}
_A_TIER = f"({'|'.join(Tier)})"
_IN_FORM = {
    "tiers": {
        "type": "string",
        "pattern": f"^{_A_TIER}(,{_A_TIER})*$",
        "description": f"{_TIERS['description']}. With commas between them",
    }
}
_OF_JOBS: dict[str, Any] = {
    "tiers": _TIERS,
    "webhook_url": {
        "type": "string",
        "format": "uri",
        "description": "Gets a signed webhook at the end: see docs/jobs.md. Needs WEBHOOK_SECRET",
    },
}
_WRAPPED: dict[str, Any] = {
    "endpoint": {
        "type": "string",
        "description": "A native path, such as /v1/chat/completions, instead of a prompt",
    },
    "body": {"type": "object", "description": "What goes to `endpoint`; 20 MB at most"},
}
_EXAMPLES = {
    "text": {"value": {"data": "Explain the importance of cybersecurity."}},
    "image": {"value": {"data": "Generate an image of a futuristic city."}},
    "edit": {
        "value": {
            "data": "Make this picture a watercolour",
            "image_uri": "https://example.com/cat.png",
        }
    },
}


def _body_of(fields: dict[str, Any], only_json: dict[str, Any] | None = None) -> dict[str, Any]:
    in_form = {name: _IN_FORM.get(name, field) for name, field in fields.items()}
    values = {"type": "object", "properties": in_form, "additionalProperties": False}
    as_json = {**values, "properties": {**fields, **(only_json or {})}}
    with_files = {**values, "properties": {**in_form, "file": _FILES, "files": _FILES}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": as_json, "examples": _EXAMPLES},
                "multipart/form-data": {"schema": with_files},
                "application/x-www-form-urlencoded": {"schema": values},
            },
        }
    }


BODY = _body_of(_PROPERTIES)
JOB_BODY = _body_of(_PROPERTIES | _OF_JOBS, _WRAPPED)
