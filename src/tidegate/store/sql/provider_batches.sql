-- Batches in the providers' batch APIs, and the jobs that are their lines.

-- name: get_provider_batch
-- Return provider batch $1 by our id.
SELECT * FROM provider_batches WHERE id = $1

-- name: add_provider_batch
-- Insert a batch before anything of it is sent, claimed by worker $10.
INSERT INTO provider_batches (id, pool, upstream, dialect, endpoint, model, key_digest, lines,
    size_bytes, claim, claimed_by)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 1, $10)
RETURNING *

-- name: add_provider_batch_lines
-- Insert the jobs that are the lines of batch $1.
INSERT INTO provider_batch_lines (batch_id, line, request_id, claim, hold_id, leave_at)
SELECT $1, line, request_id, claim, hold_id, leave_at
FROM json_to_recordset($2::json) AS row (line integer, request_id uuid, claim bigint, hold_id uuid,
    leave_at timestamptz)

-- name: hand_to_batch
-- Clear the claimants of running jobs that are lines of a batch.
UPDATE requests r SET claimed_by = NULL
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint)
WHERE r.id = row.id AND r.claim = row.claim AND r.status = 'running'

-- name: lines_of_provider_batch
-- Return the jobs of batch $1 by line number.
SELECT line, request_id FROM provider_batch_lines WHERE batch_id = $1

-- name: take_provider_batch
-- Claim a due batch for worker $1, except the batches $2 and those at the upstreams $5.
-- Batches of workers not seen for $4 ms are included only if $3.
UPDATE provider_batches SET claim = claim + 1, claimed_by = $1
WHERE id = (
    SELECT b.id FROM provider_batches b LEFT JOIN workers w ON w.instance_id = b.claimed_by
    WHERE b.state <> 'done' AND b.due_at <= now() AND b.id <> ALL($2::uuid[])
        AND b.upstream <> ALL($5::text[])
        AND (b.claimed_by IS NULL OR b.claimed_by = $1 OR $3::boolean AND
            greatest(w.seen_at, pg_postmaster_start_time())
                < now() - $4::double precision * interval '1 millisecond')
    ORDER BY b.due_at LIMIT 1 FOR UPDATE OF b SKIP LOCKED
)
RETURNING *, now() AS read_at

-- name: set_provider_batch
-- Update batch $1 under claim $2, with $10 lines; it is due again after $8 ms, and released if $9.
UPDATE provider_batches SET state = $3, file_id = $4, provider_id = $5, provider_state = $6,
    problem = $7, lines = $10,
    creating_at = CASE WHEN $3 = 'made' THEN NULL ELSE coalesce(creating_at, now()) END,
    created_at = CASE WHEN $5::text IS NULL THEN NULL ELSE coalesce(created_at, now()) END,
    done_at = CASE WHEN $3 = 'done' THEN now() END,
    due_at = now() + $8::double precision * interval '1 millisecond',
    claimed_by = CASE WHEN $9::boolean THEN NULL ELSE claimed_by END
WHERE id = $1 AND claim = $2
RETURNING *, now() AS read_at

-- name: put_off_provider_batch
-- Release batch $1 under claim $2, due again after $3 ms, with its state unchanged.
UPDATE provider_batches SET due_at = now() + $3::double precision * interval '1 millisecond',
    claimed_by = NULL
WHERE id = $1 AND claim = $2

-- name: turn_away
-- Release claims on queued jobs that no batch accepts, so that they run in their usual tier.
UPDATE requests r SET claim = r.claim + 1, claimed_by = NULL, tier = 'live',
    tiers_allowed = array_remove(r.tiers_allowed, 'batch'), revisit_at = NULL, not_before = NULL,
    version = r.version + 1
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint)
WHERE r.id = row.id AND r.claim = row.claim AND r.status = 'queued'
RETURNING r.pool

-- name: free_provider_batches
-- Release all batches that worker $1 has claimed.
UPDATE provider_batches SET claimed_by = NULL WHERE state <> 'done' AND claimed_by = $1

-- name: open_provider_lines
-- Return at most $4 open lines of batch $1 after line $2, or those of the lines $3, with their jobs.
SELECT r.*, l.line, l.hold_id, l.leave_at, EXISTS (
    SELECT 1 FROM files f WHERE f.request_id = r.id AND f.role = 'input') AS has_files
FROM provider_batch_lines l
JOIN requests r ON r.id = l.request_id AND r.claim = l.claim AND r.status = 'running'
WHERE l.batch_id = $1 AND l.line > $2 AND ($3::integer[] IS NULL OR l.line = ANY($3))
ORDER BY l.line LIMIT $4

-- name: sum_provider_lines
-- Count the open lines of batch $1 and those to be cancelled.
-- Also returns when the first line leaves the batch, when the first is due, and a type.
SELECT count(*) AS open, count(r.cancel_asked_at) AS cancelled,
    min(l.leave_at) FILTER (WHERE r.cancel_asked_at IS NULL) AS leave_at,
    min(r.deadline_at) FILTER (WHERE r.cancel_asked_at IS NULL) AS due_at, min(r.kind) AS kind
FROM provider_batch_lines l
JOIN requests r ON r.id = l.request_id AND r.claim = l.claim AND r.status = 'running'
WHERE l.batch_id = $1

-- name: known_provider_ids
-- Return the provider's ids of all our batches at upstream $1.
SELECT provider_id FROM provider_batches WHERE upstream = $1 AND provider_id IS NOT NULL

-- name: count_provider_batches
-- Count the open batches by upstream.
SELECT upstream, count(*) AS batches FROM provider_batches WHERE state <> 'done' GROUP BY upstream

-- name: provider_batch_times
-- Return in which time 95 % of the last $3 successful batches of model $2 at upstream $1 ended.
SELECT count(*) AS batches, percentile_cont(0.95) WITHIN GROUP (ORDER BY took_ms) AS usual_ms
FROM (
    SELECT extract(epoch FROM done_at - made_at)::double precision * 1000 AS took_ms
    FROM provider_batches
    WHERE state = 'done' AND upstream = $1 AND model = $2 AND provider_id IS NOT NULL
        AND problem IS NULL AND done_at > now() - interval '14 days'
    ORDER BY done_at DESC LIMIT $3
) AS ended

-- name: unsettled_provider_holds
-- Return the budget reservations of the lines of batch $1.
SELECT DISTINCT h.id FROM provider_batch_lines l JOIN budget_holds h ON h.id = l.hold_id
WHERE l.batch_id = $1 AND h.estimated_at IS NULL

-- name: prune_provider_batches
-- Delete batches that have been done for 30 days.
DELETE FROM provider_batches WHERE state = 'done' AND done_at < now() - interval '30 days'
