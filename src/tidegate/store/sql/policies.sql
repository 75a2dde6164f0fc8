-- Revisions of policies.

-- name: lock_policies
-- Lock the policy of pool $1 against decisions of other processes, until this transaction ends.
SELECT pg_advisory_xact_lock(7423001, hashtext($1))

-- name: get_policies
-- Return the newest $2 revisions of the policy of pool $1; the first one is in force.
SELECT revision, origin, digest, policy, set_by, reason, created_at
FROM policies WHERE pool = $1 ORDER BY revision DESC LIMIT $2

-- name: policies_in_force
-- Return the newest revision of every pool.
SELECT DISTINCT ON (pool) pool, policy FROM policies ORDER BY pool, revision DESC

-- name: first_of_deployment
-- Return the first revision of pool $1 by a deployment whose policy has the digest $2.
SELECT revision, origin, digest, policy, set_by, reason, created_at
FROM policies WHERE pool = $1 AND origin = 'deployment' AND digest = $2 ORDER BY revision LIMIT 1

-- name: deployed_before
-- Return which of the digests $2 have been a deployment's policy of pool $1.
SELECT DISTINCT digest FROM policies
WHERE pool = $1 AND origin = 'deployment' AND digest = ANY($2::text[])

-- name: removed_by_people
-- Return which of the limits $2 of pool $1 existed and were last removed by a person, other than by a return to the deployment's policy.
SELECT name FROM unnest($2::text[]) AS name
WHERE EXISTS (
    SELECT FROM operator_actions
    WHERE what = 'limits.change' AND target = $1 AND NOT coalesce(is_now ? 'deployed', false)
    AND revision = (
        SELECT min(revision) FROM policies WHERE pool = $1 AND revision > (
            SELECT max(revision) FROM policies WHERE pool = $1 AND policy->'limits' ? name
        )
    )
)

-- name: add_policy
-- Insert a revision of the policy of pool $1; an existing one is kept.
INSERT INTO policies (pool, revision, origin, digest, policy, set_by, reason)
VALUES ($1, $2, $3, $4, $5::jsonb, $6, $7)
ON CONFLICT (pool, revision) DO NOTHING

-- name: prune_policies
-- Delete revisions of pool $1 up to $2, except the first and the last one of each deployment.
-- The first has the policy that the deployment requests, by which old and new deployments are
-- distinguished.
DELETE FROM policies AS old
WHERE pool = $1 AND revision <= $2
    AND (origin = 'live' OR (
        SELECT min(revision) < old.revision AND max(revision) > old.revision FROM policies AS same
        WHERE same.pool = old.pool AND same.origin = old.origin AND same.digest = old.digest
    ))
