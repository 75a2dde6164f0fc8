-- Processing tiers of jobs, and the batches of the providers' own batch APIs.
--
-- An older version writes no tier, which means the usual one. A job that a provider's batch has is
-- `running` without a claimant: no version takes it for the job of a dead worker.

-- tier: that a job is in, or waits for; NULL is the usual one. tiers_allowed: those that its
-- owner allows beside that; NULL where nothing was said. tier_why, revisit_at: why that tier was
-- chosen, and until when that stands. batch_after: from when on it may be given to a provider's
-- batch; NULL for now.
ALTER TABLE requests ADD COLUMN tier text, ADD COLUMN tiers_allowed text[],
    ADD COLUMN tier_why text, ADD COLUMN revisit_at timestamptz,
    ADD COLUMN batch_after timestamptz;
ALTER TABLE tenants ADD COLUMN tiers_allowed text[];
CREATE INDEX requests_to_batch ON requests (pool, tenant_id, created_at, id)
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND tier = 'batch', false);
CREATE INDEX requests_in_batch ON requests (pool, tenant_id)
    WHERE coalesce(status = 'running' AND claimed_by IS NULL AND tier = 'batch', false);

-- One batch at a provider. It is written before anything is sent. `creating` says that the
-- request which creates it may have been sent. endpoint: the native path that its lines call,
-- with `{model}` where the model stands. key_digest: SHA-256 of the upstream's key. due_at: when
-- it is looked at again. claim fences what a worker does to it.
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

-- A line is open while its job is running under this claim. hold_id: what the line holds of
-- budgets. leave_at: when its job is to move to a faster tier.
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
