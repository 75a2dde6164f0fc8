"""A key with limits for the LiteLLM proxy, which asks for it here: no database is needed then."""

from __future__ import annotations

from fastapi import Request
from litellm.proxy._types import UserAPIKeyAuth

_MANY = 1_000_000_000


async def limited(_request: Request, api_key: str) -> UserAPIKeyAuth:
    return UserAPIKeyAuth(
        api_key=api_key, max_parallel_requests=5000, rpm_limit=_MANY, tpm_limit=_MANY
    )
