"""How much disk the record takes: `python -m bench.record [--requests 2000]`.

Jobs, streams and native calls go through the whole product to an emulated provider, with prompts
and answers of a stated length, out of words in random order, so that they are packed about as well
as real text is. What PostgreSQL's tables have grown by is divided by the requests. Told apart from
it are the bytes of its log (what an archive of it, or a replica, receives) and those of files.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import aiohttp
import asyncpg

from bench.machine import describe
from tests.fleet import Fleet

_AT_ONCE = 50
_WORDS_SEED = 7
_GIB = 1024**3
_SIZE = """
    SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'
"""


@dataclass(frozen=True, slots=True)
class Disk:
    tables_bytes: int
    log_bytes: int
    files_bytes: int

    def __sub__(self, before: Disk) -> Disk:
        return Disk(
            self.tables_bytes - before.tables_bytes,
            self.log_bytes - before.log_bytes,
            self.files_bytes - before.files_bytes,
        )


class Words:
    """A vocabulary of 5,000, the first of which are used most, as in real text."""

    def __init__(self) -> None:
        self._rng = rng = random.Random(_WORDS_SEED)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        self._words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5_000)]
        weights = [1 / (rank + 10) for rank in range(len(self._words))]
        self._weights = list(accumulate(weights))

    def text(self, chars: int) -> str:
        said = self._rng.choices(self._words, cum_weights=self._weights, k=chars // 3)
        return " ".join(said)[:chars]


async def _disk(connection: asyncpg.Connection, blobs: Path) -> Disk:
    await connection.execute("CHECKPOINT")
    lsn = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"
    sizes = (await connection.fetchval(_SIZE), await connection.fetchval(lsn))
    return Disk(*sizes, _bytes_in(blobs))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


async def _job(http: aiohttp.ClientSession, url: str, prompt: str) -> None:
    async with http.post(f"{url}/submit", json={"data": prompt}) as answer:
        body = await answer.json()
        if answer.status != 202:
            raise RuntimeError(body)
    status = "queued"
    while status in ("queued", "running"):
        async with http.get(f"{url}/status/{body['request_id']}?wait=20") as answer:
            if answer.status != 503:  # a busy machine: asked again
                status = (await answer.json())["status"]
    if status != "succeeded":
        raise RuntimeError(status)


async def _stream(http: aiohttp.ClientSession, url: str, prompt: str) -> None:
    async with http.post(f"{url}/stream", json={"text": prompt}) as answer:
        if "event: done" not in await answer.text():
            raise RuntimeError(answer.status)


async def _native(http: aiohttp.ClientSession, url: str, prompt: str) -> None:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": "gemini-2.5-flash", "messages": messages}
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(await answer.text())
        await answer.read()


async def _measure(requests: int, prompt_chars: int, answer_chars: int) -> dict[str, Disk]:
    words = Words()
    limits = {"RATE_LIMITS": f'{{"text_only": {_AT_ONCE}}}', "CLASSIFIER": "keywords"}
    found: dict[str, Disk] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with Fleet(Path(folder), apis=1, workers=1, settings=limits) as fleet:
            connection = await asyncpg.connect(fleet.postgres.url())
            blobs = Path(folder) / "data" / "blobs"
            ways = {"a job": _job, "a stream": _stream, "a native call": _native}
            for name, way in ways.items():
                before = await _disk(connection, blobs)

                async def some(count: int, way: Callable[..., Awaitable[None]] = way) -> None:
                    for _ in range(count):
                        await fleet.control.set_behaviour(answer=words.text(answer_chars))
                        await way(fleet.http, fleet.url, words.text(prompt_chars))

                await asyncio.gather(*(some(requests // _AT_ONCE) for _ in range(_AT_ONCE)))
                await asyncio.sleep(1)  # what is written in batches
                found[name] = await _disk(connection, blobs) - before
            await connection.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2_000, help="of each kind")
    parser.add_argument("--prompt-chars", type=int, default=1_000)
    parser.add_argument("--answer-chars", type=int, default=2_000)
    options = parser.parse_args()
    requests = options.requests // _AT_ONCE * _AT_ONCE
    command = ["python", "-m", "bench.record", "--requests", str(options.requests)]
    print("\n".join(describe("PostgreSQL of the wheel", command)))
    found = asyncio.run(_measure(requests, options.prompt_chars, options.answer_chars))
    print(
        f"\nGB per million requests, prompts of {options.prompt_chars} and answers of "
        f"{options.answer_chars} characters:\n"
    )
    print("| one million of | tables | log written | files |\n|---|---|---|---|")
    for name, disk in found.items():
        each = [
            f"{size / requests * 1_000_000 / _GIB:.1f}"
            for size in (disk.tables_bytes, disk.log_bytes, disk.files_bytes)
        ]
        print(f"| {name.removeprefix('a ')}s | {' | '.join(each)} |")


if __name__ == "__main__":
    main()
