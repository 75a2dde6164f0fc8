"""Tokens of Microsoft Entra ID, by whatever credential azure-identity finds in the environment."""

from __future__ import annotations

from azure.core.exceptions import AzureError
from azure.identity import DefaultAzureCredential

from tidegate.policy.access import Authentication, Network
from tidegate.upstream.auth.credentials import BearerToken, CredentialsUnavailable


class EntraSource:
    """Reads tokens for one scope."""

    def __init__(self, authentication: Authentication, network: Network | None) -> None:
        self._scope = authentication.option("scope")
        options: dict[str, object] = {}
        if network is not None and network.proxy is not None:
            options["proxies"] = {"http": network.proxy.url, "https": network.proxy.url}
        if network is not None and network.ca_file:
            options["connection_verify"] = network.ca_file
        self._credential = DefaultAzureCredential(**options)

    def read(self) -> BearerToken:
        """Raises CredentialsUnavailable."""
        try:
            token = self._credential.get_token(self._scope)
        except (AzureError, OSError, ValueError) as failed:
            reason = str(failed).partition("\n")[0]
            raise CredentialsUnavailable(f"{type(failed).__name__}: {reason}") from None
        return BearerToken(b"Bearer " + token.token.encode(), float(token.expires_on))
