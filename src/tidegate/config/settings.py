"""Every setting, with its type, bounds, default and description: the only place that has them.

Those on where things are stand in `places`. `.env.example` and `docs/configuration.md` are written
from here by `scripts/generate_docs.py`.
"""

from __future__ import annotations

import json
from base64 import b64decode
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from tidegate.config import client, places
from tidegate.config.places import GOOGLE_URL, Milliseconds, Places, sound
from tidegate.errors import ConfigError

DEFAULT_LIMITS = {"text_only": 5, "multi_modal": 3, "image_generation": 2}
KINDS = tuple(DEFAULT_LIMITS)
MOST_AT_ONCE = 100_000
NEEDED_IN_THE_OPEN = ("DATABASE_URL", "REDIS_URL")
PROVIDER_KEYS = ("GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
SECRETS = (
    *NEEDED_IN_THE_OPEN,
    *PROVIDER_KEYS,
    *("ADMIN_TOKEN", "WEBHOOK_SECRET", "TIDEGATE_API_KEY"),
)

ALLOWED = (
    places.ALLOWED
    | client.ALLOWED
    | {
        "tidegate_policy": "the path of a file that is there",
        "webhook_secret": "whsec_ and 24 to 64 bytes in base64",
        "rate_limits": f"a JSON object of whole numbers from 0 to {MOST_AT_ONCE}"
        f" by type ({', '.join(KINDS)})",
    }
)
# The headings of the documentation, each above the field that it stands before.
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
    """Who decides whether a request wants an image: see docs/classification.md."""

    LLM = "llm"
    AUTO = "auto"
    KEYWORDS = "keywords"


class Config(Places):
    """Every setting of a deployment. Field names are the variables' names in lower case."""

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
    max_held_bytes: Annotated[int, Field(ge=1)] = Field(
        default=250_000_000,
        description="How much of the bodies of requests one process holds in memory at once, "
        "those of up to 64 KB aside: native calls and prompts of /stream until they end, all "
        "others while they arrive; more are refused with 429. A process takes about twice as "
        "much memory for them. MAX_BODY_BYTES where that is more. A tenant with keys may have "
        "half of what the others leave of it. Jobs count until they are stored (503 where there "
        "is no room); of large wrapped calls a worker holds a third of it for each type of job, "
        "and the others wait.",
    )
    max_batch_files_bytes: Annotated[int, Field(ge=1)] = Field(
        default=10_000_000_000,
        description="How much one tenant may keep in the files that it uploads for batches, until "
        "it deletes them or RETENTION_DAYS are over. More is refused: see docs/batches.md.",
    )
    receive_timeout_ms: Milliseconds = Field(
        default=15_000, description="The longest silence of a client while it sends its request."
    )
    stream_wait_ms: Milliseconds = Field(
        default=30_000,
        description="How long a stream or a native call waits for its turn before it is refused, "
        "where the request gives no deadline.",
    )
    keep_alive_after_ms: Annotated[int, Field(ge=0, le=3_600_000)] = Field(
        default=0,
        description="While a native stream waits longer than this, comments keep its connection "
        "alive; from then on a refusal is an event in a 200. 0: never.",
    )
    stalled_reader_ms: Milliseconds = Field(
        default=30_000, description="How long a client may stop reading before it is cut off."
    )

    max_attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        default=5,
        description="How many attempts a job has. A fault of the upstream itself (no connection, "
        "429, 502, 503, a refused key) uses up none.",
    )
    claim_lease_ms: Milliseconds = Field(
        default=15_000, description="How soon another worker takes over a dead worker's jobs."
    )
    job_deadline_ms: Annotated[int | None, Field(ge=1)] = Field(
        default=None,
        description="How long a job may wait for its turn before it expires, where the request "
        "gives no deadline_ms. Not set: as long as needed.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        description="Signs webhooks (see docs/jobs.md), as whsec_ and random bytes in base64. "
        "Without one no webhook_url is taken.",
    )
    webhook_allow_private: bool = Field(
        default=False,
        description="Send webhooks to private, loopback and link-local addresses too. Only where "
        "everybody who may submit may also reach what is there.",
    )
    webhook_timeout_ms: Milliseconds = Field(
        default=15_000, description="How long the receiver of a webhook may take to answer."
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
    leave_ms: Annotated[int, Field(ge=0, le=3_600_000)] = Field(
        default=1_000,
        description="How long a process that gets SIGTERM goes on taking requests, while it says "
        "on /health/ready and on every answer that it leaves, so that balancers and clients with "
        "kept connections go elsewhere. Ctrl-C does not wait for it.",
    )
    shutdown_grace_ms: Milliseconds = Field(
        default=20_000, description="How long running calls may go on after that."
    )
    migrate_at_start: bool = Field(
        default=True,
        description="Whether serve and worker bring the database's schema up to date before they "
        "begin. Where `tidegate migrate` does it, 0 lets them start at once and become ready when "
        "the schema fits.",
    )

    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="The look of the log: auto is console on a terminal, else json."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least serious lines that are logged."
    )
    worker_port: Annotated[int | None, Field(ge=0, le=65_535)] = Field(
        default=None,
        description="Where a worker that runs by itself (tidegate worker) is asked how it is, on "
        "HOST: /health/live and /health/ready for probes, /metrics, /admin/process; 0 takes any "
        "free port. Not set: nowhere. Those of tidegate up are seen at its API.",
    )

    tidegate_url: client.Url = None
    tidegate_api_key: client.Key = None

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

    @field_validator("webhook_secret")
    @classmethod
    def _signing(cls, value: SecretStr) -> SecretStr:
        head, mark, coded = value.get_secret_value().partition("whsec_")
        try:
            key = b64decode(coded, validate=True)
        except ValueError:
            key = b""
        is_sound = bool(mark) and not head and 24 <= len(key) <= 64
        return sound(ALLOWED["webhook_secret"], value, is_sound)

    @field_validator("tidegate_policy")
    @classmethod
    def _policy(cls, value: Path) -> Path:
        path = value.expanduser()
        return sound(ALLOWED["tidegate_policy"], path, path.is_file())

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
    def lease_ms(self) -> int:
        return round(self.semaphore_timeout * 1000)

    def model_for(self, kind: str) -> str:
        """The configured model of a kind (`text_only`, `multi_modal`, `image_generation`)."""
        names = {"text_only": self.text_model, "multi_modal": self.multi_modal_model}
        return names.get(kind, self.image_model)
