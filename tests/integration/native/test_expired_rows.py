"""Rows of responses that OpenAI deletes by itself end later, and no other tenant reads these."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import key_of
from tests.waiting import wait_until
from tidegate.emulator.server import run_emulator

FILE = """
[upstreams.main]
{provider}
base_url = "{url}/v1"
key = "MAIN_KEY"
models = ["gpt-*"]
adopt = "heir"
"""
MODEL = "gpt-5-mini"
STAY = timedelta(days=60)


@dataclass
class Stage:
    """A gateway over one account, whose clock for such rows the test sets."""

    gateway: Gateway
    acme: AsyncOpenAI
    heir: AsyncOpenAI
    elsewhere: AsyncOpenAI

    def at(self, offset: timedelta) -> None:
        self.gateway.services.relay.resources.now = lambda: datetime.now(UTC) + offset

    async def rows(self, *, of_items: bool = False) -> set[str]:
        """The ids that have one, ended or not."""
        query = "SELECT resource_id FROM provider_resources WHERE (kind = 'item') = $1"
        found = await self.gateway.database.fetch(query, of_items)
        return {row["resource_id"] for row in found}

    async def have_items(self, *responses: str) -> bool:
        """Whether these responses, and no others, have some of their messages."""
        found = [one for one in await self.rows(of_items=True) if one.startswith("item_")]
        return {one[len("item_") :].rpartition("_")[0] for one in found} == {*responses}

    async def prune(self) -> None:
        await self.gateway.services.store.retention.prune(30)

    async def follow_up(self, client: AsyncOpenAI, response_id: str) -> bool:
        """Whether the response can be read and continued; neither one alone."""
        calls = (
            client.responses.retrieve(response_id),
            client.responses.create(model=MODEL, input="And?", previous_response_id=response_id),
        )
        seen = set[bool]()
        for call in calls:
            try:
                await call
                seen.add(True)
            except openai.NotFoundError:
                seen.add(False)
        (both,) = seen
        return both


@pytest.fixture
def provider() -> str:
    return 'provider = "openai"'


@pytest.fixture
async def stage(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str
) -> AsyncIterator[Stage]:
    monkeypatch.setenv("MAIN_KEY", "key-of-the-account")
    async with AsyncExitStack() as stack:
        account = await stack.enter_async_context(run_emulator())
        path = tmp_path / "policy.toml"
        path.write_text(FILE.format(url=account.url, provider=provider))
        gateway = await open_gateway(worker=False, auth="on", tidegate_policy=path)
        clients = list[AsyncOpenAI]()
        for tenant in ("acme", "heir"):
            key = (await key_of(gateway, tenant))["Authorization"].split()[1]
            client = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)
            clients.append(await stack.enter_async_context(client))
        direct = AsyncOpenAI(base_url=f"{account.url}/v1", api_key="direct", max_retries=0)
        acme, heir = clients
        yield Stage(gateway, acme, heir, await stack.enter_async_context(direct))


async def test_a_row_ends_a_month_after_openai_may_have_deleted_its_response(stage: Stage) -> None:
    stage.at(-STAY - timedelta(days=2))
    made = await stage.acme.responses.create(model=MODEL, input="Say it")
    stream = await stage.acme.responses.create(model=MODEL, input="Say it", stream=True)
    (begun, *_) = [event async for event in stream]
    streamed = begun.response.id
    conversation = await stage.acme.conversations.create()
    attached = await stage.acme.responses.create(
        model=MODEL, input="Say it", conversation=conversation.id
    )
    stage.at(-STAY + timedelta(days=2))
    kept = await stage.acme.responses.create(model=MODEL, input="Say it")
    stage.at(timedelta())
    lasting = {conversation.id, attached.id, kept.id}
    assert await stage.rows() == {made.id, streamed} | lasting
    await wait_until(lambda: stage.have_items(made.id, streamed, attached.id, kept.id))
    for ended in (made.id, streamed):
        assert not await stage.follow_up(stage.acme, ended)
    await stage.prune()
    assert await stage.rows() == lasting
    assert await stage.have_items(attached.id, kept.id)
    assert not await stage.follow_up(stage.acme, made.id)
    assert await stage.follow_up(stage.acme, kept.id)
    assert (await stage.acme.responses.retrieve(attached.id)).id == attached.id
    onward = await stage.acme.responses.create(
        model=MODEL, input="And?", conversation=conversation.id
    )
    assert onward.id in await stage.rows()


async def test_a_response_whose_row_has_ended_is_not_the_adopting_tenant_s(stage: Stage) -> None:
    """OpenAI may keep it for longer than it promises."""
    stage.at(-STAY - timedelta(days=2))
    made = await stage.acme.responses.create(model=MODEL, input="A secret")
    elsewhere = await stage.elsewhere.responses.create(model=MODEL, input="Say it")
    conversation = await stage.elsewhere.conversations.create()
    attached = await stage.elsewhere.responses.create(
        model=MODEL, input="Say it", conversation=conversation.id
    )
    await stage.prune()
    assert await stage.rows() == set()
    stage.at(STAY)  # after both were made
    assert not await stage.follow_up(stage.heir, made.id)
    assert not await stage.follow_up(stage.heir, elsewhere.id)
    assert (await stage.heir.responses.retrieve(attached.id)).id == attached.id
    assert not await stage.follow_up(stage.heir, "resp_of_nobody")
    stage.at(timedelta(days=20))
    assert await stage.follow_up(stage.heir, elsewhere.id)


@pytest.mark.parametrize("provider", ['dialect = "openai"', 'provider = "vllm"'])
async def test_a_row_stays_where_no_provider_says_how_long_it_keeps_a_response(
    stage: Stage,
) -> None:
    stage.at(timedelta(days=-10_000))
    made = await stage.acme.responses.create(model=MODEL, input="Say it")
    await stage.prune()
    assert made.id in await stage.rows()
    assert await stage.follow_up(stage.acme, made.id)
