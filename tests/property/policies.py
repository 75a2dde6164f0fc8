"""The policies that the property tests move between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from hypothesis import strategies as st

from tidegate.limiter import (
    MEASURES_OF_SHARES,
    Adaptive,
    AdaptsBy,
    Band,
    Concurrency,
    Limit,
    PoolPolicy,
    Quota,
    Ramp,
    Rate,
)

LEASE_MS = 30_000
WINDOW_MS = 60_000
# Over the concurrencies a call needs one, two or three of them; some need rates too. In the order
# that the client gives them.
LANES = (
    ("kind:a",),
    ("kind:b",),
    ("kind:a", "pool:all"),
    ("kind:b", "pool:all"),
    ("kind:a", "kind:b"),
    ("kind:a", "kind:b", "pool:all"),
    ("kind:a", "rpm:x"),
    ("kind:b", "tpm:x"),
    ("pool:all", "rpm:x", "tpm:x"),
    ("kind:a", "rpd:x"),
    ("kind:a", "model:m"),
    ("kind:b", "model:m", "upstream:u"),
    ("upstream:u",),
    ("tif:x",),
    ("kind:a", "tif:x", "tpm:x"),
)
CONCURRENCIES = ("kind:a", "kind:b", "pool:all")
TENANTS = ("t1", "t2", "t3")
BANDS = (
    (Band("high"), Band("normal", min_share=0.2), Band("low", min_share=0.1)),
    (Band("high", headroom=0.4), Band("normal", min_share=0.3), Band("low")),
    (Band("high"), Band("rest", min_share=0.3)),
)
WEIGHTS: tuple[Mapping[str, int], ...] = ({}, {"t2": 3}, {"t1": 2, "t3": 8})


@dataclass(frozen=True, slots=True)
class Shape:
    """What differs from policy to policy. `wild` are changes that take limits away, or count them
    in another way."""

    a: int = 1
    b: int = 2
    all: int = 3
    bands: int = 0
    weights: int = 0
    hold: bool = False
    cancel: bool = True
    hand_off: bool = True
    fair_by: int = 0
    queue_max: int = 1000
    shadow: bool = False
    adaptive: AdaptsBy | None = None
    reap_closed_ms: int = 0
    even: bool = False
    refills: bool = False
    tokens: int = 0
    lower: bool = False
    wild: str = ""

    def policy(self, revision: int) -> PoolPolicy:
        limits: dict[str, int | Limit] = {
            "kind:a": self.a,
            "kind:b": Concurrency(
                self.b, adaptive=Adaptive(1, self.adaptive) if self.adaptive else None
            ),
            "pool:all": Concurrency(self.all, shadow=self.shadow),
            "rpm:x": Rate(3, WINDOW_MS),
            "tpm:x": Rate(1000, WINDOW_MS, "tokens"),
            "rpd:x": Quota(6),
        }
        if self.even:
            limits["rpm:x"] = Rate(3, WINDOW_MS, pace_ms=WINDOW_MS // 3, ramp=Ramp(100, 1))
            limits["tpm:x"] = Rate(
                1000, WINDOW_MS, "tokens", pace_ms=WINDOW_MS // 5, ramp=Ramp(50, 300)
            )
        if self.lower:
            for name, bound in (("rpm:x", 2), ("tpm:x", 300), ("rpd:x", 4)):
                limits[name] = replace(cast(Rate | Quota, limits[name]), bound=bound)
        if self.refills:
            for name in ("rpm:x", "tpm:x"):
                limits[name] = replace(cast(Rate, limits[name]), shape="bucket")
        if self.tokens:
            by_tokens = Concurrency(self.tokens, shadow=self.shadow, unit="tokens_in_flight")
            limits["pool:all"] = limits["tif:x"] = by_tokens
        else:
            limits["tif:x"] = 2
        if self.wild == "gone":
            del limits["pool:all"]
        elif self.wild == "other sort":
            limits["rpm:x"] = Concurrency(2)
            limits["pool:all"] = Rate(4, WINDOW_MS)
            limits["tpm:x"] = Concurrency(1000, unit="tokens_in_flight")
        elif self.wild == "counted otherwise":
            limits["rpm:x"] = Rate(3, WINDOW_MS, "images")
            limits["rpd:x"] = Rate(6, WINDOW_MS)
        elif self.wild == "longer window":
            limits["tpm:x"] = Rate(800, 3 * WINDOW_MS, "tokens")
        return PoolPolicy(
            limits,
            lease_ms=LEASE_MS,
            on_lost="cancel" if self.cancel else "finish",
            on_expiry="hold" if self.hold else "reuse",
            revision=revision,
            weights=WEIGHTS[self.weights],
            bands=BANDS[self.bands],
            queue_per_tenant=self.queue_max,
            reap_closed_ms=self.reap_closed_ms,
            hand_off=self.hand_off,
            fair_by=MEASURES_OF_SHARES[self.fair_by],
        )

    def raised(self, other: Shape) -> Shape:
        """The other one, but with no limit lower than here, and the same promises."""
        return replace(
            other,
            a=max(self.a, other.a),
            b=max(self.b, other.b),
            all=max(self.all, other.all),
            tokens=max(self.tokens, other.tokens) if self.tokens else 0,
            hold=self.hold,
            cancel=self.cancel,
            shadow=self.shadow,
            adaptive=self.adaptive,
            reap_closed_ms=0,
            even=False,
            refills=self.refills,
            lower=self.lower and other.lower,
            wild="",
        )


def shapes() -> st.SearchStrategy[Shape]:
    fields: dict[str, st.SearchStrategy[Any]] = {
        "a": st.sampled_from([0, 1, 2, 3, 3]),
        "b": st.sampled_from([1, 2, 3, 3, 9]),
        "all": st.integers(1, 4),
        "bands": st.integers(0, len(BANDS) - 1),
        "weights": st.integers(0, len(WEIGHTS) - 1),
        "hold": st.booleans(),
        "cancel": st.booleans(),
        "hand_off": st.sampled_from([True, True, False]),
        "fair_by": st.sampled_from([0, 0, 1, 2]),
        "queue_max": st.sampled_from([3, 1000, 1000, 1000]),
        "shadow": st.sampled_from([False, False, True]),
        "adaptive": st.sampled_from([None, "refusals", "latency"]),
        "even": st.sampled_from([False, False, True]),
        "refills": st.booleans(),
        "tokens": st.sampled_from([0, 0, 500, 1000]),
        "lower": st.booleans(),
        "reap_closed_ms": st.sampled_from([0, 0, 5000]),
        "wild": st.sampled_from(
            ["", "", "", "gone", "other sort", "counted otherwise", "longer window"]
        ),
    }
    return st.builds(Shape, **fields)
