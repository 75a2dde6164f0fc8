"""Signatures of AWS, version 4, with credentials as botocore finds them.

It finds them in the environment, a profile, a container or an instance, and renews those that end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import BotoCoreError
from botocore.session import Session

from tidegate.errors import UpstreamRejected
from tidegate.policy.access import Authentication
from tidegate.upstream.auth.credentials import CredentialsUnavailable
from tidegate.upstream.transport import RawHeaders, RequestPlace

# botocore renews credentials itself when they are read within ten minutes of their end.
READ_EVERY_S = 60.0
_GOOD_FOR_S = 600.0
_PROOF = ("Authorization", "X-Amz-Date", "X-Amz-Security-Token")


@dataclass(frozen=True, slots=True)
class SigningKey:
    """Credentials with the region and the service that signatures name."""

    credentials: ReadOnlyCredentials = field(repr=False)
    region: str
    service: str
    expires_at: float
    renew_at: float | None

    def prove(
        self, method: str, place: RequestPlace, headers: RawHeaders, body: object
    ) -> RawHeaders:
        """Raises UpstreamRejected for a body that comes in pieces."""
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
        self._session: Session | None = None

    def read(self) -> SigningKey:
        """Raises CredentialsUnavailable."""
        try:
            if self._session is None:
                self._session = Session(profile=self._profile)
            found = self._session.get_credentials()
            frozen = None if found is None else found.get_frozen_credentials()
        except (BotoCoreError, OSError, ValueError, RuntimeError) as failed:
            raise CredentialsUnavailable(f"{type(failed).__name__}: {failed}") from None
        if frozen is None:
            raise CredentialsUnavailable("botocore finds no credentials of AWS here")
        now = time.time()
        return SigningKey(
            frozen, self._region, self._service, now + _GOOD_FOR_S, now + READ_EVERY_S
        )
