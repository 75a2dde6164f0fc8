"""Credentials of upstreams, renewed ahead of their end by a task each; a thread does the reading.

Invariants: a call never waits for a renewal; credentials are used until their end and not after it;
where none are valid the call fails as under a refused key; reasons are logged, without secrets, and
are in no error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from tidegate.errors import UpstreamUnauthorized
from tidegate.policy.access import Authentication, Network
from tidegate.policy.deployment import Upstream
from tidegate.telemetry.logging import Log, get_logger
from tidegate.upstream.transport import RawHeaders, RelayWire, RequestPlace, Signer, Timeouts

AHEAD_S = 300.0
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
# How long a start waits for the first credentials; calls fail until they are there.
FIRST_WITHIN_S = 10.0
_REASON_CHARS = 200


class CredentialsUnavailable(Exception):
    """There are no credentials; the message has the reason, without a secret."""


class Valid(Protocol):
    """Credentials that are valid until `expires_at`, by the calendar's clock."""

    @property
    def expires_at(self) -> float: ...

    @property
    def renew_at(self) -> float | None:
        """When to read them again, where that is sooner than ahead of their end."""

    def prove(
        self, method: str, place: RequestPlace, headers: RawHeaders, body: object
    ) -> RawHeaders:
        """The headers that prove who sends a request. Raises UpstreamRejected for one that can't
        be signed."""


class Source(Protocol):
    """Where credentials come from."""

    def read(self) -> Valid:
        """Read valid ones. Blocks. Raises CredentialsUnavailable."""


@dataclass(frozen=True, slots=True)
class BearerToken:
    """An OAuth token."""

    authorization: bytes
    expires_at: float
    renew_at: float | None = None

    def __repr__(self) -> str:
        return f"<BearerToken until {self.expires_at:.0f}>"

    def prove(
        self, method: str, place: RequestPlace, headers: RawHeaders, body: object
    ) -> RawHeaders:
        return [(b"authorization", self.authorization)]


class RenewedCredentials:
    """A `Signer`: one per process and authentication."""

    def __init__(self, source: Source, kind: str, clock: Callable[[], float] = time.time) -> None:
        self._source = source
        self._kind = kind
        self._clock = clock
        self._valid: Valid | None = None
        self._began_at = 0.0  # of the valid ones
        self._failures = 0
        self._wanted = asyncio.Event()  # sooner than planned

    def sign(
        self, method: str, place: RequestPlace, headers: RawHeaders, body: object
    ) -> RawHeaders:
        valid = self._valid
        if valid is None or self._clock() >= valid.expires_at:
            raise UpstreamUnauthorized("this gateway has no valid credentials for the provider")
        own = valid.prove(method, place, headers, body)
        names = {name for name, _ in own}
        return [*(pair for pair in headers if pair[0] not in names), *own]

    def refused(self) -> None:
        self._wanted.set()

    async def run(self) -> None:
        """Renew them until it is cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.wait_s()):
                    await self._wanted.wait()
                await asyncio.sleep(FIRST_RETRY_S)  # whoever is refused asks often
            self._wanted.clear()
            await self.renew()

    async def renew(self) -> None:
        """Read them once; what was valid stays so until its end."""
        try:
            self._valid = await asyncio.to_thread(self._source.read)
        except CredentialsUnavailable as failed:
            self._failures += 1
            fields = {"kind": self._kind, "reason": str(failed)[:_REASON_CHARS]}
            get_logger().error(Log.CREDENTIALS_FAILED, **fields)
            return
        self._began_at, self._failures = self._clock(), 0

    def wait_s(self) -> float:
        """Until the next reading."""
        if self._failures:
            return float(min(FIRST_RETRY_S * 2 ** (self._failures - 1), LONGEST_RETRY_S))
        valid = self._valid
        if valid is None:
            return FIRST_RETRY_S
        ahead_s = min(AHEAD_S, (valid.expires_at - self._began_at) / 2)
        at = valid.expires_at - ahead_s
        if valid.renew_at is not None:
            at = min(at, valid.renew_at)
        return max(FIRST_RETRY_S, at - self._clock())


def source_of(authentication: Authentication, network: Network | None) -> Source:
    """Importing the library of a kind takes a while: only the one that is used is. `network`: of
    the upstream, by which the tokens are requested too."""
    match authentication.kind:
        case "google":
            from tidegate.upstream.auth.google import GoogleSource

            return GoogleSource(authentication, network)
        case "entra":
            from tidegate.upstream.auth.entra import EntraSource

            return EntraSource(authentication, network)
    from tidegate.upstream.auth.aws import AwsSource

    return AwsSource(authentication)


@asynccontextmanager
async def open_signers(
    upstreams: Iterable[Upstream],
) -> AsyncIterator[Mapping[Authentication, Signer]]:
    """The credentials of `upstreams`, kept valid while the block runs. Never raises for those that
    can't be read: their calls fail, and it is logged."""
    signers: dict[Authentication, RenewedCredentials] = {}
    for upstream in upstreams:
        for dialect in upstream.base_urls:
            access = upstream.access(dialect)
            authentication = access.authentication
            if authentication is not None and authentication not in signers:
                source = await asyncio.to_thread(source_of, authentication, access.network)
                signers[authentication] = RenewedCredentials(source, authentication.kind)
    async with AsyncExitStack() as stack:
        if signers:
            first = asyncio.gather(*(one.renew() for one in signers.values()))
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_WITHIN_S):
                    await first
        for one in signers.values():
            stack.callback(asyncio.create_task(one.run()).cancel)
        yield signers


@asynccontextmanager
async def open_wire(timeouts: Timeouts, upstreams: Iterable[Upstream]) -> AsyncIterator[RelayWire]:
    """A wire to `upstreams`, with their credentials."""
    wire = RelayWire(timeouts)
    async with open_signers(upstreams) as wire.signers:
        await wire.start()
        try:
            yield wire
        finally:
            await wire.aclose()
