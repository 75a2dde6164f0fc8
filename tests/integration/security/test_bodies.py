"""Bodies made to cost: nested, numerous, enormous. Each is answered, and soon."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.security.hostile import Hostile, post, raw, status_of
from tidegate.policy.format import edit

CHAT = b"/v1/chat/completions"
GEMINI = b"/v1beta/models/m:generateContent"
MOST_CPU_S = 1.5
POLICY = """
[upstreams.gemini]
aliases = { short = "the-long-name" }
"""


@pytest.fixture
async def gateway(open_gateway: Opener, hostile: Hostile, tmp_path: Path) -> Gateway:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    gateway = await open_gateway(
        worker=False, gemini_base_url=hostile.url, max_body_bytes=30_000_000, tidegate_policy=policy
    )
    # Estimates are made only where a limit counts tokens.
    await gateway.services.keeper.change(edit({"tpm:total": 1_000_000}), set_by="test")
    return gateway


def chat(rest: bytes, model: bytes = b"m") -> bytes:
    return post(path=CHAT, body=b'{"model":"%b",%b}' % (model, rest))


def nested(depth: int) -> bytes:
    return b'"messages":' + b"[" * depth + b"]" * depth


# Made when they are sent: together they are 200 MB.
BODIES: dict[str, tuple[Callable[[], bytes], int]] = {
    "100,000 levels": (lambda: chat(nested(100_000)), 400),
    "500 levels, as they came": (lambda: chat(nested(500)), 200),
    "500 levels under another name": (lambda: chat(nested(500), b"short"), 200),
    "500 levels whose usage must be asked for": (
        lambda: chat(b'"stream":true,"stream_options":{},' + nested(500)),
        400,
    ),
    "the same with two models below": (lambda: chat(nested(900) + b',"a":{"model":"x"}'), 200),
    "as many objects": (lambda: chat(b'"a":' + b'{"a":' * 500 + b"1" + b"}" * 500), 200),
    "a number of a million digits": (lambda: chat(b'"max_tokens":' + b"9" * 1_000_000), 400),
    "the largest number": (lambda: chat(b'"max_tokens":18446744073709551615,"n":100'), 200),
    "a larger one": (lambda: chat(b'"max_tokens":%d' % 10**30), 200),
    "a negative one": (lambda: chat(b'"max_tokens":-5,"n":-5'), 200),
    "a small exponent": (lambda: chat(b'"temperature":1e-400,"max_tokens":1e308'), 200),
    "240,000 names": (
        lambda: chat(b'"a":{' + b",".join(b'"k%d":1' % n for n in range(240_000)) + b"}"),
        200,
    ),
    "490,000 texts": (lambda: chat(b'"messages":[' + b'"x",' * 490_000 + b'"y"]'), 200),
    "a million texts": (lambda: chat(b'"messages":[' + b'"x",' * 1_000_000 + b'"y"]'), 413),
    "160,000 models": (
        lambda: chat(b'"messages":[' + b'{"model":"x"},' * 160_000 + b'"y"]'),
        200,
    ),
    "20 MB of one text": (lambda: chat(b'"messages":["' + b"x" * 20_000_000 + b'"]'), 200),
    "20 MB of base64 that is no picture": (
        lambda: chat(
            b'"messages":[{"type":"image_url","image_url":{"url":"data:image/png;base64,'
            + b"A" * 20_000_000
            + b'"}}]'
        ),
        200,
    ),
    "10 MB of quotes": (lambda: chat(b'"messages":["' + b'\\"' * 5_000_000 + b'"]'), 200),
    "10 MB of spaces": (lambda: chat(b'"messages":' + b" " * 10_000_000 + b"[]"), 200),
    "10 MB of almost names": (
        lambda: chat(b'"messages":["' + b'\\"model' * 1_400_000 + b'"]'),
        200,
    ),
    "9 million lists": (lambda: chat(b'"messages":[' + b"[]," * 9_000_000 + b"1]"), 413),
    "9 million commas in a text": (
        lambda: chat(b'"messages":["' + b",[{" * 3_000_000 + b'"]'),
        200,
    ),
    "more than is allowed": (lambda: chat(b'"a":"' + b"x" * 31_000_000 + b'"'), 413),
    "70,000 files": (
        lambda: post(
            path=GEMINI,
            body=b'{"contents":[{"parts":['
            + b'{"fileData":{"fileUri":"gs://x","mimeType":"video/mp4"}},' * 70_000
            + b'{"text":"x"}]}]}',
        ),
        200,
    ),
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_made_to_cost_is_answered_soon(
    gateway: Gateway, hostile: Hostile, name: str
) -> None:
    made, status = BODIES[name]
    request = made()
    began = time.process_time()
    got = await raw(gateway, request)
    took_s = time.process_time() - began  # of the client here as well, which does little
    assert status_of(got) == status, got[:300]
    assert took_s < MOST_CPU_S, f"{took_s:.2f} s of CPU"
    if status == 200:
        body = request.partition(b"\r\n\r\n")[2].replace(b'"short"', b'"the-long-name"')
        assert hostile.seen[-1].endswith(body), "byte for byte"
    else:
        assert hostile.seen == []
    assert gateway.held == 0
