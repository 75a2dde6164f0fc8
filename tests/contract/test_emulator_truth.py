"""The emulator's ground truth: what it counts and refuses, how soon it sees a client go."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.waiting import promised_s, wait_until
from tidegate.emulator.client import EmulatorControl
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.emulator.settings import Behaviour, EmulatorSettings, RateLimit
from tidegate.emulator.state import KindStats

MODEL = "gemini-2.5-flash"
SECOND_NS = 1_000_000_000


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        headers={"x-goog-api-key": "k"}, connector=connector
    ) as opened:
        yield opened


async def post(
    session: aiohttp.ClientSession, url: str, prompt: str = "Hello", model: str = MODEL
) -> tuple[int, Any]:
    body = {"contents": [{"parts": [{"text": prompt}]}]}
    address = f"{url}/v1beta/models/{model}:generateContent"
    async with session.post(address, json=body) as response:
        return response.status, await response.json()


async def text_only(emulator: Emulator) -> KindStats:
    return (await emulator.control.stats())["text_only"]


async def in_flight(emulator: Emulator, count: int) -> bool:
    return (await emulator.control.stats()).in_flight == count


async def test_over_the_concurrency_limit_is_refused_and_counted_as_over(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_behaviour(concurrency={"text_only": 3})
    await emulator.control.set_fault("hang", count=3)
    tasks = [asyncio.create_task(post(session, emulator.url)) for _ in range(8)]
    await wait_until(lambda: sum(task.done() for task in tasks) == 5)
    answers = [task.result() for task in tasks if task.done()]
    assert [status for status, _ in answers] == [429] * 5
    assert "Concurrent" in str(answers[0][1]["error"]["details"])
    stats = await text_only(emulator)
    assert (stats.over, stats.max_in_flight, stats.in_flight) == (5, 3, 3)
    assert stats.refused == {"concurrency:text_only": 5}
    assert (stats.arrived, stats.started, stats.finished) == (8, 3, 0)
    for task in tasks:
        task.cancel()
    await wait_until(partial(in_flight, emulator, 0))
    assert (await post(session, emulator.url))[0] == 200
    assert (await text_only(emulator)).over == 5


async def test_a_total_limit_bounds_all_kinds_together_and_kinds_are_apart(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    image = "gemini-2.5-flash-image"
    await emulator.control.set_behaviour(concurrency={"text_only": 1, "total": 2})
    await emulator.control.set_fault("hang")
    first = asyncio.create_task(post(session, emulator.url))
    await wait_until(partial(in_flight, emulator, 1))
    assert (await post(session, emulator.url))[0] == 429
    second = asyncio.create_task(post(session, emulator.url, model=image))
    await wait_until(partial(in_flight, emulator, 2))
    assert (await post(session, emulator.url, model=image))[0] == 429
    stats = await emulator.control.stats()
    assert stats["text_only"].refused == {"concurrency:text_only": 1}
    assert stats["image_generation"].refused == {"concurrency:total": 1}
    assert stats.max_in_flight == 2
    first.cancel()
    second.cancel()


async def test_without_a_limit_the_peak_is_what_was_open_at_once(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_fault("hang")
    for count in (30, 10):
        tasks = [asyncio.create_task(post(session, emulator.url)) for _ in range(count)]
        await wait_until(partial(in_flight, emulator, count))
        for task in tasks:
            task.cancel()
        await wait_until(partial(in_flight, emulator, 0))
    stats = await text_only(emulator)
    assert (stats.max_in_flight, stats.over, stats.client_gone) == (30, 0, 40)


class Clock:
    """The clock that the limits of an emulator go by, moved by hand."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000 * SECOND_NS

    def __call__(self) -> int:
        return self.now_ns


MODES: list[tuple[str, list[int]]] = [
    # Statuses of 3 calls at 50 s, 4 at 61 s, 4 at 111 s, of a limit of 3 in 60 s.
    ("fixed_window", [200, 200, 200, 200, 200, 200, 429, 429, 429, 429, 429]),
    ("sliding_window", [200, 200, 200, 429, 429, 429, 429, 200, 200, 200, 429]),
    ("token_bucket", [200, 200, 200, 429, 429, 429, 429, 200, 200, 200, 429]),
]


@pytest.mark.parametrize(("mode", "expected"), MODES)
async def test_each_counting_mode_refuses_what_it_should_over_the_wire(
    session: aiohttp.ClientSession, mode: Any, expected: list[int]
) -> None:
    clock = Clock()
    start_ns = clock.now_ns - clock.now_ns % (60 * SECOND_NS)
    settings = EmulatorSettings(behaviour=Behaviour(rates=(RateLimit("total", 3, 60, mode),)))
    statuses = []
    async with run_emulator(settings, clock_ns=clock) as emulator:
        for at_s, calls in ((50, 3), (61, 4), (111, 4)):
            clock.now_ns = start_ns + at_s * SECOND_NS
            statuses += [(await post(session, emulator.url))[0] for _ in range(calls)]
        stats = await text_only(emulator)
    assert statuses == expected
    assert stats.refused == {"requests:total:60s": expected.count(429)}
    assert stats.over == 0


async def test_waiting_as_long_as_retry_info_says_is_enough(
    session: aiohttp.ClientSession,
) -> None:
    clock = Clock()
    rate = RateLimit("text_only", 1, 60, "sliding_window")
    settings = EmulatorSettings(behaviour=Behaviour(rates=(rate,)))
    async with run_emulator(settings, clock_ns=clock) as emulator:
        assert (await post(session, emulator.url))[0] == 200
        clock.now_ns += 20 * SECOND_NS
        status, body = await post(session, emulator.url)
        assert status == 429
        retry = next(item for item in body["error"]["details"] if "retryDelay" in item)
        assert retry["retryDelay"] == "40s"
        clock.now_ns += 40 * SECOND_NS
        assert (await post(session, emulator.url))[0] == 200


async def test_input_tokens_are_limited_by_what_the_prompt_costs(
    session: aiohttp.ClientSession,
) -> None:
    rate = RateLimit("total", 10, 60, "sliding_window", "input_tokens")
    settings = EmulatorSettings(behaviour=Behaviour(rates=(rate,)))
    async with run_emulator(settings, clock_ns=Clock()) as emulator:
        assert (await post(session, emulator.url, "x" * 24))[0] == 200
        status, body = await post(session, emulator.url, "x" * 20)
        assert status == 429
        assert "InputTokens" in str(body)
        assert (await post(session, emulator.url, "x" * 16))[0] == 200


async def test_a_daily_quota_is_told_as_per_day(session: aiohttp.ClientSession) -> None:
    rate = RateLimit("total", 0, 86_400)
    settings = EmulatorSettings(behaviour=Behaviour(rates=(rate,)))
    async with run_emulator(settings) as emulator:
        _, body = await post(session, emulator.url)
    assert "GenerateRequestsPerDay" in str(body)


@pytest.mark.parametrize("fault", ["hang", "hang_mid_stream", None])
async def test_a_client_that_leaves_is_noticed_within_ten_milliseconds(
    emulator: Emulator, fault: str | None
) -> None:
    """Before the headers, in mid-stream, and while the answer is still being slept over."""
    if fault is None:
        await emulator.control.set_behaviour(first_byte_ms=60_000)
    else:
        await emulator.control.set_fault(fault)
    path = f"/v1beta/models/{MODEL}:streamGenerateContent?alt=sse&key=k"
    body = b'{"contents":[{"parts":[{"text":"Hello"}]}]}'
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    late = []
    tasks_before = len(asyncio.all_tasks())
    for turn in range(1, 11):
        _, writer = await asyncio.open_connection("127.0.0.1", emulator.port)
        writer.write(head.encode() + body)
        await wait_until(partial(in_flight, emulator, 1))
        left_ns = time.time_ns()
        writer.close()

        async def gone(turn: int = turn) -> bool:
            return (await text_only(emulator)).client_gone == turn

        await wait_until(gone)
        late.append(((await emulator.control.calls())[-1].ended_ns or 0) - left_ns)
    assert sorted(late)[len(late) // 2] < promised_s(0.01) * 1_000_000_000
    # Their handlers are cancelled, not left to sleep on.
    await wait_until(lambda: len(asyncio.all_tasks()) <= tasks_before)
    stats = await text_only(emulator)
    assert (stats.in_flight, stats.client_gone, stats.finished) == (0, 10, 0)


def whole_request() -> bytes:
    body = b'{"contents":[{"parts":[{"text":"Hello"}]}]}'
    head = "POST /v1beta/models/m:generateContent?key=k HTTP/1.1\r\nHost: x\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("new_one_first", [False, True])
async def test_closing_one_call_and_opening_the_next_at_once_is_never_over(
    emulator: Emulator, new_one_first: bool
) -> None:
    """The server reads the new request before the disconnect: the kernel knows who has left."""
    await emulator.control.set_behaviour(concurrency={"text_only": 2}, first_byte_ms=60_000)
    request = whole_request()
    address = ("127.0.0.1", emulator.port)
    sockets = [socket.create_connection(address) for _ in range(102)]

    async def arrived(count: int) -> bool:
        return (await text_only(emulator)).arrived == count

    for opened in sockets:
        opened.sendall(request[:-2])
    for opened in sockets[:2]:
        opened.sendall(request[-2:])
    await wait_until(lambda: arrived(2))
    for turn, pair in enumerate(zip(sockets, sockets[2:], strict=False), start=3):
        rest = request[-2:]
        if new_one_first:
            # A socket that was ready in this turn of the loop is the first in the next turn's list.
            pair[1].sendall(rest[:1])
            rest = rest[1:]
            await asyncio.sleep(0)
        # Nothing of the server runs between these two lines. The handler of the new call waits for
        # the last byte, and goes on before the handler of the closed one is cancelled.
        pair[0].close()
        pair[1].sendall(rest)
        await wait_until(partial(arrived, turn))
    stats = await text_only(emulator)
    for opened in sockets[-2:]:
        opened.close()
    assert (stats.arrived, stats.over, stats.max_in_flight) == (102, 0, 2)


async def test_a_request_that_is_read_after_its_client_left_is_never_in_flight(
    emulator: Emulator,
) -> None:
    """The server reads the next call's request first: the kernel knows which was left by then."""
    await emulator.control.set_behaviour(concurrency={"text_only": 1}, first_byte_ms=60_000)
    request = whole_request()
    address = ("127.0.0.1", emulator.port)
    pairs = 25
    sockets = [socket.create_connection(address) for _ in range(2 * pairs)]

    async def ended(count: int) -> bool:
        stats = await text_only(emulator)
        return stats.arrived == stats.client_gone == count

    for opened in sockets:
        opened.sendall(request[:-2])
    for number in range(pairs):
        left, stays = sockets[2 * number : 2 * number + 2]
        stays.sendall(request[-2:-1])  # ready in this turn of the loop: the first of the next turn
        await asyncio.sleep(0)
        # Nothing of the server runs between these three lines.
        left.sendall(request[-2:])
        left.close()
        stays.sendall(request[-1:])
        await wait_until(partial(in_flight, emulator, 1))
        stays.close()
        await wait_until(partial(ended, 2 * number + 2))
    stats = await text_only(emulator)
    assert (stats.over, stats.max_in_flight, stats.client_gone) == (0, 1, 2 * pairs)


async def test_the_log_tells_how_often_a_prompt_was_called(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_fault("unavailable", match="twice", count=1)
    for prompt in ("once", "twice", "twice"):
        await post(session, emulator.url, prompt + " " + "x" * 300)
    calls = await emulator.control.calls()
    assert [call.prompt.split()[0] for call in calls] == ["once", "twice", "twice"]
    assert [call.outcome for call in calls] == ["finished", "failed", "finished"]
    assert all(call.started_ns <= (call.ended_ns or 0) for call in calls)
    assert {len(call.prompt) for call in calls} == {200}
    assert calls[1].prompt_sha == calls[2].prompt_sha != calls[0].prompt_sha
    assert len(await emulator.control.calls(contains="twice")) == 2
    later = await emulator.control.calls(since=calls[0].id)
    assert [call.id for call in later] == [calls[1].id, calls[2].id]
    assert calls[0].bytes > 0


async def test_reset_forgets_but_keeps_count_of_what_still_runs(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await post(session, emulator.url, "ended")
    await emulator.control.set_fault("hang")
    task = asyncio.create_task(post(session, emulator.url, "running"))
    await wait_until(partial(in_flight, emulator, 1))
    await emulator.control.reset()
    stats = await text_only(emulator)
    assert (stats.arrived, stats.started, stats.max_in_flight, stats.finished) == (1, 1, 1, 0)
    assert [call.prompt for call in await emulator.control.calls()] == ["running"]
    task.cancel()
    await wait_until(partial(in_flight, emulator, 0))
    assert (await post(session, emulator.url))[0] == 200
    stats = await text_only(emulator)
    assert (stats.finished, stats.client_gone) == (1, 1)


async def test_latency_is_as_ordered_by_kind(
    emulator: Emulator, session: aiohttp.ClientSession
) -> None:
    await emulator.control.set_behaviour(
        first_byte_ms={"text_only": {"uniform": [40, 60]}}, between_ms={"*": 20}, chunks=4
    )
    before = time.monotonic()
    await post(session, emulator.url)
    took_s = time.monotonic() - before
    assert took_s >= 0.1  # 40 ms, and three gaps of 20 ms
    before = time.monotonic()
    await post(session, emulator.url, model="gemini-2.5-flash-image")
    assert time.monotonic() - before >= 0.02


async def test_the_log_is_bounded() -> None:
    settings = EmulatorSettings(log_size=5)
    async with (
        run_emulator(settings) as emulator,
        aiohttp.ClientSession(headers={"x-goog-api-key": "k"}) as session,
    ):
        for _ in range(8):
            await post(session, emulator.url)
        assert [call.id for call in await emulator.control.calls()] == [4, 5, 6, 7, 8]


async def test_the_control_api_answers_on_loopback_only() -> None:
    from tidegate.emulator.server import is_loopback

    for address in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(address)
    for address in ("10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0"):
        assert not is_loopback(address)
    assert not is_loopback(None)


async def test_a_body_over_the_limit_is_refused(session: aiohttp.ClientSession) -> None:
    async with run_emulator(EmulatorSettings(max_body_bytes=10_000)) as emulator:
        status, body = await post(session, emulator.url, "x" * 20_000)
    assert (status, body["error"]["code"]) == (413, 413)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The emulator as its own process, with a latency and a limit, and its port file."""
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "tidegate.emulator", "--port", "0"]
    command += ["--port-file", str(port_file), "--behaviour", '{"concurrency": {"text_only": 1}}']
    with subprocess.Popen([*command, "--first-byte-ms", "30"], stderr=subprocess.PIPE) as running:
        yield running, port_file
        running.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_its_own_process_writes_its_port_serves_and_stops_cleanly(
    process: tuple[subprocess.Popen[bytes], Path],
    session: aiohttp.ClientSession,
    number: signal.Signals,
) -> None:
    running, port_file = process
    await wait_until(port_file.exists, what="the port file")
    url = f"http://127.0.0.1:{int(port_file.read_text())}"
    async with EmulatorControl(url) as control:
        await control.set_fault("hang", count=1)
        hanging = asyncio.create_task(post(session, url))

        async def hangs() -> bool:
            return (await control.stats()).in_flight == 1

        await wait_until(hangs)
        assert (await post(session, url))[0] == 429
        assert (await control.stats())["text_only"].over == 1
    running.send_signal(number)
    assert await asyncio.to_thread(running.wait, 5) == 0
    with pytest.raises(aiohttp.ClientError):
        await hanging
    assert running.stderr is not None
    assert b"Traceback" not in running.stderr.read()


@pytest.mark.parametrize(
    "arguments",
    [["--behaviour", "{"], ["--behaviour", '{"chunks": 0}'], ["--faults", '[{"fault": "x"}]']],
)
def test_wrong_settings_stop_the_start_with_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "tidegate.emulator", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
