"""A job that wraps a native call: made through the relay, told as an attempt of the pipeline."""

from __future__ import annotations

from datetime import UTC, datetime

from tidegate.attempt import Attempt
from tidegate.call import Caller
from tidegate.errors import InvalidRequest, NotFound
from tidegate.jobs.ends import time_left_ms
from tidegate.jobs.outages import Key
from tidegate.limiter import Permit
from tidegate.relay.call import CallFailed, Life
from tidegate.relay.detached import collected, detached_call, endpoint_named
from tidegate.relay.spine import Relay
from tidegate.relay.work import Begun
from tidegate.store.records import ClaimedJob, FailedTry, Failure


def targets_of(relay: Relay, path: str, model: str) -> tuple[Key, ...]:
    """The upstreams and models that a call can go to; none where another version took it in."""
    try:
        endpoint = endpoint_named(path)
        found = relay.targets.of(endpoint.dialect, endpoint.model or model)
    except (InvalidRequest, NotFound):
        return ()
    return tuple((target.upstream.name, target.model) for target in found)


async def run_wrapped(
    relay: Relay,
    job: ClaimedJob,
    attempt: Attempt,
    admitted: Begun,
    *,
    body: bytes,
    caller: Caller,
    max_attempts: int,
) -> None:
    """Make the call that a job wraps, with its `body`, on the budget of its `caller`; `attempt` is
    filled as the pipeline would fill it."""
    assert job.endpoint is not None
    life, left_ms = Life(), time_left_ms(job)
    attempt.failed_try, attempt.counted_tries = None, 0

    async def begun(permit: Permit | None) -> None:
        now = datetime.now(UTC)
        if life.failed is not None:  # another upstream stands in
            attempt.failed_try = FailedTry(
                finished_at=life.finished_at or now,
                upstream_ms=life.upstream_ms,
                failure=Failure.of(life.failed),
                is_counted=not life.failed.of_upstream,
            )
            attempt.counted_tries += attempt.failed_try.is_counted
        attempt.admitted_at, attempt.fence = now, (0, 0) if permit is None else permit.fence
        attempt.queue_ms = max(0.0, (now - attempt.waiting_since).total_seconds() * 1000)
        await admitted(permit)

    call = detached_call(
        request_id=job.request_id,
        path=job.endpoint,
        body=body,
        caller=caller,
        priority=job.priority,
        deadline_ms=None if left_ms is None else max(1, left_ms),
        trail=attempt.trail,
        most_tries=max_attempts - job.attempts,
    )
    try:
        await collected(relay, call, life, begun)
    except CallFailed as failed:
        raise failed.error from None
    finally:
        attempt.finished_at, attempt.upstream_ms = life.finished_at, life.upstream_ms
        attempt.dialect, attempt.operation = call.endpoint.dialect, call.endpoint.name
        attempt.upstream = life.target.upstream.name if life.target else None
        attempt.answer.first_byte_ms = life.first_byte_ms
        attempt.charge = life.charge
        if life.pieces:
            answer = attempt.answer
            answer.text = [life.said.decode("utf-8", "replace")]
            answer.usage = life.told.usage
            answer.finish_reason = life.told.finish_reason
            answer.response_id = life.told.response_id
            answer.model_version = life.told.model_version
