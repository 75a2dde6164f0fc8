"""Every setting, with its type, bounds, default and description: the only place that has them.

`.env.example` and `docs/configuration.md` are written from here by `scripts/generate_docs.py`.
A validator raises ValueError with the rest of a sentence, "must be ...", and never the value.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from tidegate.config.addresses import is_address, is_host_name, split_url
from tidegate.errors import ConfigError

GOOGLE_URL = "https://generativelanguage.googleapis.com"
DEFAULT_LIMITS = {"text_only": 5, "multi_modal": 3, "image_generation": 2}
KINDS = tuple(DEFAULT_LIMITS)
MOST_AT_ONCE = 100_000
NEEDED_IN_THE_OPEN = ("DATABASE_URL", "REDIS_URL", "GEMINI_API_KEY")
SECRETS = (*NEEDED_IN_THE_OPEN, "ADMIN_TOKEN")
SHORTEST_TOKEN = 16
Milliseconds = Annotated[int, Field(ge=1, le=86_400_000)]

# What is allowed, where the type alone doesn't say it in a user's words.
ALLOWED = {
    "database_url": "a URL that starts with postgresql://",
    "redis_url": "a URL that starts with redis://, rediss://, unix://, redis+sentinel:// or "
    "redis+cluster://",
    "data_dir": "the path of a folder, or of one to be made",
    "blob_url": "empty, or a URL that starts with s3://, gs:// or az:// and holds no password",
    "host": "an IP address or a host name",
    "admin_token": f"a text of {SHORTEST_TOKEN} characters or more, without spaces",
    "gemini_base_url": "an http:// or https:// URL without a user, a password or a query",
    "tidegate_policy": "the path of a file that is there",
    "rate_limits": f"a JSON object of whole numbers from 0 to {MOST_AT_ONCE}"
    f" by type ({', '.join(KINDS)})",
}
# The headings of the documentation, each above the field that it stands before.
SECTIONS = {
    "database_url": "Where things are",
    "gemini_api_key": "The provider",
    "rate_limits": "Limits",
    "classifier": "Text or image",
    "max_prompt_chars": "Bounds on what a client may send",
    "max_attempts": "Jobs and the record",
    "log_format": "Logs",
}


class ClassifierMode(StrEnum):
    """Who decides whether a request wants an image: see docs/classification.md."""

    LLM = "llm"
    AUTO = "auto"
    KEYWORDS = "keywords"


class Config(BaseModel):
    """Every setting of a deployment. Field names are the variables' names in lower case."""

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
        "REDIS_URL and GEMINI_API_KEY (or TIDEGATE_DEMO=1).",
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
        description="What `/admin` asks for, as Authorization: Bearer. Without one it answers "
        "only while HOST is a loopback address, and only to this machine.",
    )

    gemini_api_key: SecretStr | None = Field(
        default=None,
        description="Your key for the Gemini API. Without one the built-in emulator answers.",
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
    first_byte_timeout_ms: Milliseconds = Field(
        default=60_000, description="How long the provider may take to begin its answer."
    )
    idle_timeout_ms: Milliseconds = Field(
        default=60_000, description="The longest silence within a provider's answer."
    )
    total_timeout_ms: Milliseconds = Field(
        default=600_000, description="How long one call of the provider may take in all."
    )
    fetch_timeout_ms: Milliseconds = Field(
        default=20_000, description="How long fetching the picture of an `image_uri` may take."
    )

    rate_limits: dict[str, int] = Field(
        default_factory=DEFAULT_LIMITS.copy,
        description="How many calls of each type may run at once, over all processes together. "
        "A type left out keeps its default.",
    )
    tidegate_policy: Path | None = Field(
        default=None,
        description="A file with all limits, rates, weights and priorities: see docs/limits.md. "
        "Not set: tidegate.toml in the folder that the product is started from, if it is there. "
        "What it says comes before RATE_LIMITS and the settings below.",
    )
    semaphore_timeout: Annotated[float, Field(ge=0.2, le=3600)] = Field(
        default=3.0,
        description="The lease in seconds: how soon what a crashed process held is free again. "
        "Calls may run for much longer; a living process renews its lease.",
    )
    when_valkey_away: Literal["closed", "local"] = Field(
        default="closed",
        description="While Valkey is away for longer than the lease: closed lets requests wait "
        "and then refuses them with 503; local lets each process use its share of the limits.",
    )
    on_lost: Literal["finish", "cancel"] = Field(
        default="finish",
        description="Whether running calls finish or are cancelled when Valkey is away for "
        "longer than the lease.",
    )
    on_expiry: Literal["reuse", "hold"] = Field(
        default="reuse",
        description="What happens to the permits of a process that went silent: reuse gives them "
        "away after the lease; hold keeps them until its calls must have ended.",
    )

    classifier: ClassifierMode = Field(
        default=ClassifierMode.AUTO,
        description="Who decides whether a request wants an image: llm asks a model every time, "
        "auto only when the rules are unsure, keywords never.",
    )
    classifier_timeout_ms: Milliseconds = Field(
        default=2_000, description="How long the model may take to decide, before keywords do."
    )
    classifier_limit: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=2, description="How many such questions may run at once, outside RATE_LIMITS."
    )

    max_prompt_chars: Annotated[int, Field(ge=1)] = Field(
        default=200_000, description="The longest prompt that is taken, in characters."
    )
    max_file_bytes: Annotated[int, Field(ge=1)] = Field(
        default=50_000_000, description="The largest single file that is taken."
    )
    max_files: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=10, description="How many files one request may carry."
    )
    max_body_bytes: Annotated[int, Field(ge=1)] = Field(
        default=100_000_000, description="The largest request that is taken, files included."
    )
    receive_timeout_ms: Milliseconds = Field(
        default=15_000, description="The longest silence of a client while it sends its request."
    )
    stream_wait_ms: Milliseconds = Field(
        default=30_000,
        description="How long a stream waits for its turn before it is refused, "
        "where the request gives no deadline_ms.",
    )
    stalled_reader_ms: Milliseconds = Field(
        default=30_000, description="How long a client may stop reading before it is cut off."
    )

    max_attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        default=5, description="How often a job is tried when the provider fails in passing."
    )
    claim_lease_ms: Milliseconds = Field(
        default=15_000, description="How soon another worker takes over a dead worker's jobs."
    )
    job_deadline_ms: Annotated[int | None, Field(ge=1)] = Field(
        default=None,
        description="How long a job may wait for its turn before it expires, where the request "
        "gives no deadline_ms. Not set: as long as needed.",
    )
    retention_days: Annotated[int, Field(ge=1)] = Field(
        default=30, description="How long requests and answers are kept (tidegate prune)."
    )
    spill_max_bytes: Annotated[int, Field(ge=0)] = Field(
        default=256_000_000,
        description="How much may be kept on disk of what PostgreSQL could not take.",
    )
    audit_full: Literal["block", "drop"] = Field(
        default="block",
        description="When the record cannot keep up: block lets requests wait for it, drop "
        "leaves records out and counts them.",
    )
    shutdown_grace_ms: Milliseconds = Field(
        default=20_000, description="How long running calls may go on after a stop is asked for."
    )

    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="The look of the log: auto is console on a terminal, else json."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least serious lines that are logged."
    )

    @field_validator("rate_limits", mode="before")
    @classmethod
    def _limits(cls, value: object) -> dict[str, int]:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (json.JSONDecodeError, RecursionError):
                value = None
        if not isinstance(value, dict):
            raise ValueError(f"must be {ALLOWED['rate_limits']}")
        for kind, limit in value.items():
            if kind not in KINDS:
                raise ValueError(f"has the unknown type {kind!r}; known are {', '.join(KINDS)}")
            if type(limit) is not int or not 0 <= limit <= MOST_AT_ONCE:
                raise ValueError(f"{kind} must be a whole number from 0 to {MOST_AT_ONCE}")
        return DEFAULT_LIMITS | value

    @field_validator(
        *("when_valkey_away", "on_lost", "on_expiry", "classifier", "audit_full"),
        *("log_level", "log_format"),
        mode="before",
    )
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("data_dir")
    @classmethod
    def _folder(cls, value: Path) -> Path:
        folder = value.expanduser()
        return _sound("data_dir", folder, folder.is_dir() or not folder.exists())

    @field_validator("tidegate_policy")
    @classmethod
    def _policy(cls, value: Path) -> Path:
        path = value.expanduser()
        return _sound("tidegate_policy", path, path.is_file())

    @field_validator("admin_token")
    @classmethod
    def _token(cls, value: SecretStr) -> SecretStr:
        token = value.get_secret_value()
        sound = len(token) >= SHORTEST_TOKEN and token.isascii() and token.isprintable()
        return _sound("admin_token", value, sound and " " not in token)

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

    @model_validator(mode="after")
    def _never_by_mistake(self) -> Self:
        """Demo mode (bundled servers, emulated provider) is for loopback, or asked for by name."""
        if bool(self.database_url) != bool(self.redis_url):
            missing, given = "REDIS_URL", "DATABASE_URL"
            if not self.database_url:
                missing, given = given, missing
            raise ConfigError(missing, "(not set)", f"{given} is set, so this must be set as well")
        if self.gemini_base_url != GOOGLE_URL and self.gemini_api_key is None:
            raise ConfigError(
                "GEMINI_API_KEY", "(not set)", "GEMINI_BASE_URL is set, so this must be set as well"
            )
        if self.tidegate_demo or self.is_loopback:
            return self
        for name in NEEDED_IN_THE_OPEN:
            if getattr(self, name.lower()) is None:
                raise ConfigError(
                    name,
                    "(not set)",
                    f"must be set when HOST is not loopback (HOST={self.host}); "
                    "TIDEGATE_DEMO=1 allows the bundled servers and the emulated provider",
                )
        return self

    @property
    def is_loopback(self) -> bool:
        if is_address(self.host):
            return ip_address(self.host).is_loopback
        return self.host == "localhost"

    @property
    def embedded(self) -> bool:
        """Whether Valkey and PostgreSQL are the bundled ones."""
        return self.database_url is None

    @property
    def emulated(self) -> bool:
        """Whether the provider is the built-in emulator."""
        return self.gemini_api_key is None

    @property
    def lease_ms(self) -> int:
        return round(self.semaphore_timeout * 1000)

    def model_for(self, kind: str) -> str:
        """The configured model of a kind (`text_only`, `multi_modal`, `image_generation`)."""
        names = {"text_only": self.text_model, "multi_modal": self.multi_modal_model}
        return names.get(kind, self.image_model)


Value = TypeVar("Value")


def _sound(field: str, value: Value, is_sound: bool) -> Value:
    if not is_sound:
        raise ValueError(f"must be {ALLOWED[field]}")
    return value
