-- Upstreams that change at run time.

-- name: lock_upstreams
-- Lock the upstreams against other changes until this transaction ends.
SELECT pg_advisory_xact_lock(7423003, 0)

-- name: see_upstreams
-- Record process $1 and its revisions; return the newest revisions in force and proposed.
WITH seen AS (
    INSERT INTO upstream_processes (instance_id, role, revision, prepared, problems,
        proposed_problems)
    VALUES ($1, $2, $3, $4, $5::jsonb, $6::jsonb)
    ON CONFLICT (instance_id) DO UPDATE SET revision = EXCLUDED.revision,
        prepared = EXCLUDED.prepared, problems = EXCLUDED.problems,
        proposed_problems = EXCLUDED.proposed_problems, seen_at = clock_timestamp()
)
SELECT max(revision) FILTER (WHERE in_force_at IS NOT NULL) AS in_force,
    max(revision) FILTER (WHERE in_force_at IS NULL AND refused IS NULL
        AND created_at > clock_timestamp() - interval '30 s') AS proposed
FROM upstream_revisions

-- name: leave_upstreams
-- Delete process $1, which has ended.
DELETE FROM upstream_processes WHERE instance_id = $1

-- name: get_upstream_revision
-- Return a revision, in force or not.
SELECT revision, upstreams, action, set_by, reason, created_at, in_force_at, refused
FROM upstream_revisions WHERE revision = $1

-- name: get_upstream_revisions
-- Return the newest $1 revisions that have been in force, the current one first.
SELECT revision, upstreams, action, set_by, reason, created_at, in_force_at, refused
FROM upstream_revisions WHERE in_force_at IS NOT NULL ORDER BY revision DESC LIMIT $1

-- name: proposed_upstreams
-- Return the proposals of the last half minute that are not decided.
SELECT revision, set_by FROM upstream_revisions
WHERE in_force_at IS NULL AND refused IS NULL
    AND created_at > clock_timestamp() - interval '30 s'

-- name: add_upstream_revision
-- Insert the next revision, in force if $5.
INSERT INTO upstream_revisions (revision, upstreams, action, set_by, reason, in_force_at)
SELECT coalesce(max(revision), 0) + 1, $1::jsonb, $2, $3, $4,
    CASE WHEN $5::boolean THEN clock_timestamp() END
FROM upstream_revisions
RETURNING revision

-- name: decide_upstream_revision
-- Put proposal $1 in force, or refuse it for the reason $2.
UPDATE upstream_revisions SET refused = $2,
    in_force_at = CASE WHEN $2::text IS NULL THEN clock_timestamp() END
WHERE revision = $1 AND in_force_at IS NULL AND refused IS NULL
RETURNING revision

-- name: prune_upstream_revisions
-- Delete all revisions but the newest $1, and processes not seen for an hour.
WITH gone AS (
    DELETE FROM upstream_processes WHERE seen_at < clock_timestamp() - interval '1 hour'
)
DELETE FROM upstream_revisions
WHERE revision <= (SELECT max(revision) FROM upstream_revisions) - $1

-- name: get_upstream_processes
-- Return the processes seen within the last $1 ms.
SELECT instance_id, role, revision, prepared, problems, proposed_problems FROM upstream_processes
WHERE seen_at > clock_timestamp() - make_interval(secs => $1::double precision / 1000)
ORDER BY instance_id

-- name: count_at_upstream
-- Count what upstream $1 stores or runs: resources of callers, background calls and open batches.
-- Items and sounds are parts of answers, which no caller deletes.
SELECT
    (SELECT count(*) FROM provider_resources WHERE upstream = $1
        AND kind NOT IN ('item', 'audio') AND (expires_at IS NULL OR expires_at > now())) AS resources,
    (SELECT count(*) FROM background_calls WHERE upstream = $1 AND state <> 'ended') AS background,
    (SELECT count(*) FROM provider_batches WHERE upstream = $1 AND state <> 'done') AS batches

-- name: notify_upstreams
-- Wake the processes that apply the changes.
SELECT pg_notify('tidegate_upstreams', '')
