"""What is out or paused is so in all processes together, and for nobody else."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from uuid import uuid4

import orjson
import pytest
from structlog.testing import capture_logs

from tests.gateway import Gateway, Opener
from tests.integration.native.conftest import MODEL
from tests.integration.security.hostile import Hostile, hostile, one_try
from tests.waiting import wait_until
from tidegate.admission.demand import CallDemand
from tidegate.errors import (
    LeaseLost,
    LimitPaused,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)
from tidegate.limiter import Adaptive, Concurrency, Demand, Limiter, PoolPolicy
from tidegate.policy.inspection import Control
from tidegate.spine import routing
from tidegate.spine.routing import (
    DRAINED,
    FAULTS,
    FIRST_PAUSE_MS,
    LONGEST_DOUBT_S,
    Gate,
    Suspect,
)
from tidegate.telemetry.logging import Log

__all__ = ["hostile", "one_try"]

OTHER = "gemini-2.5-pro"
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
Answer = tuple[int, dict[str, str], bytes]


def refusal(status: int, message: str, *lines: str) -> bytes:
    body = orjson.dumps({"error": {"code": status, "message": message}})
    head = "\r\n".join((f"HTTP/1.1 {status} No", f"content-length: {len(body)}", *lines))
    return head.encode() + b"\r\n\r\n" + body


async def ask(
    gateway: Gateway, text: str = "hello", model: str = MODEL, deadline_ms: int = 30_000
) -> Answer:
    url = f"{gateway.url}/v1beta/models/{model}:generateContent"
    body = {"contents": [{"parts": [{"text": text}]}]}
    headers = {"x-tidegate-deadline-ms": str(deadline_ms)}
    async with gateway.http.post(url, json=body, headers=headers) as response:
        named = {name.lower(): value for name, value in response.headers.items()}
        return response.status, named, await response.read()


@pytest.fixture
async def pair(open_gateway: Opener, hostile: Hostile) -> list[Gateway]:
    """Two processes' worth of gateway over one pool."""
    return [await open_gateway(worker=False, gemini_base_url=hostile.url) for _ in range(2)]


def states(pair: list[Gateway]) -> list[str]:
    return [gateway.services.spine.health["gemini"].state for gateway in pair]


@pytest.mark.usefixtures("one_try")
async def test_an_upstream_that_is_out_for_one_process_is_out_for_all_and_comes_back_for_all(
    pair: list[Gateway], hostile: Hostile
) -> None:
    hostile.answer = refusal(503, "no server")
    for number in range(FAULTS):
        assert (await ask(pair[0], str(number)))[0] == 503
    await wait_until(lambda: states(pair).count("ok") == 0, what="both know of it")
    seen = len(hostile.seen)
    # They wait at the gate, in both processes; one of them tries, and its success lets all pass.
    hostile.answer = OK
    answers = await asyncio.gather(*(ask(pair[n % 2], f"then {n}") for n in range(8)))
    assert [status for status, _, _ in answers] == [200] * 8
    assert len(hostile.seen) == seen + 8
    await wait_until(lambda: states(pair) == ["ok", "ok"], what="it is back for both")


@pytest.mark.usefixtures("one_try")
async def test_one_call_of_all_processes_tries_and_the_others_wait_or_are_told_when(
    pair: list[Gateway], hostile: Hostile
) -> None:
    hostile.answer = refusal(503, "no server")
    for number in range(FAULTS):
        await ask(pair[0], str(number))
    await wait_until(lambda: states(pair).count("ok") == 0, what="both know of it")
    seen = len(hostile.seen)
    answers = await asyncio.gather(
        *(ask(pair[n % 2], f"then {n}", deadline_ms=2_500) for n in range(10))
    )
    tried = len(hostile.seen) - seen
    assert 1 <= tried <= 2, "after 1 s, and 2 s after that had failed"
    out = [body for status, named, body in answers if b"no upstream takes calls now" in body]
    assert len(out) == 10 - tried
    assert {status for status, _, _ in answers} == {503}
    assert all(int(named["retry-after"]) >= 1 for _, named, body in answers if body in out)


async def test_a_try_of_a_process_that_dies_is_not_the_last(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    limiter, name = gateway.services.limiter, "upstream:gemini"
    await limiter.close_gate(name, for_ms=100, most_ms=8_000, tried=False)
    url = gateway.services.config.redis_url
    assert url is not None
    dying = Limiter.from_url(
        url.get_secret_value(), pool=limiter.pool, policy=limiter.policy, instance_id="dying"
    )
    tries = asyncio.Event()

    async def hold() -> None:
        with suppress(LeaseLost):
            async with dying.acquire_for(Demand(("kind:text_only", name), implicit=True)):
                tries.set()
                await asyncio.Event().wait()

    async with dying:
        holding = asyncio.create_task(hold())
        await tries.wait()
        waits = asyncio.create_task(ask(gateway))
        waiting = lambda: limiter.local_state().waiters == 1  # noqa: E731
        await wait_until(waiting, what="it waits for the other's try")
        await limiter.revoke("dying")  # what its lease's end does
        assert (await waits)[0] == 200
        assert gateway.services.spine.health["gemini"].state == "ok"
        await holding


@pytest.mark.usefixtures("one_try")
async def test_a_try_that_is_not_answered_holds_up_no_other(
    pair: list[Gateway], hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "PROBE_S", 0.01)
    limiter = pair[0].services.limiter
    await limiter.close_gate(
        "upstream:gemini", for_ms=100, most_ms=8_000, tried=False, reason="no server"
    )
    released = asyncio.Event()

    async def hang(writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.write(OK)
        await writer.drain()

    hostile.answer = hang
    hangs = asyncio.create_task(ask(pair[0], "hangs"))
    await wait_until(lambda: len(hostile.seen) == 1, what="it tries")
    hostile.answer = OK
    assert (await ask(pair[1], "then", deadline_ms=5_000))[0] == 200, "10 minutes later, else"
    await wait_until(lambda: states(pair) == ["ok", "ok"], what="it is back for both")
    released.set()
    assert (await hangs)[0] == 200


async def test_a_try_that_goes_on_after_its_answer_has_no_part_in_the_next_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "PROBE_S", 0.05)
    async with Limiter.from_url("memory://", pool=uuid4().hex, policy={}) as limiter:
        gate, others = Gate("of-this-test", limiter), asyncio.all_tasks()
        close = partial(limiter.close_gate, gate.limit, for_ms=10_000, most_ms=60_000, tried=False)
        await close()
        with gate.trying():
            passing_on = [one for one in asyncio.all_tasks() - others if "_pass_on" in repr(one)]
            await gate.worked(MODEL, tried=True)
            await close()
            await asyncio.gather(*passing_on)
            found = (await limiter.snapshot()).limits[gate.limit]
        assert len(passing_on) == 1
        assert 0 < found.paused_ms <= 10_000, "its own tries decide how long it lasts"


@pytest.mark.usefixtures("one_try")
async def test_a_dead_key_is_tried_once_a_minute_and_by_another_key_immediately(
    open_gateway: Opener, hostile: Hostile
) -> None:
    hostile.answer = refusal(401, "Incorrect API key provided")
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    assert (await ask(gateway))[0] == 502
    status, named, body = await ask(gateway)
    assert (status, len(hostile.seen)) == (503, 1)
    assert b"rejects this gateway's API key" in body
    assert 30 < int(named["retry-after"]) <= 60
    hostile.answer = OK
    other = await open_gateway(
        worker=False, gemini_base_url=hostile.url, gemini_api_key="AIzaAnotherKeyOfTheAccount"
    )
    assert (await ask(other))[0] == 200
    health = gateway.services.spine.health["gemini"]
    await wait_until(lambda: health.state == "ok", what="the other key worked")
    assert not health.key_dead


async def test_an_upstream_that_refuses_calls_without_a_key_is_not_said_to_have_one() -> None:
    refused, suspect = UpstreamUnauthorized("Unauthorized", of_key=True), Suspect(None, 1)
    async with Limiter.from_url("memory://", pool=uuid4().hex, policy={}) as limiter:
        gate, same = (Gate("of-this-test", limiter) for _ in range(2))
        await gate.failed(refused, MODEL, suspect=suspect, tried=False)
        paused = (await limiter.snapshot()).limits[gate.limit].paused_by
        assert ("key none: " in paused, gate.key_dead, same.key_dead) == (True, True, True)
        assert Gate("of-this-test", limiter, "a key").closed() is None, "another key may be valid"


async def test_an_account_without_money_is_not_taken_for_a_refused_key(
    pair: list[Gateway], hostile: Hostile
) -> None:
    """In both processes, of which one alone has called the provider."""
    hostile.answer = refusal(402, "Payment is due")
    assert (await ask(pair[0]))[0] == 502
    await wait_until(lambda: states(pair) == ["out", "out"], what="both know it")
    for gateway in pair:
        _, body = await gateway.get("/health/dependencies")
        causes = [one for one in body["verdict"]["causes"] if one["kind"] == "key_refused"]
        assert [one["words"] for one in causes] == [
            "The account of upstream gemini has no credit left."
        ]


@pytest.mark.usefixtures("one_try")
async def test_an_old_fault_of_a_process_is_not_what_closed_a_gate(
    pair: list[Gateway], hostile: Hostile
) -> None:
    """Neither when another process closed it, nor when an operator drained it."""
    hostile.answer = refusal(500, "boom")
    assert (await ask(pair[0]))[0] >= 500
    health = pair[0].services.spine.health["gemini"]
    assert "boom" in health.why
    hostile.answer = refusal(402, "Payment is due")
    assert (await ask(pair[1]))[0] == 502
    await wait_until(lambda: states(pair) == ["out", "out"], what="both know it")
    assert health.why == "the account at the provider has no credit left"
    assert "Payment is due" in pair[1].services.spine.health["gemini"].why
    health.drain(True)
    assert health.why == DRAINED


async def test_a_person_opens_a_gate_by_ending_its_pause(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    limiter = gateway.services.limiter
    await limiter.close_gate("upstream:gemini", for_ms=60_000, most_ms=60_000, tried=False)
    assert (await ask(gateway, deadline_ms=500))[0] == 503
    services = gateway.services
    store = services.store
    control = Control(services.keepers["gemini"], store.running_calls, store.tenants)
    shown = {one.limit: one for one in (await control.overview()).limits}
    assert shown["upstream:gemini"].paused_ms > 0
    assert await control.resume("upstream:gemini", by="somebody")
    assert (await ask(gateway))[0] == 200


async def test_a_429_of_one_model_pauses_that_model_alone_in_all_processes(
    pair: list[Gateway], hostile: Hostile
) -> None:
    exotic = "gemini-exotic"
    hostile.answer = refusal(429, "Quota exceeded", "retry-after: 500")
    status, _, body = await ask(pair[0], model=exotic)
    assert (status, b"Quota exceeded" in body) == (429, True)
    hostile.answer = OK
    seen = len(hostile.seen)
    for gateway in pair:
        await wait_until(lambda g=gateway: g.services.limiter.has_pauses)  # type: ignore[misc]
        status, named, body = await ask(gateway, model=exotic)
        assert (status, b"paused" in body) == (429, True)
        assert 400 < int(named["retry-after"]) <= 500
    assert len(hostile.seen) == seen
    for gateway in pair:
        assert (await ask(gateway, model=OTHER))[0] == 200
        assert (await ask(gateway))[0] == 200
    assert set((await pair[0].services.limiter.snapshot()).limits) >= {f"model:{exotic}"}
    assert pair[0].services.limiter.paused_ms(("kind:text_only",)) == 0


async def test_a_429_without_a_time_slows_down_more_and_more(
    open_gateway: Opener, hostile: Hostile
) -> None:
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    hostile.answer = refusal(429, "Slow down")
    answers = await asyncio.gather(
        *(ask(gateway, str(number), deadline_ms=3_000) for number in range(20))
    )
    assert {status for status, _, _ in answers} == {429}
    assert gateway.services.spine.health["gemini"].state == "ok", "a throttling is no fault"
    # 5 at once, then those that come back one by one after 0.5, 1 and 2 s.
    assert len(hostile.seen) <= 35
    hostile.answer = OK
    assert (await ask(gateway, "later"))[0] == 200


async def test_calls_that_are_refused_in_one_moment_slow_down_once(open_gateway: Opener) -> None:
    gate = (await open_gateway(worker=False)).services.spine.health["gemini"]
    refused, demand = UpstreamThrottled("Slow down"), CallDemand((), "default", "normal", 0)
    with capture_logs() as logs:
        throttled = (gate.throttled(refused, MODEL, demand) for _ in range(8))
        pauses_ms = await asyncio.gather(*throttled)
    assert 0 < min(pauses_ms) <= max(pauses_ms) == FIRST_PAUSE_MS
    paused = [line for line in logs if line["event"] == Log.LIMIT_PAUSED]
    assert [(line["by"], line["reason"]) for line in paused] == [("gemini", "Slow down")]


async def test_one_pause_is_one_line_in_the_log_and_a_much_longer_one_another(
    open_gateway: Opener,
) -> None:
    """Also where the provider states the time, of which each refusal has a little less left."""
    limiter, now = (await open_gateway(worker=False)).services.limiter, 0.0
    gate, demand = Gate("gemini", limiter, clock=lambda: now), CallDemand((), "t", "normal", 0)

    async def refused(number: int, after_ms: int) -> None:
        words = f"Try again in {after_ms} ms"
        error = UpstreamThrottled(words, retry_after_ms=after_ms + number, of_account=True)
        await gate.throttled(error, MODEL, demand)

    with capture_logs() as logs:
        await asyncio.gather(*(refused(number, 9_000) for number in range(8)))
        now = 5.0
        await refused(0, 90_000)
        await asyncio.gather(*(refused(number, 90_000) for number in range(8)))
        now = 100.0
        await refused(0, 180_000)
    paused = [line["for_ms"] for line in logs if line["event"] == Log.LIMIT_PAUSED]
    assert [round(for_ms, -3) for for_ms in paused] == [9_000, 90_000, 180_000]


@pytest.mark.parametrize(
    ("phase", "state"), [("first_byte", "ok"), ("idle", "ok"), ("total", "ok"), ("connect", "out")]
)
async def test_that_our_patience_ends_is_no_fault_of_the_upstream(
    open_gateway: Opener, phase: str, state: str
) -> None:
    """But that it cannot be reached is one."""
    gate = (await open_gateway(worker=False)).services.spine.health["gemini"]
    for number in range(2 * FAULTS):
        late = UpstreamTimeout("too long", phase=phase)
        await gate.failed(late, MODEL, suspect=Suspect(f"t-{number}", number), tried=False)
    assert gate.state == state


@pytest.mark.parametrize("of_account", [False, True])
async def test_an_answer_begins_the_pauses_again(open_gateway: Opener, of_account: bool) -> None:
    """Those of the account as well: refusals without a time paused it for 8 s each in the end."""
    gate = (await open_gateway(worker=False)).services.spine.health["gemini"]
    refused = UpstreamThrottled("Slow down", of_account=of_account)
    demand = CallDemand((), "default", "normal", 0)
    assert await gate.throttled(refused, MODEL, demand) == FIRST_PAUSE_MS
    await gate.worked(MODEL, tried=False)
    assert not gate.has_doubts


async def test_a_refusal_that_lowers_an_adaptive_limit_pauses_nothing_else(
    open_gateway: Opener,
) -> None:
    """A second one before any answer does: it may be about something else."""
    url = (await open_gateway(worker=False)).services.config.redis_url
    assert url is not None
    policy = PoolPolicy({"kind:text_only": Concurrency(40, adaptive=Adaptive(minimum=2))})
    refused, demand = (
        UpstreamThrottled("x"),
        CallDemand(("kind:text_only",), "default", "normal", 0),
    )
    async with Limiter.from_url(url.get_secret_value(), pool=uuid4().hex, policy=policy) as limiter:
        gate = Gate("of-this-test", limiter)
        assert await gate.throttled(refused, MODEL, demand) == 0
        assert await gate.throttled(refused, MODEL, demand) > 0


async def test_what_clients_name_does_not_grow_the_record(
    open_gateway: Opener, hostile: Hostile
) -> None:
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    limiter = gateway.services.limiter
    hostile.answer = refusal(429, "Quota exceeded", "retry-after-ms: 1")
    for number in range(5):
        odd = f"%7Bodd%7D%20{number}-{uuid4().hex}"
        assert (await ask(gateway, model=odd, deadline_ms=50))[0] in (404, 429)

    async def forgotten() -> bool:
        raw = await limiter._link.command(("HKEYS", limiter._keys.meta), 5.0)
        return not [name for name in raw if b":model:" in name]

    await wait_until(forgotten, what="nothing of them is left")
    assert not [name for name in limiter._issuer.wait_ewma_ms if name.startswith("model:")]


async def test_faults_of_an_upstream_that_is_out_are_laid_to_it_for_a_day(
    open_gateway: Opener,
) -> None:
    limiter, now = (await open_gateway(worker=False)).services.limiter, [0.0]
    gate = Gate("of-this-test", limiter, clock=lambda: now[0])

    async def fail(request: int) -> bool:
        error = UpstreamUnavailable("an internal error", status=500)
        await gate.failed(error, MODEL, suspect=Suspect(None, request), tried=False)
        return error.of_upstream

    assert [await fail(request) for request in range(FAULTS)] == [False] * (FAULTS - 1) + [True]
    now[0] += LONGEST_DOUBT_S - 1
    assert await fail(0)
    now[0] += 1
    assert not await fail(0), "or what fails by its own doing would be called for ever"
    await gate.open()
    assert [await fail(request) for request in range(FAULTS)][-1], "another outage"


async def test_a_refusal_names_the_limit_that_is_paused_the_longest(open_gateway: Opener) -> None:
    services = (await open_gateway(worker=False)).services
    gate, limiter = services.spine.health["gemini"], services.limiter
    await limiter.close_gate(gate.limit, for_ms=1_000, most_ms=8_000, tried=False)
    await gate.open()  # calls come back over some seconds
    await limiter.penalise(f"model:{MODEL}", for_ms=600_000, ramp_ms=1, by="gemini")
    demand = gate.bind(CallDemand(("kind:text_only",), "default", "normal", 0), MODEL)
    late = gate.late(demand, 1_000)
    assert isinstance(late, LimitPaused)
    assert late.limit == f"model:{MODEL}"
