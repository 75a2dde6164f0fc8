"""Jobs that wrap a native call with a large body: one that is kept as a file, not in the row."""

from __future__ import annotations

import asyncio
import shutil
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask
from tidegate.call import ANYBODY
from tidegate.dialects.parsing import parsed
from tidegate.emulator.server import run_emulator
from tidegate.errors import InvalidRequest

PATH = "/v1/chat/completions"


def picture_call(size_bytes: int, text: str = "What is in it?", seed: int = 1) -> dict[str, Any]:
    """A chat completion about a picture of that size."""
    url = "data:image/png;base64," + b64encode(Random(seed).randbytes(size_bytes)).decode()
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": parts}]}


async def submitted(
    gateway: Gateway, body: dict[str, Any], key: str = "", **more: Any
) -> tuple[int, dict[str, Any]]:
    given = {"endpoint": PATH, "body": body} | more
    headers = {"Idempotency-Key": key} if key else {}
    url = f"{gateway.url}/submit"
    async with gateway.http.post(url, headers=headers, json=given) as response:
        return response.status, orjson.loads(await response.read())


def blobs(gateway: Gateway) -> list[Path]:
    folder = gateway.config.data_dir / "blobs"
    return [path for path in folder.rglob("*") if path.is_file()]


async def rows_of(gateway: Gateway) -> int:
    count: int = await gateway.database.fetchval("SELECT count(*) FROM requests")
    return count


@asynccontextmanager
async def tapped() -> AsyncIterator[tuple[str, list[bytes]]]:
    """An emulator's URL, and the bodies that come to it."""
    seen: list[bytes] = []
    async with run_emulator() as emulator, aiohttp.ClientSession() as http:

        async def pass_on(request: web.Request) -> web.Response:
            seen.append(await request.read())
            headers = {name: request.headers[name] for name in ("Content-Type", "Authorization")}
            url = emulator.url + request.path_qs
            async with http.request(request.method, url, data=seen[-1], headers=headers) as answer:
                return web.Response(
                    body=await answer.read(),
                    status=answer.status,
                    content_type=answer.content_type,
                )

        app = web.Application(client_max_size=30_000_000)
        app.router.add_route("*", "/{path:.*}", pass_on)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
        finally:
            await runner.cleanup()


async def test_a_call_with_a_picture_goes_from_submit_to_its_answer(open_gateway: Opener) -> None:
    body = picture_call(3_000_000) | {"seed": 12345678901234567890}
    async with tapped() as (url, seen):
        gateway = await open_gateway(gemini_base_url=url, admin_token=ADMIN_TOKEN, worker=False)
        status, accepted = await submitted(gateway, body)
        assert (status, accepted["type"]) == (202, "multi_modal")
        request_id = accepted["request_id"]
        assert gateway.services.bodies.held_bytes == 0
        prompt = await gateway.database.fetchval("SELECT prompt FROM requests")
        with pytest.raises(InvalidRequest):  # what an older worker would send in its place
            parsed(prompt.encode())
        gateway.start_worker()
        record = await gateway.end_of(request_id)
        assert (record["status"], record["attempts"]) == ("succeeded", 1)
        assert record["answer"]["choices"]
        assert [orjson.loads(one) for one in seen] == [body]

        (file,) = record["files"]
        assert (file["name"], file["mime_type"]) == ("body.json", "application/json")
        async with gateway.http.get(gateway.url + file["url"]) as response:
            assert await response.read() == seen[0]
        request = (await gateway.audit(request_id))["request"]
        assert (request["endpoint"], len(request["files"])) == (PATH, 1)
        assert request["files"][0]["file_id"] in file["url"]

        path = f"/admin/requests/{request_id}"
        view = (await ask(gateway, "GET", path, AS_ADMIN))[1]["request"]
        assert view["prompt"] == seen[0].decode()[: len(view["prompt"])]
        assert len(view["prompt"]) < view["prompt_chars"] == len(seen[0])
        status, anew = await ask(gateway, "POST", f"{path}/retry", AS_ADMIN, {})
        assert status == 202
        assert (await gateway.end_of(anew["request_id"]))["status"] == "succeeded"
        assert seen[1] == seen[0]
        assert len(blobs(gateway)) == 2


async def test_what_is_too_large_is_refused(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    status, problem = await submitted(gateway, picture_call(15_100_000))
    assert (status, problem["field"]) == (413, "body")
    assert "20000000 bytes" in problem["allowed"]
    # A prompt has its own bound still.
    payload = {"data": "x" * 3_000_000}
    async with gateway.http.post(f"{gateway.url}/submit", json=payload) as response:
        problem = await response.json(content_type=None)
    assert (response.status, problem["field"]) == (413, "body")
    assert "2465536 bytes" in problem["allowed"]
    many = {"model": "m", "messages": [], "x": [[]] * 300_000}
    status, problem = await submitted(gateway, many)
    assert (status, problem["allowed"]) == (413, "at most 500000 values")
    assert (gateway.services.bodies.held_bytes, await rows_of(gateway)) == (0, 0)
    assert blobs(gateway) == []


async def test_what_a_process_holds_of_them_is_bounded(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, max_body_bytes=600_000, max_held_bytes=800_000)
    others = gateway.services.hold(ANYBODY)
    others.reach(500_000)
    body = picture_call(300_000)
    status, problem = await submitted(gateway, body)
    assert (status, problem["code"], problem["limit"]) == (503, "queue_full", "MAX_HELD_BYTES")
    assert problem["retry_after_ms"] == 1_000
    assert gateway.services.bodies.held_bytes == 500_000
    others.release()
    assert (await submitted(gateway, body))[0] == 202
    assert gateway.services.bodies.held_bytes == 0


async def test_the_same_again_is_the_same_job(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    body = picture_call(500_000)
    both = await asyncio.gather(*(submitted(gateway, body, "order-17") for _ in range(2)))
    again = await submitted(gateway, body, "order-17")
    assert {status for status, _ in (*both, again)} == {202}
    assert len({answer["request_id"] for _, answer in (*both, again)}) == 1
    assert (await submitted(gateway, picture_call(500_000, seed=2), "order-17"))[0] == 409
    assert (len(blobs(gateway)), await rows_of(gateway)) == (1, 1)


async def test_erasing_takes_the_body_along(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    status, _ = await submitted(gateway, picture_call(500_000), subject="ann")
    assert (status, len(blobs(gateway))) == (202, 1)
    status, report = await ask(gateway, "DELETE", "/admin/subjects/ann", {})
    assert (status, report["requests"], report["done"]) == (200, 1, True)
    assert (blobs(gateway), await rows_of(gateway)) == ([], 0)


async def test_the_blob_store_away_or_the_body_gone(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    body = picture_call(500_000)
    _, accepted = await submitted(gateway, body)
    folder = gateway.config.data_dir / "blobs"
    shutil.rmtree(folder)
    folder.write_text("no folder")
    status, problem = await submitted(gateway, body)
    assert (status, problem["code"]) == (503, "store_unavailable")
    assert await rows_of(gateway) == 1
    folder.unlink()
    folder.mkdir()
    gateway.start_worker()
    record = await gateway.end_of(accepted["request_id"])
    assert (record["status"], record["error"]["code"]) == ("failed", "not_found")
    assert "body of this call" in record["error"]["message"]
    assert await gateway.calls() == []


async def test_a_worker_holds_few_of_them_and_makes_all_the_calls(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, max_held_bytes=1_500_000)
    await gateway.upstream.set_behaviour(first_byte_ms=100)
    taken = [await submitted(gateway, picture_call(200_000, seed=seed)) for seed in range(4)]
    gateway.start_worker()
    for _, accepted in taken:
        assert (await gateway.end_of(accepted["request_id"]))["status"] == "succeeded"
    assert (await gateway.upstream.stats())["multi_modal"].max_in_flight == 1
