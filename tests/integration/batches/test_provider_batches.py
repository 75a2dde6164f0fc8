"""Jobs in the batches of the providers' own batch APIs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from pathlib import Path
from secrets import token_bytes
from typing import Any, Self
from uuid import UUID

import pytest

from tests.gateway import PNG, Gateway, Opener
from tests.integration.batches.provider import (
    MODELS,
    SOON,
    asked,
    batches,
    is_in,
    policy_of,
    put_into_batch,
    wrapped,
)
from tests.waiting import wait_until
from tidegate.call import Media
from tidegate.emulator.batches import BatchStore
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.jobs import provider_batches
from tidegate.jobs.provider_batches import MOST_BYTES
from tidegate.prices.budgets import budget_of
from tidegate.rehearse import recorded_load
from tidegate.rehearse.budgets import TierTerms
from tidegate.rehearse.load import TokenPace, Usual
from tidegate.store.statistics import past_calls
from tidegate.upstream.batch_api import (
    BatchedCall,
    BatchOutline,
    BatchProgress,
    OpenAIBatches,
)
from tidegate.upstream.fetch import ImageFetcher, refused

HOUR_MS = 3_600_000
CREATIONS = {
    "openai": "POST /v1/batches",
    "anthropic": "POST /v1/messages/batches",
    "gemini": ":batchGenerateContent",
}


@pytest.fixture
async def provider() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
def settings(provider: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GOOGLE_KEY"):
        monkeypatch.setenv(name, f"key-of-{name.lower()}")
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_of(provider.url))
    return {"tidegate_policy": policy, **SOON}


async def opened(open_gateway: Opener, settings: dict[str, Any]) -> Gateway:
    return await open_gateway(worker=False, **settings)


async def is_held(gateway: Gateway) -> bool:
    """Whether a batch stands still."""
    return any(one["problem"] for one in await batches(gateway))


async def submitted(gateway: Gateway, *jobs: dict[str, Any]) -> list[str]:
    """Jobs that wait for one batch."""
    ids = [await gateway.submit(**job) for job in jobs]
    await put_into_batch(gateway, *ids)
    return ids


async def test_jobs_of_all_dialects_are_answered_once_at_half_the_price(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    texts = [f"Say word {number}" for number in range(3)]
    jobs = [(dialect, text) for dialect in MODELS for text in texts]
    ids = await submitted(gateway, *(wrapped(*job) for job in jobs))
    tide = {"data": "Explain the tide", "type": "text_only"}
    prompts = await submitted(gateway, *({**tide, "model": model} for model in MODELS.values()))
    gateway.start_worker()
    ends = [await gateway.end_of(one) for one in ids]
    assert {end["status"] for end in ends} == {"succeeded"}
    assert [end["attempts"] for end in ends] == [1] * 9
    for (dialect, text), end in zip(jobs, ends, strict=True):
        answer = end["answer"]
        said = {
            "openai": lambda answer: answer["choices"][0]["message"]["content"],
            "anthropic": lambda answer: answer["content"][0]["text"],
            "gemini": lambda answer: answer["candidates"][0]["content"]["parts"][0]["text"],
        }[dialect](answer)
        assert text in said
        assert end["usage"]["tier"] == "batch"
    for prompt in prompts:
        last = await gateway.end_of(prompt)
        assert (last["status"], "tide" in last["text"]) == ("succeeded", True), last
    expected = {(text, "batch"): len(MODELS) for text in (*texts, "Explain the tide")}
    assert await asked(provider.control) == expected
    assert len(await batches(gateway)) == len(MODELS)  # prompts are with the calls
    await costs_half(gateway, ids[0])
    attempts = await gateway.attempts(ids[0])
    assert [(row["outcome"], row["upstream"]) for row in attempts] == [("succeeded", "openai")]


async def test_a_line_whose_answer_reports_no_input_is_charged_an_estimate_of_it(
    open_gateway: Opener, settings: dict[str, Any]
) -> None:
    """As a call outside of a batch is: Google reports none where a file is named by its address."""
    gateway = await opened(open_gateway, settings)
    picture = {"fileData": {"fileUri": "https://example.com/a.png", "mimeType": "image/png"}}
    contents = [{"role": "user", "parts": [{"text": "Describe it"}, picture]}]
    (job,) = await submitted(gateway, wrapped("gemini", "", contents=contents))
    gateway.start_worker()
    assert (await gateway.end_of(job))["status"] == "succeeded"
    row = await gateway.audit(job)
    assert (row["usage_state"], row["input_tokens"] > 0) == ("estimated", True)
    made = row["output_tokens"] + row["thoughts_tokens"]
    micros = (row["input_tokens"] * 0.30 + made * 2.50) / 2
    assert row["cost_micros"] == pytest.approx(micros, abs=1)


async def costs_half(gateway: Gateway, job: str) -> None:
    """gpt-4o-mini: 0.15 USD a million of input, 0.60 of output."""
    row = await gateway.audit(job)
    micros = (row["input_tokens"] * 0.15 + row["output_tokens"] * 0.60) / 2
    assert row["upstream"] == "openai"
    assert row["cost_micros"] == pytest.approx(micros, abs=1)


async def test_a_rehearsal_takes_the_jobs_of_its_pool_with_their_tiers(
    open_gateway: Opener, settings: dict[str, Any]
) -> None:
    gateway, since = await opened(open_gateway, settings), datetime.now(UTC)
    batched = await submitted(gateway, wrapped("openai", "Say hello"))
    live = await gateway.submit(**wrapped("openai", "Say goodbye"))
    prompt = await gateway.submit(data="Explain the tide", model=MODELS["openai"])
    gateway.start_worker()
    for job in (*batched, live, prompt):
        assert (await gateway.end_of(job))["status"] == "succeeded"
    found = {
        pool: await past_calls(gateway.services.store.connections, pool, since, datetime.now(UTC))
        for pool in ("openai", "gemini")
    }
    assert {pool: len(calls) for pool, calls in found.items()} == {"openai": 3, "gemini": 0}
    assert Counter((one.tier, *(one.tiers or ())) for one in found["openai"]) == {
        ("batch", "batch"): 1,
        (None,): 2,
    }
    terms = TierTerms(share=lambda _model, _tier: 0.5)
    usual, span = Usual({}, TokenPace(400.0, 100.0)), (since, datetime.now(UTC))
    load = await recorded_load(gateway.services.store.connections, "openai", span, usual, terms)
    assert load is not None
    (rehearsed,) = [one for one in load.arrivals if one.tiers]
    cost_usd = next(one.cost_micros for one in found["openai"] if one.tier) / 10**6
    # As the usual tier would have made it: at twice the price of the batch, for as long as it says.
    assert rehearsed.tiers == "batch"
    assert rehearsed.cost_usd == pytest.approx(2 * cost_usd)
    assert rehearsed.duration_ms == 400 + 10 * rehearsed.output_tokens
    assert len(load.waits_ms) == 2


async def test_a_job_in_a_batch_shows_where_it_is(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"delay_ms": HOUR_MS})
    (job,) = await submitted(gateway, wrapped("openai", "Say hello"))
    gateway.start_worker()
    await wait_until(partial(is_in, gateway, "created"))
    shown = await gateway.status(job)
    assert (shown["status"], shown.get("place"), shown["attempts"]) == ("running", None, 1)
    await provider.control.set_behaviour(batches={})
    (batch,) = await batches(gateway)
    assert batch["provider_id"].startswith("batch_")
    # Another worker's claims, and the end of this one, leave it alone.
    await gateway.stop_worker()
    assert (await gateway.status(job))["status"] == "running"


async def test_what_the_provider_refuses_is_decided_by_the_usual_tier(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    good, bad = await submitted(
        gateway,
        wrapped("openai", "Say hello"),
        wrapped("openai", "Say nothing", max_tokens=-1),
    )
    gateway.start_worker()
    assert (await gateway.end_of(good))["status"] == "succeeded"
    record = await gateway.end_of(bad)
    assert (record["status"], record["error"]["upstream_status"]) == ("failed", 400)
    assert await asked(provider.control, "Say hello") == {("Say hello", "batch"): 1}


@pytest.mark.parametrize("dialect", MODELS)
async def test_a_line_at_which_the_provider_failed_is_tried_again(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator, dialect: str
) -> None:
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"failed_share": 1.0})
    (job,) = await submitted(gateway, wrapped(dialect, "Say hello"))
    gateway.start_worker()
    record = await gateway.end_of(job)
    assert record["status"] == "succeeded"
    assert await asked(provider.control, "Say hello") == {("Say hello", ""): 1}


@pytest.mark.parametrize("dialect", MODELS)
async def test_a_batch_that_expires_returns_its_lines(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator, dialect: str
) -> None:
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"delay_ms": HOUR_MS, "window_s": 0.3})
    (job,) = await submitted(gateway, wrapped(dialect, "Say hello"))
    gateway.start_worker()
    record = await gateway.end_of(job)
    assert (record["status"], record["attempts"]) == ("succeeded", 1)
    assert await asked(provider.control, "Say hello") == {("Say hello", ""): 1}
    outcomes = [row["outcome"] for row in await gateway.attempts(job)]
    assert outcomes == ["failed", "succeeded"]


async def test_an_outage_of_the_provider_fails_no_job(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    for fault in ("POST /v1/files", "POST /v1/batches", "GET /v1/batches", "GET /v1/files"):
        await provider.control.set_fault("unavailable", kind="other", match=fault, count=3)
    (job,) = await submitted(gateway, wrapped("openai", "Say hello"))
    gateway.start_worker(claim_lease_ms=600)
    record = await gateway.end_of(job)
    assert (record["status"], record["attempts"]) == ("succeeded", 1)
    assert await asked(provider.control, "Say hello") == {("Say hello", "batch"): 1}


@pytest.mark.parametrize("dialect", MODELS)
async def test_a_creation_whose_answer_was_lost_is_found_and_not_repeated(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator, dialect: str
) -> None:
    gateway = await opened(open_gateway, settings)
    match = CREATIONS[dialect]
    await provider.control.set_fault("answer_lost", kind="other", match=match, count=1)
    ids = await submitted(gateway, *(wrapped(dialect, f"Say word {n}") for n in range(5)))
    gateway.start_worker()
    assert {(await gateway.end_of(one))["status"] for one in ids} == {"succeeded"}
    expected = {(f"Say word {n}", "batch"): 1 for n in range(5)}
    assert await asked(provider.control) == expected


@pytest.mark.parametrize("dialect", MODELS)
async def test_a_lost_creation_is_found_beside_the_query_of_an_upstream(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator, dialect: str
) -> None:
    policy = settings["tidegate_policy"]
    policy.write_text(policy.read_text().replace("models =", 'query = { region = "eu" }\nmodels ='))
    gateway = await opened(open_gateway, settings)
    match = CREATIONS[dialect]
    await provider.control.set_fault("answer_lost", kind="other", match=match, count=1)
    (job,) = await submitted(gateway, wrapped(dialect, "Say hello"))
    gateway.start_worker()
    assert (await gateway.end_of(job))["status"] == "succeeded"
    assert await asked(provider.control) == {("Say hello", "batch"): 1}


async def test_a_batch_is_created_once_though_its_report_is_not_understood(
    open_gateway: Opener,
    settings: dict[str, Any],
    provider: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = await opened(open_gateway, settings)
    understood, reports = OpenAIBatches._progress, []

    def progress(api: OpenAIBatches, shown: dict[str, Any]) -> BatchProgress:
        reports.append(shown)
        if len(reports) == 1:
            raise ValueError("a report that nobody has thought of")
        return understood(api, shown)

    monkeypatch.setattr(OpenAIBatches, "_progress", progress)
    (job,) = await submitted(gateway, wrapped("openai", "Say hello"))
    gateway.start_worker()
    assert (await gateway.end_of(job))["status"] == "succeeded"
    assert await asked(provider.control, "Say hello") == {("Say hello", "batch"): 1}


@pytest.mark.parametrize("dialect", MODELS)
async def test_results_that_break_off_are_read_again(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator, dialect: str
) -> None:
    gateway = await opened(open_gateway, settings)
    results = {"openai": "/content", "anthropic": "/results", "gemini": ":download"}[dialect]
    await provider.control.set_fault("cut_mid_stream", kind="other", match=results, count=2)
    ids = await submitted(gateway, *(wrapped(dialect, f"Say word {n}") for n in range(20)))
    gateway.start_worker()
    ends = [await gateway.end_of(one) for one in ids]
    assert {(end["status"], end["attempts"]) for end in ends} == {("succeeded", 1)}
    assert await asked(provider.control) == {(f"Say word {n}", "batch"): 1 for n in range(20)}
    count = await gateway.database.fetchval("SELECT count(*) FROM audit WHERE source = 'job'")
    assert count == 20


@pytest.mark.parametrize(
    ("dialect", "bound"),
    [("openai", "enqueued_tokens"), ("anthropic", "enqueued_requests"), ("gemini", "open_batches")],
)
async def test_a_full_queue_at_the_provider_holds_a_batch(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator, dialect: str, bound: str
) -> None:
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={bound: 0})
    (job,) = await submitted(gateway, wrapped(dialect, "Say hello"))
    gateway.start_worker()
    await wait_until(partial(is_held, gateway))
    assert (await gateway.status(job))["status"] == "running"
    await provider.control.set_behaviour(batches={})
    assert (await gateway.end_of(job))["status"] == "succeeded"
    assert await asked(provider.control, "Say hello") == {("Say hello", "batch"): 1}


@pytest.mark.parametrize("cancelling_ms", [100, HOUR_MS])
async def test_a_job_leaves_a_batch_in_time_for_its_deadline(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator, cancelling_ms: int
) -> None:
    """17.5 s before it is due a call of unknown length has to begin in the usual tier."""
    quick = {"provider_batch_window_ms": 1_000, "provider_batch_cancel_ms": 100}
    gateway = await opened(open_gateway, settings | quick)
    batch = {"delay_ms": HOUR_MS, "cancelling_ms": cancelling_ms}
    await provider.control.set_behaviour(batches=batch)
    gateway.start_worker()
    due: dict[str, Any] = {"tiers": ["batch"], "deadline_ms": 22_000}
    job = await gateway.submit(**wrapped("openai", "Say hello"), **due)
    await wait_until(partial(is_in, gateway, "created", "cancelling"))
    record = await gateway.end_of(job)
    assert (record["status"], record["attempts"], record["tier"]) == ("succeeded", 1, "live")
    assert await asked(provider.control, "Say hello") == {("Say hello", ""): 1}


async def test_a_job_leaves_a_batch_in_time_though_the_batch_api_does_not_answer(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"delay_ms": HOUR_MS})
    late, other = await submitted(
        gateway, wrapped("openai", "Say hello"), wrapped("openai", "Say goodbye")
    )
    gateway.start_worker()
    await wait_until(partial(is_in, gateway, "created"))
    for path in ("GET /v1/batches", "POST /v1/batches"):
        await provider.control.set_fault("unavailable", kind="other", match=path, count=100_000)
    await wait_until(partial(is_held, gateway))
    await gateway.database.execute(
        "WITH due AS (UPDATE requests SET deadline_at = now() + interval '1 minute' WHERE id = $1)"
        " UPDATE provider_batch_lines SET leave_at = now() WHERE request_id = $1",
        late,
    )
    record = await gateway.end_of(late)
    assert (record["status"], record["attempts"], record["tier"]) == ("succeeded", 1, "live")
    assert (await gateway.status(other))["status"] == "running", "has all the time"


async def test_a_job_leaves_a_batch_in_time_that_the_provider_does_not_create_for_an_hour(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    quick = {"provider_batch_window_ms": 1_000, "provider_batch_cancel_ms": 100}
    gateway = await opened(open_gateway, settings | quick)
    await provider.control.set_fault(
        "throttled", kind="other", match="POST /v1/files", retry_after_s=3_600
    )
    gateway.start_worker()
    due: dict[str, Any] = {"tiers": ["batch"], "deadline_ms": 22_000}
    job = await gateway.submit(**wrapped("openai", "Say hello"), **due)
    await wait_until(partial(is_held, gateway))
    record = await gateway.end_of(job)
    assert (record["status"], record["attempts"], record["tier"]) == ("succeeded", 1, "live")
    assert await asked(provider.control, "Say hello") == {("Say hello", ""): 1}


async def test_a_job_is_cancelled_soon_though_its_batch_may_not_be_created_for_an_hour(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    upload = "POST /v1/files"
    await provider.control.set_fault("throttled", kind="other", match=upload, retry_after_s=3_600)
    unwanted, other = await submitted(
        gateway, wrapped("openai", "Say hello"), wrapped("openai", "Say goodbye")
    )
    gateway.start_worker()
    await wait_until(partial(is_held, gateway))
    async with gateway.http.delete(f"{gateway.url}/requests/{unwanted}") as response:
        assert response.status in (200, 202)
    assert (await gateway.end_of(unwanted))["status"] == "cancelled"
    assert (await gateway.status(other))["status"] == "running"
    uploads = [call for call in await provider.control.calls() if upload in call.prompt]
    assert len(uploads) == 1, "it is asked again when it has said so"


async def test_a_job_leaves_a_batch_sooner_once_more_jobs_come_before_it(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    """Fifty calls of 10 s, one at a time, and a quarter more, take longer than is left until it is
    due."""
    limit = '\n[upstreams.openai.limits]\n"pool:total" = 1\n'
    settings["tidegate_policy"].write_text(policy_of(provider.url) + limit)
    quick = {"provider_batch_window_ms": 1_000, "provider_batch_cancel_ms": 100}
    gateway = await opened(open_gateway, settings | quick)
    await provider.control.set_behaviour(batches={"delay_ms": HOUR_MS, "cancelling_ms": 100})
    gateway.start_worker()
    due: dict[str, Any] = {"tiers": ["batch"], "deadline_ms": 600_000}
    job = await gateway.submit(**wrapped("openai", "Say hello"), **due)
    await wait_until(partial(is_in, gateway, "created"))
    await gateway.database.execute(
        "INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by,"
        " classified_reason, prompt, priority, created_at, deadline_at, not_before)"
        " SELECT gen_random_uuid(), 'default', pool, 'job', 'queued', kind, 'caller', '', 'x', 0,"
        " now(), now() + interval '500 s', now() + interval '1 hour'"
        " FROM requests, generate_series(1, 50) WHERE id = $1",
        job,
    )
    record = await gateway.end_of(job)
    assert (record["status"], record["tier"]) == ("succeeded", "live")
    assert await asked(provider.control, "Say hello") == {("Say hello", ""): 1}


async def test_a_batch_of_cancelled_jobs_is_cancelled(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"delay_ms": HOUR_MS})
    ids = await submitted(gateway, *(wrapped("openai", f"Say word {n}") for n in range(2)))
    gateway.start_worker()
    await wait_until(partial(is_in, gateway, "created"))
    first, last = ids
    async with gateway.http.delete(f"{gateway.url}/requests/{first}") as response:
        assert (response.status, (await response.json())["status"]) == (202, "running")
    async with gateway.http.delete(f"{gateway.url}/requests/{last}") as response:
        assert response.status in (200, 202)
    ends = [await gateway.end_of(one) for one in ids]
    assert {end["status"] for end in ends} == {"cancelled"}
    assert await asked(provider.control, "Say word") == {}
    assert (await gateway.audit(ids[0]))["cost_micros"] == 0


async def test_a_cancelled_job_among_others_is_charged_and_not_answered(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    """Providers cancel whole batches only."""
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"delay_ms": 1_500})
    one, other = await submitted(
        gateway, wrapped("openai", "Say one"), wrapped("openai", "Say two")
    )
    gateway.start_worker()
    await wait_until(partial(is_in, gateway, "created"))
    async with gateway.http.delete(f"{gateway.url}/requests/{one}") as response:
        assert response.status in (200, 202)
    record = await gateway.end_of(one)
    assert (record["status"], record.get("answer")) == ("cancelled", None)
    assert (await gateway.end_of(other))["status"] == "succeeded"
    assert (await gateway.audit(one))["cost_micros"] > 0


async def test_a_line_that_has_a_cache_written_is_held_at_the_price_of_that(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    records = gateway.services.store.budgets.records
    await records.set(budget_of("day", {"usd": "1", "period": "day"}), by="test")
    await provider.control.set_behaviour(batches={"delay_ms": HOUR_MS})
    kept = {"type": "ephemeral", "ttl": "1h"}
    system = [{"type": "text", "text": "!" * 2_000, "cache_control": kept}]
    await submitted(gateway, wrapped("anthropic", "Say hello", system=system))
    gateway.start_worker()
    await wait_until(partial(is_in, gateway, "created"))
    (book,) = await records.books("day")
    # 3 USD a million tokens, of which none has less than a byte; the usual input costs half of it.
    assert book.held >= 2_000 * 3


async def test_budgets_are_held_for_lines_and_charged_their_batch_price(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    records = gateway.services.store.budgets.records
    await records.set(budget_of("day", {"usd": "0.00008", "period": "day"}), by="test")
    ids = await submitted(gateway, *(wrapped("openai", f"Say word {n}") for n in range(4)))
    await provider.control.set_behaviour(batches={"delay_ms": 1_500})
    gateway.start_worker()
    await wait_until(partial(is_in, gateway, "created"))
    (batch,) = await batches(gateway)
    assert 0 < batch["lines"] < 4  # the others have no room: each may cost 0.00003 or more
    (book,) = await records.books("day")
    assert 0 < book.held <= book.amount
    ends = [await gateway.end_of(one) for one in ids]
    assert {end["status"] for end in ends} == {"succeeded"}
    rows = await gateway.database.fetch("SELECT cost_micros FROM audit WHERE source = 'job'")

    async def settled() -> bool:
        (book,) = await records.books("day")
        return (book.held, book.spent) == (0, sum(row["cost_micros"] for row in rows))

    await wait_until(settled)


async def test_prompts_with_files_and_pictures_go_into_a_batch(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    seen, drawn = await submitted(
        gateway,
        {"data": "What is in it?", "type": "multi_modal", "files": PNG},
        {"data": "Draw a lighthouse", "type": "image_generation"},
    )
    gateway.start_worker()
    record = await gateway.end_of(seen)
    assert record["status"] == "succeeded"
    assert record["text"]
    picture = await gateway.end_of(drawn)
    assert picture["status"] == "succeeded"
    (image,) = picture["images"]
    async with gateway.http.get(gateway.url + image["url"]) as response:
        assert (response.status, (await response.read())[:4]) == (200, b"\x89PNG")
    assert {tier for _, tier in await asked(provider.control)} == {"batch"}


def pictured(text: str, uri: str) -> dict[str, Any]:
    """The fields of a job whose picture is fetched when it becomes a line."""
    return {"data": text, "type": "multi_modal", "image_uri": f"https://example.com/{uri}"}


async def test_pictures_that_are_fetched_make_no_batch_larger(
    open_gateway: Opener, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Media("image/png", PNG + bytes(3_000_000), "large.png")

    async def fetch(_fetcher: ImageFetcher, _uri: str, *_more: object) -> Media:
        return picture

    monkeypatch.setattr(ImageFetcher, "fetch", fetch)
    gateway = await opened(open_gateway, settings)
    ids = await submitted(gateway, *(pictured(f"Picture {n}", f"{n}.png") for n in range(6)))
    gateway.start_worker()
    assert {(await gateway.end_of(one))["status"] for one in ids} == {"succeeded"}
    made = await batches(gateway)
    assert max(one["size_bytes"] for one in made) <= MOST_BYTES
    assert sum(one["lines"] for one in made) == len(ids)


async def test_a_picture_that_does_not_come_holds_up_no_other_tenant(
    open_gateway: Opener, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    came, fetching = asyncio.Event(), set[str]()

    async def fetch(_fetcher: ImageFetcher, uri: str, *_more: object) -> Media:
        fetching.add(uri)
        await came.wait()
        return Media("image/png", PNG)

    monkeypatch.setattr(ImageFetcher, "fetch", fetch)
    gateway = await opened(open_gateway, settings)
    slow = await submitted(gateway, *(pictured(f"Picture {n}", f"{n}.png") for n in range(5)))
    (other,) = await submitted(gateway, wrapped("openai", "Say hello"))
    gateway.start_worker()
    assert (await gateway.end_of(other))["status"] == "succeeded"
    # All together: they take as long as the slowest of them.
    await wait_until(lambda: len(fetching) == len(slow))
    came.set()
    assert {(await gateway.end_of(one))["status"] for one in slow} == {"succeeded"}


async def test_the_lines_of_a_few_batches_are_in_memory_however_many_begin(
    open_gateway: Opener, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_upload, uploading = asyncio.Event(), list[UUID]()
    upload = OpenAIBatches.upload

    async def slow(
        api: OpenAIBatches, batch: BatchOutline, calls: Sequence[BatchedCall]
    ) -> str | None:
        uploading.append(batch.id)
        await may_upload.wait()
        return await upload(api, batch, calls)

    monkeypatch.setattr(OpenAIBatches, "upload", slow)
    monkeypatch.setattr(provider_batches, "MOST_LINES", 1)
    gateway = await opened(open_gateway, settings)
    ids = await submitted(gateway, *(wrapped("openai", f"Say word {n}") for n in range(30)))
    gateway.start_worker()

    async def all_begun() -> bool:
        return len(await batches(gateway)) == len(ids)

    await wait_until(all_begun)
    assert len(uploading) <= 8
    may_upload.set()
    assert {(await gateway.end_of(one))["status"] for one in ids} == {"succeeded"}


async def test_an_upstream_that_does_not_answer_leaves_room_for_the_batches_of_others(
    open_gateway: Opener,
    settings: dict[str, Any],
    provider: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provider_batches, "MOST_LINES", 1)
    await provider.control.set_fault("hang", kind="other", match="POST /v1/files", count=100)
    gateway = await opened(open_gateway, settings)
    await submitted(gateway, *(wrapped("openai", f"Say word {n}") for n in range(16)))
    gateway.start_worker()

    async def all_hang() -> bool:
        calls = await provider.control.calls()
        return sum(call.fault == "hang" for call in calls) >= 4

    await wait_until(all_hang)
    (other,) = await submitted(gateway, wrapped("anthropic", "Say hello"))
    assert (await gateway.end_of(other))["status"] == "succeeded"


async def test_a_line_that_cannot_be_made_again_leaves_its_batch_to_the_others(
    open_gateway: Opener,
    settings: dict[str, Any],
    provider: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched = list[str]()

    async def fetch(_fetcher: ImageFetcher, uri: str, *_more: object) -> Media:
        fetched.append(uri)
        if "gone" in uri and fetched.count(uri) > 1:
            raise refused("was answered with status 404")
        return Media("image/png", PNG)

    monkeypatch.setattr(ImageFetcher, "fetch", fetch)
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"open_batches": 0})
    gone, other = await submitted(
        gateway, pictured("Whose is it?", "gone.png"), pictured("What is it?", "other.png")
    )
    gateway.start_worker()
    await wait_until(partial(is_held, gateway))
    await provider.control.set_behaviour(batches={})
    assert (await gateway.end_of(other))["status"] == "succeeded"
    record = await gateway.end_of(gone)
    assert (record["status"], record["error"]["code"]) == ("failed", "fetch_refused")


async def test_waiting_jobs_count_for_the_queue_of_their_tenant(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"delay_ms": HOUR_MS})
    ids = await submitted(gateway, *(wrapped("openai", f"Say word {n}") for n in range(3)))
    counted = "count_batched"
    row = await gateway.services.store.connections.row(counted, "default", "gemini")
    assert row is not None
    assert (row["jobs"], row["size_bytes"] > 0) == (3, True)
    gateway.start_worker()
    await wait_until(partial(is_in, gateway, "created"))
    row = await gateway.services.store.connections.row(counted, "default", "gemini")
    assert row is not None
    assert row["jobs"] == len(ids)


async def test_a_job_that_may_wait_is_put_into_a_batch(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    gateway = await opened(open_gateway, settings)
    gateway.start_worker()
    day_ms = 24 * HOUR_MS
    jobs = [
        await gateway.submit(**wrapped("openai", text), tiers=["batch"], deadline_ms=due_ms)
        for text, due_ms in (("Say it tomorrow", day_ms), ("Say it now", 60_000))
    ]
    later, now = [await gateway.end_of(one) for one in jobs]
    assert [later["status"], now["status"]] == ["succeeded"] * 2
    assert [later["tier"], now["tier"]] == ["batch", "live"]
    assert "batch costs 50%" in later["tier_why"]
    expected = {("Say it tomorrow", "batch"): 1, ("Say it now", ""): 1}
    assert await asked(provider.control) == expected


async def test_a_prompt_goes_into_a_batch_where_a_native_call_of_its_model_does(
    open_gateway: Opener, settings: dict[str, Any]
) -> None:
    """Only Gemini's batches lose the answers they have once they are cancelled."""
    gateway = await opened(open_gateway, settings)
    gateway.start_worker()
    may_wait: dict[str, Any] = {"tiers": ["batch"], "deadline_ms": 24 * HOUR_MS}
    jobs = {
        dialect: await gateway.submit(
            data="Say it tomorrow", model=model, type="text_only", **may_wait
        )
        for dialect, model in MODELS.items()
    }
    tiers = {dialect: (await gateway.end_of(job))["tier"] for dialect, job in jobs.items()}
    assert tiers == {"openai": "batch", "anthropic": "batch", "gemini": "live"}


async def test_a_worker_whose_clock_was_set_creates_no_batch_again_too_soon(
    open_gateway: Opener,
    settings: dict[str, Any],
    provider: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request of a worker that was lost may still be under way."""

    class Set(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(hours=1)

    gateway = await opened(open_gateway, settings | {"claim_lease_ms": 60_000})
    await provider.control.set_fault("hang", kind="other", match="POST /v1/batches", count=1)
    await submitted(gateway, wrapped("openai", "Say hello"))
    gateway.start_worker()
    await wait_until(partial(is_in, gateway, "creating"))
    await gateway.stop_worker()
    monkeypatch.setattr(provider_batches, "datetime", Set)
    gateway.start_worker()

    async def waits() -> bool:
        query = "SELECT due_at > now() + interval '1 minute' FROM provider_batches"
        return bool(await gateway.database.fetchval(query))

    await wait_until(waits)
    assert await is_in(gateway, "creating")


async def test_a_batch_of_another_consumer_is_not_taken_for_ours(
    open_gateway: Opener, settings: dict[str, Any], provider: Emulator
) -> None:
    """Anthropic's batches have nothing that tells whose they are until they have ended."""
    gateway = await opened(open_gateway, settings | {"claim_lease_ms": 600})
    await provider.control.set_behaviour(batches={"delay_ms": 3_000})
    params = wrapped("anthropic", "Say another's")["body"]
    theirs = {"requests": [{"custom_id": "a", "params": params}]}
    url = f"{provider.url}/v1/messages/batches"
    headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
    creation = "POST /v1/messages/batches"
    await provider.control.set_fault("hang", kind="other", match=creation, count=1)
    (job,) = await submitted(gateway, wrapped("anthropic", "Say ours"))
    gateway.start_worker()

    async def hangs() -> bool:
        return any(call.fault == "hang" for call in await provider.control.calls())

    await wait_until(hangs)
    async with gateway.http.post(url, json=theirs, headers=headers) as response:
        other = (await response.json())["id"]
    (batch,) = await batches(gateway)
    assert batch["state"] == "creating"
    await gateway.stop_worker()
    gateway.start_worker()

    async def is_held() -> bool:
        (found,) = await batches(gateway)
        return "others of its size" in (found["problem"] or "")

    await wait_until(is_held)
    assert (await gateway.end_of(job))["status"] == "succeeded"
    (batch,) = await batches(gateway)
    assert batch["provider_id"] != other
    asked_for = await asked(provider.control, "Say")
    assert asked_for == {("Say another's", "batch"): 1, ("Say ours", "batch"): 1}


@pytest.mark.parametrize("dialect", MODELS)
async def test_a_batch_that_is_deleted_at_the_provider_returns_its_lines(
    open_gateway: Opener,
    settings: dict[str, Any],
    provider: Emulator,
    dialect: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"delay_ms": HOUR_MS})
    ids = await submitted(gateway, *(wrapped(dialect, f"Say word {n}") for n in range(3)))
    gateway.start_worker()
    await wait_until(partial(is_in, gateway, "created"))
    find = BatchStore.find

    def deleted(store: BatchStore, *named: str) -> Any:
        for batch in store.newest(dialect):
            store.delete(batch)
        return find(store, *named)

    monkeypatch.setattr(BatchStore, "find", deleted)
    ends = [await gateway.end_of(one) for one in ids]
    assert {end["status"] for end in ends} == {"succeeded"}
    assert await asked(provider.control) == {(f"Say word {n}", ""): 1 for n in range(3)}
    assert [row["outcome"] for row in await gateway.attempts(ids[0])] == ["failed", "succeeded"]


async def test_results_that_are_deleted_at_the_provider_return_their_lines(
    open_gateway: Opener,
    settings: dict[str, Any],
    provider: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = await opened(open_gateway, settings)
    file, looks = BatchStore.file, list[str]()

    def without_results(store: BatchStore, file_id: str) -> Any:
        found = file(store, file_id)
        if found is not None and found.purpose == "batch_output":
            looks.append(file_id)
            return None
        return found

    monkeypatch.setattr(BatchStore, "file", without_results)
    (job,) = await submitted(gateway, wrapped("openai", "Say hello"))
    gateway.start_worker()
    assert (await gateway.end_of(job))["status"] == "succeeded"
    assert len(looks) >= 2, "the first time it was looked for once more"
    assert await asked(provider.control) == {("Say hello", "batch"): 1, ("Say hello", ""): 1}


@pytest.mark.parametrize("changed", ["key", "list"])
async def test_a_batch_that_may_be_elsewhere_or_is_still_listed_is_waited_for(
    open_gateway: Opener,
    settings: dict[str, Any],
    provider: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    """Another key may be that of another account, whose batches are not known there."""
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"delay_ms": 1_500})
    (job,) = await submitted(gateway, wrapped("openai", "Say hello"))
    looks, find = 0, BatchStore.find

    def missing(store: BatchStore, _batch_id: str, dialect: str, words: str) -> Any:
        nonlocal looks
        looks += 1
        return find(store, "another", dialect, words)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStore, "find", missing)
        if changed == "key":
            patch.setattr(BatchStore, "newest", lambda *_: [])
            patch.setattr(provider_batches, "_digest", lambda _: token_bytes(32))
        gateway.start_worker()
        await wait_until(lambda: looks >= 5, 20, "looks at it")
        assert await is_held(gateway)
    assert (await gateway.end_of(job))["status"] == "succeeded"
    assert await asked(provider.control) == {("Say hello", "batch"): 1}
