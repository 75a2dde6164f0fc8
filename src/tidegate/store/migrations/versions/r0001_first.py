"""The first schema: requests and their files, workers, and the records partitioned by day.

Partitions are not made here: `store.partitions` makes them ahead, after every migration.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

USAGE = """
    input_tokens bigint, output_tokens bigint, thoughts_tokens bigint, cached_tokens bigint,
    total_tokens bigint
"""

STEPS = (
    f"""
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
        {USAGE},
        finish_reason text,
        failure jsonb,
        version bigint NOT NULL DEFAULT 1
    ) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02,
            autovacuum_vacuum_insert_scale_factor = 0.05)
    """,
    """
    CREATE UNIQUE INDEX requests_idempotency ON requests (tenant_id, idempotency_key)
        WHERE idempotency_key IS NOT NULL
    """,
    """
    CREATE INDEX requests_ready
        ON requests (pool, lane, tenant_id, priority DESC, created_at, id)
        WHERE status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
    """,
    """
    CREATE INDEX requests_place ON requests (pool, lane, priority, created_at, id)
        WHERE status = 'queued'
    """,
    """
    CREATE INDEX requests_ripening ON requests (not_before)
        WHERE status = 'queued' AND not_before IS NOT NULL
    """,
    """
    CREATE INDEX requests_deadline ON requests (deadline_at)
        WHERE status = 'queued' AND deadline_at IS NOT NULL
    """,
    """
    CREATE INDEX requests_claimed ON requests (claimed_by)
        WHERE claimed_by IS NOT NULL AND status IN ('queued', 'running')
    """,
    """
    CREATE INDEX requests_ended ON requests (finished_at)
        WHERE status NOT IN ('queued', 'running')
    """,
    """
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
    )
    """,
    "CREATE INDEX files_request ON files (request_id)",
    "CREATE INDEX files_blob ON files (blob_key)",
    """
    CREATE TABLE workers (
        instance_id text PRIMARY KEY,
        seen_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    f"""
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
        {USAGE},
        finish_reason text,
        model_version text,
        response_id text,
        failure jsonb,
        PRIMARY KEY (id, created_at)
    ) PARTITION BY RANGE (created_at)
    """,
    "CREATE INDEX attempts_request ON attempts (request_id)",
    "CREATE TABLE attempts_default PARTITION OF attempts DEFAULT",
    f"""
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
        {USAGE},
        finish_reason text,
        failure jsonb,
        PRIMARY KEY (id, created_at)
    ) PARTITION BY RANGE (created_at)
    """,
    "CREATE INDEX audit_request ON audit (request_id)",
    "CREATE TABLE audit_default PARTITION OF audit DEFAULT",
    """
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
        CHECK ((data IS NULL) <> (blob_key IS NULL)),
        PRIMARY KEY (id, created_at, role)
    ) PARTITION BY RANGE (created_at)
    """,
    "CREATE TABLE bodies_default PARTITION OF bodies DEFAULT",
    # What is in `data` is compressed already.
    "ALTER TABLE bodies ALTER COLUMN data SET STORAGE EXTERNAL",
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
