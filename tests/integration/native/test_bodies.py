"""The bodies of calls, read back out of the record by those they belong to."""

from __future__ import annotations

import random
import threading
import zlib
from base64 import b64encode
from functools import partial
from typing import Any

import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import key_of
from tests.waiting import wait_until
from tidegate import record as call
from tidegate.call import Scope
from tidegate.dialects import parsing
from tidegate.store import requests as recorded

MODEL = "gemini-2.5-flash"
CHAT = "/v1/chat/completions"
LETTERS = bytes(b"abcdefghijklmnop "[each % 17] for each in range(256))
LARGE = random.Random(1).randbytes(300_000).translate(LETTERS).decode()
FILE = b64encode(random.Random(1).randbytes(400_000)).decode()  # kept as it is


def asking(text: str, **more: Any) -> bytes:
    # Spaced as no serialiser of ours would do it: what is kept is what travelled.
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}]} | more
    return orjson.dumps(body, option=orjson.OPT_INDENT_2) + b"\n \n"


async def said(
    gateway: Gateway, body: bytes, content_type: str = "application/json", **headers: str
) -> tuple[str, bytes, str]:
    """The id of a call, its answer's bytes and their type."""
    given = {"Content-Type": content_type, **headers}
    async with gateway.http.post(gateway.url + CHAT, data=body, headers=given) as answer:
        request_id = answer.headers["x-tidegate-request-id"]
        return request_id, await answer.read(), answer.headers["Content-Type"]


async def kept(
    gateway: Gateway, request_id: str, role: str, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    url = f"{gateway.url}/requests/{request_id}/{role}"
    async with gateway.http.get(url, headers=headers) as answer:
        names = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, await answer.read(), names


async def once_kept(gateway: Gateway, request_id: str, role: str) -> tuple[bytes, dict[str, str]]:
    """The record is written behind the answer."""

    async def found() -> tuple[bytes, dict[str, str]] | None:
        status, body, headers = await kept(gateway, request_id, role)
        return (body, headers) if status == 200 else None

    seen: tuple[bytes, dict[str, str]] = await wait_until(found, 20, f"the {role}")
    return seen


@pytest.mark.parametrize("text", ["Say small", f"Say {'again ' * 1000}", LARGE, FILE])
async def test_a_body_is_given_back_as_it_travelled(gateway: Gateway, text: str) -> None:
    body, spoken = asking(text), "application/json; charset=utf-8"
    request_id, answer, content_type = await said(gateway, body, spoken)
    found, headers = await once_kept(gateway, request_id, "request")
    assert found == body
    assert headers["content-type"] == spoken
    found, headers = await once_kept(gateway, request_id, "response")
    assert found == answer
    assert (headers["content-type"], headers["content-length"]) == (content_type, str(len(answer)))
    in_blobs = await gateway.database.fetchval("SELECT count(blob_key) FROM bodies")
    assert in_blobs >= (text in (LARGE, FILE)), "the large one is a blob"


async def test_other_calls_go_on_while_a_large_body_is_read(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To parse and search 20 MB takes a tenth of a second."""
    check_parts, threads = parsing.check_parts, []

    def noted(raw: bytes) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        check_parts(raw)

    monkeypatch.setattr(parsing, "check_parts", noted)
    for text in ("Say small", LARGE):
        _, answer, _ = await said(gateway, asking(text))
        assert b"choices" in answer
    assert threads == [True, False]


@pytest.mark.parametrize("wants_usage", [True, False])
async def test_a_stream_is_given_back_with_its_events(gateway: Gateway, wants_usage: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": wants_usage}}
    request_id, answer, _ = await said(gateway, asking("Say words", **options))
    found, headers = await once_kept(gateway, request_id, "response")
    if wants_usage:
        assert found == answer
    else:  # with the event that we asked for, and took out again
        assert found.startswith(answer.removesuffix(b"data: [DONE]\n\n"))
        assert len(found) > len(answer)
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"].startswith("attachment")


async def test_what_an_error_said_is_kept_too(gateway: Gateway) -> None:
    await gateway.upstream.set_behaviour(strict_models=True)
    body = orjson.dumps({"model": "no-such-model", "messages": [{"role": "user", "content": "x"}]})
    request_id, answer, content_type = await said(gateway, body)
    found, headers = await once_kept(gateway, request_id, "response")
    assert (found, headers["content-type"]) == (answer, content_type)


async def test_the_middle_of_a_long_answer_is_told_to_be_left_out(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "KEPT_BYTES", 2_000)
    monkeypatch.setattr(call, "TAIL_BYTES", 500)
    await gateway.upstream.set_behaviour(chunks=60, between_ms=5)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    request_id, answer, _ = await said(gateway, asking("Say " + "word " * 200, **options))
    found, headers = await once_kept(gateway, request_id, "response")
    omitted_bytes = int(headers["x-tidegate-omitted-bytes"])
    assert omitted_bytes > 0
    assert len(found) + omitted_bytes == len(answer)
    assert answer.startswith(found[:-500])
    assert answer.endswith(found[-500:])
    assert "x-tidegate-omitted-bytes" not in (await once_kept(gateway, request_id, "request"))[1]


async def test_bodies_are_the_owners_alone(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    acme, other = [await key_of(gateway, name) for name in ("acme", "other")]
    blind = await key_of(gateway, "acme", scopes=(Scope.INFER,))
    request_id, _, _ = await said(gateway, asking("Say it"), **acme)

    async def is_kept() -> bool:
        return (await kept(gateway, request_id, "request", **acme))[0] == 200

    await wait_until(is_kept, 20)
    for role in ("request", "response"):
        assert (await kept(gateway, request_id, role, **acme))[0] == 200
        status, raw, headers = await kept(gateway, request_id, role, **other)
        assert (status, headers["content-type"]) == (404, "application/problem+json")
        assert b"acme" not in raw
        assert (await kept(gateway, request_id, role, **blind))[0] == 403
        assert (await kept(gateway, request_id, role))[0] == 401


async def test_what_is_erased_or_was_never_there_is_not_found(gateway: Gateway) -> None:
    request_id, _, _ = await said(gateway, asking(LARGE))
    await once_kept(gateway, request_id, "request")
    key = await gateway.database.fetchval(
        "SELECT blob_key FROM bodies WHERE role = 'request' AND blob_key IS NOT NULL"
    )
    await gateway.services.blobs.delete([key])
    status, raw, _ = await kept(gateway, request_id, "request")
    assert (status, orjson.loads(raw)["code"]) == (404, "not_found")
    await gateway.database.execute("DELETE FROM bodies")
    assert (await kept(gateway, request_id, "response"))[0] == 404
    assert (await kept(gateway, "0" * 32, "request"))[0] == 404
    assert (await kept(gateway, "no-id", "request"))[0] == 400


async def test_jobs_show_what_the_record_has_of_them(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    request_id = await gateway.submit(data="Explain the tide")
    end = await gateway.end_of(request_id)
    asked, headers = await once_kept(gateway, request_id, "request")
    assert headers["content-type"] == "application/json"
    assert orjson.loads(asked)["prompt"] == "Explain the tide"
    answered, _ = await once_kept(gateway, request_id, "response")
    assert orjson.loads(answered)["text"] == end["text"]


async def test_a_small_blob_does_not_unpack_to_a_large_piece() -> None:
    packed = zlib.compress(bytes(5_000_000))
    pieces = [piece async for piece in recorded._unpacked(recorded._of(packed))]
    assert sum(map(len, pieces)) == 5_000_000
    assert max(map(len, pieces)) <= recorded._PIECE_BYTES


async def test_of_a_tenant_without_bodies_neither_prompt_nor_answer_is_on_record(
    open_gateway: Opener,
) -> None:
    """Neither in a column nor in a file, whatever its size; but usage, and what others sent."""
    gateway = await open_gateway(bodies_off="quiet, silent")
    word = "unspeakable"
    for tenant in ("quiet", "acme"):
        of_it = {"x-tidegate-tenant": tenant}
        for text in (f"Say {word}", f"Say {word} {LARGE}"):
            await said(gateway, asking(text), **of_it)
        url = f"{gateway.url}/stream"
        body = {"text": f"Explain {word}", "type": "text_only"}
        async with gateway.http.post(url, json=body, headers=of_it) as answer:
            assert word in await answer.text()

    async def recorded_of(tenant: str) -> bool:
        count = "SELECT count(*) FROM audit WHERE tenant_id = $1 AND total_tokens > 0"
        return bool(await gateway.database.fetchval(count, tenant) == 3)

    for tenant in ("quiet", "acme"):
        await wait_until(partial(recorded_of, tenant), 20, f"the record of {tenant}")
    kept_of = {
        row["tenant_id"]: row["count"]
        for row in await gateway.database.fetch(
            "SELECT tenant_id, count(*) FROM bodies GROUP BY tenant_id"
        )
    }
    assert kept_of == {"acme": 6}
    for table in ("audit", "requests", "attempts", "bodies"):
        said_in = (
            f"SELECT count(*) FROM {table} AS one WHERE tenant_id = 'quiet' AND one::text ~ $1"
        )
        assert await gateway.database.fetchval(said_in, word) == 0, table
    found = await gateway.database.fetch(
        "SELECT tenant_id FROM audit WHERE prompt_head ~ $1 GROUP BY tenant_id", word
    )
    assert [row["tenant_id"] for row in found] == ["acme"]
