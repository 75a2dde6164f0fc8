-- The record of native calls, where COPY could not take it.

-- name: add_relayed
-- Append the audit rows of native calls; one that is there already is left, so repeats are safe.
INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status, kind, classified_by,
    classified_reason, priority, model, model_version, response_id, attempts, lapses, instance_id,
    submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens,
    thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, endpoint, http_status,
    streamed, key_id, subject, usage_state, cost_micros, images, first_byte_ms, usage_details)
SELECT id, created_at, request_id, tenant_id, pool, source, status, kind, classified_by,
    classified_reason, priority, model, model_version, response_id, attempts, lapses, instance_id,
    submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens,
    thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, endpoint, http_status,
    streamed, key_id, subject, usage_state, cost_micros, images, first_byte_ms, usage_details
FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, request_id uuid,
    tenant_id text, pool text, source text, status text, kind text, classified_by text,
    classified_reason text, priority integer, model text, model_version text,
    response_id text, attempts integer, lapses integer, instance_id text, submitted_at timestamptz,
    admitted_at timestamptz, finished_at timestamptz, queue_ms double precision,
    upstream_ms double precision, input_tokens bigint, output_tokens bigint,
    thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint, finish_reason text,
    failure jsonb, endpoint text, http_status integer, streamed boolean, key_id text, subject text,
    usage_state text, cost_micros bigint, images integer, first_byte_ms double precision,
    usage_details jsonb)
ON CONFLICT (id, created_at) DO NOTHING
RETURNING id

-- name: add_relayed_bodies
-- Append the bodies of native calls; one that is there already is left.
INSERT INTO bodies (id, created_at, role, tenant_id, pool, encoding, size_bytes, data, blob_key,
    content_type, omitted_bytes)
SELECT id, created_at, role, tenant_id, pool, encoding, size_bytes, decode(data, 'base64'), blob_key,
    content_type, coalesce(omitted_bytes, 0)
FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, role text, tenant_id text,
    pool text, encoding text, size_bytes bigint, data text, blob_key text, content_type text,
    omitted_bytes bigint)
ON CONFLICT (id, created_at, role) DO NOTHING

-- name: get_relayed
-- The record of one native call of a tenant.
SELECT * FROM audit WHERE request_id = $1 AND tenant_id = $2 AND source = 'relay' LIMIT 1
