"""Batches through the unmodified OpenAI SDK: from the file to what each line gave."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import openai
import pytest

from tests.batching import ENDPOINT as PATH
from tests.batching import (
    MODEL,
    assert_all_succeeded,
    begin,
    content,
    end_of,
    jsonl,
    line,
    lines_of,
    nested,
)
from tests.gateway import Opener
from tests.integration.batches.conftest import MakeSdk
from tests.waiting import wait_until
from tests.zones import set_clock
from tidegate.call import Scope
from tidegate.jobs.batches import Check, Sound
from tidegate.store.database import sql


async def test_from_the_file_to_the_answers(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway()
    await gateway.upstream.set_behaviour(strict_models=True)
    client = sdk(gateway)
    lines = [line(f"id-{number}", f"Say word{number}.") for number in range(20)]
    lines.append(line("wrong", "x"))
    lines[-1]["body"]["model"] = "no-such-model"
    batch = await begin(client, jsonl(lines), metadata={"of": "a test"})
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"of": "a test"})
    assert batch.expires_at is not None
    assert batch.expires_at - batch.created_at == 86_400
    done = await end_of(client, batch)
    assert done.status == "completed"
    assert done.request_counts is not None
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (21, 20, 1)
    assert None not in (done.in_progress_at, done.finalizing_at, done.completed_at)
    out = await lines_of(client, done.output_file_id)
    assert [one["custom_id"] for one in out] == [f"id-{number}" for number in range(20)]
    for number, one in enumerate(out):
        assert (one["response"]["status_code"], one["error"]) == (200, None)
        said = one["response"]["body"]["choices"][0]["message"]["content"]
        assert f"word{number}." in said
    (failed,) = await lines_of(client, done.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("wrong", 404)
    assert failed["response"]["body"]["error"]["code"] == "model_not_found"
    assert (await client.files.retrieve(done.output_file_id or "")).purpose == "batch_output"
    assert await gateway.database.fetchval("SELECT count(*) FROM batch_lines") == 0

    async def recorded() -> bool:
        found = await gateway.database.fetchval("SELECT count(*) FROM audit WHERE source = 'batch'")
        return bool(found == 21)

    await wait_until(recorded, 20, "the record of each line")
    _, listed = await gateway.get("/requests")
    assert listed["items"] == []


async def test_what_is_wrong_with_a_file_is_told_by_line(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway()
    client = sdk(gateway)
    lines: list[Any] = [
        line("a", "x"),
        line("a", "x"),
        line("b", "x", method="GET"),
        line("c", "x", url="/v1/embeddings"),
        line("d", "x", body={}),
        line("e", "x", body={"model": MODEL, "stream": True}),
        [],
        line("", "x"),
        line("f\x00", "x"),
        line("g", "x", body={"model": "m\x00"}),
        line("h\ud800", "x"),
        line("i", "x", body={"model": MODEL, "messages": [], "metadata": nested(300)}),
    ]
    batch = await begin(client, jsonl(lines) + b"{nothing\n")
    done = await end_of(client, batch)
    assert (done.status, done.output_file_id) == ("failed", None)
    assert done.errors is not None
    told = [(one.line, one.code) for one in done.errors.data or []]
    assert told == [
        (2, "duplicate_custom_id"),
        (3, "invalid_method"),
        (4, "mismatched_url"),
        (5, "invalid_body"),
        (6, "invalid_body"),
        (7, "invalid_json_line"),
        (8, "missing_custom_id"),
        (9, "invalid_custom_id"),
        (10, "invalid_body"),
        (11, "invalid_json_line"),
        (12, "invalid_body"),
        (13, "invalid_json_line"),
    ]
    empty = await end_of(client, await begin(client, b"\n"))
    assert empty.errors is not None
    assert [one.code for one in empty.errors.data or []] == ["empty_file"]
    assert await gateway.calls() == []


async def test_a_batch_that_cannot_be_read_holds_up_no_other(
    open_gateway: Opener, sdk: MakeSdk, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, tried = Check.take, list[int]()

    def failing(check: Check, number: int, raw: bytes) -> Sound | None:
        if b"of-another" in raw:
            tried.append(number)
            raise RuntimeError("an error that nobody foresaw")
        return take(check, number, raw)

    monkeypatch.setattr(Check, "take", failing)
    gateway = await open_gateway()
    other, client = sdk(gateway, "other"), sdk(gateway)
    stuck = await begin(other, jsonl([line("of-another", "x")]))
    await wait_until(lambda: tried)
    done = await end_of(client, await begin(client, content(2)))
    await assert_all_succeeded(client, done, 2)
    assert (await other.batches.retrieve(stuck.id)).status == "validating"


async def test_a_file_may_be_written_as_other_systems_write_it(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    """A byte order mark, CRLF, blank lines, no end of the last line, texts beyond ASCII and NUL."""
    gateway = await open_gateway()
    client = sdk(gateway)
    one, two = jsonl([line("a", "Say a\x00b")]).strip(), jsonl([line("ü\u2028", "Say é")]).strip()
    given = b"\xef\xbb\xbf" + one + b"\r\n\r\n  \r\n" + two
    done = await end_of(client, await begin(client, given))
    assert done.status == "completed", done.errors
    counts = done.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (2, 2, 0)
    out = await lines_of(client, done.output_file_id)
    assert [said["custom_id"] for said in out] == ["a", "ü\u2028"]
    assert sorted(call.prompt for call in await gateway.calls()) == ["Say a\x00b", "Say é"]


async def test_cancelling_ends_what_has_not_begun(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1})
    client = sdk(gateway)
    await gateway.upstream.set_behaviour(first_byte_ms=200)
    batch = await begin(client, jsonl([line(f"id-{n}", f"Say {n}") for n in range(200)]))

    async def one_done() -> bool:
        counts = (await client.batches.retrieve(batch.id)).request_counts
        return counts is not None and counts.completed > 0

    await wait_until(one_done, 20, "the first answer")
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    done = await end_of(client, batch)
    assert (done.status, done.cancelled_at is not None) == ("cancelled", True)
    counts = done.request_counts
    assert counts is not None
    out = await lines_of(client, done.output_file_id)
    errors = await lines_of(client, done.error_file_id)
    assert len(out) == counts.completed <= 5  # not what a worker had taken, only what was called
    assert len(out) + len(errors) == 200
    assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
    finished = await end_of(client, await begin(client, jsonl([line("a", "Say a")])))
    with pytest.raises(openai.ConflictError):
        await client.batches.cancel(finished.id)


async def test_another_tenant_sees_nothing(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway()
    mine, theirs = sdk(gateway, "acme"), sdk(gateway, "other")
    batch = await begin(mine, jsonl([line("a", "Say a")]))
    done = await end_of(mine, batch)
    for ask in (
        theirs.batches.retrieve(batch.id),
        theirs.batches.cancel(batch.id),
        theirs.files.retrieve(batch.input_file_id),
        theirs.files.content(done.output_file_id or ""),
        theirs.files.delete(batch.input_file_id),
        theirs.batches.create(
            input_file_id=batch.input_file_id, endpoint=PATH, completion_window="24h"
        ),
    ):
        with pytest.raises(openai.NotFoundError):
            await ask
    assert (await theirs.batches.list()).data == []
    assert (await theirs.files.list()).data == []
    assert [one.id for one in (await mine.batches.list()).data] == [batch.id]


async def test_lists_go_on_where_a_page_ended(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway(worker=False)
    client = sdk(gateway)
    made = [(await begin(client, jsonl([line("a", "x")]))).id for _ in range(3)]
    assert [one.id async for one in client.batches.list(limit=2)] == made[::-1]
    for empty in ({"limit": 0}, {"after": "batch_of_nobody"}):
        page = await client.batches.list(**empty)
        assert (page.data, page.has_more) == ([], False), empty
    for path in ("batches", "files", "messages/batches"):
        for number in ("0" * 9 + "101", "0" * 8 + "1" + "9" * 30):
            status, _ = await gateway.get(f"/v1/{path}?limit={number}")
            assert status == 400, (path, number)
    files = [one async for one in client.files.list(limit=2)]
    assert [one.filename for one in files] == ["in.jsonl"] * 3
    upwards = [one.id async for one in client.files.list(limit=2, order="asc")]
    assert upwards == [one.id for one in files][::-1]
    deleted = await client.files.delete(files[0].id)
    assert deleted.deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.content(files[0].id)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"completion_window": "1h"}, "completion_window"),
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"endpoint": "/v1beta/models/x:generateContent"}, "endpoint"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after"),
    ],
)
async def test_a_wrong_batch_is_refused_by_name(
    open_gateway: Opener, sdk: MakeSdk, given: dict[str, Any], field: str
) -> None:
    gateway = await open_gateway(worker=False)
    client = sdk(gateway)
    file = await client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": PATH, "completion_window": "24h"} | given
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.batches.create(**body)
    assert wrong.value.param == field


async def test_the_input_of_a_batch_has_no_expiry_of_its_own(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(worker=False)
    files, given = sdk(gateway).files, ("in.jsonl", b"{}\n")
    soon: Any = {"anchor": "created_at", "seconds": 3_600}
    with pytest.raises(openai.BadRequestError) as wrong:
        await files.create(file=given, purpose="batch", expires_after=soon)
    assert wrong.value.param == "expires_after[anchor]"
    unknown: Any = ""
    with pytest.raises(openai.BadRequestError) as wrong:
        await files.create(file=given, purpose=unknown)
    assert wrong.value.param == "purpose"


async def test_interactive_calls_pass_a_batch_by(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 2})
    client = sdk(gateway)
    await gateway.upstream.set_behaviour(first_byte_ms=50)
    batch = await begin(client, jsonl([line(f"id-{n}", f"Say {n}") for n in range(200)]))
    await gateway.in_flight(2)

    async def ask(number: int) -> int:
        """When it was sent."""
        sent_ns = time.time_ns()
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"live {number}"}]
        )
        return sent_ns

    asked = [await ask(number) for number in range(11)]
    counts = (await client.batches.retrieve(batch.id)).request_counts
    assert counts is not None
    assert counts.completed < 150, "the batch was over too soon to say anything"
    # However slow the machine is: as many lines begin beside a call as there are slots, and those
    # that were sent before the call had come to the queue.
    lines = await gateway.upstream.calls(contains="Say")
    live = await gateway.upstream.calls(contains="live")
    beside = sorted(
        sum(sent_ns < one.started_ns < call.started_ns for one in lines)
        for sent_ns, call in zip(asked, live, strict=True)
    )
    assert beside[5] <= 4, beside
    await client.batches.cancel(batch.id)
    await end_of(client, batch)


async def test_more_lines_than_a_worker_holds(open_gateway: Opener, sdk: MakeSdk) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 64})
    client = sdk(gateway)
    lines = [line(f"id-{number}", f"Say {number}") for number in range(600)]
    done = await end_of(client, await begin(client, jsonl(lines)), 90)
    counts = done.request_counts
    assert counts is not None
    assert (done.status, counts.completed, counts.failed) == ("completed", 600, 0)
    out = await lines_of(client, done.output_file_id)
    assert [one["custom_id"] for one in out] == [one["custom_id"] for one in lines]
    assert (await gateway.upstream.stats())["text_only"].arrived == 600


async def test_the_lines_count_for_the_caps_on_the_queue(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    store = gateway.services.store
    await store.tenants.set("acme", {"most_queued_jobs": 5}, by="test")
    _, made = await store.tenants.create_key("acme", scopes=(Scope.INFER, Scope.READ))
    client = sdk(gateway, "acme", api_key=made.text)
    await begin(client, jsonl([line(f"id-{n}", "x") for n in range(4)]))
    with pytest.raises(openai.RateLimitError) as full:
        await begin(client, jsonl([line(f"id-{n}", "x") for n in range(2)]))
    assert full.value.body["limit"] == "most_queued_jobs"
    await begin(client, jsonl([line("last", "x")]))
    database, count = gateway.database, sql("queued_of_batches")
    whole = await database.fetchrow(count, "acme")
    await database.execute("UPDATE batches SET completed = 2, failed = 1 WHERE total = 4")
    left = await database.fetchrow(count, "acme")
    assert (whole["jobs"], left["jobs"]) == (5, 2)
    assert left["size_bytes"] / whole["size_bytes"] == pytest.approx(2 / 5, rel=0.05)


async def test_lines_are_called_by_a_worker_whose_clock_is_ahead_of_their_deadline(
    open_gateway: Opener, sdk: MakeSdk, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, timedelta(hours=25))
    gateway = await open_gateway()
    client = sdk(gateway)
    await assert_all_succeeded(client, await end_of(client, await begin(client, content(2))), 2)
