"""How long `POST /submit` takes when 100 come at once, while the provider hangs.

    python -m bench.submit [--apis 1] [--rounds 200]

Each round sends 100 requests at the same moment, one on each of 100 open connections, and waits for
all the answers. The provider is told to hang, so that no call ever ends. The client is bare
sockets, since it shares the machine with what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from tests.fleet import Fleet

AT_ONCE = 100


async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> float:
    """Milliseconds from sending the request to having read its answer."""
    started = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    await reader.readexactly(length)
    if not head.startswith(b"HTTP/1.1 202"):
        raise RuntimeError(head.decode())
    return (time.perf_counter() - started) * 1000


async def measure(apis: int, rounds: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        async with Fleet(Path(folder), apis=apis, workers=1) as fleet:
            await fleet.control.set_fault("hang")
            body = json.dumps({"data": "Explain the importance of cybersecurity."}).encode()
            head = (
                "POST /submit HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            urls = [urlsplit(url) for url in fleet.apis]
            connections = [
                await asyncio.open_connection(urls[n % apis].hostname, urls[n % apis].port)
                for n in range(AT_ONCE)
            ]
            taken: list[float] = []
            for number in range(rounds + 3):
                burst = await asyncio.gather(*(one(*c, head.encode() + body) for c in connections))
                if number >= 3:  # the first ones open database connections
                    taken += burst
            for _, writer in connections:
                writer.close()
            return sorted(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--apis", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    taken = asyncio.run(measure(options.apis, options.rounds))
    at = {p: taken[min(len(taken) - 1, int(len(taken) * p / 100))] for p in (50, 90, 99)}
    print(
        f"{AT_ONCE} submits at once, {options.apis} API process(es), provider hanging, "
        f"{platform.machine()}: p50 {at[50]:.1f} ms, p90 {at[90]:.1f} ms, p99 {at[99]:.1f} ms, "
        f"max {taken[-1]:.1f} ms, mean {statistics.mean(taken):.1f} ms"
    )


if __name__ == "__main__":
    main()
