"""Fetches on a caller's behalf, guarded against server-side request forgery; provider probes.

Invariants: a socket is opened only to an allowed address, checked on the address that is connected
to, for every hop; no cookies, credentials, referrer or proxy of ours are used; at most `max_bytes`
are kept; a webhook follows no redirect; an image type is recognised only by a unique signature;
look-ups of names that callers chose use no thread that other work needs, and one tenant cannot use
all of their threads.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from threading import Lock
from typing import TYPE_CHECKING, Any

import orjson
from yarl import URL

from tidegate.call import Media
from tidegate.dialects import DIALECTS
from tidegate.dialects.headers import answered_at, retry_after_ms
from tidegate.dialects.spec import ErrorAnswer
from tidegate.errors import FetchFailed, FetchRefused, UpstreamError
from tidegate.policy.deployment import Upstream
from tidegate.upstream.server_load import server_load
from tidegate.upstream.transport import RelayWire

if TYPE_CHECKING:  # most processes never fetch: aiohttp is imported by the first exchange
    import aiohttp
    from aiohttp.abc import AbstractResolver

Address = IPv4Address | IPv6Address
MAX_URI_CHARS = 2048
ALLOWED = (
    "an http:// or https:// URL of a public host, on port 80, 443 or above 1023, "
    f"without a user name or password, at most {MAX_URI_CHARS} characters"
)

# Own tables instead of `is_global`, whose results differ between Python's releases.
_CLOSED_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT; one cloud's metadata too
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # a cloud's metadata on an otherwise public address
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# All else is loopback, unspecified, mapped, compatible, NAT64, ULA, link-local or multicast.
_OPEN_V6 = IPv6Network("2000::/3")
_CLOSED_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments; Teredo wraps IPv4 in 2001::/32
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4 wraps IPv4
        "3fff::/20",  # documentation
    )
)
_CLOSED_NAMES = ("localhost", "metadata", "metadata.google.internal")
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?!.{{254}}){_LABEL}(\.{_LABEL})*")
_AUTHORITY = re.compile(r"[^/?#]*//([^/?#]*)")
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\x9f\\]")
# Forms of a host that inet_aton accepts: 2130706433, 0x7f.1, 0177.0.0.1, 127.1.
_LOOKS_NUMERIC = re.compile(r"(.*\.)?(0[xX][0-9a-fA-F]*|[0-9]+)\.?")


def is_public(address: Address) -> bool:
    """Return whether connections to `address` on a caller's behalf are allowed."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _CLOSED_V4)
    # ISATAP embeds an IPv4 address in the lower half of an address of any network.
    if int(address) >> 32 & 0xFDFF_FFFF == 0x0000_5EFE:
        return False
    return address in _OPEN_V6 and not any(address in network for network in _CLOSED_V6)


def check_uri(
    uri: str, is_allowed: Callable[[Address], bool] = is_public, *, field: str = "image_uri"
) -> URL:
    """Parse `uri` and refuse all that can be refused without DNS.

    Raises FetchRefused, which names `field`.
    """
    try:
        return _checked(uri, is_allowed)
    except ValueError as error:
        raise refused(str(error), field) from None


def _checked(uri: str, is_allowed: Callable[[Address], bool]) -> URL:
    if len(uri) > MAX_URI_CHARS:
        raise ValueError(f"is longer than {MAX_URI_CHARS} characters")
    if _UNSAFE.search(uri):
        raise ValueError("has spaces, backslashes or control characters in it")
    try:
        url = URL(uri)
        port = url.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if url.scheme not in ("http", "https"):
        raise ValueError("is neither http:// nor https://")
    host = (url.raw_host or "").rstrip(".").lower()
    if not host:
        raise ValueError("names no host")
    # Checks the text itself: the parser drops an empty name, and brackets without an address.
    authority = found[1] if (found := _AUTHORITY.match(uri)) else ""
    if "@" in authority:
        raise ValueError("has a user name or password in it")
    if port not in (80, 443) and (port is None or port < 1024):
        raise ValueError("names a port that is not allowed")
    _check_host(host, is_allowed, bracketed="[" in authority)
    return url.with_fragment(None)


def refused(problem: str, field: str = "image_uri") -> FetchRefused:
    """Return the error of this module; `problem` continues a sentence that begins with the
    field."""
    return FetchRefused(field, f"{field} {problem}", allowed=ALLOWED)


def _failed(problem: str, retry_after_ms: int | None = None) -> FetchFailed:
    """Return the error of a picture whose server may answer later."""
    return FetchFailed("image_uri", f"image_uri {problem}", retry_after_ms=retry_after_ms)


def _check_host(host: str, is_allowed: Callable[[Address], bool], *, bracketed: bool) -> None:
    try:
        address = ip_address(host)
    except ValueError:
        if _LOOKS_NUMERIC.fullmatch(host):
            raise ValueError("spells an address in numbers in an unusual way") from None
        if bracketed or not _NAME.fullmatch(host):
            raise ValueError("is not a URL") from None
        name_is_closed = host in _CLOSED_NAMES or host.endswith(".localhost")
        if name_is_closed and not is_allowed(IPv4Address("127.0.0.1")):
            raise ValueError("does not name a public host") from None
        return
    if not is_allowed(address):
        raise ValueError("does not name a public host")


class AddressRefused(OSError):
    """The name resolved to an address to which no connection is allowed."""


# A look-up cannot be cancelled, and takes half a minute if a name server does not answer. The event
# loop's few threads (4 of uvloop) resolve the providers' names and must stay free for that.
MOST_LOOK_UPS = 64
Found = Sequence[tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]]


class LookUps:
    """A pool of threads that look up names chosen by callers.

    A tenant may use half of the threads that the others leave. A look-up counts until it has really
    ended; further look-ups of the tenant wait. So one tenant's slow name servers do not delay the
    look-ups of another.
    """

    def __init__(self, most: int = MOST_LOOK_UPS) -> None:
        self._most = most
        self._threads = ThreadPoolExecutor(most, "callers-names")
        self._lock = Lock()
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def run(self, tenant_id: str, work: Callable[[], Found]) -> Found:
        """Run a look-up in a thread, and wait for its result. If this is cancelled, the look-up
        continues in its thread."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.setdefault(tenant_id, deque()).append(turn)
            self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # granted and cancelled in the same iteration
                self._end(tenant_id)
            raise
        looking = self._threads.submit(work)
        looking.add_done_callback(lambda _: self._end(tenant_id))
        return await asyncio.wrap_future(looking)

    def _end(self, tenant_id: str) -> None:
        with self._lock:
            self._running[tenant_id] -= 1
            if not self._running[tenant_id]:
                del self._running[tenant_id]
            self._grant()

    def _grant(self) -> None:
        """Start waiting look-ups as far as threads are free. Called with the lock held, in any
        thread."""
        for tenant_id, turns in list(self._waiting.items()):
            while turns and (turns[0].cancelled() or self._has_room(tenant_id)):
                turn = turns.popleft()
                if not turn.cancelled():
                    self._running[tenant_id] += 1
                    turn.get_loop().call_soon_threadsafe(self._begin, turn, tenant_id)
            if not turns:
                del self._waiting[tenant_id]

    def _has_room(self, tenant_id: str) -> bool:
        own = self._running[tenant_id]
        left = self._most - self._running.total() + own
        return own < (left + 1) // 2

    def _begin(self, turn: asyncio.Future[None], tenant_id: str) -> None:
        if turn.cancelled():
            self._end(tenant_id)
        else:
            turn.set_result(None)


_LOOK_UPS = LookUps()


def callers_resolver(tenant_id: str) -> AbstractResolver:
    """Return a resolver for names that a tenant's callers chose, with threads of its own."""
    from aiohttp.abc import AbstractResolver, ResolveResult

    class CallersResolver(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            lookup = partial(socket.getaddrinfo, flags=socket.AI_ADDRCONFIG)
            work = partial(lookup, host, port, family, socket.SOCK_STREAM)
            found = await _LOOK_UPS.run(tenant_id, work)
            return [
                ResolveResult(
                    hostname=host,
                    host=str(where[0]),
                    port=int(where[1]),
                    family=kind,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
                for kind, _, protocol, _, where in found
            ]

        async def close(self) -> None:
            """Do nothing: there is nothing to close."""

    return CallersResolver()


def guarded_session(
    is_allowed: Callable[[Address], bool],
    resolver: AbstractResolver | None,
    headers: Mapping[str, str],
) -> aiohttp.ClientSession:
    """Return a session for a single exchange, which shares nothing with others. The caller sets the
    time limit. resolver: by default the event loop's, for names that an operator chose."""
    import aiohttp
    from aiohttp.resolver import ThreadedResolver

    def open_socket(info: aiohttp.AddrInfoType) -> socket.socket:
        """Open a socket, called with the very address that the connection is made to."""
        family, kind, protocol, _, where = info
        if not is_allowed(ip_address(str(where[0]).split("%", 1)[0])):
            raise AddressRefused("the address is not public")
        return socket.socket(family=family, type=kind, proto=protocol)

    connector = aiohttp.TCPConnector(
        resolver=resolver or ThreadedResolver(),
        socket_factory=open_socket,
        use_dns_cache=False,
        force_close=True,
        limit=1,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None),
        headers=dict(headers),
    )


def why_not_sent(failed: aiohttp.ClientError) -> str:
    """Describe a failure in words that follow the name of the target: "...could not be connected
    to"."""
    import aiohttp

    if isinstance(failed, aiohttp.ClientConnectorDNSError):
        return "names a host that cannot be found"
    if isinstance(failed, aiohttp.ClientConnectorError):
        if "the address is not public" in str(failed.os_error):
            return "does not lead to a public address"
        return "could not be connected to"
    if isinstance(failed, aiohttp.InvalidURL):
        return "is not a URL"
    return "was not answered properly"


def _may_pass(failed: aiohttp.ClientError) -> bool:
    """Whether the same request may succeed later: not at a URL that is none, a name that does not
    exist, or an address that is not public."""
    import aiohttp

    if isinstance(failed, aiohttp.ClientConnectorDNSError):
        return failed.os_error.errno == socket.EAI_AGAIN
    if isinstance(failed, aiohttp.ClientConnectorError):
        return "the address is not public" not in str(failed.os_error)
    return not isinstance(failed, aiohttp.InvalidURL)


PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/heic", "image/heif")

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_HEIF_BRANDS = {b"mif1", b"msf1", b"mif2"}


def picture_type(head: bytes) -> str | None:
    """Return the MIME type of the picture that begins with `head` (32 bytes suffice), or None."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    return _iso_picture(head)


def iso_brands(head: bytes) -> list[bytes]:
    """Return the brands of an ISO base media file (MP4, HEIF, ...), major first; empty for
    others."""
    if head[4:8] != b"ftyp" or len(head) < 12:
        return []
    end = min(int.from_bytes(head[:4], "big"), len(head), 256)
    return [head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))]


def _iso_picture(head: bytes) -> str | None:
    brands = iso_brands(head)
    if not brands:
        return None
    if brands[0] in _HEIC_BRANDS:
        return "image/heic"
    if brands[0] in _HEIF_BRANDS:
        # AVIF files may begin with the general brand too, and are not accepted.
        return None if b"avif" in brands or b"avis" in brands else "image/heif"
    return None


MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_MAY_PASS = (408, 425, 429)  # and every 5xx
_HEADERS = {
    "Accept": ", ".join(PICTURE_TYPES),
    "Accept-Encoding": "identity",
    "User-Agent": "tidegate",
}
# Content types of servers that do not know the type.
_UNSAID = ("application/octet-stream", "binary/octet-stream")


@dataclass(frozen=True, slots=True)
class ImageFetcher:
    """Fetches images of at most `max_bytes` within `timeout_ms` in total, name look-up included.

    `is_allowed` judges each address; `resolver` looks up names (by default the system's). Both are
    for tests: production uses the defaults.
    """

    max_bytes: int
    timeout_ms: int
    is_allowed: Callable[[Address], bool] = is_public
    resolver: AbstractResolver | None = None

    async def fetch(
        self, uri: str, tenant_id: str = "", arrived: Callable[[int], None] | None = None
    ) -> Media:
        """Fetch the picture at `uri` for a tenant. `arrived` is called with the number of bytes in
        memory so far, and may raise. Raises FetchRefused, and FetchFailed if it may be tried again.
        Cancelling closes the connection."""
        import aiohttp

        try:
            async with asyncio.timeout(self.timeout_ms / 1000), AsyncExitStack() as stack:
                resolver = self.resolver or callers_resolver(tenant_id)
                session = guarded_session(self.is_allowed, resolver, _HEADERS)
                await stack.enter_async_context(session)
                return await self._follow(session, check_uri(uri, self.is_allowed), arrived)
        except TimeoutError:
            raise _failed(f"did not arrive within {self.timeout_ms} ms") from None
        except aiohttp.ClientError as failed:
            why = _failed if _may_pass(failed) else refused
            raise why(why_not_sent(failed)) from None

    async def _follow(
        self, session: aiohttp.ClientSession, url: URL, arrived: Callable[[int], None] | None
    ) -> Media:
        for _ in range(MAX_REDIRECTS + 1):
            async with session.get(url, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._read(response, arrived)
                target = response.headers.get("Location", "")
            try:
                url = url.join(URL(target))
            except ValueError:
                raise refused("redirects to something that is not a URL") from None
            url = check_uri(str(url), self.is_allowed)
        raise refused(f"redirects more than {MAX_REDIRECTS} times")

    async def _read(
        self, response: aiohttp.ClientResponse, arrived: Callable[[int], None] | None
    ) -> Media:
        if response.status != 200:
            problem = f"was answered with status {response.status}"
            if response.status < 500 and response.status not in _MAY_PASS:
                raise refused(problem)
            raise _failed(problem, _requested_wait_ms(response) or None)
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise refused("was answered with a compressed body, which is not taken")
        content_type = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if content_type and content_type not in _UNSAID and not content_type.startswith("image/"):
            raise refused(f"is not an image but {content_type[:64]!r}")
        if response.content_length is not None and response.content_length > self.max_bytes:
            raise self._too_large()
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > self.max_bytes:
                raise self._too_large()
            if arrived is not None:
                arrived(len(data))
            if len(data) >= 32 and picture_type(bytes(data[:256])) is None:
                break
        mime_type = picture_type(bytes(data[:256]))
        if mime_type is None:
            raise refused("is not an image of a type that is taken")
        name = "".join(letter for letter in response.url.name if letter.isprintable())
        return Media(mime_type=mime_type, data=bytes(data), name=name[:128])

    def _too_large(self) -> FetchRefused:
        return refused(f"is larger than {self.max_bytes} bytes")


_POST_HEADERS = {"User-Agent": "tidegate", "Accept": "*/*", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Posted:
    """The result of a POST: the answer's status, or None and the reason. retry_after_ms: from the
    answer's header."""

    status: int | None = None
    problem: str | None = None
    retry_after_ms: int = 0


def _requested_wait_ms(answer: aiohttp.ClientResponse) -> int:
    now = answered_at(answer.headers.get("Date", ""), datetime.now(UTC))
    named = {name.lower(): value for name, value in answer.headers.items()}
    return retry_after_ms(ErrorAnswer(answer.status, {}, named, now)) or 0


@dataclass(frozen=True, slots=True)
class GuardedPoster:
    """Posts within `timeout_ms` in total; `is_allowed` judges each address. operators: an operator,
    not a caller, chose the URL: any port and any form of URL is accepted."""

    timeout_ms: int
    is_allowed: Callable[[Address], bool] = is_public
    operators: bool = False

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], tenant_id: str = ""
    ) -> Posted:
        """Post for a tenant. Cancelling closes the connection."""
        import aiohttp

        try:
            target = self._target(url)
            resolver = None if self.operators else callers_resolver(tenant_id)
            async with (
                asyncio.timeout(self.timeout_ms / 1000),
                guarded_session(self.is_allowed, resolver, _POST_HEADERS) as session,
                session.post(target, data=body, headers=headers, allow_redirects=False) as answer,
            ):
                wait_ms = 0 if answer.ok else _requested_wait_ms(answer)
                return Posted(answer.status, retry_after_ms=wait_ms)
        except FetchRefused as refused:
            return Posted(problem=refused.message)
        except TimeoutError:
            return Posted(problem=f"webhook_url did not answer within {self.timeout_ms} ms")
        except aiohttp.ClientError as failed:
            return Posted(problem=f"webhook_url {why_not_sent(failed)}")

    def _target(self, url: str) -> URL:
        if not self.operators:
            return check_uri(url, self.is_allowed, field="webhook_url")
        try:
            return URL(url)
        except ValueError:
            raise refused("is not a URL", "webhook_url") from None


@dataclass(frozen=True, slots=True)
class UpstreamTest:
    """The result of testing an upstream in one dialect, by requesting its models.

    status: None without an answer. problem: empty on success. load: that of a self-hosted server,
    in words, if it reports any.
    """

    dialect: str
    url: str
    status: int | None
    took_ms: float
    models: tuple[str, ...] = ()
    problem: str = ""
    load: str = ""


_MODELS_BYTES = 4_000_000
NO_LIST = (404, 405)  # of a server without such a list: its credentials are not tested
_REFUSED = (401, 403)


async def tested(wire: RelayWire, upstream: Upstream, dialect: str) -> UpstreamTest:
    """Test an upstream by requesting its models with its credentials and network. Never raises for
    anything that the provider or the network does."""
    spec, access = DIALECTS[dialect], upstream.access(dialect)
    headers = [*spec.headers, (b"accept-encoding", b"identity")]
    url, status, problem = access.url(spec.models.path, spec.models.query), None, ""
    models: tuple[str, ...] = ()
    began = time.perf_counter()
    try:
        exchange = await wire.open("GET", wire.place(url, access), headers, None)
        status = exchange.status
        try:
            body = await exchange.read(_MODELS_BYTES)
        finally:
            exchange.close()
        if status == 200:
            shape = spec.models
            listed = (one[shape.id_key] for one in shape.read(orjson.loads(body)))
            models = tuple(one.removeprefix(shape.prefix) for one in listed)
        elif status in _REFUSED:
            problem = f"it refuses the credentials with {status}"
        elif status not in NO_LIST:
            problem = f"it answers {status}"
    except UpstreamError as failed:
        problem = failed.message
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        problem = "its answer is no list of models"
    took_ms = round((time.perf_counter() - began) * 1000, 1)
    load = str(await server_load(wire, upstream)) if upstream.is_own and status else ""
    return UpstreamTest(dialect, access.base, status, took_ms, models, problem, load)


async def request_models(wire: RelayWire, upstream: Upstream, dialect: str) -> Posted:
    """Request a provider's list of models in `dialect`. Never raises for anything that the provider
    or the network does."""
    spec, access = DIALECTS[dialect], upstream.access(dialect)
    headers = [*spec.headers, (b"accept-encoding", b"identity")]
    try:
        place = wire.place(access.url(spec.models.path, spec.models.query), access)
        exchange = await wire.open("GET", place, headers, None)
        exchange.close()
        await asyncio.sleep(0)
    except UpstreamError as failed:
        return Posted(problem=failed.message)
    return Posted(exchange.status)
