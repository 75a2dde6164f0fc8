"""The guarded fetcher against real servers on loopback, with the address check injected."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import ResolveResult

from tests.contract.names import Names
from tests.waiting import wait_until
from tidegate.errors import FetchFailed, FetchRefused
from tidegate.upstream.fetch import (
    MOST_LOOK_UPS,
    Address,
    GuardedPoster,
    ImageFetcher,
    is_public,
)

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(200))
MAX_BYTES = 100_000
HERE = ip_address("127.0.0.1")
ELSEWHERE = ip_address("127.0.0.2")  # loopback too, but not allowed: it stands for our network

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def only_here(address: Address) -> bool:
    return address == HERE


@dataclass
class Site:
    """A server on every loopback address. `requests` came in; `closed` were left by the client."""

    port: int = 0
    handler: Handler | None = None
    requests: list[web.BaseRequest] = field(default_factory=list)
    closed: int = 0

    def url(self, path: str = "/fox.png", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def answers(self, **named: object) -> None:
        async def handler(_request: web.BaseRequest) -> web.Response:
            return web.Response(**named)  # type: ignore[arg-type]

        self.handler = handler

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        assert self.handler is not None
        try:
            return await self.handler(request)
        except (asyncio.CancelledError, ConnectionError):
            self.closed += 1
            raise


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    # `closed` needs handlers that are cancelled when their client leaves.
    server = web.Server(site.handle, handler_cancellation=True)
    runner = web.ServerRunner(server, shutdown_timeout=1)
    await runner.setup()
    listening = socket.create_server(("0.0.0.0", 0))
    site.port = listening.getsockname()[1]
    await web.SockSite(runner, listening).start()
    yield site
    await runner.cleanup()


@pytest.fixture
def fetcher() -> ImageFetcher:
    return ImageFetcher(max_bytes=MAX_BYTES, timeout_ms=5_000, is_allowed=only_here)


async def tick(seconds: float) -> None:
    """The pace of a slow server."""
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, passed.set)
    await passed.wait()


async def refusal(fetcher: ImageFetcher, uri: str, *, may_pass: bool = False) -> str:
    with pytest.raises(FetchRefused) as refused:
        await fetcher.fetch(uri)
    assert refused.value.field == "image_uri"
    assert refused.value.retryable is may_pass
    return str(refused.value)


@pytest.mark.parametrize("said", ["image/png", "image/jpeg", "application/octet-stream"])
async def test_a_picture_is_fetched_and_its_type_is_that_of_its_content(
    said: str, site: Site, fetcher: ImageFetcher
) -> None:
    site.answers(body=PNG, content_type=said)
    media = await fetcher.fetch(site.url("/my%0Afox.png?size=2"))
    assert (media.data, media.mime_type, media.name) == (PNG, "image/png", "myfox.png")


async def test_nothing_of_ours_is_sent_along(
    site: Site, fetcher: ImageFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.3:1")

    async def handler(request: web.BaseRequest) -> web.Response:
        if request.path == "/first":
            there = site.url("/second")
            return web.Response(status=302, headers={"Location": there, "Set-Cookie": "a=b"})
        return web.Response(body=PNG, content_type="image/png")

    site.handler = handler
    await fetcher.fetch(site.url("/first"))
    expected = {"Host", "Accept", "Accept-Encoding", "Connection", "User-Agent"}
    assert [request.path for request in site.requests] == ["/first", "/second"]
    for request in site.requests:
        assert set(request.headers) == expected
        assert request.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("said", ["text/html", "image/png"])
async def test_a_page_that_is_not_an_image_is_refused(
    said: str, site: Site, fetcher: ImageFetcher
) -> None:
    site.answers(body=b"<!doctype html><html><body>" + b" " * 5000, content_type=said)
    assert "is not an image" in await refusal(fetcher, site.url())


async def test_a_picture_of_another_type_is_refused(site: Site, fetcher: ImageFetcher) -> None:
    site.answers(body=b"<svg xmlns='http://www.w3.org/2000/svg'/>", content_type="image/svg+xml")
    assert "not an image of a type that is taken" in await refusal(fetcher, site.url())


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 500, 503])
async def test_an_answer_other_than_200_is_refused(
    status: int, site: Site, fetcher: ImageFetcher
) -> None:
    site.answers(status=status)
    assert f"status {status}" in await refusal(fetcher, site.url(), may_pass=status >= 500)


@pytest.mark.parametrize("status", [408, 425, 429, 502])
async def test_a_server_that_may_answer_later_says_when(
    status: int, site: Site, fetcher: ImageFetcher
) -> None:
    site.answers(status=status, headers={"Retry-After": "7"})
    with pytest.raises(FetchFailed) as failed:
        await fetcher.fetch(site.url())
    assert (failed.value.retry_after_ms, failed.value.allowed) == (7_000, None)


async def test_a_name_server_that_fails_may_answer_later() -> None:
    class Failing(Names):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    fetcher = ImageFetcher(max_bytes=MAX_BYTES, timeout_ms=5_000, resolver=Failing())
    problem = await refusal(fetcher, "http://down.example/", may_pass=True)
    assert "cannot be found" in problem


async def test_a_compressed_answer_is_refused_unopened(site: Site, fetcher: ImageFetcher) -> None:
    packed = gzip.compress(PNG + bytes(50_000_000))
    site.answers(body=packed, content_type="image/png", headers={"Content-Encoding": "gzip"})
    assert "compressed" in await refusal(fetcher, site.url())


async def test_a_picture_of_a_gigabyte_is_refused_by_its_announced_length(
    site: Site, fetcher: ImageFetcher
) -> None:
    sent = 0

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        response.content_length = 1_000_000_000
        await response.prepare(request)
        for _ in range(15_000):
            await response.write(PNG + bytes(65_000))
            sent += 65_000
        return response

    site.handler = handler
    assert f"larger than {MAX_BYTES} bytes" in await refusal(fetcher, site.url())
    await wait_until(lambda: site.closed == 1)
    assert sent < 50_000_000


async def test_a_picture_without_end_is_refused_while_it_arrives(
    site: Site, fetcher: ImageFetcher
) -> None:
    sent = 0

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        while True:
            await response.write(PNG + bytes(65_000))
            sent += 65_000

    site.handler = handler
    assert f"larger than {MAX_BYTES} bytes" in await refusal(fetcher, site.url())
    await wait_until(lambda: site.closed == 1)
    assert sent < 50_000_000


@pytest.mark.parametrize("drips", [True, False])
async def test_a_picture_that_does_not_arrive_in_time_is_refused(drips: bool, site: Site) -> None:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        if drips:
            await response.prepare(request)
            await response.write(PNG)
        while True:
            if drips:
                await response.write(b"x")
            await tick(0.01)

    site.handler = handler
    fetcher = ImageFetcher(max_bytes=MAX_BYTES, timeout_ms=200, is_allowed=only_here)
    problem = await refusal(fetcher, site.url(), may_pass=True)
    assert "did not arrive within 200 ms" in problem
    await wait_until(lambda: site.closed == 1)


async def test_a_name_that_is_not_resolved_in_time_is_refused() -> None:
    class Slow(Names):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            await asyncio.Event().wait()
            return []

    fetcher = ImageFetcher(max_bytes=MAX_BYTES, timeout_ms=100, resolver=Slow())
    problem = await refusal(fetcher, "http://slow.example/", may_pass=True)
    assert "did not arrive within 100 ms" in problem


async def test_names_that_are_not_answered_hold_up_no_other_look_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a caller's own name server is silent: a look-up can't be cancelled."""
    ended, looking, usual = threading.Event(), threading.Semaphore(0), socket.getaddrinfo

    def look(host: Any, *more: Any, **named: Any) -> Any:
        if str(host).endswith("slow.example"):
            looking.release()
            ended.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return usual(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look)
    fetcher = ImageFetcher(max_bytes=MAX_BYTES, timeout_ms=20_000)
    poster = GuardedPoster(timeout_ms=20_000)
    names = [f"http://{number}.slow.example/" for number in range(20)]
    given = [asyncio.create_task(fetcher.fetch(name)) for name in names]
    posted = [asyncio.create_task(poster.post(name, b"", {})) for name in names]
    try:
        await wait_until(lambda: looking.acquire(blocking=False), 10, "a look-up")
        async with asyncio.timeout(5):
            loop = asyncio.get_running_loop()
            await loop.getaddrinfo("127.0.0.1", 80)
            await asyncio.to_thread(bytes)
    finally:
        ended.set()
        ends = await asyncio.gather(*given, *posted, return_exceptions=True)
    assert all("cannot be found" in str(end) for end in ends)


async def test_names_of_one_tenant_leave_threads_to_those_of_another(
    monkeypatch: pytest.MonkeyPatch, site: Site
) -> None:
    """A tenant's own name server need only be silent: what it holds up are look-ups, not calls."""
    ended, slow, usual = threading.Event(), [], socket.getaddrinfo

    def look(host: Any, *more: Any, **named: Any) -> Any:
        if str(host).endswith("slow.example"):
            slow.append(host)
            ended.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return usual("127.0.0.1", *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look)
    site.answers(body=PNG)
    fetcher = ImageFetcher(max_bytes=MAX_BYTES, timeout_ms=20_000, is_allowed=only_here)
    poster = GuardedPoster(timeout_ms=20_000, is_allowed=only_here)
    names = [f"http://{number}.slow.example/" for number in range(100)]
    given = [asyncio.create_task(fetcher.fetch(name, "alice")) for name in names]
    posted = [asyncio.create_task(poster.post(name, b"", {}, "alice")) for name in names]
    try:
        await wait_until(lambda: len(slow) == MOST_LOOK_UPS // 2, 10, "look-ups of alice")
        async with asyncio.timeout(5):
            assert (await fetcher.fetch(site.url(host="bob.example"), "bob")).data == PNG
            assert (await poster.post(site.url(host="bob.example"), b"", {}, "bob")).status == 200
        for task in given:  # a look-up in a thread goes on
            task.cancel()
        await asyncio.gather(*given, return_exceptions=True)
        assert len(slow) == MOST_LOOK_UPS // 2
    finally:
        ended.set()
        ends = await asyncio.gather(*posted, return_exceptions=True)
    assert len(slow) < 200
    assert all("cannot be found" in str(end) for end in ends)


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://169.254.169.254/",
        "http://2130706433:{port}/",
        "http://localhost:{port}/",
        "file:///etc/passwd",
        "http://user:pass@127.0.0.1:{port}/",
    ],
)
async def test_production_refuses_an_address_that_is_not_public(uri: str, site: Site) -> None:
    fetcher = ImageFetcher(max_bytes=MAX_BYTES, timeout_ms=5_000)
    await refusal(fetcher, uri.format(port=site.port))
    assert site.requests == []


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fd00::1"]
)
async def test_production_refuses_a_name_that_leads_to_an_address_that_is_not_public(
    address: str, site: Site
) -> None:
    names = Names(evil=[address])
    fetcher = ImageFetcher(max_bytes=MAX_BYTES, timeout_ms=5_000, resolver=names)
    problem = await refusal(fetcher, site.url(host="evil.example"))
    assert "does not lead to a public address" in problem
    assert (site.requests, names.asked) == ([], ["evil.example"])


async def test_every_address_of_a_name_is_checked(site: Site) -> None:
    names = Names(evil=["127.0.0.2", "127.0.0.3", "::1"])
    fetcher = ImageFetcher(
        max_bytes=MAX_BYTES, timeout_ms=5_000, is_allowed=only_here, resolver=names
    )
    await refusal(fetcher, site.url(host="evil.example"))
    assert site.requests == []


async def test_the_check_sees_the_address_that_is_connected_to(site: Site) -> None:
    """A name whose answer changes between a check and the connection gains nothing."""
    checked: list[Address] = []

    def note(address: Address) -> bool:
        checked.append(address)
        return address == HERE

    async def peer(request: web.BaseRequest) -> web.Response:
        assert request.transport is not None
        assert request.transport.get_extra_info("sockname")[0] == "127.0.0.1"
        return web.Response(body=PNG, content_type="image/png")

    site.handler = peer
    names = Names(fine=["127.0.0.1"])
    fetcher = ImageFetcher(max_bytes=MAX_BYTES, timeout_ms=5_000, is_allowed=note, resolver=names)
    await fetcher.fetch(site.url(host="fine.example"))
    assert checked == [HERE]
    assert len(names.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_to_an_allowed_address_is_followed(
    status: int, site: Site, fetcher: ImageFetcher
) -> None:
    async def handler(request: web.BaseRequest) -> web.Response:
        if request.path == "/first/a":
            return web.Response(status=status, headers={"Location": "../second"})
        return web.Response(body=PNG, content_type="image/png")

    site.handler = handler
    assert (await fetcher.fetch(site.url("/first/a"))).data == PNG
    assert [request.path for request in site.requests] == ["/first/a", "/second"]


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2:{port}/",
        "//127.0.0.2:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://private.example:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "http://user@127.0.0.1:{port}/",
        "http://127.0.0.1:22/",
        "http://[",
    ],
)
async def test_a_redirect_to_an_address_that_is_not_allowed_is_refused(
    target: str, site: Site
) -> None:
    site.answers(status=302, headers={"Location": target.format(port=site.port)})
    fetcher = ImageFetcher(
        max_bytes=MAX_BYTES,
        timeout_ms=5_000,
        is_allowed=only_here,
        resolver=Names(private=[str(ELSEWHERE)]),
    )
    await refusal(fetcher, site.url())
    assert len(site.requests) == 1


async def test_more_than_three_redirects_are_refused(site: Site, fetcher: ImageFetcher) -> None:
    site.answers(status=302, headers={"Location": "/again"})
    assert "redirects more than 3 times" in await refusal(fetcher, site.url())
    assert len(site.requests) == 4


async def test_an_unknown_name_and_a_closed_port_are_refused(fetcher: ImageFetcher) -> None:
    nameless = ImageFetcher(max_bytes=MAX_BYTES, timeout_ms=5_000, resolver=Names())
    assert "cannot be found" in await refusal(nameless, "http://nowhere.example/")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        assert "could not be connected to" in await refusal(fetcher, uri, may_pass=True)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not http at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + PNG,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + PNG,
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000,
        b"HTTP/1.1 302 Found\r\n\r\n",
    ],
)
async def test_an_answer_that_is_not_http_is_refused(answer: bytes, fetcher: ImageFetcher) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        may_pass = not answer.startswith(b"HTTP/1.1 302")
        await refusal(fetcher, f"http://127.0.0.1:{port}/", may_pass=may_pass)


async def test_cancelling_closes_the_connection(site: Site, fetcher: ImageFetcher) -> None:
    async def handler(_request: web.BaseRequest) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    site.handler = handler
    fetching = asyncio.create_task(fetcher.fetch(site.url()))
    await wait_until(lambda: site.requests)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    await wait_until(lambda: site.closed == 1)


def test_aiohttp_still_takes_the_hook_that_the_guard_hangs_on() -> None:
    """Without it every address would be open: this must fail loudly after an upgrade."""
    assert "socket_factory" in aiohttp.TCPConnector.__init__.__code__.co_varnames
    assert is_public(ip_address("8.8.8.8"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/hook", f"http://127.0.0.1:1/{'a' * 3000}"])
async def test_an_operators_url_is_bounded_in_nothing(url: str) -> None:
    callers = GuardedPoster(timeout_ms=5_000, is_allowed=lambda _: True)
    assert "could not be connected to" not in str((await callers.post(url, b"", {})).problem)
    operators = GuardedPoster(timeout_ms=5_000, is_allowed=lambda _: True, operators=True)
    assert (await operators.post(url, b"", {})).problem == "webhook_url could not be connected to"
    assert "is not a URL" in str((await operators.post("http://[", b"", {})).problem)
