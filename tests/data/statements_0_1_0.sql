-- The statements of version 0.1.0, commit ee32f61: what runs against a newer schema after a rollback.

-- name: add_batch_file
-- Keep a file of a batch; one that is there already is left, so repeats are safe.
INSERT INTO batch_files (id, tenant_id, purpose, name, size_bytes, lines, blob_key) VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (id) DO NOTHING

-- name: lock_batch_files
-- Let only one at a time count and add files of tenant $1, until this transaction ends.
SELECT pg_advisory_xact_lock(7423002, hashtext($1))

-- name: kept_batch_files
-- The bytes that tenant $1 keeps in uploads other than $2, at least $3 each, with those it deleted that a batch has yet to read.
SELECT coalesce(sum(greatest(size_bytes, $3::bigint)), 0)::bigint FROM ( SELECT size_bytes FROM batch_files WHERE tenant_id = $1 AND purpose = 'batch' AND ($2::uuid IS NULL OR id <> $2) UNION ALL SELECT min(b.input_bytes) FROM batches b WHERE b.tenant_id = $1 AND b.status = 'validating' AND NOT EXISTS (SELECT 1 FROM batch_files f WHERE f.blob_key = b.input_blob) GROUP BY b.input_blob ) AS kept

-- name: get_batch_file
-- One file of a tenant.
SELECT * FROM batch_files WHERE id = $1 AND tenant_id = $2

-- name: list_batch_files
-- Files of tenant $1 that come after $2, newest first, of purpose $3 if it is given.
SELECT * FROM batch_files WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id < $2) AND ($3::text IS NULL OR purpose = $3) ORDER BY id DESC LIMIT $4

-- name: list_batch_files_upwards
-- The same, oldest first.
SELECT * FROM batch_files WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id > $2) AND ($3::text IS NULL OR purpose = $3) ORDER BY id LIMIT $4

-- name: delete_batch_file
-- Forget a file of a tenant; its blob is told.
DELETE FROM batch_files WHERE id = $1 AND tenant_id = $2 RETURNING blob_key

-- name: uses_batch_blob
-- Whether a batch has yet to read this blob.
SELECT true FROM batches WHERE input_blob = $1 AND status = 'validating' LIMIT 1

-- name: names_batch_blob
-- Whether there is a file of this blob.
SELECT true FROM batch_files WHERE blob_key = $1 LIMIT 1

-- name: add_batch
-- Take a batch in; the expiry counts from now.
INSERT INTO batches (id, tenant_id, endpoint, input_file_id, input_blob, input_bytes, completion_window, metadata, models, key_id, total, expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8::jsonb, $9, $10, $11, now() + interval '24 hours') ON CONFLICT (id) DO NOTHING

-- name: get_batch
-- One batch of a tenant.
SELECT * FROM batches WHERE id = $1 AND tenant_id = $2

-- name: list_batches
-- Batches of tenant $1 that come after $2, newest first.
SELECT * FROM batches WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id < $2) ORDER BY id DESC LIMIT $3

-- name: cancel_batch
-- Let no more lines of a batch begin.
UPDATE batches SET status = 'cancelling', ends_as = 'cancelled', cancelling_at = now() WHERE id = $1 AND tenant_id = $2 AND status IN ('validating', 'in_progress') RETURNING id

-- name: expire_batches
-- Let no more lines begin of batches whose time is up.
UPDATE batches SET status = 'finalizing', ends_as = 'expired', finalizing_at = now() WHERE status IN ('validating', 'in_progress') AND expires_at <= now()

-- name: batches_over
-- Which of the batches $1 take no more calls, or are not there any more.
SELECT held.id FROM unnest($1::uuid[]) AS held (id) WHERE NOT EXISTS (SELECT 1 FROM batches b WHERE b.id = held.id AND b.status = 'in_progress')

-- name: take_batch
-- Take a batch to validate or assemble, for worker $1; one it has already is one it forgot.
UPDATE batches SET claim = claim + 1, claimed_by = $1 WHERE id = ( SELECT b.id FROM batches b WHERE (b.claimed_by IS NULL OR b.claimed_by = $1) AND (b.status = 'validating' OR ( b.status IN ('finalizing', 'cancelling') AND NOT EXISTS ( SELECT 1 FROM batch_lines l WHERE l.batch_id = b.id AND l.state IN ('claimed', 'calling')))) ORDER BY b.id LIMIT 1 FOR UPDATE SKIP LOCKED ) RETURNING *

-- name: free_batch
-- Give up the claim on a batch.
UPDATE batches SET claimed_by = NULL WHERE id = $1 AND claim = $2

-- name: add_batch_lines
-- Insert lines of a batch; those that are there already are left, so repeats are safe.
INSERT INTO batch_lines (batch_id, line, id, tenant_id, custom_id, body, size_bytes) SELECT $1, line, id, $2, custom_id, body, octet_length(body) FROM json_to_recordset($3::json) AS row (line integer, id uuid, custom_id text, body text) ON CONFLICT (batch_id, line) DO NOTHING

-- name: begin_batch
-- A validated batch begins, with the exact number of its lines.
UPDATE batches SET status = 'in_progress', in_progress_at = now(), total = $3, claimed_by = NULL WHERE id = $1 AND claim = $2 AND status = 'validating'

-- name: refuse_batch
-- A batch whose file is not sound ends; its lines are deleted apart.
UPDATE batches SET status = 'failed', failed_at = now(), errors = $3::jsonb, total = 0, claimed_by = NULL WHERE id = $1 AND claim = $2 AND status = 'validating'

-- name: delete_batch_lines
-- Forget the lines of a batch.
DELETE FROM batch_lines WHERE batch_id = $1

-- name: finished_batch_lines
-- Lines of a batch after line $2, in their order, at most $3.
SELECT line, id, custom_id, state, status_code, answer, failure FROM batch_lines WHERE batch_id = $1 AND line > $2 ORDER BY line LIMIT $3

-- name: end_batch
-- A batch ends as it was to, with its files.
UPDATE batches SET status = ends_as, claimed_by = NULL, output_file_id = $3, error_file_id = $4, completed_at = CASE WHEN ends_as = 'completed' THEN now() END, expired_at = CASE WHEN ends_as = 'expired' THEN now() END, cancelled_at = CASE WHEN ends_as = 'cancelled' THEN now() END WHERE id = $1 AND claim = $2 AND status IN ('finalizing', 'cancelling') RETURNING id

-- name: claim_batch_lines
-- Claim ready lines for worker $1, at most $2 and $3 bytes, from line $4 on, of other batches than $5; batches take turns.
WITH ready AS MATERIALIZED ( SELECT head.*, b.endpoint, b.models, b.key_id, b.expires_at FROM batches b CROSS JOIN LATERAL ( SELECT batch_id, line, row_number() OVER (ORDER BY line) AS turn, size_bytes FROM batch_lines WHERE batch_id = b.id AND state = 'queued' AND (not_before IS NULL OR not_before <= now()) AND line >= coalesce(($4::jsonb ->> b.id::text)::integer, 0) ORDER BY line LIMIT 4 * $2 ) AS head WHERE b.status = 'in_progress' AND b.id <> ALL($5::uuid[]) ), picked AS MATERIALIZED ( SELECT l.batch_id, l.line, ready.turn, ready.endpoint, ready.models, ready.key_id, ready.expires_at FROM ready JOIN batch_lines l ON l.batch_id = ready.batch_id AND l.line = ready.line WHERE l.state = 'queued' ORDER BY ready.turn, l.batch_id LIMIT $2 FOR UPDATE OF l SKIP LOCKED ), fitting AS ( SELECT picked.*, sum(l.size_bytes) OVER (ORDER BY turn, picked.batch_id) - l.size_bytes AS so_far FROM picked JOIN batch_lines l ON l.batch_id = picked.batch_id AND l.line = picked.line ) UPDATE batch_lines l SET state = 'claimed', claim = l.claim + 1, claimed_by = $1 FROM fitting WHERE l.batch_id = fitting.batch_id AND l.line = fitting.line AND fitting.so_far < $3 RETURNING l.*, fitting.endpoint, fitting.models, fitting.key_id, fitting.expires_at

-- name: batches_held_up
-- Batches of keys whose tenants are disabled or gone, or have spent a budget of this day or month of UTC.
SELECT b.id FROM batches b LEFT JOIN tenants t ON t.id = b.tenant_id CROSS JOIN LATERAL (SELECT (now() AT TIME ZONE 'UTC')::date AS today) AS clock LEFT JOIN LATERAL ( SELECT sum(u.cost_micros) AS month_micros, sum(u.cost_micros) FILTER (WHERE u.day = clock.today) AS day_micros, sum(u.input_tokens + u.output_tokens + u.thoughts_tokens) AS month_tokens, sum(u.input_tokens + u.output_tokens + u.thoughts_tokens) FILTER (WHERE u.day = clock.today) AS day_tokens FROM usage_days u WHERE u.tenant_id = t.id AND u.day >= date_trunc('month', clock.today)::date AND num_nonnulls(t.budget_day_money, t.budget_month_money, t.budget_day_tokens, t.budget_month_tokens) > 0 ) AS spent ON true WHERE b.status = 'in_progress' AND b.key_id IS NOT NULL AND ( t.id IS NULL OR t.disabled_at IS NOT NULL OR coalesce(spent.day_micros, 0) >= t.budget_day_money * 1000000 OR coalesce(spent.month_micros, 0) >= t.budget_month_money * 1000000 OR coalesce(spent.day_tokens, 0) >= t.budget_day_tokens OR coalesce(spent.month_tokens, 0) >= t.budget_month_tokens)

-- name: begin_batch_lines
-- Mark lines as calling, before their upstream calls; unless another worker has them, or the batch ends.
UPDATE batch_lines l SET state = 'calling', attempts = l.attempts + (l.state = 'claimed')::integer FROM json_to_recordset($1::json) AS row (batch_id uuid, line integer, claim bigint) WHERE l.batch_id = row.batch_id AND l.line = row.line AND l.claim = row.claim AND (l.state = 'calling' OR l.state = 'claimed' AND EXISTS ( SELECT 1 FROM batches b WHERE b.id = l.batch_id AND b.status = 'in_progress')) RETURNING l.batch_id, l.line

-- name: end_batch_lines
-- Record how lines ended; their batches count them in the same transaction.
UPDATE batch_lines l SET state = row.state, claimed_by = NULL, status_code = row.status_code, answer = row.answer, failure = row.failure FROM json_to_recordset($1::json) AS row (batch_id uuid, line integer, claim bigint, state text, status_code integer, answer text, failure jsonb) WHERE l.batch_id = row.batch_id AND l.line = row.line AND l.claim = row.claim AND l.state IN ('claimed', 'calling') RETURNING l.batch_id, l.state

-- name: count_batch_lines
-- Add ended lines to a batch; the last one has it assembled.
UPDATE batches SET completed = completed + $2, failed = failed + $3, status = CASE WHEN status = 'in_progress' AND completed + failed + $2 + $3 >= total THEN 'finalizing' ELSE status END, finalizing_at = CASE WHEN status = 'in_progress' AND completed + failed + $2 + $3 >= total THEN now() ELSE finalizing_at END WHERE id = $1

-- name: release_stray_lines
-- Give up lines of worker $1 that it does not know of.
UPDATE batch_lines SET state = 'queued', claim = claim + 1, claimed_by = NULL WHERE claimed_by = $1 AND state IN ('claimed', 'calling') AND NOT (id = ANY($2::uuid[]))

-- name: return_batch_lines
-- Give claims on lines up, for another try not before a given time where there is one.
UPDATE batch_lines l SET state = 'queued', claim = l.claim + 1, claimed_by = NULL, not_before = now() + row.after_ms * interval '1 millisecond' FROM json_to_recordset($1::json) AS row (batch_id uuid, line integer, claim bigint, after_ms double precision) WHERE l.batch_id = row.batch_id AND l.line = row.line AND l.claim = row.claim AND l.state IN ('claimed', 'calling')

-- name: retake_batch_lines
-- Return lines of workers not seen for $1 milliseconds; at $2 lapses in mid-call one has failed.
WITH gone AS MATERIALIZED ( SELECT claimant.claimed_by FROM ( SELECT claimed_by FROM batch_lines WHERE state IN ('claimed', 'calling') UNION SELECT claimed_by FROM batches WHERE claimed_by IS NOT NULL ) AS claimant LEFT JOIN workers w ON w.instance_id = claimant.claimed_by WHERE greatest(w.seen_at, pg_postmaster_start_time()) < now() - $1 * interval '1 millisecond' ), freed AS ( UPDATE batches b SET claimed_by = NULL, claim = b.claim + 1 FROM gone WHERE b.claimed_by = gone.claimed_by ) UPDATE batch_lines l SET claim = l.claim + 1, claimed_by = NULL, lapses = l.lapses + (l.state = 'calling')::integer, state = CASE WHEN l.state = 'calling' AND l.lapses + 1 >= $2 THEN 'failed' ELSE 'queued' END, failure = CASE WHEN l.state = 'calling' AND l.lapses + 1 >= $2 THEN $3::jsonb END, not_before = CASE WHEN l.state = 'calling' AND l.lapses > 0 THEN now() + random() * interval '30 seconds' END FROM gone WHERE l.claimed_by = gone.claimed_by AND l.state IN ('claimed', 'calling') RETURNING l.batch_id, l.state

-- name: queued_of_batches
-- The lines that batches of tenant $1 have yet to work through, and their part of the input's bytes.
SELECT coalesce(sum(total - completed - failed), 0)::bigint AS jobs, coalesce(sum(ceil( input_bytes * (total - completed - failed)::numeric / greatest(total, 1))), 0)::bigint AS size_bytes FROM batches WHERE tenant_id = $1 AND status IN ('validating', 'in_progress')

-- name: batches_ended_before
-- Batches that ended before $1, oldest first, at most $2; of the tenants $3, or where not $4 of all others.
SELECT id FROM batches WHERE greatest(completed_at, failed_at, expired_at, cancelled_at) < $1 AND (tenant_id = ANY($3::text[])) = $4 ORDER BY id LIMIT $2

-- name: delete_batches
-- Forget ended batches.
DELETE FROM batches WHERE id = ANY($1::uuid[])

-- name: old_batch_files
-- Files from before $1 that no batch has yet to read, at most $2; of the tenants $3, or of all others.
SELECT f.id, f.blob_key FROM batch_files f WHERE f.created_at < $1 AND (f.tenant_id = ANY($3::text[])) = $4 AND NOT EXISTS ( SELECT 1 FROM batches b WHERE b.status = 'validating' AND b.input_blob = f.blob_key) ORDER BY f.id LIMIT $2

-- name: delete_batch_files
-- Forget files whose blobs are gone.
DELETE FROM batch_files WHERE id = ANY($1::uuid[])

-- name: lock_owned
-- Lock request $1 of tenant $2 against all others that would change it.
SELECT status, claimed_by FROM requests WHERE id = $1 AND tenant_id = $2 FOR UPDATE

-- name: cancel_queued
-- End queued job $1; the claim is fenced off.
UPDATE requests SET status = 'cancelled', claim = claim + 1, claimed_by = NULL, not_before = NULL, finished_at = now(), failure = $2::jsonb, version = version + 1 WHERE id = $1 AND coalesce(status = 'queued', false) RETURNING *

-- name: ask_to_cancel
-- Ask the worker that has running job $1 to end it.
UPDATE requests SET cancel_asked_at = coalesce(cancel_asked_at, now()) WHERE id = $1 AND status = 'running'

-- name: asked_of_worker
-- What worker $1 is to give up: running jobs, and those of $2 that were cancelled while they waited.
SELECT id FROM requests WHERE coalesce(status IN ('queued', 'running') AND cancel_asked_at IS NOT NULL, false) AND coalesce(status = 'running', false) AND claimed_by = $1 UNION SELECT id FROM requests WHERE id = ANY($2::uuid[]) AND status = 'cancelled'

-- name: cancel_returned
-- End up to 500 jobs that came back into the queue after their end was asked for.
UPDATE requests SET status = 'cancelled', claim = claim + 1, claimed_by = NULL, not_before = NULL, finished_at = now(), failure = $1::jsonb, version = version + 1 WHERE id IN ( SELECT id FROM requests WHERE coalesce(status IN ('queued', 'running') AND cancel_asked_at IS NOT NULL, false) AND coalesce(status = 'queued', false) LIMIT 500 FOR UPDATE SKIP LOCKED ) RETURNING *

-- name: look_at_server
-- What the server says of itself and of our place in it.
SELECT current_setting('server_version_num')::int AS version, current_setting('server_version') AS version_text, pg_is_in_recovery() AS is_replica, current_setting('server_encoding') AS encoding, current_setting('autovacuum') AS autovacuum, current_setting('fsync') AS fsync, current_setting('synchronous_commit') AS synchronous_commit, current_setting('default_transaction_read_only') AS read_only, current_setting('max_connections')::int AS max_connections, current_setting('superuser_reserved_connections')::int AS reserved, (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connected, pg_backend_pid() AS backend, extract(epoch FROM clock_timestamp())::float8 AS clock_s, current_user AS who, current_schema() AS schema, coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS may_create

-- name: look_at_transactions
-- Transactions that hold back the clean-up of dead rows for long, the oldest first.
SELECT pid, coalesce(usename, '') AS who, coalesce(application_name, '') AS program, state, extract(epoch FROM clock_timestamp() - xact_start)::float8 AS age_s FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start < clock_timestamp() - make_interval(secs => $1) AND backend_type = 'client backend' ORDER BY xact_start LIMIT 20

-- name: look_at_tables
-- How much room our tables take, with their indexes, and which are not this user's.
SELECT c.relname AS name, pg_total_relation_size(c.oid) AS size_bytes, pg_has_role(c.relowner, 'USAGE') AS is_ours, has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE') AS may_use FROM pg_class c WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r' ORDER BY 2 DESC

-- name: dossier_request
-- Request $1, a job or a stream that has ended.
SELECT * FROM requests WHERE id = $1

-- name: dossier_audit
-- How request $1 ended, the last time; of a native call or a line of a batch all that there is.
SELECT * FROM audit WHERE request_id = $1 ORDER BY created_at DESC LIMIT 1

-- name: dossier_line
-- Line $1 of a batch, while a worker has it.
SELECT l.id, l.tenant_id, l.state, l.attempts, l.lapses, l.claimed_by, l.body, l.batch_id, b.endpoint, b.key_id, b.expires_at FROM batch_lines l JOIN batches b ON b.id = l.batch_id WHERE l.state IN ('claimed', 'calling') AND l.id = $1

-- name: dossier_attempts
-- The last 100 attempts of request $1, the latest first.
SELECT * FROM attempts WHERE request_id = $1 ORDER BY created_at DESC, number DESC LIMIT 100

-- name: dossier_webhooks
-- The last 20 webhooks of request $1, the latest first.
SELECT id, event, url, state, tries, due_at, answer_status, problem, created_at, ended_at FROM webhooks WHERE request_id = $1 ORDER BY created_at DESC, id DESC LIMIT 20

-- name: dossier_bodies
-- Which bodies there are with audit row $1 of the time $2.
SELECT role, size_bytes, content_type, omitted_bytes FROM bodies WHERE id = $1 AND created_at = $2

-- name: dossier_body
-- The body in the role $2 of request $1, as it ended the last time.
SELECT bodies.encoding, bodies.size_bytes, bodies.data, bodies.blob_key, bodies.content_type, bodies.omitted_bytes FROM audit JOIN bodies ON bodies.id = audit.id AND bodies.created_at = audit.created_at WHERE audit.request_id = $1 AND bodies.role = $2 ORDER BY audit.created_at DESC LIMIT 1

-- name: dossier_file
-- File $1 of request $2.
SELECT * FROM files WHERE id = $1 AND request_id = $2

-- name: lock_erased
-- Wait for all who have looked into the table and are not done with what they write.
LOCK TABLE erased IN ACCESS EXCLUSIVE MODE

-- name: add_erased
-- Have nothing of tenant $2 and subject $3 recorded any more that was received before now.
INSERT INTO erased (id, tenant_id, subject_digest) VALUES ($1, $2, $3)

-- name: get_erased
-- What was erased of the tenants $1 as a whole, or of the subjects with the digests $2.
SELECT tenant_id, subject_digest, erased_at FROM erased WHERE (subject_digest IS NULL AND tenant_id = ANY($1::text[])) OR subject_digest = ANY($2::bytea[])

-- name: scan_requests
-- Of the next $4 requests after $1: the last one, and those of tenant $2 and subject $3, where given.
SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id) FILTER (WHERE ($2::text IS NULL OR tenant_id = $2) AND ($3::text IS NULL OR subject = $3)) AS found FROM (SELECT id, tenant_id, subject FROM requests WHERE id > $1 ORDER BY id LIMIT $4) AS next

-- name: scan_audit
-- The same of the audit, with the requests that its rows are of.
SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id ORDER BY id) FILTER (WHERE ($2::text IS NULL OR tenant_id = $2) AND ($3::text IS NULL OR subject = $3)) AS found, array_agg(request_id ORDER BY id) FILTER (WHERE ($2::text IS NULL OR tenant_id = $2) AND ($3::text IS NULL OR subject = $3)) AS requests FROM (SELECT id, request_id, tenant_id, subject FROM audit WHERE id > $1 ORDER BY id LIMIT $4) AS next

-- name: blobs_of_bodies
-- The blobs of the bodies of many audit rows.
SELECT blob_key FROM bodies WHERE id = ANY($1::uuid[]) AND blob_key IS NOT NULL

-- name: erase_requests
-- Delete requests in whatever state, with their files and webhooks.
DELETE FROM requests WHERE id = ANY($1::uuid[])

-- name: erase_attempts
-- Delete all attempts of many requests.
DELETE FROM attempts WHERE request_id = ANY($1::uuid[])

-- name: erase_bodies
-- Delete the bodies of many audit rows.
DELETE FROM bodies WHERE id = ANY($1::uuid[])

-- name: erase_audit
-- Delete audit rows.
DELETE FROM audit WHERE id = ANY($1::uuid[])

-- name: erase_native_keys
-- Delete the answers that were kept under idempotency keys of many native calls.
DELETE FROM native_keys WHERE request_id = ANY($1::uuid[])

-- name: batches_of_tenant
-- Batches of tenant $1 in whatever state, at most $2.
SELECT id FROM batches WHERE tenant_id = $1 ORDER BY id LIMIT $2

-- name: count_batches
-- How many batches tenant $1 has, and how many files for them.
SELECT (SELECT count(*) FROM batches WHERE tenant_id = $1) AS batches, (SELECT count(*) FROM batch_files WHERE tenant_id = $1) AS files

-- name: batch_files_of_tenant
-- Files for and of batches of tenant $1, at most $2.
SELECT id, blob_key FROM batch_files WHERE tenant_id = $1 ORDER BY id LIMIT $2

-- name: write_history
-- Put down what a process has counted in some spans, in the place of what it said of them before.
INSERT INTO history AS kept (step_s, at, pool, instance_id, counts, apart, waits, lengths) SELECT step_s, to_timestamp(at), pool, $1, counts::jsonb, apart::jsonb, waits, lengths FROM unnest($2::integer[], $3::float8[], $4::text[], $5::text[], $6::text[], $7::bytea[], $8::bytea[]) AS row (step_s, at, pool, counts, apart, waits, lengths) ON CONFLICT (step_s, at, pool, instance_id) DO UPDATE SET counts = excluded.counts, apart = excluded.apart, waits = excluded.waits, lengths = excluded.lengths

-- name: read_history
-- What all processes have counted in the spans of $1 seconds that begin at $2 or later.
SELECT extract(epoch FROM at)::bigint AS at, pool, counts, apart, waits, lengths FROM history WHERE step_s = $1 AND at >= to_timestamp($2::float8) ORDER BY at LIMIT $3

-- name: forget_history
-- Delete the spans of $1 seconds that began before $2.
DELETE FROM history WHERE step_s = $1 AND at < to_timestamp($2::float8)

-- name: list_requests
-- Requests of tenant $1 in [$2, $3) before ($4, $5), newest first: $10 that match of $11 looked at.
SELECT * FROM ( (SELECT id, source, status, kind, coalesce(used_model, model) AS model, priority, attempts, created_at, admitted_at, finished_at, queue_ms, upstream_ms, total_tokens, failure ->> 'code' AS failure_code FROM requests WHERE tenant_id = $1 AND created_at >= $2 AND created_at < $3 AND (created_at, id) < ($4, $5::uuid) ORDER BY created_at DESC, id DESC LIMIT $11) UNION ALL (SELECT id, source, status, kind, model, priority, attempts, created_at, admitted_at, finished_at, queue_ms, upstream_ms, total_tokens, failure ->> 'code' AS failure_code FROM audit WHERE source = 'relay' AND tenant_id = $1 AND created_at >= $2 AND created_at < $3 AND (created_at, id) < ($4, $5::uuid) ORDER BY created_at DESC, id DESC LIMIT $11) ORDER BY created_at DESC, id DESC LIMIT $11 ) AS looked_at WHERE ($6::text IS NULL OR status = $6) AND ($7::text IS NULL OR kind = $7) AND ($8::text IS NULL OR model = $8) AND ($9::text IS NULL OR source = $9) ORDER BY created_at DESC, id DESC LIMIT $10

-- name: list_reach
-- The last of the $6 requests that `list_requests` looks at, where there are that many.
SELECT created_at, id FROM ( (SELECT created_at, id FROM requests WHERE tenant_id = $1 AND created_at >= $2 AND created_at < $3 AND (created_at, id) < ($4, $5::uuid) ORDER BY created_at DESC, id DESC LIMIT $6) UNION ALL (SELECT created_at, id FROM audit WHERE source = 'relay' AND tenant_id = $1 AND created_at >= $2 AND created_at < $3 AND (created_at, id) < ($4, $5::uuid) ORDER BY created_at DESC, id DESC LIMIT $6) ) AS looked_at ORDER BY created_at DESC, id DESC OFFSET $6 - 1 LIMIT 1

-- name: take_native_key
-- Take key $2 of tenant $1 for request $4: a new one, one a day old, or one left open for $5 seconds.
INSERT INTO native_keys AS known (tenant_id, idempotency_key, digest, request_id) VALUES ($1, $2, $3, $4) ON CONFLICT (tenant_id, idempotency_key) DO UPDATE SET digest = excluded.digest, request_id = excluded.request_id, created_at = now(), ended_at = NULL, http_status = NULL, content_type = NULL, answer = NULL WHERE known.created_at < now() - interval '24 hours' OR (known.ended_at IS NULL AND known.created_at < now() - make_interval(secs => $5)) RETURNING request_id

-- name: get_native_key
-- What is known of a key that is not a day old.
SELECT digest, request_id, ended_at IS NOT NULL AS ended, http_status, content_type, answer FROM native_keys WHERE tenant_id = $1 AND idempotency_key = $2 AND created_at >= now() - interval '24 hours'

-- name: end_native_key
-- Keep the answer that request $3 gave under its key.
UPDATE native_keys SET ended_at = now(), http_status = $4, content_type = $5, answer = $6 WHERE tenant_id = $1 AND idempotency_key = $2 AND request_id = $3

-- name: free_native_key
-- Give up the key of request $3, which was not answered: who asks again is to be answered.
DELETE FROM native_keys WHERE tenant_id = $1 AND idempotency_key = $2 AND request_id = $3 AND ended_at IS NULL

-- name: forget_native_keys
-- Forget keys that nobody can use any more.
DELETE FROM native_keys WHERE created_at < now() - interval '24 hours'

-- name: add_webhooks
-- Insert webhooks, in the transaction that ends their requests.
INSERT INTO webhooks (id, request_id, tenant_id, pool, event, url) SELECT id, request_id, tenant_id, pool, event, url FROM json_to_recordset($1::json) AS row (id uuid, request_id uuid, tenant_id text, pool text, event text, url text)

-- name: claim_webhooks
-- Claim up to $1 due webhooks, those that wait longest first; due again after $2 milliseconds.
UPDATE webhooks SET tries = tries + 1, due_at = now() + $2 * interval '1 millisecond' WHERE id IN ( SELECT id FROM webhooks WHERE state = 'pending' AND due_at <= now() ORDER BY due_at LIMIT $1 FOR UPDATE SKIP LOCKED ) RETURNING id, request_id, tenant_id, event, url, tries

-- name: settle_webhook
-- Record how try $2 of webhook $1 went; the next one is due in $6 milliseconds.
UPDATE webhooks SET state = $3, answer_status = $4, problem = $5, due_at = now() + $6 * interval '1 millisecond', ended_at = CASE WHEN $3 = 'pending' THEN NULL ELSE now() END WHERE id = $1 AND tries = $2 AND state = 'pending'

-- name: redeliver_webhook
-- A person's decision: webhook $1 is due now, with all its tries before it.
UPDATE webhooks SET state = 'pending', tries = 0, due_at = now(), ended_at = NULL WHERE id = $1 RETURNING id

-- name: get_webhook
-- The latest webhook of request $1.
SELECT id, state, tries, due_at, answer_status, problem FROM webhooks WHERE request_id = $1 ORDER BY created_at DESC, id DESC LIMIT 1

-- name: past_calls
-- The last $3 calls of pool $1 that were handed in within the last $2 seconds, the newest first.
SELECT submitted_at, tenant_id, kind, model, priority, coalesce(upstream_ms, 0) AS upstream_ms, coalesce(input_tokens, 0) AS input_tokens, coalesce(output_tokens, 0) + coalesce(thoughts_tokens, 0) AS output_tokens, coalesce(images, 0) AS images FROM audit WHERE pool = $1 AND created_at >= now() - $2 * interval '1 second' AND submitted_at >= now() - $2 * interval '1 second' AND admitted_at IS NOT NULL ORDER BY submitted_at DESC LIMIT $3

-- name: lock_policies
-- Let no other process decide on the policy of pool $1 until this transaction ends.
SELECT pg_advisory_xact_lock(7423001, hashtext($1))

-- name: get_policies
-- The newest $2 revisions of the policy of pool $1, the one in force first.
SELECT revision, origin, digest, policy, set_by, reason, created_at FROM policies WHERE pool = $1 ORDER BY revision DESC LIMIT $2

-- name: deployed_before
-- Which of the digests $2 were a deployment's policy of pool $1 at any time.
SELECT DISTINCT digest FROM policies WHERE pool = $1 AND origin = 'deployment' AND digest = ANY($2::text[])

-- name: add_policy
-- Put a revision of the policy of pool $1 on record; one that is there already is left.
INSERT INTO policies (pool, revision, origin, digest, policy, set_by, reason) VALUES ($1, $2, $3, $4, $5::jsonb, $6, $7) ON CONFLICT (pool, revision) DO NOTHING

-- name: prune_policies
-- Forget revisions of pool $1 up to $2, but of each deployment, which tells old from new, the last.
DELETE FROM policies AS old WHERE pool = $1 AND revision <= $2 AND (origin = 'live' OR EXISTS ( SELECT FROM policies AS later WHERE later.pool = old.pool AND later.origin = old.origin AND later.digest = old.digest AND later.revision > old.revision ))

-- name: add_files
-- Insert the files of requests written in the same transaction.
INSERT INTO files (id, request_id, tenant_id, role, position, name, mime_type, size_bytes, blob_key) SELECT id, request_id, tenant_id, role, position, name, mime_type, size_bytes, blob_key FROM json_to_recordset($1::json) AS row (id uuid, request_id uuid, tenant_id text, role text, position integer, name text, mime_type text, size_bytes bigint, blob_key text) ON CONFLICT (id) DO NOTHING

-- name: get_request
-- One request of a tenant.
SELECT id, tenant_id, source, status, kind, classified_by, classified_reason, model, used_model, priority, attempts, created_at, admitted_at, finished_at, not_before, deadline_at, queue_ms, upstream_ms, first_byte_ms, result, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, version, webhook_url, endpoint FROM requests WHERE id = $1 AND tenant_id = $2

-- name: get_place
-- The place of queued request $1 in its queue, counted up to 10,000.
SELECT 1 + ( SELECT count(*) FROM ( (SELECT 1 FROM requests q WHERE q.status = 'queued' AND q.pool = r.pool AND q.lane = r.lane AND q.priority > r.priority ORDER BY q.priority LIMIT 10000) UNION ALL (SELECT 1 FROM requests q WHERE q.status = 'queued' AND q.pool = r.pool AND q.lane = r.lane AND q.priority = r.priority AND (q.created_at, q.id) < (r.created_at, r.id) ORDER BY q.created_at, q.id LIMIT 10000) LIMIT 10000 ) AS before ) AS place FROM requests r WHERE r.id = $1 AND coalesce(r.status = 'queued', false)

-- name: get_request_files
-- All files of one request in their order, uploads first.
SELECT * FROM files WHERE request_id = $1 ORDER BY role, position

-- name: get_file
-- One file by its public id, for its owner only.
SELECT * FROM files WHERE id = $1 AND tenant_id = $2

-- name: get_versions
-- The versions of many requests: the one query that all long polls of a process share.
SELECT id, version FROM requests WHERE id = ANY($1::uuid[])

-- name: beat
-- Say that this worker is alive.
INSERT INTO workers (instance_id, seen_at) VALUES ($1, now()) ON CONFLICT (instance_id) DO UPDATE SET seen_at = now()

-- name: get_input_files
-- The uploads of many claimed jobs, in their order.
SELECT * FROM files WHERE request_id = ANY($1::uuid[]) AND role = 'input' ORDER BY position

-- name: set_classified
-- Record the kind that a claimed job turned out to have.
UPDATE requests SET kind = $3, classified_by = $4, classified_reason = $5, version = version + 1 WHERE id = $1 AND claim = $2 AND coalesce(status = 'queued', false) RETURNING id

-- name: begin_running
-- Mark admitted jobs as running, with their attempts; a repeat under one claim adds no second one.
WITH begun AS ( UPDATE requests r SET status = 'running', attempts = r.attempts + (r.status = 'queued')::integer, attempt_id = CASE WHEN r.status = 'queued' THEN row.attempt_id ELSE r.attempt_id END, attempt_at = CASE WHEN r.status = 'queued' THEN now() ELSE r.attempt_at END, admitted_at = row.admitted_at, queue_ms = row.queue_ms, used_model = row.model, version = r.version + 1 FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, attempt_id uuid, model text, admitted_at timestamptz, queue_ms double precision, fence_epoch bigint, fence_sequence bigint) WHERE r.id = row.id AND r.claim = row.claim AND coalesce(r.claimed_by = $2, false) AND (r.status = 'running' OR (r.status = 'queued' AND r.cancel_asked_at IS NULL)) RETURNING r.id, r.attempt_id, r.attempt_at, r.tenant_id, r.pool, r.kind, r.attempts, r.claim, row.model, row.fence_epoch, row.fence_sequence, row.admitted_at, row.queue_ms ), attempted AS ( INSERT INTO attempts (id, created_at, request_id, tenant_id, pool, kind, number, claim, instance_id, model, fence_epoch, fence_sequence, outcome, admitted_at, queue_ms) SELECT attempt_id, attempt_at, id, tenant_id, pool, kind, attempts, claim, $2, model, fence_epoch, fence_sequence, 'running', admitted_at, queue_ms FROM begun ON CONFLICT (id, created_at) DO UPDATE SET fence_epoch = excluded.fence_epoch, fence_sequence = excluded.fence_sequence, model = excluded.model, admitted_at = excluded.admitted_at, queue_ms = excluded.queue_ms ) SELECT id FROM begun

-- name: add_attempts
-- Insert attempts that have ended.
INSERT INTO attempts (id, created_at, request_id, tenant_id, pool, kind, number, claim, instance_id, model, fence_epoch, fence_sequence, outcome, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens, finish_reason, model_version, response_id, failure, first_byte_ms) SELECT id, coalesce(created_at, now()), request_id, tenant_id, pool, kind, number, claim, instance_id, model, fence_epoch, fence_sequence, outcome, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens, finish_reason, model_version, response_id, failure, first_byte_ms FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, request_id uuid, tenant_id text, pool text, kind text, number integer, claim bigint, instance_id text, model text, fence_epoch bigint, fence_sequence bigint, outcome text, admitted_at timestamptz, finished_at timestamptz, queue_ms double precision, upstream_ms double precision, input_tokens bigint, output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint, finish_reason text, model_version text, response_id text, failure jsonb, first_byte_ms double precision)

-- name: end_requests
-- Bring claimed jobs to their end state with all that is known of them.
UPDATE requests r SET status = row.status, finished_at = row.finished_at, admitted_at = coalesce(row.admitted_at, r.admitted_at), queue_ms = coalesce(row.queue_ms, r.queue_ms), upstream_ms = row.upstream_ms, first_byte_ms = row.first_byte_ms, used_model = coalesce(row.model, r.used_model), result = row.result, input_tokens = row.input_tokens, output_tokens = row.output_tokens, thoughts_tokens = row.thoughts_tokens, cached_tokens = row.cached_tokens, total_tokens = row.total_tokens, finish_reason = row.finish_reason, failure = row.failure, claimed_by = NULL, not_before = NULL, version = r.version + 1 FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, status text, finished_at timestamptz, admitted_at timestamptz, queue_ms double precision, upstream_ms double precision, model text, result text, input_tokens bigint, output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint, finish_reason text, failure jsonb, first_byte_ms double precision) WHERE r.id = row.id AND r.claim = row.claim AND r.status IN ('queued', 'running') RETURNING r.*

-- name: retry_requests
-- Put claimed jobs back into the queue, not before a given time.
UPDATE requests r SET status = 'queued', claim = r.claim + 1, claimed_by = NULL, not_before = row.not_before, failure = row.failure, upstream_ms = row.upstream_ms, first_byte_ms = row.first_byte_ms, version = r.version + 1 FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, not_before timestamptz, failure jsonb, upstream_ms double precision, first_byte_ms double precision) WHERE r.id = row.id AND r.claim = row.claim AND r.status IN ('queued', 'running') RETURNING r.*

-- name: already_written
-- Which of these writes were committed before, by a try whose reply was lost.
SELECT r.id FROM json_to_recordset($1::json) AS row (id uuid, claim bigint, status text) JOIN requests r ON r.id = row.id WHERE (r.claim = row.claim AND r.status = row.status AND row.status <> 'queued') OR (r.claim = row.claim + 1 AND row.status = 'queued' AND r.status = 'queued')

-- name: end_attempts
-- Record how attempts ended.
UPDATE attempts a SET outcome = row.outcome, finished_at = row.finished_at, upstream_ms = row.upstream_ms, first_byte_ms = row.first_byte_ms, input_tokens = row.input_tokens, output_tokens = row.output_tokens, thoughts_tokens = row.thoughts_tokens, cached_tokens = row.cached_tokens, total_tokens = row.total_tokens, finish_reason = row.finish_reason, model_version = row.model_version, response_id = row.response_id, failure = row.failure FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, outcome text, finished_at timestamptz, upstream_ms double precision, input_tokens bigint, output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint, finish_reason text, model_version text, response_id text, failure jsonb, first_byte_ms double precision) WHERE a.id = row.id AND a.created_at = row.created_at

-- name: add_bodies
-- Append the bodies of audit rows: inline as base64, or the key of a blob.
INSERT INTO bodies (id, role, tenant_id, pool, encoding, size_bytes, data, blob_key) SELECT id, role, tenant_id, pool, encoding, size_bytes, decode(data, 'base64'), blob_key FROM json_to_recordset($1::json) AS row (id uuid, role text, tenant_id text, pool text, encoding text, size_bytes bigint, data text, blob_key text)

-- name: hand_back
-- Give claims up at once, as a worker that stops does; not counted as lapses.
UPDATE requests r SET status = 'queued', claim = r.claim + 1, claimed_by = NULL, version = r.version + (r.status = 'running')::integer FROM json_to_recordset($1::json) AS row (id uuid, claim bigint), requests old WHERE r.id = row.id AND r.claim = row.claim AND r.status IN ('queued', 'running') AND old.id = r.id RETURNING r.*, old.status AS old_status

-- name: release_strays
-- Give up claims of worker $1 that it does not know of: their replies were lost.
UPDATE requests SET claim = claim + 1, claimed_by = NULL WHERE id IN ( SELECT id FROM requests WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false) AND claimed_by = $1 AND coalesce(status = 'queued', false) AND NOT (id = ANY($2::uuid[])) FOR UPDATE SKIP LOCKED ) RETURNING id, pool

-- name: leave
-- Forget this worker; what it still had in the queue is ready again.
WITH returned AS ( UPDATE requests SET claim = claim + 1, claimed_by = NULL WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false) AND claimed_by = $1 AND coalesce(status = 'queued', false) RETURNING pool ), gone AS ( DELETE FROM workers WHERE instance_id = $1 ) SELECT DISTINCT pool FROM returned

-- name: silent_workers
-- Workers not seen for $1 milliseconds, counted from the server's own start at the latest.
SELECT instance_id, seen_at FROM workers WHERE greatest(seen_at, pg_postmaster_start_time()) < now() - $1 * interval '1 millisecond'

-- name: unknown_holders
-- Who holds jobs and is not known as a worker.
WITH RECURSIVE holders AS ( (SELECT claimed_by FROM requests WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false) ORDER BY claimed_by LIMIT 1) UNION ALL SELECT (SELECT r.claimed_by FROM requests r WHERE coalesce(r.status IN ('queued', 'running') AND r.claimed_by IS NOT NULL, false) AND r.claimed_by > holders.claimed_by ORDER BY r.claimed_by LIMIT 1) FROM holders WHERE holders.claimed_by IS NOT NULL ) SELECT claimed_by FROM holders WHERE claimed_by IS NOT NULL AND NOT EXISTS ( SELECT 1 FROM workers w WHERE w.instance_id = holders.claimed_by) AND pg_postmaster_start_time() < now() - $1 * interval '1 millisecond'

-- name: lock_lapsed
-- Jobs of the workers $1, which have not been seen since $2 milliseconds ago; up to 500.
SELECT id FROM requests WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false) AND claimed_by = ANY($1::text[]) AND NOT EXISTS ( SELECT 1 FROM workers w WHERE w.instance_id = claimed_by AND greatest(w.seen_at, pg_postmaster_start_time()) >= now() - $2 * interval '1 millisecond') ORDER BY id LIMIT 500 FOR UPDATE OF requests SKIP LOCKED

-- name: retake
-- Return locked, lapsed jobs to the queue; a running one lapses, and at $2 lapses it is dead.
UPDATE requests r SET claim = r.claim + 1, claimed_by = NULL, lapses = r.lapses + (r.status = 'running')::integer, status = CASE WHEN r.status = 'running' AND r.lapses + 1 >= $2 THEN 'dead' ELSE 'queued' END, finished_at = CASE WHEN r.status = 'running' AND r.lapses + 1 >= $2 THEN now() END, failure = CASE WHEN r.status = 'running' AND r.lapses + 1 >= $2 THEN $3::jsonb ELSE r.failure END, not_before = CASE WHEN r.status = 'running' AND r.lapses = $2 - 2 THEN now() + random() * interval '30 seconds' ELSE r.not_before END, version = r.version + (r.status = 'running')::integer FROM requests old WHERE r.id = ANY($1::uuid[]) AND old.id = r.id RETURNING r.*, old.status AS old_status

-- name: expire_due
-- End up to 500 queued jobs whose deadline passed in the last $2 seconds, claimed or not.
UPDATE requests SET status = 'expired', claim = claim + 1, claimed_by = NULL, not_before = NULL, finished_at = now(), failure = $1::jsonb, version = version + 1 WHERE id IN ( SELECT id FROM requests WHERE coalesce(status = 'queued' AND deadline_at IS NOT NULL, false) AND deadline_at <= now() AND deadline_at > now() - $2 * interval '1 second' ORDER BY deadline_at LIMIT 500 FOR UPDATE SKIP LOCKED ) RETURNING *

-- name: requeue_dead
-- A person's decision: a dead job gets a fresh start.
UPDATE requests SET status = 'queued', lapses = 0, claim = claim + 1, claimed_by = NULL, failure = NULL, finished_at = NULL, not_before = NULL, cancel_asked_at = NULL, version = version + 1 WHERE id = $1 AND status = 'dead' RETURNING pool

-- name: notify
-- Wake listeners; sent apart from the change itself, since NOTIFY takes an instance-wide lock.
SELECT pg_notify(channel, payload) FROM json_to_recordset($1::json) AS row (channel text, payload text)

-- name: prune_candidates
-- Ended requests older than $1, oldest first, at most $2, of all tenants but $3.
SELECT id FROM requests WHERE status NOT IN ('queued', 'running') AND finished_at < $1 AND NOT (tenant_id = ANY($3::text[])) ORDER BY finished_at LIMIT $2

-- name: blobs_of_requests
-- The blobs of the files of many requests.
SELECT blob_key FROM files WHERE request_id = ANY($1::uuid[])

-- name: delete_requests
-- Delete ended requests with their files.
DELETE FROM requests WHERE id = ANY($1::uuid[]) AND status NOT IN ('queued', 'running')

-- name: forget_workers
-- Forget workers that have long been gone and hold nothing.
DELETE FROM workers w WHERE seen_at < $1 AND NOT EXISTS ( SELECT 1 FROM requests r WHERE coalesce(r.status IN ('queued', 'running') AND r.claimed_by IS NOT NULL, false) AND r.claimed_by = w.instance_id)

-- name: blobs_in_use
-- Which of these blobs are still referred to.
SELECT blob_key FROM files WHERE blob_key = ANY($1::text[]) UNION ALL SELECT blob_key FROM bodies WHERE blob_key = ANY($1::text[]) UNION ALL SELECT blob_key FROM batch_files WHERE blob_key = ANY($1::text[]) UNION ALL SELECT input_blob FROM batches WHERE input_blob = ANY($1::text[]) AND status = 'validating'

-- name: lock_queued
-- How much tenant $1 has queued in pool $2 as last counted, locked until this transaction ends.
SELECT jobs, size_bytes, extract(epoch FROM clock_timestamp() - counted_at)::double precision * 1000 AS age_ms, count_ms FROM queued WHERE tenant_id = $1 AND pool = $2 FOR UPDATE

-- name: begin_queued
-- Make the row to lock; old enough to be counted at once.
INSERT INTO queued (tenant_id, pool, jobs, size_bytes, counted_at, count_ms) VALUES ($1, $2, 0, 0, 'epoch', 0) ON CONFLICT (tenant_id, pool) DO NOTHING

-- name: count_queued
-- The ready jobs of tenant $1 in pool $2, in the lanes $3, at most $4 of each.
SELECT count(*) AS jobs FROM unnest($3::text[]) AS lanes (lane) CROSS JOIN LATERAL ( SELECT id FROM requests WHERE status = 'queued' AND claimed_by IS NULL AND not_before IS NULL AND pool = $2 AND lane = lanes.lane AND tenant_id = $1 ORDER BY priority DESC, created_at, id LIMIT $4 ) AS ready

-- name: count_queued_bytes
-- The same with the bytes of their prompts and files.
SELECT count(*) AS jobs, coalesce(sum(ready.size_bytes + coalesce(( SELECT sum(f.size_bytes) FROM files f WHERE f.request_id = ready.id AND f.role = 'input' ), 0)), 0)::bigint AS size_bytes FROM unnest($3::text[]) AS lanes (lane) CROSS JOIN LATERAL ( SELECT id, octet_length(prompt) AS size_bytes FROM requests WHERE status = 'queued' AND claimed_by IS NULL AND not_before IS NULL AND pool = $2 AND lane = lanes.lane AND tenant_id = $1 ORDER BY priority DESC, created_at, id LIMIT $4 ) AS ready

-- name: set_queued
-- Note what tenant $1 has queued in pool $2, and where it was counted how long that took.
UPDATE queued SET jobs = $3, size_bytes = $4, counted_at = CASE WHEN $5::double precision IS NULL THEN counted_at ELSE clock_timestamp() END, count_ms = coalesce($5, count_ms) WHERE tenant_id = $1 AND pool = $2

-- name: forget_queued
-- Have what tenant $1 has queued counted anew: its caps may have been others for a while.
DELETE FROM queued WHERE tenant_id = $1

-- name: ripen
-- Let retries take their place among the ready whose time has come in the last $1 seconds.
UPDATE requests SET not_before = NULL, version = version + 1 WHERE id IN ( SELECT id FROM requests WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false) AND not_before <= now() AND not_before > now() - $1 * interval '1 second' ORDER BY not_before LIMIT 500 FOR UPDATE SKIP LOCKED )

-- name: came
-- What became ready in pool $1, lane $2 in the transactions [$3, $4) and $5; whether `ripen` $6 has work.
WITH found AS MATERIALIZED ( SELECT tenant_id, priority, created_at, id FROM requests WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL AND ready_xid >= 0, false) AND pool = $1 AND lane = $2 AND ready_xid >= $3 AND ready_xid < $4 UNION ALL SELECT r.tenant_id, r.priority, r.created_at, r.id FROM unnest($5::bigint[]) AS late (xid) CROSS JOIN LATERAL ( SELECT tenant_id, priority, created_at, id FROM requests WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL AND ready_xid >= 0, false) AND pool = $1 AND lane = $2 AND ready_xid = late.xid OFFSET 0 ) AS r ), ranked AS ( SELECT found.*, row_number() OVER w AS place, count(*) OVER (PARTITION BY tenant_id, priority) AS jobs FROM found WINDOW w AS (PARTITION BY tenant_id, priority ORDER BY created_at, id) ), queues AS ( SELECT tenant_id, priority, max(jobs) AS jobs, array_agg(created_at ORDER BY place) AS made_at, array_agg(id ORDER BY place) AS ids FROM ranked WHERE place <= 64 GROUP BY tenant_id, priority ) SELECT pg_snapshot_xmax(seen.snapshot)::text::bigint AS xmax, ARRAY(SELECT xid::text::bigint FROM pg_snapshot_xip(seen.snapshot) AS xid) AS under_way, EXISTS ( SELECT 1 FROM requests WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false) AND not_before <= now() AND not_before > now() - $6 * interval '1 second' ) AS is_ripening, queues.* FROM (SELECT pg_current_snapshot() AS snapshot) AS seen LEFT JOIN queues ON true

-- name: claim
-- Claim up to $3 ready jobs of pool $1, lane $2 for $4 from the queues $5, tenants in turn.
WITH queues AS MATERIALIZED ( SELECT n, tenant_id, priority, since, early FROM json_to_recordset($5::json) AS row (n integer, tenant_id text, priority integer, since timestamptz, early uuid[]) ), candidates AS MATERIALIZED ( SELECT head.*, row_number() OVER (PARTITION BY n ORDER BY priority DESC, created_at, id) AS turn FROM ( SELECT queues.n, queues.priority, r.created_at, r.id, false AS is_early FROM queues CROSS JOIN LATERAL ( SELECT created_at, id FROM requests WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false) AND pool || '/' || lane || '/' || tenant_id = $1 || '/' || $2 || '/' || queues.tenant_id AND priority = queues.priority AND created_at >= queues.since ORDER BY created_at, id LIMIT $3 ) AS r UNION ALL SELECT queues.n, queues.priority, r.created_at, r.id, true FROM queues CROSS JOIN unnest(queues.early) AS named (id) CROSS JOIN LATERAL ( SELECT created_at, id FROM requests WHERE id = named.id AND pool = $1 AND lane = $2 AND coalesce(not_before IS NULL AND claimed_by IS NULL AND status = 'queued', false) OFFSET 0 ) AS r WHERE queues.since IS NULL OR r.created_at < queues.since ) AS head ), picked AS MATERIALIZED ( SELECT r.id, c.n, c.turn FROM (SELECT id, n, turn FROM candidates ORDER BY turn, n) AS c CROSS JOIN LATERAL ( SELECT id FROM requests WHERE id = c.id AND coalesce(not_before IS NULL AND claimed_by IS NULL AND status = 'queued', false) FOR UPDATE SKIP LOCKED ) AS r LIMIT $3 ), claimed AS ( UPDATE requests r SET claim = r.claim + 1, claimed_by = $4 FROM picked WHERE r.id = picked.id RETURNING r.*, picked.n, picked.turn ), looked_at AS ( SELECT c.n, c.priority, count(*) FILTER (WHERE NOT c.is_early) AS scanned, max(c.created_at) FILTER (WHERE NOT c.is_early) AS last, min(c.created_at) FILTER (WHERE NOT c.is_early AND claimed.id IS NULL) AS first_left, array_agg(c.id) FILTER (WHERE c.is_early AND claimed.id IS NULL) AS early_left FROM candidates c LEFT JOIN claimed ON claimed.id = c.id GROUP BY c.n, c.priority ) SELECT claimed.*, EXISTS ( SELECT 1 FROM files f WHERE f.request_id = claimed.id AND f.role = 'input' ) AS has_files, queues.n AS of_n, queues.priority AS of_priority, looked_at.early_left, coalesce(first_left, CASE WHEN scanned >= $3 THEN last END) AS since_now FROM queues LEFT JOIN looked_at USING (n, priority) LEFT JOIN claimed ON claimed.n = queues.n AND claimed.priority = queues.priority ORDER BY claimed.turn, claimed.n

-- name: get_body
-- The body in the role $3 of a request of tenant $2 that has ended.
SELECT bodies.encoding, bodies.size_bytes, bodies.data, bodies.blob_key, bodies.content_type, bodies.omitted_bytes FROM audit JOIN bodies ON bodies.id = audit.id AND bodies.created_at = audit.created_at WHERE audit.request_id = $1 AND audit.tenant_id = $2 AND audit.source <> 'batch' AND bodies.tenant_id = $2 AND bodies.role = $3 LIMIT 1

-- name: get_cost
-- What request $1 of tenant $2 cost; it ended between $3 and $4, which tell the partitions.
SELECT cost_micros FROM audit WHERE request_id = $1 AND tenant_id = $2 AND created_at >= $3 AND created_at < $4 LIMIT 1

-- name: add_relayed
-- Append the audit rows of native calls; one that is there already is left, so repeats are safe.
INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status, kind, classified_by, classified_reason, priority, model, response_id, attempts, lapses, instance_id, submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, endpoint, http_status, streamed, key_id, subject, usage_state, cost_micros, images, first_byte_ms) SELECT id, created_at, request_id, tenant_id, pool, source, status, kind, classified_by, classified_reason, priority, model, response_id, attempts, lapses, instance_id, submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, endpoint, http_status, streamed, key_id, subject, usage_state, cost_micros, images, first_byte_ms FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, request_id uuid, tenant_id text, pool text, source text, status text, kind text, classified_by text, classified_reason text, priority integer, model text, response_id text, attempts integer, lapses integer, instance_id text, submitted_at timestamptz, admitted_at timestamptz, finished_at timestamptz, queue_ms double precision, upstream_ms double precision, input_tokens bigint, output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint, finish_reason text, failure jsonb, endpoint text, http_status integer, streamed boolean, key_id text, subject text, usage_state text, cost_micros bigint, images integer, first_byte_ms double precision) ON CONFLICT (id, created_at) DO NOTHING RETURNING id

-- name: add_relayed_bodies
-- Append the bodies of native calls; one that is there already is left.
INSERT INTO bodies (id, created_at, role, tenant_id, pool, encoding, size_bytes, data, blob_key, content_type, omitted_bytes) SELECT id, created_at, role, tenant_id, pool, encoding, size_bytes, decode(data, 'base64'), blob_key, content_type, coalesce(omitted_bytes, 0) FROM json_to_recordset($1::json) AS row (id uuid, created_at timestamptz, role text, tenant_id text, pool text, encoding text, size_bytes bigint, data text, blob_key text, content_type text, omitted_bytes bigint) ON CONFLICT (id, created_at, role) DO NOTHING

-- name: get_relayed
-- The record of one native call of a tenant.
SELECT * FROM audit WHERE request_id = $1 AND tenant_id = $2 AND source = 'relay' LIMIT 1

-- name: get_whereabouts
-- Where request $1 stands, whoever owns it.
SELECT id, tenant_id, pool, status, kind, coalesce(used_model, model) AS model, claimed_by, attempts, created_at, not_before, admitted_at, finished_at, failure FROM requests WHERE id = $1

-- name: running_calls
-- The jobs of pool $1 that hold a permit: whose it is, by process and sequence of its fence.
SELECT r.id, a.instance_id, a.fence_sequence, r.admitted_at FROM requests r JOIN attempts a ON a.id = r.attempt_id AND a.created_at = r.attempt_at WHERE r.claimed_by IS NOT NULL AND r.status = 'running' AND r.pool = $1 LIMIT 5000

-- name: search_requests
-- Requests with ids in [$1, $2), newest first: $3 that match the rest of $4 looked at.
SELECT id, tenant_id, pool, source, status, kind, model, priority, attempts, created_at, admitted_at, finished_at, queue_ms, upstream_ms, total_tokens, failure_code, subject, endpoint FROM ( (SELECT id, tenant_id, pool, source, status, kind, coalesce(used_model, model) AS model, priority, attempts, created_at, admitted_at, finished_at, queue_ms, upstream_ms, total_tokens, failure ->> 'code' AS failure_code, subject, endpoint FROM requests WHERE id >= $1 AND id < $2 ORDER BY id DESC LIMIT $4) UNION ALL (SELECT id, tenant_id, pool, CASE WHEN source IN ('relay', 'batch') THEN source END, status, kind, model, priority, attempts, CASE WHEN source = 'batch' THEN to_timestamp( ('x0000' || translate(left(id::text, 13), '-', ''))::bit(64)::bigint / 1000.0) ELSE submitted_at END, admitted_at, finished_at, queue_ms, upstream_ms, total_tokens, failure ->> 'code', subject, endpoint FROM audit WHERE id >= $1 AND id < $2 ORDER BY id DESC LIMIT $4) UNION ALL (SELECT l.id, l.tenant_id, '', 'batch', CASE l.state WHEN 'calling' THEN 'running' ELSE 'queued' END, NULL, NULL, -100, l.attempts, to_timestamp( ('x0000' || translate(left(l.id::text, 13), '-', ''))::bit(64)::bigint / 1000.0), NULL, NULL, NULL, NULL, NULL, NULL, NULL, b.endpoint FROM batch_lines l JOIN batches b ON b.id = l.batch_id WHERE l.state IN ('claimed', 'calling') AND l.id >= $1 AND l.id < $2 ORDER BY l.id DESC LIMIT $4) ORDER BY id DESC LIMIT $4 ) AS looked_at WHERE source IS NOT NULL AND ($5::text[] IS NULL OR status = ANY($5)) AND ($6::text IS NULL OR tenant_id = $6) AND ($7::text IS NULL OR model = $7) AND ($8::text IS NULL OR kind = $8) AND ($9::text IS NULL OR source = $9) AND ($10::text IS NULL OR failure_code = $10) AND ($11::text IS NULL OR subject = $11) AND created_at >= $12 AND created_at < $13 ORDER BY id DESC LIMIT $3

-- name: search_reach
-- The last of the $3 that `search_requests` looks at, where there are that many.
SELECT id FROM ( (SELECT id FROM requests WHERE id >= $1 AND id < $2 ORDER BY id DESC LIMIT $3) UNION ALL (SELECT id FROM audit WHERE id >= $1 AND id < $2 ORDER BY id DESC LIMIT $3) UNION ALL (SELECT id FROM batch_lines WHERE state IN ('claimed', 'calling') AND id >= $1 AND id < $2 ORDER BY id DESC LIMIT $3) ) AS looked_at ORDER BY id DESC OFFSET $3 - 1 LIMIT 1

-- name: standing_queues
-- The jobs that are ready in up to $1 queues, up to $2 of each, and when the oldest was handed in.
WITH RECURSIVE queues AS ( (SELECT pool || '/' || lane || '/' || tenant_id AS queue, pool, lane, tenant_id, 1 AS place FROM requests WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false) ORDER BY (pool || '/' || lane || '/' || tenant_id) LIMIT 1) UNION ALL (SELECT next.* FROM queues CROSS JOIN LATERAL ( SELECT r.pool || '/' || r.lane || '/' || r.tenant_id, r.pool, r.lane, r.tenant_id, queues.place + 1 FROM requests r WHERE coalesce(r.status = 'queued' AND r.claimed_by IS NULL AND r.not_before IS NULL, false) AND (r.pool || '/' || r.lane || '/' || r.tenant_id) > queues.queue ORDER BY (r.pool || '/' || r.lane || '/' || r.tenant_id) LIMIT 1 ) AS next WHERE queues.place < $1) ) SELECT queues.pool, queues.lane, queues.tenant_id, found.jobs, found.oldest FROM queues CROSS JOIN LATERAL ( SELECT count(*) AS jobs, min(created_at) AS oldest FROM ( SELECT r.created_at FROM requests r WHERE coalesce(r.status = 'queued' AND r.claimed_by IS NULL AND r.not_before IS NULL, false) AND (r.pool || '/' || r.lane || '/' || r.tenant_id) = queues.queue LIMIT $2 ) AS counted ) AS found

-- name: standing_jobs
-- Jobs that wait for a retry, that workers have, that run or are dead, up to $1 of each; and more.
SELECT (SELECT count(*) FROM (SELECT 1 FROM requests WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false) LIMIT $1) AS a ) AS retrying, (SELECT count(*) FROM (SELECT 1 FROM requests WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false) AND coalesce(status = 'running', false) LIMIT $1) AS a ) AS running, (SELECT count(*) FROM (SELECT 1 FROM requests WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false) AND coalesce(status = 'queued', false) LIMIT $1) AS a ) AS claimed, (SELECT count(*) FROM (SELECT 1 FROM requests WHERE coalesce(status = 'dead', false) LIMIT $1) AS a ) AS dead, (SELECT count(*) FROM (SELECT 1 FROM webhooks WHERE state = 'pending' LIMIT $1) AS a ) AS webhooks, (SELECT greatest(0, extract(epoch FROM now() - min(due_at))) FROM webhooks WHERE state = 'pending') AS webhooks_oldest_s, (SELECT count(*) FROM workers WHERE seen_at > now() - interval '1 minute') AS workers

-- name: count_stuck
-- How many dead jobs and how many webhooks that were given up there are, up to $1 of each.
SELECT (SELECT count(*) FROM (SELECT FROM requests WHERE coalesce(status = 'dead', false) ORDER BY finished_at LIMIT $1) AS one) AS jobs, (SELECT count(*) FROM (SELECT FROM webhooks WHERE coalesce(state = 'given_up', false) ORDER BY ended_at LIMIT $1) AS one) AS webhooks

-- name: list_dead
-- The $1 jobs that died last.
SELECT id, tenant_id, pool, kind, coalesce(used_model, model) AS model, attempts, lapses, created_at, finished_at, failure ->> 'message' AS problem FROM requests WHERE coalesce(status = 'dead', false) ORDER BY finished_at DESC LIMIT $1

-- name: discard_dead
-- A person's decision: a dead job is not to be made any more.
UPDATE requests SET status = 'cancelled', claim = claim + 1, version = version + 1 WHERE id = $1 AND status = 'dead' RETURNING id

-- name: list_given_up
-- The $1 webhooks that were given up last.
SELECT id, request_id, tenant_id, event, url, tries, answer_status, problem, ended_at FROM webhooks WHERE coalesce(state = 'given_up', false) ORDER BY ended_at DESC LIMIT $1

-- name: submit_requests
-- Insert many jobs at once; a row whose id or key is there already is left out, so repeats are safe.
INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by, classified_reason, prompt, image_uri, model, priority, created_at, deadline_at, idempotency_key, idempotency_digest, webhook_url, subject, endpoint, traceparent) SELECT id, tenant_id, pool, 'job', 'queued', kind, classified_by, classified_reason, prompt, image_uri, model, priority, created_at, deadline_at, idempotency_key, decode(idempotency_digest, 'hex'), webhook_url, subject, endpoint, traceparent FROM json_to_recordset($1::json) AS row (id uuid, tenant_id text, pool text, kind text, classified_by text, classified_reason text, prompt text, image_uri text, model text, priority integer, created_at timestamptz, deadline_at timestamptz, idempotency_key text, idempotency_digest text, webhook_url text, subject text, endpoint text, traceparent text) ON CONFLICT DO NOTHING

-- name: get_keyed
-- The requests that have these idempotency keys of their tenants now.
SELECT r.id, r.tenant_id, r.idempotency_key, encode(r.idempotency_digest, 'hex') AS digest, r.status, r.kind, r.classified_by, r.classified_reason FROM json_to_recordset($1::json) AS row (tenant_id text, idempotency_key text) JOIN requests r ON r.tenant_id = row.tenant_id AND r.idempotency_key = row.idempotency_key

-- name: access_version
-- The number that grows with every change of a tenant or key.
SELECT version FROM access

-- name: count_change
-- Say that a tenant or key has changed; locks the number until the change is committed.
UPDATE access SET version = version + 1

-- name: find_keys
-- The keys with the prefixes $1, with what their tenants may do.
SELECT k.prefix, k.digest, k.tenant_id, k.scopes, k.revoked_at IS NOT NULL AS revoked, extract(epoch FROM k.expires_at - now())::double precision AS expires_in_s, t.disabled_at IS NOT NULL AS disabled, t.models, t.most_priority, t.most_queued_jobs, t.most_queued_bytes, t.most_streams, t.most_long_polls, (t.budget_day_money * 1000000)::bigint AS day_micros, (t.budget_month_money * 1000000)::bigint AS month_micros, t.budget_day_tokens AS day_tokens, t.budget_month_tokens AS month_tokens FROM keys k JOIN tenants t ON t.id = k.tenant_id WHERE k.prefix = ANY($1::text[])

-- name: any_key
-- Whether there is a key that works.
SELECT EXISTS ( SELECT 1 FROM keys WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now()))

-- name: keys_used
-- Note when keys were last used; one that another process is writing just now is left.
UPDATE keys k SET last_used_at = row.used_at FROM json_to_recordset($1::json) AS row (prefix text, used_at timestamptz) WHERE k.prefix = row.prefix AND (k.last_used_at IS NULL OR k.last_used_at < row.used_at) AND k.prefix IN ( SELECT prefix FROM keys WHERE prefix IN (SELECT prefix FROM json_to_recordset($1::json) AS used (prefix text)) FOR NO KEY UPDATE SKIP LOCKED )

-- name: add_key
-- Insert a key of tenant $2; a repeat finds it there, another key with its prefix is left alone.
INSERT INTO keys (prefix, tenant_id, digest, name, scopes, expires_at) VALUES ($1, $2, $3, $4, $5::text[], $6) ON CONFLICT (prefix) DO UPDATE SET name = excluded.name WHERE keys.digest = excluded.digest RETURNING prefix, tenant_id, name, scopes, created_at, expires_at, revoked_at, last_used_at

-- name: revoke_key
-- End a key for good; one that is revoked already stays as it is.
UPDATE keys SET revoked_at = coalesce(revoked_at, now()) WHERE prefix = $1 RETURNING prefix, tenant_id, name, scopes, created_at, expires_at, revoked_at, last_used_at

-- name: list_keys
-- Up to $3 keys in order of their making, of tenant $1 where given, whose prefix starts with $2.
SELECT prefix, tenant_id, name, scopes, created_at, expires_at, revoked_at, last_used_at FROM keys WHERE ($1::text IS NULL OR tenant_id = $1) AND starts_with(prefix, $2) ORDER BY created_at, prefix LIMIT $3

-- name: list_tenants
-- Up to $2 tenants by id, or the one whose id is $1.
SELECT t.*, (SELECT count(*) FROM keys k WHERE k.tenant_id = t.id AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())) AS keys FROM tenants t WHERE $1::text IS NULL OR t.id = $1 ORDER BY t.id LIMIT $2

-- name: add_tenant
-- Make a tenant; one that is there is left as it is.
INSERT INTO tenants (id) VALUES ($1) ON CONFLICT (id) DO NOTHING

-- name: set_tenant
-- Bring the columns of a tenant to the values of $2, all of which are given.
UPDATE tenants t SET most_priority = row.most_priority, models = row.models, most_queued_jobs = row.most_queued_jobs, most_queued_bytes = row.most_queued_bytes, most_streams = row.most_streams, most_long_polls = row.most_long_polls, budget_day_money = row.budget_day_money, budget_month_money = row.budget_month_money, budget_day_tokens = row.budget_day_tokens, budget_month_tokens = row.budget_month_tokens, retention_days = row.retention_days, disabled_at = CASE WHEN row.disabled THEN coalesce(t.disabled_at, now()) END FROM json_to_record($2::json) AS row (most_priority integer, models text[], most_queued_jobs bigint, most_queued_bytes bigint, most_streams integer, most_long_polls integer, budget_day_money numeric, budget_month_money numeric, budget_day_tokens bigint, budget_month_tokens bigint, retention_days integer, disabled boolean) WHERE t.id = $1

-- name: lock_tenant
-- One tenant, which no other process can change until this transaction ends.
SELECT t.*, 0 AS keys FROM tenants t WHERE id = $1 FOR UPDATE

-- name: remove_tenant
-- Forget a tenant with its keys; its requests stay until their time is over.
DELETE FROM tenants WHERE id = $1 RETURNING id

-- name: own_retention
-- Tenants whose requests are kept for other days than $1.
SELECT id, retention_days FROM tenants WHERE retention_days <> $1

-- name: prune_candidates_of
-- Ended requests of tenant $3 older than $1, oldest first, at most $2.
SELECT id FROM requests WHERE tenant_id = $3 AND created_at < $1 AND status NOT IN ('queued', 'running') AND finished_at < $1 ORDER BY created_at LIMIT $2

-- name: recorded_of
-- How many rows of the audit each of the requests $1 has.
SELECT request_id, count(*) AS records FROM audit WHERE request_id = ANY($1::uuid[]) GROUP BY request_id

-- name: audit_of
-- The rows of the audit of the requests $1.
SELECT id FROM audit WHERE request_id = ANY($1::uuid[])

-- name: drop_usage_of
-- Forget what tenant $1 used.
DELETE FROM usage_days WHERE tenant_id = $1

-- name: drop_queued_of
-- Forget how much tenant $1 had queued.
DELETE FROM queued WHERE tenant_id = $1

-- name: drop_workers
-- Forget that the workers $1 were ever alive.
DELETE FROM workers WHERE instance_id = ANY($1::text[])

-- name: add_streams
-- Insert finished streams whole; one that is there already is left, so repeats are safe.
INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by, classified_reason, prompt, image_uri, model, used_model, priority, created_at, deadline_at, admitted_at, finished_at, attempts, queue_ms, upstream_ms, result, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, subject, first_byte_ms) SELECT id, tenant_id, pool, 'stream', status, kind, classified_by, classified_reason, prompt, image_uri, model, used_model, priority, created_at, deadline_at, admitted_at, finished_at, attempts, queue_ms, upstream_ms, result, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, subject, first_byte_ms FROM json_to_recordset($1::json) AS row (id uuid, tenant_id text, pool text, status text, kind text, classified_by text, classified_reason text, prompt text, image_uri text, model text, used_model text, priority integer, created_at timestamptz, deadline_at timestamptz, admitted_at timestamptz, finished_at timestamptz, attempts integer, queue_ms double precision, upstream_ms double precision, result text, input_tokens bigint, output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint, finish_reason text, failure jsonb, subject text, first_byte_ms double precision) ON CONFLICT (id) DO NOTHING RETURNING *

-- name: add_audit
-- Append one audit row per ended request.
INSERT INTO audit (id, request_id, tenant_id, pool, source, status, kind, classified_by, classified_reason, priority, model, model_version, response_id, attempts, lapses, instance_id, submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, subject, usage_state, cost_micros, images, first_byte_ms) SELECT id, request_id, tenant_id, pool, source, status, kind, classified_by, classified_reason, priority, model, model_version, response_id, attempts, lapses, instance_id, submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, input_tokens, output_tokens, thoughts_tokens, cached_tokens, total_tokens, finish_reason, failure, subject, usage_state, cost_micros, images, first_byte_ms FROM json_to_recordset($1::json) AS row (id uuid, request_id uuid, tenant_id text, pool text, source text, status text, kind text, classified_by text, classified_reason text, priority integer, model text, model_version text, response_id text, attempts integer, lapses integer, instance_id text, submitted_at timestamptz, admitted_at timestamptz, finished_at timestamptz, queue_ms double precision, upstream_ms double precision, input_tokens bigint, output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint, total_tokens bigint, finish_reason text, failure jsonb, subject text, usage_state text, cost_micros bigint, images integer, first_byte_ms double precision)

-- name: add_usage
-- Add to the totals what was just recorded; in one order everywhere, lest two wait in a circle.
INSERT INTO usage_days AS kept (tenant_id, day, model, pool, requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros, unpriced, partial, estimated, unknown) SELECT tenant_id, day, model, pool, requests, input_tokens, output_tokens, cached_tokens, thoughts_tokens, images, cost_micros, unpriced, partial, estimated, unknown FROM json_to_recordset($1::json) AS row (tenant_id text, day date, model text, pool text, requests bigint, input_tokens bigint, output_tokens bigint, cached_tokens bigint, thoughts_tokens bigint, images bigint, cost_micros bigint, unpriced bigint, partial bigint, estimated bigint, unknown bigint) ORDER BY tenant_id, day, model, pool ON CONFLICT (tenant_id, day, model, pool) DO UPDATE SET requests = kept.requests + excluded.requests, input_tokens = kept.input_tokens + excluded.input_tokens, output_tokens = kept.output_tokens + excluded.output_tokens, cached_tokens = kept.cached_tokens + excluded.cached_tokens, thoughts_tokens = kept.thoughts_tokens + excluded.thoughts_tokens, images = kept.images + excluded.images, cost_micros = kept.cost_micros + excluded.cost_micros, unpriced = kept.unpriced + excluded.unpriced, partial = kept.partial + excluded.partial, estimated = kept.estimated + excluded.estimated, unknown = kept.unknown + excluded.unknown

-- name: get_usage
-- Totals from day $4 to day $5, of tenant $6 or of all, apart by tenant, model and day as $1 to $3 say.
SELECT CASE WHEN $1::boolean THEN tenant_id END AS tenant, CASE WHEN $2::boolean THEN model END AS model, CASE WHEN $3::boolean THEN day END AS day, sum(requests)::bigint AS requests, sum(input_tokens)::bigint AS input_tokens, sum(output_tokens)::bigint AS output_tokens, sum(cached_tokens)::bigint AS cached_tokens, sum(thoughts_tokens)::bigint AS thoughts_tokens, sum(images)::bigint AS images, sum(cost_micros)::bigint AS cost_micros, sum(unpriced)::bigint AS unpriced, sum(partial)::bigint AS partial, sum(estimated)::bigint AS estimated, sum(unknown)::bigint AS unknown FROM usage_days WHERE day BETWEEN $4 AND $5 AND ($6::text IS NULL OR tenant_id = $6) GROUP BY 1, 2, 3 ORDER BY 3, 1, 2 LIMIT $7

-- name: get_spent
-- What the tenants $1 have spent in the month that begins on $2, and of that on day $3.
SELECT tenant_id, sum(cost_micros)::bigint AS month_micros, sum(input_tokens + output_tokens + thoughts_tokens)::bigint AS month_tokens, coalesce(sum(cost_micros) FILTER (WHERE day = $3), 0)::bigint AS day_micros, coalesce(sum(input_tokens + output_tokens + thoughts_tokens) FILTER (WHERE day = $3), 0)::bigint AS day_tokens FROM usage_days WHERE tenant_id = ANY($1::text[]) AND day >= $2 GROUP BY tenant_id
