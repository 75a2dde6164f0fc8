"""The daily partitions of the append-only tables.

Invariant: an insert never fails for want of a partition, since each table has a default one; rows
that landed there move into their day's partition when that is made.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

import asyncpg

TABLES = ("attempts", "audit", "bodies")
DAYS_AHEAD = 7
# An attempt's row grows once, when it ends: where its page has room for that, no index is touched.
_SETTINGS = {"attempts": "WITH (fillfactor = 40)"}
_LOCK = 7_423_001  # advisory lock of everyone who makes or drops partitions


def name_of(table: str, day: date) -> str:
    return f"{table}_{day:%Y%m%d}"


def day_of(name: str) -> date | None:
    """The day of a partition's name; None for the default partition."""
    stamp = name.rpartition("_")[2]
    if not stamp.isdigit():
        return None
    return datetime.strptime(stamp, "%Y%m%d").replace(tzinfo=UTC).date()


async def make_ahead(connection: asyncpg.Connection, today: date) -> list[str]:
    """Make what is missing of today's and the next days' partitions; runs in a transaction.

    Returns the names of those made.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
    days = [today + timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)]
    names = [name_of(table, day) for table in TABLES for day in days]
    missing = await connection.fetch(
        "SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass(name) IS NULL", names
    )
    absent = {row["name"] for row in missing}
    for table in TABLES:
        for day in days:
            if name_of(table, day) in absent:
                await _make(connection, table, day)
    return sorted(absent)


async def _make(connection: asyncpg.Connection, table: str, day: date) -> None:
    start = datetime.combine(day, time.min, UTC)
    end = start + timedelta(days=1)
    name = name_of(table, day)
    settings = _SETTINGS.get(table, "")
    await connection.execute(f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL) {settings}")
    await connection.execute(
        f"""
        WITH moved AS (
            DELETE FROM {table}_default WHERE created_at >= $1 AND created_at < $2 RETURNING *
        )
        INSERT INTO {name} SELECT * FROM moved
        """,
        start,
        end,
    )
    await connection.execute(
        f"ALTER TABLE {table} ATTACH PARTITION {name} "
        f"FOR VALUES FROM ('{start.isoformat()}') TO ('{end.isoformat()}')"
    )


async def older_than(connection: asyncpg.Connection, day: date) -> list[tuple[str, str]]:
    """(table, partition) of every partition whose whole day is before `day`, oldest first."""
    rows = await connection.fetch(
        """
        SELECT parent.relname AS parent, child.relname AS child
        FROM pg_inherits
        JOIN pg_class parent ON parent.oid = inhparent
        JOIN pg_class child ON child.oid = inhrelid
        WHERE parent.oid = ANY($1::regclass[])
        """,
        list(TABLES),
    )
    found = [
        (when, row["parent"], row["child"])
        for row in rows
        if (when := day_of(row["child"])) is not None and when < day
    ]
    return [(parent, child) for _, parent, child in sorted(found)]


async def drop(connection: asyncpg.Connection, table: str, name: str) -> bool:
    """Drop one partition in this transaction; False when others use it and it must wait.

    Waiting long for the lock would hold up every insert that queues behind it.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
    await connection.execute("SET LOCAL lock_timeout = '500ms'")
    await connection.execute("SAVEPOINT before_drop")
    try:
        await connection.execute(f"ALTER TABLE {table} DETACH PARTITION {name}")
        await connection.execute(f"DROP TABLE {name}")
    except asyncpg.LockNotAvailableError:
        await connection.execute("ROLLBACK TO SAVEPOINT before_drop")
        return False
    return True
