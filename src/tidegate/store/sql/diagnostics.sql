-- Read-only checks of a database, and deletion of the rows of a test run.

-- name: look_at_server
-- Return properties of the server, and of our role and database.
SELECT current_setting('server_version_num')::int AS version,
    current_setting('server_version') AS version_text,
    pg_is_in_recovery() AS is_replica,
    current_setting('server_encoding') AS encoding,
    current_setting('autovacuum') AS autovacuum,
    current_setting('fsync') AS fsync,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('default_transaction_read_only') AS read_only,
    current_setting('max_connections')::int AS max_connections,
    current_setting('superuser_reserved_connections')::int AS reserved,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connected,
    current_setting('max_locks_per_transaction')::int AS locks_each,
    current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int
        AS lockers,
    -- The partitions and their indexes, of the table with the most.
    (SELECT coalesce(max(one.amount), 0)::int FROM (
        SELECT count(DISTINCT i.inhrelid) + count(x.indexrelid) AS amount
        FROM pg_inherits i JOIN pg_class p ON p.oid = i.inhparent
            LEFT JOIN pg_index x ON x.indrelid = i.inhrelid
        WHERE p.relkind = 'p' AND p.relnamespace = current_schema()::regnamespace
        GROUP BY i.inhparent) AS one) AS partitions,
    pg_backend_pid() AS backend,
    extract(epoch FROM clock_timestamp())::float8 AS clock_s,
    current_user AS who,
    current_schema() AS schema,
    coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS may_create

-- name: look_at_transactions
-- Return old transactions that prevent the clean-up of dead rows, oldest first.
SELECT pid, coalesce(usename, '') AS who, coalesce(application_name, '') AS program, state,
    extract(epoch FROM clock_timestamp() - xact_start)::float8 AS age_s
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND xact_start < clock_timestamp() - make_interval(secs => $1)
    AND backend_type = 'client backend'
ORDER BY xact_start LIMIT 20

-- name: look_at_tables
-- Return the sizes of our tables with their indexes, and which tables another user owns.
SELECT c.relname AS name, pg_total_relation_size(c.oid) AS size_bytes,
    pg_has_role(c.relowner, 'USAGE') AS is_ours,
    has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
        AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE') AS may_use
FROM pg_class c
WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'
ORDER BY 2 DESC

-- name: recorded_of
-- Count the audit rows of each of the requests $1.
SELECT request_id, count(*) AS records FROM audit WHERE request_id = ANY($1::uuid[])
GROUP BY request_id

-- name: cut_short
-- Count by process the attempts at each of the requests $1 that were cut short, answered or not.
SELECT request_id, instance_id, count(*) AS attempts FROM attempts
WHERE request_id = ANY($1::uuid[]) AND outcome = 'ambiguous' GROUP BY request_id, instance_id

-- name: audit_of
-- Return the audit rows of the requests $1.
SELECT id FROM audit WHERE request_id = ANY($1::uuid[])

-- name: drop_usage_of
-- Delete the usage of tenant $1.
DELETE FROM usage_days WHERE tenant_id = $1

-- name: drop_workers
-- Delete the records of the workers $1.
DELETE FROM workers WHERE instance_id = ANY($1::text[])
