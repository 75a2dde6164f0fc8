-- Statements that look at what was called and when: see past_calls.py.

-- name: past_calls
-- The last $3 calls of pool $1 that were handed in within the last $2 seconds, the newest first.
SELECT submitted_at, tenant_id, kind, model, priority, coalesce(upstream_ms, 0) AS upstream_ms,
    coalesce(input_tokens, 0) AS input_tokens,
    coalesce(output_tokens, 0) + coalesce(thoughts_tokens, 0) AS output_tokens,
    coalesce(images, 0) AS images
FROM audit
WHERE pool = $1 AND created_at >= now() - $2 * interval '1 second'
    AND submitted_at >= now() - $2 * interval '1 second' AND admitted_at IS NOT NULL
ORDER BY submitted_at DESC LIMIT $3
