"""Answers of a provider's batch, line by line, as they come over a connection."""

from __future__ import annotations

import asyncio
from typing import Any

from tidegate.dialects.gemini import usage_of
from tidegate.dialects.gemini_work import BatchTally
from tidegate.jobs.background import rows_of
from tidegate.upstream.transport import RelayWire, Timeouts

GOOD = b'{"response": {"usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 4}}}'
PATIENT = Timeouts(5_000, 5_000, 5_000, 9_000)


async def read(file: bytes, most_bytes: int) -> list[dict[str, Any]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(file))
        for start in range(0, len(file), 7):  # cut anywhere
            writer.write(file[start : start + 7])
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    wire = RelayWire(PATIENT)
    exchange = await wire.open("GET", wire.place(f"http://{host}:{port}/"), [], None)
    found = [row async for row in rows_of(exchange, most_bytes)]
    exchange.close()
    await wire.aclose()
    server.close()
    return found


async def test_a_line_that_can_not_be_read_is_an_answer_of_unknown_usage() -> None:
    """The batch ends all the same, or it would be counted until its longest time, and that answer
    is taken for as large as the largest of the others."""
    long = b'{"response": {"text": "' + b"x" * 200 + b'"}}'
    whole = await read(b"\n".join([GOOD, b"", GOOD, b""]), 100)
    assert len(whole) == 2
    tally = BatchTally({}, b"", usage_of)
    for row in whole:
        tally.add(row)
    assert tally.facts().usage.input_tokens == 6
    for odd in (long, b"no JSON", b"[1]"):
        for lines in ([GOOD, odd, GOOD], [GOOD, odd], [odd, GOOD, b""]):
            rows = await read(b"\n".join(lines), 100)
            assert len(rows) == len([line for line in lines if line]), odd
            tally = BatchTally({}, b"", usage_of)
            for row in rows:
                tally.add(row)
            facts = tally.facts()
            assert facts.is_estimate
            assert facts.usage.input_tokens == 3 * len(rows), odd
