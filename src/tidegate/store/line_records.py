"""Records of batch lines whose calls ended without an answer that anybody knows.

A worker died over a call, or stopped, and the line's batch has ended since or gives it up. Whether
the provider answered, and what it used, is not known: the record says so, as an attempt of a job
does that is marked ambiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson

from tidegate.call import UNKNOWN_CHARGE
from tidegate.store.records import Failure
from tidegate.store.relayed import RelayRecord
from tidegate.store.states import Status

AMBIGUOUS = "ambiguous"
PRIORITY = -100  # of all lines
_MESSAGE = (
    "its worker was lost while it was called, and its batch {}: whether the provider answered, "
    "and what it used, is not known"
)
_CALLED = "it was called, without success, before its batch {}"


def ambiguous_of(row: Mapping[str, Any], ended: str) -> Failure:
    """Why a line that was called has no answer. ended: what became of its batch."""
    if row["lapses"]:
        return Failure(code=AMBIGUOUS, message=_MESSAGE.format(ended))
    return Failure(code=f"batch_{ended}", message=_CALLED.format(ended))


def record_of(row: Mapping[str, Any], *, status: Status, failure: Failure) -> RelayRecord:
    """The record of a line that was called, as its row in PostgreSQL tells it."""
    now = datetime.now(UTC)
    return RelayRecord(
        request_id=UUID(int=row["id"].int),
        tenant_id=row["tenant_id"],
        pool="",
        endpoint=row["endpoint"],
        status=status,
        http_status=0,
        received_at=now,
        finished_at=now,
        request=row["body"].encode(),
        response=b"",
        model=_model_in(row["body"]),
        priority=PRIORITY,
        tries=row["attempts"],
        charge=UNKNOWN_CHARGE,
        failure=failure,
        key_id=row["key_id"],
        source="batch",
    )


def _model_in(body: str) -> str | None:
    found = orjson.loads(body).get("model")
    return found if isinstance(found, str) else None
