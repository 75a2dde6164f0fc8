"""Declared types of the bodies of native calls, and how much of them was left out."""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

STEPS = (
    # Null where it was not noted: in what an older version writes, and in the bodies of jobs and
    # of our own streams, which are always JSON.
    "ALTER TABLE bodies ADD COLUMN content_type text",
    # Of the middle of a long answer, of which the record has the beginning and the end.
    "ALTER TABLE bodies ADD COLUMN omitted_bytes bigint NOT NULL DEFAULT 0",
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
