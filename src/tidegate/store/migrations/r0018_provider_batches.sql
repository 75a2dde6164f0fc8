-- Processing tiers of jobs, and batches in the providers' batch APIs.
--
-- An older version writes no tier, which means the standard one. A job in a provider's batch is
-- `running` without a claimant, so that no version takes it for the job of a dead worker.

-- tier: the one that a job is in or waits for; NULL is the standard tier. tiers_allowed: the other tiers
-- that its owner allows; NULL if not stated. tier_why, revisit_at: why the tier was chosen, and until
-- when. batch_after: from when on the job may be put into a provider's batch; NULL for now.
ALTER TABLE requests ADD COLUMN tier text, ADD COLUMN tiers_allowed text[],
    ADD COLUMN tier_why text, ADD COLUMN revisit_at timestamptz,
    ADD COLUMN batch_after timestamptz;
ALTER TABLE tenants ADD COLUMN tiers_allowed text[];
CREATE INDEX requests_to_batch ON requests (pool, tenant_id, created_at, id)
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND tier = 'batch', false);
CREATE INDEX requests_in_batch ON requests (pool, tenant_id)
    WHERE coalesce(status = 'running' AND claimed_by IS NULL AND tier = 'batch', false);

-- A batch at a provider, inserted before anything is sent. `creating`: the request that creates it may
-- have been sent. endpoint: the native path that its lines call, with `{model}` in place of the model.
-- key_digest: SHA-256 of the upstream's key. due_at: the time of the next poll. claim fences the writes
-- of workers.
CREATE TABLE provider_batches (
    id uuid PRIMARY KEY,
    pool text NOT NULL,
    upstream text NOT NULL,
    dialect text NOT NULL,
    endpoint text NOT NULL,
    model text NOT NULL,
    key_digest bytea NOT NULL,
    state text NOT NULL DEFAULT 'made' CHECK (state IN
        ('made', 'creating', 'created', 'cancelling', 'done')),
    lines integer NOT NULL,
    size_bytes bigint NOT NULL,
    file_id text,
    provider_id text,
    provider_state text,
    problem text,
    made_at timestamptz NOT NULL DEFAULT now(),
    creating_at timestamptz,
    created_at timestamptz,
    done_at timestamptz,
    due_at timestamptz NOT NULL DEFAULT now(),
    claim bigint NOT NULL DEFAULT 0,
    claimed_by text
);
CREATE INDEX provider_batches_due ON provider_batches (due_at) WHERE state <> 'done';
CREATE INDEX provider_batches_done ON provider_batches (done_at) WHERE state = 'done';

-- A line is open while its job is running under this claim. hold_id: the line's budget reservation.
-- leave_at: when its job must move to a faster tier.
CREATE TABLE provider_batch_lines (
    batch_id uuid NOT NULL REFERENCES provider_batches (id) ON DELETE CASCADE,
    line integer NOT NULL,
    request_id uuid NOT NULL,
    claim bigint NOT NULL,
    hold_id uuid,
    leave_at timestamptz,
    PRIMARY KEY (batch_id, line)
);
CREATE INDEX provider_batch_lines_request ON provider_batch_lines (request_id);
