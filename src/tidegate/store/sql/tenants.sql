-- Tenants, API keys and sign-in codes.

-- name: forget_queued
-- Delete the count of queued jobs of tenant $1, so that they are counted again.
DELETE FROM queued WHERE tenant_id = $1

-- name: access_version
-- Return the number that grows with every change of a tenant or key.
SELECT version FROM access

-- name: count_change
-- Notify processes of a changed tenant or key; lock the number until the change is committed.
UPDATE access SET version = version + 1

-- name: find_keys
-- Return the keys with the prefixes $1, with the permissions of their tenants.
SELECT k.prefix, k.digest, k.tenant_id, k.scopes, k.revoked_at IS NOT NULL AS revoked,
    extract(epoch FROM k.expires_at - now())::double precision AS expires_in_s,
    t.disabled_at IS NOT NULL AS disabled, t.models, t.most_priority, t.most_queued_jobs,
    t.most_queued_bytes, t.most_streams, t.most_long_polls, t.tiers_allowed AS tiers
FROM keys k JOIN tenants t ON t.id = k.tenant_id
WHERE k.prefix = ANY($1::text[])

-- name: find_tenants
-- Return the permissions of the tenants $1.
SELECT t.id AS tenant_id, t.disabled_at IS NOT NULL AS disabled, t.models, t.most_priority,
    t.most_queued_jobs, t.most_queued_bytes, t.most_streams, t.most_long_polls,
    t.tiers_allowed AS tiers
FROM tenants t WHERE t.id = ANY($1::text[])

-- name: any_key
-- Return whether a valid key exists.
SELECT EXISTS (
    SELECT 1 FROM keys WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now()))

-- name: keys_used
-- Record when keys were last used; rows that another process is writing are skipped.
UPDATE keys k SET last_used_at = row.used_at
FROM json_to_recordset($1::json) AS row (prefix text, used_at timestamptz)
WHERE k.prefix = row.prefix AND (k.last_used_at IS NULL OR k.last_used_at < row.used_at)
    AND k.prefix IN (
        SELECT prefix FROM keys
        WHERE prefix IN (SELECT prefix FROM json_to_recordset($1::json) AS used (prefix text))
        FOR NO KEY UPDATE SKIP LOCKED
    )

-- name: add_key
-- Insert a key of tenant $2; a repeat and another key with its prefix change nothing.
INSERT INTO keys (prefix, tenant_id, digest, name, scopes, expires_at, made_by)
VALUES ($1, $2, $3, $4, $5::text[], $6, $7)
ON CONFLICT (prefix) DO UPDATE SET name = excluded.name WHERE keys.digest = excluded.digest
RETURNING prefix, tenant_id, name, scopes, created_at, expires_at, revoked_at, last_used_at,
    made_by

-- name: revoke_key
-- Revoke a key for good; a revoked key stays as it is.
UPDATE keys SET revoked_at = coalesce(revoked_at, now()) WHERE prefix = $1
RETURNING prefix, tenant_id, name, scopes, created_at, expires_at, revoked_at, last_used_at,
    made_by

-- name: keep_key
-- Record who vouches for a key whose author is unknown.
UPDATE keys SET made_by = coalesce(made_by, $2) WHERE prefix = $1
RETURNING prefix, tenant_id, name, scopes, created_at, expires_at, revoked_at, last_used_at,
    made_by

-- name: unvouched_keys
-- Return at most $1 valid keys whose authors are unknown, those for /admin first.
SELECT prefix, tenant_id, name, scopes, created_at, expires_at, revoked_at, last_used_at, made_by
FROM keys
WHERE made_by IS NULL AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
ORDER BY 'admin' = ANY(scopes) DESC, created_at, prefix LIMIT $1

-- name: spend_code
-- Spend the one-time code $1, which expires at $2; return true only for the first spender $3.
INSERT INTO spent_codes (nonce, ends_at, spender) VALUES ($1, $2, $3)
ON CONFLICT (nonce) DO UPDATE SET ends_at = excluded.ends_at
    WHERE spent_codes.spender = excluded.spender
RETURNING true

-- name: is_spent
-- Return whether the code or session $1 is spent.
SELECT EXISTS (SELECT 1 FROM spent_codes WHERE nonce = $1)

-- name: forget_codes
-- Delete codes that have expired by the clock of every process.
DELETE FROM spent_codes WHERE ends_at < now() - interval '1 day'

-- name: list_keys
-- List at most $4 keys by creation time, after key $3 if given.
-- They belong to tenant $1 if given, and their prefixes begin with $2.
SELECT prefix, tenant_id, name, scopes, created_at, expires_at, revoked_at, last_used_at,
    made_by
FROM keys
WHERE ($1::text IS NULL OR tenant_id = $1) AND starts_with(prefix, $2)
    AND ($3::text IS NULL
        OR (created_at, prefix) > (SELECT k.created_at, k.prefix FROM keys k WHERE k.prefix = $3))
ORDER BY created_at, prefix LIMIT $4

-- name: list_tenants
-- List at most $2 tenants by id, or only the tenant $1.
SELECT t.id, t.most_priority, t.models, t.most_queued_jobs, t.most_queued_bytes, t.most_streams,
    t.most_long_polls, t.retention_days, t.tiers_allowed AS tiers, t.created_at, t.disabled_at,
    (SELECT amount / 1000000.0 FROM budgets WHERE name = t.id || '/budget_day_money')
        AS budget_day_money,
    (SELECT amount / 1000000.0 FROM budgets WHERE name = t.id || '/budget_month_money')
        AS budget_month_money,
    (SELECT amount FROM budgets WHERE name = t.id || '/budget_day_tokens') AS budget_day_tokens,
    (SELECT amount FROM budgets WHERE name = t.id || '/budget_month_tokens') AS budget_month_tokens,
    (SELECT count(*) FROM keys k WHERE k.tenant_id = t.id AND k.revoked_at IS NULL
        AND (k.expires_at IS NULL OR k.expires_at > now())) AS keys
FROM tenants t WHERE $1::text IS NULL OR t.id = $1 ORDER BY t.id LIMIT $2

-- name: add_tenant
-- Insert a tenant; an existing one is kept.
INSERT INTO tenants (id) VALUES ($1) ON CONFLICT (id) DO NOTHING

-- name: set_tenant
-- Update the columns of a tenant to the values in $2, all of which are given.
UPDATE tenants t SET
    most_priority = row.most_priority,
    models = row.models,
    most_queued_jobs = row.most_queued_jobs,
    most_queued_bytes = row.most_queued_bytes,
    most_streams = row.most_streams,
    most_long_polls = row.most_long_polls,
    retention_days = row.retention_days,
    tiers_allowed = row.tiers,
    disabled_at = CASE WHEN row.disabled THEN coalesce(t.disabled_at, now()) END
FROM json_to_record($2::json) AS row (most_priority integer, models text[],
    most_queued_jobs bigint, most_queued_bytes bigint, most_streams integer,
    most_long_polls integer, retention_days integer, tiers text[], disabled boolean)
WHERE t.id = $1

-- name: lock_tenant
-- Return one tenant, locked against changes until this transaction ends.
SELECT t.*, t.tiers_allowed AS tiers, 0 AS keys FROM tenants t WHERE id = $1 FOR UPDATE

-- name: remove_tenant
-- Delete a tenant with its keys; its requests stay until their retention ends.
DELETE FROM tenants WHERE id = $1
RETURNING id
