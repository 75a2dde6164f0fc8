"""Backing services of a process, bundled if none are configured, and sessions of commands.

Invariant: a process runs on a complete configuration. Missing parts are filled in once, by the
first process of a family, and passed to its children as environment variables, never as arguments.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import sys
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID, uuid4

from pydantic import SecretStr

from tidegate.call import DEFAULT_POOL, Kind
from tidegate.embedded.lease import ServersLease, ServiceName, ensure
from tidegate.errors import ConfigError, InvalidRequest, NotFound, StoreUnavailable
from tidegate.limiter import PoolPolicy, check_server_url
from tidegate.policy.deployment import (
    ORIGINS,
    deployed,
    deployed_upstreams,
    doubtful,
    emulates,
    stated_by,
)
from tidegate.policy.live import NO_CHANGES, LiveChanges, changes_of
from tidegate.settings import NEEDED_IN_THE_OPEN, SECRETS, Config, load, origins, secret
from tidegate.supervisor.supervisor import LIFELINE
from tidegate.telemetry.logging import redact
from tidegate.usual_models import EMULATORS_KEY

if TYPE_CHECKING:
    from tidegate.policy.rollout import PolicyKeeper
    from tidegate.store.batches import BatchStand
    from tidegate.store.database import Connections
    from tidegate.store.requests import Whereabouts

EMULATED = "EMULATED_PROVIDER"
_FILES_OF_TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_MIGRATE_WITHIN_S = 60.0
_RETRY_S = 1.0
_MODELS = {
    "TEXT_MODEL": Kind.TEXT_ONLY,
    "MULTI_MODAL_MODEL": Kind.MULTI_MODAL,
    "IMAGE_MODEL": Kind.IMAGE_GENERATION,
    "CLASSIFIER_MODEL": Kind.TEXT_ONLY,
}


@dataclass(frozen=True, slots=True)
class Ground:
    """A complete configuration; `lease` holds the bundled servers, if there are any."""

    config: Config
    lease: ServersLease | None
    embedded: bool
    emulated: bool


def _quietly(_what: str) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def prepared(
    config: Config,
    *,
    only: Collection[ServiceName] = ("postgres", "valkey", "emulator"),
    busy: Callable[[str], AbstractContextManager[None]] = _quietly,
) -> Iterator[Ground]:
    """Start all services that `config` leaves out, or those in `only`, until the end of the block.

    Blocks until they are ready; `busy` is called with a description and returns a context for each
    wait. Raises `embedded.ServerFailed`.
    """
    services = _missing(config, only)
    lease = None
    if services:
        with busy("starting the bundled servers"):
            lease = ensure(config.data_dir, services)
    try:
        yield Ground(_filled(config, lease), lease, config.embedded, "emulator" in services)
    finally:
        if lease is not None:
            with busy("stopping the bundled servers"):
                lease.close()


def _missing(config: Config, only: Collection[ServiceName]) -> set[ServiceName]:
    services: set[ServiceName] = set()
    if config.embedded:
        services |= {"postgres", "valkey"}
    if "emulator" in only and emulates(config):
        services.add("emulator")
    return services & set(only)


def _filled(config: Config, lease: ServersLease | None) -> Config:
    if lease is None:
        return config
    found: dict[str, Any] = {}
    if lease.database_url:
        found["database_url"] = SecretStr(lease.database_url)
    if lease.redis_url:
        found["redis_url"] = SecretStr(lease.redis_url)
    if lease.emulator_url:
        found["gemini_base_url"] = lease.emulator_url
        found["gemini_api_key"] = SecretStr(EMULATORS_KEY)
    return config.model_copy(update=found)


def load_sound(*, with_jobs: bool = True) -> Config:
    """Return the settings after all checks of `config check`; without those of workers if this
    deployment has none. Raises ConfigError."""
    from tidegate.spine.routing import Targets
    from tidegate.telemetry.tracing import check_collector, collector_variables

    config = load()
    if config.redis_url is not None:
        check_server_url("REDIS_URL", config.redis_url.get_secret_value())
        _check_files_of(config.redis_url.get_secret_value())
    check_collector(collector_variables())
    deployed(config)
    upstreams = deployed_upstreams(config)
    Targets(upstreams)
    if with_jobs and config.reconcile:
        from tidegate.jobs.reconciliation import nightly_accounts

        nightly_accounts(upstreams, config.reconcile, secret)
    return config


def load_to_run(*, with_jobs: bool = True) -> Config:
    """Return the same for a process that is to run, unless its supervisor has checked them;
    possible mistakes are reported. Raises ConfigError."""
    config = load_sound(with_jobs=with_jobs)
    if not is_child():
        warn_of_doubtful(config)
    return config


def warn_of_doubtful(config: Config) -> None:
    """Report each variable with a name similar to a setting's, and each configured model that no
    upstream serves; no model if none is served and no setting names one."""
    from tidegate.spine.routing import Targets

    for one in doubtful(config):
        sys.stderr.write(f"tidegate: {one}\n")
    targets = Targets(deployed_upstreams(config))
    problems = {}
    for name, kind in _MODELS.items():
        try:
            targets.of_prompt(getattr(config, name.lower()), kind)
        except InvalidRequest as refused:
            problems[name] = refused.message
    if len(problems) == len(_MODELS) and not problems.keys() & origins():
        return
    for name, message in problems.items():
        sys.stderr.write(f"tidegate: {name}: {message}\n")


def _check_files_of(redis_url: str) -> None:
    """Raise ConfigError for a file of TLS in REDIS_URL that cannot be read: the limiter would wait
    for a server that it can never reach."""
    for name, path in parse_qsl(urlsplit(redis_url).query):
        if name in _FILES_OF_TLS and not os.access(path, os.R_OK):
            why = f"can't be used: {name} names {path}, which cannot be read"
            raise ConfigError("REDIS_URL", None, why)


def make_folders(config: Config, *others: str) -> None:
    """Create the folders of DATA_DIR that a process writes to, and `others`. Raises ConfigError if
    this user may not."""
    names = (*(() if config.blob_url else ("blobs",)), *others, "spill")
    try:
        for name in names:
            (config.data_dir / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(config.data_dir / "spill", os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as refused:
        why = f"cannot be used: {refused.strerror}; it must be a folder that this user may write to"
        raise ConfigError("DATA_DIR", str(config.data_dir), why) from None


def check_database_url(config: Config) -> None:
    """Raise ConfigError for a URL that can never name a database, so that waiting is useless. Not
    run by `asyncio.run`, which would wait for the thread of a pending look-up of the host."""
    from tidegate.store.diagnostics import check_url

    with closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(check_url(database_url_of(config)))


def migrate(config: Config, show: Callable[[str], object]) -> str | None:
    """Migrate the schema, waiting up to a minute for an unavailable database.

    Returns the new revision, or None if it was current; `show` is called once with the reason for a
    wait. Raises StoreUnavailable after the minute.
    """
    from tidegate.store.database import migrate as run_steps

    deadline = time.monotonic() + _MIGRATE_WITHIN_S
    is_reported = False
    while True:
        try:
            return asyncio.run(run_steps(database_url_of(config)))
        except StoreUnavailable as unavailable:
            if time.monotonic() > deadline:
                raise
            if not is_reported:
                show(f"waiting for PostgreSQL: {redact(str(unavailable))}")
                is_reported = True
            time.sleep(_RETRY_S)


def environment_of(ground: Ground) -> dict[str, str]:
    """Return the variables from which a child reads exactly this configuration.

    Every setting is included, as an empty value if unset, so that an edit of `.env` in the meantime
    cannot give one child other limits than the rest. Their origins are passed beside them.
    """
    variables = {name.upper(): _as_text(value) for name, value in ground.config}
    files = {f"{name}_FILE": "" for name in SECRETS}
    places = origins()
    if ground.embedded:
        places |= dict.fromkeys(NEEDED_IN_THE_OPEN, "the bundled servers")
    if ground.emulated:
        places |= dict.fromkeys(("GEMINI_API_KEY", "GEMINI_BASE_URL"), "the built-in emulator")
    passed = {ORIGINS: json.dumps(places), EMULATED: "1" if ground.emulated else ""}
    return variables | files | passed


def _as_text(value: object) -> str:
    match value:
        case None:
            return ""
        case SecretStr():
            return value.get_secret_value()
        case bool():
            return "1" if value else "0"
        case Mapping():
            return json.dumps(value)
        case StrEnum():
            return value.value
        case tuple():
            return ",".join(value)
        case Path():
            return str(value.resolve())
    return str(value)


def is_child() -> bool:
    """Return whether a supervisor started this process, which has prepared everything."""
    return LIFELINE in os.environ


T = TypeVar("T")


def _check_there(config: Config) -> None:
    """Raise StoreUnavailable if the command would create an empty deployment only to read it."""
    if config.embedded and not (config.data_dir / "embedded").exists():
        raise StoreUnavailable(
            f"no deployment is in {config.data_dir} (DATA_DIR): `tidegate up` creates one; run the "
            "command in the folder of an existing one, or with its DATA_DIR"
        )


# A command waits for a slow server, as on a busy machine, which it may be asked about; a serving
# process would continue without it.
_PATIENCE_MS = 10_000


def with_record(config: Config, work: Callable[[Connections], Awaitable[T]]) -> T:
    """Run `work` with only the record, whatever the state of Valkey. Raises StoreUnavailable, and
    the errors of `work`."""
    from tidegate.store.database import Connections

    async def run(url: str) -> T:
        connections = Connections(url, patience_ms=_PATIENCE_MS)
        connections.start()
        try:
            return await work(connections)
        finally:
            await connections.aclose()

    _check_there(config)
    with prepared(config, only={"postgres"}) as ground:
        return asyncio.run(run(database_url_of(ground.config)))


def with_keeper(
    config: Config, pool: str, work: Callable[[PolicyKeeper, Connections], Awaitable[T]]
) -> T:
    """Run `work` with the policy of a pool of the deployment in `config`, and with the record.

    Raises ConfigError, LimiterUnavailable if Valkey does not answer, and the errors of `work`.
    """
    is_unknown = pool != DEFAULT_POOL and pool not in stated_by(config).tables()

    async def run(whole: Config, connections: Connections) -> T:
        live = await live_changes(connections) if is_unknown else NO_CHANGES
        async with _open_keepers(config, whole, connections, [pool], live) as (keeper,):
            return await work(keeper, connections)

    return _with_servers(config, run)


def with_keepers(
    config: Config, work: Callable[[Sequence[PolicyKeeper], Connections], Awaitable[T]]
) -> T:
    """Run `work` as `with_keeper` does, with the policies of all pools."""

    async def run(whole: Config, connections: Connections) -> T:
        live = await live_changes(connections)
        pools = dict.fromkeys((DEFAULT_POOL, *live.over(stated_by(config).tables())))
        async with _open_keepers(config, whole, connections, pools, live) as keepers:
            return await work(keepers, connections)

    return _with_servers(config, run)


@asynccontextmanager
async def _open_keepers(
    config: Config,
    whole: Config,
    connections: Connections,
    pools: Iterable[str],
    live: LiveChanges,
) -> AsyncIterator[list[PolicyKeeper]]:
    from tidegate.policy.rollout import open_pool
    from tidegate.store.tenants import Policies

    name = f"cli-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
    keepers = []
    async with AsyncExitStack() as stack:
        for pool in pools:
            policy, provider = pool_of(config, pool, live)
            opening = open_pool(whole, Policies(connections), name, policy, pool, provider=provider)
            keeper = await stack.enter_async_context(opening)
            await keeper.limiter.ping(_PATIENCE_MS)
            await keeper.limiter.joined()
            keepers.append(keeper)
        yield keepers


def _with_servers(config: Config, work: Callable[[Config, Connections], Awaitable[T]]) -> T:
    """Run `work` with the complete configuration and the record, while the servers run."""
    from tidegate.store.database import Connections

    async def run(whole: Config) -> T:
        connections = Connections(database_url_of(whole), patience_ms=_PATIENCE_MS)
        connections.start()
        try:
            return await work(whole, connections)
        finally:
            await connections.aclose()

    _check_there(config)
    with prepared(config, only={"postgres", "valkey"}) as ground:
        return asyncio.run(run(ground.config))


async def live_changes(connections: Connections) -> LiveChanges:
    """Return the live changes of upstreams. Raises StoreUnavailable."""
    from tidegate.store.provider.upstreams import UpstreamRevisions

    return changes_of((await UpstreamRevisions(connections).newest()).upstreams)


async def places_of(
    config: Config, connections: Connections, request_id: UUID
) -> list[Whereabouts]:
    """Return a job once for each pool that may serve it. Raises NotFound and StoreUnavailable."""
    from tidegate.store.requests import ActiveRequests

    found = await ActiveRequests(connections).whereabouts(request_id)
    return await _places_of(config, connections, found)


async def batch_of(
    config: Config, connections: Connections, batch_id: UUID
) -> tuple[BatchStand, list[Whereabouts]]:
    """Return a batch, and its next waiting line once for each pool that may serve it; none without
    one. Raises NotFound and StoreUnavailable."""
    from tidegate.spine.detached import next_line
    from tidegate.store.batches import batch_stand

    stand = await batch_stand(connections, batch_id)
    line = next_line(stand)
    return stand, [] if line is None else await _places_of(config, connections, line)


async def _places_of(
    config: Config, connections: Connections, found: Whereabouts
) -> list[Whereabouts]:
    from tidegate.spine.routing import Targets

    try:
        targets = Targets(deployed_upstreams(config, await live_changes(connections)))
    except ConfigError:  # for example a key that only the processes have
        return [found]
    return targets.places_of(found, config)


def policy_of(config: Config, pool: str = DEFAULT_POOL) -> PoolPolicy:
    """Return the deployed policy of a pool. Raises ConfigError, and NotFound for an unknown
    pool."""
    return pool_of(config, pool)[0]


def pool_of(config: Config, pool: str, live: LiveChanges = NO_CHANGES) -> tuple[PoolPolicy, str]:
    """Return the deployed policy of a pool and the provider of its preset; empty without one."""
    if pool == DEFAULT_POOL:  # its preset has no defaults
        return deployed(config), ""
    stated = stated_by(config)
    if (found := stated.pool(pool, live)) is None:
        names = ", ".join(dict.fromkeys((DEFAULT_POOL, *stated.tables())))
        raise NotFound(f"there is no upstream {pool}; known: {names}")
    return found


def database_url_of(config: Config) -> str:
    """Return the URL of PostgreSQL in a complete configuration."""
    assert config.database_url is not None
    return config.database_url.get_secret_value()
