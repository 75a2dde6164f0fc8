"""Command `tidegate batch run`: a file of prompts, processed as jobs."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.call import Kind
from tidegate.cli.client import GatewayClient, with_gateway
from tidegate.cli.limits import span_ms
from tidegate.cli.terminal import DONE, FAILED, Json, given, show_json
from tidegate.errors import GatewayRefused, GatewayUnreachable

if TYPE_CHECKING:
    from tidegate.cli.batch_run import Run, RunProgress

app = typer.Typer(help="Work through a file of prompts.", no_args_is_help=True)

_REDRAW_S = 0.2
_LOOK_S = 1.0
_PLAIN_S = 10.0


@app.callback()
def _batch() -> None:
    pass


LineTiers = Annotated[
    str | None, typer.Option(help="Processing tiers that lines may use: live,flex,batch.")
]


@app.command()
def run(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON lines, plain lines or CSV (.csv, .tsv).", exists=True, dir_okay=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Where results go; beside FILE, as NAME.results.jsonl, if not given."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="The column of prompts in a CSV file, if not `prompt`.")
    ] = None,
    type_: Annotated[
        Kind | None, typer.Option("--type", help="For lines that name no type.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="For lines that name no model.")] = None,
    priority: Annotated[
        int, typer.Option(min=-100, max=100, help="The lowest lets all others go first.")
    ] = -100,
    deadline: Annotated[
        str | None, typer.Option(help="Let a line expire that has waited 10m, 2h, 1d.")
    ] = None,
    tiers: LineTiers = None,
    window: Annotated[
        int, typer.Option(min=1, max=1_000, help="How many are submitted at a time.")
    ] = 64,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again what failed in an earlier run.")
    ] = False,
    json: Json = False,
) -> None:
    """Ask every prompt of a file, and write each answer down as it comes.

    Stopped, killed or cut off, the same command goes on where it was. Exit code 1 means that some
    lines have failed.
    """
    from tidegate.cli.batch_run import Results, Run, read

    deadline_ms = None if deadline is None else span_ms("--deadline", deadline)
    kind = type_ and type_.value
    options = given(type=kind, model=model, priority=priority, deadline_ms=deadline_ms)
    options |= {} if tiers is None else {"tiers": tiers.replace(" ", "").split(",")}
    target = output or file.with_name(f"{file.stem}.results.jsonl")
    prompts = read(file, column, options)

    async def work(gateway: GatewayClient) -> int:
        with Results(target) as results:
            batch = Run(gateway, prompts, results, window=window, retry_failed=retry_failed)
            try:
                await _shown(file.name, batch)
            except (asyncio.CancelledError, GatewayRefused, GatewayUnreachable, OSError):
                _say_stopped(batch.tally)
                raise
        _say_done(batch, target, json)
        return FAILED if batch.tally.failed + batch.failed_earlier else DONE

    raise typer.Exit(with_gateway(work))


async def _shown(name: str, batch: Run) -> None:
    """Run it, and show how far it is; on a terminal as it moves, else a line now and then."""
    running = asyncio.create_task(batch.run())
    try:
        with _display(name, batch.tally) as (draw, every_s):
            while not running.done():
                draw()
                await asyncio.wait({running}, timeout=every_s)
            draw()
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@contextmanager
def _display(name: str, tally: RunProgress) -> Iterator[tuple[Any, float]]:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(tally), _LOOK_S
        return
    from rich.live import Live

    from tidegate.cli.batch_run import bar

    with Live(bar(name, tally), console=console, auto_refresh=False) as live:
        yield lambda: live.update(bar(name, tally), refresh=True), _REDRAW_S


class _Lines:
    """A line on standard error now and then, and immediately if the reason to wait has changed."""

    def __init__(self, tally: RunProgress) -> None:
        self._tally = tally
        self._told = self._state()
        self._next = time.monotonic() + _PLAIN_S

    def __call__(self) -> None:
        now, told = time.monotonic(), self._state()
        if told == self._told or (now < self._next and told[1] == self._told[1]):
            return
        self._told, self._next = told, now + _PLAIN_S
        sys.stderr.write(f"{progress_in_words(self._tally)}\n")

    def _state(self) -> tuple[int, str]:
        # Without its figures, which move all the time.
        return self._tally.ended, re.sub(r"[0-9]+", "", self._tally.waiting)


def progress_in_words(tally: RunProgress) -> str:
    from tidegate.limiter import format_span

    words = f"{tally.ended} of {tally.total} done, {tally.failed} failed, {tally.per_second:.1f}/s"
    if tally.left_s is not None and tally.ended < tally.total:
        words += f", {format_span(tally.left_s * 1000)} left"
    return f"{words}; {tally.waiting}" if tally.waiting else words


def _say_stopped(tally: RunProgress) -> None:
    sys.stderr.write(
        f"tidegate: stopped with {tally.ended} of {tally.total} done; "
        f"{tally.submitted} are submitted and go on. The same command goes on from here.\n"
    )


def _say_done(batch: Run, output: Path, json: bool) -> None:
    from tidegate.limiter import format_span

    tally = batch.tally
    took_s = time.monotonic() - tally.began
    failed = tally.failed + batch.failed_earlier
    if json:
        show_json(
            {
                "lines": tally.total,
                "succeeded": tally.ended - failed,
                "failed": failed,
                "earlier": tally.earlier,
                "tokens": tally.tokens,
                "cost_micros": tally.cost_micros,
                "took_ms": round(took_s * 1000),
                "results": str(output),
            }
        )
        return
    words = f"{tally.ended - failed} of {tally.total} succeeded, {failed} failed"
    if tally.earlier:
        words += f" ({tally.earlier} of them in an earlier run)"
    words += f"; {format_span(took_s * 1000)}"
    if tally.tokens:
        words += f", {tally.tokens} tokens"
    if tally.cost_micros:
        words += f", cost {tally.cost_micros / 1e6:g}"
    sys.stderr.write(f"tidegate: {words}\n")
    if failed:
        sys.stderr.write("tidegate: --retry-failed asks again what failed\n")
    typer.echo(output)
