"""API keys: how they are made, what is kept of them, how they are told from anything else. Pure.

A key is `tg_<prefix>_<secret>`. The prefix names it, in lists and logs. The secret is 43 letters
and digits of the system's random source, 256 bits: no search through them is possible, so one
SHA-256 is enough of a hash, where a password that people think of would need a slow one. Invariant:
only the digest of the whole key is kept; the key itself is with whom it was shown to, once.
"""

from __future__ import annotations

import hmac
import re
import secrets
import string
from dataclasses import dataclass, field
from hashlib import sha256

_PREFIX_LETTERS = string.ascii_lowercase + string.digits
_SECRET_LETTERS = string.ascii_letters + string.digits
_PREFIX_LENGTH = 10
_SECRET_LENGTH = 43  # 62 ** 43 > 2 ** 256
_KEY = re.compile(rb"tg_(?P<prefix>[a-z0-9]{10})_[A-Za-z0-9]{43}")
_NAMED = re.compile(r"(?:tg_)?(?P<prefix>[a-z0-9]{10})(?:_\w*)?")


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made. `text` is to be shown once."""

    prefix: str
    text: str = field(repr=False)
    digest: bytes


def make_key() -> NewKey:
    prefix = _random(_PREFIX_LETTERS, _PREFIX_LENGTH)
    text = f"tg_{prefix}_{_random(_SECRET_LETTERS, _SECRET_LENGTH)}"
    return NewKey(prefix, text, digest_of(text.encode()))


def digest_of(key: bytes) -> bytes:
    return sha256(key).digest()


def prefix_of(key: bytes) -> str | None:
    """The prefix of what is shaped like a key; None for anything else."""
    found = _KEY.fullmatch(key)
    return None if found is None else found["prefix"].decode()


def prefix_in(text: str) -> str | None:
    """The prefix that a person means: bare, with `tg_` before it, or with the secret after it."""
    found = _NAMED.fullmatch(text.strip())
    return None if found is None else found["prefix"]


def is_same(digest: bytes, other: bytes) -> bool:
    """In time that says nothing of where they differ."""
    return hmac.compare_digest(digest, other)


def _random(letters: str, length: int) -> str:
    return "".join(secrets.choice(letters) for _ in range(length))
