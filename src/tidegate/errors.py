"""Errors that Tidegate raises on purpose, in one tree.

TidegateError
├── ConfigError                 a setting is wrong; stops the start with one line
│   └── PolicyConflict          a program's policy is not the one in force in its pool
├── InvalidRequest              the caller's input is wrong; names the field and what is allowed
│   ├── PayloadTooLarge         a body, file or prompt is over its limit
│   │   └── FilesFull           a tenant has reached its limit on batch files
│   ├── UnsupportedMedia        a content type or file type that is not supported
│   └── FetchRefused            an `image_uri` that must not, or could not, be fetched
│       └── FetchFailed             its server failed or did not answer, which may pass
├── RequestTimeout              the client was too slow in sending its request
├── RealtimeIdle                a realtime session was silent on both sides for too long
├── RealtimeStalled             the client of a realtime session does not read
├── Unauthenticated             the API key is missing or unknown
├── Forbidden                   the caller may not do this
├── NotFound                    no such request, file or limit
│   └── UpstreamMissing         the process cannot use the upstream of a call, as without its key
├── MethodNotAllowed            the path exists, but not with this method
│   └── WebSocketRefused        the path exists, but not as a WebSocket
├── IdempotencyConflict         the idempotency key was used for a different request
├── AlreadyEnded                the request has ended already
├── PolicyChanged               another change came first
├── NotEnded                    the request has not ended yet
├── UpstreamsChanged            another change of the upstreams came first
├── UpstreamUnfit               an upstream fails its test, or a process lacks its key
├── UpstreamInUse               an upstream is still in use and cannot be removed
├── RequestCancelled            the owner cancelled the request
├── TooManyFollowers            the process has its maximum of status streams
├── QuotaExceeded               a tenant has reached one of its caps; names the cap
│   ├── BudgetExceeded          a budget has no room for the call in its period
│   │   └── BudgetPaused        the budget is paused until a person resumes it
│   ├── BudgetReserved          the rest of a budget is reserved for running calls
│   └── BudgetUnbounded         the maximum cost of a call under a budget is unknown
├── AdmissionError              a call was not admitted
│   ├── DeadlineExceeded        the call was not admitted before its deadline
│   │   ├── LimitPaused         a limit is paused for longer than the call may wait
│   │   └── LimitUsedUp         a limit has no room before the deadline
│   ├── DemandImpossible        the call can never be admitted; names the limit
│   ├── QueueFull               the queue is full
│   └── LimiterUnavailable      Valkey is unavailable and the policy is `closed`
├── LeaseLost                   the session of the permit has expired; results are not stored
├── CallPreempted               the call was preempted by a higher band, and is made again later
├── LastTryWaits                another last attempt of a job is running in this worker
├── UpstreamError               the call failed at the provider; `of_upstream`: by its own fault
│   ├── UpstreamThrottled       429, with the time, and whether a day's quota is used up
│   ├── UpstreamTierBusy        the requested processing tier has no capacity at the moment
│   ├── UpstreamUnavailable     5xx, refused or broken connection
│   │   └── UpstreamOut         out of service after repeated failures; it is being probed
│   │       └── UpstreamDrained     an operator has drained it, and no other serves the model
│   ├── UpstreamTimeout         the connect, first-byte, idle or total timeout was reached
│   ├── UpstreamRejected        another 4xx: a retry would fail too
│   ├── UpstreamUnauthorized    401 or 403: the API key is rejected
│   │   └── UpstreamUnpaid      the account has no credit, or has reached its spend limit
│   ├── UpstreamGarbled         the answer is malformed
│   ├── PromptBlocked           the provider's safety filter blocked the prompt
│   └── EmptyAnswer             the answer has no content; has the finish reason
├── StoreUnavailable            PostgreSQL is unavailable
├── IssuerUnavailable           the token issuer is unavailable, and its keys are unknown
├── ClaimLost                   another worker has the job now; this result is not stored
├── GatewayRefused              a gateway rejected a command; has its status and code
├── GatewayUnreachable          a gateway that a command called does not answer
└── ShuttingDown                this process is stopping

HTTP statuses are assigned in one table, `http/problems.py`. `code` is the stable name of the
error in records, logs and problem JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Literal, NamedTuple


class TidegateError(Exception):
    """Root of the tree. `str(error)` never contains a secret.

    reason: what a server of ours, or the network, said: a part of the message for operators and for
    callers in the process. Clients and tenants do not see it, since it may name hosts and users.
    """

    code: str = "internal"
    retryable: bool = False
    at_upstream: str | None = None  # where the call failed, for a response header

    def __init__(
        self, message: str, *, retry_after_ms: int | None = None, reason: str | None = None
    ) -> None:
        self.message = message if reason is None else f"{message}: {reason}"
        super().__init__(self.message)
        self.retry_after_ms = retry_after_ms
        self._reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by attributes: task queues and process pools send errors to their callers
        pickled, and the default would call `__init__` with the message alone."""
        return _restored, (type(self), self.args), self.__dict__

    @property
    def public_message(self) -> str:
        """The message without its reason."""
        return (
            self.message if self._reason is None else self.message.removesuffix(f": {self._reason}")
        )

    @property
    def client_message(self) -> str:
        """The message as clients of the gateway see it."""
        return self.public_message

    @property
    def message_with_allowed(self) -> str:
        """`client_message` with what is allowed, for bodies without a field for that."""
        allowed = getattr(self, "allowed", None)
        if not allowed or allowed in self.client_message:
            return self.client_message
        return f"{self.client_message}; allowed: {allowed}"


def _restored(kind: type[TidegateError], args: tuple[object, ...]) -> TidegateError:
    return kind.__new__(kind, *args)


_LONGEST_SHOWN = 500  # characters


def _in_a_line(text: str) -> str:
    shown = text.replace("\r", "\\r").replace("\n", "\\n")
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."


class ConfigError(TidegateError):
    """A setting, key or argument is wrong. The message is the one line shown at start-up:
    `NAME=value: allowed`, or without a value the sentence `name allowed`. Line breaks of a name or
    value are written as escapes, and a long value is cut."""

    code = "config"

    def __init__(self, variable: str, value: str | None, allowed: str) -> None:
        name = _in_a_line(variable)
        super().__init__(
            f"{name} {allowed}" if value is None else f"{name}={_in_a_line(value)}: {allowed}"
        )
        self.variable = variable
        self.value = value
        self.allowed = allowed


class PolicyConflict(ConfigError):
    """The policy of a program differs from the one in force in `pool`, and may not replace it.
    `limit` is the first limit or field that differs, with both of its values."""

    code = "policy_conflict"

    def __init__(self, message: str, *, pool: str, limit: str, in_force: str, asked: str) -> None:
        super().__init__(limit, asked, f"{in_force} is in force in pool {pool!r}")
        self.args = (message,)
        self.message = message
        self.pool = pool
        self.limit = limit
        self.in_force = in_force
        self.asked = asked


class InvalidRequest(TidegateError):
    """The caller's input is wrong. `field` names the input, `allowed` states valid values."""

    code = "invalid_request"

    def __init__(self, field: str, message: str, *, allowed: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.allowed = allowed


class PayloadTooLarge(InvalidRequest):
    """A body, file or prompt is over its limit."""

    code = "too_large"


class FilesFull(PayloadTooLarge):
    """A tenant has reached its limit on batch files: one must be deleted or expire."""

    code = "files_full"


class UnsupportedMedia(InvalidRequest):
    """The content type, or the type of a file, is not supported."""

    code = "unsupported_media"


class FetchRefused(InvalidRequest):
    """An `image_uri` must not, or could not, be fetched."""

    code = "fetch_refused"


class FetchFailed(FetchRefused):
    """The server of an `image_uri` failed or did not answer, which may pass."""

    code = "fetch_failed"
    retryable = True

    def __init__(self, field: str, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(field, message)
        self.retry_after_ms = retry_after_ms


class RequestTimeout(TidegateError):
    """The client was too slow in sending its request."""

    code = "request_timeout"


class RealtimeIdle(TidegateError):
    """A realtime session was silent on both sides for too long."""

    code = "realtime_idle"


class RealtimeStalled(TidegateError):
    """The client of a realtime session does not read."""

    code = "client_stalled"


class Unauthenticated(TidegateError):
    """The API key is missing or unknown."""

    code = "unauthenticated"


class Forbidden(TidegateError):
    """The caller may not do this. `field` and `allowed`: as of InvalidRequest, if an input is
    refused."""

    code = "forbidden"

    def __init__(
        self, message: str, *, field: str | None = None, allowed: str | None = None
    ) -> None:
        super().__init__(message)
        self.field = field
        self.allowed = allowed


class NotFound(TidegateError):
    """No such request, file or limit. `field` names the input that required it, if any."""

    code = "not_found"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UpstreamMissing(NotFound):
    """This process cannot use the upstream of a call. `lacking`: what each possible upstream lacks,
    such as the variable of its key. Another process may have it."""

    code = "upstream_missing"
    retryable = True

    def __init__(self, of: str, lacking: Mapping[str, str]) -> None:
        lacks = "; ".join(f"{name} lacks {setting}" for name, setting in lacking.items())
        super().__init__(f"this process can't reach the upstream of {of}: {lacks}")


class MethodNotAllowed(TidegateError):
    """The path exists, but only with other methods: `methods`."""

    code = "method_not_allowed"

    def __init__(self, message: str, *, methods: tuple[str, ...]) -> None:
        super().__init__(message)
        self.methods = methods


class WebSocketRefused(MethodNotAllowed):
    """The path exists, but not as a WebSocket. Codex then sends the same in HTTP immediately; on
    any other status it tries the WebSocket five more times first."""

    code = "websocket_refused"


class IdempotencyConflict(TidegateError):
    """The idempotency key was used for a different request."""

    code = "idempotency_conflict"
    field = "Idempotency-Key"
    allowed = "the same request again, or a new key"


class AlreadyEnded(TidegateError):
    """The request has ended already."""

    code = "already_ended"


class PolicyChanged(TidegateError):
    """Another change came first: the value that a change expects is not in force any more."""

    code = "policy_changed"

    def __init__(self, key: str, now: object) -> None:
        value = "not set" if now is None else f"{now}"
        super().__init__(f"{key} is {value} now: another change came first")
        self.field = key
        self.allowed = "a change of what is in force"

    @classmethod
    def check(cls, now: Mapping[str, object], expected: Mapping[str, object]) -> None:
        """Raises PolicyChanged if a value is not the expected one, ConfigError for an unknown
        name."""
        for name, value in expected.items():
            if name not in now:
                raise ConfigError(f"expected.{name}", None, f"is unknown; known: {', '.join(now)}")
            if now[name] != value:
                raise cls(name, now[name])


class NotEnded(TidegateError):
    """The request has not ended yet."""

    code = "not_ended"


class UpstreamsChanged(TidegateError):
    """Another change of the upstreams came first."""

    code = "upstreams_changed"


class UpstreamUnfit(TidegateError):
    """An upstream fails its test, or a process lacks its key."""

    code = "upstream_unfit"


class UpstreamInUse(TidegateError):
    """An upstream is still in use and cannot be removed."""

    code = "upstream_in_use"


class RequestCancelled(TidegateError):
    """The owner cancelled the request."""

    code = "cancelled"


class TooManyFollowers(TidegateError):
    """The process has its maximum of status streams."""

    code = "too_many_followers"
    retryable = True


class QuotaExceeded(TidegateError):
    """A tenant has reached one of its caps. `limit` is the cap's name, e.g. `most_queued_jobs`;
    `allowed`: the cap in words."""

    code = "quota_exceeded"
    retryable = True

    def __init__(
        self, message: str, *, limit: str, allowed: str, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message, retry_after_ms=retry_after_ms)
        self.limit = limit
        self.allowed = allowed


class BudgetExceeded(QuotaExceeded):
    """A budget has no room. `limit` is its name, e.g. `budget_day_tokens`. A retry helps once its
    period ends, not earlier. fallback: the model that is called instead, if there is one.
    resets_at: when the period ends, by PostgreSQL's clock. never_fits: the call needs more than a
    whole period allows, so that a retry does not help."""

    code = "budget_exceeded"

    def __init__(
        self,
        message: str,
        *,
        limit: str,
        allowed: str,
        retry_after_ms: int | None,
        fallback: str | None = None,
        resets_at: datetime | None = None,
        never_fits: bool = False,
    ) -> None:
        super().__init__(message, limit=limit, allowed=allowed, retry_after_ms=retry_after_ms)
        self.fallback, self.never_fits = fallback, never_fits
        self.retryable = not never_fits
        self.resets_at = resets_at


class BudgetPaused(BudgetExceeded):
    """The budget is paused for an unknown time: a person must resume it."""

    code = "budget_paused"


class BudgetReserved(QuotaExceeded):
    """The rest of the budget `limit` is reserved for calls in progress."""

    code = "budget_reserved"


class BudgetUnbounded(QuotaExceeded):
    """The budget `limit` applies to a call whose greatest possible cost is unknown: it is rejected,
    since the budget could be exceeded. The same call fails again."""

    code = "budget_unbounded"
    retryable = False


class AdmissionError(TidegateError):
    """The limiter did not admit a call. `limit` is the id of the refusing limit, e.g.
    `kind:text_only`."""

    code = "admission"

    def __init__(
        self,
        message: str,
        *,
        limit: str,
        retry_after_ms: int | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message, retry_after_ms=retry_after_ms, reason=reason)
        self.limit = limit


class DeadlineExceeded(AdmissionError):
    """A call was not admitted before its deadline. `is_estimate`: `retry_after_ms` is an estimate,
    since it depends on the duration of calls or on the order of waiters. Otherwise it is the end of
    a window, a quota or a pause."""

    code = "deadline_exceeded"
    is_estimate = False


class LimitPaused(DeadlineExceeded):
    """A limit is paused for longer than the call may wait; `retry_after_ms` is the end of the
    pause, None if it lasts until a person resumes the limit."""

    code = "limit_paused"


class LimitUsedUp(DeadlineExceeded):
    """A limit has no room before the deadline; `retry_after_ms` is when it has."""

    code = "limit_used_up"


class DemandImpossible(AdmissionError):
    """The call can never be admitted: `limit` is unknown, 0, or lower than the demand."""

    code = "impossible"


class QueueFull(AdmissionError):
    """The queue of waiting calls, or the memory for requests, is full."""

    code = "queue_full"


class LimiterUnavailable(AdmissionError):
    """Valkey is unavailable: a call is not admitted, or a command has no result."""

    code = "limiter_unavailable"
    retryable = True


class LeaseLost(TidegateError):
    """The session of the permit has expired; results are not stored."""

    code = "lease_lost"
    retryable = True

    @property
    def client_message(self) -> str:
        """A message without the session and the limits, which concern operators."""
        return "the gateway lost its right to make this call, and ended it: send it again"


class CallPreempted(TidegateError):
    """A call whose answer had not begun was cancelled to admit one of a higher band. It uses up no
    attempt: its job or line is queued again. Never raised to a client."""

    code = "preempted"
    retryable = True


class LastTryWaits(TidegateError):
    """A job or line that fails for good if one more worker dies is called alone, and another such
    call is in progress. It uses up no attempt. Never raised to a client."""

    code = "last_try_waits"
    retryable = True


# Statuses of a server or proxy in trouble. Not 504, which Gemini answers to a prompt that is too
# long for it, https://ai.google.dev/gemini-api/docs/troubleshooting
OF_THE_SERVER = (502, 503, 529)
# The longest time that a fault may state for the next call: an outage can end sooner than the
# provider, or a proxy in front of it, expects.
LONGEST_OF_FAULT_MS = 15_000


class UpstreamError(TidegateError):
    """A call failed at the provider. `status`: its HTTP status, if any. `in_outage`: set once other
    requests are known to fail at that upstream too. `is_busy`: a self-hosted server has no free
    slot yet, or loads its model."""

    code = "upstream"
    # Whether the upstream works, and this is its answer to this request.
    is_answer: ClassVar[bool] = False
    in_outage = False
    is_busy = False

    def __init__(
        self, message: str, *, status: int | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message, retry_after_ms=retry_after_ms)
        self.status = status

    @property
    def pause_ms(self) -> int:
        """The time for which to leave the upstream alone, 0 if none is stated: as long as a 4xx
        states, at most `LONGEST_OF_FAULT_MS` for any other failure."""
        stated_ms = self.retry_after_ms or 0
        is_refusal = self.status is not None and self.status < 500
        return stated_ms if is_refusal else min(stated_ms, LONGEST_OF_FAULT_MS)

    @property
    def of_upstream(self) -> bool:
        """Whether the fault is the upstream's, so that any other request would fail too. Such an
        error uses up none of a job's attempts. False if the request may have caused the error."""
        return self.in_outage


class StatedBound(NamedTuple):
    """A limit of the requested model, as a refusal states it."""

    unit: Literal["requests", "tokens", "input_tokens"]
    window: Literal["minute", "day"]
    bound: int


class UpstreamThrottled(UpstreamError):
    """A 429. `day_quota`: a day's quota is used up, so that a short wait does not help.

    unit: what was exceeded: `requests`, `tokens`, `input_tokens`, `output_tokens` or `images`;
        None if the provider did not state it.
    per_day: whether the limit is one per day, whenever the day begins.
    of_account: whether the limit is the account's, and not only the requested model's.
    stated: the limits that the refusal states with their bounds.
    lowered_limit: set if an adaptive limit was lowered for it, and nothing was paused.
    """

    code = "upstream_throttled"
    retryable = True
    lowered_limit = False

    def __init__(
        self,
        message: str,
        *,
        status: int | None = 429,
        retry_after_ms: int | None = None,
        per_day: bool = False,
        day_quota: bool = False,
        unit: str | None = None,
        of_account: bool = False,
        stated: tuple[StatedBound, ...] = (),
    ) -> None:
        super().__init__(message, status=status, retry_after_ms=retry_after_ms)
        self.stated = stated
        self.per_day = per_day or day_quota
        self.day_quota = day_quota
        self.unit = unit
        self.of_account = of_account

    @property
    def of_upstream(self) -> bool:
        return True


class UpstreamTierBusy(UpstreamError):
    """The requested processing tier, such as `flex`, has no capacity at the moment. The model and
    the account may still be usable in the standard tier, and nothing is charged."""

    code = "upstream_tier_busy"
    retryable = True
    is_answer = True


class UpstreamUnavailable(UpstreamError):
    """A 5xx, or a refused or broken connection. `broke`: when the connection broke, if known: while
    it was made, or before a byte of an answer. `asked`: false if the call was not made, because the
    upstream is out."""

    code = "upstream_unavailable"
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_ms: int | None = None,
        broke: Literal["connecting", "unheard"] | None = None,
        asked: bool = True,
    ) -> None:
        super().__init__(message, status=status, retry_after_ms=retry_after_ms)
        self.broke = broke
        self.asked = asked

    @property
    def of_upstream(self) -> bool:
        own = not self.asked or self.broke == "connecting" or self.status in OF_THE_SERVER
        return own or self.in_outage


class UpstreamOut(UpstreamUnavailable):
    """The call was not made: the upstream is out of service after repeated failures, and is
    probed."""

    code = "upstream_out"

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message, retry_after_ms=retry_after_ms, asked=False)


class UpstreamDrained(UpstreamOut):
    """The call was not made: an operator has drained the upstream, and no other one serves the
    model."""

    code = "upstream_drained"


class UpstreamTimeout(UpstreamError):
    """A timeout. `phase` is `connect`, `first_byte`, `idle` or `total`."""

    code = "upstream_timeout"
    retryable = True

    def __init__(self, message: str, *, phase: str) -> None:
        super().__init__(message)
        self.phase = phase

    @property
    def of_upstream(self) -> bool:
        return self.phase == "connect" or self.in_outage


class UpstreamRejected(UpstreamError):
    """The provider rejected the call with another 4xx: a retry would fail too."""

    code = "upstream_rejected"
    is_answer = True


class UpstreamUnauthorized(UpstreamError):
    """A 401 or 403. `of_key`: false if the refusal may concern this call only. `in_short`: a
    message that every client may read."""

    code = "upstream_unauthorized"
    in_short: ClassVar[str] = "the provider rejects this gateway's API key"

    def __init__(self, message: str, *, status: int | None = None, of_key: bool = True) -> None:
        super().__init__(message, status=status)
        self.of_key = of_key

    def for_clients(self) -> UpstreamUnauthorized:
        """Return the error without the provider's words, which a client could take as being about
        its own key."""
        found = type(self)(self.in_short)
        found.retry_after_ms, found.at_upstream = self.retry_after_ms, self.at_upstream
        return found

    @property
    def of_upstream(self) -> bool:
        return self.of_key or self.in_outage


class UpstreamUnpaid(UpstreamUnauthorized):
    """The account has no credit. `retry_after_ms`: until it may spend again, if the provider states
    it. `of_key`: false if it has too little for this call only."""

    code = "upstream_unpaid"
    in_short = "the account at the provider has no credit left"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        of_key: bool = True,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message, status=status, of_key=of_key)
        self.retry_after_ms = retry_after_ms


class UpstreamGarbled(UpstreamError):
    """The provider's answer is malformed. `is_empty`: a success without a body."""

    code = "upstream_garbled"
    retryable = True

    def __init__(self, message: str, *, status: int | None = None, is_empty: bool = False) -> None:
        super().__init__(message, status=status)
        self.is_empty = is_empty


class PromptBlocked(UpstreamError):
    """The provider's safety filter blocked the prompt. `reason`: the provider's word, such as
    `SAFETY`."""

    code = "prompt_blocked"
    is_answer = True

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message, status=200)
        self.reason = reason


class EmptyAnswer(UpstreamError):
    """The answer has no content. `finish_reason`: the provider's word, None if it gave none."""

    code = "empty_answer"
    is_answer = True

    def __init__(self, message: str, *, finish_reason: str | None) -> None:
        super().__init__(message, status=200)
        self.finish_reason = finish_reason


class StoreUnavailable(TidegateError):
    """PostgreSQL is unavailable."""

    code = "store_unavailable"
    retryable = True


class IssuerUnavailable(TidegateError):
    """The token issuer is unavailable, and its keys are unknown."""

    code = "issuer_unavailable"
    retryable = True


class ClaimLost(TidegateError):
    """Another worker has the job now; this result is not stored."""

    code = "claim_lost"


class GatewayRefused(TidegateError):
    """A gateway rejected a command. `problem`: the code in its answer, such as `not_found`."""

    code = "gateway_refused"

    def __init__(
        self, message: str, *, status: int, problem: str = "", retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message, retry_after_ms=retry_after_ms)
        self.status = status
        self.problem = problem


class GatewayUnreachable(TidegateError):
    """A gateway that a command called does not answer, or not as a gateway."""

    code = "gateway_unreachable"
    retryable = True


class ShuttingDown(TidegateError):
    """This process is stopping."""

    code = "shutting_down"
    retryable = True
