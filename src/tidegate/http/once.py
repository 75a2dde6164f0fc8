"""`Idempotency-Key` on native paths: one call of the provider, however often it is asked for.

Invariant: who asks again for the same (path, query and body) gets the same answer; while the first
is still being answered it waits for that. What failed is not kept, nor what is too long to be kept
whole: who asks again is answered anew.
"""

from __future__ import annotations

import asyncio
from hashlib import sha256
from urllib.parse import parse_qsl

from tidegate.errors import (
    BudgetExceeded,
    IdempotencyConflict,
    InvalidRequest,
    StoreUnavailable,
)
from tidegate.http.idempotency import HEADER, MOST_CHARS, REPLAYED_HEADER, is_key
from tidegate.relay.asked import asked_of, parsed
from tidegate.relay.call import KEPT_BYTES, Life, NativeCall, Out
from tidegate.relay.usage_event import WithoutUsageEvent
from tidegate.store.native_keys import Given, NativeKeys
from tidegate.store.records import Idempotency
from tidegate.telemetry import Log, get_logger

_LOOK_S = 0.1
_NAME = HEADER.lower().encode()
_MARGIN_MS = 60_000

log = get_logger()


def wanted_of(call: NativeCall, headers: list[tuple[bytes, bytes]]) -> Idempotency | None:
    """The key of a request with the digest of what it asks for; None without one. Raises
    InvalidRequest."""
    keys = [value for name, value in headers if name == _NAME]
    if not keys or not call.endpoint.is_counted:
        return None
    text = keys[0].decode("latin-1")
    if len(keys) > 1 or not is_key(text):
        allowed = f"1 to {MOST_CHARS} printable characters of ASCII, such as a UUID"
        raise InvalidRequest(HEADER, "this is not an idempotency key", allowed=allowed)
    return Idempotency(text, sha256(b"%b\0%b" % (_target_of(call).encode(), call.body)).hexdigest())


def shows_key(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name == _NAME for name, _ in headers)


async def check_known(
    keys: NativeKeys, call: NativeCall, headers: list[tuple[bytes, bytes]], spent: BudgetExceeded
) -> None:
    """Raises `spent` unless the call's key stands for a call already: to hear of that costs
    nothing. Raises InvalidRequest and StoreUnavailable as well."""
    wanted = wanted_of(call, headers)
    if wanted is None or await keys.known(call.caller.tenant_id, wanted.key) is None:
        raise spent


def _target_of(call: NativeCall) -> str:
    """What is asked beside the body. In whatever order a query is written, it asks the same."""
    path = call.endpoint.path_for(call.endpoint.model or "")
    if not call.query:
        return path
    pairs = parse_qsl(call.query, keep_blank_values=True, errors="surrogateescape")
    return f"{path}?{sorted(pairs)!a}"


class Once:
    """One request under a key."""

    def __init__(self, keys: NativeKeys, call: NativeCall, wanted: Idempotency) -> None:
        self._keys = keys
        self._call = call
        self._wanted = wanted
        self._tenant_id = call.caller.tenant_id

    async def given_before(self, total_timeout_ms: int) -> Given | None:
        """What was answered under the key; None if this request is to be answered. Raises
        IdempotencyConflict, also where the first is not answered before our deadline."""
        call = self._call
        longest_ms = total_timeout_ms + call.wait_ms + _MARGIN_MS
        while True:
            given = await self._keys.take(
                self._tenant_id, self._wanted, call.request_id, longest_ms
            )
            if given is None:
                return None
            if given.digest != self._wanted.digest:
                raise IdempotencyConflict("the key was used for another request")
            if given.answer is not None:
                return given
            if call.left_ms() <= 0:
                raise IdempotencyConflict(
                    "the first request under the key is still being answered",
                    retry_after_ms=1_000,
                )
            await asyncio.sleep(_LOOK_S)

    async def replay(self, given: Given, out: Out) -> None:
        """Answer as was answered before."""
        assert given.answer is not None
        answer = given.answer
        asked = asked_of(self._call.endpoint, parsed(self._call.body))
        if asked.wants_usage and given.content_type.startswith("text/event-stream"):
            without = WithoutUsageEvent()
            answer = without.take(answer) + without.rest()
        headers = [
            (b"content-type", given.content_type.encode("latin-1")),
            (b"content-length", str(len(answer)).encode()),
            (REPLAYED_HEADER.encode(), b"true"),
        ]
        await out.start(given.http_status, headers)
        await out.body(answer, False)

    async def ended(self, life: Life, content_type: str) -> None:
        """Keep what was answered, once it has gone out."""
        if life.answer_bytes > KEPT_BYTES:  # only parts of it are there
            await self.failed()
            return
        given = Given(
            self._wanted.digest, self._call.request_id, life.http_status, content_type, life.answer
        )
        try:
            await self._keys.end(self._tenant_id, self._wanted.key, given)
        except StoreUnavailable as away:  # the key is free again when no call can last that long
            log.warning(Log.STORE_AWAY, detail=away.message)

    async def failed(self) -> None:
        """Let it be asked again."""
        try:
            await self._keys.free(self._tenant_id, self._wanted.key, self._call.request_id)
        except StoreUnavailable as away:
            log.warning(Log.STORE_AWAY, detail=away.message)
