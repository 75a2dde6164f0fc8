-- Calls that have ended, counted by process and span of time: see history.py.

-- name: write_history
-- Put down what a process has counted in some spans, in the place of what it said of them before.
INSERT INTO history AS kept (step_s, at, pool, instance_id, counts, apart, waits, lengths)
SELECT step_s, to_timestamp(at), pool, $1, counts::jsonb, apart::jsonb, waits, lengths
FROM unnest($2::integer[], $3::float8[], $4::text[], $5::text[], $6::text[], $7::bytea[],
    $8::bytea[]) AS row (step_s, at, pool, counts, apart, waits, lengths)
ON CONFLICT (step_s, at, pool, instance_id) DO UPDATE SET
    counts = excluded.counts, apart = excluded.apart,
    waits = excluded.waits, lengths = excluded.lengths

-- name: read_history
-- What all processes have counted in the spans of $1 seconds that begin at $2 or later.
SELECT extract(epoch FROM at)::bigint AS at, pool, counts, apart, waits, lengths FROM history
WHERE step_s = $1 AND at >= to_timestamp($2::float8)
ORDER BY at LIMIT $3

-- name: forget_history
-- Delete the spans of $1 seconds that began before $2.
DELETE FROM history WHERE step_s = $1 AND at < to_timestamp($2::float8)
