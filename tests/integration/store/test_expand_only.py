"""Every migration only adds, so that the version before runs on beside it, and after a rollback.

Judged by what PostgreSQL says of its tables after each step, not by the words of the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import asyncpg

from tidegate.store.database import HEAD, steps, upgrade

# What a step may do although it takes something away from the version before, and why that is none.
_EXCEPTIONS: dict[tuple[str, str], str] = {}

_COLUMNS = """
    SELECT c.relname AS "table", a.attname AS "column", a.attnotnull AS required,
        format_type(a.atttypid, a.atttypmod) AS type, a.atthasdef OR a.attidentity <> '' AS filled
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
        AND a.attnum > 0 AND NOT a.attisdropped
"""
_RULES = """
    SELECT c.relname AS "table", pg_get_constraintdef(r.oid) AS rule
    FROM pg_constraint r JOIN pg_class c ON c.oid = r.conrelid
    WHERE c.relnamespace = 'public'::regnamespace AND r.contype <> 'n'
    UNION
    SELECT c.relname, 'UNIQUE by ' || pg_get_indexdef(i.indexrelid)
    FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
    WHERE c.relnamespace = 'public'::regnamespace AND i.indisunique
"""


@dataclass(slots=True)
class _Schema:
    """Columns by table and name: type, whether a value is required, whether one is made up."""

    columns: dict[tuple[str, str], tuple[str, bool, bool]] = field(default_factory=dict)
    rules: set[tuple[str, str]] = field(default_factory=set)

    @property
    def tables(self) -> set[str]:
        return {table for table, _ in self.columns}


async def _seen(connection: asyncpg.Connection) -> _Schema:
    columns = await connection.fetch(_COLUMNS)
    return _Schema(
        {
            (row["table"], row["column"]): (row["type"], row["required"], row["filled"])
            for row in columns
        },
        {(row["table"], row["rule"]) for row in await connection.fetch(_RULES)},
    )


def _taken_away(before: _Schema, after: _Schema) -> Iterator[str]:
    """What the version before could do and now cannot, in words."""
    for place, (kind, required, _) in before.columns.items():
        name = ".".join(place)
        if place not in after.columns:
            yield f"{name} is gone or has another name"
            continue
        now_kind, now_required, now_filled = after.columns[place]
        if now_kind != kind:
            yield f"{name} was {kind} and is {now_kind}"
        if now_required and not required and not now_filled:
            yield f"{name} must now be given"
    for place, (_, required, filled) in after.columns.items():
        old_table = place[0] in before.tables
        if old_table and place not in before.columns and required and not filled:
            yield f"{'.'.join(place)} is new and must be given"
    for table, rule in after.rules - before.rules:
        if table in before.tables:
            yield f"{table} has a new rule: {rule}"


async def test_every_step_leaves_the_version_before_all_that_it_needs(
    empty_database_url: str,
) -> None:
    connection = await asyncpg.connect(empty_database_url)
    found: dict[tuple[str, str], str] = {}
    before = await _seen(connection)
    revisions = [revision for revision, _ in steps()]
    for revision in revisions:
        await upgrade(connection, revision)
        after = await _seen(connection)
        assert len(after.columns) >= len(before.columns)
        for what in _taken_away(before, after):
            found[revision, what] = _EXCEPTIONS.get((revision, what), "")
        before = after
    await connection.close()
    assert revisions[-1] == HEAD
    assert {place: why for place, why in found.items() if not why} == {}, "the version before"
    assert set(found) == set(_EXCEPTIONS), "an exception that is not needed"


async def test_what_takes_something_away_is_found(empty_database_url: str) -> None:
    connection = await asyncpg.connect(empty_database_url)
    await connection.execute("CREATE TABLE a (gone text, n integer, optional text, kept text)")
    before = await _seen(connection)
    await connection.execute(
        "ALTER TABLE a DROP COLUMN gone, ALTER n TYPE bigint, ALTER optional SET NOT NULL,"
        " ADD COLUMN new text NOT NULL, ADD COLUMN fine text NOT NULL DEFAULT '', ADD UNIQUE (kept)"
    )
    told = sorted(_taken_away(before, await _seen(connection)))
    await connection.close()
    assert [line.split(":")[0] for line in told] == [
        "a has a new rule",
        "a has a new rule",
        "a.gone is gone or has another name",
        "a.n was integer and is bigint",
        "a.new is new and must be given",
        "a.optional must now be given",
    ]
