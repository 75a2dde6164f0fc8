-- Statements that read bodies back out of the record: see recorded.py.

-- name: get_body
-- The body in the role $3 of a request of tenant $2 that has ended.
SELECT bodies.encoding, bodies.size_bytes, bodies.data, bodies.blob_key, bodies.content_type,
    bodies.omitted_bytes
FROM audit JOIN bodies ON bodies.id = audit.id AND bodies.created_at = audit.created_at
WHERE audit.request_id = $1 AND audit.tenant_id = $2 AND audit.source <> 'batch'
    AND bodies.tenant_id = $2 AND bodies.role = $3
ORDER BY audit.created_at DESC LIMIT 1

-- name: get_charged
-- What request $1 of tenant $2 cost, and the details of its usage; it ended between $3 and $4, which tell the partitions.
SELECT cost_micros, usage_details FROM audit
WHERE request_id = $1 AND tenant_id = $2 AND created_at >= $3 AND created_at < $4
ORDER BY created_at DESC LIMIT 1
