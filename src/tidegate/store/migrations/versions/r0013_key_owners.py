"""Owners of idempotency keys: a key whose process died is free within seconds."""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

STEPS = (
    # seen_at: when the process that answers last renewed its claim on the key. lost: the request
    # before, whose process stopped renewing before its answer was stored.
    """
    ALTER TABLE native_keys
        ADD COLUMN seen_at timestamptz, ADD COLUMN lost uuid
    """,
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
