-- Recorded usage of a day by model, its corrections, and the results of comparisons with providers.

-- name: get_told_usage
-- Sum by model the reported usage of upstream $1, of calls that ended from $2 until $3.
SELECT coalesce(model_version, model, '') AS model, count(*) AS requests,
    coalesce(sum(input_tokens), 0)::bigint AS input_tokens,
    coalesce(sum(cached_tokens), 0)::bigint AS cached_tokens,
    coalesce(sum((usage_details ->> 'cache_write_tokens')::bigint), 0)::bigint AS cache_write_tokens,
    coalesce(sum(coalesce(output_tokens, 0) + coalesce(thoughts_tokens, 0)), 0)::bigint AS output_tokens,
    coalesce(sum((usage_details ->> 'searches')::bigint), 0)::bigint AS searches,
    coalesce(sum(cost_micros), 0)::bigint AS cost_micros,
    count(*) FILTER (WHERE cost_micros IS NULL) AS unpriced,
    array_remove(array_agg(DISTINCT usage_details ->> 'tier'), NULL) AS tiers
FROM audit
WHERE coalesce(upstream, pool) = $1 AND created_at >= $2::timestamptz - interval '31 days' AND created_at < $3
    AND finished_at >= $2 AND finished_at < $3 AND usage_state = 'told'
GROUP BY 1

-- name: get_doubtful_calls
-- Return at most $4 calls of upstream $1 that ended from $2 until $3 with uncertain usage.
-- It was not reported completely, or an earlier attempt was begun by a process that died.
SELECT request_id, coalesce(model_version, model, '') AS model,
    CASE WHEN usage_state IN ('told', 'none') THEN 'repeated' ELSE usage_state END AS state,
    CASE WHEN usage_state IN ('told', 'none') THEN 0 ELSE coalesce(input_tokens, 0) END AS input_tokens,
    CASE WHEN usage_state IN ('told', 'none') THEN 0
        ELSE coalesce(output_tokens, 0) + coalesce(thoughts_tokens, 0) END AS output_tokens,
    CASE WHEN usage_state IN ('told', 'none') THEN 0 ELSE cost_micros END AS cost_micros,
    coalesce(cost_micros, 0) AS weight
FROM audit
WHERE coalesce(upstream, pool) = $1 AND created_at >= $2::timestamptz - interval '31 days' AND created_at < $3
    AND finished_at >= $2 AND finished_at < $3
    AND (usage_state IN ('partial', 'estimated', 'unknown') OR lapses > 0)
ORDER BY finished_at, request_id LIMIT $4

-- name: count_deleted_calls
-- Return how many calls of upstream $1 ended from $2 until $3 and are no longer in the audit.
-- Totals are kept when calls expire or are erased.
SELECT (
    SELECT coalesce(sum(requests), 0)::bigint FROM usage_days
    WHERE pool = $1 AND day = ($2::timestamptz AT TIME ZONE 'UTC')::date
) - (
    SELECT count(*) FROM audit
    WHERE coalesce(nullif(upstream, ''), pool) = $1
        AND created_at >= $2::timestamptz - interval '31 days' AND created_at < $3
        AND finished_at >= $2 AND finished_at < $3
) AS deleted

-- name: correct_charges
-- Add $4 to the costs of calls $1, which ended from $2 until $3, except for costs that are no longer $5.
UPDATE audit SET cost_micros = coalesce(cost_micros, 0) + c.more
FROM unnest($1::uuid[], $4::bigint[], $5::bigint[]) AS c (id, more, before)
WHERE request_id = c.id AND created_at >= $2::timestamptz - interval '31 days' AND created_at < $3
    AND finished_at >= $2 AND finished_at < $3 AND coalesce(cost_micros, 0) = c.before
RETURNING request_id, tenant_id, (finished_at AT TIME ZONE 'UTC')::date AS day,
    coalesce(model, '') AS model, coalesce(nullif(upstream, ''), pool) AS upstream, pool

-- name: correct_usage
-- Add $6 micro-dollars to totals of tenants $1 on days $2 for models $3 at upstreams $4, as add_usage orders.
-- An earlier version counted jobs under the pool $5 in which they were queued. $7: how many calls had no
-- cost before.
WITH places AS (
    SELECT g.tenant_id, g.day, g.model, p.pool, sum(g.micros)::bigint AS micros,
        sum(g.priced)::bigint AS priced
    FROM unnest($1::text[], $2::date[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::bigint[])
        AS g (tenant_id, day, model, upstream, pool, micros, priced)
    CROSS JOIN LATERAL (
        SELECT u.pool FROM usage_days u
        WHERE u.tenant_id = g.tenant_id AND u.day = g.day AND u.model = g.model
            AND u.pool IN (g.upstream, g.pool)
        ORDER BY u.pool = g.upstream DESC LIMIT 1
    ) AS p GROUP BY 1, 2, 3, 4
), locked AS (
    SELECT u.tenant_id, u.day, u.model, u.pool
    FROM usage_days u JOIN places p USING (tenant_id, day, model, pool)
    ORDER BY 1, 2, 3, 4 FOR NO KEY UPDATE OF u
)
UPDATE usage_days u SET cost_micros = u.cost_micros + p.micros, unpriced = greatest(0, u.unpriced - p.priced)
FROM places p JOIN locked l USING (tenant_id, day, model, pool)
WHERE u.tenant_id = p.tenant_id AND u.day = p.day AND u.model = p.model AND u.pool = p.pool

-- name: put_reconciliation
-- Store the result of a comparison for a model, instead of an earlier one.
INSERT INTO reconciliations (upstream, day, model, provider, ours_micros, theirs_micros, verdict, reason, calls)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT (upstream, day, model) DO UPDATE SET provider = excluded.provider,
    ours_micros = excluded.ours_micros, theirs_micros = excluded.theirs_micros,
    verdict = excluded.verdict, reason = excluded.reason,
    calls = CASE WHEN excluded.verdict = 'equal' THEN reconciliations.calls ELSE excluded.calls END,
    reconciled_at = now()

-- name: get_reconciliations
-- Return at most $3 results for the days from $1 until $2, newest first, by upstream and model.
SELECT upstream, day, model, provider, ours_micros, theirs_micros, verdict, reason, calls, reconciled_at
FROM reconciliations WHERE day BETWEEN $1 AND $2
ORDER BY day DESC, upstream, model LIMIT $3

-- name: reconciled_since
-- Return whether upstream $1 was compared for day $2 at time $3 or later.
SELECT 1 FROM reconciliations WHERE upstream = $1 AND day = $2 AND reconciled_at >= $3 LIMIT 1
