-- What processes notify one another of, and what they poll for.

-- name: get_versions
-- The versions of many requests: the one query that all long polls of a process share.
SELECT id, version FROM requests WHERE id = ANY($1::uuid[])

-- name: notify
-- Wake listeners; sent apart from the change itself, since NOTIFY takes an instance-wide lock.
SELECT pg_notify(channel, payload)
FROM json_to_recordset($1::json) AS row (channel text, payload text)
