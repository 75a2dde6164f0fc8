"""An OpenID Connect issuer for tests, over HTTP: discovery, keys, authorization code with PKCE.

It is strict where an issuer is to be (one use of a code, the verifier, the redirect URI, the
client's secret), and counts what it is asked. `user` signs in without a question.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

CLIENT, SECRET = "tidegate", "the-secret-of-the-client"
AUDIENCE = "tidegate-calls"


def new_key(algorithm: str = "RS256") -> Any:
    if algorithm.startswith("ES"):
        return ec.generate_private_key(ec.SECP256R1())
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(public_exponent=65_537, key_size=2_048)


@dataclass
class IssuerServer:
    """`keys`: by id, with the algorithm that each signs by; the last one signs."""

    url: str = ""
    keys: dict[str, tuple[str, Any]] = field(default_factory=lambda: {"k1": ("RS256", new_key())})
    user: dict[str, Any] = field(default_factory=dict)
    secret: str | None = SECRET
    redirect_uri: str | None = None  # None: any
    is_down: bool = False
    keys_answer: bytes | None = None  # what it answers with 200 in place of its keys
    reuses_codes: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)  # what its document says instead
    nonce: str | None = None  # put into ID tokens instead of the one that was sent
    issued: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    change: Callable[[dict[str, Any]], None] = lambda claims: None

    def token(self, key_id: str | None = None, **claims: Any) -> str:
        """A token as a service gets it; None takes a claim away."""
        now = int(time.time())
        usual = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "svc-a",
            "iat": now,
            "exp": now + 300,
        }
        told = {name: value for name, value in (usual | claims).items() if value is not None}
        key_id = key_id or list(self.keys)[-1]
        algorithm, key = self.keys[key_id]
        return jwt.encode(told, key, algorithm, headers={"kid": key_id})

    def rotate(self, key_id: str, algorithm: str = "RS256") -> None:
        """Sign by a new key; the old ones are no longer listed."""
        self.keys = {key_id: (algorithm, new_key(algorithm))}

    def _metadata(self) -> dict[str, Any]:
        return {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/keys",
            **self.metadata,
        }

    def _listed(self) -> list[dict[str, Any]]:
        found = []
        for key_id, (algorithm, key) in self.keys.items():
            of_kind = jwt.get_algorithm_by_name(algorithm)
            jwk: dict[str, Any] = of_kind.to_jwk(key.public_key(), as_dict=True)
            found.append(jwk | {"kid": key_id, "use": "sig"})
        symmetric = {"kty": "oct", "kid": "shared", "k": "c2VjcmV0" * 8, "alg": "HS256"}
        return [*found, symmetric]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked[request.path] += 1
        if self.is_down:
            raise web.HTTPServiceUnavailable
        if request.path == "/.well-known/openid-configuration":
            return web.json_response(self._metadata())
        if request.path == "/keys" and self.keys_answer is not None:
            return web.Response(body=self.keys_answer)
        if request.path == "/keys":
            return web.json_response({"keys": self._listed()})
        if request.path == "/authorize":
            return self._authorized(dict(request.query))
        if request.path == "/token":
            form = {name: str(value) for name, value in (await request.post()).items()}
            return self._redeemed(form, request.headers.get("Authorization", ""))
        raise web.HTTPNotFound

    def _authorized(self, query: dict[str, str]) -> web.Response:
        right = {"response_type": "code", "client_id": CLIENT, "code_challenge_method": "S256"}
        wrong = {name for name, value in right.items() if query.get(name) != value}
        wrong |= {n for n in ("state", "nonce", "code_challenge") if len(query.get(n, "")) < 16}
        if wrong or "openid" not in query.get("scope", "").split():
            raise web.HTTPBadRequest(text=f"wrong: {wrong}")
        if self.redirect_uri not in (None, query["redirect_uri"]):
            raise web.HTTPBadRequest(text="redirect_uri is not registered")
        code = secrets.token_urlsafe(16)
        self.issued[code] = query
        told = urlencode({"code": code, "state": query["state"], "iss": self.url})
        raise web.HTTPFound(f"{query['redirect_uri']}?{told}")

    def _redeemed(self, form: dict[str, str], authorization: str) -> web.Response:
        code = form.get("code", "")
        asked = self.issued.get(code) if self.reuses_codes else self.issued.pop(code, None)
        basic = base64.b64encode(f"{CLIENT}:{self.secret}".encode()).decode()
        if self.secret is not None and authorization != f"Basic {basic}":
            return web.json_response({"error": "invalid_client"}, status=401)
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if (
            asked is None
            or form.get("grant_type") != "authorization_code"
            or form.get("redirect_uri") != asked["redirect_uri"]
            or challenge != asked["code_challenge"]
        ):
            return web.json_response({"error": "invalid_grant"}, status=400)
        nonce = asked["nonce"] if self.nonce is None else self.nonce
        claims = {"aud": CLIENT, "nonce": nonce, **self.user}
        self.change(claims)
        answer = {
            "access_token": "opaque",
            "token_type": "Bearer",
            "id_token": self.token(**claims),
        }
        return web.json_response(answer)


@asynccontextmanager
async def issuer_server(**values: Any) -> AsyncIterator[IssuerServer]:
    server = IssuerServer(**values)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    server.url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        await runner.cleanup()
