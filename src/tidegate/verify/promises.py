"""Promises under verification: of the limiter under load and faults, and of the job path.

Of the limiter: load, fairness, kill, pause, data loss, live change, latency. Of jobs: each is
submitted, processed and recorded once, whichever process dies; a call is repeated only if its
worker was killed before the result was recorded.

Invariants: the emulator counts excess calls, not this program; bars for latencies are multiples of
this network's round trip; all rows belong to a tenant and a pool of this run and are removed at its
end.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from tidegate.call import Classification, ClassifiedBy, Kind, Status, new_id
from tidegate.checker import NS, Interruption, first_of_new_epoch_s, in_flight, shares
from tidegate.errors import ConfigError, LimiterUnavailable, StoreUnavailable
from tidegate.limiter import SPARE_MS, Limiter, forget_pool
from tidegate.policy.format import to_plain
from tidegate.rehearse.report import waits_of
from tidegate.settings import Config
from tidegate.store.blobs import Blobs
from tidegate.store.database import Connections
from tidegate.store.diagnostics import Trial
from tidegate.store.records import NewJob
from tidegate.store.store import Store
from tidegate.supervisor.services import Ground, environment_of
from tidegate.usual_models import GEMINI
from tidegate.verify.plan import (
    BATON,
    KIND,
    LIMIT,
    WEIGHTS,
    Report,
    VerifiedPool,
    clean_pool,
    finish,
    milliseconds,
    seconds,
    until,
)
from tidegate.verify.processes import ProbeOrders, ProcessFamily

# Time that a busy machine adds to a round trip; and how long a process keeps a released permit for
# its own next call.
_OURS_MS, _KEPT_MS = 10.0, SPARE_MS
_NO_LONGER_SPARE_S = 1.2 * SPARE_MS / 1000


async def measure(here: Limiter, there: Limiter, rounds: int, report: Report) -> None:
    """Measure the latencies between two sessions of one pool, `here` and `there`.

    Round trips are timed in between, since they set the bars: other load slows down both.
    """
    trips, granted, handed_over = [], [], []
    for number in range(rounds):
        trips.append(await _timed(here.ping(2_000)))
        granted.append(await _admission(here, number))
        trips.append(await _timed(there.ping(2_000)))
        pair = (here, there) if number % 2 else (there, here)
        handed_over.append(await _handed_over(*pair))
    trip = waits_of(trips)
    assert trip.p50_ms is not None
    report.measured("a round trip to Valkey, p50 / p99", milliseconds(trip))
    report.median(
        "a free permit is had in about a round trip",
        granted,
        2 * trip.p50_ms + _OURS_MS,
    )
    report.median(
        "a freed permit reaches a waiter elsewhere by push",
        handed_over,
        3 * trip.p50_ms + _KEPT_MS + _OURS_MS,
    )


async def _admission(here: Limiter, number: int) -> float:
    """Return the latency in ms of a permit that Valkey must grant.

    The wait afterwards makes sure that no process keeps the released permit.
    """
    began = time.perf_counter()
    async with here.acquire(LIMIT, tenant=list(WEIGHTS)[number % len(WEIGHTS)]):
        took_ms = (time.perf_counter() - began) * 1000
    await asyncio.sleep(_NO_LONGER_SPARE_S)
    return took_ms


async def _timed(work: Awaitable[object]) -> float:
    """Return how long the work took, in ms."""
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1000


async def _handed_over(here: Limiter, there: Limiter) -> float:
    """Return the time in ms from a permit's release in `here` to its grant to a waiter in
    `there`.
    """
    waits = asyncio.Event()
    freed = 0.0

    async def wait() -> float:
        waits.set()
        async with there.acquire(BATON):
            return time.perf_counter()

    async with here.acquire(BATON):
        waiter = asyncio.create_task(wait())
        await waits.wait()
        await until(lambda: there.local_state().waiting[BATON] > 0, 1.0)
        # By then the ticket is in the queue, and its process knows it.
        await asyncio.sleep(_NO_LONGER_SPARE_S)
        freed = time.perf_counter()
    return (await waiter - freed) * 1000


MARK = "tidegate-verify"
_START_S = 30.0
# Permits count as used again if this share is in use for this long.
_AGAIN_NS, _AGAIN_SHARE = NS // 2, 0.8
_SLACK_S = 1.0
_USED = 0.9


class LimiterVerification:
    """One run of the limiter's promises.

    `url`: of Valkey. `restart_command`: restarts it without its data.
    """

    def __init__(self, pool: VerifiedPool, url: str, restart_command: str | None = None) -> None:
        self._url = url
        self._pool = pool.name
        self._policy = pool.policy
        self._plan = pool.plan
        self._upstream = pool.upstream
        self._report = pool.report
        self._say = pool.say
        self._restart_command = restart_command
        # Set once the latencies have been measured, which load would distort.
        self.measured = asyncio.Event()
        self._sids: set[str] = set()
        self._frozen: list[Interruption] = []

    async def run(self) -> None:
        """Run all steps. Raises LimiterUnavailable if Valkey does not answer."""
        self._limiter = self._member("verify")
        try:
            async with self._limiter:
                await self._limiter.ping(2_000)
                await self._limiter.joined()
                try:
                    self._say("latencies")
                    async with self._member("verify-2") as other:
                        await other.joined()
                        await measure(self._limiter, other, self._plan.rounds, self._report)
                    self.measured.set()
                    async with ProcessFamily("probe") as self._family:
                        await self._under_load()
                        await self._drain()
                finally:
                    with suppress(LimiterUnavailable):  # `_forget` then reports what is left
                        await finish(self._note())
        finally:
            self.measured.set()
            await finish(self._forget())
        await self._judge_over()

    async def _under_load(self) -> None:
        names = [f"probe-{number + 1}" for number in range(self._plan.probes)]
        self._say(f"load of {self._plan.calls_per_s:.0f} calls a second by {len(names)} processes")
        await asyncio.gather(*(self._launch(name) for name in names))
        if not await until(self._is_full, _START_S):
            self._report.kept("permits are used", "all of them", "never all", False, "see stderr")
            return
        await self._load()
        await self._pause(self._busiest())
        await self._kill(self._busiest())
        await self._lower()
        await self._lose()

    async def _load(self) -> None:
        plan, began_ns = self._plan, time.monotonic_ns()
        await asyncio.sleep(plan.load_s)
        ended_ns, events = time.monotonic_ns(), self._family.events()
        used = in_flight(events).mean(began_ns, ended_ns) / plan.limit
        self._report.kept(
            "permits are used while anybody waits", f">= {_USED:.0%}", f"{used:.1%}", used >= _USED
        )
        calls = sum(event.what == "begin" for event in events)
        self._report.measured("calls under load", f"{calls}, {calls / plan.load_s:.0f} a second")

        self._judge_shares()

    def _judge_shares(self) -> None:
        received = shares(self._family.events(), WEIGHTS)
        whole = sum(WEIGHTS.values())
        measured = ", ".join(
            f"{received.shares[one]:.1%} of {w / whole:.0%}" for one, w in WEIGHTS.items()
        )
        self._report.kept(
            "tenants share by their weights",
            f"within {self._plan.fair:.0%}",
            f"{measured}: {received.off:.1%} off",
            received.off <= self._plan.fair,
        )

    async def _kill(self, name: str) -> None:
        self._say(f"kill -9 of {name}")
        since_ns = time.monotonic_ns()
        await self._family.kill(name)
        bar_s = self._plan.lease_ms / 1000 + _SLACK_S
        took_s = await self._used_again(since_ns, bar_s + 3)
        self._report.within("what a killed process held is back within the lease", took_s, bar_s)
        await self._launch(f"{name}b")

    async def _pause(self, name: str) -> None:
        """Send SIGSTOP, wait for two leases, then send SIGCONT."""
        self._say(f"{name} is paused")
        since_ns, span_s = time.monotonic_ns(), 2 * self._plan.lease_ms / 1000
        self._family.signal(name, signal.SIGSTOP)
        await asyncio.sleep(span_s)
        self._family.signal(name, signal.SIGCONT)
        resumed_ns = time.monotonic_ns()
        self._frozen.append(Interruption(name, since_ns, resumed_ns + NS // 2))
        again = await until(lambda: self._began_since(name, resumed_ns), 10.0)
        self._report.kept(
            "a paused process releases what it held, and joins again",
            "new calls",
            f"{self._family.told('lost', name)} calls cancelled, "
            f"{'new ones' if again else 'none since'}",
            again,
        )
        if self._policy.on_expiry == "hold":
            reason = "ON_EXPIRY=hold keeps them until the calls must have ended"
            self._report.skipped("a paused process's permits are reused", reason)
            return
        bar_s = self._plan.lease_ms / 1000 + _SLACK_S
        took_s = await self._used_again(since_ns, bar_s + 3)
        self._report.within("a paused process's permits are reused within the lease", took_s, bar_s)

    async def _lower(self) -> None:
        low = max(1, self._plan.limit // 2)
        self._say(f"the limit lowered to {low}, live")
        since_ns = time.monotonic_ns()
        await self._change(low)
        bar_s = 1.0 + self._plan.call_ms / 1000
        await asyncio.sleep(2 * bar_s)
        curve = in_flight(self._family.events(), without=self._frozen)
        above = [at for at, level in zip(curve.times, curve.levels, strict=True)
                 if at >= since_ns and level > low]  # fmt: skip
        index = curve.times.index(above[-1]) + 1 if above else 0
        drained_ns = curve.times[index] if above and index < len(curve.times) else since_ns
        drained = curve.at(time.monotonic_ns()) <= low
        took_s = (drained_ns - since_ns) / NS if drained else None
        self._report.within("a limit that is lowered drains", took_s, bar_s)
        await self._change(self._plan.limit)
        if not await until(self._is_full, 5.0):
            self._report.kept("a raised limit is used", "<= 5 s", "not used", False)

    async def _lose(self) -> None:
        """Remove all keys of this pool, as an empty restart would; keep those of other pools."""
        self._say("Valkey loses the pool")
        await self._note()
        await self._judge_loss("after a loss of the pool's keys permits are granted again",
                               self._remove_keys)  # fmt: skip
        again = "the same after a restart of Valkey without its data"
        if self._restart_command is None:
            why = "give --restart-command; the pool's keys were removed instead"
            self._report.skipped(again, why)
            return
        self._say("Valkey restarts")
        await self._judge_loss(again, self._restart)

    async def _judge_loss(self, promise: str, lose: Callable[[], Awaitable[object]]) -> None:
        since_ns = time.monotonic_ns()
        await lose()
        lost_ns = time.monotonic_ns()
        bar_s = self._plan.lease_ms / 1000 + _SLACK_S
        granted_s: float | None = None

        def granted() -> bool:
            nonlocal granted_s
            granted_s = first_of_new_epoch_s(self._family.events(), since_ns)
            return granted_s is not None

        await until(granted, bar_s + 5)
        took_s = None if granted_s is None else granted_s - (lost_ns - since_ns) / NS
        self._report.within(promise, took_s, bar_s)
        if not await until(self._is_full, 5.0):
            self._report.kept("and all of them are used again", "<= 5 s", "not all", False)

    async def _restart(self) -> None:
        """Run the operator's restart command and wait until Valkey answers."""
        assert self._restart_command is not None
        process = await asyncio.create_subprocess_shell(self._restart_command)
        status = await process.wait()
        if status:
            raise ConfigError("--restart-command", f"(exit {status})", "must end with 0")

        async def answers() -> bool:
            try:
                await self._limiter.ping(500)
            except LimiterUnavailable:
                return False
            return True

        await until(answers, 30.0)

    async def _drain(self) -> None:
        self._say("drain")
        await self._note()
        began = time.monotonic()
        names = self._family.names
        ended = await asyncio.gather(*(self._family.end(name) for name in names))
        empty = await until(self._is_empty, self._plan.lease_ms / 1000)
        took_s = time.monotonic() - began
        self._report.kept(
            "processes that get SIGTERM end in order, and hold nothing",
            "exit 0, an empty pool",
            f"{sum(status == 0 for status in ended)} of {len(names)}, "
            f"{'empty' if empty else 'not empty'} after {seconds(took_s)}",
            empty and all(status == 0 for status in ended),
            ", ".join(f"{name} {status}" for name, status in zip(names, ended, strict=True)),
        )

    async def _judge_over(self) -> None:
        stats = (await self._upstream.stats())[KIND]
        self._report.kept(
            "never more calls at the provider than the limit",
            f"0 over, at most {self._plan.limit}",
            f"{stats.over} over, at most {stats.max_in_flight} of {stats.arrived:,}",
            stats.over == 0 and stats.max_in_flight <= self._plan.limit,
            "more calls were open than the emulated provider allows",
            lasting=True,
        )

    def _member(self, name: str) -> Limiter:
        return Limiter.from_url(
            self._url,
            pool=self._pool,
            policy=self._policy,
            instance_id=f"{name}-{self._pool}",
            on_conflict="keep",
        )

    async def _launch(self, name: str) -> None:
        orders = ProbeOrders(
            url=self._url,
            pool=self._pool,
            upstream=self._upstream.url,
            name=name,
            policy=to_plain(self._policy),
            tenants=list(WEIGHTS),
            tasks=self._plan.tasks,
            limit=LIMIT,
            mark=MARK,
        )
        await self._family.start(name, asdict(orders), {})
        # A signal that arrives before its handler is installed would not end the probe in order.
        if not await until(lambda: self._family.has_begun(name), _START_S):
            self._report.left.append(f"{name} has not come up in {_START_S:.0f} s")

    def _is_full(self) -> bool:
        curve = in_flight(self._family.events(), without=self._frozen)
        return curve.at(time.monotonic_ns()) >= self._plan.limit

    async def _is_empty(self) -> bool:
        snapshot = await self._limiter.snapshot()
        view = snapshot.limits[LIMIT]
        return snapshot.sessions == 1 and not (view.used or view.waiting)

    def _busiest(self) -> str:
        """Return the process with the most recent begins of calls."""
        begun = Counter(e.worker for e in self._family.events()[-200:] if e.what == "begin")
        return max(self._family.names, key=lambda name: begun[name])

    def _began_since(self, name: str, since_ns: int) -> bool:
        return any(
            event.worker == name and event.what == "begin" and event.at_ns > since_ns
            for event in self._family.events()
        )

    async def _used_again(self, since_ns: int, within_s: float) -> float | None:
        """Return the seconds from `since_ns` until all permits were in use again and stayed so."""
        found: int | None = None

        def again() -> bool:
            nonlocal found
            curve = in_flight(self._family.events(), without=self._frozen)
            found = curve.recovered_ns(
                self._plan.limit,
                since_ns,
                time.monotonic_ns(),
                window_ns=_AGAIN_NS,
                share=_AGAIN_SHARE,
            )
            return found is not None

        await until(again, within_s)
        return None if found is None else found / NS

    async def _change(self, limit: int) -> None:
        now = self._limiter.policy
        policy = replace(now, limits={**now.limits, LIMIT: limit}, revision=now.revision + 1)
        await self._limiter.set_policy(policy, by=self._pool)

    async def _note(self) -> None:
        """Remember the sessions whose keys exist."""
        snapshot = await self._limiter.snapshot()
        self._sids |= {process.sid for process in snapshot.processes}

    async def _remove_keys(self) -> int:
        tenants = [*WEIGHTS, "default"]
        return await forget_pool(
            self._url, self._pool, self._policy, sids=self._sids, tenants=tenants
        )

    async def _forget(self) -> None:
        """Remove all keys of the pool."""
        await clean_pool(self._remove_keys, self._pool, self._report)


@dataclass(frozen=True, slots=True)
class Repeats:
    """Calls beyond the first of each job.

    of_killed: after an attempt of the killed worker that had no result. others: after an attempt of
    another worker, such as one that was suspended for longer than its lease. unexplained: those of
    `others` without any such attempt before.
    """

    of_killed: int
    others: int
    unexplained: int


def repeats(calls: Sequence[int], cut_short: Sequence[Mapping[str, int]], killed: str) -> Repeats:
    """Return the repeated calls.

    `calls`: how often each job called the provider. `cut_short`: attempts without a result, by
    worker.
    """
    of_killed = others = unexplained = 0
    for made, by_worker in zip(calls, cut_short, strict=True):
        repeated = max(0, made - 1)
        explained = min(repeated, by_worker.get(killed, 0))
        of_killed += explained
        others += repeated - explained
        unexplained += max(0, repeated - sum(by_worker.values()))
    return Repeats(of_killed, others, unexplained)


def in_a_call(
    workers: Sequence[str], held: Iterable[tuple[str, int]], finished: int, in_flight: int
) -> list[str]:
    """Return the workers that hold a permit while calls are in flight at the emulator.

    Empty until some calls have finished, since the first calls start slowly and a worker is to be
    killed in the middle of its work. On a busy machine some permits are usually unused, and one
    worker may have all jobs.
    """
    if finished < 2 * AT_ONCE or not in_flight:
        return []
    having = {instance for instance, _ in held}
    return [one for one in workers if one in having]


AT_ONCE = 3
_SUBMIT_MS = 50.0
_SOONEST_S = 20.0
_JOIN_S = 5.0
_OPEN = (Status.QUEUED, Status.RUNNING)


class JobVerification:
    """One run of the job path's promises.

    `ground` has this deployment's settings; the pool's name is also the tenant's.
    """

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
        """Run all steps. Raises StoreUnavailable if PostgreSQL does not answer."""
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
        """Return this deployment's settings, pointed at the emulator and at a temporary folder."""
        from pydantic import SecretStr

        no_policy = folder / "tidegate.toml"
        no_policy.touch()
        return self._ground.config.model_copy(
            update={
                "gemini_base_url": self._upstream.url,
                "gemini_api_key": SecretStr("of-the-emulator"),
                # No other upstream of the deployment is called, even if it serves TEXT_MODEL.
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
        """Kill a worker during a call; return the wall clock in ns, or None if no worker called."""
        calling: list[str] = []

        async def one_calls() -> bool:
            calling[:] = await self._calling(store, family.names)
            return bool(calling)

        if not await until(one_calls, _SOONEST_S):
            return None
        name = calling[0]
        self._say(f"kill -9 of {name}")
        await family.kill(name)
        self._killed = name
        return time.time_ns()

    async def _calling(self, store: Store, workers: Sequence[str]) -> list[str]:
        held = await store.running_calls.calls(self._pool)
        stats = await self._upstream.stats()
        return in_a_call(workers, held, stats[KIND].finished, stats.in_flight)

    async def _all_end(self, store: Store) -> None:
        """Wait until all jobs have ended or time is up; the report shows which."""

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
        answered = await self._upstream.calls(contains=self._pool)
        calls = Counter(call.prompt for call in answered)
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
        """Judge repeated calls: the emulator counts calls, the record names attempts without
        result.
        """
        counts = [calls.get(self._prompt(number), 0) for number in range(len(self._ids))]
        found = repeats(counts, [cut_short.get(one, {}) for one in self._ids], self._killed)
        self._report.kept(
            "a call is repeated only where a kill left no result",
            "0 others repeated",
            f"{found.others} others, {found.of_killed} of the killed worker's",
            found.others == 0 and found.unexplained == 0 and all(counts),
            f"{found.unexplained} although a result was on record or no attempt was cut short; "
            f"{counts.count(0)} jobs never called",
            lasting=found.unexplained > 0,
        )

    def _prompt(self, number: int) -> str:
        return f"{self._pool} job {number}."

    async def _recorded(self) -> Mapping[UUID, int]:
        """Return the number of audit rows by request; they are written after the results."""
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
        except StoreUnavailable as unavailable:
            self._report.left.append(f"rows of the tenant {self._pool}: {unavailable.message}")
        await clean_pool(self._forget_keys, self._pool, self._report)

    async def _forget_keys(self) -> None:
        """Remove the pool's keys. Raises LimiterUnavailable."""
        redis = self._ground.config.redis_url
        assert redis is not None
        url = redis.get_secret_value()
        opened = Limiter.from_url(url, pool=self._pool, policy=self._policy, on_conflict="keep")
        async with opened as looking:
            # A join still in progress would otherwise create keys after the removal.
            try:
                async with asyncio.timeout(_JOIN_S):
                    await looking.joined()
            except TimeoutError as late:
                raise LimiterUnavailable("no answer in time", limit="") from late
            sids = [process.sid for process in (await looking.snapshot()).processes]
        await forget_pool(url, self._pool, self._policy, sids=sids, tenants=[self._pool])
