"""Jobs that wrap native calls, and batches of them: files, batches and their lines."""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

STEPS = (
    # The native path that a job wraps a call of; `prompt` is then its body, `result` the answer.
    "ALTER TABLE requests ADD COLUMN endpoint text",
    """
    CREATE TABLE batch_files (
        id uuid PRIMARY KEY,
        tenant_id text NOT NULL,
        purpose text NOT NULL CHECK (purpose IN ('batch', 'batch_output')),
        name text NOT NULL,
        size_bytes bigint NOT NULL,
        lines integer NOT NULL,
        blob_key text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "CREATE INDEX batch_files_listed ON batch_files (tenant_id, id)",
    "CREATE INDEX batch_files_blob ON batch_files (blob_key)",
    # `ends_as`: what it is to become once no line is under way any more. `claim` fences who
    # validates or assembles it; `total` is the file's lines until they are counted exactly.
    """
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
    )
    """,
    "CREATE INDEX batches_listed ON batches (tenant_id, id)",
    """
    CREATE INDEX batches_open ON batches (status, id)
        WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
    """,
    """
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
    ) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02)
    """,
    "CREATE INDEX batch_lines_ready ON batch_lines (batch_id, line) WHERE state = 'queued'",
    """
    CREATE INDEX batch_lines_held ON batch_lines (claimed_by)
        WHERE state IN ('claimed', 'calling')
    """,
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
