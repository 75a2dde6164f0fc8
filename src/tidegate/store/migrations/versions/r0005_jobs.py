"""Jobs that are handed in once, cancelled, listed and told of: columns, indexes and the outbox."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

STEPS = (
    # What was asked under an idempotency key: SHA-256.
    "ALTER TABLE requests ADD COLUMN idempotency_digest bytea",
    # When the owner of a running job asked for its end.
    "ALTER TABLE requests ADD COLUMN cancel_asked_at timestamptz",
    """
    CREATE INDEX requests_cancelling ON requests (claimed_by)
        WHERE cancel_asked_at IS NOT NULL AND status IN ('queued', 'running')
    """,
    "CREATE INDEX requests_listed ON requests (tenant_id, created_at, id)",
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
