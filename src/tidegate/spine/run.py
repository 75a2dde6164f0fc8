"""Spine: the path of every call upstream, whatever its exchange.

    targets ──► admission ──► budgets ──► exchange ──► settle, charge ──► release
       ▲                                    │
       └── retry, at the same or the next upstream, while nothing was sent to the client

Native calls, `/stream`, jobs, batch lines, the classifier and realtime sessions differ only in
their `CallExchange`: bytes in a provider's dialect (`spine/native.py`), a prompt
(`spine/prompt.py`) or two WebSockets (`realtime/exchange.py`). The spine fills the call's
`CallRecord`; the front that made the call ends and stores the record.

Invariants: a permit is held exactly while its upstream call is open; at a server that continues
without its client, until that server has finished (`spine/out.py`). A retry or a failover happens
only before anything was sent to the client, within the deadline and the retry budget. An upstream's
failure is counted in its health before the permit is released.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from math import inf
from random import random
from typing import Any, Protocol
from uuid import UUID

from tidegate.admission.charges import Prices
from tidegate.admission.demand import CallDemand, Demands, tokens_read
from tidegate.admission.estimator import Learned
from tidegate.call import DEFAULT_POOL, CallCost, Caller, Outcome, seconds_of
from tidegate.dialects import refusals
from tidegate.dialects.headers import of_answer, to_return
from tidegate.dialects.spec import Dialect, Headers, Operation
from tidegate.errors import (
    BudgetExceeded,
    BudgetReserved,
    BudgetUnbounded,
    DeadlineExceeded,
    DemandImpossible,
    InvalidRequest,
    LeaseLost,
    LimitPaused,
    LimitUsedUp,
    NotFound,
    QueueFull,
    QuotaExceeded,
    TidegateError,
    UpstreamDrained,
    UpstreamError,
    UpstreamGarbled,
    UpstreamThrottled,
    UpstreamTierBusy,
    UpstreamUnauthorized,
)
from tidegate.limiter import Limiter, Permit, PoolPolicy
from tidegate.policy.deployment import CONNECT_TIMEOUT, Preempt, Upstream
from tidegate.prices.budgets import Binding
from tidegate.record import CallRecord, PieceDecoder, coding_of, decoded
from tidegate.settings import Config
from tidegate.spine.affinity import Affinity, Home
from tidegate.spine.preemption import Preemption
from tidegate.spine.routing import (
    Gate,
    Gates,
    NotWorthWaiting,
    PatientAdmission,
    RemainingCapacity,
    RetryBudget,
    Suspect,
    Target,
    Targets,
    WatchBudgets,
)
from tidegate.store.budgets import Budgets
from tidegate.store.spill import CallJournal
from tidegate.telemetry.tracing import Tracing, Trail
from tidegate.upstream.transport import Exchange, Timeouts

MOST_TRIES = 4
_REFUSAL_BYTES = 1_000_000
_SHORTEST_SECRET_BYTES = 8  # a shorter key, such as `none`, is no secret
_HARD_MARGIN_MS = 5_000  # to close and record the call after its own total timeout
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
_ROOM_WITHIN_MS = 60_000  # a call without a deadline checks its budget again after this time
_LAST_TRY_MS = 100  # a retry later than this before the deadline would fail at a limit

OnAdmitted = Callable[[Permit | None], Awaitable[None]]


class CallFailed(Exception):
    """A call that failed: the upstream's refusal or fault, with its own error body if it sent one.

    status: 0 if the upstream did not answer. paused_ms: how long this failure paused a limit of the
    call. reported: the client has already received the error, in the answer's body."""

    def __init__(
        self,
        error: UpstreamError,
        target: Target,
        *,
        status: int = 0,
        headers: Headers | None = None,
        body: bytes = b"",
        reported: bool = False,
    ) -> None:
        super().__init__(error.message)
        error.at_upstream = target.upstream.name
        self.error = error
        self.target = target
        self.status = status
        self.headers = headers or []
        self.body = body
        self.paused_ms = 0
        self.reported = reported

    def named(self, queue_ms: float) -> CallFailed:
        """Add the response headers that name the upstream, and return this exception."""
        self.headers += of_answer(self.target.upstream.name, queue_ms)
        return self


async def refusal_of(
    exchange: Exchange, target: Target, dialect: str, tier: str = "", *, calls_model: bool = False
) -> CallFailed:
    """Return the failure that an unsuccessful answer reports, from its body as far as it arrived.
    `tier`: the requested one. `calls_model`: the request was for a model's answer. Raises
    UpstreamGarbled for a status below 400."""
    body, status = await exchange.read_refusal(_REFUSAL_BYTES), exchange.status
    if status < 400:
        raise UpstreamGarbled(f"the provider answered {status}, which is not followed")
    headers = exchange.headers
    coding = coding_of(headers)
    text = decoded(body, coding) if coding else body
    if coding and (not exchange.at_end or masked(text, target) != text):  # relayed decoded
        body, headers = text, [pair for pair in headers if pair[0].lower() != b"content-encoding"]
    stated = refusals.error_of_refusal_in(text)
    named = {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in exchange.headers
    }
    secret = target.upstream.key
    error = refusals.upstream_error(
        status,
        stated,
        named,
        secret=secret,
        dialect=dialect,
        tier=tier,
        is_own=target.upstream.is_own,
        calls_model=calls_model,
    )
    returned = to_return(headers, secret, same_length=False)
    return CallFailed(error, target, status=status, headers=returned, body=masked(body, target))


HELD_S = 2.0
HELD_BYTES = 65_536


async def beginning_of(
    exchange: Exchange, operation: Operation, coding: bytes, *, streams: bool
) -> tuple[bytes, dict[str, Any] | None]:
    """Return the first bytes of an answer, up to its first output if it `streams`, and the error
    object that it reports before any output, or None. Bytes that are compressed by `coding` are
    decoded to be inspected. Raises UpstreamError. Cancellation leaves the exchange open."""
    reader = PieceDecoder(coding) if coding else None
    first = await exchange.next()
    text = first if reader is None else reader.take(first)
    whole = exchange.at_end
    if why := refusals.no_answer(operation, exchange.headers, first, at_end=whole):
        message = f"the provider answered {exchange.status} with {why}"
        raise UpstreamGarbled(message, is_empty=not first.strip())
    if streams and (reader is None or reader.reads):
        prelude = refusals.Prelude()
        until = asyncio.get_running_loop().time() + HELD_S
        holds = prelude.holds(text, at_end=exchange.at_end)
        while holds and not exchange.at_end and len(first) < HELD_BYTES:
            try:
                async with asyncio.timeout_at(until):
                    piece = await exchange.next()
            except TimeoutError:
                break
            first += piece
            plain = piece if reader is None else reader.take(piece)
            if reader is not None and not reader.reads:
                break
            text += plain
            holds = prelude.holds(plain, at_end=exchange.at_end)
        if prelude.is_events:
            return first, prelude.error
    # Neither half a line nor the head of compressed data can be inspected.
    while (
        (streams and refusals.is_too_short(text))
        or (reader is not None and reader.reads and not text)
    ) and not exchange.at_end:
        piece = await exchange.next()
        first += piece
        text += piece if reader is None else reader.take(piece)
    if not refusals.may_begin_with_error(text):
        return first, refusals.error_without_output(text) if whole or exchange.at_end else None
    while (value := refusals.error_event_in(text)) is None:
        if exchange.at_end or len(text) > refusals.LONGEST_BYTES:
            return first, None
        piece = await exchange.next()
        first += piece
        text += piece if reader is None else reader.take(piece)
    return first, value


def masked(body: bytes, target: Target) -> bytes:
    """Return a body with the upstream's keys replaced by `***`."""
    for secret in target.upstream.secrets:
        key = secret.encode()
        if len(key) >= _SHORTEST_SECRET_BYTES:
            body = body.replace(key, b"***")
    return body


def _is_there() -> bool:
    return False


@dataclass(slots=True)
class Terms:
    """Terms of a call: who makes it, how long it may wait, and how often it may be tried.

    received: on the monotonic clock; wait_ms: from then until admission, None without a deadline.
    has_own_deadline: the caller set it; it then decides the order among its tenant's calls. left:
    whether the client has disconnected or cancelled. subject: the end user the call is about.
    repeats: whether a failed call is retried in here, and whether an estimated wait may reject it
    before its deadline; if not, a queue does both. most_tries: over all upstreams. waits_out: wait
    for a pause that outlasts the deadline, since the pause may be ended early. preempted: how often
    the call has been preempted; None if it must not be. upstream: the only one it may go to, if it
    is bound to one.
    """

    request_id: UUID
    caller: Caller
    received: float
    wait_ms: int | None = None
    priority: int = 0
    trail: Trail | None = None
    repeats: bool = True
    most_tries: int = MOST_TRIES
    waits_out: bool = False
    subject: str | None = None
    conversation: str | None = None
    preempted: int | None = None
    has_own_deadline: bool = False
    left: Callable[[], bool] = _is_there
    upstream: str | None = None

    def left_ms(self) -> float:
        """Return the time until the admission deadline: negative after it, infinite without one."""
        if self.wait_ms is None:
            return inf
        return round(self.wait_ms - (time.monotonic() - self.received) * 1000)


@dataclass(frozen=True, slots=True)
class UpstreamAccount:
    """An upstream's gate, limiter and demands in this process. hard_ms: when a call has hung."""

    gate: Gate
    limiter: Limiter
    demands: Demands
    remaining: RemainingCapacity
    hard_ms: int


class CallExchange(Protocol):
    """A call's exchange with an upstream; the spine decides where, when and how often."""

    terms: Terms
    bills: bool  # whether the call costs money, so that budgets apply to it

    ended_alone: bool  # whether the answer was completed after the client had left

    @property
    def started(self) -> bool:
        """Whether a part of the answer was sent to the client: then there is no retry."""

    @property
    def has_response(self) -> bool:
        """Whether a part of the answer may have arrived from the upstream in this attempt."""

    def serving(self, targets: Targets, model: str) -> list[Target]:
        """Return the targets for another model. Raises NotFound and InvalidRequest."""

    def elsewhere(self, targets: Targets) -> list[Target]:
        """Return the targets among today's upstreams; none for a call that is bound to those it
        has. Raises NotFound and InvalidRequest."""

    def demand(self, target: Target, account: UpstreamAccount) -> CallDemand:
        """Return which limits the call takes at a target, and how much of each."""

    def cost(self, target: Target, account: UpstreamAccount, demand: CallDemand) -> CallCost:
        """Return the call's expected and its greatest possible cost at a target."""

    async def make(
        self, target: Target, account: UpstreamAccount, demand: CallDemand, *, is_try: bool
    ) -> None:
        """Make the call and relay its answer. `is_try`: the call is the upstream's probe.

        Raises CallFailed, and errors of the client's side. Cancellation closes the upstream call.
        """

    def settle(
        self,
        target: Target,
        account: UpstreamAccount,
        demand: CallDemand,
        *,
        whole: bool,
        failed: CallFailed | None,
    ) -> int | None:
        """Read the answer's usage and facts into the record, and set its charge. Return the number
        of images to count, None if that is unknown. `whole`: the answer was completed."""

    def suspect(self) -> Suspect:
        """Return the request that may itself have caused a fault of the upstream."""


class Spine:
    """Makes the calls of one process, over the limiters of all pools."""

    def __init__(
        self,
        *,
        config: Config,
        targets: Targets,
        pools: Mapping[str, Limiter],
        tracing: Tracing,
        budgets: Budgets,
        journal: CallJournal,
    ) -> None:
        self.journal = journal
        self.targets = targets
        self.tracing = tracing
        self.budgets = budgets
        self.preemption = Preemption()
        self.retries = RetryBudget()
        self.affinity = Affinity(config.cache_wait_us_per_token)
        self._config = config
        self.health = Gates()
        self._accounts: dict[str, UpstreamAccount] = {}
        self.timeouts: dict[str, Timeouts] = {}
        for upstream in targets.upstreams.values():
            if upstream.pool in pools:
                self.install(upstream, pools[upstream.pool])
            else:
                self.timeouts[upstream.name] = timeouts_of(config, upstream)

    def install(self, upstream: Upstream, limiter: Limiter) -> None:
        """Add an upstream, or replace it by its new version; what was learned of it is kept."""
        name = upstream.name
        before = self._accounts.get(name)
        if before is not None and before.limiter is not limiter:
            before = None
        gate = Gate(name, limiter, upstream.identity())
        if before is not None:
            gate = before.gate.renewed(gate)
        self.timeouts[name] = timeouts = timeouts_of(self._config, upstream)
        self._accounts[name] = UpstreamAccount(
            gate,
            limiter,
            Demands(
                None if before is None else before.demands.estimator,
                kinds_optional=name != DEFAULT_POOL,
                prices=Prices(upstream),
            ),
            RemainingCapacity(limiter) if before is None else before.remaining,
            timeouts.total_ms + _HARD_MARGIN_MS,
        )
        self.health[name] = gate
        gate.drain(name in self.targets.drained)

    def withdraw(self, name: str) -> None:
        """Remove an upstream for new calls; calls that have begun keep it."""
        if (gate := self.health.pop(name, None)) is not None:
            gate.drain(True)

    def forget(self, name: str) -> None:
        """Drop a withdrawn upstream for which no call holds a permit or waits any more."""
        if name not in self.health:
            self._accounts.pop(name, None)
            self.timeouts.pop(name, None)

    def run(
        self,
        exchange: CallExchange,
        record: CallRecord,
        targets: list[Target],
        on_admitted: OnAdmitted | None = None,
        home: Home | None = None,
    ) -> Coroutine[Any, Any, None]:
        """Make the call at the first of the targets that admits it, and fill `record`.

        home: of its conversation, if any. `on_admitted` is called before each attempt, under its
        permit; if it raises, the call ends and nothing was sent. Raises CallFailed with the last
        upstream's error, AdmissionError, BudgetExceeded, CallPreempted, LeaseLost and
        StoreUnavailable. Cancellation leaves neither a waiter nor an open upstream call.
        """
        self.retries.earn()
        return _Run(self, exchange, record, on_admitted, home).until_answered(targets)

    def account(self, target: Target) -> UpstreamAccount:
        """Return the account of a target's upstream. Raises UpstreamDrained if that was removed."""
        if (account := self._accounts.get(target.upstream.name)) is None:
            raise UpstreamDrained("the upstream of the call was removed while it waited")
        return account

    def first_of(self, dialect: Dialect) -> Target:
        """Return the dialect's first upstream, for a call without a model. Raises NotFound."""
        upstreams = self.targets.in_service(dialect)
        if not upstreams:
            raise NotFound(f"no upstream speaks the {dialect} dialect")
        return Target(upstreams[0], "")

    def check_bounded(self, exchange: CallExchange, targets: Sequence[Target]) -> None:
        """Raises BudgetUnbounded for a call whose greatest possible cost is unknown at each of its
        targets, so that a budget would reject it at all of them."""
        terms, budgets, error = exchange.terms, self.budgets, None
        for target in targets:
            bound = budgets.binding(terms.caller, target.model, terms.subject, terms.conversation)
            account = self.account(target)
            try:
                cost = exchange.cost(target, account, exchange.demand(target, account))
                budgets.refusal(bound, cost)
            except BudgetUnbounded as unbounded:
                error = error or unbounded
            else:
                return
        if error is not None:
            raise error

    def usable(self, targets: list[Target]) -> list[Target]:
        """Return the targets that are not out; if all are out, all of them, the first to be back
        first. A removed upstream is returned only if there is no other."""
        targets = [one for one in targets if one.upstream.name in self._accounts] or targets[:1]
        if len(targets) == 1:
            return targets
        found = [one for one in targets if self.account(one).gate.state != "out"]
        return found or sorted(targets, key=lambda one: self.account(one).gate.ready_in_ms())

    def policy(self, target: Target) -> PoolPolicy | None:
        """Return the limits in force at an upstream; None for one that was removed."""
        account = self._accounts.get(target.upstream.name)
        return None if account is None else account.limiter.policy

    def estimates(self) -> tuple[Learned, ...]:
        """Return the errors of this process's token estimates, at the account of GEMINI_API_KEY."""
        account = self._accounts.get(DEFAULT_POOL)
        return () if account is None else account.demands.estimator.error()


_Never = dict[int, DemandImpossible | DeadlineExceeded | QueueFull]


class _Run:
    """One call: its attempts, until it is answered or has failed."""

    def __init__(
        self,
        spine: Spine,
        exchange: CallExchange,
        record: CallRecord,
        on_admitted: OnAdmitted | None,
        home: Home | None,
    ) -> None:
        self._home = home
        self._spine = spine
        self._exchange = exchange
        self._terms = exchange.terms
        self._record = record
        self._on_admitted = on_admitted
        self._budgets = spine.budgets if exchange.bills and spine.budgets.any else None
        self._trying: Target | None = None
        self._is_answered = False  # the answer is complete and was sent to the client
        self._refusals: dict[tuple[str, str] | None, QuotaExceeded] = {}

    async def until_answered(self, targets: list[Target]) -> None:
        spine, terms = self._spine, self._terms
        left = spine.usable(targets)
        if self._budgets is not None:
            await self._budgets.known()
        began = datetime.now(UTC)
        while True:
            tries = self._record.attempts
            try:
                policies = list(map(spine.policy, left))
                await self._by_one_of(left)
                return
            except LeaseLost:
                if self._is_answered:
                    return  # the call has succeeded; the permit is not needed any more
                if self._record.attempts > tries or not terms.repeats:
                    raise
                self._record.begin_again()  # its permit was lost before the call was made
            except DemandImpossible:
                # A limit was removed while the call waited: it requests those now in force.
                now = map(spine.policy, left)
                if all(one is other for one, other in zip(policies, now, strict=True)):
                    raise
            except UpstreamDrained:
                targets = left = self._elsewhere()
                if not left:
                    raise
            except BudgetReserved as reserved:
                if terms.left_ms() <= 0 or not terms.repeats:  # a queue retries it
                    raise
                self._record.wait_for_budget(str(reserved.limit), began)
                room_ms = min(terms.left_ms(), _ROOM_WITHIN_MS)
                await spine.budgets.room(room_ms / 1000)
                if terms.left_ms() < _LAST_TRY_MS:
                    raise
                left = left if self._refusals else self._elsewhere() or left
            except (BudgetExceeded, BudgetUnbounded) as spent:
                self._refusals[_place(self._trying)] = spent
                left = self._affordable(left)
                if not left:
                    targets, self._home = self._instead(spent), None  # that of another model
                    left = spine.usable(targets)
                if not left:
                    raise max(self._refusals.values(), key=lambda one: one.retryable) from None
            except CallFailed as failed:
                if not self._worth_another(failed):
                    raise
                left = [one for one in left if one is not failed.target]
                if not left:
                    again = terms.repeats and failed.error.retryable
                    if not (again and await self._pause(failed)):
                        raise
                    left = [
                        one for one in spine.usable(targets) if _place(one) not in self._refusals
                    ]
                    if not left:
                        raise
                self._record.begin_again()

    def _elsewhere(self) -> list[Target]:
        """Return new targets for a call whose upstream was drained, or that waits for a budget."""
        found: list[Target] = []
        with suppress(NotFound, InvalidRequest):
            if self._terms.upstream is None:
                found = self._exchange.elsewhere(self._spine.targets)
        if self._refusals and all(_place(one) in self._refusals for one in found):
            found = self._instead(next(iter(self._refusals.values())))
        left = [one for one in self._spine.usable(found) if _place(one) not in self._refusals]
        return [one for one in left if not self._spine.account(one).gate.drained]

    def _affordable(self, targets: list[Target]) -> list[Target]:
        """Return the targets that no budget refuses, as far as is known: a later may be cheaper."""
        assert self._budgets is not None
        found = []
        for target in targets:
            if _place(target) in self._refusals or self._spine.policy(target) is None:
                continue
            account = self._spine.account(target)
            cost = self._exchange.cost(target, account, self._exchange.demand(target, account))
            with suppress(BudgetUnbounded):  # the attempt there raises it
                if (refused := self._budgets.refusal(self._binding(target), cost)) is not None:
                    self._refusals[_place(target)] = refused
                    continue
            found.append(target)
        return found

    def _instead(self, spent: QuotaExceeded) -> list[Target]:
        """Return the targets of a spent budget's cheaper model. Empty if there is no such model,
        the caller may not request it, or a budget has refused it too."""
        refusals = [spent, *self._refusals.values()]
        models = (one.fallback for one in refusals if isinstance(one, BudgetExceeded))
        for model in filter(None, models):
            found: list[Target] = []
            if self._terms.upstream is None and self._terms.caller.may_ask(model):
                with suppress(NotFound, InvalidRequest):
                    found = self._exchange.serving(self._spine.targets, model)
            if found := [one for one in found if _place(one) not in self._refusals]:
                return found
        return []

    def _binding(self, target: Target) -> tuple[Binding, ...]:
        """Return the budgets that apply to the call at a target, usually none."""
        assert self._budgets is not None
        terms = self._terms
        return self._budgets.binding(terms.caller, target.model, terms.subject, terms.conversation)

    def _worth_another(self, failed: CallFailed) -> bool:
        if self._exchange.started or self._terms.left_ms() <= 0:
            return False
        if failed.error.is_busy and failed.paused_ms:
            return True  # retry until the deadline: the pauses protect the server
        again = failed.error.retryable or isinstance(failed.error, UpstreamUnauthorized)
        again = again and self._record.attempts < self._terms.most_tries
        return again and self._spine.retries.spend()

    async def _pause(self, failed: CallFailed) -> bool:
        """Back off before a retry at the same upstream; False if the deadline would come first. If
        the upstream's 429 paused a limit, the call waits in that limit's queue instead."""
        left_ms = self._terms.left_ms()
        if failed.paused_ms:
            return failed.paused_ms < left_ms
        after_ms = failed.error.retry_after_ms
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self._record.attempts - 1))
        pause_s = (after_ms or 0) / 1000 + longest_s * (0.5 + random() / 2)
        if pause_s * 1000 >= left_ms:
            return False
        await asyncio.sleep(pause_s)
        return self._terms.left_ms() > 0  # the sleep may have taken longer

    async def _by_one_of(self, targets: list[Target]) -> None:
        """Make the call at the first target with free capacity; else wait at the first in order
        whose pause ends before the deadline. A conversation's home is the first in order."""
        home = self._home
        if home is not None and home.is_known:
            targets = [targets[place] for place in home.places(targets)]
        demands = self._demands(targets)
        never: _Never = {}
        if len(targets) > 1:
            for place in range(len(targets)) if home is None else home.places(targets):
                target, demand = targets[place], demands[place]
                account = self._spine.account(target)
                self._trying = target
                try:
                    async with self._attempt(account, demand) as permit:
                        if account.gate.binds_more(demand, target.model):
                            if permit is not None:
                                permit.settle_unused()
                        elif permit is not None or not demand.limits:
                            await self._admitted(permit, target, account, demand)
                            return
                    if (
                        home is not None
                        and home.wait_ms
                        and target == home.target
                        and await self._waited_at_home(home)
                    ):
                        return
                except DemandImpossible as impossible:
                    never[place] = impossible
        while True:
            place, account = 0, self._spine.account(targets[0])
            if never or account.gate.may_hold:
                demands = self._demands(targets)
                place = self._to_wait_for(targets, demands, never)
                account = self._spine.account(targets[place])
            target, demand = targets[place], demands[place]
            self._trying = target
            self._record.waits_for = account.limiter.pool, demand.limits
            try:
                async with self._admission(target, account, demand) as permit:
                    await self._admitted(permit, target, account, demand)
                    return
            except NotWorthWaiting:
                continue  # in another queue, if one is worth waiting in
            except (LimitUsedUp, LimitPaused, QueueFull) as early:
                account.gate.announced.explain(early)
                if not self._record.waits or self._terms.left_ms() <= 0:
                    raise
                never[place] = early
            except DeadlineExceeded as late:
                account.gate.announced.explain(late)
                out = None if self._terms.waits_out else account.gate.out()
                raise out or late from None

    async def _waited_at_home(self, home: Home) -> bool:
        """Wait at the upstream that caches the conversation, for as long as its cache is worth.
        False if the call was not admitted within that time, or an estimate says it would not be."""
        record, began, target = self._record, datetime.now(UTC), home.target
        account = self._spine.account(target)
        demand, self._trying = self._exchange.demand(target, account), target
        wait_ms, home.wait_ms = home.wait_ms, 0.0  # wait only one time
        if account.gate.late(demand, wait_ms) is not None:
            return False
        record.waits_for = account.limiter.pool, demand.limits
        try:
            async with self._admission(target, account, demand, within_ms=wait_ms) as permit:
                await self._admitted(permit, target, account, demand)
                return True
        except (DeadlineExceeded, QueueFull):
            self._spine.affinity.waited(home, target, wait_ms)
            if not record.waits or self._terms.left_ms() <= 0:
                raise
        except NotWorthWaiting:
            pass  # a limit there was paused meanwhile
        record.waits_since = record.waits_since or began
        return False

    def _demands(self, targets: list[Target]) -> list[CallDemand]:
        return [self._exchange.demand(target, self._spine.account(target)) for target in targets]

    def _to_wait_for(self, targets: list[Target], demands: list[CallDemand], never: _Never) -> int:
        """Return the index of the first target whose queue is worth waiting in. Raises the error
        that can be retried first, DemandImpossible if no target could ever admit the call."""
        left_ms = inf if self._terms.waits_out else max(0, self._terms.left_ms())
        late: list[TidegateError] = [x for x in never.values() if x.code != DemandImpossible.code]
        for place, (target, demand) in enumerate(zip(targets, demands, strict=True)):
            if place in never:
                continue
            why = self._spine.account(target).gate.late(demand, left_ms)
            if why is None:
                return place
            late.append(why)
        raise min(late or never.values(), key=lambda one: one.retry_after_ms or inf)

    def _attempt(
        self, account: UpstreamAccount, demand: CallDemand
    ) -> AbstractAsyncContextManager[Permit | None]:
        if not demand.limits:
            return nullcontext()
        return account.limiter.try_acquire_for(demand.to_admit(None, account.hard_ms, once=True))

    def _admission(
        self, target: Target, account: UpstreamAccount, demand: CallDemand, within_ms: float = inf
    ) -> AbstractAsyncContextManager[Permit | None]:
        if not demand.limits:
            return nullcontext()
        terms = self._terms
        wait_ms = terms.left_ms()
        left_ms = min(wait_ms, within_ms)
        if left_ms <= 0:
            raise DeadlineExceeded("the deadline has passed", limit=demand.limits[0])
        to_admit = demand.to_admit(
            None if left_ms == inf else round(left_ms),
            account.hard_ms,
            by_estimate=terms.repeats,
            has_usual_deadline=not terms.has_own_deadline,
        )
        return PatientAdmission(
            account.limiter.acquire_for(to_admit),
            account.gate,
            demand,
            target.model,
            inf if terms.waits_out else wait_ms,
            None if self._budgets is None else self._watch(self._budgets, target, account, demand),
        )

    def _watch(
        self, budgets: Budgets, target: Target, account: UpstreamAccount, demand: CallDemand
    ) -> WatchBudgets | None:
        """Return a watcher that takes the call out of its queue once a budget of the call is spent.
        Raises the budget's error if it is known to be spent already."""
        bindings = self._binding(target)
        if not bindings:
            return None
        cost = self._exchange.cost(target, account, demand)
        if (error := budgets.refusal(bindings, cost)) is not None:
            raise error
        return partial(budgets.watch, bindings, cost)

    def _admitted(
        self, permit: Permit | None, target: Target, account: UpstreamAccount, demand: CallDemand
    ) -> Coroutine[Any, Any, None]:
        """Return the call, made under its permit and under its budgets, if it has any."""
        if self._budgets is not None and (bindings := self._binding(target)):
            return self._under_budgets(self._budgets, bindings, permit, target, account, demand)
        return self._under(permit, target, account, demand)

    async def _under_budgets(
        self,
        budgets: Budgets,
        bindings: tuple[Binding, ...],
        permit: Permit | None,
        target: Target,
        account: UpstreamAccount,
        demand: CallDemand,
    ) -> None:
        if permit is not None:
            permit.settle_unused()  # in case a budget refuses the call
        cost = self._exchange.cost(target, account, demand)
        hold = await budgets.reserve(bindings, self._terms.request_id, cost)
        try:
            await self._under(permit, target, account, demand)
        finally:
            if not self._record.handed_over:
                budgets.settle(hold, self._record.charge)

    async def _under(
        self, permit: Permit | None, target: Target, account: UpstreamAccount, demand: CallDemand
    ) -> None:
        """Make the call under its permit, then settle, learn from and record its usage."""
        record, trail = self._record, self._terms.trail
        self._note_admission(permit, target, account)
        is_try = account.gate.is_try(demand)
        if self._on_admitted is not None:
            await self._on_admitted(permit)
        if permit is not None:
            await permit.confirm()  # last: `on_admitted` may be slow, and the permit lost
        record.attempts += 1
        if record.source in ("relay", "stream"):  # the rest is in PostgreSQL before it is called
            self._spine.journal.enter(record)
        started = time.perf_counter()
        outcome, failure = Outcome.IGNORED, None
        try:
            if target.upstream.preempt is None and not is_try:
                await self._exchange.make(target, account, demand, is_try=is_try)
            else:
                with self._giving_way(target.upstream.preempt, permit, account, is_try):
                    await self._exchange.make(target, account, demand, is_try=is_try)
            outcome = Outcome.SUCCESS
            self._is_answered = True
        except CallFailed as failed:
            failure = failed
            is_dropped = failed.error.retryable and not isinstance(failed.error, UpstreamTierBusy)
            outcome = Outcome.DROPPED if is_dropped else Outcome.IGNORED
            await self._note_failure(failed, account, demand, is_try)
            raise
        finally:
            record.upstream_ms = (time.perf_counter() - started) * 1000
            record.finished_at = datetime.now(UTC)
            whole = outcome is Outcome.SUCCESS or self._exchange.ended_alone
            if trail is not None:
                why, status = (None, 0) if failure is None else (failure.error, failure.status)
                trail.end(why, worked=whole, status=status)
            images = self._exchange.settle(target, account, demand, whole=whole, failed=failure)
            if permit is not None and not record.handed_over:
                reported, charged = record.answer.usage, record.charge.usage
                used = first_ms = None
                if demand.estimate is not None:
                    used = demand.used(reported, charged, whole=whole)
                if permit.adapts_by_latency and whole and record.streamed:
                    first_ms = record.answer.first_byte_ms
                    used = used or tokens_read(reported, charged)
                permit.settle(
                    outcome,
                    tokens=used,
                    images=images,
                    audio_seconds=None if reported.details is None else seconds_of(reported),
                    cost_micros=record.charge.cost_micros,
                    first_ms=first_ms,
                )
                if demand.estimate is not None:
                    account.demands.learn(demand, reported, charged, whole=whole)
            if self._home is not None and whole:
                first_ms = record.answer.first_byte_ms if record.streamed else None
                self._spine.affinity.note(self._home, target, record.answer.usage, permit, first_ms)

    def _giving_way(
        self, rule: Preempt | None, permit: Permit | None, account: UpstreamAccount, is_try: bool
    ) -> AbstractContextManager[object]:
        """Return a context in which the call can be preempted, if its upstream and its terms allow
        it. A probe gives way only to another probe."""
        times = self._terms.preempted
        if is_try:
            return account.gate.trying()
        if rule is None or times is None or times >= rule.times or permit is None:
            return nullcontext()
        limiter, request_id = account.limiter, self._terms.request_id
        return self._spine.preemption.of(limiter, rule, self._exchange, permit, request_id)

    def _note_admission(
        self, permit: Permit | None, target: Target, account: UpstreamAccount
    ) -> None:
        record, pool = self._record, account.limiter.pool
        record.waits = False
        if record.attempts and record.pool != pool:
            record.note_moving()
        record.upstream, record.pool = target.upstream.name, pool
        record.model = target.model or None
        now = record.admitted_at = datetime.now(UTC)
        record.fence = (0, 0) if permit is None else permit.fence
        if not record.attempts:
            if record.waits_since is not None:
                record.queue_ms = max(0.0, (now - record.waits_since).total_seconds() * 1000)
            else:
                record.queue_ms = 0.0 if permit is None else permit.waited_ms
        if permit is not None:
            permit.settle_unused()  # until a call was made

    async def _note_failure(
        self, failed: CallFailed, account: UpstreamAccount, demand: CallDemand, is_try: bool
    ) -> None:
        """Pause the limit that a 429 concerns, and count the failure in the upstream's health."""
        record, error, model = self._record, failed.error, failed.target.model
        record.failed = error
        if isinstance(error, UpstreamThrottled):
            record.note_throttled(failed.target.upstream.name, failed.target.upstream.pool)
            failed.paused_ms = await account.gate.throttled(error, model, demand)
        await account.gate.failed(error, model, suspect=self._exchange.suspect(), tried=is_try)
        record.faults += error.of_upstream


def _place(target: Target | None) -> tuple[str, str] | None:
    return None if target is None else (target.upstream.name, target.model)


def timeouts_of(config: Config, upstream: Upstream) -> Timeouts:
    """Return an upstream's timeouts: its own where set, else those of the settings."""
    return Timeouts(
        connect_ms=upstream.timeouts.get(CONNECT_TIMEOUT, config.connect_timeout_ms),
        first_byte_ms=upstream.timeouts.get("first_byte_timeout_ms", config.first_byte_timeout_ms),
        idle_ms=upstream.timeouts.get("idle_timeout_ms", config.idle_timeout_ms),
        total_ms=upstream.timeouts.get("total_timeout_ms", config.total_timeout_ms),
    )
