"""Tenants, API keys, used sign-in codes, and policies on record.

A key is `tg_<prefix>_<secret>`. The prefix names it in lists and logs; the secret has 43 random
letters and digits (256 bits), so one SHA-256 is a sufficient hash.

Invariants: every change increments the one version number in the same transaction; only the digest
of a key is stored; of several processes that spend a sign-in code, one succeeds; revisions of a
pool's policy are written by one transaction at a time, each based on the record at that time.
"""

from __future__ import annotations

import hmac
import re
import secrets
import string
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from typing import Any, cast

import asyncpg
import orjson

from tidegate.call import DEFAULT_TENANT, Caller, Caps, OperatorRole, Scope, Tier
from tidegate.errors import ConfigError, NotFound, PolicyChanged, StoreUnavailable
from tidegate.prices.budgets import tenants_budget
from tidegate.store.budgets import drop_books, set_budget
from tidegate.store.database import Connections, sql
from tidegate.store.operator_actions import OperatorActions
from tidegate.store.records import (
    PauseRecord,
    PolicyRecord,
    What,
    changed_once,
    clean,
    done_once,
    dumps,
    record_action,
    record_of,
    recorded,
)
from tidegate.telemetry.logging import Log, get_logger

_PREFIX_LETTERS = string.ascii_lowercase + string.digits
_SECRET_LETTERS = string.ascii_letters + string.digits
_PREFIX_LENGTH = 10
_SECRET_LENGTH = 43  # 62 ** 43 > 2 ** 256
_KEY = re.compile(rb"tg_(?P<prefix>[a-z0-9]{10})_[A-Za-z0-9]{43}")
_NAMED = re.compile(r"(?:tg_)?(?P<prefix>[a-z0-9]{10})(?:_\w*)?")


@dataclass(frozen=True, slots=True)
class GeneratedKey:
    """A newly generated key. `text` is shown only once."""

    prefix: str
    text: str = field(repr=False)
    digest: bytes


def make_key() -> GeneratedKey:
    prefix = _random(_PREFIX_LETTERS, _PREFIX_LENGTH)
    text = f"tg_{prefix}_{_random(_SECRET_LETTERS, _SECRET_LENGTH)}"
    return GeneratedKey(prefix, text, digest_of(text.encode()))


def digest_of(key: bytes) -> bytes:
    return sha256(key).digest()


def prefix_of(key: bytes) -> str | None:
    """Return the prefix of bytes in the form of a key; None for anything else."""
    found = _KEY.fullmatch(key)
    return None if found is None else found["prefix"].decode()


def prefix_in(text: str) -> str | None:
    """Return the prefix in a person's input: bare, with `tg_` before it, or with the secret after
    it."""
    found = _NAMED.fullmatch(text.strip())
    return None if found is None else found["prefix"]


def is_same(digest: bytes, other: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(digest, other)


def _random(letters: str, length: int) -> str:
    return "".join(secrets.choice(letters) for _ in range(length))


MOST_TENANTS = 10_000
MOST_KEYS = 1_000
MOST_PATTERNS = 200
_LONGEST_PATTERN = 128
_TIMEOUT_MS = 2_000
_LOOK_TIMEOUT_MS = 500
USUAL_SCOPES = (Scope.INFER, Scope.READ)

log = get_logger()


def scopes_of(requested: Iterable[Scope], role: OperatorRole | None) -> list[Scope]:
    """Return the scopes of a new key: the given ones and its role, or the default ones."""
    scopes = [*requested, *([] if role is None else [Scope(role.value)])]
    return scopes or list(USUAL_SCOPES)


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant on record; its weight and limits are part of the policy.

    None means no bound. `keys`: the number of valid keys. Budgets of money are in USD, and rows of
    `budgets`, of which a tenant may have more. tiers: the default tiers of its jobs; None for the
    live tier only.
    """

    tenant_id: str
    most_priority: int
    models: tuple[str, ...] | None
    most_queued_jobs: int | None
    most_queued_bytes: int | None
    most_streams: int | None
    most_long_polls: int | None
    budget_day_money: float | None
    budget_month_money: float | None
    budget_day_tokens: int | None
    budget_month_tokens: int | None
    retention_days: int | None
    tiers: tuple[Tier, ...] | None
    created_at: datetime
    disabled_at: datetime | None
    keys: int


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as lists show it. `made_by`: None if no key was required when it was made, or
    makers were not recorded yet."""

    prefix: str
    tenant_id: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    made_by: str | None

    @property
    def state(self) -> str:
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= datetime.now(UTC):
            return "expired"
        return "works"


@dataclass(frozen=True, slots=True)
class FoundKey:
    """A key with the permissions of its tenant, for authentication. `expires_in_s` may be
    negative."""

    digest: bytes
    caller: Caller
    scopes: frozenset[Scope]
    revoked: bool
    disabled: bool
    expires_in_s: float | None


@dataclass(frozen=True, slots=True)
class FoundTenant:
    """A tenant, for authentication without one of its keys."""

    caller: Caller
    disabled: bool


SETTABLE = tuple(
    one.name
    for one in fields(Tenant)
    if one.name not in ("tenant_id", "created_at", "disabled_at", "keys")
)

_MOST_OF = {"retention_days": 100_000, "most_streams": 10**6, "most_long_polls": 10**6}
BUDGETS = ("budget_day_money", "budget_month_money", "budget_day_tokens", "budget_month_tokens")
_COLUMNS = tuple(name for name in SETTABLE if name not in BUDGETS)


class Tenants:
    """The tables of tenants and keys. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self.actions = OperatorActions(connections)
        self.policies = Policies(connections)

    async def version(self) -> int:
        """Return the version number, or raise within half a second."""
        return await self._connections.run(_version, timeout_ms=_LOOK_TIMEOUT_MS)

    async def find(self, prefixes: Sequence[str]) -> tuple[int, dict[str, FoundKey]]:
        """Return the keys with these prefixes, at the returned version or a later one."""

        async def read(connection: asyncpg.Connection) -> tuple[int, list[asyncpg.Record]]:
            version = await _version(connection)
            return version, await connection.fetch(sql("find_keys"), list(prefixes))

        version, rows = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        return version, {row["prefix"]: _found(row) for row in rows}

    async def find_tenants(self, tenants: Sequence[str]) -> tuple[int, dict[str, FoundTenant]]:
        """Return the tenants with these names, at the returned version or a later one."""

        async def read(connection: asyncpg.Connection) -> tuple[int, list[asyncpg.Record]]:
            version = await _version(connection)
            return version, await connection.fetch(sql("find_tenants"), list(tenants))

        version, rows = await self._connections.run(read, timeout_ms=_TIMEOUT_MS)
        found = {row["tenant_id"]: FoundTenant(_caller(row), row["disabled"]) for row in rows}
        return version, found

    async def any_key(self) -> bool:
        (row,) = await self._connections.rows("any_key", timeout_ms=_TIMEOUT_MS)
        return bool(row[0])

    async def used(self, at: Mapping[str, datetime]) -> None:
        """Record when keys were last used."""
        keys = dumps({"prefix": key, "used_at": when} for key, when in at.items())
        await self._connections.execute("keys_used", keys, timeout_ms=_TIMEOUT_MS)

    async def create_key(
        self,
        tenant_id: str,
        *,
        name: str = "",
        scopes: Iterable[Scope] = USUAL_SCOPES,
        expires_at: datetime | None = None,
        made_by: str | None = None,
    ) -> tuple[Key, GeneratedKey]:
        """Create a key; return its record, and the key itself, to be shown once. `made_by`: the
        person who was authorised to create it. Raises NotFound."""
        made, names = make_key(), sorted({scope.value for scope in scopes})
        columns = (made.prefix, tenant_id, made.digest, clean(name), names, expires_at, made_by)
        after = {"tenant": tenant_id, "name": name, "scopes": names, "expires_at": expires_at}
        try:
            row = await self._change("add_key", *columns, what="key.create", after=after)
        except asyncpg.ForeignKeyViolationError:
            raise NotFound(f"there is no tenant {tenant_id}") from None
        if row is None:  # practically never
            raise StoreUnavailable("another key has the same prefix; try again")
        log.warning(Log.KEY_MADE, key_id=made.prefix, tenant=tenant_id, scopes=names)
        return _key(row), made

    async def revoke_key(self, prefix: str, *, by: str) -> Key:
        """Revoke a key; may be repeated. Raises NotFound."""

        row = await self._change("revoke_key", prefix, what="key.revoke")
        if row is None:
            raise NotFound(f"there is no key with the prefix {prefix}")
        log.warning(Log.KEY_REVOKED, key_id=prefix, tenant=row["tenant_id"], by=by)
        return _key(row)

    async def keep_key(self, prefix: str, *, by: str) -> Key:
        """Record who vouches for a key whose maker is unknown. Raises NotFound."""
        row = await self._connections.run(
            recorded("keep_key", prefix, by, what="key.keep", target=prefix),
            timeout_ms=_TIMEOUT_MS,
        )
        if row is None:
            raise NotFound(f"there is no key with the prefix {prefix}")
        return _key(row)

    async def unvouched_keys(self) -> list[Key]:
        """Return up to 1,000 valid keys whose makers are unknown."""
        found = await self._connections.rows("unvouched_keys", MOST_KEYS, timeout_ms=_TIMEOUT_MS)
        return [_key(row) for row in found]

    async def list_keys(
        self,
        tenant_id: str | None = None,
        prefix: str = "",
        *,
        after: str | None = None,
        limit: int = MOST_KEYS,
    ) -> list[Key]:
        """Return a page of keys, oldest first, including invalid ones: those made after the key
        with the prefix `after`. Raises NotFound if there is no such key."""
        found = await self._connections.rows(
            "list_keys", tenant_id, prefix, after, limit, timeout_ms=_TIMEOUT_MS
        )
        if not found and after is not None:
            found_after = await self._connections.rows(
                "list_keys", None, after, None, 1, timeout_ms=_TIMEOUT_MS
            )
            if after not in {row["prefix"] for row in found_after}:
                raise NotFound(f"there is no key with the prefix {after}")
        return [_key(row) for row in found]

    async def all_keys(self, tenant_id: str | None = None, prefix: str = "") -> list[Key]:
        """Return all keys, read in pages, oldest first."""
        keys = page = await self.list_keys(tenant_id, prefix)
        while len(page) >= MOST_KEYS:
            page = await self.list_keys(tenant_id, prefix, after=page[-1].prefix)
            keys = keys + page
        return keys

    async def list_tenants(self) -> list[Tenant]:
        """Return all tenants (10,000 at most) by id; the tenant `default` always exists."""
        return await self._read(None)

    async def knows(self, tenant_id: str) -> bool:
        """Whether the tenant exists."""
        return bool(await self._read(tenant_id))

    async def get(self, tenant_id: str) -> Tenant:
        """Return a tenant. Raises NotFound."""
        found = await self._read(tenant_id)
        if not found:
            raise NotFound(f"there is no tenant {tenant_id}")
        return found[0]

    async def set(
        self,
        tenant_id: str,
        changes: Mapping[str, Any],
        *,
        by: str,
        disabled: bool | None = None,
        expected: Mapping[str, Any] | None = None,
    ) -> Tenant:
        """Create a tenant, or change the settings in `changes` (see SETTABLE).

        Raises ConfigError for an invalid value, and PolicyChanged if a setting is not as
        `expected`.
        """
        check_changes(changes)

        async def write(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("add_tenant"), tenant_id)
            now = await connection.fetchrow(sql("lock_tenant"), tenant_id)
            if expected:
                found = {name: now[name] for name in _COLUMNS}
                for name in BUDGETS:
                    found[name] = await _budget_now(connection, tenant_id, name)
                found["disabled"] = now["disabled_at"] is not None
                PolicyChanged.check(found, expected)
            whole = {name: now[name] for name in _COLUMNS}
            whole |= {name: value for name, value in changes.items() if name in _COLUMNS}
            whole["disabled"] = now["disabled_at"] is not None if disabled is None else disabled
            row = orjson.dumps(whole, default=str).decode()
            await connection.execute(sql("set_tenant"), tenant_id, row)
            was = {name: now[name] for name in changes if name in _COLUMNS}
            for name in BUDGETS:
                if name in changes:
                    was[name] = await _budget_now(connection, tenant_id, name)
                    await _set_budget(connection, tenant_id, name, changes[name])
            await connection.execute(sql("forget_queued"), tenant_id)
            await connection.execute(sql("count_change"))
            is_now = dict(changes)
            if disabled is not None:
                was["disabled"], is_now["disabled"] = now["disabled_at"] is not None, disabled
            await record_action(connection, "tenant.set", tenant_id, before=was, after=is_now)

        await self._connections.run(changed_once(write), timeout_ms=_TIMEOUT_MS)
        log.warning(Log.TENANT_CHANGED, tenant=tenant_id, by=by, changes=dict(changes))
        return await self.get(tenant_id)

    async def check(self, tenant_id: str, expected: Mapping[str, Any]) -> None:
        """Raises PolicyChanged if a tenant's setting is not as expected."""
        if not expected:
            return
        found = await self._read(tenant_id)
        if not found:
            raise PolicyChanged("tenant", None)
        now = {name: getattr(found[0], name) for name in SETTABLE}
        now |= {name: now[name] and list(now[name]) for name in ("models", "tiers")}
        PolicyChanged.check(now | {"disabled": found[0].disabled_at is not None}, expected)

    async def remove(self, tenant_id: str, *, by: str) -> None:
        """Remove a tenant and its keys; its requests stay on record. Raises NotFound."""
        if tenant_id == DEFAULT_TENANT:
            raise ConfigError("tenant", tenant_id, "cannot be removed; disable it instead")

        async def write(connection: asyncpg.Connection) -> asyncpg.Record | None:
            row = await connection.fetchrow(sql("remove_tenant"), tenant_id)
            if row is not None:
                await drop_books(
                    connection, await connection.fetch(sql("drop_tenant_budgets"), tenant_id)
                )
                await record_action(connection, "tenant.remove", tenant_id)
            await connection.execute(sql("count_change"))
            return row

        if await self._connections.run(done_once(write), timeout_ms=_TIMEOUT_MS) is None:
            raise NotFound(f"there is no tenant {tenant_id}")
        log.warning(Log.TENANT_CHANGED, tenant=tenant_id, by=by, changes="removed")

    async def spend_code(self, nonce: bytes, ends_at: int, spender: bytes) -> bool:
        """Spend a sign-in code of the dashboard; return whether it is valid, which it is for one
        `spender`. Expired codes are deleted. `ends_at`: in Unix time."""

        async def write(connection: asyncpg.Connection) -> bool:
            await connection.execute(sql("forget_codes"))
            end = datetime.fromtimestamp(ends_at, UTC)
            return bool(await connection.fetchval(sql("spend_code"), nonce, end, spender))

        return await self._connections.run(write, timeout_ms=_TIMEOUT_MS)

    async def is_spent(self, nonce: bytes) -> bool:
        """Whether `spend_code` was called for this code. Returns or raises within half a second."""
        (row,) = await self._connections.rows("is_spent", nonce, timeout_ms=_LOOK_TIMEOUT_MS)
        return bool(row[0])

    async def _change(
        self, name: str, *values: object, what: What, after: Mapping[str, Any] | None = None
    ) -> asyncpg.Record | None:
        """Run a statement on the key with the prefix in `values`, and increment the version; return
        the statement's row."""

        async def write(connection: asyncpg.Connection) -> asyncpg.Record | None:
            row = await connection.fetchrow(sql(name), *values)
            await connection.execute(sql("count_change"))
            if row is not None:
                target = f"{row['prefix']} of {row['tenant_id']}"
                await record_action(connection, what, target, after=after)
            return row

        return await self._connections.run(write, timeout_ms=_TIMEOUT_MS)

    async def _read(self, tenant_id: str | None) -> list[Tenant]:
        found = await self._connections.rows(
            "list_tenants", tenant_id, MOST_TENANTS, timeout_ms=_TIMEOUT_MS
        )
        return [_tenant(row) for row in found]


async def _budget_now(connection: asyncpg.Connection, tenant_id: str, setting: str) -> float | None:
    """Return the amount of the budget behind a tenant's setting; None if there is none."""
    row = await connection.fetchrow(sql("get_budget"), f"{tenant_id}/{setting}")
    if row is None:
        return None
    amount: int = row["amount"]
    return amount / 1_000_000 if setting.endswith("_money") else amount


async def _set_budget(
    connection: asyncpg.Connection, tenant_id: str, setting: str, value: float | None
) -> None:
    """Create, change or remove the budget behind a tenant's setting."""
    if value is None:
        await drop_books(
            connection, await connection.fetch(sql("drop_budget"), f"{tenant_id}/{setting}")
        )
        return
    amount = round(Decimal(str(value)) * 1_000_000) if setting.endswith("_money") else int(value)
    await set_budget(connection, tenants_budget(tenant_id, setting, amount), keep_end=True)


def check_changes(changes: Mapping[str, Any]) -> None:
    """Raises ConfigError for an unknown setting or an invalid value."""
    for name, value in changes.items():
        if name not in SETTABLE:
            raise ConfigError(name, None, f"is unknown; known: {', '.join(SETTABLE)}")
        if name == "models":
            _check_patterns(value)
        elif name == "tiers":
            _check_tiers(value)
        elif name == "most_priority":
            _check_number(name, value, -100, 100)
        elif value is not None:
            least = 1 if name == "retention_days" else 0
            _check_number(name, value, least, _MOST_OF.get(name, 10**12))


def _check_number(name: str, value: object, least: int, most: int) -> None:
    kinds = (int, float) if name.endswith("_money") else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        expected = "a number" if float in kinds else "a whole number"
        raise ConfigError(name, str(value), f"must be {expected} from {least} to {most}")
    if float in kinds and Decimal(str(value)) * 1_000_000 % 1:
        raise ConfigError(name, str(value), "must be whole micro-dollars, such as 0.000001")


def _check_patterns(value: object) -> None:
    if value is None:
        return
    sound = isinstance(value, list | tuple) and len(value) <= MOST_PATTERNS
    if not sound or not all(_is_pattern(one) for one in cast("list[object]", value)):
        allowed = f"must be up to {MOST_PATTERNS} names or patterns such as gemini-*"
        raise ConfigError("models", str(value)[:200], allowed)


def _check_tiers(value: object) -> None:
    if value is None:
        return
    sound = isinstance(value, list | tuple) and all(str(one) in set(Tier) for one in value)
    if not sound or not value:
        raise ConfigError("tiers", str(value)[:200], f"must be a list of {', '.join(Tier)}")


def _is_pattern(one: object) -> bool:
    return (
        isinstance(one, str)
        and 0 < len(one) <= _LONGEST_PATTERN
        and one.isascii()
        and one.isprintable()
        and " " not in one
    )


async def _version(connection: asyncpg.Connection) -> int:
    version: int = await connection.fetchval(sql("access_version"))
    return version


def _caller(row: asyncpg.Record, key_id: str | None = None) -> Caller:
    return Caller(
        tenant_id=row["tenant_id"],
        key_id=key_id,
        models=None if row["models"] is None else tuple(row["models"]),
        most_priority=row["most_priority"],
        caps=record_of(Caps, row),
        tiers=tuple(tier for tier in _tiers_of(row) or () if tier is not Tier.LIVE),
    )


def _found(row: asyncpg.Record) -> FoundKey:
    return FoundKey(
        digest=bytes(row["digest"]),
        caller=_caller(row, row["prefix"]),
        # A scope of a later version permits nothing here.
        scopes=frozenset(Scope(one) for one in row["scopes"] if one in set(Scope)),
        revoked=row["revoked"],
        disabled=row["disabled"],
        expires_in_s=row["expires_in_s"],
    )


def _tiers_of(row: Mapping[str, Any]) -> tuple[Tier, ...] | None:
    """Return a tenant's processing tiers, without those of a later version."""
    found = row["tiers"]
    return None if found is None else tuple(Tier(one) for one in found if one in set(Tier))


def _key(row: asyncpg.Record) -> Key:
    scopes = tuple(Scope(one) for one in row["scopes"] if one in set(Scope))
    return record_of(Key, row, scopes=scopes)


def _tenant(row: asyncpg.Record) -> Tenant:
    money = ("budget_day_money", "budget_month_money")
    return record_of(
        Tenant,
        row,
        tenant_id=row["id"],
        models=None if row["models"] is None else tuple(row["models"]),
        tiers=_tiers_of(row),
        **{name: None if row[name] is None else float(row[name]) for name in money},
    )


MOST_SHOWN = 1_000
_LIVE_KEPT = 1_000

Decide = Callable[[Sequence[PolicyRecord], bool], Sequence[PolicyRecord]]


class Policies:
    """The table of policies. Every method raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def newest(self, pool: str) -> PolicyRecord | None:
        """Return the revision in force, according to the record."""
        found = await self.history(pool, 1)
        return found[0] if found else None

    async def history(self, pool: str, most: int) -> list[PolicyRecord]:
        """Return the newest `most` revisions (1,000 at most), the one in force first."""
        rows = await self._connections.rows(
            "get_policies", pool, min(most, MOST_SHOWN), timeout_ms=_TIMEOUT_MS
        )
        return [_policy(row) for row in rows]

    async def in_force(self) -> dict[str, dict[str, Any]]:
        """Return the recorded policy in force of every pool that ever existed."""
        rows = await self._connections.rows("policies_in_force", timeout_ms=_TIMEOUT_MS)
        return {row["pool"]: orjson.loads(row["policy"]) for row in rows}

    async def removed_by_people(self, pool: str, limits: Collection[str]) -> set[str]:
        """Return those of these limits that a person removed last, within the history. A return to
        the deployment's policy removes none."""
        rows = await self._connections.rows(
            "removed_by_people", pool, list(limits), timeout_ms=_TIMEOUT_MS
        )
        return {row["name"] for row in rows}

    async def pauses(self, pool: str) -> list[PauseRecord]:
        """Return recorded pauses of limits by people that have not ended."""
        rows = await self._connections.rows("paused_by_people", pool, timeout_ms=_TIMEOUT_MS)
        return [record_of(PauseRecord, row) for row in rows]

    async def decide(
        self, pool: str, digest: str, decide: Decide, *, is_return: bool = False
    ) -> None:
        """Record what `decide` returns, while no other process can do so. is_return: an operator
        returns to the deployment's policy.

        `decide` gets the newest revision, followed by the first of its deployment, and whether a
        deployment ever had a policy of `digest`. It must be pure: it may be called again after a
        commit with a lost reply.
        """

        async def work(connection: asyncpg.Connection) -> None:
            await connection.execute(sql("lock_policies"), pool)
            rows = await connection.fetch(sql("get_policies"), pool, 1)
            if rows:
                rows += await connection.fetch(sql("first_of_deployment"), pool, rows[0]["digest"])
            seen = await connection.fetch(sql("deployed_before"), pool, [digest])
            for record in decide([_policy(row) for row in rows], bool(seen)):
                await connection.execute(
                    sql("add_policy"),
                    pool,
                    record.revision,
                    record.origin,
                    record.digest,
                    orjson.dumps(record.policy).decode(),
                    clean(record.set_by),
                    clean(record.reason),
                )
                oldest = record.revision - _LIVE_KEPT
                await connection.execute(sql("prune_policies"), pool, oldest)
                await record_action(
                    connection,
                    "limits.change",
                    pool,
                    after={"deployed": True} if is_return else None,
                    revision=record.revision,
                )

        await self._connections.run(work, timeout_ms=_TIMEOUT_MS)


def _policy(row: asyncpg.Record) -> PolicyRecord:
    return record_of(PolicyRecord, row, policy=orjson.loads(row["policy"]))
