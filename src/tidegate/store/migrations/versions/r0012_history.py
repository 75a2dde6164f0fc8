"""Data of the dashboard's charts, and indexes for what waits for an operator."""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

STEPS = (
    # Each process's count of the calls that ended in a span of time, rewritten until the span
    # is over: a write may be repeated. What is counted by name may grow without another step.
    # waits, lengths: histograms of ms, as store/statistics.py packs them.
    """
    CREATE TABLE history (
        step_s integer NOT NULL,
        at timestamptz NOT NULL,
        pool text NOT NULL,
        instance_id text NOT NULL,
        counts jsonb NOT NULL,
        apart jsonb NOT NULL,
        waits bytea NOT NULL,
        lengths bytea NOT NULL,
        PRIMARY KEY (step_s, at, pool, instance_id)
    ) WITH (fillfactor = 50)
    """,
    """
    CREATE INDEX requests_dead ON requests (finished_at)
        WHERE coalesce(status = 'dead', false)
    """,
    """
    CREATE INDEX webhooks_given_up ON webhooks (ended_at)
        WHERE coalesce(state = 'given_up', false)
    """,
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
