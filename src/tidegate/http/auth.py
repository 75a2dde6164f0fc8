"""Authentication: from the API key or token of a request to its tenant and permissions.

The hot path calls `known`, which does no I/O. For unknown keys `identify` reads PostgreSQL and
caches the result. The version number of all tenants and keys is read every 0.4 s; a new number
invalidates the cache.

A token (a JWT of the issuer that a deployment trusts) is verified at most once in ten minutes, and
its tenant is read like that of a key; `known` finds both by digest.

Invariants: a cached result is valid only if it was current within the last 0.9 s, or, while
PostgreSQL does not answer, within AUTH_OUTAGE_MS; so a revoked key is rejected by every process
within a second. Keys are cached by digest and never logged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import unquote_to_bytes

from tidegate.call import ANYBODY, Caller, OperatorRole, Scope
from tidegate.errors import (
    ConfigError,
    Forbidden,
    InvalidRequest,
    NotFound,
    StoreUnavailable,
    Unauthenticated,
)
from tidegate.limiter import check_tenant
from tidegate.store.database import GroupWriter
from tidegate.store.tenants import (
    USUAL_SCOPES,
    FoundKey,
    FoundTenant,
    Tenants,
    digest_of,
    is_same,
    prefix_of,
)
from tidegate.telemetry.logging import Log, get_logger
from tidegate.upstream.issuer import LEEWAY_S, Issuer, looks_like_token

TENANT_HEADER = "x-tidegate-tenant"
_TENANT = TENANT_HEADER.encode()
_BEARER = b"authorization"
_CREDENTIALS = frozenset((_BEARER, b"x-api-key", b"x-goog-api-key", b"api-key"))
_NAMES = _CREDENTIALS | {_TENANT}
_KEY_PREFIX = b"tg_"
BY_OPERATOR = "operator:"  # begins what is in place of the key in calls of operators
_LONGEST_NAME_CHARS = 255
_IN_QUERY = b"key="


class Credentials(NamedTuple):
    """Credentials in a request. `several`: it has different keys of this gateway. `tenant` is empty
    if two different names were given."""

    key: bytes | None
    tenant: bytes | None
    several: bool


def credentials_in(headers: Iterable[tuple[bytes, bytes]], query: bytes) -> Credentials:
    """Return the credentials in headers and query; a key of this gateway takes precedence over
    others."""
    key: bytes | None = None
    tenant: bytes | None = None
    several = False
    for name, value in headers:
        if name not in _NAMES:
            continue
        if name == _TENANT:
            tenant = value if tenant in (None, value) else b""
            continue
        found = _in_authorization(value) if name == _BEARER else value.strip()
        key, several = _better(key, found, several)
    if query.find(_IN_QUERY) >= 0:
        for pair in query.split(b"&"):
            if pair.startswith(_IN_QUERY):
                found = unquote_to_bytes(pair[len(_IN_QUERY) :])
                key, several = _better(key, found, several)
    return Credentials(key, tenant, several)


def in_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Return all credentials in the headers, of this gateway or not. Those in a query are left out,
    since a query ends up in logs."""
    return [
        found
        for name, value in headers
        if name in _CREDENTIALS
        and (found := _in_authorization(value) if name == _BEARER else value.strip())
    ]


def _in_authorization(value: bytes) -> bytes:
    scheme, _, given = value.strip().partition(b" ")
    return given.strip() if scheme.lower() == b"bearer" else b""


def _better(key: bytes | None, found: bytes, several: bool) -> tuple[bytes | None, bool]:
    """Return the credential to use of two: a key of this gateway over a token, a token over any
    other. Of two of the same sort the last is used, but the first of two keys of this gateway."""
    if not found or found == key:
        return key, several
    if key is None or not key.startswith(_KEY_PREFIX):
        is_token = key is not None and looks_like_token(key)
        keeps_first = is_token and not (found.startswith(_KEY_PREFIX) or looks_like_token(found))
        return (key if keeps_first else found), several
    return key, several or found.startswith(_KEY_PREFIX)


POLL_EVERY_S = 0.4
FRESH_S = 0.9
REFUSED_FOR_S = 5.0
MOST_KNOWN = 10_000
MOST_REFUSED = 10_000
MOST_NAMED = 1_000
MOST_VERIFIED = 10_000
VERIFIED_FOR_S = 600.0
_READ_AT_ONCE = 500
_USE_NOTED_EVERY_S = 60.0
_FIND_TRIES = 3
_HOW = (
    "send one as Authorization: Bearer tg_..., x-api-key: tg_..., x-goog-api-key: tg_..., "
    "api-key: tg_... or ?key=tg_...; create one with `tidegate keys create`"
)

log = get_logger()

Headers = Iterable[tuple[bytes, bytes]]
CachedT = TypeVar("CachedT")


@dataclass(frozen=True, slots=True)
class _KnownKey:
    """A valid key, until `ends_at` on the process's clock; read at `version` or later."""

    caller: Caller
    scopes: frozenset[Scope]
    tenant: bytes
    ends_at: float
    version: int
    disabled: bool
    is_token: bool = False

    @property
    def name(self) -> str:
        """Return how a refusal names it."""
        key_id = self.caller.key_id
        return f"the token {key_id}" if self.is_token else f"the key tg_{key_id}"


class TokenTrust(NamedTuple):
    """The issuer and audience whose tokens are accepted as keys. `tenant_claim` names the
    tenant."""

    issuer: Issuer
    audience: str
    tenant_claim: str


class _Verified(NamedTuple):
    """A token with a valid signature and claims, until `ends_at` on the process's clock."""

    tenant: str
    subject: str
    ends_at: float


class Authenticator:
    """Authenticates requests; one object per API process. `on`: callers must send a key."""

    def __init__(
        self,
        tenants: Tenants,
        *,
        on: bool,
        outage_ms: int,
        tokens: TokenTrust | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on = on
        self._tokens = tokens
        self._verified: dict[bytes, _Verified] = {}
        self._tenants = tenants
        self._outage_s = outage_ms / 1000
        self._clock = clock
        self._known: dict[bytes, _KnownKey] = {}
        self._refused: dict[bytes, tuple[float, str]] = {}
        self._named: dict[bytes, Caller] = {}
        self._used: dict[str, float] = {}
        self._version = 0
        self._newest_at = float("-inf")  # when the cache was last known to be current
        self._is_unavailable = False
        self._polling: asyncio.Task[None] | None = None
        self._finds: GroupWriter[str, tuple[int, FoundKey | None]] = GroupWriter(self._find)
        self._tenant_finds: GroupWriter[str, tuple[int, FoundTenant | None]] = GroupWriter(
            self._find_tenants
        )

    def __repr__(self) -> str:
        return f"<Authenticator on={self.on} known={len(self._known)} away={self._is_unavailable}>"

    # Called for each request

    def known(self, headers: Headers, query: bytes) -> Caller | None:
        """Return the caller of a call to a model, if it is cached.

        None means unknown: `identify` then returns the caller or raises the error. `headers` have
        lower-case names, as in ASGI.
        """
        credentials = credentials_in(headers, query)
        if not self.on:
            return ANYBODY if credentials.tenant is None else self._named.get(credentials.tenant)
        if credentials.key is None or credentials.several:
            return None
        now = self._clock()
        one = self._known.get(digest_of(credentials.key))
        if one is None or now >= one.ends_at or one.disabled or not self._may_trust(now):
            return None
        if Scope.INFER not in one.scopes or credentials.tenant not in (None, one.tenant):
            return None
        self._note_use(one, now)
        return one.caller

    async def identify(
        self, headers: Headers, query: bytes, scope: Scope | str = Scope.INFER
    ) -> Caller:
        """Return the caller, if permitted `scope`.

        Raises Unauthenticated, Forbidden, InvalidRequest for an impossible tenant name, and
        StoreUnavailable.
        """
        scope = Scope(scope)
        credentials = credentials_in(headers, query)
        if not self.on:
            return self._keyless_caller(credentials)
        one = await self._authenticated(credentials)
        if scope not in one.scopes:
            raise Forbidden(
                f"{one.name} lacks the scope {scope}",
                allowed=", ".join(sorted(one.scopes)),
            )
        self._check_tenant(one, credentials)
        self._note_use(one, self._clock())
        return one.caller

    async def operator(self, headers: Headers, query: bytes) -> tuple[Caller, OperatorRole]:
        """Return the caller and the role of an operator's key, also where callers need no key.

        Raises Unauthenticated, Forbidden and StoreUnavailable.
        """
        credentials = credentials_in(headers, query)
        one = await self._authenticated(credentials)
        role = OperatorRole.of(one.scopes)
        if role is None:
            raise Forbidden(
                f"{one.name} has no role of {', '.join(OperatorRole)}",
                allowed=", ".join(sorted(one.scopes)),
            )
        if self.on:
            self._check_tenant(one, credentials)
        self._note_use(one, self._clock())
        return one.caller, role

    async def _authenticated(self, credentials: Credentials) -> _KnownKey:
        if credentials.several:
            raise Unauthenticated("the request has several API keys: send one")
        if credentials.key is None:
            raise Unauthenticated(f"the request has no API key: {_HOW}")
        one = await self._of_key(credentials.key)
        if one.disabled:
            raise Forbidden(f"the tenant {one.caller.tenant_id} is disabled")
        return one

    def _check_tenant(self, one: _KnownKey, credentials: Credentials) -> None:
        if credentials.tenant not in (None, one.tenant):
            raise Forbidden(
                "the key is of another tenant", field=TENANT_HEADER, allowed=one.caller.tenant_id
            )

    def keyless_caller(self, headers: Headers) -> Caller:
        """Return the caller where no API key is required. Raises InvalidRequest for an impossible
        tenant name."""
        return self._keyless_caller(credentials_in(headers, b""))

    async def vouched(self, prefix: str, has_signed: Callable[[bytes], bool]) -> Caller:
        """Return the caller of a request that is signed by a key instead of showing it.
        `has_signed` checks the signature by the key's digest. Raises Unauthenticated, Forbidden,
        StoreUnavailable."""
        _, found = await self._finds.write(prefix)
        if found is None or not has_signed(found.digest):
            raise Unauthenticated(f"unknown API key: {_HOW}")
        if (reason := _why_invalid(found, found.digest)) is not None:
            raise Unauthenticated(reason)
        if found.disabled or Scope.INFER not in found.scopes:
            raise Forbidden(f"the key tg_{prefix} is no longer allowed to do this")
        return found.caller

    async def for_operator(self, tenant: str, operator: str) -> Caller:
        """Return the caller of a call that an operator makes as a tenant: the operator is in place
        of a key. Where callers need no key, the tenant may be unknown. Raises NotFound, Forbidden,
        StoreUnavailable."""
        _, found = await self._tenant_finds.write(tenant)
        if found is None and self.on:
            raise NotFound(f"no tenant is called {tenant!r}")
        if found is not None and found.disabled:
            raise Forbidden(f"the tenant {tenant} is disabled")
        caller = Caller(tenant) if found is None else found.caller
        name = operator.removeprefix("the key ")
        return replace(caller, key_id=f"{BY_OPERATOR}{name}"[:_LONGEST_NAME_CHARS])

    def _keyless_caller(self, credentials: Credentials) -> Caller:
        """Return the caller where no key is required: the header alone names the tenant."""
        if credentials.tenant is None:
            return ANYBODY
        caller = self._named.get(credentials.tenant)
        if caller is None:
            caller = Caller(tenant_id=tenant_named(credentials.tenant))
            if len(self._named) >= MOST_NAMED:
                self._named.clear()
            self._named[credentials.tenant] = caller
        return caller

    async def _of_key(self, key: bytes) -> _KnownKey:
        digest = digest_of(key)
        if not self._may_trust(self._clock()):
            await self._poll()
        now = self._clock()
        one = self._known.get(digest)
        if one is not None and self._may_trust(now):
            if now < one.ends_at:
                return one
            if not one.is_token:  # a token is verified again, which reports its fault
                self._refuse(digest, f"{one.name} has expired")
        refused = self._refused.get(digest)
        if refused is not None and now < refused[0]:
            raise Unauthenticated(refused[1])
        prefix = prefix_of(key)
        if prefix is None and self._tokens is not None and looks_like_token(key):
            return await self._of_token(digest, key, self._tokens)
        if prefix is None:
            raise Unauthenticated(f"not an API key of this gateway: {_HOW}")
        for _ in range(_FIND_TRIES):
            began_at = self._clock()
            version, found = await self._finds.write(prefix)
            if version >= self._version:  # otherwise the cache was renewed during the read
                return self._admitted(digest, found, began_at, version)
        raise StoreUnavailable("API keys are being changed; try again")

    async def _of_token(self, digest: bytes, token: bytes, trust: TokenTrust) -> _KnownKey:
        verified = self._verified.get(digest)
        if verified is None or self._clock() >= verified.ends_at:
            try:
                claims = await trust.issuer.claims(token, trust.audience)
            except Unauthenticated as invalid:
                self._refuse(digest, invalid.message)
            verified = self._checked(digest, claims, trust)
            _remember(self._verified, MOST_VERIFIED, digest, verified)
        for _ in range(_FIND_TRIES):
            version, found = await self._tenant_finds.write(verified.tenant)
            if version < self._version:
                continue  # the cache was renewed during the read
            if found is None:
                self._refuse(
                    digest, f"the token's claim {trust.tenant_claim} is not the name of a tenant"
                )
            one = _KnownKey(
                caller=replace(found.caller, key_id=f"jwt:{verified.subject}"),
                scopes=frozenset(USUAL_SCOPES),
                tenant=verified.tenant.encode(),
                ends_at=verified.ends_at,
                version=version,
                disabled=found.disabled,
                is_token=True,
            )
            _remember(self._known, MOST_KNOWN, digest, one)
            return one
        raise StoreUnavailable("tenants are being changed; try again")

    def _checked(self, digest: bytes, claims: Mapping[str, Any], trust: TokenTrust) -> _Verified:
        """Check the claims of a token. Raises Unauthenticated if it names no subject or no
        tenant."""
        subject, tenant = claims["sub"], claims.get(trust.tenant_claim)
        if not isinstance(subject, str) or not 0 < len(subject) <= 255 or not subject.isprintable():
            self._refuse(digest, "the token's claim sub must be 1 to 255 printable characters")
        if not isinstance(tenant, str):
            self._refuse(digest, f"the token lacks the claim {trust.tenant_claim}")
        try:
            tenant = tenant_named(tenant.encode("utf-8", "replace"))
        except InvalidRequest:
            self._refuse(
                digest, f"the token's claim {trust.tenant_claim} is not the name of a tenant"
            )
        lasts_s = min(VERIFIED_FOR_S, int(claims["exp"]) + LEEWAY_S - time.time())
        return _Verified(tenant, subject, self._clock() + lasts_s)

    # The cache

    def _admitted(
        self, digest: bytes, found: FoundKey | None, began_at: float, version: int
    ) -> _KnownKey:
        reason = _why_invalid(found, digest)
        if found is None or reason is not None:
            self._refuse(digest, reason or "")
        one = _known_of(found, began_at, version)
        _remember(self._known, MOST_KNOWN, digest, one)
        return one

    def _refuse(self, digest: bytes, why: str) -> NoReturn:
        self._known.pop(digest, None)
        if len(self._refused) >= MOST_REFUSED:
            self._refused.clear()
        self._refused[digest] = (self._clock() + REFUSED_FOR_S, why)
        raise Unauthenticated(why)

    def _may_trust(self, now: float) -> bool:
        age_s = now - self._newest_at
        return age_s < FRESH_S or (self._is_unavailable and age_s < self._outage_s)

    def _note_use(self, one: _KnownKey, now: float) -> None:
        if one.caller.key_id is not None and not one.is_token:
            self._used[one.caller.key_id] = now

    async def _find(self, prefixes: Sequence[str]) -> list[tuple[int, FoundKey | None]]:
        version, found = await self._tenants.find(sorted(set(prefixes)))
        return [(version, found.get(prefix)) for prefix in prefixes]

    async def _find_tenants(self, names: Sequence[str]) -> list[tuple[int, FoundTenant | None]]:
        version, found = await self._tenants.find_tenants(sorted(set(names)))
        return [(version, found.get(name)) for name in names]

    # Updates of the cache

    async def run(self) -> None:
        """Look for changes until cancelled; returns immediately if no key is required."""
        is_checked = False
        noted_at = self._clock()
        while self.on:
            try:
                await self._poll()
                if not is_checked and not self._is_unavailable:
                    await self._warn_if_no_key()
                    is_checked = True
                if self._clock() - noted_at >= _USE_NOTED_EVERY_S:
                    noted_at = self._clock()
                    await self.note_uses()
            except StoreUnavailable as unavailable:
                log.debug(Log.STORE_AWAY, detail=unavailable.message)
            except Exception:  # the top of a task: logged, and the task continues
                log.exception(Log.INTERNAL_ERROR)
            await asyncio.sleep(POLL_EVERY_S)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Keep the cache current; at the end, record which keys were used."""
        watching = asyncio.create_task(self.run())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(StoreUnavailable):
                await self.note_uses()

    async def note_uses(self) -> None:
        """Record when keys were last used. Raises StoreUnavailable."""
        used, self._used = self._used, {}
        if not used:
            return
        now, wall = self._clock(), time.time()
        at = {key: datetime.fromtimestamp(wall - (now - then), UTC) for key, then in used.items()}
        await self._tenants.used(at)

    async def refresh(self) -> None:
        """Make a change that was just committed effective in this process before returning."""
        if self._polling is not None:  # that read may have begun before the change
            await self._poll()
        await self._poll()

    async def _poll(self) -> None:
        """Update the cache; concurrent callers share one read."""
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll_now())
            self._polling.add_done_callback(self._polled)
        await asyncio.shield(self._polling)

    def _polled(self, _task: asyncio.Task[None]) -> None:
        self._polling = None

    async def _poll_now(self) -> None:
        began_at = self._clock()
        try:
            version = await self._tenants.version()
            if version != self._version:
                await self._read_again(version)
        except StoreUnavailable as unavailable:
            log.debug(Log.STORE_AWAY, detail=unavailable.message)
            self._is_unavailable = True
            return
        self._is_unavailable = False
        self._newest_at = began_at

    async def _read_again(self, version: int) -> None:
        """Replace all cached keys by their state at `version` or later."""
        # Tokens are left out: their tenants are read again with the next request of each.
        old = [
            (digest, one)
            for digest, one in self._known.items()
            if one.version < version and not one.is_token
        ]
        for start in range(0, len(old), _READ_AT_ONCE):
            batch = old[start : start + _READ_AT_ONCE]
            began_at = self._clock()
            read_at, found = await self._tenants.find([one.caller.key_id or "" for _, one in batch])
            for digest, one in batch:
                now = found.get(one.caller.key_id or "")
                if now is None or _why_invalid(now, digest) is not None:
                    self._known.pop(digest, None)
                elif digest in self._known:
                    self._known[digest] = _known_of(now, began_at, read_at)
        # Also drop entries that were read at an older version meanwhile.
        self._known = {digest: one for digest, one in self._known.items() if one.version >= version}
        self._refused.clear()
        self._version = version

    async def _warn_if_no_key(self) -> None:
        if self._tokens is None and not await self._tenants.any_key():
            hint = "every request is rejected until an API key exists: tidegate keys create"
            log.warning(Log.NO_API_KEY, hint=hint)


def _remember(known: dict[bytes, CachedT], most: int, digest: bytes, value: CachedT) -> None:
    """Add an entry; if the cache is full, the oldest is dropped."""
    if len(known) >= most and digest not in known:
        known.pop(next(iter(known)))
    known[digest] = value


def tenant_named(raw: bytes, header: str = TENANT_HEADER) -> str:
    """Return the tenant that the header names. Raises InvalidRequest."""
    try:
        name = raw.decode()
        check_tenant(name)
    except (UnicodeDecodeError, ConfigError):
        name = ""
    if not name.isprintable() or not name:
        raise InvalidRequest(
            header,
            f"{header} is not a tenant's name",
            allowed="1 to 200 characters without spaces, | { or }",
        )
    return name


def _why_invalid(found: FoundKey | None, digest: bytes) -> str | None:
    """Return why a key is not valid, or None. Details appear only if the whole key was correct."""
    if found is None or not is_same(found.digest, digest):
        return "the API key is wrong"
    if found.revoked:
        return f"the key tg_{found.caller.key_id} was revoked"
    if found.expires_in_s is not None and found.expires_in_s <= 0:
        return f"the key tg_{found.caller.key_id} has expired"
    return None


def _known_of(found: FoundKey, began_at: float, version: int) -> _KnownKey:
    lasts_s = float("inf") if found.expires_in_s is None else found.expires_in_s
    return _KnownKey(
        caller=found.caller,
        scopes=found.scopes,
        tenant=found.caller.tenant_id.encode(),
        ends_at=began_at + lasts_s,
        version=version,
        disabled=found.disabled,
    )
