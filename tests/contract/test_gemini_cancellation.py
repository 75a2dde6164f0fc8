"""Whoever gives up, the upstream connection is closed: told by the server, which sees it close."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.contract.gemini_upstream import (
    STREAM_HEAD,
    Collected,
    Connection,
    RawUpstream,
    Received,
    call,
    chunk,
    gemini,
    raw_upstream,
)
from tests.waiting import wait_turns, wait_until
from tidegate.call import Answer, Delta, Event, Kind, Media
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.upstream.gemini import GeminiProcessor


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


async def before_headers(_: Received, to: Connection) -> None:
    await to.hang()


async def after_headers(_: Received, to: Connection) -> None:
    await to.send(STREAM_HEAD)
    await to.hang()


async def mid_stream(_: Received, to: Connection) -> None:
    await to.send(STREAM_HEAD)
    await to.event(chunk("So far", tokens=3))
    await to.hang()


async def flooding(_: Received, to: Connection) -> None:
    await to.send(STREAM_HEAD)
    await to.event(chunk("So far", tokens=3))
    while True:
        await to.event(chunk("and on " * 1_000))


async def blocked(_: Event) -> None:
    await asyncio.Event().wait()


async def cancel_when(
    ours: GeminiProcessor,
    reached: Callable[[], object],
    sink: Callable[[Event], Awaitable[None]],
    answer: Answer,
    times: int = 1,
) -> None:
    """Cancel a call once `reached()`; return once `run` has unwound."""
    task = asyncio.create_task(ours.run(call(), answer, sink))
    await wait_until(reached, 20)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ours.open_calls == 0


async def closed_soon(upstream: RawUpstream) -> None:
    await wait_turns(lambda: upstream.closed_at, what="the server sees the connection close")


@pytest.mark.parametrize("times", [1, 2, 3, 8])
@pytest.mark.parametrize("script", [before_headers, after_headers, mid_stream])
async def test_cancelling_while_waiting_for_the_provider_closes_the_call(
    script: Callable[[Received, Connection], Awaitable[None]], times: int
) -> None:
    answer, sink = Answer(), Collected()
    async with raw_upstream(script) as upstream, gemini(upstream.url) as ours:

        def reached() -> object:
            return sink.events if script is mid_stream else upstream.received

        await cancel_when(ours, reached, sink, answer, times)
        await closed_soon(upstream)
    if script is mid_stream:
        assert answer.whole_text == "So far"
        assert answer.usage.output_tokens == 3


@pytest.mark.parametrize("times", [1, 2, 3, 8])
@pytest.mark.parametrize("script", [mid_stream, flooding])
async def test_cancelling_while_the_sink_blocks_closes_the_call(
    script: Callable[[Received, Connection], Awaitable[None]], times: int
) -> None:
    answer = Answer()
    async with raw_upstream(script) as upstream, gemini(upstream.url) as ours:
        await cancel_when(ours, lambda: answer.text, blocked, answer, times)
        await closed_soon(upstream)
    assert answer.whole_text == "So far"


async def test_cancelling_during_the_tls_handshake_closes_the_socket() -> None:
    arrived, closed = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            arrived.set()
        closed.set()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with gemini(url) as ours:
        await cancel_when(ours, arrived.is_set, blocked, Answer())
        await wait_turns(closed.is_set, what="the end of the connection")
    server.close()


async def test_an_exception_of_the_sink_comes_out_unchanged_and_closes_the_call() -> None:
    class Gone(Exception):
        pass

    gone = Gone("the client left")

    async def leave(_: Event) -> None:
        raise gone

    answer = Answer()
    async with raw_upstream(mid_stream) as upstream, gemini(upstream.url) as ours:
        with pytest.raises(Gone) as raised:
            await ours.run(call(), answer, leave)
        assert raised.value is gone
        assert ours.open_calls == 0
        await closed_soon(upstream)
    assert answer.whole_text == "So far"


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError, TypeError, ConnectionError])
async def test_a_sinks_everyday_errors_are_not_taken_for_the_providers(
    error: type[Exception], emulator: Emulator
) -> None:
    async def broken(_: Event) -> None:
        raise error("mine")

    async with gemini(emulator.url) as ours:
        with pytest.raises(error, match="mine"):
            await ours.run(call(), Answer(), broken)


async def test_cancelling_the_judge_closes_its_call() -> None:
    async with raw_upstream(before_headers) as upstream, gemini(upstream.url) as ours:
        task = asyncio.create_task(
            ours.judge("a fox", [], model="gemini-2.5-flash-lite", answer=Answer())
        )
        await wait_until(lambda: upstream.received, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ours.open_calls == 0
        await closed_soon(upstream)


async def test_cancelling_during_an_upload_leaves_no_call(emulator: Emulator) -> None:
    await emulator.control.set_behaviour(file_processing_ms=60_000)
    large = Media("application/pdf", b"%PDF-1.7" * 1_000)
    async with gemini(emulator.url, inline_max_bytes=1_000) as ours:
        made = call(Kind.MULTI_MODAL, media=(large,))
        task = asyncio.create_task(ours.run(made, Answer(), Collected()))
        await wait_until(lambda: _has(emulator, "files"), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    methods = [item.method for item in await emulator.control.calls()]
    assert "stream" not in methods
    assert methods[-1] == "files", "the uploaded file is deleted"


async def _has(emulator: Emulator, method: str) -> bool:
    return any(item.method == method for item in await emulator.control.calls())


async def test_a_hundred_calls_cancelled_at_random_moments_leave_nothing(
    emulator: Emulator,
) -> None:
    await emulator.control.set_behaviour(first_byte_ms={"*": 40}, between_ms={"*": 10_000})
    dice = random.Random(7)
    async with gemini(emulator.url) as ours:

        async def give_up(stage: str) -> None:
            answer, sink = Answer(), blocked if dice.random() < 0.5 else Collected()
            task = asyncio.create_task(ours.run(call(), answer, sink))
            if stage == "soon":
                for _ in range(dice.randrange(40)):
                    await asyncio.sleep(0)
            elif stage == "sent":
                await wait_until(lambda: ours.open_calls)
                await asyncio.wait((task,), timeout=dice.uniform(0, 0.1))
            else:
                await wait_until(lambda: answer.text)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        stages = ["soon", "sent", "answering"] * 33 + ["answering"]
        await asyncio.gather(*map(give_up, stages))
        assert ours.open_calls == 0

        async def all_closed() -> bool:
            return (await emulator.control.stats())["text_only"].in_flight == 0

        await wait_turns(all_closed, what="the provider sees all connections close")
        stats = (await emulator.control.stats())["text_only"]
    assert stats.client_gone == stats.started >= stages.count("answering")


async def test_a_connection_is_used_again_after_a_call_that_ended_well() -> None:
    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        await to.event(chunk("Hello", finish="STOP"))
        await to.end()

    seen = []
    async with raw_upstream(script) as upstream, gemini(upstream.url) as ours:
        for _ in range(5):
            sink = Collected()
            await ours.run(call(), Answer(), sink)
            seen.append(upstream.connections)
            assert Delta("Hello") in sink.events
    assert seen == [1] * 5
