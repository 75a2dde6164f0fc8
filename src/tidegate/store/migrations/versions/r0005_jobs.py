"""Jobs that are handed in once, cancelled, listed and told of: columns, indexes and the outbox."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0003"
branch_labels = None
depends_on = None

STEPS = (
    # What was asked under an idempotency key: SHA-256.
    "ALTER TABLE requests ADD COLUMN idempotency_digest bytea",
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
