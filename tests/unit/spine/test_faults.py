"""When faults are enough, and how much may be tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest

from tidegate.admission.demand import CallDemand
from tidegate.errors import (
    LimiterUnavailable,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)
from tidegate.limiter import Concurrency, Limiter, PoolPolicy, Rate
from tidegate.spine import routing
from tidegate.spine.routing import (
    FAULTS,
    FAULTS_OF_ONE,
    FORGOTTEN_S,
    MOST_PAUSED,
    Faults,
    Gate,
    RetryBudget,
    Suspect,
)


def noted(faults: Faults, *suspects: Suspect | None) -> list[bool]:
    """Whether each one made it enough."""
    said = []
    for suspect in suspects:
        faults.add(suspect)
        said.append(faults.are_enough)
    return said


def test_some_faults_in_a_row_are_enough_and_a_success_between_begins_again() -> None:
    faults = Faults()
    for _ in range(3):
        assert not any(noted(faults, *[None] * (FAULTS - 1)))
        faults.clear()
    assert noted(faults, *[None] * FAULTS) == [False] * (FAULTS - 1) + [True]


def test_one_request_that_fails_however_often_is_not_enough() -> None:
    faults = Faults()
    assert [faults.add(Suspect("a", 1)) for _ in range(100)] == [True] + [False] * 99
    assert not faults.are_enough


def test_one_tenants_requests_are_not_enough_until_very_many_have_failed() -> None:
    said = noted(Faults(), *(Suspect("a", request) for request in range(FAULTS_OF_ONE)))
    assert said == [False] * (FAULTS_OF_ONE - 1) + [True]


@pytest.mark.parametrize(
    "others", [[None], [Suspect("b", 1)], [Suspect("a", 1), Suspect("b", 1)]], ids=len
)
def test_anothers_fault_makes_them_enough(others: list[Suspect | None]) -> None:
    faults = Faults()
    assert not any(noted(faults, *(Suspect("a", request) for request in range(FAULTS - 1))))
    assert noted(faults, *others)[-1]


def test_where_clients_cannot_be_told_apart_different_requests_are_enough() -> None:
    said = noted(Faults(), *(Suspect(None, request) for request in range(FAULTS)))
    assert said == [False] * (FAULTS - 1) + [True]


def test_what_is_known_of_suspects_is_bounded() -> None:
    faults = Faults()
    for request in range(10 * FAULTS_OF_ONE):
        faults.add(Suspect(str(request), request))
    assert len(faults._suspects) <= FAULTS_OF_ONE


@pytest.mark.parametrize(
    ("error", "provoked"),
    [
        (UpstreamUnavailable("no connection", broke="connecting"), False),
        (UpstreamUnavailable("", status=502), False),
        (UpstreamUnavailable("", status=503), False),
        (UpstreamUnavailable("", status=529), False),
        (UpstreamTimeout("", phase="connect"), False),
        (UpstreamUnauthorized("", status=401), False),
        (UpstreamUnavailable("", status=500), True),
        (UpstreamUnavailable("a prompt that is too long", status=504), True),
        (UpstreamUnavailable("closed before", broke="unheard"), True),
        (UpstreamUnavailable("cut in mid-answer"), True),
        (UpstreamTimeout("", phase="first_byte"), True),
        (UpstreamTimeout("", phase="idle"), True),
        (UpstreamTimeout("", phase="total"), True),
        (UpstreamGarbled(""), True),
        (UpstreamUnauthorized("", status=403, of_key=False), True),
    ],
)
def test_what_a_request_can_bring_upon_itself(error: UpstreamError, provoked: bool) -> None:
    assert error.of_upstream is not provoked
    assert error.of_upstream is not provoked


@pytest.mark.parametrize(
    ("error", "of_upstream"),
    [
        (UpstreamThrottled("slow down"), True),
        (UpstreamThrottled("a day's quota is gone", day_quota=True), True),
        (UpstreamUnavailable("no upstream takes calls now", asked=False), True),
        (UpstreamRejected("no such model", status=404), False),
    ],
)
def test_whose_fault_a_refusal_is(error: UpstreamError, of_upstream: bool) -> None:
    assert error.of_upstream is of_upstream


def test_a_fifth_of_the_traffic_may_be_tried_again() -> None:
    budget = RetryBudget(saved=0)
    tried = 0
    for _ in range(1000):
        budget.earn()
        tried += budget.spend()
    assert 195 <= tried <= 200


@dataclass
class _Pauses:
    """A limiter whose policy names no model. paused: its pauses."""

    paused: dict[str, int]
    policy: PoolPolicy = field(default_factory=lambda: PoolPolicy({}))

    def pauses(self) -> dict[str, int]:
        return self.paused

    def paused_ms(self, limits: Sequence[str]) -> int:
        return 0

    async def penalise(self, limit: str, *, for_ms: int, **_: object) -> bool:
        self.paused[limit] = for_ms
        return True


async def test_invented_models_that_are_paused_leave_room_for_those_that_answered() -> None:
    """Clients name models, and an upstream may refuse each of them by a 429."""
    limiter = _Pauses({})
    gate = Gate("busy", cast(Limiter, limiter))
    gate.announced.note("real", [])
    demand = CallDemand((), "t", "p", 0)

    async def paused_ms(model: str, of_account: bool = False) -> int:
        error = UpstreamThrottled("slow down", retry_after_ms=9_000, of_account=of_account)
        return await gate.throttled(error, model, demand)

    for number in range(MOST_PAUSED):
        assert await paused_ms(f"invented-{number}")
    assert not await paused_ms("one-more")
    assert await paused_ms("real")
    assert await paused_ms("one-more", of_account=True)
    assert {"model:real", "upstream:busy"} < set(limiter.paused)
    for number in range(2 * MOST_PAUSED):  # at a server that answers for any
        gate.announced.note(f"answered-{number}", [])
        await paused_ms(f"answered-{number}")
    assert len(limiter.paused) == 2 * MOST_PAUSED + 1


async def test_a_refusal_is_announced_of_the_limit_in_force_that_it_names() -> None:
    policy = PoolPolicy(
        {"tpm:gpt-5": Rate(30_000, 60_000, "tokens"), "model:gpt-5": Concurrency(4)}
    )
    gate = Gate("busy", cast(Limiter, _Pauses({}, policy)))
    demand = CallDemand(("tpm:gpt-5", "model:gpt-5"), "t", "p", 0)
    for unit in ("tokens", "images"):
        error = UpstreamThrottled("slow down", retry_after_ms=9_000, unit=unit)
        await gate.throttled(error, "gpt-5", demand)
        await gate.throttled(error, "invented", demand)
    assert [one.limit for one in gate.announced.refusals()] == ["tpm:gpt-5"]


async def test_a_rate_that_is_refused_again_is_paused_for_longer_each_time() -> None:
    """The provider tells when one call fits, and others take it."""
    now, limiter = 0.0, _Pauses({}, PoolPolicy({"rpm:gpt-5": Rate(450, 60_000)}))
    gate = Gate("busy", cast(Limiter, limiter), clock=lambda: now)
    demand = CallDemand(("rpm:gpt-5",), "t", "p", 0)

    async def paused_ms(told_ms: int) -> int:
        error = UpstreamThrottled("slow down", retry_after_ms=told_ms, unit="requests")
        return await gate.throttled(error, "gpt-5", demand)

    found = []
    for _ in range(6):
        found.append(await paused_ms(130))
        assert await paused_ms(130) == found[-1], "a call that was under way"
        now += found[-1] / 1000 + 0.2
    assert found == [500, 1_000, 2_000, 4_000, 8_000, 8_000]
    assert await paused_ms(47_000) == 47_000
    now += 47.0 + FORGOTTEN_S + 1
    assert await paused_ms(130) == 500


async def test_a_rate_whose_refusal_tells_no_time_is_paused_for_a_part_of_its_window() -> None:
    """A minute that others have used up has no room half a second later."""
    now, rates = 0.0, {"rpm:gpt-5": Rate(450, 60_000), "tpm:gpt-5": Rate(9_000, 10_000)}
    gate = Gate("busy", cast(Limiter, _Pauses({}, PoolPolicy(rates))), clock=lambda: now)
    demand = CallDemand(tuple(rates), "t", "p", 0)

    async def paused_ms(unit: str) -> int:
        return await gate.throttled(UpstreamThrottled("slow down", unit=unit), "gpt-5", demand)

    found = []
    for _ in range(4):
        found.append(await paused_ms("requests"))
        now += found[-1] / 1000 + 0.2
    assert found == [2_000, 4_000, 8_000, 8_000]
    assert await paused_ms("tokens") == 500, "a thirtieth of 10 s is less"


class _Away:
    """A limiter with a closed gate, whose server is unavailable, then unsure of its data."""

    def __init__(self) -> None:
        away = LimiterUnavailable("away", limit="", retry_after_ms=1)
        self.replies: list[bool | LimiterUnavailable] = [away, False, True]
        self.passed_on = asyncio.Event()

    def gate(self, _: str) -> tuple[int, str]:
        return 0, "upstream: no answer"

    async def close_gate(self, *_: object, **__: object) -> bool:
        reply = self.replies.pop(0)
        if isinstance(reply, LimiterUnavailable):
            raise reply
        if reply:
            self.passed_on.set()
        return reply


async def test_a_hung_try_is_passed_on_once_valkey_answers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "PROBE_S", 0)
    monkeypatch.setattr(routing, "FIRST_MS", 1)
    limiter = _Away()
    with Gate("hung", cast(Limiter, limiter)).trying():
        async with asyncio.timeout(5):
            await limiter.passed_on.wait()
    assert limiter.replies == []


class _Reopened:
    """A limiter whose gate another process opens before who closed it looks at it again."""

    has_pauses = False
    closed = 0

    def gate(self, _: str) -> None:
        return None

    async def close_gate(self, *_: object, **__: object) -> bool:
        self.closed += 1
        return True


async def out_after(kinds: Sequence[str], tenant: str | None = None) -> int:
    """How many empty answers in a row put an upstream out of service; 0 for none of them."""
    gate = Gate("main", cast(Limiter, limiter := _Reopened()))
    empty = UpstreamGarbled("an empty body", is_empty=True)
    for count, kind in enumerate(kinds, 1):
        await gate.failed(empty, "m", suspect=Suspect(tenant, count, kind=kind), tried=False)
        if limiter.closed:
            return count
    return 0


async def test_empty_answers_to_one_kind_of_call_leave_the_upstream_to_the_others() -> None:
    many = FAULTS_OF_ONE - 1
    assert await out_after(["/embeddings"] * many) == 0
    assert await out_after(["/embeddings"] * many + ["/responses"]) == FAULTS_OF_ONE
    assert await out_after(["/embeddings"] * FAULTS_OF_ONE) == FAULTS_OF_ONE
    assert await out_after(["/embeddings", "/responses"] * many) == FAULTS
    assert await out_after(["/embeddings", "/responses"] * 9, tenant="acme") == 0


async def test_a_dead_key_is_an_outage_although_its_gate_is_open_again() -> None:
    """Or jobs beside it would wait for a minute, as nothing tells them of the gate."""
    gate = Gate("main", cast(Limiter, _Reopened()))
    dead = UpstreamUnauthorized("no such key")
    await gate.failed(dead, "any", suspect=Suspect("acme", 1), tried=False)
    assert dead.in_outage
