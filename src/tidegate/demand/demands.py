"""What each call asks the limiter for, and what is learned when it has ended. Pure.

Owns the process's estimator. Invariant: what is told of a call's end is never less than what is
known to have been used; what is not known stays as it was reserved.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.call import CLASSIFIER_LIMIT, DEFAULT_TENANT, Call, Kind, Usage
from tidegate.demand.cost import Prices
from tidegate.demand.estimator import Estimate, Estimator, tokens_of
from tidegate.demand.pieces import Pieces
from tidegate.demand.reach import Reach, band_of
from tidegate.limiter import Tokens
from tidegate.limiter.limits import PoolPolicy

_CLASSIFIER = CLASSIFIER_LIMIT.partition(":")[2]
# The judge's instruction and schema, which come on top of each prompt.
_JUDGE_CHARS = 1_200
_LEARN_FROM_ONE_IN = 8


@dataclass(frozen=True, slots=True)
class Demand:
    """All limits of a call, or none; `priority` is the name of a band."""

    limits: tuple[str, ...]
    tenant: str
    priority: str
    images: int
    estimate: Estimate | None = None

    @property
    def tokens(self) -> Tokens | None:
        """What to reserve: rarely less than it will use. None: it was not estimated, since nobody
        counts it."""
        if self.estimate is None:
            return None
        return Tokens(self.estimate.input_tokens, self.estimate.output_tokens)

    def used(self, usage: Usage, *, whole: bool) -> Tokens | None:
        """What to settle for, None where nothing is known. `whole`: the answer came to its end;
        of one that was cut the provider may have made more than it told us of."""
        input_tokens, output_tokens = tokens_of(usage)
        if self.estimate is None or (input_tokens is None and output_tokens is None):
            return None
        if input_tokens is None:
            input_tokens = self.estimate.input_tokens
        if output_tokens is None:
            output_tokens = self.estimate.output_tokens
        elif not whole:
            output_tokens = max(output_tokens, self.estimate.output_tokens)
        return Tokens(input_tokens, output_tokens)


class Demands:
    """One per process and upstream, with what the upstream charges."""

    def __init__(
        self,
        estimator: Estimator | None = None,
        *,
        kinds_optional: bool = False,
        prices: Prices | None = None,
    ) -> None:
        """`kinds_optional`: a kind without a limit in the policy is not bound by one."""
        self.estimator = estimator or Estimator()
        self.prices = prices or Prices()
        self._kinds_optional = kinds_optional
        self._reach = Reach(PoolPolicy({}))
        self._turn = -1  # the first call is one to learn from

    def of(self, call: Call, policy: PoolPolicy) -> Demand:
        """What a call needs under the policy in force."""
        images = int(call.kind is Kind.IMAGE_GENERATION)
        return Demand(
            limits=self._limits(policy, call.kind.value, call.model, call.tenant_id, images),
            tenant=call.tenant_id,
            priority=band_of(call.priority, policy.bands),
            images=images,
            estimate=self.estimator.estimate(
                call.model, call.kind.value, call.prompt, call.media, images=images
            ),
        )

    def of_native(
        self,
        model: str,
        kind: str,
        pieces: Pieces,
        policy: PoolPolicy,
        *,
        tenant: str,
        priority: int,
        images: int = 0,
        max_output_tokens: int | None = None,
    ) -> Demand:
        """What a request in a provider's own dialect needs; its limits may be none. Where no limit
        counts LLM tokens only some calls are estimated, so that the estimator goes on learning: it
        costs as much as all the rest."""
        limits = self._limits(policy, kind, model, tenant, images)
        reach = self._reach
        self._turn = (self._turn + 1) % _LEARN_FROM_ONE_IN
        estimate = None
        if not self._turn or reach.counts_tokens:
            estimate = self.estimator.of_pieces(
                model, kind, pieces, images=images, max_output_tokens=max_output_tokens
            )
        return Demand(
            limits=limits,
            tenant=tenant,
            priority=reach.band(priority),
            images=images,
            estimate=estimate,
        )

    def of_question(
        self,
        prompt: str,
        model: str,
        policy: PoolPolicy,
        *,
        max_output_tokens: int,
        tenant: str = DEFAULT_TENANT,
    ) -> Demand:
        """What the classifier's question needs: of its own limit, and of those on the model.

        It takes its tenant's turn, but nothing of the tenant's limits: the question is ours.
        """
        return Demand(
            limits=self._limits(policy, _CLASSIFIER, model, DEFAULT_TENANT, 0),
            tenant=tenant,
            priority=band_of(0, policy.bands),
            images=0,
            estimate=self.estimator.estimate(
                model, _CLASSIFIER, prompt + " " * _JUDGE_CHARS, max_output_tokens=max_output_tokens
            ),
        )

    def learn(self, demand: Demand, usage: Usage, *, whole: bool) -> None:
        """Take in what a call used; an answer that was cut teaches its input alone."""
        if demand.estimate is None:
            return
        known = usage if whole else Usage(input_tokens=usage.input_tokens)
        self.estimator.learn(demand.estimate, known)

    def _limits(
        self, policy: PoolPolicy, kind: str, model: str, tenant: str, images: int
    ) -> tuple[str, ...]:
        if self._reach.policy is not policy:
            self._reach = Reach(policy, kinds_optional=self._kinds_optional)
        return self._reach.limits(kind, model, tenant, images)
