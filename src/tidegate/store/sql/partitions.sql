-- Partitions of a day, by their names: {partition} is one of ours, never text of a caller.

-- name: walk_partition
-- Of the next $5 rows after $1: the last one, and those to delete: of the tenants $2, or where not $3 of all others, before $4.
SELECT (array_agg(id ORDER BY id DESC))[1] AS last, array_agg(id) FILTER (WHERE
    (tenant_id = ANY($2::text[])) = $3 AND ($4::timestamptz IS NULL OR created_at < $4)) AS found
FROM (SELECT id, tenant_id, created_at FROM {partition} WHERE id > $1 ORDER BY id LIMIT $5) AS next

-- name: delete_rows
-- Delete rows of a partition.
DELETE FROM {partition} WHERE id = ANY($1::uuid[])

-- name: blobs_of_rows
-- The blobs of rows of a partition of bodies.
SELECT blob_key FROM {partition} WHERE id = ANY($1::uuid[]) AND blob_key IS NOT NULL

-- name: blobs_of_partition
-- The blobs of all rows of a partition of bodies.
SELECT blob_key FROM {partition} WHERE blob_key IS NOT NULL
