"""What an interaction with the dashboard's pages takes on a large record.

    python -m bench.pages [--requests 1000000] [--tenants 500] [--keys 4000] [--limits 10000]
        [--days 31] [--folder FOLDER]

A database is filled with requests of 31 days, or of `--days`: tenants and keys of unequal size,
eight models, four upstreams, prompts of 20 to 60 words, a tenth of them jobs, a fiftieth failed.
Then one API process answers what each page requests, one request at a time. The table has the
median of `--repeats`: of the processor time that the process, PostgreSQL and Valkey take for an
answer, which is how long it takes on a machine that nobody else uses, and of the time until it is
there, which is more on one that others use. With `--folder` the database stays there, and the next
run reads it: of another version of the code too, which migrates it first.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from random import Random

import asyncpg

from bench.machine import cpu_ns, describe
from bench.record import Words
from tests.fleet import Fleet
from tests.waiting import wait_until
from tidegate.embedded.servers import PostgresServer
from tidegate.store import database as partitions
from tidegate.store.database import migrate

DAYS = 31
PROMPTS = 20_000
AIM_MS = 100.0
_SEED = 11

# One day of requests: $1 of them from $2 on, for $6; each row's numbers come from its own.
_FILL_DAY = """
    INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status, kind,
        classified_by, classified_reason, priority, model, attempts, lapses, instance_id,
        submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens,
        thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, endpoint, http_status,
        streamed, key_id, subject, usage_state, cost_micros, images, first_byte_ms, usage_details,
        upstream, conversation, prompt_head)
    SELECT id, at, id, 't' || tenant, 'gemini', CASE WHEN n % 10 = 0 THEN 'job' ELSE 'relay' END,
        CASE WHEN failed THEN 'failed' ELSE 'succeeded' END, 'text_only', 'body', '', 0,
        'model-' || n % 8, 1, 0, 'api-' || n % 4, at, at + waited, at + waited + took,
        extract(epoch FROM waited) * 1000, extract(epoch FROM took) * 1000, input, output, 0,
        input / 3, input + output, 'stop',
        CASE WHEN failed THEN '{"code": "upstream_error", "message": "it failed"}'::jsonb END,
        '/v1/chat/completions', CASE WHEN failed THEN 502 ELSE 200 END, n % 2 = 0,
        'k' || lpad(tenant::text, 5, '0') || lpad(key::text, 2, '0'), 'user-' || (n * 7919) % 20000,
        CASE WHEN n % 200 = 0 THEN 'estimated' ELSE 'told' END, input + output * 4, 0,
        extract(epoch FROM took) * 300, CASE WHEN n % 3 = 0
            THEN jsonb_build_object('cache_write_tokens', input / 4) END,
        'upstream-' || n % 4, CASE WHEN n % 4 = 0 THEN 'talk-' || n / 20 END, prompts.head
    FROM (
        SELECT n, $2::timestamptz + (n - first) * ($6::interval / $1::bigint) AS at,
            floor($4::bigint * power(random(), 2))::int AS tenant, random() < 0.02 AS failed,
            random() * interval '2 seconds' AS waited, random() * interval '9 seconds' AS took,
            (50 + random() * 4000)::int AS input, (20 + random() * 900)::int AS output,
            floor(random() * $5::int)::int AS prompt,
            floor($7::int * power(random(), 2))::int AS key
        FROM (SELECT $3::bigint AS first) AS one,
            generate_series($3::bigint, $3::bigint + $1::bigint - 1) AS n
    ) AS made
    JOIN bench_prompts AS prompts ON prompts.place = made.prompt
    CROSS JOIN LATERAL (SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0')
        || '70008' || lpad(to_hex(made.n), 15, '0'))::uuid AS id) AS named
"""
_FILL_REST = (
    """INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by,
            classified_reason, prompt, model, created_at, admitted_at, finished_at, queue_ms,
            upstream_ms, result, total_tokens)
        SELECT request_id, tenant_id, pool, 'job', status, kind, 'rules', '', prompt_head, model,
            submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, prompt_head, total_tokens
        FROM audit WHERE source = 'job'""",
    # In no order, as the batches of a busy day leave them.
    """INSERT INTO usage_days (tenant_id, day, model, pool, requests, input_tokens, output_tokens,
            cached_tokens, thoughts_tokens, images, cost_micros, unpriced, partial, estimated,
            unknown, cache_write_tokens)
        SELECT tenant_id, (finished_at AT TIME ZONE 'UTC')::date, model, upstream, count(*),
            sum(input_tokens), sum(output_tokens), sum(cached_tokens), 0, 0, sum(cost_micros), 0, 0,
            count(*) FILTER (WHERE usage_state = 'estimated'), 0,
            coalesce(sum((usage_details ->> 'cache_write_tokens')::bigint), 0)
        FROM audit GROUP BY 1, 2, 3, 4 ORDER BY 2, md5(tenant_id || model)""",
    """INSERT INTO alerts (created_at, kind, data, state)
        SELECT now() - n * interval '10 minutes', 'test', '{"text": "A test"}', 'delivered'
        FROM generate_series(1, 1000) AS n""",
    "DROP TABLE bench_prompts",
    "ANALYZE",
)


async def fill(url: str, options: argparse.Namespace) -> None:
    """Fill a migrated database."""
    requests, tenants, days = options.requests, options.tenants, options.days
    of_each = options.keys // tenants
    words, rng = Words(), Random(_SEED)
    connection = await asyncpg.connect(url)
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    await connection.execute("SET synchronous_commit = off")
    await connection.execute("CREATE TABLE bench_prompts (place int PRIMARY KEY, head text)")
    heads = [(n, words.text(rng.randint(100, 300))) for n in range(PROMPTS)]
    await connection.copy_records_to_table("bench_prompts", records=heads)
    await connection.execute("ANALYZE bench_prompts")
    await connection.execute("SELECT setseed(0.5)")
    names = [(f"t{n}",) for n in range(tenants)]
    await connection.copy_records_to_table("tenants", records=names, columns=["id"])
    keys = [
        (f"k{n:05}{which:02}", f"t{n}", bytes(32), f"key {which}", ["call"])
        for n in range(tenants)
        for which in range(of_each)
    ]
    columns = ["prefix", "tenant_id", "digest", "name", "scopes"]
    await connection.copy_records_to_table("keys", records=keys, columns=columns)
    first = 0
    for day in reversed(range(days)):
        start = today - timedelta(days=day)
        async with connection.transaction():
            for table in partitions.TABLES:
                with suppress(asyncpg.DuplicateTableError):
                    async with connection.transaction():
                        await partitions._make(connection, table, start.date())
        count = requests // days + (1 if day < requests % days else 0)
        length = min(timedelta(days=1), datetime.now(UTC) - start)  # today up to now
        await connection.execute(_FILL_DAY, count, start, first, tenants, PROMPTS, length, of_each)
        first += count
    for statement in _FILL_REST:
        await connection.execute(statement)
    await connection.execute("VACUUM (ANALYZE) audit")
    await connection.close()


def pages(since: str, until: str, request: str) -> dict[str, str]:
    """The interactions by name, each with the path that the page requests."""
    common, rarer = (word for word in Words().text(3_000).split()[:2])
    month = f"since={since}&until={until}"
    quarter = f"since={date.fromisoformat(until) - timedelta(days=89)}&until={until}"
    day = f"since={until}T00:00:00Z"
    listed = "/admin/requests?limit=50"
    return {
        "Requests": listed,
        "Requests, next page": f"{listed}&cursor={request}",
        "Requests of a busy tenant": f"{listed}&tenant=t1",
        "Requests of a rare tenant": f"{listed}&tenant=t499",
        "Requests that failed": f"{listed}&status=failed",
        "Requests of a model": f"{listed}&model=model-3",
        "Requests of an upstream": f"{listed}&upstream=upstream-2",
        "Requests of a user": f"{listed}&subject=user-77",
        "Requests with an error code": f"{listed}&error_code=upstream_error",
        "Requests with no such code": f"{listed}&error_code=timeout",
        "Requests that are open": f"{listed}&status=queued&status=running",
        "Requests that are jobs": f"{listed}&source=job",
        "Requests of a conversation": f"{listed}&conversation=talk-40",
        "Requests of today": f"{listed}&{day}",
        "Search, common word": f"{listed}&text={common}",
        "Search, two words": f"{listed}&text={common}+{rarer}",
        "Search, rare word": f"{listed}&text=user-12345",
        "Search, no such word": f"{listed}&text=zzzzqqqq",
        "Search, beginning of an id": f"{listed}&text={request[:13]}",
        "One request": f"/admin/requests/{request}",
        "Conversation": "/admin/conversations?tenant=t1&conversation=talk-40",
        "Latency of a day": f"/admin/latency?since={date.fromisoformat(until) - timedelta(days=1)}"
        f"&until={date.fromisoformat(until) + timedelta(days=1)}",
        "Usage by day": f"/admin/usage?by=day&{month}",
        "Usage by tenant": f"/admin/usage?by=tenant&{month}",
        "Usage by tenant and day": f"/admin/usage?by=tenant,day&{month}",
        "Usage by model and day": f"/admin/usage?by=model,day&{month}",
        "Usage by key": f"/admin/usage?by=key&{month}",
        "Usage by key and day": f"/admin/usage?by=key,day&{month}",
        "Usage by upstream": f"/admin/usage?by=upstream&{month}",
        "Usage by upstream and day": f"/admin/usage?by=upstream,day&{month}",
        "Usage of 90 days by tenant": f"/admin/usage?by=tenant&{quarter}",
        "Usage of 90 days by tenant and day": f"/admin/usage?by=tenant,day&{quarter}",
        "Usage of a tenant by key": f"/admin/usage?by=key,day&tenant=t1&{month}",
        "Usage of an upstream by tenant": f"/admin/usage?by=tenant&upstream=upstream-1&{month}",
        "Usage of an upstream by model": f"/admin/usage?by=model&upstream=upstream-1&{month}",
        "Usage of an upstream by key": f"/admin/usage?by=key&upstream=upstream-1&{month}",
        "Overview, first picture": "/dashboard/feed",
        "Overview of an upstream": "/dashboard/feed?pool=gemini",
        "Overview, 24 hours": "/dashboard/feed?span=24h",
        "Limits": "/dashboard/limits",
        "Limits, searched": "/dashboard/limits?search=t499",
        "Limits by tenant": "/dashboard/limits?group=tenant",
        "Keys and tenants": "/admin/tenants",
        "Keys": "/admin/keys",
        "Budgets": "/admin/budgets",
        "Books": "/admin/budgets/books",
        "Upstreams": "/admin/upstreams",
        "Batches": "/admin/batches",
        "Alerts": "/admin/alerts",
        "Attention, dead jobs": "/admin/dead",
        "Attention, webhooks": "/admin/webhooks",
        "Actions": "/admin/actions",
        "Limits history": "/dashboard/revisions",
    }


async def took_ms(fleet: Fleet, path: str) -> tuple[float, int]:
    """How long an answer took, a feed's up to its first picture, and how large it is."""
    began = time.perf_counter()
    async with fleet.http.get(f"{fleet.url}{path}") as answer:
        if answer.status != 200:
            print(f"| {path} | answered {answer.status} | | |")
        if "/feed" not in path:
            size = len(await answer.read())
        else:
            size = 0
            async for line in answer.content:
                size += len(line)
                if line.startswith(b"data:"):
                    break
    return (time.perf_counter() - began) * 1000, size


async def set_limits(fleet: Fleet, limits: int, tenants: int) -> None:
    """Three limits of each tenant, and as many of models as are wanted in all."""
    each: dict[str, int] = {}
    for n in range(tenants):
        each |= {f"tenant:t{n}": 5, f"rpm:tenant/t{n}": 600, f"tpm:tenant/t{n}": 1_000_000}
    each |= {f"rpm:model-{n}": 600 for n in range(limits - len(each))}
    async with fleet.http.patch(f"{fleet.url}/admin/limits", json={"set": each}) as answer:
        if answer.status >= 400:
            raise RuntimeError(await answer.text())


async def measure(url: str, folder: Path, options: argparse.Namespace) -> None:
    connection = await asyncpg.connect(url)
    counted = await connection.fetchval("SELECT count(*) FROM audit")
    request = await connection.fetchval(
        "SELECT id FROM audit WHERE source = 'relay' ORDER BY id DESC OFFSET 500 LIMIT 1"
    )
    until = await connection.fetchval(
        "SELECT (max(created_at) AT TIME ZONE 'UTC')::date FROM audit"
    )
    await connection.close()
    since = until - timedelta(days=DAYS - 1)
    settings = {"DATABASE_URL": url, "LOG_LEVEL": "warning"}
    async with Fleet(folder, apis=1, workers=0, settings=settings) as fleet:
        await set_limits(fleet, options.limits, options.tenants)
        await wait_until(lambda: _is_summed_up(url), 600)
        (api,) = fleet.apis.values()
        pids = [api.process.pid, fleet.valkey.pid]
        postgres = int((options.folder / "cluster/postmaster.pid").read_text().split()[0])
        print(f"{counted:,} requests\n\n| page | processor ms | answered ms | kB |")
        print("|---|---|---|---|")
        slow = []
        for name, path in pages(f"{since}", f"{until}", f"{request}").items():
            if options.only and options.only not in name:
                continue
            used, answered = [], []
            await took_ms(fleet, path)  # what is read from the disk once
            for _ in range(options.repeats):
                before = used_ms(pids, postgres)
                wall_ms, size = await took_ms(fleet, path)
                answered.append(wall_ms)
                used.append(used_ms(pids, postgres) - before)
            median = statistics.median(used)
            if median >= AIM_MS:
                slow.append(name)
            wall_ms = statistics.median(answered)
            print(f"| {name} | {median:.0f} | {wall_ms:.0f} | {size / 1000:.0f} |")
        print(f"\n{AIM_MS:g} ms of processor or more: {', '.join(slow) or 'none'}")


def used_ms(pids: Iterable[int], server: int) -> float:
    """Processor time so far of these, and of all processes that a server has or had."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    ended = int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[13])
    total = ended * 1000 / os.sysconf("SC_CLK_TCK")
    for pid in (*pids, *map(int, children)):
        with suppress(OSError):  # ended meanwhile
            total += cpu_ns(pid) / 1e6
    return total


async def _is_summed_up(url: str) -> bool:
    """Whether no day or week is still to be summed up; true of a version that sums none up."""
    connection = await asyncpg.connect(url)
    due = ("days_to_sum", "part_to_sum", "weeks_to_sum")
    try:
        for name in [name for name in due if name in partitions.QUERIES]:
            if await connection.fetch(partitions.sql(name)):
                return False
        return True
    finally:
        await connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--tenants", type=int, default=500)
    parser.add_argument("--keys", type=int, default=4000, help="of all tenants together")
    parser.add_argument("--days", type=int, default=DAYS)
    parser.add_argument("--limits", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where the database is, or is to be kept")
    parser.add_argument("--only", default="", help="a part of the names of those to measure")
    options = parser.parse_args()
    command = ["python", "-m", "bench.pages", "--requests", str(options.requests)]
    command += ["--keys", str(options.keys), "--days", str(options.days)]
    print("\n".join(describe("PostgreSQL of the wheel", command)), end="\n\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch) / "postgres").resolve()
        done = folder / "filled"
        folder.mkdir(parents=True, exist_ok=True)
        server = PostgresServer(folder)
        options.folder = server.folder
        server.start()
        try:
            if not done.exists():
                asyncio.run(migrate(server.url()))
                asyncio.run(fill(server.url(), options))
                done.touch()
            asyncio.run(measure(server.url(), Path(scratch) / "fleet", options))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
