"""How long Gemini may take, phase by phase, and that our own slowness doesn't count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tests.contract.gemini_upstream import (
    STREAM_HEAD,
    Collected,
    Connection,
    Received,
    call,
    chunk,
    gemini,
    raw_upstream,
    run_against,
)
from tests.waiting import wait_turns, wait_until
from tidegate.call import Answer, Delta, Event
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.errors import UpstreamThrottled, UpstreamTimeout, UpstreamUnavailable
from tidegate.upstream.transport import Timeouts


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


SHORT = 150


@pytest.mark.parametrize(
    ("phase", "limits"),
    [
        ("first_byte", Timeouts(5_000, SHORT, 5_000, 9_000)),
        ("idle", Timeouts(5_000, 5_000, SHORT, 9_000)),
        ("total", Timeouts(5_000, 5_000, 5_000, SHORT)),
    ],
)
async def test_a_silent_provider_runs_out_of_its_time(phase: str, limits: Timeouts) -> None:
    seen = []

    async def script(_: Received, to: Connection) -> None:
        if phase != "first_byte":
            await to.send(STREAM_HEAD)
            await to.event(chunk("And then"))
        await to.hang()
        seen.append("closed")

    with pytest.raises(UpstreamTimeout) as raised:
        await run_against(script, timeouts=limits)
    assert raised.value.phase == phase
    assert seen == ["closed"]


async def test_headers_without_a_body_run_into_the_first_byte_timeout() -> None:
    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        await to.hang()

    with pytest.raises(UpstreamTimeout) as raised:
        await run_against(script, timeouts=Timeouts(5_000, SHORT, 5_000, 9_000))
    assert raised.value.phase == "first_byte"


async def test_a_refusal_whose_body_never_comes_is_that_refusal() -> None:
    async def script(_: Received, to: Connection) -> None:
        await to.send(b"HTTP/1.1 429 Slow\r\nretry-after: 9\r\ncontent-length: 9\r\n\r\n")
        await to.hang()

    with pytest.raises(UpstreamThrottled) as raised:
        await run_against(script, timeouts=Timeouts(5_000, SHORT, 5_000, 9_000))
    assert raised.value.retry_after_ms == 9_000


async def test_a_handshake_that_never_ends_runs_into_the_connect_timeout() -> None:
    closed = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            pass
        closed.set()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with gemini(url, Timeouts(SHORT, 5_000, 5_000, 9_000)) as ours:
        with pytest.raises(UpstreamTimeout) as raised:
            await ours.run(call(), Answer(), Collected())
        await wait_turns(closed.is_set, what="the end of the connection")
    server.close()
    assert raised.value.phase == "connect"


async def test_a_provider_that_does_not_speak_tls_is_unavailable(emulator: Emulator) -> None:
    async with gemini(emulator.url.replace("http://", "https://")) as ours:
        with pytest.raises(UpstreamUnavailable):
            await ours.run(call(), Answer(), Collected())


async def test_a_sink_that_blocks_does_not_trip_the_idle_timeout() -> None:
    unblocked = asyncio.Event()

    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        await to.event(chunk("one "))
        await unblocked.wait()
        await to.event(chunk("two", finish="STOP"))
        await to.end()

    async def slow(event: Event) -> None:
        if event == Delta("one "):
            until = time.monotonic() + 3 * SHORT / 1000
            await wait_until(lambda: time.monotonic() > until)
            unblocked.set()

    answer = Answer()
    limits = Timeouts(5_000, SHORT, SHORT, 9_000)
    async with raw_upstream(script) as upstream, gemini(upstream.url, limits) as ours:
        await ours.run(call(), answer, slow)
    assert answer.whole_text == "one two"


async def test_a_sink_that_blocks_is_bounded_by_the_total_time() -> None:
    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        await to.event(chunk("one"))
        await to.hang()

    async def stuck(_: Event) -> None:
        await asyncio.Event().wait()

    limits = Timeouts(5_000, 5_000, 5_000, SHORT)
    async with raw_upstream(script) as upstream, gemini(upstream.url, limits) as ours:
        with pytest.raises(UpstreamTimeout) as raised:
            await ours.run(call(), Answer(), stuck)
        assert ours.open_calls == 0
    assert raised.value.phase == "total"


async def test_a_timeout_of_the_sinks_own_comes_out_as_it_is() -> None:
    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        await to.event(chunk("one", finish="STOP"))
        await to.end()

    async def impatient(_: Event) -> None:
        raise TimeoutError("mine")

    async with raw_upstream(script) as upstream, gemini(upstream.url) as ours:
        with pytest.raises(TimeoutError, match="mine"):
            await ours.run(call(), Answer(), impatient)
