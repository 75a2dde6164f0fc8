"""What waiters have in common that may take each other's place: a band, a tenant, and its limits.

Does no I/O. Invariant: a flow's `key` is its name on the wire, and never changes; what the policy
says of its limits is read anew when the policy's revision is another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidegate.errors import DemandImpossible
from tidegate.limiter.limits import Concurrency, Limit, PoolPolicy, Quota, Rate, Unit
from tidegate.limiter.wire import Hint, flow_of

if TYPE_CHECKING:
    from tidegate.limiter.entries import Waiter

# What a call is taken to last before the first one of its flow has ended.
FIRST_COST_MS = 1000.0
_LEARN = 1 / 8
# Of how many limits the names are shown to a caller who asks for one that is unknown.
_KNOWN_SHOWN = 8
# Of virtual time in a ms of use by a tenant of weight 1.
UNITS = 100_000


@dataclass(frozen=True, slots=True)
class Tokens:
    """LLM tokens of a call: an estimate before it, or what it used."""

    input: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        return self.input + self.output


def tokens_of(tokens: int | Tokens) -> Tokens:
    """A number is a total whose parts are not known: it counts as input."""
    return Tokens(tokens) if isinstance(tokens, int) else tokens


def amount_of(unit: Unit, tokens: Tokens | None, images: int | None) -> int | None:
    """How much of a unit a call takes or used; None where that is not known."""
    if unit == "requests":
        return 1
    if unit == "images":
        return images
    if tokens is None:
        return None
    if unit == "tokens":
        return tokens.total
    return tokens.input if unit == "input_tokens" else tokens.output


def unknown_limit(name: str, policy: PoolPolicy, pool: str = "") -> str:
    """What is wrong with a demand for a limit that a policy does not name."""
    known = sorted(policy.limits)
    more = f" and {len(known) - _KNOWN_SHOWN} more" if len(known) > _KNOWN_SHOWN else ""
    names = ", ".join(known[:_KNOWN_SHOWN]) + more
    where = f" of pool {pool!r}" if pool else ""
    return f"limit {name!r} is not in the policy{where} (known: {names})"


class Flow:
    """See the module. `cost_ms` is how long its calls last, as far as is known; `hint` is set while
    the server lets us pass permits on in it. `quotas` are (limit, zone). `slack_ms` is how much
    later than admitted its calls may be sent; `rest_ms` is what was rounded off the length of its
    last call. `firm` are those of its limits that get nothing back when calls end, where the server
    does not know. `held_up_by` is the limit that it waits for, as the server said last, of which
    so much is `used`; `room_at_ms` when there is room for its first waiter, 0 while not known."""

    __slots__ = (
        "band",
        "cost_ms",
        "firm",
        "held",
        "held_up_by",
        "hint",
        "key",
        "lane",
        "limits",
        "list",
        "plain",
        "quotas",
        "rates",
        "rest_ms",
        "revision",
        "room_at_ms",
        "slack_ms",
        "tenant",
        "unnamed",
        "used",
        "waiting",
        "weight",
    )

    def __init__(self, band: int, tenant: str, limits: tuple[str, ...]) -> None:
        self.band = band
        self.tenant = tenant
        self.limits = limits
        self.key = flow_of(band, tenant, limits)
        # Permits may be passed on between flows of one lane and band.
        self.lane = (band, limits)
        self.waiting: dict[int, Waiter] = {}
        self.held = 0
        self.cost_ms = FIRST_COST_MS
        self.hint: Hint | None = None
        self.held_up_by: str | None = None
        self.room_at_ms = 0.0
        self.used = 0
        self.firm: tuple[str, ...] = ()
        self.rest_ms = 0.0
        self.revision = -1
        self.list: tuple[Limit, ...] = ()
        self.rates = False
        self.plain = False
        self.quotas: tuple[tuple[str, str], ...] = ()
        self.slack_ms = float("inf")
        self.unnamed: str | None = None  # the first limit that the policy does not name
        self.weight = 1

    def __repr__(self) -> str:
        return f"<Flow {self.key} waiting={len(self.waiting)} held={self.held}>"

    def refresh(self, policy: PoolPolicy, pool: str = "") -> None:
        """Read what the policy says. Raises DemandImpossible for a limit that lets nobody in."""
        found = [policy.binding(name) for name in self.limits]
        for name, limit in zip(self.limits, found, strict=True):
            if limit is None:
                raise DemandImpossible(unknown_limit(name, policy, pool), limit=name)
            if limit.bound == 0:
                raise DemandImpossible(f"limit {name!r} is 0: it admits no call", limit=name)
        self.list = tuple(limit for limit in found if limit is not None)
        named = policy.limits
        self.unnamed = next((name for name in self.limits if name not in named), None)
        self.rates = any(not isinstance(limit, Concurrency) for limit in self.list)
        self.plain = policy.hand_off and not any(
            not isinstance(limit, Concurrency) or limit.adaptive for limit in self.list
        )
        self.quotas = tuple((n, q.zone) for n, q in zip(self.limits, self.list, strict=True)
                            if isinstance(q, Quota))  # fmt: skip
        self.firm = tuple(n for n, x in zip(self.limits, self.list, strict=True)
                          if not isinstance(x, Concurrency) and x.unit == "requests"
                          and not (isinstance(x, Rate) and x.exact))  # fmt: skip
        slacks = [limit.slack for limit in self.list if isinstance(limit, Rate)]
        self.slack_ms = min(slacks, default=float("inf"))
        self.weight = policy.weights.get(self.tenant, 1)
        self.revision = policy.revision

    def amounts(self, tokens: Tokens | None, images: int) -> str:
        """What one call takes of each limit, as the wire says it: empty where it is 1 of each.

        Clamped to what a limit can ever give. Raises ValueError where a limit counts tokens and
        nobody said how many.
        """
        if not self.rates:
            return ""
        parts = []
        for name, limit in zip(self.limits, self.list, strict=True):
            amount: int | None = 1
            if not isinstance(limit, Concurrency):
                amount = amount_of(limit.unit, tokens, images)
                if amount is None:
                    raise ValueError(f"{name} counts {limit.unit}: say tokens=")
                amount = min(max(0, amount), limit.bound)
            parts.append(str(amount))
        return ",".join(parts)

    def actual(self, tokens: Tokens | None, images: int | None) -> str:
        """What a call really used, `-` where it is not known: empty where nothing is to be said."""
        if not self.rates or (tokens is None and images is None):
            return ""
        parts = []
        for limit in self.list:
            amount = None
            if not isinstance(limit, Concurrency) and limit.unit != "requests":
                amount = amount_of(limit.unit, tokens, images)
            parts.append("-" if amount is None else str(max(0, amount)))
        return ",".join(parts)

    def spends(self, amounts: str) -> Mapping[str, int]:
        """What an admission takes of the limits that are not concurrencies. Asked for before one
        of them became a rate it may say nothing of amounts: 1 of each, as the server takes it."""
        if not self.rates:
            return {}
        said = [int(amount) for amount in amounts.split(",")] if amounts else [1] * len(self.list)
        found = zip(self.limits, self.list, said, strict=True)
        return {name: amount for name, limit, amount in found
                if not isinstance(limit, Concurrency)}  # fmt: skip

    def learn(self, took_ms: float) -> None:
        """A call of this flow lasted so long."""
        if self.cost_ms == FIRST_COST_MS:
            self.cost_ms = max(1.0, took_ms)
        else:
            self.cost_ms += (max(1.0, took_ms) - self.cost_ms) * _LEARN

    def whole_ms(self, took_ms: float) -> int:
        """How long a call lasted, in whole ms: what is rounded off counts for the next one."""
        exact_ms = took_ms + self.rest_ms
        whole_ms = max(1, round(exact_ms))
        self.rest_ms = max(-1.0, exact_ms - whole_ms)
        return whole_ms

    def nobody_waits(self) -> None:
        """What was known of its wait is over."""
        self.hint, self.held_up_by, self.room_at_ms = None, None, 0.0

    def first(self) -> Waiter | None:
        """The first waiter whose task has not been cancelled in this very moment."""
        for waiter in self.waiting.values():
            if not waiter.future.done():
                return waiter
        return None

    def next_by_hint(self) -> tuple[int, Waiter | None] | None:
        """The virtual start of the first waiter, and the waiter if a permit of ours may let it in:
        not one that comes too late for that. None where there is no hint, or the place of the
        waiter is not known yet: its tenant keeps its own, and is asked again when it is."""
        hint = self.hint
        waiter = None if hint is None else self.first()
        if hint is None or waiter is None or waiter.stamp == 0:
            return None
        start = hint.tag + (waiter.stamp - hint.head) * hint.step
        return start, waiter if waiter.stamp <= hint.horizon else None
