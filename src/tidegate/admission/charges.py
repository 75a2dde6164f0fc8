"""Charges of a call: its usage times a price, in whole micro-dollars, rounded once per call. Pure.

Invariants: unknown usage or an unknown price makes the cost unknown, never zero; an answer that
was cut, or reported no usage, is charged for its input and for what came of it at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from math import ceil
from typing import Literal

from tidegate.admission.estimator import (
    PICTURE_TOKENS,
    Estimate,
    pieces_of_text,
    tokens_of,
)
from tidegate.call import UNKNOWN_CHARGE, Answer, Charge, Usage, UsageDetails, UsageState
from tidegate.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable
from tidegate.policy.deployment import Price, Upstream

_PICOS = 10**12  # of money: a millionth of what a million tokens cost, for each of them


_MICRO = 10**6


_MODELS_KEPT = 1_000


CacheWrite = Literal["5m", "1h"]


@dataclass(frozen=True, slots=True)
class Rates:
    """A price in picos (10^-12) of money for one token, or one picture. What has no price of
    its own is priced as the input or the output that it is a part of."""

    input: int | None
    output: int | None
    cached: int | None
    image: int | None
    cache_write: int | None
    cache_write_1h: int | None
    input_audio: int | None
    input_image: int | None
    output_audio: int | None
    output_image: int | None

    @classmethod
    def of(cls, price: Price) -> Rates:
        written = _first(price.cache_write, price.input)
        return cls(
            input=_per_token(price.input),
            output=_per_token(price.output),
            cached=_per_token(_first(price.cached, price.input)),
            image=_picos(price.image, _PICOS),
            cache_write=_per_token(written),
            cache_write_1h=_per_token(_first(price.cache_write_1h, written)),
            input_audio=_per_token(_first(price.input_audio, price.input)),
            input_image=_per_token(_first(price.input_image, price.input)),
            output_audio=_per_token(_first(price.output_audio, price.output)),
            output_image=_per_token(_first(price.output_image, price.output)),
        )


class Prices:
    """Those of one upstream; of each model the pattern is looked for once."""

    def __init__(self, upstream: Upstream | None = None) -> None:
        self._upstream = upstream if upstream is not None and upstream.prices else None
        self.of = lru_cache(_MODELS_KEPT)(self._rates_of)

    def _rates_of(self, model: str) -> Rates | None:
        price = None if self._upstream is None else self._upstream.price(model)
        return None if price is None else Rates.of(price)


def charge_of(rates: Rates | None, usage: Usage, images: int | None, *, whole: bool) -> Charge:
    """Charge for the usage that the provider reported. `whole`: the answer came to its end."""
    if is_unknown(usage):
        # Some providers charge images alone, and report no tokens.
        cost = None
        if whole and images and rates is not None and rates.image is not None:
            cost = _micros(images * rates.image)
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
) -> Charge:
    """For a request that went out, and `came` tokens of an answer without reported usage,
    but for `details` such as the provider's own cost: they are on record, and change no charge.
    `writes`: to which cache the request has its input written.

    The input is never below the first guess of it, and the output is what came, whatever was
    reserved: what has been learned from earlier calls lowers no charge.
    """
    usage = Usage(
        input_tokens=max(estimate.expected_input_tokens, estimate.guessed_input_tokens),
        output_tokens=came,
    )
    cost = cost_micros(rates, usage, images)
    if writes is not None and cost is not None:
        written = UsageDetails(usage.input_tokens)
        if writes == "1h":
            written = replace(written, cache_write_1h_tokens=usage.input_tokens)
        cost = max(cost, cost_micros(rates, replace(usage, details=written), images) or 0)
    return Charge(UsageState.ESTIMATED, replace(usage, details=details), images or None, cost)


def foreseen(rates: Rates | None, estimate: Estimate, images: int = 0) -> tuple[int, int]:
    """Expected cost of a call: millionths of money, 0 without a price, and tokens."""
    usage = Usage(
        input_tokens=max(estimate.expected_input_tokens, estimate.guessed_input_tokens),
        output_tokens=max(estimate.expected_output_tokens, estimate.guessed_output_tokens),
    )
    micros = cost_micros(rates, usage, images) or 0
    return micros, sum(count or 0 for count in tokens_of(usage))


def cut_charge(
    rates: Rates | None, told: Usage, estimate: Estimate, came: int, images: int | None
) -> Charge:
    """Charge for an answer that was cut, with some usage reported before its end.

    A figure of the provider's stands where it is about what came; where it is less than half of
    that, it was reported earlier (Anthropic's at the start of a stream), and what came counts.
    """
    taken, given = tokens_of(told)
    usage = told
    if taken is None:
        taken = max(estimate.expected_input_tokens, estimate.guessed_input_tokens)
        usage = replace(usage, input_tokens=taken)
    if given is None or 2 * given < came:
        thoughts = told.thoughts_tokens or 0
        usage = replace(usage, output_tokens=max(0, came - thoughts), total_tokens=None)
    return Charge(UsageState.PARTIAL, usage, images, cost_micros(rates, usage, images))


def answer_charge(
    rates: Rates | None, answer: Answer, estimate: Estimate | None, *, whole: bool
) -> Charge:
    """For a call by a provider's SDK that was sent: by the usage reported with a whole answer,
    else by what came of it at least, and the input."""
    images = len(answer.pictures)
    if whole and not is_unknown(answer.usage):
        return charge_of(rates, answer.usage, images, whole=True)
    if estimate is None:
        return UNKNOWN_CHARGE
    came = came_tokens(answer.whole_text, images=images)
    if is_unknown(answer.usage):
        return estimated_charge(rates, estimate, came, images, answer.usage.details)
    return cut_charge(rates, answer.usage, estimate, came, images)


def came_tokens(text: str, *, images: int = 0, scale: float = 1.0) -> int:
    """About how many tokens an answer has, as far as it came. `scale`: `text` is of that part
    of it."""
    return ceil(sum(pieces_of_text(text).values()) * scale + images * PICTURE_TOKENS)


def never_sent(error: UpstreamError) -> bool:
    """Whether there was no connection to send a request on."""
    if isinstance(error, UpstreamTimeout):
        return error.phase == "connect"
    return isinstance(error, UpstreamUnavailable) and error.broke == "connecting"


def is_unknown(usage: Usage) -> bool:
    return usage.input_tokens is usage.output_tokens is usage.total_tokens is None


def cost_micros(rates: Rates | None, usage: Usage, images: int | None) -> int | None:
    """Pictures that have a price of their own are not charged as output once more."""
    taken, given = tokens_of(usage)
    if rates is None or taken is None or given is None:
        return None
    pictures = images if images and rates.image is not None else 0
    thoughts = usage.thoughts_tokens or 0
    if usage.details is None:
        cached = min(usage.cached_tokens or 0, taken)
        parts: tuple[tuple[int, int | None], ...] = (
            (taken - cached, rates.input),
            (cached, rates.cached),
            (thoughts if pictures else given, rates.output),
            (pictures, rates.image),
        )
    else:
        left = given - min(thoughts, given)
        said = ((thoughts, rates.output), *_of_output(rates, usage.details, left))
        parts = (
            *_of_input(rates, usage, usage.details, taken),
            *(((thoughts, rates.output), (pictures, rates.image)) if pictures else said),
        )
    picos = 0
    for count, rate in parts:
        if count and rate is None:
            return None
        picos += count * (rate or 0)
    return _micros(picos)


def _of_input(
    rates: Rates, usage: Usage, details: UsageDetails, taken: int
) -> Iterator[tuple[int, int | None]]:
    """The parts of the input: together never more, nor fewer, tokens than `taken`. What was
    written to a cache comes first, since it is the dearest; what is not reported as for an
    hour is for 5 minutes."""
    written = min(details.cache_write_tokens or 0, taken)
    for_an_hour = min(details.cache_write_1h_tokens or 0, written)
    yield for_an_hour, rates.cache_write_1h
    yield written - for_an_hour, rates.cache_write
    cached = min(usage.cached_tokens or 0, taken - written)
    yield cached, rates.cached
    left = taken - written - cached
    audio = min(details.input_audio_tokens or 0, left)
    yield audio, rates.input_audio
    pictures = min(details.input_image_tokens or 0, left - audio)
    yield pictures, rates.input_image
    yield left - audio - pictures, rates.input


def _of_output(rates: Rates, details: UsageDetails, given: int) -> Iterator[tuple[int, int | None]]:
    audio = min(details.output_audio_tokens or 0, given)
    yield audio, rates.output_audio
    pictures = min(details.output_image_tokens or 0, given - audio)
    yield pictures, rates.output_image
    yield given - audio - pictures, rates.output


def _first(price: float | None, other: float | None) -> float | None:
    return other if price is None else price


def _per_token(price: float | None) -> int | None:
    return _picos(price, _PICOS // 10**6)


def _picos(price: float | None, one: int) -> int | None:
    # By its decimal digits: 0.1 means a tenth.
    return None if price is None else round(Decimal(repr(price)) * one)


def _micros(picos: int) -> int:
    return (picos + _MICRO // 2) // _MICRO
