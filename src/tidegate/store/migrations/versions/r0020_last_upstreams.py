"""Upstream of the last call that was begun of a job or of a line of a batch.

Where its process dies, the record says at which upstream the call may have cost something.
"""

from __future__ import annotations

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

STEPS = (
    # Null in what an older version begins.
    "ALTER TABLE requests ADD COLUMN upstream text",
    "ALTER TABLE batch_lines ADD COLUMN upstream text, ADD COLUMN model text",
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
