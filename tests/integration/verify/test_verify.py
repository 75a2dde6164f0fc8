"""`tidegate verify` against real servers: kept promises, a broken one, and nothing left behind.

The options are those that docs/verify.md shows.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis

from tests.commands import ran
from tests.forked import started
from tests.waiting import wait_until
from tidegate.emulator.server import run_emulator
from tidegate.emulator.settings import Behaviour, EmulatorSettings
from tidegate.limiter import PoolPolicy
from tidegate.verify.plan import BATON, KIND, LIMIT, WEIGHTS, Plan, Report, Verdict, VerifiedPool
from tidegate.verify.promises import LimiterVerification
from tidegate.verify.run import markdown_of, sentence_of

ROOT = Path(__file__).parents[3]
TABLES = ("requests", "files", "attempts", "audit", "bodies", "usage_days", "queued", "workers")


def environment(valkey_url: str, database_url: str, folder: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONIOENCODING": "utf-8",
        "REDIS_URL": valkey_url,
        "DATABASE_URL": database_url,
        "GEMINI_API_KEY": "a-key-that-is-never-used",
        "DATA_DIR": str(folder / "data"),
    }


async def left(valkey_url: str, database_url: str) -> Mapping[str, object]:
    """What of any verification is still there; nothing, as a rule."""
    found: dict[str, object] = {}
    async with Redis.from_url(valkey_url) as valkey:
        if keys := await valkey.keys("*tidegate-verify*"):
            found["keys"] = keys
    connection = await asyncpg.connect(database_url)
    try:
        for table in TABLES:
            if count := await connection.fetchval(f"SELECT count(*) FROM {table}"):
                found[table] = count
    finally:
        await connection.close()
    return found | processes(database_url)


def processes(database_url: str) -> dict[str, object]:
    """Those that were started with the URL of the test's own database."""
    found: dict[str, object] = {}
    for one in Path("/proc").glob("[0-9]*/environ"):
        try:
            if database_url.encode() in one.read_bytes():
                found[one.parent.name] = (one.parent / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_every_promise_is_kept_and_nothing_is_left(
    valkey_url: str, database_url: str, tmp_path: Path
) -> None:
    """In a deployment without an account of Gemini, whose prompts would be another upstream's."""
    job = await queue_a_job_of_somebody(database_url)
    (tmp_path / "tidegate.toml").write_text('[upstreams.own]\nbase_url = "http://127.0.0.1:9/v1"\n')
    env = environment(valkey_url, database_url, tmp_path) | {"TEXT_MODEL": "gpt-5-mini"}
    del env["GEMINI_API_KEY"]
    done = await ran(
        *("verify", "--quick", "--json", "--markdown", "report.md"),
        cwd=tmp_path,
        env=env | {"OPENAI_API_KEY": "a-key-that-is-never-used"},
        within_s=100,
    )
    results = done.json["results"]
    told = {one["promise"]: one for one in results}
    broken = [one for one in results if one["verdict"] == "broken"]
    assert (done.code, broken, done.json["left"]) == (0, [], [])
    assert (
        "0 over, at most 6 of"
        in told["never more calls at the provider than the limit"]["measured"]
    )
    assert told["each result is on record exactly once"]["measured"] == "8 of 8 jobs"
    assert sum(one["verdict"] == "kept" for one in results) >= 14
    assert (
        "| never more calls at the provider than the limit |"
        in (tmp_path / "report.md").read_text()
    )
    # What is not of the verification is as it was.
    assert await left(valkey_url, database_url) == {"requests": 1}
    connection = await asyncpg.connect(database_url)
    try:
        row = await connection.fetchrow("SELECT status, claim, claimed_by FROM requests")
        assert await connection.fetchval("SELECT id FROM requests") == job
        assert row is not None
        assert tuple(row) == ("queued", 0, None)
    finally:
        await connection.close()


async def queue_a_job_of_somebody(database_url: str) -> object:
    """As a deployment has it whose workers are all away."""
    connection = await asyncpg.connect(database_url)
    try:
        return await connection.fetchval(
            "INSERT INTO requests (id, pool, source, status, kind, classified_by,"
            " classified_reason, prompt, created_at) VALUES (gen_random_uuid(), 'gemini', 'job',"
            " 'queued', 'text_only', 'rules', 'a test', 'Who are you?', now()) RETURNING id"
        )
    finally:
        await connection.close()


@pytest.mark.timeout(90)
async def test_ctrl_c_leaves_nothing(valkey_url: str, database_url: str, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as output:
        process = started(
            ["tidegate", "verify", "--quick"],
            cwd=tmp_path,
            env=environment(valkey_url, database_url, tmp_path),
            stdout=output,
            stderr=output,
        )
        said = tmp_path / "out"
        await wait_until(lambda: "is paused" in said.read_text(), 60, "the middle of it")
        assert await left(valkey_url, database_url) != {}
        process.send_signal(signal.SIGINT)
        code = await asyncio.to_thread(process.wait, 30)
    assert code == 130, said.read_text()
    assert await left(valkey_url, database_url) == {}, said.read_text()


@pytest.mark.timeout(90)
async def test_a_provider_that_allows_less_is_noticed(valkey_url: str) -> None:
    """The pool lets in 4 where the provider allows 3: as it would be, were a limit not kept."""
    plan = Plan(
        probes=2,
        tasks=4,
        limit=4,
        call_ms=60,
        load_s=0.5,
        fair=1.0,
        rounds=10,
        jobs=0,
        workers=0,
        kills_worker=False,
        lease_ms=500,
        claim_lease_ms=15_000,
    )
    policy = PoolPolicy({LIMIT: plan.limit, BATON: 1}, lease_ms=plan.lease_ms, weights=WEIGHTS)
    behaviour = Behaviour().changed({"first_byte_ms": plan.call_ms, "concurrency": {KIND: 3}})
    report = Report()
    async with run_emulator(EmulatorSettings("127.0.0.1", 0, behaviour)) as emulator:
        pool = "tidegate-verify-too-much"
        verified = VerifiedPool(pool, policy, plan, emulator.control, report, lambda what: None)
        await LimiterVerification(verified, valkey_url).run()
    over = [one for one in report.broken if one.promise.startswith("never more calls")]
    assert [one.verdict for one in over] == [Verdict.BROKEN], report.results
    assert not over[0].measured.startswith("0 over")
    assert not report.is_sound
    assert "BROKEN" in sentence_of(report)
    assert "BROKEN" in markdown_of(report)
    async with Redis.from_url(valkey_url) as valkey:
        assert await valkey.keys(f"*{pool}*") == []
