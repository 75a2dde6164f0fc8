"""Limits of an API key, a user or a conversation: they bind all of its calls, and no others."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any
from urllib.parse import quote

import pytest

from tests.batching import begin, content, end_of, jsonl, line
from tests.commands import tidegate
from tests.gateway import Gateway, Opener
from tests.integration.batches.conftest import sdk as sdk
from tests.integration.batches.test_message_batches import claude as claude
from tests.integration.batches.test_message_batches import several
from tests.integration.realtime.test_realtime_life import talk, turn
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of, submitted
from tests.waiting import wait_until
from tidegate.policy.format import edit

MODEL = "gemini-2.5-flash"
CHAT = "/v1/chat/completions"
SOON = {"x-tidegate-deadline-ms": "900"}
WITH_KEYS = {"auth": "on", "admin_token": ADMIN_TOKEN}
Headers = dict[str, str]


def prefix_of(headers: Headers) -> str:
    return headers["Authorization"].removeprefix("Bearer tg_").partition("_")[0]


async def set_limits(gateway: Gateway, limits: dict[str, Any]) -> None:
    await gateway.services.keeper.change(edit(limits), set_by="test")
    await wait_until(lambda: limits.keys() <= gateway.services.limiter.policy.limits.keys(), 20)


async def chat(gateway: Gateway, headers: Headers, text: str = "Explain") -> tuple[int, Any, float]:
    """The status, the error, and the seconds of Retry-After."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
    url, sent = f"{gateway.url}{CHAT}", {**SOON, **headers}
    async with gateway.http.post(url, json=body, headers=sent) as response:
        error = (await response.json()).get("error")
        return response.status, error, float(response.headers.get("Retry-After", 0))


async def ended(gateway: Gateway, headers: Headers, request_id: str) -> str:
    async def end() -> str | None:
        _, body = await ask(gateway, "GET", f"/status/{request_id}?wait=5", headers)
        return None if body["status"] in ("queued", "running") else body["status"]

    found: str = await wait_until(end, 20, f"the end of {request_id}")
    return found


async def held_up(gateway: Gateway, request_id: str, limit: str) -> str:
    """The sentence of `why`, once the job waits for the limit."""

    async def reason() -> str | None:
        _, found = await ask(gateway, "GET", f"/admin/why/{request_id}", AS_ADMIN)
        return found["sentence"] if found.get("held_up_by") == limit else None

    sentence: str = await wait_until(reason, 20, f"{request_id} waits for {limit}")
    return sentence


async def test_a_key_at_its_rate_is_refused_early_while_another_of_its_tenant_goes_on(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, **WITH_KEYS)
    one, other = await key_of(gateway, "acme"), await key_of(gateway, "acme")
    limit = f"rpm:key/{prefix_of(one)}"
    await set_limits(gateway, {limit: 2})
    assert [(await chat(gateway, one))[0] for _ in range(2)] == [200, 200]
    status, error, after_s = await chat(gateway, one)
    assert (status, error["limit"]) == (429, limit)
    assert error["message"].startswith(f"Limit {limit} is used up (2 of 2 requests a minute)")
    assert 50 < after_s < 65, "refused early, with the time until there is room"
    assert [(await chat(gateway, other))[0] for _ in range(4)] == [200] * 4
    streamed = await ask(
        gateway, "POST", "/stream", one, {"text": "Explain", "deadline_ms": 20_000}
    )
    assert (streamed[0], streamed[1]["code"]) == (429, "limit_used_up")


@pytest.mark.parametrize("name", ["ann", "Änne Muster/4|x, *50%"])
async def test_a_user_at_its_rate_is_refused_and_no_other_tenant_s_of_that_name(
    open_gateway: Opener, name: str
) -> None:
    gateway = await open_gateway(worker=False, **WITH_KEYS)
    acme, other = await key_of(gateway, "acme"), await key_of(gateway, "other")
    ann = {"x-tidegate-subject": name}
    limit = f"rpm:user/acme/{quote(name, safe='')}"
    await set_limits(gateway, {limit: 2})
    assert [(await chat(gateway, other | ann))[0] for _ in range(3)] == [200] * 3
    assert [(await chat(gateway, acme | ann))[0] for _ in range(2)] == [200, 200]
    status, error, _ = await chat(gateway, acme | ann)
    assert (status, error["limit"]) == (429, limit)
    streamed = {"text": "Explain", "subject": name, "deadline_ms": 10_000}
    assert (await ask(gateway, "POST", "/stream", acme, streamed))[0] == 429
    assert (await chat(gateway, acme | {"x-tidegate-subject": "bob"}))[0] == 200
    assert (await chat(gateway, acme))[0] == 200
    view = (await gateway.services.limiter.snapshot()).limits[limit]
    assert view.used == 2, "other tenants take nothing of it"


async def test_calls_of_a_user_and_of_a_conversation_wait_for_each_other_alone(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, **WITH_KEYS)
    acme = await key_of(gateway, "acme")
    await set_limits(gateway, {"user:acme/ann": 1, "conversation:acme/c1": 1})
    await gateway.upstream.set_fault("hang", match="hold it")
    ann, talk_1 = acme | {"x-tidegate-subject": "ann"}, acme | {"x-tidegate-conversation": "c1"}
    for number, (held, limit) in enumerate(
        ((ann, "user:acme/ann"), (talk_1, "conversation:acme/c1"))
    ):
        holding = asyncio.create_task(chat(gateway, held, f"hold it {number}"))
        await gateway.in_flight(1)
        status, error, _ = await chat(gateway, held)
        assert (status, error["limit"]) == (429, limit)
        assert (await chat(gateway, acme))[0] == 200
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        await gateway.in_flight(0)


@pytest.mark.parametrize("wrapped", [False, True])
async def test_jobs_of_a_key_or_user_wait_for_it_while_others_end(
    open_gateway: Opener, wrapped: bool
) -> None:
    gateway = await open_gateway(**WITH_KEYS)
    one, other = await key_of(gateway, "acme"), await key_of(gateway, "acme")
    of_key = f"rpm:key/{prefix_of(one)}"
    await set_limits(gateway, {of_key: 2, "rpm:user/acme/ann": 1})

    def job(**more: Any) -> dict[str, Any]:
        if not wrapped:
            return {"data": "Explain", "type": "text_only", **more}
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Explain"}]}
        return {"endpoint": CHAT, "body": body, **more}

    for _ in range(2):
        assert await ended(gateway, one, await submitted(gateway, one, **job())) == "succeeded"
    waits = await submitted(gateway, one, **job())
    sentence = await held_up(gateway, waits, of_key)
    assert of_key in sentence
    shown = await tidegate(gateway, "why", waits)
    assert (shown.code, of_key in shown.said) == (0, True)
    for _ in range(3):
        assert await ended(gateway, other, await submitted(gateway, other, **job())) == "succeeded"

    mine = job(subject="ann")
    assert await ended(gateway, other, await submitted(gateway, other, **mine)) == "succeeded"
    of_ann = await submitted(gateway, other, **mine)
    await held_up(gateway, of_ann, "rpm:user/acme/ann")
    assert await ended(gateway, other, await submitted(gateway, other, **job())) == "succeeded"
    await set_limits(gateway, {of_key: 50, "rpm:user/acme/ann": 50})
    assert await ended(gateway, one, waits) == "succeeded"
    assert await ended(gateway, other, of_ann) == "succeeded"


async def test_lines_of_a_key_s_batch_and_its_realtime_sessions_are_bound_too(
    open_gateway: Opener, sdk: Any
) -> None:
    gateway = await open_gateway(worker=False, first_byte_timeout_ms=5_000, **WITH_KEYS)
    one, other = await key_of(gateway, "acme"), await key_of(gateway, "acme")
    prefix = prefix_of(one)
    limits = {"kind:realtime": 9, f"key:{prefix}": 1, f"rpm:key/{prefix}": 3}
    await set_limits(gateway, limits)
    async with talk(gateway, headers=one | SOON) as socket:
        await turn(socket, "hello")
        status, error, _ = await chat(gateway, one)
        assert (status, error["limit"]) == (429, f"key:{prefix}")
        async with talk(gateway, headers=other) as at_ease:
            assert (await turn(at_ease, "hello"))["response"]["status"] == "completed"
        await turn(socket, "hello")
        await turn(socket, "hello")
        error = (await turn(socket, "hello", "error"))["error"]
        assert error["limit"] == f"rpm:key/{prefix}"

    await set_limits(gateway, {f"key:{prefix}": 1, f"rpm:key/{prefix}": 1_000})
    await gateway.upstream.set_fault("hang", match="hold it")
    client = sdk(gateway, "acme", api_key=one["Authorization"].removeprefix("Bearer "))
    batch = await begin(client, jsonl([line(f"id-{n}", f"hold it {n}") for n in range(3)]))
    gateway.start_worker()
    await gateway.in_flight(1)
    await held_up(gateway, batch.id, f"key:{prefix}")
    assert (await gateway.upstream.stats()).in_flight == 1
    assert (await chat(gateway, other))[0] == 200
    await gateway.upstream.clear_faults()
    await client.batches.cancel(batch.id)
    await end_of(client, batch)


async def test_a_person_sets_and_sees_them_and_a_removed_tenant_takes_them_along(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, **WITH_KEYS)
    acme, other = await key_of(gateway, "acme"), await key_of(gateway, "other")
    of_key, of_other = f"rpm:key/{prefix_of(acme)}", f"key:{prefix_of(other)}"
    done = await tidegate(
        gateway, "limits", "set", f"{of_key}=7", "user:acme/ann=2", f"{of_other}=4"
    )
    assert (done.code, done.complained) == (0, "")
    path = f"/admin/limits/{quote('tpm:user/acme/Bob%20Smith', safe='')}"
    body = {"limit": 900, "by": "ann"}
    assert (await ask(gateway, "PUT", path, AS_ADMIN, body))[0] == 200
    for wrong, said in (
        ("user:ann=2", "must be user:<tenant>/<user>"),
        ("rpm:user/acme/*=2", "budget with `each`"),
        (f"key:{acme['Authorization'].removeprefix('Bearer ')}=2", "by its prefix alone"),
    ):
        refused = await tidegate(gateway, "limits", "set", wrong)
        assert (refused.code, said in refused.complained) == (2, True), refused.complained
    shown = await tidegate(gateway, "limits", "show")
    for line_of in (of_key, "user:acme/ann", "tpm:user/acme/Bob%20Smith", of_other):
        assert line_of in shown.said
    assert "7 requests a minute" in shown.said

    assert (await ask(gateway, "DELETE", "/admin/tenants/acme", AS_ADMIN))[0] == 200
    _, page = await ask(gateway, "GET", "/admin/limits", AS_ADMIN)
    left = [one["limit"] for one in page["limits"] if "kind:" not in one["limit"]]
    assert left == [of_other]


def one_a_minute(limits: int, began: float) -> range:
    """How many calls may be made at limits of one a minute: a busy machine takes minutes."""
    return range(limits, limits * (1 + int(time.monotonic() - began) // 60) + 1)


@pytest.mark.parametrize("names", [[""], ["ann"], ["ann", "bob"]])
async def test_many_jobs_at_a_callers_own_limit_leave_room_for_its_tenants_others(
    open_gateway: Opener, names: list[str]
) -> None:
    """Of a key, or of users with it. A worker has twice the limit of a type, and two: half of these
    at least wait for such limits, and as many others have room beside them."""
    gateway = await open_gateway(worker=False, **WITH_KEYS)
    one, other = await key_of(gateway, "acme"), await key_of(gateway, "acme")
    own = [f"user/acme/{name}" if name else f"key/{prefix_of(one)}" for name in names]
    await set_limits(gateway, {"kind:text_only": 2} | {f"rpm:{which}": 1 for which in own})
    texts = {"data": "Explain", "type": "text_only"}
    for name in names:
        more = {"subject": name} if name else {}
        for _ in range(20):
            await submitted(gateway, one, **texts, **more)
    began = time.monotonic()
    gateway.start_worker()

    async def waiting() -> int:
        snapshot = await gateway.services.limiter.snapshot()
        return sum(queue.waiting for queue in snapshot.queues)

    async def is_half_full() -> bool:
        calls = len(await gateway.calls())
        return calls in one_a_minute(len(names), began) and await waiting() >= 3

    await wait_until(is_half_full, 40, "jobs that wait for these limits, many more behind them")
    free = [await submitted(gateway, other, **texts) for _ in range(4)]
    for request_id in free:
        assert await ended(gateway, other, request_id) == "succeeded"
    assert len(await gateway.calls()) - len(free) in one_a_minute(len(names), began)
    assert await waiting() <= 12


@pytest.mark.parametrize(
    ("form", "what", "callers"),
    [("batches", "key", 1), ("batches", "tenant", 2), ("message batches", "key", 2)],
)
async def test_many_lines_at_a_callers_own_limit_leave_room_for_other_batches(
    open_gateway: Opener, sdk: Any, claude: Any, form: str, what: str, callers: int
) -> None:
    """A worker has 128 lines, and as many beside where all of them wait for such limits."""
    gateway = await open_gateway(worker=False, **WITH_KEYS)
    tenants = ["acme"] * 3 if what == "key" else ["acme", "globex", "other"]
    keys = [await key_of(gateway, one) for one in tenants]
    names = list(map(prefix_of, keys)) if what == "key" else tenants
    await set_limits(gateway, {f"rpm:{what}/{name}": 1 for name in names[:callers]})

    async def batch(of: Headers, count: int) -> Any:
        key = of["Authorization"].removeprefix("Bearer ")
        if form == "batches":
            return await begin(sdk(gateway, api_key=key, default_headers={}), content(count))
        return await claude(gateway, of).messages.batches.create(requests=several(count))

    async def waiting() -> int:
        snapshot = await gateway.services.limiter.snapshot()
        return sum(queue.waiting for queue in snapshot.queues)

    async def are_called(count: int, waits: int) -> bool:
        calls = len(await gateway.calls())
        return calls in one_a_minute(count, began) and await waiting() >= waits

    held, began = [], time.monotonic()
    gateway.start_worker()
    for number, key in enumerate(keys[:callers], 1):
        held += [await batch(key, 150), await batch(key, 150)]
        full = partial(are_called, number, 127 * number)
        await wait_until(full, 30, "as many that wait as a worker takes")
    free = await batch(keys[-1], 200)
    await wait_until(partial(has_ended, gateway, free), 30, "the other batch")
    assert len(await gateway.calls()) - 200 in one_a_minute(callers, began)
    assert await waiting() <= 256
    assert not any([await has_ended(gateway, one) for one in held])


async def has_ended(gateway: Gateway, batch: Any) -> bool:
    """Whether a batch of either form has."""
    query = "SELECT status = 'completed' FROM batches WHERE id = $1::uuid"
    return bool(await gateway.database.fetchval(query, batch.id.rpartition("_")[2]))
