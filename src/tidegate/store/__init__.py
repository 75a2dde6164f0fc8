"""PostgreSQL as record and queue, and the blobs beside it. Nothing else touches PostgreSQL.

`store.Store` is the whole public face; `records` and `states` are what it takes and gives.
"""
