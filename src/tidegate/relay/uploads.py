"""Uploads of files to Gemini: streamed through, never held in memory.

Invariant: the upstream's upload URL, which holds its key, never reaches a client: it gets one of
ours, which says the same but for the key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from urllib.parse import parse_qsl, urlencode, urlsplit

from tidegate.errors import Forbidden, UpstreamError
from tidegate.relay.call import CallFailed, Life, NativeCall, Out
from tidegate.relay.headers import Headers, to_return
from tidegate.relay.paths import Operation
from tidegate.relay.refusal import refusal_of
from tidegate.relay.spine import Relay

UPLOADS = "/upload/v1beta/files"
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
    own: Callable[[str], str],
    out: Out,
    life: Life,
) -> None:
    """One request of an upload; `own` gives the URL by which the client reaches us, of its query.
    Raises as `Relay.run`."""
    target = relay.first_of(call.endpoint.dialect)
    life.target, life.tries = target, 1
    try:
        exchange = await relay.open(call, target, pieces)
        try:
            if exchange.status >= 300:
                raise await refusal_of(exchange, target, call.endpoint.dialect)
            life.http_status = exchange.status
            headers = _own(to_return(exchange.headers, target.upstream.key), own)
            await out.start(exchange.status, headers)
            while piece := await exchange.next():
                life.keep(piece)
                await out.body(piece, True)
            await out.body(b"", False)
        finally:
            exchange.close()
    except UpstreamError as error:
        raise CallFailed(error, target) from None


def _own(headers: Headers, own: Callable[[str], str]) -> Headers:
    return [
        (name, own(_query_of(value.decode("latin-1"))).encode() if name in _URLS else value)
        for name, value in headers
    ]


def _query_of(theirs: str) -> str:
    """Of the upstream's URL, without its key."""
    pairs = parse_qsl(urlsplit(theirs).query, keep_blank_values=True)
    return urlencode([pair for pair in pairs if pair[0] != "key"])
