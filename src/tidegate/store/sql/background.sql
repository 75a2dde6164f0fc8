-- Background calls, which continue at a provider without a client.

-- name: add_background_call
-- Record a call before its request is sent.
INSERT INTO background_calls (id, state, tenant_id, dialect, kind, upstream, pool, limits, permit,
    facts, request, deadline_at, due_at, lineage)
VALUES ($1, 'sending', $2, $3, $4, $5, $6, $7, $8, $9::jsonb, $10,
    now() + $11::double precision * interval '1 millisecond',
    now() + $11::double precision * interval '1 millisecond', $12::jsonb)
ON CONFLICT (id) DO UPDATE SET upstream = excluded.upstream, pool = excluded.pool,
    limits = excluded.limits, permit = excluded.permit, facts = excluded.facts,
    deadline_at = excluded.deadline_at, due_at = excluded.due_at
    WHERE background_calls.state = 'sending'

-- name: start_background_call
-- Mark call $1 as accepted by the provider, with the id $2 there; it holds $3 of budgets.
UPDATE background_calls SET state = 'running', resource_id = $2, hold_id = $3, facts = $4::jsonb,
    due_at = now() + $5::double precision * interval '1 millisecond'
WHERE id = $1 AND state = 'sending'
RETURNING id

-- name: hand_over_budget_hold
-- Detach budget reservation $1 from its process: from now on it belongs to the provider's work.
UPDATE budget_holds SET instance = 'provider batches' WHERE id = $1 AND estimated_at IS NULL

-- name: drop_background_call
-- Delete call $1, which the provider has not accepted.
DELETE FROM background_calls WHERE id = $1 AND state = 'sending'

-- name: take_background_call
-- Claim a due call for worker $1, except the calls $2 and those at upstreams $5.
-- Calls of workers not seen for $4 ms are included only if $3.
UPDATE background_calls SET claim = claim + 1, claimed_by = $1, looks = looks + 1
WHERE id = (
    SELECT b.id FROM background_calls b LEFT JOIN workers w ON w.instance_id = b.claimed_by
    WHERE b.due_at <= now() AND b.id <> ALL($2::uuid[]) AND b.upstream <> ALL($5::text[])
        AND (b.claimed_by IS NULL OR b.claimed_by = $1 OR $3::boolean AND
            greatest(w.seen_at, pg_postmaster_start_time())
                < now() - $4::double precision * interval '1 millisecond')
    ORDER BY b.due_at LIMIT 1 FOR UPDATE OF b SKIP LOCKED
)
RETURNING *, facts::text AS facts_text, lineage::text AS lineage_text,
    (extract(epoch FROM now() - created_at) * 1000)::double precision AS age_ms,
    (extract(epoch FROM now() - cancelled_at) * 1000)::double precision AS cancelled_ms,
    (extract(epoch FROM deadline_at - now()) * 1000)::double precision AS left_ms

-- name: put_off_background_call
-- Release call $1 under claim $2; it is due again after $3 ms. $4: it was cancelled at the provider.
UPDATE background_calls SET claimed_by = NULL,
    due_at = now() + $3::double precision * interval '1 millisecond',
    cancelled_at = CASE WHEN $4::boolean THEN coalesce(cancelled_at, now()) ELSE cancelled_at END
WHERE id = $1 AND claim = $2

-- name: end_background_call
-- Mark call $1 under claim $2 as ended and recorded; delete its request.
UPDATE background_calls SET state = 'ended', claimed_by = NULL, request = '',
    due_at = now() + $3::double precision * interval '1 millisecond'
WHERE id = $1 AND claim = $2 AND state <> 'ended'
RETURNING id

-- name: forget_background_call
-- Delete call $1, for which nothing is left to do.
DELETE FROM background_calls WHERE id = $1 AND claim = $2

-- name: free_background_calls
-- Release all calls that worker $1 has claimed.
UPDATE background_calls SET claimed_by = NULL WHERE claimed_by = $1

-- name: hasten_background_call
-- Make the call that creates a resource due now, because that resource has changed.
UPDATE background_calls SET due_at = now()
WHERE dialect = $1 AND kind = $2 AND resource_id = $3 AND state = 'running' AND due_at > now()

-- name: background_call_of
-- Return the call that is creating a resource, if it is running.
SELECT id FROM background_calls
WHERE dialect = $1 AND kind = $2 AND resource_id = $3 AND state = 'running'

-- name: count_background_calls
-- Count the background calls that have not ended, by upstream.
SELECT upstream, count(*) AS calls FROM background_calls WHERE state <> 'ended' GROUP BY upstream

-- name: counted_background_calls
-- Return the permits of all background calls that have not ended, and how long each may last at most.
SELECT upstream, limits, permit,
    greatest(0, ceil(extract(epoch FROM deadline_at - now()) * 1000))::bigint AS left_ms
FROM background_calls WHERE state <> 'ended'

-- name: is_on_record
-- Return whether call $1 has been recorded already.
-- A process that died may have recorded it.
SELECT EXISTS (SELECT 1 FROM audit WHERE id = $1)
