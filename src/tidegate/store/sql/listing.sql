-- Statements that list a tenant's own requests: see listing.py. Jobs and streams are in `requests`,
-- native calls in `audit`; each side gives as many as are looked at, and both are merged.

-- name: list_requests
-- Requests of tenant $1 in [$2, $3) before ($4, $5), newest first: $10 that match of $11 looked at.
SELECT * FROM (
    (SELECT id, source, status, kind, coalesce(used_model, model) AS model, priority, attempts,
        created_at, admitted_at, finished_at, queue_ms, upstream_ms, total_tokens,
        failure ->> 'code' AS failure_code
    FROM requests
    WHERE tenant_id = $1 AND created_at >= $2 AND created_at < $3
        AND (created_at, id) < ($4, $5::uuid)
    ORDER BY created_at DESC, id DESC
    LIMIT $11)
    UNION ALL
    (SELECT id, source, status, kind, model, priority, attempts,
        created_at, admitted_at, finished_at, queue_ms, upstream_ms, total_tokens,
        failure ->> 'code' AS failure_code
    FROM audit
    WHERE source = 'relay' AND tenant_id = $1 AND created_at >= $2 AND created_at < $3
        AND (created_at, id) < ($4, $5::uuid)
    ORDER BY created_at DESC, id DESC
    LIMIT $11)
    ORDER BY created_at DESC, id DESC
    LIMIT $11
) AS looked_at
WHERE ($6::text IS NULL OR status = $6) AND ($7::text IS NULL OR kind = $7)
    AND ($8::text IS NULL OR model = $8) AND ($9::text IS NULL OR source = $9)
ORDER BY created_at DESC, id DESC
LIMIT $10

-- name: list_reach
-- The last of the $6 requests that `list_requests` looks at, where there are that many.
SELECT created_at, id FROM (
    (SELECT created_at, id FROM requests
    WHERE tenant_id = $1 AND created_at >= $2 AND created_at < $3
        AND (created_at, id) < ($4, $5::uuid)
    ORDER BY created_at DESC, id DESC
    LIMIT $6)
    UNION ALL
    (SELECT created_at, id FROM audit
    WHERE source = 'relay' AND tenant_id = $1 AND created_at >= $2 AND created_at < $3
        AND (created_at, id) < ($4, $5::uuid)
    ORDER BY created_at DESC, id DESC
    LIMIT $6)
) AS looked_at
ORDER BY created_at DESC, id DESC
OFFSET $6 - 1 LIMIT 1
