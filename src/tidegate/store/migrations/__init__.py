"""Alembic's folder: raw SQL steps, run only by `tidegate.store.database`."""
