"""What operators rehearse over HTTP: the same as the command, beside the event loop."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from datetime import UTC, datetime, time, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.commands import tidegate
from tests.gateway import Gateway, Opener
from tests.rehearsal import put_on_record
from tests.waiting import wait_until
from tidegate.call import Scope
from tidegate.http.admin import limits
from tidegate.rehearse import MOST_RECORDED_CALLS, RecordRehearsal

DAY = datetime.now(UTC).date() - timedelta(days=1)
NINE = datetime.combine(DAY, time(9), UTC)


async def asked(
    gateway: Gateway, body: dict[str, Any], query: str = "", key: str | None = None
) -> tuple[int, Any]:
    url = f"{gateway.url}/admin/limits/rehearse{query}"
    headers = {"Authorization": f"Bearer {key or gateway.operator_key}"}
    within = aiohttp.ClientTimeout(total=100)  # it gives way to all other processes
    async with gateway.http.post(url, json=body, headers=headers, timeout=within) as answer:
        return answer.status, await answer.json()


def simulating() -> list[int]:
    """The processes that rehearse for this one."""
    found = []
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except FileNotFoundError:
                continue  # it has just ended
            if b"tidegate.rehearse" in command:
                found.append(pid)
    return found


async def test_a_recorded_day_is_rehearsed_as_the_command_does(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    _, viewer = await gateway.services.store.tenants.create_key("default", scopes=[Scope.VIEWER])
    body = {"record": f"{DAY}", "set": {"kind:text_only": 20}}
    status, found = await asked(gateway, body, key=viewer.text)
    assert (status, found["calls"], found["cases"]) == (200, 0, [])
    await put_on_record(gateway.database, NINE, 400)
    await put_on_record(gateway.database, NINE + timedelta(hours=8), 40)
    hours = f"{DAY}T09-17"
    status, found = await asked(gateway, {"record": hours, "set": {"kind:text_only": 20}})
    assert (status, found["calls"]) == (200, 400)
    now, changed = found["cases"]
    assert (now["name"], changed["name"]) == ("as it is", "kind:text_only=20")
    assert now["queued"] > changed["queued"] > 0
    assert now["binding"] == ["kind:text_only"]
    assert [one["name"] for one in now["used"]] == ["kind:text_only"]
    assert {one["name"] for one in now["waiting"]} == {"acme", "globex", "initech"}
    assert max(now["used"][0]["values"]) == 1.0
    everybody, *tenants = found["tenants"]
    assert (everybody["tenant"], everybody["recorded_p99_ms"]) == ("", 3000)
    assert {one["tenant"]: one["calls"] for one in tenants} == {
        "acme": 250,
        "globex": 100,
        "initech": 50,
    }
    wanted = ("rehearse", "--from-record", hours, "--set", "kind:text_only=20")
    command = await tidegate(gateway, *wanted, "--json")
    assert command.code == 0, command.complained
    for case, told in zip(found["cases"], command.json, strict=True):
        assert (case["queued"], case["refused"]) == (told["queued"], told["refused"])
        waits = told["waits"]
        assert (case["p50_ms"], case["p99_ms"]) == (waits["p50_ms"], waits["p99_ms"])
    spoken = await tidegate(gateway, *wanted)
    assert found["sentence"] in " ".join(spoken.said.split())


async def test_batch_lines_on_record_give_way_where_a_change_says_so(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await put_on_record(gateway.database, NINE, 200)
    of_lines = "UPDATE audit SET source = 'batch', priority = -100 WHERE tenant_id = 'acme'"
    await gateway.database.execute(of_lines)
    body = {"record": f"{DAY}", "set": {"preempt": {"after_ms": 200}}}
    status, found = await asked(gateway, body)
    assert (status, found["calls"]) == (200, 200), found
    now, changed = found["cases"]
    assert changed["name"] == 'preempt={"after_ms":200}'
    assert (now["gave_way"], changed["gave_way"] > 0) == (0, True)
    assert "calls would have given way" in found["sentence"]
    waits_ms = {
        one["tenant"]: [case["p50_ms"] for case in one["cases"]] for one in found["tenants"]
    }
    before_ms, after_ms = waits_ms["globex"]
    assert after_ms < before_ms


UPSTREAM = """
[upstreams.x]
base_url = "http://127.0.0.1:1/v1"
[upstreams.x.limits]
"pool:total" = 5
[upstreams.x.prices."gemini-*"]
input = 1.0
output = 2.0
tiers = { batch = { share = 0.5 } }
"""


async def test_jobs_on_record_take_the_tiers_that_they_were_allowed(
    open_gateway: Opener, tmp_path: Path
) -> None:
    (policy := tmp_path / "policy.toml").write_text(UPSTREAM)
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    await put_on_record(gateway.database, NINE, 80)
    await gateway.database.execute("UPDATE audit SET upstream = 'x'")
    await gateway.database.execute("UPDATE audit SET source = 'job' WHERE tenant_id != 'acme'")
    # Of globex due in a day, of initech in a minute.
    await gateway.database.execute(
        "INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by,"
        " classified_reason, prompt, created_at, finished_at, tiers_allowed, deadline_at)"
        " SELECT request_id, tenant_id, pool, 'job', 'succeeded', kind, 'caller', '', 'x',"
        " created_at, finished_at, '{batch}', submitted_at + CASE tenant_id"
        " WHEN 'globex' THEN interval '1 day' ELSE interval '1 minute' END"
        " FROM audit WHERE tenant_id != 'acme'"
    )
    body = {"record": f"{DAY}", "set": {"pool:total": 20}}
    status, found = await asked(gateway, body, "?pool=x")
    assert (status, found["calls"]) == (200, 80), found
    for case in found["cases"]:
        jobs = {one["tier"]: (one["jobs"], one["late"]) for one in case["tiers"]}
        assert jobs == {"live": (10, 0), "batch": (20, 0)}
        # 800 and 200 tokens each.
        assert [one["cost_micros"] for one in case["tiers"]] == [10 * 1_200, 20 * 600]
    assert "jobs would have been 10 in live, 20 in batch, as it is now" in found["sentence"]


@pytest.mark.slow
async def test_what_cannot_be_rehearsed_is_named(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    [default] = [one.default for one in fields(RecordRehearsal) if one.name == "most"]
    assert default == MOST_RECORDED_CALLS
    most = 2_000
    monkeypatch.setattr(limits, "RecordRehearsal", partial(RecordRehearsal, most=most))
    for body, field in (
        ({"record": "Tuesday"}, "record"),
        ({"record": f"{DAY}T17-09"}, "record"),
        ({"record": f"{DAY}", "set": {"kind:text_only": -1}}, "limits.kind:text_only"),
        ({"record": f"{DAY}", "set": {"nothing": 1}}, "nothing"),
        ({"record": f"{DAY}", "set": {"budgets.acme.usd": "much"}}, "budgets.acme.usd"),
        ({"record": f"{DAY}", "set": {"preempt": {"times": 0}}}, "preempt.times"),
        ({}, "record"),
    ):
        status, problem = await asked(gateway, body)
        assert (status, problem["field"]) == (400, field), problem
    status, problem = await asked(gateway, {"record": "1h"}, "?pool=none")
    assert (status, problem["field"]) == (400, "pool")
    midnight = datetime.combine(DAY, time(), UTC)
    await put_on_record(gateway.database, midnight, most + 1)
    status, problem = await asked(gateway, {"record": f"{DAY}"})
    assert (status, problem["field"]) == (400, "record")
    assert "fewer hours" in problem["detail"]


async def test_one_runs_at_a_time_and_ends_with_its_client(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await put_on_record(gateway.database, NINE, 40_000)
    body = {"record": f"{DAY}", "set": {"kind:text_only": 6}}
    first = asyncio.create_task(asked(gateway, body))
    await wait_until(lambda: len(simulating()) == 1, 20, "the first to run")
    [running] = simulating()
    second = asyncio.create_task(asked(gateway, {"record": "2024-02-29"}))
    await wait_until(lambda: gateway.services.rehearsals.waiting == 1, 20, "the second to wait")
    assert simulating() == [running]
    async with gateway.http.get(f"{gateway.url}/health/live") as answer:
        assert answer.status == 200  # the event loop is free
    status, problem = await asked(gateway, {"record": "1h"})
    assert (status, problem["code"]) == (429, "quota_exceeded")
    first.cancel()
    await wait_until(lambda: running not in simulating(), 20, "the process to end")
    status, found = await second
    assert (status, found["calls"]) == (200, 0)
    third = asyncio.create_task(asked(gateway, body))
    await wait_until(lambda: len(simulating()) == 1, 20, "the third to run")
    gateway.services.draining.set()
    status, problem = await third
    assert (status, problem["code"]) == (503, "shutting_down")
    await wait_until(lambda: simulating() == [], 20, "its process to end")
    assert isinstance(await asyncio.gather(first, return_exceptions=True), list)
