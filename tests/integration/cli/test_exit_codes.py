"""One rule for all commands: what is not there is exit code 1, a wrong argument is 2."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from tests.commands import Done
from tests.gateway import Opener
from tests.integration.cli.calling import run
from tidegate.cli import app

NO_ID = "01a20eee-3651-7845-959b-24c31459d2c4"
NO_BATCH = "batch_00000000000000000000000000000000"

# What commands name that is not there, with what is said of it.
NOT_THERE = {
    f"status {NO_ID}": "no request",
    "status ffff": "neither the beginning",
    f"batch pause {NO_BATCH}": "there is no such batch",
    f"batch resume {NO_BATCH}": "there is no such batch",
    f"batch cancel {NO_BATCH}": "there is no such batch",
    "batch cancel ffff": "neither the beginning",
    f"why {NO_ID}": "no request",
    f"why {NO_BATCH}": "there is no batch",
    "why ffff": "neither the beginning",
    "why nobody/3": "no ticket 3",
    "limits show --pool no": "there is no upstream no; known: gemini",
    "limits accept rpm:no": "nothing was learned about a limit rpm:no",
    "limits set --remove rpm:no": "there is no limits.rpm:no",
    "limits set rpm:m=6 --remove weights.no": "there is no weights.no",
    "limits pause rpm:no": "there is no limit rpm:no",
    "limits resume rpm:no": "there is no limit rpm:no",
    "limits history --pool no": "there is no upstream no",
    "limits import openai --pool no": "there is no upstream no",
    "permits list --pool no": "there is no upstream no",
    "permits revoke no --yes": "no process no",
    "upstreams set no weight=3": "there is no upstream no",
    "upstreams set gemini --remove weigth": "upstream gemini has no weigth",
    "upstreams test no": "there is no upstream no",
    "upstreams drain no": "there is no upstream no",
    "upstreams resume no": "there is no upstream no",
    "upstreams remove no": "there is no upstream no",
    "upstreams rollback 77": "revision 77",
    "tenants list --pool no": "there is no upstream no",
    "tenants show no": "there is no tenant no",
    "tenants set acme --limit tenant:acme=none": "there is no limit tenant:acme",
    "tenants remove no --yes": "there is no tenant no",
    "budgets list no": "there is no budget no",
    "budgets remove no --yes": "there is no budget no",
    "budgets resume no": "there is no budget no",
    "keys keep aaaaaaaaaa": "there is no key",
    "keys revoke aaaaaaaaaa": "there is no key",
    "rehearse --pool no --from-record 1h": "there is no upstream no",
    "reconcile openai --upstream no": "there is no upstream no",
}
# What they take that cannot be.
WRONG = {
    "submit": "prompt is missing",
    "status x!": "must be an id",
    "requests --since soon": "--since=soon",
    "batch run /dev/null": "at least one prompt",
    "config check --colour": "--colour",
    "doctor --colour": "--colour",
    "limits set": "needs either changes",
    "limits set rpm:m=6 --remove rpm:m": "must be named once",
    "limits set rpm:m=many": "a whole number or a table",
    "limits pause kind:text_only --for soon": "--for=soon",
    "limits import groq": "must be one of openai, anthropic",
    "limits import openai": "the provider of an upstream: set OPENAI_API_KEY",
    "limits import openai --pool gemini": "must be the provider of an upstream",
    "upstreams add Open_AI": "must be lower-case letters",
    "upstreams add gemini": "must be a new name",
    "upstreams drain gemini --for 1s": "--for=1s",
    "upstreams set gemini weight=3 --remove weight": "can't be both set and removed",
    "tenants set acme --tiers fast": "--tiers=fast",
    "budgets set all --usd much": "much",
    "keys create --expires soon": "--expires=soon",
    "keys revoke x": "a key's prefix",
    "requeue --since soon": "--since=soon",
    "rehearse": "needs either a file or --from-record",
    "verify --markdown /": "--markdown",
    "reconcile groq": "must be one of openai, anthropic",
    "export record --to 2026-01-01": "--to=2026-01-01: needs --from",
    "backup /": "/ exists already",
    "restore nowhere.dump": "nowhere.dump does not exist",
    "prune --days 0": "--days",
    "up --api 0": "--api",
    "serve --fd 99": "--fd=99",
}
# Those that list what is there, and do what there is to do.
NEITHER = {
    *("worker", "emulator", "migrate", "erase", "actions", "batch list", "keys list"),
    *("upstreams list", "upstreams history"),
}


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield " ".join(path)
    for name, one in (inner or {}).items():
        yield from _commands(one, (*path, name))


def test_every_command_is_tried_with_what_is_wrong() -> None:
    commands = list(_commands(get_command(app)))
    tried = {*NOT_THERE, *WRONG, *NEITHER}
    assert [
        one for one in commands if not any(f"{line} ".startswith(f"{one} ") for line in tried)
    ] == []


async def test_what_is_not_there_is_code_1_and_what_is_wrong_is_code_2(
    open_gateway: Opener,
) -> None:
    # The lease is one that several commands can begin in beside one another.
    gateway = await open_gateway(worker=False, semaphore_timeout=15.0)
    wanted = {line: (1, said) for line, said in NOT_THERE.items()}
    wanted |= {line: (2, said) for line, said in WRONG.items()}
    turns = asyncio.Semaphore(2)  # so many begin beside one another

    async def tried(line: str) -> Done:
        async with turns:
            return await run(gateway, *line.split(), ADMIN_TOKEN=gateway.operator_key)

    found = dict(zip(wanted, await asyncio.gather(*map(tried, wanted)), strict=True))
    wrong = {
        line: (found[line], said)
        for line, (code, said) in wanted.items()
        if (found[line].code, found[line].said) != (code, "") or said not in found[line].complained
    }
    assert wrong == {}
    assert [line for line, done in found.items() if "Traceback" in done.complained] == []
