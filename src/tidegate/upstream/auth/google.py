"""Tokens of Google: of a service account's file, or of the application default credentials."""

from __future__ import annotations

import time
from datetime import UTC

import google.auth
import google.auth.transport.requests
import requests
from google.auth.exceptions import GoogleAuthError

from tidegate.policy.access import Authentication, Network
from tidegate.upstream.auth.credentials import BearerToken, CredentialsUnavailable

_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
_USUAL_S = 3_600.0  # where a token does not say when it ends


class GoogleSource:
    """Reads tokens of one identity."""

    def __init__(self, authentication: Authentication, network: Network | None) -> None:
        self._file = authentication.option("credentials_file")
        self._network = network
        self._credentials: google.auth.credentials.Credentials | None = None

    def read(self) -> BearerToken:
        """Raises CredentialsUnavailable."""
        try:
            with session_by(self._network) as session:
                request = google.auth.transport.requests.Request(session=session)
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

    def _found(self) -> google.auth.credentials.Credentials:
        found: google.auth.credentials.Credentials
        if self._file:
            load = google.auth.load_credentials_from_file
            found, _ = load(self._file, scopes=_SCOPES)  # type: ignore[no-untyped-call]
        else:
            found, _ = google.auth.default(scopes=_SCOPES)
        return found


def session_by(network: Network | None) -> requests.Session:
    """A session by the network of an upstream; the environment's proxies apply where it has no
    proxy of its own."""
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
