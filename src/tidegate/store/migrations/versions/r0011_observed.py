"""Time to the first byte of an answer, and the trace that a request is part of.

Nothing that is there is rewritten; both are null in what an older version writes.
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# From sending a call to the first bytes of its answer's body, in milliseconds: of an attempt, of a
# request's last one, and of the row of its end.
STEPS = (
    "ALTER TABLE attempts ADD COLUMN first_byte_ms double precision",
    "ALTER TABLE audit ADD COLUMN first_byte_ms double precision",
    # The W3C trace context that a job was submitted in, for the worker that will run it.
    """
    ALTER TABLE requests
        ADD COLUMN first_byte_ms double precision, ADD COLUMN traceparent text
    """,
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
