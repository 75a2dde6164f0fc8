"""Day quotas outlive a Valkey that has lost everything: the record has the calls of the day."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from redis.asyncio import Redis

from tests.gateway import Gateway, gateway
from tests.waiting import wait_until, where_it_is
from tidegate.call import DEFAULT_POOL, DEFAULT_TENANT
from tidegate.errors import StoreUnavailable
from tidegate.limiter import Limiter, PoolPolicy, Quota
from tidegate.spine.upstreams import RecordedDays
from tidegate.store.database import Connections

MODEL = "gemini-2.5-flash"


async def _used(running: Gateway) -> dict[str, int]:
    limits = (await running.services.limiter.snapshot()).limits
    return {name: limit.used for name, limit in limits.items() if "pd:" in name}


async def test_a_days_quota_counts_what_is_on_record_after_a_loss_of_all(
    valkey_url: str, database_url: str, tmp_path: Path
) -> None:
    zone, elsewhere = where_it_is(12), where_it_is(18)
    path = tmp_path / "tidegate.toml"
    path.write_text(
        f"""
        [limits]
        "rpd:{MODEL}" = {{ bound = 3, zone = "{zone}" }}
        "tpd:gemini-*" = {{ bound = 1_000_000, zone = "{elsewhere}" }}
        "rpd:tenant/{DEFAULT_TENANT}" = {{ bound = 1_000, zone = "{zone}" }}
        "rpd:user/{DEFAULT_TENANT}/ann" = {{ bound = 10, zone = "{zone}" }}
        "rpd:other-model" = {{ bound = 10, zone = "{zone}" }}
        """
    )
    redis_url = f"{valkey_url.rpartition('/')[0]}/{uuid4().int % 15 + 1}"
    given: dict[str, Any] = {
        "redis_url": redis_url,
        "database_url": database_url,
        "tidegate_policy": path,
    }
    async with Redis.from_url(redis_url) as client:
        await client.flushdb()
        async with gateway(tmp_path / "data", worker=False, **given) as running:
            for number in range(2):
                user = {"subject": "ann"} if number else {}
                answered = await running.stream(text=f"Explain {number}", **user)
                assert answered.names[-1] == "done", answered.problem
            assert (await running.stream(text="Generate an image of a fox")).names[-1] == "done"
            count = f"{running.url}/v1beta/models/{MODEL}:countTokens"
            parts = {"contents": [{"parts": [{"text": "Explain"}]}]}
            async with running.http.post(count, json=parts) as answer:
                assert answer.status == 200, "it runs no model"
            await wait_until(lambda: running.services.limiter.permits_held == 0, 20)

            async def settled() -> bool:
                return 0 < (await _used(running))["tpd:gemini-*"] < 100_000

            await wait_until(settled, 20)
            before = await _used(running)
        assert before[f"rpd:{MODEL}"] == 2
        await client.flushdb()
        async with gateway(tmp_path / "data", worker=False, **given) as running:
            assert await _used(running) == before
            assert (await running.stream(text="Explain three")).names[-1] == "done"
            refused = await running.stream(text="Explain four", deadline_ms=1000)
            assert refused.problem["limit"] == f"rpd:{MODEL}"
        async with gateway(tmp_path / "data", worker=False, **given) as running:
            assert (await _used(running))[f"rpd:{MODEL}"] == 3, "counted once"
        await client.flushdb()
        connections, there = Connections(database_url), await asyncpg.connect(database_url)
        limits = {f"rpd:{MODEL}": Quota(10, zone=zone)}
        async with (
            aclosing(connections),
            Limiter.from_url(redis_url, pool=DEFAULT_POOL, policy=PoolPolicy(limits)) as limiter,
        ):
            days = RecordedDays(limiter, connections)
            await there.execute("ALTER TABLE audit RENAME TO audit_away")
            with pytest.raises(StoreUnavailable):
                await days.count()
            async with limiter.acquire(*limits):
                pass
            await there.execute("ALTER TABLE audit_away RENAME TO audit")
            await days.count()
            seen = (await limiter.snapshot()).limits
            assert seen[f"rpd:{MODEL}"].used == 3, "though a call was admitted meanwhile"
        await there.close()
