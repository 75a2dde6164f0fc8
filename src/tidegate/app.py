"""Composition root: the one place that wires the parts of a process together."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from functools import cache, partial
from typing import TYPE_CHECKING
from uuid import uuid4

from tidegate import settings as configuration
from tidegate.call import DEFAULT_POOL, Kind
from tidegate.dashboard.rollup import Rollup, counting
from tidegate.dialects.spec import Dialect
from tidegate.errors import LimiterUnavailable, StoreUnavailable
from tidegate.http.auth import Authenticator, TokenTrust
from tidegate.http.browsers import Origins, Sessions, SignIn
from tidegate.http.services import Services
from tidegate.limiter import Limiter, PoolPolicy
from tidegate.metrics.instruments import Calls, Instruments, Limiting, Tally
from tidegate.metrics.process import Board, Exposition, ProcessState, Watch
from tidegate.metrics.verdict import Standing
from tidegate.operator_key import operator_key
from tidegate.policy.deployment import Deployment, deployed, deployed_upstreams, stated_by
from tidegate.policy.live import changes_of
from tidegate.record import ActiveCalls, CallListeners
from tidegate.settings import Config, secret
from tidegate.spine.hand_over import count_again
from tidegate.spine.native import Relay
from tidegate.spine.prompt import PromptCalls
from tidegate.spine.resources import Resources, shown_at
from tidegate.spine.routing import Targets
from tidegate.spine.run import Spine
from tidegate.spine.upstreams import LiveUpstreams, Pools, following, revision_to_start_with
from tidegate.store.blobs import Blobs
from tidegate.store.provider.upstreams import UpstreamProcess
from tidegate.store.store import Store
from tidegate.telemetry.logging import NAMED, Log, get_logger
from tidegate.telemetry.tracing import Tracing, collector_variables, names_collector
from tidegate.upstream.credentials import Signers, open_wire
from tidegate.upstream.fetch import ImageFetcher
from tidegate.upstream.gemini import GeminiProcessor
from tidegate.upstream.issuer import Issuer
from tidegate.upstream.transport import Timeouts

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tidegate.http.server import Gateway
    from tidegate.jobs.reconciliation import NightlyReconciliation

log = get_logger()

# New objects before a garbage collection, which blocks the event loop.
_GC_THRESHOLD = 50_000
_POLL_S, _LONGEST_POLL_S = 0.02, 2.0
_COUNTED_WITHIN_S = 2.0


def create_app(
    config: Config | Callable[[], Config] | None = None, *, warm_within_ms: int = 0
) -> Gateway:
    """Return the web application of one API process: `uvicorn tidegate.app:create_app --factory`.

    `config` must be complete, with URLs and key also for bundled servers; a function is called at
    each start. The application starts once the stores have answered, or after `warm_within_ms`.
    """
    # Not imported by workers: together they take a quarter of the start.
    with _models_built_at_use():  # those of the OpenAPI document: a twelfth of the start
        import fastapi  # noqa: F401
    from tidegate.http.server import build

    settings = config or configuration.load()

    @asynccontextmanager
    async def warm() -> AsyncIterator[Services]:
        whole = settings() if callable(settings) else settings
        async with open_services(whole, "api") as services, _counting(services) as counted:
            await _answered(services, warm_within_ms, counted)
            yield services

    return build(warm, _add_dashboard)


def _add_dashboard(app: FastAPI) -> None:
    from tidegate.dashboard import routes

    routes.install(app)


@contextmanager
def _models_built_at_use() -> Iterator[None]:
    """Let Pydantic build the models that are imported in the block when each is used first."""
    from pydantic import BaseModel

    inherited = BaseModel.model_config
    BaseModel.model_config = {**inherited, "defer_build": True}
    try:
        yield
    finally:
        BaseModel.model_config = inherited


async def _answered(services: Services, within_ms: int, counted: asyncio.Task[None]) -> None:
    """Return once Valkey and PostgreSQL have answered and background work is counted, or after
    `within_ms`."""
    if not within_ms:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(within_ms / 1000):
            await services.limiter.joined()
            fits = await services.store.schema_fits()
            while not fits:
                await asyncio.sleep(_POLL_S)
                fits = await services.store.schema_fits()
            await asyncio.shield(counted)


@asynccontextmanager
async def _counting(services: Services) -> AsyncIterator[asyncio.Task[None]]:
    """Context with a task that ends once all background work is counted again, which is necessary
    if Valkey lost its data while no process ran."""
    task = asyncio.create_task(_count_background(services))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _count_background(services: Services) -> None:
    wait_s = _POLL_S
    while True:
        with suppress(StoreUnavailable, LimiterUnavailable):  # tried again below
            if await services.store.schema_fits():
                await count_again(services.store.background, services.spine)
                return
        await asyncio.sleep(wait_s)
        wait_s = min(_LONGEST_POLL_S, 2 * wait_s)


async def run_worker(
    config: Config,
    stop: asyncio.Event,
    on_ready: Callable[[], None] = lambda: None,
    alongside: Callable[[Services], AbstractAsyncContextManager[None]] | None = None,
) -> None:
    """Work on jobs until `stop` is set, then drain within `shutdown_grace_ms`; all within the
    context that `alongside` returns."""
    from tidegate.jobs.worker import Worker  # not in an API: it takes a thirtieth of the start

    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(open_services(config, "worker"))
        if alongside is not None:
            await stack.enter_async_context(alongside(services))
        on_ready()
        counted = await stack.enter_async_context(_counting(services))
        with suppress(TimeoutError):
            async with asyncio.timeout(_COUNTED_WITHIN_S):
                await asyncio.shield(counted)
        worker = Worker(
            config=config,
            store=services.store,
            blobs=services.blobs,
            limiter=services.limiter,
            prompts=services.prompts,
            relay=services.relay,
        )
        background = [asyncio.create_task(_send_webhooks(config, services.store))]
        if config.alert_webhook_url is not None:
            background += _send_alerts(config, services)
        if config.reconcile:
            background.append(asyncio.create_task(_reconciliation(config, services).run()))
        try:
            await _known(services.upstreams, stop)
            await worker.run(stop)
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)


async def _known(upstreams: LiveUpstreams, stop: asyncio.Event) -> None:
    """Return once the live changes to upstreams are known, or `stop` is set. Earlier, jobs of an
    added upstream would fail, and a drained upstream would be called."""
    waits = [asyncio.create_task(one.wait()) for one in (upstreams.is_known, stop)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def run_worker_of(
    pool: str, policy: PoolPolicy, config: Config, instance_id: str, stop: asyncio.Event
) -> None:
    """Work on the jobs of a pool other than the deployment's, under a policy that is not on record,
    until `stop` is set; without batches and webhooks."""
    from tidegate.jobs.worker import Worker

    assert config.redis_url is not None
    async with AsyncExitStack() as stack:
        blobs = Blobs.from_url(config.blob_url, config.data_dir)
        store = _store_of(config, blobs, instance_id)
        await store.start()
        stack.push_async_callback(store.aclose)
        url = config.redis_url.get_secret_value()
        limiter = await stack.enter_async_context(
            Limiter.from_url(
                url, pool=pool, policy=policy, instance_id=instance_id, on_conflict="keep"
            )
        )
        targets = Targets(deployed_upstreams(config))
        pools = dict.fromkeys(targets.upstreams, limiter)
        spine = _spine_of(config, targets, pools, Tracing(), store)
        relay = await stack.enter_async_context(_open_relay(config, spine, store, Signers()))
        prompts = await stack.enter_async_context(_open_prompts(config, relay, store))
        worker = Worker(
            config=config,
            store=store,
            blobs=blobs,
            limiter=limiter,
            prompts=prompts,
            relay=relay,
            pool=pool,
        )
        await worker.run(stop)


def _reconciliation(config: Config, services: Services) -> NightlyReconciliation:
    from tidegate.jobs.reconciliation import NightlyReconciliation

    record, upstreams = services.store.reconciliations, services.upstreams
    return NightlyReconciliation(record, lambda: upstreams.deployment, config.reconcile, secret)


async def _send_webhooks(config: Config, store: Store) -> None:
    if config.webhook_secret is not None:
        from tidegate.jobs.webhooks import WebhookSender

        await WebhookSender(config, store).run()


def _send_alerts(config: Config, services: Services) -> list[asyncio.Task[None]]:
    """Start the tasks that raise alerts and post them. Raises ConfigError."""
    from tidegate.jobs.webhooks import AlertSender, CauseAlerts

    alerts = AlertSender(config, services.store)
    causes = CauseAlerts(services.standing, services.store.alerts)
    return [asyncio.create_task(alerts.run()), asyncio.create_task(causes.run())]


@asynccontextmanager
async def open_services(config: Config, role: str) -> AsyncIterator[Services]:
    """Open all services in order of dependence, and close them in reverse. Starts even if Valkey or
    PostgreSQL is unavailable, and reconnects."""
    deployed_upstreams(config)  # an error in the file is reported whatever was changed live
    instance_id = f"{role}-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
    async with AsyncExitStack() as stack:
        blobs = Blobs.from_url(config.blob_url, config.data_dir)
        stack.callback(asyncio.create_task(_watch_blobs(blobs)).cancel)
        store, rollup = await stack.enter_async_context(_open_store(config, blobs, instance_id))
        instruments = Instruments()
        tracing = await stack.enter_async_context(_tracing(store.listeners, role, instance_id))
        process = UpstreamProcess(instance_id, role)
        live = await stack.enter_async_context(
            _open_upstreams(config, process, (store, rollup), instruments.tally, tracing)
        )
        limiters, keepers = live.pools.limiters, live.pools.keepers
        limiter, spine = limiters[DEFAULT_POOL], live.relay.spine
        name = os.environ.get(NAMED) or role
        watch = Watch(instruments, name, limiters=limiters, store=store, health=spine.health)
        stack.callback(asyncio.create_task(watch.run()).cancel)
        board = Board(limiter, instance_id, ActiveCalls(), spine.health)
        stack.callback(asyncio.create_task(board.run()).cancel)
        await live.open(board.share)
        await stack.enter_async_context(following(live, store.notifications))
        gate = _gate_of(config, store)
        if role == "api":
            await stack.enter_async_context(gate.at_work())
        prompts = _prompts_of(config, live.relay, store, live.processors)
        stack.push_async_callback(prompts.aclose)
        services = Services(
            config=config,
            listeners=store.listeners,
            tally=instruments.tally,
            exposition=Exposition(instruments, watch, keepers, store.queue_depths, live.loads),
            state=_counted(store.listeners, instruments, ProcessState(instance_id, watch)),
            board=board,
            standing=Standing(keepers, board, store),
            store=store,
            blobs=blobs,
            limiter=limiter,
            spine=spine,
            prompts=prompts,
            keeper=keepers[DEFAULT_POOL],
            relay=live.relay,
            keepers=keepers,
            limiters=limiters,
            gate=gate,
            operator_key=operator_key(config),
            origins=Origins(config),
            sign_in=_sign_in(config),
            sessions=Sessions(store.tenants),
            budgets=store.budgets,
            upstreams=live,
        )
        _collect_rarely()
        _log_start(role, instance_id, limiter)
        yield services
        services.draining.set()
        log.info(Log.STOPPED, role=role, instance_id=instance_id)


def _sign_in(config: Config) -> SignIn | None:
    """Return the sign-in by an issuer, None if there is no issuer."""
    if not config.oidc_issuer:
        return None
    return SignIn(config, operator_key(config).get_secret_value())


def _gate_of(config: Config, store: Store) -> Authenticator:
    """Return the authenticator of API keys, and of tokens if their issuer is set."""
    tokens = None
    if config.jwt_issuer:
        issuer = Issuer(config.jwt_issuer)
        tokens = TokenTrust(issuer, config.jwt_audience, config.jwt_tenant_claim)
    outage_ms = config.auth_outage_ms
    return Authenticator(store.tenants, on=config.requires_keys, outage_ms=outage_ms, tokens=tokens)


def _log_start(role: str, instance_id: str, limiter: Limiter) -> None:
    limits = {kind.value: limiter.policy.bound(kind.limit) for kind in Kind}
    log.info(Log.STARTED, role=role, instance_id=instance_id, limits=limits)


def _counted(
    listeners: CallListeners, instruments: Instruments, state: ProcessState
) -> ProcessState:
    """Have ended calls counted for scrapes, and failed ones remembered in `state`."""
    listeners.listen(Calls(instruments.tally).take)
    listeners.listen(state.take)
    return state


@cache
def _collect_rarely() -> None:
    """Exclude objects that live as long as the process from garbage collection, once per process: a
    full collection of imported modules would repeatedly block the event loop for a tenth of a
    second. No collection runs first: it would take a tenth of the start."""
    gc.freeze()
    # Objects here are rarely part of a cycle. The default threshold of 700 new objects would cost
    # each request several microseconds.
    gc.set_threshold(_GC_THRESHOLD, 20, 20)


async def _watch_blobs(blobs: Blobs, every_s: float = 30) -> None:
    """Log blob store outages: at the start, before the first upload finds out, and later ones that
    a write meets. Ping while an outage lasts."""
    is_logged, is_due = False, True
    while True:
        if is_due:
            try:
                await blobs.ping()
                is_logged = False
            except StoreUnavailable as error:
                if not is_logged:
                    log.error(Log.BLOBS_AWAY, detail=error.message)
                is_logged = True
        await asyncio.sleep(every_s)
        is_due = blobs.unavailable or blobs.is_silent


@asynccontextmanager
async def _open_store(
    config: Config, blobs: Blobs, instance_id: str
) -> AsyncIterator[tuple[Store, Rollup]]:
    """Context with a started store that counts this process's calls."""
    store = _store_of(config, blobs, instance_id)
    await store.start()
    try:
        async with counting(store) as rollup:
            yield store, rollup
    finally:
        await store.aclose()
        store.listeners.flush()


@asynccontextmanager
async def _open_upstreams(
    config: Config,
    process: UpstreamProcess,
    recording: tuple[Store, Rollup],
    tally: Tally,
    tracing: Tracing,
) -> AsyncIterator[LiveUpstreams]:
    """Context with the upstreams in force, their pools, and the relay to them."""
    store, rollup = recording
    configured, stated = deployed(config), stated_by(config)
    start = await revision_to_start_with(store.upstreams)
    deployment = stated.deployment(changes_of(start.upstreams))
    async with AsyncExitStack() as stack:
        pools = await stack.enter_async_context(
            _open_pools(config, store, process.instance_id, configured, deployment, tally)
        )
        rollup.watch(pools.limiters)
        signers = Signers()
        spine = _spine_of(config, Targets(deployment), pools.limiters, tracing, store)
        relay = await stack.enter_async_context(_open_relay(config, spine, store, signers))
        yield LiveUpstreams(
            config=config,
            stated=stated,
            start=start,
            deployment=deployment,
            record=store.upstreams,
            process=process,
            pools=pools,
            relay=relay,
            signers=signers,
        )


@asynccontextmanager
async def _open_pools(
    config: Config,
    store: Store,
    instance_id: str,
    configured: PoolPolicy,
    others: Deployment,
    tally: Tally,
) -> AsyncIterator[Pools]:
    """Context with this process's pools, whose policies are kept in force."""
    providers = {one.pool: one.provider for one in others.upstreams}
    pools = Pools(
        config, store.policies, instance_id, lambda pool: Limiting(tally, pool), store.connections
    )
    try:
        for pool, policy in ({DEFAULT_POOL: configured} | dict(others.policies)).items():
            await pools.enter(pool, policy, providers.get(pool))
        yield pools
    finally:
        await pools.aclose()


def _spine_of(
    config: Config, targets: Targets, pools: dict[str, Limiter], tracing: Tracing, store: Store
) -> Spine:
    return Spine(
        config=config,
        targets=targets,
        pools=pools,
        tracing=tracing,
        budgets=store.budgets,
        journal=store.journal,
    )


@asynccontextmanager
async def _open_relay(
    config: Config, spine: Spine, store: Store, signers: Signers
) -> AsyncIterator[Relay]:
    upstreams = spine.targets.upstreams.values()
    async with open_wire(_timeouts_of(config), upstreams, signers) as wire:
        show = partial(shown_at, wire, spine.timeouts)
        resources = Resources(
            store.provider_resources, store.background, spine.targets, store.requests, show
        )
        yield Relay(spine, wire, resources)


@asynccontextmanager
async def _tracing(listeners: CallListeners, role: str, instance_id: str) -> AsyncIterator[Tracing]:
    """Context with tracing: spans and metrics go to a collector if the environment or `.env` names
    one."""
    variables = collector_variables()
    os.environ.update(variables)  # the SDK reads them there
    if not names_collector(variables):
        yield Tracing()
        return
    try:
        from tidegate.metrics.otel import Collector
    except ImportError as missing:
        log.warning(Log.NO_OTEL, missing=missing.name, fix="pip install 'tidegate[otel]'")
        yield Tracing()
        return
    collector = Collector(f"tidegate-{role}", instance_id)
    listeners.listen(collector.take)
    try:
        yield Tracing(collector.samples)
    finally:
        listeners.flush()
        await asyncio.to_thread(collector.close)


def _store_of(config: Config, blobs: Blobs, instance_id: str) -> Store:
    assert config.database_url is not None
    return Store(
        config.database_url.get_secret_value(),
        instance_id=instance_id,
        blobs=blobs,
        spill_dir=config.data_dir / "spill",
        spill_max_bytes=config.spill_max_bytes,
        audit_full=config.audit_full,
        claim_lease_ms=config.claim_lease_ms,
        bodies_off=config.bodies_off,
    )


@asynccontextmanager
async def _open_prompts(config: Config, relay: Relay, store: Store) -> AsyncIterator[PromptCalls]:
    """Context with Google's SDK for each upstream with Gemini's dialect, and the relay for the
    others, in a process whose upstreams do not change."""
    spine = relay.spine
    async with AsyncExitStack() as stack:
        processors = {}
        for upstream in spine.targets.upstreams_of(Dialect.GEMINI):
            processor = processors[upstream.name] = GeminiProcessor(
                api_key=upstream.key,
                base_url=upstream.base_urls[Dialect.GEMINI],
                timeouts=spine.timeouts[upstream.name],
                access=upstream.access(Dialect.GEMINI),
                signers=relay.wire.signers,
            )
            stack.push_async_callback(processor.aclose)
        prompts = _prompts_of(config, relay, store, processors)
        stack.push_async_callback(prompts.aclose)
        yield prompts


def _prompts_of(
    config: Config, relay: Relay, store: Store, processors: Mapping[str, GeminiProcessor]
) -> PromptCalls:
    return PromptCalls(
        config=config,
        relay=relay,
        processors=processors,
        blobs=store.blobs,
        fetcher=_fetcher_of(config),
        listeners=store.listeners,
    )


def _fetcher_of(config: Config) -> ImageFetcher:
    return ImageFetcher(max_bytes=config.max_file_bytes, timeout_ms=config.fetch_timeout_ms)


def _timeouts_of(config: Config) -> Timeouts:
    return Timeouts(
        connect_ms=config.connect_timeout_ms,
        first_byte_ms=config.first_byte_timeout_ms,
        idle_ms=config.idle_timeout_ms,
        total_ms=config.total_timeout_ms,
    )
