-- Statements that end jobs for their owners: see cancels.py.

-- name: lock_owned
-- Lock request $1 of tenant $2 against all others that would change it.
SELECT status, claimed_by FROM requests WHERE id = $1 AND tenant_id = $2 FOR UPDATE

-- name: cancel_queued
-- End queued job $1; the claim is fenced off.
UPDATE requests SET status = 'cancelled', claim = claim + 1, claimed_by = NULL, not_before = NULL,
    finished_at = now(), failure = $2::jsonb, version = version + 1
WHERE id = $1 AND coalesce(status = 'queued', false)
RETURNING *

-- name: ask_to_cancel
-- Ask the worker that has running job $1 to end it.
UPDATE requests SET cancel_asked_at = coalesce(cancel_asked_at, now())
WHERE id = $1 AND status = 'running'

-- name: asked_of_worker
-- What worker $1 is to give up: running jobs, and those of $2 that were cancelled while they waited.
SELECT id FROM requests
WHERE coalesce(status IN ('queued', 'running') AND cancel_asked_at IS NOT NULL, false)
    AND coalesce(status = 'running', false) AND claimed_by = $1
UNION
SELECT id FROM requests WHERE id = ANY($2::uuid[]) AND status = 'cancelled'

-- name: cancel_returned
-- End up to 500 jobs that came back into the queue after their end was asked for.
UPDATE requests SET status = 'cancelled', claim = claim + 1, claimed_by = NULL, not_before = NULL,
    finished_at = now(), failure = $1::jsonb, version = version + 1
WHERE id IN (
    SELECT id FROM requests
    WHERE coalesce(status IN ('queued', 'running') AND cancel_asked_at IS NOT NULL, false)
        AND coalesce(status = 'queued', false)
    LIMIT 500 FOR UPDATE SKIP LOCKED
)
RETURNING *
