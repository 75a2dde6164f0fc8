"""The limiter at every kind of server that it is documented for."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.integration.limiter.makers import Maker
from tests.integration.servers import suite
from tests.integration.servers.acl import (
    DOCUMENT,
    OF_THE_CONNECTIONS,
    documented,
    of_the_limiter,
)
from tests.integration.servers.daemon import MAKES, version_of
from tests.integration.servers.kinds import KINDS


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
async def test_the_limiter_works_at(kind: str, pool: str, tmp_path: Path) -> None:
    async with KINDS[kind](tmp_path) as url, AsyncExitStack() as stack:
        await suite.works(url, Maker(pool, stack))


def test_the_documented_acl_allows_exactly_what_the_limiter_says() -> None:
    rules = documented()
    commands = {rule.removeprefix("+") for rule in rules if rule.startswith("+")}
    assert commands == of_the_limiter() | OF_THE_CONNECTIONS
    others = {rule for rule in rules if not rule.startswith("+")}
    assert others == {"resetkeys", "resetchannels", "-@all", "~tg:*", "&tg:*"}


def test_the_table_of_the_documentation_names_the_servers_that_are_tested() -> None:
    rows = re.findall(r"^\| (Redis|Valkey) ([\d.]+) \| `([\w-]+)`", DOCUMENT.read_text(), re.M)
    assert {make: f"{name} {version}" for name, version, make in rows} == {
        make: version_of(make) for make in MAKES
    }
