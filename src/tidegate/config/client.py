"""What the command line needs to call a Tidegate that runs somewhere: its address and a key.

Invariant: reading these needs no other setting to be sound, since they are also set where nothing
of Tidegate runs but its commands.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from tidegate.config.addresses import split_url

ALLOWED = {
    "tidegate_url": "an http:// or https:// URL without a user, a password or a query",
    "tidegate_api_key": "a key as `tidegate keys create` shows it",
}


def _url(value: str) -> str:
    url = split_url(value)
    plain = bool(url.hostname) and not (url.username or url.password or url.query or url.fragment)
    if not plain or url.scheme not in ("http", "https"):
        raise ValueError(f"must be {ALLOWED['tidegate_url']}")
    return value.rstrip("/")


def _key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError(f"must be {ALLOWED['tidegate_api_key']}")
    return value


Url = Annotated[
    str | None,
    AfterValidator(lambda value: value if value is None else _url(value)),
    Field(
        description="Where the commands submit, status, requests and batch find Tidegate, as "
        "https://tidegate.example.com. Not set: http://localhost and PORT."
    ),
]
Key = Annotated[
    SecretStr | None,
    AfterValidator(lambda value: value if value is None else _key(value)),
    Field(description="The API key that those commands show, where one is asked for."),
]
Port = Annotated[int, Field(ge=0, le=65535, description="The port to listen on.")]


class Client(BaseModel):
    """Whom the commands call, and with which key."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    tidegate_url: Url = None
    tidegate_api_key: Key = None
    port: Port = 8000

    @property
    def is_on_this_machine(self) -> bool:
        """Whether the address is a loopback address, as that of a deployment of these settings."""
        return split_url(self.url).hostname in ("localhost", "127.0.0.1", "::1")

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return self.tidegate_url or f"http://localhost:{self.port}"
