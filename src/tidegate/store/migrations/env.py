"""Alembic's entry point: `migrate` hands it an open connection and the transaction around it."""

from __future__ import annotations

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, transactional_ddl=True)
context.run_migrations()
