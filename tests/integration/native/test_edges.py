"""What clients send at the edges of HTTP and JSON: told in their dialect, on a sound connection."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import orjson
import pytest
from aiohttp import FormData
from google.genai import Client
from google.genai.types import HttpOptions

from tests.gateway import Gateway, Opener
from tests.integration.security.hostile import (
    PATH,
    Hostile,
    hostile,
    one_try,
    post,
    raw,
    status_of,
)
from tests.waiting import wait_until

__all__ = ["hostile", "one_try"]

CHAT = b"/v1/chat/completions"
MESSAGES = b"/v1/messages"
ASKED = b'{"model":"m","messages":[]}'
LAST = post(path=CHAT, body=ASKED)


@pytest.fixture
async def gateway(open_gateway: Opener, hostile: Hostile) -> Gateway:
    return await open_gateway(worker=False, gemini_base_url=hostile.url)


def first(method: bytes, path: bytes, body: bytes, *lines: bytes) -> bytes:
    """A request that keeps its connection."""
    head = (
        b"%b %b HTTP/1.1" % (method, path),
        b"host: localhost",
        b"content-length: %d" % len(body),
    )
    return b"\r\n".join((*head, *lines)) + b"\r\n\r\n" + body


WEBSOCKET = (
    *(b"connection: Upgrade", b"upgrade: WebSocket", b"sec-websocket-version: 13"),
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
)
H2C = (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"http2-settings: AAEAAEAA")
KEPT = {
    "no list": (first(b"POST", CHAT, b"[]"), 400),
    "no JSON": (first(b"POST", PATH.encode(), b"x"), 400),
    "no path": (first(b"POST", b"/v1/none", ASKED), 404),
    "a HEAD": (first(b"HEAD", b"/v1/models", b""), 200),
    "a HEAD of ours": (first(b"HEAD", b"/health/live", b""), 200),
    "a HEAD before an agent's first call": (first(b"HEAD", b"/api/hello", b""), 200),
    "a HEAD of none": (first(b"HEAD", b"/v1/none", b""), 404),
    "a HEAD of a POST": (first(b"HEAD", b"/v1/embeddings", b""), 405),
    "an OPTIONS": (first(b"OPTIONS", CHAT, b""), 204),
    "an OPTIONS of none": (first(b"OPTIONS", b"/v1/none", b""), 404),
    "a GET": (first(b"GET", b"/v1/embeddings", b""), 405),
    "a WebSocket": (first(b"GET", b"/v1/responses", b"", *WEBSOCKET), 426),
    "a WebSocket at none": (first(b"GET", b"/v1/none", b"", *WEBSOCKET), 404),
    "a WebSocket at a list": (first(b"GET", b"/v1/models", b"", *WEBSOCKET), 200),
    "another protocol": (first(b"GET", b"/v1/responses", b"", *H2C), 405),
    "no model": (first(b"POST", MESSAGES, b"{}"), 400),
    "compressed": (first(b"POST", CHAT, gzip.compress(ASKED), b"content-encoding: gzip"), 415),
    "a compressed file": (first(b"POST", b"/v1/files", b"x", b"content-encoding: gzip"), 415),
    "a compressed batch": (first(b"POST", b"/v1/batches", b"x", b"content-encoding: gzip"), 415),
}


@pytest.mark.parametrize("name", KEPT)
async def test_after_a_refusal_the_next_request_is_answered_on_the_same_connection(
    gateway: Gateway, name: str
) -> None:
    request, status = KEPT[name]
    got = await raw(gateway, request + LAST)
    assert status_of(got) == status
    head, _, rest = got.partition(b"\r\n\r\n")
    length = 0
    if not request.startswith(b"HEAD") and status != 204:
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert status_of(rest[length:]) == 200, rest
    assert rest.endswith(b"\r\n\r\n{}")


@pytest.mark.parametrize("path", [CHAT, MESSAGES, PATH.encode()])
async def test_a_compressed_body_is_refused_clearly_in_each_dialect(
    gateway: Gateway, hostile: Hostile, path: bytes
) -> None:
    for coding in (b"gzip", b"br", b"identity, GZIP"):
        got = await raw(gateway, post(b"content-encoding: " + coding, path=path, body=ASKED))
        assert status_of(got) == 415
        assert b"accept-encoding: identity" in got
        assert b"compressed" in got
    assert hostile.seen == []
    body = ASKED if path != PATH.encode() else b'{"contents":[]}'
    got = await raw(gateway, post(b"content-encoding: Identity", path=path, body=body))
    assert status_of(got) == 200


@pytest.mark.parametrize("stream", [b'"yes"', b"1", b"0", b'"false"', b"[]"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_stream_that_is_neither_true_nor_false_is_refused(
    gateway: Gateway, hostile: Hostile, path: bytes, stream: bytes
) -> None:
    got = await raw(gateway, post(path=path, body=b'{"model":"m","stream":%b}' % stream))
    assert (status_of(got), b"stream is neither" in got) == (400, True)
    assert hostile.seen == []


async def test_errors_name_what_is_wrong(gateway: Gateway) -> None:
    for body, field in ((b"{", "body"), (b"{}", "model"), (b'{"model":7}', "model")):
        got = await raw(gateway, post(path=CHAT, body=body))
        assert orjson.loads(got.partition(b"\r\n\r\n")[2])["error"]["param"] == field
    got = await raw(gateway, post(path=b"/v1/none"))
    error = orjson.loads(got.partition(b"\r\n\r\n")[2])["error"]
    assert (error["param"], error["code"]) == (None, "not_found"), "a path is no model"


async def test_an_alias_serves_embeddings_counts_and_one_models_card(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        '[upstreams.gemini]\naliases = { vectors = "gemini-embedding-001", '
        'quick = "gemini-2.5-flash" }\n'
    )
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    options = HttpOptions(base_url=gateway.url, api_version="v1beta")
    client = Client(api_key="of-a-client", http_options=options)
    try:
        found = await client.aio.models.embed_content(model="vectors", contents=["a", "b"])
        assert len(found.embeddings or []) == 2
        assert (await client.aio.models.count_tokens(model="quick", contents="a b")).total_tokens
        assert (await client.aio.models.get(model="quick")).name == "models/quick"
    finally:
        await client.aio.aclose()
        client.close()
    of_the_list = ""
    assert {call.model for call in await gateway.calls()} <= {
        "gemini-embedding-001",
        "gemini-2.5-flash",
        of_the_list,
    }


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (b"/chat/completions", b"POST /v1beta/openai/chat/completions"),
        (b"/v1beta/openai/chat/completions", b"POST /v1beta/openai/chat/completions"),
        (b"/v1/v1/chat/completions/", b"POST /v1beta/openai/chat/completions"),
        (b"/api/v1/chat/completions", b"POST /v1beta/openai/chat/completions"),
        (b"/v1beta/openai/v1/chat/completions", b"POST /v1beta/openai/chat/completions"),
        (b"//models/gemini-x:generateContent", b"POST /v1beta/models/gemini-x:generateContent"),
    ],
)
async def test_a_base_url_that_is_one_step_off_leads_to_the_same(
    gateway: Gateway, hostile: Hostile, path: bytes, asked: bytes
) -> None:
    body = b'{"contents":[]}' if b"gemini" in path else ASKED
    assert status_of(await raw(gateway, post(path=path, body=body))) == 200
    assert hostile.seen[-1].startswith(asked + b" HTTP/1.1"), hostile.seen[-1]


async def test_a_path_that_is_not_relayed_is_told_by_tidegate(gateway: Gateway) -> None:
    got = await raw(gateway, post(path=b"/v1/fine_tuning/jobs", body=ASKED))
    assert status_of(got) == 404
    assert b"Tidegate does not relay POST /v1/fine_tuning/jobs" in got


@pytest.mark.parametrize("path", [b"/v1/responses", MESSAGES])
async def test_a_websocket_where_there_is_none_is_told_to_send_http(
    gateway: Gateway, path: bytes
) -> None:
    """Codex tries a WebSocket first: on 426 it sends HTTP immediately, on 405 after seven tries."""
    got = await raw(gateway, first(b"GET", path, b"", *WEBSOCKET) + LAST)
    assert status_of(got) == 426
    head = got.partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert {b"upgrade: HTTP/1.1", b"allow: POST, OPTIONS"} <= set(head)
    assert b"does not relay %b as a WebSocket, but POST in HTTP" % path in got


@pytest.mark.parametrize("path", [b"/api/chat", b"/tensor/x/infer", b"/v1", b"/v1/", b"/v2/rerank"])
async def test_a_path_of_no_front_is_told_by_tidegate_too(gateway: Gateway, path: bytes) -> None:
    got = await raw(gateway, post(path=path, body=ASKED))
    assert status_of(got) == 404
    assert b"Tidegate has no POST %b; docs/gateway.md says what it relays" % path in got


@pytest.mark.parametrize("body", [b"{}", b"[", b'{"model":"m"}'])
async def test_a_body_where_none_belongs_is_left_out(
    gateway: Gateway, hostile: Hostile, body: bytes
) -> None:
    """Google's SDK for JavaScript deletes a file with an empty object."""
    url, key = f"{gateway.url}/v1/files/abc", {"x-goog-api-key": "k"}
    async with gateway.http.delete(url, data=body, headers=key) as answer:
        assert answer.status == 200
    assert hostile.seen[-1].startswith(b"DELETE /v1/files/abc HTTP/1.1")
    assert hostile.seen[-1].endswith(b"\r\n\r\n")


UPLOADS = {
    "OpenAI's form": ("/v1/files", {}),
    "Gemini's": ("/upload/v1beta/files", {"x-goog-upload-protocol": "raw"}),
}


@pytest.mark.parametrize("name", UPLOADS)
async def test_the_answers_to_uploads_say_which_upstream_they_are_from(
    gateway: Gateway, hostile: Hostile, name: str
) -> None:
    """What the provider says in headers passes on, too."""
    path, headers = UPLOADS[name]
    for status, line, shown in ((200, b"X-Request-Id: r-1", "r-1"), (429, b"Retry-After: 7", "7")):
        said = b'{"id":"file-1","object":"file"}'
        head = b"HTTP/1.1 %d So\r\ncontent-type: application/json\r\n%b\r\n" % (status, line)
        hostile.answer = b"%bcontent-length: %d\r\n\r\n%b" % (head, len(said), said)
        form = FormData({"purpose": "user_data"})
        form.add_field("file", b"text", filename="a.txt")
        data = form if "form" in name else b"text"
        async with gateway.http.post(gateway.url + path, data=data, headers=headers) as answer:
            assert (answer.status, await answer.read()) == (status, said)
            assert answer.headers["x-tidegate-upstream"] == "gemini"
            assert answer.headers[line.split(b":")[0].decode()] == shown
            assert answer.headers.getall("content-length") == [str(len(said))]


async def test_an_upload_announces_its_length_where_its_client_does(
    gateway: Gateway, hostile: Hostile
) -> None:
    """Servers that take no chunks answer 411 else."""
    url, data = f"{gateway.url}/upload/v1beta/files", b"0123456789" * 30_000
    headers = {"x-goog-upload-protocol": "raw", "content-type": "text/plain"}
    async with gateway.http.post(url, data=data, headers=headers) as answer:
        assert answer.status == 200
    head, _, body = hostile.seen[-1].partition(b"\r\n\r\n")
    assert b"content-length: 300000" in head.lower()
    assert b"transfer-encoding" not in head.lower()
    assert body == data
    async with gateway.http.post(url, headers=headers) as answer:
        assert answer.status == 200
    assert hostile.seen[-1].lower().count(b"content-length: 0\r\n") == 1

    async def in_pieces() -> AsyncIterator[bytes]:
        yield b"0123456789"

    async with gateway.http.post(url, data=in_pieces(), headers=headers) as answer:
        assert answer.status == 200
    assert b"transfer-encoding: chunked" in hostile.seen[2].lower()
    assert b"content-length" not in hostile.seen[2].lower()


async def test_an_upload_that_breaks_off_ends_the_request_to_the_provider(
    gateway: Gateway, hostile: Hostile
) -> None:
    head = b"POST /upload/v1beta/files HTTP/1.1\r\nhost: localhost\r\n"
    head += b"x-goog-upload-protocol: raw\r\ncontent-length: 300000\r\n\r\n"
    parts = urlsplit(gateway.url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(head + b"0123456789" * 10_000)
    await writer.drain()
    await wait_until(lambda: hostile.begun == 1, what="the beginning at the provider")
    writer.transport.abort()
    await wait_until(lambda: hostile.closed == 1, what="the end of its connection")
    assert hostile.seen == []


async def test_a_list_of_models_that_is_refused_says_by_which_upstream(
    open_gateway: Opener, hostile: Hostile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_KEY", "key-of-the-only")
    policy = tmp_path / "policy.toml"
    base = f'base_url = "{hostile.url}/v1"\nkey = "SOME_KEY"\nmodels = ["a-*"]\n'
    policy.write_text(f"[upstreams.only]\n{base}")
    hostile.answer = b"HTTP/1.1 403 No\r\ncontent-length: 2\r\n\r\n{}"
    gateway = await open_gateway(worker=False, tidegate_policy=policy, gemini_base_url=hostile.url)
    async with gateway.http.get(f"{gateway.url}/v1/models") as answer:
        assert answer.status == 403
        assert answer.headers["x-tidegate-upstream"] in ("only", "gemini")


METHODS = {
    b"/v1/chat/completions": ("GET, HEAD, POST, OPTIONS", b'"type":"invalid_request_error"'),
    b"/v1/messages": ("POST, OPTIONS", b'{"type":"error"'),
    b"/v1beta/models/m:generateContent": ("POST, OPTIONS", b'"status":"UNIMPLEMENTED"'),
    b"/v1/models": ("GET, HEAD, OPTIONS", b"Tidegate does not relay PATCH /v1/models, but GET"),
    b"/v1/batches": ("GET, HEAD, POST, OPTIONS", b"but POST and GET"),
    b"/v1/files/file-1": ("GET, HEAD, DELETE, OPTIONS", b"but GET and DELETE"),
    b"/upload/v1beta/files": ("POST, PUT, OPTIONS", b"but POST and PUT"),
    b"/health/ready": ("GET, HEAD, OPTIONS", b"Tidegate has no PATCH /health/ready, but GET"),
    b"/submit": ("POST, OPTIONS", b"Tidegate has no PATCH /submit, but POST"),
    b"/static/favicon.svg": ("GET, HEAD, OPTIONS", b""),
}


@pytest.mark.parametrize("path", METHODS)
async def test_a_known_path_says_by_which_methods_it_is_known(
    gateway: Gateway, hostile: Hostile, path: bytes
) -> None:
    methods, said = METHODS[path]
    url = f"{gateway.url}{path.decode()}"
    async with gateway.http.options(url) as answer:
        assert (answer.status, answer.headers["allow"], await answer.read()) == (204, methods, b"")
    async with gateway.http.patch(url, data=b"{}") as answer:
        assert (answer.status, answer.headers["allow"]) == (405, methods)
        assert said in await answer.read()
    assert hostile.seen == []


async def test_a_balancer_s_usual_check_is_answered(gateway: Gateway) -> None:
    """HAProxy's, as it sends it where it is told nothing else."""
    assert status_of(await raw(gateway, b"OPTIONS / HTTP/1.0\r\n\r\n")) == 204


async def test_an_id_with_slashes_can_be_retrieved(gateway: Gateway, hostile: Hostile) -> None:
    async with gateway.http.get(f"{gateway.url}/v1/models/meta-llama%2FLlama-3-8B") as answer:
        assert answer.status == 200
    assert hostile.seen[-1].startswith(b"GET /v1beta/openai/models/meta-llama%2FLlama-3-8B HTTP")


@pytest.mark.usefixtures("one_try")
async def test_a_client_that_has_the_answer_already_is_told_so(
    gateway: Gateway, hostile: Hostile
) -> None:
    """Browsers ask so by themselves for what came with an ETag."""
    hostile.answer = b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\n\r\n'
    url, condition = f"{gateway.url}/v1/models/m-1", {"if-none-match": '"a"'}
    async with gateway.http.get(url, headers=condition) as answer:
        assert (answer.status, await answer.read()) == (304, b"")
        assert answer.headers["etag"] == '"a"'
        assert "content-length" not in answer.headers
        assert "transfer-encoding" not in answer.headers
    assert b'\r\nif-none-match: "a"\r\n' in hostile.seen[-1]
    async with gateway.http.get(url) as answer:
        assert answer.status == 502, "nobody has asked for that"


async def test_the_model_that_the_provider_took_by_itself_is_on_record(
    gateway: Gateway, hostile: Hostile
) -> None:
    answer = b'{"object":"response","status":"completed","id":"resp_1","model":"gpt-x-1"}'
    hostile.answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer)
    saved = {"prompt": {"id": "pmpt_1"}, "input": "Say hello"}
    async with gateway.http.post(f"{gateway.url}/v1/responses", json=saved) as response:
        assert (response.status, await response.read()) == (200, answer)
        row = await gateway.audit(response.headers["x-tidegate-request-id"])
    assert b'"model"' not in hostile.seen[-1]
    assert (row["model"], row["model_version"]) == (None, "gpt-x-1")


@pytest.mark.parametrize("kind", [b"content-type: Text/Event-Stream;charset=UTF-8", b"x-a: b"])
async def test_the_usage_that_a_stream_was_not_asked_for_is_taken_out_whatever_its_type(
    gateway: Gateway, hostile: Hostile, kind: bytes
) -> None:
    said = {"id": "c-1", "model": "m-1", "choices": [{"index": 0, "delta": {"content": "Hello"}}]}
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    shown, hidden = orjson.dumps(said), orjson.dumps(said | {"choices": [], "usage": usage})
    text = b"data: %b\n\ndata: %b\n\ndata: [DONE]\n\n" % (shown, hidden)
    head = (b"HTTP/1.1 200 OK", kind, b"content-length: %d" % len(text))
    hostile.answer = b"\r\n".join(head) + b"\r\n\r\n" + text
    body = {"model": "m", "messages": [], "stream": True}
    async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=body) as answer:
        assert await answer.read() == b"data: %b\n\ndata: [DONE]\n\n" % shown
        row = await gateway.audit(answer.headers["x-tidegate-request-id"])
    assert (row["input_tokens"], row["output_tokens"], row["usage_state"]) == (5, 7, "told")


@pytest.mark.parametrize("streams", [False, True])
async def test_what_an_upstream_compressed_unasked_goes_on_and_is_read(
    gateway: Gateway, hostile: Hostile, streams: bool
) -> None:
    said = {"id": "c-1", "model": "m-1", "choices": []}
    told = said | {"usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}}
    text = orjson.dumps(told)
    if streams:
        text = b"data: %b\n\ndata: [DONE]\n\n" % text
    packed = gzip.compress(text)
    sort = b"text/event-stream" if streams else b"application/json"
    length = b"content-length: %d" % len(packed)
    head = (b"HTTP/1.1 200 OK", b"content-encoding: gzip", b"content-type: %b" % sort, length)
    hostile.answer = b"\r\n".join(head) + b"\r\n\r\n" + packed
    body = {"model": "m", "messages": [], "stream": streams}
    url, key = f"{gateway.url}/v1/chat/completions", {"idempotency-key": "one"}
    async with gateway.http.post(url, json=body, headers=key) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert await answer.read() == text  # decoded by the client
        row = await gateway.audit(answer.headers["x-tidegate-request-id"])
    async with gateway.http.post(url, json=body, headers=key) as again:
        assert "content-encoding" not in again.headers
        assert await again.read() == (b"data: [DONE]\n\n" if streams else text)
    assert len(hostile.seen) == 1
    assert (row["input_tokens"], row["output_tokens"], row["usage_state"]) == (5, 7, "told")
    assert row["model_version"] == "m-1"


async def test_a_refusal_that_is_compressed_is_read_and_hides_the_key(
    gateway: Gateway, hostile: Hostile
) -> None:
    key = gateway.services.spine.targets.upstreams["gemini"].key
    said = orjson.dumps({"error": {"message": f"no credit for {key}", "code": "invalid"}})
    packed = gzip.compress(said)
    head = (b"HTTP/1.1 400 No", b"content-encoding: gzip", b"content-length: %d" % len(packed))
    hostile.answer = b"\r\n".join(head) + b"\r\n\r\n" + packed
    body = {"model": "m", "messages": []}
    async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=body) as answer:
        assert (answer.status, "content-encoding" in answer.headers) == (400, False)
        assert await answer.read() == said.replace(key.encode(), b"***")


DOWNLOAD = b"/v1beta/files/f1:download"
HELD = b"\x00\xff" * 100_000


def found(location: str) -> bytes:
    return b"HTTP/1.1 302 Found\r\nlocation: %b\r\ncontent-length: 2\r\n\r\n{}" % location.encode()


async def test_a_download_follows_the_redirect_of_its_upstream(
    gateway: Gateway, hostile: Hostile
) -> None:
    """As Google answers one."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        if hostile.seen[-1].startswith(b"GET /download/"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(HELD) + HELD)
        else:
            writer.write(found(f"{hostile.url}/download/v1beta/files/f1:download?alt=media"))
        await writer.drain()

    hostile.answer = answer
    url = f"{gateway.url}{DOWNLOAD.decode()}?alt=media"
    async with gateway.http.get(url, headers={"x-goog-api-key": "of-a-client"}) as response:
        assert (response.status, await response.read()) == (200, HELD)
    first, second = hostile.seen
    assert first.startswith(b"GET %b?alt=media HTTP/1.1" % DOWNLOAD)
    assert second.startswith(b"GET /download%b?alt=media HTTP/1.1" % DOWNLOAD)
    for one in (first, second):
        assert one.lower().count(b"x-goog-api-key: ") == 1
        assert b"of-a-client" not in one


@pytest.mark.parametrize("path", [DOWNLOAD.decode(), "/v1beta/models"])
async def test_no_redirect_leads_to_another_server_nor_round_for_ever(
    gateway: Gateway, hostile: Hostile, one_try: None, path: str
) -> None:
    there = Hostile()
    server = await asyncio.start_server(there.serve, "127.0.0.1", 0)
    elsewhere = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}"
    try:
        for location, asked in ((elsewhere, 1), (f"{hostile.url}{path}", 4)):
            hostile.seen.clear()
            hostile.answer = found(location)
            async with gateway.http.get(f"{gateway.url}{path}") as response:
                assert response.status == 502
                assert "location" not in response.headers
                assert b"not followed" in await response.read()
            assert len(hostile.seen) == (asked if path == DOWNLOAD.decode() else 1)
    finally:
        server.close()
    assert there.seen == []
