"""Store: PostgreSQL as record and queue, and the blobs beside it."""
