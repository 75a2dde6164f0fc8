"""`tidegate limits import` over HTTP: from an admin key to limits in force that fit; and calls
under a limit that does not fit."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.accounts import ADMIN_KEY, provider
from tests.commands import Done, tidegate
from tests.gateway import Gateway, Opener, open_gateway
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator
from tidegate.policy.account import MARGIN

__all__ = ["open_gateway", "provider"]

WITHIN_S = 5.0  # of the bar, for the command as a person runs it
MESSAGES = [{"role": "user", "content": "Hello"}]
LIMITS = [
    {"models": "gpt-4o", "unit": "requests", "bound": 1_200},
    {"models": "gpt-4o", "unit": "tokens", "bound": 30_000},
    {"models": "gpt-5*", "unit": "requests", "bound": 500},
]


@pytest.fixture
async def gateway(open_gateway: Opener, provider: Emulator, tmp_path: Path) -> Gateway:
    return await open_gateway(worker=False, tidegate_policy=tmp_path / "tidegate.toml")


async def imported(gateway: Gateway, *arguments: str, **settings: str) -> Done:
    policy = str(gateway.config.tidegate_policy)
    return await tidegate(
        gateway, "limits", "import", *arguments, TIDEGATE_POLICY=policy, **settings
    )


async def in_force(gateway: Gateway, pool: str) -> dict[str, Any]:
    limits: dict[str, Any] = (await gateway.services.limiters[pool].snapshot()).limits  # type: ignore[assignment]
    return {name: view.bound for name, view in limits.items()}


async def test_one_command_puts_limits_in_force_that_fit(
    gateway: Gateway, provider: Emulator
) -> None:
    await provider.control.set_account(provider="openai", limits=LIMITS)
    dry = await imported(gateway, "openai")
    assert dry.code == 0, dry.complained
    assert "limits.rpm:gpt-4o: none -> " in dry.said
    assert "--apply puts this in force" in dry.said
    assert "rpm:gpt-4o" not in await in_force(gateway, "oai")

    began = time.monotonic()
    done = await imported(gateway, "openai", "--apply", "--json")
    took_s = time.monotonic() - began
    assert done.code == 0, done.complained
    assert done.json["applied"]
    assert took_s < WITHIN_S

    async def known() -> bool:
        return "rpm:gpt-5" in gateway.services.limiters["oai"].policy.limits

    await wait_until(known, 10, "the limits in force")
    assert await in_force(gateway, "oai") == {
        "pool:total": 64,
        "rpm:gpt-4o": 1_200,
        "tpm:gpt-4o": 30_000,
        "rpm:gpt-5": 500,
    }
    policy = gateway.services.limiters["oai"].policy
    limit = policy.limit("tpm:gpt-4o")
    assert limit is not None
    assert (limit.reserve, limit.settles, limit.source) == ("larger", False, "imported")  # type: ignore[union-attr]
    assert ADMIN_KEY not in done.said + done.complained + dry.said + dry.complained

    # All that the account gives is used, and none of it is refused.
    async def call() -> int:
        body = {"model": "gpt-4o", "max_tokens": 1_000, "messages": MESSAGES}
        async with gateway.http.post(gateway.url + "/v1/chat/completions", json=body) as answer:
            await answer.read()
            return answer.status

    assert await asyncio.gather(*(call() for _ in range(30))) == [200] * 30
    book = await provider.control.account()
    assert book["refused"] == 0
    tokens = next(one for one in book["limits"] if one["name"].startswith("tokens:gpt-4o:"))
    assert tokens["counted"] == 30_000
    seen = (await gateway.services.limiters["oai"].snapshot()).limits["tpm:gpt-4o"]
    # `used` is less as soon as it refills; of a bucket that is nearly empty a margin is kept free,
    # once an answer has told so.
    assert 30_000 <= seen.taken <= 30_000 * (1 + 2 * MARGIN)

    again = await imported(gateway, "openai", "--apply")
    assert "are those of the account" in again.said


async def test_classes_workspaces_and_what_a_person_has_set(
    gateway: Gateway, provider: Emulator
) -> None:
    limits = [
        {"models": "claude-*-5-5", "unit": "requests", "bound": 50},
        {"models": "claude-*-5-5", "unit": "uncached_input_tokens", "bound": 40_000},
        {"models": "claude-2*", "unit": "input_tokens", "bound": 9_000},
        {"models": "claude-2", "unit": "input_tokens", "bound": 8_000},
    ]
    await provider.control.set_account(
        provider="anthropic", limits=limits, workspaces={"wrkspc_1": 0.5}
    )
    group = "claude-haiku-5-5,claude-opus-5-5,claude-sonnet-5-5"
    done = await imported(gateway, "anthropic", "--json")
    assert done.code == 0, done.complained
    found = {name: value["bound"] for name, value in done.json["set"].items()}
    assert found == {f"rpm:{group}": 50, f"itpm:{group}": 40_000, "itpm:claude-2": 8_000}
    assert done.json["set"][f"itpm:{group}"]["unit"] == "uncached_input_tokens"
    assert done.json["set"]["itpm:claude-2"]["unit"] == "input_tokens"

    done = await imported(gateway, "anthropic", "--workspace", "wrkspc_1", "--json")
    assert done.json["set"][f"rpm:{group}"]["bound"] == 25

    policy = str(gateway.config.tidegate_policy)
    mine = f"itpm:{group}=7000"
    await tidegate(gateway, "limits", "set", mine, "--pool", "ant", TIDEGATE_POLICY=policy)
    done = await imported(gateway, "anthropic", "--apply", "--json")
    assert done.json["kept"] == {f"itpm:{group}": 40_000}
    assert (await in_force(gateway, "ant"))[f"itpm:{group}"] == 7_000
    done = await imported(gateway, "anthropic", "--apply", "--replace", "--json")
    assert done.json["kept"] == {}
    assert (await in_force(gateway, "ant"))[f"itpm:{group}"] == 40_000


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "said"),
    [
        (["groq"], {}, 2, "must be one of openai, anthropic"),
        (["openai"], {"OPENAI_ADMIN_KEY": ""}, 2, "OPENAI_ADMIN_KEY"),
        (["openai"], {"OPENAI_ADMIN_KEY": "invalid-key"}, 1, "(HTTP 401)"),
        (["openai"], {"OPENAI_ADMIN_KEY": "sk-plain-secret"}, 1, "(HTTP 403)"),
        (["openai", "--key", "OTHER"], {"OTHER": "sk-plain-secret"}, 1, "OTHER must be an admin"),
        (["openai", "--project", "none"], {}, 2, "--project"),
        (["anthropic", "--workspace", "none"], {}, 2, "--workspace"),
        (["openai", "--pool", "none"], {}, 1, "there is no upstream none; known: "),
        (["openai", "--pool", "ant"], {}, 2, "--pool=ant: is no account of openai; oai is"),
        (["anthropic", "--pool", "oai"], {}, 2, "--pool=oai: is no account of anthropic; ant is"),
        (["openai", "--shared", "none-*"], {}, 2, "--shared"),
        (["openai", "--workspace", "w"], {}, 2, "--workspace=w: must only be given for anthropic"),
        (["anthropic", "--project", "p"], {}, 2, "--project=p: must only be given for openai"),
        (["openai", "--url", "{url}"], {}, 1, "the rate-limit API answered HTTP 404"),
    ],
)
async def test_an_error_names_what_is_wrong_and_never_the_key(
    gateway: Gateway,
    provider: Emulator,
    arguments: list[str],
    settings: dict[str, str],
    code: int,
    said: str,
) -> None:
    which = "anthropic" if "anthropic" in arguments else "openai"
    await provider.control.set_account(provider=which)
    given = [argument.format(url=provider.url) for argument in arguments]  # without its /v1
    done = await imported(gateway, *given, **settings)
    assert (done.code, said in done.complained) == (code, True), done.complained
    assert "secret" not in done.said + done.complained
    assert json.dumps("Traceback") not in done.complained


async def test_a_refusal_names_the_lower_bound_for_which_the_rest_is_kept_free(
    gateway: Gateway, provider: Emulator
) -> None:
    limits = [{"models": "gpt-5", "unit": "requests", "bound": 20}]
    await provider.control.set_account(provider="openai", limits=limits)
    change = {"set": {"rpm:gpt-5": {"bound": 100, "unit": "requests"}}}
    async with gateway.http.patch(gateway.url + "/admin/limits?pool=oai", json=change) as answer:
        assert answer.status == 200, await answer.text()
    url, body = f"{gateway.url}/v1/chat/completions", {"model": "gpt-5", "messages": MESSAGES}
    ends = " The provider reports a bound of 20, and the rest is kept free."

    async def refused() -> str:
        """The first calls may go to the provider, and may wait without an estimate."""
        hurried = {"x-tidegate-deadline-ms": "100"}
        async with gateway.http.post(url, json=body, headers=hurried) as answer:
            said = str(json.loads(await answer.read()).get("error", {}).get("message", ""))
        return said if said.endswith(ends) and "is used up" in said else ""

    said = await wait_until(refused, 20, "a refusal that names the bound")
    assert said.startswith("Limit rpm:gpt-5 is used up (")
    assert said.count("The provider") == 1
    shown = await tidegate(gateway, "limits", "show", "--pool", "oai")
    kept = "he provider reports a bound of 20: the rest is kept free and counts as spent"
    assert kept in " ".join(shown.said.split())
    # One of several waits for longer than it takes to ask for it.
    waiting = [asyncio.create_task(gateway.http.post(url, json=body)) for _ in range(10)]

    async def explained() -> str:
        """The sentences about the first in the queue; it may be admitted before it is named."""
        overview = await tidegate(gateway, "limits", "show", "--pool", "oai", "--json")
        if not (queues := overview.json["queues"]):
            return ""
        ticket = f"{queues[0]['process']}/{queues[0]['first_ticket']}"
        why = await tidegate(gateway, "why", ticket, "--pool", "oai")
        return "" if "is waiting" in why.complained else f"{why.said}{why.complained}"

    assert kept in " ".join((await wait_until(explained, 20, "an explained wait")).split())
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)
