-- Submission, cancellation by owners, and the number of queued jobs of a tenant.

-- name: add_files
-- Insert the files of requests written in the same transaction.
INSERT INTO files (id, request_id, tenant_id, role, position, name, mime_type, size_bytes, blob_key)
SELECT id, request_id, tenant_id, role, position, name, mime_type, size_bytes, blob_key
FROM json_to_recordset($1::json) AS row (id uuid, request_id uuid, tenant_id text, role text,
    position integer, name text, mime_type text, size_bytes bigint, blob_key text)
ON CONFLICT (id) DO NOTHING

-- name: queued_of_batches
-- Count the lines that batches of tenant $1 have not completed, and their part of the input's bytes.
SELECT coalesce(sum(total - completed - failed), 0)::bigint AS jobs, coalesce(sum(ceil(
    input_bytes * (total - completed - failed)::numeric / greatest(total, 1))), 0)::bigint AS size_bytes
FROM batches WHERE tenant_id = $1 AND status IN ('validating', 'in_progress')

-- name: lock_owned
-- Lock request $1 of tenant $2 against concurrent changes.
SELECT status, claimed_by FROM requests WHERE id = $1 AND tenant_id = $2 FOR UPDATE

-- name: cancel_queued
-- Cancel queued job $1; its claim is fenced off.
UPDATE requests SET status = 'cancelled', claim = claim + 1, claimed_by = NULL, not_before = NULL,
    finished_at = now(), failure = $2::jsonb, version = version + 1
WHERE id = $1 AND coalesce(status = 'queued', false)
RETURNING *

-- name: request_cancel
-- Request the worker of running job $1 to cancel it.
UPDATE requests SET cancel_asked_at = coalesce(cancel_asked_at, now())
WHERE id = $1 AND status = 'running'

-- name: cancelled_of_worker
-- Return the jobs that worker $1 must stop: running jobs, and those of $2 cancelled while queued.
SELECT id FROM requests
WHERE coalesce(status IN ('queued', 'running') AND cancel_asked_at IS NOT NULL, false)
    AND coalesce(status = 'running', false) AND claimed_by = $1
UNION
SELECT id FROM requests WHERE id = ANY($2::uuid[]) AND status = 'cancelled'

-- name: lock_queued
-- Return and lock the last count of the jobs that tenant $1 has queued in pool $2.
SELECT jobs, size_bytes,
    extract(epoch FROM clock_timestamp() - counted_at)::double precision * 1000 AS age_ms, count_ms
FROM queued WHERE tenant_id = $1 AND pool = $2
FOR UPDATE

-- name: begin_queued
-- Insert the row to lock, old enough to be counted immediately.
INSERT INTO queued (tenant_id, pool, jobs, size_bytes, counted_at, count_ms)
VALUES ($1, $2, 0, 0, 'epoch', 0)
ON CONFLICT (tenant_id, pool) DO NOTHING

-- name: count_queued
-- Count the ready jobs of tenant $1 in pool $2, in the lanes $3, at most $4 in each.
SELECT count(*) AS jobs FROM unnest($3::text[]) AS lanes (lane) CROSS JOIN LATERAL (
    SELECT id FROM requests
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false)
        AND pool || '/' || lane || '/' || tenant_id = $2 || '/' || lanes.lane || '/' || $1
    LIMIT $4
) AS ready

-- name: count_queued_bytes
-- Count the same jobs with the bytes of their prompts and files.
SELECT count(*) AS jobs, coalesce(sum(ready.size_bytes + coalesce((
    SELECT sum(f.size_bytes) FROM files f WHERE f.request_id = ready.id AND f.role = 'input'
), 0)), 0)::bigint AS size_bytes
FROM unnest($3::text[]) AS lanes (lane) CROSS JOIN LATERAL (
    SELECT id, octet_length(prompt) AS size_bytes FROM requests
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false)
        AND pool || '/' || lane || '/' || tenant_id = $2 || '/' || lanes.lane || '/' || $1
    LIMIT $4
) AS ready

-- name: add_arrivals
-- Record the jobs $3 of tenant $1 that were admitted to pool $2, until they are stored.
INSERT INTO queue_arrivals (id, tenant_id, pool, jobs, size_bytes)
SELECT id, $1, $2, jobs, size_bytes
FROM json_to_recordset($3::json) AS row (id uuid, jobs bigint, size_bytes bigint)
ON CONFLICT (id) DO NOTHING

-- name: end_arrivals
-- Forget admitted jobs that are stored in the same transaction.
DELETE FROM queue_arrivals WHERE id = ANY($1::uuid[])

-- name: fail_arrivals
-- Forget admitted jobs whose storing failed in ten seconds: they may still be stored.
UPDATE queue_arrivals SET admitted_at = least(admitted_at, now() - interval '110 seconds')
WHERE id = ANY($1::uuid[])

-- name: count_arrivals
-- Count the jobs of tenant $1 that were admitted to pool $2 and are not stored yet; forget those that never will be.
WITH lost AS (
    DELETE FROM queue_arrivals
    WHERE tenant_id = $1 AND pool = $2 AND admitted_at < now() - interval '2 minutes'
)
SELECT coalesce(sum(jobs), 0)::bigint AS jobs, coalesce(sum(size_bytes), 0)::bigint AS size_bytes
FROM queue_arrivals
WHERE tenant_id = $1 AND pool = $2 AND admitted_at >= now() - interval '2 minutes'

-- name: count_batched
-- Count the jobs and bytes of tenant $1 in pool $2 that wait for a provider's batch or are in one.
SELECT count(*) AS jobs, coalesce(sum(octet_length(one.prompt) + coalesce((
    SELECT sum(f.size_bytes) FROM files f WHERE f.request_id = one.id AND f.role = 'input'
), 0)), 0)::bigint AS size_bytes
FROM (
    SELECT id, prompt FROM requests
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND tier = 'batch', false)
        AND pool = $2 AND tenant_id = $1 AND not_before IS NOT NULL
    UNION ALL
    SELECT id, prompt FROM requests
    WHERE coalesce(status = 'running' AND claimed_by IS NULL AND tier = 'batch', false)
        AND pool = $2 AND tenant_id = $1
) AS one

-- name: set_tiers
-- Record the processing tiers of claimed jobs that wait for admission.
UPDATE requests r SET tier = row.tier, tier_why = row.tier_why, version = r.version + 1
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, tier text, tier_why text)
WHERE r.id = row.id AND r.claim = row.claim AND coalesce(r.status = 'queued', false)
RETURNING r.id

-- name: set_queued
-- Store the number of jobs that tenant $1 has queued in pool $2, and the duration of a count.
UPDATE queued SET jobs = $3, size_bytes = $4,
    counted_at = CASE WHEN $5::double precision IS NULL THEN counted_at ELSE clock_timestamp() END,
    count_ms = coalesce($5, count_ms)
WHERE tenant_id = $1 AND pool = $2

-- name: submit_requests
-- Insert many jobs; rows whose id or key exists are left out, so repeats are safe.
INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by, classified_reason,
    prompt, image_uri, model, priority, created_at, deadline_at, idempotency_key,
    idempotency_digest, webhook_url, subject, conversation, key_id, endpoint, traceparent,
    tiers_allowed, repeats, bound_upstream)
SELECT id, tenant_id, pool, 'job', 'queued', kind, classified_by, classified_reason,
    prompt, image_uri, model, priority, created_at, deadline_at, idempotency_key,
    decode(idempotency_digest, 'hex'), webhook_url, subject, conversation, key_id, endpoint,
    traceparent, tiers_allowed, repeats, bound_upstream
FROM json_to_recordset($1::json) AS row (id uuid, tenant_id text, pool text, kind text,
    classified_by text, classified_reason text, prompt text, image_uri text, model text,
    priority integer, created_at timestamptz, deadline_at timestamptz, idempotency_key text,
    idempotency_digest text, webhook_url text, subject text, conversation text, key_id text,
    endpoint text, traceparent text, tiers_allowed text[], repeats uuid, bound_upstream text)
ON CONFLICT DO NOTHING

-- name: get_keyed
-- Return the requests that have these idempotency keys of their tenants.
SELECT r.id, r.tenant_id, r.idempotency_key, encode(r.idempotency_digest, 'hex') AS digest,
    r.status, r.kind, r.classified_by, r.classified_reason
FROM json_to_recordset($1::json) AS row (tenant_id text, idempotency_key text)
JOIN requests r ON r.tenant_id = row.tenant_id AND r.idempotency_key = row.idempotency_key
