-- How much there is of each, for those who watch over all: see standing.py. Every count is bounded,
-- and walks an index of what it counts alone.

-- name: standing_queues
-- The jobs that are ready in up to $1 queues, up to $2 of each, and when the oldest was handed in.
WITH RECURSIVE queues AS (
    (SELECT pool || '/' || lane || '/' || tenant_id AS queue, pool, lane, tenant_id, 1 AS place
    FROM requests
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false)
    ORDER BY (pool || '/' || lane || '/' || tenant_id) LIMIT 1)
    UNION ALL
    (SELECT next.* FROM queues CROSS JOIN LATERAL (
        SELECT r.pool || '/' || r.lane || '/' || r.tenant_id, r.pool, r.lane, r.tenant_id,
            queues.place + 1
        FROM requests r
        WHERE coalesce(r.status = 'queued' AND r.claimed_by IS NULL AND r.not_before IS NULL, false)
            AND (r.pool || '/' || r.lane || '/' || r.tenant_id) > queues.queue
        ORDER BY (r.pool || '/' || r.lane || '/' || r.tenant_id) LIMIT 1
    ) AS next WHERE queues.place < $1)
)
SELECT queues.pool, queues.lane, queues.tenant_id, found.jobs, found.oldest
FROM queues CROSS JOIN LATERAL (
    SELECT count(*) AS jobs, min(created_at) AS oldest FROM (
        SELECT r.created_at FROM requests r
        WHERE coalesce(r.status = 'queued' AND r.claimed_by IS NULL AND r.not_before IS NULL, false)
            AND (r.pool || '/' || r.lane || '/' || r.tenant_id) = queues.queue
        LIMIT $2
    ) AS counted
) AS found

-- name: standing_jobs
-- Jobs that wait for a retry, that workers have, that run or are dead, up to $1 of each; and more.
SELECT
    (SELECT count(*) FROM (SELECT 1 FROM requests
        WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false) LIMIT $1) AS a
    ) AS retrying,
    (SELECT count(*) FROM (SELECT 1 FROM requests
        WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
            AND coalesce(status = 'running', false) LIMIT $1) AS a
    ) AS running,
    (SELECT count(*) FROM (SELECT 1 FROM requests
        WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
            AND coalesce(status = 'queued', false) LIMIT $1) AS a
    ) AS claimed,
    (SELECT count(*) FROM (SELECT 1 FROM requests
        WHERE coalesce(status = 'dead', false) LIMIT $1) AS a
    ) AS dead,
    (SELECT count(*) FROM (SELECT 1 FROM webhooks WHERE state = 'pending' LIMIT $1) AS a
    ) AS webhooks,
    (SELECT greatest(0, extract(epoch FROM now() - min(due_at))) FROM webhooks
        WHERE state = 'pending') AS webhooks_oldest_s,
    (SELECT count(*) FROM workers WHERE seen_at > now() - interval '1 minute') AS workers
