-- What has expired or is to be erased. {partition} is the name of a partition, never text of a caller.

-- name: prune_candidates
-- Ended requests older than $1, from $4 on, oldest first, at most $2, of all tenants but $3.
SELECT id, finished_at FROM requests WHERE status NOT IN ('queued', 'running') AND finished_at < $1
    AND finished_at >= $4 AND NOT (tenant_id = ANY($3::text[]))
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

-- name: batches_ended_before
-- Batches that ended before $1, oldest first, at most $2; of the tenants $3, or where not $4 of all others.
SELECT id FROM batches
WHERE greatest(completed_at, failed_at, expired_at, cancelled_at) < $1
    AND (tenant_id = ANY($3::text[])) = $4
ORDER BY id LIMIT $2

-- name: delete_batches
-- Forget ended batches.
DELETE FROM batches WHERE id = ANY($1::uuid[])

-- name: old_batch_files
-- Files from before $1 that no batch has yet to read, at most $2; of the tenants $3, or of all others.
SELECT f.id, f.blob_key FROM batch_files f
WHERE f.created_at < $1 AND (f.tenant_id = ANY($3::text[])) = $4 AND NOT EXISTS (
    SELECT 1 FROM batches b WHERE b.status = 'validating' AND b.input_blob = f.blob_key)
ORDER BY f.id LIMIT $2

-- name: delete_batch_files
-- Forget files whose blobs are gone.
DELETE FROM batch_files WHERE id = ANY($1::uuid[])

-- name: scan_requests
-- Of the next $4 requests after $1: the last one, and those of tenant $2 and subject $3, where given.
SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id) FILTER (WHERE
    ($2::text IS NULL OR tenant_id = $2) AND ($3::text IS NULL OR subject = $3)) AS found
FROM (SELECT id, tenant_id, subject FROM requests WHERE id > $1 ORDER BY id LIMIT $4) AS next

-- name: scan_audit
-- The same of the audit, with the requests that its rows are of.
SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id ORDER BY id) FILTER (WHERE
    ($2::text IS NULL OR tenant_id = $2) AND ($3::text IS NULL OR subject = $3)) AS found,
    array_agg(request_id ORDER BY id) FILTER (WHERE
    ($2::text IS NULL OR tenant_id = $2) AND ($3::text IS NULL OR subject = $3)) AS requests
FROM (SELECT id, request_id, tenant_id, subject FROM audit WHERE id > $1 ORDER BY id LIMIT $4)
    AS next

-- name: blobs_of_bodies
-- The blobs of the bodies of many audit rows.
SELECT blob_key FROM bodies WHERE id = ANY($1::uuid[]) AND blob_key IS NOT NULL

-- name: erase_requests
-- Delete requests in whatever state, with their files and webhooks.
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
-- Delete the answers that were kept under idempotency keys of many native calls.
DELETE FROM native_keys WHERE request_id = ANY($1::uuid[])

-- name: batches_of_tenant
-- Batches of tenant $1 in whatever state, at most $2.
SELECT id FROM batches WHERE tenant_id = $1 ORDER BY id LIMIT $2

-- name: count_batches
-- How many batches tenant $1 has, and how many files for them.
SELECT (SELECT count(*) FROM batches WHERE tenant_id = $1) AS batches,
    (SELECT count(*) FROM batch_files WHERE tenant_id = $1) AS files

-- name: batch_files_of_tenant
-- Files for and of batches of tenant $1, at most $2.
SELECT id, blob_key FROM batch_files WHERE tenant_id = $1 ORDER BY id LIMIT $2

-- name: forget_native_keys
-- Forget keys that can not be used any more.
DELETE FROM native_keys WHERE created_at < now() - interval '24 hours'

-- name: walk_partition
-- Of the next $5 rows after $1: the last one, and those to delete: of the tenants $2, or where not $3 of all others, before $4.
SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id) FILTER (WHERE
    (tenant_id = ANY($2::text[])) = $3 AND ($4::timestamptz IS NULL OR created_at < $4)) AS found
FROM (SELECT id, tenant_id, created_at FROM {partition} WHERE id > $1 ORDER BY id LIMIT $5) AS next

-- name: delete_rows
-- Delete rows of a partition.
DELETE FROM {partition} WHERE id = ANY($1::uuid[])

-- name: blobs_of_rows
-- The blobs of rows of a partition of bodies.
SELECT blob_key FROM {partition} WHERE id = ANY($1::uuid[]) AND blob_key IS NOT NULL

-- name: blobs_of_partition
-- The blobs of all rows of a partition of bodies.
SELECT blob_key FROM {partition} WHERE blob_key IS NOT NULL

-- name: own_retention
-- Tenants whose requests are kept for other days than $1.
SELECT id, retention_days FROM tenants WHERE retention_days <> $1

-- name: count_erasures
-- How often each tenant's calls were erased, or a subject's of it; null: a subject's of all tenants.
SELECT tenant_id, count(*) AS erasures FROM erased GROUP BY tenant_id

-- name: prune_candidates_of
-- Ended requests of tenant $3 older than $1, oldest first, at most $2.
SELECT id FROM requests WHERE tenant_id = $3 AND created_at < $1
    AND status NOT IN ('queued', 'running') AND finished_at < $1
ORDER BY created_at LIMIT $2

-- name: days_on_record
-- Days that are over and have a partition, or calls in the default one that came after the first partition's day: when each was last summed up, and whether it has changed since. Of an earlier day the rest is gone: it keeps its file.
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
-- What differs once the record of the day $1 has changed.
SELECT (SELECT max(xid::text::bigint) FROM changed_days WHERE day = $1) AS changed,
    (SELECT summed_at FROM summed_days WHERE day = $1) AS summed_at

-- name: export_calls
-- The next $4 calls after row $3 that came on record for the times from $1 until $2.
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
-- The bodies of the audit rows $1 that came on record for the times from $2 until $3.
SELECT id, role, encoding, data, blob_key FROM bodies
WHERE id = ANY($1::uuid[]) AND created_at >= $2 AND created_at < $3
