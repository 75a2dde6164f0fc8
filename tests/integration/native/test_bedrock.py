"""boto3's `bedrock-runtime` and `AnthropicBedrock`, unmodified, through the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway import KEY, PNG, Gateway, Opener
from tests.integration.native.clouds import AWS_ID, AWS_SECRET
from tests.integration.tenants.asking import key_of
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.record import framed_in

MODEL = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
ARN = "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/abc"
SAY: Any = [{"role": "user", "content": [{"text": "Say hello"}]}]
INVOKED: Any = {
    "anthropic_version": "bedrock-2023-05-31",
    "max_tokens": 500,
    "messages": [{"role": "user", "content": "Say hello"}],
}
POLICY = """
[upstreams.first]
dialects = {{ bedrock = "{first}" }}
key = "FIRST_KEY"

[upstreams.second]
dialects = {{ bedrock = "{second}" }}
key = "SECOND_KEY"

[[routes]]
model = "*"
try = ["first", "second"]
"""


@pytest.fixture(autouse=True)
def no_account_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "AWS_BEARER_TOKEN_BEDROCK",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_PROFILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))


def runtime(gateway: Gateway, **options: Any) -> Any:
    """boto3 sends a bearer over TLS alone; without, it is unsigned, and a hook adds a header."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    how = None if options else UNSIGNED
    config = Config(retries={"total_max_attempts": 1}, read_timeout=30, signature_version=how)
    where = {"endpoint_url": gateway.url, "region_name": "us-east-1", "config": config}
    return boto3.session.Session().client("bedrock-runtime", **where, **options)


def all_of(method: Any, field: str, **asked: Any) -> tuple[str, list[dict[str, Any]]]:
    """The id of a streamed call, and its events."""
    answer = method(**asked)
    request_id = answer["ResponseMetadata"]["HTTPHeaders"]["x-tidegate-request-id"]
    return request_id, list(answer[field])


async def test_a_stream_that_waits_shows_its_place_and_sdks_pass_over_it(
    open_gateway: Opener,
) -> None:
    from anthropic import AsyncAnthropicBedrock

    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang", match="hold it", count=1)
    held = {"contents": [{"parts": [{"text": "hold it"}]}]}
    url = f"{gateway.url}/v1beta/models/gemini-2.5-flash:generateContent"
    holding = asyncio.create_task(gateway.http.post(url, json=held))
    await gateway.in_flight(1)
    asking = {"x-tidegate-show-wait": "1"}
    client = runtime(gateway)
    add = "before-send.bedrock-runtime"
    client.meta.events.register(add, lambda request, **_: request.headers.update(asking))
    # The head of each comes before it is admitted, with the first message of its place.
    raw = f"{gateway.url}/model/{MODEL}/converse-stream"
    asked: Any = {"modelId": MODEL, "messages": SAY}
    message: Any = {"model": MODEL, "max_tokens": 500, "messages": INVOKED["messages"]}
    sdk = AsyncAnthropicBedrock(
        base_url=gateway.url,
        aws_region="us-east-1",
        aws_access_key=AWS_ID,
        aws_secret_key=AWS_SECRET,
        default_headers=asking,
    )
    async with (
        gateway.http.post(raw, json={"messages": SAY}, headers=asking) as response,
        sdk.messages.stream(**message) as stream,
    ):
        answer = await asyncio.to_thread(client.converse_stream, **asked)
        assert response.status == 200
        assert response.content_type == "application/vnd.amazon.eventstream"
        shown: dict[str, Any] = {"limit": None}  # as it is until the call is in its queue
        while shown["limit"] is None:
            length = await response.content.readexactly(4)
            rest = await response.content.readexactly(int.from_bytes(length, "big") - 4)
            headers, payload = next(framed_in(length + rest))
            assert headers[":event-type"] == "waiting"
            shown = orjson.loads(payload)
        assert (shown["limit"], shown["wait_ms"] > 0) == ("kind:text_only", True)
        assert 0 <= shown["ahead"] <= 2
        holding.cancel()
        named = [one[":event-type"] for one, _ in framed_in(await response.read())]
        assert named[-1] == "metadata"
        events = await asyncio.to_thread(list, answer["stream"])
        names = [name for one in events for name in one]
        assert (names[0], names[-1]) == ("messageStart", "metadata")
        assert (await stream.get_final_message()).stop_reason == "end_turn"
    await sdk.close()


async def test_converse_whole_and_streamed_and_their_record(gateway: Gateway) -> None:
    client = runtime(gateway)
    picture = {"image": {"format": "png", "source": {"bytes": PNG}}}
    tool = {"toolSpec": {"name": "look", "inputSchema": {"json": {"type": "object"}}}}
    asked: Any = {
        "modelId": MODEL,
        "messages": SAY,
        "system": [{"text": "Be brief"}],
        "inferenceConfig": {"maxTokens": 77},
    }
    whole = await asyncio.to_thread(client.converse, **asked)
    assert whole["output"]["message"]["content"][0]["text"]
    assert whole["stopReason"] == "end_turn"
    row = await gateway.audit(whole["ResponseMetadata"]["HTTPHeaders"]["x-tidegate-request-id"])
    counts = (row["input_tokens"], row["output_tokens"])
    assert counts == (whole["usage"]["inputTokens"], whole["usage"]["outputTokens"])
    assert (row["model"], row["finish_reason"], row["kind"], row["status"]) == (
        *(MODEL, "end_turn", "text_only", "succeeded"),
    )

    request_id, events = await asyncio.to_thread(all_of, client.converse_stream, "stream", **asked)
    assert [next(iter(one)) for one in events][-2:] == ["messageStop", "metadata"]
    text = "".join(
        one["contentBlockDelta"]["delta"]["text"] for one in events if "contentBlockDelta" in one
    )
    used = events[-1]["metadata"]["usage"]
    row = await gateway.audit(request_id)
    assert text == whole["output"]["message"]["content"][0]["text"]
    assert (row["input_tokens"], row["output_tokens"], row["finish_reason"], row["streamed"]) == (
        *(used["inputTokens"], used["outputTokens"], "end_turn", True),
    )
    assert 'data: {"metadata":' in row["response"], "the record is text"

    asked["messages"] = [{"role": "user", "content": [*SAY[0]["content"], picture]}]
    asked |= {"modelId": ARN, "toolConfig": {"tools": [tool], "toolChoice": {"any": {}}}}
    called = await asyncio.to_thread(client.converse, **asked)
    assert called["stopReason"] == "tool_use"
    assert called["output"]["message"]["content"][0]["toolUse"]["name"] == "look"
    row = await gateway.audit(called["ResponseMetadata"]["HTTPHeaders"]["x-tidegate-request-id"])
    assert (row["model"], row["kind"]) == (ARN, "multi_modal")
    counted = await asyncio.to_thread(
        client.count_tokens, modelId=MODEL, input={"converse": {"messages": SAY}}
    )
    assert counted["inputTokens"] > 0


async def test_invoked_models_whole_and_streamed_and_their_record(gateway: Gateway) -> None:
    from anthropic import AsyncAnthropicBedrock

    client = runtime(gateway)
    asked: Any = {"modelId": MODEL, "body": orjson.dumps(INVOKED)}
    raw = await asyncio.to_thread(client.invoke_model, **asked)
    whole = orjson.loads(raw["body"].read())
    row = await gateway.audit(raw["ResponseMetadata"]["HTTPHeaders"]["x-tidegate-request-id"])
    assert (row["input_tokens"], row["output_tokens"], row["finish_reason"]) == (
        *(whole["usage"]["input_tokens"], whole["usage"]["output_tokens"], "end_turn"),
    )
    request_id, events = await asyncio.to_thread(
        all_of, client.invoke_model_with_response_stream, "body", **asked
    )
    last = orjson.loads(events[-1]["chunk"]["bytes"])["amazon-bedrock-invocationMetrics"]
    row = await gateway.audit(request_id)
    assert (row["input_tokens"], row["output_tokens"]) == (
        *(last["inputTokenCount"], last["outputTokenCount"]),
    )
    assert row["model"] == MODEL
    async with AsyncAnthropicBedrock(
        base_url=gateway.url, aws_region="us-east-1", api_key="of-a-client", max_retries=0
    ) as sdk:
        message: Any = {"model": MODEL, "max_tokens": 500, "messages": INVOKED["messages"]}
        answered = await sdk.messages.with_raw_response.create(**message)
        row = await gateway.audit(answered.headers["x-tidegate-request-id"])
        assert row["output_tokens"] == (await answered.parse()).usage.output_tokens
        async with sdk.messages.stream(**message) as stream:
            assert "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
    assert final.stop_reason == "end_turn"


async def test_a_signature_opens_nothing_here_and_does_not_go_on(open_gateway: Opener) -> None:
    """A client that signs shows its key in a header that boto3 lets it add."""
    from botocore.exceptions import ClientError

    gateway = await open_gateway(worker=False, auth="on")
    key = (await key_of(gateway, "acme"))["Authorization"].removeprefix("Bearer ")
    signed = {"aws_access_key_id": AWS_ID, "aws_secret_access_key": AWS_SECRET}
    client = runtime(gateway, **signed, aws_session_token="of-a-client")
    with pytest.raises(ClientError, match="AccessDeniedException"):
        await asyncio.to_thread(client.converse, modelId=MODEL, messages=SAY)

    def shows(request: Any, **_: Any) -> None:
        request.headers["x-api-key"] = key

    client.meta.events.register("before-send.bedrock-runtime", shows)
    answer = await asyncio.to_thread(client.converse, modelId=MODEL, messages=SAY)
    assert answer["stopReason"] == "end_turn"


@pytest.fixture
async def two(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Gateway, Emulator, Emulator]]:
    monkeypatch.setenv("FIRST_KEY", KEY)
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    async with run_emulator() as first, run_emulator() as second:
        path = tmp_path / "policy.toml"
        path.write_text(POLICY.format(first=first.url, second=second.url))
        opened = await open_gateway(
            worker=False, tidegate_policy=path, rate_limits={"image_generation": 0}
        )
        yield opened, first, second


async def test_refusals_are_classified_and_told_in_boto3s_words(
    two: tuple[Gateway, Emulator, Emulator],
) -> None:
    from botocore.exceptions import ClientError, EventStreamError

    gateway, first, second = two
    client = runtime(gateway)
    asked: Any = {"modelId": MODEL, "messages": SAY}

    async def moved(method: Any, field: str = "") -> str:
        """The upstream that answered."""
        if field:
            request_id, events = await asyncio.to_thread(all_of, method, field, **asked)
            assert "metadata" in events[-1]
        else:
            answer = await asyncio.to_thread(method, **asked)
            request_id = answer["ResponseMetadata"]["HTTPHeaders"]["x-tidegate-request-id"]
        return str((await gateway.audit(request_id))["upstream"])

    await first.control.set_fault("unavailable", count=1)
    assert await moved(client.converse) == "second"
    await first.control.set_fault("error_in_stream", count=1, after_chunks=0, code=503)
    assert await moved(client.converse_stream, "stream") == "second", "before any output"
    assert await moved(client.converse) == "first"
    await first.control.set_fault("throttled", count=1)
    assert await moved(client.converse) == "second"

    for one in (first, second):
        await one.control.set_fault("error_in_stream", count=1, after_chunks=1, code=429)
    with pytest.raises(EventStreamError) as broken:
        await asyncio.to_thread(all_of, client.converse_stream, "stream", **asked)
    assert broken.value.response["Error"]["Code"] == "throttlingException"

    with pytest.raises(ClientError) as wrong:
        await asyncio.to_thread(client.invoke_model, modelId=MODEL, body=b"{}")
    assert wrong.value.response["Error"]["Code"] == "ValidationException"
    assert "anthropic_version" in wrong.value.response["Error"]["Message"]
    with pytest.raises(ClientError) as ours:
        await asyncio.to_thread(client.invoke_model, modelId=MODEL, body=b"not JSON")
    assert ours.value.response["Error"]["Code"] == "ValidationException"
    assert "is not JSON" in ours.value.response["Error"]["Message"]


async def test_a_stream_that_is_sent_again_under_a_key_is_the_same_bytes(gateway: Gateway) -> None:
    url = f"{gateway.url}/model/{MODEL}/converse-stream"
    headers = {"Idempotency-Key": "one", "Authorization": "Bearer of-a-client"}
    seen = []
    for _ in range(2):
        async with gateway.http.post(url, json={"messages": SAY}, headers=headers) as answer:
            assert answer.content_type == "application/vnd.amazon.eventstream"
            seen.append((answer.headers.get("idempotency-replayed"), await answer.read()))
    assert seen[1] == ("true", seen[0][1])
    names = [headers[":event-type"] for headers, _ in framed_in(seen[0][1])]
    assert (names[0], names[-1]) == ("messageStart", "metadata")
