-- Resources at providers: their owners, and the upstreams where they are stored.

-- name: add_provider_resources
-- Record the owners of resources; an owner stays until the provider has deleted the resource.
INSERT INTO provider_resources (dialect, kind, resource_id, tenant_id, upstream, account, request_id,
    subject, expires_at, conversation)
SELECT dialect, kind, resource_id, tenant_id, upstream, decode(account, 'hex'), request_id, subject,
    expires_at, conversation
FROM json_to_recordset($1::json) AS row (dialect text, kind text, resource_id text, tenant_id text,
    upstream text, account text, request_id uuid, subject text, expires_at timestamptz,
    conversation text)
ORDER BY dialect, kind, resource_id
ON CONFLICT (dialect, kind, resource_id) DO UPDATE SET tenant_id = EXCLUDED.tenant_id,
    upstream = EXCLUDED.upstream, account = EXCLUDED.account, request_id = EXCLUDED.request_id,
    subject = EXCLUDED.subject, expires_at = EXCLUDED.expires_at, created_at = now(),
    conversation = EXCLUDED.conversation
WHERE provider_resources.expires_at <= now()

-- name: provider_resources_named
-- Return those of the resources $3 of a kind that have an owner.
SELECT resource_id, tenant_id, upstream, account, expires_at, request_id, conversation
FROM provider_resources
WHERE dialect = $1 AND kind = $2 AND resource_id = ANY($3::text[])
    AND (expires_at IS NULL OR expires_at > now())

-- name: provider_batch_named
-- Return a batch at a provider of dialect $1 whose id, or whose input's id, is this one.
SELECT id FROM provider_batches WHERE dialect = $1 AND (provider_id = $2 OR file_id = $2) LIMIT 1

-- name: provider_resources_of
-- Return at most $6 resources of tenant $1 of a kind, after resource $5 if given.
-- $4: newest first.
SELECT r.resource_id, r.tenant_id, r.upstream, r.account, r.expires_at, r.request_id,
    r.conversation
FROM provider_resources r
LEFT JOIN provider_resources a
    ON a.dialect = $2 AND a.kind = $3 AND a.resource_id = $5 AND a.tenant_id = $1
WHERE r.tenant_id = $1 AND r.dialect = $2 AND r.kind = $3
    AND (r.expires_at IS NULL OR r.expires_at > now())
    AND ($5::text IS NULL OR CASE WHEN $4::boolean
        THEN (r.created_at, r.resource_id) < (a.created_at, a.resource_id)
        ELSE (r.created_at, r.resource_id) > (a.created_at, a.resource_id) END)
ORDER BY
    CASE WHEN $4 THEN r.created_at END DESC, CASE WHEN $4 THEN r.resource_id END DESC,
    CASE WHEN NOT $4 THEN r.created_at END, CASE WHEN NOT $4 THEN r.resource_id END
LIMIT $6

-- name: tokens_kept
-- Return the tokens of requests $2 of tenant $1, and of the last call of each conversation $3.
SELECT request_id, max(coalesce(input_tokens + output_tokens, total_tokens, input_tokens)) AS tokens
FROM audit
WHERE tenant_id = $1 AND request_id = ANY($2::uuid[])
    AND coalesce(input_tokens + output_tokens, total_tokens, input_tokens) IS NOT NULL
GROUP BY request_id
UNION ALL
SELECT NULL, last.tokens
FROM unnest($3::text[]) AS named (conversation)
CROSS JOIN LATERAL (
    SELECT coalesce(input_tokens + output_tokens, total_tokens, input_tokens) AS tokens FROM audit
    WHERE audit.conversation = named.conversation AND tenant_id = $1
        AND coalesce(input_tokens + output_tokens, total_tokens, input_tokens) IS NOT NULL
    ORDER BY submitted_at DESC LIMIT 1) AS last

-- name: forget_provider_resource
-- Delete a resource of tenant $4 that was deleted at its provider.
DELETE FROM provider_resources
WHERE dialect = $1 AND kind = $2 AND resource_id = $3 AND tenant_id = $4

-- name: forget_expired_resources
-- Delete resources that have expired at their providers.
DELETE FROM provider_resources WHERE expires_at < now() - interval '1 day'

-- name: erase_provider_resources
-- Delete the resources of a tenant, of a subject, or of a subject of a tenant.
DELETE FROM provider_resources WHERE ($1::text IS NULL OR tenant_id = $1)
    AND ($2::text IS NULL OR subject = $2)

-- name: count_provider_resources
-- Count the resources of a tenant, of a subject, or of a subject of a tenant.
SELECT count(*) AS resources FROM provider_resources WHERE ($1::text IS NULL OR tenant_id = $1)
    AND ($2::text IS NULL OR subject = $2)
