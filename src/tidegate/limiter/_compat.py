"""Private names of redis-py that the limiter uses.

redis >= 6.4, < 9. Guarded by `tests/contract/test_private_names.py`.
"""

from __future__ import annotations

from redis.asyncio.connection import AbstractConnection


def close_now(connection: AbstractConnection) -> None:
    """Close a connection without an await, so that a cancelled task can do it.

    The public `disconnect` waits for the transport.
    """
    connection._close()  # type: ignore[no-untyped-call]
