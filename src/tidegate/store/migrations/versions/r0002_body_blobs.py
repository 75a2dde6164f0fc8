"""Index of the blobs that are bodies, so that an unreferenced blob is known by its key."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE INDEX bodies_blob ON bodies (blob_key) WHERE blob_key IS NOT NULL")
