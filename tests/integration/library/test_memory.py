"""A pool in memory does what the same pool in Valkey does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.waiting import wait_until
from tests.zones import ZONE
from tidegate.errors import (
    DemandImpossible,
    LimiterUnavailable,
    PolicyConflict,
    ShuttingDown,
    TidegateError,
)
from tidegate.limiter import (
    Limit,
    Limiter,
    LimitView,
    Observer,
    PoolPolicy,
    Quota,
    Rate,
    State,
    SyncLimiter,
    Tokens,
)

LIMITS: dict[str, int | Limit] = {
    "openai": 1,
    "rpm:x": Rate.per_minute(2),
    "tpm:x": Rate.per_minute(1_000, unit="tokens"),
    "rpd:x": Quota(3, zone=ZONE),
}
POLICY = PoolPolicy(LIMITS, weights={"acme": 4})
MEMORY = "memory://"
Told = list[Any]
Scene = Callable[[Limiter, Limiter, Told], Awaitable[None]]


async def refusal(limiter: Limiter, *limits: str, **options: Any) -> tuple[str, str]:
    try:
        async with limiter.acquire(*limits, **options):
            return "", ""
    except TidegateError as error:
        return type(error).__name__, getattr(error, "limit", "")


def figures(view: LimitView) -> tuple[Any, ...]:
    used = view.used, view.waiting, view.reserved, view.taken
    return view.sort, view.bound, *used, view.shadowed, view.shadow


async def limits_of(limiter: Limiter) -> dict[str, tuple[Any, ...]]:
    snapshot = await limiter.snapshot()
    return {name: figures(view) for name, view in snapshot.limits.items()}


async def takes_turns(one: Limiter, other: Limiter, told: Told) -> None:
    order: list[str] = []

    async def work(limiter: Limiter, name: str, **options: Any) -> None:
        async with limiter.acquire("openai", timeout=20, **options):
            order.append(name)

    async with asyncio.TaskGroup() as tasks, one.acquire("openai"):
        tasks.create_task(work(other, "low", priority="low"))
        await wait_until(lambda: waits(one, 1))
        tasks.create_task(work(one, "high", priority="high"))
        await wait_until(lambda: waits(one, 2))
        told.append(await limits_of(one))
        queues = (await one.snapshot(permits=True)).queues
        told.append(sorted((q.band, q.held_up_by, q.waiting) for q in queues))
        async with other.try_acquire("openai") as permit:
            told.append(permit)
    told.append(order)


async def waits(limiter: Limiter, number: int) -> bool:
    return (await limiter.snapshot()).limits["openai"].waiting == number


async def spends_rates(one: Limiter, other: Limiter, told: Told) -> None:
    for limiter in (one, other):
        tokens = Tokens(input=300, output=100)
        async with limiter.acquire("rpm:x", "tpm:x", "rpd:x", tokens=tokens, timeout=5) as permit:
            permit.settle(tokens=Tokens(input=50, output=50))
    told.append(await refusal(one, "rpm:x", timeout=1))
    told.append(await refusal(other, "tpm:x", tokens=5_000, timeout=1))
    await wait_until(lambda: settled(one))
    told.append(await limits_of(one))


async def settled(limiter: Limiter) -> bool:
    return (await limiter.snapshot()).limits["tpm:x"].used == 200


async def pauses(one: Limiter, other: Limiter, told: Told) -> None:
    told.append(await one.penalise("openai", for_ms=60_000, reason="429", by="ann"))
    told.append(await one.penalise("openai", for_ms=5_000))
    told.append(await refusal(other, "openai", timeout=0.2))
    paused = (await one.snapshot()).limits["openai"]
    told.append((paused.paused_by, 50_000 < paused.paused_ms <= 60_000))
    told.append((await one.resume("openai"), await one.resume("openai")))
    told.append(await refusal(other, "openai", timeout=5))
    told.append((await one.charge("rpd:x", 3), await one.charge("nothing", 3)))
    told.append(await refusal(other, "rpd:x", timeout=1))


async def explains(one: Limiter, other: Limiter, told: Told) -> None:
    async with one.acquire("openai", tenant="acme"):
        waiting = other.acquire("openai", tenant="bravo", timeout=20)

        async def wait() -> None:
            async with waiting:
                pass

        task = asyncio.create_task(wait())
        await wait_until(lambda: waits(one, 1))
        assert waiting.ticket is not None
        why = await other.why(other.session, waiting.ticket)
        assert why is not None
        told.append((why.place.tenant, why.place.limits, why.place.held_up_by, why.place.ahead))
        told.append([(holder.tenant, holder.limits) for holder in why.holders])
        tenants = (await one.snapshot()).tenants
        told.append([(tenant.tenant, tenant.waiting) for tenant in tenants])
    await task


async def loses_a_session(one: Limiter, other: Limiter, told: Told) -> None:
    held = asyncio.Event()
    lost = ""

    async def work() -> None:
        nonlocal lost
        try:
            async with one.acquire("openai", timeout=5) as permit:
                held.set()
                await permit.lost.wait()
        except TidegateError as error:
            lost = type(error).__name__

    task = asyncio.create_task(work())
    await held.wait()
    told.append(await other.revoke(one.session))
    told.append(await refusal(other, "openai", timeout=5))
    await task
    told.append(lost)


async def changes_its_policy(one: Limiter, other: Limiter, told: Told) -> None:
    await one.set_policy(replace(POLICY, limits=LIMITS | {"openai": 9}, revision=2), by="ann")
    await one.in_force()
    await wait_until(lambda: other.policy.revision == 2)
    told.append((other.policy.bound("openai"), await limits_of(other)))
    history = await other.history()
    told.append([(change.revision, change.by) for change in history])


async def keeps_notes(one: Limiter, other: Limiter, told: Told) -> None:
    await one.tell(b"\xffhello", 60_000)
    told.append([note for note in (await other.told(10)).values() if note])
    told.append((await one.claim("day", 60_000), await other.claim("day", 60_000)))


SCENES: list[Scene] = [
    takes_turns,
    spends_rates,
    pauses,
    explains,
    loses_a_session,
    changes_its_policy,
    keeps_notes,
]


async def played(scene: Scene, url: str, pool: str) -> Told:
    told: Told = []
    async with AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(Limiter.from_url(url, pool=pool, policy=POLICY))
            for _ in range(2)
        ]
        await scene(one, other, told)
    return told


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
async def test_memory_does_what_valkey_does(scene: Scene, valkey_url: str, pool: str) -> None:
    real = await played(scene, valkey_url, pool)
    assert await played(scene, MEMORY, pool) == real
    assert real


async def test_a_pool_in_memory_is_forgotten_with_its_last_limiter(pool: str) -> None:
    async with AsyncExitStack() as stack:
        for bound in (1, 2):
            limiter = Limiter.from_url(MEMORY, pool=pool, policy={"openai": bound})
            await stack.enter_async_context(limiter)
        with pytest.raises(PolicyConflict):
            await Limiter.from_url(MEMORY, pool=pool, policy={"openai": 1}).start()
    async with Limiter.from_url(MEMORY, pool=pool, policy={"openai": 3}) as limiter:
        assert limiter.policy.revision == 1
        assert len(await limiter.history()) == 1


async def test_pools_of_other_names_share_nothing(pool: str) -> None:
    async with AsyncExitStack() as stack:
        for url, name in ((MEMORY, pool), (MEMORY, "other"), (f"{MEMORY}other", pool)):
            limiter = Limiter.from_url(url, pool=name, policy={"openai": 1})
            await stack.enter_async_context(limiter)
            await stack.enter_async_context(limiter.acquire("openai", timeout=5))


def test_threads_share_a_pool_in_memory(pool: str) -> None:
    with (
        SyncLimiter.from_url(MEMORY, pool=pool, policy={"openai": 1}) as one,
        SyncLimiter.from_url(MEMORY, pool=pool, policy={"openai": 1}) as other,
    ):
        with one.acquire("openai", timeout=5), other.try_acquire("openai") as permit:
            assert permit is None
        with other.acquire("openai", timeout=5) as permit:
            assert permit is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"outcome": "failed"},
        {"tokens": 12.0},
        {"tokens": Tokens(input=2.5)},  # type: ignore[arg-type]
        {"images": "1"},
        {"first_ms": float("nan")},
    ],
    ids=str,
)
async def test_what_cannot_be_counted_is_refused_where_it_is_settled(
    wrong: dict[str, Any], pool: str
) -> None:
    """Where the permit is returned it was too late: the permit stayed held for ever."""
    async with Limiter.from_url(MEMORY, pool=pool, policy=POLICY) as limiter:
        async with limiter.acquire("openai", "tpm:x", tokens=100, timeout=5) as permit:
            with pytest.raises((TypeError, ValueError)):
                permit.settle(**wrong)
        assert limiter.permits_held == 0
        await wait_until(lambda: is_free(limiter))


async def is_free(limiter: Limiter) -> bool:
    limits = (await limiter.snapshot()).limits
    return (limits["openai"].used, limits["tpm:x"].used) == (0, 100)


async def test_an_estimate_that_is_no_whole_number_holds_up_no_other_call(
    valkey_url: str, pool: str
) -> None:
    """A fraction was sent, and each answer of the server about it was a fault of the process."""
    fractions: list[Any] = [2.5, Tokens(input=2.5)]  # type: ignore[arg-type]
    for url in (MEMORY, valkey_url):
        async with Limiter.from_url(url, pool=pool, policy=POLICY) as limiter:
            for tokens in fractions:
                with pytest.raises(TypeError, match="whole number"):
                    async with limiter.acquire("tpm:x", tokens=tokens, timeout=5):
                        pass
            async with limiter.acquire("openai", timeout=5):
                assert limiter.state == "up"


async def test_a_limiter_is_opened_once_and_not_before_its_start(pool: str) -> None:
    """What asked before waited for ever, and a second start left a session and its tasks."""
    limiter = Limiter.from_url(MEMORY, pool=pool, policy=POLICY)
    with pytest.raises(ShuttingDown, match="not been started"):
        async with limiter.acquire("openai", timeout=5):
            pass
    before = asyncio.all_tasks()
    async with limiter:
        with pytest.raises(RuntimeError, match="once"):
            await limiter.start()
    with pytest.raises(RuntimeError, match="once"):
        await limiter.start()
    assert asyncio.all_tasks() == before


async def test_a_limiter_says_that_it_belongs_to_another_event_loop(pool: str) -> None:
    async def ask() -> None:
        async with limiter.acquire("openai"):
            pass

    async with Limiter.from_url(MEMORY, pool=pool, policy=POLICY) as limiter:
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, ask())
        await asyncio.wait_for(ask(), 20)


@pytest.mark.parametrize("none", [{"timeout": 0}, {"timeout": -1.0}, {"deadline_ms": 0}])
async def test_a_timeout_of_0_takes_a_permit_that_is_free_and_waits_for_none(
    valkey_url: str, pool: str, none: dict[str, Any]
) -> None:
    for url in (MEMORY, valkey_url):
        async with Limiter.from_url(url, pool=pool, policy=POLICY) as limiter:
            await wait_until(lambda: limiter.state == "up")  # a new Valkey is quiet for a lease
            async with asyncio.timeout(20), limiter.acquire("openai", **none):
                assert await refusal(limiter, "openai", **none) == ("DeadlineExceeded", "openai")
            assert (limiter.permits_held, limiter.waiters) == (0, 0)


async def test_a_pause_of_a_limit_that_no_policy_names_is_refused(
    valkey_url: str, pool: str
) -> None:
    for url in (MEMORY, valkey_url):
        async with Limiter.from_url(url, pool=pool, policy=POLICY) as limiter:
            with pytest.raises(DemandImpossible, match="known: openai") as refused:
                await limiter.penalise("opanai", for_ms=60_000)
            assert refused.value.limit == "opanai"
            assert limiter.pauses() == {}


async def test_what_is_asked_of_a_limiter_elsewhere_or_after_its_end_is_refused(
    valkey_url: str, pool: str
) -> None:
    """It opened another connection, which nothing closed."""
    for url in (MEMORY, valkey_url):
        limiter = Limiter.from_url(url, pool=pool, policy=POLICY)
        with pytest.raises(ShuttingDown, match="not been started"):
            await limiter.snapshot()
        async with limiter:
            for ask in (limiter.snapshot, limiter.history, partial(limiter.penalise, "openai")):
                with pytest.raises(RuntimeError, match="another event loop"):
                    await asyncio.to_thread(asyncio.run, ask())
            assert (await limiter.snapshot()).limits["openai"].paused_ms == 0
        for ask in (limiter.snapshot, limiter.history, partial(limiter.penalise, "openai")):
            with pytest.raises(LimiterUnavailable, match="is closed"):
                await ask()
        assert limiter._link.server is None


class BrokenObserver(Observer):
    def state_changed(self, old: State, new: State) -> None:
        raise ZeroDivisionError

    def admitted(self, limit: str, waited_ms: float) -> None:
        raise ZeroDivisionError

    def refused(self, limit: str, code: str) -> None:
        raise ZeroDivisionError

    def synced(self, took_ms: float, entries: int) -> None:
        raise ZeroDivisionError


async def test_an_observer_that_fails_loses_no_permit_and_no_refusal(
    pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A permit stayed held for ever, and a caller waited past its timeout."""
    observer, policy = BrokenObserver(), {"openai": 1}
    limiter = Limiter.from_url(MEMORY, pool=pool, policy=policy, observer=observer)
    late = ("DeadlineExceeded", "openai")
    async with asyncio.timeout(20), limiter:
        async with limiter.acquire("openai", timeout=20):
            assert await refusal(limiter, "openai", timeout=0.01) == late
        assert limiter.permits_held == 0
    assert "an observer failed" in caplog.text


FORKED = """
import asyncio, os, sys
from tidegate.limiter import Limiter

url, pool = sys.argv[1:]
limiter = Limiter.from_url(url, pool=pool, policy={"openai": 2})
up, down = os.pipe(), os.pipe()

async def serve(entered, others):
    async with limiter, limiter.acquire("openai", timeout=20) as permit:
        os.write(entered, b".")
        await asyncio.to_thread(os.read, others, 1)
        # The other one has joined by now: a session of the same name would have ended this one.
        os.write(1, b"%d %r\\n" % (len(await limiter.permits()), permit.is_lost))
        os.write(entered, b".")
        await asyncio.to_thread(os.read, others, 1)

child = os.fork()
asyncio.run(serve(up[1], down[0]) if child == 0 else serve(down[1], up[0]))
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_processes_forked_from_one_limiter_have_a_session_each(valkey_url: str, pool: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, valkey_url, pool],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("2 False\n2 False\n", 0), done.stderr
