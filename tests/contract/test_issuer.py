"""Tokens of an issuer over HTTP: which count, which do not, and how often it is asked."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.issuer import AUDIENCE, IssuerServer, issuer_server, new_key
from tidegate.errors import IssuerUnavailable, Unauthenticated
from tidegate.upstream import issuer as module
from tidegate.upstream.issuer import Issuer

KEYS = "/keys"


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def server() -> AsyncIterator[IssuerServer]:
    async with issuer_server() as started:
        yield started


async def claims_of(issuer: Issuer, token: str) -> dict[str, Any]:
    return await issuer.claims(token.encode(), AUDIENCE)


def good_body(server: IssuerServer) -> str:
    return server.token().split(".")[1]


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA", "PS512"])
async def test_a_token_of_the_issuer_counts_and_its_keys_are_read_once(
    server: IssuerServer, algorithm: str
) -> None:
    server.rotate("k2", algorithm)
    issuer = Issuer(server.url)
    found = await asyncio.gather(*(claims_of(issuer, server.token(n=n)) for n in range(20)))
    assert [one["n"] for one in found] == list(range(20))
    assert server.asked[KEYS] == 1


async def test_what_is_not_the_issuers_or_not_for_us_or_over_does_not_count(
    server: IssuerServer,
) -> None:
    issuer = Issuer(server.url)
    now = time.time()
    for claims, why in (
        ({"aud": "another"}, "another audience"),
        ({"aud": None}, "lacks the claim aud"),
        ({"iss": "https://evil.example"}, "another issuer"),
        ({"iss": None}, "lacks the claim iss"),
        ({"exp": now - 60}, "has expired"),
        ({"exp": None}, "lacks the claim exp"),
        ({"nbf": now + 60}, "not valid yet"),
        ({"sub": None}, "lacks the claim sub"),
    ):
        with pytest.raises(Unauthenticated, match=why):
            await claims_of(issuer, server.token(**claims))
    for within in ({"exp": now - 10}, {"nbf": now + 10}, {"aud": ["x", AUDIENCE]}):
        assert await claims_of(issuer, server.token(**within))


async def test_attacks_on_the_signature_are_refused(server: IssuerServer) -> None:
    issuer = Issuer(server.url)
    good = server.token()
    claims = jwt.decode(good, options={"verify_signature": False})
    head, body, signature = good.split(".")
    public = server.keys["k1"][1].public_key()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )

    def signed_by(secret: bytes, **header: Any) -> str:
        text = f"{part({'alg': 'HS256', 'typ': 'JWT', **header})}.{body}"
        mac = hmac.digest(secret, text.encode(), hashlib.sha256)
        return f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"

    attacks = {
        "none": f"{part({'alg': 'none', 'kid': 'k1'})}.{body}.",
        "None": f"{part({'alg': 'None', 'kid': 'k1'})}.{body}.{signature}",
        "no algorithm": f"{part({'kid': 'k1'})}.{body}.{signature}",
        "the public key as a secret": signed_by(pem, kid="k1"),
        "the listed symmetric key": signed_by(base64.b64decode("c2VjcmV0" * 8), kid="shared"),
        "a key of its own": jwt.encode(claims, new_key(), "RS256", headers={"kid": "k1"}),
        "a key in its head": jwt.encode(
            claims, new_key(), "RS256", headers={"kid": "k1", "jwk": {"kty": "RSA"}}
        ),
        "another algorithm of the key's kind": f"{part({'alg': 'RS512', 'kid': 'k1'})}.{body}."
        f"{signature}",
        "a key of another kind": jwt.encode(
            claims, new_key("ES256"), "ES256", headers={"kid": "k1"}
        ),
        "critical extensions": f"{part({'alg': 'RS256', 'kid': 'k1', 'crit': ['x']})}.{body}."
        f"{signature}",
        "another body": f"{head}.{part(claims | {'tenant': 'acme'})}.{signature}",
        "no signature": f"{head}.{body}.",
        "no JSON": f"eyJ.{body}.{signature}",
        "a nested head": f"{part([[]])}.{body}.{signature}",
        "too long": f"{head}.{'A' * 20_000}.{signature}",
        "a path as the key's id": jwt.encode(
            claims, new_key(), "RS256", headers={"kid": "../../etc/passwd"}
        ),
    }
    assert await claims_of(issuer, good)
    for name, token in attacks.items():
        with pytest.raises(Unauthenticated) as refused:
            await claims_of(issuer, token)
        assert token not in refused.value.message, name


async def test_a_short_key_is_refused(server: IssuerServer) -> None:
    # Google's and others' are of 2,048 bits at least; a shorter one can be taken apart.
    weak = rsa.generate_private_key(public_exponent=65_537, key_size=1_024)
    server.keys = {"weak": ("RS256", weak)}
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        token = server.token()
    with pytest.raises(Unauthenticated, match="cannot be verified"):
        await claims_of(Issuer(server.url), token)


async def test_keys_rotate_and_a_flood_of_unknown_keys_hammers_no_issuer(
    server: IssuerServer,
) -> None:
    clock = Clock()
    issuer = Issuer(server.url, clock=clock)
    old = server.token()
    assert await claims_of(issuer, old)
    clock.now += module.KEYS_ASKED_EVERY_S
    server.rotate("k2")
    assert await claims_of(issuer, server.token())
    with pytest.raises(Unauthenticated, match="does not list"):
        await claims_of(issuer, old)
    before = server.asked[KEYS]
    body = good_body(server)
    flood = [f"{part({'alg': 'RS256', 'kid': f'k{n}'})}.{body}.c2ln" for n in range(300)]
    for seconds in range(30):
        clock.now += 1
        outcomes = await asyncio.gather(
            *(claims_of(issuer, one) for one in flood[seconds * 10 : seconds * 10 + 10]),
            return_exceptions=True,
        )
        assert all(isinstance(one, Unauthenticated) for one in outcomes)
    assert server.asked[KEYS] - before <= 3


async def test_an_outage_of_the_issuer_is_survived_while_its_keys_are_fresh(
    server: IssuerServer,
) -> None:
    clock = Clock()
    issuer = Issuer(server.url, clock=clock)
    server.is_down = True
    with pytest.raises(IssuerUnavailable):
        await claims_of(issuer, server.token())
    server.is_down = False
    with pytest.raises(IssuerUnavailable):
        await claims_of(issuer, server.token())  # it was asked a moment ago
    clock.now += module.KEYS_ASKED_EVERY_S
    assert await claims_of(issuer, server.token())
    server.is_down = True
    for _ in range(20):
        clock.now += module.KEYS_READ_EVERY_S
        assert await claims_of(issuer, server.token())
    clock.now += module.KEYS_USABLE_S
    with pytest.raises(IssuerUnavailable):
        await claims_of(issuer, server.token())


async def test_a_key_that_was_withdrawn_in_a_quiet_time_does_not_count(
    server: IssuerServer,
) -> None:
    clock = Clock()
    issuer = Issuer(server.url, clock=clock)
    stolen = server.token()
    assert await claims_of(issuer, stolen)
    clock.now += 6 * 3_600  # no token comes
    server.rotate("k2")
    with pytest.raises(Unauthenticated, match="does not list"):
        await claims_of(issuer, stolen)
    assert await claims_of(issuer, server.token())


@pytest.mark.parametrize("answer", [b"<html>Back soon</html>", b"{}", b'{"keys": null}', b"[]"])
async def test_an_issuer_that_answers_with_no_list_of_keys_is_away(
    server: IssuerServer, answer: bytes
) -> None:
    clock = Clock()
    issuer = Issuer(server.url, clock=clock)
    assert await claims_of(issuer, server.token())
    clock.now += module.KEYS_READ_EVERY_S
    server.keys_answer = answer
    for _ in range(3):
        assert await claims_of(issuer, server.token())
        clock.now += module.KEYS_ASKED_EVERY_S
    with pytest.raises(IssuerUnavailable, match="could not be read"):
        await claims_of(Issuer(server.url), server.token())
    server.keys_answer = None
    server.rotate("k2")
    assert await claims_of(issuer, server.token())


async def test_what_an_issuer_answers_is_bounded_and_checked(
    server: IssuerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = Issuer(f"{server.url}/other")
    with pytest.raises(IssuerUnavailable, match="answers 404"):
        await another.metadata()
    with pytest.raises(IssuerUnavailable, match="could not be connected to"):
        await Issuer("http://127.0.0.1:1").metadata()
    monkeypatch.setattr(module, "_MOST_ANSWER_BYTES", 10)
    with pytest.raises(IssuerUnavailable, match="too much"):
        await Issuer(server.url).metadata()
    monkeypatch.undo()
    real = server.url
    issuer = Issuer(real)
    server.url = "https://evil.example"
    with pytest.raises(IssuerUnavailable, match="another URL"):
        await issuer.metadata()


@pytest.mark.parametrize("name", ["authorization_endpoint", "token_endpoint", "jwks_uri"])
async def test_a_document_that_names_no_url_is_an_outage_and_not_a_fault_of_ours(
    server: IssuerServer, name: str
) -> None:
    server.metadata = {name: "http://["}
    with pytest.raises(IssuerUnavailable, match=f"names no usable {name}"):
        await Issuer(server.url).metadata()
    with pytest.raises(IssuerUnavailable, match="could not be read"):
        await claims_of(Issuer(server.url), server.token())


async def test_what_is_malformed_beside_what_is_sound_hides_nothing(server: IssuerServer) -> None:
    server.metadata = {"token_endpoint_auth_methods_supported": 5}
    issuer = Issuer(server.url)
    assert not (await issuer.metadata()).posts_secret
    odd = [{"kty": ["RSA"]}, {"kty": {}, "kid": "k1"}, {"kty": "RSA", "kid": []}, 5]
    server.keys_answer = json.dumps({"keys": [*odd, *server._listed()]}).encode()
    assert await claims_of(issuer, server.token())
