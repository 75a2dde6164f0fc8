"""A call that waits: for room in its budget, or again since its permit was lost before it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tidegate.admission.demand import CallDemand
from tidegate.call import ANYBODY, NO_CHARGE, CallCost, Usage, new_id
from tidegate.dialects.spec import Dialect
from tidegate.errors import (
    BudgetExceeded,
    BudgetReserved,
    DemandImpossible,
    LeaseLost,
    QueueFull,
    UpstreamDrained,
    UpstreamUnavailable,
)
from tidegate.limiter import PoolPolicy
from tidegate.policy.deployment import Deployment, Upstream
from tidegate.record import CallRecord
from tidegate.settings import Config
from tidegate.spine.affinity import Home
from tidegate.spine.routing import Suspect, Target, Targets
from tidegate.spine.run import CallFailed, Spine, Terms

A = Upstream("a", {"openai": "http://a"}, "k", ("m",))
B = Upstream("b", {"openai": "http://b"}, "k", ("m",))
OUT = (5_000, "the provider answered 503")
AT_A = Home(b"c", Target(A, "m"), is_known=True)


@dataclass
class _Permit:
    """One that is lost `at` a moment: before it is confirmed, or when it is released."""

    at: str = ""
    waited_ms: float = 0.0
    fence: tuple[int, int] = (1, 1)
    adapts_by_latency: bool = False
    enter: Callable[[], None] = lambda: None

    def settle_unused(self) -> None:
        pass

    def settle(self, *_: object, **__: object) -> None:
        pass

    async def confirm(self) -> None:
        if self.at == "confirm":
            raise asyncio.CancelledError

    def leave(self, _: Exception) -> None:
        pass

    async def __aenter__(self) -> _Permit:
        self.enter()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.at and (kind is None or issubclass(kind, asyncio.CancelledError)):
            raise LeaseLost("the session is gone")


@dataclass
class _Limiter:
    """Of one upstream. out: whether it has a closed gate."""

    pool: str
    permits: list[_Permit] = field(default_factory=list)
    out: bool = False
    policy: PoolPolicy = field(default_factory=lambda: PoolPolicy({}))

    @property
    def has_pauses(self) -> bool:
        return self.out

    def gate(self, _: str) -> tuple[int, str] | None:
        return OUT if self.out else None

    def paused_ms(self, _: object) -> int:
        return OUT[0] if self.out else 0

    def paused_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names[:1] if self.out else ()

    def notify_watchers(self) -> None:
        pass

    watch_pauses = unwatch_pauses = lambda *_: None

    def acquire_for(self, _: object) -> _Permit:
        return self.permits.pop(0) if self.permits else _Permit()

    try_acquire_for = acquire_for


@dataclass
class _Budgets:
    """room: what happens while a call waits for room in its budget, for each wait."""

    room_by: list[Any] = field(default_factory=list)
    any: bool = True

    async def known(self) -> None:
        pass

    def binding(self, *_: object) -> tuple[str, ...]:
        return ("day",)

    def refusal(self, *_: object) -> None:
        return None

    def watch(self, *_: object) -> Any:
        return lambda: None

    async def reserve(self, *_: object) -> None:
        if self.room_by:
            raise BudgetReserved("no room yet", limit="day", allowed="$1")

    async def room(self, _: float) -> None:
        self.room_by.pop(0)()

    def settle(self, *_: object) -> None:
        pass


class _Exchange:
    """made: at which upstreams the call was made."""

    started = has_response = ended_alone = False

    def __init__(self, terms: Terms, bills: bool) -> None:
        self.terms, self.bills = terms, bills
        self.made: list[str] = []

    def elsewhere(self, targets: Targets) -> list[Target]:
        return targets.of(Dialect.OPENAI, "m")

    serving = elsewhere

    def demand(self, target: Target, lane: Any) -> CallDemand:
        return cast(CallDemand, lane.gate.bind(CallDemand(("rpm",), "t", "p", 0), target.model))

    def cost(self, *_: object) -> CallCost:
        return CallCost(0, 0)

    async def make(self, target: Target, *_: object, **__: object) -> None:
        self.made.append(target.upstream.name)

    def settle(self, *_: object, **__: object) -> None:
        return None

    def suspect(self) -> Suspect:
        return Suspect(None, 1)


class _Stage:
    def __init__(self, *upstreams: Upstream, budgets: _Budgets | None = None) -> None:
        self.limiters = {one.name: _Limiter(one.name) for one in (A, B)}
        self.targets = Targets(Deployment(upstreams), Random(1))
        self.spine = Spine(
            config=Config(),
            targets=self.targets,
            pools=cast(Any, self.limiters),
            tracing=cast(Any, None),
            budgets=cast(Any, budgets or SimpleNamespace(any=False)),
            journal=cast(Any, None),
        )
        self.exchange = _Exchange(Terms(new_id(), ANYBODY, 0.0), bills=budgets is not None)

    def replace(self, *upstreams: Upstream) -> None:
        """As a live change does it."""
        self.targets.replace(Deployment(upstreams))
        for one in upstreams:
            self.spine.install(one, cast(Any, self.limiters[one.name]))
        for name in set(self.spine.health) - {one.name for one in upstreams}:
            self.spine.withdraw(name)

    def forget(self, name: str) -> None:
        """An upstream is removed, and no call holds a permit of it or waits for one."""
        self.replace(*(one for one in (A, B) if one.name != name))
        self.spine.forget(name)

    async def run(self, home: Home | None = None) -> list[str]:
        record = self.record = CallRecord("job", "t", datetime.now(UTC), charge=NO_CHARGE)
        targets = self.targets.of(Dialect.OPENAI, "m")
        await self.spine.run(cast(Any, self.exchange), record, targets, home=home)
        assert record.answer.usage == Usage()
        return self.exchange.made


async def test_an_upstream_that_is_back_is_tried_once_a_budget_has_room() -> None:
    budgets = _Budgets()
    stage = _Stage(A, B, budgets=budgets)
    stage.limiters["a"].out = True

    def turns() -> None:
        stage.limiters["a"].out, stage.limiters["b"].out = False, True

    budgets.room_by.append(turns)
    assert await stage.run() == ["a"]


async def test_an_upstream_that_came_is_tried_once_a_budget_has_room() -> None:
    budgets = _Budgets()
    stage = _Stage(B, budgets=budgets)

    def comes() -> None:
        stage.replace(A, B)
        stage.limiters["b"].out = True

    budgets.room_by.append(comes)
    assert await stage.run() == ["a"]


@pytest.mark.parametrize("bound", [None, "b"])
async def test_a_call_that_waits_goes_elsewhere_once_its_upstream_is_forgotten(
    bound: str | None,
) -> None:
    budgets = _Budgets()
    stage = _Stage(B, budgets=budgets)
    stage.exchange.terms.upstream = bound

    def goes() -> None:
        stage.replace(A)
        stage.spine.forget("b")

    budgets.room_by.append(goes)
    if bound is None:
        assert await stage.run() == ["a"]
    else:
        with pytest.raises(UpstreamDrained):
            await stage.run()


async def test_a_call_whose_permit_was_lost_before_it_was_made_is_admitted_again() -> None:
    stage = _Stage(A)
    stage.limiters["a"].permits = [_Permit("confirm"), _Permit()]
    assert await stage.run() == ["a"]


@pytest.mark.parametrize("upstreams", [(A,), (A, B)], ids=len)
async def test_a_permit_that_is_lost_as_its_upstream_goes_out_is_asked_for_again(
    upstreams: tuple[Upstream, ...],
) -> None:
    """The upstream was paused while the permit was on its way, which is returned unused."""
    stage = _Stage(*upstreams)
    limiters = [stage.limiters[one.name] for one in upstreams]
    turns = [partial(setattr, one, "out", out) for out in (True, False) for one in limiters]
    for one, goes_out in zip(limiters, turns, strict=False):
        one.permits = [_Permit("release", enter=goes_out), _Permit(enter=turns[-1])]
    made = await stage.run()
    assert len(made) == 1


async def test_a_call_whose_permit_was_lost_while_it_was_made_is_not_repeated() -> None:
    stage = _Stage(A)
    stage.limiters["a"].permits = [_Permit("call")]

    async def cancelled(*_: object, **__: object) -> None:
        stage.exchange.made.append("a")
        raise asyncio.CancelledError

    stage.exchange.make = cancelled  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):
        await stage.run()
    assert stage.exchange.made == ["a"]


async def test_a_call_whose_permit_was_lost_waits_again() -> None:
    stage, seen = _Stage(A), list[bool]()
    again = _Permit(enter=lambda: seen.append(stage.record.waits))
    stage.limiters["a"].permits = [_Permit("confirm"), again]
    assert await stage.run() == ["a"]
    assert seen == [True]


def full() -> None:
    raise QueueFull("the queue is full", limit="rpm", retry_after_ms=1_000)


async def test_a_call_whose_conversations_queue_is_full_goes_elsewhere() -> None:
    stage = _Stage(A, B)
    stage.limiters["a"].permits = [cast(Any, _NoPermit()), _Permit(enter=full)]
    assert await stage.run(Home(b"c", Target(A, "m"), True, wait_ms=100.0)) == ["b"]


class _NoPermit:
    """There is none now."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


async def test_a_call_goes_on_without_an_upstream_that_is_forgotten_before_it() -> None:
    stage = _Stage(A, B)
    targets = stage.targets.of(Dialect.OPENAI, "m")
    stage.forget("b")
    stage.targets.of = lambda *_: targets  # type: ignore[method-assign]
    assert await stage.run() == ["a"]


async def test_a_failed_call_is_repeated_without_an_upstream_that_is_forgotten_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidegate.spine.run._FIRST_PAUSE_S", 0.0)
    stage, made = _Stage(A, B), list[str]()

    async def make(target: Target, *_: object, **__: object) -> None:
        made.append(target.upstream.name)
        if len(made) == 2:
            stage.forget("b")
        if len(made) < 3:
            raise CallFailed(UpstreamUnavailable("the provider answered 503"), target)

    stage.exchange.make = make  # type: ignore[method-assign]
    await stage.run(AT_A)
    assert made == ["a", "b", "a"]


async def test_a_budget_refuses_a_call_whose_other_upstream_is_forgotten() -> None:
    budgets = _Budgets()
    stage = _Stage(A, B, budgets=budgets)

    async def spent(*_: object) -> None:
        stage.forget("b")
        raise BudgetExceeded("it is spent", limit="day", allowed="$1", retry_after_ms=None)

    budgets.reserve = spent  # type: ignore[method-assign]
    with pytest.raises(BudgetExceeded):
        await stage.run(AT_A)


async def test_a_limit_is_taken_away_as_another_upstream_is_forgotten() -> None:
    stage = _Stage(A, B)
    limiter = stage.limiters["a"]

    def taken_away() -> None:
        limiter.policy = PoolPolicy({})
        stage.forget("b")
        raise DemandImpossible("no such limit", limit="rpm")

    for one in stage.limiters.values():
        one.permits = [cast(Any, _NoPermit())]
    limiter.permits.append(_Permit(enter=taken_away))
    assert await stage.run(AT_A) == ["a"]
