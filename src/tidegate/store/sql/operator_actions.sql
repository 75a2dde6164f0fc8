-- Actions of operators.

-- name: add_action
-- Record an action; a repeat of its transaction changes nothing.
INSERT INTO operator_actions
    (action_id, operator, role, address, what, target, was, is_now, revision)
VALUES ($1, $2, $3, $4, $5, $6, $7::jsonb, $8::jsonb, $9)
ON CONFLICT (action_id, what, target) DO NOTHING

-- name: list_actions
-- List the newest $7 actions below number $6, of operator $1, kind $2 and target $3 if given.
SELECT number, at, operator, role, address, what, target, was, is_now, revision
FROM operator_actions
WHERE ($1::text IS NULL OR operator = $1) AND ($2::text IS NULL OR what = $2)
    AND ($3::text IS NULL OR target = $3) AND ($4::timestamptz IS NULL OR at >= $4)
    AND ($5::timestamptz IS NULL OR at < $5) AND ($6::bigint IS NULL OR number < $6)
ORDER BY number DESC LIMIT $7

-- name: recent_pauses
-- Return the newest $2 pauses of limits and their ends since $1, as operators requested them.
SELECT at, operator, what, target, is_now FROM operator_actions
WHERE at >= $1 AND what IN ('limit.pause', 'limit.resume')
ORDER BY at DESC, number DESC LIMIT $2

-- name: paused_by_people
-- Return the longest pause of each limit of pool $1 that a person began and nobody has ended.
-- Pauses by versions that did not record `by` are left out, since they ended with Valkey.
WITH known AS (
    SELECT number, what, target, is_now,
        at + (is_now->>'for_ms')::float8 * interval '1 millisecond' AS until
    FROM operator_actions
    WHERE what IN ('limit.pause', 'limit.resume') AND is_now->>'pool' = $1
)
SELECT DISTINCT ON (target) target AS "limit", is_now->>'by' AS by,
    coalesce(is_now->>'reason', '') AS reason,
    coalesce(extract(epoch FROM until - clock_timestamp())::float8 * 1000, 'infinity') AS left_ms
FROM known
WHERE what = 'limit.pause' AND is_now ? 'by' AND (until IS NULL OR until > clock_timestamp())
    AND number > ALL (
        SELECT number FROM known AS resumed
        WHERE resumed.target = known.target AND resumed.what = 'limit.resume'
    )
ORDER BY target, until DESC NULLS FIRST

-- name: prune_actions
-- Delete actions older than $1.
DELETE FROM operator_actions WHERE at < $1
