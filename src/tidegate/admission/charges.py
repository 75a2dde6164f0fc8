"""Charges of a call by its upstream's prices, and the choice of the cheapest tier in time.

Invariants: unknown usage or an unknown price makes the cost unknown, never zero. An answer that
was cut off or reported no usage is charged for its input and at least for the output received.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from math import ceil, inf
from typing import Any, Literal
from uuid import UUID

from tidegate.admission.estimator import PICTURE_TOKENS, Estimate, pieces_of_text
from tidegate.call import (
    UNKNOWN_CHARGE,
    Answer,
    CallCost,
    Charge,
    Tier,
    Usage,
    UsageDetails,
    UsageState,
    tokens_of,
)
from tidegate.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable
from tidegate.limiter import Concurrency, Limit, Rate
from tidegate.policy.deployment import Upstream
from tidegate.prices.rates import (
    Catalog,
    Price,
    Rates,
    catalog,
    cost_micros,
    micros_by_measure,
    micros_of,
    provider_of,
)
from tidegate.settings import Config

_MODELS_KEPT = 1_000
_HOUR_S, _DAY_HOURS = 3_600, 24
_EPOCH = date(1970, 1, 1).toordinal()
_MICRO = 10**6  # picos in a micro-dollar
# Tokens that a provider adds to any call, and to a call with a client's tools: Anthropic's tool use
# system prompt has up to 800 (platform.claude.com/docs/en/agents-and-tools/tool-use/overview).
_CALL_TOKENS = 50
_TOOLS_TOKENS = 1_000

CacheWrite = Literal["5m", "1h"]


_INPUT_TO_OUTPUT = 3  # how many input tokens count beside an output token to compare prices


def price_ranks(places: Sequence[tuple[Upstream, str]]) -> list[int]:
    """Return the rank of each upstream's price of a model, 0 for the lowest.

    If a price of input tokens is unknown, none is compared, and all are 0.
    """
    costs = []
    for upstream, model in places:
        rates = Prices(upstream).of(model)
        if rates is None or rates.input is None:
            return [0] * len(places)
        costs.append(_INPUT_TO_OUTPUT * rates.input + (rates.output or 0))
    order = sorted(set(costs))
    return [order.index(cost) for cost in costs]


class Prices:
    """The prices of one upstream: its own, or else the public prices of its provider.

    The rates of each model, tier and hour are looked up once, then cached.
    """

    def __init__(
        self,
        upstream: Upstream | None = None,
        *,
        public: Catalog | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._upstream = upstream
        self._public = public or catalog()
        self._now = now
        self._provider = None if upstream is None else provider_of_upstream(upstream)
        if self._provider is not None:
            self._public.rows(self._provider)  # load the table now, not during the first call
        self._on = lru_cache(_MODELS_KEPT)(self._rates_on)

    def of(self, model: str, tier: str = "") -> Rates | None:
        """Return the rates in force this hour (UTC), or None if the price is unknown."""
        return self._on(model, tier, self._hour, dearest=False)

    def bound(self, model: str, tier: str, *, is_chosen: bool = False) -> Rates | None:
        """Return rates that a call requesting `tier` cannot exceed if it ends by the next day.

        None if that tier may have a price that is unknown. is_chosen: the gateway chose the tier,
        so that no other one serves the call.
        """
        if is_chosen:
            return self._on(model, tier, self._hour, dearest=True)
        if self.of(model, tier) is None:
            return None
        return self.at_least(model, tier, dearest=True)

    def at_least(self, model: str, tier: str, *, dearest: bool = False) -> Rates | None:
        """Return the rates of a call whose answer reports no tier.

        Of the requested tier only what is dearer than usual applies, because the client chose that
        tier. `dearest`: use the rates of the dearest hour of today or tomorrow.
        """
        usual = self._on(model, "", self._hour, dearest=dearest)
        of_tier = self._on(model, tier, self._hour, dearest=dearest) if tier else None
        return usual if usual is None or of_tier is None else usual.dearest(of_tier)

    def share(self, model: str, tier: str) -> float | None:
        """Return the highest ratio of the rates of `tier` to the usual ones, for input and output.

        None if either price is not stated; the provider may then not offer the model in that tier.
        """
        own = None if self._upstream is None else self._upstream.price(model)
        if own is not None and own.of_tier(tier) is None:
            return None
        usual, other = self.of(model), self.of(model, tier)
        if usual is None or other is None:
            return None
        both = ((usual.input, other.input), (usual.output, other.output))
        shares = [there / here for here, there in both if here and there is not None]
        return max(shares, default=None)

    def most(self, model: str) -> tuple[int | None, int | None]:
        """Return the context window of a model and its maximum output, in tokens.

        The context window covers input and output together. None for either that is unknown.
        """
        if self._provider is None:
            return None, None
        row = self._public.row(self._provider, model, _day_of(self._hour))
        return (None, None) if row is None else (row.context_tokens, row.most_output_tokens)

    @property
    def unasked_write(self) -> CacheWrite | None:
        """The cache to which the provider writes the input of every call without being asked.

        OpenAI's models do so since GPT-5.6, and have a price for it
        (learn.microsoft.com/azure/foundry/openai/how-to/prompt-caching).
        """
        return "5m" if self._provider in ("openai", "azure") else None

    @property
    def _hour(self) -> int:
        return int(self._now() // _HOUR_S)

    def _rates_on(self, model: str, tier: str, hour: int, *, dearest: bool) -> Rates | None:
        if self._upstream is None:
            return None
        at = None if dearest else hour
        if (own := self._upstream.price(model)) is not None:
            return Rates.of((own.of_tier(tier) or own).in_hour(at))
        if self._provider is None:
            return None
        rates = self._public_rates(model, tier, hour, at)
        if rates is None or not dearest:
            return rates
        after = self._public_rates(model, tier, hour + _DAY_HOURS, at)
        return rates if after is None else rates.dearest(after)

    def _public_rates(self, model: str, tier: str, hour: int, at: int | None) -> Rates | None:
        price = self._public.find(self._provider or "", model, _day_of(hour), tier)
        return None if price is None else Rates.of(price.in_hour(at), is_public=True)


def _day_of(hour: int) -> date:
    return date.fromordinal(_EPOCH + hour // _DAY_HOURS)


def provider_of_upstream(upstream: Upstream) -> str | None:
    """Return the provider that the upstream names, else the provider of its hosts.

    Answers of the built-in emulator cost what Gemini's would. None for a self-hosted server.
    """
    if upstream.is_made_up:
        return "gemini"
    urls = upstream.base_urls.values()
    return upstream.provider or next(filter(None, map(provider_of, urls)), None)


@dataclass(frozen=True, slots=True)
class ListedPrice:
    """The price of some models at an upstream; `price` is None if it is unknown.

    models: names or patterns. checked: the day on which a public price was read from `source`; None
    for a price that the upstream states.
    """

    models: tuple[str, ...]
    price: Price | None
    checked: date | None = None
    source: str = ""


def listed_prices(upstream: Upstream, day: date) -> list[ListedPrice]:
    """Return the prices of an upstream on a day (UTC), by which its calls are charged.

    The stated prices come first, then those of the models that it names, then the public prices of
    other models that it serves.
    """
    found = [ListedPrice((pattern,), price) for pattern, price in upstream.prices.items()]
    provider = provider_of_upstream(upstream)
    named = dict.fromkeys((*upstream.named, *upstream.aliases.values()))
    for model in named:
        row = None if provider is None else catalog().row(provider, model, day)
        if upstream.price(model) is not None:
            continue
        if row is None:
            found.append(ListedPrice((model,), None))
        else:
            found.append(ListedPrice((model,), row.price, row.checked, row.source))
    patterns = [one for one in upstream.models if one not in named]
    for row in () if provider is None else catalog().rows(provider):
        models = tuple(
            one
            for one in row.models
            if one not in named
            and any(fnmatchcase(one, pattern) for pattern in patterns)
            and upstream.price(one) is None
            and catalog().row(row.provider, one, day) is row
        )
        if models:
            found.append(ListedPrice(models, row.price, row.checked, row.source))
    return found


def charge_of(rates: Rates | None, usage: Usage, images: int | None, *, whole: bool) -> Charge:
    """Return the charge for the usage that the provider reported.

    `whole`: the answer came to its end.
    """
    if is_unknown(usage):
        # Some providers charge images alone and report no tokens.
        cost = None
        if whole and images and rates is not None and rates.image is not None:
            cost = micros_of(images * rates.image)
        if whole and is_measured(usage):
            return Charge(UsageState.TOLD, usage, images, cost_micros(rates, usage, images))
        is_reported = bool(images) or usage.details is not None
        return Charge(UsageState.UNKNOWN, usage, images, cost) if is_reported else UNKNOWN_CHARGE
    state = UsageState.TOLD if whole else UsageState.PARTIAL
    return Charge(state, usage, images, cost_micros(rates, usage, images))


def estimated_charge(
    rates: Rates | None,
    estimate: Estimate,
    output: int,
    images: int = 0,
    details: UsageDetails | None = None,
    writes: CacheWrite | None = None,
    measured: UsageDetails | None = None,
) -> Charge:
    """Return the estimated charge for a request that was sent and whose answer reported no usage.

    `output`: output tokens received. `details`: what the provider did report, such as its own cost;
    it is recorded and changes no charge. `writes`: the cache to which the request has its input
    written. `measured`: usage other than tokens that the request itself shows; it is charged and
    recorded.

    The input is never below its first guess, and the output is what was received, whatever was
    reserved: nothing learned from earlier calls lowers a charge.
    """
    usage = Usage(
        input_tokens=max(estimate.expected_input_tokens, estimate.guessed_input_tokens),
        output_tokens=output,
    )
    cost = cost_micros(rates, replace(usage, details=measured), images)
    if writes is not None and cost is not None:
        written = UsageDetails(usage.input_tokens)
        if writes == "1h":
            written = replace(written, cache_write_1h_tokens=usage.input_tokens)
        cost = max(cost, cost_micros(rates, replace(usage, details=written), images) or 0)
    details = details or measured
    return Charge(UsageState.ESTIMATED, replace(usage, details=details), images or None, cost)


def foreseen(
    rates: Rates | None,
    estimate: Estimate,
    images: int = 0,
    measured: UsageDetails | None = None,
) -> tuple[int, int]:
    """Return the expected cost of a call in micro-dollars (0 without a price), and its tokens."""
    usage = Usage(
        input_tokens=max(estimate.expected_input_tokens, estimate.guessed_input_tokens),
        output_tokens=max(estimate.expected_output_tokens, estimate.guessed_output_tokens),
        details=measured,
    )
    micros = cost_micros(rates, usage, images) or 0
    return micros, sum(count or 0 for count in tokens_of(usage))


def call_cost(
    rates: Rates | None,
    estimate: Estimate,
    *,
    input_bytes: int,
    context_tokens: int | None = None,
    unseen: str = "",
    max_output_tokens: int | None = None,
    images: int = 0,
    draws_alone: bool = False,
    writes: CacheWrite | None = None,
    tools: bool = False,
    unbounded: str = "",
    measured: UsageDetails | None = None,
) -> CallCost:
    """Return the cost of a call before it is made: an upper bound, if provable, and an estimate.

    A text never has more tokens than bytes, and the bytes of the JSON around a message cover the
    tokens that a provider adds to it.

    unseen: the reason why only the model's context window, `context_tokens`, bounds the input.
    max_output_tokens: the bound on all answers together. draws_alone: the call generates `images`
    and nothing else. unbounded: the reason why nothing bounds the cost. measured: usage other than
    tokens that the request shows; its characters and seconds of video are exact.
    """
    likely_micros, likely_tokens = foreseen(rates, estimate, images, measured)
    if measured is not None and (measured.input_characters or measured.output_video_seconds):
        micros = None if rates is None else micros_by_measure(rates, measured)
        if micros is not None:
            return CallCost(micros, likely_tokens, likely_micros, likely_tokens)
        unbounded = unbounded or "its cost depends on facts that are not known beforehand"
    most_input: int | None = input_bytes + (_TOOLS_TOKENS if tools else _CALL_TOKENS)
    if unseen:
        most_input = context_tokens
        if rates is not None and rates.audio_second is not None:
            unbounded = unbounded or "the length of audio in it is not known beforehand"
    if unbounded:
        unknown = unbounded
    elif most_input is None:
        unknown = unseen
    elif images and not draws_alone:
        unknown = "the number of pictures that it generates is not known beforehand"
    elif max_output_tokens is None and not draws_alone:
        unknown = "it has no max_tokens, and the maximum output of its model is not known"
    else:
        most_output = 0 if draws_alone else max_output_tokens or 0
        micros = _most_micros(
            rates, most_input, most_output, images if draws_alone else 0, writes, bool(unseen)
        )
        tokens = None if draws_alone else most_input + most_output
        unknown = "" if tokens else "the tokens of pictures are not known beforehand"
        if micros is None:
            unknown = "the price of its model is not known"
        return CallCost(micros, tokens, likely_micros, likely_tokens, unknown)
    return CallCost(None, None, likely_micros, likely_tokens, unknown)


def _most_micros(
    rates: Rates | None,
    input_tokens: int,
    output_tokens: int,
    images: int,
    writes: CacheWrite | None,
    has_files: bool,
) -> int | None:
    """Return the cost at the dearest rates, rounded up; None if a rate that applies is unknown."""
    if rates is None:
        return None
    if rates.input is None:
        if not images or rates.image is None or rates.output is not None:
            return None
        input_tokens = 0  # this model charges for images alone
    all_rates = [rates]
    if rates.above is not None and rates.long is not None and input_tokens > rates.above:
        all_rates.append(rates.long)
    most = 0
    for one in all_rates:
        inputs = [one.input, one.cached]
        if writes is not None:
            inputs += [one.cache_write, one.cache_write_1h if writes == "1h" else None]
        if has_files:
            inputs += [one.input_audio, one.input_image, one.input_video]
        picos = 0
        for count, found in (
            (input_tokens, inputs),
            (output_tokens, [one.output, one.output_audio, one.output_image]),
            (images, [one.image]),
        ):
            known = [rate for rate in found if rate is not None]
            if count and not known:
                return None
            picos += count * max(known, default=0)
        most = max(most, picos)
    return -(-most // _MICRO)


def cut_charge(
    rates: Rates | None,
    reported: Usage,
    estimate: Estimate,
    received: int,
    images: int | None,
    *,
    whole: bool = False,
) -> Charge:
    """Return the charge for an answer that was cut off after it reported some usage.

    With `whole`, for a complete answer whose usage is incomplete. What is missing is estimated.

    The provider's output count is used unless it is less than half of what was received: then it
    was reported earlier in the stream (Anthropic reports one at the start), and the output received
    counts.
    """
    reported = without_zeros(reported, received, whole=whole)
    input_tokens, output_tokens = tokens_of(reported)
    usage = reported
    if input_tokens is None:
        input_tokens = max(estimate.expected_input_tokens, estimate.guessed_input_tokens)
        if whole and reported.total_tokens is not None:
            input_tokens = max(
                0, reported.total_tokens - (received if output_tokens is None else output_tokens)
            )
        usage = replace(usage, input_tokens=input_tokens)
    if output_tokens is None or (2 * output_tokens < received and not whole):
        thoughts = reported.thoughts_tokens or 0
        usage = replace(usage, output_tokens=max(0, received - thoughts), total_tokens=None)
    state = UsageState.ESTIMATED if whole or is_unknown(reported) else UsageState.PARTIAL
    return Charge(state, usage, images, cost_micros(rates, usage, images))


def answer_charge(
    rates: Rates | None, answer: Answer, estimate: Estimate | None, *, whole: bool
) -> Charge:
    """Return the charge for a call that a provider's SDK sent.

    It is based on the usage reported with a whole answer, else on the input and at least the output
    received.
    """
    images, usage = len(answer.pictures), answer.usage
    if whole and is_zero(usage) and not images:
        usage = without_zeros(usage, received_tokens(answer.whole_text), whole=True)
    is_reported = not is_unknown(usage)
    if whole and is_reported and (estimate is None or is_complete(usage)):
        return charge_of(rates, usage, images, whole=True)
    if estimate is None:
        return UNKNOWN_CHARGE
    received = received_tokens(answer.whole_text, images=images)
    if not is_reported:
        return estimated_charge(rates, estimate, received, images, usage.details)
    return cut_charge(rates, usage, estimate, received, images, whole=whole)


def received_tokens(text: str, *, images: int = 0, scale: float = 1.0) -> int:
    """Return the approximate number of tokens of an answer, as far as it was received.

    `scale`: the ratio of the whole answer to the part of it in `text`.
    """
    return ceil(sum(pieces_of_text(text).values()) * scale + images * PICTURE_TOKENS)


def never_sent(error: UpstreamError) -> bool:
    """Return whether the request was never sent, because no connection was established."""
    if isinstance(error, UpstreamTimeout):
        return error.phase == "connect"
    return isinstance(error, UpstreamUnavailable) and error.broke == "connecting"


def is_measured(usage: Usage) -> bool:
    """Return whether seconds of audio or video, or searches, are reported.

    Some models are charged by these.
    """
    details = usage.details
    if details is None:
        return False
    return bool(details.input_audio_seconds or details.searches or details.output_video_seconds)


def is_complete(usage: Usage) -> bool:
    """Return whether the usage has all that a whole answer is charged by.

    That is input and output, or no tokens but measured units. Google leaves out the input of some
    requests that name a file by its URI.
    """
    if usage.input_tokens is not None and usage.output_tokens is not None:
        return True
    return is_measured(usage) if is_unknown(usage) else None not in tokens_of(usage)


def is_zero(usage: Usage) -> bool:
    """Return whether the usage reports an output of no tokens, and nothing else that is charged."""
    return tokens_of(usage)[1] == 0 and not is_measured(usage)


def without_zeros(usage: Usage, received: int, *, whole: bool) -> Usage:
    """Return the usage without zeros that cannot be true: of a whole answer that has tokens, and of
    any that was cut off.

    Some servers report zeros as long as a stream has not ended, or for all that they do not count.
    """
    if whole and not (received and is_zero(usage)):
        return usage
    total = usage.total_tokens or 0
    return replace(
        usage,
        input_tokens=usage.input_tokens or None,
        output_tokens=usage.output_tokens or None,
        total_tokens=total if total > (usage.input_tokens or 0) else None,
    )


def is_unknown(usage: Usage) -> bool:
    return usage.input_tokens is usage.output_tokens is usage.total_tokens is None


MARGIN = 1.5  # factor on the usual duration of a tier
RESERVE = 1.25  # factor on what the usual tier needs at the configured limits
SLACK_MS = 5_000.0  # from a change of tier to the next call: claims, updates, the queue
UNKNOWN_SHARE = 0.5  # share of a batch's window that must remain if no batch was seen yet
# If the configured limits make a job wait longer than this, it moves to a batch at the same price.
FREE_WITHIN_MS = 60_000.0
LEAST_SAMPLES = 5
_MAX_SAMPLES = 100
_USUAL = 0.95
_FIRST_BUSY_MS, _LONGEST_BUSY_MS = 1_000.0, 60_000.0
_MOST_KEPT = 10_000
_LONGEST_MS = 400 * 86_400_000.0


@dataclass(frozen=True, slots=True)
class TierTimes:
    """Durations that providers announce for their tiers.

    batch_ms: the window of a batch. cancel_ms: how long a cancelled batch takes to end. flex_ms:
    how long an answer in the flex tier may take.
    """

    batch_ms: float = 86_400_000.0
    cancel_ms: float = 600_000.0
    flex_ms: float = 900_000.0

    @classmethod
    def of(cls, config: Config) -> TierTimes:
        return cls(
            float(config.provider_batch_window_ms),
            float(config.provider_batch_cancel_ms),
            float(config.flex_within_ms),
        )


@dataclass(frozen=True, slots=True)
class TierOffer:
    """A cheaper tier that is available to a job.

    share: its price relative to the usual tier. usual_ms: the time within which nearly all recent
    calls or batches ended; None if too few were seen. busy_ms: how long the tier is to be avoided
    because it lacked capacity. keeps_results: whether a cancelled batch returns the answers that it
    has by then.
    """

    tier: Tier
    share: float
    usual_ms: float | None = None
    busy_ms: float = 0.0
    keeps_results: bool = True


@dataclass(frozen=True, slots=True)
class LiveRoom:
    """The capacity of the usual tier under the configured limits.

    ahead: the number of jobs with the same needs that come first. per_second: how many calls the
    limits admit. call_ms: how long one call takes.
    """

    ahead: int = 0
    per_second: float = inf
    call_ms: float = 0.0

    @property
    def wait_ms(self) -> float:
        """Time until the job is admitted; infinite at a limit of 0, even for the first job."""
        return inf if self.per_second <= 0 else 1_000 * self.ahead / self.per_second

    @property
    def reserve_ms(self) -> float:
        """Time before the deadline at which the job must be in the usual tier."""
        return RESERVE * (self.wait_ms + self.call_ms) + SLACK_MS

    def is_late(self, left_ms: float) -> bool:
        """Return whether the usual tier would answer later than in `left_ms`.

        There is then no reason to leave a slower tier for it. False at a limit of 0: a person sets
        that, and no job may bypass it.
        """
        return left_ms < self.wait_ms + self.call_ms < inf


@dataclass(frozen=True, slots=True)
class TierChoice:
    """The tier of a job, until when, and why.

    revisit_at: by then the job moves to a faster tier; None if it never has to. why: a sentence for
    the caller.
    """

    tier: Tier
    revisit_at: datetime | None
    why: str


def choose(
    offers: Iterable[TierOffer],
    room: LiveRoom,
    *,
    now: datetime,
    due: datetime | None,
    times: TierTimes,
) -> TierChoice:
    """Return the cheapest of `offers` and the usual tier in which the job meets its deadline."""
    left_ms = inf if due is None else (due - now).total_seconds() * 1_000
    live_is_late = room.is_late(left_ms)
    safe: list[tuple[TierOffer, float]] = []
    late: list[str] = []
    for offer in offers:
        if offer.share >= 1:
            continue
        allowed_ms = left_ms
        if not live_is_late:
            allowed_ms -= room.reserve_ms + (times.cancel_ms if offer.tier is Tier.BATCH else 0.0)
        takes_ms = _takes_ms(offer, room, times)
        if takes_ms <= allowed_ms:
            safe.append((offer, allowed_ms))
        else:
            late.append(f"{offer.tier} may take {in_words(takes_ms)}")
    free = [one for one in safe if not one[0].busy_ms] or safe
    if not free:
        return TierChoice(Tier.LIVE, None, _why_live(late, left_ms, room))
    offer, allowed_ms = min(free, key=lambda one: _order(one[0], room))
    why = f"{offer.tier} costs {offer.share:.0%} of the usual price"
    if due is not None:
        why += f" and {in_words(left_ms)} are left; live "
        why += (
            "is too late" if live_is_late else f"from {in_words(room.reserve_ms)} before it is due"
        )
    return TierChoice(offer.tier, None if live_is_late else _after(now, allowed_ms), why)


def _takes_ms(offer: TierOffer, room: LiveRoom, times: TierTimes) -> float:
    """Return the time within which the tier answers, as far as is known."""
    if offer.tier is Tier.BATCH:
        if offer.usual_ms is None:
            # A batch that must be cancelled may lose answers that were paid for.
            return (UNKNOWN_SHARE if offer.keeps_results else 1) * times.batch_ms
        return min(MARGIN * offer.usual_ms, times.batch_ms)
    usual_ms = times.flex_ms if offer.usual_ms is None else MARGIN * offer.usual_ms
    return offer.busy_ms + room.wait_ms + usual_ms


def _order(offer: TierOffer, room: LiveRoom) -> tuple[float, bool]:
    """Return a sort key: price, then speed.

    At the same price flex comes first, since it answers sooner, if the configured limits have
    capacity for it.
    """
    prefers_flex = room.wait_ms <= FREE_WITHIN_MS and not offer.busy_ms
    return offer.share, (offer.tier is Tier.FLEX) is not prefers_flex


def _why_live(late: Sequence[str], left_ms: float, room: LiveRoom) -> str:
    if not late:
        return "no cheaper tier is allowed and offered for its model"
    if room.wait_ms == inf:
        return "a limit of 0 admits none of its calls, in any tier"
    needs = f"live needs {in_words(room.reserve_ms)}"
    return f"{in_words(left_ms)} are left, of which {needs}: {' and '.join(late)}"


def _after(now: datetime, ms: float) -> datetime | None:
    return None if ms > _LONGEST_MS else now + timedelta(milliseconds=ms)


_UNITS = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"))


def in_words(ms: float) -> str:
    """Return a duration for people to read, to a tenth of its unit."""
    if ms == inf:
        return "any time"
    for unit_ms, name in _UNITS:
        if ms >= unit_ms:
            return f"{ms / unit_ms:.1f}".removesuffix(".0") + f" {name}"
    return f"{max(0, round(ms))} ms"


@dataclass(slots=True)
class TimeSamples:
    """Durations of the last calls of one sort."""

    last_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_SAMPLES))

    def usual_ms(self, least: int = LEAST_SAMPLES) -> float | None:
        """Return the 95th percentile; None while fewer than `least` calls were seen."""
        if len(self.last_ms) < least:
            return None
        return sorted(self.last_ms)[ceil(_USUAL * len(self.last_ms)) - 1]

    def mean_ms(self) -> float | None:
        return sum(self.last_ms) / len(self.last_ms) if self.last_ms else None


@dataclass(slots=True)
class _Busy:
    """Consecutive refusals of flex for lack of capacity, and when it may be tried again."""

    refusals: int = 0
    until: float = 0.0


class FlexCalls:
    """Flex calls of this process by upstream and model, and the jobs that flex has refused.

    The clock is that of the event loop.
    """

    def __init__(self, clock: Callable[[], float], max_entries: int = _MOST_KEPT) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self._times: OrderedDict[tuple[str, str], TimeSamples] = OrderedDict()
        self._busy: OrderedDict[tuple[str, str], _Busy] = OrderedDict()
        self._never: OrderedDict[UUID, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<FlexCalls {len(self._times)} models, {len(self._busy)} busy>"

    def usual_ms(self, key: tuple[str, str]) -> float | None:
        times = self._times.get(key)
        return None if times is None else times.usual_ms()

    def busy_ms(self, key: tuple[str, str]) -> float:
        """Return how long flex must not be tried again; 0 if it may be tried now."""
        busy = self._busy.get(key)
        return 0.0 if busy is None else max(0.0, (busy.until - self._clock()) * 1_000)

    def answered(self, key: tuple[str, str], took_ms: float) -> None:
        self._times.setdefault(key, TimeSamples()).last_ms.append(took_ms)
        self._times.move_to_end(key)
        self._busy.pop(key, None)
        _bound(self._times, self._max_entries)

    def was_busy(self, key: tuple[str, str], reported_ms: int | None) -> None:
        """Record a refusal for lack of capacity.

        Flex is paused twice as long each time, or as long as the provider says if that is longer.
        """
        busy = self._busy.setdefault(key, _Busy())
        if busy.until <= self._clock():  # refusals of concurrent calls count as one
            pause_ms = min(_LONGEST_BUSY_MS, _FIRST_BUSY_MS * 2.0**busy.refusals)
            busy.refusals = min(busy.refusals + 1, 10)
            busy.until = self._clock() + max(pause_ms, reported_ms or 0) / 1_000
        _bound(self._busy, self._max_entries)

    def refuse(self, job: UUID) -> None:
        """Record that flex refused the job itself; the job then uses the usual tier."""
        self._never[job] = None
        _bound(self._never, self._max_entries)

    def is_refused(self, job: UUID) -> bool:
        return job in self._never


def _bound(entries: OrderedDict[Any, Any], most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)


_UNKNOWN_CALL_MS = 10_000.0
_DAY_S = 86_400
_SMOOTHING = 0.1


@dataclass(slots=True)
class CallSizes:
    """Moving averages of the tokens of one kind of call; None before the first call."""

    input_tokens: float | None = None
    output_tokens: float | None = None

    def add(self, usage: Usage) -> None:
        input_tokens, output_tokens = tokens_of(usage)
        self.input_tokens = _moved(self.input_tokens, input_tokens)
        self.output_tokens = _moved(self.output_tokens, output_tokens)

    def of(self, unit: str) -> float | None:
        """Return about how much of `unit` a call uses; None if that is unknown."""
        input_tokens, output_tokens = self.input_tokens, self.output_tokens
        match unit:
            case "requests" | "images":
                return 1.0
            case "input_tokens" | "uncached_input_tokens":
                return input_tokens
            case "output_tokens":
                return output_tokens
            case "tokens" if input_tokens is not None and output_tokens is not None:
                return input_tokens + output_tokens
        return None


def _moved(average: float | None, value: int | None) -> float | None:
    if value is None or average is None:
        return average if value is None else float(value)
    return average + _SMOOTHING * (value - average)


def admitted_per_second(
    limit: Limit | None, call_ms: float, size_of: Callable[[str], float | None]
) -> float:
    """Return how many calls per second a limit admits if nothing else delays them.

    Infinite if it is unknown how much of the limit a call uses.
    """
    if limit is None or limit.shadow:
        return inf
    if not limit.bound:
        return 0.0
    if isinstance(limit, Concurrency):
        size = size_of("tokens") if limit.by_tokens else 1
        return limit.bound * 1_000 / max(1.0, call_ms) / size if size else inf
    size = size_of(limit.unit)
    if not size:
        return inf
    window_s = limit.window_ms / 1_000 if isinstance(limit, Rate) else _DAY_S
    return limit.bound / window_s / size


@dataclass(slots=True)
class CallSamples:
    """Durations of the last calls of a kind in the usual tier, and their sizes in any tier."""

    times: TimeSamples = field(default_factory=TimeSamples)
    sizes: CallSizes = field(default_factory=CallSizes)

    def room(self, limits: Iterable[Limit | None], ahead: int) -> LiveRoom:
        """Return the capacity of the usual tier under these limits, with `ahead` jobs in front."""
        mean_ms = self.times.mean_ms() or _UNKNOWN_CALL_MS
        rates = (admitted_per_second(one, mean_ms, self.sizes.of) for one in limits)
        usual_ms = self.times.usual_ms(least=1) or _UNKNOWN_CALL_MS
        return LiveRoom(max(0, ahead), min(rates, default=inf), usual_ms)
