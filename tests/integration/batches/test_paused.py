"""Batches that an operator pauses, resumes, cancels, and whose results an operator fetches."""

from __future__ import annotations

import orjson

from tests.batching import assert_all_succeeded, begin, completed, content, end_of
from tests.commands import Done, tidegate
from tests.gateway import Opener
from tests.integration.batches.conftest import MakeSdk
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of
from tests.waiting import wait_until

LINES = 60
ON = {"auth": "on", "admin_token": ADMIN_TOKEN, "rate_limits": {"text_only": 2}}
BUSY = "SELECT count(*) FROM batch_lines WHERE state IN ('claimed', 'calling')"


async def test_a_paused_batch_stands_still_until_an_operator_resumes_it(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(**ON)
    await gateway.upstream.set_behaviour(first_byte_ms=200)
    headers = await key_of(gateway, "acme")
    key = headers["Authorization"].removeprefix("Bearer ")
    client = sdk(gateway, api_key=key, default_headers={})
    batch = await begin(client, content(LINES))

    async def begun() -> bool:
        return await completed(client, batch) > 0

    await wait_until(begun, 20, "a line that has ended")
    path = f"/admin/batches/{batch.id}"
    said = {"by": "ada", "reason": "too much at noon"}
    assert (await ask(gateway, "POST", f"{path}/pause", headers, said))[0] == 403
    status, paused = await ask(gateway, "POST", f"{path}/pause", AS_ADMIN, said)
    assert (status, paused["pause"]["by"], paused["pause"]["reason"]) == (200, *said.values())

    async def still() -> bool:
        return bool(await gateway.database.fetchval(BUSY) == 0)

    await wait_until(still, 20, "a batch that stands still")
    done = await completed(client, batch)
    assert 0 < done < LINES
    assert len(await gateway.calls()) == done
    assert (await client.batches.retrieve(batch.id)).status == "in_progress"
    _, why = await ask(gateway, "GET", f"/admin/why/{batch.id}", AS_ADMIN)
    left = f"{LINES - done} of {LINES} lines left"
    assert why["sentence"] == f"is paused by ada: too much at noon; {left}"
    # Others go on beside it, and so does the pause through a second one.
    other = await begin(client, content(3))
    await assert_all_succeeded(client, await end_of(client, other), 3)
    assert (await ask(gateway, "POST", f"{path}/pause", AS_ADMIN, {"by": "bob"}))[0] == 200
    assert await completed(client, batch) == done
    _, listed = await ask(gateway, "GET", "/admin/batches?limit=1", AS_ADMIN)
    assert [one["id"] for one in listed["items"]] == [other.id]
    _, rest = await ask(gateway, "GET", f"/admin/batches?after={listed['next_after']}", AS_ADMIN)
    assert (rest["items"][0]["id"], rest["items"][0]["pause"]["by"]) == (batch.id, "bob")
    assert rest["next_after"] is None
    _, still_open = await ask(gateway, "GET", "/admin/batches?open=true&tenant=acme", AS_ADMIN)
    assert [one["id"] for one in still_open["items"]] == [batch.id]
    assert (await ask(gateway, "GET", "/admin/batches?tenant=other", AS_ADMIN))[1]["items"] == []
    await gateway.upstream.set_behaviour(first_byte_ms=1)
    assert (await ask(gateway, "POST", f"{path}/resume", AS_ADMIN, {}))[1]["pause"] is None
    await assert_all_succeeded(client, await end_of(client, batch), LINES)
    url = f"{gateway.url}{path}/results/output"
    async with gateway.http.get(url, headers=AS_ADMIN) as answer:
        assert answer.headers["Content-Disposition"].startswith("attachment")
        lines = (await answer.read()).splitlines()
    assert [orjson.loads(one)["custom_id"] for one in lines] == [f"id-{n}" for n in range(LINES)]
    assert (await ask(gateway, "GET", f"{path}/results/errors", AS_ADMIN))[0] == 404
    for verb in ("pause", "cancel"):
        assert (await ask(gateway, "POST", f"{path}/{verb}", AS_ADMIN, {}))[0] == 409
    for nothing in ("batch_x", f"batch_{'0' * 32}"):
        path = f"/admin/batches/{nothing}/cancel"
        assert (await ask(gateway, "POST", path, AS_ADMIN, {}))[0] == 404


async def test_an_operator_cancels_a_batch_of_a_tenant_while_it_is_paused(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(**ON | {"worker": False})
    key = (await key_of(gateway, "acme"))["Authorization"].removeprefix("Bearer ")
    client = sdk(gateway, api_key=key, default_headers={})
    batch = await begin(client, content(3))
    path = f"/admin/batches/{batch.id}"
    assert (await ask(gateway, "POST", f"{path}/pause", AS_ADMIN, {}))[0] == 200
    gateway.start_worker()

    async def in_progress() -> bool:
        return bool((await client.batches.retrieve(batch.id)).status == "in_progress")

    await wait_until(in_progress, 20, "its file is checked")
    status, found = await ask(gateway, "POST", f"{path}/cancel", AS_ADMIN, {"by": "ada"})
    assert (status, found.get("pause", found)) == (200, None)
    assert (await end_of(client, batch)).status == "cancelled"
    assert await gateway.calls() == []


async def test_the_commands_list_pause_resume_and_cancel_by_the_end_of_an_id(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1}, first_byte_timeout_ms=5_000)
    client = sdk(gateway)

    async def command(*words: str) -> Done:
        given = {"TIDEGATE_URL": gateway.url, "ADMIN_TOKEN": gateway.operator_key}
        return await tidegate(gateway, *words, **given)

    await gateway.upstream.set_fault("hang", match="hold it")
    held, other = [await begin(client, content(3, says="hold it {}")) for _ in range(2)]
    await gateway.in_flight(1)
    end = held.id[-12:]
    done = await command("batch", "pause", end, "--reason", "not at noon")
    assert (done.code, done.complained) == (0, "")
    assert done.said == f"{held.id} is paused: `tidegate batch resume` ends that\n"
    done = await command("batch", "list")
    row = next(line for line in done.said.splitlines() if held.id in line)
    assert "paused" in row
    assert row.rstrip().endswith(": not at noon")
    assert other.id in done.said
    done = await command("batch", "resume", held.id, "--json")
    assert orjson.loads(done.said)["pause"] is None
    for one in (held, other):
        assert (await command("batch", "cancel", one.id)).code == 0
    await gateway.upstream.clear_faults()
    for one in (held, other):
        assert (await end_of(client, one)).status == "cancelled"
    done = await command("batch", "list", "--json")
    assert orjson.loads(done.said)["items"] == []
    done = await command("batch", "list")
    assert (done.said, done.complained) == ("", "no batch is in progress\n")
    done = await command("batch", "pause", end)
    assert (done.code, done.said) == (2, "")
    assert "this batch is cancelled: it can't be paused any more" in done.complained
    done = await command("batch", "pause", "nothing")
    assert "is neither the beginning nor the end of an id of the newest batches" in done.complained
