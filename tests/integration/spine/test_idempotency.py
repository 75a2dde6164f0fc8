"""The header `Idempotency-Key` on `POST /submit`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson

from tests.gateway import PNG, Gateway, Opener, gateway, payload_of

ASKED = {"data": "Explain the tide", "priority": 3, "deadline_ms": 60_000}


async def _submit(
    target: Gateway, key: str | None, body: dict[str, Any] | None = None, **payload: Any
) -> tuple[int, dict[str, str], dict[str, Any]]:
    headers = {} if key is None else {"Idempotency-Key": key}
    given = payload or payload_of(ASKED if body is None else body)
    async with target.http.post(f"{target.url}/submit", headers=headers, **given) as response:
        seen = {name.lower(): value for name, value in response.headers.items()}
        return response.status, seen, orjson.loads(await response.read())


def _blobs(folder: Path) -> list[Path]:
    return [path for path in (folder / "blobs").rglob("*") if path.is_file()]


async def test_the_same_request_again_is_the_same_job(open_gateway: Opener) -> None:
    target = await open_gateway()
    status, headers, first = await _submit(target, "order-17")
    assert (status, "idempotency-replayed" in headers) == (202, False)
    await target.end_of(first["request_id"])
    status, headers, again = await _submit(target, "order-17")
    assert (status, headers["idempotency-replayed"]) == (202, "true")
    assert again["request_id"] == headers["x-tidegate-request-id"] == first["request_id"]
    assert (again["status"], again["status_url"]) == ("succeeded", first["status_url"])
    # In whatever encoding: it asks for the same.
    form = {name: str(value) for name, value in ASKED.items()}
    assert (await _submit(target, "order-17", data=form))[2]["request_id"] == first["request_id"]
    assert len(await target.calls()) == 1
    assert (await _submit(target, None))[2]["request_id"] != first["request_id"]


async def test_another_request_under_the_key_is_refused(open_gateway: Opener) -> None:
    target = await open_gateway(worker=False)
    await _submit(target, "order-17")
    for change in (
        {"data": "Explain the moon"},
        {"priority": 4},
        {"deadline_ms": 60_001},
        {"model": "gemini-2.5-pro"},
        {"type": "text_only"},
        {"subject": "ann"},
        {"conversation": "c-1"},
    ):
        status, headers, problem = await _submit(target, "order-17", ASKED | change)
        assert (status, problem["code"]) == (409, "idempotency_conflict"), change
        assert (problem["field"], "new key" in problem["allowed"]) == ("Idempotency-Key", True)
        assert headers["content-type"] == "application/problem+json"


async def test_files_are_compared_by_content_and_those_of_a_duplicate_do_not_stay(
    open_gateway: Opener,
) -> None:
    target = await open_gateway(worker=False)
    folder = target.config.data_dir
    large = PNG + bytes(600_000)  # spooled to the disk, not kept in memory
    for key, content in (("small", PNG), ("large", large)):
        body = {"data": "Describe this picture", "file": content}
        first = (await _submit(target, key, body))[2]
        kept = _blobs(folder)
        assert (await _submit(target, key, body))[2]["request_id"] == first["request_id"]
        changed = body | {"file": content + b"\0"}
        assert (await _submit(target, key, changed))[0] == 409
        assert _blobs(folder) == kept
    assert len(kept) == 2


async def test_a_bad_key_is_refused_by_name(open_gateway: Opener) -> None:
    target = await open_gateway(worker=False)
    for key in ("", "x" * 256, "caf\u00e9", "a\tb"):
        status, _, problem = await _submit(target, key)
        assert (status, problem["field"]) == (400, "Idempotency-Key"), key
        assert "printable" in problem["allowed"]


async def test_more_than_one_key_is_refused(open_gateway: Opener) -> None:
    target = await open_gateway(worker=False)
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    url = f"{target.url}/submit"
    async with target.http.post(url, headers=headers, json=ASKED) as response:
        assert response.status == 400


async def test_a_hundred_at_once_over_two_apis_are_one_request(
    open_gateway: Opener, tmp_path: Path
) -> None:
    first = await open_gateway()
    assert first.config.redis_url is not None
    assert first.config.database_url is not None
    async with gateway(
        tmp_path / "second",
        redis_url=first.config.redis_url.get_secret_value(),
        database_url=first.config.database_url.get_secret_value(),
        worker=False,
    ) as second:
        answers = await asyncio.gather(
            *(_submit((first, second)[number % 2], "race") for number in range(100))
        )
    assert {status for status, _, _ in answers} == {202}
    assert len({body["request_id"] for _, _, body in answers}) == 1
    assert sum("idempotency-replayed" not in headers for _, headers, _ in answers) == 1
    assert await first.database.fetchval("SELECT count(*) FROM requests") == 1
