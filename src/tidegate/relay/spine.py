"""The spine of a native call: choose an upstream, admit, call, pass on, settle.

Invariants: a permit is held exactly while its upstream call is open; another upstream, or another
try, is taken only before anything of an answer has gone out; usage that is not told stays as it
was reserved.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from tidegate.call import DEFAULT_POOL, OTHER_KIND
from tidegate.config import Config
from tidegate.demand import Demand, Demands
from tidegate.demand.cost import Prices
from tidegate.errors import NotFound
from tidegate.limiter import Limiter
from tidegate.limiter.demand import Demand as Wanted
from tidegate.policy.upstreams import Upstream
from tidegate.providers.gemini.timeouts import Timeouts
from tidegate.providers.relay import Exchange, RelayWire
from tidegate.relay.asked import Asked, asked_of
from tidegate.relay.call import Life, NativeCall, Out
from tidegate.relay.headers import Headers, with_key
from tidegate.relay.models import Models, is_plain
from tidegate.relay.paths import Dialect, Operation
from tidegate.relay.permission import check_body, check_model, check_names
from tidegate.relay.redirect import MOST_REDIRECTS, REDIRECTS, followed
from tidegate.relay.remaining import Remaining
from tidegate.relay.skim import skimmed
from tidegate.relay.spelling import check_said_once
from tidegate.relay.targets import Target, Targets
from tidegate.relay.work import Begun, Work
from tidegate.spine.faults import RetryBudget
from tidegate.spine.routing import Gate, Gates
from tidegate.store.budgets import BudgetGate
from tidegate.telemetry import get_logger
from tidegate.tracing import HEADER, Tracing

_HARD_MARGIN_MS = 5_000
_REDIRECT_BYTES = 65_536

log = get_logger()


class Relay:
    """One per process, over the limiters of all pools."""

    def __init__(
        self,
        *,
        config: Config,
        targets: Targets,
        pools: Mapping[str, Limiter],
        wire: RelayWire,
        tracing: Tracing,
        budgets: BudgetGate,
    ) -> None:
        self.targets = targets
        self.budgets = budgets
        self.tracing = tracing
        self._gates = {
            name: Gate(name, pools[one.pool], one.key)
            for name, one in targets.upstreams.items()
            if one.pool in pools
        }
        self.health = Gates(self._gates)
        self.remaining = {pool: Remaining(limiter) for pool, limiter in pools.items()}
        self._pools = pools
        self._wire = wire
        self._demands = {
            name: Demands(kinds_optional=name != DEFAULT_POOL, prices=Prices(upstream))
            for name, upstream in targets.upstreams.items()
        }
        self._budget = RetryBudget()
        self._timeouts = {
            name: timeouts_of(config, upstream) for name, upstream in targets.upstreams.items()
        }
        self._models = Models(wire)

    async def run(
        self, call: NativeCall, out: Out, life: Life, on_admitted: Begun | None = None
    ) -> None:
        """Make the call; its answer goes to `out` as it comes, and `life` is filled.

        `on_admitted` is called before each try upstream, under its permit; what it raises ends the
        call, and nothing was sent. Without `out.started` a try that broke off is made again.
        Raises CallFailed for what the last upstream said, and our own errors for what came before;
        after `out.started` nothing more can be told to the client but that it failed. Cancellation
        leaves neither a waiter nor an open upstream call.
        """
        life.trail = call.trail
        if call.endpoint.operation is Operation.MODELS and await self._listed(call, out, life):
            return
        body: dict[str, Any] = {}
        asked: Asked | None = None
        if call.endpoint.is_counted or call.body:
            read = skimmed(call.body)
            if read.raw is not call.body:  # it was large: others go first now
                await asyncio.sleep(0)
            body = read.body
            asked = asked_of(call.endpoint, body, read.whole)
            check_said_once(read.raw, body)
            check_model(call.caller, asked.model)
            check_body(call.caller, call.endpoint, body)
            check_names(call.caller, read.raw)
            life.model, life.streams = asked.model, asked.streams
            life.kind = asked.kind if call.endpoint.is_counted else None
        self._budget.earn()
        work = Work(self, call, body, asked, out, life, on_admitted)
        await work.until_answered(self._chain(call, asked))

    async def _listed(self, call: NativeCall, out: Out, life: Life) -> bool:
        """Answer for the list of models, where it is not the only upstream's own."""
        upstreams = self.targets.speaking(call.endpoint.dialect)
        if not call.endpoint.path.endswith("/models") or not upstreams:
            return False
        routes = self.targets.named_by_routes(call.endpoint.dialect)
        if is_plain(call.caller, upstreams, routes):
            return False
        body = await self._models.listed(call, upstreams, routes)
        life.keep(body)
        length = (b"content-length", str(len(body)).encode())
        await out.start(200, [(b"content-type", b"application/json"), length])
        await out.body(body, False)
        return True

    def _chain(self, call: NativeCall, asked: Asked | None) -> list[Target]:
        if asked is not None:
            return self.targets.of(call.endpoint.dialect, asked.model)
        name = call.endpoint.model
        if call.endpoint.operation is Operation.MODELS and name is not None:
            check_model(call.caller, name)
            return self.targets.of(call.endpoint.dialect, name)
        return [self.first_of(call.endpoint.dialect)]

    def first_of(self, dialect: Dialect) -> Target:
        """For what concerns no model. Raises NotFound where nobody speaks the dialect."""
        speaking = self.targets.speaking(dialect)
        if not speaking:
            raise NotFound(f"no upstream speaks the {dialect} dialect")
        return Target(speaking[0], "")

    def usable(self, targets: list[Target]) -> list[Target]:
        """Those that may be asked now; where all are out, all: the first to be back comes first."""
        if len(targets) == 1:
            return targets
        found = [one for one in targets if self.gate_of(one).state != "out"]
        return found or sorted(targets, key=lambda one: self.gate_of(one).ready_in_ms())

    def gate_of(self, target: Target) -> Gate:
        return self._gates[target.upstream.name]

    def limiter_of(self, target: Target) -> Limiter:
        return self._pools[target.upstream.pool]

    def demand_of(self, call: NativeCall, asked: Asked | None, target: Target) -> Demand:
        counted = call.endpoint.is_counted and asked is not None
        demand = self._demands[target.upstream.name].of_native(
            target.model,
            asked.kind if counted and asked else OTHER_KIND,
            asked.pieces if asked else {},
            self.limiter_of(target).policy,
            tenant=call.caller.tenant_id,
            priority=call.priority,
            images=asked.images if asked else 0,
            max_output_tokens=asked.max_output_tokens if counted and asked else 1,
        )
        return self.gate_of(target).bind(demand, target.model)

    def wanted(
        self, demand: Demand, target: Target, deadline_ms: int | None, *, once: bool = False
    ) -> Wanted:
        hard_ms = self._timeouts[target.upstream.name].total_ms + _HARD_MARGIN_MS
        return demand.to_admit(deadline_ms, hard_ms, once=once)

    async def open(
        self,
        call: NativeCall,
        target: Target,
        body: bytes | AsyncIterator[bytes] | None,
        on_sent: Callable[[], None] | None = None,
    ) -> Exchange:
        """Send the request to an upstream. Raises UpstreamError."""
        dialect = call.endpoint.dialect
        base = target.upstream.base_urls[dialect]
        text = f"{base}{call.endpoint.path_for(target.model)}"
        if call.query:
            text = f"{text}?{call.query}"
        headers = with_key(call.headers, dialect, target.upstream.key)
        place = self._wire.place(text)
        if call.trail is not None:
            said = call.trail.begin(target.upstream.name, target.model, str(place.origin))
            headers.append((HEADER, said.encode()))
        timeouts = self._timeouts[target.upstream.name]
        exchange = await self._wire.open(call.method, place, headers, body, on_sent, timeouts)
        if exchange.status in REDIRECTS and _may_follow(call):
            return await self._follow(exchange, base, headers, timeouts)
        return exchange

    async def _follow(
        self, exchange: Exchange, base: str, headers: Headers, timeouts: Timeouts
    ) -> Exchange:
        """The answer at the end of an upstream's redirects, or the redirect that is not followed.
        Raises UpstreamError."""
        for _ in range(MOST_REDIRECTS):
            onward = followed(exchange.headers, base)
            if onward is None:
                break
            try:
                await exchange.read(_REDIRECT_BYTES)
            finally:
                exchange.close()
            place = self._wire.place(onward)
            exchange = await self._wire.open("GET", place, headers, None, None, timeouts)
            if exchange.status not in REDIRECTS:
                break
        return exchange

    def may_try_again(self) -> bool:
        return self._budget.spend()

    def demands_of(self, target: Target) -> Demands:
        return self._demands[target.upstream.name]


def _may_follow(call: NativeCall) -> bool:
    return call.method == "GET" and call.endpoint.operation is Operation.FILES


def timeouts_of(config: Config, upstream: Upstream) -> Timeouts:
    """How long an upstream may take: as it is set for itself, else as for all."""
    return Timeouts(
        connect_ms=config.connect_timeout_ms,
        first_byte_ms=upstream.timeouts.get("first_byte_timeout_ms", config.first_byte_timeout_ms),
        idle_ms=upstream.timeouts.get("idle_timeout_ms", config.idle_timeout_ms),
        total_ms=upstream.timeouts.get("total_timeout_ms", config.total_timeout_ms),
    )
