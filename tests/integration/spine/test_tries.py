"""Each call of a wrapped job to an upstream is an attempt on record, and all are bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tidegate.emulator.server import run_emulator
from tidegate.errors import StoreUnavailable
from tidegate.store.queue import JobQueue

CHAT = "/v1/chat/completions"
BODY = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Say hello"}]}
CHAIN = """
[upstreams.second]
dialects = {{ openai = "{url}/v1" }}
key = "SECOND_KEY"

[[routes]]
model = "*"
try = ["gemini", "second"]
"""


async def ended(gateway: Gateway) -> tuple[dict[str, Any], list[tuple[int, str, str | None]]]:
    """The record of a job, and its attempts with their outcomes and upstream's status."""
    request_id = await gateway.submit(endpoint=CHAT, body=BODY)
    record = await gateway.end_of(request_id)
    rows = await gateway.database.fetch(
        "SELECT number, outcome, failure ->> 'upstream_status' AS status FROM attempts "
        "WHERE request_id = $1::uuid ORDER BY number",
        request_id,
    )
    return record, [(row["number"], row["outcome"], row["status"]) for row in rows]


async def test_the_same_upstream_is_called_once_in_an_attempt(open_gateway: Opener) -> None:
    gateway = await open_gateway(max_attempts=3)
    await gateway.upstream.set_fault("internal")
    record, attempts = await ended(gateway)
    assert (record["status"], record["attempts"]) == ("failed", 3)
    assert attempts == [(number, "failed", "500") for number in (1, 2, 3)]
    assert len(await gateway.calls()) == 3


async def test_another_upstream_that_stands_in_is_another_attempt(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    async with run_emulator() as second:
        policy = tmp_path / "policy.toml"
        policy.write_text(CHAIN.format(url=second.url))
        gateway = await open_gateway(tidegate_policy=policy, max_attempts=3)
        await gateway.upstream.set_fault("internal")
        record, attempts = await ended(gateway)
        assert (record["status"], record["attempts"]) == ("succeeded", 2)
        assert attempts == [(1, "failed", "500"), (2, "succeeded", None)]
        await gateway.upstream.clear_faults()
        await gateway.upstream.set_fault("unavailable")
        record, attempts = await ended(gateway)
        assert (record["status"], record["attempts"]) == ("succeeded", 1), "503 uses up none"
        assert attempts == [(1, "failed", "503"), (2, "succeeded", None)]
        await second.control.set_fault("internal")
        await gateway.upstream.clear_faults()
        await gateway.upstream.set_fault("internal")
        before = len(await gateway.calls()) + len(await second.control.calls())
        record, attempts = await ended(gateway)
        assert (record["status"], record["attempts"], len(attempts)) == ("failed", 3, 3)
        calls = len(await gateway.calls()) + len(await second.control.calls())
        assert calls - before == 3, "never more than MAX_ATTEMPTS, whatever the chain"


@pytest.mark.parametrize("is_written", [False, True])
async def test_a_try_that_failed_is_on_record_though_postgresql_stalls_before_the_next(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    """`is_written`: PostgreSQL has begun the next attempt, and its reply is lost."""
    begin, stalls = JobQueue._begin_another, [True]

    async def stalling(queue: JobQueue, *args: Any) -> bool:
        is_first = bool(stalls) and stalls.pop()
        is_new = (is_written or not is_first) and await begin(queue, *args)
        if is_first:
            raise StoreUnavailable("it stalls")
        return is_new

    monkeypatch.setattr(JobQueue, "_begin_another", stalling)
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    async with run_emulator() as second:
        policy = tmp_path / "policy.toml"
        policy.write_text(CHAIN.format(url=second.url))
        gateway = await open_gateway(tidegate_policy=policy, max_attempts=3)
        await gateway.upstream.set_fault("internal", count=1)
        record, attempts = await ended(gateway)
        assert not stalls
        assert attempts == [(1, "failed", "500"), (2, "succeeded", None)]
        assert (record["status"], record["attempts"]) == ("succeeded", 2)
