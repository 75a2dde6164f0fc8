"""`tidegate ...` beside a running gateway of a test, as a person runs it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

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
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tidegate", *arguments),
        cwd=config.data_dir.parent,
        env={
            **os.environ,
            "DATABASE_URL": config.database_url.get_secret_value(),
            "REDIS_URL": config.redis_url.get_secret_value(),
            "GEMINI_API_KEY": "k",
            "SEMAPHORE_TIMEOUT": str(config.semaphore_timeout),
            **settings,
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complained = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return Done(process.returncode, said.decode(), complained.decode())
