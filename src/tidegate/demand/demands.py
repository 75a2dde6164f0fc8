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
from tidegate.limiter.demand import Demand as Wanted
from tidegate.limiter.limits import PoolPolicy

_CLASSIFIER = CLASSIFIER_LIMIT.partition(":")[2]
# The judge's instruction and schema, which come on top of each prompt.
_JUDGE_CHARS = 1_200
_LEARN_FROM_ONE_IN = 16
_NO_USAGE = Usage()


# Not frozen, as all else of its kind: each call would pay for that.
@dataclass(slots=True)
class Demand:
    """All limits of a call, or none; nobody changes it. `priority` is the name of a band."""

    limits: tuple[str, ...]
    tenant: str
    priority: str
    images: int
    estimate: Estimate | None = None

    @property
    def tokens(self) -> Tokens | None:
        """What to reserve: rarely less than it will use, and never less than the first guess, so
        that a tenant can't teach its own reservations away. None: it was not estimated, since
        nobody counts it."""
        one = self.estimate
        if one is None:
            return None
        return Tokens(
            max(one.input_tokens, one.guessed_input_tokens),
            max(one.output_tokens, one.guessed_output_tokens),
        )

    def to_admit(self, deadline_ms: int | None, hard_ms: int, *, once: bool = False) -> Wanted:
        """What the limiter is asked for; see its `Demand`."""
        return Wanted(
            self.limits,
            self.tenant,
            self.priority,
            self.tokens,
            self.images,
            deadline_ms,
            hard_ms,
            once,
            True,
        )

    def used(self, told: Usage, charged: Usage = _NO_USAGE, *, whole: bool) -> Tokens | None:
        """What to settle for, None where nothing is known. `whole`: the answer came to its end; of
        one that was cut the provider may have made more than it told us of. `charged`: what the
        call is charged for, which is what came of it at least; it can be more than was reserved."""
        reserved = self.tokens
        if reserved is None:
            return None
        input_tokens, output_tokens = tokens_of(told)
        came_input, came_output = tokens_of(charged)
        known = (input_tokens, output_tokens, came_input, came_output)
        if all(one is None for one in known):
            return None
        if input_tokens is None:
            input_tokens = max(reserved.input, came_input or 0)
        if output_tokens is None or not whole:
            output_tokens = max(output_tokens or 0, came_output or 0, reserved.output)
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
                *(call.model, call.kind.value, call.prompt, call.media),
                images=images,
                tenant=call.tenant_id,
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
                *(model, kind, pieces),
                images=images,
                max_output_tokens=max_output_tokens,
                tenant=tenant,
            )
        return Demand(limits, tenant, reach.band(priority), images, estimate)

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
                *(model, _CLASSIFIER, prompt + " " * _JUDGE_CHARS),
                max_output_tokens=max_output_tokens,
                tenant=tenant,
            ),
        )

    def learn(
        self, demand: Demand, told: Usage, charged: Usage = _NO_USAGE, *, whole: bool
    ) -> None:
        """Take in what a call used. An answer that was cut teaches its input alone, unless more
        came of it than was reserved."""
        estimate = demand.estimate
        if estimate is None:
            return
        known = told
        if not whole:
            came = tokens_of(charged)[1] or 0
            output_tokens = came if came > estimate.output_tokens else None
            known = Usage(input_tokens=told.input_tokens, output_tokens=output_tokens)
        self.estimator.learn(estimate, known)

    def _limits(
        self, policy: PoolPolicy, kind: str, model: str, tenant: str, images: int
    ) -> tuple[str, ...]:
        if self._reach.policy is not policy:
            self._reach = Reach(policy, kinds_optional=self._kinds_optional)
        return self._reach.limits(kind, model, tenant, images)
