"""Pictures of batched jobs whose server fails for a while."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.gateway import PNG, Opener
from tests.integration.batches.provider import asked
from tests.integration.batches.test_provider_batches import (
    is_held,
    opened,
    pictured,
    provider,
    settings,
    submitted,
)
from tests.waiting import wait_until
from tidegate.call import Media
from tidegate.emulator.server import Emulator
from tidegate.errors import FetchFailed
from tidegate.upstream.fetch import ImageFetcher

__all__ = ["provider", "settings"]


async def test_a_picture_whose_server_fails_for_a_while_is_still_sent_at_half_the_price(
    open_gateway: Opener,
    settings: dict[str, Any],
    provider: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched = list[str]()

    async def fetch(_fetcher: ImageFetcher, uri: str, *_more: object) -> Media:
        fetched.append(uri)
        if "away" in uri or fetched.count(uri) == 1:
            raise FetchFailed("image_uri", "image_uri was answered with status 503")
        return Media("image/png", PNG)

    monkeypatch.setattr(ImageFetcher, "fetch", fetch)
    gateway = await opened(open_gateway, settings)
    back, away = await submitted(
        gateway, pictured("What is it?", "back.png"), pictured("Whose is it?", "away.png")
    )
    gateway.start_worker()
    end = await gateway.end_of(back)
    assert (end["status"], end["usage"]["tier"], end["attempts"]) == ("succeeded", "batch", 2)
    lost = await gateway.end_of(away)
    assert (lost["status"], lost["error"]["code"]) == ("failed", "fetch_failed")
    assert not any(tier != "batch" for _, tier in await asked(provider.control))


async def test_a_line_whose_picture_does_not_come_again_may_be_in_another_batch(
    open_gateway: Opener,
    settings: dict[str, Any],
    provider: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched = list[str]()

    async def fetch(_fetcher: ImageFetcher, uri: str, *_more: object) -> Media:
        fetched.append(uri)
        if "slow" in uri and fetched.count(uri) == 2:
            raise FetchFailed("image_uri", "image_uri was answered with status 503")
        return Media("image/png", PNG)

    monkeypatch.setattr(ImageFetcher, "fetch", fetch)
    gateway = await opened(open_gateway, settings)
    await provider.control.set_behaviour(batches={"open_batches": 0})
    ids = await submitted(
        gateway, pictured("Whose is it?", "slow.png"), pictured("What is it?", "other.png")
    )
    gateway.start_worker()
    await wait_until(partial(is_held, gateway))
    await provider.control.set_behaviour(batches={})
    ends = [await gateway.end_of(one) for one in ids]
    assert [(end["status"], end["usage"]["tier"]) for end in ends] == [("succeeded", "batch")] * 2
    assert fetched.count("https://example.com/slow.png") > 2
