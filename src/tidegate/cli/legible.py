"""Text of somebody else, made safe to show: a terminal obeys control characters. Pure."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def legible(text: str) -> str:
    """Control characters but new lines and tabs as `\\x1b` and the like: an answer of a model, or a
    reason somebody typed, could else set a terminal's title, clear it or write its clipboard."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))
