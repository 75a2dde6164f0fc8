-- What waits for a person's decision: see stuck.py.

-- name: count_stuck
-- How many dead jobs and how many webhooks that were given up there are, up to $1 of each.
SELECT
    (SELECT count(*) FROM (SELECT FROM requests
        WHERE coalesce(status = 'dead', false) ORDER BY finished_at LIMIT $1) AS one) AS jobs,
    (SELECT count(*) FROM (SELECT FROM webhooks
        WHERE coalesce(state = 'given_up', false) ORDER BY ended_at LIMIT $1) AS one) AS webhooks

-- name: list_dead
-- The $1 jobs that died last.
SELECT id, tenant_id, pool, kind, coalesce(used_model, model) AS model, attempts, lapses,
    created_at, finished_at, failure ->> 'message' AS problem
FROM requests WHERE coalesce(status = 'dead', false)
ORDER BY finished_at DESC LIMIT $1

-- name: discard_dead
-- A person's decision: a dead job is not to be made any more.
UPDATE requests SET status = 'cancelled', claim = claim + 1, version = version + 1
WHERE id = $1 AND status = 'dead'
RETURNING id

-- name: list_given_up
-- The $1 webhooks that were given up last.
SELECT id, request_id, tenant_id, event, url, tries, answer_status, problem, ended_at
FROM webhooks WHERE coalesce(state = 'given_up', false)
ORDER BY ended_at DESC LIMIT $1
