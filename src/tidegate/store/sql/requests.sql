-- Recorded requests: one request, the requests of a tenant or of all tenants, their bodies, and what
-- needs a person.
--
-- Lists of a tenant merge jobs and streams from `requests` with native calls from `audit`; each side
-- returns as many as are scanned. Searches are in the order of ids, which begin with the time and are
-- primary keys. `audit` has a row of its own for each job and stream that has ended, which is scanned
-- and left out.

-- name: get_request
-- Return one request of a tenant.
SELECT id, tenant_id, source, status, kind, classified_by, classified_reason, model, used_model,
    priority, attempts, created_at, admitted_at, finished_at, not_before, deadline_at, queue_ms,
    upstream_ms, first_byte_ms, result, input_tokens, output_tokens, thoughts_tokens, cached_tokens,
    total_tokens, finish_reason, failure, version, webhook_url, endpoint, tier,
    tier_why
FROM requests WHERE id = $1 AND tenant_id = $2

-- name: get_place
-- Return the position of queued request $1 in its queue, counted up to 10,000.
SELECT 1 + (
    SELECT count(*) FROM (
        (SELECT 1 FROM requests q WHERE q.status = 'queued' AND q.pool = r.pool
            AND q.lane = r.lane AND q.priority > r.priority
            ORDER BY q.priority LIMIT 10000)
        UNION ALL
        (SELECT 1 FROM requests q WHERE q.status = 'queued' AND q.pool = r.pool
            AND q.lane = r.lane AND q.priority = r.priority
            AND (q.created_at, q.id) < (r.created_at, r.id)
            ORDER BY q.created_at, q.id LIMIT 10000)
        LIMIT 10000
    ) AS before
) AS place
FROM requests r WHERE r.id = $1 AND coalesce(r.status = 'queued', false)

-- name: get_request_files
-- Return all files of a request in order, uploads first, with the images of its last end.
-- Images of an end after which the request was queued again have negative positions or, if an older
-- version queued it, are older than its last attempt. Ten seconds allow for a server clock that was set
-- back.
SELECT f.* FROM files f JOIN requests r ON r.id = f.request_id
WHERE f.request_id = $1 AND (f.role = 'input' OR (r.status NOT IN ('queued', 'running') AND f.position >= 0
    AND f.created_at >= coalesce(r.attempt_at - interval '10 seconds', '-infinity')))
ORDER BY f.role, f.position

-- name: get_file
-- Return a file by its public id, for its owner only.
SELECT * FROM files WHERE id = $1 AND tenant_id = $2

-- name: requeue_dead
-- Queue a dead job again with its whole time, by decision of a person.
UPDATE requests SET status = 'queued', attempts = 0, lapses = 0, preemptions = 0, claim = claim + 1,
    claimed_by = NULL, failure = NULL, finished_at = NULL, admitted_at = NULL, not_before = NULL,
    cancel_asked_at = NULL, queue_ms = NULL, upstream_ms = NULL, first_byte_ms = NULL,
    used_model = NULL, upstream = NULL, result = NULL, finish_reason = NULL, input_tokens = NULL,
    output_tokens = NULL, thoughts_tokens = NULL, cached_tokens = NULL, total_tokens = NULL,
    given_ms = coalesce(given_ms, (extract(epoch FROM deadline_at - created_at) * 1000)::bigint),
    deadline_at = now() + coalesce(given_ms * interval '1 millisecond', deadline_at - created_at),
    version = version + 1
WHERE id = $1 AND status = 'dead'
RETURNING pool

-- name: detail_request
-- Return request $1, a job or a stream that has ended.
SELECT * FROM requests WHERE id = $1

-- name: detail_audit
-- Return how request $1 last ended, from $2 on.
-- For a native call or a line of a batch this is all that is recorded.
SELECT * FROM audit WHERE request_id = $1 AND created_at >= $2 ORDER BY created_at DESC LIMIT 1

-- name: detail_line
-- Return line $1 of a batch while a worker has claimed it.
SELECT l.id, l.tenant_id, l.state, l.attempts, l.lapses, l.claimed_by, l.body, l.batch_id,
    b.endpoint, b.key_id, b.expires_at
FROM batch_lines l JOIN batches b ON b.id = l.batch_id
WHERE l.state IN ('claimed', 'calling') AND l.id = $1

-- name: detail_attempts
-- Return the last 100 attempts of request $1, newest first.
SELECT * FROM attempts WHERE request_id = $1 ORDER BY created_at DESC, number DESC LIMIT 100

-- name: detail_webhooks
-- Return the last 20 webhooks of request $1, newest first.
SELECT id AS webhook_id, event, url, state, tries, due_at, answer_status, problem, created_at,
    ended_at
FROM webhooks WHERE request_id = $1 ORDER BY created_at DESC, id DESC LIMIT 20

-- name: detail_bodies
-- List the bodies of audit row $1 created at $2.
SELECT role, size_bytes, coalesce(content_type, 'application/json') AS content_type, omitted_bytes
FROM bodies
WHERE id = $1 AND created_at = $2

-- name: detail_body
-- Return the body with role $2 of request $1, of its last end from $3 on.
SELECT bodies.encoding, bodies.size_bytes, bodies.data, bodies.blob_key,
    coalesce(bodies.content_type, 'application/json') AS content_type, bodies.omitted_bytes
FROM audit JOIN bodies ON bodies.id = audit.id AND bodies.created_at = audit.created_at
WHERE audit.request_id = $1 AND bodies.role = $2
    AND audit.created_at >= $3 AND bodies.created_at >= $3
ORDER BY audit.created_at DESC LIMIT 1

-- name: detail_file
-- Return file $1 of request $2.
SELECT * FROM files WHERE id = $1 AND request_id = $2

-- name: list_requests
-- List requests of tenant $1 in [$2, $3) before ($4, $5), newest first: $10 matches in $11 scanned.
SELECT * FROM (
    (SELECT id, source, status, kind, coalesce(used_model, model) AS model, priority, attempts,
        created_at, admitted_at, finished_at, queue_ms, upstream_ms, total_tokens,
        failure ->> 'code' AS failure_code, conversation, upstream
    FROM requests
    WHERE tenant_id = $1 AND created_at >= $2 AND created_at < $3
        AND (created_at, id) < ($4, $5::uuid)
    ORDER BY created_at DESC, id DESC
    LIMIT $11)
    UNION ALL
    (SELECT id, source, status, kind, model, priority, attempts,
        created_at, admitted_at, finished_at, queue_ms, upstream_ms, total_tokens,
        failure ->> 'code' AS failure_code, conversation, upstream
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
    AND ($12::text IS NULL OR conversation = $12) AND ($13::text IS NULL OR upstream = $13)
ORDER BY created_at DESC, id DESC
LIMIT $10

-- name: list_reach
-- Return the last of the $6 requests that `list_requests` scans, if there are that many.
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

-- name: get_body
-- Return the body with role $3 of an ended request of tenant $2, from $4 on.
SELECT bodies.encoding, bodies.size_bytes, bodies.data, bodies.blob_key,
    coalesce(bodies.content_type, 'application/json') AS content_type, bodies.omitted_bytes
FROM audit JOIN bodies ON bodies.id = audit.id AND bodies.created_at = audit.created_at
WHERE audit.request_id = $1 AND audit.tenant_id = $2 AND audit.source <> 'batch'
    AND bodies.tenant_id = $2 AND bodies.role = $3
    AND audit.created_at >= $4 AND bodies.created_at >= $4
ORDER BY audit.created_at DESC LIMIT 1

-- name: get_charged
-- Return the cost and usage details of request $1 of tenant $2.
-- It ended between $3 and $4, which select the partitions.
SELECT cost_micros, usage_details FROM audit
WHERE request_id = $1 AND tenant_id = $2 AND created_at >= $3 AND created_at < $4
ORDER BY created_at DESC LIMIT 1

-- name: get_relayed
-- Return the record of a native call of a tenant, from $3 on.
SELECT * FROM audit
WHERE request_id = $1 AND tenant_id = $2 AND source = 'relay' AND created_at >= $3 LIMIT 1

-- name: count_requeues
-- Count by error code at most $6 jobs in the states $1 that ended in [$2, $3).
-- They are of tenant $4 and have error code $5, if given.
SELECT coalesce(code, '') AS code, count(*) AS jobs FROM (
    SELECT failure ->> 'code' AS code FROM requests
    WHERE status NOT IN ('queued', 'running') AND status = ANY($1::text[]) AND source = 'job'
        AND finished_at >= $2 AND finished_at < $3 AND ($4::text IS NULL OR tenant_id = $4)
        AND ($5::text IS NULL OR coalesce(failure ->> 'code', '') = $5)
    ORDER BY finished_at LIMIT $6
) AS matching GROUP BY 1 ORDER BY 2 DESC, 1

-- name: requeue_ended
-- Queue at most $6 such jobs again, as if they were new but in their old place, first ended first.
-- Their outputs, as of an attempt that was cut short, are moved aside.
WITH requeued AS (
    UPDATE requests SET status = 'queued', attempts = 0, lapses = 0, preemptions = 0, claim = claim + 1,
        claimed_by = NULL, failure = NULL, finished_at = NULL, admitted_at = NULL, not_before = NULL,
        cancel_asked_at = NULL, queue_ms = NULL, upstream_ms = NULL, first_byte_ms = NULL,
        used_model = NULL, upstream = NULL, result = NULL, finish_reason = NULL, input_tokens = NULL,
        output_tokens = NULL, thoughts_tokens = NULL, cached_tokens = NULL, total_tokens = NULL,
        given_ms = coalesce(given_ms, (extract(epoch FROM deadline_at - created_at) * 1000)::bigint),
        deadline_at = now() + coalesce(given_ms * interval '1 millisecond', deadline_at - created_at),
        version = version + 1
    WHERE id IN (
        SELECT id FROM requests
        WHERE status NOT IN ('queued', 'running') AND status = ANY($1::text[]) AND source = 'job'
            AND finished_at >= $2 AND finished_at < $3 AND ($4::text IS NULL OR tenant_id = $4)
            AND ($5::text IS NULL OR coalesce(failure ->> 'code', '') = $5)
        ORDER BY finished_at LIMIT $6 FOR UPDATE SKIP LOCKED
    )
    RETURNING id, pool
), put_aside AS (
    UPDATE files SET position = -1 - position FROM requeued
    WHERE files.request_id = requeued.id AND files.role = 'output' AND files.position >= 0
)
SELECT id, pool FROM requeued

-- name: list_newest_ids
-- Return the ids of the last $1 requests of all tenants, newest first.
SELECT id FROM requests ORDER BY id DESC LIMIT $1

-- name: get_whereabouts
-- Return the state of request $1 of any tenant.
SELECT id, id AS request_id, tenant_id, pool, status, kind, coalesce(used_model, model) AS model,
    claimed_by, attempts, created_at, not_before, admitted_at, finished_at,
    failure ->> 'code' AS failure_code, failure ->> 'message' AS failure_message, tier, upstream,
    key_id, subject, conversation, (
        SELECT concat_ws(': ', b.upstream || ', ' || coalesce(b.provider_id, 'not created yet'),
            b.problem)
        FROM provider_batch_lines l JOIN provider_batches b ON b.id = l.batch_id
        WHERE l.request_id = requests.id AND l.claim = requests.claim
    ) AS batch
FROM requests WHERE id = $1

-- name: get_ahead
-- Count the queued jobs of the tenant before request $1, without and with a claimant.
-- Jobs are claimed and admitted by deadline, and are due after ten minutes without one, but no job is
-- claimed before an older one for having no deadline. Of the newer ones that are claimed before this
-- one, those among the first 10,000 deadlines are counted.
SELECT (
    SELECT count(*) FROM (
        (SELECT 1 FROM requests q WHERE q.status = 'queued' AND q.claimed_by IS NULL
            AND q.not_before IS NULL AND q.pool = r.pool AND q.lane = r.lane
            AND q.tenant_id = r.tenant_id AND q.priority > r.priority LIMIT 10000)
        UNION ALL
        (SELECT 1 FROM requests q WHERE q.status = 'queued' AND q.claimed_by IS NULL
            AND q.not_before IS NULL AND q.pool = r.pool AND q.lane = r.lane
            AND q.tenant_id = r.tenant_id AND q.priority = r.priority
            AND (q.created_at, q.id) < (r.created_at, r.id)
            AND coalesce(coalesce(q.deadline_at, q.created_at + interval '10 minutes')
                <= r.deadline_at, true)
            LIMIT 10000)
        UNION ALL
        (SELECT 1 FROM (
            SELECT * FROM requests d
            WHERE coalesce(d.status = 'queued' AND d.deadline_at IS NOT NULL, false)
                AND d.deadline_at > now()
                AND d.deadline_at < coalesce(r.deadline_at, r.created_at + interval '10 minutes')
            ORDER BY d.deadline_at LIMIT 10000
        ) AS q WHERE q.claimed_by IS NULL AND q.not_before IS NULL AND q.pool = r.pool
            AND q.lane = r.lane AND q.tenant_id = r.tenant_id AND q.priority = r.priority
            AND (q.created_at, q.id) > (r.created_at, r.id))
        LIMIT 10000
    ) AS before
) AS unclaimed, (
    SELECT count(*) FROM requests q WHERE q.status = 'queued' AND q.claimed_by IS NOT NULL
        AND q.pool = r.pool AND q.lane = r.lane AND q.tenant_id = r.tenant_id
        AND q.priority = r.priority
        AND (coalesce(q.deadline_at, q.created_at + interval '10 minutes'), q.created_at, q.id)
            < (coalesce(r.deadline_at, r.created_at + interval '10 minutes'), r.created_at, r.id)
) AS claimed
FROM requests r WHERE r.id = $1 AND coalesce(r.status = 'queued', false)

-- name: running_calls
-- Return the jobs that hold permits of pool $1, by process and sequence of the fence.
-- Calls of the account `gemini` have permits of the pool in which their jobs are queued.
SELECT r.id AS request_id, a.instance_id, a.fence_sequence, r.admitted_at
FROM requests r JOIN LATERAL (
    SELECT instance_id, fence_sequence FROM attempts
    WHERE id = r.attempt_id AND created_at = r.attempt_at OFFSET 0
) AS a ON true
WHERE coalesce(r.status IN ('queued', 'running') AND r.claimed_by IS NOT NULL, false)
    AND coalesce(r.status = 'running', false) AND coalesce(nullif(r.upstream, 'gemini'), r.pool) = $1
LIMIT 5000

-- name: search_requests
-- Search requests with ids in [$1, $2), newest first: $3 matches in $4 scanned.
-- A request that waits for its first call matches every upstream, because its targets are not recorded.
SELECT id, tenant_id, pool, source, status, kind, model, priority, attempts, created_at,
    admitted_at, finished_at, queue_ms, upstream_ms, total_tokens, failure_code, subject, endpoint,
    conversation, upstream, key_id, cost_micros, prompt_head, tier
FROM (
    (SELECT id, tenant_id, pool, source, status, kind, coalesce(used_model, model) AS model,
        priority, attempts, created_at, admitted_at, finished_at, queue_ms, upstream_ms,
        total_tokens, failure ->> 'code' AS failure_code, subject, endpoint, conversation, upstream,
        key_id, NULL::bigint AS cost_micros, NULL AS prompt_head, tier
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
        total_tokens, failure ->> 'code', subject, endpoint, conversation, upstream, key_id,
        cost_micros, prompt_head, usage_details ->> 'tier'
    FROM audit
    WHERE id >= $1 AND id < $2
    ORDER BY id DESC
    LIMIT $4)
    UNION ALL
    (SELECT l.id, l.tenant_id, '', 'batch',
        CASE l.state WHEN 'calling' THEN 'running' ELSE 'queued' END, NULL, NULL, -100,
        l.attempts, to_timestamp(
            ('x0000' || translate(left(l.id::text, 13), '-', ''))::bit(64)::bigint / 1000.0),
        NULL, NULL, NULL, NULL, NULL, NULL, NULL, b.endpoint, NULL, l.upstream, b.key_id, NULL, NULL, NULL
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
    AND ($11::text IS NULL OR subject = $11) AND ($12::text IS NULL OR conversation = $12)
    AND created_at >= $13 AND created_at < $14 AND ($15::text IS NULL OR upstream = $15
        OR upstream IS NULL AND status IN ('queued', 'running'))
ORDER BY id DESC
LIMIT $3

-- name: search_jobs
-- Return the beginnings of the prompts of jobs and streams $1, and their costs recorded in [$2, $3).
-- The prompt of a job that wraps a native call is its body, whose beginning is known when it has ended.
SELECT r.id, a.cost_micros, CASE WHEN r.status IN ('queued', 'running') AND r.endpoint IS NULL
    THEN left(r.prompt, $4) ELSE a.prompt_head END AS prompt_head
FROM requests r LEFT JOIN (
    SELECT DISTINCT ON (request_id) request_id, cost_micros, prompt_head FROM audit
    WHERE request_id = ANY($1::uuid[]) AND created_at >= $2 AND created_at < $3
    ORDER BY request_id, created_at DESC
) AS a ON a.request_id = r.id AND r.status NOT IN ('queued', 'running')
WHERE r.id = ANY($1::uuid[])

-- name: search_reach
-- Return the last of the $3 requests that `search_requests` scans, if there are that many.
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

-- name: count_stuck
-- Count what needs a person, at most $1 of each: dead jobs, and webhooks and alerts given up.
-- Also returns the time of the first death, the jobs that are ready or wait for a retry, and the
-- workers seen in the last $2 ms. A retry has a failure.
SELECT
    (SELECT finished_at FROM requests
        WHERE coalesce(status = 'dead', false) ORDER BY finished_at LIMIT 1) AS dead_since,
    (SELECT count(*) FROM (SELECT FROM requests
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false)
        ORDER BY (pool || '/' || lane || '/' || tenant_id) LIMIT $1) AS one) AS ready,
    (SELECT count(*) FROM (SELECT failure FROM requests
        WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false)
        ORDER BY not_before LIMIT $1) AS one WHERE failure IS NOT NULL) AS retrying,
    (SELECT count(*) FROM workers WHERE seen_at > now() - $2 * interval '1 millisecond')
        AS workers,
    (SELECT count(*) FROM (SELECT FROM requests
        WHERE coalesce(status = 'dead', false) ORDER BY finished_at LIMIT $1) AS one) AS jobs,
    (SELECT count(*) FROM (SELECT FROM webhooks
        WHERE coalesce(state = 'given_up', false) ORDER BY ended_at LIMIT $1) AS one) AS webhooks,
    (SELECT count(*) FROM (SELECT FROM alerts
        WHERE state = 'given_up' AND due_at > now() - interval '1 day' AND created_at > coalesce(
            (SELECT max(created_at) FROM alerts WHERE state = 'delivered'), '-infinity')
        LIMIT $1) AS one) AS alerts

-- name: list_dead
-- List the $1 jobs that died last.
SELECT id AS request_id, tenant_id AS tenant, pool, kind AS type,
    coalesce(used_model, model) AS model, attempts, lapses, created_at AS submitted_at,
    finished_at AS died_at, failure ->> 'message' AS problem
FROM requests WHERE coalesce(status = 'dead', false)
ORDER BY finished_at DESC LIMIT $1

-- name: discard_dead
-- Cancel a dead job for good, by decision of a person.
UPDATE requests SET status = 'cancelled', claim = claim + 1, version = version + 1
WHERE id = $1 AND status = 'dead'
RETURNING id

-- name: list_given_up
-- List the $1 webhooks that were given up last.
SELECT id AS webhook_id, request_id, tenant_id AS tenant, event, url, tries, answer_status, problem,
    ended_at AS given_up_at
FROM webhooks WHERE coalesce(state = 'given_up', false)
ORDER BY ended_at DESC LIMIT $1

-- name: sums_of_calls
-- Sum the calls of a conversation or trace $2 of tenant $1; {column} is our own name.
SELECT count(*) AS calls, count(*) FILTER (WHERE status <> 'succeeded') AS failed,
    count(*) FILTER (WHERE cost_micros IS NULL) AS unpriced,
    min(submitted_at) AS began_at, max(finished_at) AS ended_at,
    coalesce(sum(queue_ms), 0) AS queue_ms, coalesce(sum(upstream_ms), 0) AS upstream_ms,
    coalesce(sum(input_tokens), 0)::bigint AS input_tokens,
    coalesce(sum(cached_tokens), 0)::bigint AS cached_tokens,
    coalesce(sum(input_tokens) FILTER (WHERE cached_tokens IS NOT NULL), 0)::bigint AS cached_of,
    coalesce(sum(output_tokens), 0)::bigint AS output_tokens,
    coalesce(sum(cost_micros), 0)::bigint AS cost_micros
FROM audit WHERE tenant_id = $1 AND {column} = $2

-- name: calls_together
-- Return the last $3 calls received of a conversation or trace $2 of tenant $1.
SELECT request_id, source, status, endpoint, model, upstream, attempts, submitted_at, admitted_at,
    finished_at, queue_ms, upstream_ms, first_byte_ms, input_tokens, output_tokens, thoughts_tokens,
    cached_tokens, total_tokens, usage_state, cost_micros, failure ->> 'code' AS failure_code,
    conversation, opening, parent_id, trace_id, parent_span
FROM audit WHERE tenant_id = $1 AND {column} = $2
ORDER BY submitted_at DESC, id DESC LIMIT $3

-- name: search_words_from
-- Return the first day of the full-text index of the audit, as the end of a partition's name.
SELECT min(substring(c.relname FROM '[0-9]+$')) FROM pg_inherits i
JOIN pg_index x ON x.indexrelid = i.inhrelid JOIN pg_class c ON c.oid = x.indrelid
WHERE i.inhparent = 'audit_words'::regclass

-- name: recently_ended
-- Return those of the last $4 rows before audit row $1, from time $2 on, that contain the words $3.
-- The words are also matched as given, because a parsed part of an address, such as ann@example, would
-- not match the whole address.
SELECT * FROM (
    SELECT * FROM audit WHERE id < $1 AND created_at >= $2 ORDER BY id DESC LIMIT $4
) AS latest
WHERE (setweight(to_tsvector('simple'::regconfig,
        coalesce(subject, '') || ' ' || coalesce(key_id, '')), 'A')
    || to_tsvector('simple'::regconfig, coalesce(prompt_head, '')))
    @@ (to_tsquery('simple', $3::text) || lower($3::text)::tsquery)

-- name: ended_with_words
-- Return all rows before audit row $1, from time $2 on, that contain the words $3, without the bound $4.
SELECT * FROM audit
WHERE id < $1 AND created_at >= $2 AND $4::bigint >= 0
    AND (setweight(to_tsvector('simple'::regconfig,
        coalesce(subject, '') || ' ' || coalesce(key_id, '')), 'A')
    || to_tsvector('simple'::regconfig, coalesce(prompt_head, '')))
    @@ (to_tsquery('simple', $3::text) || lower($3::text)::tsquery)
OFFSET 0

-- name: search_words
-- Return the last $5 of the rows {among} that match the other conditions, from row $17 on.
SELECT id AS place, request_id AS id, tenant_id, pool, source, status, kind, model, priority,
    attempts, submitted_at AS created_at, admitted_at, finished_at, queue_ms, upstream_ms,
    total_tokens, failure ->> 'code' AS failure_code, subject, endpoint, conversation, upstream,
    key_id, cost_micros, prompt_head, usage_details ->> 'tier' AS tier
FROM ({among}) AS found
WHERE ($6::text[] IS NULL OR status = ANY($6)) AND ($7::text IS NULL OR tenant_id = $7)
    AND ($8::text IS NULL OR model = $8) AND ($9::text IS NULL OR kind = $9)
    AND ($10::text IS NULL OR source = $10)
    AND ($11::text IS NULL OR failure ->> 'code' = $11)
    AND ($12::text IS NULL OR subject = $12) AND ($13::text IS NULL OR conversation = $13)
    AND submitted_at >= $14 AND submitted_at < $15 AND ($16::text IS NULL OR upstream = $16)
    AND found.id >= $17::uuid
ORDER BY found.id DESC LIMIT $5
