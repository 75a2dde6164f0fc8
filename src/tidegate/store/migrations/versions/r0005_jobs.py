"""Jobs that are submitted once, cancelled, listed and notified: columns, indexes and the outbox."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

STEPS = (
    # What was asked under an idempotency key: SHA-256.
    "ALTER TABLE requests ADD COLUMN idempotency_digest bytea",
    # When the owner of a running job asked for its end.
    "ALTER TABLE requests ADD COLUMN cancel_asked_at timestamptz",
    """
    CREATE INDEX requests_cancelling ON requests (claimed_by)
        WHERE cancel_asked_at IS NOT NULL AND status IN ('queued', 'running')
    """,
    "ALTER TABLE requests ADD COLUMN webhook_url text",
    # `due_at`: when the next try may start; while one is under way, when it counts as lost.
    """
    CREATE TABLE webhooks (
        id uuid PRIMARY KEY,
        request_id uuid NOT NULL REFERENCES requests (id) ON DELETE CASCADE,
        tenant_id text NOT NULL DEFAULT 'default',
        pool text NOT NULL,
        event text NOT NULL,
        url text NOT NULL,
        state text NOT NULL DEFAULT 'pending'
            CHECK (state IN ('pending', 'delivered', 'given_up')),
        tries integer NOT NULL DEFAULT 0,
        due_at timestamptz NOT NULL DEFAULT now(),
        answer_status integer,
        problem text,
        created_at timestamptz NOT NULL DEFAULT now(),
        ended_at timestamptz
    )
    """,
    "CREATE INDEX webhooks_due ON webhooks (due_at) WHERE state = 'pending'",
    "CREATE INDEX webhooks_request ON webhooks (request_id)",
    "CREATE INDEX requests_listed ON requests (tenant_id, created_at, id)",
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
