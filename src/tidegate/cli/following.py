"""A request followed to its end: shown as it moves, its answer printed, its pictures saved.

Invariant: standard output holds the answer (or the JSON) alone; what is for people only goes to
standard error. Leaving never ends the request.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tidegate.cli.client import ENDS, Gateway, is_passing
from tidegate.cli.exits import DONE, FAILED
from tidegate.cli.legible import legible
from tidegate.errors import GatewayRefused, GatewayUnreachable

if TYPE_CHECKING:
    from rich.status import Status

AWAY_S = 120.0
_COME_BACK_S = 1.0
_ASK_WHY_S = 1.0
_MARKS = {"succeeded": "green", "queued": "yellow", "running": "cyan"}
_SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "image/gif": ".gif"}


class Progress:
    """What a person sees on standard error: a line for each state, and beneath it, on a terminal,
    what is waited for. Nothing at all if `silent`."""

    def __init__(self, *, silent: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=silent)
        self._began = time.monotonic()
        self._status: Status | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not self._console.is_terminal or self._console.quiet:
            yield
            return
        with self._console.status("", spinner_style="cyan") as self._status:
            yield
        self._status = None

    def state(self, view: dict[str, Any]) -> None:
        from rich.text import Text

        name = view["status"]
        took_s = time.monotonic() - self._began
        line = Text.assemble(
            (f"{took_s:7.1f} s  ", "bright_black"),
            (f"{name:<11}", _MARKS.get(name, "red")),
            _details(view),
        )
        self._console.print(line)
        self.waiting("the provider answers" if name == "running" else "")

    def waiting(self, words: str) -> None:
        if self._status is not None:
            self._status.update(f"[bright_black]{words}[/]")

    def note(self, words: str) -> None:
        self._console.print(words, style="yellow", markup=False)


def _details(view: dict[str, Any]) -> str:
    match view["status"]:
        case "queued":
            parts = [view.get("type") or "its type is not certain yet"]
            if (place := view.get("place")) is not None:
                parts.append(f"place {place} in the queue")
            if error := view.get("error"):
                parts.append(f"after {error['code']}, tried again")
        case "running":
            parts = [view.get("model") or "", f"try {view['attempts']}" * (view["attempts"] > 1)]
        case _:
            parts = [view.get("model") or "", *_figures(view)]
    return ", ".join(part for part in parts if part)


def _figures(view: dict[str, Any]) -> Iterator[str]:
    if (queue_ms := view.get("queue_ms")) is not None:
        yield f"waited {queue_ms / 1000:.1f} s"
    if (upstream_ms := view.get("upstream_ms")) is not None:
        yield f"took {upstream_ms / 1000:.1f} s"
    usage = view.get("usage") or {}
    if "total_tokens" in usage:
        yield f"{usage['total_tokens']} tokens"
    if (cost := view.get("cost_micros")) is not None:
        yield f"cost {cost / 1e6:g}"


async def follow(
    gateway: Gateway, request_id: str, progress: Progress, *, as_json: bool
) -> dict[str, Any]:
    """Follow a request by its events until it has ended; its last state.

    A lost connection is taken up again where it was, for as long as AWAY_S. `as_json` prints each
    state as a line of JSON. Raises GatewayRefused, GatewayUnreachable.
    """
    asking = asyncio.create_task(_ask_why(gateway, request_id, progress))
    try:
        return await _follow(gateway, request_id, progress, as_json)
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def _follow(
    gateway: Gateway, request_id: str, progress: Progress, as_json: bool
) -> dict[str, Any]:
    last_id, heard_at, lost = "", time.monotonic(), False
    view: dict[str, Any] = {}
    while True:
        failure: GatewayRefused | GatewayUnreachable | None = None
        try:
            async for event in gateway.events(f"/status/{request_id}", last_id):
                last_id, heard_at, lost = event.event_id or last_id, time.monotonic(), False
                if event.name == "status":
                    view = event.data
                    progress.state(view)
                    if as_json:
                        show_line(view)
                if event.name == "done" or view.get("status") in ENDS:
                    return view
        except (GatewayRefused, GatewayUnreachable) as away:
            failure = away
        if failure is not None and not is_passing(failure):
            raise failure
        if failure is not None and time.monotonic() - heard_at > AWAY_S:
            raise failure
        if not lost and failure is not None:
            progress.note(f"lost the connection ({failure.message}); coming back")
            lost = True
        await asyncio.sleep(_COME_BACK_S)


async def _ask_why(gateway: Gateway, request_id: str, progress: Progress) -> None:
    """While it waits, show for what; an answer that fails is asked for again."""
    while True:
        await asyncio.sleep(_ASK_WHY_S)
        try:
            why = await gateway.get(f"/requests/{request_id}/why")
        except (GatewayRefused, GatewayUnreachable) as failed:
            progress.waiting(failed.message)
            continue
        if why["status"] == "queued":
            place = f", place {why['place']} in the queue" if "place" in why else ""
            progress.waiting(f"{why['sentence']}{place}")


async def wait(gateway: Gateway, request_id: str) -> dict[str, Any]:
    """The last state of a request, by asking until it has ended; as `follow` else."""
    heard_at = time.monotonic()
    while True:
        try:
            view: dict[str, Any] = await gateway.get(f"/status/{request_id}", wait="60")
        except (GatewayRefused, GatewayUnreachable) as failed:
            if not is_passing(failed) or time.monotonic() - heard_at > AWAY_S:
                raise
            await asyncio.sleep(_COME_BACK_S)
            continue
        heard_at = time.monotonic()
        if view["status"] in ENDS:
            return view


def show_line(value: object) -> None:
    import orjson

    typer.echo(orjson.dumps(value))


def show_answer(view: dict[str, Any]) -> int:
    """Print the answer of a request that has ended, or say why there is none; the exit code."""
    if text := view.get("text"):
        # Into a file or another program it goes as it is, escapes and all.
        typer.echo(legible(text) if sys.stdout.isatty() else text, color=True)
    if (answer := view.get("answer")) is not None:
        show_line(answer)
    if view["status"] == "succeeded":
        return DONE
    error = view.get("error") or {}
    why = f": {error['message']} ({error['code']})" if error else ""
    sys.stderr.write(legible(f"tidegate: request {view['request_id']} is {view['status']}{why}\n"))
    return FAILED


async def save_pictures(
    gateway: Gateway, view: dict[str, Any], output: Path | None, progress: Progress
) -> list[str]:
    """Save what pictures the answer has; their paths. `output` is a folder, which is made, or with
    a suffix the name of the one picture; without it pictures are only named."""
    saved = []
    pictures = view.get("images") or []
    for number, picture in enumerate(pictures, start=1):
        if output is None:
            progress.note(f"picture {number}: {gateway.url}{picture['url']} (--output saves it)")
            continue
        target = _target(output, view["request_id"], number, len(pictures), picture["mime_type"])
        target.parent.mkdir(parents=True, exist_ok=True)
        await gateway.download(picture["url"], target)
        saved.append(str(target))
        progress.note(f"picture {number} is saved as {target}")
    return saved


def _target(output: Path, request_id: str, number: int, count: int, mime_type: str) -> Path:
    if output.suffix and not output.is_dir():
        return output if count == 1 else output.with_stem(f"{output.stem}-{number}")
    name = request_id if count == 1 else f"{request_id}-{number}"
    return output / f"{name}{_SUFFIXES.get(mime_type, '.bin')}"
