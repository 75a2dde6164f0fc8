"""Signing in to the dashboard by an OpenID Connect issuer, and what attacks it."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import orjson
import pytest
from yarl import URL

from tests.gateway import Gateway, Opener
from tests.issuer import CLIENT, SECRET, IssuerServer, issuer_server
from tests.waiting import wait_until
from tidegate.http.browsers import PERSON_S, cookie_name, make_code, state_cookie_name

RULES = {
    "groups=tide-admins": "admin",
    "groups=oncall": "operator",
    "email=*@example.com": "viewer",
    "realm.roles=looks-*": "viewer",
}
ANN = {"sub": "u-1", "email": "Ann@example.com", "email_verified": True, "groups": ["oncall"]}
NAVIGATION = {
    "Sec-Fetch-Site": "cross-site",
    "Sec-Fetch-Mode": "navigate",
    "Sec-Fetch-Dest": "document",
}


@dataclass
class Place:
    gateway: Gateway
    another: Gateway  # another process of the deployment
    issuer: IssuerServer

    @asynccontextmanager
    async def browser(self) -> AsyncIterator[aiohttp.ClientSession]:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
            yield session

    async def begun(self, browser: aiohttp.ClientSession, **headers: str) -> str:
        """The address to which the issuer sends the browser back."""
        url = f"{self.gateway.url}/dashboard/sign-in"
        async with browser.get(url, allow_redirects=False, headers=headers) as answer:
            assert answer.status == 303
            assert answer.headers["Cache-Control"] == "no-store"
            place = answer.headers["Location"]
        async with browser.get(place, allow_redirects=False) as answer:
            assert answer.status == 302, await answer.text()
            return answer.headers["Location"]

    async def ended(self, browser: aiohttp.ClientSession, place: str) -> str:
        """Where the page is opened then."""
        async with browser.get(place, allow_redirects=False, headers=NAVIGATION) as answer:
            assert answer.status == 303, await answer.text()
            assert state_cookie_name(self.gateway.operator_key) in str(answer.headers)
            return answer.headers["Location"]

    async def session(self, browser: aiohttp.ClientSession) -> tuple[int, Any]:
        async with browser.get(f"{self.gateway.url}/dashboard/session") as answer:
            return answer.status, orjson.loads(await answer.read())


@pytest.fixture(params=["off", "on"])
async def place(open_gateway: Opener, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    async with issuer_server(user=dict(ANN)) as issuer:
        first, second = [
            await open_gateway(
                worker=False,
                auth=request.param,
                oidc_issuer=issuer.url,
                oidc_client_id=CLIENT,
                oidc_client_secret=SECRET,
                oidc_roles=RULES,
            )
            for _ in range(2)
        ]
        yield Place(first, second, issuer)


async def test_a_person_signs_in_with_the_role_of_their_claims_and_out_again(place: Place) -> None:
    gateway = place.gateway
    async with place.browser() as browser:
        async with browser.get(f"{gateway.url}/dashboard/ways-in") as answer:
            assert orjson.loads(await answer.read()) == {"single_sign_on": True}
        assert await place.ended(browser, await place.begun(browser)) == "./"
        status, session = await place.session(browser)
        assert (status, session["operator"], session["role"]) == (
            *(200, "Ann@example.com"),
            "operator",
        )
        (kept,) = [
            one for one in browser.cookie_jar if one.key == cookie_name(gateway.operator_key)
        ]
        assert kept["httponly"]
        assert kept["samesite"].lower() == "strict"
        assert int(kept["max-age"]) == PERSON_S
        pause = f"{gateway.url}/admin/limits/kind:text_only/pause"
        for marks, code in (
            ({"Origin": gateway.url, "Sec-Fetch-Site": "same-origin"}, 200),
            ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
            ({"Sec-Fetch-Site": "same-site"}, 403),
        ):
            async with browser.post(pause, json={"for_ms": 1}, headers=marks) as answer:
                assert answer.status == code, marks
        async with browser.post(f"{gateway.url}/admin/keys", json={}) as answer:
            assert answer.status == 403
            assert "needs the role admin; Ann@example.com has the role operator" in (
                await answer.text()
            )
        place.issuer.is_down = True
        assert (await place.session(browser))[0] == 200, "a session outlives its issuer"
        async with place.browser() as another:
            another.cookie_jar.update_cookies({kept.key: kept.value}, URL(gateway.url))
            assert (await place.session(another))[0] == 200
            async with browser.post(f"{gateway.url}/dashboard/sign-out") as answer:
                assert answer.status == 204
            assert (await place.session(browser))[0] == 401
            assert (await place.session(another))[0] == 401, "it had a copy"


async def test_who_has_no_role_or_no_verified_address_gets_none(place: Place) -> None:
    someone = {"sub": "u-2", "email": "bob@example.com"}
    for claims, role in (
        (someone | {"email_verified": True}, "viewer"),
        (someone | {"email_verified": False}, None),
        (someone, None),
        (someone | {"email": "bob@example.com.evil", "email_verified": True}, None),
        ({"sub": "u-3", "groups": ["tide-admins", "oncall"]}, "admin"),
        ({"sub": "u-3", "groups": "oncall"}, "operator"),
        ({"sub": "u-3", "realm": {"roles": ["looks-on"]}}, "viewer"),
        ({"sub": "u-3", "groups": [["tide-admins"], 5]}, None),
    ):
        place.issuer.user = claims
        async with place.browser() as browser:
            where = await place.ended(browser, await place.begun(browser))
            assert where == ("./" if role else "./?sign-in=role"), claims
            status, session = await place.session(browser)
            assert (status, session.get("role")) == ((200, role) if role else (401, None))


async def test_nobody_is_on_record_by_a_name_of_their_own_choice_alone(place: Place) -> None:
    letters = "\U0001f30a" * 255
    for claims, name in (
        ({"email": "ann@example.com", "email_verified": "true"}, "ann@example.com"),
        ({"email": "ann@example.com"}, "ann@example.com (u-9)"),
        ({"email": "ann@example.com", "email_verified": False}, "ann@example.com (u-9)"),
        ({"preferred_username": "the operator's key"}, "the operator's key (u-9)"),
        ({"name": "ann@example.com", "preferred_username": "a\u202eb"}, "ann@example.com (u-9)"),
        ({}, "u-9"),
        ({"name": "u-9"}, "u-9"),
        ({"name": letters, "sub": letters}, letters),
        ({"name": letters, "sub": letters[1:]}, f"{letters[:100]} ({letters[1:]})"),
    ):
        place.issuer.user = {"sub": "u-9", "groups": "oncall"} | claims
        async with place.browser() as browser:
            assert await place.ended(browser, await place.begun(browser)) == "./", claims
            status, session = await place.session(browser)
            assert (status, session.get("operator")) == (200, name)
    who = await place.gateway.database.fetch("SELECT operator FROM operator_actions")
    assert {row["operator"] for row in who} >= {"ann@example.com", "the operator's key (u-9)"}


async def replayed(place: Place, why: str) -> None:
    """The same address again, with all that the browser had, does not count in any process."""
    async with place.browser() as browser:
        begun = await place.begun(browser)
        cookies = {one.key: one.value for one in browser.cookie_jar}
        assert await place.ended(browser, begun) == "./"
    header = "; ".join(f"{name}={value}" for name, value in cookies.items())
    own = URL(place.gateway.url).authority
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as thief:
        for gateway, refused in ((place.gateway, "state"), (place.another, why)):
            sent = {"Cookie": header, "Host": own}
            url = begun.replace(place.gateway.url, gateway.url, 1)
            async with thief.get(url, allow_redirects=False, headers=sent) as got:
                assert got.headers["Location"] == f"./?sign-in={refused}"


async def test_attacks_on_the_way_back_sign_nobody_in(place: Place) -> None:
    issuer, operator_key = place.issuer, place.gateway.operator_key

    async def refused(browser: aiohttp.ClientSession, where: str, why: str) -> None:
        assert await place.ended(browser, where) == f"./?sign-in={why}"
        assert (await place.session(browser))[0] == 401

    async with place.browser() as browser, place.browser() as victim:
        begun = await place.begun(browser)
        await refused(victim, begun, "state")  # a sign-in that another browser began
        assert await place.ended(browser, begun) == "./"  # and is still good in its own
        await place.begun(victim)
        await refused(victim, begun, "state")
    for reuses, why in ((False, "refused"), (True, "state")):
        issuer.reuses_codes = reuses  # which none should, and which is not relied on
        await replayed(place, why)
    issuer.reuses_codes = False
    spent = "SELECT count(*) FROM spent_codes"
    before = await place.gateway.database.fetchval(spent)
    for part, put, why in (
        ("state", make_code(operator_key), "state"),
        ("state", "", "state"),
        ("code", "made-up", "refused"),
        ("code", "&error=access_denied", "refused"),
        ("iss", "https%3A%2F%2Fevil.example", "state"),
    ):
        async with place.browser() as browser:
            begun = await place.begun(browser)
            await refused(browser, re.sub(rf"\b{part}=[^&]+", f"{part}={put}", begun), why)
    for claims in (
        {"nonce": "of-another-sign-in"},
        {"aud": "another-client"},
        {"azp": "another-client"},
        {"iss": "https://evil.example"},
        {"exp": 1},
        {"sub": None},
    ):
        issuer.change = lambda told, claims=claims: told.update(claims)  # type: ignore[misc]
        async with place.browser() as browser:
            await refused(browser, await place.begun(browser), "refused")
    after = await place.gateway.database.fetchval(spent)
    assert after == before, "who can't sign in writes nothing"


async def test_nothing_goes_to_the_issuer_but_once_for_a_sign_in_that_this_browser_began(
    place: Place,
) -> None:
    asked = place.issuer.asked

    async def guessed(browser: aiohttp.ClientSession, begun: str, number: int) -> str:
        return await place.ended(browser, re.sub(r"\bcode=[^&]+", f"code=guess-{number}", begun))

    async with place.browser() as browser, place.browser() as another:
        begun = await place.begun(browser)
        kept = {one.key: one.value for one in browser.cookie_jar}
        before = asked["/token"]
        assert await guessed(another, begun, 0) == "./?sign-in=state"
        assert asked["/token"] == before, "no sign-in was begun there"
        header = {"Cookie": "; ".join(f"{name}={value}" for name, value in kept.items())}
        for number in range(5):
            async with aiohttp.ClientSession(headers=header) as guesser:
                why = await guessed(guesser, begun, number)
            assert why == ("./?sign-in=state" if number else "./?sign-in=refused")
        assert asked["/token"] == before + 1, "a sign-in has one answer"
        assert await place.ended(browser, await place.begun(browser)) == "./"


async def test_made_up_codes_go_to_the_issuer_at_a_bounded_rate(place: Place) -> None:
    async def guessed(number: int) -> str:
        async with place.browser() as browser:
            begun = await place.begun(browser)
            return await place.ended(browser, re.sub(r"\bcode=[^&]+", f"code=x-{number}", begun))

    before = place.issuer.asked["/token"]
    ends, started = list[str](), time.monotonic()
    while "./?sign-in=busy" not in ends and len(ends) < 200:
        ends.append(await guessed(len(ends)))
    assert set(ends) == {"./?sign-in=refused", "./?sign-in=busy"}
    asked = place.issuer.asked["/token"] - before
    assert 30 <= asked <= 31 + time.monotonic() - started

    async def signs_in() -> bool:
        async with place.browser() as browser:
            return await place.ended(browser, await place.begun(browser)) == "./"

    await wait_until(signs_in, 10, "a sign-in in the next seconds")
    for _ in range(3):
        assert await signs_in(), "what succeeds takes nothing"


async def test_a_sign_in_in_one_tab_ends_none_of_another(place: Place) -> None:
    async with place.browser() as browser:
        first, second = await place.begun(browser), await place.begun(browser)
        assert await place.ended(browser, first) == "./"
        assert await place.ended(browser, second) == "./"
        assert await place.ended(browser, second) == "./?sign-in=state", "it is spent"
        for _ in range(20):
            begun = await place.begun(browser)
        (kept,) = [one for one in browser.cookie_jar if one.key.endswith("_state")]
        assert len(kept.value) < 1_000, "a page that opens many fills no jar"
        assert await place.ended(browser, begun) == "./"


async def test_it_leads_nowhere_but_to_the_page(place: Place) -> None:
    async with place.browser() as browser:
        evil = "https%3A%2F%2Fevil.example"
        asks = f"next={evil}&redirect_uri={evil}&return_to={evil}"
        url = f"{place.gateway.url}/dashboard/sign-in?{asks}"
        async with browser.get(url, allow_redirects=False) as answer:
            sent = parse_qs(urlsplit(answer.headers["Location"]).query)
        assert sent["redirect_uri"] == [f"{place.gateway.url}/dashboard/signed-in"]
        begun = await place.begun(browser)
        assert await place.ended(browser, f"{begun}&next={evil}&redirect_uri={evil}") == "./"
    async with place.browser() as browser:
        # The prefix that a balancer may use is kept.
        url = f"{place.gateway.url}/llm/dashboard/sign-in"
        async with browser.get(url, allow_redirects=False) as answer:
            sent = parse_qs(urlsplit(answer.headers["Location"]).query)
        assert sent["redirect_uri"] == [f"{place.gateway.url}/llm/dashboard/signed-in"]


async def test_while_the_issuer_is_away_signing_in_says_so_and_the_key_goes_on(
    place: Place,
) -> None:
    place.issuer.is_down = True
    async with place.browser() as browser:
        url = f"{place.gateway.url}/dashboard/sign-in"
        async with browser.get(url, allow_redirects=False) as answer:
            assert answer.headers["Location"] == "./?sign-in=issuer"
        asked = place.issuer.asked["/.well-known/openid-configuration"]
        for _ in range(20):
            async with browser.get(url, allow_redirects=False) as answer:
                assert answer.headers["Location"] == "./?sign-in=issuer"
        hammered = place.issuer.asked["/.well-known/openid-configuration"] - asked
        assert hammered <= 5, "at most once in a second"
        place.issuer.is_down = False

        async def leads_to_the_issuer() -> bool:
            async with browser.get(url, allow_redirects=False) as answer:
                return answer.headers["Location"].startswith(place.issuer.url)

        await wait_until(leads_to_the_issuer, 20, "the issuer's return")
        begun = await place.begun(browser)
        place.issuer.is_down = True
        assert await place.ended(browser, begun) == "./?sign-in=issuer"
        code = make_code(place.gateway.operator_key)
        page = f"{place.gateway.url}/dashboard/?code={code}"
        async with browser.get(page, allow_redirects=False) as answer:
            assert answer.status == 303
        assert (await place.session(browser))[1]["role"] == "admin"


async def test_without_an_issuer_there_is_no_such_way(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    for path in ("/dashboard/sign-in", "/dashboard/signed-in"):
        async with gateway.http.get(gateway.url + path, allow_redirects=False) as answer:
            assert answer.status == 404
    async with gateway.http.get(f"{gateway.url}/dashboard/ways-in") as answer:
        assert orjson.loads(await answer.read()) == {"single_sign_on": False}
