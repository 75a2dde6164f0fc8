"""Resumption of sessions of Gemini Live, by handles that serve their own tenant alone. Pure.

A provider's handle continues a session with all of its content, and belongs to the account. The
client gets it behind a signature by the upstream's key, of the tenant and the size of the
conversation: so no row is needed, every process can check it, and a renewed key ends it.

Invariant: only the gateway can make a handle that passes, since no client knows the upstream's key.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from tidegate.errors import NotFound
from tidegate.spine.routing import Target

_SHORTEST_KEY = 16
_SIGNED = re.compile(r"([0-9a-f]{32})\.([0-9]{1,12})\.(.{1,16000})", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class ResumedSession:
    """A session that is resumed. handle: the provider's. context_tokens: of its conversation when
    the client got the handle."""

    handle: str
    context_tokens: int


def may_sign(key: str) -> bool:
    """Return whether an upstream's key is a secret: a short one, such as `none`, can be guessed."""
    return len(key) >= _SHORTEST_KEY


def signed(handle: str, context_tokens: int, key: str, tenant: str) -> str:
    """Return a provider's handle as its tenant gets it. key: of the upstream."""
    return f"{_signature(handle, context_tokens, key, tenant)}.{context_tokens}.{handle}"


def resumed(
    named: tuple[str, str], targets: Iterable[Target], tenant: str
) -> tuple[ResumedSession, list[Target]]:
    """Return the session of a client's handle, and the targets where it can be resumed. named: the
    handle after its field. Raises NotFound for a handle that is not the tenant's own."""
    field, text = named
    parts = _SIGNED.fullmatch(text)
    if parts is not None:
        sign, tokens, handle = parts.groups()
        found = ResumedSession(handle, int(tokens))
        homes = [
            one
            for one in targets
            if may_sign(one.upstream.key)
            and hmac.compare_digest(
                sign, _signature(handle, found.context_tokens, one.upstream.key, tenant)
            )
        ]
        if homes:
            return found, homes
    raise NotFound("there is no session with this handle", field=field)


def _signature(handle: str, context_tokens: int, key: str, tenant: str) -> str:
    text = f"gemini-live\n{tenant}\n{context_tokens}\n{handle}"
    return hmac.new(key.encode(), text.encode(), sha256).hexdigest()[:32]
