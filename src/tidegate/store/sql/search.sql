-- Statements by which an operator finds requests of all tenants: see search.py. In the order of
-- ids, which begin with the time and are primary keys. `audit` has a row of its own for each job
-- and stream that has ended: they are looked at on the way, and left out.

-- name: search_requests
-- Requests with ids in [$1, $2), newest first: $3 that match the rest of $4 looked at.
SELECT id, tenant_id, pool, source, status, kind, model, priority, attempts, created_at,
    admitted_at, finished_at, queue_ms, upstream_ms, total_tokens, failure_code, subject, endpoint
FROM (
    (SELECT id, tenant_id, pool, source, status, kind, coalesce(used_model, model) AS model,
        priority, attempts, created_at, admitted_at, finished_at, queue_ms, upstream_ms,
        total_tokens, failure ->> 'code' AS failure_code, subject, endpoint
    FROM requests
    WHERE id >= $1 AND id < $2
    ORDER BY id DESC
    LIMIT $4)
    UNION ALL
    (SELECT id, tenant_id, pool,
        CASE WHEN source IN ('relay', 'batch') THEN source END, status, kind, model,
        priority, attempts, CASE WHEN source = 'batch' THEN to_timestamp(
            ('x0000' || translate(left(id::text, 13), '-', ''))::bit(64)::bigint / 1000.0)
            ELSE submitted_at END,
        admitted_at, finished_at, queue_ms, upstream_ms,
        total_tokens, failure ->> 'code', subject, endpoint
    FROM audit
    WHERE id >= $1 AND id < $2
    ORDER BY id DESC
    LIMIT $4)
    UNION ALL
    (SELECT l.id, l.tenant_id, '', 'batch',
        CASE l.state WHEN 'calling' THEN 'running' ELSE 'queued' END, NULL, NULL, -100,
        l.attempts, to_timestamp(
            ('x0000' || translate(left(l.id::text, 13), '-', ''))::bit(64)::bigint / 1000.0),
        NULL, NULL, NULL, NULL, NULL, NULL, NULL, b.endpoint
    FROM batch_lines l JOIN batches b ON b.id = l.batch_id
    WHERE l.state IN ('claimed', 'calling') AND l.id >= $1 AND l.id < $2
    ORDER BY l.id DESC
    LIMIT $4)
    ORDER BY id DESC
    LIMIT $4
) AS looked_at
WHERE source IS NOT NULL
    AND ($5::text[] IS NULL OR status = ANY($5)) AND ($6::text IS NULL OR tenant_id = $6)
    AND ($7::text IS NULL OR model = $7) AND ($8::text IS NULL OR kind = $8)
    AND ($9::text IS NULL OR source = $9) AND ($10::text IS NULL OR failure_code = $10)
    AND ($11::text IS NULL OR subject = $11)
    AND created_at >= $12 AND created_at < $13
ORDER BY id DESC
LIMIT $3

-- name: search_reach
-- The last of the $3 that `search_requests` looks at, where there are that many.
SELECT id FROM (
    (SELECT id FROM requests WHERE id >= $1 AND id < $2 ORDER BY id DESC LIMIT $3)
    UNION ALL
    (SELECT id FROM audit WHERE id >= $1 AND id < $2 ORDER BY id DESC LIMIT $3)
    UNION ALL
    (SELECT id FROM batch_lines
    WHERE state IN ('claimed', 'calling') AND id >= $1 AND id < $2
    ORDER BY id DESC LIMIT $3)
) AS looked_at
ORDER BY id DESC
OFFSET $3 - 1 LIMIT 1
