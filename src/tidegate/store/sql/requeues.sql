-- Jobs that have failed, queued again under their own ids: see requeues.py.

-- name: count_requeues
-- By error code: jobs of the states $1 that ended in [$2, $3), of tenant $4 and code $5 where given; up to $6.
SELECT coalesce(code, '') AS code, count(*) AS jobs FROM (
    SELECT failure ->> 'code' AS code FROM requests
    WHERE status NOT IN ('queued', 'running') AND status = ANY($1::text[]) AND source = 'job'
        AND finished_at >= $2 AND finished_at < $3 AND ($4::text IS NULL OR tenant_id = $4)
        AND ($5::text IS NULL OR failure ->> 'code' = $5)
    ORDER BY finished_at LIMIT $6
) AS matching GROUP BY 1 ORDER BY 2 DESC, 1

-- name: requeue_ended
-- Queue up to $6 such jobs again, those that ended first: as when they were new, but for their place.
UPDATE requests SET status = 'queued', attempts = 0, lapses = 0, claim = claim + 1,
    claimed_by = NULL, failure = NULL, finished_at = NULL, admitted_at = NULL, not_before = NULL,
    cancel_asked_at = NULL, queue_ms = NULL, upstream_ms = NULL, first_byte_ms = NULL,
    deadline_at = now() + (deadline_at - created_at), version = version + 1
WHERE id IN (
    SELECT id FROM requests
    WHERE status NOT IN ('queued', 'running') AND status = ANY($1::text[]) AND source = 'job'
        AND finished_at >= $2 AND finished_at < $3 AND ($4::text IS NULL OR tenant_id = $4)
        AND ($5::text IS NULL OR failure ->> 'code' = $5)
    ORDER BY finished_at LIMIT $6 FOR UPDATE SKIP LOCKED
)
RETURNING id, pool
