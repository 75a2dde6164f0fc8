"""Cost of requests, totals by tenant, day and model, subjects of requests, and what was erased.

Nothing that is there is rewritten: totals begin with the first request after this step.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

COUNTS = (
    *("requests", "input_tokens", "output_tokens", "cached_tokens", "thoughts_tokens", "images"),
    *("cost_micros", "unpriced", "partial", "estimated", "unknown"),
)
STEPS = (
    """
    ALTER TABLE audit
        ADD COLUMN usage_state text, ADD COLUMN cost_micros bigint, ADD COLUMN images integer
    """,
    "ALTER TABLE requests ADD COLUMN subject text",
    # By the day of UTC on which a request ended. Rows are updated with every batch.
    f"""
    CREATE TABLE usage_days (
        tenant_id text NOT NULL,
        day date NOT NULL,
        model text NOT NULL,
        pool text NOT NULL,
        {", ".join(f"{name} bigint NOT NULL DEFAULT 0" for name in COUNTS)},
        PRIMARY KEY (tenant_id, day, model, pool)
    ) WITH (fillfactor = 50)
    """,
    "CREATE INDEX usage_days_day ON usage_days (day)",
    # Whose requests were erased, and when: what was received before is not recorded any more. Of a
    # subject only its digest is kept; without one the whole tenant is meant, without a tenant all.
    """
    CREATE TABLE erased (
        id uuid PRIMARY KEY,
        tenant_id text,
        subject_digest bytea,
        erased_at timestamptz NOT NULL DEFAULT now(),
        CHECK (tenant_id IS NOT NULL OR subject_digest IS NOT NULL)
    )
    """,
    "CREATE INDEX erased_subject ON erased (subject_digest) WHERE subject_digest IS NOT NULL",
    "CREATE INDEX erased_tenant ON erased (tenant_id) WHERE subject_digest IS NULL",
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
