"""Turns of a realtime session: their use of rates and budgets, and their cost in total.

    budgets: reserved before each turn ─► settled by the usage that the provider reports
    rates:   a permit for each turn, requested when the client begins it, held to its end

    audio:   taken from the limits on seconds of audio some seconds ahead of the client's audio

A turn that the provider begins by itself, for example on a pause in speech, gets its permit while
it runs: nothing more of the client is forwarded before it is admitted.

Invariants: every usage that a provider reports is charged once; a turn that is cut is charged at
least for its input and its output so far; however a session ends, no permit and no reservation
remains.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil
from uuid import UUID

from tidegate.admission.charges import call_cost, charge_of, estimated_charge
from tidegate.admission.demand import CallDemand
from tidegate.admission.estimator import Estimate, pieces_of
from tidegate.call import (
    NO_CHARGE,
    REALTIME_KIND,
    UNKNOWN_USAGE,
    Charge,
    Outcome,
    Usage,
    UsageDetails,
    UsageState,
    seconds_of,
    tokens_of,
)
from tidegate.errors import (
    BudgetReserved,
    LimiterUnavailable,
    QueueFull,
    TidegateError,
    UpstreamGarbled,
)
from tidegate.limiter import Limit, Quota, Rate
from tidegate.prices.budgets import Binding
from tidegate.prices.rates import Rates
from tidegate.realtime.events import ClientEvent, Reported, Spent, about_text, add_usage
from tidegate.spine.routing import Target
from tidegate.spine.run import Terms, UpstreamAccount
from tidegate.store.budgets import Budgets

_AUDIO_STEP_S = 5
# Bounds of a session: each of these turns waits for the limits, or is in memory, until it has
# ended.
_MOST_LATE, _MOST_BEGUN, MOST_REQUESTED = 16, 100, 100
_RETRY_AFTER_MS = 1_000
# How long a requested turn may take to begin after an error that may be about it: longer than any
# turn takes. One that begins later is admitted and charged as the provider's own.
UNBEGUN_S = 10.0
_UNSEEN = "a turn has the whole conversation, with its audio, for its input"


def is_rate(account: UpstreamAccount, limit_id: str) -> bool:
    """Return whether a limit is a rate or a quota, which turns spend, and not a concurrency
    limit."""
    return isinstance(account.limiter.policy.limit(limit_id), Rate | Quota)


@dataclass(eq=False, slots=True)
class RealtimeTurn:
    """A turn.

    `admitted` is done once the limits have admitted or rejected it. `ended` has its usage as
    reported and its charge; None if there was no turn. event_id: of the message that requests it,
    as errors name it. joins: it may be answered together with another one. after: the number of
    turns that had begun before. doubted_at: when an error came that may be about it.
    """

    demand: CallDemand | None
    hold: UUID | None
    admitted: asyncio.Future[None]
    ended: asyncio.Future[tuple[Usage, Charge] | None]
    task: asyncio.Task[None] | None = None
    received_tokens: float = 0.0
    event_id: str | None = None
    joins: bool = False
    after: int = 0
    doubted_at: float | None = None

    @property
    def is_admitted(self) -> bool:
        done = self.admitted
        return done.done() and not done.cancelled() and done.exception() is None


class Turns:
    """The turns of a session at an upstream. `wait_ms`: how long a turn may wait for the limits."""

    def __init__(
        self,
        terms: Terms,
        target: Target,
        account: UpstreamAccount,
        budgets: Budgets,
        wait_ms: int,
    ) -> None:
        self.count = 0
        self.charge = NO_CHARGE
        self._received_s = self._taken_s = 0.0  # of the client's audio: received, admitted
        self._terms = terms
        self._target = target
        self._account = account
        self._budgets = budgets
        self._wait_ms = wait_ms
        self._ahead: UUID | None = None  # the reservation for the next turn
        self._extra = NO_CHARGE  # usage besides turns, not charged to a budget yet
        self._begins = 0
        self._context_tokens = 0  # size of the conversation, by the last turn's report
        self._sent_tokens = 0.0  # estimate of what the client has sent since then
        self._requested: list[RealtimeTurn] = []  # requested by the client, not begun yet
        self._begun: list[RealtimeTurn] = []
        self._late: list[RealtimeTurn] = []  # begun by the provider, not admitted yet

    # Before a turn

    async def open(self) -> None:
        """Reserve the first turn. Raises the error of a budget that has no room for it."""
        await self._budgets.known()
        self._ahead = await self._reserve()

    def opened(self, first: str, context_tokens: int) -> None:
        """Count the message that opens the session, with its instructions and tools, and the
        conversation that it resumes."""
        self._context_tokens, self._sent_tokens = context_tokens, about_text(first)

    @property
    def context_tokens(self) -> int:
        """Return about how many tokens the conversation has."""
        return self._context_tokens + ceil(self._sent_tokens)

    async def ask(
        self, *, joins: bool = False, continues: bool = False, event_id: str | None = None
    ) -> None:
        """Wait until the limits admit a turn that the client begins. Raises AdmissionError and the
        errors of budgets; then the turn must not begin. joins: it may take the place of one that
        was answered together with another. continues: it is part of a turn in progress, if any."""
        if continues and self._begun:
            return
        if joins and (left := self._answered_together()) is not None:
            left.after = self._begins
            return
        if len(self._requested) >= MOST_REQUESTED:
            message = f"{MOST_REQUESTED} turns of this session have been requested and not begun"
            raise QueueFull(message, limit="turns", retry_after_ms=_RETRY_AFTER_MS)
        turn = await self._new()
        turn.event_id, turn.joins, turn.after = event_id, joins, self._begins
        try:
            await asyncio.shield(turn.admitted)
        except BaseException:  # whatever ends the wait, its place is released
            await self._end(turn, None)
            raise
        self._requested.append(turn)

    def _answered_together(self) -> RealtimeTurn | None:
        """Return a turn that was requested before the last turn began, which seems to have answered
        it."""
        return next(
            (one for one in self._requested if one.joins and one.after < self._begins), None
        )

    async def may_go_on(self) -> None:
        """Wait until the limits have admitted the turns that the provider has begun by itself.
        Raises as `ask`."""
        while self._late:
            await asyncio.shield(self._late[0].admitted)
            self._late.pop(0)

    async def sent(self, event: ClientEvent) -> None:
        """Wait until the limits have admitted the audio of a message that the client sends. Raises
        as `ask`."""
        self._sent_tokens += event.about_tokens
        account, received_s = self._account, self._received_s + event.audio_seconds
        while received_s > self._taken_s:
            demand = self._audio_demand()
            if demand.limits:
                to_admit = demand.to_admit(self._wait_ms, account.hard_ms)
                async with account.limiter.acquire_for(to_admit) as permit:
                    permit.settle(Outcome.SUCCESS, audio_seconds=demand.audio_seconds)
                self._taken_s += demand.audio_seconds
            else:
                self._taken_s = received_s + _AUDIO_STEP_S
        self._received_s = received_s

    @property
    def usage(self) -> Usage:
        """Return the usage of the session, with at least the audio that the client sent: a
        transcript may report the same seconds."""
        usage, received_s = self.charge.usage, ceil(self._received_s)
        if received_s <= (seconds_of(usage) or 0):
            return usage
        details = replace(usage.details or UsageDetails(), input_audio_seconds=received_s)
        return replace(usage, details=details)

    # Reports of the provider

    async def take(self, reported: Reported) -> None:
        """Process the report of a message. Raises the error of a budget that has no room for
        another turn, and UpstreamGarbled for too many turns in progress."""
        if reported.refuses and reported.about is None:
            self._doubt()
        elif reported.refuses and (turn := self._refused(reported.about)) is not None:
            self._requested.remove(turn)
            await self._end(turn, None)
        if reported.begins_turn:
            await self._begin()
        if reported.about_tokens:
            turn = self._begun[0] if self._begun else await self._begin()
            turn.received_tokens += reported.about_tokens
        for spent in reported.spent:
            if spent.ends_turn:
                await self._close(spent.usage)
            else:
                await self._add(spent)
        if reported.ends_turn and not reported.spent and self._begun:
            turn = self._begun.pop(0)  # it was cancelled, or has failed
            await self._end(turn, self._cut_charge(turn))

    def _refused(self, event_id: str | None) -> RealtimeTurn | None:
        """Return the turn whose message the provider has rejected, if any: other messages have ids
        too."""
        return next((one for one in self._requested if one.event_id == event_id), None)

    def _doubt(self) -> None:
        """Note an error that names no message: it may have rejected the oldest turn."""
        for turn in self._requested:
            if turn.doubted_at is None:
                turn.doubted_at = asyncio.get_running_loop().time()
                return

    async def end_unbegun(self) -> None:
        """End turns that seem to have been rejected, since they do not begin. Called repeatedly."""
        now = asyncio.get_running_loop().time()
        for turn in [one for one in self._requested if one.doubted_at is not None]:
            if now - (turn.doubted_at or 0.0) >= UNBEGUN_S and turn in self._requested:
                self._requested.remove(turn)
                await self._end(turn, None)

    async def _begin(self) -> RealtimeTurn:
        if len(self._late) >= _MOST_LATE or len(self._begun) >= _MOST_BEGUN:
            raise UpstreamGarbled("the provider starts turns without ending any")
        self._begins += 1
        if self._requested:
            turn = self._requested.pop(0)
        else:
            turn = await self._new()
            if not turn.admitted.done():
                self._late.append(turn)
        self._begun.append(turn)
        return turn

    async def _close(self, usage: Usage) -> None:
        turn = self._begun[0] if self._begun else await self._begin()
        self._begun.remove(turn)
        self._context_tokens = (usage.input_tokens or 0) + (usage.output_tokens or 0)
        self._sent_tokens = 0.0
        await self._end(turn, charge_of(self._rates(), usage, None, whole=True), usage)
        if self._ahead is None:
            self._ahead = await self._reserve()

    async def close(self) -> None:
        """End all turns: those that have begun are charged for their output so far."""
        for turn in self._begun:
            await self._end(turn, self._cut_charge(turn))
        while (left := self._answered_together()) is not None:
            self._requested.remove(left)
            await self._end(left, None)
        for turn in self._requested:
            await self._end(turn, self._cut_charge(turn))  # it may have begun
        self._begun, self._requested = [], []
        for turn in self._late:
            await self._charge_late(turn)
        self._late = []
        if self._ahead is not None:
            extra, self._extra = self._extra, NO_CHARGE
            self._budgets.settle(self._ahead, None if extra is NO_CHARGE else extra)
            self._ahead = None

    # The life of a turn

    async def _new(self) -> RealtimeTurn:
        loop = asyncio.get_running_loop()
        hold, self._ahead = self._ahead, None
        if hold is None:
            hold = await self._reserve()
        demand = self._demand()
        turn = RealtimeTurn(demand, hold, loop.create_future(), loop.create_future())
        if demand is None:
            turn.admitted.set_result(None)
        else:
            turn.task = loop.create_task(self._under_permit(turn, demand))
        return turn

    async def _under_permit(self, turn: RealtimeTurn, demand: CallDemand) -> None:
        to_admit = demand.to_admit(self._wait_ms, self._account.hard_ms)
        try:
            async with self._account.limiter.acquire_for(to_admit) as permit:
                turn.admitted.set_result(None)
                used = await turn.ended
                if used is None:
                    permit.settle_unused()
                else:
                    reported, charge = used
                    tokens = demand.used(reported, charge.usage, whole=True)
                    permit.settle(Outcome.SUCCESS, tokens=tokens, cost_micros=charge.cost_micros)
        except TidegateError as error:
            if not turn.admitted.done():
                turn.admitted.set_exception(error)
                turn.admitted.exception()  # marks it as retrieved: a waiter may have given up

    async def _end(
        self, turn: RealtimeTurn, charge: Charge | None, stated: Usage = UNKNOWN_USAGE
    ) -> None:
        """Charge a turn (None if there was none), and release its permit."""
        if charge is not None:
            self.count += 1
            self.charge = _both(self.charge, charge)
        elif self._ahead is None:  # the next turn gets its reservation
            self._ahead, turn.hold = turn.hold, None
        if turn.hold is not None:
            whole = charge
            if charge is not None and self._extra is not NO_CHARGE:
                whole, self._extra = _both(charge, self._extra), NO_CHARGE
            self._budgets.settle(turn.hold, whole)
            turn.hold = None
        turn.ended.set_result(None if charge is None else (stated, charge))
        task = turn.task
        if task is None or (charge is not None and not turn.admitted.done()):
            return  # it still waits for the limits, which must count it
        if not turn.admitted.done():
            task.cancel()
        await asyncio.wait({task})

    async def _charge_late(self, turn: RealtimeTurn) -> None:
        """Charge an ended turn to the rates that have not admitted it yet, without waiting for them
        any longer."""
        if turn.task is not None and not turn.is_admitted:
            turn.task.cancel()
            await asyncio.wait({turn.task})
        used = turn.ended.result() if turn.ended.done() else None
        if turn.demand is not None and not turn.is_admitted and used is not None:
            await self._count(turn.demand.limits, used[1])

    async def _count(self, limits: tuple[str, ...], charge: Charge) -> None:
        """Charge usage to rates that have not admitted it."""
        limiter = self._account.limiter
        for limit_id in limits:
            amount = _amount(limiter.policy.limit(limit_id), charge)
            if amount:
                with suppress(LimiterUnavailable):  # counts nothing while unavailable
                    await limiter.charge(limit_id, amount)

    def _cut_charge(self, turn: RealtimeTurn) -> Charge:
        """Return the charge of a turn without a reported usage: its input, and its output so
        far."""
        return estimated_charge(self._rates(), self._estimate(), ceil(turn.received_tokens))

    def _rates(self) -> Rates | None:
        return self._account.demands.prices.at_least(self._target.model, "")

    async def _add(self, spent: Spent) -> None:
        """Add usage besides turns: of another model, for example for a transcript, which counts for
        that model's rates, or of searches. It is part of the session's cost. Budgets are charged
        with the open turn if there is one, otherwise now; raises as `take`."""
        rates = self._account.demands.prices.at_least(spent.model or self._target.model, "")
        charge = charge_of(rates, spent.usage, None, whole=True)
        if spent.model is not None:
            await self._count(self._rates_of(spent.model), charge)
        self.charge = _both(self.charge, charge)
        self._extra = _both(self._extra, charge)
        if self._ahead is not None:  # no turn is open whose end would charge it
            ahead, self._ahead = self._ahead, None
            extra, self._extra = self._extra, NO_CHARGE
            self._budgets.settle(ahead, extra)
            self._ahead = await self._reserve()

    def _rates_of(self, model: str) -> tuple[str, ...]:
        """Return the rates for transcripts of another model. Limits on requests count only if they
        are that model's alone, since transcripts are not turns."""
        other, own, policy = self._demand(model), self._demand(), self._account.limiter.policy
        known = () if own is None else own.limits
        limits = () if other is None else other.limits
        of_turns = {one for one in known if getattr(policy.limit(one), "unit", "") == "requests"}
        return tuple(one for one in limits if one not in of_turns)

    def _audio_demand(self) -> CallDemand:
        """Return the demand of the client's next seconds of audio on the limits that count
        audio."""
        account, terms, policy = self._account, self._terms, self._account.limiter.policy
        tenant, model = terms.caller.tenant_id, self._target.model
        tags = (terms.caller.key_id, terms.subject, terms.conversation)
        found = account.demands.limits(policy, REALTIME_KIND, model, tenant, 0, _AUDIO_STEP_S, tags)
        bounds = {
            one: limit.bound
            for one in found
            if isinstance(limit := policy.limit(one), Rate | Quota)
            and limit.unit == "audio_seconds"
        }
        demand = account.demands.of_native(
            model, REALTIME_KIND, pieces_of(""), policy, tenant=tenant, priority=terms.priority
        )
        step_s = max(1, min([_AUDIO_STEP_S, *bounds.values()]))
        return CallDemand(tuple(bounds), tenant, demand.priority, 0, audio_seconds=step_s)

    # Bounds of a turn

    def _demand(self, model: str = "") -> CallDemand | None:
        """Return the demand of the next turn, or of a transcript by another model, on the rates;
        None if no rate applies."""
        account, terms = self._account, self._terms
        demand = account.demands.of_native(
            model or self._target.model,
            REALTIME_KIND,
            pieces_of(""),
            account.limiter.policy,
            tenant=terms.caller.tenant_id,
            priority=terms.priority,
            tags=(terms.caller.key_id, terms.subject, terms.conversation),
            estimates_all=True,
        )
        rates = tuple(one for one in demand.limits if is_rate(account, one))
        if not rates:
            return None
        estimate = self._estimate()
        return replace(demand, limits=rates, estimate=estimate)

    def _estimate(self) -> Estimate:
        account, model = self._account, self._target.model
        estimate = account.demands.estimator.of_pieces(
            model, REALTIME_KIND, pieces_of(""), tenant=self._terms.caller.tenant_id
        )
        taken = max(1, self.context_tokens)
        return replace(
            estimate,
            input_tokens=taken,
            expected_input_tokens=taken,
            guessed_input_tokens=taken,
        )

    async def _reserve(self) -> UUID | None:
        """Reserve the possible cost of a turn from the budgets that apply to it; None if none
        does."""
        bindings = self._bindings()
        if not bindings:
            return None
        model, prices = self._target.model, self._account.demands.prices
        context_tokens, most_output = prices.most(model)
        cost = call_cost(
            prices.bound(model, ""),
            self._estimate(),
            input_bytes=0,
            context_tokens=context_tokens,
            unseen=_UNSEEN,
            max_output_tokens=most_output,
        )
        until = asyncio.get_running_loop().time() + self._wait_ms / 1000
        while True:
            try:
                return await self._budgets.reserve(bindings, self._terms.request_id, cost)
            except BudgetReserved:
                left_s = until - asyncio.get_running_loop().time()
                if left_s <= 0:
                    raise
                await self._budgets.room(left_s)

    def _bindings(self) -> tuple[Binding, ...]:
        if not self._budgets.any:
            return ()
        terms = self._terms
        return self._budgets.binding(
            terms.caller, self._target.model, terms.subject, terms.conversation
        )


def _both(one: Charge, other: Charge) -> Charge:
    """Return the sum of two charges; its cost is unknown if one of theirs is."""
    cost: int | None = None
    if one.cost_micros is not None and other.cost_micros is not None:
        cost = one.cost_micros + other.cost_micros
    state = other.state
    if one.state not in (UsageState.NONE, other.state):
        state = UsageState.PARTIAL
    return Charge(state, add_usage(one.usage, other.usage), None, cost)


def _amount(limit: Limit | None, charge: Charge) -> int:
    """Return how much a charge counts for a limit."""
    if not isinstance(limit, Rate | Quota):
        return 0
    input_tokens, output_tokens = tokens_of(charge.usage)
    match limit.unit:
        case "requests":
            return 1
        case "usd":
            return charge.cost_micros or 0
        case "tokens":
            return (input_tokens or 0) + (output_tokens or 0)
        case "input_tokens":
            return input_tokens or 0
        case "output_tokens":
            return output_tokens or 0
        case "uncached_input_tokens":
            return max(0, (input_tokens or 0) - (charge.usage.cached_tokens or 0))
    return 0
