"""OpenID Connect issuer: its metadata, its public keys, and verification of the tokens that it
signs.

The keys are read for the first token, for the first token that comes 10 minutes or more after the
last read, and for a token that names an unknown key; at most once in 10 s in all cases. So a
withdrawn key stops being accepted even where tokens are rare. While the issuer is unavailable, the
last keys stay valid for a day, and no token waits for an issuer that is known to be unavailable.

Invariants: a token is accepted only with a signature by an algorithm in `ALGORITHMS` (all
asymmetric) and by a key of the issuer whose type matches the algorithm; issuer, audience and expiry
are always checked; requests go only to the issuer's own addresses; no redirect is followed.
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_plus, urlsplit

import orjson

from tidegate.errors import IssuerUnavailable, Unauthenticated
from tidegate.telemetry.logging import Log, get_logger
from tidegate.upstream.fetch import guarded_session, why_not_sent

# Signature algorithm -> the key type that it needs, and for EC the curve.
ALGORITHMS: Mapping[str, tuple[str, str | None]] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), ("RSA", None)),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
}
LEEWAY_S = 30
KEYS_READ_EVERY_S = 600.0
KEYS_USABLE_S = 86_400.0
KEYS_ASKED_EVERY_S = 10.0
METADATA_USABLE_S = 3_600.0
METADATA_TRIED_EVERY_S = 1.0
MOST_TOKEN_BYTES = 16_384
_MOST_ANSWER_BYTES = 262_144
_MOST_KEYS = 100
_TIMEOUT_S = 5.0
_NEEDED = ("exp", "iss", "aud", "sub")
_HEADERS = {"User-Agent": "tidegate", "Accept": "application/json", "Accept-Encoding": "identity"}

log = get_logger()


@dataclass(frozen=True, slots=True)
class IssuerMetadata:
    """The fields of an issuer's discovery document that are used here.

    posts_secret: the client secret is sent in the form, because the issuer does not accept it in a
    header.
    """

    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    posts_secret: bool


def looks_like_token(key: bytes) -> bool:
    """Return whether `key` has the shape of a signed JWT: three parts, the first a JSON object."""
    return key.startswith(b"eyJ") and key.count(b".") == 2


class Issuer:
    """An issuer, identified by its URL. One object per process serves all callers that trust it."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self._clock = clock
        self._metadata: IssuerMetadata | None = None
        self._metadata_at = self._metadata_tried_at = float("-inf")
        self._why_no_metadata = ""
        self._discovering = asyncio.Lock()
        self._keys: dict[str | None, dict[str, Any]] = {}
        self._keys_at = float("-inf")  # when they were last read
        self._begun_at = float("-inf")  # when the last request for them began, successful or not
        self._asking: asyncio.Task[None] | None = None
        self._is_unavailable = False

    def __repr__(self) -> str:
        return f"<Issuer {self.url} keys={len(self._keys)} away={self._is_unavailable}>"

    async def claims(self, token: bytes, audience: str) -> dict[str, Any]:
        """Verify a token and return its claims: the issuer's signature, `audience` and expiry.

        Raises Unauthenticated, whose message states the fault and repeats no part of the token, and
        IssuerUnavailable.
        """
        import jwt

        if len(token) > MOST_TOKEN_BYTES:
            raise Unauthenticated(f"the token is longer than {MOST_TOKEN_BYTES} bytes")
        try:
            head = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise Unauthenticated("the token is no JWT") from None
        algorithm, key_id = head.get("alg"), head.get("kid")
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS or "crit" in head:
            raise Unauthenticated(f"the token is not signed by one of {', '.join(ALGORITHMS)}")
        key = await self._key(key_id if isinstance(key_id, str) else None, algorithm)
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                jwt.PyJWK(key, algorithm),
                algorithms=[algorithm],
                audience=audience,
                leeway=LEEWAY_S,
                options={"require": list(_NEEDED), "enforce_minimum_key_length": True},
            )
        except jwt.InvalidTokenError as error:
            raise Unauthenticated(_why(error)) from None
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise Unauthenticated("the token cannot be verified") from None
        if not _is_same_url(claims["iss"], self.url):
            raise Unauthenticated("the token is of another issuer")
        return claims

    async def metadata(self) -> IssuerMetadata:
        """Return the metadata of the discovery document, reading it if needed. Raises
        IssuerUnavailable."""
        age_s = self._clock() - self._metadata_at
        if self._metadata is None or age_s >= METADATA_USABLE_S:
            await self._request_metadata()
        if self._metadata is None:
            raise self._unavailable(self._why_no_metadata)
        return self._metadata

    async def _request_metadata(self) -> None:
        """Read the discovery document; while that fails, at most once a second. Concurrent callers
        share one request."""
        async with self._discovering:
            now = self._clock()
            if min(now - self._metadata_at, now - self._metadata_tried_at) < METADATA_TRIED_EVERY_S:
                return
            self._metadata_tried_at = now
            try:
                self._metadata, self._metadata_at = await self._discovered(), now
            except IssuerUnavailable as error:
                self._why_no_metadata = error.message.removeprefix(self._named)

    async def redeem(
        self, form: Mapping[str, str], client_id: str, secret: str | None
    ) -> dict[str, Any]:
        """Exchange an authorization code at the token endpoint and return the endpoint's answer.

        Raises Unauthenticated if the code is not accepted, and IssuerUnavailable.
        """
        metadata = await self.metadata()
        fields, headers = {**form, "client_id": client_id}, dict[str, str]()
        if secret is not None and metadata.posts_secret:
            fields["client_secret"] = secret
        elif secret is not None:  # as RFC 6749, section 2.3.1 requires
            pair = f"{quote_plus(client_id)}:{quote_plus(secret)}"
            headers["Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        status, answer = await self._exchange(metadata.token_endpoint, fields, headers)
        if 400 <= status < 500:
            code = str(answer.get("error", status))
            raise Unauthenticated(f"the issuer refuses the sign-in: {code[:40]!a}")
        if status != 200:
            raise self._unavailable(f"answers {status}")
        return answer

    async def _key(self, key_id: str | None, algorithm: str) -> dict[str, Any]:
        """Return the public key that a token names. Raises Unauthenticated and
        IssuerUnavailable."""
        key, now = self._keys.get(key_id), self._clock()
        if key is None or now - self._keys_at >= KEYS_USABLE_S:
            await self._request_keys()
            key = self._keys.get(key_id)
            if self._clock() - self._keys_at >= KEYS_USABLE_S:
                raise IssuerUnavailable(f"the keys of {self.url} could not be read")
        elif now - self._keys_at >= KEYS_READ_EVERY_S and not self._is_unavailable:
            await self._request_keys()
            key = self._keys.get(key_id)
        elif now - self._keys_at >= KEYS_READ_EVERY_S and self._may_request():
            self._begin_asking()  # concurrently: the old keys stay valid meanwhile
        if key is None and key_id is None and len(self._keys) == 1:
            key = next(iter(self._keys.values()))
        if key is None and self._is_unavailable:
            raise IssuerUnavailable(f"the keys of {self.url} could not be read")
        if key is None:
            raise Unauthenticated("the token is signed by a key that its issuer does not list")
        kind, curve = ALGORITHMS[algorithm]
        if key["kty"] != kind or curve not in (None, key.get("crv")):
            raise Unauthenticated("the token's algorithm is not that of its key")
        if key.get("alg", algorithm) != algorithm:
            raise Unauthenticated("the token's algorithm is not that of its key")
        return key

    def _may_request(self) -> bool:
        return self._asking is None and self._clock() - self._begun_at >= KEYS_ASKED_EVERY_S

    def _begin_asking(self) -> None:
        self._begun_at = self._clock()
        self._asking = asyncio.create_task(self._read_keys())
        self._asking.add_done_callback(self._request_ended)

    def _request_ended(self, _task: asyncio.Task[None]) -> None:
        self._asking = None

    async def _request_keys(self) -> None:
        """Read the keys, unless a request began within `KEYS_ASKED_EVERY_S`. Concurrent callers
        share one request."""
        if self._may_request():
            self._begin_asking()
        if self._asking is not None:
            await asyncio.shield(self._asking)

    async def _read_keys(self) -> None:
        try:
            metadata = await self.metadata()
            status, answer = await self._exchange(metadata.jwks_uri)
            if status != 200:
                raise self._unavailable(f"answers {status} to a request for its keys")
            if not isinstance(listed := answer.get("keys"), list):
                raise self._unavailable("answers a request for its keys with none")
        except IssuerUnavailable as error:
            if not self._is_unavailable:
                log.warning(Log.ISSUER_AWAY, issuer=self.url, detail=error.message)
            self._is_unavailable = True
            return
        self._keys = _usable_keys(listed)
        self._keys_at = self._clock()
        if self._is_unavailable:
            log.info(Log.ISSUER_BACK, issuer=self.url)
        self._is_unavailable = False

    async def _discovered(self) -> IssuerMetadata:
        place = f"{self.url.rstrip('/')}/.well-known/openid-configuration"
        status, found = await self._exchange(place)
        if status != 200:
            raise self._unavailable(f"answers {status} to a request for its discovery document")
        if not _is_same_url(found.get("issuer"), self.url):
            raise self._unavailable("calls itself by another URL in its discovery document")
        methods = found.get("token_endpoint_auth_methods_supported")
        return IssuerMetadata(
            authorization_endpoint=self._endpoint(found, "authorization_endpoint"),
            token_endpoint=self._endpoint(found, "token_endpoint"),
            jwks_uri=self._endpoint(found, "jwks_uri"),
            # If the document names no methods, the default is the header (RFC 8414, section 2).
            posts_secret=isinstance(methods, list)
            and bool(methods)
            and "client_secret_basic" not in methods,
        )

    def _endpoint(self, found: Mapping[str, Any], name: str) -> str:
        url = str(found.get(name, ""))
        try:
            scheme = urlsplit(url).scheme
        except ValueError:
            scheme = ""
        if scheme not in {"https", urlsplit(self.url).scheme}:
            raise self._unavailable(f"names no usable {name}")
        return url

    async def _exchange(
        self,
        url: str,
        fields: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Send a request and return the status and the JSON object of its answer. Raises
        IssuerUnavailable."""
        import aiohttp

        method = "GET" if fields is None else "POST"
        try:
            async with (
                asyncio.timeout(_TIMEOUT_S),
                # The operator chose this address, as that of an upstream: it may be private.
                guarded_session(lambda _: True, None, _HEADERS) as session,
                session.request(
                    method, url, data=fields, headers=headers, allow_redirects=False
                ) as answer,
            ):
                raw = bytearray()
                async for piece in answer.content.iter_any():
                    raw += piece
                    if len(raw) > _MOST_ANSWER_BYTES:
                        raise self._unavailable("answers with too much")
                status = answer.status
        except TimeoutError:
            raise self._unavailable(f"does not answer within {_TIMEOUT_S:.0f} s") from None
        except (aiohttp.ClientError, ValueError) as failed:
            why = why_not_sent(failed) if isinstance(failed, aiohttp.ClientError) else "is no URL"
            raise self._unavailable(why) from None
        try:
            found = orjson.loads(raw)
        except orjson.JSONDecodeError:
            found = {}
        return status, found if isinstance(found, dict) else {}

    def _unavailable(self, why: str) -> IssuerUnavailable:
        return IssuerUnavailable(f"{self._named}{why}")

    @property
    def _named(self) -> str:
        return f"the issuer {self.url} "


def _usable_keys(listed: list[Any]) -> dict[str | None, dict[str, Any]]:
    """Return the public signature keys by their ids; symmetric and encryption keys are left out."""
    kinds = {kind for kind, _ in ALGORITHMS.values()}
    found: dict[str | None, dict[str, Any]] = {}
    for key in listed[:_MOST_KEYS]:
        if not isinstance(key, dict) or str(key.get("kty")) not in kinds:
            continue
        if key.get("use", "sig") == "sig":
            key_id = key.get("kid")
            found[key_id if isinstance(key_id, str) else None] = key
    return found


def _is_same_url(stated: object, url: str) -> bool:
    """Return whether an issuer's URL equals the configured one, apart from a slash at the end."""
    return isinstance(stated, str) and stated.rstrip("/") == url.rstrip("/")


def _why(error: Exception) -> str:
    import jwt

    if isinstance(error, jwt.ExpiredSignatureError):
        return "the token has expired"
    if isinstance(error, jwt.ImmatureSignatureError):
        return "the token is not valid yet"
    if isinstance(error, jwt.InvalidAudienceError):
        return "the token is for another audience"
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"the token lacks the claim {error.claim}"
    return "the token's signature is not its issuer's"
