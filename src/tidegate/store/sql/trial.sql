-- Statements of a tenant and a pool that were made for a trial: see trial.py.

-- name: recorded_of
-- How many rows of the audit each of the requests $1 has.
SELECT request_id, count(*) AS records FROM audit WHERE request_id = ANY($1::uuid[])
GROUP BY request_id

-- name: cut_short
-- How many attempts at each of the requests $1 each process cut short, answered or not.
SELECT request_id, instance_id, count(*) AS attempts FROM attempts
WHERE request_id = ANY($1::uuid[]) AND outcome = 'ambiguous' GROUP BY request_id, instance_id

-- name: audit_of
-- The rows of the audit of the requests $1.
SELECT id FROM audit WHERE request_id = ANY($1::uuid[])

-- name: drop_usage_of
-- Forget what tenant $1 used.
DELETE FROM usage_days WHERE tenant_id = $1

-- name: drop_queued_of
-- Forget how much tenant $1 had queued.
DELETE FROM queued WHERE tenant_id = $1

-- name: drop_workers
-- Forget that the workers $1 were ever alive.
DELETE FROM workers WHERE instance_id = ANY($1::text[])
