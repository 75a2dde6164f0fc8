"""Browsers: requests from web pages of other origins, and the sign-in.

A browser sends requests for any page that its user opens, from this machine and to loopback
addresses too. Two things identify such a page: the browser names the page's origin (Origin,
Sec-Fetch-Site), and Host contains a name that was made to resolve to this address (DNS rebinding).
Programs send neither Origin nor Sec-Fetch-Site. Whether there is a proxy cannot be determined: no
header proves it.

`tidegate up` prints an address with a one-time code, so that the operator's key is never shown to a
browser. The code is exchanged for a cookie:

    code      nonce . end . HMAC(key, "code", nonce, end)     ten minutes, used once
    cookie    nonce . end . HMAC(key, "session", nonce, end)  twelve hours

A person who signs in by an OpenID Connect issuer also gets a cookie, valid for an hour. It contains
the role that the issuer's claims gave, so that a revoked role ends within that time.

    state     like a code; the nonce and the PKCE verifier of the sign-in are derived from it
    cookie    JSON . HMAC(key, "person", rules, JSON)

All are derived from the key, so that every process of a deployment can check them and none stores a
session. Used codes and signed-out sessions are recorded in PostgreSQL, which all processes share. A
new key ends every code and session, and changed OIDC settings end every person's session.
Invariants: no code or cookie reveals anything about the key; a sign-in ends in the browser that
began it, and redirects only to our own addresses; the issuer is asked at a bounded rate.
"""

from __future__ import annotations

import hmac
import math
import secrets
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from hashlib import sha256
from ipaddress import ip_address
from typing import Any, Literal, NamedTuple
from urllib.parse import urlencode, urlsplit

import orjson

from tidegate.call import OperatorRole, role_by
from tidegate.errors import Forbidden, IssuerUnavailable, StoreUnavailable, Unauthenticated
from tidegate.settings import Config
from tidegate.store.tenants import Tenants
from tidegate.telemetry.logging import Log, get_logger
from tidegate.upstream.issuer import Issuer

log = get_logger()

Headers = Collection[tuple[bytes, bytes]]

_OWN_SITES = (b"same-origin", b"none")
_MOST_REMEMBERED = 200
_MOST_ANSWERED = 10_000


class Origins:
    """Names of this gateway, by HOST and ALLOWED_HOSTS; and other pages that may call it, by
    CORS_ORIGINS."""

    def __init__(self, config: Config) -> None:
        self._loopback = config.is_loopback
        self._names = frozenset((*config.allowed_hosts, config.host))
        self._allowed = frozenset(config.allowed_hosts)
        self._pages = frozenset(one.encode() for one in config.cors_origins)
        self._known: set[bytes] = set()

    def refusal(self, headers: Headers, method: str) -> Forbidden | None:
        """Return why a request without a key is rejected; None if it is accepted."""
        found = dict(headers)
        host = found.get(b"host")
        if len(found) != len(headers) and len({v for n, v in headers if n == b"host"}) > 1:
            host = b""  # two different values are not a name
        if host is not None and host not in self._known and not self._is_own_host(host):
            return Forbidden(
                f"Host is {_printable(host)}, which is not a name of this gateway",
                field="Host",
                allowed=f"{self._in_words()}, or a name in ALLOWED_HOSTS",
            )
        if b"origin" not in found and b"sec-fetch-site" not in found:
            return None
        if found.get(b"origin") in self._pages:
            return None
        return self.page_refusal(headers, method)

    def socket_refusal(self, headers: Headers) -> Forbidden | None:
        """Return why a WebSocket is rejected; None if it is accepted. Browsers do not enforce CORS
        for WebSockets: the page must be ours or one of CORS_ORIGINS, even with a key."""
        if any(name == b"origin" and value in self._pages for name, value in headers):
            return None
        return self.page_refusal(headers, "GET")

    def page_refusal(self, headers: Headers, method: str) -> Forbidden | None:
        """Return why a request is from a page of another site; None if it is not."""
        found = {name: value for name, value in headers if name in _NAMES}
        site = found.get(b"sec-fetch-site", b"none")
        if site not in _OWN_SITES and not _is_opening(found, method):
            return Forbidden(
                f"a page of another site sent this request (Sec-Fetch-Site: {_printable(site)})",
                field="Sec-Fetch-Site",
                allowed="requests of programs and of this gateway's own pages",
            )
        origin = found.get(b"origin")
        if origin is not None and not self._is_own_page(origin, found.get(b"host", b"")):
            return Forbidden(
                f"a page of {_printable(origin)} sent this request",
                field="Origin",
                allowed="requests of programs and of this gateway's own pages; behind a proxy "
                "that changes Host, name its host in ALLOWED_HOSTS",
            )
        return None

    def _is_own_host(self, host: bytes) -> bool:
        name = _name_in(host)
        if name in self._names or _is_loopback(name):
            is_own = True
        elif self._loopback:
            is_own = False
        else:
            # The name of a foreign page has a dot; an address cannot be rebound.
            is_own = _is_address(name) or (bool(name) and "." not in name)
        if is_own and len(self._known) < _MOST_REMEMBERED:
            self._known.add(host)
        return is_own

    def _is_own_page(self, origin: bytes, host: bytes) -> bool:
        try:
            parts = urlsplit(origin.decode("ascii"))
            netloc, port = parts.netloc.lower(), parts.port
        except ValueError:
            return False
        if netloc and netloc.encode() == host.lower():
            return True
        return parts.hostname in self._allowed and port is None

    def _in_words(self) -> str:
        if self._loopback:
            return "localhost or a loopback address"
        return "an address, a name without a dot"


_NAMES = frozenset((b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest"))


def _is_opening(found: dict[bytes, bytes], method: str) -> bool:
    """Return whether a person follows a link: the page with the link cannot read the answer."""
    return (
        method in ("GET", "HEAD")
        and found.get(b"sec-fetch-mode") == b"navigate"
        and found.get(b"sec-fetch-dest") == b"document"
    )


def _name_in(host: bytes) -> str:
    """Return the host without port and brackets; empty if it cannot be parsed."""
    try:
        parts = urlsplit(f"//{host.decode('ascii')}")
        _ = parts.port  # raises for a port that is not a number
    except ValueError:
        return ""
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return ""
    return (parts.hostname or "").removesuffix(".")


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _printable(value: bytes) -> str:
    return ascii(value[:100].decode("ascii", "replace"))[1:-1]


CODE_S = 600
SESSION_S = 12 * 3600
_NONCE_BYTES = 16
_END_BYTES = 6
_MAC_BYTES = 32
_LENGTH = _NONCE_BYTES + _END_BYTES + _MAC_BYTES

PERSON_S = 3600
READ_AGAIN_S = 2.0
_MOST_COOKIE_CHARS = 3_500
_MOST_NAME_CHARS = 100

Use = Literal["code", "session", "state"]


class Pass(NamedTuple):
    """A valid code or session."""

    nonce: bytes
    ends_at: int  # Unix time


def make_code(key: str, now: float | None = None) -> str:
    """Return a code for the address that the start-up page prints."""
    return _made("code", key, CODE_S, now)


def make_session(key: str, now: float | None = None) -> str:
    """Return the value of a session cookie."""
    return _made("session", key, SESSION_S, now)


def checked(use: Use, key: str, text: str, now: float | None = None) -> Pass | None:
    """Return the valid code or session in `text`; None if it is invalid or expired."""
    try:
        raw = urlsafe_b64decode(text.encode("ascii"))
    except ValueError:
        return None
    if len(raw) != _LENGTH or not _is_whole(text, raw):
        return None
    payload, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(use, key, payload)):
        return None
    ends_at = int.from_bytes(payload[_NONCE_BYTES:])
    if ends_at <= (time.time() if now is None else now):
        return None
    return Pass(payload[:_NONCE_BYTES], ends_at)


def _is_whole(text: str, raw: bytes) -> bool:
    """Return whether `text` is the canonical encoding of `raw`: decoding ignores characters that
    are not base64, and a session is ended by its text."""
    return urlsafe_b64encode(raw).decode() == text


class Sessions:
    """Sessions that were signed out before their expiry, in all processes. One object per
    process."""

    def __init__(self, tenants: Tenants, clock: Callable[[], float] = time.monotonic) -> None:
        self._tenants = tenants
        self._clock = clock
        self._read: dict[bytes, tuple[float, bool]] = {}  # time of the read; had ended

    async def have_ended(self, cookie: str) -> bool:
        """Return whether a session has ended, at most `READ_AGAIN_S` old; while PostgreSQL is
        unavailable, the last known state."""
        session, now = _id_of(cookie), self._clock()
        read_at, ended = self._read.get(session, (-math.inf, False))
        if ended or now - read_at < READ_AGAIN_S:
            return ended
        with suppress(StoreUnavailable):  # then cached keys stay valid too
            ended = await self._tenants.is_spent(session)
        ended = ended or self._read.get(session, (now, False))[1]  # ended here meanwhile
        self._remember(session, now, ended)
        return ended

    async def end(self, cookie: str) -> None:
        """End a valid session, here immediately and in other processes within `READ_AGAIN_S`.
        Raises StoreUnavailable: then it has ended in this process only."""
        session = _id_of(cookie)
        self._remember(session, self._clock(), True)
        await self._tenants.spend_code(session, int(time.time()) + SESSION_S, session)

    def _remember(self, session: bytes, now: float, ended: bool) -> None:
        if len(self._read) >= _MOST_REMEMBERED and session not in self._read:
            del self._read[next(iter(self._read))]
        self._read[session] = (now, ended)


def _id_of(cookie: str) -> bytes:
    return sha256(b"tidegate session 1:" + cookie.encode()).digest()[:_NONCE_BYTES]


def make_state(key: str, now: float | None = None) -> str:
    """Return the state of a new sign-in, which is sent to the issuer and kept in a cookie."""
    return _made("state", key, CODE_S, now)


class Person(NamedTuple):
    """A person who signed in by an issuer. `name` is for display, `subject` is the issuer's id."""

    name: str
    subject: str
    role: OperatorRole


class SignInRefused(Exception):
    """A rejected sign-in by the issuer; `why` selects the page's message."""

    def __init__(self, why: Literal["busy", "issuer", "refused", "role", "state"]) -> None:
        super().__init__(why)
        self.why = why


class RefusedSignIns:
    """The rate of sign-ins that the issuer refuses, by the address of the connection.

    Anyone can begin a sign-in and complete it with a made-up code, which costs the issuer a request
    in this gateway's name: an issuer that is asked too often blocks the gateway's sign-ins. Each
    address has a bucket of `_MOST_REFUSED` tries, one more each second; successes are returned. A
    network of IPv6 counts as one address, and so does a proxy. Bounded; one object per process.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # tries, and when they were counted

    def take(self, address: str) -> bool:
        """Take a try of `address`; return whether it had one."""
        left = self._tries(address)
        if left < 1:
            return False
        self._set(address, left - 1)
        return True

    def put_back(self, address: str) -> None:
        """Return a try that the issuer did not refuse."""
        self._set(address, self._tries(address) + 1)

    def _tries(self, address: str) -> float:
        now = self._clock()
        left, at = self._left.get(_network(address), (_MOST_REFUSED, now))
        return min(_MOST_REFUSED, left + now - at)

    def _set(self, address: str, left: float) -> None:
        self._left.pop(network := _network(address), None)
        if left < _MOST_REFUSED:
            if len(self._left) >= _MOST_ANSWERED:
                del self._left[next(iter(self._left))]
            self._left[network] = left, self._clock()


_MOST_REFUSED = 30.0


def _network(address: str) -> str:
    """Return the network of one holder: an IPv6 address without its last 64 bits."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    is_one = parsed.version == 4 or parsed.ipv4_mapped is not None
    return address if is_one else parsed.exploded[:19]


class SignIn:
    """Sign-in by an OpenID Connect issuer: authorization code with PKCE (RFC 7636)."""

    def __init__(self, config: Config, key: str) -> None:
        self._issuer = Issuer(config.oidc_issuer)
        self._client_id = config.oidc_client_id
        self._secret = config.oidc_client_secret
        self._rules = config.oidc_roles
        self._key = key
        self._answered: dict[str, None] = {}  # states that have had their answer, oldest first
        self._refused = RefusedSignIns()
        trusted = orjson.dumps([config.oidc_issuer, self._client_id, dict(self._rules)])
        self._trust = sha256(trusted).digest()

    async def begin(self, state: str, redirect_uri: str) -> str:
        """Return the issuer's address to which the browser is redirected. Raises SignInRefused."""
        try:
            metadata = await self._issuer.metadata()
        except IssuerUnavailable as unavailable:
            log.warning(Log.ISSUER_AWAY, detail=unavailable.message)
            raise SignInRefused("issuer") from None
        challenge = sha256(self._derived("verifier", state).encode()).digest()
        query = {
            "response_type": "code",
            "client_id": self._client_id,
            "redirect_uri": redirect_uri,
            "scope": "openid profile email",
            "state": state,
            "nonce": self._derived("nonce", state),
            "code_challenge": urlsafe_b64encode(challenge).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        }
        mark = "&" if "?" in metadata.authorization_endpoint else "?"
        return f"{metadata.authorization_endpoint}{mark}{urlencode(query)}"

    async def finish(
        self, state: str, code: str, issuer: str | None, redirect_uri: str, *, address: str
    ) -> Person:
        """Return the person who has signed in. The state must have been checked. A process sends
        one code of a sign-in to the issuer, so that nobody tries codes through it, and few of an
        address. Raises SignInRefused."""
        if issuer is not None and issuer.rstrip("/") != self._issuer.url.rstrip("/"):
            raise SignInRefused("state")  # an answer of another issuer (RFC 9207)
        if state in self._answered:
            raise SignInRefused("state")
        if not self._refused.take(address):
            raise SignInRefused("busy")
        if len(self._answered) >= _MOST_ANSWERED:
            del self._answered[next(iter(self._answered))]
        self._answered[state] = None
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": self._derived("verifier", state),
        }
        secret = None if self._secret is None else self._secret.get_secret_value()
        try:
            answer = await self._issuer.redeem(form, self._client_id, secret)
            token = str(answer.get("id_token", "")).encode()
            claims = await self._issuer.claims(token, self._client_id)
        except IssuerUnavailable as unavailable:
            log.warning(Log.ISSUER_AWAY, detail=unavailable.message)
            raise SignInRefused("issuer") from None
        except Unauthenticated as invalid:
            log.warning(Log.SIGN_IN_REFUSED, detail=invalid.message)
            raise SignInRefused("refused") from None
        person = self._person(state, claims)
        self._refused.put_back(address)
        return person

    def _person(self, state: str, claims: Mapping[str, Any]) -> Person:
        is_for_us = claims.get("azp", self._client_id) == self._client_id
        nonce = str(claims.get("nonce", ""))
        if not is_for_us or not hmac.compare_digest(nonce.encode(), self._nonce(state)):
            log.warning(Log.SIGN_IN_REFUSED, detail="the ID token is of another sign-in")
            raise SignInRefused("refused")
        role = role_by(self._rules, claims)
        subject = _plain(claims["sub"])
        name = _named(claims, subject)
        if role is None or not subject:
            log.warning(Log.SIGN_IN_REFUSED, by=name, detail="no rule of OIDC_ROLES fits")
            raise SignInRefused("role")
        log.warning(Log.SIGNED_IN, by=name, role=role.value)
        return Person(name, subject, role)

    def cookie(self, person: Person, now: float | None = None) -> str:
        """Return the value of a person's cookie."""
        ends_at = int((time.time() if now is None else now) + PERSON_S)
        payload = orjson.dumps([ends_at, secrets.token_hex(8), *person])
        return f"{urlsafe_b64encode(payload).decode()}.{self._mac(payload).hex()}"

    def person(self, cookie: str, now: float | None = None) -> Person | None:
        """Return the person of a cookie; None if the cookie is invalid or expired."""
        coded, _, mac = cookie.partition(".")
        if len(cookie) > _MOST_COOKIE_CHARS:
            return None
        try:
            payload = urlsafe_b64decode(coded.encode("ascii"))
        except ValueError:
            return None
        if not hmac.compare_digest(
            mac.encode("ascii", "replace"), self._mac(payload).hex().encode()
        ):
            return None
        if not _is_whole(coded, payload):
            return None
        ends_at, _, name, subject, role = orjson.loads(payload)
        if ends_at <= (time.time() if now is None else now):
            return None
        return Person(name, subject, OperatorRole(role))

    def _derived(self, use: str, state: str) -> str:
        label = f"tidegate sign-in {use} 1:{state}".encode()
        return (
            urlsafe_b64encode(hmac.digest(self._key.encode(), label, sha256)).decode().rstrip("=")
        )

    def _nonce(self, state: str) -> bytes:
        return self._derived("nonce", state).encode()

    def _mac(self, payload: bytes) -> bytes:
        message = b"tidegate sign-in person 1:" + self._trust + payload
        return hmac.digest(self._key.encode(), message, sha256)


def _named(claims: Mapping[str, Any], subject: str) -> str:
    """Return a person's name for the record: the e-mail address that the issuer has verified,
    otherwise the subject. A name that the person may have chosen only stands beside the subject:
    alone it could be the name of another person, or the record's name of the operator's key."""
    if claims.get("email_verified") in (True, "true") and (email := _plain(claims.get("email"))):
        return email
    chosen = (_plain(claims.get(one)) for one in ("email", "preferred_username", "name"))
    name = next((one for one in chosen if one), subject)
    return subject if name == subject else f"{name[:_MOST_NAME_CHARS]} ({subject})"


def _plain(value: object) -> str:
    """Return a claim as text that may be displayed and logged; empty if it is not such text."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 255 else ""


def state_cookie_name(key: str) -> str:
    return f"{cookie_name(key)}_state"


def cookie_name(key: str) -> str:
    """Return the cookie's name, which differs by key: a browser shares the cookies of all ports of
    a host."""
    return f"tidegate_{_mac('session', key, b'name').hex()[:12]}"


def _made(use: Use, key: str, lasts_s: int, now: float | None) -> str:
    ends_at = int((time.time() if now is None else now) + lasts_s)
    payload = secrets.token_bytes(_NONCE_BYTES) + ends_at.to_bytes(_END_BYTES)
    return urlsafe_b64encode(payload + _mac(use, key, payload)).decode()


def _mac(use: Use, key: str, payload: bytes) -> bytes:
    return hmac.digest(key.encode(), f"tidegate sign-in {use} 1:".encode() + payload, sha256)
