-- Who was erased, and what of theirs is deleted: see erased.py and erase.py.

-- name: lock_erased
-- Wait for all who have looked into the table and are not done with what they write.
LOCK TABLE erased IN ACCESS EXCLUSIVE MODE

-- name: add_erased
-- Have nothing of tenant $2 and subject $3 recorded any more that was received before now.
INSERT INTO erased (id, tenant_id, subject_digest) VALUES ($1, $2, $3)

-- name: get_erased
-- What was erased of the tenants $1 as a whole, or of the subjects with the digests $2.
SELECT tenant_id, subject_digest, erased_at FROM erased
WHERE (subject_digest IS NULL AND tenant_id = ANY($1::text[]))
    OR subject_digest = ANY($2::bytea[])
