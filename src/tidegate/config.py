"""All settings: typed, validated, from the environment or `.env`.

Invariant: a process that starts has a whole and sound `Config`; a wrong value stops the start
with a `ConfigError`, one line that names the variable, its value (never a secret) and what is
allowed. Each secret may also be given as `NAME_FILE`, the path of a file that holds it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from tidegate.errors import ConfigError

GOOGLE_URL = "https://generativelanguage.googleapis.com"
KINDS = ("text_only", "multi_modal", "image_generation")
SECRETS = ("DATABASE_URL", "REDIS_URL", "GEMINI_API_KEY")
Milliseconds = Annotated[int, Field(ge=1, le=86_400_000)]


class ClassifierMode(StrEnum):
    """Who decides whether a request wants an image: see docs/classification.md."""

    LLM = "llm"
    AUTO = "auto"
    KEYWORDS = "keywords"


def _http_url(value: str) -> str:
    if urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname:
        raise ValueError("must be an http:// or https:// URL")
    return value.rstrip("/")


class Config(BaseModel):
    """Every setting of a deployment. Field names are the variables' names in lower case."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    # Where things are
    database_url: SecretStr | None = None
    redis_url: SecretStr | None = None
    data_dir: Path = Path("data")
    blob_url: str = ""  # empty: a folder in data_dir; or s3://, gs://, az://
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    tidegate_demo: bool = False

    # The provider
    gemini_api_key: SecretStr | None = None
    gemini_base_url: Annotated[str, AfterValidator(_http_url)] = GOOGLE_URL
    text_model: str = "gemini-2.5-flash"
    multi_modal_model: str = "gemini-2.5-flash"
    image_model: str = "gemini-2.5-flash-image"
    classifier_model: str = "gemini-2.5-flash-lite"
    connect_timeout_ms: Milliseconds = 5_000
    first_byte_timeout_ms: Milliseconds = 60_000
    idle_timeout_ms: Milliseconds = 60_000
    total_timeout_ms: Milliseconds = 600_000

    # Limits upstream, and the limiter
    rate_limits: dict[str, Annotated[int, Field(ge=0, le=100_000)]] = Field(
        default_factory=lambda: {"text_only": 5, "multi_modal": 3, "image_generation": 2}
    )
    semaphore_timeout: Annotated[float, Field(ge=0.2, le=3600)] = 3.0  # seconds
    when_valkey_away: Literal["closed", "local"] = "closed"
    on_lost: Literal["finish", "cancel"] = "finish"
    on_expiry: Literal["reuse", "hold"] = "reuse"

    # Classification
    classifier: ClassifierMode = ClassifierMode.AUTO
    classifier_timeout_ms: Milliseconds = 2_000
    classifier_limit: Annotated[int, Field(ge=1, le=10_000)] = 2

    # Bounds on what a client may send
    max_prompt_chars: Annotated[int, Field(ge=1)] = 200_000
    max_file_bytes: Annotated[int, Field(ge=1)] = 50_000_000
    max_files: Annotated[int, Field(ge=0, le=1000)] = 10
    max_body_bytes: Annotated[int, Field(ge=1)] = 100_000_000
    receive_timeout_ms: Milliseconds = 15_000  # longest silence while a request arrives
    stream_wait_ms: Milliseconds = 30_000  # default wait of a stream for admission
    stalled_reader_ms: Milliseconds = 30_000

    # Jobs and the record
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    claim_lease_ms: Milliseconds = 15_000
    job_deadline_ms: Annotated[int, Field(ge=1)] | None = (
        None  # none: a job waits as long as needed
    )
    retention_days: Annotated[int, Field(ge=1)] = 30
    spill_max_bytes: Annotated[int, Field(ge=0)] = 256_000_000
    audit_full: Literal["block", "drop"] = "block"
    shutdown_grace_ms: Milliseconds = 20_000

    # Logs
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("rate_limits")
    @classmethod
    def _known_kinds(cls, value: dict[str, int]) -> dict[str, int]:
        unknown = sorted(set(value) - set(KINDS))
        if unknown:
            raise ValueError(f"has the unknown type {unknown[0]!r}; known are {', '.join(KINDS)}")
        defaults = {"text_only": 5, "multi_modal": 3, "image_generation": 2}
        return defaults | value

    @field_validator("log_level", "log_format", "classifier", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("database_url")
    @classmethod
    def _postgres_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        if value and urlsplit(value.get_secret_value()).scheme not in ("postgresql", "postgres"):
            raise ValueError("must start with postgresql://")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        schemes = ("redis", "rediss", "unix", "valkey", "valkeys")
        if value and urlsplit(value.get_secret_value()).scheme not in schemes:
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value

    @model_validator(mode="after")
    def _never_by_mistake(self) -> Self:
        """Demo mode (bundled servers, emulated provider) is for loopback, or asked for by name."""
        if bool(self.database_url) != bool(self.redis_url):
            missing, given = "REDIS_URL", "DATABASE_URL"
            if not self.database_url:
                missing, given = given, missing
            raise ConfigError(missing, "(not set)", f"{given} is set, so this must be set as well")
        if self.tidegate_demo or self.is_loopback:
            return self
        for name in SECRETS:
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
        try:
            return ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
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


def load(environ: Mapping[str, str] | None = None, dotenv: Path | None = Path(".env")) -> Config:
    """Read the environment over `.env` over the defaults.

    Raises ConfigError, whose message is the one line to show.
    """
    found: dict[str, str] = {}
    if dotenv is not None and dotenv.is_file():
        found |= {name: value for name, value in dotenv_values(dotenv).items() if value is not None}
    found |= dict(os.environ if environ is None else environ)
    values: dict[str, Any] = {}
    for field in Config.model_fields:
        name = field.upper()
        raw = _secret_from_file(name, found) if name in SECRETS else found.get(name)
        if raw is not None and raw.strip() != "":
            values[field] = _rate_limits(raw) if field == "rate_limits" else raw.strip()
    try:
        return Config(**values)
    except ValidationError as invalid:
        raise _first(invalid, values) from None


def _secret_from_file(name: str, found: Mapping[str, str]) -> str | None:
    path = found.get(f"{name}_FILE", "").strip()
    if not path:
        return found.get(name)
    if found.get(name, "").strip():
        raise ConfigError(f"{name}_FILE", path, f"set either {name} or {name}_FILE, not both")
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as unreadable:
        reason = getattr(unreadable, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{name}_FILE", path, f"must be a readable file: {reason}") from None


def _rate_limits(raw: str) -> Any:
    allowed = 'must be a JSON object such as {"text_only": 5, "multi_modal": 3}'
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        raise ConfigError("RATE_LIMITS", raw, allowed) from None
    if not isinstance(value, dict):
        raise ConfigError("RATE_LIMITS", raw, allowed)
    return value


def _first(invalid: ValidationError, values: Mapping[str, Any]) -> ConfigError:
    problem = invalid.errors()[0]
    field = str(problem["loc"][0]) if problem["loc"] else ""
    name = field.upper()
    shown = "(hidden)" if name in SECRETS else str(values.get(field, ""))
    allowed = str(problem["msg"]).removeprefix("Value error, ")
    inner = ".".join(str(step) for step in problem["loc"][1:])
    return ConfigError(name, shown, f"{inner}: {allowed}" if inner else allowed)
