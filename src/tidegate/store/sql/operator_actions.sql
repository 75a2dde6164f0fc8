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

-- name: prune_actions
-- Forget actions from before $1.
DELETE FROM operator_actions WHERE at < $1
