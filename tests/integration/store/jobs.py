"""Jobs and results to put into a store."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import asyncpg

from tests.waiting import wait_until
from tidegate.call import (
    UNKNOWN_CHARGE,
    Answer,
    Attachment,
    Classification,
    ClassifiedBy,
    Kind,
    Status,
    Usage,
    new_id,
)
from tidegate.errors import StoreUnavailable
from tidegate.record import CallRecord, Failure, OutputFile, Source
from tidegate.store.database import sql
from tidegate.store.records import NewJob
from tidegate.store.store import Store


async def beat(store: Store) -> None:
    """A heartbeat has arrived: with a short lease it waits for 100 ms at most, and a busy machine
    may take longer to open a connection."""

    async def arrived() -> bool:
        try:
            await store.queue.heartbeat()
        except StoreUnavailable:
            return False
        return True

    await wait_until(arrived, 10, "a heartbeat")


def now() -> datetime:
    return datetime.now(UTC)


TEXT = Classification(Kind.TEXT_ONLY, ClassifiedBy.RULES, "no file and no word of a picture")
UNSURE = Classification(None, ClassifiedBy.RULES, "the words could mean either")


def new_job(prompt: str = "Why is the sky blue?", **overrides: Any) -> NewJob:
    values: dict[str, Any] = {
        "request_id": new_id(),
        "created_at": now(),
        "prompt": prompt,
        "classification": TEXT,
    }
    return NewJob(**{**values, **overrides})


def upload(name: str = "page.pdf") -> Attachment:
    return Attachment(new_id(), name, "application/pdf", 1234, f"2025-01-01/{new_id()}")


_OF_ANSWER = ("usage", "finish_reason", "model_version", "response_id", "first_byte_ms")


def result(
    text: str = "Because of Rayleigh.",
    status: str = Status.SUCCEEDED,
    failure: Failure | None = None,
    **overrides: Any,
) -> CallRecord:
    """The record of a call that was admitted, and has ended."""
    answer = {
        "usage": Usage(input_tokens=5, output_tokens=9, total_tokens=14),
        "finish_reason": "STOP",
        "model_version": "gemini-test-001",
        "response_id": "r1",
        **{name: overrides.pop(name) for name in _OF_ANSWER if name in overrides},
    }
    values: dict[str, Any] = {
        "source": "job",
        "tenant_id": "default",
        "received_at": now(),
        "model": "gemini-test",
        "fence": (1, 7),
        "admitted_at": now(),
        "finished_at": now(),
        "queue_ms": 12.5,
        "upstream_ms": 340.0,
        "attempts": 1,
        "answer": Answer([text], **answer),
        "charge": UNKNOWN_CHARGE,
    }
    record = CallRecord(**{**values, **overrides})
    record.end(status, failure)
    return record


def unadmitted(status: str, failure: Failure | None = None, source: Source = "job") -> CallRecord:
    """The record of a call that was never made."""
    record = CallRecord(source, "default", now())
    record.end(status, failure)
    return record


def picture() -> OutputFile:
    return OutputFile(new_id(), "image/png", 99, f"2025-01-01/{new_id()}")


_AS_IN_A_PROCESS = "SET LOCAL enable_seqscan = off; SET LOCAL jit = off"


async def plan(session: asyncpg.Connection, name: str, *arguments: object, options: str) -> str:
    """How a statement is run with these arguments; nothing of it stays."""
    transaction = session.transaction()
    await transaction.start()
    lines = await session.fetch(f"EXPLAIN ({options}) {sql(name)}", *arguments)
    await transaction.rollback()
    return "\n".join(line[0] for line in lines)


async def plan_for_any(
    session: asyncpg.Connection, name: str, *arguments: object, options: str
) -> str:
    """The same by the plan that a session makes once, for whatever arguments come."""
    given = ", ".join([await _literal(session, value) for value in arguments])
    transaction = session.transaction()
    await transaction.start()
    await session.execute(f"{_AS_IN_A_PROCESS}; SET LOCAL plan_cache_mode = force_generic_plan")
    await session.execute(f"PREPARE for_any AS {sql(name)}")
    lines = await session.fetch(f"EXPLAIN ({options}) EXECUTE for_any ({given})")
    await session.execute("DEALLOCATE for_any")
    await transaction.rollback()
    return "\n".join(line[0] for line in lines)


async def _literal(session: asyncpg.Connection, value: object) -> str:
    if isinstance(value, list):
        value = "{" + ",".join(map(str, value)) + "}"
    text = None if value is None else str(value)
    return str(await session.fetchval("SELECT quote_nullable($1::text)", text))
