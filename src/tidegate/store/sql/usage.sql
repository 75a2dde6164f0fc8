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

-- name: get_usage
-- Return the totals from day $4 to day $5, of tenant $6 and upstream $9 if given.
-- They are grouped by tenant, model and day as $1 to $3 say. Days that are summed up are read from their
-- sums of level $8.
WITH summed AS MATERIALIZED (
    SELECT s.day FROM summed_days s
    WHERE $8::text IS NOT NULL AND s.day BETWEEN $4 AND $5
        AND NOT EXISTS (SELECT FROM changed_days c WHERE c.day = s.day)
), sums AS (
    SELECT CASE WHEN $1::boolean THEN tenant_id END AS tenant, CASE WHEN $2::boolean THEN model END AS model,
        CASE WHEN $3::boolean THEN day END AS day,
        requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images,
        cost_micros, unpriced, partial, estimated, unknown, cache_write_tokens,
        input_audio_tokens, input_image_tokens, input_video_tokens, output_audio_tokens,
        output_image_tokens, output_video_tokens, searches, provider_cost_micros
    FROM usage_days
    WHERE $8::text IS NULL AND day BETWEEN $4 AND $5 AND ($6::text IS NULL OR tenant_id = $6)
        AND ($9::text IS NULL OR pool = $9)
    UNION ALL
    SELECT CASE WHEN $1::boolean THEN tenant_id END, CASE WHEN $2::boolean THEN model END,
        CASE WHEN $3::boolean THEN day END,
        requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images,
        cost_micros, unpriced, partial, estimated, unknown, cache_write_tokens,
        input_audio_tokens, input_image_tokens, input_video_tokens, output_audio_tokens,
        output_image_tokens, output_video_tokens, searches, provider_cost_micros
    FROM generate_series(greatest($4, (SELECT min(day) FROM usage_days)),
        least($5, (SELECT max(day) FROM usage_days)), interval '1 day') AS d JOIN LATERAL (
        SELECT * FROM usage_days
        WHERE day = d::date AND ($6::text IS NULL OR tenant_id = $6) OFFSET 0
    ) AS u ON true
    WHERE $8::text IS NOT NULL AND d::date NOT IN (SELECT day FROM summed)
    UNION ALL
    SELECT CASE WHEN $1::boolean THEN u.tenant_id END, CASE WHEN $2::boolean THEN u.model END,
        CASE WHEN $3::boolean THEN u.ended_day END,
        u.requests, u.input_tokens, u.output_tokens, u.cached_tokens, u.thoughts_tokens, u.images,
        u.cost_micros, u.unpriced, u.partial, u.estimated, u.unknown, u.cache_write_tokens,
        u.input_audio_tokens, u.input_image_tokens, u.input_video_tokens, u.output_audio_tokens,
        u.output_image_tokens, u.output_video_tokens, u.searches, u.provider_cost_micros
    FROM usage_sums u JOIN summed s ON s.day = u.day
    WHERE u.level = $8 AND u.ended_day BETWEEN $4 AND $5 AND ($6::text IS NULL OR u.tenant_id = $6)
)
SELECT tenant, model, day,
    sum(requests)::bigint AS requests, sum(input_tokens)::bigint AS input_tokens,
    sum(output_tokens)::bigint AS output_tokens, sum(cached_tokens)::bigint AS cached_tokens,
    sum(thoughts_tokens)::bigint AS thoughts_tokens, sum(images)::bigint AS images,
    sum(cost_micros)::bigint AS cost_micros, sum(unpriced)::bigint AS unpriced,
    sum(partial)::bigint AS partial, sum(estimated)::bigint AS estimated,
    sum(unknown)::bigint AS unknown, sum(cache_write_tokens)::bigint AS cache_write_tokens,
    sum(input_audio_tokens)::bigint AS input_audio_tokens,
    sum(input_image_tokens)::bigint AS input_image_tokens,
    sum(input_video_tokens)::bigint AS input_video_tokens,
    sum(output_audio_tokens)::bigint AS output_audio_tokens,
    sum(output_image_tokens)::bigint AS output_image_tokens,
    sum(output_video_tokens)::bigint AS output_video_tokens, sum(searches)::bigint AS searches,
    sum(provider_cost_micros)::bigint AS provider_cost_micros
FROM sums GROUP BY 1, 2, 3 ORDER BY 3, 1, 2 LIMIT $7

-- name: get_logged_usage
-- Return the same totals from the request log, of upstream $11 if given.
-- They are also grouped by key and upstream as $8 and $9 say. Days that are summed up are read from
-- their sums of level $10. $12: only days whose sums distinguish keys, unlike those of an earlier
-- version.
WITH summed AS MATERIALIZED (
    SELECT s.day FROM summed_days s
    WHERE $10::text IS NOT NULL AND s.day BETWEEN $4::date - 31 AND $5
        AND NOT EXISTS (SELECT FROM changed_days c WHERE c.day = s.day)
        AND (NOT $12::boolean OR EXISTS (
            SELECT FROM usage_sums u WHERE u.day = s.day AND u.level = $10 AND u.key_id <> ''))
), logged AS MATERIALIZED (
    SELECT d::date AS day FROM generate_series($4::date - 31, $5::date, interval '1 day') AS d
    WHERE d::date NOT IN (SELECT day FROM summed)
), sums AS (
    SELECT CASE WHEN $1::boolean THEN a.tenant_id END AS tenant,
        CASE WHEN $2::boolean THEN coalesce(a.model, '') END AS model,
        CASE WHEN $3::boolean THEN (a.finished_at AT TIME ZONE 'UTC')::date END AS day,
        CASE WHEN $8::boolean THEN coalesce(a.key_id, '') END AS key,
        CASE WHEN $9::boolean THEN coalesce(a.upstream, a.pool) END AS upstream,
        count(*) AS requests, coalesce(sum(input_tokens), 0)::bigint AS input_tokens,
        coalesce(sum(output_tokens), 0)::bigint AS output_tokens,
        coalesce(sum(cached_tokens), 0)::bigint AS cached_tokens,
        coalesce(sum(thoughts_tokens), 0)::bigint AS thoughts_tokens,
        coalesce(sum(images), 0)::bigint AS images,
        coalesce(sum(cost_micros), 0)::bigint AS cost_micros,
        count(*) FILTER (WHERE cost_micros IS NULL AND usage_state IS DISTINCT FROM 'unknown') AS unpriced,
        count(*) FILTER (WHERE usage_state = 'partial') AS partial,
        count(*) FILTER (WHERE usage_state = 'estimated') AS estimated,
        count(*) FILTER (WHERE usage_state = 'unknown') AS unknown,
        coalesce(sum((usage_details ->> 'cache_write_tokens')::bigint), 0)::bigint AS cache_write_tokens,
        coalesce(sum((usage_details ->> 'input_audio_tokens')::bigint), 0)::bigint AS input_audio_tokens,
        coalesce(sum((usage_details ->> 'input_image_tokens')::bigint), 0)::bigint AS input_image_tokens,
        coalesce(sum((usage_details ->> 'input_video_tokens')::bigint), 0)::bigint AS input_video_tokens,
        coalesce(sum((usage_details ->> 'output_audio_tokens')::bigint), 0)::bigint AS output_audio_tokens,
        coalesce(sum((usage_details ->> 'output_image_tokens')::bigint), 0)::bigint AS output_image_tokens,
        coalesce(sum((usage_details ->> 'output_video_tokens')::bigint), 0)::bigint AS output_video_tokens,
        coalesce(sum((usage_details ->> 'searches')::bigint), 0)::bigint AS searches,
        coalesce(sum((usage_details ->> 'provider_cost_micros')::bigint), 0)::bigint AS provider_cost_micros
    FROM logged l JOIN LATERAL (
        SELECT * FROM audit
        WHERE created_at >= l.day::timestamp AT TIME ZONE 'UTC'
            AND created_at < (l.day + 1)::timestamp AT TIME ZONE 'UTC'
            AND finished_at >= $4::date::timestamp AT TIME ZONE 'UTC'
            AND finished_at < ($5::date + 1)::timestamp AT TIME ZONE 'UTC'
            AND ($6::text IS NULL OR tenant_id = $6)
            AND ($11::text IS NULL OR coalesce(upstream, pool) = $11)
        OFFSET 0
    ) AS a ON true
    GROUP BY 1, 2, 3, 4, 5
    UNION ALL
    SELECT CASE WHEN $1::boolean THEN u.tenant_id END, NULL,
        CASE WHEN $3::boolean THEN u.ended_day END, CASE WHEN $8::boolean THEN u.key_id END,
        CASE WHEN $9::boolean THEN u.upstream END,
        sum(u.requests)::bigint, sum(u.input_tokens)::bigint, sum(u.output_tokens)::bigint,
        sum(u.cached_tokens)::bigint, sum(u.thoughts_tokens)::bigint, sum(u.images)::bigint,
        sum(u.cost_micros)::bigint, sum(u.unpriced)::bigint, sum(u.partial)::bigint,
        sum(u.estimated)::bigint, sum(u.unknown)::bigint, sum(u.cache_write_tokens)::bigint,
        sum(u.input_audio_tokens)::bigint, sum(u.input_image_tokens)::bigint,
        sum(u.input_video_tokens)::bigint, sum(u.output_audio_tokens)::bigint,
        sum(u.output_image_tokens)::bigint, sum(u.output_video_tokens)::bigint,
        sum(u.searches)::bigint, sum(u.provider_cost_micros)::bigint
    FROM usage_sums u
    WHERE u.day = ANY (ARRAY(SELECT s.day FROM summed s)) AND u.level = $10 AND u.ended_day BETWEEN $4 AND $5
        AND ($6::text IS NULL OR u.tenant_id = $6) AND ($11::text IS NULL OR u.upstream = $11)
    GROUP BY 1, 2, 3, 4, 5
)
SELECT tenant, model, day, key, upstream,
    sum(requests)::bigint AS requests, sum(input_tokens)::bigint AS input_tokens,
    sum(output_tokens)::bigint AS output_tokens, sum(cached_tokens)::bigint AS cached_tokens,
    sum(thoughts_tokens)::bigint AS thoughts_tokens, sum(images)::bigint AS images,
    sum(cost_micros)::bigint AS cost_micros, sum(unpriced)::bigint AS unpriced,
    sum(partial)::bigint AS partial, sum(estimated)::bigint AS estimated,
    sum(unknown)::bigint AS unknown, sum(cache_write_tokens)::bigint AS cache_write_tokens,
    sum(input_audio_tokens)::bigint AS input_audio_tokens,
    sum(input_image_tokens)::bigint AS input_image_tokens,
    sum(input_video_tokens)::bigint AS input_video_tokens,
    sum(output_audio_tokens)::bigint AS output_audio_tokens,
    sum(output_image_tokens)::bigint AS output_image_tokens,
    sum(output_video_tokens)::bigint AS output_video_tokens, sum(searches)::bigint AS searches,
    sum(provider_cost_micros)::bigint AS provider_cost_micros
FROM sums GROUP BY 1, 2, 3, 4, 5 ORDER BY 3, 1, 2, 4, 5 LIMIT $7

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
-- Sum up the calls recorded on day $1.
INSERT INTO usage_sums (day, level, ended_day, tenant_id, key_id, upstream,
    requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros,
    unpriced, partial, estimated, unknown, cache_write_tokens, input_audio_tokens,
    input_image_tokens, input_video_tokens, output_audio_tokens, output_image_tokens,
    output_video_tokens, searches, provider_cost_micros)
SELECT $1::date, CASE WHEN grouping(tenant_id) = 1 THEN 'upstream' WHEN grouping(upstream) = 1
        THEN 'key' ELSE 'tenant_upstream' END, ended_day, coalesce(tenant_id, ''),
    coalesce(key_id, ''), coalesce(upstream, ''),
    count(*), coalesce(sum(input_tokens), 0)::bigint, coalesce(sum(output_tokens), 0)::bigint,
    coalesce(sum(cached_tokens), 0)::bigint, coalesce(sum(thoughts_tokens), 0)::bigint,
    coalesce(sum(images), 0)::bigint, coalesce(sum(cost_micros), 0)::bigint,
    count(*) FILTER (WHERE cost_micros IS NULL AND usage_state IS DISTINCT FROM 'unknown'),
    count(*) FILTER (WHERE usage_state = 'partial'),
    count(*) FILTER (WHERE usage_state = 'estimated'),
    count(*) FILTER (WHERE usage_state = 'unknown'),
    coalesce(sum((usage_details ->> 'cache_write_tokens')::bigint), 0)::bigint,
    coalesce(sum((usage_details ->> 'input_audio_tokens')::bigint), 0)::bigint,
    coalesce(sum((usage_details ->> 'input_image_tokens')::bigint), 0)::bigint,
    coalesce(sum((usage_details ->> 'input_video_tokens')::bigint), 0)::bigint,
    coalesce(sum((usage_details ->> 'output_audio_tokens')::bigint), 0)::bigint,
    coalesce(sum((usage_details ->> 'output_image_tokens')::bigint), 0)::bigint,
    coalesce(sum((usage_details ->> 'output_video_tokens')::bigint), 0)::bigint,
    coalesce(sum((usage_details ->> 'searches')::bigint), 0)::bigint,
    coalesce(sum((usage_details ->> 'provider_cost_micros')::bigint), 0)::bigint
FROM (
    SELECT (finished_at AT TIME ZONE 'UTC')::date AS ended_day, tenant_id,
        coalesce(key_id, '') AS key_id, coalesce(upstream, pool) AS upstream,
        input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros,
        usage_state, usage_details
    FROM audit
    WHERE created_at >= $1::date::timestamp AT TIME ZONE 'UTC'
        AND created_at < ($1::date + 1)::timestamp AT TIME ZONE 'UTC'
) AS calls
GROUP BY GROUPING SETS ((ended_day, tenant_id, key_id), (ended_day, upstream),
    (ended_day, tenant_id, key_id, upstream))

-- name: sum_usage_day
-- Sum up the totals of day $1.
INSERT INTO usage_sums (day, level, ended_day, tenant_id, model,
    requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros,
    unpriced, partial, estimated, unknown, cache_write_tokens, input_audio_tokens,
    input_image_tokens, input_video_tokens, output_audio_tokens, output_image_tokens,
    output_video_tokens, searches, provider_cost_micros)
SELECT $1::date, CASE WHEN grouping(model) = 0 THEN 'model' ELSE 'tenant' END, $1::date,
    coalesce(tenant_id, ''), coalesce(model, ''),
    sum(requests)::bigint, sum(input_tokens)::bigint, sum(output_tokens)::bigint,
    sum(cached_tokens)::bigint, sum(thoughts_tokens)::bigint, sum(images)::bigint,
    sum(cost_micros)::bigint, sum(unpriced)::bigint, sum(partial)::bigint, sum(estimated)::bigint,
    sum(unknown)::bigint, sum(cache_write_tokens)::bigint, sum(input_audio_tokens)::bigint,
    sum(input_image_tokens)::bigint, sum(input_video_tokens)::bigint,
    sum(output_audio_tokens)::bigint, sum(output_image_tokens)::bigint,
    sum(output_video_tokens)::bigint, sum(searches)::bigint, sum(provider_cost_micros)::bigint
FROM usage_days WHERE day = $1::date
GROUP BY GROUPING SETS ((tenant_id), (model))

-- name: note_summed_day
-- Record that day $1 is summed up.
INSERT INTO summed_days (day) VALUES ($1) ON CONFLICT (day) DO UPDATE SET summed_at = now()

-- name: forget_logged_sums
-- Delete the sums of day $1 that come from the request log, whose rows are deleted.
DELETE FROM usage_sums WHERE day = $1 AND level IN ('key', 'upstream', 'tenant_upstream')
