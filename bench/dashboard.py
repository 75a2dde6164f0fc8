"""What people who watch the dashboard cost the process that they watch.

    python -m bench.dashboard [--viewers 100] [--seconds 20]

One API process and one worker, a pool of 57 limits in which 50 tenants wait, and ten submits a
second all the while. Processor time is measured with nobody watching, with one viewer and with
many, and that of the watching is the difference. Viewers are bare sockets that read all they get.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.machine import cpu_ns, describe
from tests.fleet import Fleet

TENANTS = 50
CALLS_A_S = 10
SETTLE_S = 3.0
AIM_PERCENT = 5.0


@dataclass(slots=True)
class Watched:
    """What all viewers together were sent."""

    size_bytes: int = 0
    frames: int = 0


async def watch(url: str, shown: str, seen: Watched) -> None:
    """`shown`: the operator's key, as it stands in the header `Authorization`."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = f"GET /dashboard/feed HTTP/1.1\r\nHost: {parts.netloc}\r\n"
    head += f"Authorization: {shown}\r\n\r\n"
    writer.write(head.encode())
    try:
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status:
            raise RuntimeError(status.decode())
        while data := await reader.read(65_536):
            seen.size_bytes += len(data)
            seen.frames += data.count(b"event: live")
    finally:
        writer.close()


async def crowd(fleet: Fleet) -> None:
    """Limits and weights for all tenants, and a job of each that waits."""
    limits: dict[str, Any] = {f"tenant:t{n}": 2 for n in range(TENANTS)}
    weights = {f"weights.t{n}": 1 + n % 5 for n in range(TENANTS)}
    limits |= {"rpm:total": 100_000, "tpm:total": 10_000_000, "kind:image_generation": 0}
    changes = {"set": {**limits, **weights}}
    async with fleet.http.patch(f"{fleet.url}/admin/limits", json=changes) as answer:
        answer.raise_for_status()
    path = f"{fleet.url}/admin/limits/kind:multi_modal/pause"
    async with fleet.http.post(path, json={}) as answer:
        answer.raise_for_status()
    for number in range(TENANTS):
        job = {"data": "Describe it", "type": "multi_modal"}
        headers = {"x-tidegate-tenant": f"t{number}"}
        async with fleet.http.post(f"{fleet.url}/submit", json=job, headers=headers) as answer:
            answer.raise_for_status()


async def call(fleet: Fleet) -> None:
    """Calls at a steady pace, for ever."""
    number = 0
    while True:
        number += 1
        job = {"data": f"Explain tide {number}"}
        headers = {"x-tidegate-tenant": f"t{number % TENANTS}"}
        async with fleet.http.post(f"{fleet.url}/submit", json=job, headers=headers) as answer:
            answer.raise_for_status()
        await asyncio.sleep(1 / CALLS_A_S)


async def percent_of_a_core(pid: int, seconds: float) -> float:
    before = cpu_ns(pid)
    await asyncio.sleep(seconds)
    return (cpu_ns(pid) - before) / seconds / 1e7


async def measure(counts: list[int], seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with Fleet(Path(folder), apis=1, workers=1) as fleet:
            await crowd(fleet)
            calling = asyncio.create_task(call(fleet))
            (api,) = fleet.apis.values()
            pids = {"API": api.process.pid, "Valkey": fleet.valkey.pid}
            alone: dict[str, float] = {}
            print("| viewers | " + " | ".join(pids) + " | bytes a frame | frames a s |")
            print("| --- " * (len(pids) + 3) + "|")
            for viewers in [0, *counts]:
                seen = Watched()
                shown = fleet.as_operator["Authorization"]
                tasks = [asyncio.create_task(watch(fleet.url, shown, seen)) for _ in range(viewers)]
                await asyncio.sleep(SETTLE_S)
                size_bytes, frames = seen.size_bytes, seen.frames
                used = await asyncio.gather(
                    *(percent_of_a_core(pid, seconds) for pid in pids.values())
                )
                told = dict(zip(pids, used, strict=True))
                alone = alone or told
                frames, size_bytes = seen.frames - frames, seen.size_bytes - size_bytes
                row = [f"{told[name]:.1f} %, +{told[name] - alone[name]:.1f}" for name in pids]
                each = round(size_bytes / frames) if frames else 0
                print(f"| {viewers} | {' | '.join(row)} | {each} | {frames / seconds:.0f} |")
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            cost = told["API"] - alone["API"]
            verdict = "ok" if cost < AIM_PERCENT else "missed"
            print(f"\n{viewers} viewers: {cost:.1f} % of a core, < {AIM_PERCENT:g} %: {verdict}")
            calling.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--viewers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    command = ["python", "-m", "bench.dashboard", "--viewers", str(options.viewers)]
    print("\n".join(describe("uvicorn with uvloop", command)), end="\n\n")
    asyncio.run(measure([1, options.viewers], options.seconds))


if __name__ == "__main__":
    main()
