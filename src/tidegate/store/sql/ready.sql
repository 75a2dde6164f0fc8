-- Statements that find and claim what is ready: see ready.py. All of them are bounded from below,
-- so that none walks past the entries of jobs that have left the queue long ago. Each condition is
-- written as its index has it, word for word, and otherwise where a job is looked up by its id: the
-- planner takes a partial index, however many dead entries it has, for an empty one.

-- name: ripen
-- Let retries take their place among the ready whose time has come in the last $1 seconds.
UPDATE requests SET not_before = NULL, version = version + 1
WHERE id IN (
    SELECT id FROM requests WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false)
        AND not_before <= now() AND not_before > now() - $1 * interval '1 second'
    ORDER BY not_before LIMIT 500 FOR UPDATE SKIP LOCKED
)

-- name: bring_back
-- Let jobs that were put off take their place among the ready; none that was claimed since.
UPDATE requests r SET not_before = NULL, version = r.version + 1
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint)
WHERE r.id = row.id AND r.claim = row.claim AND r.status = 'queued' AND r.claimed_by IS NULL
    AND r.not_before IS NOT NULL
RETURNING r.pool

-- name: came
-- What became ready in pool $1, lane $2 in the transactions [$3, $4) and $5; whether `ripen` $6 has work.
WITH found AS MATERIALIZED (
    SELECT tenant_id, priority, created_at, id FROM requests
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
            AND ready_xid >= 0, false)
        AND pool = $1 AND lane = $2 AND ready_xid >= $3 AND ready_xid < $4
    UNION ALL
    SELECT r.tenant_id, r.priority, r.created_at, r.id
    FROM unnest($5::bigint[]) AS late (xid) CROSS JOIN LATERAL (
        SELECT tenant_id, priority, created_at, id FROM requests
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
                AND ready_xid >= 0, false)
            AND pool = $1 AND lane = $2 AND ready_xid = late.xid
        OFFSET 0
    ) AS r
), ranked AS (
    SELECT found.*, row_number() OVER w AS place,
        count(*) OVER (PARTITION BY tenant_id, priority) AS jobs
    FROM found WINDOW w AS (PARTITION BY tenant_id, priority ORDER BY created_at, id)
), queues AS (
    SELECT tenant_id, priority, max(jobs) AS jobs, array_agg(created_at ORDER BY place) AS made_at,
        array_agg(id ORDER BY place) AS ids
    FROM ranked WHERE place <= 64 GROUP BY tenant_id, priority
)
SELECT pg_snapshot_xmax(seen.snapshot)::text::bigint AS xmax,
    ARRAY(SELECT xid::text::bigint FROM pg_snapshot_xip(seen.snapshot) AS xid) AS under_way,
    EXISTS (
        SELECT 1 FROM requests WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false)
            AND not_before <= now() AND not_before > now() - $6 * interval '1 second'
    ) AS is_ripening, queues.*
FROM (SELECT pg_current_snapshot() AS snapshot) AS seen LEFT JOIN queues ON true

-- name: claim
-- Claim up to $3 ready jobs of pool $1, lane $2 for $4 from the queues $5, tenants in turn.
WITH queues AS MATERIALIZED (
    SELECT n, tenant_id, priority, since, early FROM json_to_recordset($5::json)
        AS row (n integer, tenant_id text, priority integer, since timestamptz, early uuid[])
), candidates AS MATERIALIZED (
    SELECT head.*, row_number() OVER (PARTITION BY n ORDER BY priority DESC, created_at, id) AS turn
    FROM (
        SELECT queues.n, queues.priority, r.created_at, r.id, false AS is_early
        FROM queues CROSS JOIN LATERAL (
            SELECT created_at, id FROM requests
            WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false)
                AND pool || '/' || lane || '/' || tenant_id = $1 || '/' || $2 || '/' || queues.tenant_id
                AND priority = queues.priority AND created_at >= queues.since
            ORDER BY created_at, id LIMIT $3
        ) AS r
        UNION ALL
        SELECT queues.n, queues.priority, r.created_at, r.id, true
        FROM queues CROSS JOIN unnest(queues.early) AS named (id) CROSS JOIN LATERAL (
            SELECT created_at, id FROM requests
            WHERE id = named.id AND pool = $1 AND lane = $2
                AND coalesce(not_before IS NULL AND claimed_by IS NULL AND status = 'queued', false)
            OFFSET 0
        ) AS r
        WHERE queues.since IS NULL OR r.created_at < queues.since
    ) AS head
), picked AS MATERIALIZED (
    SELECT r.id, c.n, c.turn
    FROM (SELECT id, n, turn FROM candidates ORDER BY turn, n) AS c CROSS JOIN LATERAL (
        SELECT id FROM requests
        WHERE id = c.id
            AND coalesce(not_before IS NULL AND claimed_by IS NULL AND status = 'queued', false)
        FOR UPDATE SKIP LOCKED
    ) AS r
    LIMIT $3
), claimed AS (
    UPDATE requests r SET claim = r.claim + 1, claimed_by = $4
    FROM picked WHERE r.id = picked.id
    RETURNING r.*, picked.n, picked.turn
), looked_at AS (
    SELECT c.n, c.priority, count(*) FILTER (WHERE NOT c.is_early) AS scanned,
        max(c.created_at) FILTER (WHERE NOT c.is_early) AS last,
        min(c.created_at) FILTER (WHERE NOT c.is_early AND claimed.id IS NULL) AS first_left,
        array_agg(c.id) FILTER (WHERE c.is_early AND claimed.id IS NULL) AS early_left
    FROM candidates c LEFT JOIN claimed ON claimed.id = c.id GROUP BY c.n, c.priority
)
SELECT claimed.*, EXISTS (
        SELECT 1 FROM files f WHERE f.request_id = claimed.id AND f.role = 'input'
    ) AS has_files, queues.n AS of_n, queues.priority AS of_priority, looked_at.early_left,
    coalesce(first_left, CASE WHEN scanned >= $3 THEN last END) AS since_now
FROM queues LEFT JOIN looked_at USING (n, priority)
    LEFT JOIN claimed ON claimed.n = queues.n AND claimed.priority = queues.priority
ORDER BY claimed.turn, claimed.n
