"""Mixed load for a fleet: marked prompts of every kind, submitted and streamed, each followed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from tests.fleet import Fleet

RECORDED_NS = 1_000_000_000  # from a call's end to its being recorded, on a busy machine
ARRIVED_NS = 20_000_000  # from a call's being sent to its being logged where it arrives

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360f8cfc000000301010018dd8db00000000049454e44ae426082"
)


@dataclass(slots=True)
class StreamEnd:
    """What a client saw of its stream. `end` is done, error, cut or refused."""

    status: int
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    end: str = "cut"

    @property
    def text(self) -> str:
        return "".join(data["text"] for name, data in self.events if name == "delta")


def form_for(marker: str, number: int) -> tuple[str, dict[str, Any]]:
    """Kind and body of the number-th request; three in six text, two multi-modal, one image."""
    if number % 6 in (1, 4):
        return "multi_modal", {"data": f"Describe this picture [{marker}]", "file": PNG}
    if number % 6 == 2:
        return "image_generation", {"data": f"Generate an image of a fox [{marker}]"}
    return "text_only", {"data": f"Explain why the tide turns [{marker}]"}


def _form(body: dict[str, Any]) -> aiohttp.FormData:
    form = aiohttp.FormData()
    for name, value in body.items():
        if isinstance(value, bytes):
            form.add_field(name, value, filename="a.png", content_type="image/png")
        else:
            form.add_field(name, value)
    return form


async def submit(fleet: Fleet, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """POST /submit, as JSON unless there is a file."""
    has_file = any(isinstance(value, bytes) for value in body.values())
    payload: dict[str, Any] = {"data": _form(body)} if has_file else {"json": body}
    async with fleet.http.post(f"{url}/submit", **payload) as response:
        return response.status, await response.json(content_type=None)


async def stream(fleet: Fleet, url: str, body: dict[str, Any]) -> StreamEnd:
    """POST /stream, read to its end."""
    try:
        async with fleet.http.post(f"{url}/stream", data=_form(body)) as response:
            seen = StreamEnd(response.status)
            if response.status != 200:
                seen.events.append(("refused", await response.json(content_type=None)))
                seen.end = "refused"
                return seen
            with contextlib.suppress(aiohttp.ClientError):  # then `end` stays "cut"
                await _read_events(response, seen)
            return seen
    except aiohttp.ClientError:
        return StreamEnd(0)


async def _read_events(response: aiohttp.ClientResponse, seen: StreamEnd) -> None:
    name = ""
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            seen.events.append((name, orjson.loads(line.removeprefix("data: "))))
            if name in ("done", "error"):
                seen.end = name


class Load:
    """Submits and streams spread over all APIs. `ids` maps each marker to its request id."""

    def __init__(self, fleet: Fleet, name: str = "m") -> None:
        self.fleet = fleet
        self.name = name
        self.ids: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.streams: dict[str, tuple[str, asyncio.Task[StreamEnd]]] = {}

    async def submit(self, count: int) -> None:
        """All `count` at once, answered 202, spread over the APIs."""
        urls = list(self.fleet.apis)

        async def one(number: int) -> None:
            marker = f"{self.name}{number}"
            kind, body = form_for(marker, number)
            status, answer = await submit(self.fleet, urls[number % len(urls)], body)
            assert status == 202, answer
            self.ids[marker], self.kinds[marker] = answer["request_id"], kind

        known = len(self.ids)
        await asyncio.gather(*(one(number) for number in range(known, known + count)))

    def start_streams(self, count: int) -> None:
        urls = list(self.fleet.apis)
        for number in range(count):
            marker = f"{self.name}s{number}"
            kind, body = form_for(marker, number)
            url = urls[number % len(urls)]
            self.kinds[marker] = kind
            task = asyncio.create_task(stream(self.fleet, url, body))
            self.streams[marker] = (url, task)

    async def stream_ends(self) -> dict[str, StreamEnd]:
        return {marker: await task for marker, (_, task) in self.streams.items()}

    async def ends(self, timeout_s: float = 90) -> dict[str, dict[str, Any]]:
        """Each submitted request's final status, by marker."""
        ends = await asyncio.gather(
            *(self.fleet.end_of(request_id, timeout_s) for request_id in self.ids.values())
        )
        return dict(zip(self.ids, ends, strict=True))

    async def assert_all_succeeded(self, timeout_s: float = 90) -> None:
        """Every submitted request succeeded, as the kind it was meant to be."""
        ends = await self.ends(timeout_s)
        states = Counter(end["status"] for end in ends.values())
        assert states == {"succeeded": len(ends)}, states
        wrong = {m: end["type"] for m, end in ends.items() if end["type"] != self.kinds[m]}
        assert not wrong

    async def assert_called_once(
        self, *, killed_at_ns: Sequence[int] = (), held: Collection[str] = ()
    ) -> None:
        """No prompt reached the provider twice, but for calls that a kill cut off, and those of
        requests that a frozen process `held`.

        Those were in flight at the kill, or had ended so shortly before that their result was
        still on its way into the record; each is repeated once at most.
        """
        calls = await self.fleet.calls_by_marker()
        missing = [marker for marker in self.ids if not calls[marker]]
        assert not missing, f"never called: {missing}"
        for marker, seen in calls.items():
            if len(seen) == 1:
                continue
            assert len(seen) == 2, (marker, seen)
            if self.ids.get(marker) in held:
                continue
            ended_ns = seen[0].ended_ns or time.time_ns()
            sent_ns = seen[0].started_ns - ARRIVED_NS
            cut = [at for at in killed_at_ns if sent_ns <= at <= ended_ns + RECORDED_NS]
            assert cut, f"{marker} was called twice, and no kill is why: {seen}"
