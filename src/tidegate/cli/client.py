"""Client of a running Tidegate for the commands of its users, and the live view of one request.

Errors: GatewayRefused with the server's message, GatewayUnreachable. TIDEGATE_API_KEY is sent only
to TIDEGATE_URL, or to the address of `--url`; without it the operator's key is sent, only to
loopback addresses. Standard output has only the answer (or JSON), standard error the progress.
Ctrl-C stops the view, never the request.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

import typer

from tidegate.call import Status
from tidegate.cli.terminal import DONE, FAILED, called_url, legible
from tidegate.errors import ConfigError, GatewayRefused, GatewayUnreachable

if TYPE_CHECKING:
    import aiohttp
    from pydantic import SecretStr
    from rich.status import Status as RichStatus

    from tidegate.settings import Client

T = TypeVar("T")

_URL = "TIDEGATE_URL"
ENDS = tuple(status.value for status in Status if status.is_end)
CONNECT_S = 10.0
ANSWER_S = 90.0  # of silence: a long poll may take a minute; a large file may take any time
# The server sends a keep-alive after 15 s.
SILENT_S = 45.0
_PIECE_BYTES = 256 * 1024
_LONGEST_LINE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """An event of a stream; `event_id` is the id to resume after it."""

    name: str
    data: Any
    event_id: str


class GatewayClient:
    """A client of a gateway: `async with GatewayClient(settings) as gateway`."""

    def __init__(self, settings: Client) -> None:
        self.url = settings.url
        origin = _URL if settings.tidegate_url else "the default"
        self._named = f"{settings.url} ({origin if called_url.get() is None else '--url'})"
        self._is_here = settings.is_on_this_machine
        key = settings.tidegate_api_key
        self._shows = "" if key is None else "TIDEGATE_API_KEY"
        self._headers = {} if key is None else {"x-api-key": key.get_secret_value()}
        if key is None and (own := _operator_key(settings)) is not None:
            self._shows = "the operator's key (ADMIN_TOKEN, or operator.key in DATA_DIR)"
            self._headers = {"Authorization": f"Bearer {own.get_secret_value()}"}
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        import aiohttp

        self._http = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_S, sock_read=ANSWER_S),
            read_bufsize=_PIECE_BYTES,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.close()

    async def get(self, path: str, **query: str) -> Any:
        """Return the JSON at a path. Raises GatewayRefused, GatewayUnreachable."""
        async with self._answer_to("GET", path, params=query) as answer:
            return await answer.json()

    async def health(self) -> dict[str, Any]:
        """Return the answer of `/health/dependencies`, healthy or not. Raises as `get`."""
        async with self._answer_to("GET", "/health/dependencies", expected=(503,)) as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def check_key(self) -> None:
        """Raise GatewayRefused if the gateway does not know the key: otherwise its public answers
        would pass for all that the key may see."""
        try:
            await self.get("/requests", limit="1")
        except GatewayRefused as refused:
            if self._headers and refused.status == 401:
                raise

    async def send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, **query: str
    ) -> Any:
        """Send JSON and return the JSON of the answer. Raises as `get`."""
        given: dict[str, Any] = {} if body is None else {"json": body}
        async with self._answer_to(method, path, params=query, **given) as answer:
            return await answer.json()

    async def submit(
        self, fields: Mapping[str, Any], files: tuple[Path, ...] = (), key: str | None = None
    ) -> dict[str, Any]:
        """Submit a request, with its files as a form. Raises OSError for a file that cannot be
        read, and as `get`. With a `key` it is safe to repeat."""
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"json": fields} if not files else {"data": _form(fields, files)}
        async with self._answer_to("POST", "/submit", headers=headers, **body) as answer:
            accepted: dict[str, Any] = await answer.json()
            return accepted

    async def download(self, path: str, target: Path) -> None:
        """Write the content at a path into a file, which is complete or missing. Raises as `get`,
        and OSError."""
        half = target.with_name(f"{target.name}.part")
        try:
            # The server's links include the prefix of the request, which may be in TIDEGATE_URL
            # too.
            path = path.removeprefix(urlsplit(self.url).path)
            async with self._answer_to("GET", path) as answer:
                with half.open("wb") as file:
                    async for piece in answer.content.iter_chunked(_PIECE_BYTES):
                        file.write(piece)
            half.replace(target)
        finally:
            half.unlink(missing_ok=True)

    async def events(self, path: str, last_id: str = "") -> AsyncIterator[ServerEvent]:
        """Yield server-sent events after `last_id` until the server ends the stream; the first one,
        named `open`, is for the connection. Raises as `get`, and GatewayUnreachable if the
        connection is lost."""
        import aiohttp

        headers = {"Accept": "text/event-stream"}
        if last_id:
            headers["Last-Event-ID"] = last_id
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_S, sock_read=SILENT_S)
        async with self._answer_to("GET", path, headers=headers, timeout=timeout) as answer:
            yield ServerEvent("open", None, "")
            fields: dict[str, str] = {}
            # Not by aiohttp's lines, whose bound a text in an event may exceed.
            async for raw in _lines(answer.content):
                line = raw.decode().rstrip("\r\n")
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif "data" in fields:
                    yield _event(fields)
                    fields = {}
                else:
                    fields = {}

    @asynccontextmanager
    async def _answer_to(
        self, method: str, path: str, expected: tuple[int, ...] = (), **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        import aiohttp

        try:
            async with self._http.request(
                method, self.url + path, allow_redirects=False, **options
            ) as answer:
                if answer.status >= 300 and answer.status not in expected:
                    raise await self._refusal(answer)
                yield answer
        except aiohttp.ClientError as failed:
            why = f"{self._named} does not answer: {_words(failed)}{self._way_out}"
            raise GatewayUnreachable(why) from failed
        except TimeoutError as late:
            raise GatewayUnreachable(f"{self._named} does not answer in time") from late

    @property
    def _way_out(self) -> str:
        start = "`tidegate up` starts one here, and " if self._is_here else ""
        return f"; {start}{_URL} or --url says where one runs"

    async def _refusal(self, answer: aiohttp.ClientResponse) -> GatewayRefused | GatewayUnreachable:
        """Return the error for a status other than 2xx, with the server's message."""
        import orjson

        try:
            problem = orjson.loads(await answer.read())
            message, code = str(problem["detail"]), str(problem["code"])
        except (ValueError, KeyError, TypeError):
            return GatewayUnreachable(
                f"{self._named} answers {answer.status} and is not a Tidegate gateway"
            )
        if answer.status == 401:
            message = self._unknown_key(message)
        elif answer.status == 403 and "field" not in problem and "allowed" in problem:
            message += f" (it has: {problem['allowed']}); `tidegate keys create` makes another"
        elif "allowed" in problem and not message.endswith(str(problem["allowed"])):
            message += f" (allowed: {problem['allowed']})"
        retry_after_ms = problem.get("retry_after_ms")
        return GatewayRefused(
            message, status=answer.status, problem=code, retry_after_ms=retry_after_ms
        )

    def _unknown_key(self, message: str) -> str:
        """Return what is wrong with the key, without advice for programs."""
        if not self._shows:
            return (
                f"{self._named} asks for a key: set TIDEGATE_API_KEY, or run the command with the "
                "DATA_DIR of the deployment"
            )
        why = message.partition(": send one as")[0].partition("; or send ")[0]
        return (
            f"{self._shows}: {why}; set TIDEGATE_API_KEY to one that `tidegate keys create` makes"
        )


def _operator_key(settings: Client) -> SecretStr | None:
    """Return the operator's key of a deployment with these settings, if this user may read it."""
    from tidegate.operator_key import existing_operator_key
    from tidegate.settings import load

    if not settings.is_on_this_machine:
        return None
    try:
        return existing_operator_key(load())
    except ConfigError:  # reported by the commands that need those settings
        return None


def with_gateway(work: Callable[[GatewayClient], Coroutine[Any, Any, T]]) -> T:
    """Run a command's work on the gateway in the settings; Ctrl-C cancels it and raises
    KeyboardInterrupt."""
    settings = _settings()

    async def run() -> T:
        async with GatewayClient(settings) as gateway:
            return await work(gateway)

    return asyncio.run(run())


def _settings() -> Client:
    from tidegate.settings import load_client

    if (url := called_url.get()) is None:
        return load_client()
    try:
        return load_client({**os.environ, _URL: url})
    except ConfigError as invalid:
        option = "--url" if invalid.variable == _URL else invalid.variable
        raise ConfigError(option, invalid.value, invalid.allowed) from None


def is_passing(error: GatewayRefused | GatewayUnreachable) -> bool:
    """Return whether a retry may help: the server is unavailable, full, or a cap is reached."""
    if isinstance(error, GatewayUnreachable):
        return True
    return error.status in (408, 502, 503, 504) or error.problem == "quota_exceeded"


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in content.iter_any():
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line
        if len(rest) > _LONGEST_LINE_BYTES:
            raise GatewayUnreachable("the server sends an event that is too long")


def _event(fields: Mapping[str, str]) -> ServerEvent:
    import orjson

    try:
        data = orjson.loads(fields["data"])
    except ValueError:
        raise GatewayUnreachable("the server sends events that are not JSON") from None
    return ServerEvent(fields.get("event", "message"), data, fields.get("id", ""))


def _form(fields: Mapping[str, Any], files: tuple[Path, ...]) -> aiohttp.FormData:
    import mimetypes

    import aiohttp

    form = aiohttp.FormData()
    for name, value in fields.items():
        form.add_field(name, ",".join(value) if isinstance(value, list) else str(value))
    for path in files:
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        form.add_field("file", path.open("rb"), filename=path.name, content_type=kind)
    return form


def _words(error: BaseException) -> str:
    """Return the description of an error; for one of the operating system its own text, since
    asyncio's lists every address that was tried. TLS and the resolver have their own error
    numbers."""
    number = getattr(error, "errno", None)
    cause = getattr(error, "os_error", error)
    if isinstance(cause, (ssl.SSLError, socket.gaierror)):
        return f"{'TLS: ' if isinstance(cause, ssl.SSLError) else ''}{cause.strerror or cause}"
    if number is not None and number > 0:
        return os.strerror(number)
    return str(error) or type(error).__name__


DOWN_S = 120.0
_RECONNECT_AFTER_S = 1.0
_ASK_WHY_S = 1.0
_MARKS = {"succeeded": "green", "queued": "yellow", "running": "cyan"}
_SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "image/gif": ".gif"}


class Progress:
    """Progress on standard error: a line for each state, and below it, on a terminal, the reason of
    a wait. Nothing if `silent`."""

    def __init__(self, *, silent: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=silent)
        self._began = time.monotonic()
        self._status: RichStatus | None = None

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
    gateway: GatewayClient, request_id: str, progress: Progress, *, as_json: bool
) -> dict[str, Any]:
    """Follow a request by its events until it has ended, and return its last state.

    A lost connection is resumed, for at most DOWN_S. `as_json` prints each state as a line of JSON.
    Raises GatewayRefused, GatewayUnreachable.
    """
    asking = asyncio.create_task(_ask_why(gateway, request_id, progress))
    try:
        return await _follow(gateway, request_id, progress, as_json)
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def _follow(
    gateway: GatewayClient, request_id: str, progress: Progress, as_json: bool
) -> dict[str, Any]:
    last_id, lost_at = "", math.inf
    view: dict[str, Any] = {}
    while True:
        failure: GatewayRefused | GatewayUnreachable | None = None
        try:
            async for event in gateway.events(f"/status/{request_id}", last_id):
                last_id, lost_at = event.event_id or last_id, math.inf
                if event.name == "status":
                    view = event.data
                    progress.state(view)
                    if as_json:
                        show_line(view)
                if event.name == "done" or view.get("status") in ENDS:
                    return view
        except (GatewayRefused, GatewayUnreachable) as unreachable:
            failure = unreachable
        if failure is not None and not is_passing(failure):
            raise failure
        if failure is not None and time.monotonic() - lost_at > DOWN_S:
            raise failure
        if failure is not None and lost_at == math.inf:
            progress.note(f"lost the connection ({failure.message}); coming back")
            lost_at = time.monotonic()
        await asyncio.sleep(_RECONNECT_AFTER_S)


async def _ask_why(gateway: GatewayClient, request_id: str, progress: Progress) -> None:
    """While the request waits, show the reason; a failed read is repeated."""
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


async def wait(gateway: GatewayClient, request_id: str) -> dict[str, Any]:
    """Poll a request until it has ended, and return its last state. Raises as `follow`."""
    answered_at = time.monotonic()
    while True:
        try:
            view: dict[str, Any] = await gateway.get(f"/status/{request_id}", wait="60")
        except (GatewayRefused, GatewayUnreachable) as failed:
            if not is_passing(failed) or time.monotonic() - answered_at > DOWN_S:
                raise
            await asyncio.sleep(_RECONNECT_AFTER_S)
            continue
        answered_at = time.monotonic()
        if view["status"] in ENDS:
            return view


def show_line(value: object) -> None:
    import orjson

    typer.echo(orjson.dumps(value))


def show_answer(view: dict[str, Any]) -> int:
    """Print the answer of an ended request, or why there is none. Return the exit code."""
    if text := view.get("text"):
        # Into a file or another program the text is written unchanged, including escapes.
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
    gateway: GatewayClient, view: dict[str, Any], output: Path | None, progress: Progress
) -> list[str]:
    """Save the pictures of an answer and return their paths. `output` is a folder, which is
    created, or with a suffix the name of the only picture; without it the pictures' URLs are
    shown."""
    saved = []
    pictures = view.get("images") or []
    for number, picture in enumerate(pictures, start=1):
        if output is None:
            progress.note(f"picture {number}: {gateway.url}{picture['url']} (--output saves it)")
            continue
        target = _target(output, view["request_id"], number, len(pictures), picture["mime_type"])
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            await gateway.download(picture["url"], target)
        except OSError as failed:
            if failed.filename is None:
                raise
            why = f"cannot be written: {failed.strerror}"
            raise ConfigError("--output", str(target), why) from failed
        saved.append(str(target))
        progress.note(f"picture {number} is saved as {target}")
    return saved


def _target(output: Path, request_id: str, number: int, count: int, mime_type: str) -> Path:
    if output.suffix and not output.is_dir():
        return output if count == 1 else output.with_stem(f"{output.stem}-{number}")
    name = request_id if count == 1 else f"{request_id}-{number}"
    return output / f"{name}{_SUFFIXES.get(mime_type, '.bin')}"
