"""Calls of batch lines and jobs without an answer yet give way to live calls, where that is set."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from tests.batching import ENDPOINT, MODEL, assert_all_succeeded, begin, content, end_of
from tests.gateway import Gateway, Opener
from tests.integration.batches.conftest import MakeSdk
from tests.integration.tenants.asking import ADMIN_TOKEN, key_of
from tests.waiting import promised_s, wait_until

LIMIT, LINES = 4, 6
SLOW_MS = max(3_000, round(1_000 * promised_s(1.2)))  # twice that beside other tests
AFTER_MS = 200
PREEMPTED = "SELECT coalesce(sum(preemptions), 0) FROM batch_lines"


async def opened(open_gateway: Opener, folder: Path, preempt: str, **settings: Any) -> Gateway:
    """One where `LIMIT` calls run concurrently; the provider refuses any more."""
    policy = folder / "preempt.toml"
    policy.write_text(f"[upstreams.gemini]\npreempt = {preempt}\n")
    limit = settings.pop("limit", LIMIT)
    limits = {"text_only": limit}
    settings |= {"first_byte_timeout_ms": 4 * SLOW_MS}
    gateway = await open_gateway(tidegate_policy=policy, rate_limits=limits, **settings)
    await gateway.upstream.set_behaviour(concurrency=limits)
    return gateway


async def live(client: AsyncOpenAI, text: str = "Say live.") -> None:
    messages: Any = [{"role": "user", "content": text}]
    answer = await client.chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content


async def outcomes(gateway: Gateway, contains: str = "slow") -> Counter[str | None]:
    return Counter(call.outcome for call in await gateway.calls(contains))


async def ended_before(gateway: Gateway, contains: str) -> Counter[str | None]:
    """How slow calls had ended when the last call with such a prompt reached the provider."""
    last_ns = max(call.started_ns for call in await gateway.calls(contains))
    slow = await gateway.calls("slow")
    return Counter(call.outcome for call in slow if call.ended_ns and call.ended_ns <= last_ns)


async def assert_within_the_limit(gateway: Gateway, limit: int = LIMIT) -> None:
    stats = (await gateway.upstream.stats())["text_only"]
    assert (stats.max_in_flight, stats.over) == (limit, 0)


async def slow_lines(gateway: Gateway, client: AsyncOpenAI, lines: int = LINES) -> Any:
    """A batch whose first lines fill the limit, and are slow to answer."""
    await gateway.upstream.set_fault(
        "slow_first_token", match="slow", delay_ms=SLOW_MS, count=min(LIMIT, lines)
    )
    batch = await begin(client, content(lines, says="Say slow{}."))
    await gateway.in_flight(min(LIMIT, lines))
    return batch


async def test_a_line_gives_way_to_a_live_call_and_is_answered_later(
    open_gateway: Opener, sdk: MakeSdk, tmp_path: Path
) -> None:
    """With two workers, of which one alone gives up a call."""
    gateway = await opened(open_gateway, tmp_path, f"{{ after_ms = {AFTER_MS} }}")
    await gateway.start_ready_worker()
    client = sdk(gateway)
    batch = await slow_lines(gateway, client)
    await live(client)
    assert await ended_before(gateway, "live") == {"client_gone": 1}

    async def counted() -> bool:
        return int(await gateway.database.fetchval(PREEMPTED)) == 1

    await wait_until(counted, 20, "a line that is counted as having given way")
    await assert_all_succeeded(client, await end_of(client, batch), LINES)
    times = Counter(call.prompt for call in await gateway.calls("slow"))
    assert sorted(times.values()) == [*[1] * (LINES - 1), 2]
    rows = await gateway.database.fetch("SELECT attempts FROM audit WHERE source = 'batch'")
    assert [row["attempts"] for row in rows] == [1] * LINES, "it used up no attempt"
    await assert_within_the_limit(gateway)


async def test_no_line_gives_way_where_that_is_not_set(
    open_gateway: Opener, sdk: MakeSdk, tmp_path: Path
) -> None:
    gateway = await opened(open_gateway, tmp_path, "false")
    client = sdk(gateway)
    batch = await slow_lines(gateway, client)
    await live(client)
    assert (await ended_before(gateway, "live")).keys() == {"finished"}
    await assert_all_succeeded(client, await end_of(client, batch), LINES)
    assert len(await gateway.calls("slow")) == LINES


async def test_each_waiting_call_is_given_one_at_most(
    open_gateway: Opener, sdk: MakeSdk, tmp_path: Path
) -> None:
    gateway = await opened(open_gateway, tmp_path, f"{{ after_ms = {AFTER_MS} }}")
    client = sdk(gateway)
    batch = await slow_lines(gateway, client)
    # These keep their permits, so that each needs one of its own.
    await gateway.upstream.set_fault("slow_first_token", match="live", delay_ms=SLOW_MS)
    calls = [asyncio.create_task(live(client, f"Say live{n}.")) for n in range(2)]

    async def both() -> bool:
        return len(await gateway.calls("live")) == 2

    await wait_until(both, 20, "both live calls at the provider")
    assert (await ended_before(gateway, "live"))["client_gone"] > 0
    await asyncio.gather(*calls)
    await assert_all_succeeded(client, await end_of(client, batch), LINES)
    assert (await outcomes(gateway))["client_gone"] <= 2
    await assert_within_the_limit(gateway)


async def test_a_line_gives_way_so_often_and_no_more(
    open_gateway: Opener, sdk: MakeSdk, tmp_path: Path
) -> None:
    preempt = f"{{ after_ms = {AFTER_MS}, times = 1 }}"
    gateway = await opened(open_gateway, tmp_path, preempt, limit=1)
    client = sdk(gateway)
    await gateway.upstream.set_fault("slow_first_token", match="slow", delay_ms=1_500)
    batch = await begin(client, content(1, says="Say slow{}."))
    await gateway.in_flight(1)
    await live(client)
    await gateway.in_flight(1)
    await live(client)
    assert await outcomes(gateway) == {"client_gone": 1, "finished": 1}
    await assert_all_succeeded(client, await end_of(client, batch), 1)
    await assert_within_the_limit(gateway, 1)


async def test_a_job_gives_way_and_its_attempts_say_so(
    open_gateway: Opener, sdk: MakeSdk, tmp_path: Path
) -> None:
    gateway = await opened(open_gateway, tmp_path, f"{{ after_ms = {AFTER_MS} }}", limit=1)
    client = sdk(gateway)
    await gateway.upstream.set_fault("slow_first_token", match="slow", delay_ms=SLOW_MS, count=1)
    messages = [{"role": "user", "content": "Say slow."}]
    body = {"model": MODEL, "messages": messages}
    job = await gateway.submit(endpoint=ENDPOINT, body=body, priority=-50)
    await gateway.in_flight(1)
    await live(client)
    ended = await gateway.end_of(job)
    assert (ended["status"], ended["attempts"]) == ("succeeded", 1)
    attempts = await gateway.attempts(job)
    assert [one["outcome"] for one in attempts] == ["preempted", "succeeded"]
    assert attempts[0]["failure"] is not None
    assert await outcomes(gateway) == {"client_gone": 1, "finished": 1}
    await assert_within_the_limit(gateway, 1)


async def test_a_call_that_gave_way_is_charged_to_its_budget_as_an_estimate(
    open_gateway: Opener, sdk: MakeSdk, tmp_path: Path
) -> None:
    keys = {"auth": "on", "admin_token": ADMIN_TOKEN}
    preempt = f"{{ after_ms = {AFTER_MS} }}"
    gateway = await opened(open_gateway, tmp_path, preempt, limit=1, worker=False, **keys)
    headers = await key_of(gateway, "acme", budget_day_tokens=100_000)
    gateway.start_worker()  # which would learn of a new budget some time after its first claim
    key = headers["Authorization"].removeprefix("Bearer ")
    client = sdk(gateway, api_key=key, default_headers={})
    batch = await slow_lines(gateway, client, 1)
    await live(client)
    await assert_all_succeeded(client, await end_of(client, batch), 1)
    assert await outcomes(gateway) == {"client_gone": 1, "finished": 1}

    async def settled() -> bool:
        book = await gateway.database.fetchrow(
            "SELECT sum(spent) AS spent, sum(estimated) AS estimated, sum(held) AS held, "
            "(SELECT sum(total_tokens) FROM audit) AS used FROM budget_books"
        )
        assert book is not None
        spent, estimated, held, used = book
        return bool(held == 0 and estimated > 0 and spent == used + estimated)

    await wait_until(settled, 20, "a budget with the usage of two calls and an estimate of one")


async def test_a_job_of_the_same_band_does_not_give_way(
    open_gateway: Opener, sdk: MakeSdk, tmp_path: Path
) -> None:
    gateway = await opened(open_gateway, tmp_path, f"{{ after_ms = {AFTER_MS} }}", limit=1)
    client = sdk(gateway)
    await gateway.upstream.set_fault("slow_first_token", match="slow", delay_ms=1_000)
    messages = [{"role": "user", "content": "Say slow."}]
    body = {"model": MODEL, "messages": messages}
    job = await gateway.submit(endpoint=ENDPOINT, body=body)
    await gateway.in_flight(1)
    await live(client)
    assert (await gateway.end_of(job))["status"] == "succeeded"
    assert await outcomes(gateway) == {"finished": 1}


async def test_nothing_is_lost_where_answers_come_as_calls_give_way(
    open_gateway: Opener, sdk: MakeSdk, tmp_path: Path
) -> None:
    lines, preempt = 40, "{ after_ms = 50, times = 2 }"
    gateway = await opened(open_gateway, tmp_path, preempt)
    client = sdk(gateway)
    await gateway.upstream.set_behaviour(first_byte_ms={"uniform": [50, 250]})
    batch = await begin(client, content(lines, says="Say slow{}."))
    await gateway.in_flight(LIMIT)
    for number in range(10):
        await asyncio.gather(*(live(client, f"Say live{number}.") for _ in range(2)))
    assert (await outcomes(gateway))["client_gone"] > 0
    await assert_all_succeeded(client, await end_of(client, batch), lines)
    calls = Counter(call.prompt for call in await gateway.calls("slow"))
    assert len(calls) == lines
    assert max(calls.values()) <= 3, "a line gives way twice at most"

    async def released() -> bool:
        snapshot = await gateway.services.limiter.snapshot()
        return all(limit.used == 0 for limit in snapshot.limits.values() if limit.sort == "c")

    await wait_until(released, 20, "a pool in which no permit is in use")
    await assert_within_the_limit(gateway)


async def test_a_provider_that_works_on_has_more_calls_than_the_limit(
    open_gateway: Opener, sdk: MakeSdk, tmp_path: Path
) -> None:
    """Why it is not set by itself: such a provider refuses what took the place of a line."""
    gateway = await opened(open_gateway, tmp_path, f"{{ after_ms = {AFTER_MS} }}")
    await gateway.upstream.set_behaviour(works_on=True)
    client = sdk(gateway)
    await slow_lines(gateway, client, LIMIT)
    calling = asyncio.create_task(live(client))

    async def over() -> bool:
        return (await gateway.upstream.stats())["text_only"].over > 0

    await wait_until(over, 20, "a call beyond the provider's limit")
    assert (await gateway.upstream.stats())["text_only"].in_flight == LIMIT
    calling.cancel()
