"""Backing services of a process: bundled servers and the emulator if none are configured.

Invariant: a process runs on a whole configuration. What was missing is filled in once, by the
first process of a family, and handed to its children as environment variables, never as arguments.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from tidegate.embedded.lease import Lease, ServiceName, ensure
from tidegate.errors import StoreUnavailable
from tidegate.policy.deployment import emulates
from tidegate.settings import EMULATORS_KEY, SECRETS, Config
from tidegate.telemetry.logging import redact

LIFELINE = "TIDEGATE_LIFELINE_FD"
EMULATED = "EMULATED_PROVIDER"
_MIGRATE_WITHIN_S = 60.0
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Ground:
    """`config` is whole. `lease` holds the bundled servers, where there are any."""

    config: Config
    lease: Lease | None
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
    """Have all that `config` leaves out, or `only` some of it, until the end of the block.

    Blocks until it is ready, inside of what `busy` makes of a few words on what it does. Raises
    `embedded.ServerFailed`.
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


def _filled(config: Config, lease: Lease | None) -> Config:
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


def migrate(config: Config, say: Callable[[str], object]) -> str | None:
    """Bring the schema up to date, waiting up to a minute for a database that is away.

    Returns the new revision, or None where there was nothing to do; `say` is told once why it
    waits. Raises StoreUnavailable when the minute is over.
    """
    from tidegate.store.database import migrate as run_steps

    assert config.database_url is not None
    deadline = time.monotonic() + _MIGRATE_WITHIN_S
    told = False
    while True:
        try:
            return asyncio.run(run_steps(config.database_url.get_secret_value()))
        except StoreUnavailable as away:
            if time.monotonic() > deadline:
                raise
            if not told:
                say(f"waiting for PostgreSQL: {redact(str(away))}")
                told = True
            time.sleep(_RETRY_S)


def environment_of(ground: Ground) -> dict[str, str]:
    """The variables from which a child reads exactly this configuration.

    Every setting is there, as an empty value where it is unset, so that a `.env` that was edited
    in the meantime cannot give one child other limits than the rest.
    """
    variables = {name.upper(): _as_text(value) for name, value in ground.config}
    files = {f"{name}_FILE": "" for name in SECRETS}
    return variables | files | {EMULATED: "1" if ground.emulated else ""}


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
    """Whether this process was started by a supervisor, which has prepared everything."""
    return LIFELINE in os.environ
