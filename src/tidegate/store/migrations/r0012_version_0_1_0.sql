-- Schema of version 0.1.0. Databases at this revision have exactly these columns in this order; later
-- steps change the schema, and this file stays as it is. `make_ahead` in store/database.py creates
-- partitions by day after every migration.

-- Requests: jobs, which also form the queue, and streams.
CREATE TABLE requests (
    id uuid PRIMARY KEY,
    tenant_id text NOT NULL DEFAULT 'default',
    pool text NOT NULL,
    source text NOT NULL CHECK (source IN ('job', 'stream')),
    status text NOT NULL CHECK (status IN
        ('queued', 'running', 'succeeded', 'failed', 'cancelled', 'expired', 'dead')),
    kind text,
    lane text GENERATED ALWAYS AS (coalesce(kind, 'unsure')) STORED,
    classified_by text NOT NULL,
    classified_reason text NOT NULL,
    prompt text NOT NULL,
    image_uri text,
    model text,
    used_model text,
    priority integer NOT NULL DEFAULT 0,
    idempotency_key text,
    created_at timestamptz NOT NULL,
    deadline_at timestamptz,
    not_before timestamptz,
    admitted_at timestamptz,
    finished_at timestamptz,
    claim bigint NOT NULL DEFAULT 0,
    claimed_by text,
    lapses integer NOT NULL DEFAULT 0,
    attempts integer NOT NULL DEFAULT 0,
    attempt_id uuid,
    attempt_at timestamptz,
    queue_ms double precision,
    upstream_ms double precision,
    result text,
    input_tokens bigint,
    output_tokens bigint,
    thoughts_tokens bigint,
    cached_tokens bigint,
    total_tokens bigint,
    finish_reason text,
    failure jsonb,
    version bigint NOT NULL DEFAULT 1,
    -- SHA-256 of the request that was submitted under the idempotency key.
    idempotency_digest bytea,
    -- When the owner of a running job requested its cancellation.
    cancel_asked_at timestamptz,
    webhook_url text,
    -- The native path, if the job wraps a native call; `prompt` is then its body, and `result` the
    -- answer.
    endpoint text,
    subject text,
    -- The transaction that made a job ready. Workers read the jobs of newer transactions, instead of
    -- searching for them among the entries of jobs that have left the queue.
    ready_xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    -- From sending the last call to the first bytes of its answer's body.
    first_byte_ms double precision,
    -- The W3C trace context in which the job was submitted, for the worker that runs it.
    traceparent text
) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02,
        autovacuum_vacuum_insert_scale_factor = 0.05);

CREATE UNIQUE INDEX requests_idempotency ON requests (tenant_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX requests_ready ON requests (pool, lane, tenant_id, priority DESC, created_at, id)
    WHERE status = 'queued' AND claimed_by IS NULL AND not_before IS NULL;
CREATE INDEX requests_place ON requests (pool, lane, priority, created_at, id)
    WHERE status = 'queued';
CREATE INDEX requests_ripening ON requests (not_before)
    WHERE status = 'queued' AND not_before IS NOT NULL;
CREATE INDEX requests_deadline ON requests (deadline_at)
    WHERE status = 'queued' AND deadline_at IS NOT NULL;
CREATE INDEX requests_claimed ON requests (claimed_by)
    WHERE claimed_by IS NOT NULL AND status IN ('queued', 'running');
CREATE INDEX requests_ended ON requests (finished_at)
    WHERE status NOT IN ('queued', 'running');
CREATE INDEX requests_cancelling ON requests (claimed_by)
    WHERE cancel_asked_at IS NOT NULL AND status IN ('queued', 'running');
CREATE INDEX requests_listed ON requests (tenant_id, created_at, id);

-- If statistics show hardly any queued jobs, the planner considers every index of queued jobs nearly
-- empty, and so equally good, because statistics do not count dead entries. The conditions of these
-- indexes are therefore written so that each index matches only its own statements. (They replace
-- requests_ripening, requests_deadline and requests_cancelling, which match no statement of 0.1.0.)
CREATE INDEX requests_came ON requests (pool, lane, ready_xid)
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
        AND ready_xid >= 0, false);
CREATE INDEX requests_queue
    ON requests ((pool || '/' || lane || '/' || tenant_id), priority, created_at, id)
    WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false);
CREATE INDEX requests_ripe ON requests (not_before)
    WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false);
CREATE INDEX requests_due ON requests (deadline_at)
    WHERE coalesce(status = 'queued' AND deadline_at IS NOT NULL, false);
CREATE INDEX requests_held ON requests (claimed_by)
    WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false);
CREATE INDEX requests_called_off ON requests (claimed_by)
    WHERE coalesce(status IN ('queued', 'running') AND cancel_asked_at IS NOT NULL, false);
CREATE INDEX requests_dead ON requests (finished_at)
    WHERE coalesce(status = 'dead', false);

-- A trigger covers every way back into the queue, including those of another version that runs
-- concurrently or later.
CREATE FUNCTION requests_became_ready() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.ready_xid := pg_current_xact_id()::text::bigint;
        RETURN NEW;
    END
    $$;
CREATE TRIGGER requests_became_ready BEFORE UPDATE ON requests FOR EACH ROW
    WHEN (NEW.status = 'queued' AND NEW.claimed_by IS NULL AND NEW.not_before IS NULL
        AND NOT (OLD.status = 'queued' AND OLD.claimed_by IS NULL AND OLD.not_before IS NULL
            AND (OLD.pool, OLD.kind, OLD.tenant_id, OLD.priority, OLD.created_at)
                IS NOT DISTINCT FROM
                (NEW.pool, NEW.kind, NEW.tenant_id, NEW.priority, NEW.created_at)))
    EXECUTE FUNCTION requests_became_ready();

CREATE TABLE files (
    id uuid PRIMARY KEY,
    request_id uuid NOT NULL REFERENCES requests (id) ON DELETE CASCADE,
    tenant_id text NOT NULL DEFAULT 'default',
    role text NOT NULL CHECK (role IN ('input', 'output')),
    position integer NOT NULL,
    name text NOT NULL,
    mime_type text NOT NULL,
    size_bytes bigint NOT NULL,
    blob_key text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX files_request ON files (request_id);
CREATE INDEX files_blob ON files (blob_key);

CREATE TABLE workers (
    instance_id text PRIMARY KEY,
    seen_at timestamptz NOT NULL DEFAULT now()
);

-- `due_at`: when the next try may start; during a try, when it counts as lost.
CREATE TABLE webhooks (
    id uuid PRIMARY KEY,
    request_id uuid NOT NULL REFERENCES requests (id) ON DELETE CASCADE,
    tenant_id text NOT NULL DEFAULT 'default',
    pool text NOT NULL,
    event text NOT NULL,
    url text NOT NULL,
    state text NOT NULL DEFAULT 'pending'
        CHECK (state IN ('pending', 'delivered', 'given_up')),
    tries integer NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL DEFAULT now(),
    answer_status integer,
    problem text,
    created_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz
);
CREATE INDEX webhooks_due ON webhooks (due_at) WHERE state = 'pending';
CREATE INDEX webhooks_request ON webhooks (request_id);
CREATE INDEX webhooks_given_up ON webhooks (ended_at)
    WHERE coalesce(state = 'given_up', false);

-- Attempts, ended requests and native calls, and bodies, partitioned by day.
CREATE TABLE attempts (
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    request_id uuid NOT NULL,
    tenant_id text NOT NULL DEFAULT 'default',
    pool text NOT NULL,
    kind text,
    number integer NOT NULL,
    claim bigint NOT NULL,
    instance_id text NOT NULL,
    model text NOT NULL,
    fence_epoch bigint NOT NULL,
    fence_sequence bigint NOT NULL,
    outcome text NOT NULL,
    admitted_at timestamptz,
    finished_at timestamptz,
    queue_ms double precision,
    upstream_ms double precision,
    input_tokens bigint,
    output_tokens bigint,
    thoughts_tokens bigint,
    cached_tokens bigint,
    total_tokens bigint,
    finish_reason text,
    model_version text,
    response_id text,
    failure jsonb,
    first_byte_ms double precision,
    PRIMARY KEY (id, created_at)
) PARTITION BY RANGE (created_at);
CREATE INDEX attempts_request ON attempts (request_id);
CREATE TABLE attempts_default PARTITION OF attempts DEFAULT;

-- Native calls are rows without a job, with an endpoint.
CREATE TABLE audit (
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    request_id uuid NOT NULL,
    tenant_id text NOT NULL DEFAULT 'default',
    pool text NOT NULL,
    source text NOT NULL,
    status text NOT NULL,
    kind text,
    classified_by text NOT NULL,
    classified_reason text NOT NULL,
    priority integer NOT NULL,
    model text,
    model_version text,
    response_id text,
    attempts integer NOT NULL,
    lapses integer NOT NULL,
    instance_id text NOT NULL,
    submitted_at timestamptz NOT NULL,
    admitted_at timestamptz,
    finished_at timestamptz NOT NULL,
    queue_ms double precision,
    upstream_ms double precision,
    input_tokens bigint,
    output_tokens bigint,
    thoughts_tokens bigint,
    cached_tokens bigint,
    total_tokens bigint,
    finish_reason text,
    failure jsonb,
    endpoint text,
    http_status integer,
    streamed boolean,
    key_id text,
    subject text,
    usage_state text,
    cost_micros bigint,
    images integer,
    first_byte_ms double precision,
    PRIMARY KEY (id, created_at)
) PARTITION BY RANGE (created_at);
CREATE INDEX audit_request ON audit (request_id);
CREATE INDEX audit_relayed ON audit (tenant_id, created_at DESC, id DESC)
    WHERE source = 'relay';
CREATE TABLE audit_default PARTITION OF audit DEFAULT;

CREATE TABLE bodies (
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    role text NOT NULL CHECK (role IN ('request', 'response')),
    tenant_id text NOT NULL DEFAULT 'default',
    pool text NOT NULL,
    encoding text NOT NULL,
    size_bytes bigint NOT NULL,
    data bytea,
    blob_key text,
    -- The declared type of a native call's body. Null for jobs and for our own streams, whose bodies are
    -- always JSON.
    content_type text,
    -- Bytes omitted in the middle of a long answer, of which the beginning and the end are stored.
    omitted_bytes bigint NOT NULL DEFAULT 0,
    CHECK ((data IS NULL) <> (blob_key IS NULL)),
    PRIMARY KEY (id, created_at, role)
) PARTITION BY RANGE (created_at);
-- `data` is compressed already.
ALTER TABLE bodies ALTER COLUMN data SET STORAGE EXTERNAL;
CREATE INDEX bodies_blob ON bodies (blob_key) WHERE blob_key IS NOT NULL;
CREATE TABLE bodies_default PARTITION OF bodies DEFAULT;

-- The policies of pools, one row per revision: what was in force, since when, and by whom.
CREATE TABLE policies (
    pool text NOT NULL,
    revision bigint NOT NULL,
    origin text NOT NULL CHECK (origin IN ('deployment', 'live')),
    digest text NOT NULL,
    policy jsonb NOT NULL,
    set_by text NOT NULL,
    reason text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (pool, revision)
);
CREATE INDEX policies_deployed ON policies (pool, digest) WHERE origin = 'deployment';

CREATE TABLE tenants (
    id text PRIMARY KEY,
    most_priority integer NOT NULL DEFAULT 100 CHECK (most_priority BETWEEN -100 AND 100),
    models text[],
    most_queued_jobs bigint CHECK (most_queued_jobs >= 0),
    most_queued_bytes bigint CHECK (most_queued_bytes >= 0),
    most_streams integer CHECK (most_streams >= 0),
    most_long_polls integer CHECK (most_long_polls >= 0),
    budget_day_money numeric(20, 6) CHECK (budget_day_money >= 0),
    budget_month_money numeric(20, 6) CHECK (budget_month_money >= 0),
    budget_day_tokens bigint CHECK (budget_day_tokens >= 0),
    budget_month_tokens bigint CHECK (budget_month_tokens >= 0),
    retention_days integer CHECK (retention_days >= 1),
    created_at timestamptz NOT NULL DEFAULT now(),
    disabled_at timestamptz
);
INSERT INTO tenants (id) VALUES ('default');

-- Only the digest of a key is stored: see store/tenants.py.
CREATE TABLE keys (
    prefix text PRIMARY KEY,
    tenant_id text NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    name text NOT NULL DEFAULT '',
    scopes text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz
);
CREATE INDEX keys_tenant ON keys (tenant_id, created_at);

-- One row. Every change of a tenant or key increments it right before the commit, so that a reader of
-- the number sees the change.
CREATE TABLE access (
    id integer PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    version bigint NOT NULL DEFAULT 1
);
INSERT INTO access DEFAULT VALUES;

-- The number of queued jobs of a tenant. It is counted again if it is missing, so that its loss has no
-- effect.
CREATE UNLOGGED TABLE queued (
    tenant_id text NOT NULL,
    pool text NOT NULL,
    jobs bigint NOT NULL,
    size_bytes bigint NOT NULL,
    counted_at timestamptz NOT NULL,
    count_ms double precision NOT NULL,
    PRIMARY KEY (tenant_id, pool)
) WITH (fillfactor = 50);

-- Idempotency keys of native calls.
CREATE TABLE native_keys (
    tenant_id text NOT NULL,
    idempotency_key text NOT NULL,
    digest bytea NOT NULL,
    request_id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz,
    http_status integer,
    content_type text,
    answer bytea,
    PRIMARY KEY (tenant_id, idempotency_key)
);
CREATE INDEX native_keys_age ON native_keys (created_at);

CREATE TABLE batch_files (
    id uuid PRIMARY KEY,
    tenant_id text NOT NULL,
    purpose text NOT NULL CHECK (purpose IN ('batch', 'batch_output')),
    name text NOT NULL,
    size_bytes bigint NOT NULL,
    lines integer NOT NULL,
    blob_key text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX batch_files_listed ON batch_files (tenant_id, id);
CREATE INDEX batch_files_blob ON batch_files (blob_key);

-- `ends_as`: the final status once no line is in progress. `claim` fences the worker that validates or
-- assembles the batch. `total` is the number of lines in the file until they are counted exactly.
CREATE TABLE batches (
    id uuid PRIMARY KEY,
    tenant_id text NOT NULL,
    endpoint text NOT NULL,
    input_file_id uuid NOT NULL,
    input_blob text NOT NULL,
    input_bytes bigint NOT NULL,
    completion_window text NOT NULL,
    metadata jsonb,
    models text[],
    key_id text,
    status text NOT NULL DEFAULT 'validating' CHECK (status IN ('validating', 'failed',
        'in_progress', 'finalizing', 'completed', 'expired', 'cancelling', 'cancelled')),
    ends_as text NOT NULL DEFAULT 'completed',
    total integer NOT NULL,
    completed integer NOT NULL DEFAULT 0,
    failed integer NOT NULL DEFAULT 0,
    errors jsonb,
    output_file_id uuid,
    error_file_id uuid,
    claim bigint NOT NULL DEFAULT 0,
    claimed_by text,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    in_progress_at timestamptz,
    finalizing_at timestamptz,
    completed_at timestamptz,
    failed_at timestamptz,
    expired_at timestamptz,
    cancelling_at timestamptz,
    cancelled_at timestamptz
);
CREATE INDEX batches_listed ON batches (tenant_id, id);
CREATE INDEX batches_open ON batches (status, id)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

CREATE TABLE batch_lines (
    batch_id uuid NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
    line integer NOT NULL,
    id uuid NOT NULL,
    tenant_id text NOT NULL,
    custom_id text NOT NULL,
    body text NOT NULL,
    size_bytes integer NOT NULL,
    state text NOT NULL DEFAULT 'queued'
        CHECK (state IN ('queued', 'claimed', 'calling', 'succeeded', 'failed')),
    claim bigint NOT NULL DEFAULT 0,
    claimed_by text,
    attempts integer NOT NULL DEFAULT 0,
    lapses integer NOT NULL DEFAULT 0,
    not_before timestamptz,
    status_code integer,
    answer text,
    failure jsonb,
    PRIMARY KEY (batch_id, line)
) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02);
CREATE INDEX batch_lines_ready ON batch_lines (batch_id, line) WHERE state = 'queued';
CREATE INDEX batch_lines_held ON batch_lines (claimed_by)
    WHERE state IN ('claimed', 'calling');

-- Totals by the UTC day on which requests ended. Rows are updated with every batch of records.
CREATE TABLE usage_days (
    tenant_id text NOT NULL,
    day date NOT NULL,
    model text NOT NULL,
    pool text NOT NULL,
    requests bigint NOT NULL DEFAULT 0,
    input_tokens bigint NOT NULL DEFAULT 0,
    output_tokens bigint NOT NULL DEFAULT 0,
    cached_tokens bigint NOT NULL DEFAULT 0,
    thoughts_tokens bigint NOT NULL DEFAULT 0,
    images bigint NOT NULL DEFAULT 0,
    cost_micros bigint NOT NULL DEFAULT 0,
    unpriced bigint NOT NULL DEFAULT 0,
    partial bigint NOT NULL DEFAULT 0,
    estimated bigint NOT NULL DEFAULT 0,
    unknown bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, day, model, pool)
) WITH (fillfactor = 50);
CREATE INDEX usage_days_day ON usage_days (day);

-- Erasures: nothing received before them is recorded any more. Only the digest of a subject is stored;
-- without a subject the whole tenant is erased, without a tenant the subject of all tenants.
CREATE TABLE erased (
    id uuid PRIMARY KEY,
    tenant_id text,
    subject_digest bytea,
    erased_at timestamptz NOT NULL DEFAULT now(),
    CHECK (tenant_id IS NOT NULL OR subject_digest IS NOT NULL)
);
CREATE INDEX erased_subject ON erased (subject_digest) WHERE subject_digest IS NOT NULL;
CREATE INDEX erased_tenant ON erased (tenant_id) WHERE subject_digest IS NULL;

-- Data of the dashboard's charts: the counts of each process of calls that ended in a time span,
-- rewritten until the span is over, so that a write may be repeated. New names can be counted without
-- another migration. waits, lengths: histograms of ms, packed as in store/statistics.py.
CREATE TABLE history (
    step_s integer NOT NULL,
    at timestamptz NOT NULL,
    pool text NOT NULL,
    instance_id text NOT NULL,
    counts jsonb NOT NULL,
    apart jsonb NOT NULL,
    waits bytea NOT NULL,
    lengths bytea NOT NULL,
    PRIMARY KEY (step_s, at, pool, instance_id)
) WITH (fillfactor = 50);
