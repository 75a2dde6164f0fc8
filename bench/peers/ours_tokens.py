"""Tidegate's own limiter under a rate of LLM tokens, with estimates that are off by a factor.

The permit that the worker sees is the number of tokens that the call really takes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random

from bench.limiter.orders import Orders
from tidegate.admission.estimator import Estimate, Estimator, pieces_of_text
from tidegate.call import Usage
from tidegate.limiter import Limiter, PoolPolicy, Rate, Tokens

WEIGHED = True
LIMIT = "tpm:bench"
CALIBRATION_CALLS = 50


@asynccontextmanager
async def opened(
    orders: Orders,
) -> AsyncIterator[Callable[[int], AbstractAsyncContextManager[int]]]:
    off, chance, estimator = orders.options["off"], Random(orders.number), Estimator()

    def draw() -> tuple[Estimate, int]:
        """A prompt's estimate, and the input tokens that it will really take."""
        estimate = estimator.of_pieces(
            "model", "text", pieces_of_text("x" * chance.randint(400, 1200))
        )
        guess = sum(estimate.input_pieces.values())
        return estimate, round(guess * off * chance.uniform(0.85, 1.15))

    for _ in range(CALIBRATION_CALLS):
        estimate, tokens = draw()
        estimator.learn(estimate, Usage(input_tokens=tokens))

    policy = PoolPolicy({LIMIT: Rate(orders.bound, orders.window_ms, unit="input_tokens")})
    async with Limiter.from_url(orders.url, pool="bench", policy=policy) as limiter:

        @asynccontextmanager
        async def acquire(_: int) -> AsyncIterator[int]:
            estimate, tokens = draw()
            demand = Tokens(input=estimate.input_tokens, output=estimate.output_tokens)
            async with limiter.acquire(LIMIT, tokens=demand) as permit:
                yield tokens
                permit.settle(tokens=Tokens(input=tokens, output=0))
            estimator.learn(estimate, Usage(input_tokens=tokens))

        yield acquire
