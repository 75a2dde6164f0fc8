-- Our record of a day by model, its corrections, and what the comparisons with providers found.

-- name: get_told_usage
-- Sums by model of the whole answers of upstream $1 that ended from $2 until $3.
SELECT coalesce(model_version, model, '') AS model, count(*) AS requests,
    coalesce(sum(input_tokens), 0)::bigint AS input_tokens,
    coalesce(sum(cached_tokens), 0)::bigint AS cached_tokens,
    coalesce(sum((usage_details ->> 'cache_write_tokens')::bigint), 0)::bigint AS cache_write_tokens,
    coalesce(sum(coalesce(output_tokens, 0) + coalesce(thoughts_tokens, 0)), 0)::bigint AS output_tokens,
    coalesce(sum((usage_details ->> 'searches')::bigint), 0)::bigint AS searches,
    coalesce(sum(cost_micros), 0)::bigint AS cost_micros,
    count(*) FILTER (WHERE cost_micros IS NULL) AS unpriced
FROM audit
WHERE coalesce(upstream, pool) = $1 AND created_at >= $2::timestamptz - interval '31 days' AND created_at < $3
    AND finished_at >= $2 AND finished_at < $3 AND usage_state = 'told'
GROUP BY 1

-- name: get_doubtful_calls
-- The calls of upstream $1 that ended from $2 until $3 whose usage was not reported whole, or that were begun before by a process that died; $4 at most.
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

-- name: correct_charge
-- Set the cost of call $1, which ended from $2 until $3, to what it was plus $4, unless another has changed it from $5 meanwhile.
UPDATE audit SET cost_micros = coalesce(cost_micros, 0) + $4
WHERE request_id = $1 AND created_at >= $2::timestamptz - interval '31 days' AND created_at < $3
    AND finished_at >= $2 AND finished_at < $3 AND coalesce(cost_micros, 0) = $5
RETURNING tenant_id, coalesce(model, '') AS model, pool, coalesce(nullif(upstream, ''), pool) AS upstream, (finished_at AT TIME ZONE 'UTC')::date AS day

-- name: correct_usage
-- Add $6 micro-dollars to the total of tenant $1 on day $2 for model $3 at upstream $4.
-- What an earlier version counted of jobs is that of pool $5, in whose queue they were.
UPDATE usage_days SET cost_micros = cost_micros + $6
WHERE tenant_id = $1 AND day = $2 AND model = $3 AND pool = (
    SELECT pool FROM usage_days
    WHERE tenant_id = $1 AND day = $2 AND model = $3 AND pool IN ($4, $5)
    ORDER BY pool = $4 DESC LIMIT 1)

-- name: put_reconciliation
-- Keep what a comparison found of a model, instead of what an earlier one did.
INSERT INTO reconciliations (upstream, day, model, provider, ours_micros, theirs_micros, verdict, reason, calls)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT (upstream, day, model) DO UPDATE SET provider = excluded.provider,
    ours_micros = excluded.ours_micros, theirs_micros = excluded.theirs_micros,
    verdict = excluded.verdict, reason = excluded.reason,
    calls = CASE WHEN excluded.verdict = 'equal' THEN reconciliations.calls ELSE excluded.calls END,
    reconciled_at = now()

-- name: get_reconciliations
-- What was found for the days from $1 until $2, the newest first, then by upstream and model; $3 at most.
SELECT upstream, day, model, provider, ours_micros, theirs_micros, verdict, reason, calls, reconciled_at
FROM reconciliations WHERE day BETWEEN $1 AND $2
ORDER BY day DESC, upstream, model LIMIT $3

-- name: reconciled_since
-- Whether upstream $1 was compared for day $2.
SELECT 1 FROM reconciliations WHERE upstream = $1 AND day = $2 LIMIT 1
