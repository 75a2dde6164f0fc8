"""Access of an upstream on the wire: a real CONNECT proxy, TLS both ways, its own headers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.connections.scripted import GOOD, Upstream, always, request
from tests.integration.servers.certificates import Authority
from tidegate.errors import UpstreamUnauthorized, UpstreamUnavailable
from tidegate.jobs.reconciliation import account_of
from tidegate.policy.access import Access, AccessOptions, Authentication, Network, Proxy
from tidegate.policy.deployment import Upstream as ConfiguredUpstream
from tidegate.upstream.transport import RawHeaders, RelayWire, RequestPlace
from tidegate.upstream.usage_api import read_admin_page

AUTHORIZATION = b"Basic bWU6c2VjcmV0"


class ConnectProxy:
    """A proxy that tunnels for whoever shows the user; it keeps the heads that it was sent."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.port = 0
        self.answer = b""  # to refuse by

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        if self.answer or AUTHORIZATION not in head:
            writer.write(self.answer or b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            writer.close()
            return
        method, target, _ = head.split(b" ", 2)
        if method == b"CONNECT":
            host, _, port = target.decode().rpartition(":")
        else:
            host, _, port = target.decode().split("/")[2].rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        if method == b"CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            back.write(head)
        await asyncio.gather(_pass_on(reader, back), _pass_on(there, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(65_536):
            writer.write(piece)
    except ConnectionError:
        pass  # the other side has gone
    finally:
        writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[ConnectProxy]:
    found = ConnectProxy()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    yield found
    server.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "tls")


@pytest.fixture
async def secure(upstream: Upstream, authority: Authority) -> AsyncIterator[str]:
    """The address of the scripted upstream over TLS, for clients with a certificate alone."""
    certificate, key = authority.sign("server")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.ca)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0, ssl=context)
    yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


def network(authority: Authority, proxy: ConnectProxy | None = None) -> Network:
    certificate, key = authority.sign("client")
    through = proxy and Proxy("127.0.0.1", proxy.port, AUTHORIZATION)
    return Network(through or None, str(authority.ca), str(certificate), str(key))


async def ask(wire: RelayWire, access: Access, headers: RawHeaders | None = None) -> bytes:
    place = wire.place(access.url("/v1/x"), access)
    exchange = await wire.open("POST", place, headers or [], b"{}")
    try:
        return await exchange.read(1_000)
    finally:
        exchange.close()


async def test_a_tunnel_with_tls_both_ways_is_made_once_and_kept(
    wire: RelayWire, upstream: Upstream, proxy: ConnectProxy, authority: Authority, secure: str
) -> None:
    upstream.script = always(GOOD)
    access = Access(secure, network=network(authority, proxy))
    assert [await ask(wire, access) for _ in range(2)] == [b"{}", b"{}"]
    (head,) = proxy.heads
    named = secure.removeprefix("https://").encode()
    assert head.startswith(b"CONNECT %b HTTP/1.1\r\nhost: %b\r\n" % (named, named))
    assert upstream.connections == 1
    other = Access(secure, network=network(authority))
    assert await ask(wire, other) == b"{}"
    assert upstream.connections == 2, "a kept connection is of its own network"


async def test_a_body_that_was_not_taken_whole_holds_up_no_other_request_under_tls(
    wire: RelayWire, upstream: Upstream, authority: Authority, secure: str
) -> None:
    async def answers_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(GOOD)
        await asyncio.get_running_loop().create_future()

    upstream.script = answers_early
    access = Access(secure, network=network(authority))
    place = wire.place(access.url("/v1/x"), access)
    exchange = await wire.open("POST", place, [], b"x" * 20_000_000)
    assert (await exchange.next(), exchange.close()) == (b"{}", True)
    assert await ask(wire, access) == b"{}"
    assert upstream.connections == 2


async def test_what_an_admin_key_reads_goes_by_the_upstream_s_proxy_without_its_key(
    wire: RelayWire, upstream: Upstream, proxy: ConnectProxy, authority: Authority, secure: str
) -> None:
    heads = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await request(reader))
        writer.write(GOOD)

    upstream.script = answer
    provider = ConfiguredUpstream(
        "openai",
        {"openai": secure},
        "of-the-upstream",
        access_options=AccessOptions(networks={"openai": network(authority, proxy)}),
    )
    account = account_of(provider, "openai", {"OPENAI_ADMIN_KEY": "of-an-admin"}.__getitem__)
    assert await read_admin_page(wire, account, "/organization/usage") == {}
    assert len(proxy.heads) == 1
    assert b"of-an-admin" in heads[0]
    assert b"of-the-upstream" not in heads[0]


async def test_without_a_certificate_or_the_root_there_is_no_connection(
    wire: RelayWire, upstream: Upstream, authority: Authority, secure: str
) -> None:
    upstream.script = always(GOOD)
    for known in (None, Network(ca_file=str(authority.ca))):
        with pytest.raises(UpstreamUnavailable):
            await ask(wire, Access(secure, network=known))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "it answered 407"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "it answered 502"),
        (b"HTTP/1.1 403 Forbidden\r\ncontent-length: 8\r\n\r\n<p>no</p>", "it answered 403"),
        (b"SSH-2.0-x\r\n\r\n", "its answer is not HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\nmore", "its answer is not HTTP"),
        (b"x" * 40_000, "it closed the connection or answered too much"),
    ],
)
async def test_a_proxy_that_makes_no_tunnel_is_named_without_its_user(
    wire: RelayWire,
    proxy: ConnectProxy,
    authority: Authority,
    secure: str,
    answer: bytes,
    said: str,
) -> None:
    proxy.answer = answer
    found = network(authority, proxy)
    if not answer:
        assert found.proxy is not None
        found = replace(found, proxy=replace(found.proxy, authorization=b"Basic d3Jvbmc="))
    with pytest.raises(UpstreamUnavailable, match=said) as failed:
        await ask(wire, Access(secure, network=found))
    assert failed.value.broke == "connecting"
    assert f"127.0.0.1:{proxy.port}" in failed.value.message
    assert "Basic" not in failed.value.message


async def test_plain_http_goes_by_a_proxy_in_absolute_form(
    wire: RelayWire, upstream: Upstream, proxy: ConnectProxy
) -> None:
    upstream.script = always(GOOD)
    found = Network(Proxy("127.0.0.1", proxy.port, AUTHORIZATION))
    assert await ask(wire, Access(upstream.url, network=found)) == b"{}"
    assert proxy.heads[0].startswith(b"POST %b/v1/x HTTP/1.1\r\n" % upstream.url.encode())


async def test_what_is_the_upstreams_own_goes_out_once(wire: RelayWire, upstream: Upstream) -> None:
    heads: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await request(reader))
        writer.write(GOOD)

    upstream.script = script
    access = Access(
        upstream.url,
        ((b"x-own", b"1"), (b"authorization", b"Bearer k")),
        frozenset((b"x-own",)),
        {"api-version": "1"},
    )
    await ask(wire, access, [(b"x-own", b"of-a-client"), (b"x-other", b"2")])
    (head,) = heads
    assert head.startswith(b"POST /v1/x?api-version=1 HTTP/1.1\r\n")
    assert head.count(b"x-own: ") == 1
    for line in (b"x-own: 1\r\n", b"x-other: 2\r\n", b"authorization: Bearer k\r\n"):
        assert line in head


class Signer:
    def __init__(self) -> None:
        self.refusals = 0

    def sign(
        self, method: str, place: RequestPlace, headers: RawHeaders, body: object
    ) -> RawHeaders:
        return [*headers, (b"authorization", b"Bearer renewed")]

    def refused(self) -> None:
        self.refusals += 1


async def test_renewed_credentials_sign_and_hear_of_a_refusal(
    wire: RelayWire, upstream: Upstream
) -> None:
    authentication, signer = Authentication("google"), Signer()
    access = Access(upstream.url, authentication=authentication)
    upstream.script = always(GOOD)
    with pytest.raises(UpstreamUnauthorized):
        await ask(wire, access)
    assert upstream.connections == 0, "nothing goes out without credentials"
    wire.signers = {authentication: signer}
    assert (await ask(wire, access), signer.refusals) == (b"{}", 0)
    upstream.script = always(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\n{}")
    for connection in wire.connections:  # the old script plays on there
        connection.drop()
    assert (await ask(wire, access), signer.refusals) == (b"{}", 1)
