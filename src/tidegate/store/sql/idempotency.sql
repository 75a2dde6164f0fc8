-- Idempotency keys of native calls, with their owners and answers; and of batches, where the request is
-- the batch.

-- name: take_native_key
-- Take key $2 of tenant $1 for request $4, if it is new, a day old or has lapsed.
-- It has lapsed, for the same digest $3, if its owner has not renewed it for $5 seconds (null: never).
-- Older processes do not renew keys, and none of their calls takes longer than 11 minutes.
INSERT INTO native_keys AS known (tenant_id, idempotency_key, digest, request_id, seen_at)
VALUES ($1, $2, $3, $4, now())
ON CONFLICT (tenant_id, idempotency_key) DO UPDATE SET digest = excluded.digest,
    request_id = excluded.request_id, created_at = now(), seen_at = now(), ended_at = NULL,
    http_status = NULL, content_type = NULL, answer = NULL,
    lost = CASE WHEN known.created_at >= now() - interval '24 hours' THEN known.request_id END
WHERE known.created_at < now() - interval '24 hours'
    OR (known.ended_at IS NULL AND known.digest = excluded.digest
        AND CASE WHEN known.seen_at >= known.created_at THEN known.seen_at
            ELSE known.created_at + interval '11 minutes' END
            < now() - make_interval(secs => $5))
RETURNING lost

-- name: get_native_key
-- Return a key that is less than a day old, and whether it has lapsed after $3 seconds.
SELECT digest, request_id, lost, ended_at IS NOT NULL AS ended, http_status, content_type, answer,
    ended_at IS NULL AND coalesce(
        CASE WHEN seen_at >= created_at THEN seen_at ELSE created_at + interval '11 minutes' END
            < now() - make_interval(secs => $3), false) AS lapsed
FROM native_keys
WHERE tenant_id = $1 AND idempotency_key = $2 AND created_at >= now() - interval '24 hours'

-- name: end_native_key
-- Store the answer of request $3 under its key.
UPDATE native_keys SET ended_at = now(), http_status = $4, content_type = $5, answer = $6
WHERE tenant_id = $1 AND idempotency_key = $2 AND request_id = $3 AND ended_at IS NULL

-- name: end_native_keys
-- Store the answers of many requests under their keys, from JSON.
UPDATE native_keys known SET ended_at = now(), http_status = row.http_status,
    content_type = row.content_type, answer = decode(row.answer, 'base64')
FROM jsonb_to_recordset($1::jsonb) AS row(
    id uuid, tenant_id text, idempotency_key text, http_status integer, content_type text,
    answer text)
WHERE known.tenant_id = row.tenant_id AND known.idempotency_key = row.idempotency_key
    AND known.request_id = row.id AND known.ended_at IS NULL

-- name: free_native_keys
-- Delete the keys of requests that were not answered, so that a repeat is processed.
DELETE FROM native_keys known
USING jsonb_to_recordset($1::jsonb) AS row(id uuid, tenant_id text, idempotency_key text)
WHERE known.tenant_id = row.tenant_id AND known.idempotency_key = row.idempotency_key
    AND known.request_id = row.id AND known.ended_at IS NULL

-- name: renew_native_keys
-- Renew the keys of requests that are in progress.
UPDATE native_keys known SET seen_at = now()
FROM unnest($1::text[], $2::text[], $3::uuid[]) AS mine(tenant_id, idempotency_key, request_id)
WHERE known.tenant_id = mine.tenant_id AND known.idempotency_key = mine.idempotency_key
    AND known.request_id = mine.request_id AND known.ended_at IS NULL
RETURNING known.request_id
