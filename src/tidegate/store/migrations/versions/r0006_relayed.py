"""Native calls on the record, audit rows that belong to no job; and their idempotency keys."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

STEPS = (
    """
    ALTER TABLE audit
        ADD COLUMN endpoint text, ADD COLUMN http_status integer,
        ADD COLUMN streamed boolean, ADD COLUMN key_id text, ADD COLUMN subject text
    """,
    """
    CREATE INDEX audit_relayed ON audit (tenant_id, created_at DESC, id DESC)
        WHERE source = 'relay'
    """,
    """
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
    )
    """,
    "CREATE INDEX native_keys_age ON native_keys (created_at)",
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
