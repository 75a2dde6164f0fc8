-- Policies on record.

-- name: lock_policies
-- Let no other process decide on the policy of pool $1 until this transaction ends.
SELECT pg_advisory_xact_lock(7423001, hashtext($1))

-- name: get_policies
-- The newest $2 revisions of the policy of pool $1, the one in force first.
SELECT revision, origin, digest, policy, set_by, reason, created_at
FROM policies WHERE pool = $1 ORDER BY revision DESC LIMIT $2

-- name: policies_in_force
-- The newest revision of every pool.
SELECT DISTINCT ON (pool) pool, policy FROM policies ORDER BY pool, revision DESC

-- name: first_of_deployment
-- The first revision of the policy of pool $1 of the deployment that asks for $2.
SELECT revision, origin, digest, policy, set_by, reason, created_at
FROM policies WHERE pool = $1 AND origin = 'deployment' AND digest = $2 ORDER BY revision LIMIT 1

-- name: deployed_before
-- Which of the digests $2 were a deployment's policy of pool $1 at any time.
SELECT DISTINCT digest FROM policies
WHERE pool = $1 AND origin = 'deployment' AND digest = ANY($2::text[])

-- name: removed_by_people
-- Which of the limits $2 of pool $1 were there before, and were last removed by a person.
SELECT name FROM unnest($2::text[]) AS name
WHERE EXISTS (
    SELECT FROM operator_actions
    WHERE what = 'limits.change' AND target = $1 AND revision = (
        SELECT min(revision) FROM policies WHERE pool = $1 AND revision > (
            SELECT max(revision) FROM policies WHERE pool = $1 AND policy->'limits' ? name
        )
    )
)

-- name: add_policy
-- Put a revision of the policy of pool $1 on record; one that is there already is left.
INSERT INTO policies (pool, revision, origin, digest, policy, set_by, reason)
VALUES ($1, $2, $3, $4, $5::jsonb, $6, $7)
ON CONFLICT (pool, revision) DO NOTHING

-- name: prune_policies
-- Forget revisions of pool $1 up to $2, but of each deployment, which tells old from new, the first, which has what it asks for, and the last.
DELETE FROM policies AS old
WHERE pool = $1 AND revision <= $2
    AND (origin = 'live' OR (
        SELECT min(revision) < old.revision AND max(revision) > old.revision FROM policies AS same
        WHERE same.pool = old.pool AND same.origin = old.origin AND same.digest = old.digest
    ))
