"""The policies of pools, one row a revision: what was in force since when, and by whom."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

STEPS = (
    """
    CREATE TABLE policies (
        pool text NOT NULL,
        revision bigint NOT NULL,
        origin text NOT NULL CHECK (origin IN ('deployment', 'live')),
        digest text NOT NULL,
        policy jsonb NOT NULL,
        set_by text NOT NULL,
        reason text NOT NULL DEFAULT '',
        created_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (pool, revision)
    )
    """,
    "CREATE INDEX policies_deployed ON policies (pool, digest) WHERE origin = 'deployment'",
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
