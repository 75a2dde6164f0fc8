"""Credentials that are renewed: tokens of Google and Microsoft, signatures of AWS.

Each is renewed ahead of its expiry by a task of its own; a thread does the reading. Importing the
libraries is slow, and two are extras: only those of an authentication in use are imported.

Invariants: a call never waits for a renewal; credentials are used until they expire, never after;
without valid credentials a call fails as with a rejected key; the reasons are logged, without
secrets, and never appear in errors.
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
# The longest time that a start waits for the first credentials; until they come, calls fail.
FIRST_WITHIN_S = 10.0
_REASON_CHARS = 200


class CredentialsUnavailable(Exception):
    """No credentials could be read; the message has the reason, without a secret."""


class Valid(Protocol):
    """Credentials that are valid until `expires_at`, in Unix time."""

    @property
    def expires_at(self) -> float: ...

    @property
    def renew_at(self) -> float | None:
        """Return when to read them again, if that is earlier than the usual time ahead of their
        expiry."""

    def prove(
        self, method: str, place: RequestPlace, headers: RawHeaders, body: object
    ) -> RawHeaders:
        """Return the headers that authenticate a request. Raises UpstreamRejected for a request
        that cannot be signed."""


class CredentialSource(Protocol):
    """A source of credentials."""

    def read(self) -> Valid:
        """Read valid credentials. Blocks. Raises CredentialsUnavailable."""


@dataclass(frozen=True, slots=True)
class BearerToken:
    """An OAuth access token."""

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
    """A `Signer` that renews its credentials: one per process and authentication."""

    def __init__(
        self, source: CredentialSource, kind: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._source = source
        self._kind = kind
        self._clock = clock
        self._valid: Valid | None = None
        self._began_at = 0.0  # when the valid ones were read
        self._failures = 0
        self._renewal = asyncio.Event()  # set to renew ahead of time

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
        self._renewal.set()

    @property
    def has_ended(self) -> bool:
        """Return whether there are no valid credentials."""
        return self._valid is None or self._clock() >= self._valid.expires_at

    async def run(self) -> None:
        """Renew the credentials until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.wait_s()):
                    await self._renewal.wait()
                await asyncio.sleep(FIRST_RETRY_S)  # rejections come in groups
            self._renewal.clear()
            await self.renew()

    async def renew(self) -> None:
        """Read the credentials once; on failure the previous ones stay in use until they expire."""
        try:
            self._valid = await asyncio.to_thread(self._source.read)
        except CredentialsUnavailable as failed:
            self._failures += 1
            fields = {"kind": self._kind, "reason": str(failed)[:_REASON_CHARS]}
            get_logger().error(Log.CREDENTIALS_FAILED, **fields)
            return
        self._began_at, self._failures = self._clock(), 0

    def wait_s(self) -> float:
        """Return the time until the next read: with backoff after failures."""
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
_USUAL_S = 3_600.0  # lifetime of a token that does not state its own


class GoogleSource:
    """Reads tokens of a service account file, or of the application default credentials."""

    def __init__(self, authentication: Authentication, network: Network | None) -> None:
        self._file = authentication.option("credentials_file")
        self._network = network
        self._credentials: Credentials | None = None

    def read(self) -> BearerToken:
        """Read an access token. Raises CredentialsUnavailable."""
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import Request

        try:
            with _session_by(self._network) as session:
                request = Request(session=session)
                if self._credentials is None:
                    self._credentials = self._found()
                self._credentials.refresh(request)  # type: ignore[no-untyped-call]
        except (GoogleAuthError, OSError, ValueError) as failed:
            self._credentials = None  # their file may be replaced meanwhile
            # The error's second argument is the answer, of any length.
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
    """Return a session with an upstream's network options. The environment's proxies apply if the
    upstream has no proxy."""
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
    """Reads tokens of Microsoft Entra for one scope."""

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
        """Read an access token. Raises CredentialsUnavailable."""
        from azure.core.exceptions import AzureError

        try:
            token = self._credential.get_token(self._scope)
        except (AzureError, OSError, ValueError) as failed:
            reason = str(failed).partition("\n")[0]
            raise CredentialsUnavailable(f"{type(failed).__name__}: {reason}") from None
        return BearerToken(b"Bearer " + token.token.encode(), float(token.expires_on))


# botocore renews credentials itself if they are read within ten minutes of their expiry.
READ_EVERY_S = 60.0
_GOOD_FOR_S = 600.0
_PROOF = ("Authorization", "X-Amz-Date", "X-Amz-Security-Token")


@dataclass(frozen=True, slots=True)
class SigningKey:
    """AWS credentials with the region and the service that signatures name."""

    credentials: Any = field(repr=False)
    region: str
    service: str
    expires_at: float
    renew_at: float | None

    def prove(
        self, method: str, place: RequestPlace, headers: RawHeaders, body: object
    ) -> RawHeaders:
        """Return the headers of a signature. Raises UpstreamRejected for a body in pieces."""
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
    """Reads the credentials of a profile, or by AWS's default chain."""

    def __init__(self, authentication: Authentication) -> None:
        self._profile = authentication.option("aws_profile") or None
        self._region = authentication.option("region")
        self._service = authentication.option("aws_service")
        self._session: Any = None  # of credentials that botocore renews

    def read(self) -> SigningKey:
        """Read the credentials. Raises CredentialsUnavailable."""
        from botocore.credentials import RefreshableCredentials
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.session import Session

        session, self._session = self._session, None
        try:
            session = session or Session(profile=self._profile)
            found = session.get_credentials()
            frozen = None if found is None else found.get_frozen_credentials()
            # botocore reads a file of fixed keys once, which may be replaced by others.
            if isinstance(found, RefreshableCredentials):
                self._session = session
        except (BotoCoreError, ClientError, OSError, ValueError, RuntimeError) as failed:
            raise CredentialsUnavailable(f"{type(failed).__name__}: {failed}") from None
        if frozen is None:
            raise CredentialsUnavailable("botocore finds no credentials of AWS here")
        now = time.time()
        return SigningKey(
            frozen, self._region, self._service, now + _GOOD_FOR_S, now + READ_EVERY_S
        )


def source_of(authentication: Authentication, network: Network | None) -> CredentialSource:
    """Return the source of an authentication. network: that of the upstream, also used to request
    tokens."""
    match authentication.kind:
        case "google":
            return GoogleSource(authentication, network)
        case "entra":
            return EntraSource(authentication, network)
    return AwsSource(authentication)


class Signers(Mapping[Authentication, Signer]):
    """The credentials of all upstreams, renewed until `close`.

    The credentials of a replaced upstream are used until they expire, for waiting calls that began
    with it; after that, credentials that are read by the same options are used, such as those of
    the same file, if it was replaced.
    """

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
        """Renew also the credentials of `upstreams`, and wait for the first. Never raises if they
        cannot be read: that is logged, and their calls fail."""
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
        """Renew only the credentials of `upstreams` from now on."""
        needed = _renewed(upstreams)
        for authentication in [one for one in self._tasks if one not in needed]:
            self._tasks.pop(authentication).cancel()
        for authentication, one in list(self._signers.items()):
            if authentication not in self._tasks and one.has_ended:
                del self._signers[authentication]

    def close(self) -> None:
        """Stop all renewals and drop all credentials."""
        self.keep(())
        self._signers.clear()


def _renewed(upstreams: Iterable[Upstream]) -> dict[Authentication, Network | None]:
    """Return the authentications of upstreams whose credentials are renewed, with their
    networks."""
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
    """Open a transport to `upstreams`, with their credentials, which are added to `signers`."""
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
