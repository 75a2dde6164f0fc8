"""Native calls on the record: audit rows that belong to no job."""

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
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
