"""One try upstream: what is known of it as it goes, and what the store is told in the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from tidegate.call import NO_CHARGE, Answer, Charge
from tidegate.store.records import AttemptResult, FailedTry, Failure, OutputFile
from tidegate.tracing import Trail


@dataclass(slots=True)
class Attempt:
    """One try upstream as it goes: filled in step by step, so that a cut one can be recorded.

    `limits` are those that it asks for. `queue_ms` is from `waiting_since`, the receipt of the
    request at first, to admission. `is_marked`: a job's call is on record, as one that may be made.
    `failed_try`: the one before, of another upstream; of such `counted_tries` use up attempts.
    """

    waiting_since: datetime
    answer: Answer = field(default_factory=Answer)
    fence: tuple[int, int] | None = None
    limits: tuple[str, ...] = ()
    admitted_at: datetime | None = None
    finished_at: datetime | None = None
    queue_ms: float = 0.0
    upstream_ms: float = 0.0
    charge: Charge = NO_CHARGE
    upstream: str | None = None
    dialect: str = "gemini"
    operation: str = "generate_content"
    trail: Trail | None = None
    is_marked: bool = False
    failed_try: FailedTry | None = None
    counted_tries: int = 0


def attempt_result(
    attempt: Attempt, model: str, pictures: tuple[OutputFile, ...], failure: Failure | None
) -> AttemptResult | None:
    """The attempt as the store takes it; None when it was never admitted."""
    if attempt.admitted_at is None or attempt.fence is None:
        return None
    answer = attempt.answer
    return AttemptResult(
        model=model,
        fence=attempt.fence,
        admitted_at=attempt.admitted_at,
        finished_at=attempt.finished_at or datetime.now(UTC),
        queue_ms=attempt.queue_ms,
        upstream_ms=attempt.upstream_ms,
        text=answer.whole_text,
        pictures=pictures,
        usage=answer.usage,
        finish_reason=answer.finish_reason,
        model_version=answer.model_version,
        response_id=answer.response_id,
        failure=failure,
        charge=attempt.charge,
        first_byte_ms=answer.first_byte_ms,
        upstream=attempt.upstream,
        dialect=attempt.dialect,
        operation=attempt.operation,
        trail=attempt.trail,
    )
