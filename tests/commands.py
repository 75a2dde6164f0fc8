"""`tidegate ...` beside a running gateway of a test, as a person runs it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tests.forked import started
from tests.gateway import Gateway


@dataclass(frozen=True, slots=True)
class Done:
    code: int
    said: str
    complained: str

    @property
    def json(self) -> Any:
        return json.loads(self.said)


async def tidegate(gateway: Gateway, *arguments: str, **settings: str) -> Done:
    """Run the command beside the deployment, with its settings and others."""
    config = gateway.config
    assert config.database_url is not None
    assert config.redis_url is not None
    env = {
        **os.environ,
        "DATABASE_URL": config.database_url.get_secret_value(),
        "REDIS_URL": config.redis_url.get_secret_value(),
        "GEMINI_API_KEY": "k",
        "SEMAPHORE_TIMEOUT": str(config.semaphore_timeout),
        **settings,
    }
    return await ran(*arguments, cwd=config.data_dir.parent, env=env)


async def ran(*arguments: str, cwd: Path, env: Mapping[str, str], within_s: float = 60) -> Done:
    """Run the command in a folder, with this environment and no other."""
    with TemporaryFile() as said, TemporaryFile() as complained:
        process = started(
            ["tidegate", *arguments], cwd=cwd, env=env, stdout=said, stderr=complained
        )
        code = await asyncio.to_thread(process.wait, within_s)
        said.seek(0)
        complained.seek(0)
        return Done(code, said.read().decode(), complained.read().decode())
