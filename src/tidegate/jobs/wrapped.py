"""A job that wraps a native call: made through the relay, told as an attempt of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from random import uniform
from uuid import UUID

from tidegate.attempt import Attempt
from tidegate.call import Caller
from tidegate.demand.pause import model_limit
from tidegate.errors import InvalidRequest, NotFound
from tidegate.jobs.ends import time_left_ms
from tidegate.jobs.outages import Key, Outages
from tidegate.limiter import Permit
from tidegate.relay.call import CallFailed, Life
from tidegate.relay.detached import collected, detached_call, endpoint_named
from tidegate.relay.spine import Relay
from tidegate.relay.work import Begun
from tidegate.store.records import ClaimedJob, FailedTry, Failure

_PAUSED_MS = 400
# So many jobs of a paused model do not all come back as soon as its pause ends.
_APART_MS, _MOST_APART_MS, _LONGEST_WAIT_MS = 25, 20_000, 60_000


def targets_of(relay: Relay, path: str, model: str) -> tuple[Key, ...]:
    """The upstreams and models that a call can go to; none where another version took it in."""
    try:
        endpoint = endpoint_named(path)
        found = relay.targets.of(endpoint.dialect, endpoint.model or model)
    except (InvalidRequest, NotFound):
        return ()
    return tuple((target.upstream.name, target.model) for target in found)


def paused_waits_ms(
    relay: Relay,
    jobs: Iterable[ClaimedJob],
    targets: Callable[[ClaimedJob], Sequence[Key]],
    before: int = 0,
) -> dict[UUID, int]:
    """Of jobs that wait for models which are paused: when each is to look again. They would take
    the places of others. At latest a minute later, since a person may end a pause. `before`: how
    many were put off just before these."""
    held_ms = {}
    for job in jobs:
        paused_ms = min((_paused_ms(relay, key) for key in targets(job)), default=0)
        if paused_ms > _PAUSED_MS:
            held_ms[job.request_id] = paused_ms
    apart_ms = min(_MOST_APART_MS, _APART_MS * (before + len(held_ms)))
    return {
        request_id: round(min(_LONGEST_WAIT_MS, paused_ms + uniform(0, apart_ms)))
        for request_id, paused_ms in held_ms.items()
    }


def held_waits_ms(
    relay: Relay,
    outages: Outages,
    targets: Callable[[ClaimedJob], Sequence[Key]],
    jobs: Sequence[ClaimedJob],
    before: int,
) -> dict[UUID, int]:
    """Of jobs for which nothing can be called now: when each is to look again."""
    waits_ms = paused_waits_ms(relay, jobs, targets, before)
    for job in jobs if outages.is_any else ():
        if outages.held_ms(keys := targets(job)):
            waits_ms[job.request_id] = outages.wait_ms(keys)
    return waits_ms


def _paused_ms(relay: Relay, key: Key) -> int:
    gate = relay.health.get(key[0])
    return 0 if gate is None else gate.limiter.paused_ms((model_limit(key[1]),))


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
            answer.text = [life.answer.decode("utf-8", "replace")]
            answer.usage = life.told.usage
            answer.finish_reason = life.told.finish_reason
            answer.response_id = life.told.response_id
