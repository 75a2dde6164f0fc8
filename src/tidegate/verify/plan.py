"""How long a verification takes and how much load it makes: all of it bounded. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.config import Config
from tidegate.limiter.limits import PoolPolicy

KIND = "text_only"
LIMIT = f"kind:{KIND}"
WEIGHTS = {"light": 1, "heavy": 3}
# Of the measurement of how soon a freed permit is heard of elsewhere.
BATON = "kind:classifier"


@dataclass(frozen=True, slots=True)
class Plan:
    """probes: processes that want permits, `tasks` of each tenant in each. limit: permits; each is
    held for a call of `call_ms`. load_s: how long shares and use are measured; fair: how far off
    shares may be in so short a time. rounds: of each
    latency. jobs: how many are submitted. workers: that do them. kills_worker: whether one of those
    is killed, which takes a claim lease."""

    probes: int
    tasks: int
    limit: int
    call_ms: int
    load_s: float
    fair: float
    rounds: int
    jobs: int
    workers: int
    kills_worker: bool
    lease_ms: int
    claim_lease_ms: int

    @property
    def calls_per_s(self) -> float:
        """At the most: all of them to the emulator."""
        return self.limit * 1000 / self.call_ms

    def policy(self, config: Config) -> PoolPolicy:
        """The deployment's own words on failures, with limits of ours."""
        return PoolPolicy(
            {LIMIT: self.limit, BATON: 1},
            lease_ms=self.lease_ms,
            when_away=config.when_valkey_away,
            on_lost=config.on_lost,
            on_expiry=config.on_expiry,
            weights=WEIGHTS,
            queue_per_tenant=1_000,
        )


def plan_of(config: Config, *, quick: bool) -> Plan:
    """About 15 s, or about a minute."""
    if quick:
        return Plan(
            probes=2,
            tasks=6,
            limit=6,
            call_ms=120,
            load_s=4.0,
            fair=0.25,
            rounds=60,
            jobs=8,
            workers=1,
            kills_worker=False,
            lease_ms=min(config.lease_ms, 1_000),
            claim_lease_ms=config.claim_lease_ms,
        )
    return Plan(
        probes=3,
        tasks=8,
        limit=8,
        call_ms=150,
        load_s=12.0,
        fair=0.1,
        rounds=300,
        jobs=40,
        workers=2,
        kills_worker=config.claim_lease_ms <= 20_000,
        lease_ms=config.lease_ms,
        claim_lease_ms=config.claim_lease_ms,
    )
