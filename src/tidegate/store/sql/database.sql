-- The revision, partitions, and a restored database. {table} and {partition} are names of ours, never text of a caller.

-- name: create_revision
-- The table of the revision; its name is Alembic's, which ran the steps at first.
CREATE TABLE IF NOT EXISTS alembic_version (
    version_num varchar(32) NOT NULL CONSTRAINT alembic_version_pkc PRIMARY KEY
)

-- name: lock_partitions
-- Wait for others who make or drop partitions.
SELECT pg_advisory_xact_lock($1)

-- name: wait_briefly
-- Give up a lock that others, such as a backup, keep for long: all who come later wait behind us.
SET LOCAL lock_timeout = '500ms'

-- name: missing_partitions
-- Which of these tables there are not.
SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass(name) IS NULL

-- name: create_partition
-- A table for one day, not attached yet.
CREATE TABLE {partition} (LIKE {table} INCLUDING ALL) {settings}

-- name: lock_writers
-- Wait for writers, and keep others out: their rows would come into the default partition, which takes them no more.
LOCK TABLE ONLY {table} IN SHARE ROW EXCLUSIVE MODE

-- name: fill_partition
-- Move the rows of [$1, $2) out of the default partition.
WITH moved AS (
    DELETE FROM {table}_default WHERE created_at >= $1 AND created_at < $2 RETURNING *
)
INSERT INTO {partition} SELECT * FROM moved

-- name: attach_partition
-- Make the table a partition.
ALTER TABLE {table} ATTACH PARTITION {partition} FOR VALUES FROM ('{start}') TO ('{end}')

-- name: list_partitions
-- The partitions of these tables.
SELECT parent.relname AS parent, child.relname AS child
FROM pg_inherits
JOIN pg_class parent ON parent.oid = inhparent
JOIN pg_class child ON child.oid = inhrelid
WHERE parent.oid = ANY($1::regclass[])

-- name: detach_partition
-- Take a partition out of its table.
ALTER TABLE {table} DETACH PARTITION {partition}

-- name: drop_partition
-- Delete a detached partition.
DROP TABLE {partition}

-- name: settle_restored
-- Queued jobs of a restored record: as if they had been ready since ever.
-- A new server counts its transactions from the beginning: they would look as if they were to come
-- in the far future, and be read again at every look.
UPDATE requests SET ready_xid = 0 WHERE status = 'queued'
