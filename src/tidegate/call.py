"""Internal types of requests and calls, independent of providers and of HTTP. Pure.

A `Call` is one request to a model. The answer is a series of `Event`s, pushed one by one into a
sink, and at the end an `Answer`.

The states of a request:

                     ┌────────── retry, released, worker died ────────────┐
                     ▼                                                    │
    submit ──────► queued ────────────── admitted ───────────────────► running
                     │                                                    │
                     ├─► expired    its deadline came first               ├─► succeeded
                     ├─► cancelled  by its owner                          ├─► failed
                     │                                                    │
                     └─► dead  ◄─── its workers died 3 times ─────────────┴─► cancelled

A stream is recorded once, when it ends, in one of the right-hand states.

Invariant: an end state never changes, except that a person may requeue a dead job, or discard it;
it is then cancelled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from os import urandom
from string import ascii_lowercase, ascii_uppercase
from typing import Any
from uuid import UUID

DEFAULT_TENANT = "default"
DEFAULT_POOL = "gemini"


class Kind(StrEnum):
    """Kind of a request; each kind has a limit of its own, `kind:<value>`."""

    TEXT_ONLY = "text_only"
    MULTI_MODAL = "multi_modal"
    IMAGE_GENERATION = "image_generation"

    @property
    def limit(self) -> str:
        return f"kind:{self.value}"


CLASSIFIER_LIMIT = "kind:classifier"
# A call that runs no model, such as the list of models: only limited by limits that name this kind.
OTHER_KIND = "other"
# A provider's batch, while it runs there: only limited by limits that name this kind.
BATCH_KIND = "batch"
# An open realtime session: only limited by limits that name this kind.
REALTIME_KIND = "realtime"


class Status(StrEnum):
    """The state of a request."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DEAD = "dead"

    @property
    def is_end(self) -> bool:
        return self not in (Status.QUEUED, Status.RUNNING)


class Tier(StrEnum):
    """Processing tier of a job, the fastest first.

    LIVE is the provider's standard tier, under the gateway's limits; FLEX is slower, cheaper, and
    refused while the provider is short of capacity; BATCH is the provider's own batch API.
    """

    LIVE = "live"
    FLEX = "flex"
    BATCH = "batch"


class ClassifiedBy(StrEnum):
    """What decided the kind of a request."""

    CALLER = "caller"
    RULES = "rules"
    LLM = "llm"
    KEYWORDS = "keywords"
    BODY = "body"  # the body of a native request


@dataclass(frozen=True, slots=True)
class Classification:
    """A kind, None while unsure, with a short sentence as the reason for the record."""

    kind: Kind | None
    by: ClassifiedBy
    reason: str


@dataclass(frozen=True, slots=True)
class Attachment:
    """A stored input file: its bytes are in the blob store under `blob_key`."""

    file_id: UUID
    name: str
    mime_type: str
    size_bytes: int
    blob_key: str


@dataclass(frozen=True, slots=True)
class Media:
    """Bytes of one file or image, in memory."""

    mime_type: str
    data: bytes
    name: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a model, as the spine sees it. `media`: the loaded attachments. `tier`: LIVE,
    or FLEX, which is then requested from the provider."""

    request_id: UUID
    prompt: str
    kind: Kind
    model: str
    media: tuple[Media, ...] = ()
    tenant_id: str = DEFAULT_TENANT
    priority: int = 0  # from -100 to 100, higher first
    traceparent: str | None = None  # sent with it, if it is part of a trace
    tier: Tier = Tier.LIVE


class Scope(StrEnum):
    """A permission of an API key."""

    INFER = "infer"  # call models: live, streamed, or as jobs
    READ = "read"  # read its tenant's own requests, answers and files
    VIEWER = "viewer"  # /admin, dashboard and metrics of all tenants, as OperatorRole.VIEWER
    OPERATOR = "operator"  # likewise, as OperatorRole.OPERATOR
    ADMIN = "admin"  # all of /admin, whatever the key's tenant


class OperatorRole(StrEnum):
    """What an operator may do; each role includes those before it.

    viewer: read. operator: change limits, pause, requeue, cancel, drain. admin: keys, tenants,
    upstreams and their credentials, erasure, roles.
    """

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, other: OperatorRole) -> bool:
        return _RANKS.index(self) >= _RANKS.index(other)

    @staticmethod
    def of(scopes: Collection[str]) -> OperatorRole | None:
        """Return the highest role among a key's scopes, which have the same names; None without
        one."""
        return next((role for role in reversed(_RANKS) if role in scopes), None)


_RANKS = tuple(OperatorRole)
RoleRules = Mapping[str, OperatorRole]


def role_rules(value: object) -> object:
    """Parse rules such as `{"groups=oncall": "operator"}`, a mapping or JSON: a claim, and a
    pattern that one of its values must match, to a role. Raises ValueError, which states what is
    allowed."""
    allowed = 'must be a JSON object such as {"groups=oncall": "operator"}, of roles '
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict) or not all("=" in rule.strip("=") for rule in value):
        raise ValueError(allowed + ", ".join(OperatorRole))
    if any(role not in _RANKS for role in value.values()):
        raise ValueError(allowed + ", ".join(OperatorRole))
    return {rule: OperatorRole(role) for rule, role in value.items()}


# Unlike `str.lower`, which maps some other letters to ASCII, such as the Kelvin sign.
_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)


def role_by(rules: RoleRules, claims: Mapping[str, Any]) -> OperatorRole | None:
    """Return the highest role that a person's claims give; None without one. An e-mail address only
    counts if its issuer has verified it."""
    fitting = {role for rule, role in rules.items() if _fits(rule, claims)}
    return OperatorRole.of(fitting)


def _fits(rule: str, claims: Mapping[str, Any]) -> bool:
    name, _, pattern = rule.partition("=")
    value: Any = claims.get(name)
    if value is None:  # a path, such as Keycloak's realm_access.roles
        value = claims
        for step in name.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
    if name == "email":
        is_verified = claims.get("email_verified") in (True, "true")
        is_text = is_verified and isinstance(value, str)
        return is_text and fnmatchcase(value.translate(_LOWER), pattern.translate(_LOWER))
    values = value if isinstance(value, list) else [value]
    return any(isinstance(one, str) and fnmatchcase(one, pattern) for one in values)


@dataclass(frozen=True, slots=True)
class Caps:
    """Bounds on one tenant's use of the gateway. None means no bound.

    Jobs and bytes are counted over all processes, streams and long polls in each process.
    """

    most_queued_jobs: int | None = None
    most_queued_bytes: int | None = None
    most_streams: int | None = None
    most_long_polls: int | None = None

    @property
    def on_queue(self) -> bool:
        return self.most_queued_jobs is not None or self.most_queued_bytes is not None


NO_CAPS = Caps()


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request, with its tenant and what it may use.

    key_id: of the API key in use; None without one. models: patterns of allowed models
    (`gemini-*`); None means all. most_priority: a higher priority is lowered to it. tiers: the
    default tiers of its jobs beside the live one.
    """

    tenant_id: str = DEFAULT_TENANT
    key_id: str | None = None
    models: tuple[str, ...] | None = None
    most_priority: int = 100
    caps: Caps = NO_CAPS
    tiers: tuple[Tier, ...] = ()

    def may_ask(self, model: str) -> bool:
        """Whether a model is allowed, with or without Gemini's prefix `models/`."""
        if self.models is None:
            return True
        plain = model.removeprefix("models/")
        return any(fnmatchcase(plain, pattern) for pattern in self.models)


ANYBODY = Caller()


@dataclass(frozen=True, slots=True)
class CallCost:
    """Cost of a call before it is made. most_micros, most_tokens: the greatest possible cost, in
    micro-dollars and in LLM tokens, None if there is no proven bound. likely_micros, likely_tokens:
    the expected cost; 0 without a price. unknown: why the greatest cost is unknown."""

    most_micros: int | None
    most_tokens: int | None
    likely_micros: int = 0
    likely_tokens: int = 0
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class UsageDetails:
    """Usage that a provider reports beside the tokens. None: not reported, or 0.

    These tokens are parts of the input or the output. `cache_write_tokens` has two parts: written
    for 5 minutes and for an hour. provider_cost_micros: what the provider itself charges, in
    micro-dollars; never the gateway's charge. tier: the processing tier that served the call, None
    for the standard one.
    """

    cache_write_tokens: int | None = None
    cache_write_5m_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    input_audio_tokens: int | None = None
    input_image_tokens: int | None = None
    input_video_tokens: int | None = None
    output_audio_tokens: int | None = None
    output_image_tokens: int | None = None
    output_video_tokens: int | None = None
    searches: int | None = None
    provider_cost_micros: int | None = None
    tier: str | None = None
    file_searches: int | None = None
    input_audio_seconds: int | None = None
    input_characters: int | None = None
    output_video_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """LLM tokens that a call used. None means that the provider did not report them: never zero."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    thoughts_tokens: int | None = None
    cached_tokens: int | None = None
    total_tokens: int | None = None
    details: UsageDetails | None = None


UNKNOWN_USAGE = Usage()


def seconds_of(usage: Usage) -> int | None:
    """Return the seconds of audio in the input; None if they are not reported."""
    return None if usage.details is None else usage.details.input_audio_seconds


class UsageState(StrEnum):
    """How the usage of a call is known."""

    NONE = "none"  # no model ran: never sent, or refused by the provider
    TOLD = "told"  # reported by the provider, of a complete answer
    PARTIAL = "partial"  # reported by the provider, of an answer that was cut off: a lower bound
    ESTIMATED = "estimated"  # by the gateway: the estimated input, and the output that arrived
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Charge:
    """What a call is charged. `cost_micros`: in micro-dollars; None if the price or the usage is
    unknown. `images`: the number that arrived, None if they were not counted."""

    state: UsageState = UsageState.NONE
    usage: Usage = UNKNOWN_USAGE
    images: int | None = None
    cost_micros: int | None = 0

    @property
    def tokens(self) -> int:
        """LLM tokens that count against a budget; unknown ones count as zero."""
        usage = self.usage
        if usage.output_tokens is None and usage.total_tokens is not None:
            return usage.total_tokens
        return sum(
            count or 0 for count in (usage.input_tokens, usage.output_tokens, usage.thoughts_tokens)
        )


NO_CHARGE = Charge()
UNKNOWN_CHARGE = Charge(UsageState.UNKNOWN, cost_micros=None)


@dataclass(frozen=True, slots=True)
class Admitted:
    """The limiter has admitted the call; `waited_ms`: the time from request to admission."""

    waited_ms: float


@dataclass(frozen=True, slots=True)
class Delta:
    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    media: Media


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Usage so far; a later report replaces an earlier one."""

    usage: Usage


Event = Admitted | Delta | Picture | UsageReport
Sink = Callable[[Event], Awaitable[None]]


@dataclass(slots=True)
class Answer:
    """An answer, filled while it streams, so that a partial one is kept too."""

    text: list[str] = field(default_factory=list)
    pictures: list[Media] = field(default_factory=list)
    usage: Usage = UNKNOWN_USAGE
    finish_reason: str | None = None
    model_version: str | None = None
    response_id: str | None = None
    first_byte_ms: float | None = None  # from sending the call to the first bytes of its answer

    @property
    def whole_text(self) -> str:
        return "".join(self.text)

    def clear(self) -> None:
        """Discard the answer before a retry."""
        self.text, self.pictures, self.usage = [], [], UNKNOWN_USAGE
        self.finish_reason = self.model_version = self.response_id = self.first_byte_ms = None


class Outcome(StrEnum):
    """How a permit's call ended, as reported to the limiter."""

    SUCCESS = "success"
    IGNORED = "ignored"  # cancelled, or refused for reasons unrelated to the provider's load
    DROPPED = "dropped"  # throttled or failed upstream


# A UUIDv7's version and variant, and its random bits, among the last 80.
_V7 = 0x7 << 76 | 0x2 << 62
_RANDOM = (1 << 80) - 1 & ~(0xF << 76 | 0x3 << 62)


def new_id() -> UUID:
    """Return a UUIDv7 (RFC 9562): milliseconds since the epoch, then random bits; sorts by time."""
    ms = time.time_ns() // 1_000_000
    value = (ms & 0xFFFF_FFFF_FFFF) << 80 | int.from_bytes(urandom(10), "big") & _RANDOM | _V7
    return UUID(int=value)


def made_at(one: UUID) -> datetime:
    """Return when `new_id` made an id."""
    return datetime.fromtimestamp((one.int >> 80) / 1000, UTC)


def tokens_of(usage: Usage) -> tuple[int | None, int | None]:
    """Return the input and output tokens of a call, with thinking as output; None if unknown."""
    output_tokens = usage.output_tokens
    if output_tokens is not None:
        output_tokens += usage.thoughts_tokens or 0
    elif usage.total_tokens is not None and usage.input_tokens is not None:
        output_tokens = max(0, usage.total_tokens - usage.input_tokens)
    return usage.input_tokens, output_tokens
