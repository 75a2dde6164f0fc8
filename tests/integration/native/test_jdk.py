"""Clients that offer to go over to HTTP/2, as the JDK's does on plain HTTP: that is ignored."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.integration.security.hostile import Hostile, hostile
from tidegate.http.uvicorn_protocol import before_offer

__all__ = ["hostile"]

SOURCE = Path(__file__).parents[2] / "data/jdk/Client.java"
BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "Upgrade: h2c"}]})
OFFER = (
    b"Connection: Upgrade, HTTP2-Settings\r\n"
    b"Upgrade: h2c\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
)
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n%b%b\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.fixture
async def gateway(open_gateway: Opener, hostile: Hostile) -> Gateway:
    return await open_gateway(worker=False, gemini_base_url=hostile.url)


WHOLE = HEAD % (OFFER, LENGTH)
KEPT = HEAD % (OFFER.replace(b"Upgrade,", b"keep-alive, upgrade,"), LENGTH)
IN_CHUNKS = HEAD % (OFFER, CHUNKED) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize(
    "segments",
    [
        (WHOLE + BODY,),
        (HEAD % (LENGTH, OFFER) + BODY,),
        (KEPT + BODY,),
        (IN_CHUNKS,),  # as Spring's RestClient sends it
        (WHOLE, BODY),  # as Ktor does
    ],
)
async def test_an_offer_is_ignored_and_the_body_read(
    gateway: Gateway, hostile: Hostile, segments: tuple[bytes, ...]
) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for number in (1, 2):  # on one connection
        for segment in segments:
            writer.write(segment)
            await writer.drain()
            await asyncio.sleep(0)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        assert await reader.readexactly(2) == b"{}"
        assert len(hostile.seen) == number
    writer.close()
    sent = hostile.seen[-1]
    assert sent.endswith(BODY)
    assert b"http2-settings" not in sent.lower()
    assert b"upgrade" not in sent.removesuffix(BODY).lower()


async def test_an_offer_is_ignored_wherever_its_head_is_split(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    whole = WHOLE + BODY
    start = whole.index(b"\r\nConnection")
    places = [*range(start, whole.index(b"\r\nUpgrade") + 3), len(WHOLE) - 1, len(whole) - 1]
    for place in places:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(whole[:place])
        await writer.drain()
        async with gateway.http.get(f"{gateway.url}/health/live"):
            pass  # the gateway has read the first part by then
        writer.write(whole[place:])
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), (whole[:place], head)
        writer.close()


@pytest.mark.parametrize(
    ("piece", "parsed"),
    [
        (b"GET / HTTP/1.1\r\nConn", b"GET / HTTP/1.1"),
        (b"GET / HTTP/1.1\r", b"GET / HTTP/1.1"),
        (b"a: b\r\nCONNECTION: x, upgr", b"a: b"),
        (b"a: b\r\nconnections: x", None),
        (b"a: b\r\n\r", None),
        (b"a: b\r\n\r\nbody\r", None),
        (b"a: b\r\nConnection: " + b"x" * 300, None),
    ],
)
def test_only_an_unfinished_connection_header_waits_for_more(
    piece: bytes, parsed: bytes | None
) -> None:
    assert piece[: before_offer(piece)] == (piece if parsed is None else parsed)


if shutil.which("javac") is not None:  # the shapes above hold its bytes, and those of others

    @pytest.mark.slow
    async def test_the_jdk_s_own_client(gateway: Gateway, hostile: Hostile) -> None:
        url = f"{gateway.url}/v1/chat/completions"
        command = (
            "java",
            "-Xshare:auto",
            "-XX:TieredStopAtLevel=1",
            str(SOURCE),
            url,
            BODY.decode(),
        )
        running = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        said, failed = await running.communicate()
        assert said.decode().split("\n")[:3] == [
            "whole HTTP_1_1 200",
            "whole HTTP_1_1 200",
            "chunked HTTP_1_1 200",
        ], failed.decode()
        assert len(hostile.seen) == 3
        assert all(one.endswith(BODY) for one in hostile.seen)
