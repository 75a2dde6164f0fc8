"""Credentials that are renewed: tokens of Google and Microsoft, signatures of AWS.

A task each renews them ahead of their end; a thread does the reading. Importing a library takes a
while, and two are extras: only those of an authentication in use are imported.

Invariants: a call never waits for a renewal; credentials are used until their end and not after it;
where none are valid the call fails as under a refused key; reasons are logged, without secrets, and
are in no error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC
from typing import TYPE_CHECKING, Any, Protocol

from tidegate.errors import UpstreamRejected, UpstreamUnauthorized
from tidegate.policy.access import Authentication, Network
from tidegate.policy.deployment import Upstream
from tidegate.telemetry.logging import Log, get_logger
from tidegate.upstream.transport import RawHeaders, RelayWire, RequestPlace, Signer, Timeouts

if TYPE_CHECKING:
    from google.auth.credentials import Credentials
    from requests import Session

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


class CredentialSource(Protocol):
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

    def __init__(
        self, source: CredentialSource, kind: str, clock: Callable[[], float] = time.time
    ) -> None:
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
        if valid is None or self.has_ended:
            raise UpstreamUnauthorized("this gateway has no valid credentials for the provider")
        own = valid.prove(method, place, headers, body)
        names = {name for name, _ in own}
        return [*(pair for pair in headers if pair[0] not in names), *own]

    def refused(self) -> None:
        self._wanted.set()

    @property
    def has_ended(self) -> bool:
        """Whether there are no valid ones."""
        return self._valid is None or self._clock() >= self._valid.expires_at

    async def run(self) -> None:
        """Renew them until it is cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.wait_s()):
                    await self._wanted.wait()
                await asyncio.sleep(FIRST_RETRY_S)  # one refusal seldom comes alone
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


_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
_USUAL_S = 3_600.0  # where a token does not say when it ends


class GoogleSource:
    """Reads tokens of a service account's file, or by the application default credentials."""

    def __init__(self, authentication: Authentication, network: Network | None) -> None:
        self._file = authentication.option("credentials_file")
        self._network = network
        self._credentials: Credentials | None = None

    def read(self) -> BearerToken:
        """Raises CredentialsUnavailable."""
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import Request

        try:
            with _session_by(self._network) as session:
                request = Request(session=session)
                if self._credentials is None:
                    self._credentials = self._found()
                self._credentials.refresh(request)  # type: ignore[no-untyped-call]
        except (GoogleAuthError, OSError, ValueError) as failed:
            # Its second argument is what was answered, of any length.
            reason = str(failed.args[0]) if failed.args else ""
            message = f"{type(failed).__name__}: {reason}" if reason else type(failed).__name__
            raise CredentialsUnavailable(message) from None
        token, expiry = self._credentials.token, self._credentials.expiry
        if not token:
            raise CredentialsUnavailable("the token's server gave no token")
        ends = time.time() + _USUAL_S if expiry is None else expiry.replace(tzinfo=UTC).timestamp()
        return BearerToken(b"Bearer " + token.encode(), ends)

    def _found(self) -> Credentials:
        import google.auth
        from google.oauth2 import service_account

        found: Credentials
        if self._file:
            load = service_account.Credentials.from_service_account_file
            found = load(self._file, scopes=_SCOPES)  # type: ignore[no-untyped-call]
        else:
            found, _ = google.auth.default(scopes=_SCOPES)
        return found


def _session_by(network: Network | None) -> Session:
    """A session by the network of an upstream; the environment's proxies apply where it has no
    proxy of its own."""
    import requests

    session = requests.Session()
    if network is None:
        return session
    if (proxy := network.proxy) is not None:
        session.proxies = {"http": proxy.url, "https": proxy.url}
    if network.ca_file:
        session.verify = network.ca_file
    if network.certificate:
        key = network.certificate_key
        session.cert = (network.certificate, key) if key else network.certificate
    return session


class EntraSource:
    """Reads tokens for one scope."""

    def __init__(self, authentication: Authentication, network: Network | None) -> None:
        from azure.identity import DefaultAzureCredential

        self._scope = authentication.option("scope")
        options: dict[str, object] = {}
        if network is not None and network.proxy is not None:
            options["proxies"] = {"http": network.proxy.url, "https": network.proxy.url}
        if network is not None and network.ca_file:
            options["connection_verify"] = network.ca_file
        self._credential = DefaultAzureCredential(**options)

    def read(self) -> BearerToken:
        """Raises CredentialsUnavailable."""
        from azure.core.exceptions import AzureError

        try:
            token = self._credential.get_token(self._scope)
        except (AzureError, OSError, ValueError) as failed:
            reason = str(failed).partition("\n")[0]
            raise CredentialsUnavailable(f"{type(failed).__name__}: {reason}") from None
        return BearerToken(b"Bearer " + token.token.encode(), float(token.expires_on))


# botocore renews credentials itself when they are read within ten minutes of their end.
READ_EVERY_S = 60.0
_GOOD_FOR_S = 600.0
_PROOF = ("Authorization", "X-Amz-Date", "X-Amz-Security-Token")


@dataclass(frozen=True, slots=True)
class SigningKey:
    """Credentials with the region and the service that signatures name."""

    credentials: Any = field(repr=False)
    region: str
    service: str
    expires_at: float
    renew_at: float | None

    def prove(
        self, method: str, place: RequestPlace, headers: RawHeaders, body: object
    ) -> RawHeaders:
        """Raises UpstreamRejected for a body that comes in pieces."""
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        if not isinstance(body, bytes | None):
            raise UpstreamRejected("an upload can't be signed for AWS: its body comes in pieces")
        target, _, rest = place.line.partition(b" ")
        host = rest.partition(b"host: ")[2].partition(b"\r\n")[0].decode("ascii")
        scheme = "https" if place.origin.secure else "http"
        path = target.decode("ascii").removeprefix(f"{scheme}://{host}")
        signed = AWSRequest(method, f"{scheme}://{host}{path}", {"host": host}, body or b"")
        SigV4Auth(self.credentials, self.service, self.region).add_auth(signed)
        return [
            (name.lower().encode(), signed.headers[name].encode())
            for name in _PROOF
            if name in signed.headers
        ]


class AwsSource:
    """Reads the credentials of one profile, or of the surroundings."""

    def __init__(self, authentication: Authentication) -> None:
        self._profile = authentication.option("aws_profile") or None
        self._region = authentication.option("region")
        self._service = authentication.option("aws_service")
        self._session: Any = None

    def read(self) -> SigningKey:
        """Raises CredentialsUnavailable."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.session import Session

        try:
            if self._session is None:
                self._session = Session(profile=self._profile)
            found = self._session.get_credentials()
            frozen = None if found is None else found.get_frozen_credentials()
        except (BotoCoreError, ClientError, OSError, ValueError, RuntimeError) as failed:
            raise CredentialsUnavailable(f"{type(failed).__name__}: {failed}") from None
        if frozen is None:
            raise CredentialsUnavailable("botocore finds no credentials of AWS here")
        now = time.time()
        return SigningKey(
            frozen, self._region, self._service, now + _GOOD_FOR_S, now + READ_EVERY_S
        )


def source_of(authentication: Authentication, network: Network | None) -> CredentialSource:
    """`network`: of the upstream, by which the tokens are requested too."""
    match authentication.kind:
        case "google":
            return GoogleSource(authentication, network)
        case "entra":
            return EntraSource(authentication, network)
    return AwsSource(authentication)


class Signers(Mapping[Authentication, Signer]):
    """The credentials of upstreams, kept valid until `close`. Those of an upstream that was
    replaced sign until their end, for calls that have begun with it and wait; after it those sign
    that are read by the same options, as from the same file once it was replaced."""

    def __init__(self) -> None:
        self._signers: dict[Authentication, RenewedCredentials] = {}
        self._tasks: dict[Authentication, asyncio.Task[None]] = {}

    def __getitem__(self, authentication: Authentication) -> Signer:
        own = self._signers.get(authentication)
        if authentication not in self._tasks and (own is None or own.has_ended):
            identity = authentication.kind, authentication.options
            for renewed in self._tasks:
                if (renewed.kind, renewed.options) == identity:
                    return self._signers[renewed]
        return self._signers[authentication]

    def __iter__(self) -> Iterator[Authentication]:
        return iter(self._signers)

    def __len__(self) -> int:
        return len(self._signers)

    async def open(self, upstreams: Iterable[Upstream]) -> None:
        """Keep those of `upstreams` valid too, and wait for the first. Never raises for those that
        can't be read: their calls fail, and it is logged."""
        new: dict[Authentication, RenewedCredentials] = {}
        for authentication, network in _renewed(upstreams).items():
            if authentication not in self._tasks:
                source = await asyncio.to_thread(source_of, authentication, network)
                new[authentication] = RenewedCredentials(source, authentication.kind)
        if new:
            first = asyncio.gather(*(one.renew() for one in new.values()))
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_WITHIN_S):
                    await first
        for authentication, one in new.items():
            if authentication not in self._tasks:
                self._signers[authentication] = one
                self._tasks[authentication] = asyncio.create_task(one.run())

    def keep(self, upstreams: Iterable[Upstream]) -> None:
        """Renew those of `upstreams` alone from now on."""
        needed = _renewed(upstreams)
        for authentication in [one for one in self._tasks if one not in needed]:
            self._tasks.pop(authentication).cancel()
        for authentication, one in list(self._signers.items()):
            if authentication not in self._tasks and one.has_ended:
                del self._signers[authentication]

    def close(self) -> None:
        """Renew none any more, and have none left."""
        self.keep(())
        self._signers.clear()


def _renewed(upstreams: Iterable[Upstream]) -> dict[Authentication, Network | None]:
    """The authentications of upstreams whose credentials are renewed, with their networks."""
    found: dict[Authentication, Network | None] = {}
    for upstream in upstreams:
        for dialect in upstream.base_urls:
            access = upstream.access(dialect)
            if access.authentication is not None:
                found.setdefault(access.authentication, access.network)
    return found


@asynccontextmanager
async def open_wire(
    timeouts: Timeouts, upstreams: Iterable[Upstream], signers: Signers | None = None
) -> AsyncIterator[RelayWire]:
    """A wire to `upstreams`, with their credentials, which are put into `signers`."""
    wire = RelayWire(timeouts)
    wire.signers = signers = Signers() if signers is None else signers
    try:
        await signers.open(upstreams)
        await wire.start()
        try:
            yield wire
        finally:
            await wire.aclose()
    finally:
        signers.close()
