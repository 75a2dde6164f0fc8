-- Ready jobs, claims, and the jobs of silent workers. Scans for ready jobs have a lower bound, so that
-- they do not pass the index entries of jobs that left the queue long ago. Each condition is written
-- exactly as in its index where that index is to be used, and differently where a job is looked up by
-- its id: the planner considers a partial index empty, however many dead entries it has.

-- name: beat
-- Record that this worker is alive.
INSERT INTO workers (instance_id, seen_at) VALUES ($1, now())
ON CONFLICT (instance_id) DO UPDATE SET seen_at = now() RETURNING clock_timestamp() AS server_time

-- name: get_input_files
-- Return the uploads of many claimed jobs, in order.
SELECT * FROM files WHERE request_id = ANY($1::uuid[]) AND role = 'input' ORDER BY position

-- name: set_classified
-- Record the type of a job that was classified after it was claimed.
UPDATE requests SET kind = $3, classified_by = $4, classified_reason = $5, version = version + 1
WHERE id = $1 AND claim = $2 AND coalesce(status = 'queued', false)
RETURNING id

-- name: begin_running
-- Mark admitted jobs as running, with their attempts; a repeat under one claim adds no attempt.
-- Jobs that were claimed before have no attempt older than $3, which selects the partitions.
WITH begun AS (
    UPDATE requests r SET
        status = 'running',
        attempts = r.attempts + (r.status = 'queued')::integer,
        attempt_id = CASE WHEN r.status = 'queued' THEN row.attempt_id ELSE r.attempt_id END,
        attempt_at = CASE WHEN r.status = 'queued' THEN now() ELSE r.attempt_at END,
        admitted_at = row.admitted_at,
        queue_ms = row.queue_ms,
        used_model = row.model,
        upstream = row.upstream,
        tier = coalesce(row.tier, r.tier),
        tier_why = coalesce(row.tier_why, r.tier_why),
        version = r.version + 1
    FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, attempt_id uuid, model text,
        upstream text, admitted_at timestamptz, queue_ms double precision, fence_epoch bigint,
        fence_sequence bigint, tier text, tier_why text)
    WHERE r.id = row.id AND r.claim = row.claim AND coalesce(r.claimed_by = $2, false)
        AND (r.status = 'running' OR (r.status = 'queued' AND r.cancel_asked_at IS NULL))
    RETURNING r.id, r.attempt_id, r.attempt_at, r.tenant_id, r.pool, r.kind, r.attempts, r.claim,
        row.model, row.upstream, row.fence_epoch, row.fence_sequence, row.admitted_at, row.queue_ms
), attempted AS (
    INSERT INTO attempts (id, created_at, request_id, tenant_id, pool, kind, number, claim,
        instance_id, model, upstream, fence_epoch, fence_sequence, outcome, admitted_at, queue_ms)
    SELECT attempt_id, attempt_at, id, tenant_id, pool, kind,
        -- `attempts` may lack some attempts of a job that was claimed before.
        CASE WHEN claim = 1 THEN attempts ELSE greatest(attempts, 1 + (
            SELECT count(*) FROM attempts a
            WHERE a.request_id = begun.id AND a.created_at >= $3)) END, claim,
        $2, model, upstream, fence_epoch, fence_sequence, 'running', admitted_at, queue_ms
    FROM begun
    ON CONFLICT (id, created_at) DO UPDATE SET fence_epoch = excluded.fence_epoch,
        fence_sequence = excluded.fence_sequence, model = excluded.model,
        upstream = excluded.upstream, admitted_at = excluded.admitted_at, queue_ms = excluded.queue_ms
)
SELECT id FROM begun

-- name: running_attempt
-- Return the running attempt of job $1 under claim $2 of worker $3.
SELECT attempt_id, attempt_at FROM requests
WHERE id = $1 AND claim = $2 AND claimed_by = $3 AND status = 'running' FOR UPDATE

-- name: begin_another
-- Begin attempt $2 of running job $1, in addition to the last one; it uses up $3 more attempts.
-- The first attempt did not begin before $10.
WITH begun AS (
    UPDATE requests SET attempts = attempts + $3, attempt_id = $2, attempt_at = now(),
        upstream = $9, version = version + 1
    WHERE id = $1
    RETURNING *
)
INSERT INTO attempts (id, created_at, request_id, tenant_id, pool, kind, number, claim,
    instance_id, model, upstream, fence_epoch, fence_sequence, outcome, admitted_at, queue_ms)
SELECT $2, now(), id, tenant_id, pool, kind,
    1 + (SELECT count(*) FROM attempts a
        WHERE a.request_id = begun.id AND a.created_at >= $10), claim,
    $4, $5, $9, $6, $7, 'running', $8, queue_ms
FROM begun

-- name: end_attempts
-- Record the ends of running attempts that began between $2 and $3, which select the partitions.
UPDATE attempts a SET
    outcome = row.outcome,
    finished_at = row.finished_at,
    upstream_ms = row.upstream_ms,
    first_byte_ms = row.first_byte_ms,
    input_tokens = row.input_tokens,
    output_tokens = row.output_tokens,
    thoughts_tokens = row.thoughts_tokens,
    cached_tokens = row.cached_tokens,
    total_tokens = row.total_tokens,
    finish_reason = row.finish_reason,
    model_version = row.model_version,
    response_id = row.response_id,
    failure = row.failure
FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, outcome text,
    finished_at timestamptz, upstream_ms double precision, input_tokens bigint,
    output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint,
    finish_reason text, model_version text, response_id text, failure jsonb,
    first_byte_ms double precision)
WHERE a.id = row.id AND a.created_at = row.created_at AND a.created_at BETWEEN $2 AND $3
    AND a.outcome = 'running'

-- name: release_claims
-- Release claims of a worker that stops, or for `wait_ms`; these do not count as lapses.
-- `unmade` attempts ended before a call and count as attempts.
UPDATE requests r SET status = 'queued', claim = r.claim + 1, claimed_by = NULL,
    attempts = r.attempts + coalesce(row.unmade, 0),
    not_before = now() + row.wait_ms * interval '1 millisecond',
    failure = coalesce(row.failure, r.failure),
    version = r.version + (r.status = 'running')::integer
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, wait_ms double precision,
    failure jsonb, unmade integer), requests old
WHERE r.id = row.id AND r.claim = row.claim AND r.status IN ('queued', 'running') AND old.id = r.id
RETURNING r.*, old.status AS old_status

-- name: park_jobs
-- Release claims on queued jobs that were assigned to a tier, until a given time.
-- `unmade` attempts ended before a call, and count.
UPDATE requests r SET claim = r.claim + 1, claimed_by = NULL, tier = row.tier,
    tier_why = coalesce(row.tier_why, r.tier_why), revisit_at = row.revisit_at,
    not_before = row.not_before, batch_after = now() + row.batch_wait_ms * interval '1 millisecond',
    attempts = r.attempts + coalesce(row.unmade, 0),
    failure = coalesce(row.failure, r.failure), version = r.version + 1
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, tier text, tier_why text,
    revisit_at timestamptz, not_before timestamptz, batch_wait_ms double precision, failure jsonb,
    unmade integer)
WHERE r.id = row.id AND r.claim = row.claim AND r.status = 'queued'
RETURNING r.id

-- name: claim_batched
-- Claim jobs of the tier `batch` in pool $1 for worker $2, at most $3 jobs and $4 bytes.
-- Tenants take turns. Nothing is claimed while fewer jobs wait and none has waited for $5 ms. An image
-- that is not fetched yet counts as a million bytes.
WITH RECURSIVE tenants AS (
    (SELECT tenant_id FROM requests
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND tier = 'batch', false)
            AND pool = $1
        ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT r.tenant_id FROM requests r
        WHERE coalesce(r.status = 'queued' AND r.claimed_by IS NULL AND r.tier = 'batch', false)
            AND r.pool = $1 AND r.tenant_id > tenants.tenant_id
        ORDER BY r.tenant_id LIMIT 1)
    FROM tenants WHERE tenants.tenant_id IS NOT NULL
), waiting AS MATERIALIZED (
    SELECT head.* FROM tenants CROSS JOIN LATERAL (
        SELECT id, created_at, row_number() OVER (ORDER BY created_at, id) AS turn,
            coalesce(batch_after, created_at) AS since, octet_length(prompt)
            + CASE WHEN image_uri IS NULL THEN 0 ELSE 1000000 END + coalesce((
                SELECT sum(f.size_bytes) FROM files f
                WHERE f.request_id = requests.id AND f.role = 'input'), 0) AS size_bytes
        FROM requests
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND tier = 'batch', false)
            AND pool = $1 AND tenant_id = tenants.tenant_id AND kind IS NOT NULL
            AND not_before > now() AND coalesce(batch_after <= now(), true)
        ORDER BY created_at, id LIMIT $3
    ) AS head
), due AS (
    SELECT count(*) >= $3 OR sum(size_bytes) >= $4
        OR min(since) <= now() - $5::double precision * interval '1 millisecond' AS is_due
    FROM waiting
), picked AS MATERIALIZED (
    SELECT r.id, w.turn, w.created_at, w.size_bytes
    FROM (SELECT * FROM waiting WHERE (SELECT is_due FROM due) ORDER BY turn, created_at) AS w
    CROSS JOIN LATERAL (
        SELECT id FROM requests
        WHERE id = w.id
            AND coalesce(tier = 'batch' AND claimed_by IS NULL AND status = 'queued', false)
        FOR UPDATE SKIP LOCKED
    ) AS r
    LIMIT $3
), fitting AS (
    SELECT id, sum(size_bytes) OVER (ORDER BY turn, created_at, id) - size_bytes AS so_far FROM picked
)
UPDATE requests r SET claim = r.claim + 1, claimed_by = $2
FROM fitting WHERE r.id = fitting.id AND fitting.so_far < $4
RETURNING r.*, EXISTS (
    SELECT 1 FROM files f WHERE f.request_id = r.id AND f.role = 'input') AS has_files

-- name: release_strays
-- Release claims of worker $1 that it does not have, because the replies to it were lost.
UPDATE requests SET claim = claim + 1, claimed_by = NULL
WHERE id IN (
    SELECT id FROM requests
    WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
        AND claimed_by = $1 AND coalesce(status = 'queued', false) AND NOT (id = ANY($2::uuid[]))
    FOR UPDATE SKIP LOCKED
)
RETURNING id, pool

-- name: leave
-- Delete this worker; its claimed jobs in the queue are ready again.
WITH returned AS (
    UPDATE requests SET claim = claim + 1, claimed_by = NULL
    WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
        AND claimed_by = $1 AND coalesce(status = 'queued', false)
    RETURNING pool
), gone AS (
    DELETE FROM workers WHERE instance_id = $1
)
SELECT DISTINCT pool FROM returned

-- name: silent_workers
-- Return workers not seen for $1 ms since the server's own start.
SELECT instance_id, seen_at FROM workers
WHERE greatest(seen_at, pg_postmaster_start_time()) < now() - $1 * interval '1 millisecond'

-- name: unknown_holders
-- Return claimants of jobs that are not known as workers.
WITH RECURSIVE holders AS (
    (SELECT claimed_by FROM requests
        WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
        ORDER BY claimed_by LIMIT 1)
    UNION ALL
    SELECT (SELECT r.claimed_by FROM requests r
        WHERE coalesce(r.status IN ('queued', 'running') AND r.claimed_by IS NOT NULL, false)
            AND r.claimed_by > holders.claimed_by
        ORDER BY r.claimed_by LIMIT 1)
    FROM holders WHERE holders.claimed_by IS NOT NULL
)
SELECT claimed_by FROM holders
WHERE claimed_by IS NOT NULL AND NOT EXISTS (
    SELECT 1 FROM workers w WHERE w.instance_id = holders.claimed_by)
    AND pg_postmaster_start_time() < now() - $1 * interval '1 millisecond'

-- name: lock_lapsed
-- Lock at most 500 jobs of the workers $1 that were not seen for $2 ms.
SELECT id FROM requests
WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
    AND claimed_by = ANY($1::text[]) AND NOT EXISTS (
        SELECT 1 FROM workers w WHERE w.instance_id = claimed_by
            AND greatest(w.seen_at, pg_postmaster_start_time())
                >= now() - $2 * interval '1 millisecond')
ORDER BY id LIMIT 500
FOR UPDATE OF requests SKIP LOCKED

-- name: retake
-- Return locked, lapsed jobs to the queue; a running job lapses, and is dead after $2 lapses.
UPDATE requests r SET
    claim = r.claim + 1,
    claimed_by = NULL,
    lapses = r.lapses + (r.status = 'running')::integer,
    status = CASE WHEN r.status = 'running' AND r.lapses + 1 >= $2 THEN 'dead' ELSE 'queued' END,
    finished_at = CASE WHEN r.status = 'running' AND r.lapses + 1 >= $2 THEN now() END,
    failure = CASE WHEN r.status = 'running' AND r.lapses + 1 >= $2 THEN $3::jsonb
        ELSE r.failure END,
    version = r.version + (r.status = 'running')::integer
FROM requests old
WHERE r.id = ANY($1::uuid[]) AND old.id = r.id
RETURNING r.*, old.status AS old_status

-- name: expire_due
-- Expire at most 500 queued jobs whose deadline passed in the last $2 seconds, claimed or not.
-- The failure $1 also names the last error, which is what most of them have waited for.
UPDATE requests SET status = 'expired', claim = claim + 1, claimed_by = NULL, not_before = NULL,
    finished_at = now(), version = version + 1, failure = $1::jsonb || jsonb_build_object('message',
        concat($1::jsonb->>'message', ' (last error: ' || nullif(failure->>'message', '') || ')'))
WHERE id IN (
    SELECT id FROM requests WHERE coalesce(status = 'queued' AND deadline_at IS NOT NULL, false)
        AND deadline_at <= now() AND deadline_at > now() - $2 * interval '1 second'
    ORDER BY deadline_at LIMIT 500 FOR UPDATE SKIP LOCKED
)
RETURNING *

-- name: cancel_returned
-- Cancel at most 500 jobs that returned to the queue after their cancellation was requested.
UPDATE requests SET status = 'cancelled', claim = claim + 1, claimed_by = NULL, not_before = NULL,
    finished_at = now(), failure = $1::jsonb, version = version + 1
WHERE id IN (
    SELECT id FROM requests
    WHERE coalesce(status IN ('queued', 'running') AND cancel_asked_at IS NOT NULL, false)
        AND coalesce(status = 'queued', false)
    LIMIT 500 FOR UPDATE SKIP LOCKED
)
RETURNING *

-- name: ripen
-- Make retries ready whose time came in the last $1 seconds.
UPDATE requests SET not_before = NULL, version = version + 1
WHERE id IN (
    SELECT id FROM requests WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false)
        AND not_before <= now() AND not_before > now() - $1 * interval '1 second'
    ORDER BY not_before LIMIT 500 FOR UPDATE SKIP LOCKED
)

-- name: bring_back
-- Make deferred jobs ready, except those claimed since.
UPDATE requests r SET not_before = NULL, version = r.version + 1
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint)
WHERE r.id = row.id AND r.claim = row.claim AND r.status = 'queued' AND r.claimed_by IS NULL
    AND r.not_before IS NOT NULL
RETURNING r.pool

-- name: came
-- Return jobs of pool $1, lane $2 that became ready in the transactions [$3, $4) and $5.
-- Of each queue these are the 64 oldest, and then the 64 with the earliest of the deadlines that are
-- before one of an older job. Also returns whether `ripen` has work for $6. Its plan must not depend
-- on values: in subqueries they are not estimated, or each execution would be planned, which takes
-- longer than to run it.
WITH found AS MATERIALIZED (
    SELECT tenant_id, priority, created_at, id, deadline_at FROM requests
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
            AND ready_xid >= 0, false)
        AND pool = $1 AND lane = $2
        AND ready_xid >= (SELECT $3::bigint) AND ready_xid < (SELECT $4::bigint)
    UNION ALL
    SELECT r.tenant_id, r.priority, r.created_at, r.id, r.deadline_at
    FROM unnest((SELECT $5::bigint[])) AS late (xid) CROSS JOIN LATERAL (
        SELECT tenant_id, priority, created_at, id, deadline_at FROM requests
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
                AND ready_xid >= 0, false)
            AND pool = $1 AND lane = $2 AND ready_xid = late.xid
        OFFSET 0
    ) AS r
), counted AS MATERIALIZED (
    SELECT tenant_id, priority, count(*) AS jobs,
        max(coalesce(deadline_at - created_at, interval '10 minutes')) AS longest,
        min(deadline_at - created_at) AS shortest
    FROM found GROUP BY tenant_id, priority
), named AS (
    SELECT tenant_id, priority, created_at, id, deadline_at, 0 AS turn, place
    FROM (
        SELECT *, row_number() OVER (
            PARTITION BY tenant_id, priority ORDER BY created_at, id) AS place
        FROM found
    ) AS aged
    WHERE place <= 64
    UNION ALL
    SELECT tenant_id, priority, created_at, id, deadline_at, turn, 64 + turn
    FROM (
        SELECT *, row_number() OVER (
            PARTITION BY tenant_id, priority ORDER BY deadline_at, created_at, id) AS turn
        FROM (
            SELECT *, row_number() OVER by_age AS place,
                max(coalesce(deadline_at, created_at + interval '10 minutes')) OVER by_age AS latest
            FROM found
            WHERE (SELECT bool_or(shortest < longest AND jobs > 64) FROM counted)
            WINDOW by_age AS (PARTITION BY tenant_id, priority ORDER BY created_at, id
                ROWS UNBOUNDED PRECEDING)
        ) AS uneven
        WHERE place > 64 AND deadline_at < latest
    ) AS ahead
    WHERE turn <= 65
), queues AS (
    SELECT tenant_id, priority, max(jobs) AS jobs, max(longest) AS longest,
        count(*) FILTER (WHERE turn BETWEEN 1 AND 64) AS overtaking,
        min(deadline_at) FILTER (WHERE turn > 64) AS hidden_at,
        array_agg(created_at ORDER BY place) FILTER (WHERE turn <= 64) AS made_at,
        array_agg(id ORDER BY place) FILTER (WHERE turn <= 64) AS ids,
        array_agg(coalesce(deadline_at, created_at + interval '10 minutes') ORDER BY place)
            FILTER (WHERE turn <= 64) AS due_at
    FROM (
        SELECT *, NULL::bigint AS jobs, NULL::interval AS longest FROM named
        UNION ALL
        SELECT tenant_id, priority, NULL, NULL, NULL, NULL, NULL, jobs, longest FROM counted
    ) AS both_of
    GROUP BY tenant_id, priority
)
SELECT pg_snapshot_xmax(seen.snapshot)::text::bigint AS xmax,
    ARRAY(SELECT xid::text::bigint FROM pg_snapshot_xip(seen.snapshot) AS xid) AS under_way,
    EXISTS (
        SELECT 1 FROM requests WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false)
            AND not_before <= now() AND not_before > now() - $6 * interval '1 second'
    ) AS is_ripening, queues.*
FROM (SELECT pg_current_snapshot() AS snapshot) AS seen LEFT JOIN queues ON true

-- name: find_others
-- Return at most $11 ready jobs of pool $1, lane $2, tenant $3, priority $4, without some callers.
-- These callers have a key of $8, a user of $9 or a conversation of $10. The jobs $7 are checked, and
-- the next $12 from the job created at $5 with id $6. Those that are due first are returned. The next
-- search begins at the first of the $12 that is not of these callers, or else where this one has ended.
WITH next AS MATERIALIZED (
    SELECT created_at, id, deadline_at, key_id, subject, conversation FROM requests
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false)
        AND pool || '/' || lane || '/' || tenant_id = $1 || '/' || $2 || '/' || $3
        AND priority = $4 AND (created_at, id) >= ($5::timestamptz, $6::uuid)
    ORDER BY created_at, id LIMIT $12
), named AS MATERIALIZED (
    SELECT created_at, id, deadline_at, key_id, subject, conversation FROM requests
    WHERE id = ANY($7::uuid[])
        AND coalesce(not_before IS NULL AND claimed_by IS NULL AND status = 'queued', false)
), others AS MATERIALIZED (
    SELECT created_at, id, bool_or(is_next) AS is_next,
        coalesce(deadline_at, created_at + interval '10 minutes') AS due_at
    FROM (
        SELECT *, true AS is_next FROM next
        UNION ALL
        SELECT *, false FROM named
    ) AS seen
    WHERE NOT coalesce(key_id = ANY($8::text[]), false)
        AND NOT coalesce(subject = ANY($9::text[]), false)
        AND NOT coalesce(conversation = ANY($10::text[]), false)
    GROUP BY created_at, id, deadline_at
)
SELECT ARRAY(SELECT id FROM others ORDER BY due_at, created_at, id LIMIT $11) AS ids,
    begins.created_at AS next_at, begins.id AS next_id
FROM (SELECT) AS one LEFT JOIN LATERAL (
    (SELECT created_at, id, 1 AS choice FROM others WHERE is_next ORDER BY created_at, id LIMIT 1)
    UNION ALL
    (SELECT created_at, id, 2 FROM next ORDER BY created_at DESC, id DESC LIMIT 1)
    ORDER BY choice LIMIT 1
) AS begins ON true

-- name: claim
-- Claim at most $3 ready jobs of pool $1, lane $2 for $4 from the queues $5, tenants in turn.
-- In each queue those that are due first are claimed, of its named jobs and the oldest from `since`. A
-- job without a deadline is due ten minutes after it was made. If a queue has no more than these, its
-- unclaimed jobs are returned too, and need no search again.
WITH queues AS MATERIALIZED (
    SELECT n, tenant_id, priority, since, early FROM json_to_recordset($5::json)
        AS row (n integer, tenant_id text, priority integer, since timestamptz, early uuid[])
), candidates AS MATERIALIZED (
    SELECT n, priority, id, created_at, due_at, bool_or(is_early) AS is_early,
        bool_or(NOT is_early) AS is_scanned,
        row_number() OVER (PARTITION BY n ORDER BY priority DESC, due_at, created_at, id) AS turn,
        sum(bool_or(NOT is_early)::integer) OVER (PARTITION BY n, priority) >= $3 AS is_long
    FROM (
        SELECT queues.n, queues.priority, r.*, false AS is_early
        FROM queues CROSS JOIN LATERAL (
            SELECT created_at, id, coalesce(deadline_at, created_at + interval '10 minutes') AS due_at
            FROM requests
            WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false)
                AND pool || '/' || lane || '/' || tenant_id = $1 || '/' || $2 || '/' || queues.tenant_id
                AND priority = queues.priority AND created_at >= queues.since
            ORDER BY created_at, id LIMIT $3
        ) AS r
        UNION ALL
        SELECT queues.n, queues.priority, r.*, true
        FROM queues CROSS JOIN unnest(queues.early) AS named (id) CROSS JOIN LATERAL (
            SELECT created_at, id, coalesce(deadline_at, created_at + interval '10 minutes') AS due_at
            FROM requests
            WHERE id = named.id AND pool = $1 AND lane = $2
                AND coalesce(not_before IS NULL AND claimed_by IS NULL AND status = 'queued', false)
            OFFSET 0
        ) AS r
    ) AS head
    GROUP BY n, priority, id, created_at, due_at
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
    SELECT c.n, c.priority, bool_or(is_long) AS is_long,
        max(c.created_at) FILTER (WHERE c.is_scanned) AS last,
        min(c.created_at) FILTER (WHERE c.is_scanned AND claimed.id IS NULL) AS first_left,
        array_agg(c.id) FILTER (WHERE c.is_early AND claimed.id IS NULL) AS early_left,
        array_agg(c.id) FILTER (WHERE is_other AND claimed.id IS NULL) AS others_left,
        array_agg(c.created_at) FILTER (WHERE is_other AND claimed.id IS NULL) AS made_at,
        array_agg(c.due_at) FILTER (WHERE is_other AND claimed.id IS NULL) AS due_at
    FROM (SELECT *, NOT is_long AND NOT is_early AS is_other FROM candidates) AS c
        LEFT JOIN claimed ON claimed.id = c.id
    GROUP BY c.n, c.priority
)
SELECT claimed.*, EXISTS (
        SELECT 1 FROM files f WHERE f.request_id = claimed.id AND f.role = 'input'
    ) AS has_files, queues.n AS of_n, queues.priority AS of_priority, looked_at.early_left,
    looked_at.others_left, looked_at.made_at, looked_at.due_at,
    CASE WHEN looked_at.is_long THEN coalesce(first_left, last) END AS since_now
FROM queues LEFT JOIN looked_at USING (n, priority)
    LEFT JOIN claimed ON claimed.n = queues.n AND claimed.priority = queues.priority
ORDER BY claimed.turn, claimed.n
