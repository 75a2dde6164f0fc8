"""Settings: types, bounds, defaults and descriptions, read from the environment over `.env`.

`.env.example` and `docs/configuration.md` are generated from here. Each secret may be given as
`NAME_FILE`, the path of a file.

Invariants: a process starts with a complete and valid `Config`; a mistake is one ConfigError of one
line that names the variable, its value (never a secret) and the allowed values.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from enum import StrEnum
from io import StringIO
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin
from urllib.parse import SplitResult, urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tidegate.call import RoleRules, role_rules
from tidegate.errors import ConfigError
from tidegate.usual_models import EMULATORS_KEY, GEMINI, usual_models

GOOGLE_URL = "https://generativelanguage.googleapis.com"
SHORTEST_TOKEN = 16
DEFAULT_LIMITS = {"text_only": 5, "multi_modal": 3, "image_generation": 2}
KINDS = tuple(DEFAULT_LIMITS)
MOST_AT_ONCE = 100_000
Milliseconds = Annotated[int, Field(ge=1, le=86_400_000)]
Positive = Annotated[int, Field(ge=1)]
Days = Annotated[int, Field(ge=1, le=100_000)]
Value = TypeVar("Value")


def _listed(value: object) -> object:
    """Return the texts of a list, or of a text with commas between; another value as it is."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    return tuple(text for part in parts if (text := str(part).strip()))


Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
_DATABASE_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]*\]|[^:\[\]]*)(:\d{1,5})?")
_CHOICES = (  # in any case
    *("auth", "when_valkey_away", "on_lost", "on_expiry"),
    *("classifier", "audit_full", "log_level", "log_format"),
)
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*\.?")


# The allowed values, if the type alone does not tell them to a user.
ALLOWED = {
    "database_url": "a URL that starts with postgresql://, its ports numbers, # in a password %23",
    "redis_url": "a URL that starts with redis://, rediss://, unix://, redis+sentinel:// or "
    "redis+cluster://, # in a password %23",
    "data_dir": "the path of a folder, or of one to be made",
    "key_folder": "the path of a folder, or of one to be made",
    "blob_url": "empty, or s3://, gs:// or az:// with the name of a bucket and no password",
    "host": "an IP address or a host name",
    "allowed_hosts": "host names or addresses without ports, with commas between",
    "oidc_roles": 'a JSON object such as {"groups=oncall": "operator"}',
    "oidc_issuer": "an https:// URL without a user or a query; http:// at a loopback address",
    "jwt_issuer": "an https:// URL without a user or a query; http:// at a loopback address",
    "cors_origins": "addresses of pages as https://host or http://host:port, with commas between",
    "reconcile": "openai, anthropic, or both with a comma between",
    "bodies_off": "names of tenants with commas between, or *",
    "admin_token": f"a text of {SHORTEST_TOKEN} characters or more, without spaces",
    "gemini_base_url": "an http:// or https:// URL without a user, a password or a query",
    "alert_webhook_url": "an http:// or https:// URL without a user or a password",
    "tidegate_policy": "the path of an existing file",
    "webhook_secret": "whsec_ and 24 to 64 bytes in base64, or two of them with a comma between",
    "rate_limits": f"a JSON object of whole numbers from 0 to {MOST_AT_ONCE}"
    f" by type ({', '.join(KINDS)})",
    "tidegate_url": "an http:// or https:// URL without a user, a password or a query",
    "tidegate_api_key": "a key as `tidegate keys create` shows it",
}


def setting(default: Any, text: str) -> Any:
    """Declare a setting with its default and its description."""
    return Field(default=default, description=text)


def _checked(field: str, value: Value, is_sound: bool) -> Value:
    """Return `value`, or raise ValueError with the allowed values."""
    if not is_sound:
        raise ValueError(f"must be {ALLOWED[field]}")
    return value


def _path(field: str, value: Path, is_sound: Callable[[Path], bool]) -> Path:
    try:
        path = value.expanduser()
        return _checked(field, path, is_sound(path))
    except (OSError, RuntimeError):  # too long, unreadable; or ~ of an unknown user
        return _checked(field, value, False)


def split_url(text: str) -> SplitResult:
    """Return the parts of a URL, all empty if it is not a URL."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises for a port that is not a number
    except ValueError:
        return SplitResult("", "", "", "", "")
    return parts


def is_host_name(text: str) -> bool:
    return _HOST_NAME.fullmatch(text) is not None


def is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def is_plain_url(text: str) -> bool:
    """Return whether a text is an HTTP URL without a user, a password, a query or a fragment."""
    url = split_url(text)
    plain = bool(url.hostname) and not (url.username or url.password)
    return plain and url.scheme in ("http", "https") and re.search(r"[\s?#]", text) is None


def is_key(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _issuer(value: str) -> str:
    url, is_local = split_url(value), split_url(value).hostname in ("localhost", "127.0.0.1", "::1")
    is_sound = is_plain_url(value) and (url.scheme == "https" or is_local)
    return _checked("jwt_issuer", value, is_sound or not value)


def _url(value: str | None) -> str | None:
    if value is None:
        return None
    return _checked("tidegate_url", value.rstrip("/"), is_plain_url(value))


def _key(value: SecretStr | None) -> SecretStr | None:
    is_sound = value is None or is_key(value.get_secret_value())
    return _checked("tidegate_api_key", value, is_sound)


Url = Annotated[
    str | None,
    AfterValidator(_url),
    Field(
        description="Where the commands submit, status, requests and batch find Tidegate, as "
        "https://tidegate.example.com. Not set: http://localhost and PORT."
    ),
]
Key = Annotated[
    SecretStr | None,
    AfterValidator(_key),
    Field(description="The API key that those commands show, where one is required."),
]
Port = Annotated[int, Field(ge=0, le=65535, description="The port to listen on.")]


class Client(BaseModel):
    """The gateway that the commands call, and the key."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    tidegate_url: Url = None
    tidegate_api_key: Key = None
    port: Port = 8000

    @property
    def is_on_this_machine(self) -> bool:
        """Return whether the address is loopback, as for a deployment of these settings."""
        return split_url(self.url).hostname in ("localhost", "127.0.0.1", "::1")

    @property
    def url(self) -> str:
        """Return the URL without a trailing slash."""
        return self.tidegate_url or f"http://localhost:{self.port}"


_ORIGIN = re.compile(
    r"(?:http(?!:.*:80$)|https(?!:.*:443$))://(?:[a-z\d_.-]+|\[[\da-f:.]+\])(?::\d{1,5})?", re.ASCII
)


def _is_origin(text: str) -> bool:
    """Return whether a text is the origin of a page as in a browser's Origin: never a pattern."""
    return _ORIGIN.fullmatch(text) is not None


NEEDED_IN_THE_OPEN = ("DATABASE_URL", "REDIS_URL")
PROVIDER_KEYS = ("GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
SECRETS = (
    *NEEDED_IN_THE_OPEN,
    *PROVIDER_KEYS,
    *("ADMIN_TOKEN", "OIDC_CLIENT_SECRET", "WEBHOOK_SECRET", "TIDEGATE_API_KEY"),
    "ALERT_WEBHOOK_URL",  # its path may be a secret that allows posting there
)

# The headings of the documentation, by the field that each precedes.
SECTIONS = {
    "database_url": "Where things are",
    "gemini_api_key": "The providers",
    "rate_limits": "Limits",
    "classifier": "Text or image",
    "max_prompt_chars": "Bounds on what a client may send",
    "max_attempts": "Jobs and the record",
    "log_format": "Logs and metrics",
    "tidegate_url": "The command line",
}


class ClassifierMode(StrEnum):
    """How requests are classified as text or image: see docs/classification.md."""

    LLM = "llm"
    AUTO = "auto"
    KEYWORDS = "keywords"


class Config(BaseModel):
    """Every setting of a deployment. Field names are the variables' names in lower case."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr | None = setting(
        None,
        "The PostgreSQL (15 or newer) that keeps every request and answer, as "
        "postgresql://user:password@host/database. Set it together with REDIS_URL; without both, "
        "a bundled PostgreSQL and Valkey start in DATA_DIR.",
    )
    redis_url: SecretStr | None = setting(
        None,
        "The Valkey or Redis that holds the limits, as redis://user:password@host:6379/0; "
        "rediss:// is the same over TLS. See docs/servers.md for redis+sentinel:// and "
        "redis+cluster://.",
    )
    data_dir: Path = setting(
        Path("data"), "Where the bundled servers, uploads and generated images are kept."
    )
    blob_url: str = setting(
        "",
        "A bucket for uploads and generated images instead of a folder in DATA_DIR, as s3://, "
        "gs:// or az://; its credentials come from the cloud's own variables.",
    )
    host: str = setting(
        "127.0.0.1",
        "The address to listen on. Any but a loopback address needs DATABASE_URL, REDIS_URL and "
        "an upstream: the key of a provider, or one in tidegate.toml (or TIDEGATE_DEMO=1).",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = setting(
        8000, "The port to listen on; 0 takes any free one."
    )
    tidegate_demo: bool = setting(
        False,
        "Allow the bundled servers and the emulated provider on an address that others can reach. "
        "For demonstrations only: the answers are made up.",
    )
    admin_token: SecretStr | None = setting(
        None,
        "The operator's key, which opens `/admin`, the dashboard and `/metrics`, as "
        "Authorization: Bearer; an API key with a role does as well. Not set: the one in "
        "`operator.key` in DATA_DIR, which the first process makes. Set it where processes run "
        "with a DATA_DIR each.",
    )
    viewers_read_bodies: bool = setting(
        False, "Whether the role viewer reads prompts, answers and files: see docs/access.md."
    )
    oidc_issuer: Annotated[str, AfterValidator(_issuer)] = setting(
        "", "An OpenID Connect issuer by which people sign in to the dashboard: docs/access.md."
    )
    oidc_client_id: str = setting("", "The client id of this gateway at that issuer.")
    oidc_client_secret: SecretStr | None = setting(
        None, "The client secret at that issuer, if any."
    )
    oidc_roles: Annotated[RoleRules, BeforeValidator(role_rules)] = setting(
        {}, 'Roles by claim, such as {"groups=oncall": "operator"}.'
    )
    allowed_hosts: Texts = setting(
        (),
        "Further host names of this gateway, separated by commas. If no API key is required, only "
        "requests with these in Host, HOST or a loopback address are answered (if HOST is not a "
        "loopback address, also IP addresses and names without a dot), so that no web page can "
        "reach it under its own name (DNS rebinding).",
    )
    cors_origins: Texts = setting(
        (),
        "Origins of web pages that may call this gateway from a browser, separated by commas; not "
        "the operator's paths. Without API keys every visitor of such a page can make calls.",
    )
    auth: Literal["auto", "on", "off"] = setting(
        "auto",
        "Whether callers must send an API key: see docs/tenants.md. auto requires one on any HOST "
        "but a loopback address; off never requires one.",
    )
    jwt_issuer: Annotated[str, AfterValidator(_issuer)] = setting(
        "", "An issuer whose tokens (JWTs of services) count as API keys: see docs/access.md."
    )
    jwt_audience: str = setting("", "The audience that those tokens must name.")
    jwt_tenant_claim: str = setting("tenant", "The claim of those tokens that names the tenant.")
    auth_outage_ms: Milliseconds = setting(
        600_000,
        "How long API keys that were seen before remain valid while PostgreSQL is unavailable; "
        "then requests get 503.",
    )

    gemini_api_key: SecretStr | None = setting(
        None,
        "Your key for the Gemini API, which makes the upstream `gemini`. Without one the built-in "
        "emulator answers in its place, on loopback addresses and under TIDEGATE_DEMO=1; "
        "elsewhere there is no such upstream.",
    )
    openai_api_key: SecretStr | None = setting(
        None,
        "Your key for OpenAI's API, which makes the upstream `openai` for OpenAI's own models, "
        "unless tidegate.toml has one that uses it: see docs/gateway.md.",
    )
    anthropic_api_key: SecretStr | None = setting(
        None,
        "Your key for Anthropic's API, which makes the upstream `anthropic` for Claude, unless "
        "tidegate.toml has one that uses it.",
    )
    key_folder: Path | None = setting(
        None,
        "The folder of the files that live changes of upstreams may name as secrets, besides those "
        "in tidegate.toml: docs/upstreams.md. Not set: `keys` in DATA_DIR.",
    )
    gemini_base_url: str = setting(
        GOOGLE_URL, "Where the Gemini API is, for a proxy or an emulator in its place."
    )
    text_model: str = setting(
        GEMINI[0], "The model for text; without GEMINI_API_KEY: docs/gateway.md."
    )
    multi_modal_model: str = setting(GEMINI[1], "The model for requests with files.")
    image_model: str = setting(GEMINI[2], "The model that makes images.")
    classifier_model: str = setting(GEMINI[3], "The model that classifies prompts.")
    connect_timeout_ms: Milliseconds = setting(
        5_000, "How long connecting to the provider may take."
    )
    # The SDKs of OpenAI and Anthropic wait for 600 s, each time for the next bytes of a stream.
    first_byte_timeout_ms: Milliseconds = setting(
        600_000, "How long the provider may take to begin its answer."
    )
    idle_timeout_ms: Milliseconds = setting(
        600_000, "The longest silence within a provider's answer."
    )
    total_timeout_ms: Milliseconds = setting(
        3_600_000, "How long one call of the provider may take in all."
    )
    fetch_timeout_ms: Milliseconds = setting(
        20_000, "How long fetching the picture of an `image_uri` may take."
    )

    rate_limits: dict[str, int] = setting(
        DEFAULT_LIMITS,
        "How many calls of each type may run concurrently, over all processes together. A type "
        "left out keeps its default.",
    )
    tidegate_policy: Path | None = setting(
        None,
        "A file with all limits, rates, weights and priorities: see docs/limits.md. Not set: "
        "tidegate.toml in the folder that the product is started from, if it is there. What it "
        "says comes before RATE_LIMITS and the settings below.",
    )
    semaphore_timeout: Annotated[float, Field(ge=0.2, le=3600)] = setting(
        3.0,
        "The lease in seconds: how soon the permits of a crashed process are released. Calls may "
        "run for much longer, since a running process renews its lease.",
    )
    when_valkey_away: Literal["closed", "local"] = setting(
        "closed",
        "While Valkey is unavailable for longer than the lease: closed lets requests wait and then "
        "refuses them with 503; local lets each process use its share of the limits.",
    )
    on_lost: Literal["finish", "cancel"] = setting(
        "finish",
        "Whether running calls finish or are cancelled when Valkey is unavailable for longer than "
        "the lease.",
    )
    on_expiry: Literal["reuse", "hold"] = setting(
        "reuse",
        "What happens to the permits of a process that went silent: reuse releases them after "
        "the lease; hold keeps them until its calls must have ended.",
    )

    classifier: ClassifierMode = setting(
        ClassifierMode.AUTO,
        "How prompts are classified as text or image: llm always calls a model, auto only if the "
        "rules are unsure, keywords never.",
    )
    classifier_timeout_ms: Milliseconds = setting(
        2_000,
        "How long the model may take before keywords decide; at most half of the time that the "
        "request has left.",
    )
    classifier_limit: Annotated[int, Field(ge=1, le=10_000)] = setting(
        2, "How many calls of the classifier may run concurrently, outside RATE_LIMITS."
    )

    max_prompt_chars: Positive = setting(200_000, "The longest accepted prompt, in characters.")
    max_file_bytes: Positive = setting(50_000_000, "The largest accepted file.")
    max_files: Annotated[int, Field(ge=0, le=1000)] = setting(10, "The most files in a request.")
    max_body_bytes: Positive = setting(100_000_000, "The largest accepted request, files included.")
    max_held_bytes: Positive = setting(
        250_000_000,
        "How many bytes of request bodies over 64 KB a process holds in memory: those of native "
        "calls and /stream until they end, all others while they arrive; further ones get 429. "
        "A process needs about twice this memory. At least MAX_BODY_BYTES. A tenant with keys may "
        "use half of what the others leave. Jobs count until they are stored (503 if there is no "
        "room). A worker holds a third of it for large wrapped calls of each type of job; further "
        "ones wait.",
    )
    max_batch_files_bytes: Positive = setting(
        10_000_000_000,
        "How many bytes of batch files a tenant may store, until it deletes them or RETENTION_DAYS "
        "are over. Further uploads are rejected: see docs/batches.md.",
    )
    receive_timeout_ms: Milliseconds = setting(
        15_000, "The longest silence of a client while it sends its request."
    )
    stream_wait_ms: Milliseconds = setting(
        30_000,
        "How long a stream or a native call waits for admission before it is rejected, if the "
        "request has no deadline.",
    )
    cache_wait_us_per_token: Annotated[int | None, Field(ge=0, le=60_000)] = setting(
        None,
        "How long all calls of a conversation together wait for the upstream with its prompt "
        "cache, in microseconds per cached token. 0: not at all. Not set: what such a token saves.",
    )
    keep_alive_after_ms: Annotated[int, Field(ge=0, le=3_600_000)] = setting(
        0,
        "After this time, comments keep the connection of a waiting native stream alive; a "
        "rejection after the first one is an event in a 200. 0: never.",
    )
    stalled_reader_ms: Milliseconds = setting(
        30_000, "How long a client may stop reading before it is disconnected."
    )

    max_attempts: Annotated[int, Field(ge=1, le=100)] = setting(
        5,
        "How many attempts a job has. Failures of the upstream itself (no connection, 429, 502, "
        "503, a rejected key) do not count.",
    )
    claim_lease_ms: Milliseconds = setting(
        15_000, "How soon another worker takes over the jobs of a dead worker."
    )
    provider_batch_gather_ms: Milliseconds = setting(
        60_000, "How long a job of the tier `batch` waits for others to share a provider's batch."
    )
    provider_batch_poll_ms: Milliseconds = setting(
        60_000, "How often a provider's batch is polled; less often with many batches."
    )
    background_poll_ms: Milliseconds = setting(2_000, "Least interval of polls of background work.")
    job_deadline_ms: Annotated[int | None, Field(ge=1, le=31_536_000_000)] = setting(
        None, "How long a job without deadline_ms waits before it expires. Not set: no limit."
    )
    flex_within_ms: Milliseconds = setting(
        900_000,
        "How long a call in a provider's flex tier may take. A job uses flex only if so much time "
        "is left before its latest start in the usual tier (see docs/jobs.md).",
    )
    provider_batch_window_ms: Milliseconds = setting(
        86_400_000,
        "How long a provider's batch may take, until measured: jobs use one if half of it is left.",
    )
    provider_batch_cancel_ms: Milliseconds = setting(
        600_000, "How long a provider's batch may take to end once it is cancelled."
    )
    webhook_secret: SecretStr | None = setting(
        None,
        "Signs webhooks (see docs/jobs.md): whsec_ and random bytes in base64. Without it a "
        "webhook_url is rejected.",
    )
    webhook_allow_private: bool = setting(
        False,
        "Send webhooks to private, loopback and link-local addresses too. Set it only if every "
        "client that may submit may also reach these.",
    )
    webhook_timeout_ms: Milliseconds = setting(
        15_000, "How long the receiver of a webhook may take to answer."
    )
    alert_webhook_url: SecretStr | None = setting(
        None, "Where workers post alerts, such as those of budgets: see docs/money.md."
    )
    alert_format: Literal["standard", "slack"] = setting(
        "standard",
        "Body of an alert: standard is signed by WEBHOOK_SECRET, as webhooks are; slack is a text "
        "for Slack and compatible services, also signed if there is a secret.",
    )
    retention_days: Days = setting(30, "How long requests and answers are kept (tidegate prune).")
    bodies_off: Texts = setting((), "Tenants whose texts are not kept, or *: docs/accounting.md.")
    operator_log_days: Annotated[int, Field(ge=30, le=36_500)] = setting(
        365, "How long actions of operators are kept: see docs/access.md."
    )
    reconcile: Texts = setting(
        (),
        "Providers whose usage and cost of the previous day are compared with the record each "
        "night, separated by commas: openai, anthropic; no other can be compared. Needs "
        "OPENAI_ADMIN_KEY or ANTHROPIC_ADMIN_KEY: see docs/money.md.",
    )
    record_export: Literal["off", "jsonl", "parquet"] = setting(
        "off", "Format in which `tidegate up`, or a timer, exports the record: docs/operating.md."
    )
    spill_max_bytes: Annotated[int, Field(ge=0)] = setting(
        256_000_000, "How much may be kept on disk while PostgreSQL is unavailable."
    )
    audit_full: Literal["block", "drop"] = setting(
        "block", "If the record cannot keep up, block has requests wait, drop omits records."
    )
    leave_ms: Annotated[int, Field(ge=0, le=3_600_000)] = setting(
        1_000,
        "How long a process continues to accept requests after SIGTERM, while /health/ready fails "
        "and every answer closes its connection, so that balancers and clients with kept "
        "connections move elsewhere. Ctrl-C skips it.",
    )
    shutdown_grace_ms: Milliseconds = setting(
        20_000, "How long running calls may continue after that."
    )
    migrate_at_start: bool = setting(
        True,
        "Whether serve and worker migrate the database before they start. If `tidegate migrate` "
        "does it, 0 lets them start immediately and become ready when the schema is current.",
    )

    log_format: Literal["auto", "console", "json"] = setting(
        "auto", "Format of the log: auto is console on a terminal, otherwise json."
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "The lowest level that is logged."
    )
    worker_port: Annotated[int | None, Field(ge=0, le=65_535)] = setting(
        None,
        "Port of a separate worker (tidegate worker) on HOST for /health/live and /health/ready, "
        "/metrics and /admin/process; 0 takes any free port. Not set: none. Workers of tidegate up "
        "are visible at its API.",
    )

    tidegate_url: Url = None
    tidegate_api_key: Key = None

    @field_validator("data_dir", "key_folder")
    @classmethod
    def _folder(cls, value: Path) -> Path:
        return _path("data_dir", value, lambda folder: not folder.exists() or folder.is_dir())

    @field_validator("admin_token")
    @classmethod
    def _token(cls, value: SecretStr) -> SecretStr:
        token = value.get_secret_value()
        return _checked("admin_token", value, len(token) >= SHORTEST_TOKEN and is_key(token))

    @field_validator("allowed_hosts")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        bare = [name.removeprefix("[").removesuffix("]").lower() for name in value]
        bare = [name.removesuffix(".") for name in bare if name]
        is_sound = all(is_address(name) or is_host_name(name) for name in bare)
        return _checked("allowed_hosts", tuple(bare), is_sound)

    @field_validator("reconcile", "bodies_off")
    @classmethod
    def _listed(cls, value: tuple[str, ...], of: ValidationInfo) -> tuple[str, ...]:
        allowed = "openai|anthropic" if of.field_name == "reconcile" else r"[^\s|{}]{1,200}"
        return _checked(str(of.field_name), value, all(re.fullmatch(allowed, x) for x in value))

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        origins = tuple(one.lower() for one in value)
        return _checked("cors_origins", origins, all(map(_is_origin, origins)))

    @field_validator("host")
    @classmethod
    def _address(cls, value: str) -> str:
        bare = value.removeprefix("[").removesuffix("]")
        return _checked("host", bare.lower(), is_address(bare) or is_host_name(bare))

    @field_validator("blob_url")
    @classmethod
    def _bucket(cls, value: str) -> str:
        url = split_url(value)
        bucket = url.scheme in ("s3", "gs", "az") and not (url.username or url.query)
        return _checked("blob_url", value, (bucket and url.netloc != "") or not value)

    @field_validator("gemini_base_url")
    @classmethod
    def _http(cls, value: str) -> str:
        return _checked("gemini_base_url", value.rstrip("/"), is_plain_url(value))

    @field_validator("alert_webhook_url")
    @classmethod
    def _is_alert_url(cls, value: SecretStr) -> SecretStr:
        url = split_url(value.get_secret_value())
        plain = bool(url.hostname) and not (url.username or url.password)
        return _checked("alert_webhook_url", value, plain and url.scheme in ("http", "https"))

    @field_validator("database_url")
    @classmethod
    def _postgres(cls, value: SecretStr) -> SecretStr:
        try:
            url = urlsplit(value.get_secret_value())
        except ValueError:  # brackets without an address
            return _checked("database_url", value, False)
        is_sound = all(map(_DATABASE_HOST.fullmatch, url.netloc.rpartition("@")[2].split(",")))
        is_sound &= bool(re.match("(?i)postgres(ql)?://", value.get_secret_value()))
        return _checked("database_url", value, is_sound)

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: SecretStr) -> SecretStr:
        # redis-py supports Valkey, but not the URL schemes named after it.
        text = re.sub(r"^valkey(s?)(://|\+)", r"redis\1\2", value.get_secret_value())
        # Not parsed: it may name several hosts with a port each.
        several = re.match(r"rediss?\+(sentinel|cluster)://.", text) is not None
        return _checked(
            "redis_url",
            SecretStr(text),
            several or split_url(text).scheme in ("redis", "rediss", "unix"),
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

    @field_validator(*_CHOICES, mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("webhook_secret")
    @classmethod
    def _signing(cls, value: SecretStr) -> SecretStr:
        texts = [one.strip() for one in value.get_secret_value().split(",")]
        try:
            keys = [b64decode(one.removeprefix("whsec_"), validate=True) for one in texts]
        except ValueError:
            keys = []
        is_sound = 1 <= len(keys) <= 2 and all(one.startswith("whsec_") for one in texts)
        is_sound = is_sound and all(24 <= len(key) <= 64 for key in keys)
        return _checked("webhook_secret", value, is_sound)

    @field_validator("tidegate_policy")
    @classmethod
    def _policy(cls, value: Path) -> Path:
        return _path("tidegate_policy", value, Path.is_file)

    @model_validator(mode="before")
    @classmethod
    def _usual_models(cls, values: dict[str, Any]) -> dict[str, Any]:
        return usual_models(values) | values

    @model_validator(mode="after")
    def _never_by_mistake(self) -> Self:
        """Allow demo mode (bundled servers, emulated provider) on loopback, or if set by name."""
        if bool(self.database_url) != bool(self.redis_url):
            missing, present = "REDIS_URL", "DATABASE_URL"
            if not self.database_url:
                missing, present = present, missing
            raise ConfigError(missing, "(not set)", _AS_WELL.format(present))
        if self.jwt_issuer and not self.jwt_audience:
            raise ConfigError("JWT_AUDIENCE", "(not set)", "must be set where JWT_ISSUER is")
        if self.oidc_issuer and not (self.oidc_client_id and self.oidc_roles):
            missing = "OIDC_ROLES" if self.oidc_client_id else "OIDC_CLIENT_ID"
            raise ConfigError(missing, "(not set)", "must be set where OIDC_ISSUER is")
        if self.gemini_base_url != GOOGLE_URL and self.gemini_api_key is None:
            raise ConfigError("GEMINI_API_KEY", "(not set)", _AS_WELL.format("GEMINI_BASE_URL"))
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
        host = self.host
        return ip_address(host).is_loopback if is_address(host) else host == "localhost"

    @property
    def requires_keys(self) -> bool:
        """Return whether callers must send an API key."""
        return self.auth == "on" or (self.auth == "auto" and not self.is_loopback)

    @property
    def embedded(self) -> bool:
        """Return whether Valkey and PostgreSQL are the bundled ones."""
        return self.database_url is None

    @property
    def emulated(self) -> bool:
        """Return whether the built-in emulator may answer as Gemini: see `policy.emulates`."""
        return self.gemini_api_key is None and (self.tidegate_demo or self.is_loopback)

    @property
    def is_made_up(self) -> bool:
        """Return whether the answers of the account `gemini` are the built-in emulator's."""
        key = self.gemini_api_key
        return self.emulated or (key is not None and key.get_secret_value() == EMULATORS_KEY)

    @property
    def lease_ms(self) -> int:
        return round(self.semaphore_timeout * 1000)

    def model_for(self, kind: str) -> str:
        """Return the model of a kind (`text_only`, `multi_modal`, `image_generation`)."""
        names = {"text_only": self.text_model, "multi_modal": self.multi_modal_model}
        return names.get(kind, self.image_model)


Settings = TypeVar("Settings", bound=BaseModel)
_LONGEST_SHOWN = 200
_AS_WELL = "{} is set, so this must be set as well"
_UNITS = {"ms": " of milliseconds", "bytes": " of bytes", "days": " of days"}


def load(environ: Mapping[str, str] | None = None, dotenv: Path | None = Path(".env")) -> Config:
    """Read the environment over `.env` over the defaults; an empty value counts as not set.

    Raises ConfigError, whose message is the one line to show.
    """
    return _loaded(Config, environ, dotenv)


def load_client(
    environ: Mapping[str, str] | None = None, dotenv: Path | None = Path(".env")
) -> Client:
    """Read the settings of the commands' client as `load` does. Raises ConfigError."""
    return _loaded(Client, environ, dotenv)


def origins(
    environ: Mapping[str, str] | None = None, dotenv: Path | None = Path(".env")
) -> dict[str, str]:
    """Return where the value of each setting comes from, in words, by the setting's name."""
    written = from_dotenv(dotenv)
    source = os.environ if environ is None else environ
    found: dict[str, str] = {}
    for field in Config.model_fields:
        name = field.upper()
        for key in (name, f"{name}_FILE") if name in SECRETS else (name,):
            # As in `load`: an empty variable of the environment hides a line of the file.
            value = source[key] if key in source else written.get(key, "")
            if value.strip():
                place = "the environment" if key in source else str(dotenv)
                found[name] = place if key == name else f"the file of {key}, from {place}"
    return found


def _loaded(
    model: type[Settings], environ: Mapping[str, str] | None, dotenv: Path | None
) -> Settings:
    found = {**from_dotenv(dotenv), **(os.environ if environ is None else environ)}
    values: dict[str, str] = {}
    for field in model.model_fields:
        name = field.upper()
        raw = _secret(name, found) if name in SECRETS else found.get(name, "")
        if raw.strip():
            values[field] = raw.strip()
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        raise _first(invalid, values) from None


def secret(name: str, dotenv: Path | None = Path(".env")) -> str:
    """Return a secret whose variable the policy's file names: from the environment over `.env`, or
    from the file in `<name>_FILE`; empty if there is none. Raises ConfigError."""
    return _secret(name, {**from_dotenv(dotenv), **os.environ}).strip()


def allowed(field: str) -> str:
    """Return the allowed values of a setting in a user's words, which continue "must be"."""
    if field in ALLOWED:
        return ALLOWED[field]
    info = Config.model_fields[field]
    types = [one for one in get_args(info.annotation) if one is not type(None)]
    if get_origin(info.annotation) is Literal:
        return f"one of {', '.join(map(str, types))}"
    kind = info.annotation if isinstance(info.annotation, type) else types[0]
    if issubclass(kind, StrEnum):
        return f"one of {', '.join(member.value for member in kind)}"
    if issubclass(kind, bool):
        return "1 or 0 (or true and false, yes and no)"
    if issubclass(kind, int | float):
        noun = "a whole number" if issubclass(kind, int) else "a number"
        return _number(noun + _UNITS.get(field.rpartition("_")[2], ""), info.metadata)
    return "text"


def _number(noun: str, metadata: list[object]) -> str:
    bounds = {
        side: getattr(one, side) for one in metadata for side in ("ge", "le") if hasattr(one, side)
    }
    return f"{noun} from {bounds['ge']}" + (f" to {bounds['le']}" if "le" in bounds else " up")


def from_dotenv(path: Path | None) -> dict[str, str]:
    """Return the variables of a `.env` file, if any. Raises ConfigError if it cannot be read."""
    if path is None or not path.exists():  # it may be a folder, for example of a mount
        return {}
    try:
        for line in parse_stream(StringIO(path.read_text(encoding="utf-8-sig"))):
            if line.error:  # a setting that is skipped would have its default
                at = f"(line {line.original.line})"
                raise ConfigError(str(path), at, "must be NAME=value, or begin with #")
        return {name: value for name, value in dotenv_values(path).items() if value is not None}
    except (OSError, UnicodeDecodeError) as unreadable:
        raise ConfigError(str(path), "(file)", _unreadable(unreadable)) from None


def _secret(name: str, found: Mapping[str, str]) -> str:
    path = found.get(f"{name}_FILE", "").strip()
    if not path:
        return found.get(name, "")
    if found.get(name, "").strip():
        raise ConfigError(
            f"{name}_FILE", _one_line(path), f"set either {name} or {name}_FILE, not both"
        )
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as unreadable:
        raise ConfigError(f"{name}_FILE", _one_line(path), _unreadable(unreadable)) from None
    if not text:  # as "not set" it would start a gateway of emulated answers by mistake
        raise ConfigError(f"{name}_FILE", _one_line(path), "must be a file that is not empty")
    return text


def _unreadable(error: OSError | UnicodeDecodeError) -> str:
    return f"must be a readable file: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"


def _first(invalid: ValidationError, values: Mapping[str, str]) -> ConfigError:
    problem = invalid.errors(include_url=False, include_input=False)[0]
    field = str(problem["loc"][0])
    name = field.upper()
    value = "(hidden)" if name in SECRETS else _one_line(values[field], name)
    own_words = problem["type"] == "value_error"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return ConfigError(name, value, message if own_words else f"must be {allowed(field)}")


def shown(name: str, value: object) -> str:
    """Return a setting's value on one line, without secrets and a URL's hidden parts."""
    return "(hidden)" if name in SECRETS else _one_line(str(value), name)


def _one_line(value: str, name: str = "") -> str:
    """Return `value` without line breaks and, for a URL or a setting that is one, without a user,
    password or query."""
    scheme, divides, rest = value.partition("://") if "://" in value else ("", "", value)
    if divides or name.endswith("_URL"):
        before, query, _ = rest.partition("?")
        _, at, place = before.rpartition("@")
        value = f"{scheme}{divides}{'***@' if at else ''}{place}{'?***' if query else ''}"
    printable = "".join(letter if letter.isprintable() else " " for letter in value)
    return printable if len(printable) <= _LONGEST_SHOWN else f"{printable[:_LONGEST_SHOWN]}..."
