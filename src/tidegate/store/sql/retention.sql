-- Expiry and erasure. {partition} is the name of a partition, never text of a caller.

-- name: prune_candidates
-- Return at most $2 requests that ended from $4 until $1, oldest first, without the tenants $3.
SELECT id, finished_at FROM requests WHERE status NOT IN ('queued', 'running') AND finished_at < $1
    AND finished_at >= $4 AND NOT (tenant_id = ANY($3::text[]))
ORDER BY finished_at LIMIT $2

-- name: blobs_of_requests
-- Return the blobs of the files of many requests.
SELECT blob_key FROM files WHERE request_id = ANY($1::uuid[])

-- name: delete_requests
-- Delete ended requests with their files.
DELETE FROM requests WHERE id = ANY($1::uuid[]) AND status NOT IN ('queued', 'running')

-- name: forget_workers
-- Delete workers that are gone for long and hold nothing.
DELETE FROM workers w WHERE seen_at < $1 AND NOT EXISTS (
    SELECT 1 FROM requests r
    WHERE coalesce(r.status IN ('queued', 'running') AND r.claimed_by IS NOT NULL, false)
        AND r.claimed_by = w.instance_id)

-- name: blobs_in_use
-- Return which of these blobs are still in use.
SELECT blob_key FROM files WHERE blob_key = ANY($1::text[]) UNION ALL
SELECT blob_key FROM bodies WHERE blob_key = ANY($1::text[]) UNION ALL
SELECT blob_key FROM batch_files WHERE blob_key = ANY($1::text[]) UNION ALL
SELECT input_blob FROM batches WHERE input_blob = ANY($1::text[]) AND status = 'validating'

-- name: batches_ended_before
-- Return at most $2 batches that ended before $1, oldest first.
-- They belong to the tenants $3, or to all others if not $4.
SELECT id FROM batches
WHERE greatest(completed_at, failed_at, expired_at, cancelled_at) < $1
    AND (tenant_id = ANY($3::text[])) = $4
ORDER BY id LIMIT $2

-- name: delete_batches
-- Delete ended batches.
DELETE FROM batches WHERE id = ANY($1::uuid[])

-- name: old_batch_files
-- Return at most $2 files older than $1 that no batch has yet to read.
-- They belong to the tenants $3, or to all others if not $4.
SELECT f.id, f.blob_key FROM batch_files f
WHERE f.created_at < $1 AND (f.tenant_id = ANY($3::text[])) = $4 AND NOT EXISTS (
    SELECT 1 FROM batches b WHERE b.status = 'validating' AND b.input_blob = f.blob_key)
ORDER BY f.id LIMIT $2

-- name: delete_batch_files
-- Delete files whose blobs are deleted.
DELETE FROM batch_files WHERE id = ANY($1::uuid[])

-- name: scan_requests
-- Scan the $4 requests after $1: return the last one, and those of tenant $2 and subject $3 if given.
SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id) FILTER (WHERE
    ($2::text IS NULL OR tenant_id = $2) AND ($3::text IS NULL OR subject = $3)) AS found
FROM (SELECT id, tenant_id, subject FROM requests WHERE id > $1 ORDER BY id LIMIT $4) AS next

-- name: scan_audit
-- Scan the audit in the same way, and return the requests of the rows too.
SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id ORDER BY id) FILTER (WHERE
    ($2::text IS NULL OR tenant_id = $2) AND ($3::text IS NULL OR subject = $3)) AS found,
    array_agg(request_id ORDER BY id) FILTER (WHERE
    ($2::text IS NULL OR tenant_id = $2) AND ($3::text IS NULL OR subject = $3)) AS requests
FROM (SELECT id, request_id, tenant_id, subject FROM audit WHERE id > $1 ORDER BY id LIMIT $4)
    AS next

-- name: blobs_of_bodies
-- Return the blobs of the bodies of many audit rows.
SELECT blob_key FROM bodies WHERE id = ANY($1::uuid[]) AND blob_key IS NOT NULL

-- name: erase_requests
-- Delete requests in any state, with their files and webhooks.
DELETE FROM requests WHERE id = ANY($1::uuid[])

-- name: erase_attempts
-- Delete all attempts of many requests.
DELETE FROM attempts WHERE request_id = ANY($1::uuid[])

-- name: erase_bodies
-- Delete the bodies of many audit rows.
DELETE FROM bodies WHERE id = ANY($1::uuid[])

-- name: erase_audit
-- Delete audit rows.
DELETE FROM audit WHERE id = ANY($1::uuid[])

-- name: erase_native_keys
-- Delete the answers stored under idempotency keys of many native calls.
DELETE FROM native_keys WHERE request_id = ANY($1::uuid[])

-- name: batches_of_tenant
-- Return at most $2 batches of tenant $1 in any state.
SELECT id FROM batches WHERE tenant_id = $1 ORDER BY id LIMIT $2

-- name: count_batches
-- Count the batches of tenant $1, and their files.
SELECT (SELECT count(*) FROM batches WHERE tenant_id = $1) AS batches,
    (SELECT count(*) FROM batch_files WHERE tenant_id = $1) AS files

-- name: batch_files_of_tenant
-- Return at most $2 input and output files of batches of tenant $1.
SELECT id, blob_key FROM batch_files WHERE tenant_id = $1 ORDER BY id LIMIT $2

-- name: forget_native_keys
-- Delete expired idempotency keys.
DELETE FROM native_keys WHERE created_at < now() - interval '24 hours'

-- name: walk_partition
-- Scan the $5 rows after $1: return the last one, and those created before $4 to be deleted.
-- They belong to the tenants $2, or to all others if not $3.
SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id) FILTER (WHERE
    (tenant_id = ANY($2::text[])) = $3 AND ($4::timestamptz IS NULL OR created_at < $4)) AS found
FROM (SELECT id, tenant_id, created_at FROM {partition} WHERE id > $1 ORDER BY id LIMIT $5) AS next

-- name: delete_rows
-- Delete rows of a partition.
DELETE FROM {partition} WHERE id = ANY($1::uuid[])

-- name: blobs_of_rows
-- Return the blobs of some rows of a partition of bodies.
SELECT blob_key FROM {partition} WHERE id = ANY($1::uuid[]) AND blob_key IS NOT NULL

-- name: blobs_of_partition
-- Return the blobs of all rows of a partition of bodies.
SELECT blob_key FROM {partition} WHERE blob_key IS NOT NULL

-- name: own_retention
-- Return the tenants with a retention other than $1 days.
SELECT id, retention_days FROM tenants WHERE retention_days <> $1

-- name: count_erasures
-- Count the erasures by tenant, including those of its subjects; null: of a subject of all tenants.
SELECT tenant_id, count(*) AS erasures FROM erased GROUP BY tenant_id

-- name: prune_candidates_of
-- Return at most $2 ended requests of tenant $3 older than $1, oldest first.
SELECT id FROM requests WHERE tenant_id = $3 AND created_at < $1
    AND status NOT IN ('queued', 'running') AND finished_at < $1
ORDER BY created_at LIMIT $2

-- name: days_on_record
-- Return past days in the audit: when each was last summed up, and whether it has changed since.
-- These are days with a partition, and later days with calls in the default partition. Earlier days are
-- incomplete in the audit and keep their files.
WITH parted AS (
    SELECT to_date(substring(c.relname FROM '[0-9]{8}$'), 'YYYYMMDD') AS day FROM pg_inherits i
    JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'audit'::regclass AND c.relname ~ '_[0-9]{8}$'
)
SELECT kept.day, s.summed_at, EXISTS (SELECT FROM changed_days c WHERE c.day = kept.day) AS has_changed
FROM (
    SELECT day FROM parted UNION SELECT (created_at AT TIME ZONE 'UTC')::date FROM audit_default
    WHERE (created_at AT TIME ZONE 'UTC')::date > (SELECT min(day) FROM parted)
) AS kept LEFT JOIN summed_days s ON s.day = kept.day
WHERE kept.day < (now() AT TIME ZONE 'UTC')::date
ORDER BY kept.day

-- name: state_of_day
-- Return a value that differs after the records of day $1 have changed.
SELECT (SELECT max(xid::text::bigint) FROM changed_days WHERE day = $1) AS changed,
    (SELECT summed_at FROM summed_days WHERE day = $1) AS summed_at

-- name: export_calls
-- Return the next $4 calls after row $3 that were recorded from $1 until $2.
SELECT id, created_at, request_id, tenant_id AS tenant, key_id AS key, subject, source, status, kind,
    model, model_version, coalesce(upstream, pool) AS upstream, endpoint, http_status, streamed,
    priority, attempts, submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, first_byte_ms,
    input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens, images, cost_micros,
    usage_state, usage_details, finish_reason, failure ->> 'code' AS error_code,
    failure ->> 'message' AS error_message, conversation, trace_id, response_id
FROM audit
WHERE created_at >= $1 AND created_at < $2 AND id > $3
ORDER BY id LIMIT $4

-- name: export_bodies
-- Return the bodies of the audit rows $1 that were recorded from $2 until $3.
SELECT id, role, encoding, data, blob_key FROM bodies
WHERE id = ANY($1::uuid[]) AND created_at >= $2 AND created_at < $3
