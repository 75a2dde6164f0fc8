-- Actions of operators.

-- name: add_action
-- Put an action on record; a repeat of its transaction finds it there.
INSERT INTO operator_actions
    (action_id, operator, role, address, what, target, was, is_now, revision)
VALUES ($1, $2, $3, $4, $5, $6, $7::jsonb, $8::jsonb, $9)
ON CONFLICT (action_id, what, target) DO NOTHING

-- name: list_actions
-- The newest $7 actions below the number $6, of operator $1, kind $2 and target $3 where given.
SELECT number, at, operator, role, address, what, target, was, is_now, revision
FROM operator_actions
WHERE ($1::text IS NULL OR operator = $1) AND ($2::text IS NULL OR what = $2)
    AND ($3::text IS NULL OR target = $3) AND ($4::timestamptz IS NULL OR at >= $4)
    AND ($5::timestamptz IS NULL OR at < $5) AND ($6::bigint IS NULL OR number < $6)
ORDER BY number DESC LIMIT $7

-- name: paused_by_people
-- The longest pause of each limit of pool $1 that a person began and nobody has ended; without those by versions that did not put `by` on record, whose pauses ended with Valkey.
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
-- Forget actions from before $1.
DELETE FROM operator_actions WHERE at < $1
