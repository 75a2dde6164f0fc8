-- Totals of ended requests by tenant, day and model, and the same sums of the request log.

-- name: add_usage
-- Add to the totals what was just recorded; in one order everywhere, so that no two wait in a circle.
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
-- Totals from day $4 to day $5, of tenant $6 or of all, apart by tenant, model and day as $1 to $3 say.
SELECT CASE WHEN $1::boolean THEN tenant_id END AS tenant, CASE WHEN $2::boolean THEN model END AS model,
    CASE WHEN $3::boolean THEN day END AS day, sum(requests)::bigint AS requests,
    sum(input_tokens)::bigint AS input_tokens, sum(output_tokens)::bigint AS output_tokens,
    sum(cached_tokens)::bigint AS cached_tokens, sum(thoughts_tokens)::bigint AS thoughts_tokens,
    sum(images)::bigint AS images, sum(cost_micros)::bigint AS cost_micros,
    sum(unpriced)::bigint AS unpriced, sum(partial)::bigint AS partial,
    sum(estimated)::bigint AS estimated, sum(unknown)::bigint AS unknown,
    sum(cache_write_tokens)::bigint AS cache_write_tokens,
    sum(input_audio_tokens)::bigint AS input_audio_tokens,
    sum(input_image_tokens)::bigint AS input_image_tokens,
    sum(input_video_tokens)::bigint AS input_video_tokens,
    sum(output_audio_tokens)::bigint AS output_audio_tokens,
    sum(output_image_tokens)::bigint AS output_image_tokens,
    sum(output_video_tokens)::bigint AS output_video_tokens,
    sum(searches)::bigint AS searches,
    sum(provider_cost_micros)::bigint AS provider_cost_micros
FROM usage_days
WHERE day BETWEEN $4 AND $5 AND ($6::text IS NULL OR tenant_id = $6)
GROUP BY 1, 2, 3 ORDER BY 3, 1, 2 LIMIT $7

-- name: get_logged_usage
-- The same of the request log, apart by key and upstream too as $8 and $9 say.
SELECT CASE WHEN $1::boolean THEN tenant_id END AS tenant,
    CASE WHEN $2::boolean THEN coalesce(model, '') END AS model,
    CASE WHEN $3::boolean THEN (finished_at AT TIME ZONE 'UTC')::date END AS day,
    CASE WHEN $8::boolean THEN coalesce(key_id, '') END AS key,
    CASE WHEN $9::boolean THEN coalesce(upstream, pool) END AS upstream, count(*) AS requests,
    coalesce(sum(input_tokens), 0)::bigint AS input_tokens,
    coalesce(sum(output_tokens), 0)::bigint AS output_tokens,
    coalesce(sum(cached_tokens), 0)::bigint AS cached_tokens,
    coalesce(sum(thoughts_tokens), 0)::bigint AS thoughts_tokens,
    coalesce(sum(images), 0)::bigint AS images, coalesce(sum(cost_micros), 0)::bigint AS cost_micros,
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
FROM audit
WHERE created_at >= $4::date::timestamp AT TIME ZONE 'UTC' - interval '31 days'
    AND created_at < ($5::date + 1)::timestamp AT TIME ZONE 'UTC'
    AND finished_at >= $4::date::timestamp AT TIME ZONE 'UTC'
    AND finished_at < ($5::date + 1)::timestamp AT TIME ZONE 'UTC'
    AND ($6::text IS NULL OR tenant_id = $6)
GROUP BY 1, 2, 3, 4, 5 ORDER BY 3, 1, 2, 4, 5 LIMIT $7
