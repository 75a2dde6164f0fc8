"""What an upstream's refusal means: for the client, for the upstream's health, for everybody."""

from __future__ import annotations

from tidegate.errors import UpstreamGarbled
from tidegate.providers.gemini import faults
from tidegate.providers.relay import Exchange
from tidegate.relay.call import CallFailed
from tidegate.relay.coding import coding_of, decoded
from tidegate.relay.headers import to_return
from tidegate.relay.targets import Target

_REFUSAL_BYTES = 1_000_000


async def refusal_of(exchange: Exchange, target: Target, dialect: str) -> CallFailed:
    """An answer that is not a success, read to its end. Raises UpstreamError where that fails."""
    body = await exchange.read(_REFUSAL_BYTES)
    status = exchange.status
    if status < 400:
        raise UpstreamGarbled(f"the provider answered {status}, which is not followed")
    headers, key = exchange.headers, target.upstream.key.encode()
    coding = coding_of(headers)
    text = decoded(body, coding) if coding else body
    if coding and key in text:  # goes on decoded, and without it
        body, headers = text, [pair for pair in headers if pair[0].lower() != b"content-encoding"]
    said = faults.error_of_refusal_in(text)
    named = {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in exchange.headers
    }
    error = faults.from_status(status, said, named, secret=target.upstream.key, dialect=dialect)
    return CallFailed(
        error,
        target,
        status=status,
        headers=to_return(headers, target.upstream.key, same_length=False),
        body=body.replace(key, b"***"),
    )
