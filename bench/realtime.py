"""What realtime sessions cost an API process: `python -m bench.realtime`.

Starts an API process with the emulator as its provider and Valkey and PostgreSQL of its own, opens
sessions by waves, has them speak turns for a while, and closes them. Prints the process's memory
(PSS) before, with all of them open, over time, and after, and how many the provider has open.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import time
from pathlib import Path

import orjson
from websockets.asyncio.client import ClientConnection, connect

from tests.fleet import Fleet
from tests.waiting import wait_until

MODEL = "gemini-2.5-flash"
WAVE = 50
SOUND = '{"type":"input_audio_buffer.append","audio":"' + "A" * 6_400 + '"}'  # 100 ms
ASK = '{"type":"response.create","response":{"output_modalities":["text"]}}'


def pss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise ValueError(f"no memory of {pid}")


async def opened(url: str) -> ClientConnection:
    socket = await connect(
        f"ws{url.removeprefix('http')}/v1/realtime?model={MODEL}",
        additional_headers={"Authorization": "Bearer x"},
        proxy=None,
        compression=None,
        open_timeout=60,
    )
    await socket.recv()
    return socket


async def turn(socket: ClientConnection) -> None:
    for _ in range(3):
        await socket.send(SOUND)
    await socket.send(ASK)
    while orjson.loads(await socket.recv())["type"] != "response.done":
        pass


async def measured(folder: Path, sessions: int, rounds: int) -> None:
    """Of a deployment in `folder`, which has a policy with room for the sessions."""
    settings = {"LOG_LEVEL": "warning", "TIDEGATE_POLICY": str(folder / "policy.toml")}
    async with Fleet(folder, apis=1, workers=0, settings=settings) as fleet:
        url, (child,) = fleet.url, fleet.apis.values()
        pid = child.process.pid
        one = await opened(url)  # what is loaded at the first is no session's
        await turn(one)
        await one.close()
        before = pss_kb(pid)
        print(f"before: {before / 1024:.1f} MB")
        sockets: list[ClientConnection] = []
        while len(sockets) < sessions:
            number = min(WAVE, sessions - len(sockets))
            sockets += await asyncio.gather(*(opened(url) for _ in range(number)))
        idle = pss_kb(pid)
        each = (idle - before) / sessions
        print(f"{sessions} open: {idle / 1024:.1f} MB, {each:.1f} KB each")
        for number in range(rounds):
            began = time.monotonic()
            for start in range(0, sessions, WAVE):
                await asyncio.gather(*(turn(one) for one in sockets[start : start + WAVE]))
            took_s = time.monotonic() - began
            said = f"round {number + 1}: {pss_kb(pid) / 1024:.1f} MB"
            print(f"{said}, {sessions / took_s:.0f} turns a second", flush=True)
        in_flight = (await fleet.control.stats())["realtime"].in_flight
        print(f"in flight at the provider: {in_flight}")
        for start in range(0, sessions, WAVE):
            await asyncio.gather(*(one.close() for one in sockets[start : start + WAVE]))

        async def all_ended() -> bool:
            return not (await fleet.control.stats())["realtime"].in_flight

        await wait_until(all_ended, 30, "the end of all sessions")
        print(f"after: {pss_kb(pid) / 1024:.1f} MB")
        again = await asyncio.gather(*(opened(url) for _ in range(10)))
        await asyncio.gather(*(one.close() for one in again))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.realtime")
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each session")
    asked = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="realtime-") as folder:
        policy = f'[limits]\n"kind:realtime" = {asked.sessions}\n'
        (Path(folder) / "policy.toml").write_text(policy)
        asyncio.run(measured(Path(folder), asked.sessions, asked.rounds))


if __name__ == "__main__":
    main()
