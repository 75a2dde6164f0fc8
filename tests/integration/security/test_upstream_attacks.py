"""An upstream that is broken or wants to harm: what of it reaches clients, and what it can cost."""

from __future__ import annotations

import asyncio
import gzip
import resource
import time

import pytest

from tests.gateway import KEY, Gateway, Opener
from tests.integration.security.hostile import Hostile, post, raw, status_of
from tests.waiting import promised_s, wait_until

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
GOOD = OK + b"content-length: 2\r\n\r\n{}"
POST = post()

pytestmark = pytest.mark.usefixtures("one_try")


@pytest.fixture
async def gateway(open_gateway: Opener, hostile: Hostile) -> Gateway:
    return await open_gateway(
        worker=False, gemini_base_url=hostile.url, first_byte_timeout_ms=800, idle_timeout_ms=800
    )


async def answered(gateway: Gateway, hostile: Hostile, answer: bytes) -> bytes:
    """What a client gets when the upstream says `answer`; nothing is left behind by it."""
    hostile.answer = answer
    await gateway.services.spine.health["gemini"].open()
    got = await raw(gateway, POST)
    await wait_until(lambda: gateway.held == gateway.waiting == 0, 20, "the permit")
    await gateway.services.limiter.resume("kind:text_only")
    return got


NO_ANSWERS = {
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n"
    b"connection: upgrade\r\ncontent-length: 0\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\n"
    b"content-length: 0\r\n\r\n",
    "nothing new": b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n",
    "no such status": b"HTTP/1.1 999 Odd\r\ncontent-length: 2\r\n\r\n{}",
    "a status of two digits": b"HTTP/1.1 099 Odd\r\ncontent-length: 2\r\n\r\n{}",
    "a body where there is none": b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nhello",
    "two ways to tell the length": OK
    + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "two lengths": OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    "a length that is none": OK + b"content-length: -1\r\n\r\n{}",
    "a chunk's size that is none": OK + b"transfer-encoding: chunked\r\n\r\nzz\r\nhi\r\n0\r\n\r\n",
    "5,000 headers": OK + b"".join(b"x-%d: y\r\n" % n for n in range(5_000)) + b"\r\n{}",
    "a header of a megabyte": OK + b"x: " + b"y" * 1_000_000 + b"\r\n\r\n{}",
    "a NUL in a header": OK + b"x: a\0b\r\ncontent-length: 2\r\n\r\n{}",
    "another control character": OK + b"x: a\x01b\r\ncontent-length: 2\r\n\r\n{}",
    "a name with a space": OK + b"x y: a\r\ncontent-length: 2\r\n\r\n{}",
    "no HTTP": b"SSH-2.0-x\r\n\r\n",
    "nothing": b"",
}


async def test_what_is_no_answer_is_a_502_of_ours(gateway: Gateway, hostile: Hostile) -> None:
    for name, answer in NO_ANSWERS.items():
        got = await answered(gateway, hostile, answer)
        assert status_of(got) == 502, (name, got[:300])
        assert got.count(b"HTTP/1.1") == 1, name
        assert b"location" not in got.lower(), name
        assert b'"INTERNAL"' in got, (name, "in the words of the dialect")


async def test_headers_that_would_act_on_us_or_our_clients_do_not_pass(
    gateway: Gateway, hostile: Hostile
) -> None:
    lines = (
        *(b"Set-Cookie: a=1", b"Set-Cookie2: a=1", b"Clear-Site-Data: *", b"Refresh: 0;url=//evil"),
        *(b"Alt-Svc: h3=evil:443", b"Strict-Transport-Security: max-age=9", b"Report-To: {}"),
        *(b"NEL: {}", b"X-Tidegate-Request-Id: forged", b"X-Tidegate-Remaining: forged"),
        *(b"Connection: x-hop-a", b"X-Hop-A: forged", b"Connection: close", b"Keep-Alive: max=9"),
        *(b"Proxy-Authenticate: Basic", b"Upgrade: h2c", b"Trailer: x"),
        *(b"X-Accel-Redirect: /inner", b"X-Sendfile: /etc/passwd"),
    )
    got = await answered(
        gateway,
        hostile,
        OK + b"\r\n".join((*lines, b"X-Plain: yes", b"content-length: 2\r\n\r\n{}")),
    )
    head, _, body = got.lower().partition(b"\r\n\r\n")
    assert (status_of(got), body) == (200, b"{}")
    names = {line.partition(b":")[0] for line in head.split(b"\r\n")[1:]}
    told = {b"x-tidegate-queue-ms", b"x-tidegate-upstream", b"x-tidegate-request-id"}
    plain = {b"date", b"content-type", b"content-length", b"x-plain", b"connection"}
    assert names == plain | told
    assert b"forged" not in head


async def test_lengths_that_are_lies_end_the_answer_where_they_are_found_out(
    gateway: Gateway, hostile: Hostile
) -> None:
    short = await answered(
        gateway, hostile, OK + b"content-length: 500\r\nconnection: close\r\n\r\nhi"
    )
    assert short.endswith(b"\r\n\r\nhi"), "cut, not made up for"
    behind = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"
    got = await answered(gateway, hostile, GOOD + behind)
    assert got.endswith(b"\r\n\r\n{}")
    for _ in range(3):  # what came behind is not taken for the answer to the next request
        assert b"forged" not in await answered(gateway, hostile, GOOD)


async def test_no_answer_is_a_page_of_ours_in_a_browser(gateway: Gateway, hostile: Hostile) -> None:
    """A tenant's file may be HTML, and the address of it names a key: a script in it would act for
    the operator who follows that link."""
    get = b"GET /v1beta/files/abc:download?alt=media HTTP/1.1\r\nhost: localhost\r\n"
    get += b"connection: close\r\n\r\n"
    for head in (
        *(b"200 OK\r\ncontent-type: text/html", b"200 OK\r\ncontent-type: image/svg+xml"),
        *(b"200 OK", b"404 Not Found\r\ncontent-type: text/html"),
        b"200 OK\r\ncontent-type: application/json\r\ncontent-type: text/html",
    ):
        hostile.answer = b"HTTP/1.1 " + head + b"\r\ncontent-length: 8\r\n\r\n<script>"
        got = (await raw(gateway, get)).lower()
        assert (status_of(got.upper()), b"<script>" in got) == (int(head[:3]), True), head
        assert b"\r\ncontent-security-policy: default-src 'none'; sandbox" in got, head
        assert b"\r\nx-content-type-options: nosniff" in got, head
    assert b"content-security-policy" not in (await answered(gateway, hostile, GOOD)).lower()


async def test_early_hints_do_not_pass_and_without_end_run_into_the_timeout(
    gateway: Gateway, hostile: Hostile
) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
    got = await answered(gateway, hostile, hints * 3 + GOOD)
    assert (status_of(got), got.count(b"HTTP/1.1")) == (200, 1)
    assert b"link" not in got

    async def for_ever(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(hints * 100)
            await writer.drain()
            await asyncio.sleep(0)

    hostile.answer = for_ever
    await gateway.services.spine.health["gemini"].open()
    began = time.monotonic()
    assert status_of(await raw(gateway, POST)) == 504
    assert time.monotonic() - began < promised_s(5)


async def test_an_answer_without_end_goes_on_piece_by_piece_and_is_not_kept(
    gateway: Gateway, hostile: Hostile
) -> None:
    sent = 0

    async def for_ever(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(OK + b"transfer-encoding: chunked\r\n\r\n")
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        while True:
            writer.write(piece)
            await writer.drain()
            sent += 65536

    hostile.answer = for_ever
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    url = gateway.url + "/v1/chat/completions"
    async with gateway.http.post(url, json={"model": "m", "messages": []}) as response:
        got = 0
        async for piece in response.content.iter_any():
            got += len(piece)
            if got > 100_000_000:
                break
        # A client that stops reading stops the upstream too, before its answer fills our memory.
        await wait_until(lambda: sent > got, 20)
    assert sent - got < 40_000_000
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    assert grown_kb < 80_000, f"{grown_kb} KB"
    await wait_until(lambda: gateway.held == 0, 20, "the permit of who left")


async def test_a_refusal_without_end_is_read_to_a_bound(gateway: Gateway, hostile: Hostile) -> None:
    async def for_ever(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()

    hostile.answer = for_ever
    got = await raw(gateway, POST)
    assert status_of(got) == 400
    assert len(got) < 1_100_000


async def test_a_compressed_answer_is_not_unpacked_here(gateway: Gateway, hostile: Hostile) -> None:
    """A bomb stays as small as it came; the usage that it tells is not read, and not zero."""
    bomb = gzip.compress(b'{"usageMetadata":{"promptTokenCount":0}}' + bytes(20_000_000))
    head = OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb)
    got = await answered(gateway, hostile, head + bomb)
    assert got.endswith(bomb)
    assert b"accept-encoding: identity" in hostile.seen[-1].lower()
    request_id = got.partition(b"x-tidegate-request-id: ")[2].split(b"\r\n")[0].decode()
    row = await gateway.audit(request_id)
    assert row["usage_state"] == "estimated"
    assert row["input_tokens"] > 0


async def test_a_refusal_that_repeats_our_key_does_not_show_it(
    gateway: Gateway, hostile: Hostile
) -> None:
    for status in (b"400 Bad", b"401 No", b"403 No", b"404 None", b"429 Slow", b"500 Broken"):
        said = b'{"error":{"code":400,"message":"the key %b is odd"}}' % KEY.encode()
        echoed = b"x-seen: key %b\r\nx-debug: on" % KEY.encode()
        head = b"HTTP/1.1 %b\r\n%b\r\ncontent-length: %d\r\n\r\n" % (status, echoed, len(said))
        got = await answered(gateway, hostile, head + said)
        assert status_of(got) >= 400
        assert KEY.encode() not in got, status
        # So it does where a success is an error in its body.
        head = head.replace(status, b"200 OK")
        assert KEY.encode() not in await answered(gateway, hostile, head + said)
    assert KEY.encode() in hostile.seen[-1], "the key does go to the upstream"
