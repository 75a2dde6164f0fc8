"""How these tests ask a gateway: as a tenant with a key, and as whoever may do everything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from tests.gateway import Gateway, payload_of
from tidegate.call import Scope

ADMIN_TOKEN = "the-token-of-these-tests"
AS_ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


async def key_of(
    gateway: Gateway,
    tenant: str,
    *,
    scopes: Iterable[Scope] = (Scope.INFER, Scope.READ),
    **changes: Any,
) -> dict[str, str]:
    """The headers of a new key; `changes` are made to its tenant first."""
    tenants = gateway.services.store.tenants
    await tenants.set(tenant, changes, by="test")
    await gateway.services.store.budgets.refresh()
    _, made = await tenants.create_key(tenant, scopes=scopes)
    return {"Authorization": f"Bearer {made.text}"}


async def ask(
    gateway: Gateway,
    method: str,
    path: str,
    headers: dict[str, str],
    body: dict[str, Any] | None = None,
) -> tuple[int, Any]:
    """The status, and the body where it is JSON."""
    given = {} if body is None else payload_of(body)
    async with gateway.http.request(
        method, gateway.url + path, headers=headers, **given
    ) as response:
        data = await response.read()
        if response.status >= 400:
            assert response.content_type == "application/problem+json", data
        is_json = "json" in response.content_type
        return response.status, orjson.loads(data) if is_json else data


async def submitted(gateway: Gateway, headers: dict[str, str], **body: Any) -> str:
    """The id of a job that was taken."""
    status, answer = await ask(gateway, "POST", "/submit", headers, body or {"data": "Explain"})
    assert status == 202, answer
    return str(answer["request_id"])
