"""What the processes of a pool tell one another beside permits."""

from __future__ import annotations

import pytest

from tests.integration.limiter.makers import Maker
from tests.waiting import wait_until
from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import LimiterUnavailable


async def test_each_reads_what_all_have_told_last_until_it_is_forgotten(
    maker: Maker, valkey_url: str
) -> None:
    one, two = [await maker(valkey_url) for _ in range(2)]
    await one.tell(b"first", 10_000)
    await one.tell(b"second \x00\xff", 10_000)
    await two.tell(b"soon gone", 50)
    assert (await two.told(10))[one.session] == b"second \x00\xff"

    async def alone() -> bool:
        return await one.told(10) == {one.session: b"second \x00\xff"}

    await wait_until(alone, 20, "the other's is forgotten")
    await two.tell(b"again", 10_000)
    assert len(await one.told(1)) == 1


async def test_without_valkey_nothing_is_told_and_nothing_breaks(
    maker: Maker, own_valkey: ValkeyServer
) -> None:
    limiter = await maker(own_valkey.url)
    own_valkey.pause()
    with pytest.raises(LimiterUnavailable):
        await limiter.tell(b"x", 1_000)
    own_valkey.resume()

    async def told() -> bool:
        try:
            await limiter.tell(b"x", 5_000)
        except LimiterUnavailable:
            return False
        return True

    await wait_until(told, 20, "it is back")


async def test_a_name_is_claimed_by_one_process_until_the_claim_ends(
    maker: Maker, valkey_url: str
) -> None:
    one, two = [await maker(valkey_url) for _ in range(2)]
    assert await one.claim("a name", 10_000)
    assert not await two.claim("a name", 10_000)
    assert not await one.claim("a name", 10_000)
    assert await two.claim("another", 50)

    async def free() -> bool:
        return await one.claim("another", 10_000)

    await wait_until(free, 20, "the claim has ended")
