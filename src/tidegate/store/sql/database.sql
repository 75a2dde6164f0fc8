-- The revision, partitions, and a restored database. {table} and {partition} are our own names, never
-- text of a caller.

-- name: create_revision
-- Create the table of the revision, whose name is Alembic's, which ran the first migrations.
CREATE TABLE IF NOT EXISTS alembic_version (
    version_num varchar(32) NOT NULL CONSTRAINT alembic_version_pkc PRIMARY KEY
)

-- name: lock_partitions
-- Wait for other processes that create or delete partitions.
SELECT pg_advisory_xact_lock($1)

-- name: wait_briefly
-- Limit the wait for a lock that others, such as a backup, hold for long: later requests queue behind it.
SET LOCAL lock_timeout = '500ms'

-- name: missing_partitions
-- Return which of these tables do not exist.
SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass(name) IS NULL

-- name: create_partition
-- Create the table of one day, not attached yet.
CREATE TABLE {partition} (LIKE {table} INCLUDING ALL) {settings}

-- name: lock_writers
-- Wait for writers and block others, whose rows would enter the default partition.
-- The default partition must not accept these rows any more.
LOCK TABLE ONLY {table} IN SHARE ROW EXCLUSIVE MODE

-- name: fill_partition
-- Move the rows of [$1, $2) from the default partition.
WITH moved AS (
    DELETE FROM {table}_default WHERE created_at >= $1 AND created_at < $2 RETURNING *
)
INSERT INTO {partition} SELECT * FROM moved

-- name: attach_partition
-- Attach the table as a partition.
ALTER TABLE {table} ATTACH PARTITION {partition} FOR VALUES FROM ('{start}') TO ('{end}')

-- name: list_partitions
-- List the partitions of these tables.
SELECT parent.relname AS parent, child.relname AS child
FROM pg_inherits
JOIN pg_class parent ON parent.oid = inhparent
JOIN pg_class child ON child.oid = inhrelid
WHERE parent.oid = ANY($1::regclass[])

-- name: detach_partition
-- Detach a partition from its table.
ALTER TABLE {table} DETACH PARTITION {partition}

-- name: drop_partition
-- Delete a detached partition.
DROP TABLE {partition}

-- name: settle_restored
-- Mark the queued jobs of a restored database as ready since the beginning.
-- A new server counts transactions from the beginning, so that otherwise their numbers would be in the
-- far future, and every poll would read the jobs again.
UPDATE requests SET ready_xid = 0 WHERE status = 'queued'
