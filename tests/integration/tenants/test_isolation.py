"""One tenant sees nothing of another's, whatever route it takes."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from socket import AF_INET, SOCK_STREAM
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.contract.names import Names
from tests.gateway import PNG, Opener, payload_of, small_receive_buffer
from tests.integration.tenants.asking import ask, key_of, submitted
from tests.waiting import wait_until
from tidegate.http import services
from tidegate.policy.format import edit
from tidegate.upstream.fetch import ImageFetcher


async def test_requests_files_and_status_are_the_owners_alone(open_gateway: Opener) -> None:
    gateway = await open_gateway(auth="on")
    acme, other = [await key_of(gateway, name) for name in ("acme", "other")]
    request_id = await submitted(gateway, acme, data="Describe this", file=PNG)
    picture_id = await submitted(gateway, acme, data="Generate an image of a fox")

    async def ended() -> bool:
        _, body = await ask(gateway, "GET", f"/status/{picture_id}?wait=5", acme)
        return bool(body["status"] == "succeeded")

    await wait_until(ended, 20, "the picture")
    _, mine = await ask(gateway, "GET", f"/status/{request_id}", acme)
    _, picture = await ask(gateway, "GET", f"/status/{picture_id}", acme)
    urls = [mine["files"][0]["url"], picture["images"][0]["url"]]
    paths = [f"/status/{request_id}", f"/status/{request_id}?wait=1", *urls]
    paths.append(f"/requests/{request_id}/why")
    for prefix in ("", "/llm"):
        for path in paths:
            assert (await ask(gateway, "GET", prefix + path, acme))[0] == 200, path
            status, problem = await ask(gateway, "GET", prefix + path, other)
            assert (status, problem["code"]) == (404, "not_found"), path
            assert "acme" not in str(problem)


async def test_a_stream_is_recorded_for_its_tenant_and_answers_only_it(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    acme, other = [await key_of(gateway, name) for name in ("acme", "other")]
    async with gateway.http.post(
        f"{gateway.url}/stream", json={"text": "Explain"}, headers=acme
    ) as response:
        request_id = response.headers["x-tidegate-request-id"]
        assert response.status == 200
        assert b"event: done" in await response.read()
    assert (await ask(gateway, "GET", f"/status/{request_id}", acme))[0] == 200
    assert (await ask(gateway, "GET", f"/status/{request_id}", other))[0] == 404
    row = await gateway.audit(request_id)
    assert row["tenant_id"] == "acme"


async def test_a_tenants_own_limit_holds_up_its_jobs_alone(open_gateway: Opener) -> None:
    gateway = await open_gateway(auth="on", worker=False)
    await gateway.services.keeper.change(edit({"tenant:acme": 1}), set_by="test")
    gateway.start_worker()  # with the new limits from its first call on
    await gateway.upstream.set_fault("hang", count=1)
    acme, other = [await key_of(gateway, name) for name in ("acme", "other")]
    await submitted(gateway, acme, data="Hold it", type="text_only")
    await gateway.in_flight(1)
    held = await submitted(gateway, acme, data="Explain", type="text_only")
    free = await submitted(gateway, other, data="Explain", type="text_only")

    async def done() -> bool:
        _, body = await ask(gateway, "GET", f"/status/{free}?wait=5", other)
        return bool(body["status"] == "succeeded")

    await wait_until(done, 20, "the other tenant's job")
    assert (await ask(gateway, "GET", f"/status/{held}", acme))[1]["status"] == "queued"
    assert len(await gateway.calls()) == 2


async def test_many_jobs_at_a_tenants_own_limit_leave_room_for_anothers(
    open_gateway: Opener,
) -> None:
    """A worker has twice the limit of a type, and two: all of them wait for acme's own."""
    gateway = await open_gateway(auth="on", worker=False)
    limits = {"rpm:tenant/acme": 1, "rpm:tenant/globex": 1, "kind:text_only": 2}
    await gateway.services.keeper.change(edit(limits), set_by="test")
    acme, globex, other = [await key_of(gateway, name) for name in ("acme", "globex", "other")]
    for key in (acme, globex):
        for _ in range(20):
            await submitted(gateway, key, data="Explain", type="text_only")
    gateway.start_worker()

    async def is_full() -> bool:
        snapshot = await gateway.services.limiter.snapshot()
        return sum(queue.waiting for queue in snapshot.queues) == 6

    await wait_until(is_full, 20, "as many that wait as a worker takes")
    free = await submitted(gateway, other, data="Explain", type="text_only")

    async def done() -> bool:
        _, body = await ask(gateway, "GET", f"/status/{free}?wait=5", other)
        return bool(body["status"] == "succeeded")

    await wait_until(done, 20, "the other tenant's job")
    assert len(await gateway.calls()) == 3


async def test_the_classifiers_question_takes_its_tenants_turn(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    acme = await key_of(gateway, "acme")
    await gateway.upstream.set_fault("hang", count=1)
    asking = asyncio.create_task(
        ask(gateway, "POST", "/stream", acme, {"text": "A lighthouse at dusk, oil on canvas"})
    )
    seen: list[str] = []

    async def asked() -> bool:
        seen[:] = [
            permit.tenant
            for permit in await gateway.services.limiter.permits()
            if permit.limits == ("kind:classifier",)
        ]
        return bool(seen)

    await wait_until(asked, 20, "the question")
    assert seen == ["acme"]
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_one_tenants_large_bodies_leave_room_for_anothers(open_gateway: Opener) -> None:
    bounds = {"max_body_bytes": 300_000, "max_held_bytes": 700_000}
    gateway = await open_gateway(worker=False, auth="on", **bounds)
    alice, bob = await key_of(gateway, "alice"), await key_of(gateway, "bob")
    await gateway.upstream.set_fault("hang", match="hold it")

    async def call(headers: dict[str, str], text: str) -> int:
        body = {"contents": [{"parts": [{"text": text + " " + "x" * 150_000}]}]}
        url = f"{gateway.url}/v1beta/models/gemini-2.5-flash:generateContent"
        async with gateway.http.post(url, json=body, headers=headers) as response:
            return response.status

    held = [asyncio.create_task(call(alice, "hold it")) for _ in range(2)]
    await gateway.in_flight(2)
    assert await call(alice, "one more") == 429
    assert await call(bob, "Say hello") == 200
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)


async def test_one_tenants_forms_that_wait_on_disk_leave_room_for_anothers(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait there for as long as their client allows: a day, if it says so."""
    monkeypatch.setattr(services, "MOST_SPOOLED_BYTES", 800_000)
    gateway = await open_gateway(worker=False, auth="on")
    alice, bob = await key_of(gateway, "alice"), await key_of(gateway, "bob")
    await gateway.upstream.set_fault("hang")

    async def call(headers: dict[str, str]) -> int:
        form = aiohttp.FormData({"model": "gemini-2.5-flash"})
        form.add_field("file", b"x" * 150_000, filename="a.mp3", content_type="audio/mpeg")
        url = f"{gateway.url}/v1/audio/transcriptions"
        async with gateway.http.post(url, data=form, headers=headers) as response:
            return response.status

    held = [asyncio.create_task(call(alice)) for _ in range(2)]
    await gateway.in_flight(2)
    assert await call(alice) == 429
    held.append(asyncio.create_task(call(bob)))
    await gateway.in_flight(3)
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    await wait_until(lambda: not gateway.services.spooled.of_tenants, 10, "room on the disk")


LARGE = b'{"output": "' + b"x" * 12_000_000 + b'"}'


async def test_one_tenants_slow_readers_of_stored_answers_leave_room_for_anothers(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """Each of them held a whole answer in memory, for as long as it read a little now and then."""

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=LARGE, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/responses", answer)
    async with TestServer(app) as upstream:
        policy, url = tmp_path / "policy.toml", upstream.make_url("/v1")
        policy.write_text(f'[upstreams.own]\nbase_url = "{url}"\nmodels = ["gpt-*"]\n')
        bounds = {"max_body_bytes": 1_000_000, "max_held_bytes": 40_000_000}
        gateway = await open_gateway(auth="on", tidegate_policy=policy, **bounds)
        alice, bob = await key_of(gateway, "alice"), await key_of(gateway, "bob")
        bodies, asking = gateway.services.bodies, {"model": "gpt-5-mini", "input": "hello"}
        job = await submitted(gateway, alice, endpoint="/v1/responses", body=asking)
        of_job = f"{gateway.url}/status/{job}?wait=10"

        async def call(method: str, url: str, headers: dict[str, str], **more: Any) -> int:
            async with gateway.http.request(method, url, headers=headers, **more) as response:
                return response.status

        async def has_ended() -> bool:
            _, body = await ask(gateway, "GET", f"/status/{job}?wait=5", alice)
            return bool(body["status"] == "succeeded")

        await wait_until(has_ended, 20, "the job")
        once = {"Idempotency-Key": "k1", "Content-Type": "application/json"}
        body, of_call = orjson.dumps(asking), f"{gateway.url}/v1/responses"
        for key in (alice, bob):
            assert await call("POST", of_call, key | once, data=body) == 200
        live = {"Accept": "text/event-stream"}
        for method, path, more, refused in (
            ("POST", "/v1/responses", once, 429),
            ("GET", f"/status/{job}", {}, 503),
            ("GET", f"/status/{job}", live, 200),  # it ends, and is to come again
        ):
            await wait_until(lambda: not bodies.of_tenants, 40, "the memory of the answers before")
            slow = small_receive_buffer((AF_INET, SOCK_STREAM, 0))
            slow.connect(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
            lines = [f"{method} {path} HTTP/1.1", "host: localhost"]
            lines += [f"{name}: {value}" for name, value in (alice | more).items()]
            lines += [f"content-length: {len(body) if method == 'POST' else 0}", "", ""]
            slow.sendall("\r\n".join(lines).encode() + (body if method == "POST" else b""))
            await wait_until(lambda: bodies.of_tenants["alice"] >= len(LARGE), 20, "the reader")
            again = of_call if method == "POST" else of_job
            sent = {"data": body} if method == "POST" else {}
            assert await call(method, again, alice | more, **sent) == refused, path
            assert await call("POST", of_call, bob | once, data=body) == 200
            slow.close()
            await wait_until(lambda: not bodies.of_tenants, 40, "the memory")
            assert await call(method, again, alice | more, **sent) == 200


FORM = "multipart/form-data; boundary=B"
FILE = b'--B\r\ncontent-disposition: form-data; name="%b"; filename="a.txt"\r\n\r\n%b\r\n'
HALF = b"x" * 200_000


@pytest.mark.parametrize(
    ("path", "content_type", "begun"),
    [
        ("/submit", FORM, FILE % (b"file", HALF[40_000:]) + FILE % (b"files", HALF[160_000:])),
        ("/submit", "application/json", b'{"data": "' + HALF),
        ("/submit", "application/x-www-form-urlencoded", b"data=" + HALF),
        ("/stream", FORM, FILE % (b"file", HALF)),
        ("/llm/stream", "application/json", b'{"text": "' + HALF),
        ("/v1/files", FORM, FILE % (b"file", HALF)),
    ],
)
async def test_whatever_of_a_body_is_in_memory_counts_for_its_tenant(
    open_gateway: Opener, path: str, content_type: str, begun: bytes
) -> None:
    bounds = {"max_body_bytes": 550_000, "max_held_bytes": 550_000}
    gateway = await open_gateway(worker=False, auth="on", **bounds)
    alice, bob = await key_of(gateway, "alice"), await key_of(gateway, "bob")
    bodies = gateway.services.bodies
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\n"
        f"authorization: {alice['Authorization']}\r\ncontent-length: 500000\r\n\r\n"
    )
    parts = urlsplit(gateway.url)
    writers = []

    def holds(least_bytes: int) -> bool:
        return bodies.of_tenants["alice"] >= least_bytes

    for count in (1, 2):
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(head.encode() + begun)
        writers.append(writer)
        await wait_until(partial(holds, 190_000 * count), 20, "what it holds")
    reader, third = await asyncio.open_connection(parts.hostname, parts.port)
    third.write(head.encode() + begun)
    assert (await reader.readline()).split()[1] in (b"429", b"503")
    status, _ = await ask(gateway, "POST", "/submit", bob, {"data": "y" * 70_000})
    assert status == 202
    for writer in (*writers, third):
        writer.close()
    await wait_until(lambda: bodies.held_bytes == 0, 20, "what they held is free")


async def test_a_streams_prompt_counts_until_its_end(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    alice = await key_of(gateway, "alice")
    await gateway.upstream.set_fault("hang")
    body = {"text": "Explain " + "x" * 150_000, "type": "text_only"}
    response = await gateway.http.post(f"{gateway.url}/stream", json=body, headers=alice)
    await gateway.in_flight(1)
    held = gateway.services.bodies.of_tenants
    assert 150_000 <= held["alice"] < 151_000
    response.close()
    await wait_until(lambda: "alice" not in held, 20, "what it held is free")


async def test_a_streams_files_count_while_it_waits_and_is_called(open_gateway: Opener) -> None:
    bounds = {"max_body_bytes": 550_000, "max_held_bytes": 550_000}
    gateway = await open_gateway(worker=False, auth="on", **bounds)
    alice = await key_of(gateway, "alice")
    await gateway.upstream.set_fault("hang")
    form = {"text": "Explain", "type": "multi_modal", "file": PNG + bytes(300_000)}

    async def streamed() -> aiohttp.ClientResponse:
        url = f"{gateway.url}/stream"
        return await gateway.http.post(url, headers=alice, **payload_of(form))

    first = await streamed()
    await gateway.in_flight(1)
    held = gateway.services.bodies.of_tenants
    assert 300_000 <= held["alice"] < 301_000
    second = await streamed()
    assert (second.status, (await second.json(content_type=None))["code"]) == (503, "queue_full")
    first.close()
    await wait_until(lambda: "alice" not in held, 20, "what it held is free")


async def test_a_streams_picture_counts_while_it_is_fetched(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server that its caller chose, and that never ends it."""
    bounds = {"max_body_bytes": 550_000, "max_held_bytes": 550_000}
    gateway = await open_gateway(worker=False, auth="on", **bounds)
    alice, ended = await key_of(gateway, "alice"), asyncio.Event()

    async def picture(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 400000\r\n\r\n" + PNG + bytes(300_000))
        await ended.wait()
        writer.close()

    fetcher = ImageFetcher(
        550_000, 20_000, is_allowed=lambda _: True, resolver=Names(site=["127.0.0.1"])
    )
    monkeypatch.setattr(gateway.services.prompts, "_fetcher", fetcher)
    async with await asyncio.start_server(picture, "127.0.0.1", 0) as site:
        uri = f"http://site.example:{site.sockets[0].getsockname()[1]}/fox.png"
        body = {"text": "Explain", "type": "multi_modal", "image_uri": uri}
        url = f"{gateway.url}/stream"
        first = asyncio.create_task(gateway.http.post(url, headers=alice, json=body))
        held = gateway.services.bodies.of_tenants
        await wait_until(lambda: held["alice"] >= 300_000, 10, "what has come of the picture")
        async with gateway.http.post(url, headers=alice, json=body) as second:
            problem = await second.json(content_type=None)
            assert (second.status, problem["code"]) == (503, "queue_full")
        first.cancel()
        await wait_until(lambda: "alice" not in held, 20, "what it held is free")
        ended.set()
