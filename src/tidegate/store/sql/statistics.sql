-- Ended calls, counted by process and time span; queue depths; past calls. Every count of queue depths
-- is bounded, and scans an index of only what it counts.

-- name: write_history
-- Store the counts of a process for some time spans, replacing its earlier counts of them.
INSERT INTO history AS kept (step_s, at, pool, instance_id, counts, apart, waits, lengths)
SELECT step_s, to_timestamp(at), pool, $1, counts::jsonb, apart::jsonb, waits, lengths
FROM unnest($2::integer[], $3::float8[], $4::text[], $5::text[], $6::text[], $7::bytea[],
    $8::bytea[]) AS row (step_s, at, pool, counts, apart, waits, lengths)
ON CONFLICT (step_s, at, pool, instance_id) DO UPDATE SET
    counts = excluded.counts, apart = excluded.apart,
    waits = excluded.waits, lengths = excluded.lengths

-- name: read_history
-- Return the counts of all processes for the spans of $1 seconds that begin at $2 or later.
SELECT extract(epoch FROM at)::bigint AS at, pool, counts, apart, waits, lengths FROM history
WHERE step_s = $1 AND at >= to_timestamp($2::float8)
ORDER BY at LIMIT $3

-- name: forget_history
-- Delete the spans of $1 seconds that began before $2.
DELETE FROM history WHERE step_s = $1 AND at < to_timestamp($2::float8)

-- name: past_calls
-- Return the last $4 calls of pool $1 that were submitted from $2 on and before $3, newest first.
-- Jobs and streams are recorded with the pool in which they were queued, but had permits of their
-- upstream's pool. A job has its tier, its allowed tiers and the ms until it was due as long as its own
-- row exists. A job in a provider's batch had no permit.
SELECT submitted_at, tenant_id, kind, model, priority, coalesce(upstream_ms, 0) AS upstream_ms,
    coalesce(input_tokens, 0) AS input_tokens,
    coalesce(output_tokens, 0) + coalesce(thoughts_tokens, 0) AS output_tokens,
    coalesce(cached_tokens, 0) AS cached_tokens,
    coalesce((usage_details ->> 'cache_write_tokens')::bigint, 0) AS cache_write_tokens,
    coalesce(images, 0) AS images, coalesce(cost_micros, 0) AS cost_micros, key_id, subject,
    (extract(epoch FROM admitted_at - submitted_at) * 1000)::float8 AS waited_ms,
    source = 'batch' OR source = 'job' AND endpoint IS NOT NULL AS gives_way,
    tier, tiers_allowed AS tiers,
    (extract(epoch FROM deadline_at - submitted_at) * 1000)::float8 AS due_ms
FROM audit LEFT JOIN LATERAL (
    SELECT tier, tiers_allowed, deadline_at FROM requests r
    WHERE audit.source = 'job' AND r.id = audit.request_id) AS job ON true
WHERE coalesce(nullif(upstream, ''), pool) = $1
    AND created_at >= $2 AND submitted_at >= $2 AND submitted_at < $3
    AND admitted_at IS NOT NULL
ORDER BY submitted_at DESC LIMIT $4

-- name: latency_of_hours
-- Return by hour from $1 to $2 how long requests of tenant $3 and upstream $6, if given, took.
-- That is their waits, calls and totals, with the $4 slowest tenants, models, upstreams, types and
-- errors of each hour. Batch lines, which may take a day, and requests that ended over a day after $2
-- are left out. If the log has more than $5 pages of these days, one page in `one_in` is read, evenly
-- spread so that each hour is represented, and counts and sums are multiplied by it.
WITH size AS (
    SELECT greatest(1, ceil(sum(pages) / $5::float8))::bigint AS one_in, max(pages) AS most FROM (
        SELECT pg_relation_size(relid) / current_setting('block_size')::bigint AS pages
        FROM pg_partition_tree('audit')
        WHERE isleaf AND (relid::text !~ '_[0-9]{8}$' OR right(relid::text, 8)
            BETWEEN to_char($1::timestamptz AT TIME ZONE 'UTC', 'YYYYMMDD')
            AND to_char(($2::timestamptz + interval '1 day') AT TIME ZONE 'UTC', 'YYYYMMDD'))
    ) AS partitions
), calls AS MATERIALIZED (
    SELECT date_bin('1 hour', submitted_at, $1) AS at, one_in, tenant_id, model, upstream, kind, code,
        has_failed, called_ms, took_ms,
        CASE WHEN admitted_at IS NULL THEN took_ms ELSE coalesce(queue_ms, 0) END AS waited_ms
    FROM size CROSS JOIN LATERAL generate_series(0, most, one_in) AS page CROSS JOIN LATERAL (
        SELECT submitted_at, admitted_at, queue_ms, tenant_id, model, kind, failure ->> 'code' AS code,
            coalesce(nullif(upstream, ''), nullif(pool, '')) AS upstream,
            status IN ('failed', 'dead', 'expired') AS has_failed,
            coalesce(upstream_ms, 0) AS called_ms,
            1000 * date_part('epoch', finished_at - submitted_at) AS took_ms
        FROM audit
        WHERE ctid >= format('(%s,0)', page)::tid AND ctid < format('(%s,0)', page + 1)::tid
            AND created_at >= $1 AND created_at < $2 + interval '1 day'
            AND submitted_at >= $1 AND submitted_at < $2 AND source <> 'batch'
            AND ($3::text IS NULL OR tenant_id = $3)
            AND ($6::text IS NULL OR coalesce(nullif(upstream, ''), pool) = $6)
        OFFSET 0
    ) AS logged
), hours AS (
    SELECT at, min(one_in) AS one_in, count(*) AS sampled, min(one_in) * count(*) AS requests,
        min(one_in) * count(*) FILTER (WHERE has_failed) AS failed,
        percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY waited_ms) AS waited_ms,
        percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY called_ms) AS called_ms,
        percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY took_ms) AS took_ms,
        min(one_in) * sum(waited_ms) AS waited_sum_ms, min(one_in) * sum(called_ms) AS called_sum_ms,
        min(one_in) * sum(greatest(0, took_ms - waited_ms - called_ms)) AS between_sum_ms
    FROM calls GROUP BY at
), sums AS (
    SELECT at, CASE WHEN grouping(tenant_id) = 0 THEN 'tenant' WHEN grouping(model) = 0 THEN 'model'
            WHEN grouping(upstream) = 0 THEN 'upstream' WHEN grouping(kind) = 0 THEN 'type'
            ELSE 'error' END AS of,
        coalesce(tenant_id, model, upstream, kind, code) AS name,
        min(one_in) * count(*) AS requests, min(one_in) * sum(waited_ms) AS waited_sum_ms,
        min(one_in) * sum(called_ms) AS called_sum_ms
    FROM calls
    GROUP BY GROUPING SETS ((at, tenant_id), (at, model), (at, upstream), (at, kind), (at, code))
    HAVING coalesce(tenant_id, model, upstream, kind, code) IS NOT NULL
), ranked AS (
    SELECT *, row_number() OVER (PARTITION BY at, of ORDER BY waited_sum_ms + called_sum_ms DESC, name) AS place
    FROM sums
), parts AS (
    SELECT at, json_agg(json_build_object('of', of, 'name', name, 'requests', requests, 'waited_sum_ms',
        waited_sum_ms, 'called_sum_ms', called_sum_ms) ORDER BY of, place) AS parts
    FROM ranked WHERE place <= $4 GROUP BY at
)
SELECT hours.*, coalesce(parts.parts, '[]') AS parts FROM hours LEFT JOIN parts USING (at) ORDER BY at

-- name: depth_of_queues
-- Count the ready jobs in at most $1 queues, at most $2 in each, with the time of the oldest.
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

-- name: depth_of_jobs
-- Count jobs that wait for a retry, are claimed, run or are dead, at most $1 of each, and more.
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

-- name: jobs_ahead
-- Count at most $2 open jobs of pool $1 by lane and due time.
-- Due times are exact to about 5 % of the time until then. Running jobs without a claimant are in a
-- provider's batch.
WITH open AS (
    (SELECT lane, deadline_at, not_before IS NULL AS is_waiting FROM requests
        WHERE coalesce(status = 'queued' AND deadline_at IS NOT NULL, false) AND pool = $1
        ORDER BY deadline_at LIMIT $2)
    UNION ALL
    (SELECT lane, deadline_at, false FROM requests
        WHERE coalesce(status = 'running' AND claimed_by IS NULL AND tier = 'batch', false)
            AND pool = $1 AND deadline_at IS NOT NULL
        LIMIT $2)
    UNION ALL
    (SELECT lane, NULL, true FROM requests
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false)
            AND pool = $1 AND deadline_at IS NULL
        LIMIT $2)
)
SELECT lane, min(deadline_at) AS due_at, count(*) AS jobs,
    count(*) FILTER (WHERE is_waiting) AS waiting
FROM open
GROUP BY lane, trunc(50 * log(greatest(1, extract(epoch FROM deadline_at - now()))))

-- name: lines_ahead
-- Lines that have not ended, by when their batches expire.
SELECT expires_at AS due_at, sum(total - completed - failed)::bigint AS lines FROM batches
WHERE status = 'in_progress' AND paused_at IS NULL GROUP BY expires_at

-- name: day_uses
-- Sum what admitted calls of pool $1 used from $2 on, by the scopes of limits.
-- Keys, subjects and conversations are separate if they are in $3, $4 and $5. Calls in a provider's
-- batch had no permit, and operations without a model count under none.
SELECT kind, model, tenant_id, key_id, subject, conversation, count(*) AS requests,
    sum(input_tokens)::bigint AS input_tokens, sum(output_tokens)::bigint AS output_tokens,
    sum(least(cached_tokens, input_tokens))::bigint AS cached_tokens,
    sum(cache_write_tokens)::bigint AS cache_write_tokens, sum(images)::bigint AS images,
    sum(audio_seconds)::bigint AS audio_seconds, sum(cost_micros)::bigint AS cost_micros
FROM (
    SELECT coalesce(kind, '') AS kind, tenant_id,
        CASE WHEN kind IS NULL AND usage_state = 'none' THEN '' ELSE coalesce(model, '') END AS model,
        CASE WHEN key_id = ANY($3::text[]) THEN key_id END AS key_id,
        CASE WHEN subject = ANY($4::text[]) THEN subject END AS subject,
        CASE WHEN conversation = ANY($5::text[]) THEN conversation END AS conversation,
        coalesce(input_tokens, 0) AS input_tokens,
        coalesce(output_tokens, 0) + coalesce(thoughts_tokens, 0) AS output_tokens,
        coalesce(cached_tokens, 0) AS cached_tokens,
        coalesce((usage_details ->> 'cache_write_tokens')::bigint, 0) AS cache_write_tokens,
        coalesce(images, 0) AS images, coalesce(cost_micros, 0) AS cost_micros,
        coalesce((usage_details ->> 'input_audio_seconds')::bigint, 0) AS audio_seconds
    FROM audit
    WHERE coalesce(nullif(upstream, ''), pool) = $1 AND created_at >= $2 AND admitted_at >= $2
        AND NOT (source = 'job' AND EXISTS (
            SELECT FROM requests r WHERE r.id = audit.request_id AND r.tier = 'batch'))
) AS calls
GROUP BY 1, 2, 3, 4, 5, 6
