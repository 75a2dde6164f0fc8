"""Where things are: the stores, our own address, the provider, and who may look in.

A validator raises ValueError with the rest of a sentence, "must be ...", and never the value.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from tidegate.config.addresses import is_address, is_host_name, split_url

GOOGLE_URL = "https://generativelanguage.googleapis.com"
# What stands as GEMINI_API_KEY where the emulator answers.
EMULATORS_KEY = "the-emulator-takes-any-key"
SHORTEST_TOKEN = 16
Milliseconds = Annotated[int, Field(ge=1, le=86_400_000)]
Value = TypeVar("Value")

# What is allowed, where the type alone doesn't say it in a user's words.
ALLOWED = {
    "database_url": "a URL that starts with postgresql://",
    "redis_url": "a URL that starts with redis://, rediss://, unix://, redis+sentinel:// or "
    "redis+cluster://",
    "data_dir": "the path of a folder, or of one to be made",
    "blob_url": "empty, or a URL that starts with s3://, gs:// or az:// and holds no password",
    "host": "an IP address or a host name",
    "allowed_hosts": "host names or addresses without ports, with commas between",
    "cors_origins": "addresses of pages as https://host or http://host:port, with commas between",
    "admin_token": f"a text of {SHORTEST_TOKEN} characters or more, without spaces",
    "gemini_base_url": "an http:// or https:// URL without a user, a password or a query",
}


def sound(allowed: str, value: Value, is_sound: bool) -> Value:
    """`value`, or ValueError with the rest of the sentence."""
    if not is_sound:
        raise ValueError(f"must be {allowed}")
    return value


def _sound(field: str, value: Value, is_sound: bool) -> Value:
    return sound(ALLOWED[field], value, is_sound)


class Places(BaseModel):
    """The settings that say where Tidegate is, and what it speaks to."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr | None = Field(
        default=None,
        description="The PostgreSQL (15 or newer) that keeps every request and answer, as "
        "postgresql://user:password@host/database. Set it together with REDIS_URL; without "
        "both, a bundled PostgreSQL and Valkey start in DATA_DIR.",
    )
    redis_url: SecretStr | None = Field(
        default=None,
        description="The Valkey or Redis that holds the limits, as "
        "redis://user:password@host:6379/0; rediss:// is the same over TLS. See "
        "docs/servers.md for redis+sentinel:// and redis+cluster://.",
    )
    data_dir: Path = Field(
        default=Path("data"),
        description="Where the bundled servers, uploads and generated images are kept.",
    )
    blob_url: str = Field(
        default="",
        description="A bucket for uploads and generated images instead of a folder in DATA_DIR, "
        "as s3://, gs:// or az://; its credentials come from the cloud's own variables.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="The address to listen on. Any but a loopback address needs DATABASE_URL, "
        "REDIS_URL and an upstream: the key of a provider, or one in tidegate.toml (or "
        "TIDEGATE_DEMO=1).",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="The port to listen on; 0 takes any free one."
    )
    tidegate_demo: bool = Field(
        default=False,
        description="Allow the bundled servers and the emulated provider on an address that "
        "others can reach. For demonstrations only: the answers are made up.",
    )
    admin_token: SecretStr | None = Field(
        default=None,
        description="The operator's key, which opens `/admin`, the dashboard and `/metrics`, as "
        "Authorization: Bearer; an API key of the scope admin does as well. Not set: the one in "
        "`operator.key` in DATA_DIR, which the first process makes. Set it where processes run "
        "with a DATA_DIR each.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="Further names of this gateway, with commas, as clients write them in Host. "
        "While callers show no API key, only requests to these, to HOST and to loopback addresses "
        "are answered (where HOST is no loopback address, also those to addresses and to names "
        "without a dot), so that no web page reaches it under a name of its own.",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description="Web pages that may call this gateway from a browser, as their Origin says "
        "it, with commas; all paths but the operator's. While callers show no API key, whoever "
        "opens such a page can spend.",
    )
    auth: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Whether callers must show an API key: see docs/tenants.md. auto asks for one "
        "on any HOST but a loopback address; off asks nobody, wherever it listens.",
    )
    auth_outage_ms: Milliseconds = Field(
        default=600_000,
        description="How long API keys that were seen before go on working while PostgreSQL is "
        "away; after it requests get 503.",
    )

    gemini_api_key: SecretStr | None = Field(
        default=None,
        description="Your key for the Gemini API, which makes the upstream `gemini`. Without one "
        "the built-in emulator answers in its place, on loopback addresses and under "
        "TIDEGATE_DEMO=1; elsewhere there is no such upstream.",
    )
    openai_api_key: SecretStr | None = Field(
        default=None,
        description="Your key for OpenAI's API, which makes the upstream `openai` for OpenAI's own "
        "models, unless tidegate.toml has one that uses it: see docs/gateway.md.",
    )
    anthropic_api_key: SecretStr | None = Field(
        default=None,
        description="Your key for Anthropic's API, which makes the upstream `anthropic` for "
        "Claude, unless tidegate.toml has one that uses it.",
    )
    gemini_base_url: str = Field(
        default=GOOGLE_URL,
        description="Where the Gemini API is, for a proxy or an emulator in its place.",
    )
    text_model: str = Field(
        default="gemini-2.5-flash", description="The model for requests of text alone."
    )
    multi_modal_model: str = Field(
        default="gemini-2.5-flash", description="The model for requests with files."
    )
    image_model: str = Field(
        default="gemini-2.5-flash-image", description="The model that makes images."
    )
    classifier_model: str = Field(
        default="gemini-2.5-flash-lite",
        description="The model that is asked whether a request wants an image.",
    )
    connect_timeout_ms: Milliseconds = Field(
        default=5_000, description="How long connecting to the provider may take."
    )
    # The SDKs of OpenAI and Anthropic wait for 600 s, each time for the next bytes of a stream.
    first_byte_timeout_ms: Milliseconds = Field(
        default=600_000, description="How long the provider may take to begin its answer."
    )
    idle_timeout_ms: Milliseconds = Field(
        default=600_000, description="The longest silence within a provider's answer."
    )
    total_timeout_ms: Milliseconds = Field(
        default=3_600_000, description="How long one call of the provider may take in all."
    )
    fetch_timeout_ms: Milliseconds = Field(
        default=20_000, description="How long fetching the picture of an `image_uri` may take."
    )

    @field_validator("data_dir")
    @classmethod
    def _folder(cls, value: Path) -> Path:
        folder = value.expanduser()
        try:
            sound = folder.is_dir() or not folder.exists()
        except PermissionError:  # in a folder that this user may not look into
            sound = False
        return _sound("data_dir", folder, sound)

    @field_validator("admin_token")
    @classmethod
    def _token(cls, value: SecretStr) -> SecretStr:
        token = value.get_secret_value()
        sound = len(token) >= SHORTEST_TOKEN and token.isascii() and token.isprintable()
        return _sound("admin_token", value, sound and " " not in token)

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list | tuple):
            return value
        bare = [str(name).strip().removeprefix("[").removesuffix("]").lower() for name in names]
        bare = [name.removesuffix(".") for name in bare if name]
        is_sound = all(is_address(name) or is_host_name(name) for name in bare)
        return _sound("allowed_hosts", tuple(bare), is_sound)

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _origins(cls, value: object) -> object:
        named = value.split(",") if isinstance(value, str) else value
        if not isinstance(named, list | tuple):
            return value
        origins = tuple(str(one).strip().lower() for one in named if str(one).strip())
        return _sound("cors_origins", origins, all(map(_is_origin, origins)))

    @field_validator("auth", mode="before")
    @classmethod
    def _lower_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("host")
    @classmethod
    def _address(cls, value: str) -> str:
        bare = value.removeprefix("[").removesuffix("]")
        return _sound("host", bare.lower(), is_address(bare) or is_host_name(bare))

    @field_validator("blob_url")
    @classmethod
    def _bucket(cls, value: str) -> str:
        url = split_url(value)
        bucket = url.scheme in ("s3", "gs", "az") and not (url.username or url.query)
        return _sound("blob_url", value, bucket or not value)

    @field_validator("gemini_base_url")
    @classmethod
    def _http(cls, value: str) -> str:
        url = split_url(value)
        plain = bool(url.hostname) and not (url.username or url.password or url.query)
        return _sound(
            "gemini_base_url", value.rstrip("/"), plain and url.scheme in ("http", "https")
        )

    @field_validator("database_url")
    @classmethod
    def _postgres(cls, value: SecretStr) -> SecretStr:
        # Not taken apart: several hosts with a port each are allowed here.
        scheme = value.get_secret_value().partition("://")[0]
        return _sound("database_url", value, scheme in ("postgresql", "postgres"))

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: SecretStr) -> SecretStr:
        # redis-py speaks to Valkey, but does not know the schemes named after it.
        text = re.sub(r"^valkey(s?)(://|\+)", r"redis\1\2", value.get_secret_value())
        # Not taken apart: several hosts with a port each are allowed there.
        several = re.match(r"rediss?\+(sentinel|cluster)://.", text) is not None
        return _sound(
            "redis_url",
            SecretStr(text),
            several or split_url(text).scheme in ("redis", "rediss", "unix"),
        )

    @property
    def is_loopback(self) -> bool:
        if is_address(self.host):
            return ip_address(self.host).is_loopback
        return self.host == "localhost"

    @property
    def asks_for_keys(self) -> bool:
        """Whether callers must show an API key."""
        return self.auth == "on" or (self.auth == "auto" and not self.is_loopback)

    @property
    def embedded(self) -> bool:
        """Whether Valkey and PostgreSQL are the bundled ones."""
        return self.database_url is None

    @property
    def emulated(self) -> bool:
        """Whether the built-in emulator may answer as Gemini: see `policy.emulates`."""
        return self.gemini_api_key is None and (self.tidegate_demo or self.is_loopback)

    @property
    def is_made_up(self) -> bool:
        """Whether the answers of the account `gemini` are the built-in emulator's."""
        key = self.gemini_api_key
        return self.emulated or (key is not None and key.get_secret_value() == EMULATORS_KEY)


def _is_origin(text: str) -> bool:
    """Whether it is the address of a page as a browser says it in Origin."""
    url = split_url(text)
    return (
        url.scheme in ("http", "https")
        and text == f"{url.scheme}://{url.netloc}"
        and bool(url.hostname)
        and "@" not in url.netloc
    )
