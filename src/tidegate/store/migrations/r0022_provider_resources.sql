-- Resources at providers with their owners, and background calls.
--
-- An older version writes neither: a resource made by its calls has no owner here, so that no caller can
-- reach it.

-- The owner of a resource at a provider, and where it is stored. account: digest of the upstream's base
-- URL and key. subject: the person whom the creating call was about. Rows outlive the record of that
-- call, and are deleted with their tenant or subject, or when the resource is deleted or has expired.
CREATE TABLE provider_resources (
    dialect text NOT NULL,
    kind text NOT NULL,
    resource_id text NOT NULL,
    tenant_id text NOT NULL,
    upstream text NOT NULL,
    account bytea NOT NULL,
    request_id uuid,
    subject text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz,
    PRIMARY KEY (dialect, kind, resource_id)
);
CREATE INDEX provider_resources_of_tenant
    ON provider_resources (tenant_id, dialect, kind, created_at, resource_id);
CREATE INDEX provider_resources_of_subject ON provider_resources (subject)
    WHERE subject IS NOT NULL;
CREATE INDEX provider_resources_expired ON provider_resources (expires_at)
    WHERE expires_at IS NOT NULL;

-- Calls that continue at a provider without a client. `sending` is written before the request is sent,
-- `ended` with the record of the call. permit: the name under which the limiter counts it. facts: for
-- its record, which is made when it ends. request: its body, compressed. hold_id: its budget
-- reservation. due_at: the time of the next poll. claim fences the writes of workers.
CREATE TABLE background_calls (
    id uuid PRIMARY KEY,
    state text NOT NULL CHECK (state IN ('sending', 'running', 'ended')),
    tenant_id text NOT NULL,
    dialect text NOT NULL,
    kind text NOT NULL,
    resource_id text,
    upstream text NOT NULL,
    pool text NOT NULL,
    limits text[] NOT NULL,
    permit text NOT NULL,
    hold_id uuid,
    facts jsonb NOT NULL,
    request bytea NOT NULL,
    looks integer NOT NULL DEFAULT 0,
    cancelled_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    deadline_at timestamptz NOT NULL,
    due_at timestamptz NOT NULL,
    claim bigint NOT NULL DEFAULT 0,
    claimed_by text
);
CREATE INDEX background_calls_due ON background_calls (due_at);
CREATE INDEX background_calls_named ON background_calls (dialect, kind, resource_id)
    WHERE state = 'running';
