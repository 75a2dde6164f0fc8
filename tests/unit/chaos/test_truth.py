"""The truth hears what workers say, in both protocols, and takes the calls of a dead one away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from chaos.limiter.truth import Caller, Truth
from tests.waiting import wait_until


@pytest.fixture
async def truth(tmp_path: Path) -> AsyncIterator[Truth]:
    truth = Truth()
    await truth.start(tmp_path / "truth")
    yield truth
    await truth.stop()


async def caller(truth: Truth, name: str, *, history: bool, path: Path | None = None) -> Caller:
    found = await Caller.connect(
        truth.port if path is None else str(path / "truth"), name, history=history
    )
    # Held by the caller, so that it lives as long.
    found.listening = asyncio.create_task(found.listen())  # type: ignore[attr-defined]
    return found


async def test_the_plain_protocol_counts(truth: Truth) -> None:
    one = await caller(truth, "w0", history=False)
    two = await caller(truth, "w1", history=False)
    for each, what in ((one, "+"), (two, "+"), (one, "+"), (one, "-"), (one, "L")):
        await each.say(what)
    assert (truth.open_calls, truth.peak, truth.total, truth.leases_lost) == (2, 3, 3, 1)
    assert truth.by_worker == {"w0": 1, "w1": 1}
    assert truth.log == []


async def test_a_history_is_kept_in_the_order_heard(truth: Truth, tmp_path: Path) -> None:
    one = await caller(truth, "w0", history=True, path=tmp_path)
    for line in ("?1 acme 800 high kind:x,pool:total", "?2 other 0 - kind:x", "+1 77", "!2", "-1"):
        await one.say(f"{line}\n")
    assert [(event.what, event.call) for event in truth.log] == [
        *(("ask", 1), ("ask", 2), ("begin", 1), ("leave", 2), ("end", 1)),
    ]
    asked, plain, begun, _, ended = truth.log
    assert (asked.tenant, asked.tokens, asked.priority) == ("acme", 800, "high")
    assert asked.limits == begun.limits == ended.limits == ("kind:x", "pool:total")
    assert (plain.tenant, plain.priority) == ("other", "")
    assert (asked.epoch, begun.epoch) == (0, 77)
    assert [event.at_ns for event in truth.log] == sorted(event.at_ns for event in truth.log)
    assert (truth.open_calls, truth.peak) == (0, 1)


async def test_what_a_dead_worker_had_open_ends_with_it(truth: Truth) -> None:
    one = await caller(truth, "w0", history=True)
    for line in ("?1 a 0 - kind:x", "?2 a 0 - kind:x", "+1 1"):
        await one.say(f"{line}\n")
    one._writer.transport.abort()
    await wait_until(lambda: not truth.by_worker)
    assert truth.open_calls == 0
    assert [(event.what, event.call) for event in truth.log[3:]] == [("end", 1), ("leave", 2)]


async def test_half_a_line_of_a_dead_worker_is_nothing(truth: Truth) -> None:
    one = await caller(truth, "w0", history=True)
    await one.say("?1 a 0 - kind:x\n")
    one.tell("+1 ")
    one._writer.close()
    await wait_until(lambda: not truth.by_worker)
    assert truth.total == 0
    assert [event.what for event in truth.log] == ["ask", "leave"]
