"""Charges of a call: the cost of its usage by what its upstream costs. Pure but for the clock.

Invariants: unknown usage or an unknown price makes the cost unknown, never zero; an answer that
was cut, or reported no usage, is charged for its input and for what came of it at least.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import lru_cache
from math import ceil
from typing import Literal

from tidegate.admission.estimator import PICTURE_TOKENS, Estimate, pieces_of_text
from tidegate.call import (
    UNKNOWN_CHARGE,
    Answer,
    CallCost,
    Charge,
    Usage,
    UsageDetails,
    UsageState,
    tokens_of,
)
from tidegate.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable
from tidegate.policy.deployment import Upstream
from tidegate.prices.rates import (
    Catalog,
    Rates,
    catalog,
    cost_micros,
    micros_by_measure,
    micros_of,
    provider_of,
)

_MODELS_KEPT = 1_000
_HOUR_S, _DAY_HOURS = 3_600, 24
_EPOCH = date(1970, 1, 1).toordinal()
_MICRO = 10**6  # picos in a micro-dollar
# What a provider adds to any call, and to one with a client's tools: Anthropic's own prompt for
# them has up to 800 tokens (platform.claude.com/docs/en/agents-and-tools/tool-use/overview).
_CALL_TOKENS = 50
_TOOLS_TOKENS = 1_000

CacheWrite = Literal["5m", "1h"]


class Prices:
    """Those of one upstream: its own, or else the public ones of its provider. Of each model, tier
    and hour they are looked for once."""

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
            self._public.rows(self._provider)  # read now, and not during the first call
        self._on = lru_cache(_MODELS_KEPT)(self._rates_on)

    def of(self, model: str, tier: str = "") -> Rates | None:
        """Rates of this hour, of UTC; None where no price is known."""
        return self._on(model, tier, self._hour, dearest=False)

    def bound(self, model: str, tier: str) -> Rates | None:
        """Rates that a call which requests `tier` does not exceed, into whichever hours it goes on;
        None where that tier may have a price which is not known."""
        if self.of(model, tier) is None:
            return None
        return self.at_least(model, tier, dearest=True)

    def at_least(self, model: str, tier: str, *, dearest: bool = False) -> Rates | None:
        """Rates of a call of which no tier was reported: those of the requested tier only where
        they are the dearer ones, since the client has chosen it. dearest: in the dearest hour."""
        usual = self._on(model, "", self._hour, dearest=dearest)
        asked = self._on(model, tier, self._hour, dearest=dearest) if tier else None
        if usual is None or asked is None or _dearness(asked) < _dearness(usual):
            return usual
        return asked

    def share(self, model: str, tier: str) -> float | None:
        """What a processing tier costs over the usual one, at most; None where the price of one of
        the two is not stated, so that the model may not be offered there at all."""
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
        """The most tokens that a model takes in and gives out together, and that it gives out; None
        where that is not known."""
        provider = None if self._upstream is None else self._upstream.provider
        if provider is None:
            return None, None
        row = self._public.row(provider, model, _day_of(self._hour))
        return (None, None) if row is None else (row.context_tokens, row.most_output_tokens)

    @property
    def unasked_write(self) -> CacheWrite | None:
        """To which cache the provider writes the input of any call: OpenAI's models since GPT-5.6,
        which have a price for it (learn.microsoft.com/azure/foundry/openai/how-to/prompt-caching).
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
        price = self._public.find(self._provider, model, _day_of(hour), tier)
        return None if price is None else Rates.of(price.in_hour(at), is_public=True)


def _dearness(rates: Rates) -> tuple[int, ...]:
    """To compare tiers by the first rate that differs: not all models are charged by output."""
    one = rates
    others = (one.image, one.video_second, one.audio_second, one.character)
    return tuple(rate or 0 for rate in (one.output, one.input, *others))


def _day_of(hour: int) -> date:
    return date.fromordinal(_EPOCH + hour // _DAY_HOURS)


def provider_of_upstream(upstream: Upstream) -> str | None:
    """The one that it names, else that of its hosts; None for a server of one's own."""
    urls = upstream.base_urls.values()
    return upstream.provider or next(filter(None, map(provider_of, urls)), None)


def charge_of(rates: Rates | None, usage: Usage, images: int | None, *, whole: bool) -> Charge:
    """Charge for the usage that the provider reported. `whole`: the answer came to its end."""
    if is_unknown(usage):
        # Some providers charge images alone, and report no tokens.
        cost = None
        if whole and images and rates is not None and rates.image is not None:
            cost = micros_of(images * rates.image)
        if whole and is_measured(usage):
            return Charge(UsageState.TOLD, usage, images, cost_micros(rates, usage, images))
        is_told = bool(images) or usage.details is not None
        return Charge(UsageState.UNKNOWN, usage, images, cost) if is_told else UNKNOWN_CHARGE
    state = UsageState.TOLD if whole else UsageState.PARTIAL
    return Charge(state, usage, images, cost_micros(rates, usage, images))


def estimated_charge(
    rates: Rates | None,
    estimate: Estimate,
    came: int,
    images: int = 0,
    details: UsageDetails | None = None,
    writes: CacheWrite | None = None,
    measured: UsageDetails | None = None,
) -> Charge:
    """For a request that went out, and `came` tokens of an answer without reported usage,
    but for `details` such as the provider's own cost: they are on record, and change no charge.
    `writes`: to which cache the request has its input written. `measured`: what the request
    shows of its usage beside tokens; it is charged and on record.

    The input is never below the first guess of it, and the output is what came, whatever was
    reserved: what has been learned from earlier calls lowers no charge.
    """
    usage = Usage(
        input_tokens=max(estimate.expected_input_tokens, estimate.guessed_input_tokens),
        output_tokens=came,
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
    """Expected cost of a call: micro-dollars, 0 without a price, and tokens."""
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
    """What a call may cost, before it is made: at most, where that can be proven, and about.

    A tokenizer makes no more tokens of a text than it has bytes, and those of the JSON around it
    cover what a provider puts around each message. unseen: why the input is bounded by the context
    of the model alone, `context_tokens`. max_output_tokens: of all answers together. draws_alone:
    it makes `images` and nothing else. unbounded: why nothing bounds it. measured: what the request
    shows of its usage beside tokens, of which characters and seconds of video are exact.
    """
    likely_micros, likely_tokens = foreseen(rates, estimate, images, measured)
    if measured is not None and (measured.input_characters or measured.output_video_seconds):
        micros = None if rates is None else micros_by_measure(rates, measured)
        if micros is not None:
            return CallCost(micros, likely_tokens, likely_micros, likely_tokens)
        unbounded = unbounded or "its model is not charged by what is known of it beforehand"
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
        unknown = "the pictures that it may make are not counted beforehand"
    elif max_output_tokens is None and not draws_alone:
        unknown = "it has no max_tokens, and the most that its model gives out is not known"
    else:
        given = 0 if draws_alone else max_output_tokens or 0
        micros = _most_micros(
            rates, most_input, given, images if draws_alone else 0, writes, bool(unseen)
        )
        tokens = None if draws_alone else most_input + given
        unknown = "" if tokens else "the tokens of pictures are not counted beforehand"
        if micros is None:
            unknown = "the price of its model is not known"
        return CallCost(micros, tokens, likely_micros, likely_tokens, unknown)
    return CallCost(None, None, likely_micros, likely_tokens, unknown)


def _most_micros(
    rates: Rates | None,
    taken: int,
    given: int,
    images: int,
    writes: CacheWrite | None,
    has_files: bool,
) -> int | None:
    """At the dearest rates, rounded up; None where one that it needs is not known."""
    if rates is None:
        return None
    if rates.input is None:
        if not images or rates.image is None or rates.output is not None:
            return None
        taken = 0  # the pictures are all that its model is charged by
    all_rates = [rates]
    if rates.above is not None and rates.long is not None and taken > rates.above:
        all_rates.append(rates.long)
    most = 0
    for one in all_rates:
        inputs = [one.input, one.cached]
        if writes is not None:
            inputs += [one.cache_write, one.cache_write_1h if writes == "1h" else None]
        if has_files:
            inputs += [one.input_audio, one.input_image]
        picos = 0
        for count, found in (
            (taken, inputs),
            (given, [one.output, one.output_audio, one.output_image]),
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
    told: Usage,
    estimate: Estimate,
    came: int,
    images: int | None,
    *,
    whole: bool = False,
) -> Charge:
    """Charge for an answer that was cut, with some usage reported before its end, or for a `whole`
    one whose usage is not complete: what it lacks is estimated.

    A figure of the provider's stands where it is about what came; where it is less than half of
    that, it was reported earlier (Anthropic's at the start of a stream), and what came counts.
    """
    taken, given = tokens_of(told)
    usage = told
    if taken is None:
        taken = max(estimate.expected_input_tokens, estimate.guessed_input_tokens)
        if whole and told.total_tokens is not None:
            taken = max(0, told.total_tokens - (came if given is None else given))
        usage = replace(usage, input_tokens=taken)
    if given is None or (2 * given < came and not whole):
        thoughts = told.thoughts_tokens or 0
        usage = replace(usage, output_tokens=max(0, came - thoughts), total_tokens=None)
    state = UsageState.ESTIMATED if whole else UsageState.PARTIAL
    return Charge(state, usage, images, cost_micros(rates, usage, images))


def answer_charge(
    rates: Rates | None, answer: Answer, estimate: Estimate | None, *, whole: bool
) -> Charge:
    """For a call by a provider's SDK that was sent: by the usage reported with a whole answer,
    else by what came of it at least, and the input."""
    images = len(answer.pictures)
    is_told = not is_unknown(answer.usage)
    if whole and is_told and (estimate is None or is_complete(answer.usage)):
        return charge_of(rates, answer.usage, images, whole=True)
    if estimate is None:
        return UNKNOWN_CHARGE
    came = came_tokens(answer.whole_text, images=images)
    if not is_told:
        return estimated_charge(rates, estimate, came, images, answer.usage.details)
    return cut_charge(rates, answer.usage, estimate, came, images, whole=whole)


def came_tokens(text: str, *, images: int = 0, scale: float = 1.0) -> int:
    """About how many tokens an answer has, as far as it came. `scale`: `text` is of that part
    of it."""
    return ceil(sum(pieces_of_text(text).values()) * scale + images * PICTURE_TOKENS)


def never_sent(error: UpstreamError) -> bool:
    """Whether there was no connection to send a request on."""
    if isinstance(error, UpstreamTimeout):
        return error.phase == "connect"
    return isinstance(error, UpstreamUnavailable) and error.broke == "connecting"


def is_measured(usage: Usage) -> bool:
    """Whether seconds of audio or video or searches are reported, by which some models are
    charged."""
    details = usage.details
    if details is None:
        return False
    return bool(details.input_audio_seconds or details.searches or details.output_video_seconds)


def is_complete(usage: Usage) -> bool:
    """Whether it is all that a whole answer is charged by: input and output, or no tokens but what
    is measured. Google leaves out the input of some requests that name a file by its URI."""
    if usage.input_tokens is not None and usage.output_tokens is not None:
        return True
    return is_measured(usage) if is_unknown(usage) else None not in tokens_of(usage)


def is_unknown(usage: Usage) -> bool:
    return usage.input_tokens is usage.output_tokens is usage.total_tokens is None
