-- Who was erased, and what of theirs is deleted: see erased.py and erase.py.

-- name: lock_erased
-- Wait for all who have looked into the table and are not done with what they write.
LOCK TABLE erased IN ACCESS EXCLUSIVE MODE

-- name: add_erased
-- Have nothing of tenant $2 and subject $3 recorded any more that was received before now.
INSERT INTO erased (id, tenant_id, subject_digest) VALUES ($1, $2, $3)

-- name: get_erased
-- What was erased of the tenants $1 as a whole, or of the subjects with the digests $2.
SELECT tenant_id, subject_digest, erased_at FROM erased
WHERE (subject_digest IS NULL AND tenant_id = ANY($1::text[]))
    OR subject_digest = ANY($2::bytea[])

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
