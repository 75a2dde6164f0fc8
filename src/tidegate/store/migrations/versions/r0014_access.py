"""Makers of keys, and the spent one-time codes of the dashboard."""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

STEPS = (
    # NULL: nobody was asked for a key when it was made, or it was not recorded who made it.
    "ALTER TABLE keys ADD COLUMN made_by text",
    """
    CREATE TABLE spent_codes (
        nonce bytea PRIMARY KEY,
        ends_at timestamptz NOT NULL,
        spender bytea NOT NULL
    )
    """,
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
