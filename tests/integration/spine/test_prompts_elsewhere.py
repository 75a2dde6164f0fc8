"""Prompts at upstreams of OpenAI's and Anthropic's dialect: text, files, images, streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData

from tests.gateway import PNG, Gateway, Opener
from tests.integration.connections.scripted import Upstream, request, upstream
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator

__all__ = ["upstream"]

Sent = tuple[bytes, str, str]
PICTURE: Sent = PNG, "a.png", "image/png"
PDF: Sent = b"%PDF-1.4\n1 0 obj<</Type/Page>>endobj\n%%EOF", "b.pdf", "application/pdf"
WAV: Sent = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(28), "c.wav", "audio/wav"
GPT, CLAUDE = "gpt-6-luna", "claude-haiku-5-5"
POLICY = """
[upstreams.openai]
provider = "openai"
base_url = "{openai}"
key = "OPENAI_API_KEY"
models = ["gpt-*"]

[upstreams.openai.limits]
"pool:total" = 8
"tpm:m" = 100000

[upstreams.claude]
provider = "anthropic"
base_url = "{claude}"
key = "ANTHROPIC_API_KEY"
models = ["claude-*"]

[upstreams.cloud]
dialects = {{ gemini = "{claude}", anthropic = "{claude}" }}
key = "ANTHROPIC_API_KEY"
models = ["gemini-of-cloud"]
aliases = {{ cloudy = "claude-haiku-5-5" }}

[[routes]]
model = "smart"
try = ["openai/gpt-6-luna", "claude/claude-haiku-5-5", "gemini/gemini-2.5-flash"]
"""


@dataclass
class Three:
    """A gateway with a worker, and an upstream of each dialect; Gemini's is `gateway.upstream`."""

    gateway: Gateway
    openai: Emulator
    claude: Emulator

    async def calls(self) -> dict[str, list[tuple[str, str]]]:
        """The kinds and models that each was called for."""
        found = {}
        for name, control in (
            ("gemini", self.gateway.upstream),
            ("openai", self.openai.control),
            ("claude", self.claude.control),
        ):
            calls = await control.calls()
            found[name] = [(call.kind, call.model) for call in calls]
        return {name: calls for name, calls in found.items() if calls}


OpenThree = Callable[..., Awaitable[Three]]


@pytest.fixture
async def open_three(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[OpenThree]:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "of-an-account")
    async with run_emulator() as openai, run_emulator() as claude:
        policy = tmp_path / "policy.toml"
        policy.write_text(POLICY.format(openai=openai.url, claude=claude.url))

        async def open_one(**settings: Any) -> Three:
            return Three(await open_gateway(tidegate_policy=policy, **settings), openai, claude)

        yield open_one


@pytest.fixture
async def three(open_three: OpenThree) -> Three:
    return await open_three()


async def post(
    gateway: Gateway, path: str, file: Sent | None = None, **fields: str
) -> tuple[int, dict[str, Any]]:
    form = FormData(fields)
    if file is not None:
        form.add_field("file", file[0], filename=file[1], content_type=file[2])
    async with gateway.http.post(f"{gateway.url}{path}", data=form) as response:
        return response.status, await response.json(content_type=None)


async def test_text_and_files_reach_the_upstream_of_their_model(three: Three) -> None:
    gateway = three.gateway
    asked = (
        (GPT, "text_only", None),
        (CLAUDE, "text_only", None),
        (GPT, "multi_modal", PICTURE),
        (CLAUDE, "multi_modal", PDF),
        (GPT, "multi_modal", WAV),
    )
    jobs = [
        await post(gateway, "/submit", file, data="Explain the tide", model=model)
        for model, _, file in asked
    ]
    for (status, sent), (model, kind, _) in zip(jobs, asked, strict=True):
        assert status == 202, sent
        job = sent["request_id"]
        done = await gateway.end_of(job)
        assert (done["status"], done["type"], done["model"]) == ("succeeded", kind, model), done
        assert done["text"]
        assert done["usage"]["input_tokens"] > 0
        row = await gateway.audit(job)
        assert row["upstream"] == ("openai" if model == GPT else "claude")
        assert row["finish_reason"] == ("stop" if model == GPT else "end_turn")
        assert row["input_tokens"] == done["usage"]["input_tokens"]
        assert row["cost_micros"] > 0
    assert {name: sorted(found) for name, found in (await three.calls()).items()} == {
        "openai": [("multi_modal", GPT), ("multi_modal", GPT), ("text_only", GPT)],
        "claude": [("multi_modal", CLAUDE), ("text_only", CLAUDE)],
    }


async def test_a_cloud_is_called_in_the_dialect_of_the_models_maker(three: Three) -> None:
    for model, finish in (("cloudy", "end_turn"), ("gemini-of-cloud", "STOP")):
        streamed = await three.gateway.stream(text="Explain the tide", model=model)
        row = await three.gateway.audit(streamed.request_id)
        assert (row["upstream"], row["finish_reason"]) == ("cloud", finish), row


async def test_a_stream_has_the_same_events_whoever_answers(three: Three) -> None:
    gateway = three.gateway
    seen = {}
    for model in ("gemini-2.5-flash", GPT, CLAUDE):
        streamed = await gateway.stream(text="Explain the tide", model=model, type="text_only")
        assert (streamed.status, streamed.ended) == (200, True)
        assert streamed.names[-2:] == ["usage", "done"]
        assert streamed.names.count("delta") > 1
        seen[model] = {name: sorted(data) for name, data in streamed.events}
        row = await gateway.audit(streamed.request_id)
        assert row["response"]["text"] == streamed.text
        assert row["first_byte_ms"] > 0
        done = streamed.events[-1][1]
        assert done["finish_reason"] == row["finish_reason"] is not None
    assert seen[GPT].keys() == seen[CLAUDE].keys() == seen["gemini-2.5-flash"].keys()
    assert seen[GPT]["done"] == seen["gemini-2.5-flash"]["done"]


async def test_an_image_is_drawn_or_changed_by_the_images_calls(three: Three) -> None:
    gateway = three.gateway
    job = await gateway.submit(data="Draw a lighthouse", model="gpt-image-2")
    done = await gateway.end_of(job)
    assert (done["status"], done["type"]) == ("succeeded", "image_generation"), done
    (picture,) = done["images"]
    assert picture["mime_type"] == "image/png"
    streamed = await gateway.stream(text="Draw a lighthouse", model="gpt-image-2")
    assert streamed.names == ["image", "usage", "done"]
    async with gateway.http.get(f"{gateway.url}{streamed.events[0][1]['url']}") as response:
        assert (await response.read()).startswith(b"\x89PNG")
    status, sent = await post(
        gateway, "/submit", PICTURE, data="Remove the cloud", model="gpt-image-2"
    )
    assert status == 202, sent
    changed = await gateway.end_of(sent["request_id"])
    assert (changed["type"], len(changed["images"])) == ("image_generation", 1), changed
    assert await three.calls() == {"openai": [("image_generation", "gpt-image-2")] * 3}


@pytest.mark.parametrize("path", ["/submit", "/stream"])
async def test_what_a_dialect_cant_take_is_refused_where_it_is_known(
    path: str, three: Three
) -> None:
    gateway = three.gateway
    status, said = await post(gateway, path, data="Draw a lighthouse", model=CLAUDE)
    assert (status, said["field"]) == (400, "model")
    assert said["allowed"] == "a model that makes images"
    assert said["detail"] == f"the upstream 'claude' of the model '{CLAUDE}' makes no images"
    status, said = await post(gateway, path, WAV, data="What is said?", model=CLAUDE)
    assert (status, said["field"], said["allowed"].split(",")[0]) == (400, "files", "PNG")
    assert "takes no audio/wav" in said["detail"]
    assert await three.calls() == {}


async def test_a_route_fails_over_from_dialect_to_dialect(three: Three) -> None:
    gateway = three.gateway
    await three.openai.control.set_fault("unavailable", count=9)
    job = await gateway.end_of(await gateway.submit(data="Explain the tide", model="smart"))
    assert (job["status"], job["model"]) == ("succeeded", CLAUDE), job
    await three.claude.control.set_fault("cut", count=9)
    streamed = await gateway.stream(text="Explain the tide", model="smart")
    assert streamed.names[-1] == "done"
    row = await gateway.audit(streamed.request_id)
    assert (row["upstream"], row["model"], row["attempts"]) == ("gemini", "gemini-2.5-flash", 3)
    # What a dialect can't take goes to one that can.
    picture = await gateway.end_of(await gateway.submit(data="Draw a lighthouse", model="smart"))
    assert picture["status"] == "succeeded"
    assert (await three.calls())["gemini"][-1][0] == "image_generation"


FAULTS = {
    "blocked_prompt": "prompt_blocked",
    "cut_mid_stream": "upstream_unavailable",
    "error_in_stream": "upstream_unavailable",
    "unauthorized": "upstream_unauthorized",
}


async def test_faults_of_an_answer_are_told_as_of_geminis(three: Three) -> None:
    for fault, code in FAULTS.items():
        for at, model in ((three.openai, GPT), (three.claude, CLAUDE)):
            await at.control.set_fault(fault, count=9)
            streamed = await three.gateway.stream(text="Explain the tide", model=model)
            assert streamed.problem["code"] == code, (model, fault, streamed)
            await at.control.clear_faults()
    assert three.gateway.held == 0


RAW = """
[upstreams.raw]
dialects = {{ openai = "{url}", anthropic = "{url}" }}
key = "OPENAI_API_KEY"
models = ["raw", "raw-claude"]
"""
FLAGGED = {"message": "your prompt was flagged", "code": "invalid_prompt"}
FILTERED = {
    "type": "invalid_request_error",
    "message": "Output blocked by content filtering policy",
}
POLICY_OF = "content filtering policy"
SAID = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hel"}}
REFUSALS = (
    ("raw", 400, json.dumps({"error": FLAGGED}), "invalid_prompt"),
    (
        "raw",
        403,
        json.dumps({"code": "no", "error": "Content violates usage guidelines."}),
        "usage guidelines",
    ),
    ("raw-claude", 400, json.dumps({"type": "error", "error": FILTERED}), POLICY_OF),
    # Before any output, and after some.
    ("raw-claude", 200, f"data: {json.dumps({'type': 'error', 'error': FILTERED})}\n\n", POLICY_OF),
    (
        *("raw-claude", 200),
        "".join(
            f"data: {json.dumps(one)}\n\n" for one in (SAID, {"type": "error", "error": FILTERED})
        ),
        POLICY_OF,
    ),
)


async def test_a_filter_that_refuses_a_prompt_blocks_it_and_is_asked_once(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-an-account")
    policy = tmp_path / "policy.toml"
    policy.write_text(RAW.format(url=upstream.url))
    gateway, answer = await open_gateway(tidegate_policy=policy), b""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer)

    upstream.script = script
    for model, status, body, reason in REFUSALS:
        kind = "text/event-stream" if status == 200 else "application/json"
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        answer = f"{head}connection: close\r\n\r\n{body}".encode()
        streamed = await gateway.stream(text="Explain the tide", model=model, type="text_only")
        assert streamed.problem["code"] == "prompt_blocked", (body, streamed)
        assert f"({reason})" in streamed.problem["detail"]
        row = await gateway.audit(streamed.request_id)
        assert row["attempts"] == 1, row
        if status >= 400:
            job = await gateway.submit(data="Explain the tide", model=model, type="text_only")
            done = await gateway.end_of(job)
            assert done["error"]["code"] == "prompt_blocked", done
            row = await gateway.audit(job)
            assert (row["attempts"], row["usage_state"]) == (1, "none"), row


@pytest.mark.parametrize("model", [GPT, CLAUDE])
async def test_the_classifier_is_asked_in_the_dialect_of_its_model(
    model: str, open_three: OpenThree
) -> None:
    three = await open_three(classifier_model=model, worker=False)
    at = three.openai if model == GPT else three.claude
    answer = {"kind": "image_generation", "reason": "because the test says so"}
    await at.control.set_behaviour(classifier_answer=answer)
    streamed = await three.gateway.stream(text="Nice!", model="gpt-image-2")
    assert streamed.events[-1][1]["classified_by"] == "llm"
    assert streamed.events[-1][1]["type"] == "image_generation"
    assert (await at.control.calls())[0].model == model
    assert three.gateway.held == 0


async def test_a_client_that_leaves_closes_the_call(three: Three) -> None:
    await three.openai.control.set_behaviour(between_ms={"*": 60_000})
    async with three.gateway.open_stream(text="Explain the tide", model=GPT) as response:
        assert response.status == 200
        await response.content.readuntil(b"event: delta")
        request_id = response.headers["x-tidegate-request-id"]
    row = await three.gateway.audit(request_id)
    assert row["status"] == "cancelled"
    assert row["usage_state"] in ("estimated", "partial")

    async def is_closed() -> bool:
        return not (await three.openai.control.stats()).in_flight

    await wait_until(is_closed, 5, "a closed call")
    assert three.gateway.held == 0


async def test_jobs_fill_the_limit_of_the_upstream_that_they_go_to(open_three: OpenThree) -> None:
    """Whatever the limit of Gemini's, from whose pool they are claimed."""
    three = await open_three(rate_limits={"text_only": 1, "multi_modal": 1, "image_generation": 1})
    await three.openai.control.set_fault("hang")
    for _ in range(12):
        status, sent = await post(three.gateway, "/submit", data="Explain the tide", model=GPT)
        assert status == 202, sent

    async def is_full() -> bool:
        return (await three.openai.control.stats())["text_only"].in_flight == 8

    await wait_until(is_full, what="as many calls as its limit allows")
