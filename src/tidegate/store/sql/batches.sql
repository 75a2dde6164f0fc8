-- Batches, their files and lines.

-- name: add_batch_file
-- Insert a file of a batch; an existing one is kept, so repeats are safe.
INSERT INTO batch_files (id, tenant_id, purpose, name, size_bytes, lines, blob_key)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (id) DO NOTHING

-- name: lock_batch_files
-- Lock the files of tenant $1 against concurrent counts and uploads, until this transaction ends.
SELECT pg_advisory_xact_lock(7423002, hashtext($1))

-- name: kept_batch_files
-- Sum the bytes of the uploads of tenant $1, without file $2, counting at least $3 for each.
-- A deleted upload counts until the batch that uses it has read it.
SELECT coalesce(sum(greatest(size_bytes, $3::bigint)), 0)::bigint FROM (
    SELECT size_bytes FROM batch_files
    WHERE tenant_id = $1 AND purpose = 'batch' AND ($2::uuid IS NULL OR id <> $2)
    UNION ALL
    SELECT min(b.input_bytes) FROM batches b
    WHERE b.tenant_id = $1 AND b.status = 'validating'
        AND NOT EXISTS (SELECT 1 FROM batch_files f WHERE f.blob_key = b.input_blob)
    GROUP BY b.input_blob
) AS kept

-- name: get_batch_file
-- One file of a tenant.
SELECT * FROM batch_files WHERE id = $1 AND tenant_id = $2

-- name: list_batch_files
-- List the files of tenant $1 after file $2, newest first, with purpose $3 if given.
-- Results of message batches are left out.
SELECT * FROM batch_files
WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id < $2) AND ($3::text IS NULL OR purpose = $3)
    AND NOT (purpose = 'batch_output' AND starts_with(name, 'msgbatch_'))
ORDER BY id DESC LIMIT $4

-- name: list_batch_files_upwards
-- List the files of tenant $1 after file $2, oldest first, with purpose $3 if given.
-- Results of message batches are left out.
SELECT * FROM batch_files
WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id > $2) AND ($3::text IS NULL OR purpose = $3)
    AND NOT (purpose = 'batch_output' AND starts_with(name, 'msgbatch_'))
ORDER BY id LIMIT $4

-- name: delete_batch_file
-- Delete a file of a tenant; return its blob.
DELETE FROM batch_files WHERE id = $1 AND tenant_id = $2 RETURNING blob_key

-- name: uses_batch_blob
-- Return whether a batch has not read this blob yet.
SELECT true FROM batches WHERE input_blob = $1 AND status = 'validating' LIMIT 1

-- name: names_batch_blob
-- Return whether a file has this blob.
SELECT true FROM batch_files WHERE blob_key = $1 LIMIT 1

-- name: add_batch
-- Insert a batch, which expires 24 hours from now.
INSERT INTO batches (id, tenant_id, endpoint, input_file_id, input_blob, input_bytes,
    completion_window, metadata, models, key_id, total, expires_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8::jsonb, $9, $10, $11, now() + interval '24 hours')
ON CONFLICT (id) DO NOTHING

-- name: get_batch
-- One batch of a tenant.
SELECT * FROM batches WHERE id = $1 AND tenant_id = $2

-- name: get_batch_stand
-- Return the progress of batch $1, and its next line.
-- The next line is one that a worker has claimed, or else one that a budget refused, or else the next in
-- order.
SELECT b.id AS batch_id, b.tenant_id, b.status, b.endpoint, b.total, b.created_at,
    coalesce(b.completed_at, b.failed_at, b.expired_at, b.cancelled_at) AS finished_at,
    (SELECT count(*) FROM batch_lines l
        WHERE l.batch_id = b.id AND l.state IN ('queued', 'claimed')) AS waiting,
    (SELECT count(*) FROM batch_lines l WHERE l.batch_id = b.id AND l.state = 'calling') AS calling,
    n.body, n.claimed_by, coalesce(n.attempts, 0) AS attempts, n.not_before,
    n.failure ->> 'code' AS failure_code, n.failure ->> 'message' AS failure_message,
    b.paused_by, b.pause_reason, b.key_id,
    b.key_id IS NOT NULL AND (t.id IS NULL OR t.disabled_at IS NOT NULL) AS lacks_tenant
FROM batches b LEFT JOIN tenants t ON t.id = b.tenant_id LEFT JOIN LATERAL (
    SELECT * FROM batch_lines l WHERE l.batch_id = b.id AND l.state IN ('queued', 'claimed')
    ORDER BY l.state, (l.failure IS NOT NULL AND l.not_before > now()) DESC,
        l.not_before NULLS FIRST, l.line LIMIT 1
) n ON true
WHERE b.id = $1

-- name: list_batches
-- List the batches of tenant $1 after batch $2, newest first, without message batches.
SELECT * FROM batches WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id < $2)
    AND (metadata IS NULL OR jsonb_typeof(metadata -> 'messages') IS DISTINCT FROM 'object')
ORDER BY id DESC LIMIT $3

-- name: list_message_batches
-- List the message batches of tenant $1 after $2 and before $3, newest first.
SELECT * FROM batches WHERE tenant_id = $1
    AND ($2::uuid IS NULL OR id < $2) AND ($3::uuid IS NULL OR id > $3)
    AND jsonb_typeof(metadata -> 'messages') = 'object'
ORDER BY id DESC LIMIT $4

-- name: list_message_batches_upwards
-- List the message batches of tenant $1 that are newer than $2, oldest first.
SELECT * FROM batches WHERE tenant_id = $1 AND id > $2
    AND jsonb_typeof(metadata -> 'messages') = 'object'
ORDER BY id LIMIT $3

-- name: delete_ended_batch
-- Delete a batch of a tenant that has ended; return its files.
DELETE FROM batches WHERE id = $1 AND tenant_id = $2
    AND status IN ('completed', 'failed', 'expired', 'cancelled')
RETURNING output_file_id, error_file_id

-- name: cancel_batch
-- Cancel a batch, so that no more of its lines begin.
UPDATE batches SET status = 'cancelling', ends_as = 'cancelled', cancelling_at = now()
WHERE id = $1 AND tenant_id = $2 AND status IN ('validating', 'in_progress')
RETURNING id

-- name: pause_batch
-- Pause a batch, so that no line begins until it is resumed; $2 is the author, $3 the reason.
UPDATE batches SET paused_at = coalesce(paused_at, now()), paused_by = $2, pause_reason = $3
WHERE id = $1 AND status IN ('validating', 'in_progress')
RETURNING id

-- name: resume_batch
-- Resume a paused batch.
UPDATE batches SET paused_at = NULL, paused_by = NULL, pause_reason = NULL
WHERE id = $1 AND paused_at IS NOT NULL
RETURNING id

-- name: any_batch
-- Return a batch of any tenant, as in the list.
SELECT b.*, t.disabled_at IS NOT NULL AS is_disabled, 0 AS claimed, 0 AS calling
FROM batches b LEFT JOIN tenants t ON t.id = b.tenant_id WHERE b.id = $1

-- name: list_all_batches
-- List the batches of all tenants, or of tenant $2, after batch $1, newest first, at most $4.
-- $3: only open batches.
WITH held AS (
    SELECT batch_id, count(*) FILTER (WHERE state = 'claimed') AS claimed,
        count(*) FILTER (WHERE state = 'calling') AS calling
    FROM batch_lines WHERE state IN ('claimed', 'calling') GROUP BY batch_id
)
SELECT b.*, t.disabled_at IS NOT NULL AS is_disabled, coalesce(held.claimed, 0) AS claimed,
    coalesce(held.calling, 0) AS calling
FROM batches b LEFT JOIN tenants t ON t.id = b.tenant_id LEFT JOIN held ON held.batch_id = b.id
WHERE ($1::uuid IS NULL OR b.id < $1) AND ($2::text IS NULL OR b.tenant_id = $2)
    AND (NOT $3::boolean OR b.status IN ('validating', 'in_progress', 'finalizing', 'cancelling'))
ORDER BY b.id DESC LIMIT $4

-- name: expire_batches
-- Expire the batches whose time is over, so that no more of their lines begin.
UPDATE batches SET status = 'finalizing', ends_as = 'expired', finalizing_at = now()
WHERE status IN ('validating', 'in_progress') AND expires_at <= now()

-- name: batches_over
-- Return which of the batches $1 accept no more calls, or do not exist.
SELECT held.id FROM unnest($1::uuid[]) AS held (id)
WHERE NOT EXISTS (SELECT 1 FROM batches b WHERE b.id = held.id AND b.status = 'in_progress')

-- name: open_batches
-- Return whether one of our batches is open, and whether there is work for a provider's batch.
SELECT
    EXISTS (SELECT 1 FROM batches
        WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')) AS ours,
    EXISTS (SELECT 1 FROM provider_batches WHERE state <> 'done') OR EXISTS (SELECT 1 FROM requests
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND tier = 'batch', false)) AS theirs

-- name: take_batch
-- Claim a batch to validate or assemble for worker $1, except the batches $2.
-- A batch that the worker has claimed already is one whose claim it has lost track of.
UPDATE batches SET claim = claim + 1, claimed_by = $1
WHERE id = (
    SELECT b.id FROM batches b
    WHERE (b.claimed_by IS NULL OR b.claimed_by = $1) AND b.id <> ALL($2::uuid[])
        AND (b.status = 'validating' OR (
        b.status IN ('finalizing', 'cancelling') AND NOT EXISTS (
            SELECT 1 FROM batch_lines l
            WHERE l.batch_id = b.id AND l.state IN ('claimed', 'calling'))))
    ORDER BY b.id LIMIT 1 FOR UPDATE SKIP LOCKED
)
RETURNING *

-- name: free_batch
-- Release the claim on a batch.
UPDATE batches SET claimed_by = NULL WHERE id = $1 AND claim = $2

-- name: add_batch_lines
-- Insert lines of a batch; existing lines are kept, so repeats are safe.
INSERT INTO batch_lines (batch_id, line, id, tenant_id, custom_id, body, size_bytes)
SELECT $1, line, id, $2, custom_id, body, octet_length(body)
FROM json_to_recordset($3::json) AS row (line integer, id uuid, custom_id text, body text)
ON CONFLICT (batch_id, line) DO NOTHING

-- name: begin_batch
-- Begin a validated batch, with the exact number of its lines.
UPDATE batches SET status = 'in_progress', in_progress_at = now(), total = $3, claimed_by = NULL
WHERE id = $1 AND claim = $2 AND status = 'validating'

-- name: refuse_batch
-- Fail a batch whose file is invalid; its lines are deleted separately.
UPDATE batches SET status = 'failed', failed_at = now(), errors = $3::jsonb, total = 0,
    claimed_by = NULL
WHERE id = $1 AND claim = $2 AND status = 'validating'

-- name: delete_batch_lines
-- Delete the lines of a batch.
DELETE FROM batch_lines WHERE batch_id = $1

-- name: finished_batch_lines
-- Return at most $3 lines of a batch after line $2, in order.
SELECT line, id, custom_id, state, status_code, answer, failure, attempts, lapses FROM batch_lines
WHERE batch_id = $1 AND line > $2 ORDER BY line LIMIT $3

-- name: unanswered_batch_lines
-- Return at most $2 lines of batch $1 that were called and have no answer.
SELECT l.id, l.tenant_id, l.body, l.attempts, l.lapses, l.upstream, l.model, b.endpoint, b.key_id
FROM batch_lines l JOIN batches b ON b.id = l.batch_id
WHERE l.batch_id = $1 AND l.attempts > 0 AND l.state NOT IN ('succeeded', 'failed')
ORDER BY l.line LIMIT $2

-- name: end_batch
-- Set the final state of a batch, and its files.
UPDATE batches SET status = ends_as, claimed_by = NULL, output_file_id = $3, error_file_id = $4,
    completed_at = CASE WHEN ends_as = 'completed' THEN now() END,
    expired_at = CASE WHEN ends_as = 'expired' THEN now() END,
    cancelled_at = CASE WHEN ends_as = 'cancelled' THEN now() END
WHERE id = $1 AND claim = $2 AND status IN ('finalizing', 'cancelling')
RETURNING id

-- name: claim_batch_lines
-- Claim ready lines for worker $1, at most $2 lines and $3 bytes, batches in turn.
-- Lines are claimed from line $4 on, except those of the batches $5 and of the tenants and keys $6.
WITH ready AS MATERIALIZED (
    SELECT head.*, b.endpoint, b.models, b.key_id, b.expires_at, b.metadata,
        coalesce(b.key_id IS NOT NULL AND 'flex' = ANY(t.tiers_allowed), false) AS in_flex
    FROM batches b LEFT JOIN tenants t ON t.id = b.tenant_id CROSS JOIN LATERAL (
        SELECT batch_id, line, row_number() OVER (ORDER BY line) AS turn, size_bytes
        FROM batch_lines
        WHERE batch_id = b.id AND state = 'queued' AND (not_before IS NULL OR not_before <= now())
            AND line >= coalesce(($4::jsonb ->> b.id::text)::integer, 0)
        ORDER BY line LIMIT 4 * $2
    ) AS head
    WHERE b.status = 'in_progress' AND b.paused_at IS NULL AND b.id <> ALL($5::uuid[])
        AND NOT ARRAY['tenant/' || b.tenant_id, 'key/' || coalesce(b.key_id, '')] && $6::text[]
), picked AS MATERIALIZED (
    SELECT l.batch_id, l.line, ready.turn, ready.endpoint, ready.models, ready.key_id,
        ready.expires_at, ready.metadata, ready.in_flex
    FROM ready JOIN batch_lines l ON l.batch_id = ready.batch_id AND l.line = ready.line
    WHERE l.state = 'queued'
    ORDER BY ready.turn, l.batch_id LIMIT $2
    FOR UPDATE OF l SKIP LOCKED
), fitting AS (
    SELECT picked.*, sum(l.size_bytes) OVER (ORDER BY turn, picked.batch_id) - l.size_bytes AS so_far
    FROM picked JOIN batch_lines l ON l.batch_id = picked.batch_id AND l.line = picked.line
)
UPDATE batch_lines l SET state = 'claimed', claim = l.claim + 1, claimed_by = $1
FROM fitting
WHERE l.batch_id = fitting.batch_id AND l.line = fitting.line AND fitting.so_far < $3
RETURNING l.*, fitting.endpoint, fitting.models, fitting.key_id, fitting.expires_at,
    fitting.metadata, fitting.in_flex

-- name: batches_held_up
-- Return the batches that are paused, and those of keys whose tenants are disabled or deleted.
SELECT b.id FROM batches b LEFT JOIN tenants t ON t.id = b.tenant_id
WHERE b.status = 'in_progress' AND (b.paused_at IS NOT NULL
    OR b.key_id IS NOT NULL AND (t.id IS NULL OR t.disabled_at IS NOT NULL))

-- name: begin_batch_lines
-- Mark lines as calling, before their upstream calls.
-- Lines that another worker has claimed, and those of a batch that ends or is paused, are left out.
UPDATE batch_lines l SET state = 'calling', attempts = l.attempts + (l.state = 'claimed')::integer,
    upstream = row.upstream, model = row.model
FROM json_to_recordset($1::json) AS row (batch_id uuid, line integer, claim bigint, upstream text,
    model text)
WHERE l.batch_id = row.batch_id AND l.line = row.line AND l.claim = row.claim
    AND (l.state = 'calling' OR l.state = 'claimed' AND EXISTS (
        SELECT 1 FROM batches b WHERE b.id = l.batch_id AND b.status = 'in_progress'
            AND b.paused_at IS NULL))
RETURNING l.batch_id, l.line

-- name: end_batch_lines
-- Record the results of lines; their batches count them in the same transaction.
UPDATE batch_lines l SET state = row.state, claimed_by = NULL, status_code = row.status_code,
    answer = row.answer, failure = row.failure
FROM json_to_recordset($1::json) AS row (batch_id uuid, line integer, claim bigint, state text,
    status_code integer, answer text, failure jsonb)
WHERE l.batch_id = row.batch_id AND l.line = row.line AND l.claim = row.claim
    AND l.state IN ('claimed', 'calling')
RETURNING l.batch_id, l.line, l.state

-- name: count_batch_lines
-- Add ended lines to the counts of a batch; after the last one it is assembled.
UPDATE batches SET completed = completed + $2, failed = failed + $3,
    status = CASE WHEN status = 'in_progress' AND completed + failed + $2 + $3 >= total
        THEN 'finalizing' ELSE status END,
    finalizing_at = CASE WHEN status = 'in_progress' AND completed + failed + $2 + $3 >= total
        THEN now() ELSE finalizing_at END
WHERE id = $1

-- name: release_stray_lines
-- Release lines claimed by worker $1 that it does not have.
UPDATE batch_lines SET state = 'queued', claim = claim + 1, claimed_by = NULL
WHERE claimed_by = $1 AND state IN ('claimed', 'calling') AND NOT (id = ANY($2::uuid[]))

-- name: return_batch_lines
-- Release claims on lines, for another attempt after a given time, if any.
UPDATE batch_lines l SET state = 'queued', claim = l.claim + 1, claimed_by = NULL,
    attempts = l.attempts - CASE WHEN l.state = 'calling' THEN coalesce(row.uncounted, 0) ELSE 0 END,
    preemptions = l.preemptions + coalesce(row.gave_way, 0), failure = row.failure,
    not_before = now() + row.after_ms * interval '1 millisecond'
FROM json_to_recordset($1::json) AS row (batch_id uuid, line integer, claim bigint,
    after_ms double precision, uncounted integer, gave_way integer, failure jsonb)
WHERE l.batch_id = row.batch_id AND l.line = row.line AND l.claim = row.claim
    AND l.state IN ('claimed', 'calling')

-- name: erased_batch_calls
-- Return the positions of those calls $2 for lines of batches $1 that were erased.
-- Neither the batch nor the line exists any more.
SELECT place FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS call (batch, id, place)
WHERE NOT EXISTS (SELECT 1 FROM batches b WHERE b.id = call.batch)
    AND NOT EXISTS (SELECT 1 FROM audit a WHERE a.id = call.id)

-- name: retake_batch_lines
-- Return lines of workers not seen for $1 ms to the queue.
-- A line that has lapsed $2 times during its call has failed.
WITH gone AS MATERIALIZED (
    SELECT claimant.claimed_by FROM (
        SELECT claimed_by FROM batch_lines WHERE state IN ('claimed', 'calling')
        UNION SELECT claimed_by FROM batches WHERE claimed_by IS NOT NULL
    ) AS claimant LEFT JOIN workers w ON w.instance_id = claimant.claimed_by
    WHERE greatest(w.seen_at, pg_postmaster_start_time()) < now() - $1 * interval '1 millisecond'
), freed AS (
    UPDATE batches b SET claimed_by = NULL, claim = b.claim + 1
    FROM gone WHERE b.claimed_by = gone.claimed_by
)
UPDATE batch_lines l SET claim = l.claim + 1, claimed_by = NULL,
    lapses = l.lapses + (l.state = 'calling')::integer,
    state = CASE WHEN l.state = 'calling' AND l.lapses + 1 >= $2 THEN 'failed' ELSE 'queued' END,
    failure = CASE WHEN l.state = 'calling' AND l.lapses + 1 >= $2 THEN $3::jsonb END
FROM gone
WHERE l.claimed_by = gone.claimed_by AND l.state IN ('claimed', 'calling')
RETURNING l.batch_id, l.state, l.id, l.tenant_id, l.attempts, l.lapses, l.upstream, l.model,
    CASE WHEN l.state = 'failed' THEN l.body END AS body,
    (SELECT endpoint FROM batches b WHERE b.id = l.batch_id) AS endpoint,
    (SELECT key_id FROM batches b WHERE b.id = l.batch_id) AS key_id
