-- Every statement of the store. Many rows travel as one JSON array in $1, so that a group commit
-- is one statement whatever its size. Every write to a job is fenced by its claim.

-- name: add_files
-- Insert the files of requests written in the same transaction.
INSERT INTO files (id, request_id, tenant_id, role, position, name, mime_type, size_bytes, blob_key)
SELECT id, request_id, tenant_id, role, position, name, mime_type, size_bytes, blob_key
FROM json_to_recordset($1::json) AS row (id uuid, request_id uuid, tenant_id text, role text,
    position integer, name text, mime_type text, size_bytes bigint, blob_key text)
ON CONFLICT (id) DO NOTHING

-- name: get_request
-- One request of a tenant.
SELECT id, tenant_id, source, status, kind, classified_by, classified_reason, model, used_model,
    priority, attempts, created_at, admitted_at, finished_at, not_before, deadline_at, queue_ms,
    upstream_ms, first_byte_ms, result, input_tokens, output_tokens, thoughts_tokens, cached_tokens,
    total_tokens, finish_reason, failure, version, webhook_url, endpoint
FROM requests WHERE id = $1 AND tenant_id = $2

-- name: get_place
-- The place of queued request $1 in its queue, counted up to 10,000.
SELECT 1 + (
    SELECT count(*) FROM (
        (SELECT 1 FROM requests q WHERE q.status = 'queued' AND q.pool = r.pool
            AND q.lane = r.lane AND q.priority > r.priority
            ORDER BY q.priority LIMIT 10000)
        UNION ALL
        (SELECT 1 FROM requests q WHERE q.status = 'queued' AND q.pool = r.pool
            AND q.lane = r.lane AND q.priority = r.priority
            AND (q.created_at, q.id) < (r.created_at, r.id)
            ORDER BY q.created_at, q.id LIMIT 10000)
        LIMIT 10000
    ) AS before
) AS place
FROM requests r WHERE r.id = $1 AND coalesce(r.status = 'queued', false)

-- name: get_request_files
-- All files of one request in their order, uploads first.
SELECT * FROM files WHERE request_id = $1 ORDER BY role, position

-- name: get_file
-- One file by its public id, for its owner only.
SELECT * FROM files WHERE id = $1 AND tenant_id = $2

-- name: get_versions
-- The versions of many requests: the one query that all long polls of a process share.
SELECT id, version FROM requests WHERE id = ANY($1::uuid[])

-- name: beat
-- Say that this worker is alive.
INSERT INTO workers (instance_id, seen_at) VALUES ($1, now())
ON CONFLICT (instance_id) DO UPDATE SET seen_at = now()

-- name: get_input_files
-- The uploads of many claimed jobs, in their order.
SELECT * FROM files WHERE request_id = ANY($1::uuid[]) AND role = 'input' ORDER BY position

-- name: set_classified
-- Record the kind that a claimed job turned out to have.
UPDATE requests SET kind = $3, classified_by = $4, classified_reason = $5, version = version + 1
WHERE id = $1 AND claim = $2 AND coalesce(status = 'queued', false)
RETURNING id

-- name: begin_running
-- Mark admitted jobs as running, with their attempts; a repeat under one claim adds no second one.
WITH begun AS (
    UPDATE requests r SET
        status = 'running',
        attempts = r.attempts + (r.status = 'queued')::integer,
        attempt_id = CASE WHEN r.status = 'queued' THEN row.attempt_id ELSE r.attempt_id END,
        attempt_at = CASE WHEN r.status = 'queued' THEN now() ELSE r.attempt_at END,
        admitted_at = row.admitted_at,
        queue_ms = row.queue_ms,
        used_model = row.model,
        version = r.version + 1
    FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, attempt_id uuid, model text,
        admitted_at timestamptz, queue_ms double precision, fence_epoch bigint,
        fence_sequence bigint)
    WHERE r.id = row.id AND r.claim = row.claim AND coalesce(r.claimed_by = $2, false)
        AND (r.status = 'running' OR (r.status = 'queued' AND r.cancel_asked_at IS NULL))
    RETURNING r.id, r.attempt_id, r.attempt_at, r.tenant_id, r.pool, r.kind, r.attempts, r.claim,
        row.model, row.fence_epoch, row.fence_sequence, row.admitted_at, row.queue_ms
), attempted AS (
    INSERT INTO attempts (id, created_at, request_id, tenant_id, pool, kind, number, claim,
        instance_id, model, fence_epoch, fence_sequence, outcome, admitted_at, queue_ms)
    SELECT attempt_id, attempt_at, id, tenant_id, pool, kind,
        -- Some of a job that was claimed before may not be counted.
        CASE WHEN claim = 1 THEN attempts ELSE greatest(attempts, 1 + (
            SELECT count(*) FROM attempts a WHERE a.request_id = begun.id)) END, claim,
        $2, model, fence_epoch, fence_sequence, 'running', admitted_at, queue_ms
    FROM begun
    ON CONFLICT (id, created_at) DO UPDATE SET fence_epoch = excluded.fence_epoch,
        fence_sequence = excluded.fence_sequence, model = excluded.model,
        admitted_at = excluded.admitted_at, queue_ms = excluded.queue_ms
)
SELECT id FROM begun

-- name: running_attempt
-- The attempt under way of job $1 under claim $2 of worker $3.
SELECT attempt_id, attempt_at FROM requests
WHERE id = $1 AND claim = $2 AND claimed_by = $3 AND status = 'running' FOR UPDATE

-- name: begin_another
-- Begin another attempt $2 of the running job $1 beside the last one, which uses up $3 more.
WITH begun AS (
    UPDATE requests SET attempts = attempts + $3, attempt_id = $2, attempt_at = now(),
        version = version + 1
    WHERE id = $1
    RETURNING *
)
INSERT INTO attempts (id, created_at, request_id, tenant_id, pool, kind, number, claim,
    instance_id, model, fence_epoch, fence_sequence, outcome, admitted_at, queue_ms)
SELECT $2, now(), id, tenant_id, pool, kind,
    1 + (SELECT count(*) FROM attempts a WHERE a.request_id = begun.id), claim,
    $4, $5, $6, $7, 'running', $8, queue_ms
FROM begun

-- name: add_attempts
-- Insert attempts that have ended.
INSERT INTO attempts (id, created_at, request_id, tenant_id, pool, kind, number, claim,
    instance_id, model, fence_epoch, fence_sequence, outcome, admitted_at, finished_at, queue_ms,
    upstream_ms, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens,
    finish_reason, model_version, response_id, failure, first_byte_ms)
SELECT id, coalesce(created_at, now()), request_id, tenant_id, pool, kind, number, claim,
    instance_id, model, fence_epoch, fence_sequence, outcome, admitted_at, finished_at, queue_ms,
    upstream_ms, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens,
    finish_reason, model_version, response_id, failure, first_byte_ms
FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, request_id uuid,
    tenant_id text, pool text, kind text, number integer, claim bigint, instance_id text,
    model text, fence_epoch bigint, fence_sequence bigint, outcome text, admitted_at timestamptz,
    finished_at timestamptz, queue_ms double precision, upstream_ms double precision,
    input_tokens bigint, output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint,
    total_tokens bigint, finish_reason text, model_version text, response_id text, failure jsonb,
    first_byte_ms double precision)

-- name: end_requests
-- Bring claimed jobs to their end state with all that is known of them.
UPDATE requests r SET
    status = row.status,
    finished_at = row.finished_at,
    admitted_at = coalesce(row.admitted_at, r.admitted_at),
    queue_ms = coalesce(row.queue_ms, r.queue_ms),
    upstream_ms = row.upstream_ms,
    first_byte_ms = row.first_byte_ms,
    used_model = coalesce(row.model, r.used_model),
    result = row.result,
    input_tokens = row.input_tokens,
    output_tokens = row.output_tokens,
    thoughts_tokens = row.thoughts_tokens,
    cached_tokens = row.cached_tokens,
    total_tokens = row.total_tokens,
    finish_reason = row.finish_reason,
    failure = row.failure,
    claimed_by = NULL,
    not_before = NULL,
    version = r.version + 1
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, status text,
    finished_at timestamptz, admitted_at timestamptz, queue_ms double precision,
    upstream_ms double precision, model text, result text, input_tokens bigint,
    output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint,
    finish_reason text, failure jsonb, first_byte_ms double precision)
WHERE r.id = row.id AND r.claim = row.claim AND r.status IN ('queued', 'running')
RETURNING r.*

-- name: retry_requests
-- Put claimed jobs back into the queue, not before a given time; `uncounted` attempts are given again.
UPDATE requests r SET
    status = 'queued',
    attempts = r.attempts - CASE WHEN r.status = 'running' THEN coalesce(row.uncounted, 0) ELSE 0 END,
    claim = r.claim + 1,
    claimed_by = NULL,
    not_before = row.not_before,
    failure = row.failure,
    upstream_ms = row.upstream_ms,
    first_byte_ms = row.first_byte_ms,
    version = r.version + 1
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, not_before timestamptz,
    failure jsonb, upstream_ms double precision, first_byte_ms double precision, uncounted integer)
WHERE r.id = row.id AND r.claim = row.claim AND r.status IN ('queued', 'running')
RETURNING r.*

-- name: already_written
-- Which of these writes were committed before, by a try whose reply was lost.
SELECT r.id
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, status text)
JOIN requests r ON r.id = row.id
WHERE (r.claim = row.claim AND r.status = row.status AND row.status <> 'queued')
    OR (r.claim = row.claim + 1 AND row.status = 'queued' AND r.status = 'queued')

-- name: end_attempts
-- Record how attempts ended.
UPDATE attempts a SET
    outcome = row.outcome,
    finished_at = row.finished_at,
    upstream_ms = row.upstream_ms,
    first_byte_ms = row.first_byte_ms,
    input_tokens = row.input_tokens,
    output_tokens = row.output_tokens,
    thoughts_tokens = row.thoughts_tokens,
    cached_tokens = row.cached_tokens,
    total_tokens = row.total_tokens,
    finish_reason = row.finish_reason,
    model_version = row.model_version,
    response_id = row.response_id,
    failure = row.failure
FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, outcome text,
    finished_at timestamptz, upstream_ms double precision, input_tokens bigint,
    output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint,
    finish_reason text, model_version text, response_id text, failure jsonb,
    first_byte_ms double precision)
WHERE a.id = row.id AND a.created_at = row.created_at

-- name: add_bodies
-- Append the bodies of audit rows: inline as base64, or the key of a blob.
INSERT INTO bodies (id, role, tenant_id, pool, encoding, size_bytes, data, blob_key)
SELECT id, role, tenant_id, pool, encoding, size_bytes, decode(data, 'base64'), blob_key
FROM json_to_recordset($1::json) AS row (id uuid, role text, tenant_id text, pool text,
    encoding text, size_bytes bigint, data text, blob_key text)

-- name: hand_back
-- Release claims, as a worker that stops does, or for `wait_ms`; not counted as lapses.
UPDATE requests r SET status = 'queued', claim = r.claim + 1, claimed_by = NULL,
    not_before = now() + row.wait_ms * interval '1 millisecond',
    failure = coalesce(row.failure, r.failure),
    version = r.version + (r.status = 'running')::integer
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, wait_ms double precision,
    failure jsonb), requests old
WHERE r.id = row.id AND r.claim = row.claim AND r.status IN ('queued', 'running') AND old.id = r.id
RETURNING r.*, old.status AS old_status

-- name: release_strays
-- Give up claims of worker $1 that it does not know of: their replies were lost.
UPDATE requests SET claim = claim + 1, claimed_by = NULL
WHERE id IN (
    SELECT id FROM requests
    WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
        AND claimed_by = $1 AND coalesce(status = 'queued', false) AND NOT (id = ANY($2::uuid[]))
    FOR UPDATE SKIP LOCKED
)
RETURNING id, pool

-- name: leave
-- Forget this worker; what it still had in the queue is ready again.
WITH returned AS (
    UPDATE requests SET claim = claim + 1, claimed_by = NULL
    WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
        AND claimed_by = $1 AND coalesce(status = 'queued', false)
    RETURNING pool
), gone AS (
    DELETE FROM workers WHERE instance_id = $1
)
SELECT DISTINCT pool FROM returned

-- name: silent_workers
-- Workers not seen for $1 milliseconds, counted from the server's own start at the latest.
SELECT instance_id, seen_at FROM workers
WHERE greatest(seen_at, pg_postmaster_start_time()) < now() - $1 * interval '1 millisecond'

-- name: unknown_holders
-- Who holds jobs and is not known as a worker.
WITH RECURSIVE holders AS (
    (SELECT claimed_by FROM requests
        WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
        ORDER BY claimed_by LIMIT 1)
    UNION ALL
    SELECT (SELECT r.claimed_by FROM requests r
        WHERE coalesce(r.status IN ('queued', 'running') AND r.claimed_by IS NOT NULL, false)
            AND r.claimed_by > holders.claimed_by
        ORDER BY r.claimed_by LIMIT 1)
    FROM holders WHERE holders.claimed_by IS NOT NULL
)
SELECT claimed_by FROM holders
WHERE claimed_by IS NOT NULL AND NOT EXISTS (
    SELECT 1 FROM workers w WHERE w.instance_id = holders.claimed_by)
    AND pg_postmaster_start_time() < now() - $1 * interval '1 millisecond'

-- name: lock_lapsed
-- Jobs of the workers $1, which have not been seen since $2 milliseconds ago; up to 500.
SELECT id FROM requests
WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
    AND claimed_by = ANY($1::text[]) AND NOT EXISTS (
        SELECT 1 FROM workers w WHERE w.instance_id = claimed_by
            AND greatest(w.seen_at, pg_postmaster_start_time())
                >= now() - $2 * interval '1 millisecond')
ORDER BY id LIMIT 500
FOR UPDATE OF requests SKIP LOCKED

-- name: retake
-- Return locked, lapsed jobs to the queue; a running one lapses, and at $2 lapses it is dead.
-- Those that lapsed together twice come apart for the last time: one of them may be deadly to all.
UPDATE requests r SET
    claim = r.claim + 1,
    claimed_by = NULL,
    lapses = r.lapses + (r.status = 'running')::integer,
    status = CASE WHEN r.status = 'running' AND r.lapses + 1 >= $2 THEN 'dead' ELSE 'queued' END,
    finished_at = CASE WHEN r.status = 'running' AND r.lapses + 1 >= $2 THEN now() END,
    failure = CASE WHEN r.status = 'running' AND r.lapses + 1 >= $2 THEN $3::jsonb
        ELSE r.failure END,
    not_before = CASE WHEN r.status = 'running' AND r.lapses = $2 - 2
        THEN now() + random() * interval '30 seconds' ELSE r.not_before END,
    version = r.version + (r.status = 'running')::integer
FROM requests old
WHERE r.id = ANY($1::uuid[]) AND old.id = r.id
RETURNING r.*, old.status AS old_status

-- name: expire_due
-- End up to 500 queued jobs whose deadline passed in the last $2 seconds, claimed or not.
UPDATE requests SET status = 'expired', claim = claim + 1, claimed_by = NULL, not_before = NULL,
    finished_at = now(), failure = $1::jsonb, version = version + 1
WHERE id IN (
    SELECT id FROM requests WHERE coalesce(status = 'queued' AND deadline_at IS NOT NULL, false)
        AND deadline_at <= now() AND deadline_at > now() - $2 * interval '1 second'
    ORDER BY deadline_at LIMIT 500 FOR UPDATE SKIP LOCKED
)
RETURNING *

-- name: requeue_dead
-- A person's decision: a dead job gets a fresh start.
UPDATE requests SET status = 'queued', lapses = 0, claim = claim + 1, claimed_by = NULL,
    failure = NULL, finished_at = NULL, not_before = NULL, cancel_asked_at = NULL,
    version = version + 1
WHERE id = $1 AND status = 'dead'
RETURNING pool

-- name: notify
-- Wake listeners; sent apart from the change itself, since NOTIFY takes an instance-wide lock.
SELECT pg_notify(channel, payload)
FROM json_to_recordset($1::json) AS row (channel text, payload text)

-- name: prune_candidates
-- Ended requests older than $1, oldest first, at most $2, of all tenants but $3.
SELECT id FROM requests WHERE status NOT IN ('queued', 'running') AND finished_at < $1
    AND NOT (tenant_id = ANY($3::text[]))
ORDER BY finished_at LIMIT $2

-- name: blobs_of_requests
-- The blobs of the files of many requests.
SELECT blob_key FROM files WHERE request_id = ANY($1::uuid[])

-- name: delete_requests
-- Delete ended requests with their files.
DELETE FROM requests WHERE id = ANY($1::uuid[]) AND status NOT IN ('queued', 'running')

-- name: forget_workers
-- Forget workers that have long been gone and hold nothing.
DELETE FROM workers w WHERE seen_at < $1 AND NOT EXISTS (
    SELECT 1 FROM requests r
    WHERE coalesce(r.status IN ('queued', 'running') AND r.claimed_by IS NOT NULL, false)
        AND r.claimed_by = w.instance_id)

-- name: blobs_in_use
-- Which of these blobs are still referred to.
SELECT blob_key FROM files WHERE blob_key = ANY($1::text[]) UNION ALL
SELECT blob_key FROM bodies WHERE blob_key = ANY($1::text[]) UNION ALL
SELECT blob_key FROM batch_files WHERE blob_key = ANY($1::text[]) UNION ALL
SELECT input_blob FROM batches WHERE input_blob = ANY($1::text[]) AND status = 'validating'
