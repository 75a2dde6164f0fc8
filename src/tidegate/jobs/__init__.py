"""Jobs: claimed from PostgreSQL by workers, and called like every other request."""
