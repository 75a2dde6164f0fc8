-- Notifications between processes, and what they poll for.

-- name: get_versions
-- Return the versions of many requests, in one query for all long polls of a process.
SELECT id, version FROM requests WHERE id = ANY($1::uuid[])

-- name: pulse
-- Return what loops poll for: changed budgets, due work, and new jobs of pool $1 since $2 in lanes $3.
-- $4: the transactions before $2 that were in progress when $2 was read.
SELECT clock_timestamp() AS server_time,
    pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS seen,
    ARRAY(SELECT xid::text::bigint FROM pg_snapshot_xip(pg_current_snapshot()) AS xid) AS under_way,
    (SELECT revision FROM budget_revision) AS budgets,
    $1::text IS NOT NULL AND EXISTS (SELECT 1 FROM requests
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
                AND ready_xid >= 0, false)
            AND pool = $1 AND lane = ANY($3::text[]) AND ready_xid >= $2
        UNION ALL SELECT 1 FROM requests
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
                AND ready_xid >= 0, false)
            AND pool = $1 AND lane = ANY($3::text[]) AND ready_xid = ANY($4::bigint[])) AS ready,
    $1::text IS NOT NULL AND EXISTS (SELECT 1 FROM requests
        WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false)
            AND not_before <= now() AND not_before > now() - interval '15 s') AS ripe,
    $1::text IS NOT NULL AND EXISTS (SELECT 1 FROM requests
        WHERE coalesce(status = 'queued' AND deadline_at IS NOT NULL, false)
            AND deadline_at <= now() AND deadline_at > now() - interval '15 s') AS overdue,
    $1::text IS NOT NULL AND EXISTS (SELECT 1 FROM requests
        WHERE coalesce(status IN ('queued', 'running') AND cancel_asked_at IS NOT NULL, false)
            AND coalesce(status = 'queued', false)) AS cancelled,
    $1::text IS NOT NULL AND EXISTS (SELECT 1 FROM background_calls) AS background,
    $1::text IS NOT NULL AND (EXISTS (SELECT 1 FROM batches
            WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling'))
        OR EXISTS (SELECT 1 FROM provider_batches WHERE state <> 'done')
        OR EXISTS (SELECT 1 FROM requests
            WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND tier = 'batch', false))
        ) AS batches

-- name: notify
-- Wake listeners, apart from the change itself, since NOTIFY takes an instance-wide lock.
SELECT pg_notify(channel, payload)
FROM json_to_recordset($1::json) AS row (channel text, payload text)
