"""Tenants with what they may do, their API keys, and how much of theirs is queued."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

STEPS = (
    """
    CREATE TABLE tenants (
        id text PRIMARY KEY,
        most_priority integer NOT NULL DEFAULT 100 CHECK (most_priority BETWEEN -100 AND 100),
        models text[],
        most_queued_jobs bigint CHECK (most_queued_jobs >= 0),
        most_queued_bytes bigint CHECK (most_queued_bytes >= 0),
        most_streams integer CHECK (most_streams >= 0),
        most_long_polls integer CHECK (most_long_polls >= 0),
        budget_day_money numeric(20, 6) CHECK (budget_day_money >= 0),
        budget_month_money numeric(20, 6) CHECK (budget_month_money >= 0),
        budget_day_tokens bigint CHECK (budget_day_tokens >= 0),
        budget_month_tokens bigint CHECK (budget_month_tokens >= 0),
        retention_days integer CHECK (retention_days >= 1),
        created_at timestamptz NOT NULL DEFAULT now(),
        disabled_at timestamptz
    )
    """,
    "INSERT INTO tenants (id) VALUES ('default')",
    # Of a key only its digest is here: see store/tenants.py.
    """
    CREATE TABLE keys (
        prefix text PRIMARY KEY,
        tenant_id text NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
        digest bytea NOT NULL CHECK (octet_length(digest) = 32),
        name text NOT NULL DEFAULT '',
        scopes text[] NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        expires_at timestamptz,
        revoked_at timestamptz,
        last_used_at timestamptz
    )
    """,
    "CREATE INDEX keys_tenant ON keys (tenant_id, created_at)",
    # One row. Every change of a tenant or key adds one, as the last thing before it commits: who
    # sees the number sees the change.
    """
    CREATE TABLE access (
        id integer PRIMARY KEY DEFAULT 1 CHECK (id = 1),
        version bigint NOT NULL DEFAULT 1
    )
    """,
    "INSERT INTO access DEFAULT VALUES",
    # Counted again when it is not there: nothing is lost with it.
    """
    CREATE UNLOGGED TABLE queued (
        tenant_id text NOT NULL,
        pool text NOT NULL,
        jobs bigint NOT NULL,
        size_bytes bigint NOT NULL,
        counted_at timestamptz NOT NULL,
        count_ms double precision NOT NULL,
        PRIMARY KEY (tenant_id, pool)
    ) WITH (fillfactor = 50)
    """,
)


def upgrade() -> None:
    for step in STEPS:
        op.execute(step)
