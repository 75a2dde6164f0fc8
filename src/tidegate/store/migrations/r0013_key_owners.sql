-- Owners of idempotency keys: the key of a dead process becomes free within seconds.

-- seen_at: when the process that answers last renewed its claim on the key. lost: the earlier request,
-- whose process stopped renewing before its answer was stored.
ALTER TABLE native_keys
    ADD COLUMN seen_at timestamptz, ADD COLUMN lost uuid;
