"""Reconciliation of a day with a provider, by a command or each night by the workers.

A day is read from the provider's usage API and from the record, compared by model, and stored;
charges that the comparison explains are corrected. Running it again changes nothing more.

Invariants: each night the day before is compared; two workers that compare the same day correct a
charge once; the admin key is read from the environment and never stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from tidegate.admission.charges import Prices, provider_of_upstream
from tidegate.errors import ConfigError, NotFound, StoreUnavailable, UpstreamError
from tidegate.policy.deployment import Deployment, Upstream
from tidegate.policy.providers import PROVIDERS
from tidegate.prices.rates import Rates
from tidegate.prices.reconciliation import ModelDay, ModelFinding, Verdict, compared
from tidegate.store.provider.reconciliations import Reconciliations
from tidegate.telemetry.logging import Log, get_logger
from tidegate.upstream.transport import RelayWire
from tidegate.upstream.usage_api import (
    ADMIN_KEYS,
    USAGE_PROVIDERS,
    USAGE_TIMEOUTS,
    UsageAccount,
    UsageProvider,
    usage_of_day,
)

NIGHTLY_AT = time(5, 0)  # UTC: providers publish the figures of a day some hours later
_CHECK_EVERY_S = 900.0

log = get_logger()


@dataclass(frozen=True, slots=True)
class ReconcileReport:
    """Result for one upstream and day. corrected: the number of charges; 0 for a dry run."""

    upstream: str
    provider: str
    day: date
    findings: Sequence[ModelFinding]
    corrected: int

    @property
    def ours_micros(self) -> int:
        return sum(finding.ours_micros for finding in self.findings)

    @property
    def theirs_micros(self) -> int:
        return sum(finding.theirs.cost_micros for finding in self.findings)

    @property
    def verdict(self) -> Verdict:
        found = {finding.verdict for finding in self.findings}
        order: tuple[Verdict, ...] = ("unexplained", "explained")
        return next((verdict for verdict in order if verdict in found), "equal")


def usage_provider(name: str) -> UsageProvider:
    """Return a provider with a usage API by its name. Raises ConfigError for any other."""
    for provider in USAGE_PROVIDERS:
        if provider == name:
            return provider
    known = ", ".join(USAGE_PROVIDERS)
    raise ConfigError("PROVIDER", name, f"must be one of {known}: no other provider is supported")


def upstream_of(
    deployment: Deployment,
    provider: UsageProvider,
    name: str | None,
    option: str = "--upstream",
) -> Upstream:
    """Return the provider's upstream with this name, which `option` states, or its only one.

    Raises NotFound for an unknown name, and ConfigError if the upstream is no account of the
    provider, there is none, or there are several and no name."""
    of_provider = [one for one in deployment.upstreams if provider_of_upstream(one) == provider]
    found = [one for one in of_provider if name in (None, one.name)]
    if len(found) == 1:
        return found[0]
    if name is not None and name not in (known := [one.name for one in deployment.upstreams]):
        raise NotFound(f"there is no upstream {name}; known: {', '.join(known)}")
    if not of_provider:
        way = f"set {PROVIDERS[provider].key}, or define an upstream"
        raise ConfigError("PROVIDER", provider, f"must be the provider of an upstream: {way}")
    names = ", ".join(one.name for one in of_provider)
    allowed = f"must be one of {names}"
    if name is not None:
        allowed = f"is no account of {provider}; {names} {'is' if len(of_provider) == 1 else 'are'}"
    raise ConfigError(option, name or "(not set)", allowed)


def others_of(
    upstreams: Iterable[Upstream], upstream: Upstream, provider: UsageProvider
) -> list[Upstream]:
    """Return the provider's other upstreams, which may be of the same account."""
    of_provider = (one for one in upstreams if provider_of_upstream(one) == provider)
    return [one for one in of_provider if one.name != upstream.name]


def account_of(
    upstream: Upstream, provider: UsageProvider, secret: Callable[[str], str]
) -> UsageAccount:
    """Return an upstream's account for the usage API. Raises ConfigError if the admin key is not
    set."""
    variable = ADMIN_KEYS[provider]
    key = secret(variable)
    if not key:
        raise ConfigError(variable, "(not set)", "must be set to an admin key of the account")
    network = upstream.access(provider).network
    return UsageAccount(provider, upstream.base_urls[provider], key, network=network)


def nightly_accounts(
    deployment: Deployment, providers: Sequence[str], secret: Callable[[str], str]
) -> list[tuple[Upstream, UsageAccount]]:
    """Return the accounts to compare each night. Raises ConfigError for an unknown provider, or one
    without an upstream or a key."""
    accounts = []
    for name in providers:
        provider = usage_provider(name)
        found = [one for one in deployment.upstreams if provider_of_upstream(one) == provider]
        if not found:
            raise ConfigError("RECONCILE", name, "must be the provider of an upstream")
        accounts += [(one, account_of(one, provider, secret)) for one in found]
    return accounts


async def reconcile(
    record: Reconciliations,
    wire: RelayWire,
    upstream: Upstream,
    account: UsageAccount,
    day: date,
    *,
    others: Sequence[Upstream] = (),
    dry_run: bool = False,
) -> ReconcileReport:
    """Compare a day, correct explained charges and store the findings; with `dry_run` only compare.
    Of a day that has not ended, both sides are incomplete. `others`: the provider's other
    upstreams. Raises UpstreamError and StoreUnavailable."""
    reported = await usage_of_day(wire, account, day)
    recorded = await record.ours(upstream.name, day)
    noon = datetime.combine(day, time(12), UTC).timestamp()
    prices = Prices(upstream, now=lambda: noon)
    models = {*recorded, *reported}
    contexts = {model: prices.most(model)[0] for model in models}
    findings = compared(
        recorded,
        reported,
        {model: prices.of(model) for model in models},
        contexts,
        in_tiers=_rates_in_tiers(prices, recorded),
        beside=await record.ours_of([one.name for one in others], day),
        deleted=await record.deleted(upstream.name, day),
    )
    corrected = 0
    if not dry_run:
        corrected = await record.keep(upstream.name, account.provider, day, findings)
    return ReconcileReport(upstream.name, account.provider, day, findings, corrected)


def _rates_in_tiers(prices: Prices, recorded: Mapping[str, ModelDay]) -> dict[str, list[Rates]]:
    """Return the known rates of the tiers that answers of the day reported, by model."""
    return {
        model: [one for tier in sorted(day.tiers) if (one := prices.of(model, tier)) is not None]
        for model, day in recorded.items()
    }


class NightlyReconciliation:
    """Compares yesterday with the configured providers, once a day."""

    def __init__(
        self,
        record: Reconciliations,
        deployment: Callable[[], Deployment],
        providers: Sequence[str],
        secret: Callable[[str], str],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`deployment`: returns the one in force, of which `nightly_accounts` compares some."""
        self._record = record
        self._deployment = deployment
        self._now = now
        self._done: dict[str, date] = {}  # including days without usage, of which nothing is stored
        self._providers, self._secret = providers, secret

    async def run(self) -> None:
        """Run until cancelled. A failure is logged and tried again later."""
        while True:
            now = self._now()
            if now.time() >= NIGHTLY_AT:
                await self._of_day(now.date() - timedelta(days=1))
            await asyncio.sleep(_CHECK_EVERY_S)

    def _accounts(self) -> list[tuple[Upstream, UsageAccount]]:
        return nightly_accounts(self._deployment(), self._providers, self._secret)

    async def _of_day(self, day: date) -> None:
        try:
            accounts = self._accounts()
        except ConfigError as wrong:  # such as a provider whose upstreams were removed meanwhile
            log.warning(Log.RECONCILE_FAILED, day=f"{day}", why=str(wrong))
            return
        for upstream, account in accounts:
            await self._once(upstream, account, day)

    async def _once(self, upstream: Upstream, account: UsageAccount, day: date) -> None:
        try:
            if self._done.get(upstream.name) == day:
                return
            # The provider's figures may have been incomplete when a person compared them earlier.
            complete_at = datetime.combine(day + timedelta(days=1), NIGHTLY_AT, UTC)
            if await self._record.is_done(upstream.name, day, complete_at):
                self._done[upstream.name] = day
                return
            wire = RelayWire(USAGE_TIMEOUTS)
            await wire.start()
            try:
                others = others_of(self._deployment().upstreams, upstream, account.provider)
                report = await reconcile(self._record, wire, upstream, account, day, others=others)
            finally:
                await wire.aclose()
        except (StoreUnavailable, UpstreamError) as failed:
            log.warning(Log.RECONCILE_FAILED, upstream=upstream.name, day=f"{day}", why=str(failed))
            return
        except Exception as fault:  # the top of a task: logged, and tried again
            why = repr(fault)
            log.exception(Log.RECONCILE_FAILED, upstream=upstream.name, day=f"{day}", why=why)
            return
        self._done[upstream.name] = day
        unexplained = report.verdict == "unexplained"
        (log.warning if unexplained else log.info)(
            Log.RECONCILED,
            upstream=upstream.name,
            day=f"{day}",
            verdict=report.verdict,
            ours_micros=report.ours_micros,
            theirs_micros=report.theirs_micros,
            corrected=report.corrected,
        )
