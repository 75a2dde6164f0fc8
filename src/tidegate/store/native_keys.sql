-- Idempotency keys of native calls: who is answering, and what was answered; and of batches, whose
-- request is the batch. See native_keys.py.

-- name: take_native_key
-- Take key $2 of tenant $1 for request $4: a new one, one a day old, or one left open for $5 seconds.
INSERT INTO native_keys AS known (tenant_id, idempotency_key, digest, request_id)
VALUES ($1, $2, $3, $4)
ON CONFLICT (tenant_id, idempotency_key) DO UPDATE SET digest = excluded.digest,
    request_id = excluded.request_id, created_at = now(), ended_at = NULL, http_status = NULL,
    content_type = NULL, answer = NULL
WHERE known.created_at < now() - interval '24 hours'
    OR (known.ended_at IS NULL AND known.created_at < now() - make_interval(secs => $5))
RETURNING request_id

-- name: get_native_key
-- What is known of a key that is not a day old.
SELECT digest, request_id, ended_at IS NOT NULL AS ended, http_status, content_type, answer
FROM native_keys
WHERE tenant_id = $1 AND idempotency_key = $2 AND created_at >= now() - interval '24 hours'

-- name: end_native_key
-- Keep the answer that request $3 gave under its key.
UPDATE native_keys SET ended_at = now(), http_status = $4, content_type = $5, answer = $6
WHERE tenant_id = $1 AND idempotency_key = $2 AND request_id = $3

-- name: free_native_key
-- Give up the key of request $3, which was not answered: who asks again is to be answered.
DELETE FROM native_keys
WHERE tenant_id = $1 AND idempotency_key = $2 AND request_id = $3 AND ended_at IS NULL

-- name: forget_native_keys
-- Forget keys that nobody can use any more.
DELETE FROM native_keys WHERE created_at < now() - interval '24 hours'
