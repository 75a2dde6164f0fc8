"""What each call asks the limiter for, and what is learned when it has ended. Pure.

Owns the process's estimator. Invariant: what is told of a call's end is never less than what is
known to have been used; what is not known stays as it was reserved.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.call import CLASSIFIER_LIMIT, DEFAULT_TENANT, Call, Kind, Usage
from tidegate.demand.estimator import Estimate, Estimator, tokens_of
from tidegate.demand.reach import Reach, band_of
from tidegate.limiter import Tokens
from tidegate.limiter.limits import PoolPolicy

_CLASSIFIER = CLASSIFIER_LIMIT.partition(":")[2]
# The judge's instruction and schema, which come on top of each prompt.
_JUDGE_CHARS = 1_200


@dataclass(frozen=True, slots=True)
class Demand:
    """All limits of a call, or none; `priority` is the name of a band."""

    limits: tuple[str, ...]
    tenant: str
    priority: str
    images: int
    estimate: Estimate

    @property
    def tokens(self) -> Tokens:
        """What to reserve: rarely less than it will use."""
        return Tokens(self.estimate.input_tokens, self.estimate.output_tokens)

    def used(self, usage: Usage, *, whole: bool) -> Tokens | None:
        """What to settle for, None where nothing is known. `whole`: the answer came to its end;
        of one that was cut the provider may have made more than it told us of."""
        input_tokens, output_tokens = tokens_of(usage)
        if input_tokens is None and output_tokens is None:
            return None
        if input_tokens is None:
            input_tokens = self.estimate.input_tokens
        if output_tokens is None:
            output_tokens = self.estimate.output_tokens
        elif not whole:
            output_tokens = max(output_tokens, self.estimate.output_tokens)
        return Tokens(input_tokens, output_tokens)


class Demands:
    """One per process."""

    def __init__(self, estimator: Estimator | None = None) -> None:
        self.estimator = estimator or Estimator()
        self._reach = Reach(PoolPolicy({}))

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
        known = usage if whole else Usage(input_tokens=usage.input_tokens)
        self.estimator.learn(demand.estimate, known)

    def _limits(
        self, policy: PoolPolicy, kind: str, model: str, tenant: str, images: int
    ) -> tuple[str, ...]:
        if self._reach.policy is not policy:
            self._reach = Reach(policy)
        return self._reach.limits(kind, model, tenant, images)
