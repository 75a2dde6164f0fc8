-- Webhooks and alerts to be delivered.

-- name: add_webhooks
-- Insert webhooks, in the transaction that ends their requests.
INSERT INTO webhooks (id, request_id, tenant_id, pool, event, url)
SELECT id, request_id, tenant_id, pool, event, url
FROM json_to_recordset($1::json) AS row (id uuid, request_id uuid, tenant_id text, pool text,
    event text, url text)

-- name: claim_webhooks
-- Claim at most $1 due webhooks, oldest first, without those of the tenants $3.
-- They are due again after $2 ms.
UPDATE webhooks SET tries = tries + 1, due_at = now() + $2 * interval '1 millisecond'
WHERE id IN (
    SELECT id FROM webhooks
    WHERE state = 'pending' AND due_at <= now() AND tenant_id <> ALL ($3::text[])
    ORDER BY due_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
RETURNING id AS webhook_id, request_id, tenant_id, event, url, tries, created_at

-- name: get_webhook_end
-- Return the last end of request $1 with status $2 that was recorded up to $3.
SELECT status, attempts, finished_at, model, finish_reason, failure, input_tokens, output_tokens,
    thoughts_tokens, cached_tokens, total_tokens
FROM audit WHERE request_id = $1 AND status = $2 AND created_at <= $3
ORDER BY created_at DESC LIMIT 1

-- name: settle_webhook
-- Record the result of try $2 of webhook $1; the next try is due in $6 ms.
UPDATE webhooks SET state = $3, answer_status = $4, problem = $5,
    due_at = now() + $6 * interval '1 millisecond',
    ended_at = CASE WHEN $3 = 'pending' THEN NULL ELSE now() END
WHERE id = $1 AND tries = $2 AND state = 'pending'

-- name: redeliver_webhook
-- Deliver webhook $1 again now, with all its tries, by decision of a person.
UPDATE webhooks SET state = 'pending', tries = 0, due_at = now(), ended_at = NULL WHERE id = $1
RETURNING id

-- name: get_webhook
-- Return the latest webhook of request $1.
SELECT id AS webhook_id, state, tries, due_at, answer_status, problem FROM webhooks
WHERE request_id = $1 ORDER BY created_at DESC, id DESC LIMIT 1

-- name: add_alert
-- Insert an alert of kind $1, to be posted to the operators' webhook.
INSERT INTO alerts (kind, data) VALUES ($1, $2::jsonb)

-- name: lock_causes
-- Lock the alerts of causes against other processes, until this transaction ends.
SELECT pg_advisory_xact_lock(7423005, 0)

-- name: raise_causes
-- Insert an alert for each cause in $1, unless it was raised and has held within $2 seconds.
-- For causes that hold, this is recorded. Old alerts are deleted.
WITH given AS (
    SELECT kind, data FROM jsonb_to_recordset($1::jsonb) AS row (kind text, data jsonb)
), known AS (
    SELECT a.id, a.kind, a.data FROM alerts a JOIN given g ON a.kind = g.kind
        AND a.data->>'subject' IS NOT DISTINCT FROM g.data->>'subject'
        AND a.data->>'pool' IS NOT DISTINCT FROM g.data->>'pool'
    WHERE (a.data->>'held_at')::timestamptz > now() - $2::double precision * interval '1 second'
), held AS (
    UPDATE alerts a SET data = a.data || jsonb_build_object('held_at', now())
    FROM known k WHERE a.id = k.id AND (k.data->>'held_at')::timestamptz
        < now() - $2::double precision / 10 * interval '1 second'
), old AS (
    DELETE FROM alerts WHERE created_at < now() - interval '30 days'
)
INSERT INTO alerts (kind, data)
SELECT g.kind, g.data || jsonb_build_object('held_at', now()) FROM given g
WHERE NOT EXISTS (SELECT 1 FROM known k WHERE k.kind = g.kind
    AND k.data->>'subject' IS NOT DISTINCT FROM g.data->>'subject'
    AND k.data->>'pool' IS NOT DISTINCT FROM g.data->>'pool')

-- name: claim_alerts
-- Claim at most $1 due alerts, oldest first; they are due again after $2 ms.
UPDATE alerts a SET tries = tries + 1, due_at = now() + $2 * interval '1 millisecond'
WHERE id IN (
    SELECT id FROM alerts WHERE state = 'pending' AND due_at <= now()
    ORDER BY created_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
RETURNING a.id AS alert_id, a.kind, a.data::text AS data, a.created_at, a.tries,
    coalesce(a.data->>'unit', (SELECT unit FROM budgets b WHERE b.name = a.data->>'budget')) AS unit,
    (SELECT fallback FROM budgets b WHERE b.name = a.data->>'budget') AS fallback

-- name: settle_alert
-- Record the result of try $2 of alert $1; the next try is due in $5 ms.
UPDATE alerts SET state = $3, problem = $4, due_at = now() + $5 * interval '1 millisecond'
WHERE id = $1 AND tries = $2 AND state = 'pending'

-- name: list_alerts
-- List the last $1 alerts, newest first.
SELECT a.id AS alert_id, a.kind, a.data::text AS data, a.created_at, a.state, a.tries, a.due_at,
    a.problem,
    coalesce(a.data->>'unit', (SELECT unit FROM budgets b WHERE b.name = a.data->>'budget')) AS unit,
    (SELECT fallback FROM budgets b WHERE b.name = a.data->>'budget') AS fallback
FROM alerts a ORDER BY a.created_at DESC, a.id LIMIT $1

-- name: redeliver_alert
-- Post a settled alert again.
UPDATE alerts SET state = 'pending', tries = 0, due_at = now(), problem = NULL
WHERE id = $1 AND state <> 'pending'
RETURNING id
