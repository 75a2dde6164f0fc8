"""Requests that mean one thing to us and another to who comes after us.

What cannot be parsed in one way only is refused by the protocol, before any route: see
tests/integration/http_input/test_protocol.py. Here is what the relay itself makes of the rest.
"""

from __future__ import annotations

import orjson
import pytest

from tests.gateway import KEY, Gateway, Opener
from tests.integration.http_input.test_protocol import SMUGGLING
from tests.integration.security.hostile import PATH, Hostile, post, raw, status_of

CHAT = b"/v1/chat/completions"
GET = b"HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
ASKED = b'{"model":"m","messages":[]}'


@pytest.fixture
async def gateway(open_gateway: Opener, hostile: Hostile) -> Gateway:
    return await open_gateway(worker=False, gemini_base_url=hostile.url)


async def test_what_has_two_lengths_never_reaches_an_upstream(
    gateway: Gateway, hostile: Hostile
) -> None:
    for name, lines in SMUGGLING.items():
        for path in (PATH.encode(), CHAT):
            head = b"POST %b HTTP/1.1\r\nHost: localhost\r\n" % path
            got = await raw(gateway, head + lines + post())
            assert (status_of(got), got.count(b"HTTP/1.1 4")) == (400, 1), name
    assert hostile.seen == []


REFUSED = {
    "an overlong head": post(b"x: " + b"y" * 70_000),
    "too many headers": post(*(b"x-%d: y" % n for n in range(200))),
    "a control character": post(b"x-a: a\x01b"),
    "a carriage return": post(b"x-a: a\rb: c"),
    "a line feed": post(b"x-a: a\nb: c"),
    "a NUL": post(b"x-a: a\0b"),
    "a folded header": post(b"x-a: b\r\n c: d"),
    "a name that is none": post(b"x-\xe9: b"),
    "a space in a name": post(b"x a: b"),
    "a space in the target": post(path=PATH.encode() + b"?a= b"),
    "a target beyond ASCII": post(path=PATH.encode() + b"?a=\xe9"),
    "an unknown version": post(version=b"1.2"),
    "a tunnel": b"CONNECT evil:443 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "a tenant with a line break": post(b"x-tidegate-tenant: a\x85b"),
    "a subject with a line break": post(b"x-tidegate-subject: a\x85b"),
    "a priority of other digits": post("x-tidegate-priority: ³".encode("latin-1")),
    "an idempotency key beyond ASCII": post(b"idempotency-key: a\xe9"),
    "two idempotency keys": post(b"idempotency-key: a", b"idempotency-key: b"),
    "two types": post(b"content-type: text/plain", path=CHAT),
    "the same type twice": post(b"content-type: application/json", path=CHAT),
    "two types of an upload": post(b"content-type: image/png", path=b"/upload/v1beta/files"),
    "two tenants": post(b"x-tidegate-tenant: a", b"x-tidegate-tenant: b"),
    "a path that leads up": b"GET /v1beta/models/.. " + GET,
    "the same in hiding": b"GET /v1/models/%2e%2e " + GET,
    "a slash in a model": post(path=b"/v1beta/models/a%2f..%2fb:generateContent"),
    "a line break in a model": post(path=b"/v1beta/models/a%0d%0ab:generateContent"),
    "a line break at the end": post(path=b"/v1beta/models/a:generateContent%0a"),
    "a letter beyond ASCII": post(path=b"/v1beta/models/a%C3%A9:generateContent"),
    "work that goes on": post(path=b"/v1beta/models/a:batchGenerateContent"),
    "another path of the account": post(path=b"/v1beta/cachedContents"),
    "two models": post(path=CHAT, body=b'{"model":"cheap","model":"dear"}'),
    "two models in two cases": post(path=CHAT, body=b'{"model":"cheap","Model" :"dear"}'),
    "two models, one in hiding": post(path=CHAT, body=b'{"mod\\u0065l":"cheap","model":"dear"}'),
    "no UTF-8": post(path=CHAT, body='{"model":"m"}'.encode("utf-16")),
    "a byte order mark": post(path=CHAT, body=b"\xef\xbb\xbf" + ASKED),
    "a compressed body": post(b"content-encoding: gzip", path=CHAT, body=b"\x1f\x8b\x08\0"),
    "no JSON": post(path=CHAT, body=b'{"model":"m","n":NaN}'),
}


async def test_what_could_be_read_in_two_ways_is_refused_and_goes_nowhere(
    gateway: Gateway, hostile: Hostile
) -> None:
    for name, request in REFUSED.items():
        got = await raw(gateway, request)
        assert status_of(got) in (400, 404, 415, 431), (name, got[:200])
        assert got.count(b"HTTP/1.1 4") == 1, name
    assert hostile.seen == []
    nested = post(path=CHAT, body=b'{"model":"m","tools":[{"model":"x"},{"model":"y"}]}')
    assert status_of(await raw(gateway, nested)) == 200, "one model at the top is not two"


@pytest.mark.parametrize("path", [CHAT, b"/v1/messages", PATH.encode(), b"/v1/batches"])
async def test_two_types_of_a_body_are_refused_by_name_in_the_dialect(
    path: bytes, gateway: Gateway, hostile: Hostile
) -> None:
    got = await raw(gateway, post(b"content-type: text/plain", path=path))
    assert status_of(got) == 400
    error = orjson.loads(got.partition(b"\r\n\r\n")[2])["error"]
    assert "there is more than one Content-Type" in error["message"]
    assert hostile.seen == []


async def sent_for(gateway: Gateway, hostile: Hostile, request: bytes) -> tuple[bytes, bytes]:
    """What the upstream got: the head without its first line, and that line."""
    hostile.seen.clear()
    assert status_of(await raw(gateway, request)) == 200
    (seen,) = hostile.seen
    first, _, rest = seen.partition(b"\r\n")
    return first, rest.lower()


async def test_what_is_for_us_or_for_one_connection_stays_here(
    gateway: Gateway, hostile: Hostile
) -> None:
    lines = (
        *(b"x-hop: gone", b"x-hop2: gone", b"connection: x-hop, X-Hop2", b"connection: close"),
        *(b"keep-alive: gone", b"te: gone", b"trailer: gone", b"proxy-authorization: gone"),
        *(b"proxy-connection: gone", b"expect: gone", b"forwarded: gone", b"via: gone"),
        *(b"x-forwarded-for: gone", b"x-forwarded-host: gone", b"x-real-ip: gone"),
        *(b"cookie: gone", b"authorization: Bearer gone", b"x-api-key: gone", b"api-key: gone"),
        *(b"x-http-method-override: gone", b"x-original-url: gone", b"x-rewrite-url: gone"),
        *(b"x-tidegate-subject: gone", b"x-tidegate-anything: gone", b"idempotency-key: gone"),
        *(b"accept-encoding: gone", b"origin: http://localhost", b"referer: gone"),
        *(b"sec-fetch-site: same-origin", b"sec-fetch-mode: gone"),
    )
    request = post(*lines, "x-mine: caf\xc3\xa9".encode("latin-1"), path=PATH.encode())
    first, rest = await sent_for(gateway, hostile, request)
    assert first == b"POST %b HTTP/1.1" % PATH.encode()
    assert b"gone" not in rest
    assert b"origin" not in rest
    assert b"x-mine: caf\xc3\xa9\r\n" in rest, "byte for byte"
    assert rest.count(b"\r\nhost:") + rest.startswith(b"host:") == 1
    assert rest.count(b"content-length:") == 1
    assert b"transfer-encoding" not in rest


async def test_a_clients_keys_in_the_query_stay_here_however_they_are_written(
    gateway: Gateway, hostile: Hostile
) -> None:
    query = b"?alt=json&key=gone&%6bey=gone&KEY=gone&%24key=gone&access_token=gone&a=%2Fb"
    first, _ = await sent_for(gateway, hostile, post(path=PATH.encode() + query))
    assert first == b"POST %b?alt=json&a=%%2Fb HTTP/1.1" % PATH.encode()
    plain = b"?b=%2f&keyword=%20x&a=+"
    first, _ = await sent_for(gateway, hostile, post(path=PATH.encode() + plain))
    assert first == b"POST %b%b HTTP/1.1" % (PATH.encode(), plain)


async def test_no_query_brings_a_header_that_stays_here(gateway: Gateway, hostile: Hostile) -> None:
    """As Google's clients on web pages write headers: the field mask would leave the usage out."""
    query = b"?$httpHeaders=X-Goog-FieldMask:candidates%0d%0a&%24httpMethod=GET&alt=json"
    first, rest = await sent_for(gateway, hostile, post(path=PATH.encode() + query))
    assert first == b"POST %b?alt=json HTTP/1.1" % PATH.encode()
    assert b"fieldmask" not in rest.lower()


async def test_a_target_with_a_host_is_no_way_to_that_host(
    gateway: Gateway, hostile: Hostile
) -> None:
    request = post(b"x-a: 1", path=b"http://evil.example" + PATH.encode() + b"#x")
    first, rest = await sent_for(gateway, hostile, request)
    assert first == b"POST %b HTTP/1.1" % PATH.encode()
    assert b"evil" not in rest
    assert KEY.lower().encode() in rest


async def test_line_breaks_in_what_is_quoted_stay_quoted(
    gateway: Gateway, hostile: Hostile
) -> None:
    body = b'{"model":"a\\r\\nx-evil: 1\\u0000","messages":[]}'
    _, rest = await sent_for(gateway, hostile, post(path=CHAT, body=body))
    assert rest.endswith(body)
    assert b"\r\nx-evil" not in rest
    _, rest = await sent_for(gateway, hostile, post(path=PATH.encode() + b"?a=%0d%0ax-evil:%201"))
    assert b"\r\nx-evil" not in rest


async def test_chunks_and_trailers_of_a_client_reach_nobody(
    gateway: Gateway, hostile: Hostile
) -> None:
    head = b"POST %b HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    chunks = b"%x;ext=evil\r\n%b\r\n0\r\nx-evil: 1\r\n\r\n" % (len(ASKED), ASKED)
    _, rest = await sent_for(gateway, hostile, head % CHAT + chunks)
    assert rest.endswith(b"\r\n\r\n" + ASKED)
    assert b"evil" not in rest


async def test_an_upgrade_leads_nowhere(gateway: Gateway, hostile: Hostile) -> None:
    for line in (
        b"upgrade: h2c\r\nhttp2-settings: a",
        b"upgrade: websocket\r\nsec-websocket-key: a",
    ):
        head = b"POST %b HTTP/1.1\r\nhost: localhost\r\n" % CHAT
        head += b"connection: upgrade\r\n%b\r\n" % line
        hidden = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        got = await raw(gateway, head + b"content-length: 0\r\n\r\n" + hidden, within_s=0.3)
        assert b" 101 " not in got
        assert status_of(got) == 400
    assert not [seen for seen in hostile.seen if not seen.startswith(b"GET /v1beta/openai/models")]
