"""A call in the background whose caller is cancelled: no row and no count of it is left over."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.waiting import wait_until
from tidegate.call import new_id
from tidegate.errors import StoreUnavailable, UpstreamRejected
from tidegate.policy.deployment import Upstream
from tidegate.record import CallRecord
from tidegate.spine.hand_over import BackgroundHandOver, count_again
from tidegate.spine.out import undisturbed
from tidegate.spine.routing import Target
from tidegate.spine.run import CallFailed
from tidegate.store.provider.background import CountedCall


class _Store:
    """What is on record, and counted; `gates` hold up what they name until they are set."""

    def __init__(self, *gates: str) -> None:
        self.gates = {name: asyncio.Event() for name in gates}
        self.reached: list[str] = []
        self.rows: set[object] = set()
        self.counted: set[str] = set()

    async def _pass(self, name: str) -> None:
        self.reached.append(name)
        if name in self.gates:
            await self.gates[name].wait()

    async def begin(self, record: CallRecord, *_: object) -> None:
        self.rows.add(record.id)
        await self._pass("begin")

    async def start(self, *_: object) -> None:
        await self._pass("start")

    async def drop(self, request_id: object) -> None:
        await self._pass("drop")
        self.rows.discard(request_id)

    async def hold(self, name: str, *_: object) -> None:
        self.counted.add(name)

    async def revoke(self, name: str) -> None:
        await self._pass("revoke")
        self.counted.discard(name)

    def leave(self, _: CallRecord) -> None:
        pass


class _Call:
    """One call in the background."""

    def __init__(self, store: _Store) -> None:
        self.store = there = cast(Any, store)
        self.record = CallRecord("relay", "default", datetime.now(UTC), new_id())
        self.hand_over = BackgroundHandOver(there, self.record, there, "response", 1_000)
        self.is_open = False

    def begun(self, answer: Any) -> asyncio.Task[None]:
        async def call() -> None:
            self.record.sent = self.is_open = True
            try:
                await answer()
            finally:
                self.is_open = False

        account: Any = SimpleNamespace(limiter=self.store, hard_ms=1)
        demand: Any = SimpleNamespace(limits=("kind:text_only",))
        target: Any = None
        return asyncio.create_task(self.hand_over.make(target, account, demand, call))


async def cancelled_at(task: asyncio.Task[None], store: _Store, name: str, times: int = 1) -> None:
    """Cancel a task that waits at a gate, and open the gate."""
    await wait_until(lambda: name in store.reached)
    for _ in range(times):
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
    store.gates[name].set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("step", ["drop", "revoke"])
async def test_a_client_that_leaves_while_an_answer_ends_the_work_leaves_nothing_counted(
    step: str,
) -> None:
    store = _Store(step)
    call = _Call(store)
    task = call.begun(call.hand_over.not_accepted)  # the answer is whole: nothing goes on
    await cancelled_at(task, store, step)
    assert (store.rows, store.counted) == (set(), set())


async def test_a_client_that_leaves_while_a_refusal_is_noted_leaves_nothing_counted() -> None:
    store = _Store("drop")

    async def refused() -> None:
        target = Target(Upstream("one", {}, ""), "m")
        raise CallFailed(UpstreamRejected("no", status=400), target, status=400)

    await cancelled_at(_Call(store).begun(refused), store, "drop")
    assert (store.rows, store.counted) == (set(), set())


async def test_a_call_that_was_not_begun_leaves_nothing_however_often_it_is_cancelled() -> None:
    store = _Store("begin", "drop")
    task = _Call(store).begun(asyncio.Event().wait)
    await wait_until(lambda: store.reached)
    task.cancel()
    await cancelled_at(task, store, "drop", times=2)
    assert (store.rows, store.counted) == (set(), set())


async def test_a_second_cancellation_closes_the_call_which_stays_counted() -> None:
    store = _Store()
    call = _Call(store)
    task = call.begun(asyncio.Event().wait)
    await wait_until(lambda: call.is_open)
    for _ in range(2):
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not call.is_open
    assert store.rows
    assert store.counted


async def test_a_hand_over_that_has_begun_is_done_when_its_call_is_cancelled_twice() -> None:
    store = _Store("start")
    call = _Call(store)
    task = call.begun(lambda: call.hand_over.taken(()))
    await cancelled_at(task, store, "start", times=2)
    assert call.record.handed_over
    assert store.counted


async def test_what_fails_undisturbed_is_the_cause_of_the_cancellation() -> None:
    """Else asyncio would log, when it is collected, that nobody has read the failure."""
    going_on = asyncio.Event()

    async def fail() -> None:
        await going_on.wait()
        raise StoreUnavailable("PostgreSQL is away")

    task = asyncio.create_task(undisturbed(fail()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    going_on.set()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await task
    assert isinstance(cancelled.value.__cause__, StoreUnavailable)


@pytest.mark.parametrize("after", [["first"], []])
async def test_what_ends_while_all_are_counted_again_is_not_left_counted(after: list[str]) -> None:
    store, going_on = _Store(), iter([["first", "second"], after])

    async def counted() -> list[CountedCall]:
        limits = {"kind:text_only": 1}
        return [CountedCall("openai", name, limits, 1) for name in next(going_on)]

    calls: Any = SimpleNamespace(counted=counted)
    targets = SimpleNamespace(upstreams={"openai": object()})
    spine: Any = SimpleNamespace(targets=targets, account=lambda _: SimpleNamespace(limiter=store))
    await count_again(calls, spine)
    assert store.counted == set(after)
    assert store.reached.count("revoke") == 2 - len(after)
