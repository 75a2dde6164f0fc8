-- Statements that take jobs in: see submits.py.

-- name: submit_requests
-- Insert many jobs at once; a row whose id or key is there already is left out, so repeats are safe.
INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by, classified_reason,
    prompt, image_uri, model, priority, created_at, deadline_at, idempotency_key,
    idempotency_digest, webhook_url, subject, endpoint, traceparent)
SELECT id, tenant_id, pool, 'job', 'queued', kind, classified_by, classified_reason,
    prompt, image_uri, model, priority, created_at, deadline_at, idempotency_key,
    decode(idempotency_digest, 'hex'), webhook_url, subject, endpoint, traceparent
FROM json_to_recordset($1::json) AS row (id uuid, tenant_id text, pool text, kind text,
    classified_by text, classified_reason text, prompt text, image_uri text, model text,
    priority integer, created_at timestamptz, deadline_at timestamptz, idempotency_key text,
    idempotency_digest text, webhook_url text, subject text, endpoint text, traceparent text)
ON CONFLICT DO NOTHING

-- name: get_keyed
-- The requests that have these idempotency keys of their tenants now.
SELECT r.id, r.tenant_id, r.idempotency_key, encode(r.idempotency_digest, 'hex') AS digest,
    r.status, r.kind, r.classified_by, r.classified_reason
FROM json_to_recordset($1::json) AS row (tenant_id text, idempotency_key text)
JOIN requests r ON r.tenant_id = row.tenant_id AND r.idempotency_key = row.idempotency_key
