"""Verification of the job path: submitted, processed, recorded once, whatever dies.

A call is repeated only where its worker was killed before the result was recorded.

Invariant: all rows belong to a tenant and a pool of this run, and are removed at its end.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from tidegate.call import Classification, ClassifiedBy, Kind, Status, new_id
from tidegate.errors import LimiterUnavailable, StoreUnavailable
from tidegate.limiter import Limiter, forget_pool
from tidegate.policy.format import to_plain
from tidegate.settings import Config
from tidegate.store.blobs import Blobs
from tidegate.store.database import Connections
from tidegate.store.diagnostics import Trial
from tidegate.store.records import NewJob
from tidegate.store.store import Store
from tidegate.supervisor.services import Ground, environment_of
from tidegate.usual_models import GEMINI
from tidegate.verify.plan import KIND, VerifiedPool, clean_pool, finish, until
from tidegate.verify.processes import ProcessFamily


@dataclass(frozen=True, slots=True)
class Repeats:
    """Calls beyond the first of each job. of_killed: after an attempt of the killed worker that
    came to no result. others: after one of another worker, such as one that stood still for longer
    than its lease. unexplained: of `others`, those after no such attempt at all."""

    of_killed: int
    others: int
    unexplained: int


def repeats(calls: Sequence[int], cut_short: Sequence[Mapping[str, int]], killed: str) -> Repeats:
    """`calls`: how often each job called the provider; `cut_short`: how many attempts at it came to
    no result, by worker."""
    of_killed = others = unexplained = 0
    for made, by_worker in zip(calls, cut_short, strict=True):
        repeated = max(0, made - 1)
        explained = min(repeated, by_worker.get(killed, 0))
        of_killed += explained
        others += repeated - explained
        unexplained += max(0, repeated - sum(by_worker.values()))
    return Repeats(of_killed, others, unexplained)


AT_ONCE = 3
_SUBMIT_MS = 50.0
_SOONEST_S = 20.0
_JOIN_S = 5.0
_OPEN = (Status.QUEUED, Status.RUNNING)


class JobVerification:
    """One run. `ground` has this deployment's settings; the pool's name is the tenant's too."""

    def __init__(self, pool: VerifiedPool, ground: Ground) -> None:
        self._ground = ground
        self._pool = pool.name
        self._policy = pool.policy
        self._plan = pool.plan
        self._upstream = pool.upstream
        self._report = pool.report
        self._say = pool.say
        self._ids: list[UUID] = []
        self._names: set[str] = set()
        self._killed = ""

    async def run(self) -> None:
        """Raises StoreUnavailable where PostgreSQL does not answer."""
        url = self._ground.config.database_url
        assert url is not None
        connections = Connections(url.get_secret_value())
        connections.start()
        self._trial = Trial(connections)
        try:
            with tempfile.TemporaryDirectory(prefix="tidegate-verify-") as folder:
                await self._in(Path(folder))
        finally:
            try:
                await finish(self._clean())
            finally:
                await connections.aclose()

    async def _in(self, folder: Path) -> None:
        config = self._config(folder)
        store = self._store(config)
        await store.start()
        try:
            self._say("jobs")
            await self._submit(store)
            async with ProcessFamily("worker") as family:
                env = environment_of(Ground(config, None, False, False))
                for number in range(self._plan.workers):
                    name = f"{self._pool}-worker-{number + 1}"
                    self._names.add(name)
                    orders = {"pool": self._pool, "name": name, "policy": to_plain(self._policy)}
                    await family.start(name, orders, env)
                killed = await self._kill(store, family) if self._plan.kills_worker else None
                await self._all_end(store)
                for name in family.names:
                    await family.end(name)
            await self._judge(store, killed)
        finally:
            await store.aclose()

    def _config(self, folder: Path) -> Config:
        """This deployment's, pointed at the emulator, with nothing of its disk."""
        from pydantic import SecretStr

        no_policy = folder / "tidegate.toml"
        no_policy.touch()
        return self._ground.config.model_copy(
            update={
                "gemini_base_url": self._upstream.url,
                "gemini_api_key": SecretStr("of-the-emulator"),
                # No other upstream of the deployment is asked, whatever serves its TEXT_MODEL.
                "text_model": GEMINI[0],
                "data_dir": folder,
                "blob_url": None,
                "webhook_secret": None,
                "tidegate_policy": no_policy,
            }
        )

    def _store(self, config: Config) -> Store:
        assert config.database_url is not None
        name = f"{self._pool}-submits"
        self._names.add(name)
        return Store(
            config.database_url.get_secret_value(),
            instance_id=name,
            blobs=Blobs.from_url(config.blob_url, config.data_dir),
            spill_dir=config.data_dir / "spill",
            spill_max_bytes=config.spill_max_bytes,
            audit_full=config.audit_full,
            claim_lease_ms=config.claim_lease_ms,
        )

    async def _submit(self, store: Store) -> None:
        took_ms = []
        for number in range(self._plan.jobs):
            job = NewJob(
                request_id=new_id(),
                created_at=datetime.now(UTC),
                prompt=self._prompt(number),
                classification=Classification(Kind.TEXT_ONLY, ClassifiedBy.CALLER, "a check"),
                tenant_id=self._pool,
                pool=self._pool,
            )
            self._ids.append(job.request_id)
            began = time.perf_counter()
            await store.jobs.submit(job)
            took_ms.append((time.perf_counter() - began) * 1000)
        self._report.median("a submit returns when it is committed", took_ms, _SUBMIT_MS)

    async def _kill(self, store: Store, family: ProcessFamily) -> int | None:
        """kill -9 of a worker while it calls; the wall clock's ns then, None if none ever did."""
        name = family.names[0]
        calling = await until(lambda: self._is_calling(store, name), _SOONEST_S)
        if not calling:
            return None
        self._say(f"kill -9 of {name}")
        await family.kill(name)
        self._killed = name
        return time.time_ns()

    async def _is_calling(self, store: Store, name: str) -> bool:
        """Its first calls take long to begin: it is to be in the middle of its work."""
        held = await store.running_calls.calls(self._pool)
        seen = await self._upstream.stats()
        going = seen[KIND].finished >= 2 * AT_ONCE and seen.in_flight == AT_ONCE
        return going and any(instance == name for instance, _ in held)

    async def _all_end(self, store: Store) -> None:
        """Wait until all jobs have ended, or time is over: then the report shows it."""

        async def ended() -> bool:
            states = await self._states(store)
            return not any(state in _OPEN for state in states.values())

        lease_s = 2 * self._plan.claim_lease_ms / 1000 if self._plan.kills_worker else 0.0
        await until(ended, _SOONEST_S + lease_s)

    async def _states(self, store: Store) -> Mapping[UUID, Status]:
        return {one: (await store.requests.get(one, self._pool)).status for one in self._ids}

    async def _judge(self, store: Store, killed_ns: int | None) -> None:
        states = Counter((await self._states(store)).values())
        whole, done = len(self._ids), states[Status.SUCCEEDED]
        seen = await self._upstream.calls(contains=self._pool)
        calls = Counter(call.prompt for call in seen)
        survives = "jobs survive the kill of a worker"
        kills, why = self._plan.kills_worker, str(dict(states))
        if kills and killed_ns is None:
            done, why = 0, "no worker ever called"
        self._report.kept(
            survives if kills else "jobs are done",
            f"{whole} of {whole} succeeded",
            f"{done} of {whole}",
            done == whole,
            why,
        )
        if not kills:
            lease_s = self._plan.claim_lease_ms / 1000
            self._report.skipped(survives, f"a claim lease of {lease_s:g} s takes too long here")
        self._judge_repeats(calls, await self._trial.cut_short(self._ids))
        recorded = await self._recorded()
        self._report.kept(
            "each result is on record exactly once",
            f"{whole} records",
            f"{sum(recorded.values())} of {len(recorded)} jobs",
            len(recorded) == whole and set(recorded.values()) == {1},
            lasting=any(many > 1 for many in recorded.values()),
        )

    def _judge_repeats(
        self, calls: Mapping[str, int], cut_short: Mapping[UUID, Mapping[str, int]]
    ) -> None:
        """The emulator counts the calls; the record says whose attempts came to no result."""
        asked = [calls.get(self._prompt(number), 0) for number in range(len(self._ids))]
        seen = repeats(asked, [cut_short.get(one, {}) for one in self._ids], self._killed)
        self._report.kept(
            "a call is repeated only where a kill left no result",
            "0 others repeated",
            f"{seen.others} others, {seen.of_killed} of the killed worker's",
            seen.others == 0 and seen.unexplained == 0 and all(asked),
            f"{seen.unexplained} although a result was on record or no attempt was cut short; "
            f"{asked.count(0)} jobs never called",
            lasting=seen.unexplained > 0,
        )

    def _prompt(self, number: int) -> str:
        return f"{self._pool} job {number}."

    async def _recorded(self) -> Mapping[UUID, int]:
        """Audit rows by request; they are written behind the results."""
        found: Mapping[UUID, int] = {}

        async def all_there() -> bool:
            nonlocal found
            found = await self._trial.recorded(self._ids)
            return len(found) == len(self._ids)

        await until(all_there, 10.0)
        return found

    async def _clean(self) -> None:
        try:
            await self._trial.remove(self._pool, self._ids, sorted(self._names))
        except StoreUnavailable as away:
            self._report.left.append(f"rows of the tenant {self._pool}: {away.message}")
        await clean_pool(self._forget_keys, self._pool, self._report)

    async def _forget_keys(self) -> None:
        """Raises LimiterUnavailable."""
        redis = self._ground.config.redis_url
        assert redis is not None
        url = redis.get_secret_value()
        opened = Limiter.from_url(url, pool=self._pool, policy=self._policy, on_conflict="keep")
        async with opened as looking:
            # Otherwise its own joining, still under way, would come after the removal.
            try:
                async with asyncio.timeout(_JOIN_S):
                    await looking.joined()
            except TimeoutError as late:
                raise LimiterUnavailable("no answer in time", limit="") from late
            sids = [process.sid for process in (await looking.snapshot()).processes]
        await forget_pool(url, self._pool, self._policy, sids=sids, tenants=[self._pool])
