"""Costs of random usages at random prices, computed again with fractions, as docs/money.md says."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from random import Random
from typing import Any

import pytest

from tidegate.admission.charges import Prices, call_cost, charge_of
from tidegate.admission.estimator import Estimator, pieces_of_text
from tidegate.call import Usage, UsageDetails
from tidegate.policy.deployment import Upstream
from tidegate.prices.rates import cost_micros, price_of

PARTS = 4
CALLS = 400
HOUR_S = 3_600.0
ESTIMATE = Estimator().of_pieces("m", "text_only", pieces_of_text("Tell me"), max_output_tokens=9)
AMOUNTS = (0, 0.0375, 0.075, 0.1, 0.3, 1.25, 3, 15, 0.00008, 75, 1_000_000)
COUNTS = (0, 0, 1, 2, 3, 7, 49, 100, 999, 1_000, 1_001, 200_000, 10**6 + 1, 10**12)
TIERS = ("", "flex", "priority")
OF_TOKENS = (
    *("cached", "cache_write", "cache_write_1h", "input_audio", "input_image", "input_video"),
    *("output_audio", "output_image"),
)
OF_USAGE = (
    *("cache_write_tokens", "cache_write_1h_tokens", "input_audio_tokens", "input_image_tokens"),
    *("input_video_tokens", "output_audio_tokens", "output_image_tokens", "searches"),
)
SEARCHES = "search"

Table = dict[str, Any]


def random_amounts(random: Random) -> Table:
    table: Table = {"input": random.choice(AMOUNTS), "output": random.choice(AMOUNTS)}
    if random.random() < 0.1:
        del table[random.choice(("input", "output"))]
    table |= {part: random.choice(AMOUNTS) for part in OF_TOKENS if random.random() < 0.4}
    if random.random() < 0.2:
        table["image"] = random.choice((0.04, 0.0033333))
    if random.random() < 0.3:
        table[SEARCHES] = random.choice((10, 2.5, 0.001))
    return table


def random_price(random: Random) -> Table:
    """Return a price as tidegate.toml states it."""
    table = random_amounts(random)
    if random.random() < 0.4:
        above = random.choice((1, 1_000, 200_000))
        table["long_context"] = {"above": above, **random_amounts(random)}
    if random.random() < 0.3:
        table["peak"] = {"share": random.choice((2, 0.5, 1.5)), "hours": [[1, 4], [6, 24]]}
    tiers: Table = {}
    for name in TIERS[1:]:
        if random.random() < 0.4:
            tiers[name] = {"share": random.choice((0.5, 2, 1.75))}
        elif random.random() < 0.4:
            tiers[name] = random_amounts(random)
            if "long_context" in table:
                tiers[name]["long_context"] = {"above": 500, **random_amounts(random)}
    return table | ({"tiers": tiers} if tiers else {})


def random_usage(random: Random) -> Usage:
    def count() -> int | None:
        return random.choice((None, *COUNTS))

    counts: dict[str, Any] = {one: count() for one in OF_USAGE if random.random() < 0.5}
    details = UsageDetails(**counts) if random.random() < 0.7 else None
    return Usage(random.choice(COUNTS), random.choice(COUNTS), count(), count(), details=details)


def amounts_for(table: Table, tokens: int, tier: str, *, is_peak: bool) -> dict[str, Fraction]:
    """Return the amounts in USD of a call with so many input tokens, by part."""
    in_tier = table.get("tiers", {}).get(tier, {})
    share = Fraction(repr(in_tier.get("share", 1)))
    stated = table if not in_tier or "share" in in_tier else {SEARCHES: table.get(SEARCHES, 0)}
    stated = stated | {key: in_tier[key] for key in in_tier if key != "share"}
    if is_peak and "peak" in table:
        share *= Fraction(repr(table["peak"]["share"]))
    long = stated.get("long_context", {})
    if long and tokens > long["above"]:
        stated = stated | long
    found = {
        part: Fraction(repr(stated[part])) for part in stated if type(stated[part]) is not dict
    }
    return {part: one * (1 if part == SEARCHES else share) for part, one in found.items()}


def expected(amounts: dict[str, Fraction], usage: Usage, images: int | None) -> int | None:
    """Return the cost in micro-dollars, half up; None if a part that was used has no price."""
    details = usage.details or UsageDetails()
    parts: list[tuple[int, Fraction | None]] = []

    def price(*names: str) -> Fraction | None:
        return next((amounts[name] for name in names if name in amounts), None)

    def take(left: int, count: int | None, *names: str) -> int:
        taken = min(left, count or 0)
        parts.append((taken, price(*names)))
        return left - taken

    left = usage.input_tokens or 0
    written = min(left, details.cache_write_tokens or 0)
    hourly = min(written, details.cache_write_1h_tokens or 0)
    left = take(left, hourly, "cache_write_1h", "cache_write", "input")
    left = take(left, written - hourly, "cache_write", "input")
    left = take(left, usage.cached_tokens, "cached", "input")
    for modality in ("audio", "image", "video"):
        count = getattr(details, f"input_{modality}_tokens")
        left = take(left, count, f"input_{modality}", "input")
    take(left, left, "input")
    thoughts, left = usage.thoughts_tokens or 0, usage.output_tokens or 0
    take(thoughts, thoughts, "output")
    if images and "image" in amounts:
        parts.append((images * 10**6, amounts["image"]))
    else:
        left = take(left, details.output_audio_tokens, "output_audio", "output")
        left = take(left, details.output_image_tokens, "output_image", "output")
        take(left, left, "output")
    parts.append(((details.searches or 0) * 1_000, amounts.get(SEARCHES, Fraction(0))))
    if any(count and one is None for count, one in parts):
        return None
    return floor(sum(count * (one or 0) for count, one in parts) + Fraction(1, 2))


def prices_at(table: Table, hour: int) -> Prices:
    upstream = Upstream("u", {}, "", prices={"m": price_of("price", table)})
    return Prices(upstream, now=lambda: hour * HOUR_S)


@pytest.mark.parametrize("part", range(PARTS))
def test_costs_are_those_of_a_second_computation(part: int) -> None:
    random = Random(part)
    for _ in range(CALLS):
        table, usage, images = random_price(random), random_usage(random), random.choice((None, 3))
        tier, hour = random.choice(TIERS), random.choice((0, 2, 5, 23))
        tokens = usage.input_tokens or 0
        amounts = amounts_for(table, tokens, tier, is_peak=hour in (2, 23))
        found = cost_micros(prices_at(table, hour).of("m", tier), usage, images)
        assert found == expected(amounts, usage, images), (table, tier, hour, usage, images)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_call_within_its_bounds_costs_more_than_was_reserved(part: int) -> None:
    """Whatever tier serves it, at whatever hour it ends."""
    random = Random(part)
    for _ in range(CALLS):
        table, tier = random_price(random), random.choice(TIERS)
        before, after = (prices_at(table, random.randrange(48)) for _ in range(2))
        size, most = random.choice((0, 10, 900, 2_000)), random.choice((0, 9, 500))
        writes: Any = random.choice((None, "5m", "1h"))
        is_chosen = random.random() < 0.2
        cost = call_cost(
            before.bound("m", tier, is_chosen=is_chosen),
            ESTIMATE,
            input_bytes=size,
            max_output_tokens=most,
            writes=writes,
        )
        tokens = random.choice((0, 5, size, size + 50))
        given = random.choice((0, min(1, most), most))
        written = random.choice((0, tokens, tokens // 2)) if writes else 0
        details = UsageDetails(
            written,
            cache_write_1h_tokens=written if writes == "1h" else None,
            output_audio_tokens=random.choice((None, given)),
        )
        usage = Usage(tokens, given, cached_tokens=random.choice((None, tokens)), details=details)
        served = [after.of("m", tier)]
        if not is_chosen:
            served += [after.of("m"), after.at_least("m", tier)]
        for rates in served:
            micros = charge_of(rates, usage, None, whole=True).cost_micros
            if micros is not None and cost.most_micros is not None:
                assert micros <= cost.most_micros, (table, tier, size, most, usage)
