"""Order in which jobs became ready: the transaction that brought each one into the queue.

Workers read what has come since they last looked, in place of searching for it among all that has
left the queue. A trigger keeps the mark, so that every way back into the queue is covered,
including those of an older version that runs beside this one or after it.
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

STEPS = (
    # Those that are there get 0: a constant rewrites no row.
    "ALTER TABLE requests ADD COLUMN ready_xid bigint NOT NULL DEFAULT 0",
    "ALTER TABLE requests ALTER COLUMN ready_xid SET DEFAULT pg_current_xact_id()::text::bigint",
    """
    CREATE FUNCTION requests_became_ready() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.ready_xid := pg_current_xact_id()::text::bigint;
        RETURN NEW;
    END
    $$
    """,
    """
    CREATE TRIGGER requests_became_ready BEFORE UPDATE ON requests FOR EACH ROW
        WHEN (NEW.status = 'queued' AND NEW.claimed_by IS NULL AND NEW.not_before IS NULL
            AND NOT (OLD.status = 'queued' AND OLD.claimed_by IS NULL AND OLD.not_before IS NULL
                AND (OLD.pool, OLD.kind, OLD.tenant_id, OLD.priority, OLD.created_at)
                    IS NOT DISTINCT FROM
                    (NEW.pool, NEW.kind, NEW.tenant_id, NEW.priority, NEW.created_at)))
        EXECUTE FUNCTION requests_became_ready()
    """,
    # The planner takes every index of what is queued for one of nearly no entries, and so for as
    # good as any other, when statistics say that hardly a job is queued: but dead entries are not
    # in statistics. These are written in a way that each answers to its own statements alone. The
    # older ones stay for the version before this one.
    """
    CREATE INDEX requests_came ON requests (pool, lane, ready_xid)
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL
            AND ready_xid >= 0, false)
    """,
    """
    CREATE INDEX requests_queue
        ON requests ((pool || '/' || lane || '/' || tenant_id), priority, created_at, id)
        WHERE coalesce(status = 'queued' AND claimed_by IS NULL AND not_before IS NULL, false)
    """,
    """
    CREATE INDEX requests_ripe ON requests (not_before)
        WHERE coalesce(status = 'queued' AND not_before IS NOT NULL, false)
    """,
    """
    CREATE INDEX requests_due ON requests (deadline_at)
        WHERE coalesce(status = 'queued' AND deadline_at IS NOT NULL, false)
    """,
    """
    CREATE INDEX requests_held ON requests (claimed_by)
        WHERE coalesce(status IN ('queued', 'running') AND claimed_by IS NOT NULL, false)
    """,
    """
    CREATE INDEX requests_called_off ON requests (claimed_by)
        WHERE coalesce(status IN ('queued', 'running') AND cancel_asked_at IS NOT NULL, false)
    """,
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
