"""Counts of calls that gave way to higher bands, of jobs and of batch lines."""

from __future__ import annotations

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

STEPS = (
    # An older version leaves them as they are.
    "ALTER TABLE requests ADD COLUMN preemptions integer NOT NULL DEFAULT 0",
    "ALTER TABLE batch_lines ADD COLUMN preemptions integer NOT NULL DEFAULT 0",
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
