"""Demand of a call on the limiter: its limits, its tokens, its priority. Pure: clocks are passed.

`Demands` builds the demand of a call before admission and corrects it after the call. A call falls
under the limit of its kind, and under the limits of other scopes that the policy contains. A 429
pauses a limit of the requested model, or the limit of the account if the provider names the
account; never the limit of the call's kind. The pause ends at midnight at the latest for a day
quota, and after ten minutes at the latest for any other limit.

`Conversations` predicts how much of a call's input is in the provider's prompt cache. A
conversation is identified by its tools, its system prompt and its first message. Each call of a
conversation sends the input of the previous call and a little more; the cache contains what the
previous call read from it and wrote to it. The first call of another conversation with the same
tools and system prompt finds what earlier first calls found, and at least the share of its input
that nearly all recent first calls found. Predictions are scaled by their recent accuracy for the
tenant and model.

Invariants: the settled usage is never less than the known usage; nothing is predicted before
earlier predictions have proved right; the calls of one tenant never change the predictions of
another; memory is bounded.
"""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from functools import lru_cache, partial
from hashlib import sha256
from math import ceil
from time import monotonic
from typing import NamedTuple
from zoneinfo import ZoneInfo

from tidegate.admission.charges import Prices, foreseen
from tidegate.admission.estimator import Estimate, Estimator, Pieces, pieces_of
from tidegate.call import (
    BATCH_KIND,
    CLASSIFIER_LIMIT,
    DEFAULT_TENANT,
    OTHER_KIND,
    REALTIME_KIND,
    Call,
    Kind,
    Usage,
    UsageDetails,
    tokens_of,
)
from tidegate.errors import UpstreamThrottled
from tidegate.limiter import (
    DEFAULT_PRIORITY,
    USUAL_WEIGHTS,
    Band,
    Concurrency,
    Demand,
    Limit,
    PoolPolicy,
    Quota,
    Rate,
    Tokens,
)
from tidegate.policy.format import (
    MEASURES,
    TOTAL,
    CallerName,
    binds_model,
    caller_of,
    is_in_group,
    is_of_models,
    is_pattern,
    plain_model,
    subject_of,
)

MOST_PRIORITY = 100
# Bounds the cache of limits by call, because clients choose the names of models and tenants.
_MOST_KEPT = 1_000
_UNLIMITED_KINDS = (OTHER_KIND, BATCH_KIND, REALTIME_KIND)  # bound only by limits that name them


# The API key's prefix, the user and the conversation of a call, each None if the call names none.
# A bare tuple, since each call makes one.
CallTags = tuple[str | None, str | None, str | None]
NO_TAGS: CallTags = (None, None, None)


class Reach:
    """The limits of one policy, indexed by the scope that they apply to."""

    def __init__(self, policy: PoolPolicy, *, kinds_optional: bool = False) -> None:
        self.policy = policy
        units = {
            limit.unit
            for limit in map(policy.limit, policy.limits)
            if isinstance(limit, Rate | Quota)
        }
        self.counts_money = "usd" in units or policy.fair_by == "cost"
        self.counts_cache = any(
            _counts_cache(limit) for limit in map(policy.limit, policy.limits) if limit is not None
        )
        self.counts_tokens = (
            self.counts_money
            or not units.isdisjoint(USUAL_WEIGHTS)
            or any(
                isinstance(limit, Concurrency) and limit.by_tokens
                for limit in map(policy.limit, policy.limits)
            )
        )
        self.limits = lru_cache(_MOST_KEPT)(self._limits_of)
        self.band = lru_cache(2 * MOST_PRIORITY + 1)(partial(band_of, bands=policy.bands))
        self._kinds_optional = kinds_optional
        self._bound: defaultdict[str | CallerName, list[tuple[str, str]]] = defaultdict(list)
        self._patterns: list[str] = []
        callers: set[CallerName] = set()
        for limit_id in sorted(policy.limits, key=_usual_order):
            subject = caller_of(limit_id) or subject_of(limit_id)
            if subject is not None:
                self._bound[subject].append((limit_id, _counts_media(policy.limit(limit_id))))
            if isinstance(subject, tuple):
                callers.add(subject)
            elif subject is not None and is_pattern(subject) and subject not in self._patterns:
                self._patterns.append(subject)
        self._callers = frozenset(callers)
        self.names_callers = bool(callers)

    def named(self, tenant: str, tags: CallTags) -> tuple[CallerName, ...]:
        """Return those of the call's key, user and conversation that the policy names.

        Names that the policy does not contain are not stored anywhere.
        """
        key, user, conversation = tags
        own: tuple[CallerName, ...] = (
            ("key", key or ""),
            ("user", tenant, user or ""),
            ("conversation", tenant, conversation or ""),
        )
        return tuple(one for one in own if one in self._callers)

    def _limits_of(
        self,
        kind: str,
        model: str,
        tenant: str,
        makes_images: bool,
        has_audio: bool = False,
        named: tuple[CallerName, ...] = (),
    ) -> tuple[str, ...]:
        """Return the ids of all limits that a call falls under, the limit of its kind first.

        Limits on images apply only with `makes_images`, limits on seconds of audio only with
        `has_audio`. `named`: the call's key, user and conversation that the policy names.
        """
        media = {"", "images" if makes_images else "", "audio_seconds" if has_audio else ""}
        first = f"kind:{kind}"
        required = not self._kinds_optional and kind not in _UNLIMITED_KINDS
        found = [first] if required or first in self.policy.limits else []
        name = plain_model(model)
        models = [one for one in self._patterns if is_in_group(name, one)]
        if name not in models and is_of_models(name):  # a client may name it like a pattern
            models.insert(0, name)
        all_of: tuple[str | CallerName, ...] = (*models, f"tenant/{tenant}", *named, TOTAL)
        for subject in (f"kind/{kind}", *all_of):
            if subject in self._bound:
                found += [
                    limit_id
                    for limit_id, of_media in self._bound[subject]
                    if limit_id != first and of_media in media
                ]
        return tuple(found)


def _counts_use(limit: Limit | None) -> bool:
    """Return whether the limit counts tokens or money instead of calls."""
    if isinstance(limit, Concurrency):
        return limit.by_tokens
    return isinstance(limit, Rate | Quota) and (limit.unit in USUAL_WEIGHTS or limit.unit == "usd")


def _counts_cache(limit: Limit) -> bool:
    """Return whether input in the provider's cache counts less under the limit."""
    if not isinstance(limit, Rate | Quota) or limit.unit not in USUAL_WEIGHTS:
        return False
    weights = limit.weights or USUAL_WEIGHTS[limit.unit]
    return weights.cached < weights.input and limit.reserve != "larger"


def _counts_media(limit: Limit | None) -> str:
    """Return the unit of a limit on images or seconds of audio; "" for any other limit."""
    if isinstance(limit, Rate | Quota) and limit.unit in ("images", "audio_seconds"):
        return limit.unit
    return ""


def band_of(priority: int, bands: tuple[Band, ...]) -> str:
    """Return the band for a request's priority from -100 to 100.

    Priority 0 is `normal`, or the middle band if none has that name. The other priorities are
    spread evenly over the bands above and below.
    """
    names = [band.name for band in bands]
    usual = names.index(DEFAULT_PRIORITY) if DEFAULT_PRIORITY in names else len(names) // 2
    steps = min(abs(priority), MOST_PRIORITY)
    if not steps:
        return names[usual]
    room = usual if priority > 0 else len(names) - 1 - usual
    offset = min(room, 1 + (steps - 1) * room // MOST_PRIORITY)
    return names[usual - offset if priority > 0 else usual + offset]


def _usual_order(limit_id: str) -> tuple[bool, str]:
    return limit_id.partition(":")[0] in MEASURES, limit_id


_CLASSIFIER = CLASSIFIER_LIMIT.partition(":")[2]
_BATCHES = f"kind:{BATCH_KIND}"
# Length of the judge's instruction and schema, which are added to each prompt.
_JUDGE_CHARS = 1_200
_LEARN_FROM_ONE_IN = 16
_NO_USAGE = Usage()


def _now_ms() -> float:
    return monotonic() * 1000


def _no_conversation() -> ConversationKey | None:
    return None


# Not frozen, unlike similar classes: one is created per call, and frozen ones cost more.
@dataclass(slots=True)
class CallDemand:
    """The demand of one call: it is admitted under all of `limits`, or not at all.

    priority: the name of a band. audio_seconds: those of the input. max_output_tokens: the bound
    that the call sets. cost_micros: the expected cost in micro-dollars, if a limit or the shares
    count money; None without a price. conversation, expected: set if a limit counts cached input
    less. is_follow_up: the call concerns an object that exists at an upstream, and may reach it
    there even while that upstream is drained.
    """

    limits: tuple[str, ...]
    tenant: str
    priority: str
    images: int
    estimate: Estimate | None = None
    max_output_tokens: int | None = None
    cost_micros: int | None = None
    conversation: ConversationKey | None = None
    expected: ExpectedInput | None = None
    audio_seconds: int = 0
    is_follow_up: bool = False

    @property
    def tokens(self) -> Tokens | None:
        """Tokens to reserve; None if no limit counts them, so that they were not estimated.

        The call rarely uses more. Never less than the first guess, so that a tenant cannot train
        the estimator to reserve nothing.
        """
        one = self.estimate
        if one is None:
            return None
        input_tokens = max(one.input_tokens, one.guessed_input_tokens)
        uncached = input_tokens if self.expected is None else self.expected.uncached
        return Tokens(
            input_tokens,
            max(one.output_tokens, one.guessed_output_tokens),
            input_tokens - min(uncached, input_tokens),
        )

    def to_admit(
        self,
        deadline_ms: int | None,
        hard_ms: int,
        *,
        once: bool = False,
        by_estimate: bool = False,
        has_usual_deadline: bool = False,
    ) -> Demand:
        """Return the request for the limiter; its class `Demand` describes the arguments."""
        tokens, most, larger_tokens = self.tokens, None, None
        if tokens is not None and self.estimate is not None:
            larger_tokens = self.estimate.guessed_input_tokens
            if self.max_output_tokens is not None:
                most = Tokens(tokens.input, self.max_output_tokens, tokens.cached)
                larger_tokens = max(larger_tokens, self.max_output_tokens)
        return Demand(
            self.limits,
            self.tenant,
            self.priority,
            tokens,
            self.images,
            deadline_ms,
            hard_ms,
            once,
            True,
            self.audio_seconds,
            self.cost_micros or 0,
            most,
            larger_tokens,
            by_estimate,
            has_usual_deadline,
        )

    def used(self, reported: Usage, charged: Usage = _NO_USAGE, *, whole: bool) -> Tokens | None:
        """Return the tokens to settle; None if nothing is known.

        `whole`: the answer came to its end; of an answer that was cut off the provider may have
        generated more than it reported. `charged`: the usage that the call is charged for, at least
        what was received; it can exceed the reservation.
        """
        reserved = self.tokens
        if reserved is None:
            return None
        input_tokens, output_tokens = tokens_of(reported)
        charged_input, charged_output = tokens_of(charged)
        known = (input_tokens, output_tokens, charged_input, charged_output)
        if known.count(None) == len(known):
            return None
        if input_tokens is None:
            input_tokens = max(reserved.input, charged_input or 0)
        if output_tokens is None or not whole:
            output_tokens = max(output_tokens or 0, charged_output or 0, reserved.output)
        cached = min(reported.cached_tokens or 0, input_tokens)
        written = 0 if reported.details is None else reported.details.cache_write_tokens or 0
        return Tokens(input_tokens, output_tokens, cached, min(written, input_tokens - cached))


def tokens_read(reported: Usage, charged: Usage) -> Tokens:
    """Return the input tokens that a provider processed for a call, if no limit counts tokens."""
    read = reported.input_tokens or charged.input_tokens or 0
    return Tokens(read, 0, min(reported.cached_tokens or 0, read))


class Demands:
    """Builder of demands, one per process and upstream, with the upstream's prices."""

    def __init__(
        self,
        estimator: Estimator | None = None,
        *,
        kinds_optional: bool = False,
        prices: Prices | None = None,
        now_ms: Callable[[], float] = _now_ms,
    ) -> None:
        """`kinds_optional`: the policy need not contain a limit for each kind. `now_ms`: a
        monotonic clock.
        """
        self._now_ms = now_ms
        self._conversations = Conversations(now_ms)
        self.estimator = estimator or Estimator()
        self.prices = prices or Prices()
        self._kinds_optional = kinds_optional
        self._reach = Reach(PoolPolicy({}))
        self._turn = -1  # so that the first call is estimated and learned from

    def of(self, call: Call, policy: PoolPolicy, tags: CallTags = NO_TAGS) -> CallDemand:
        """Return the demand of a call under the policy in force."""
        return self.of_native(
            call.model,
            call.kind.value,
            pieces_of(call.prompt, call.media),
            policy,
            tenant=call.tenant_id,
            tags=tags,
            priority=call.priority,
            images=int(call.kind is Kind.IMAGE_GENERATION),
            estimates_all=True,
        )

    def of_native(
        self,
        model: str,
        kind: str,
        pieces: Pieces,
        policy: PoolPolicy,
        *,
        tenant: str,
        priority: int,
        tags: CallTags = NO_TAGS,
        images: int = 0,
        max_output_tokens: int | None = None,
        estimates_all: bool = False,
        conversation: Callable[[], ConversationKey | None] = _no_conversation,
        measured: UsageDetails | None = None,
        runs_model: bool = True,
    ) -> CallDemand:
        """Return the demand of a request in a provider's own dialect; it may have no limits.

        A request that runs no model takes nothing of limits of models, tokens or money. If no
        limit counts tokens, only one call in 16 is estimated, for the estimator to learn from,
        since an estimate costs as much as all other steps; `estimates_all` estimates each.
        `conversation` is called if a limit counts cached input less. `measured`: usage other than
        tokens that the request shows.
        """
        audio_seconds = 0 if measured is None else measured.input_audio_seconds or 0
        if not runs_model:
            all_of = self.limits(policy, kind, "", tenant, 0, 0, tags)
            calls = tuple(one for one in all_of if not _counts_use(policy.limit(one)))
            return CallDemand(calls, tenant, self._reach.band(priority), 0)
        limits = self.limits(policy, kind, model, tenant, images, audio_seconds, tags)
        reach = self._reach
        self._turn = (self._turn + 1) % _LEARN_FROM_ONE_IN
        estimate = None
        if not self._turn or reach.counts_tokens or estimates_all:
            estimate = self.estimator.of_pieces(
                model,
                kind,
                pieces,
                images=images,
                max_output_tokens=max_output_tokens,
                tenant=tenant,
            )
        cost_micros = None
        if reach.counts_money and estimate is not None:
            cost_micros = foreseen(self.prices.of(model), estimate, images, measured)[0]
        demand = CallDemand(
            limits, tenant, reach.band(priority), images, estimate, max_output_tokens, cost_micros
        )
        demand.audio_seconds = audio_seconds
        if reach.counts_cache and estimate is not None and (key := conversation()) is not None:
            guessed = estimate.guessed_input_tokens
            most = max(estimate.input_tokens, guessed)
            demand.conversation = key
            demand.expected = self._conversations.expect(tenant, model, key, guessed, most)
        return demand

    def of_batch(self, policy: PoolPolicy, *, tenant: str, priority: int) -> CallDemand:
        """Return the demand of a batch at the provider: on the limits of its kind alone.

        The provider counts the requests of batches apart from all other calls.
        """
        found = self.limits(policy, BATCH_KIND, "", "", 0)
        limits = tuple(
            one for one in found if one == _BATCHES or subject_of(one) == f"kind/{BATCH_KIND}"
        )
        return CallDemand(limits, tenant, self._reach.band(priority), 0)

    def of_question(
        self,
        prompt: str,
        model: str,
        policy: PoolPolicy,
        *,
        max_output_tokens: int,
        tenant: str = DEFAULT_TENANT,
    ) -> CallDemand:
        """Return the demand of the classifier's question: on its own limit and the model's limits.

        It queues as its tenant, but takes nothing of the limits of the tenant, its keys and users,
        because the gateway asks the question, not the tenant.
        """
        return CallDemand(
            limits=self.limits(policy, _CLASSIFIER, model, DEFAULT_TENANT, 0),
            tenant=tenant,
            priority=self._reach.band(0),
            images=0,
            estimate=self.estimator.of_pieces(
                model,
                _CLASSIFIER,
                pieces_of(prompt + " " * _JUDGE_CHARS),
                max_output_tokens=max_output_tokens,
                tenant=tenant,
            ),
        )

    def learn(
        self, demand: CallDemand, reported: Usage, charged: Usage = _NO_USAGE, *, whole: bool
    ) -> None:
        """Learn from the usage of a finished call.

        An answer that was cut off teaches only its input, unless the output received exceeds the
        reservation.
        """
        estimate = demand.estimate
        if estimate is None:
            return
        known = reported
        if not whole:
            received = tokens_of(charged)[1] or 0
            output_tokens = received if received > estimate.output_tokens else None
            known = Usage(input_tokens=reported.input_tokens, output_tokens=output_tokens)
        self.estimator.learn(estimate, known)
        if (
            demand.conversation is not None
            and demand.expected is not None
            and reported.input_tokens
        ):
            read = min(reported.cached_tokens or 0, reported.input_tokens)
            written = 0 if reported.details is None else reported.details.cache_write_tokens or 0
            cached = min(read + written, reported.input_tokens)
            call = LastCall(
                self._now_ms(), estimate.guessed_input_tokens, reported.input_tokens, cached
            )
            self._conversations.learn(
                demand.tenant, estimate.model, demand.conversation, demand.expected, call, read
            )

    def limits(
        self,
        policy: PoolPolicy,
        kind: str,
        model: str,
        tenant: str,
        images: int,
        audio_seconds: int = 0,
        tags: CallTags = NO_TAGS,
    ) -> tuple[str, ...]:
        """Return the limits of the policy that apply to a call."""
        if self._reach.policy is not policy:
            self._reach = Reach(policy, kinds_optional=self._kinds_optional)
        reach = self._reach
        if not reach.names_callers:
            return reach.limits(kind, model, tenant, images > 0, audio_seconds > 0)
        named = reach.named(tenant, tags)
        return reach.limits(kind, model, tenant, images > 0, audio_seconds > 0, named)


LONGEST_MS = 600_000
# Share of a rate's window after a 429 without a time: capacity used by others is rarely free
# sooner.
_FIRST_PAUSE = 1 / 30
USUAL_RAMP_MS, LONGEST_RAMP_MS = 10_000, 60_000
_PROVIDERS_ZONE = "America/Los_Angeles"
# Clients name models: a name that does not match is replaced by a digest.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@+-]{0,127}")


@dataclass(frozen=True, slots=True)
class LimitPause:
    """A pause of a limit for `for_ms`, after which calls resume gradually over `ramp_ms`.

    for_ms is 0 if the provider gives no time; then a rate is paused for at least `first_ms`.
    of_rate: whether the limit is a rate.
    """

    limit: str
    for_ms: int
    ramp_ms: int
    of_rate: bool = False
    first_ms: int = 0


def pause_after(
    error: UpstreamThrottled,
    limits: tuple[str, ...],
    model: str,
    policy: PoolPolicy,
    now: datetime,
    *,
    account: str | None = None,
) -> LimitPause | None:
    """Return the pause that a 429 requires; None if it concerns no model.

    `limits`: those of the call. `now`: aware of its time zone. `account`: the limit that represents
    the whole account, if the 429 names the account.
    """
    limit_id = account or _blamed(error, limits, plain_model(model), policy)
    if limit_id is None:
        return None
    if error.day_quota:
        limit = policy.limit(limit_id)
        zone = limit.zone if isinstance(limit, Quota) else _PROVIDERS_ZONE
        for_ms = _to_midnight_ms(now, ZoneInfo(zone))
    else:
        for_ms = min(LONGEST_MS, error.pause_ms)
    if not error.day_quota and isinstance(rate := policy.limit(limit_id), Rate):
        # As the bucket refills: the provider's time is until there is capacity for a single call.
        ramp_ms = min(LONGEST_RAMP_MS, rate.window_ms)
        first_ms = 0 if for_ms else round(rate.window_ms * _FIRST_PAUSE)
        return LimitPause(limit_id, for_ms, ramp_ms, of_rate=True, first_ms=first_ms)
    # A wait of 0 means that the time is unknown.
    return LimitPause(limit_id, for_ms, min(USUAL_RAMP_MS, for_ms))


def _blamed(
    error: UpstreamThrottled, limits: tuple[str, ...], model: str, policy: PoolPolicy
) -> str | None:
    """Return the model's own rate of the exceeded unit, else its limit on concurrent calls.

    The latter need not be in the policy. None for a call without a model.
    """
    if not model:
        return None
    of_model = [limit_id for limit_id in limits if _is_of_model(limit_id, model)]
    window = Quota if error.per_day else Rate
    unit = error.unit or "requests"
    # A limit on all tokens counts input tokens too, but not the other way round.
    equivalent = {"input_tokens": ("input_tokens", "uncached_input_tokens", "tokens")}
    units = equivalent.get(unit, (unit, "tokens") if unit.endswith("_tokens") else (unit,))
    for each in units:
        for limit_id in of_model:
            limit = policy.limit(limit_id)
            if isinstance(limit, window) and limit.unit == each:
                return limit_id
    return next((one for one in of_model if one == f"model:{model}"), model_limit(model))


def _is_of_model(limit_id: str, model: str) -> bool:
    """Return whether a limit applies to the model, by its name or by a group."""
    return binds_model(subject_of(limit_id), model)


def model_limit(model: str) -> str:
    """Return the id of a model's limit on concurrent calls; unbounded if not in the policy."""
    name = plain_model(model)
    if _PLAIN_NAME.fullmatch(name) is None:
        name = f"~{sha256(name.encode('utf-8', 'replace')).hexdigest()[:16]}"
    return f"model:{name}"


def _to_midnight_ms(now: datetime, zone: ZoneInfo) -> int:
    local = now.astimezone(zone)
    midnight = datetime.combine(local.date() + timedelta(days=1), time(), zone)
    # In timestamps, since a day on which the clocks change has 23 or 25 hours.
    return max(1, round((midnight.timestamp() - now.timestamp()) * 1000))


# Providers keep cached input for at least five minutes after its last use.
CACHE_MS = 300_000
MOST_CALLS = 4_096
MOST_OF_A_TENANT = 512
_REMEMBERED, _ENOUGH = 64, 4
# One in this many predictions may be too high.
_ONE_IN = 20
# Number of first calls of conversations from which their cached share is used.
_ENOUGH_FIRST = 20
# Added to the growth of a conversation since its last call, which is estimated from its length.
_MARGIN, _MARGIN_TOKENS = 1.3, 64


class ConversationKey(NamedTuple):
    """Digests of what all calls of a conversation have in common.

    opening: its tools and system prompt. conversation: these and its first message.
    """

    opening: int
    conversation: int


@dataclass(slots=True)
class LastCall:
    """Usage of the last call of a conversation, in tokens.

    guessed: the first guess of the input. cached: what the provider read from its cache and wrote
    to it.
    """

    at_ms: float
    guessed: int
    input: int
    cached: int


@dataclass(slots=True)
class _ModelRatios:
    """Prediction accuracy for one tenant and model.

    ratios: actual over predicted cached input, at most 1. first: uncached input over the first
    guess, of first calls of conversations.
    """

    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    first: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    first_at_ms: float = -CACHE_MS

    def factor(self) -> float:
        """Return the factor by which predictions are reduced."""
        if len(self.ratios) < _ENOUGH:
            return 0.0
        return sorted(self.ratios)[len(self.ratios) // _ONE_IN]

    def first_uncached(self, guessed: int, now_ms: float) -> int | None:
        """Return the uncached input of a conversation's first call; None if too little is known."""
        if len(self.first) < _ENOUGH_FIRST or now_ms - self.first_at_ms > CACHE_MS:
            return None
        rarely_more = sorted(self.first)[-1 - len(self.first) // _ONE_IN]
        return ceil(guessed * rarely_more)


class ExpectedInput(NamedTuple):
    """Expected input of a call, in tokens.

    uncached: what the cache will not contain. cached: what it would contain if the prediction
    proved entirely right.
    """

    uncached: int
    cached: int


class Conversations:
    """Predictor of cached input, one per process and upstream."""

    def __init__(self, now_ms: Callable[[], float]) -> None:
        self._now_ms = now_ms
        self._calls: OrderedDict[str, OrderedDict[tuple[str, int], LastCall]] = OrderedDict()
        self._count = 0
        self._models: OrderedDict[tuple[str, str], _ModelRatios] = OrderedDict()

    def expect(
        self, tenant: str, model: str, key: ConversationKey, guessed: int, input_tokens: int
    ) -> ExpectedInput:
        """Return the expected input of a call.

        `guessed`: the first guess of its input. `input_tokens`: the most that its input will have.
        """
        known = self._models.get((tenant, model))
        last = self._last(tenant, model, key.conversation)
        first = None
        if last is not None and last.guessed <= guessed:
            ratio = last.input / max(1, last.guessed)
            grown = ceil((guessed - last.guessed) * ratio * _MARGIN) + _MARGIN_TOKENS
            cached, whole = last.cached, min(input_tokens, last.input + grown)
        else:
            if known is not None:
                first = known.first_uncached(guessed, self._now_ms())
            last = self._last(tenant, model, key.opening)
            cached, whole = 0 if last is None else last.cached, input_tokens
        from_cache = 0 if known is None else int(cached * known.factor())
        uncached = input_tokens if not from_cache else max(0, whole - from_cache)
        return ExpectedInput(uncached if first is None else min(uncached, first), cached)

    def learn(
        self,
        tenant: str,
        model: str,
        key: ConversationKey,
        expected: ExpectedInput,
        call: LastCall,
        read: int,
    ) -> None:
        """Learn from a finished call; `read`: input tokens that came from the provider's cache."""
        known = self._models.setdefault((tenant, model), _ModelRatios())
        self._models.move_to_end((tenant, model))
        if len(self._models) > MOST_CALLS:
            self._models.popitem(last=False)
        if expected.cached:
            known.ratios.append(min(1.0, read / expected.cached))
        is_first = self._last(tenant, model, key.conversation) is None
        if is_first:
            known.first.append((call.input - read) / max(1, call.guessed))
            known.first_at_ms = call.at_ms
        self._keep(tenant, (model, key.conversation), call)
        if read and is_first:
            opening = self._last(tenant, model, key.opening)
            shared = read if opening is None else min(read, opening.cached)
            common = LastCall(call.at_ms, call.guessed, call.input, shared)
            self._keep(tenant, (model, key.opening), common)

    def _last(self, tenant: str, model: str, digest: int) -> LastCall | None:
        own = self._calls.get(tenant)
        last = None if own is None else own.get((model, digest))
        if last is None or self._now_ms() - last.at_ms > CACHE_MS:
            return None
        return last

    def _keep(self, tenant: str, name: tuple[str, int], call: LastCall) -> None:
        own = self._calls.setdefault(tenant, OrderedDict())
        self._calls.move_to_end(tenant)
        self._count += name not in own
        own[name] = call
        own.move_to_end(name)
        if len(own) > MOST_OF_A_TENANT:
            own.popitem(last=False)
            self._count -= 1
        while self._count > MOST_CALLS:
            self._count -= len(self._calls.popitem(last=False)[1])
