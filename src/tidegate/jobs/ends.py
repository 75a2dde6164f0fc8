"""A job as the pipeline takes it, and how its end is told."""

from __future__ import annotations

from datetime import UTC, datetime

from tidegate.attempt import Attempt
from tidegate.call import Caller
from tidegate.config import Config
from tidegate.errors import DeadlineExceeded, LimitPaused, LimitUsedUp, TidegateError
from tidegate.pipeline import Ask
from tidegate.store.cancels import CANCELLED
from tidegate.store.records import AttemptResult, ClaimedJob, Failure
from tidegate.store.states import Status
from tidegate.store.store import Store
from tidegate.telemetry import FrequentLog, Log, get_logger

log = get_logger()
_OTHER_ENDS = {
    CANCELLED.code: Status.CANCELLED,
    # When its turn was asked for again, after its mark.
    **dict.fromkeys(
        (DeadlineExceeded.code, LimitPaused.code, LimitUsedUp.code),
        Status.EXPIRED,
    ),
}
log_job = FrequentLog(Log.JOB_DONE)


def ask_of(job: ClaimedJob) -> Ask:
    kind = job.classification.kind
    return Ask(job.prompt, job.attachments, job.image_uri, kind, job.tenant_id)


async def payer_of(job: ClaimedJob, config: Config, store: Store) -> Caller:
    """Whose budget a job spends. Raises BudgetExceeded, and StoreUnavailable."""
    if not config.asks_for_keys:
        return Caller(job.tenant_id)
    caller = Caller(job.tenant_id, budgets=await store.budgets.budgets_of(job.tenant_id))
    await store.budgets.let_in(caller)
    return caller


def status_of(result: AttemptResult) -> Status:
    if result.failure is None:
        return Status.SUCCEEDED
    code = result.failure.code
    return _OTHER_ENDS.get(code, Status.FAILED)


def log_end(
    job: ClaimedJob, attempt: Attempt, failure: Failure | None, wait_ms: int | None
) -> None:
    fields = {
        "request_id": str(job.request_id),
        "tenant": job.tenant_id,
        **({"trace_id": attempt.trail.trace} if attempt.trail else {}),
        "type": job.classification.kind,
        "queue_ms": round(attempt.queue_ms, 1),
        "upstream_ms": round(attempt.upstream_ms, 1),
        **({"code": failure.code} if failure else {}),
    }
    if wait_ms is None:
        log_job(fields)
    else:
        log.info(Log.JOB_RETRY, retry_in_ms=wait_ms, **fields)


def internal() -> TidegateError:
    return TidegateError("an internal error; it has been logged")


def time_left_ms(job: ClaimedJob) -> int | None:
    """Until the job's deadline, negative when it has passed; None without one."""
    if job.deadline_at is None:
        return None
    return round((job.deadline_at - datetime.now(UTC)).total_seconds() * 1000)
