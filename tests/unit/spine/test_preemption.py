"""Which calls give way to waiting calls of higher bands, to which, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast
from uuid import UUID

import pytest

from tests.waiting import wait_until
from tidegate.errors import CallPreempted
from tidegate.limiter import Band, HigherWaits, LimitView, Permit, PoolPolicy, QueueView, Snapshot
from tidegate.limiter.simulation import Flow, Holding
from tidegate.policy.deployment import Preempt
from tidegate.spine.preemption import PoolWatch, PreemptibleCall, Preemption

KIND, MODEL = "kind:text_only", "calls:m"
FULL = LimitView(KIND, "c", 2, 2, 1, 0, 2, 0, 0, "", 0)
LIVE = QueueView("api", "api", 1, "t", (KIND,), KIND, 1, 7, 7)
AFTER_MS = 1_000
AN_ID = UUID(int=1)


def a_pool(*queues: QueueView, limits: tuple[LimitView, ...] = (FULL,)) -> Snapshot:
    return Snapshot({one.limit: one for one in limits}, 2, 1, 1, 0, "up", queues=queues)


def first_tickets(waits: HigherWaits, now_ms: float, *queues: QueueView) -> list[int]:
    return [queue.first_ticket for queue in waits.overdue(a_pool(*queues), now_ms)]


def test_a_ticket_is_overdue_once_it_has_been_seen_for_so_long() -> None:
    waits = HigherWaits(AFTER_MS)
    assert first_tickets(waits, 0, LIVE) == []
    assert first_tickets(waits, 999, LIVE) == []
    assert first_tickets(waits, 1_000, LIVE) == [7]


def test_the_next_ticket_is_overdue_if_it_was_there_too() -> None:
    waits = HigherWaits(AFTER_MS)
    assert first_tickets(waits, 0, replace(LIVE, waiting=2, last_ticket=9)) == []
    second = replace(LIVE, first_ticket=9, last_ticket=12)
    assert first_tickets(waits, 1_000, second) == [9]
    third = replace(LIVE, first_ticket=12, last_ticket=12)
    assert first_tickets(waits, 1_250, third) == []


def test_a_ticket_that_came_later_has_not_waited_as_long() -> None:
    waits = HigherWaits(AFTER_MS)
    for number in range(20):  # each is admitted soon, while others come
        came = replace(LIVE, first_ticket=number, last_ticket=number)
        assert first_tickets(waits, number * 250, came) == []


def test_a_queue_that_was_empty_or_has_no_limit_begins_again() -> None:
    waits = HigherWaits(AFTER_MS)
    assert first_tickets(waits, 0, LIVE) == []
    assert first_tickets(waits, 500) == []
    assert first_tickets(waits, 1_100, LIVE) == []
    unreachable = replace(LIVE, held_up_by=None)
    assert first_tickets(waits, 2_200, unreachable) == []
    assert first_tickets(waits, 2_300, LIVE) == []


def test_the_highest_band_comes_first() -> None:
    waits = HigherWaits(AFTER_MS)
    queues = (replace(LIVE, band=2, first_ticket=5), LIVE)
    assert first_tickets(waits, 0, *queues) == []
    assert first_tickets(waits, 1_000, *queues) == [7, 5]


@dataclass(eq=False)
class ScriptedPool:
    """A pool whose snapshots the test sets, and whose claims it counts."""

    pool: str = "p"
    policy: PoolPolicy = field(default_factory=lambda: PoolPolicy({KIND: 2}))
    seen: Snapshot = field(default_factory=a_pool)
    claimed: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    on_claim: Callable[[], Awaitable[None]] | None = None

    async def snapshot(self) -> Snapshot:
        return self.seen

    async def claim(self, name: str, keep_ms: int) -> bool:
        self.claimed.append(name)
        if self.on_claim is not None:
            await self.on_claim()
        return name not in self.taken


@dataclass
class Heard:
    """An exchange with an upstream."""

    has_response: bool = False


@dataclass
class Calls:
    """Calls that wait for their answers, and the watch over them."""

    limiter: ScriptedPool = field(default_factory=ScriptedPool)
    tasks: list[asyncio.Task[str]] = field(default_factory=list)
    exchanges: list[Heard] = field(default_factory=list)
    now_ms: float = 0

    def __post_init__(self) -> None:
        self.watch = PoolWatch(cast(Any, self.limiter), Preempt(AFTER_MS, 3))

    async def call(self, *, band: int = 3, limits: tuple[str, ...] = (KIND,)) -> None:
        exchange, begun = Heard(), asyncio.Event()

        async def run() -> str:
            held = Holding(1, Flow(band, "t", limits), 1, 1, 1, 0, 0, 1e9, 0)
            permit = Permit(held, cast(Any, None), cast(Any, None))
            try:
                with PreemptibleCall(self.watch, exchange, permit, AN_ID):
                    begun.set()
                    await asyncio.get_running_loop().create_future()
            except CallPreempted:
                return "gave way"
            return "answered"

        self.tasks.append(asyncio.create_task(run()))
        self.exchanges.append(exchange)
        await begun.wait()

    async def overdue(self, *queues: QueueView, limits: tuple[LimitView, ...] = (FULL,)) -> None:
        """These have waited for long enough in two snapshots."""
        self.limiter.seen = a_pool(*queues, limits=limits)
        for _ in range(2):
            await self.watch.read(self.now_ms)
            self.now_ms += AFTER_MS
        await asyncio.sleep(0)

    @property
    def gave_way(self) -> list[int]:
        return [
            place
            for place, task in enumerate(self.tasks)
            if task.done() and task.result() == "gave way"
        ]

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def calls() -> Any:
    made = Calls()
    yield made
    await made.end()


async def test_the_newest_call_gives_way_and_no_other(calls: Calls) -> None:
    for _ in range(3):
        await calls.call()
    await calls.overdue(LIVE)
    assert calls.gave_way == [2]
    assert calls.limiter.claimed == ["api|7"]
    assert len(calls.watch.calls) == 2


async def test_one_call_for_each_queue_whose_first_ticket_waits(calls: Calls) -> None:
    for _ in range(3):
        await calls.call()
    await calls.overdue(LIVE, replace(LIVE, sid="api2"))
    assert calls.gave_way == [1, 2]


async def test_a_pool_is_read_four_times_within_the_time(calls: Calls) -> None:
    await calls.call()
    read = 0

    async def counted() -> Snapshot:
        nonlocal read
        read += 1
        return a_pool()

    calls.limiter.snapshot = counted  # type: ignore[method-assign]
    for now_ms in range(0, 1_000, 50):
        await calls.watch.read(now_ms)
    assert read == 4


def refusing() -> Iterator[Any]:
    yield "no higher band", replace(LIVE, band=3), (FULL,)
    yield "another limit", replace(LIVE, limits=("x",), held_up_by="x"), (replace(FULL, limit="x"),)
    yield "a rate", LIVE, (replace(FULL, sort="r"),)
    yield "room", LIVE, (replace(FULL, used=1),)
    yield "it drains", LIVE, (replace(FULL, used=3),)
    yield "a pause", LIVE, (replace(FULL, paused_ms=50),)
    both = replace(LIVE, limits=(KIND, MODEL))
    yield "another full limit", both, (FULL, replace(FULL, limit=MODEL))
    rate = replace(FULL, limit=MODEL, sort="r", room_in_ms=9)
    yield "a rate without room", both, (FULL, rate)


@pytest.mark.parametrize(
    ("queue", "limits"), [one[1:] for one in refusing()], ids=[one[0] for one in refusing()]
)
async def test_none_gives_way_where_its_permit_would_not_admit_the_waiter(
    calls: Calls, queue: QueueView, limits: tuple[LimitView, ...]
) -> None:
    await calls.call()
    await calls.overdue(queue, limits=limits)
    assert (calls.gave_way, calls.limiter.claimed) == ([], [])


async def test_a_full_limit_that_the_call_holds_too_is_no_obstacle(calls: Calls) -> None:
    await calls.call(limits=(KIND, MODEL))
    both = replace(LIVE, limits=(KIND, MODEL))
    await calls.overdue(both, limits=(FULL, replace(FULL, limit=MODEL)))
    assert calls.gave_way == [0]


async def test_a_limit_is_full_where_the_headroom_of_higher_bands_begins(calls: Calls) -> None:
    bands = (Band("high", headroom=0.25), Band("normal"), Band("low"))
    calls.limiter.policy = PoolPolicy({KIND: 8}, bands=bands)
    await calls.call()
    eight = replace(FULL, bound=8, current=8)
    normal = replace(LIVE, band=2)
    for used, gave_way in ((5, []), (7, []), (6, [0])):
        await calls.overdue(normal, limits=(replace(eight, used=used),))
        assert calls.gave_way == gave_way, used


async def test_a_call_with_an_answer_keeps_its_permit(calls: Calls) -> None:
    for _ in range(2):
        await calls.call()
    calls.exchanges[1].has_response = True
    await calls.overdue(LIVE)
    assert calls.gave_way == [0]


async def test_an_answer_that_comes_during_the_claim_is_kept(calls: Calls) -> None:
    await calls.call()

    async def heard() -> None:
        calls.exchanges[0].has_response = True

    calls.limiter.on_claim = heard
    await calls.overdue(LIVE)
    assert (calls.gave_way, calls.limiter.claimed) == ([], ["api|7"])


async def test_a_ticket_that_another_process_has_claimed_is_left_to_it(calls: Calls) -> None:
    await calls.call()
    calls.limiter.taken = {"api|7"}
    await calls.overdue(LIVE)
    assert (calls.gave_way, calls.limiter.claimed) == ([], ["api|7"])


async def test_a_cancellation_in_the_same_moment_stands(calls: Calls) -> None:
    await calls.call()
    (one,) = calls.watch.calls
    one.give_way(KIND, 1)
    calls.tasks[0].cancel()
    with suppress(asyncio.CancelledError):
        await calls.tasks[0]
    assert calls.tasks[0].cancelled()
    assert not calls.watch.calls


async def test_the_task_goes_on_uncancelled(calls: Calls) -> None:
    await calls.call()
    (one,) = calls.watch.calls
    one.give_way(KIND, 1)
    assert await calls.tasks[0] == "gave way"
    assert calls.tasks[0].cancelling() == 0


@pytest.mark.parametrize("is_entered_again", [False, True])
async def test_a_call_gives_way_by_the_rule_and_in_the_pool_of_its_own_upstream(
    is_entered_again: bool,
) -> None:
    """As after a live change of `preempt`, or where an upstream was removed and added again."""
    left = ScriptedPool()
    now = ScriptedPool() if is_entered_again else left
    before, rule = Preempt(1 if is_entered_again else 3_600_000), Preempt(1)
    now.seen, preemption = a_pool(LIVE), Preemption()

    async def call(limiter: ScriptedPool, by: Preempt) -> None:
        permit = Permit(
            Holding(1, Flow(3, "t", (KIND,)), 1, 1, 1, 0, 0, 1e9, 0),
            cast(Any, None),
            cast(Any, None),
        )
        with preemption.of(cast(Any, limiter), by, Heard(), permit, AN_ID):
            if by is rule:
                await asyncio.get_running_loop().create_future()

    await call(left, before)
    running, called = (asyncio.create_task(one) for one in (preemption.run(), call(now, rule)))
    await wait_until(called.done, what="a call that gave way")
    running.cancel()
    assert isinstance(called.exception(), CallPreempted)
