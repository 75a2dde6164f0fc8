"""Doctor: checks of a deployment, and how to fix what they find.

Facts are gathered by `limiter.diagnostics`, `store.diagnostics` and `upstream.fetch`, and judged
here. Invariant: nothing is started or changed, and nothing remains: one object is written to a
bucket and deleted immediately.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pydantic import SecretStr

from tidegate.call import DEFAULT_POOL, new_id
from tidegate.doctor import checks, stores
from tidegate.doctor.checks import Finding, State, fail, ok, skipped, warn
from tidegate.errors import ConfigError, LimiterUnavailable, StoreUnavailable, TidegateError
from tidegate.limiter import PoolPolicy, Snapshot
from tidegate.policy.deployment import Upstream, deployed, deployed_upstreams, emulates, stated_by
from tidegate.policy.format import of_plain
from tidegate.policy.live import changes_of
from tidegate.settings import Config, load
from tidegate.store.provider.upstreams import UpstreamProcess, UpstreamRevision
from tidegate.store.records import PolicyRecord
from tidegate.store.statistics import Total
from tidegate.store.tenants import Key

__all__ = ["Finding", "State", "examine"]

_ONLINE_MS = 5_000
_RECORDS = 50


@dataclass
class _Facts:
    """Results of one part of the examination that another part needs."""

    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    records: dict[str, list[PolicyRecord]] = field(default_factory=dict)
    any_key: bool | None = None
    unvouched: list[Key] | None = None
    called: list[Total] | None = None
    live: UpstreamRevision | None = None
    processes: list[UpstreamProcess] = field(default_factory=list)
    ready: int | None = None  # jobs that a worker could begin


async def examine(*, online: bool = True) -> list[Finding]:
    """Examine the deployment that the settings describe; providers and buckets only if `online`."""
    try:
        config = load()
        policy, others = deployed(config), deployed_upstreams(config)
    except ConfigError as invalid:
        fix = "see docs/configuration.md; `tidegate config check` shows all settings"
        return [fail("settings.sound", str(invalid), fix)]
    policies = {DEFAULT_POOL: policy, **others.policies}
    found = [ok("settings.sound", "the settings and the policy's file are sound")]
    found += checks.judge_settings(config)
    found += await asyncio.to_thread(lambda: list(checks.examine_machine(config)))
    facts = _Facts()
    bundled = config.embedded
    config, reason = _with_bundled(config)
    if reason:
        found += [skipped("valkey.reach", reason), skipped("postgresql.reach", reason)]
    else:
        found += await _valkey(config, policies, facts, bundled=bundled)
        found += await _postgresql(config, policies, facts)
    found += checks.judge_access(config, facts.any_key, facts.unvouched)
    for pool, snapshot in facts.snapshots.items():
        found += checks.judge_pool(pool, policies[pool], snapshot, facts.records.get(pool))
    found.append(checks.judge_blobs(config, facts.snapshots))
    made_up = DEFAULT_POOL if emulates(config) else ""
    if facts.live is not None:
        stated, live = stated_by(config), changes_of(facts.live.upstreams)
        others = stated.deployment(live)
        added = {pool: one for pool, one in others.policies.items() if pool not in policies}
        policies |= others.policies
        found += await _added_live(config, added, facts)
        found += checks.judge_live(facts.live.revision, others, stated.tables(), facts.processes)
        if facts.ready is not None:
            found.append(checks.judge_workers(facts.processes, facts.ready))
    found += checks.judge_preempt(others.upstreams, made_up)
    if facts.called is not None:
        today = datetime.now(UTC).date()
        found += checks.judge_prices(others.upstreams, facts.called, today, made_up)
    if online:
        found += await asyncio.gather(*(_provider(one, config) for one in others.upstreams))
        own = [one for one in others.upstreams if one.is_own]
        for one in own:
            if records := facts.records.get(one.pool):
                policies[one.pool] = of_plain(records[0].policy)
        found += await asyncio.gather(*(_server(one, policies[one.pool]) for one in own))
        found += await _bucket(config)
    rooms = list(dict.fromkeys(one.room for one in found))
    return sorted(found, key=lambda one: rooms.index(one.room))


def _with_bundled(config: Config) -> tuple[Config, str]:
    """Return the settings with the addresses of running bundled servers; otherwise the reason why
    none run."""
    if not config.embedded:
        return config, ""
    from tidegate.embedded.lease import Folder

    services = Folder(config.data_dir).read().services
    running = {name: one.url for name, one in services.items() if one.identity.alive and one.ready}
    if not {"valkey", "postgres"} <= running.keys():
        return config, "bundled, and not running: `tidegate up` starts them"
    urls = {
        "redis_url": SecretStr(running["valkey"]),
        "database_url": SecretStr(running["postgres"]),
    }
    return config.model_copy(update=urls), ""


async def _valkey(
    config: Config, policies: dict[str, PoolPolicy], facts: _Facts, *, bundled: bool
) -> list[Finding]:
    from tidegate.limiter import examine as examine_server

    assert config.redis_url is not None
    found: list[Finding] = []
    for pool in policies:
        try:
            report = await examine_server(config.redis_url.get_secret_value(), pool)
        except (LimiterUnavailable, ConfigError) as failed:
            return [*found, stores.judge_absence(failed)]
        if not found:
            found = [ok("valkey.reach", "it answers")]
            found += stores.judge_valkey(report, config.lease_ms, embedded=bundled)
        if report.snapshot is not None:
            facts.snapshots[pool] = report.snapshot
    return found


async def _added_live(
    config: Config, policies: dict[str, PoolPolicy], facts: _Facts
) -> list[Finding]:
    """Return findings on the pools of upstreams that were added at run time."""
    from tidegate.limiter import examine as examine_server

    found: list[Finding] = []
    assert config.redis_url is not None
    for pool, policy in policies.items():
        try:
            report = await examine_server(config.redis_url.get_secret_value(), pool)
        except (LimiterUnavailable, ConfigError):
            return found  # reported by another finding
        if report.snapshot is not None:
            facts.snapshots[pool] = report.snapshot
            records = facts.records.get(pool)
            found += checks.judge_pool(pool, policy, report.snapshot, records)
    return found


async def _postgresql(
    config: Config, policies: dict[str, PoolPolicy], facts: _Facts
) -> list[Finding]:
    from tidegate.store.database import FIRST
    from tidegate.store.diagnostics import examine as examine_server

    assert config.database_url is not None
    url = config.database_url.get_secret_value()
    try:
        report = await examine_server(url)
    except (StoreUnavailable, ConfigError) as failed:
        return [stores.judge_no_answer(failed)]
    if report.revision is not None and report.revision >= FIRST:
        await _read_record(url, policies, facts, report.revision)
    snapshot = facts.snapshots.get(DEFAULT_POOL)
    processes = None if snapshot is None else len(snapshot.processes)
    return [ok("postgresql.reach", "it answers"), *stores.judge(report, processes)]


async def _read_record(
    url: str, policies: dict[str, PoolPolicy], facts: _Facts, revision: str
) -> None:
    """Read policies and keys; a part that cannot be read is reported by another finding."""
    from tidegate.store.database import Connections
    from tidegate.store.jobs import stuck_counts
    from tidegate.store.provider.upstreams import UpstreamRevisions
    from tidegate.store.statistics import UsageTotals
    from tidegate.store.tenants import Policies, Tenants

    connections = Connections(url, size=1)
    try:
        if revision >= "0023":
            upstreams = UpstreamRevisions(connections)
            facts.live, facts.processes = await upstreams.newest(), await upstreams.processes()
            facts.ready = (await stuck_counts(connections)).ready
        live = () if facts.live is None else facts.live.upstreams
        for pool in dict.fromkeys((*policies, *live)):
            facts.records[pool] = await Policies(connections).history(pool, _RECORDS)
        tenants = Tenants(connections)
        facts.any_key = await tenants.any_key()
        if revision >= "0014":
            facts.unvouched = await tenants.unvouched_keys()
        if revision >= "0037":
            today = datetime.now(UTC).date()
            since = today - checks.PRICES_OVER
            totals = UsageTotals(connections).totals
            facts.called = await totals(("model", "day"), since, today)
    except StoreUnavailable:
        return  # the rights or the schema are wrong, which another finding reports
    finally:
        await connections.aclose()


async def _provider(upstream: Upstream, config: Config) -> Finding:
    from tidegate.upstream.credentials import open_wire
    from tidegate.upstream.fetch import request_models
    from tidegate.upstream.transport import Timeouts

    check = f"provider.{upstream.name}"
    if upstream.name == DEFAULT_POOL and config.emulated:
        return skipped(check, "emulated")
    dialect, url = next(iter(upstream.base_urls.items()))
    timeouts = Timeouts(_ONLINE_MS, _ONLINE_MS, _ONLINE_MS, _ONLINE_MS)
    async with open_wire(timeouts, [upstream]) as wire:
        probed = await request_models(wire, upstream, dialect)
    place = f"{dialect} at {url}"
    access = upstream.access(dialect)
    proves = bool(upstream.key) or access.authentication is not None
    if access.network is not None and access.network.proxy is not None:
        place += f" by the proxy {access.network.proxy}"
    match probed.status:
        case None:
            fix = "is the address right, and may this machine go out? --offline leaves this out"
            return fail(check, f"{place}: {probed.problem}", fix)
        case 200:
            return ok(check, f"{place} {'takes the key' if proves else 'answers'}")
        case 400 | 401 | 403:
            fix = "set another key, or give this one the right to the API"
            return fail(check, f"{place} refuses the key ({probed.status})", fix)
        case 429:
            return warn(check, f"{place} answers 429: the account has used up a quota", "wait")
        case 404 | 405:
            return warn(
                check, f"{place} has no list of models: the key is not tested", "try a call"
            )
        case status:
            return warn(check, f"{place} answers {status}", "see the provider's status page")


async def _server(upstream: Upstream, policy: PoolPolicy) -> Finding:
    from tidegate.upstream.credentials import open_wire
    from tidegate.upstream.server_load import server_load
    from tidegate.upstream.transport import Timeouts

    timeouts = Timeouts(_ONLINE_MS, _ONLINE_MS, _ONLINE_MS, _ONLINE_MS)
    async with open_wire(timeouts, [upstream]) as wire:
        load = await server_load(wire, upstream)
    return checks.judge_server(upstream.name, policy, load)


async def _bucket(config: Config) -> list[Finding]:
    from tidegate.store.blobs import Blobs

    if not config.blob_url:
        return []
    key, data = f"doctor/{new_id()}", b"tidegate doctor"
    try:
        async with asyncio.timeout(_ONLINE_MS / 1000):
            blobs = Blobs.from_url(config.blob_url, config.data_dir)
            await blobs.put(key, data)
            is_same = await blobs.get(key) == data
            await blobs.delete([key])
    except (TidegateError, TimeoutError, ValueError) as failed:
        fix = "see whether BLOB_URL and the cloud's own variables are right"
        why = str(failed) or f"no answer within {_ONLINE_MS} ms"
        return [fail("files.bucket", f"{config.blob_url}: {why}", fix)]
    if not is_same:
        return [fail("files.bucket", "what was written is not what was read", "another bucket")]
    return [ok("files.bucket", f"{config.blob_url} can be written, read and deleted from")]
