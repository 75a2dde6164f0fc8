"""The composition root: the only place that knows how the rooms are put together."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from uuid import uuid4

from fastapi import FastAPI

from tidegate import config as configuration
from tidegate.call import CLASSIFIER_LIMIT, DEFAULT_POOL
from tidegate.config import Config
from tidegate.http.server import build
from tidegate.http.services import Services
from tidegate.jobs.worker import Worker
from tidegate.limiter import Limiter, PoolPolicy
from tidegate.pipeline import Pipeline
from tidegate.providers.fetch import ImageFetcher
from tidegate.providers.gemini import GeminiProcessor, Timeouts
from tidegate.store.blobs import Blobs
from tidegate.store.store import Store
from tidegate.telemetry import Log, get_logger

log = get_logger()


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
        )
        await worker.run(stop)


@asynccontextmanager
async def open_services(config: Config, role: str) -> AsyncIterator[Services]:
    """Open everything in order of dependence; close it in the opposite order.

    Starts even when Valkey or PostgreSQL is away: they are reconnected to.
    """
    assert config.database_url is not None
    assert config.redis_url is not None
    assert config.gemini_api_key is not None
    instance_id = f"{role}-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
    async with AsyncExitStack() as stack:
        blobs = Blobs.from_url(config.blob_url, config.data_dir)
        store = Store.from_url(
            config.database_url.get_secret_value(),
            instance_id=instance_id,
            blobs=blobs,
            spill_dir=config.data_dir / "spill",
            spill_max_bytes=config.spill_max_bytes,
            audit_full=config.audit_full,
            claim_lease_ms=config.claim_lease_ms,
        )
        await store.start()
        stack.push_async_callback(store.aclose)
        processor = GeminiProcessor(
            api_key=config.gemini_api_key.get_secret_value(),
            base_url=config.gemini_base_url,
            timeouts=Timeouts(
                connect_ms=config.connect_timeout_ms,
                first_byte_ms=config.first_byte_timeout_ms,
                idle_ms=config.idle_timeout_ms,
                total_ms=config.total_timeout_ms,
            ),
        )
        await processor.start()
        stack.push_async_callback(processor.aclose)
        limiter = Limiter.from_url(
            config.redis_url.get_secret_value(),
            pool=DEFAULT_POOL,
            policy=policy_of(config),
            instance_id=instance_id,
        )
        await limiter.start()
        stack.push_async_callback(limiter.aclose)
        changing = asyncio.create_task(put_in_force(limiter, policy_of(config)))
        stack.callback(changing.cancel)
        fetcher = ImageFetcher(max_bytes=config.max_file_bytes, timeout_ms=config.fetch_timeout_ms)
        pipeline = Pipeline(
            config=config, limiter=limiter, processor=processor, blobs=blobs, fetcher=fetcher
        )
        services = Services(config, store, blobs, limiter, pipeline)
        # What the imports made lives as long as the process: a full collection that walks it
        # would stop the event loop for a tenth of a second, again and again.
        gc.collect()
        gc.freeze()
        log.info(Log.STARTED, role=role, instance_id=instance_id, limits=config.rate_limits)
        yield services
        services.draining.set()
        log.info(Log.STOPPED, role=role, instance_id=instance_id)


async def put_in_force(limiter: Limiter, wanted: PoolPolicy) -> None:
    """Give the pool this deployment's limits when it has others, from a start with other settings.

    The last start wins, at once for all processes; what runs is not revoked, a lowered limit
    drains. Waits while Valkey is away.
    """
    await limiter.joined()
    before = limiter.policy
    changed = replace(wanted, revision=before.revision + 1)
    if replace(changed, revision=before.revision) != before:
        log.warning(Log.LIMITS_CHANGED, before=before.limits, after=wanted.limits)
        await limiter.set_policy(changed)


def policy_of(config: Config) -> PoolPolicy:
    """The pool's policy as the deployment states it."""
    limits = {f"kind:{kind}": limit for kind, limit in config.rate_limits.items()}
    return PoolPolicy(
        limits={**limits, CLASSIFIER_LIMIT: config.classifier_limit},
        lease_ms=config.lease_ms,
        when_away=config.when_valkey_away,
        on_lost=config.on_lost,
        on_expiry=config.on_expiry,
    )
