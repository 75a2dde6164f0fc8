-- Ends of requests, native calls, bodies, and erasures. Many rows are sent as one JSON array in $1, so
-- that a group commit is one statement whatever its size. Every write to a job is fenced by its claim.

-- name: add_attempts
-- Insert attempts that have ended.
INSERT INTO attempts (id, created_at, request_id, tenant_id, pool, kind, number, claim,
    instance_id, model, fence_epoch, fence_sequence, outcome, admitted_at, finished_at, queue_ms,
    upstream_ms, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens,
    finish_reason, model_version, response_id, failure, first_byte_ms, upstream)
SELECT id, coalesce(created_at, now()), request_id, tenant_id, pool, kind, number, claim,
    instance_id, model, fence_epoch, fence_sequence, outcome, admitted_at, finished_at, queue_ms,
    upstream_ms, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens,
    finish_reason, model_version, response_id, failure, first_byte_ms, upstream
FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, request_id uuid,
    tenant_id text, pool text, kind text, number integer, claim bigint, instance_id text,
    model text, fence_epoch bigint, fence_sequence bigint, outcome text, admitted_at timestamptz,
    finished_at timestamptz, queue_ms double precision, upstream_ms double precision,
    input_tokens bigint, output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint,
    total_tokens bigint, finish_reason text, model_version text, response_id text, failure jsonb,
    first_byte_ms double precision, upstream text)

-- name: end_requests
-- Set the end state and the results of claimed jobs; return their audit columns except for texts.
-- `unmade` attempts ended before a call and count too.
UPDATE requests r SET
    status = row.status,
    attempts = r.attempts + coalesce(row.unmade, 0),
    finished_at = row.finished_at,
    admitted_at = coalesce(row.admitted_at, r.admitted_at),
    queue_ms = coalesce(row.queue_ms, r.queue_ms),
    upstream_ms = row.upstream_ms,
    first_byte_ms = row.first_byte_ms,
    used_model = coalesce(row.model, r.used_model),
    result = row.result,
    input_tokens = row.input_tokens,
    output_tokens = row.output_tokens,
    thoughts_tokens = row.thoughts_tokens,
    cached_tokens = row.cached_tokens,
    total_tokens = row.total_tokens,
    finish_reason = row.finish_reason,
    failure = row.failure,
    claimed_by = NULL,
    not_before = NULL,
    version = r.version + 1
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, status text,
    finished_at timestamptz, admitted_at timestamptz, queue_ms double precision,
    upstream_ms double precision, model text, result text, input_tokens bigint,
    output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint,
    finish_reason text, failure jsonb, first_byte_ms double precision, unmade integer)
WHERE r.id = row.id AND r.claim = row.claim AND r.status IN ('queued', 'running')
RETURNING r.id, r.tenant_id, r.pool, r.source, r.status, r.kind, r.classified_by, r.classified_reason,
    left(r.prompt, 500) AS prompt, r.endpoint, r.model, r.used_model, r.upstream, r.priority, r.claim,
    r.attempts, r.lapses, r.attempt_id, r.attempt_at, r.created_at, r.admitted_at, r.finished_at,
    r.queue_ms, r.upstream_ms, r.first_byte_ms, r.input_tokens, r.output_tokens, r.thoughts_tokens,
    r.cached_tokens, r.total_tokens, r.finish_reason, r.subject, r.conversation, r.traceparent,
    r.webhook_url, r.key_id

-- name: retry_requests
-- Return claimed jobs to the queue, not before a given time; `uncounted` attempts do not count.
UPDATE requests r SET
    status = 'queued',
    attempts = r.attempts - CASE WHEN r.status = 'running' THEN coalesce(row.uncounted, 0) ELSE 0 END,
    preemptions = r.preemptions + coalesce(row.gave_way, 0),
    claim = r.claim + 1,
    claimed_by = NULL,
    not_before = row.not_before,
    tier = coalesce(row.tier, r.tier),
    tiers_allowed = coalesce(row.tiers_allowed, r.tiers_allowed),
    failure = row.failure,
    upstream_ms = row.upstream_ms,
    first_byte_ms = row.first_byte_ms,
    version = r.version + 1
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, not_before timestamptz,
    failure jsonb, upstream_ms double precision, first_byte_ms double precision, uncounted integer,
    tier text, tiers_allowed text[], gave_way integer)
WHERE r.id = row.id AND r.claim = row.claim AND r.status IN ('queued', 'running')
RETURNING r.id, r.tenant_id, r.pool, r.kind, r.claim, r.attempt_id, r.attempt_at

-- name: already_written
-- Return which of these writes were committed before, by an attempt whose reply was lost.
SELECT r.id
FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, status text)
JOIN requests r ON r.id = row.id
WHERE (r.claim = row.claim AND r.status = row.status AND row.status <> 'queued')
    OR (r.claim = row.claim + 1 AND row.status = 'queued' AND r.status = 'queued')

-- name: add_bodies
-- Append the bodies of audit rows, inline as base64 or as the key of a blob.
INSERT INTO bodies (id, role, tenant_id, pool, encoding, size_bytes, data, blob_key)
SELECT id, role, tenant_id, pool, encoding, size_bytes, decode(data, 'base64'), blob_key
FROM json_to_recordset($1::json) AS row (id uuid, role text, tenant_id text, pool text,
    encoding text, size_bytes bigint, data text, blob_key text)

-- name: lock_erased
-- Wait for all transactions that have read the table and have not committed their writes.
LOCK TABLE erased IN ACCESS EXCLUSIVE MODE

-- name: add_erased
-- Prevent later records of what was received of tenant $2 and subject $3 before now.
INSERT INTO erased (id, tenant_id, subject_digest) VALUES ($1, $2, $3)

-- name: get_erased
-- Return the erasures of the tenants $1 as a whole, and of the subjects with the digests $2.
SELECT tenant_id, subject_digest, erased_at, clock_timestamp() AS now FROM erased
WHERE (subject_digest IS NULL AND tenant_id = ANY($1::text[]))
    OR subject_digest = ANY($2::bytea[])

-- name: add_relayed
-- Append the audit rows of native calls; existing rows are kept, so repeats are safe.
INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status, kind, classified_by,
    classified_reason, priority, model, model_version, response_id, attempts, lapses, instance_id,
    submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens,
    thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, endpoint, http_status,
    streamed, key_id, subject, usage_state, cost_micros, images, first_byte_ms, usage_details,
    upstream, conversation, opening, parent_id, trace_id, parent_span, prompt_head)
SELECT id, created_at, request_id, tenant_id, pool, source, status, kind, classified_by,
    classified_reason, priority, model, model_version, response_id, attempts, lapses, instance_id,
    submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens,
    thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, endpoint, http_status,
    streamed, key_id, subject, usage_state, cost_micros, images, first_byte_ms, usage_details,
    upstream, conversation, opening, parent_id, trace_id, parent_span, prompt_head
FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, request_id uuid,
    tenant_id text, pool text, source text, status text, kind text, classified_by text,
    classified_reason text, priority integer, model text, model_version text,
    response_id text, attempts integer, lapses integer, instance_id text, submitted_at timestamptz,
    admitted_at timestamptz, finished_at timestamptz, queue_ms double precision,
    upstream_ms double precision, input_tokens bigint, output_tokens bigint,
    thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint, finish_reason text,
    failure jsonb, endpoint text, http_status integer, streamed boolean, key_id text, subject text,
    usage_state text, cost_micros bigint, images integer, first_byte_ms double precision,
    usage_details jsonb, upstream text, conversation text, opening text, parent_id uuid,
    trace_id text, parent_span text, prompt_head text)
ON CONFLICT (id, created_at) DO NOTHING
RETURNING id

-- name: add_relayed_bodies
-- Append the bodies of native calls; existing ones are kept.
INSERT INTO bodies (id, created_at, role, tenant_id, pool, encoding, size_bytes, data, blob_key,
    content_type, omitted_bytes)
SELECT id, created_at, role, tenant_id, pool, encoding, size_bytes, decode(data, 'base64'), blob_key,
    content_type, coalesce(omitted_bytes, 0)
FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, role text, tenant_id text,
    pool text, encoding text, size_bytes bigint, data text, blob_key text, content_type text,
    omitted_bytes bigint)
ON CONFLICT (id, created_at, role) DO NOTHING

-- name: add_streams
-- Insert finished streams as whole rows; existing rows are kept, so repeats are safe.
INSERT INTO requests AS r (id, tenant_id, pool, source, status, kind, classified_by, classified_reason,
    prompt, image_uri, model, used_model, priority, created_at, deadline_at, admitted_at,
    finished_at, attempts, queue_ms, upstream_ms, result, input_tokens, output_tokens,
    thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, subject, first_byte_ms,
    conversation, traceparent, upstream, key_id)
SELECT id, tenant_id, pool, 'stream', status, kind, classified_by, classified_reason,
    prompt, image_uri, model, used_model, priority, created_at, deadline_at, admitted_at,
    finished_at, attempts, queue_ms, upstream_ms, result, input_tokens, output_tokens,
    thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, subject, first_byte_ms,
    conversation, traceparent, upstream, key_id
FROM json_to_recordset($1::json) AS row (id uuid, tenant_id text, pool text, status text,
    kind text, classified_by text, classified_reason text, prompt text, image_uri text, model text,
    used_model text, priority integer, created_at timestamptz, deadline_at timestamptz,
    admitted_at timestamptz, finished_at timestamptz, attempts integer, queue_ms double precision,
    upstream_ms double precision, result text, input_tokens bigint, output_tokens bigint,
    thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint, finish_reason text,
    failure jsonb, subject text, first_byte_ms double precision,
    conversation text, traceparent text, upstream text, key_id text)
ON CONFLICT (id) DO NOTHING
RETURNING r.id, r.tenant_id, r.pool, r.source, r.status, r.kind, r.classified_by, r.classified_reason,
    left(r.prompt, 500) AS prompt, r.endpoint, r.model, r.used_model, r.upstream, r.priority, r.claim,
    r.attempts, r.lapses, r.attempt_id, r.attempt_at, r.created_at, r.admitted_at, r.finished_at,
    r.queue_ms, r.upstream_ms, r.first_byte_ms, r.input_tokens, r.output_tokens, r.thoughts_tokens,
    r.cached_tokens, r.total_tokens, r.finish_reason, r.subject, r.conversation, r.traceparent,
    r.webhook_url, r.key_id

-- name: add_audit
-- Append one audit row per ended request.
INSERT INTO audit (id, request_id, tenant_id, pool, source, status, kind, classified_by,
    classified_reason, priority, model, model_version, response_id, attempts, lapses, instance_id,
    submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens,
    thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, key_id, subject,
    usage_state, cost_micros, images, first_byte_ms, usage_details,
    upstream, conversation, opening, parent_id, trace_id, parent_span, prompt_head)
SELECT id, request_id, tenant_id, pool, source, status, kind, classified_by,
    classified_reason, priority, model, model_version, response_id, attempts, lapses, instance_id,
    submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens,
    thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, key_id, subject,
    usage_state, cost_micros, images, first_byte_ms, usage_details,
    upstream, conversation, opening, parent_id, trace_id, parent_span, prompt_head
FROM json_to_recordset($1::json) AS row (id uuid, request_id uuid, tenant_id text, pool text,
    source text, status text, kind text, classified_by text, classified_reason text,
    priority integer, model text, model_version text, response_id text, attempts integer,
    lapses integer, instance_id text, submitted_at timestamptz, admitted_at timestamptz,
    finished_at timestamptz, queue_ms double precision, upstream_ms double precision,
    input_tokens bigint, output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint,
    total_tokens bigint, finish_reason text, failure jsonb, key_id text, subject text, usage_state text,
    cost_micros bigint, images integer, first_byte_ms double precision, usage_details jsonb, upstream text,
    conversation text, opening text, parent_id uuid, trace_id text, parent_span text, prompt_head text)
