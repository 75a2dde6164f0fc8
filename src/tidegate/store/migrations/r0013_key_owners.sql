-- Owners of idempotency keys: a key whose process died is free within seconds.

-- seen_at: when the process that answers last renewed its claim on the key. lost: the request
-- before, whose process stopped renewing before its answer was stored.
ALTER TABLE native_keys
    ADD COLUMN seen_at timestamptz, ADD COLUMN lost uuid;
