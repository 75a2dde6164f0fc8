"""Budgets: their definitions and books, what is reserved of them, and the alerts that they raise.

The budgets of tenants become rows of `budgets`, with what was spent of them so far. Their columns
in `tenants` stay for processes of the version before, and are read no more.
"""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    text = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    # Several statements need the simple protocol, which SQLAlchemy never uses.
    connection = op.get_bind().connection.dbapi_connection
    assert connection is not None
    connection.run_async(lambda driver: driver.execute(text))
