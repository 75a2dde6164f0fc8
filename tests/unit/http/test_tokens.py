"""Tokens at the gate: verified once, remembered for a bounded time, worth what their tenant is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from tests.unit.http.test_gate import Record, headers_of
from tidegate.call import Caller, Caps, Scope
from tidegate.errors import Forbidden, IssuerUnavailable, StoreUnavailable, Unauthenticated
from tidegate.http import auth
from tidegate.http.auth import VERIFIED_FOR_S, Authenticator, TokenTrust, credentials_in
from tidegate.store.tenants import FoundTenant
from tidegate.upstream.issuer import LEEWAY_S, Issuer

TOKEN = "eyJhbGciOiJSUzI1NiJ9.e30.c2ln"
OTHER = "eyJhbGciOiJSUzI1NiJ9.e31.c2ln"


class Trusted(Issuer):
    """An issuer whose every token says what the test says; counts verifications."""

    def __init__(self) -> None:
        super().__init__("https://issuer.example")
        self.told: dict[str, Any] = {"sub": "svc", "tenant": "acme"}
        self.verified = 0
        self.wrong: Exception | None = None

    async def claims(self, token: bytes, audience: str) -> dict[str, Any]:
        self.verified += 1
        if self.wrong is not None:
            raise self.wrong
        return {"exp": time.time() + 3_600, **self.told}


class Known(Record):
    """Tenants in memory, and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.tenants = {"acme": FoundTenant(Caller("acme", caps=Caps(most_streams=3)), False)}
        self.asked = 0

    async def find_tenants(self, tenants: Sequence[str]) -> tuple[int, dict[str, FoundTenant]]:
        self.asked += 1
        if self.unavailable:
            raise StoreUnavailable("away")
        return self.number, {one: self.tenants[one] for one in tenants if one in self.tenants}


@pytest.fixture
def record() -> Known:
    return Known()


@pytest.fixture
def issuer() -> Trusted:
    return Trusted()


@pytest.fixture
def gate(record: Known, issuer: Trusted) -> Authenticator:
    trust = TokenTrust(issuer, "calls", "tenant")
    return Authenticator(record, on=True, outage_ms=60_000, tokens=trust, clock=record.clock)


async def test_a_token_is_verified_once_and_then_known_without_any_work(
    record: Known, issuer: Trusted, gate: Authenticator
) -> None:
    headers = headers_of(TOKEN)
    assert gate.known(headers, b"") is None
    caller = await gate.identify(headers, b"")
    assert (caller.tenant_id, caller.key_id, caller.caps.most_streams) == ("acme", "jwt:svc", 3)
    assert gate.known(headers, b"") is caller
    assert gate.known([(b"x-api-key", TOKEN.encode())], b"") is caller
    assert await gate.identify(headers, b"", Scope.READ) is caller
    assert (issuer.verified, record.asked) == (1, 1)
    await gate.note_uses()
    assert record.noted == {}
    with pytest.raises(Forbidden, match="the token jwt:svc has no role"):
        await gate.operator(headers, b"")


async def test_it_counts_until_it_expires_and_is_verified_again_within_ten_minutes(
    record: Known, issuer: Trusted, gate: Authenticator
) -> None:
    issuer.told["exp"] = time.time() + 60 - LEEWAY_S
    await gate.identify(headers_of(TOKEN), b"")
    record.now += 61
    issuer.wrong = Unauthenticated("the token has expired")
    assert gate.known(headers_of(TOKEN), b"") is None
    with pytest.raises(Unauthenticated, match="expired"):
        await gate.identify(headers_of(TOKEN), b"")
    issuer.wrong, issuer.told["exp"] = None, time.time() + 86_400
    await gate.identify(headers_of(OTHER), b"")
    record.now += VERIFIED_FOR_S + 1
    before = issuer.verified
    assert gate.known(headers_of(OTHER), b"") is None
    await gate.identify(headers_of(OTHER), b"")
    assert issuer.verified == before + 1


async def test_a_change_of_its_tenant_is_in_force_without_another_verification(
    record: Known, issuer: Trusted, gate: Authenticator
) -> None:
    headers = headers_of(TOKEN)
    await gate.identify(headers, b"")
    record.tenants["acme"] = FoundTenant(Caller("acme"), True)
    record.number += 1
    await gate.refresh()
    assert gate.known(headers, b"") is None
    with pytest.raises(Forbidden, match="acme is disabled"):
        await gate.identify(headers, b"")
    assert issuer.verified == 1


async def test_a_tenant_that_is_not_there_is_refused_by_the_name_of_the_claim(
    record: Known, issuer: Trusted, gate: Authenticator
) -> None:
    mistakes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"tenant": "nobody"}, "claim tenant is not the name of a tenant"),
        ({"tenant": None}, "lacks the claim tenant"),
        ({"tenant": ["acme"]}, "lacks the claim tenant"),
        ({"tenant": "a b"}, "claim tenant is not the name of a tenant"),
        ({"sub": "line\nbreak"}, "claim sub must be 1 to 255"),
        ({"sub": ""}, "claim sub must be 1 to 255"),
    )
    for number, (told, why) in enumerate(mistakes):
        issuer.told = {"sub": "svc", "tenant": "acme"} | told
        with pytest.raises(Unauthenticated, match=why):
            await gate.identify(headers_of(f"eyJ.{number}.x"), b"")
    issuer.told = {"sub": "svc", "tenant": "new"}
    with pytest.raises(Unauthenticated):
        await gate.identify(headers_of(OTHER), b"")
    asked = record.asked
    for _ in range(10):
        with pytest.raises(Unauthenticated):
            await gate.identify(headers_of(OTHER), b"")
    assert record.asked == asked, "what was refused a moment ago costs no statement"
    record.tenants["new"] = FoundTenant(Caller("new"), False)
    record.number += 1
    await gate.refresh()
    assert (await gate.identify(headers_of(OTHER), b"")).tenant_id == "new"


async def test_what_is_remembered_is_bounded(
    record: Known, gate: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOST_KNOWN", "MOST_REFUSED", "MOST_VERIFIED"):
        monkeypatch.setattr(auth, name, 5)
    for number in range(20):
        await gate.identify(headers_of(f"eyJ.{number}.x"), b"")
    assert len(gate._verified) <= 5
    assert len(gate._known) <= 5


async def test_without_an_issuer_a_token_is_no_key_and_costs_nothing(record: Known) -> None:
    gate = Authenticator(record, on=True, outage_ms=1)
    with pytest.raises(Unauthenticated, match="not an API key"):
        await gate.identify(headers_of(TOKEN), b"")
    assert record.asked == record.finds == 0


async def test_an_issuer_that_is_away_is_said_so_and_not_remembered(
    issuer: Trusted, gate: Authenticator
) -> None:
    issuer.wrong = IssuerUnavailable("away")
    for _ in range(2):
        with pytest.raises(IssuerUnavailable):
            await gate.identify(headers_of(TOKEN), b"")
    issuer.wrong = None
    assert await gate.identify(headers_of(TOKEN), b"")


def test_a_token_goes_before_what_an_sdk_sends_in_the_place_of_a_key_and_behind_a_key_of_ours() -> (
    None
):
    token, placeholder = TOKEN.encode(), b"sk-none"
    ours = b"tg_abcdefghij_" + b"A" * 43
    for first, second, right in (
        (token, placeholder, token),
        (placeholder, token, token),
        (ours, token, ours),
        (token, ours, ours),
        (token, OTHER.encode(), OTHER.encode()),
    ):
        headers = [(b"authorization", b"Bearer " + first), (b"x-api-key", second)]
        found = credentials_in(headers, b"")
        assert (found.key, found.several) == (right, False)
