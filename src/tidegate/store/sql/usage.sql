-- Totals of ended requests by tenant, day and model, and the same sums of the request log.

-- name: add_usage
-- Add new records to the totals, in one order everywhere, so that no deadlock occurs.
INSERT INTO usage_days AS kept (tenant_id, day, model, pool, requests, input_tokens, output_tokens,
    cached_tokens, thoughts_tokens, images, cost_micros, unpriced, partial, estimated, unknown,
    cache_write_tokens, input_audio_tokens, input_image_tokens, input_video_tokens,
    output_audio_tokens, output_image_tokens, output_video_tokens,
    searches, provider_cost_micros)
SELECT tenant_id, day, model, pool, requests, input_tokens, output_tokens,
    cached_tokens, thoughts_tokens, images, cost_micros, unpriced, partial, estimated, unknown,
    cache_write_tokens, input_audio_tokens, input_image_tokens, input_video_tokens,
    output_audio_tokens, output_image_tokens, output_video_tokens,
    searches, provider_cost_micros
FROM json_to_recordset($1::json) AS row (tenant_id text, day date, model text, pool text,
    requests bigint, input_tokens bigint, output_tokens bigint, cached_tokens bigint,
    thoughts_tokens bigint, images bigint, cost_micros bigint, unpriced bigint, partial bigint,
    estimated bigint, unknown bigint,
    cache_write_tokens bigint, input_audio_tokens bigint, input_image_tokens bigint,
    input_video_tokens bigint, output_audio_tokens bigint, output_image_tokens bigint,
    output_video_tokens bigint, searches bigint, provider_cost_micros bigint)
ORDER BY tenant_id, day, model, pool
ON CONFLICT (tenant_id, day, model, pool) DO UPDATE SET
    requests = kept.requests + excluded.requests,
    input_tokens = kept.input_tokens + excluded.input_tokens,
    output_tokens = kept.output_tokens + excluded.output_tokens,
    cached_tokens = kept.cached_tokens + excluded.cached_tokens,
    thoughts_tokens = kept.thoughts_tokens + excluded.thoughts_tokens,
    images = kept.images + excluded.images,
    cost_micros = kept.cost_micros + excluded.cost_micros,
    unpriced = kept.unpriced + excluded.unpriced,
    partial = kept.partial + excluded.partial,
    estimated = kept.estimated + excluded.estimated,
    unknown = kept.unknown + excluded.unknown,
    cache_write_tokens = kept.cache_write_tokens + excluded.cache_write_tokens,
    input_audio_tokens = kept.input_audio_tokens + excluded.input_audio_tokens,
    input_image_tokens = kept.input_image_tokens + excluded.input_image_tokens,
    input_video_tokens = kept.input_video_tokens + excluded.input_video_tokens,
    output_audio_tokens = kept.output_audio_tokens + excluded.output_audio_tokens,
    output_image_tokens = kept.output_image_tokens + excluded.output_image_tokens,
    output_video_tokens = kept.output_video_tokens + excluded.output_video_tokens,
    searches = kept.searches + excluded.searches,
    provider_cost_micros = kept.provider_cost_micros + excluded.provider_cost_micros

-- name: as_of_one_moment
-- Make all statements of this transaction read one snapshot of the record.
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ

-- name: usage_state
-- Return which sums of the days from $1 to $2 are valid at level $3.
-- The columns: days summed up whole, days summed up to a time, weeks summed up from the present sums of
-- their days, the first and last day with usage, days with a partition of the log, and the first day with
-- calls in the default one. $4: the sums must distinguish keys, unlike those of an earlier version. Groups are
-- hashed, not sorted: the planner's estimates for new sums are too low.
WITH unchanged AS (
    SELECT d.day, d.until FROM (
        SELECT day, NULL::timestamptz AS until FROM summed_days
        UNION ALL
        SELECT p.day, p.until FROM partial_days p
        WHERE NOT EXISTS (SELECT FROM summed_days s WHERE s.day = p.day)
    ) AS d
    WHERE $3::text IS NOT NULL AND d.day BETWEEN $1::date AND $2::date
        AND NOT EXISTS (SELECT FROM changed_days c WHERE c.day = d.day)
)
SELECT ARRAY(
        SELECT day FROM unchanged WHERE until IS NULL AND (NOT $4::boolean OR EXISTS (
            SELECT FROM usage_sums u WHERE u.day = unchanged.day AND u.level = $3 AND u.key_id <> ''))
    ) AS summed,
    ARRAY(
        SELECT week FROM summed_weeks w WHERE w.week BETWEEN $1::date AND $2::date AND w.summed_at = ARRAY(
            SELECT s.summed_at FROM summed_days s WHERE s.day BETWEEN w.week AND w.week + 6 ORDER BY s.day)
    ) AS weeks,
    ARRAY(SELECT day FROM unchanged WHERE until IS NOT NULL ORDER BY day) AS begun,
    ARRAY(SELECT until FROM unchanged WHERE until IS NOT NULL ORDER BY day) AS untils,
    (SELECT min(day) FROM usage_days) AS first, (SELECT max(day) FROM usage_days) AS last,
    ARRAY(
        SELECT day FROM (
            SELECT to_date(substring(c.relname FROM '[0-9]{8}$'), 'YYYYMMDD') AS day FROM pg_inherits i
            JOIN pg_class c ON c.oid = i.inhrelid
            WHERE i.inhparent = 'audit'::regclass AND c.relname ~ '_[0-9]{8}$'
        ) AS parted WHERE day BETWEEN $1::date AND $2::date
    ) AS parted,
    (SELECT (min(created_at) AT TIME ZONE 'UTC')::date FROM audit_default) AS unparted_since,
    set_config('enable_sort', 'off', true) AS unsorted

-- name: get_usage
-- Return the first $10 totals as JSON, and the total of all.
-- They are grouped by tenant, model, day, key and upstream as $1 to $5 say, over the spans of days from $6
-- to $7, of tenant $8 and upstream $9 if given. They are read from the sums of level $11 of days $12 and of
-- weeks $18, from the totals of days $13, and from the calls recorded from $14 until $15. All of these lie
-- between $16 and $17. If $19, the calls that operators made as a tenant have the key `operator`.
WITH logged AS MATERIALIZED (
    SELECT CASE WHEN $3::boolean THEN (a.finished_at AT TIME ZONE 'UTC')::date ELSE ($6::date[])[1] END AS ended_day,
        CASE WHEN $1::boolean THEN a.tenant_id END AS tenant,
        CASE WHEN $2::boolean THEN coalesce(a.model, '') END AS model,
        CASE WHEN $4::boolean THEN coalesce(a.key_id, '') END AS key,
        CASE WHEN $5::boolean THEN coalesce(a.upstream, a.pool) END AS upstream,
        count(*) AS requests,
        coalesce(usage_total(input_tokens), 0) AS input_tokens,
        coalesce(usage_total(output_tokens), 0) AS output_tokens,
        coalesce(usage_total(cached_tokens), 0) AS cached_tokens,
        coalesce(usage_total(thoughts_tokens), 0) AS thoughts_tokens,
        coalesce(usage_total(images), 0) AS images,
        coalesce(usage_total(cost_micros), 0) AS cost_micros,
        count(*) FILTER (WHERE cost_micros IS NULL AND usage_state IS DISTINCT FROM 'unknown') AS unpriced,
        count(*) FILTER (WHERE usage_state = 'partial') AS partial,
        count(*) FILTER (WHERE usage_state = 'estimated') AS estimated,
        count(*) FILTER (WHERE usage_state = 'unknown') AS unknown,
        coalesce(usage_total((usage_details ->> 'cache_write_tokens')::bigint), 0) AS cache_write_tokens,
        coalesce(usage_total((usage_details ->> 'input_audio_tokens')::bigint), 0) AS input_audio_tokens,
        coalesce(usage_total((usage_details ->> 'input_image_tokens')::bigint), 0) AS input_image_tokens,
        coalesce(usage_total((usage_details ->> 'input_video_tokens')::bigint), 0) AS input_video_tokens,
        coalesce(usage_total((usage_details ->> 'output_audio_tokens')::bigint), 0) AS output_audio_tokens,
        coalesce(usage_total((usage_details ->> 'output_image_tokens')::bigint), 0) AS output_image_tokens,
        coalesce(usage_total((usage_details ->> 'output_video_tokens')::bigint), 0) AS output_video_tokens,
        coalesce(usage_total((usage_details ->> 'searches')::bigint), 0) AS searches,
        coalesce(usage_total((usage_details ->> 'provider_cost_micros')::bigint), 0) AS provider_cost_micros
    FROM unnest($14::timestamptz[], $15::timestamptz[]) AS part (begin_at, end_at) JOIN LATERAL (
        SELECT * FROM audit
        WHERE created_at >= part.begin_at AND created_at < part.end_at
            AND created_at >= $16::timestamptz AND created_at < $17::timestamptz
            AND finished_at >= ($6::date[])[1]::timestamp AT TIME ZONE 'UTC'
            AND finished_at < (($7::date[])[cardinality($7::date[])] + 1)::timestamp AT TIME ZONE 'UTC'
            AND ($8::text IS NULL OR tenant_id = $8)
            AND ($9::text IS NULL OR coalesce(upstream, pool) = $9)
        OFFSET 0
    ) AS a ON true
    GROUP BY 1, 2, 3, 4, 5
)
SELECT count(*) AS shown, coalesce(string_agg(concat(
            '{"requests":', requests, ',"input_tokens":', input_tokens,
            ',"output_tokens":', output_tokens, ',"cached_tokens":', cached_tokens,
            ',"thoughts_tokens":', thoughts_tokens, ',"images":', images,
            ',"cost_micros":', cost_micros, ',"unpriced":', unpriced,
            ',"partial":', partial, ',"estimated":', estimated,
            ',"unknown":', unknown, ',"cache_write_tokens":', cache_write_tokens,
            CASE WHEN (input_audio_tokens | input_image_tokens | input_video_tokens | output_audio_tokens
                    | output_image_tokens | output_video_tokens | searches | provider_cost_micros) = 0
                THEN ',"input_audio_tokens":0,"input_image_tokens":0,"input_video_tokens":0'
                    || ',"output_audio_tokens":0,"output_image_tokens":0,"output_video_tokens":0,"searches":0,"provider_cost_micros":0'
                ELSE concat(
                    ',"input_audio_tokens":', input_audio_tokens, ',"input_image_tokens":', input_image_tokens,
                    ',"input_video_tokens":', input_video_tokens, ',"output_audio_tokens":', output_audio_tokens,
                    ',"output_image_tokens":', output_image_tokens, ',"output_video_tokens":', output_video_tokens,
                    ',"searches":', searches, ',"provider_cost_micros":', provider_cost_micros) END,
            CASE WHEN $1::boolean THEN ',"tenant":' || to_json(tenant)::text END,
            CASE WHEN $2::boolean THEN ',"model":' || to_json(model)::text END,
            CASE WHEN $3::boolean THEN day_text END,
            CASE WHEN $4::boolean THEN ',"key":' || to_json(key)::text END,
            CASE WHEN $5::boolean THEN ',"upstream":' || to_json(upstream)::text END,
            '}'), ','), '') AS rows,
    coalesce(usage_total(requests), 0) AS requests, coalesce(usage_total(input_tokens), 0) AS input_tokens,
    coalesce(usage_total(output_tokens), 0) AS output_tokens, coalesce(usage_total(cached_tokens), 0) AS cached_tokens,
    coalesce(usage_total(thoughts_tokens), 0) AS thoughts_tokens, coalesce(usage_total(images), 0) AS images,
    coalesce(usage_total(cost_micros), 0) AS cost_micros, coalesce(usage_total(unpriced), 0) AS unpriced,
    coalesce(usage_total(partial), 0) AS partial, coalesce(usage_total(estimated), 0) AS estimated,
    coalesce(usage_total(unknown), 0) AS unknown, coalesce(usage_total(cache_write_tokens), 0) AS cache_write_tokens,
    coalesce(usage_total(input_audio_tokens), 0) AS input_audio_tokens, coalesce(usage_total(input_image_tokens), 0) AS input_image_tokens,
    coalesce(usage_total(input_video_tokens), 0) AS input_video_tokens, coalesce(usage_total(output_audio_tokens), 0) AS output_audio_tokens,
    coalesce(usage_total(output_image_tokens), 0) AS output_image_tokens, coalesce(usage_total(output_video_tokens), 0) AS output_video_tokens,
    coalesce(usage_total(searches), 0) AS searches, coalesce(usage_total(provider_cost_micros), 0) AS provider_cost_micros
FROM (
    SELECT span.first AS day, s.*, span.day_text FROM (
        SELECT first, last, ',"day":' || to_json(first)::text AS day_text
        FROM unnest($6::date[], $7::date[]) AS days (first, last) ORDER BY first
    ) AS span CROSS JOIN LATERAL (
        SELECT tenant, model,
            CASE WHEN $19::boolean AND starts_with(key, 'operator:') THEN 'operator' ELSE key END AS key, upstream,
            coalesce(usage_total(requests), 0) AS requests, coalesce(usage_total(input_tokens), 0) AS input_tokens,
            coalesce(usage_total(output_tokens), 0) AS output_tokens, coalesce(usage_total(cached_tokens), 0) AS cached_tokens,
            coalesce(usage_total(thoughts_tokens), 0) AS thoughts_tokens, coalesce(usage_total(images), 0) AS images,
            coalesce(usage_total(cost_micros), 0) AS cost_micros, coalesce(usage_total(unpriced), 0) AS unpriced,
            coalesce(usage_total(partial), 0) AS partial, coalesce(usage_total(estimated), 0) AS estimated,
            coalesce(usage_total(unknown), 0) AS unknown, coalesce(usage_total(cache_write_tokens), 0) AS cache_write_tokens,
            coalesce(usage_total(input_audio_tokens), 0) AS input_audio_tokens, coalesce(usage_total(input_image_tokens), 0) AS input_image_tokens,
            coalesce(usage_total(input_video_tokens), 0) AS input_video_tokens, coalesce(usage_total(output_audio_tokens), 0) AS output_audio_tokens,
            coalesce(usage_total(output_image_tokens), 0) AS output_image_tokens, coalesce(usage_total(output_video_tokens), 0) AS output_video_tokens,
            coalesce(usage_total(searches), 0) AS searches, coalesce(usage_total(provider_cost_micros), 0) AS provider_cost_micros
        FROM (
            SELECT CASE WHEN $1::boolean THEN tenant_id END AS tenant,
                CASE WHEN $2::boolean THEN model END AS model, CASE WHEN $4::boolean THEN key_id END AS key,
                CASE WHEN $5::boolean THEN upstream END AS upstream,
                requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros, unpriced,
                partial, estimated, unknown, cache_write_tokens, input_audio_tokens, input_image_tokens,
                input_video_tokens, output_audio_tokens, output_image_tokens, output_video_tokens, searches,
                provider_cost_micros
            FROM usage_sums
            WHERE level = $11 AND day = ANY ($12::date[]) AND ended_day BETWEEN span.first AND span.last
                AND ($8::text IS NULL OR tenant_id = $8) AND ($9::text IS NULL OR upstream = $9)
            UNION ALL
            SELECT CASE WHEN $1::boolean THEN tenant_id END, CASE WHEN $2::boolean THEN model END,
                CASE WHEN $4::boolean THEN key_id END, CASE WHEN $5::boolean THEN upstream END,
                requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros, unpriced,
                partial, estimated, unknown, cache_write_tokens, input_audio_tokens, input_image_tokens,
                input_video_tokens, output_audio_tokens, output_image_tokens, output_video_tokens, searches,
                provider_cost_micros
            FROM usage_weeks
            WHERE level = $11 AND week = ANY ($18::date[]) AND ended_day BETWEEN span.first AND span.last
                AND ($8::text IS NULL OR tenant_id = $8) AND ($9::text IS NULL OR upstream = $9)
            UNION ALL
            SELECT CASE WHEN $1::boolean THEN tenant_id END, CASE WHEN $2::boolean THEN model END, NULL, NULL,
                requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros, unpriced,
                partial, estimated, unknown, cache_write_tokens, input_audio_tokens, input_image_tokens,
                input_video_tokens, output_audio_tokens, output_image_tokens, output_video_tokens, searches,
                provider_cost_micros
            FROM usage_days
            WHERE day = ANY ($13::date[]) AND day BETWEEN span.first AND span.last
                AND ($8::text IS NULL OR tenant_id = $8) AND ($9::text IS NULL OR pool = $9)
            UNION ALL
            SELECT tenant, model, key, upstream,
                requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros, unpriced,
                partial, estimated, unknown, cache_write_tokens, input_audio_tokens, input_image_tokens,
                input_video_tokens, output_audio_tokens, output_image_tokens, output_video_tokens, searches,
                provider_cost_micros
            FROM logged WHERE ended_day BETWEEN span.first AND span.last
        ) AS found
        GROUP BY 1, 2, 3, 4
    ) AS s
    ORDER BY 1, 2, 3, 4, 5 LIMIT $10
) AS total

-- name: days_to_sum
-- Return past days that are not summed up, or have changed since, newest first.
-- They begin at the first day with usage or a call.
SELECT day FROM (
    SELECT d::date AS day FROM generate_series(
        (SELECT least((SELECT min(day) FROM usage_days), (
            SELECT min(to_date(substring(c.relname FROM '[0-9]{8}$'), 'YYYYMMDD')) FROM pg_inherits i
            JOIN pg_class c ON c.oid = i.inhrelid
            WHERE i.inhparent = 'audit'::regclass AND c.relname ~ '_[0-9]{8}$'))),
        ((now() - interval '10 minutes') AT TIME ZONE 'UTC')::date - 1, interval '1 day') AS d
) AS past
WHERE NOT EXISTS (SELECT FROM summed_days s WHERE s.day = past.day)
    OR EXISTS (SELECT FROM changed_days c WHERE c.day = past.day)
ORDER BY day DESC

-- name: part_to_sum
-- Return the current day and the time up to which to sum it up.
-- No row if it is summed up to that time and has not changed since.
SELECT day, until FROM (
    SELECT (now() AT TIME ZONE 'UTC')::date AS day, date_trunc('hour', now() - interval '1 hour', 'UTC') AS until
) AS part
WHERE until > day::timestamp AT TIME ZONE 'UTC'
    AND (NOT EXISTS (SELECT FROM partial_days p WHERE p.day = part.day AND p.until >= part.until)
        OR EXISTS (SELECT FROM changed_days c WHERE c.day = part.day))

-- name: lock_summed_day
-- Return whether no other process sums up day $1, and lock it until this transaction ends.
SELECT pg_try_advisory_xact_lock(7423004, $1::date - '2000-01-01'::date)

-- name: take_changes
-- Delete the changes of day $1 so far; their rows are committed, so that a later statement sees them.
DELETE FROM changed_days WHERE day = $1

-- name: forget_sums
-- Delete the sums of day $1.
DELETE FROM usage_sums WHERE day = $1

-- name: sum_logged_day
-- Sum up the calls recorded on day $1 before $2; rows that are read together are stored together.
INSERT INTO usage_sums (day, level, ended_day, tenant_id, key_id, upstream,
    requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros,
    unpriced, partial, estimated, unknown, cache_write_tokens, input_audio_tokens,
    input_image_tokens, input_video_tokens, output_audio_tokens, output_image_tokens,
    output_video_tokens, searches, provider_cost_micros)
SELECT $1::date, CASE WHEN grouping(tenant_id) = 1 THEN 'upstream' WHEN grouping(upstream) = 1
        THEN 'key' ELSE 'tenant_upstream' END, ended_day, coalesce(tenant_id, ''),
    coalesce(key_id, ''), coalesce(upstream, ''),
    count(*), coalesce(usage_total(input_tokens), 0), coalesce(usage_total(output_tokens), 0),
    coalesce(usage_total(cached_tokens), 0), coalesce(usage_total(thoughts_tokens), 0),
    coalesce(usage_total(images), 0), coalesce(usage_total(cost_micros), 0),
    count(*) FILTER (WHERE cost_micros IS NULL AND usage_state IS DISTINCT FROM 'unknown'),
    count(*) FILTER (WHERE usage_state = 'partial'),
    count(*) FILTER (WHERE usage_state = 'estimated'),
    count(*) FILTER (WHERE usage_state = 'unknown'),
    coalesce(usage_total((usage_details ->> 'cache_write_tokens')::bigint), 0),
    coalesce(usage_total((usage_details ->> 'input_audio_tokens')::bigint), 0),
    coalesce(usage_total((usage_details ->> 'input_image_tokens')::bigint), 0),
    coalesce(usage_total((usage_details ->> 'input_video_tokens')::bigint), 0),
    coalesce(usage_total((usage_details ->> 'output_audio_tokens')::bigint), 0),
    coalesce(usage_total((usage_details ->> 'output_image_tokens')::bigint), 0),
    coalesce(usage_total((usage_details ->> 'output_video_tokens')::bigint), 0),
    coalesce(usage_total((usage_details ->> 'searches')::bigint), 0),
    coalesce(usage_total((usage_details ->> 'provider_cost_micros')::bigint), 0)
FROM (
    SELECT (finished_at AT TIME ZONE 'UTC')::date AS ended_day, tenant_id,
        coalesce(key_id, '') AS key_id, coalesce(upstream, pool) AS upstream,
        input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros,
        usage_state, usage_details
    FROM audit
    WHERE created_at >= $1::date::timestamp AT TIME ZONE 'UTC'
        AND created_at < $2::timestamptz
) AS calls
GROUP BY GROUPING SETS ((ended_day, tenant_id, key_id), (ended_day, upstream),
    (ended_day, tenant_id, key_id, upstream))
ORDER BY 2, 3, 6, 4, 5

-- name: sum_usage_day
-- Sum up the totals of day $1.
INSERT INTO usage_sums (day, level, ended_day, tenant_id, model,
    requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros,
    unpriced, partial, estimated, unknown, cache_write_tokens, input_audio_tokens,
    input_image_tokens, input_video_tokens, output_audio_tokens, output_image_tokens,
    output_video_tokens, searches, provider_cost_micros)
SELECT $1::date, CASE WHEN grouping(model) = 0 THEN 'model' ELSE 'tenant' END, $1::date,
    coalesce(tenant_id, ''), coalesce(model, ''),
    usage_total(requests), usage_total(input_tokens), usage_total(output_tokens),
    usage_total(cached_tokens), usage_total(thoughts_tokens), usage_total(images),
    usage_total(cost_micros), usage_total(unpriced), usage_total(partial), usage_total(estimated),
    usage_total(unknown), usage_total(cache_write_tokens), usage_total(input_audio_tokens),
    usage_total(input_image_tokens), usage_total(input_video_tokens),
    usage_total(output_audio_tokens), usage_total(output_image_tokens),
    usage_total(output_video_tokens), usage_total(searches), usage_total(provider_cost_micros)
FROM usage_days WHERE day = $1::date
GROUP BY GROUPING SETS ((tenant_id), (model))
ORDER BY 2, 4, 5

-- name: note_summed_day
-- Record that day $1 is summed up.
INSERT INTO summed_days (day) VALUES ($1) ON CONFLICT (day) DO UPDATE SET summed_at = now()

-- name: forget_summed_day
-- Record that day $1 is not summed up as a whole.
DELETE FROM summed_days WHERE day = $1

-- name: note_partial_day
-- Record that day $1 is summed up to time $2.
INSERT INTO partial_days (day, until) VALUES ($1, $2) ON CONFLICT (day) DO UPDATE SET until = excluded.until

-- name: forget_partial_day
-- Record that day $1 is summed up as a whole.
DELETE FROM partial_days WHERE day = $1

-- name: forget_logged_sums
-- Delete the sums of day $1 that come from the request log, whose rows are deleted.
DELETE FROM usage_sums WHERE day = $1 AND level IN ('key', 'upstream', 'tenant_upstream')

-- name: forget_logged_week
-- Delete the sums of the week of day $1 that come from the request log, some of whose rows are deleted.
DELETE FROM usage_weeks WHERE week = date_trunc('week', $1::date::timestamp)::date
    AND level IN ('key', 'upstream', 'tenant_upstream')

-- name: weeks_to_sum
-- Return weeks whose days are all summed up and whose own sums are missing or older, newest first.
SELECT week FROM (
    SELECT date_trunc('week', day::timestamp)::date AS week, array_agg(summed_at ORDER BY day) AS summed_at
    FROM summed_days GROUP BY 1 HAVING count(*) = 7
) AS w
WHERE NOT EXISTS (SELECT FROM summed_weeks s WHERE s.week = w.week AND s.summed_at = w.summed_at)
    AND NOT EXISTS (SELECT FROM changed_days c WHERE c.day BETWEEN w.week AND w.week + 6)
ORDER BY week DESC

-- name: note_summed_week
-- Record that week $1 is summed up from the present sums of its days.
INSERT INTO summed_weeks (week, summed_at)
SELECT $1::date, array_agg(summed_at ORDER BY day) FROM summed_days WHERE day BETWEEN $1::date AND $1::date + 6
ON CONFLICT (week) DO UPDATE SET summed_at = excluded.summed_at

-- name: forget_week
-- Delete the sums of week $1.
DELETE FROM usage_weeks WHERE week = $1

-- name: sum_week
-- Add the sums of the days of week $1. Calls that ended within the week count on its first day.
INSERT INTO usage_weeks (week, level, ended_day, tenant_id, model, key_id, upstream,
    requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros, unpriced, partial,
    estimated, unknown, cache_write_tokens, input_audio_tokens, input_image_tokens, input_video_tokens,
    output_audio_tokens, output_image_tokens, output_video_tokens, searches, provider_cost_micros)
SELECT $1::date, level, CASE WHEN ended_day BETWEEN $1::date AND $1::date + 6 THEN $1::date ELSE ended_day END,
    tenant_id, model, key_id, upstream,
    nullif(usage_total(requests), 0), nullif(usage_total(input_tokens), 0),
    nullif(usage_total(output_tokens), 0), nullif(usage_total(cached_tokens), 0),
    nullif(usage_total(thoughts_tokens), 0), nullif(usage_total(images), 0),
    nullif(usage_total(cost_micros), 0), nullif(usage_total(unpriced), 0),
    nullif(usage_total(partial), 0), nullif(usage_total(estimated), 0),
    nullif(usage_total(unknown), 0), nullif(usage_total(cache_write_tokens), 0),
    nullif(usage_total(input_audio_tokens), 0), nullif(usage_total(input_image_tokens), 0),
    nullif(usage_total(input_video_tokens), 0), nullif(usage_total(output_audio_tokens), 0),
    nullif(usage_total(output_image_tokens), 0), nullif(usage_total(output_video_tokens), 0),
    nullif(usage_total(searches), 0), nullif(usage_total(provider_cost_micros), 0)
FROM usage_sums WHERE day BETWEEN $1::date AND $1::date + 6
GROUP BY 1, 2, 3, 4, 5, 6, 7 ORDER BY 2, 3, 7, 4, 6, 5
