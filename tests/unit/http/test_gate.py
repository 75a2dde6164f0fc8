"""The gate: what it remembers, for how long, and what it does while PostgreSQL is away."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pytest

from tests.waiting import wait_until
from tidegate.call import ANYBODY, Caller, Caps, OperatorRole, Scope
from tidegate.errors import Forbidden, InvalidRequest, StoreUnavailable, Unauthenticated
from tidegate.http import auth
from tidegate.http.auth import FRESH_S, REFUSED_FOR_S, Authenticator
from tidegate.store.tenants import FoundKey, GeneratedKey, Tenants, make_key

OUTAGE_S = 600.0


class Record(Tenants):
    """Tenants in memory, with a switch for the outage; counts what it is asked."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.keys: dict[str, FoundKey] = {}
        self.number = 1
        self.unavailable = False
        self.finds = 0
        self.held: asyncio.Event | None = None
        self.noted: dict[str, datetime] = {}

    def clock(self) -> float:
        return self.now

    def add(self, tenant: str = "acme", **overrides: Any) -> GeneratedKey:
        made = make_key()
        caller = Caller(tenant, made.prefix, caps=overrides.pop("caps", Caps()))
        usual: dict[str, Any] = {
            "digest": made.digest,
            "caller": caller,
            "scopes": frozenset((Scope.INFER, Scope.READ)),
            "revoked": False,
            "disabled": False,
            "expires_in_s": None,
        }
        self.keys[made.prefix] = FoundKey(**usual | overrides)
        self.number += 1
        return made

    def change(self, made: GeneratedKey, **values: Any) -> None:
        found = self.keys[made.prefix]
        now = {name: getattr(found, name) for name in FoundKey.__slots__} | values
        self.keys[made.prefix] = FoundKey(**now)
        self.number += 1

    async def version(self) -> int:
        if self.unavailable:
            raise StoreUnavailable("away")
        return self.number

    async def find(self, prefixes: Sequence[str]) -> tuple[int, dict[str, FoundKey]]:
        self.finds += 1
        if self.unavailable:
            raise StoreUnavailable("away")
        answer = self.number, {one: self.keys[one] for one in prefixes if one in self.keys}
        if self.held is not None:
            await self.held.wait()
        return answer

    async def any_key(self) -> bool:
        return bool(self.keys)

    async def used(self, at: Mapping[str, datetime]) -> None:
        self.noted |= at


def headers_of(key: GeneratedKey | str, **more: str) -> list[tuple[bytes, bytes]]:
    text = key if isinstance(key, str) else key.text
    tenant = [(b"x-tidegate-tenant", name.encode()) for name in more.values()]
    return [(b"authorization", f"Bearer {text}".encode()), *tenant]


@pytest.fixture
def record() -> Record:
    return Record()


@pytest.fixture
def gate(record: Record) -> Authenticator:
    return Authenticator(record, on=True, outage_ms=round(OUTAGE_S * 1000), clock=record.clock)


async def test_what_was_asked_once_is_known_without_asking(
    record: Record, gate: Authenticator
) -> None:
    made = record.add(caps=Caps(most_streams=3))
    headers = headers_of(made)
    assert gate.known(headers, b"") is None
    caller = await gate.identify(headers, b"")
    assert (caller.tenant_id, caller.key_id, caller.caps.most_streams) == ("acme", made.prefix, 3)
    assert gate.known(headers, b"") is caller
    assert gate.known([], b"key=" + made.text.encode()) is caller
    assert await gate.identify(headers, b"", "read") is caller
    assert record.finds == 1


async def test_what_is_remembered_counts_only_while_it_is_the_newest(
    record: Record, gate: Authenticator
) -> None:
    made = record.add()
    await gate.identify(headers_of(made), b"")
    record.now += FRESH_S - 0.01
    assert gate.known(headers_of(made), b"") is not None
    record.now += 0.02
    assert gate.known(headers_of(made), b"") is None, "nobody has looked since"
    record.change(made, revoked=True)
    with pytest.raises(Unauthenticated, match="was revoked"):
        await gate.identify(headers_of(made), b"")
    assert gate.known(headers_of(made), b"") is None


async def test_a_look_brings_changes_of_everything_that_is_known(
    record: Record, gate: Authenticator
) -> None:
    kept, revoked, changed = (record.add(name) for name in ("a", "b", "c"))
    for made in (kept, revoked, changed):
        await gate.identify(headers_of(made), b"")
    record.change(revoked, revoked=True)
    record.change(changed, caller=Caller("c", changed.prefix, models=("m",)))
    await gate.refresh()
    assert gate.known(headers_of(kept), b"") is not None
    assert gate.known(headers_of(revoked), b"") is None
    caller = gate.known(headers_of(changed), b"")
    assert caller is not None
    assert caller.models == ("m",)
    assert record.finds == 4, "all three at once"


async def test_an_answer_that_a_change_has_overtaken_is_asked_for_again(
    record: Record, gate: Authenticator
) -> None:
    made = record.add()
    await gate.refresh()
    record.held = asyncio.Event()
    asking = asyncio.create_task(gate.identify(headers_of(made), b""))
    await wait_until(lambda: record.finds)
    record.change(made, revoked=True)
    await gate.refresh()
    record.held.set()
    with pytest.raises(Unauthenticated, match="was revoked"):
        await asking


async def test_a_key_found_while_all_is_read_anew_is_not_left_old(
    record: Record, gate: Authenticator
) -> None:
    old, late = record.add("old"), record.add("late")
    await gate.identify(headers_of(old), b"")
    version, found = await record.find([late.prefix])
    record.change(late, revoked=True)
    record.held = asyncio.Event()
    looking = asyncio.create_task(gate.refresh())
    finds = record.finds
    await wait_until(lambda: record.finds > finds)
    gate._admitted(late.digest, found[late.prefix], record.now, version)
    record.held.set()
    await looking
    assert gate.known(headers_of(late), b"") is None


async def test_a_key_ends_when_its_time_is_over(record: Record, gate: Authenticator) -> None:
    made = record.add(expires_in_s=0.5)
    assert await gate.identify(headers_of(made), b"")
    record.now += 0.49
    assert gate.known(headers_of(made), b"") is not None
    record.now += 0.02
    record.change(made, expires_in_s=-0.01)
    assert gate.known(headers_of(made), b"") is None
    for _ in range(2):
        with pytest.raises(Unauthenticated, match="has expired"):
            await gate.identify(headers_of(made), b"")


async def test_a_wrong_key_is_asked_for_once_in_a_while(
    record: Record, gate: Authenticator
) -> None:
    right = record.add()
    wrong = f"tg_{right.prefix}_{'x' * 43}"
    unknown = make_key().text
    for key in (wrong, unknown):
        for _ in range(3):
            with pytest.raises(Unauthenticated, match="the API key is wrong"):
                await gate.identify(headers_of(key), b"")
    assert record.finds == 2
    record.now += REFUSED_FOR_S
    with pytest.raises(Unauthenticated):
        await gate.identify(headers_of(wrong), b"")
    assert record.finds == 3
    with pytest.raises(Unauthenticated, match="not an API key of this gateway"):
        await gate.identify(headers_of("sk-not-ours"), b"")
    assert record.finds == 3, "what can't be a key is not asked for"


async def test_keys_that_were_seen_outlast_an_outage_for_a_bounded_time(
    record: Record, gate: Authenticator
) -> None:
    made, unseen = record.add(), record.add()
    await gate.identify(headers_of(made), b"")
    record.unavailable = True
    record.now += 300
    assert gate.known(headers_of(made), b"") is None
    assert (await gate.identify(headers_of(made), b"")).tenant_id == "acme"
    assert gate.known(headers_of(made), b"") is not None
    with pytest.raises(StoreUnavailable):
        await gate.identify(headers_of(unseen), b"")
    record.now += OUTAGE_S - 300
    assert gate.known(headers_of(made), b"") is None
    with pytest.raises(StoreUnavailable):
        await gate.identify(headers_of(made), b"")
    record.unavailable = False
    record.change(made, revoked=True)
    with pytest.raises(Unauthenticated, match="was revoked"):
        await gate.identify(headers_of(made), b"")


async def test_scopes_tenants_and_their_mistakes(record: Record, gate: Authenticator) -> None:
    reader = record.add(scopes=frozenset((Scope.READ,)))
    disabled = record.add(disabled=True)
    made = record.add()
    with pytest.raises(Forbidden, match="lacks the scope infer"):
        await gate.identify(headers_of(reader), b"")
    assert await gate.identify(headers_of(reader), b"", Scope.READ)
    assert gate.known(headers_of(reader), b"") is None
    with pytest.raises(Forbidden, match="no role of viewer, operator, admin"):
        await gate.operator(headers_of(made), b"")
    for given, role in (
        ((Scope.VIEWER,), OperatorRole.VIEWER),
        ((Scope.ADMIN, Scope.VIEWER), OperatorRole.ADMIN),
        ((Scope.OPERATOR, Scope.INFER), OperatorRole.OPERATOR),
    ):
        operates = record.add(scopes=frozenset(given))
        assert (await gate.operator(headers_of(operates), b""))[1] is role
    for _ in range(2):
        with pytest.raises(Forbidden, match="acme is disabled"):
            await gate.identify(headers_of(disabled), b"")
        assert gate.known(headers_of(disabled), b"") is None
    assert await gate.identify(headers_of(made, tenant="acme"), b"")
    assert gate.known(headers_of(made, tenant="acme"), b"") is not None
    assert gate.known(headers_of(made, tenant="other"), b"") is None
    with pytest.raises(Forbidden, match="another tenant"):
        await gate.identify(headers_of(made, tenant="other"), b"")
    with pytest.raises(Unauthenticated, match="no API key"):
        await gate.identify([], b"")
    with pytest.raises(Unauthenticated, match="several"):
        await gate.identify(headers_of(made), b"key=" + reader.text.encode())


async def test_nobody_is_asked_where_keys_are_not_wanted(record: Record) -> None:
    gate = Authenticator(record, on=False, outage_ms=1)
    assert gate.known([], b"") is ANYBODY
    assert gate.known(headers_of("whatever"), b"") is ANYBODY
    named = [(b"x-tidegate-tenant", b"acme")]
    assert gate.known(named, b"") is None
    assert await gate.identify(named, b"") == Caller("acme")
    assert gate.known(named, b"") == Caller("acme")
    for bad in (b"", b"a b", b"a|b", b"\xff", b"a\x7f", b"x" * 201):
        with pytest.raises(InvalidRequest) as wrong:
            await gate.identify([(b"x-tidegate-tenant", bad)], b"")
        assert wrong.value.field == "x-tidegate-tenant"
    with pytest.raises(Unauthenticated):  # but for /admin
        await gate.operator(headers_of("whatever"), b"")
    await gate.run()
    assert record.finds == 0


async def test_what_is_remembered_is_bounded(
    record: Record, gate: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOST_KNOWN", "MOST_REFUSED", "MOST_NAMED"):
        monkeypatch.setattr(auth, name, 5)
    for _ in range(12):
        await gate.identify(headers_of(record.add()), b"")
        with pytest.raises(Unauthenticated):
            await gate.identify(headers_of(make_key()), b"")
    assert len(gate._known) == 5
    assert len(gate._refused) <= 5
    off = Authenticator(record, on=False, outage_ms=1)
    for number in range(12):
        await off.identify([(b"x-tidegate-tenant", str(number).encode())], b"")
    assert len(off._named) <= 5


async def test_uses_are_noted_together_and_by_the_clock_of_the_wall(
    record: Record, gate: Authenticator
) -> None:
    made = record.add()
    for _ in range(3):
        await gate.identify(headers_of(made), b"")
        gate.known(headers_of(made), b"")
    assert record.noted == {}
    record.now += 30
    await gate.note_uses()
    age_s = (datetime.now(record.noted[made.prefix].tzinfo) - record.noted[made.prefix]).seconds
    assert 29 <= age_s <= 31
    record.noted.clear()
    await gate.note_uses()
    assert record.noted == {}
    assert made.text not in repr(gate)
