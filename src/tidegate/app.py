"""The composition root: the only place that knows how the rooms are put together."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from uuid import uuid4

from fastapi import FastAPI

from tidegate import config as configuration
from tidegate.call import DEFAULT_POOL, Kind
from tidegate.config import Config
from tidegate.demand.cost import Prices
from tidegate.errors import StoreUnavailable
from tidegate.http.auth import Gate
from tidegate.http.budgets import BudgetGate
from tidegate.http.server import build
from tidegate.http.services import Services
from tidegate.jobs.webhook import WebhookSender
from tidegate.jobs.worker import Worker
from tidegate.limiter import Limiter, PoolPolicy
from tidegate.pipeline import Pipeline
from tidegate.policy import PolicyKeeper, deployed, deployed_upstreams, policy_to_start_with
from tidegate.policy.upstreams import Deployment
from tidegate.providers.fetch import ImageFetcher
from tidegate.providers.gemini import GeminiProcessor, Timeouts
from tidegate.providers.relay import RelayWire
from tidegate.relay.spine import Relay
from tidegate.relay.targets import Targets
from tidegate.store.blobs import Blobs
from tidegate.store.policies import Policies
from tidegate.store.store import Store
from tidegate.telemetry import Log, get_logger

log = get_logger()

# New objects before a collection, which stops the event loop for as long as it looks at them.
_GC_THRESHOLD = 5_000


def create_app(config: Config | None = None) -> FastAPI:
    """The web application of one API process: `uvicorn tidegate.app:create_app --factory`.

    `config` must be whole: URLs and key filled in, where they are the bundled servers' too.
    """
    settings = config or configuration.load()
    return build(lambda: open_services(settings, "api"))


async def run_worker(config: Config, stop: asyncio.Event) -> None:
    """Work on jobs until `stop` is set, then drain within `shutdown_grace_ms`."""
    async with open_services(config, "worker") as services:
        worker = Worker(
            config=config,
            store=services.store,
            blobs=services.blobs,
            pipeline=services.pipeline,
            relay=services.relay,
        )
        sending = asyncio.create_task(_send_webhooks(config, services.store))
        try:
            await worker.run(stop)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def _send_webhooks(config: Config, store: Store) -> None:
    if config.webhook_secret is not None:
        await WebhookSender(config, store).run()


@asynccontextmanager
async def open_services(config: Config, role: str) -> AsyncIterator[Services]:
    """Open everything in order of dependence; close it in the opposite order.

    Starts even when Valkey or PostgreSQL is away: they are reconnected to.
    """
    wanted, others = deployed(config), deployed_upstreams(config)
    instance_id = f"{role}-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
    async with AsyncExitStack() as stack:
        blobs = Blobs.from_url(config.blob_url, config.data_dir)
        store = _store_of(config, blobs, instance_id)
        await store.start()
        stack.push_async_callback(store.aclose)
        processor = _processor_of(config)
        await processor.start()
        stack.push_async_callback(processor.aclose)
        limiters, keepers = await stack.enter_async_context(
            _open_pools(config, store.policies, instance_id, wanted, others)
        )
        limiter, keeper = limiters[DEFAULT_POOL], keepers[DEFAULT_POOL]
        relay = await stack.enter_async_context(_open_relay(config, others, limiters))
        pipeline = Pipeline(
            config=config,
            limiter=limiter,
            processor=processor,
            blobs=blobs,
            fetcher=_fetcher_of(config),
            prices=Prices(others.upstreams[0]),  # the account of GEMINI_* comes first
        )
        gate = Gate(store.tenants, on=config.asks_for_keys, outage_ms=config.auth_outage_ms)
        budgets = BudgetGate(store.usage, store.spending)
        if role == "api":
            await stack.enter_async_context(_guarding(gate, budgets))
        services = Services(
            config=config,
            store=store,
            blobs=blobs,
            limiter=limiter,
            pipeline=pipeline,
            keeper=keeper,
            relay=relay,
            keepers=keepers,
            limiters=limiters,
            gate=gate,
            budgets=budgets,
        )
        # What the imports made lives as long as the process: a full collection that walks it
        # would stop the event loop for a tenth of a second, again and again.
        gc.collect()
        gc.freeze()
        # Hardly anything here is part of a cycle: looking for them after every 700 new objects, as
        # is usual, costs each request several microseconds.
        gc.set_threshold(_GC_THRESHOLD, 20, 20)
        limits = {kind.value: pipeline.at_once(kind) for kind in Kind}
        log.info(Log.STARTED, role=role, instance_id=instance_id, limits=limits)
        yield services
        services.draining.set()
        log.info(Log.STOPPED, role=role, instance_id=instance_id)


@asynccontextmanager
async def _guarding(gate: Gate, budgets: BudgetGate) -> AsyncIterator[None]:
    """Keep what the gates know the newest; at the end, put on record which keys were used."""
    watching = [asyncio.create_task(one.run()) for one in (gate, budgets)]
    try:
        yield
    finally:
        for task in watching:
            task.cancel()
        with suppress(StoreUnavailable):
            await gate.note_uses()


@asynccontextmanager
async def _open_pools(
    config: Config,
    policies: Policies,
    instance_id: str,
    wanted: PoolPolicy,
    others: Deployment,
) -> AsyncIterator[tuple[dict[str, Limiter], dict[str, PolicyKeeper]]]:
    """The limiters of all pools by name, and the keepers of their policies, at work."""
    limiters: dict[str, Limiter] = {}
    keepers: dict[str, PolicyKeeper] = {}
    async with AsyncExitStack() as stack:
        for pool, policy in ({DEFAULT_POOL: wanted} | dict(others.policies)).items():
            limiters[pool], keepers[pool] = await stack.enter_async_context(
                open_pool(config, policies, instance_id, policy, pool)
            )
            keeping = asyncio.create_task(keepers[pool].run())
            stack.callback(keeping.cancel)
        yield limiters, keepers


@asynccontextmanager
async def _open_relay(
    config: Config, others: Deployment, limiters: dict[str, Limiter]
) -> AsyncIterator[Relay]:
    wire = RelayWire(_timeouts_of(config))
    await wire.start()
    try:
        yield Relay(config=config, targets=Targets(others), pools=limiters, wire=wire)
    finally:
        await wire.aclose()


@asynccontextmanager
async def open_pool(
    config: Config,
    policies: Policies,
    instance_id: str,
    wanted: PoolPolicy,
    pool: str = DEFAULT_POOL,
) -> AsyncIterator[tuple[Limiter, PolicyKeeper]]:
    """The limiter of a pool, with what is on record in force, and the keeper of its policy."""
    assert config.redis_url is not None
    limiter = Limiter.from_url(
        config.redis_url.get_secret_value(),
        pool=pool,
        policy=await policy_to_start_with(policies, pool, wanted),
        instance_id=instance_id,
    )
    async with limiter:
        yield limiter, PolicyKeeper(limiter, policies, wanted=wanted, set_by=instance_id)


def _store_of(config: Config, blobs: Blobs, instance_id: str) -> Store:
    assert config.database_url is not None
    return Store.from_url(
        config.database_url.get_secret_value(),
        instance_id=instance_id,
        blobs=blobs,
        spill_dir=config.data_dir / "spill",
        spill_max_bytes=config.spill_max_bytes,
        audit_full=config.audit_full,
        claim_lease_ms=config.claim_lease_ms,
    )


def _processor_of(config: Config) -> GeminiProcessor:
    assert config.gemini_api_key is not None
    return GeminiProcessor(
        api_key=config.gemini_api_key.get_secret_value(),
        base_url=config.gemini_base_url,
        timeouts=_timeouts_of(config),
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
