-- Statements that gather all that is on record of one request, whoever owns it: see dossier.py.

-- name: dossier_request
-- Request $1, a job or a stream that has ended.
SELECT * FROM requests WHERE id = $1

-- name: dossier_audit
-- How request $1 ended, the last time; of a native call or a line of a batch all that there is.
SELECT * FROM audit WHERE request_id = $1 ORDER BY created_at DESC LIMIT 1

-- name: dossier_line
-- Line $1 of a batch, while a worker has it.
SELECT l.id, l.tenant_id, l.state, l.attempts, l.lapses, l.claimed_by, l.body, l.batch_id,
    b.endpoint, b.key_id, b.expires_at
FROM batch_lines l JOIN batches b ON b.id = l.batch_id
WHERE l.state IN ('claimed', 'calling') AND l.id = $1

-- name: dossier_attempts
-- The last 100 attempts of request $1, the latest first.
SELECT * FROM attempts WHERE request_id = $1 ORDER BY created_at DESC, number DESC LIMIT 100

-- name: dossier_webhooks
-- The last 20 webhooks of request $1, the latest first.
SELECT id, event, url, state, tries, due_at, answer_status, problem, created_at, ended_at
FROM webhooks WHERE request_id = $1 ORDER BY created_at DESC, id DESC LIMIT 20

-- name: dossier_bodies
-- Which bodies there are with audit row $1 of the time $2.
SELECT role, size_bytes, content_type, omitted_bytes FROM bodies
WHERE id = $1 AND created_at = $2

-- name: dossier_body
-- The body in the role $2 of request $1, as it ended the last time.
SELECT bodies.encoding, bodies.size_bytes, bodies.data, bodies.blob_key, bodies.content_type,
    bodies.omitted_bytes
FROM audit JOIN bodies ON bodies.id = audit.id AND bodies.created_at = audit.created_at
WHERE audit.request_id = $1 AND bodies.role = $2
ORDER BY audit.created_at DESC LIMIT 1

-- name: dossier_file
-- File $1 of request $2.
SELECT * FROM files WHERE id = $1 AND request_id = $2
