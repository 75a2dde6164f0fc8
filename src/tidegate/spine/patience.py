"""Waiting in a queue for as long as it is worth it."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from types import TracebackType
from typing import Any

from tidegate.call import Caller
from tidegate.demand import Demand
from tidegate.limiter import Acquisition, Permit
from tidegate.spine.routing import Gate
from tidegate.store.budgets import BudgetGate


class NotWorthWaiting(Exception):
    """What the call needs was paused while it waited: for longer than it may wait, or so that it
    must be asked for again."""


class Patience:
    """An admission that is left as soon as a pause outlasts the call's deadline, or the budget of
    its payer is spent.

    Entering it raises NotWorthWaiting or BudgetExceeded then, beside what the admission raises; and
    NotWorthWaiting also where the call was admitted after something else that binds it was paused:
    the permit has spent nothing. Cancelled, it leaves the queue, as the admission does.
    """

    __slots__ = ("_admission", "_budgets", "_demand", "_gate", "_model", "_payer", "_until")

    def __init__(
        self,
        admission: Acquisition,
        gate: Gate,
        demand: Demand,
        model: str,
        left_ms: float,
        budgets: BudgetGate | None = None,
        payer: Caller | None = None,
    ) -> None:
        """`budgets` and `payer`: where somebody pays who has a budget."""
        self._admission = admission
        self._gate = gate
        self._demand = demand
        self._model = model
        self._until = time.monotonic() + left_ms / 1000
        self._budgets = budgets
        self._payer = payer

    async def __aenter__(self) -> Permit:
        limiter, admission = self._gate.limiter, self._admission
        paused, end = self._paused, None
        limiter.tell_of_pauses(paused)
        if self._budgets is not None and self._payer is not None:
            end = self._budgets.waits(self._payer, admission.leave)
        try:
            permit = await admission.__aenter__()
        finally:
            limiter.tell_no_more(paused)
            if end is not None:
                end()
        if not limiter.has_pauses or not self._gate.binds_more(self._demand, self._model):
            return permit
        permit.settle("ignored", tokens=0, images=0)
        await admission.__aexit__(None, None, None)
        raise NotWorthWaiting

    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Coroutine[Any, Any, None]:
        return self._admission.__aexit__(kind, error, trace)

    def _paused(self) -> None:
        gate, left_ms = self._gate, (self._until - time.monotonic()) * 1000
        if gate.late(gate.bind(self._demand, self._model), max(0.0, left_ms)) is not None:
            self._admission.leave(NotWorthWaiting())
