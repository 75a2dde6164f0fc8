"""Files of all purposes by OpenAI's SDK: those of batches are ours, all others live at OpenAI."""

from __future__ import annotations

from typing import Any

import openai
import orjson
import pytest

from tests.integration.native.test_stored import MODEL, Stage, stage
from tests.waiting import wait_until

__all__ = ["stage"]


def naming(file_id: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "input_file", "file_id": file_id}]}]


async def test_files_of_all_purposes_are_their_owner_s_and_used_where_they_live(
    stage: Stage,
) -> None:
    acme, other = stage.acme, stage.other
    data = b"x" * 3_000_000
    soon: Any = {"anchor": "created_at", "seconds": 3_600}
    made = await acme.files.create(
        file=('odd "name".pdf', data, "application/pdf"), purpose="user_data", expires_after=soon
    )
    assert (made.purpose, made.bytes) == ("user_data", len(data))
    picture = await acme.files.create(file=("a.png", b"y"), purpose="vision")
    ours = await acme.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
    theirs = await other.files.create(file=("b.txt", b"z"), purpose="assistants")
    assert len(await stage.at(f"/v1/files/{made.id}")) == 1
    assert await stage.at(f"/v1/files/{ours.id}") == []
    audit = "SELECT tenant_id FROM audit WHERE endpoint = '/v1/files' AND status = 'succeeded'"

    async def noted() -> bool:
        rows = await stage.gateway.database.fetch(audit)
        return sorted(row["tenant_id"] for row in rows) == ["acme", "acme", "other"]

    await wait_until(noted, 20, "a row of each upload that was sent on")
    listed = [one.id async for one in acme.files.list(limit=1)]
    assert listed == [ours.id, picture.id, made.id]
    assert [one.id async for one in acme.files.list(purpose="vision")] == [picture.id]
    assert [one.id async for one in acme.files.list(purpose="batch")] == [ours.id]
    upwards = [one.id async for one in acme.files.list(order="asc", purpose="user_data")]
    assert upwards == [made.id]
    assert [one.id async for one in other.files.list()] == [theirs.id]
    assert (await acme.files.retrieve(made.id)).filename
    assert (await acme.files.content(made.id)).content == data
    asked: Any = {"model": MODEL, "input": naming(made.id)}
    assert (await acme.responses.create(**asked)).output_text
    cited = {"type": "file_citation", "file_id": "file-of-a-store", "index": 0, "filename": "f"}
    said = {"type": "output_text", "text": "so", "annotations": [cited]}
    history = [*naming(made.id), {"role": "assistant", "content": [said]}]
    assert await acme.responses.create(model=MODEL, input=history)
    for call in (
        other.responses.create(**asked),
        other.conversations.create(items=naming(made.id)),
        other.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "user", "content": [{"type": "file", "file": {"file_id": made.id}}]}
            ],
        ),
        other.files.retrieve(made.id),
        other.files.content(made.id),
        other.files.delete(made.id),
        acme.files.retrieve("file-of-nobody"),
        other.files.retrieve(ours.id),
    ):
        with pytest.raises(openai.NotFoundError):
            await call
    assert (await acme.files.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await acme.files.retrieve(made.id)
    wrong: Any = "nonsense"
    with pytest.raises(openai.BadRequestError, match="Invalid 'purpose'"):
        await acme.files.create(file=("c.txt", b"z"), purpose=wrong)


async def test_uploads_in_parts_are_their_owner_s(stage: Stage) -> None:
    acme, other = stage.acme, stage.other
    begun = await acme.uploads.create(
        bytes=6, filename="a.txt", mime_type="text/plain", purpose="user_data"
    )
    with pytest.raises(openai.NotFoundError):
        await other.uploads.parts.create(begun.id, data=b"evil")
    parts = [await acme.uploads.parts.create(begun.id, data=one) for one in (b"abc", b"def")]
    ids = [part.id for part in parts]
    with pytest.raises(openai.NotFoundError):
        await other.uploads.complete(begun.id, part_ids=ids)
    whole = await acme.uploads.complete(begun.id, part_ids=ids)
    assert whole.file is not None
    assert (await acme.files.content(whole.file.id)).content == b"abcdef"
    with pytest.raises(openai.NotFoundError):
        await other.files.content(whole.file.id)
    with pytest.raises(openai.NotFoundError):
        await other.uploads.cancel(begun.id)


async def test_a_batch_of_a_file_that_lives_at_the_provider_is_made_of_a_copy(
    stage: Stage,
) -> None:
    acme, other = stage.acme, stage.other
    line = orjson.dumps(
        {
            "custom_id": "1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, "messages": [{"role": "user", "content": "Of a copy"}]},
        }
    )
    there = await acme.files.create(file=("in.jsonl", line), purpose="user_data")
    asked: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    for file_id in (there.id, "file-of-nobody", "no id.at/all"):
        with pytest.raises(openai.NotFoundError):
            await other.batches.create(input_file_id=file_id, **asked)
    batch = await acme.batches.create(input_file_id=there.id, **asked)
    copy = await acme.files.retrieve(batch.input_file_id)
    assert (copy.bytes, copy.purpose) == (len(line), "batch")
    async with openai.AsyncOpenAI(
        base_url=f"{stage.accounts['second'].url}/v1", api_key="direct"
    ) as direct:
        before = await direct.files.create(file=("in.jsonl", line), purpose="batch")
    adopted = await stage.heir.batches.create(input_file_id=before.id, **asked)
    stage.gateway.start_worker()
    for client, one in ((acme, batch), (stage.heir, adopted)):

        async def completed(client: Any = client, batch_id: str = one.id) -> Any:
            found = await client.batches.retrieve(batch_id)
            return found if found.status == "completed" else None

        ended = await wait_until(completed, 20, "its end")
        assert ended.request_counts.completed == 1
    calls = [await one.control.calls(contains="Of a copy") for one in stage.accounts.values()]
    assert sum(map(len, calls)) == 2, "its lines are called under the limits here"


async def test_a_list_of_files_is_never_taken_for_a_call_that_its_process_lost(
    stage: Stage,
) -> None:
    assert [one.id async for one in stage.acme.files.list()] == []
    store = stage.gateway.services.store
    store.journal.close()
    left = list((stage.gateway.config.data_dir / "spill").glob("*.calls"))
    assert left == [], "calls that the next process puts on record as lost"


async def test_the_row_of_a_file_goes_once_its_provider_has_deleted_it(stage: Stage) -> None:
    """A day after it said that it would, and no sooner."""
    soon: Any = {"anchor": "created_at", "seconds": 3_600}
    given: Any = {"file": ("a.pdf", b"x"), "purpose": "user_data"}
    ends = await stage.acme.files.create(**given, expires_after=soon)
    stays = await stage.acme.files.create(**given)
    database, retention = stage.gateway.database, stage.gateway.services.store.retention

    async def kept() -> list[str]:
        rows = await database.fetch("SELECT resource_id FROM provider_resources")
        return sorted(row["resource_id"] for row in rows)

    at = await database.fetchval(
        "SELECT extract(epoch FROM expires_at)::float FROM provider_resources"
        " WHERE resource_id = $1",
        ends.id,
    )
    assert ends.expires_at is not None
    assert at == ends.expires_at + 86_400
    await retention.prune(30)
    assert await kept() == sorted([ends.id, stays.id])
    later = "UPDATE provider_resources SET expires_at = expires_at - interval '50 hours'"
    await database.execute(later)
    await retention.prune(30)
    assert await kept() == [stays.id]
    with pytest.raises(openai.NotFoundError):
        await stage.other.files.retrieve(ends.id)
