"""From calls that have ended to what is counted of them."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.metrics.names import Metric, Spec
from tidegate.metrics.tally import MOST_MODELS, MOST_TENANTS, Count, Known, Tally
from tidegate.observed import JUDGE, RETRIED, Observed

PROVIDERS = {"gemini": "gcp.gemini"}  # others are called as their dialect is
_MICROS = 1_000_000
_MOST_SORTS = 5_000
_Sort = tuple[str, str, str, str, str, str, str, str]


class Calls:
    """A listener of `Observers`."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._tenants = Known(MOST_TENANTS)
        self._models = Known(MOST_MODELS)
        self._cells: dict[_Sort, _Cells] = {}

    def take(self, batch: Sequence[Observed]) -> None:
        """Count them."""
        for one in batch:
            self._count(one)

    def _count(self, one: Observed) -> None:
        # Only what a provider answered for is sure to be no invention of a client.
        worked = one.status == "succeeded"
        model = self._models.of(one.model, learns=worked) if one.model else ""
        tenant = self._tenants.of(one.tenant_id, learns=one.attempts > 0)
        failed = "" if worked else one.code or one.status
        sort = (
            *(one.source, one.kind or "", one.pool, model),
            *(tenant, one.operation, one.dialect, one.status),
        )
        cells = self._cells.get(sort)
        if cells is None:
            if len(self._cells) >= _MOST_SORTS:
                self._cells.clear()  # nothing is lost: the tally has them
            cells = self._cells[sort] = _Cells(self._tally, sort)
        cells.calls.amount += 1
        cells.of_tenant.amount += 1
        if failed:
            self._tally.add(Metric.FAILURES, (one.source, one.pool, failed))
        if one.attempts:
            self._count_attempts(one, cells, failed)
        if one.cost_micros:
            cells.cost.amount += one.cost_micros / _MICROS
            cells.tenant_cost.amount += one.cost_micros / _MICROS
        if one.input_tokens:
            cells.use("input", one.input_tokens)
        if one.output_tokens:
            cells.use("output", one.output_tokens)
        if one.cached_tokens:
            cells.use("cached", one.cached_tokens)
        if one.thoughts_tokens:
            cells.use("thoughts", one.thoughts_tokens)

    def _count_attempts(self, one: Observed, cells: _Cells, failed: str) -> None:
        where = (one.source, one.pool)
        cells.attempts.amount += one.attempts
        again = one.attempts - 1 + (one.status == RETRIED)
        if again:
            self._tally.add(Metric.RETRIES, where, again)
        if one.throttled:
            self._tally.add(Metric.THROTTLED, where, one.throttled)
        if one.queue_ms is not None:
            cells.queue.add(one.queue_ms / 1000)
            cells.tenant_queue.amount += one.queue_ms / 1000
        if one.upstream_ms is None:
            return
        if failed:
            labels = (*cells.asked, failed, one.pool)
            self._tally.observe(Metric.GEN_AI_DURATION, labels, one.upstream_ms / 1000)
            return
        cells.duration.add(one.upstream_ms / 1000)
        if one.first_byte_ms is not None:
            cells.first_byte.add(one.first_byte_ms / 1000)
            if one.streamed:
                first_chunk = self._tally.spread(Metric.GEN_AI_FIRST_CHUNK, cells.asked)
                first_chunk.add(one.first_byte_ms / 1000)


class _Cells:
    """What calls of one sort add to. Questions of the classifier add nothing to a tenant's."""

    def __init__(self, tally: Tally, sort: _Sort) -> None:
        source, kind, pool, model, tenant, operation, dialect, status = sort
        self._tally = tally
        self._where = (pool, model)

        def of_tenant(metric: Spec, *labels: str) -> Count:
            return Count() if source == JUDGE else tally.count(metric, (tenant, *labels))

        self.asked = (operation, PROVIDERS.get(dialect, dialect), model)
        self.calls = tally.count(Metric.CALLS, (source, kind, pool, model, status))
        self.of_tenant = of_tenant(Metric.TENANT_CALLS, status)
        self.attempts = tally.count(Metric.ATTEMPTS, (source, pool))
        self.queue = tally.spread(Metric.QUEUE, (source, kind, pool))
        self.tenant_queue = of_tenant(Metric.TENANT_QUEUE)
        self.duration = tally.spread(Metric.GEN_AI_DURATION, (*self.asked, "", pool))
        self.first_byte = tally.spread(Metric.FIRST_BYTE, (source, pool))
        self.cost = tally.count(Metric.COST, self._where)
        self.tenant_cost = of_tenant(Metric.TENANT_COST)
        self._tokens = {
            name: (
                tally.count(Metric.TOKENS, (*self._where, name)),
                of_tenant(Metric.TENANT_TOKENS, name),
            )
            for name in ("input", "output", "cached", "thoughts")
        }
        self._of_a_call = {
            name: tally.spread(Metric.GEN_AI_TOKENS, (*self.asked, name))
            for name in ("input", "output")
        }

    def use(self, name: str, tokens: int) -> None:
        """LLM tokens of a sort."""
        of_all, of_tenant = self._tokens[name]
        of_all.amount += tokens
        of_tenant.amount += tokens
        spread = self._of_a_call.get(name)
        if spread is not None:
            spread.add(tokens)
