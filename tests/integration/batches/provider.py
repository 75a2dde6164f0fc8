"""A provider with batch APIs, and jobs that wait for its batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tests.gateway import Gateway
from tidegate.emulator.client import EmulatorControl

MODELS = {
    "openai": "gpt-4o-mini",
    "anthropic": "claude-sonnet-4-5",
    "gemini": "gemini-2.5-flash",
}
SOON = {"provider_batch_gather_ms": 50, "provider_batch_poll_ms": 100}


def policy_of(url: str) -> str:
    """The three providers, all at one emulator."""
    return "\n".join(
        (
            "[upstreams.openai]",
            'provider = "openai"',
            f'base_url = "{url}"',
            'models = ["gpt-*"]',
            "[upstreams.anthropic]",
            'provider = "anthropic"',
            f'base_url = "{url}"',
            'models = ["claude-*"]',
            "[upstreams.google]",
            'provider = "gemini"',
            'key = "GOOGLE_KEY"',
            f'base_url = "{url}"',
            'models = ["gemini-2.5-*"]',
        )
    )


def wrapped(dialect: str, text: str, **more: Any) -> dict[str, Any]:
    """The fields of a job that wraps a call of a dialect."""
    model = MODELS[dialect]
    if dialect == "gemini":
        body: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": text}]}]}
        return {"endpoint": f"/v1beta/models/{model}:generateContent", "body": body | more}
    body = {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": text}]}
    path = "/v1/messages" if dialect == "anthropic" else "/v1/chat/completions"
    return {"endpoint": path, "body": body | more}


async def put_into_batch(gateway: Gateway, *jobs: str) -> None:
    """Have queued jobs wait for a batch, as the choice of their tier does."""
    await gateway.database.execute(
        "UPDATE requests SET tier = 'batch', tiers_allowed = '{batch}', tier_why = 'it is cheaper',"
        " not_before = now() + interval '1 hour' WHERE id = ANY($1::uuid[])",
        list(jobs),
    )


async def asked(control: EmulatorControl, contains: str = "") -> Counter[tuple[str, str]]:
    """How often the provider was asked what, in which tier: by its own book."""
    calls = await control.calls(contains=contains)
    return Counter((call.prompt, call.tier) for call in calls if call.kind != "other")


async def batches(gateway: Gateway) -> list[Mapping[str, Any]]:
    rows = await gateway.database.fetch("SELECT * FROM provider_batches ORDER BY made_at")
    return [dict(row) for row in rows]


async def is_in(gateway: Gateway, *states: str) -> bool:
    """Whether all batches are in one of these states, and there is one."""
    found = await batches(gateway)
    return bool(found) and all(one["state"] in states for one in found)
