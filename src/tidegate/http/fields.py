"""The named values of a request, from whatever encoding, checked one by one.

Invariant: what leaves here can be stored in PostgreSQL (no NUL, no lone surrogates), put in a
provider's URL (the model) and compared (the numbers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.call import Kind
from tidegate.config import Config
from tidegate.errors import InvalidRequest, PayloadTooLarge
from tidegate.providers.addresses import Address, check_uri, is_public

PROMPT_FIELDS = ("data", "text")
FIELDS = (
    *PROMPT_FIELDS,
    *("image_uri", "type", "model", "priority", "deadline_ms", "webhook_url", "subject"),
)
FILE_FIELDS = ("file", "files")
MAX_PRIORITY = 100
MAX_DEADLINE_MS = 7 * 86_400_000
MAX_SUBJECT_CHARS = 200

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Fields:
    """The values of one request; `prompt` is empty when there was none."""

    prompt: str = ""
    image_uri: str | None = None
    kind: Kind | None = None
    model: str | None = None
    priority: int = 0
    deadline_ms: int | None = None
    webhook_url: str | None = None
    subject: str | None = None


def read_fields(
    values: Mapping[str, Any],
    config: Config,
    *,
    is_allowed: Callable[[Address], bool] = is_public,
) -> Fields:
    """Check `values` by name. None counts as absent. Raises InvalidRequest naming the field."""
    for name in values:
        check_known(name)
    given = {name: value for name, value in values.items() if value is not None}
    return Fields(
        prompt=_prompt(given, config.max_prompt_chars),
        image_uri=_image_uri(given.get("image_uri"), is_allowed),
        kind=_kind(given.get("type")),
        model=_model(given.get("model")),
        priority=_integer("priority", given.get("priority", 0), -MAX_PRIORITY, MAX_PRIORITY),
        deadline_ms=(
            _integer("deadline_ms", given["deadline_ms"], 1, MAX_DEADLINE_MS)
            if "deadline_ms" in given
            else None
        ),
        webhook_url=_webhook_url(given.get("webhook_url"), config),
        subject=_subject(given.get("subject")),
    )


def from_form(pairs: Mapping[str, str]) -> dict[str, Any]:
    """A form's texts as the values that JSON would have: numbers read, empty ones left out."""
    values: dict[str, Any] = {}
    for name, text in pairs.items():
        if name in PROMPT_FIELDS:
            values[name] = text
        elif text.strip():
            is_number = name in ("priority", "deadline_ms") and _INTEGER.fullmatch(text.strip())
            values[name] = int(text) if is_number else text.strip()
        else:
            check_known(name)
    return values


def check_known(name: str) -> None:
    """Refuse a field that we do not know, by name."""
    if name in FIELDS:
        return
    shown = name if name.isprintable() and len(name) <= 64 else ascii(name[:64])
    allowed = ", ".join(FIELDS)
    if name in FILE_FIELDS:
        raise InvalidRequest(
            name,
            f"{name!r} must be a file, sent as multipart/form-data with a file name",
            allowed=f"curl -F '{name}=@path'; values are {allowed}",
        )
    raise InvalidRequest(shown, f"there is no field {shown!r}", allowed=allowed)


def too_long(field: str, limit: int) -> PayloadTooLarge:
    """The prompt in `field` is over its limit."""
    return PayloadTooLarge(
        field,
        f"{field!r} is longer than {limit} characters",
        allowed=f"a prompt of at most {limit} characters",
    )


def _prompt(given: Mapping[str, Any], limit: int) -> str:
    if all(name in given for name in PROMPT_FIELDS):
        raise InvalidRequest("text", "'data' and 'text' mean the same: send one of them")
    for field in PROMPT_FIELDS:
        if field in given:
            prompt = _text(field, given[field])
            if len(prompt) > limit:
                raise too_long(field, limit)
            return prompt if prompt.strip() else ""
    return ""


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field, f"{field!r} must be a text, not {_json_name(value)}")
    if "\0" in value:
        raise InvalidRequest(field, f"{field!r} has a NUL character in it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            field, f"{field!r} has half of a surrogate pair in it", allowed="text in Unicode"
        ) from None
    return value


def _kind(value: Any) -> Kind | None:
    if value is None:
        return None
    try:
        return Kind(_text("type", value))
    except ValueError:
        raise InvalidRequest(
            "type", f"there is no type {value[:64]!r}", allowed=", ".join(Kind)
        ) from None


def _model(value: Any) -> str | None:
    if value is None:
        return None
    name = _text("model", value)
    if len(name) > 128 or not _MODEL.fullmatch(name):
        raise InvalidRequest(
            "model",
            f"{name[:64]!r} is not a model's name",
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


def _image_uri(value: Any, is_allowed: Callable[[Address], bool]) -> str | None:
    if value is None:
        return None
    uri = _text("image_uri", value)
    check_uri(uri, is_allowed)
    return uri


def _webhook_url(value: Any, config: Config) -> str | None:
    if value is None:
        return None
    url = _text("webhook_url", value)
    if config.webhook_secret is None:
        raise InvalidRequest(
            "webhook_url", "webhooks are off here", allowed="none while WEBHOOK_SECRET is not set"
        )
    private = config.webhook_allow_private
    check_uri(url, lambda address: private or is_public(address), field="webhook_url")
    return url


def _subject(value: Any) -> str | None:
    if value is None:
        return None
    subject = _text("subject", value).strip()
    if not 1 <= len(subject) <= MAX_SUBJECT_CHARS or not subject.isprintable():
        allowed = f"1 to {MAX_SUBJECT_CHARS} printable characters"
        raise InvalidRequest("subject", f"'subject' must be {allowed}", allowed=allowed)
    return subject


def _json_name(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")
