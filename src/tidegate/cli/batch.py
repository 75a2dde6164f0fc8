"""Commands `tidegate batch`: a file of prompts as jobs, with a bar and a file of results, and the
batches of all tenants.

Input is JSON lines, plain lines or CSV. Each line is a job with an idempotency key derived from the
file's content and the line's number, so that a second run of the same file submits nothing twice.
The results file is the only state of a run: one JSON line per finished job; an incomplete last line
is removed at start.

Invariants: a line's result is written before the next line takes its slot; Ctrl-C or `kill -9`
loses no result.
"""

from __future__ import annotations

import asyncio
import csv
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Self
from urllib.parse import quote

import typer

from tidegate.call import Kind
from tidegate.cli.client import ENDS, GatewayClient, is_passing, with_gateway
from tidegate.cli.limits import span_ms
from tidegate.cli.terminal import (
    DONE,
    FAILED,
    Json,
    Reason,
    given,
    show_json,
    show_result,
    show_table,
    who,
    whole_id,
)
from tidegate.errors import ConfigError, GatewayRefused, GatewayUnreachable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

app = typer.Typer(
    help="Process a file of prompts; list, pause, resume and cancel batches of all tenants.",
    no_args_is_help=True,
)

_REDRAW_S = 0.2
_POLL_S = 1.0
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
        typer.Option(help="The file of results. Default: NAME.results.jsonl beside FILE."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="The column of prompts in a CSV file, if not `prompt`.")
    ] = None,
    type_: Annotated[
        Kind | None, typer.Option("--type", help="The type of lines that name none.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model of lines that name none.")] = None,
    priority: Annotated[
        int, typer.Option(min=-100, max=100, help="-100 lets all other calls go first.")
    ] = -100,
    deadline: Annotated[
        str | None, typer.Option(help="Lines that wait longer than this expire: 10m, 2h, 1d.")
    ] = None,
    tiers: LineTiers = None,
    window: Annotated[
        int, typer.Option(min=1, max=1_000, help="The number of lines submitted concurrently.")
    ] = 64,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Submit lines again that failed in an earlier run."),
    ] = False,
    json: Json = False,
) -> None:
    """Submit every prompt of a file, and write each answer to a file as it arrives.

    After an interruption, run the same command again: it resumes where it stopped. Exit code 1 if
    lines have failed.
    """
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
                await _run_with_progress(file.name, batch)
            except (asyncio.CancelledError, GatewayRefused, GatewayUnreachable, OSError):
                _print_stopped(batch.tally)
                raise
        _print_done(batch, target, json)
        return FAILED if batch.tally.failed + batch.failed_earlier else DONE

    raise typer.Exit(with_gateway(work))


_MOST_LISTED = "200"
BatchId = Annotated[
    str, typer.Argument(metavar="ID", help="The id of a batch, or its beginning or end.")
]


@app.command("list")
def list_(
    is_all: Annotated[bool, typer.Option("--all", help="Include batches that have ended.")] = False,
    tenant: Annotated[str | None, typer.Option(help="Only batches of this tenant.")] = None,
    json: Json = False,
) -> None:
    """List the running batches of all tenants, newest first. For operators."""
    query = "" if is_all else "&open=true"
    query += "" if tenant is None else f"&tenant={quote(tenant, safe='')}"

    async def work(gateway: GatewayClient) -> Any:
        return await gateway.send("GET", f"/admin/batches?limit={_MOST_LISTED}{query}")

    found = with_gateway(work)
    if json:
        show_json(found)
        return
    if not found["items"]:
        typer.echo("there is no batch" if is_all else "no batch is in progress", err=True)
        return
    heads = ("batch", "tenant", "state", "done", "failed", "left", "called now", "paused by")
    show_table("", heads, [_listed(one) for one in found["items"]])
    if found["next_after"] is not None:
        typer.echo(f"only the newest {_MOST_LISTED} are shown")


def _listed(one: dict[str, Any]) -> tuple[str, ...]:
    pause = one["pause"]
    by = "" if pause is None else ": ".join(filter(None, (pause["by"], pause["reason"])))
    left = one["total"] - one["completed"] - one["failed"]
    counts = (one["completed"], one["failed"], left, one["calling"])
    state = "paused" if pause else one["status"].replace("_", " ")
    return (one["id"], one["tenant"], state, *(f"{count:,}" for count in counts), by)


@app.command()
def pause(batch: BatchId, reason: Reason = "", json: Json = False) -> None:
    """Pause a batch: no more lines start, running lines finish; its 24 hours continue to run."""
    done = _act(batch, "pause", reason)
    show_result(json, done, f"{done['id']} is paused: `tidegate batch resume` ends that")


@app.command()
def resume(batch: BatchId, reason: Reason = "", json: Json = False) -> None:
    """Resume a paused batch."""
    done = _act(batch, "resume", reason)
    show_result(json, done, f"{done['id']} goes on")


@app.command()
def cancel(batch: BatchId, reason: Reason = "", json: Json = False) -> None:
    """Cancel a batch; its result files have the lines that have ended."""
    done = _act(batch, "cancel", reason)
    show_result(json, done, f"{done['id']} is cancelled")


def _act(batch: str, verb: str, reason: str) -> dict[str, Any]:
    async def work(gateway: GatewayClient) -> Any:
        listed = await gateway.send("GET", "/admin/batches", limit=_MOST_LISTED)
        known = [one["id"] for one in listed["items"]]
        named = (
            batch if _WHOLE_ID.fullmatch(batch) else whole_id(batch, known, "the newest batches")
        )
        body = {"by": who(), "reason": reason}
        return await gateway.send("POST", f"/admin/batches/{named}/{verb}", body)

    done: dict[str, Any] = with_gateway(work)
    return done


_WHOLE_ID = re.compile(r"(?:msg)?batch_[0-9a-f]{32}")


async def _run_with_progress(name: str, batch: Run) -> None:
    """Run a batch and show its progress: live on a terminal, otherwise by a line now and then."""
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
        yield _Lines(tally), _POLL_S
        return
    from rich.live import Live

    with Live(bar(name, tally), console=console, auto_refresh=False) as live:
        yield lambda: live.update(bar(name, tally), refresh=True), _REDRAW_S


class _Lines:
    """Writes a line to standard error now and then, and immediately if the reason of the wait has
    changed."""

    def __init__(self, tally: RunProgress) -> None:
        self._tally = tally
        self._printed = self._state()
        self._next = time.monotonic() + _PLAIN_S

    def __call__(self) -> None:
        now, state = time.monotonic(), self._state()
        if state == self._printed or (now < self._next and state[1] == self._printed[1]):
            return
        self._printed, self._next = state, now + _PLAIN_S
        sys.stderr.write(f"{progress_in_words(self._tally)}\n")

    def _state(self) -> tuple[int, str]:
        # Without its figures, which change all the time.
        return self._tally.ended, re.sub(r"[0-9]+", "", self._tally.waiting)


def progress_in_words(tally: RunProgress) -> str:
    from tidegate.limiter import format_span

    words = f"{tally.ended} of {tally.total} done, {tally.failed} failed, {tally.per_second:.1f}/s"
    if tally.left_s is not None and tally.ended < tally.total:
        words += f", about {format_span(tally.left_s * 1000)} left"
    return f"{words}; {tally.waiting}" if tally.waiting else words


def _print_stopped(tally: RunProgress) -> None:
    sys.stderr.write(
        f"tidegate: stopped with {tally.ended} of {tally.total} done; "
        f"{tally.submitted} are submitted and go on. The same command goes on from here.\n"
    )


def _print_done(batch: Run, output: Path, json: bool) -> None:
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


MOST_BYTES = 200_000_000
MOST_LINES = 1_000_000
_PROMPTS = ("prompt", "data", "text")
_IDS = ("id", "custom_id", "prompt_id")
_ALONG = ("type", "model", "image_uri", "subject", "conversation")


@dataclass(frozen=True, slots=True)
class Line:
    """A request. `number` counts from 1 in the file; `fields` are those of `POST /submit`."""

    number: int
    prompt_id: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompts:
    """A whole file. `digest` covers the content and number of each line, with the options of the
    run."""

    lines: tuple[Line, ...]
    digest: str

    def key(self, line: Line, retries: int) -> str:
        """Return the idempotency key of a line after this number of failures."""
        again = f"-r{retries}" if retries else ""
        return f"batch-{self.digest}-{line.number}{again}"


def read(path: Path, column: str | None, options: dict[str, Any]) -> Prompts:
    """Return the file's lines; `options` are the defaults of their fields.

    Raises ConfigError, which names the line, for a line that is not a prompt, and for a repeated
    id.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError("FILE", str(path), f"must be at most {MOST_BYTES} bytes; split it")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as unreadable:
        why = getattr(unreadable, "strerror", None) or "not UTF-8 text"
        raise ConfigError("FILE", str(path), f"must be a readable file: {why}") from None
    is_table = path.suffix.lower() in (".csv", ".tsv")
    if column is not None and not is_table:
        raise ConfigError("--column", column, f"needs a file .csv or .tsv, which {path} is not")
    found = _of_table(path, text, column, options) if is_table else _of_lines(path, text, options)
    lines = tuple(found)
    _check(path, lines)
    # With numbers and ids: an added blank line, or other ids, would assign results to other lines.
    canonical = json.dumps(
        [(line.number, line.prompt_id, line.fields) for line in lines], sort_keys=True
    ).encode()
    return Prompts(lines, hashlib.sha256(canonical).hexdigest()[:32])


def _check(path: Path, lines: tuple[Line, ...]) -> None:
    if not lines:
        raise ConfigError("FILE", str(path), "must have at least one prompt in it")
    if len(lines) > MOST_LINES:
        raise ConfigError("FILE", str(path), f"must have at most {MOST_LINES} lines; split it")
    seen: dict[str, int] = {}
    for line in lines:
        if (before := seen.setdefault(line.prompt_id, line.number)) != line.number:
            raise _invalid_line(
                path, line.number, f"has the id {line.prompt_id!r} of line {before}"
            )


def _of_lines(path: Path, text: str, options: dict[str, Any]) -> Iterator[Line]:
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        if not line:
            continue
        made = _line(path, number, _value(path, number, line), options)
        if _SURROGATE.search(line) and _is_broken(made):
            raise _invalid_line(
                path, number, "has half a surrogate pair (\\ud800 to \\udfff) in it"
            )
        yield made


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _is_broken(line: Line) -> bool:
    """Return whether a text in a line is not valid Unicode, and could not be written into the
    results."""
    try:
        json.dumps((line.prompt_id, line.fields), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _value(path: Path, number: int, line: str) -> Any:
    """Return the JSON of a line; a line that is not JSON and does not look like it is a prompt."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        if line[0] in "{[":
            raise _invalid_line(path, number, "is broken JSON") from None
        return line
    return value if isinstance(value, str | dict | list) else line


def _line(path: Path, number: int, value: Any, options: dict[str, Any]) -> Line:
    if isinstance(value, str):
        return Line(number, str(number), {**options, "data": value})
    if not isinstance(value, dict):
        raise _invalid_line(path, number, "must be a text or an object")
    prompt_id = next((str(value[name]) for name in _IDS if value.get(name) is not None), None)
    prompt_id = prompt_id or str(number)
    if "url" in value and "body" in value:
        return Line(number, prompt_id, _native(value, options))
    prompt = next((value[name] for name in _PROMPTS if value.get(name) is not None), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise _invalid_line(path, number, f"must have a text as one of {', '.join(_PROMPTS)}")
    unknown = set(value) - {*_PROMPTS, *_IDS, *_ALONG}
    if unknown:
        known = ", ".join((*_PROMPTS, "id", *_ALONG))
        raise _invalid_line(path, number, f"has {sorted(unknown)[0]!r}; known are {known}")
    along = {name: value[name] for name in _ALONG if value.get(name) is not None}
    return Line(number, prompt_id, {**options, **along, "data": prompt})


def _native(value: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields for a line of an OpenAI batch; options on models and types are in its
    body."""
    job_fields: dict[str, Any] = {
        name: options[name] for name in ("priority", "deadline_ms", "tiers") if name in options
    }
    return {**job_fields, "endpoint": value["url"], "body": value["body"]}


def _of_table(path: Path, text: str, column: str | None, options: dict[str, Any]) -> Iterator[Line]:
    rows = csv.DictReader(
        text.splitlines(keepends=True), delimiter="\t" if path.suffix.lower() == ".tsv" else ","
    )
    columns = [name for name in rows.fieldnames or () if name]
    chosen = [column] if column is not None else [one for one in _PROMPTS if one in columns]
    if not chosen or chosen[0] not in columns:
        there = ", ".join(columns) or "none"
        raise ConfigError("--column", column, f"must name a column of {path}; it has: {there}")
    csv.field_size_limit(MOST_BYTES)
    for number, row in enumerate(rows, start=1):
        prompt = (row[chosen[0]] or "").strip()
        if not prompt:
            raise _invalid_line(path, number, f"has nothing in the column {chosen[0]}", what="row")
        given = {name: row[name] for name in _ALONG if row.get(name)}
        prompt_id = next((row[name] for name in _IDS if row.get(name)), str(number))
        yield Line(number, str(prompt_id), {**options, **given, "data": prompt})


def _invalid_line(path: Path, number: int, why: str, *, what: str = "line") -> ConfigError:
    return ConfigError("FILE", f"{path}, {what} {number}", why)


SUCCEEDED = "succeeded"


class Results:
    """An open file of results, for one run at a time. Raises ConfigError, naming `--output`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise ConfigError(
                "--output", str(path), "must be a file, from which the next run resumes"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("a+b")
        except OSError as error:
            allowed = f"must be a file that can be written: {error.strerror}"
            raise ConfigError("--output", str(path), allowed) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError("--output", str(path), "another run is writing it") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def read(self) -> list[dict[str, Any]]:
        """Return the rows of earlier runs; an incomplete last line is removed."""
        self._file.seek(0)
        rows: list[dict[str, Any]] = []
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(whole)
                break
            whole += len(line)
            if line.strip():
                rows.append(self._row(number, line))
        self._file.seek(0, os.SEEK_END)
        return rows

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        import orjson

        try:
            row = orjson.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            where = f"{self.path}, line {number}"
            raise ConfigError("--output", where, "is not a result of `tidegate batch run`")
        return row

    def add(self, row: dict[str, Any]) -> None:
        """Append a result. It is kept even if this process dies afterwards."""
        import orjson

        self._file.write(orjson.dumps(row) + b"\n")
        self._file.flush()


def row_of(line_id: str, number: int, key: str, view: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a result, from the last state of its request or from its rejection."""
    row: dict[str, Any] = {
        "id": line_id,
        "line": number,
        "status": view["status"],
        "request_id": view.get("request_id"),
        "model": view.get("model"),
        "text": view.get("text"),
        "usage": view.get("usage"),
        "cost_micros": view.get("cost_micros"),
        "error": view.get("error"),
        "key": key,
    }
    for name in ("answer", "images"):
        if view.get(name):
            row[name] = view[name]
    return row


DOWN_S = 600.0
NEVER_THERE_S = 60.0  # without any answer so far: the address may be wrong
_PAUSE_S = 1.0
_TOO_SOON_S = 0.1
_ASK_WHY_S = 1.0
_RATE_OVER_S = 20.0
# The time left is estimated by the rate over this time, once this part of the lines is done.
_LEFT_OVER_S = 180.0
_SOONEST = 0.02
_STOPPING = ("unauthenticated", "budget_exceeded", "budget_paused")


@dataclass
class RunProgress:
    """The progress of a run. `earlier` lines ended in earlier runs. `waiting` is the reason of a
    wait."""

    total: int
    earlier: int = 0
    done: int = 0
    failed: int = 0
    submitted: int = 0
    tokens: int = 0
    cost_micros: int = 0
    waiting: str = ""
    began: float = field(default_factory=time.monotonic)
    ends: deque[float] = field(default_factory=deque)
    # Times and numbers of done lines, at most one a second.
    _marks: deque[tuple[float, int]] = field(default_factory=deque)
    _before: tuple[float, int] | None = None

    @property
    def ended(self) -> int:
        return self.earlier + self.done

    @property
    def per_second(self) -> float:
        """Return the rate over the last seconds."""
        now = time.monotonic()
        while self.ends and now - self.ends[0] > _RATE_OVER_S:
            self.ends.popleft()
        span_s = min(_RATE_OVER_S, now - self.began)
        return len(self.ends) / span_s if span_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Return the estimated time until all lines have ended, by the mean rate of the last
        minutes, which is stable; None if it is unknown, or too early to estimate."""
        now = time.monotonic()
        if self.done < (self.total - self.earlier) * _SOONEST:
            return None
        while self._marks and now - self._marks[0][0] > _LEFT_OVER_S:
            self._before = self._marks.popleft()
        since, before = self._before or (self.began, 0)
        done, span_s = self.done - before, now - since
        return None if done <= 0 or span_s <= 0 else (self.total - self.ended) * span_s / done

    def count(self, row: dict[str, Any]) -> None:
        self.done += 1
        self.failed += row["status"] != SUCCEEDED
        self.tokens += (row["usage"] or {}).get("total_tokens") or 0
        self.cost_micros += row["cost_micros"] or 0
        now = time.monotonic()
        self.ends.append(now)
        if now - (self._marks[-1][0] if self._marks else self.began) >= 1:
            self._marks.append((now, self.done))


class Run:
    """A run. `tally` has its progress."""

    def __init__(
        self,
        gateway: GatewayClient,
        prompts: Prompts,
        results: Results,
        *,
        window: int,
        retry_failed: bool,
    ) -> None:
        self._gateway = gateway
        self._prompts = prompts
        self._results = results
        self._window = window
        self._queued: dict[int, str] = {}  # request ids of waiting lines
        self._answered_at = time.monotonic()
        self._patience_s = NEVER_THERE_S
        self._left = self._what_is_left(retry_failed)
        self.tally = RunProgress(len(prompts.lines), len(prompts.lines) - len(self._left))

    def _what_is_left(self, retry_failed: bool) -> list[tuple[Line, str]]:
        """Return the lines without a result, with their keys. Raises ConfigError for a file with
        results of other prompts."""
        succeeded: set[int] = set()
        failures: dict[int, int] = {}
        start = f"batch-{self._prompts.digest}-"
        for row in self._results.read():
            if not row["key"].startswith(start):
                allowed = "has results of other prompts or options: choose another file"
                raise ConfigError("--output", str(self._results.path), allowed)
            if row["status"] == SUCCEEDED:
                succeeded.add(row["line"])
            else:
                failures[row["line"]] = failures.get(row["line"], 0) + 1
        self.failed_earlier = 0 if retry_failed else len(failures.keys() - succeeded)
        return [
            (line, self._prompts.key(line, failures.get(line.number, 0)))
            for line in self._prompts.lines
            if line.number not in succeeded and (retry_failed or line.number not in failures)
        ]

    async def run(self) -> None:
        """Run until all lines have ended. Raises GatewayRefused if no line would be accepted,
        GatewayUnreachable after DOWN_S without an answer (NEVER_THERE_S if there never was one),
        and OSError for a result that cannot be written. If cancelled, submitted lines continue, and
        the next run finds them."""
        lines = iter(self._left)
        asking = asyncio.create_task(self._ask_why())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._window, len(self._left))):
                    group.create_task(self._work(lines))
        except ExceptionGroup as several:
            expected, other = several.split((GatewayRefused, GatewayUnreachable, OSError))
            if expected is None or other is not None:
                raise
            raise expected.exceptions[0] from None
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            self.tally.waiting = ""

    async def _work(self, lines: Iterator[tuple[Line, str]]) -> None:
        for line, key in lines:
            view = await self._ended(line, key)
            row = row_of(line.prompt_id, line.number, key, view)
            self._results.add(row)
            self.tally.count(row)

    async def _ended(self, line: Line, key: str) -> dict[str, Any]:
        """Submit a line and follow it to its end; the rejection of this line alone is its
        result."""
        request_id = None
        try:
            accepted = await self._patiently(lambda: self._gateway.submit(line.fields, key=key))
            request_id = accepted["request_id"]
            self.tally.submitted += 1
            view = await self._followed(line.number, request_id)
        except GatewayRefused as refused:
            if refused.problem in _STOPPING:
                raise
            error = {"code": refused.problem, "message": refused.message, "retryable": False}
            view = {"status": "refused", "error": error, "request_id": request_id}
        # Not if cancelled: submitted lines continue.
        self.tally.submitted -= request_id is not None
        self._queued.pop(line.number, None)
        return view

    async def _followed(self, number: int, request_id: str) -> dict[str, Any]:
        before = "queued"
        self._queued[number] = request_id
        while True:
            polled_at = time.monotonic()
            view: dict[str, Any] = await self._patiently(
                lambda: self._gateway.get(f"/status/{request_id}", wait="60", until="change")
            )
            if view["status"] in ENDS:
                return view
            if view["status"] == "running":
                self._queued.pop(number, None)
            if view["status"] == before and time.monotonic() - polled_at < _TOO_SOON_S:
                await asyncio.sleep(_PAUSE_S)  # the server has too many waiting clients
            before = view["status"]

    async def _patiently(self, call: Any) -> Any:
        """Call until there is an answer: the server may be restarting, or a cap be reached."""
        while True:
            try:
                answer = await call()
            except (GatewayRefused, GatewayUnreachable) as failed:
                if not is_passing(failed):
                    raise
                if isinstance(failed, GatewayRefused) and failed.problem == "quota_exceeded":
                    self._note_answer()
                if time.monotonic() - self._answered_at > self._patience_s:
                    raise
                self.tally.waiting = failed.message
                await asyncio.sleep(_PAUSE_S)
                continue
            self._note_answer()
            return answer

    def _note_answer(self) -> None:
        self._answered_at, self._patience_s = time.monotonic(), DOWN_S

    async def _ask_why(self) -> None:
        """Read now and then what the line that has waited longest waits for."""
        while True:
            await asyncio.sleep(_ASK_WHY_S)
            if not self._queued:
                self.tally.waiting = ""
                continue
            oldest = self._queued[min(self._queued)]
            try:
                why = await self._gateway.get(f"/requests/{oldest}/why")
            except (GatewayRefused, GatewayUnreachable) as failed:
                self.tally.waiting = failed.message
                continue
            if why["status"] == "queued":
                self.tally.waiting = re.sub("^waits", "waiting", why["sentence"])


_QUIET = "bright_black"


def bar(name: str, tally: RunProgress) -> RenderableType:
    """Return the progress, the rate and the reason of a wait: three lines, or more if the reason is
    long."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    whole = f"{tally.ended:,} of {tally.total:,}"
    share = tally.ended / tally.total if tally.total else 1.0
    top = Table.grid(padding=(0, 2), expand=True)
    top.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
    top.add_column(ratio=1)
    top.add_column(justify="right", no_wrap=True)
    top.add_column(justify="right", no_wrap=True)
    top.add_row(
        Text(name, style="bold"),
        ProgressBar(total=max(1, tally.total), completed=tally.ended, complete_style="cyan"),
        whole,
        f"{share:4.0%}",
    )
    lines: list[RenderableType] = [top, _pace(tally)]
    if tally.ended < tally.total:
        lines.append(_waiting(tally))
    return Group(*lines)


def _pace(tally: RunProgress) -> Text:
    from rich.text import Text

    from tidegate.limiter import format_span

    parts = Text(no_wrap=True, overflow="ellipsis")
    parts.append(f"{tally.per_second:.1f} a second", style="bold")
    parts.append(f"   {tally.done - tally.failed:,} succeeded", style="green")
    parts.append(f"   {tally.failed:,} failed", style="red" if tally.failed else _QUIET)
    if tally.earlier:
        parts.append(f"   {tally.earlier:,} before", style=_QUIET)
    if tally.left_s is not None and tally.ended < tally.total:
        parts.append(f"   about {format_span(tally.left_s * 1000)} left")
    return parts


def _waiting(tally: RunProgress) -> Text:
    from rich.text import Text

    words = f"{tally.submitted} submitted"
    if tally.waiting:
        words = f"{tally.waiting}; {words}"
    return Text(words, style=_QUIET)  # may wrap: advice is at its end
