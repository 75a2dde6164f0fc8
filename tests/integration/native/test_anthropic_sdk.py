"""The unmodified Anthropic SDK through the gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway import Gateway, Opener

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic

ASKED: Any = {
    "model": "claude-x",
    "max_tokens": 500,
    "messages": [{"role": "user", "content": "Say hello"}],
}


def sdk(gateway: Gateway) -> AsyncAnthropic:
    from anthropic import AsyncAnthropic  # 3,000 modules

    return AsyncAnthropic(base_url=gateway.url, api_key="of-a-client", max_retries=0)


async def test_whole_and_streamed_and_their_record(gateway: Gateway) -> None:
    async with sdk(gateway) as client:
        raw = await client.messages.with_raw_response.create(**ASKED)
        whole = await raw.parse()
        row = await gateway.audit(raw.headers["x-tidegate-request-id"])
        assert (row["input_tokens"], row["output_tokens"]) == (
            whole.usage.input_tokens,
            whole.usage.output_tokens,
        )
        async with client.messages.stream(**ASKED) as stream:
            request_id = stream.response.headers["x-tidegate-request-id"]
            text = "".join([piece async for piece in stream.text_stream])
            last = await stream.get_final_message()
    assert text
    row = await gateway.audit(request_id)
    assert (row["input_tokens"], row["output_tokens"], row["finish_reason"]) == (
        last.usage.input_tokens,
        last.usage.output_tokens,
        "end_turn",
    )


async def test_errors_are_those_that_the_sdk_knows(open_gateway: Opener) -> None:
    from anthropic import BadRequestError

    gateway = await open_gateway(worker=False, rate_limits={"text_only": 0})
    async with sdk(gateway) as client:
        with pytest.raises(BadRequestError, match="kind:text_only"):
            await client.messages.create(**ASKED)
