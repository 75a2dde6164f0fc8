"""Schema of version 0.1.0, the first: its steps before, 0001 to 0011, were never released."""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0012"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    text = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    # Several statements need the simple protocol, which SQLAlchemy never uses.
    connection = op.get_bind().connection.dbapi_connection
    assert connection is not None
    connection.run_async(lambda driver: driver.execute(text))
