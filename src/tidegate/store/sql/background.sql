-- Calls that go on at a provider without a client.

-- name: add_background_call
-- Write down a call before its request goes out.
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
-- The provider has taken call $1, under the id $2; it holds $3 of budgets.
UPDATE background_calls SET state = 'running', resource_id = $2, hold_id = $3, facts = $4::jsonb,
    due_at = now() + $5::double precision * interval '1 millisecond'
WHERE id = $1 AND state = 'sending'
RETURNING id

-- name: hand_over_budget_hold
-- What hold $1 holds of budgets is held for no process from now on.
UPDATE budget_holds SET instance = 'provider batches' WHERE id = $1 AND estimated_at IS NULL

-- name: drop_background_call
-- The provider has not taken call $1.
DELETE FROM background_calls WHERE id = $1 AND state = 'sending'

-- name: take_background_call
-- Take a due call for worker $1, none of $2 or at upstreams $5; of workers unseen for $4 ms only if $3.
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
    (extract(epoch FROM deadline_at - now()) * 1000)::double precision AS left_ms

-- name: put_off_background_call
-- Worker has looked at call $1 under claim $2: due again after $3 ms; cancelled at the provider if $4.
UPDATE background_calls SET claimed_by = NULL,
    due_at = now() + $3::double precision * interval '1 millisecond',
    cancelled_at = CASE WHEN $4::boolean THEN coalesce(cancelled_at, now()) ELSE cancelled_at END
WHERE id = $1 AND claim = $2

-- name: end_background_call
-- Call $1 under claim $2 has ended and is on record.
UPDATE background_calls SET state = 'ended', claimed_by = NULL, request = '',
    due_at = now() + $3::double precision * interval '1 millisecond'
WHERE id = $1 AND claim = $2 AND state <> 'ended'
RETURNING id

-- name: forget_background_call
-- Nothing is left to do for call $1.
DELETE FROM background_calls WHERE id = $1 AND claim = $2

-- name: free_background_calls
-- Worker $1 has none any more.
UPDATE background_calls SET claimed_by = NULL WHERE claimed_by = $1

-- name: hasten_background_call
-- The call that makes a thing is looked at now: something has happened to that.
UPDATE background_calls SET due_at = now()
WHERE dialect = $1 AND kind = $2 AND resource_id = $3 AND state = 'running' AND due_at > now()

-- name: background_call_of
-- Whether the call that makes a thing goes on.
SELECT id FROM background_calls
WHERE dialect = $1 AND kind = $2 AND resource_id = $3 AND state = 'running'

-- name: count_background_calls
-- How many calls go on at each upstream without a client.
SELECT upstream, count(*) AS calls FROM background_calls WHERE state <> 'ended' GROUP BY upstream

-- name: counted_background_calls
-- What counts in the limiters of all calls that go on, and for how long at most.
SELECT upstream, limits, permit,
    greatest(0, ceil(extract(epoch FROM deadline_at - now()) * 1000))::bigint AS left_ms
FROM background_calls WHERE state <> 'ended'

-- name: is_on_record
-- Whether call $1 is on record already, as one whose process died.
SELECT EXISTS (SELECT 1 FROM audit WHERE id = $1)
