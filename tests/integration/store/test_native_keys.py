"""Keys of native calls: who owns them, and what becomes of them when their owner or PostgreSQL is
gone for a while."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from base64 import b64encode
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from tests.integration.store.conftest import MakeStore
from tests.integration.store.test_outages import outage
from tests.waiting import wait_until, work_for
from tidegate.call import new_id
from tidegate.embedded.servers import PostgresServer
from tidegate.errors import StoreUnavailable
from tidegate.store.idempotency import KeyState, NativeKeys, Owner, Taken
from tidegate.store.records import Idempotency
from tidegate.store.retention import Whose
from tidegate.store.store import Store

LEASE_MS = 600
LONGER_MS = 1_500  # where the owner is another process, which may be kept from running
WANTED = Idempotency("k", "ab" * 32)
KILLED = """
import asyncio, sys
from pathlib import Path
from tests.integration.store.test_native_keys import WANTED, owner_of
from tidegate.store.blobs import Blobs
from tidegate.store.store import Store

async def main(url, folder):
    store = Store(url, instance_id="killed", blobs=Blobs.from_url("", folder),
        spill_dir=folder / "spill", spill_max_bytes=1000, audit_full="block",
        claim_lease_ms=1_500)
    await store.start()
    owner = owner_of()
    await store.native_keys.take(owner, WANTED)
    print(owner.request_id, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
"""


def owner_of(key: str = WANTED.key, subject: str | None = None) -> Owner:
    return Owner("default", key, new_id(), subject, datetime.now(UTC))


async def known(store: Store) -> KeyState | None:
    try:
        return await store.native_keys.known("default", WANTED.key)
    except StoreUnavailable:
        return None


async def is_lapsed(store: Store) -> bool:
    given = await known(store)
    return given is not None and given.lapsed


async def is_answered(store: Store) -> bool:
    given = await known(store)
    return given is not None and given.answer == b"said"


async def test_a_caller_that_is_cancelled_while_it_takes_a_key_leaves_it_free(
    make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    store, gone, next_one = await make_store(database_url), owner_of(), owner_of()

    async def waits() -> bool:
        return bool(await peek.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    async def is_free() -> bool:
        return await known(store) is None

    async with peek.transaction():
        await peek.execute("LOCK TABLE native_keys IN SHARE MODE")
        taking = asyncio.create_task(store.native_keys.take(gone, WANTED))
        await wait_until(waits, 20, "the statement that takes the key")
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
    await wait_until(lambda: not store.connections._tasks, 20, "the end of the statement")
    await wait_until(is_free, 5, "a free key")
    assert await store.native_keys.take(next_one, WANTED) == Taken()


async def lapsed_and_taken(store: Store, owner: Owner) -> Taken:
    async def take() -> Taken | None:
        with suppress(StoreUnavailable):  # one that has just stalled judges nobody
            taken = await store.native_keys.take(owner, WANTED)
            return taken if isinstance(taken, Taken) else None
        return None

    found: Taken = await wait_until(take, 20, "the key is taken")
    return found


async def test_kill_9_frees_a_key_within_its_lease_and_names_the_call(
    make_store: MakeStore, database_url: str, tmp_path: Path
) -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED, database_url, str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    first = UUID((await child.stdout.readline()).decode().strip())
    store = await make_store(database_url, claim_lease_ms=LONGER_MS)
    given = await store.native_keys.take(owner_of(), WANTED)
    assert isinstance(given, KeyState)
    assert (given.request_id, given.answer) == (first, None)
    # As long as it lives the key is its own, whoever looks.
    for _ in range(6):
        await work_for(LONGER_MS / 4_000)
        assert not await is_lapsed(store)
    child.send_signal(signal.SIGKILL)
    await child.wait()
    await wait_until(lambda: is_lapsed(store), 20, "the key is free")
    assert await lapsed_and_taken(store, owner_of()) == Taken(lost=first)


async def test_another_request_does_not_take_a_lapsed_key(
    store: Store, make_store: MakeStore, database_url: str
) -> None:
    gone = await make_store(database_url, claim_lease_ms=LEASE_MS)
    await gone.native_keys.take(owner_of(), WANTED)
    await gone.native_keys.aclose()
    other = Idempotency(WANTED.key, "cd" * 32)
    assert isinstance(await store.native_keys.take(owner_of(), other), KeyState)
    await wait_until(lambda: is_lapsed(store), 20, "the key has lapsed")
    given = await store.native_keys.take(owner_of(), other)
    assert isinstance(given, KeyState)
    assert given.digest == WANTED.digest


async def test_a_process_that_stalls_while_it_takes_a_key_takes_none_of_another(
    make_store: MakeStore, database_url: str
) -> None:
    """In a stall of the machine every owner looks dead."""
    mine, other = [await make_store(database_url, claim_lease_ms=LEASE_MS) for _ in range(2)]
    await mine.native_keys.take(owner_of(), WANTED)
    assert isinstance(await other.native_keys.take(owner_of(), WANTED), KeyState)
    steadiness, goes_on = other.native_keys._steadiness, asyncio.Event()
    await wait_until(lambda: steadiness.may_judge)

    async def held(_connection: asyncpg.Connection) -> None:
        await goes_on.wait()

    holding = [asyncio.create_task(other.connections.run(held)) for _ in range(10)]
    await asyncio.sleep(0)
    taking = asyncio.create_task(other.native_keys.take(owner_of(), WANTED))
    await mine.native_keys.aclose()
    ends = time.monotonic() + 1.5 * LEASE_MS / 1_000
    await wait_until(lambda: time.monotonic() > ends and not steadiness.may_judge)
    goes_on.set()
    with suppress(StoreUnavailable):  # what it found out came too late
        assert isinstance(await taking, KeyState)
    await asyncio.gather(*holding, return_exceptions=True)


async def test_an_answer_that_comes_late_does_not_replace_the_next_ones(
    store: Store, make_store: MakeStore, database_url: str
) -> None:
    slow = await make_store(database_url, claim_lease_ms=LEASE_MS)
    first, second = owner_of(), owner_of()
    await slow.native_keys.take(first, WANTED)
    await slow.native_keys.aclose()  # as a process that stands still
    await store.native_keys.take(second, WANTED)
    await wait_until(lambda: is_lapsed(store), 20, "the key has lapsed")
    assert await lapsed_and_taken(store, second) == Taken(lost=first.request_id)
    slow.native_keys.end(first, 200, "text/plain", b"late")
    slow.native_keys.free(first)
    await slow.aclose()
    store.native_keys.end(second, 200, "text/plain", b"said")
    await wait_until(lambda: is_answered(store), 20, "the answer is kept")
    slow.native_keys.free(second)
    assert await is_answered(store)


async def test_a_large_answer_is_neither_base64_nor_json_on_its_way(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []

    def seen(data: bytes) -> bytes:
        made.append(data)
        return b64encode(data)

    monkeypatch.setattr("tidegate.store.idempotency.b64encode", seen)
    for key, answer in (("small", b"said"), ("large", bytes(range(256)) * 1_000)):
        owner = owner_of(key)
        await store.native_keys.take(owner, Idempotency(key, WANTED.digest))
        store.native_keys.end(owner, 200, "audio/wav", answer)

        async def is_kept(key: str = key, answer: bytes = answer) -> bool:
            given = await store.native_keys.known("default", key)
            return given is not None and given.answer == answer

        await wait_until(is_kept, 20, "the answer")
    assert made == [b"said"]


async def test_an_answer_of_what_was_erased_meanwhile_is_not_kept(store: Store) -> None:
    owner = owner_of(subject="patient-1")
    await store.native_keys.take(owner, WANTED)
    await store.retention.erase(Whose(subject="patient-1"), dry_run=False, within_s=20)
    store.native_keys.end(owner, 200, "text/plain", b"said")
    await wait_until(lambda: is_lapsed(store), 20, "the key is free")
    assert isinstance(await store.native_keys.take(owner_of(), WANTED), Taken)


async def test_all_that_wait_for_a_key_share_a_look(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, find = [], NativeKeys.known

    async def counted(self: NativeKeys, tenant_id: str, key: str) -> KeyState | None:
        looks.append(key)
        return await find(self, tenant_id, key)

    monkeypatch.setattr(NativeKeys, "known", counted)
    await store.native_keys.take(owner_of(), WANTED)
    waiting = [store.native_keys.poll("default", WANTED.key) for _ in range(500)]
    found = await asyncio.gather(*waiting)
    assert {given is not None and given.answer is None for given in found} == {True}
    assert looks == [WANTED.key]


@pytest.mark.parametrize("how", ["pause", "kill"])
async def test_a_stall_as_a_call_ends_loses_no_answer_and_frees_no_key(
    how: str, own_server: PostgresServer, own_url: str, make_store: MakeStore
) -> None:
    mine, other = [await make_store(own_url, claim_lease_ms=LEASE_MS) for _ in range(2)]
    owner, failed = owner_of(), owner_of("failed")
    of_failed = Idempotency(failed.key, WANTED.digest)
    await mine.native_keys.take(owner, WANTED)
    await mine.native_keys.take(failed, of_failed)
    assert isinstance(await other.native_keys.take(owner_of(), WANTED), KeyState)
    async with outage(own_server, how):
        await wait_until(lambda: mine.connections.unavailable and other.connections.unavailable)
        mine.native_keys.free(failed)
        await work_for(2 * LEASE_MS / 1_000)  # by the clock alone the owner would look dead
    for _ in range(8):
        assert not await is_lapsed(other)
        await work_for(LEASE_MS / 4_000)
    async with outage(own_server, how):
        await wait_until(lambda: mine.connections.unavailable)
        mine.native_keys.end(owner, 200, "text/plain", b"said")
    await wait_until(lambda: is_answered(other), 20, "the answer is there")

    async def is_free() -> bool:
        try:
            return isinstance(await other.native_keys.take(owner_of("failed"), of_failed), Taken)
        except StoreUnavailable:
            return False

    await wait_until(is_free, 20, "what failed may be asked again")
