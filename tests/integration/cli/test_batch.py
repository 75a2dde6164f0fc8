"""`tidegate batch run`: every line is asked once, whatever ends the runs."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.cli.calling import forwarding, run, under_way
from tests.waiting import wait_until
from tidegate.cli import batch
from tidegate.embedded.servers import free_port
from tidegate.errors import GatewayUnreachable
from tidegate.prices.budgets import Budget


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def has_lines(path: Path, count: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count


async def all_are_handed_in(gateway: Gateway, results: Path) -> bool:
    handed_in = await gateway.database.fetchval("SELECT count(*) FROM requests")
    return bool(handed_in == len(rows_of(results)) + 8)


async def test_lines_of_every_shape_are_answered_and_failures_asked_again(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway()
    await gateway.upstream.set_fault("blocked_prompt", match="forbidden")
    body = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Say hi"}]}
    lines = [
        "Say the number one",
        json.dumps("Say the number two"),
        json.dumps({"id": "three", "prompt": "Say something forbidden", "type": "text_only"}),
        json.dumps(
            {"custom_id": "four", "method": "POST", "url": "/v1/chat/completions"} | {"body": body}
        ),
        json.dumps({"custom_id": "five", "method": "POST", "url": "/v1/nowhere", "body": body}),
    ]
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "prompts.results.jsonl"
    prompts.write_text("\n".join(lines) + "\n\n")
    first = await run(gateway, "batch", "run", str(prompts))
    assert (first.code, first.said) == (1, f"{results}\n")
    assert "3 of 5 succeeded, 2 failed" in first.complained
    by_id = {row["id"]: row for row in rows_of(results)}
    assert set(by_id) == {"1", "2", "three", "four", "five"}
    assert "Say the number one" in by_id["1"]["text"]
    assert by_id["2"]["usage"]["total_tokens"] > 0
    assert by_id["three"]["error"]["code"] == "prompt_blocked"
    assert by_id["four"]["answer"]["choices"]
    assert (by_id["five"]["status"], by_id["five"]["request_id"]) == ("refused", None)
    record = await gateway.status(by_id["1"]["request_id"])
    assert record["priority"] == -100

    calls = len(await gateway.calls())
    nothing = await run(gateway, "batch", "run", str(prompts), "--json")
    assert nothing.code == 1, "what failed before has still failed"
    assert (nothing.json["succeeded"], nothing.json["failed"], nothing.json["earlier"]) == (3, 2, 5)
    assert len(await gateway.calls()) == calls

    await gateway.upstream.clear_faults()
    again = await run(gateway, "batch", "run", str(prompts), "--retry-failed", "--json")
    assert (again.code, again.json["succeeded"], again.json["failed"]) == (1, 4, 1)
    assert len(await gateway.calls()) == calls + 1
    other = await run(gateway, "batch", "run", str(prompts), "--model", "m")
    assert other.code == 2
    assert "has results of other prompts" in other.complained


async def test_a_killed_run_goes_on_without_asking_anything_twice(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 2})
    limiter = gateway.services.limiter
    await gateway.upstream.set_behaviour(first_byte_ms=60)
    table, results = tmp_path / "prompts.csv", tmp_path / "out.jsonl"
    rows = [f'{number},"Say marker-{number:03}, please"' for number in range(40)]
    table.write_text("\n".join(["id,question", *rows]) + "\n")
    arguments = ("batch", "run", str(table), "--column", "question", "--output", str(results))
    for end, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        if end is signal.SIGINT:  # or all could be done before they are paused
            await gateway.upstream.set_behaviour(first_byte_ms=600)
        enough = (results.read_bytes().count(b"\n") if results.exists() else 0) + 6
        with under_way(gateway.url, tmp_path, *arguments, "--window", "8") as command:
            await wait_until(partial(has_lines, results, enough), 20, "some results")
            if end is signal.SIGINT:  # what is submitted by now has not ended at the signal
                await limiter.penalise("kind:text_only", for_ms=600_000, by="ann")
                await wait_until(partial(all_are_handed_in, gateway, results), 20, "the window")
            command.process.send_signal(end)
            assert await command.ended() == code
        if end is signal.SIGKILL:
            with results.open("ab") as file:  # as if it had been killed while it wrote
                file.write(b'{"id": "39", "line"')
    said = command.complained()
    assert "The same command goes on from here." in said
    handed_in = re.search(r"(\d+) are submitted and go on", said)
    assert handed_in is not None
    assert 0 < int(handed_in[1]) <= 8
    await gateway.upstream.set_behaviour(first_byte_ms=0)
    await limiter.resume("kind:text_only", by="ann")
    last = await run(gateway, *arguments, "--json")
    assert (last.code, last.json["succeeded"]) == (0, 40), last.complained
    found = rows_of(results)
    assert sorted(row["line"] for row in found) == list(range(1, 41))
    assert all(f"marker-{int(row['id']):03}" in row["text"] for row in found)
    assert len(await gateway.calls(contains="marker-")) == 40


async def test_a_run_is_alone_with_its_results_and_survives_the_loss_of_a_request(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway()
    (tmp_path / "two.jsonl").write_text("Say marker-1\nSay marker-2\n")
    await gateway.services.limiter.penalise("kind:text_only", for_ms=600_000, by="ann")
    with under_way(gateway.url, tmp_path, "batch", "run", "two.jsonl") as first:
        queued: list[str] = []

        async def both_queued() -> bool:
            items = (await gateway.get("/requests?status=queued"))[1]["items"]
            queued[:] = [one["request_id"] for one in items]
            return len(queued) == 2

        await wait_until(both_queued, 20, "both lines in the queue")
        second = await run(gateway, "batch", "run", str(tmp_path / "two.jsonl"))
        assert (second.code, "another run is writing it" in second.complained) == (2, True)
        third = await run(
            gateway, "batch", "run", str(tmp_path / "two.jsonl"), "--output", "/dev/full"
        )
        assert (third.code, "--output=/dev/full: must be a file" in third.complained) == (2, True)
        await gateway.database.execute("DELETE FROM requests WHERE id = $1::uuid", queued[0])
        await gateway.services.limiter.resume("kind:text_only", by="ann")
        assert await first.ended() == 1
    assert "1 of 2 succeeded" in first.complained()
    lost, found = sorted(
        rows_of(tmp_path / "two.results.jsonl"), key=lambda row: str(row["status"])
    )
    assert (lost["error"]["code"], lost["request_id"]) == ("not_found", queued[0])
    assert found["request_id"] == queued[1]


async def test_a_run_stops_at_a_paused_budget_and_goes_on_once_it_is_resumed(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway()
    budgets = gateway.services.store.budgets
    budget = Budget("all", "tokens", 10**6, "day", at_end="pause", doubt="estimate")
    await budgets.records.set(budget, by="test")
    await budgets.refresh()
    await gateway.database.execute("INSERT INTO budget_pauses (budget, scope) VALUES ('all', '')")
    prompts = tmp_path / "three.jsonl"
    prompts.write_text("Say marker-1\nSay marker-2\nSay marker-3\n")
    stopped = await run(gateway, "batch", "run", str(prompts), "--window", "1")
    assert "stopped with 0 of 3 done" in stopped.complained
    assert "a person must resume it" in stopped.complained
    assert rows_of(tmp_path / "three.results.jsonl") == [], "no line is written down as refused"
    await budgets.records.resume("all", scope=None, extra=0, by="test")
    await budgets.refresh()
    done = await run(gateway, "batch", "run", str(prompts), "--json")
    assert (done.code, done.json["succeeded"]) == (0, 3), done.complained


async def test_a_run_waits_for_a_gateway_that_is_away(open_gateway: Opener, tmp_path: Path) -> None:
    gateway = await open_gateway()
    port = free_port()
    (tmp_path / "one.jsonl").write_text("Say marker-1\n")
    with under_way(f"http://127.0.0.1:{port}", tmp_path, "batch", "run", "one.jsonl") as command:
        await wait_until(lambda: "Connection refused" in command.complained(), 20, "its complaint")
        async with forwarding(gateway, port):
            assert await command.ended() == 0
    assert len(rows_of(tmp_path / "one.results.jsonl")) == 1


async def test_a_gateway_that_was_never_there_is_given_up_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "NEVER_THERE_S", 0.0)
    monkeypatch.setattr(batch, "_PAUSE_S", 0.01)
    (tmp_path / "one.jsonl").write_text("Say hello\n")
    monkeypatch.setenv("TIDEGATE_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(GatewayUnreachable, match="Connection refused"):
        await asyncio.to_thread(batch.run, tmp_path / "one.jsonl", tmp_path / "out", window=2)
