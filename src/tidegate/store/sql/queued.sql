-- Statements on how much of a tenant is queued: see queued.py.

-- name: lock_queued
-- How much tenant $1 has queued in pool $2 as last counted, locked until this transaction ends.
SELECT jobs, size_bytes,
    extract(epoch FROM clock_timestamp() - counted_at)::double precision * 1000 AS age_ms, count_ms
FROM queued WHERE tenant_id = $1 AND pool = $2
FOR UPDATE

-- name: begin_queued
-- Make the row to lock; old enough to be counted at once.
INSERT INTO queued (tenant_id, pool, jobs, size_bytes, counted_at, count_ms)
VALUES ($1, $2, 0, 0, 'epoch', 0)
ON CONFLICT (tenant_id, pool) DO NOTHING

-- name: count_queued
-- The ready jobs of tenant $1 in pool $2, in the lanes $3, at most $4 of each.
SELECT count(*) AS jobs FROM unnest($3::text[]) AS lanes (lane) CROSS JOIN LATERAL (
    SELECT id FROM requests
    WHERE status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
        AND pool = $2 AND lane = lanes.lane AND tenant_id = $1
    ORDER BY priority DESC, created_at, id LIMIT $4
) AS ready

-- name: count_queued_bytes
-- The same with the bytes of their prompts and files.
SELECT count(*) AS jobs, coalesce(sum(ready.size_bytes + coalesce((
    SELECT sum(f.size_bytes) FROM files f WHERE f.request_id = ready.id AND f.role = 'input'
), 0)), 0)::bigint AS size_bytes
FROM unnest($3::text[]) AS lanes (lane) CROSS JOIN LATERAL (
    SELECT id, octet_length(prompt) AS size_bytes FROM requests
    WHERE status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
        AND pool = $2 AND lane = lanes.lane AND tenant_id = $1
    ORDER BY priority DESC, created_at, id LIMIT $4
) AS ready

-- name: set_queued
-- Note what tenant $1 has queued in pool $2, and where it was counted how long that took.
UPDATE queued SET jobs = $3, size_bytes = $4,
    counted_at = CASE WHEN $5::double precision IS NULL THEN counted_at ELSE clock_timestamp() END,
    count_ms = coalesce($5, count_ms)
WHERE tenant_id = $1 AND pool = $2

-- name: forget_queued
-- Have what tenant $1 has queued counted anew: its caps may have been others for a while.
DELETE FROM queued WHERE tenant_id = $1
