"""The limiter for threads: permits, waits, losses, interrupts and forks."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from tests.integration.library.makers import LIMIT, MakeSync, held, policy, waiting
from tests.waiting import wait_until
from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import (
    ConfigError,
    DeadlineExceeded,
    DemandImpossible,
    LeaseLost,
    ShuttingDown,
    TidegateError,
)
from tidegate.integrations.exchange import SyncExchange
from tidegate.limiter import (
    Demand,
    DetachedPermit,
    Limiter,
    Permit,
    Rate,
    SyncLimiter,
    SyncPermit,
)

PATIENT_MS = 20_000


class Holder:
    """A thread that holds a permit until it is told to let go."""

    def __init__(self, limiter: SyncLimiter) -> None:
        self._limiter = limiter
        self.in_hand = threading.Event()
        self.let_go = threading.Event()
        self.lost_seen = False
        self.failure: TidegateError | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._limiter.acquire(LIMIT, deadline_ms=PATIENT_MS) as permit:
                self.in_hand.set()
                self.let_go.wait(20)
                self.lost_seen = permit.lost.is_set()
        except TidegateError as error:
            self.failure = error

    def until_in_hand(self) -> Holder:
        assert self.in_hand.wait(10)
        return self

    def end(self) -> None:
        self.let_go.set()
        self.join()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


async def test_never_more_than_the_limit_are_in_over_threads_of_two_limiters(
    make_sync: MakeSync,
) -> None:
    limiters = [make_sync(3) for _ in range(2)]
    lock = threading.Lock()
    running, peak, done = 0, 0, 0

    def call(number: int) -> None:
        nonlocal running, peak, done
        with limiters[number % 2].acquire(LIMIT, deadline_ms=PATIENT_MS):
            with lock:
                running += 1
                peak = max(peak, running)
            threading.Event().wait(0.002)
            with lock:
                running -= 1
                done += 1

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(call, range(80)))
    assert (peak, done) == (3, 80)
    await wait_until(lambda: held(limiters[0]) == held(limiters[1]) == 0)


def test_a_permit_tells_its_limits_its_fence_and_how_long_it_waited(make_sync: MakeSync) -> None:
    limiter = make_sync()
    with limiter.acquire(LIMIT) as first:
        first.confirm()
        assert first.limits == (LIMIT,)
        assert first.waited_ms >= 0
        assert not first.lost.is_set()
    with limiter.acquire(LIMIT) as second:
        assert second.fence > first.fence


def test_errors_of_acquire_reach_the_thread(make_sync: MakeSync) -> None:
    limiter = make_sync()
    holder = Holder(limiter).until_in_hand()
    with pytest.raises(DeadlineExceeded) as late, limiter.acquire(LIMIT, deadline_ms=20):
        pass
    assert late.value.limit == LIMIT
    with pytest.raises(DemandImpossible), limiter.acquire("kind:unknown"):
        pass
    holder.end()
    assert (holder.failure, held(limiter), waiting(limiter)) == (None, 0, 0)


def test_an_error_in_the_body_leaves_as_it_is_and_gives_the_permit_back(
    make_sync: MakeSync,
) -> None:
    limiter = make_sync()
    with pytest.raises(ZeroDivisionError), limiter.acquire(LIMIT):
        raise ZeroDivisionError
    assert held(limiter) == 0


def test_an_acquisition_can_be_entered_once(make_sync: MakeSync) -> None:
    acquisition = make_sync().acquire(LIMIT)
    with acquisition:
        pass
    with pytest.raises(RuntimeError), acquisition:
        pass


def test_of_two_threads_that_enter_one_acquisition_together_one_is_refused(
    make_sync: MakeSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were admitted, and the permit of one stayed held."""
    limiter = make_sync(bound=2)
    acquisition = limiter.acquire(LIMIT, deadline_ms=PATIENT_MS)
    entered: list[object] = []

    def enter() -> None:
        try:
            entered.append(acquisition.__enter__())
        except RuntimeError as error:
            entered.append(error)

    def make(*of: Any, **more: Any) -> DetachedPermit:
        monkeypatch.setattr("tidegate.limiter.sync.DetachedPermit", DetachedPermit)
        other = threading.Thread(target=enter)  # in the middle of the first one's entry
        other.start()
        other.join(20)
        return DetachedPermit(*of, **more)

    monkeypatch.setattr("tidegate.limiter.sync.DetachedPermit", make)
    with acquisition:
        assert [type(one) for one in entered] == [RuntimeError]
        assert held(limiter) == 1
    assert held(limiter) == 0


def test_a_permit_of_a_thread_is_settled_for_all_that_a_coroutines_is() -> None:
    of_thread, of_coroutine = (inspect.signature(one) for one in (SyncPermit.settle, Permit.settle))
    assert of_thread == of_coroutine


async def test_what_a_thread_settles_is_counted() -> None:
    limits = {
        "audio": Rate.per_minute(99, unit="audio_seconds"),
        "usd": Rate.per_minute(9, unit="usd"),
    }
    demand = Demand(("audio", "usd"), audio_seconds=50, cost_micros=8)
    with SyncLimiter.from_url("memory://", pool=uuid4().hex, policy=limits) as limiter:

        def used() -> list[int]:
            return [view.used for view in limiter.snapshot().limits.values()]

        held_open = limiter.hold(demand, lambda: None)
        permit = held_open.enter()
        assert permit is not None
        assert used() == [50, 8]
        permit.settle(audio_seconds=7, cost_micros=3, first_ms=1.5)
        held_open.leave()
        await wait_until(lambda: used() == [7, 3])


async def test_a_thread_whose_lease_ran_out_while_it_stood_still_makes_no_call(
    make_sync: MakeSync,
) -> None:
    limiter = make_sync()
    lease, confirmed = limiter._limiter._session.lease, []
    clock = lease.now_ms

    def stand_still_under_a_permit() -> None:
        with limiter.acquire(LIMIT) as permit:
            permit.confirm()
            confirmed.append("before")
            lease.now_ms = lambda: clock() + lease.lease_ms  # what a pause does to the clock
            permit.confirm()
            confirmed.append("after")

    with pytest.raises(LeaseLost):
        stand_still_under_a_permit()
    assert confirmed == ["before"]
    lease.now_ms = clock


async def test_closing_tells_waiters_and_holders_and_joins_the_thread(
    make_sync: MakeSync,
) -> None:
    limiter = make_sync()
    holder = Holder(limiter).until_in_hand()
    waiter = Holder(limiter)
    await wait_until(lambda: waiting(limiter) == 1)
    closing = threading.Thread(target=limiter.close)
    closing.start()
    waiter.join()
    assert isinstance(waiter.failure, ShuttingDown)
    closing.join(20)
    assert not closing.is_alive()
    holder.end()
    assert holder.lost_seen
    assert isinstance(holder.failure, LeaseLost)
    assert not limiter._thread.is_alive()
    with pytest.raises(ShuttingDown), limiter.acquire(LIMIT):
        pass
    limiter.close()


async def test_a_question_that_a_closing_limiter_leaves_unanswered_is_no_cancellation(
    make_sync: MakeSync,
) -> None:
    limiter, asked = make_sync(), threading.Event()

    async def hang(_inner: Limiter) -> None:
        asked.set()
        await asyncio.Event().wait()

    asking = asyncio.create_task(asyncio.to_thread(limiter.run, hang))
    await asyncio.to_thread(asked.wait, 10)
    await asyncio.to_thread(limiter.close)
    with pytest.raises(ShuttingDown):
        await asking


def test_a_429_that_comes_while_the_limiter_closes_is_answered_all_the_same(
    make_sync: MakeSync,
) -> None:
    limiter = make_sync()
    exchange = SyncExchange(limiter, Demand((LIMIT,)), LIMIT, ())
    limiter.close()
    exchange.pause(1_000)


def test_a_holder_that_leaves_within_the_grace_has_lost_nothing(make_sync: MakeSync) -> None:
    limiter = make_sync()
    holder = Holder(limiter).until_in_hand()
    closing = threading.Thread(target=limiter.close, args=(15_000,))
    closing.start()
    holder.end()
    closing.join(20)
    assert (holder.lost_seen, holder.failure, closing.is_alive()) == (False, None, False)


def test_a_limiter_that_cannot_start_says_why_and_leaves_no_thread(
    own_valkey: ValkeyServer, command_valkey: Callable[..., None]
) -> None:
    command_valkey(own_valkey.url, "CONFIG", "SET", "maxmemory", "100mb")
    command_valkey(own_valkey.url, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    limiter = SyncLimiter.from_url(own_valkey.url, pool="t", policy=policy(1))
    with pytest.raises(ConfigError):
        limiter.start()
    assert not limiter._thread.is_alive()


def test_a_limiter_that_was_not_started_lets_nobody_in(valkey_url: str) -> None:
    limiter = SyncLimiter.from_url(valkey_url, pool="t", policy=policy(1))
    with pytest.raises(ShuttingDown), limiter.acquire(LIMIT):
        pass
    limiter.close()


def test_a_decorated_function_runs_with_a_permit(make_sync: MakeSync) -> None:
    limiter = make_sync()

    @limiter.limited(LIMIT, deadline_ms=PATIENT_MS)
    def double(number: int, *, more: int = 0) -> tuple[int, int]:
        """Says what it does."""
        return 2 * number + more, held(limiter)

    assert (double(4), double(1, more=1)) == ((8, 1), (3, 1))
    assert (double.__name__, double.__doc__) == ("double", "Says what it does.")
    assert held(limiter) == 0


def test_what_would_outlive_its_permit_is_not_decorated(make_sync: MakeSync) -> None:
    limiter = make_sync()

    async def coroutine() -> None: ...

    def generator() -> object:
        yield

    for function in (coroutine, generator):
        with pytest.raises(TypeError, match="no plain function"):
            limiter.limited(LIMIT)(function)


INTERRUPTED = """
import sys
from tidegate.limiter import PoolPolicy
from tidegate.limiter.sync import SyncLimiter

url, pool = sys.argv[1:]
with SyncLimiter.from_url(url, pool=pool, policy=PoolPolicy({"kind:text_only": 1})) as limiter:
    with limiter.acquire("kind:text_only"):
        print("held", flush=True)
        try:
            with limiter.acquire("kind:text_only"):
                print("let in", flush=True)
        except KeyboardInterrupt:
            state = limiter.local_state()
            while state.waiting["kind:text_only"]:
                state = limiter.local_state()
            print("given back", flush=True)
    print(limiter.local_state().held["kind:text_only"], flush=True)
"""


async def test_an_interrupt_while_waiting_gives_the_ticket_back(valkey_url: str) -> None:
    pool = f"t{uuid4().hex[:12]}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", INTERRUPTED, valkey_url, pool), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"held\n"
    with SyncLimiter.from_url(valkey_url, pool=pool, policy=policy(1)) as onlooker:
        await wait_until(lambda: onlooker.snapshot().limits[LIMIT].waiting == 1)
        process.send_signal(signal.SIGINT)
        assert await process.stdout.read() == b"given back\n0\n"
        assert onlooker.snapshot().limits[LIMIT].used == 0
    assert await process.wait() == 0


FORKED = """
import os, sys
from tidegate.limiter import PoolPolicy
from tidegate.limiter.sync import SyncLimiter

url, pool = sys.argv[1:]
policy = PoolPolicy({"kind:text_only": 1})
unstarted = SyncLimiter.from_url(url, pool=pool, policy=policy)
with SyncLimiter.from_url(url, pool=pool, policy=policy) as limiter:
    with limiter.acquire("kind:text_only"):
        child = os.fork()
        if child == 0:
            try:
                unstarted.start()
            except RuntimeError as error:
                print(error, flush=True)
            try:
                limiter.acquire("kind:text_only").__enter__()
            except RuntimeError as error:
                print(error, flush=True)
            limiter.close()
            # Leaves every `with` of its parent, too.
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        print("child", status, "held", limiter.local_state().held["kind:text_only"], flush=True)
    with limiter.acquire("kind:text_only", deadline_ms=10_000):
        print("parent goes on", flush=True)
"""


def test_a_forked_child_leaves_its_parents_limiter_alone(valkey_url: str) -> None:
    done = subprocess.run(
        # From 3.12 on Python warns of every fork beside a thread; this one is what the test is of.
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            FORKED,
            valkey_url,
            f"t{uuid4().hex[:12]}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = done.stdout.splitlines()
    assert all("belongs to the process that was forked" in line for line in said[:2])
    assert said[2:] == ["child 0 held 1", "parent goes on"]
    assert (done.returncode, done.stderr) == (0, "")
