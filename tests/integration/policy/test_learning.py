"""Limits learned from headers of good answers, over HTTP: shown, accepted, applied, acted on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from time import time
from typing import Any
from uuid import uuid4

import orjson
import pytest
import redis.asyncio

from tests.commands import Done, tidegate
from tests.gateway import Gateway, Opener, open_gateway
from tests.waiting import promised_s, wait_until, where_it_is
from tidegate.embedded.servers import ValkeyServer
from tidegate.emulator.server import run_emulator
from tidegate.errors import LimiterUnavailable, StatedBound
from tidegate.limiter import Limiter, PoolPolicy, Quota, Rate, Tokens, next_midnight_ms
from tidegate.policy.account import (
    CAREFUL_MARGIN,
    CUT,
    MARGIN,
    NEARLY_FULL,
    READ_LATE_S,
    REFUSED_MORE,
    RENEWED_S,
    STATED_S,
    UNTOLD_CUT,
)
from tidegate.policy.inspection import Control
from tidegate.policy.learned import (
    LearnedLimit,
    LearnedNote,
    OthersUse,
    RefusedLimit,
    shared_limits,
    unpacked_note,
)
from tidegate.policy.rollout import PolicyKeeper
from tidegate.spine.learning import Announced, LimitLearner
from tidegate.store.database import Connections
from tidegate.store.tenants import Policies

__all__ = ["open_gateway"]

MESSAGES = [{"role": "user", "content": "Hello"}]
LIMITS = [
    {"models": "gpt-5", "unit": "requests", "bound": 600},
    {"models": "gpt-5", "unit": "tokens", "bound": 60_000},
]


async def call(gateway: Gateway, model: str = "gpt-5", **more: Any) -> int:
    body = {"model": model, "messages": MESSAGES, **more}
    async with gateway.http.post(gateway.url + "/v1/chat/completions", json=body) as answer:
        await answer.read()
        return answer.status


def control(gateway: Gateway) -> Control:
    services = gateway.services
    return Control(services.keepers["oai"], services.store.running_calls, services.store.tenants)


async def learned(gateway: Gateway) -> dict[str, LearnedLimit]:
    return {one.limit: one for one in await control(gateway).learned()}


async def command(gateway: Gateway, *arguments: str) -> Done:
    policy = str(gateway.config.tidegate_policy)
    return await tidegate(gateway, "limits", *arguments, "--pool", "oai", TIDEGATE_POLICY=policy)


def policy_file(folder: Path, url: str, *lines: str) -> Path:
    path = folder / "tidegate.toml"
    upstream = [
        "[upstreams.oai]",
        'provider = "openai"',
        f'base_url = "{url}/v1"',
        'models = ["gpt-*"]',
        *lines,
    ]
    path.write_text("\n".join(upstream) + "\n")
    return path


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-calls")


async def test_a_learned_limit_is_shown_and_accepted(open_gateway: Opener, tmp_path: Path) -> None:
    async with run_emulator() as provider:
        await provider.control.set_account(provider="openai", limits=LIMITS)
        own = '[upstreams.oai.limits]\n"rpm:gpt-5" = 500'
        path = policy_file(tmp_path, provider.url, own)
        gateway = await open_gateway(worker=False, tidegate_policy=path)
        assert await call(gateway) == 200

        async def known() -> bool:
            return len(await learned(gateway)) == 2

        await wait_until(known, 10, "what the headers said")
        found = await learned(gateway)
        assert (found["rpm:gpt-5"].drift, found["rpm:gpt-5"].in_force) == ("rose", 500)
        assert (found["tpm:gpt-5"].drift, found["tpm:gpt-5"].bound) == ("new", 60_000)

        shown = await command(gateway, "show")
        assert "Learned from answers (tidegate limits accept [ID])" in shown.said
        assert "500: it rose" in shown.said
        async with gateway.http.get(gateway.url + "/metrics") as scrape:
            text = await scrape.text()
        assert 'tidegate_limit_drift{limit="rpm:gpt-5",pool="oai"} 100.0' in text
        assert 'tidegate_limit_others_ratio{limit="rpm:gpt-5",pool="oai"} 0.0' in text
        assert 'tidegate_limit_learned_bound{limit="tpm:gpt-5",pool="oai"} 60000.0' in text

        assert (await command(gateway, "accept", "rpm:none")).code == 1
        done = await command(gateway, "accept", "tpm:gpt-5", "--json")
        assert done.code == 0, done.complained
        limits = done.json["policy"]["limits"]
        assert limits["tpm:gpt-5"]["source"] == "learned"
        assert limits["tpm:gpt-5"]["reserve"] == "larger"
        assert limits["rpm:gpt-5"]["bound"] == 500
        url = gateway.url + "/admin/limits/accept?pool=oai"
        async with gateway.http.post(url, json={"by": "ann"}) as answer:
            assert answer.status == 200, await answer.text()
            now = await answer.json()
        assert now["policy"]["limits"]["rpm:gpt-5"]["bound"] == 600
        async with gateway.http.post(url, json={}) as answer:
            assert answer.status == 404


@pytest.mark.parametrize("shape", ["window", "bucket"])
async def test_a_bound_that_fell_leaves_all_that_the_account_has_once_it_is_accepted(
    open_gateway: Opener, tmp_path: Path, shape: str
) -> None:
    limits = [{"models": "gpt-5", "unit": "requests", "bound": 500}]
    async with run_emulator() as provider:
        await provider.control.set_account(provider="openai", limits=limits)
        own = f'limits = {{ "rpm:gpt-5" = {{ bound = 500, shape = "{shape}" }} }}'
        path = policy_file(tmp_path, provider.url, own)
        gateway = await open_gateway(worker=False, tidegate_policy=path)
        limiter = gateway.services.keepers["oai"].limiter
        await provider.control.set_account(tier=0.24)
        for _ in range(3):
            assert await call(gateway) == 200
        answered = time()

        async def is_kept() -> bool:
            return (await limiter.snapshot()).limits["rpm:gpt-5"].used >= 380

        await wait_until(is_kept, 20, "room for a bound that fell")
        done = await command(gateway, "accept", "rpm:gpt-5")
        assert done.code == 0, done.complained
        await wait_until(lambda: limiter.policy.bound("rpm:gpt-5") == 120, 10, "the lower bound")
        view = (await limiter.snapshot()).limits["rpm:gpt-5"]
        ending = 380 * RENEWED_S / 60  # is charged again already
        is_old = time() > answered + READ_LATE_S  # what others take may not be in the answers yet
        assert view.used <= 4 + ending + (MARGIN * 500 if is_old else 0)

        async with asyncio.timeout(promised_s(2)):
            assert await call(gateway) == 200
        calls = [asyncio.create_task(call(gateway)) for _ in range(130)]

        async def are_made() -> bool:
            return sum(one.done() for one in calls) >= 100

        await wait_until(are_made, 20, "what the account has left")
        view = (await limiter.snapshot()).limits["rpm:gpt-5"]
        assert (view.bound, (await provider.control.account())["refused"]) == (120, 0)
        for one in calls:
            one.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_a_bound_of_gemini_s_is_learned_from_its_refusal(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that was refused waits for the window that it was told of, and is made then."""
    monkeypatch.setenv("GOOGLE_KEY", "key-of-calls")
    account = {"models": "gemini-2.5-pro", "unit": "requests", "bound": 3}
    path = tmp_path / "tidegate.toml"
    async with run_emulator() as provider:
        await provider.control.set_account(provider="gemini", limits=[account])
        path.write_text(
            f"""
            [upstreams.google]
            provider = "gemini"
            key = "GOOGLE_KEY"
            base_url = "{provider.url}"
            models = ["gemini-*"]
            limits = {{ "rpm:gemini-2.5-pro" = 50, "rpd:gemini-2.5-pro" = 1000 }}
            """
        )
        gateway = await open_gateway(worker=False, tidegate_policy=path)
        services = gateway.services
        keeper = services.keepers["google"]
        pool = Control(keeper, services.store.running_calls, services.store.tenants)
        url = gateway.url + "/v1beta/models/gemini-2.5-pro:generateContent"
        body = {"contents": [{"role": "user", "parts": [{"text": "Hello"}]}]}

        async def one() -> int:
            async with gateway.http.post(url, json=body) as answer:
                return answer.status

        # More than two windows have, if one ends meanwhile.
        calls = [asyncio.create_task(one()) for _ in range(8)]

        async def known() -> bool:
            return bool(await pool.learned())

        await wait_until(known, 20, "what the refusal stated")
        (found,) = await pool.learned()
        assert (found.limit, found.bound, found.in_force) == ("rpm:gemini-2.5-pro", 3, 50)
        assert (found.drift, found.model) == ("fell", "gemini-2.5-pro")

        async def kept() -> bool:
            return (await keeper.limiter.snapshot()).limits["rpm:gemini-2.5-pro"].used >= 47

        await wait_until(kept, 20, "room that is kept free")
        assert (await provider.control.account())["refused"] > 0
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_the_command_to_copy_is_one_command_whatever_model_a_caller_named(
    open_gateway: Opener, tmp_path: Path
) -> None:
    async with run_emulator() as provider:
        limits = [{"models": "gpt-*", "unit": "requests", "bound": 600}]
        await provider.control.set_account(provider="openai", limits=limits)
        path = policy_file(tmp_path, provider.url)
        gateway = await open_gateway(worker=False, tidegate_policy=path)
        assert await call(gateway, "gpt-$(reboot)") == 200

        async def commands() -> list[str]:
            async with gateway.http.get(gateway.url + "/health/dependencies") as answer:
                causes = (await answer.json())["verdict"]["causes"]
            return [one["command"] for one in causes if one["kind"] == "drift"]

        found = await wait_until(commands, 10, "what the headers said")
        assert found == ["tidegate limits accept 'rpm:gpt-$(reboot)' --pool oai"]


async def test_what_remains_is_as_of_the_call_that_was_counted_last(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """An answer that takes long has headers of its beginning, and comes after newer ones."""
    slowly = [{"models": "gpt-5", "unit": "requests", "bound": 6}]  # none refills meanwhile
    async with run_emulator() as provider:
        await provider.control.set_account(provider="openai", limits=slowly)
        await provider.control.set_fault("slow_first_token", match="Think", delay_ms=2_000)
        path = policy_file(tmp_path, provider.url)
        gateway = await open_gateway(worker=False, tidegate_policy=path)
        thinking = [{"role": "user", "content": "Think"}]
        slow = asyncio.create_task(call(gateway, messages=thinking))

        async def is_counted() -> bool:
            return (await provider.control.stats()).in_flight == 1

        await wait_until(is_counted, 10, "the first call")
        assert await call(gateway) == 200
        assert await slow == 200
        _, process = await gateway.get("/admin/process")
        (said,) = process["upstreams"]["oai"]["announced"]
        assert {one["unit"]: one["remaining"] for one in said["limits"]}["requests"] == 4


@pytest.mark.slow
async def test_what_nobody_set_is_in_force_by_itself_where_it_may_be(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_emulator() as provider:
        await provider.control.set_account(provider="openai", limits=LIMITS)
        own = '[upstreams.oai.limits]\n"rpm:gpt-5" = 500'
        path = policy_file(tmp_path, provider.url, 'learn = "apply"', own)
        gateway = await open_gateway(worker=False, tidegate_policy=path)
        keeper = gateway.services.keepers["oai"]
        called_s = 0.0

        async def call_each_second() -> None:
            nonlocal called_s
            if time() - called_s >= 1:
                called_s = time()
                assert await call(gateway) == 200

        async def applied() -> bool:
            await call_each_second()
            return "tpm:gpt-5" in keeper.limiter.policy.limits

        await wait_until(applied, 20, "a limit that was learned")
        assert keeper.limiter.policy.bound("rpm:gpt-5") == 500  # a person's
        (newest, *_) = await keeper.history(1)
        assert (newest.origin, newest.set_by) == ("deployment", "headers")

        # Its tier falls: the learned limit follows, and the person's is kept with less room.
        await provider.control.set_account(tier=0.5)

        async def followed() -> bool:
            await call_each_second()
            return keeper.limiter.policy.bound("tpm:gpt-5") == 30_000

        await wait_until(followed, 20, "the lower bound")

        async def less_room() -> bool:
            return (await keeper.limiter.snapshot()).limits["rpm:gpt-5"].used >= 200

        await wait_until(less_room, 20, "room that is kept free")
        assert keeper.limiter.policy.bound("rpm:gpt-5") == 500

        # What a person removes is a proposal from then on, which is applied no more.
        removed = await command(gateway, "set", "--remove", "tpm:gpt-5")
        assert removed.code == 0, removed.complained
        looked: set[str] = set()
        ask = keeper.removed_by_people

        async def asked(names: Collection[str]) -> set[str]:
            looked.update(names)
            return await ask(names)

        monkeypatch.setattr(keeper, "removed_by_people", asked)

        async def was_due() -> bool:
            await call_each_second()
            return "tpm:gpt-5" in looked

        await wait_until(was_due, 30, "the time at which it would be applied")
        assert await ask(["tpm:gpt-5", "rpm:gpt-5", "rpm:other"]) == {"tpm:gpt-5"}
        assert "tpm:gpt-5" not in keeper.limiter.policy.limits
        assert (await learned(gateway))["tpm:gpt-5"].drift == "new"
        accepted = await command(gateway, "accept", "tpm:gpt-5")
        assert accepted.code == 0, accepted.complained
        assert await ask(["tpm:gpt-5"]) == set()
        assert keeper.limiter.policy.bound("tpm:gpt-5") == 30_000


async def test_others_on_a_days_bound_are_noticed_and_it_is_learned(
    open_gateway: Opener, tmp_path: Path
) -> None:
    async with run_emulator() as provider:
        day = {"models": "*", "unit": "requests", "bound": 200, "window_s": 86_400}
        await provider.control.set_account(provider="groq", limits=[day])
        zone = where_it_is(18)  # a quarter of the account's day refills until midnight
        (tmp_path / "tidegate.toml").write_text(
            f"""
            [upstreams.oai]
            provider = "groq"
            base_url = "{provider.url}/v1"
            key = "OPENAI_API_KEY"
            models = ["gpt-*"]

            [upstreams.oai.limits]
            "rpd:gpt-*" = {{ bound = 100, zone = "{zone}" }}
            """
        )
        path = tmp_path / "tidegate.toml"
        gateway = await open_gateway(worker=False, tidegate_policy=path)
        assert await call(gateway) == 200

        async def rose() -> bool:
            found = await learned(gateway)
            return "rpd:gpt-*" in found and found["rpd:gpt-*"].drift == "rose"

        await wait_until(rose, 10, "the bound of the day")
        limiter = gateway.services.keepers["oai"].limiter
        assert (await limiter.snapshot()).limits["rpd:gpt-*"].used == 1
        body = {"model": "gpt-5", "messages": MESSAGES}
        for _ in range(190):  # another consumer takes nearly all of the account's day
            headers = {"Authorization": "Bearer sk-of-calls"}
            url = f"{provider.url}/v1/chat/completions"
            async with gateway.http.post(url, json=body, headers=headers) as answer:
                assert answer.status == 200
        assert await call(gateway) == 200

        async def kept() -> bool:
            refills = 200 * (next_midnight_ms(zone, time() * 1000) / 1000 - time())
            room = 8 + refills / 86_400
            used = (await limiter.snapshot()).limits["rpd:gpt-*"].used
            shown = (await learned(gateway))["rpd:gpt-*"].others_share
            return used >= 100 - room - 2 and shown > 0

        await wait_until(kept, 10, "room that is kept free for the day")


async def test_others_in_a_minute_are_noticed_by_a_days_requests(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """Groq's headers tell of a day's requests, and of none a minute."""
    async with run_emulator() as provider:
        limits = [
            {"models": "*", "unit": "requests", "bound": 600},
            {"models": "*", "unit": "requests", "bound": 20_000, "window_s": 86_400},
        ]
        await provider.control.set_account(provider="groq", limits=limits)
        own = '[upstreams.oai.limits]\n"rpm:gpt-*" = 600'
        path = policy_file(tmp_path, provider.url, own)
        path.write_text(path.read_text().replace('"openai"', '"groq"\nkey = "OPENAI_API_KEY"'))
        gateway = await open_gateway(worker=False, tidegate_policy=path)

        async def others_share() -> float:
            assert await call(gateway) == 200
            found = (await learned(gateway)).get("rpm:gpt-*")
            return 0.0 if found is None else found.others_share

        async def is_known() -> bool:
            return "rpd:gpt-5" in await learned(gateway)

        assert await call(gateway) == 200
        await wait_until(is_known, 20, "what the headers said")
        for _ in range(180):  # another consumer
            headers = {"Authorization": "Bearer sk-of-calls"}
            url, body = f"{provider.url}/v1/chat/completions", {"model": "gpt-5"}
            async with gateway.http.post(
                url, json={**body, "messages": MESSAGES}, headers=headers
            ) as answer:
                assert answer.status == 200

        async def noticed() -> bool:
            return await others_share() >= 0.1  # calls of ours after an answer count as ours

        await wait_until(noticed, 20, "others of the account")
        shown = await command(gateway, "show")
        assert "others on the account take" in shown.said


async def test_the_account_of_the_gemini_key_learns_where_its_server_tells(
    open_gateway: Opener, tmp_path: Path
) -> None:
    async with run_emulator() as provider:
        limits = [{"models": "gemini-2.5-flash", "unit": "requests", "bound": 700}]
        await provider.control.set_account(provider="gemini", limits=limits, headers="openai")
        gateway = await open_gateway(worker=False, gemini_base_url=provider.url)
        services = gateway.services
        own = Control(services.keeper, services.store.running_calls, services.store.tenants)

        async def known() -> bool:  # one answer alone may leave its window open
            assert await call(gateway, "gemini-2.5-flash") == 200
            return [one.limit for one in await own.learned()] == ["rpm:gemini-2.5-flash"]

        await wait_until(known, 20, "what the headers said")
        done = await tidegate(gateway, "limits", "accept", "rpm:gemini-2.5-flash", "--json")
        assert done.code == 0, done.complained

        async def in_force() -> bool:
            return services.limiter.policy.bound("rpm:gemini-2.5-flash") == 700

        await wait_until(in_force, 10, "the limit that was accepted")


async def test_a_wrong_value_of_learn_is_refused(open_gateway: Opener, tmp_path: Path) -> None:
    path = policy_file(tmp_path, "http://127.0.0.1:1", 'learn = "always"')
    gateway = await open_gateway(worker=False)
    done = await tidegate(gateway, "config", "check", TIDEGATE_POLICY=str(path))
    assert done.code == 2
    assert (
        "upstreams.oai.learn=always: must be one of propose, apply" in done.said + done.complained
    )


@asynccontextmanager
async def learner(
    url: str,
    limit: Rate | Quota,
    bound: int = 30_000,
    remaining: int = 30_000,
    *,
    resets_in_s: int | None = None,
    is_told: bool = True,
    provider: str = "",
) -> AsyncIterator[tuple[Limiter, LimitLearner]]:
    """A process with `limit`, whose last answer reported such a bound, where `is_told`: of a window
    that begins again, as Azure's do, in `resets_in_s`."""
    is_day = isinstance(limit, Quota)
    policy = PoolPolicy({"rpd:gpt-5" if is_day else "tpm:gpt-5": limit}, lease_ms=600)
    announced, unit = Announced(), b"requests" if is_day else b"tokens"
    told = {b"limit": bound, b"remaining": remaining}
    told |= {} if resets_in_s is None else {b"reset": resets_in_s}
    headers = [(b"x-ratelimit-%s-%s" % (key, unit), b"%d" % told[key]) for key in told]
    announced.note("gpt-5", headers if is_told else [])
    async with Limiter.from_url(url, pool=f"p{uuid4().hex[:12]}", policy=policy) as limiter:
        record = Policies(Connections("postgresql://127.0.0.1:1/none"))
        provider = "groq" if is_day else provider  # whose requests are of a day
        provider = provider if resets_in_s is None else "azure"
        keeper = PolicyKeeper(limiter, record, stated=policy, set_by="test", provider=provider)
        await wait_until(lambda: limiter.state == "up", 20, "the first lease")
        yield limiter, LimitLearner(keeper, announced, "propose")


async def used(limiter: Limiter) -> int:
    (limit,) = (await limiter.snapshot()).limits.values()
    return limit.used


async def test_in_a_window_that_began_what_the_pool_did_not_take_is_of_others(
    valkey_url: str,
) -> None:
    limit = Rate(60_000, 60_000, "tokens")
    async with learner(valkey_url, limit, 60_000, 25_000, resets_in_s=30) as (limiter, learning):
        async with limiter.acquire("tpm:gpt-5", tokens=Tokens(20_000), timeout=5) as permit:
            permit.settle(tokens=Tokens(20_000))
        await learning.look()
        (others,) = learning._others
        assert others.amount == round(0.4 * 15_000), "a look makes up for so much"
        assert await used(limiter) == 20_000 + others.kept


@pytest.mark.parametrize("is_told", [True, False])
async def test_after_a_refusal_room_is_kept_free_for_what_our_count_lacks(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    limit = Rate(60_000, 60_000, "tokens")
    async with learner(valkey_url, limit, 60_000, 60_000, resets_in_s=30, is_told=is_told) as made:
        limiter, learning = made
        await learning.look()
        assert await used(limiter) == 0
        learning._announced.refuse("tpm:gpt-5")
        monkeypatch.setattr(learning, "_clock", lambda: time() - 3_600.0)
        await learning.look()
        assert await used(limiter) == 0, "the clock was set back since"
        monkeypatch.undo()
        await learning.look()
        cut = (CUT if is_told else UNTOLD_CUT) + CAREFUL_MARGIN
        room = await used(limiter)
        assert (cut - CAREFUL_MARGIN) * 60_000 < room <= cut * 60_000
        room += room // 10  # what ends in the next seconds is charged again already
        learning._announced.refuse("tpm:gpt-5")
        await learning.look()
        assert await used(limiter) <= room, "a call that was under way"
        (shown,) = await shared_limits(limiter, "")
        assert shown.others_share == pytest.approx(CUT if is_told else UNTOLD_CUT, abs=0.005)
        assert (shown.drift, bool(shown.model)) == ("same", is_told)
        raised = PoolPolicy({"tpm:gpt-5": replace(limit, bound=600_000)}, lease_ms=600, revision=2)
        await limiter.set_policy(raised)
        await wait_until(lambda: limiter.policy.bound("tpm:gpt-5") == 600_000, 20, "the bound")
        await learning.look()
        assert await used(limiter) <= room, "it was refused under another bound"


@pytest.mark.parametrize(
    ("provider", "stated", "kept"),
    [
        ("gemini", 60_000, 0.4 + REFUSED_MORE),
        ("gemini", None, UNTOLD_CUT),
        ("", 60_000, UNTOLD_CUT),
    ],
)
async def test_what_a_window_lacked_at_a_refusal_is_taken_by_others(
    valkey_url: str, provider: str, stated: int | None, kept: float
) -> None:
    """Three quarters of Gemini's window had passed, in which others took three tenths of it; it may
    be another limit that is used up where none is stated. Other providers tell when a call fits."""
    bounds = [] if stated is None else [StatedBound("tokens", "minute", stated)]
    limit = Rate(60_000, 60_000, "tokens")
    async with learner(valkey_url, limit, is_told=False, provider=provider) as (limiter, learning):
        async with limiter.acquire("tpm:gpt-5", tokens=Tokens(42_000), timeout=5) as permit:
            permit.settle(tokens=Tokens(42_000))
        learning._announced.refuse("tpm:gpt-5", "gpt-5", bounds, reset_ms=15_000)
        await learning.look()
        (others,) = learning._others
        assert others.amount == pytest.approx(60_000 * kept, abs=600)
        await learning.look()
        (again,) = learning._others
        assert others.amount - 600 < again.amount <= others.amount, "the same refusal"


@pytest.mark.parametrize(
    ("in_force", "stated"),
    [
        (Rate(600_000, 600_000, "tokens"), StatedBound("tokens", "minute", 60_000)),
        (Rate(600_000, 60_000, "tokens"), StatedBound("input_tokens", "minute", 60_000)),
    ],
    ids=["another window", "another unit"],
)
async def test_a_refusal_of_another_bound_tells_nothing_of_what_others_took(
    valkey_url: str, in_force: Rate, stated: StatedBound
) -> None:
    """What the pool did not take of a limit in force is not what others took of the provider's."""
    async with learner(valkey_url, in_force, is_told=False, provider="gemini") as made:
        limiter, learning = made
        async with limiter.acquire("tpm:gpt-5", tokens=Tokens(42_000), timeout=5) as permit:
            permit.settle(tokens=Tokens(42_000))
        learning._announced.refuse("tpm:gpt-5", "gpt-5", [stated], reset_ms=15_000)
        await learning.look()
        (others,) = learning._others
        assert others.amount == pytest.approx(600_000 * UNTOLD_CUT, abs=600)


def in_notes(limiter: Limiter, monkeypatch: pytest.MonkeyPatch, *notes: LearnedNote) -> None:
    """Let processes of later sessions share these notes too."""
    told = limiter.told

    async def all_told(most: int) -> dict[str, bytes]:
        others = {f"~{number}": orjson.dumps(asdict(one)) for number, one in enumerate(notes)}
        return {**await told(most), **others}

    monkeypatch.setattr(limiter, "told", all_told)


@pytest.mark.parametrize("stated", [60_000, 40_000])
async def test_another_leader_goes_on_with_what_refusals_that_state_a_bound_showed(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, stated: int
) -> None:
    limit, taken = Rate(60_000, 60_000, "tokens"), round(0.4 * stated)
    async with learner(valkey_url, limit, is_told=False, provider="gemini") as (limiter, learning):
        bounds = [StatedBound("tokens", "minute", stated)]
        learning._announced.refuse("tpm:gpt-5", "gpt-5", bounds)
        before = LearnedNote(others=(OthersUse("tpm:gpt-5", taken, 0),))
        in_notes(limiter, monkeypatch, before)
        await learning.look()
        (others,) = learning._others
        assert others.amount == pytest.approx(taken, abs=300)
        assert others.kept == pytest.approx(60_000 - stated + taken, abs=900)
        (shown,) = await shared_limits(limiter, "gemini")
        assert shown.others_share == pytest.approx(0.4, abs=0.01)


async def test_a_process_that_leads_next_goes_on_with_what_the_one_before_knew(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notes of a process end with its session."""
    limit = Rate(60_000, 60_000, "tokens")
    async with learner(valkey_url, limit, is_told=False) as (limiter, learning):
        told = limiter.told
        refused = LearnedNote(
            others=(OthersUse("tpm:gpt-5", 24_000, 24_000),),
            refusals=(RefusedLimit("tpm:gpt-5", time()),),
        )

        async def all_told(most: int) -> dict[str, bytes]:
            return {**await told(most), "!": orjson.dumps(asdict(refused))}

        monkeypatch.setattr(learning, "_clock", lambda: time() - 60.0)
        learning._announced.refuse("tpm:gpt-5")
        monkeypatch.undo()
        monkeypatch.setattr(limiter, "told", all_told)
        await learning.look()
        assert not learning._others, "the first of the sessions leads"
        monkeypatch.undo()
        monkeypatch.setattr(learning, "_clock", lambda: time() + 2.0)
        await learning.look()
        (others,) = learning._others
        assert others.amount == pytest.approx(24_000, abs=300)
        learning._uses.clear()
        monkeypatch.setattr(learning, "_clock", lambda: time() + 30.0)
        await learning.look()
        (others,) = learning._others
        assert others.amount == pytest.approx(UNTOLD_CUT * 60_000, abs=900), "it leads for long"


async def test_a_bound_that_was_stated_before_a_change_is_kept_to_by_no_later_leader(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows nothing of the change, and the bound would be kept to for an hour."""
    limit, name = Rate(60_000, 60_000, "tokens"), "tpm:gpt-5"
    async with learner(valkey_url, limit, is_told=False, provider="gemini") as (limiter, learning):
        stated = [StatedBound("tokens", "minute", 60_000)]
        learning._announced.refuse(name, "gpt-5", stated)
        await learning.look()
        raised = PoolPolicy({name: replace(limit, bound=600_000)}, lease_ms=600, revision=2)
        await limiter.set_policy(raised)
        await wait_until(lambda: limiter.policy.bound(name) == 600_000, 20, "the bound")
        await learning.look()
        notes = [unpacked_note(one) for one in (await limiter.told(10)).values()]
        assert not await shared_limits(limiter, "gemini"), "nothing is told of it since"
        before = await used(limiter)
        later = LimitLearner(learning._keeper, Announced(), "propose")
        later._announced.refuse("", "gpt-5", [StatedBound("requests", "minute", 10)])
        in_notes(limiter, monkeypatch, *notes)
        await later.look()
        assert await used(limiter) <= before
        learning._announced.refuse(name, "gpt-5", stated)
        await learning.look()
        assert await used(limiter) >= 540_000, "it was stated again"


async def test_a_bound_that_a_refusal_states_is_kept_to_for_an_hour(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemini has no headers of limits, and names the exceeded quota with its bound."""
    limit = Rate(60_000, 60_000, "tokens")
    async with learner(valkey_url, limit, is_told=False) as (limiter, learning):
        stated = [StatedBound("tokens", "minute", 40_000)]
        learning._announced.refuse("tpm:gpt-5", "gpt-5", stated)
        await learning.look()
        assert 20_000 <= await used(limiter) <= 20_000 + CAREFUL_MARGIN * 40_000
        (shown,) = await shared_limits(limiter, "")
        assert (shown.drift, shown.bound, shown.model) == ("fell", 40_000, "gpt-5")
        learning._uses.clear()  # so that nothing is left to be charged again
        monkeypatch.setattr(learning, "_clock", lambda: time() + STATED_S + 1)
        before = await used(limiter)
        await learning.look()
        assert await used(limiter) == before, "nobody who keeps to it hears that it rose"
        assert not await shared_limits(limiter, ""), "nor is it shown, or accepted with others"
        monkeypatch.undo()
        lowered = PoolPolicy({"tpm:gpt-5": replace(limit, bound=40_000)}, lease_ms=600, revision=2)
        await limiter.set_policy(lowered)
        await wait_until(lambda: limiter.policy.bound("tpm:gpt-5") == 40_000, 20, "the bound")
        await learning.look()
        learning._announced.refuse("tpm:gpt-5", "gpt-5", stated)
        await learning.look()
        await learning.look()  # the first found what this one shares
        (shown,) = await shared_limits(limiter, "")
        assert shown.drift == "same"
        assert shown.others_share == pytest.approx(UNTOLD_CUT, abs=0.005)


async def test_others_beside_a_lower_bound_are_shown_as_a_share_of_it(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three quarters of a minute had passed, in which others took three tenths of the lower bound:
    its second refusal, since its first tells of the bound alone."""
    limit, stated = Rate(60_000, 60_000, "tokens"), [StatedBound("tokens", "minute", 30_000)]
    async with learner(valkey_url, limit, is_told=False, provider="gemini") as (limiter, learning):
        with monkeypatch.context() as patched:
            patched.setattr(learning._announced, "_clock", lambda: time() - 20.0)
            learning._announced.refuse("", "gpt-5", stated)
        await learning.look()
        async with limiter.acquire("tpm:gpt-5", tokens=Tokens(21_000), timeout=5) as permit:
            permit.settle(tokens=Tokens(21_000))
        learning._announced.refuse("tpm:gpt-5", "gpt-5", stated, reset_ms=15_000)
        await learning.look()
        await learning.look()  # which shares what the one before it has found
        (shown,) = await shared_limits(limiter, "gemini")
        assert (shown.bound, shown.in_force) == (30_000, 60_000)
        assert shown.others_share == pytest.approx(0.4 + REFUSED_MORE, abs=0.03)


@pytest.mark.parametrize("tokens", [10_000, 55_000])
async def test_after_a_refusal_calls_of_a_full_limit_come_evenly(
    valkey_url: str, tokens: int
) -> None:
    async with learner(valkey_url, Rate(60_000, 60_000, "tokens"), is_told=False) as made:
        limiter, learning = made
        async with limiter.acquire("tpm:gpt-5", tokens=Tokens(tokens), timeout=5) as permit:
            permit.settle(tokens=Tokens(tokens))
        learning._announced.refuse("tpm:gpt-5")
        await learning.look()
        is_full = tokens > NEARLY_FULL * 60_000
        assert limiter.paused_of(["tpm:gpt-5"]) == (("tpm:gpt-5",) if is_full else ())


async def test_a_limit_in_shadow_keeps_no_room_free(valkey_url: str) -> None:
    async with learner(valkey_url, Rate(60_000, 60_000, "tokens", shadow=True)) as made:
        limiter, learning = made
        await learning.look()
        assert await used(limiter) == 0


async def test_room_is_kept_free_again_after_valkey_has_lost_its_data(
    own_valkey: ValkeyServer,
) -> None:
    async with learner(own_valkey.url, Rate(60_000, 60_000, "tokens")) as made:
        limiter, learning = made
        await learning.look()
        assert await used(limiter) == 30_000
        epoch = (await limiter.snapshot()).epoch
        client: Any = redis.asyncio.Redis.from_url(own_valkey.url)
        await client.flushall()
        await client.aclose()

        async def has_recovered() -> bool:
            snapshot = await limiter.snapshot()
            return snapshot.epoch > epoch and not snapshot.recovering_ms

        await wait_until(has_recovered, 20, "another epoch")
        await learning.look()
        ending = 30_000 * (RENEWED_S + 1.0) / 60.0  # is charged again already, if time has passed
        assert 30_000 <= await used(limiter) <= 30_000 + ending


@pytest.mark.parametrize(
    ("name", "limit", "raised"),
    [
        ("tpm:gpt-5", Rate(30_000, 60_000, "tokens"), Rate(600_000, 60_000, "tokens")),
        ("rpd:gpt-5", Quota(30_000), Quota(600_000)),
    ],
)
async def test_an_answer_of_before_a_limit_was_raised_keeps_no_room_free_in_it(
    valkey_url: str, name: str, limit: Rate | Quota, raised: Rate | Quota
) -> None:
    async with learner(valkey_url, limit, remaining=0) as made:
        limiter, learning = made
        await learning.look()
        before = await used(limiter)
        await limiter.set_policy(PoolPolicy({name: raised}, lease_ms=600, revision=2))
        await wait_until(lambda: limiter.policy.bound(name) == 600_000, 20, "the higher bound")
        await learning.look()
        assert await used(limiter) == before


async def test_after_a_clock_was_set_back_answers_of_a_changed_limit_count(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, ahead_s = "tpm:gpt-5", 3_600.0
    async with learner(valkey_url, Rate(60_000, 60_000, "tokens")) as made:
        limiter, learning = made
        monkeypatch.setattr(learning, "_clock", lambda: time() + ahead_s)
        await learning.look()
        raised = PoolPolicy({name: Rate(600_000, 60_000, "tokens")}, lease_ms=600, revision=2)
        await limiter.set_policy(raised)
        await wait_until(lambda: limiter.policy.bound(name) == 600_000, 20, "the higher bound")
        await learning.look()
        assert await used(limiter) <= 30_000
        ahead_s = 0.0
        headers = {b"limit": b"30000", b"remaining": b"30000"}
        told = [(b"x-ratelimit-%s-tokens" % key, value) for key, value in headers.items()]
        learning._announced.note("gpt-5", told)
        await learning.look()
        assert await used(limiter) >= 570_000


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("tpm:gpt-5", Rate(60_000, 60_000, "tokens")),
        ("tpm:gpt-5", Rate(60_000, 60_000, "tokens", shape="bucket")),
        ("rpd:gpt-5", Quota(60_000, zone=where_it_is(12))),
    ],
    ids=["window", "bucket", "day"],
)
async def test_what_is_kept_for_the_difference_ends_once_a_bound_that_fell_is_set(
    valkey_url: str, name: str, limit: Rate | Quota
) -> None:
    """What the account has used stays, and what ended is taken for no use of others."""
    async with learner(valkey_url, limit, remaining=20_000) as (limiter, learning):
        await learning.look()
        before = await used(limiter)
        lower = PoolPolicy({name: replace(limit, bound=30_000)}, lease_ms=600, revision=2)
        await limiter.set_policy(lower)
        await limiter.in_force()
        after = await used(limiter)
        assert after == pytest.approx(max(0, before - 30_000), abs=1_000)
        await learning.look()
        headers = {b"limit": 30_000, b"remaining": 20_000}
        unit = b"requests" if isinstance(limit, Quota) else b"tokens"
        told = [(b"x-ratelimit-%s-%s" % (key, unit), b"%d" % headers[key]) for key in headers]
        learning._announced.note("gpt-5", told)
        await learning.look()
        assert await used(limiter) == pytest.approx(after, abs=1_000)


async def test_nothing_is_charged_beside_a_bound_that_the_pool_no_longer_has(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has set a lower one, of which this one has not heard."""
    async with learner(valkey_url, Rate(60_000, 60_000, "tokens")) as (limiter, learning):
        snapshot = limiter.snapshot

        async def of_a_lower_bound(**asked: Any) -> Any:
            found = await snapshot(**asked)
            lower = {name: replace(one, bound=30_000) for name, one in found.limits.items()}
            return replace(found, limits=lower)

        with monkeypatch.context() as patched:
            patched.setattr(limiter, "snapshot", of_a_lower_bound)
            await learning.look()
        assert await used(limiter) == 0
        assert not await limiter.charge("tpm:gpt-5", 1_000, bound=30_000)
        assert await used(limiter) == 0
        assert await limiter.charge("tpm:gpt-5", 1_000, bound=60_000)
        assert await used(limiter) == 1_000


@pytest.mark.parametrize("fault", ["refused", "away"])
@pytest.mark.parametrize(
    "limit",
    [Rate(60_000, 60_000, "tokens"), Quota(60_000, zone=where_it_is(12))],
    ids=["rate", "day"],
)
async def test_room_that_could_not_be_kept_free_is_kept_free_at_the_next_look(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, limit: Rate | Quota, fault: str
) -> None:
    async def charge(name: str, amount: int, *, evenly: bool, bound: int) -> bool:
        if fault == "away":
            raise LimiterUnavailable("Valkey is away", limit=name, retry_after_ms=1)
        return False

    async with learner(valkey_url, limit, remaining=0) as made:
        limiter, learning = made
        with monkeypatch.context() as patched, suppress(LimiterUnavailable):
            patched.setattr(limiter, "charge", charge)
            await learning.look()
        assert await used(limiter) == 0
        assert not learning._others
        await learning.look()
        (others,) = learning._others
        assert await used(limiter) == others.kept > 0
