"""What an upstream's refusal means: for the client, for the upstream's health, for everybody."""

from __future__ import annotations

from tidegate.errors import UpstreamGarbled, UpstreamThrottled
from tidegate.providers.gemini import faults
from tidegate.providers.relay import Exchange
from tidegate.relay.call import CallFailed
from tidegate.relay.headers import to_return
from tidegate.relay.targets import Target
from tidegate.telemetry import get_logger

_REFUSAL_BYTES = 1_000_000
_SPENT_MS = 600_000  # an account without money: nobody says when it will have some again
_REASON_CHARS = 200

log = get_logger()


async def refusal_of(exchange: Exchange, target: Target) -> CallFailed:
    """An answer that is not a success, read to its end. Raises UpstreamError where that fails."""
    body = await exchange.read(_REFUSAL_BYTES)
    status = exchange.status
    if status < 400:
        raise UpstreamGarbled(f"the provider answered {status}, which is not followed")
    said = faults.error_in(body) or {}
    named = {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in exchange.headers
    }
    error = faults.from_status(status, said, named, secret=target.upstream.key)
    if isinstance(error, UpstreamThrottled) and said.get("code") == "insufficient_quota":
        error = UpstreamThrottled(error.message, retry_after_ms=_SPENT_MS)
    return CallFailed(
        error,
        target,
        status=status,
        headers=to_return(exchange.headers, same_length=False),
        body=body.replace(target.upstream.key.encode(), b"***"),
    )
