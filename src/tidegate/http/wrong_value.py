"""What is wrong with a value of a request, and what is allowed, in words for its sender. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {
    "uuid_parsing": ("is no id", "an id, as the answer to a submit has it in request_id"),
    "uuid_type": ("is no id", "an id, as the answer to a submit has it in request_id"),
    "int_parsing": ("is no whole number", "a whole number"),
    "int_type": ("is no whole number", "a whole number"),
    "int_from_float": ("is no whole number", "a whole number"),
    "float_parsing": ("is no number", "a number"),
    "float_type": ("is no number", "a number"),
    "bool_parsing": ("is neither true nor false", "true or false"),
    "bool_type": ("is neither true nor false", "true or false"),
    "string_type": ("is no text", "a text"),
    "list_type": ("is no list", "a list"),
    "dict_type": ("is no object", "an object"),
    "date_from_datetime_parsing": ("is no day", "a day such as 2026-01-31"),
    "date_parsing": ("is no day", "a day such as 2026-01-31"),
    "datetime_from_date_parsing": ("is no time", "a time such as 2026-01-31T12:00:00Z"),
    "datetime_parsing": ("is no time", "a time such as 2026-01-31T12:00:00Z"),
    "extra_forbidden": ("is not known", None),
    "missing": ("is not given", "required"),
}
_BOUNDS = {
    "greater_than_equal": ("is too small", "{ge} or more"),
    "greater_than": ("is too small", "more than {gt}"),
    "less_than_equal": ("is too large", "{le} or less"),
    "less_than": ("is too large", "less than {lt}"),
    "string_too_short": ("is too short", "{min_length} characters or more"),
    "string_too_long": ("is too long", "{max_length} characters or fewer"),
    "too_short": ("has too few", "{min_length} or more"),
    "too_long": ("has too many", "{max_length} or fewer"),
    "literal_error": ("is not known", "{expected}"),
    "enum": ("is not known", "{expected}"),
}


def in_words(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """What is wrong, and what is allowed where that can be told; `error` is one of Pydantic's."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _KINDS:
        return _KINDS[kind]
    if kind in _BOUNDS:
        wrong, allowed = _BOUNDS[kind]
        return wrong, allowed.format(**context)
    return f"is not right: {error['msg']}", None
