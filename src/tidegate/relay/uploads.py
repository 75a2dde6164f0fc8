"""Uploads of files to Gemini: streamed through, never held in memory.

Invariant: the upstream's upload URL, which holds its key, never reaches a client: it gets one of
ours, which says the same but for the key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import parse_qsl, urlencode, urlsplit

from tidegate.errors import Forbidden, UpstreamError
from tidegate.relay.call import CallFailed, Life, NativeCall, Out
from tidegate.relay.headers import Headers, to_return
from tidegate.relay.paths import Operation
from tidegate.relay.refusal import refusal_of
from tidegate.relay.spine import Relay
from tidegate.relay.targets import Target

MAX_BYTES = 2 * 1024**3  # https://ai.google.dev/gemini-api/docs/files
_URLS = (b"x-goog-upload-url", b"x-goog-upload-control-url")


def check_files(call: NativeCall) -> None:
    """Raises Forbidden where a caller with a key would see the files of others: the account's list
    is one for all tenants, while a file's own name is known to nobody but who made it."""
    lists = call.endpoint.operation is Operation.FILES and call.endpoint.path.endswith("/files")
    if lists and call.caller.key_id is not None:
        raise Forbidden("files are not listed: the account behind this gateway serves others too")


async def upload(
    relay: Relay,
    call: NativeCall,
    pieces: AsyncIterator[bytes],
    own_url: str,
    out: Out,
    life: Life,
) -> None:
    """One request of an upload; `own_url` is how the client reaches us. Raises as `Relay.run`."""
    target = relay.first_of(call.endpoint.dialect)
    life.target, life.tries = target, 1
    try:
        exchange = await relay.open(call, target, pieces)
        try:
            if exchange.status >= 300:
                raise await refusal_of(exchange, target)
            life.http_status = exchange.status
            headers = _own(to_return(exchange.headers), target, own_url)
            await out.start(exchange.status, headers)
            while piece := await exchange.next():
                life.keep(piece)
                await out.body(piece, True)
            await out.body(b"", False)
        finally:
            exchange.close()
    except UpstreamError as error:
        raise CallFailed(error, target) from None


def _own(headers: Headers, target: Target, own_url: str) -> Headers:
    return [
        (name, _own_url(value.decode("latin-1"), own_url).encode() if name in _URLS else value)
        for name, value in headers
    ]


def _own_url(theirs: str, own_url: str) -> str:
    parts = urlsplit(theirs)
    pairs = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if pair[0] != "key"]
    return f"{own_url}/upload/v1beta/files?{urlencode(pairs)}"
