"""Calling a Tidegate that runs somewhere: what the commands for its users stand on.

Invariant: whatever goes wrong leaves as GatewayRefused, with the server's own words, or as
GatewayUnreachable; TIDEGATE_API_KEY is sent to TIDEGATE_URL and to nobody else. Without one, the
operator's key is sent, and only to a loopback address.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

from tidegate.errors import ConfigError, GatewayRefused, GatewayUnreachable
from tidegate.store.states import Status

if TYPE_CHECKING:
    import aiohttp
    from pydantic import SecretStr

    from tidegate.config import Client

T = TypeVar("T")

ENDS = tuple(status.value for status in Status if status.is_end)
CONNECT_S = 10.0
ANSWER_S = 90.0  # of silence: a long poll may take a minute, and a large file as long as it takes
# The server fills silence after 15 s.
SILENT_S = 45.0
_PIECE_BYTES = 256 * 1024
_LONGEST_LINE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of a stream; `event_id` is where to go on after it."""

    name: str
    data: Any
    event_id: str


class Gateway:
    """One Tidegate. `async with Gateway(settings) as gateway`."""

    def __init__(self, settings: Client) -> None:
        self.url = settings.url
        self._named = (
            f"{settings.url} ({'TIDEGATE_URL' if settings.tidegate_url else 'the default'})"
        )
        key = settings.tidegate_api_key
        self._has_key = key is not None
        self._headers = {} if key is None else {"x-api-key": key.get_secret_value()}
        if key is None and (own := _operator_key(settings)) is not None:
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
        """The JSON at a path. Raises GatewayRefused, GatewayUnreachable."""
        async with self._asked("GET", path, params=query) as answer:
            return await answer.json()

    async def submit(
        self, fields: Mapping[str, Any], files: tuple[Path, ...] = (), key: str | None = None
    ) -> dict[str, Any]:
        """Hand in a request, with its files as a form. Raises OSError for a file of ours that
        can't be read, and as `get`. With a `key` it is safe to repeat."""
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"json": fields} if not files else {"data": _form(fields, files)}
        async with self._asked("POST", "/submit", headers=headers, **body) as answer:
            accepted: dict[str, Any] = await answer.json()
            return accepted

    async def download(self, path: str, target: Path) -> None:
        """Write what is at a path into a file, whole or not at all. Raises as `get`, and
        OSError."""
        half = target.with_name(f"{target.name}.part")
        try:
            # Links of the server's have the prefix under which it was called, as TIDEGATE_URL may.
            path = path.removeprefix(urlsplit(self.url).path)
            async with self._asked("GET", path) as answer:
                with half.open("wb") as file:
                    async for piece in answer.content.iter_chunked(_PIECE_BYTES):
                        file.write(piece)
            half.replace(target)
        finally:
            half.unlink(missing_ok=True)

    async def events(self, path: str, last_id: str = "") -> AsyncIterator[ServerEvent]:
        """Server-sent events from after `last_id` until the server ends. Raises as `get`, and
        GatewayUnreachable where the connection is lost."""
        import aiohttp

        headers = {"Accept": "text/event-stream"}
        if last_id:
            headers["Last-Event-ID"] = last_id
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_S, sock_read=SILENT_S)
        async with self._asked("GET", path, headers=headers, timeout=timeout) as answer:
            fields: dict[str, str] = {}
            # Not by its own lines: one may be longer than their bound, as a whole text in an event.
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
    async def _asked(
        self, method: str, path: str, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        import aiohttp

        try:
            async with self._http.request(
                method, self.url + path, allow_redirects=False, **options
            ) as answer:
                if answer.status >= 300:
                    raise await self._refusal(answer)
                yield answer
        except aiohttp.ClientError as failed:
            raise GatewayUnreachable(f"{self._named} does not answer: {_words(failed)}") from failed
        except TimeoutError as late:
            raise GatewayUnreachable(f"{self._named} does not answer in time") from late

    async def _refusal(self, answer: aiohttp.ClientResponse) -> GatewayRefused | GatewayUnreachable:
        """What a status other than 2xx means, in the server's words."""
        import orjson

        try:
            problem = orjson.loads(await answer.read())
            said, code = str(problem["detail"]), str(problem["code"])
        except (ValueError, KeyError, TypeError):
            return GatewayUnreachable(f"{self._named} answers {answer.status} and is no Tidegate")
        if "allowed" in problem:
            said += f" (allowed: {problem['allowed']})"
        if answer.status in (401, 403) and not self._has_key:
            said += "; set TIDEGATE_API_KEY"
        retry_after_ms = problem.get("retry_after_ms")
        return GatewayRefused(
            said, status=answer.status, problem=code, retry_after_ms=retry_after_ms
        )


def _operator_key(settings: Client) -> SecretStr | None:
    """The key of a deployment of these settings, where this user may read it."""
    from tidegate.config import existing_operator_key, load

    if not settings.is_on_this_machine:
        return None
    try:
        return existing_operator_key(load())
    except ConfigError:  # told by the commands that need those settings
        return None


def calling(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work to its end; Ctrl-C cancels it and raises KeyboardInterrupt."""
    return asyncio.run(work)


def is_passing(error: GatewayRefused | GatewayUnreachable) -> bool:
    """Whether asking again later may help: the server is away, full, or has a cap reached."""
    if isinstance(error, GatewayUnreachable):
        return True
    return error.status in (408, 502, 503, 504) or error.problem == "quota_exceeded"


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    kept = b""
    async for piece in content.iter_any():
        *whole, kept = (kept + piece).split(b"\n")
        for line in whole:
            yield line
        if len(kept) > _LONGEST_LINE_BYTES:
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
        form.add_field(name, str(value))
    for path in files:
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        form.add_field("file", path.open("rb"), filename=path.name, content_type=kind)
    return form


def _words(error: BaseException) -> str:
    """Of an error of the system its own words: asyncio's list every address that was tried."""
    number = getattr(error, "errno", None)
    if number is not None and number > 0:
        return os.strerror(number)
    return str(error) or type(error).__name__
