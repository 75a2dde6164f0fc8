"""What PostgreSQL can't hold: refused by name wherever it comes in, and never a lost record."""

from __future__ import annotations

from json import dumps
from typing import Any

from yarl import URL

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until

NUL, HALF = "a\x00b", "a\ud800b"
CHAT = "/v1/chat/completions"
BATCH = {"input_file_id": "file-" + "7" * 32, "endpoint": CHAT, "completion_window": "24h"}


async def asked(
    gateway: Gateway, method: str, path: str, body: Any = None
) -> tuple[int, dict[str, Any]]:
    """Bodies are written with escapes, as JSON may have them."""
    given: dict[str, Any] = {}
    if body is not None:
        given = {"data": dumps(body), "headers": {"Content-Type": "application/json"}}
    url = URL(gateway.url + path, encoded=True)
    async with gateway.http.request(method, url, **given) as response:
        return response.status, await response.json(content_type=None)


def field_of(answer: dict[str, Any]) -> str | None:
    """As ours and OpenAI's errors name it."""
    found: str | None = answer["error"]["param"] if "error" in answer else answer.get("field")
    return found


TARGETS = [
    ("GET", "/requests?model={}", "model"),
    ("GET", "/llm/requests?model={}", "model"),
    ("GET", "/requests?limit=2&cursor={}", "cursor"),
    ("GET", "/usage?by={}", "by"),
    ("GET", "/v1/files?purpose={}", "purpose"),
    ("GET", "/v1/batches?after={}", "after"),
    ("GET", "/admin/keys?tenant={}", "tenant"),
    ("GET", "/admin/keys?prefix={}", "prefix"),
    ("GET", "/admin/usage?tenant={}", "tenant"),
    ("GET", "/admin/latency?tenant={}", "tenant"),
    ("GET", "/admin/tenants/{}", "path"),
    ("DELETE", "/admin/tenants/{}", "path"),
    ("DELETE", "/admin/tenants/acme?by={}", "by"),
    ("DELETE", "/admin/subjects/{}", "path"),
    ("DELETE", "/admin/subjects/x?tenant={}", "tenant"),
]
BODIES: list[tuple[str, dict[str, Any], str]] = [
    ("/submit", {"data": NUL}, "data"),
    ("/submit", {"data": HALF}, "data"),
    ("/submit", {"data": "x", "subject": NUL}, "subject"),
    ("/submit", {"endpoint": CHAT, "body": {"model": f"m{NUL}"}}, "body.model"),
    ("/submit", {"endpoint": CHAT, "body": {"model": f"m{HALF}"}}, "body.model"),
    ("/submit", {"endpoint": CHAT, "body": {"model": "m"}, "subject": NUL}, "subject"),
    ("/v1/batches", BATCH | {"metadata": {"a": NUL}}, "metadata"),
    ("/v1/batches", BATCH | {"metadata": {NUL: "a"}}, "metadata"),
    ("/admin/keys", {"tenant": NUL}, "tenant"),
    ("/admin/keys", {"name": NUL}, "name"),
    ("/admin/keys", {"by": NUL}, "by"),
    ("/admin/keys", {"expires_at": "9999-12-31T23:59:59-14:00"}, "expires_at"),
]


async def test_a_target_with_it_is_refused(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    for method, path, named in TARGETS:
        for bad in ("a%00b", "%ED%A0%80", "%FF"):
            field = named
            status, answer = await asked(gateway, method, path.format(bad))
            if field == "path" and bad == "a%00b":  # its route knows what it names
                field = "subject" if "subjects" in path else "tenant"
            assert (status, field_of(answer)) == (400, field), (method, path, bad)


async def test_a_body_with_it_is_refused(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    for path, body, field in BODIES:
        status, answer = await asked(gateway, "POST", path, body)
        assert (status, field_of(answer)) == (400, field), (path, body)
    for table in ("requests", "keys", "batches"):
        assert await gateway.database.fetchval(f"SELECT count(*) FROM {table}") == 0


async def test_a_tenant_is_not_given_what_cannot_be_kept(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    for body, field in (
        ({"reason": NUL}, "reason"),
        ({"limits": {NUL: 1}}, "limits"),
        ({"models": ["m", NUL]}, "models.1"),
    ):
        status, answer = await asked(gateway, "PUT", "/admin/tenants/acme", body)
        assert (status, answer["field"]) == (400, field)
    for bad in ("%00", "%FF"):
        assert (await asked(gateway, "PUT", f"/admin/tenants/{bad}", {}))[0] == 400
    status, made = await asked(gateway, "PUT", "/admin/tenants/acme", {"reason": "\\u0000"})
    assert (status, made["tenant"]) == (200, "acme"), "a backslash is none"


async def test_a_native_call_with_it_passes_and_is_on_record(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    body = {"model": f"m{NUL}", "messages": [{"role": "user", "content": NUL}]}
    status, answer = await asked(gateway, "POST", f"{CHAT}?x=%00", body)
    assert (status, answer["model"]) == (200, f"m{NUL}")

    async def recorded() -> list[Any]:
        rows: list[Any] = await gateway.database.fetch(
            "SELECT status, model, usage_state FROM audit"
        )
        return rows

    (row,) = await wait_until(recorded, 20, "its record")
    assert tuple(row) == ("succeeded", "ma\ufffdb", "told")
    usage = await gateway.database.fetch("SELECT model, requests FROM usage_days")
    assert [tuple(row) for row in usage] == [("ma\ufffdb", 1)]
