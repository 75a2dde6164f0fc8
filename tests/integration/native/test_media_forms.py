"""Forms on their way: as they came, also to the next upstream, and never in memory as a whole."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until

TYPE = "multipart/form-data; boundary=line"
FILE_HEAD = b'--line\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
REST = (
    b'\r\n--line\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
    b'--line\r\nContent-Disposition: form-data; name="Model-Like"\r\n\r\nwhisper-1\r\n--line--\r\n'
)
PIECE = bytes(range(256)) * 4_096  # a megabyte
ROUTED = """
[upstreams.first]
base_url = "{first}/v1"
dialect = "openai"
[upstreams.second]
base_url = "{second}/v1"
dialect = "openai"
[[routes]]
model = "whisper-1"
try = ["first", "second/whisper-large"]
"""


@dataclass
class Taker:
    """A provider that notes the digest and length of each body, and answers with one status."""

    status: int
    url: str = ""
    bodies: list[tuple[str, int, str | None]] = field(default_factory=list)

    async def answer(self, request: web.BaseRequest) -> web.Response:
        digest, size_bytes = sha256(), 0
        async for piece in request.content.iter_any():
            digest.update(piece)
            size_bytes += len(piece)
        length = request.headers.get("Content-Length")
        self.bodies.append((digest.hexdigest(), size_bytes, length))
        if self.status != 200:
            return web.json_response({"error": {"message": "busy"}}, status=self.status)
        usage = {"type": "duration", "seconds": 7}
        return web.json_response({"text": "Hello", "usage": usage})


@asynccontextmanager
async def taking(taker: Taker) -> AsyncIterator[Taker]:
    runner = web.ServerRunner(web.Server(taker.answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    taker.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield taker
    finally:
        await runner.cleanup()


@pytest.fixture
async def takers() -> AsyncIterator[tuple[Taker, Taker]]:
    async with AsyncExitStack() as stack:
        yield (
            await stack.enter_async_context(taking(Taker(503))),
            await stack.enter_async_context(taking(Taker(200))),
        )


@pytest.fixture
async def routed(open_gateway: Opener, tmp_path: Path, takers: tuple[Taker, Taker]) -> Gateway:
    policy = tmp_path / "tidegate.toml"
    policy.write_text(ROUTED.format(first=takers[0].url, second=takers[1].url))
    return await open_gateway(worker=False, tidegate_policy=policy, max_body_bytes=120_000_000)


def uploads(gateway: Gateway) -> list[Path]:
    return list((gateway.config.data_dir / "tmp").glob("upload-*"))


def told(raw: bytes) -> tuple[str, int, str]:
    return sha256(raw).hexdigest(), len(raw), str(len(raw))


@pytest.mark.parametrize("count", [0, 2], ids=["in memory", "on disk"])
async def test_a_form_goes_to_the_next_upstream_as_it_came_but_for_the_models_name(
    routed: Gateway, takers: tuple[Taker, Taker], count: int
) -> None:
    raw = FILE_HEAD + PIECE * count + b"\r\n--lin" + REST
    url = f"{routed.url}/v1/audio/transcriptions"
    async with routed.http.post(url, data=raw, headers={"Content-Type": TYPE}) as response:
        assert response.status == 200
        assert response.headers["x-tidegate-upstream"] == "second"
        row = await routed.audit(response.headers["x-tidegate-request-id"])
    assert row["attempts"] == 2
    assert row["model"] == "whisper-large"
    first, second = takers
    assert first.bodies == [told(raw)]
    assert second.bodies == [told(raw.replace(b"whisper-1", b"whisper-large", 1))]
    await wait_until(lambda: not uploads(routed), what="forms to be removed")
    assert routed.held == 0


async def test_a_form_again_under_its_key_is_the_same_answer(
    routed: Gateway, takers: tuple[Taker, Taker]
) -> None:
    raw = FILE_HEAD + b"sound" + REST
    url = f"{routed.url}/v1/audio/transcriptions"
    headers = {"Content-Type": TYPE, "Idempotency-Key": "one"}
    seen = []
    for body in (raw, raw, raw.replace(b"sound", b"other")):
        async with routed.http.post(url, data=body, headers=headers) as response:
            seen.append((response.status, await response.read()))
    assert [status for status, _ in seen] == [200, 200, 409]
    assert seen[0] == seen[1]
    assert len(takers[1].bodies) == 1


async def test_a_client_that_leaves_in_mid_upload_leaves_nothing_behind(
    routed: Gateway, takers: tuple[Taker, Taker]
) -> None:
    parts = urlsplit(routed.url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = (
        "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: {TYPE}\r\nContent-Length: 30000000\r\n\r\n"
    )
    writer.write(head.encode() + FILE_HEAD + PIECE)
    await writer.drain()
    await wait_until(lambda: uploads(routed), what="a part of the form on disk")
    writer.transport.abort()
    await wait_until(lambda: not uploads(routed), what="the form to be removed")
    assert (routed.held, routed.waiting) == (0, 0)
    assert [taker.bodies for taker in takers] == [[], []]


async def test_a_form_of_60_mb_is_never_in_memory_as_a_whole(
    routed: Gateway, takers: tuple[Taker, Taker]
) -> None:
    """Of it the record keeps 16 MB; its two copies on the way to PostgreSQL are all there is."""
    digest = sha256()

    async def body() -> AsyncIterator[bytes]:
        for piece in (FILE_HEAD, *[PIECE] * 60, REST):
            digest.update(piece)
            yield piece

    url = f"{routed.url}/v1/audio/transcriptions"
    tracemalloc.start(1)
    try:
        async with routed.http.post(url, data=body(), headers={"Content-Type": TYPE}) as response:
            assert response.status == 200
            request_id = response.headers["x-tidegate-request-id"]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 40_000_000
    assert takers[0].bodies[0][0] == digest.hexdigest()
    await routed.audit(request_id)
    async with routed.http.get(f"{routed.url}/requests/{request_id}/request") as kept:
        assert int(kept.headers["x-tidegate-omitted-bytes"]) > 40_000_000
        assert (await kept.read()).startswith(FILE_HEAD)
