-- Statements that say where requests stand between the queue and the provider: see running.py.

-- name: get_whereabouts
-- Where request $1 stands, whoever owns it.
SELECT id, tenant_id, pool, status, kind, coalesce(used_model, model) AS model, claimed_by,
    attempts, created_at, not_before, admitted_at, finished_at, failure
FROM requests WHERE id = $1

-- name: running_calls
-- The jobs of pool $1 that hold a permit: whose it is, by process and sequence of its fence.
SELECT r.id, a.instance_id, a.fence_sequence, r.admitted_at
FROM requests r JOIN attempts a ON a.id = r.attempt_id AND a.created_at = r.attempt_at
WHERE r.claimed_by IS NOT NULL AND r.status = 'running' AND r.pool = $1
LIMIT 5000
