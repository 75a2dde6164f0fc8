"""What the database should be, against what it says of itself. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from tidegate.doctor.finding import Finding, fail, ok, skipped, warn
from tidegate.doctor.valkey import clock
from tidegate.policy.words import span_in_words
from tidegate.store.checkup import DatabaseReport

_OLDEST = 150_000
_SLOW_MS = 10.0
_MB = 1_000_000
CONNECTIONS_A_PROCESS = 12
_SHOWN = 3


def judge(report: DatabaseReport, processes: int | None) -> Iterator[Finding]:
    """`processes` are those in the pool, None where that is not known."""
    facts = report.facts
    yield _version(facts)
    yield _pooler(report)
    yield _rights(report)
    yield _schema(report)
    yield _connections(report, processes)
    yield _durable(facts)
    yield _encoding(facts)
    yield _autovacuum(facts)
    yield _transactions(report)
    yield _size(report)
    yield _latency(report.round_trip_ms)
    yield clock("postgresql.clock", report.clock_ahead_ms, "deadlines and retries go by its clock")


def _version(facts: dict[str, object]) -> Finding:
    said = f"PostgreSQL {facts['version_text']}"
    if int(str(facts["version"])) < _OLDEST:
        return fail("postgresql.version", said, "it must be 15 or newer")
    return ok("postgresql.version", said)


def _pooler(report: DatabaseReport) -> Finding:
    if not report.pooled:
        return ok("postgresql.pooler", "none in between")
    if not report.shares:
        return warn(
            "postgresql.pooler",
            "a pooler in between gave two clients two connections: perhaps in session mode",
            "set pool_mode = transaction, so that few connections do: docs/servers.md, 'PgBouncer'",
        )
    return ok("postgresql.pooler", "a pooler in transaction mode; changes are noticed by polling")


def _rights(report: DatabaseReport) -> Finding:
    facts = report.facts
    if facts["is_replica"] or facts["read_only"] == "on":
        return fail(
            "postgresql.rights",
            "it takes no writes: a replica, or default_transaction_read_only",
            "let DATABASE_URL lead to the primary (target_session_attrs=read-write)",
        )
    if facts["schema"] is None:
        return fail("postgresql.rights", "there is no schema to work in", "set its search_path")
    if report.unusable:
        return fail(
            "postgresql.rights",
            f"{facts['who']} may not write {_named(report.unusable)}",
            f"GRANT ALL ON ALL TABLES IN SCHEMA {facts['schema']} TO {facts['who']}",
        )
    if report.foreign or not facts["may_create"]:
        what = f"owns not {_named(report.foreign)}" if report.foreign else "may not create tables"
        return warn(
            "postgresql.rights",
            f"{facts['who']} {what} in {facts['schema']}: it can't migrate",
            "run `tidegate migrate` as the owner, or make this user a member of that role",
        )
    return ok("postgresql.rights", f"{facts['who']} may read, write and migrate")


def _named(tables: tuple[str, ...]) -> str:
    more = len(tables) - _SHOWN
    return ", ".join(tables[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _schema(report: DatabaseReport) -> Finding:
    found, needed = report.revision, report.needed
    if found is None and report.unusable:
        return skipped("postgresql.schema", "its revision may not be read")
    if found is None:
        return fail("postgresql.schema", "no migration has run", "run `tidegate migrate`")
    if found < needed:
        return fail(
            "postgresql.schema",
            f"at revision {found}; this version needs {needed}",
            "run `tidegate migrate`; older processes go on working",
        )
    if found > needed:
        return warn(
            "postgresql.schema",
            f"at revision {found}, newer than this version's {needed}",
            "that is fine after a rollback; else bring this version up to date",
        )
    return ok("postgresql.schema", f"at revision {found}, as this version needs")


def _connections(report: DatabaseReport, processes: int | None) -> Finding:
    facts = report.facts
    room = int(str(facts["max_connections"])) - int(str(facts["reserved"]))
    used = int(str(facts["connected"]))
    said = f"{used} of {room} in use"
    if report.pooled:
        return skipped("postgresql.connections", f"{said}; the pooler's, who has its own bound")
    wanted = CONNECTIONS_A_PROCESS * (processes or 0)
    if wanted > room:
        return warn(
            "postgresql.connections",
            f"{said}; {processes} processes may want {wanted}",
            "raise max_connections, or put PgBouncer in between: docs/servers.md",
        )
    if used > 0.9 * room:
        return warn("postgresql.connections", said, "see who has them: pg_stat_activity")
    return ok("postgresql.connections", said)


def _durable(facts: dict[str, object]) -> Finding:
    if facts["fsync"] == "off" or facts["synchronous_commit"] == "off":
        which = "fsync" if facts["fsync"] == "off" else "synchronous_commit"
        return warn(
            "postgresql.durability",
            f"{which} is off: a crash can lose requests that were taken with a 202",
            f"set {which} = on",
        )
    return ok("postgresql.durability", "commits are on the disk before they are answered")


def _encoding(facts: dict[str, object]) -> Finding:
    if facts["encoding"] != "UTF8":
        return fail(
            "postgresql.encoding",
            f"the database is in {facts['encoding']}: prompts in other scripts will fail",
            "make a database with ENCODING 'UTF8', and move there",
        )
    return ok("postgresql.encoding", "UTF8")


def _autovacuum(facts: dict[str, object]) -> Finding:
    if facts["autovacuum"] != "on":
        return fail(
            "postgresql.autovacuum",
            "autovacuum is off: the queue gets slower by the hour",
            "set autovacuum = on",
        )
    return ok("postgresql.autovacuum", "on")


def _transactions(report: DatabaseReport) -> Finding:
    if not report.old:
        return ok("postgresql.transactions", "none is older than 5 minutes")
    first = report.old[0]
    program = f", {first.program}" if first.program else ""
    return warn(
        "postgresql.transactions",
        f"{len(report.old)} of more than 5 minutes; the oldest {span_in_words(first.age_s * 1000)}"
        f", {first.state} ({first.who}{program}, pid {first.pid}): dead rows stay until it ends",
        f"SELECT pg_terminate_backend({first.pid}), and idle_in_transaction_session_timeout",
    )


def _size(report: DatabaseReport) -> Finding:
    if not report.sizes:
        return skipped("postgresql.size", "there are no tables yet")
    total = sum(report.sizes.values())
    largest = max(report.sizes, key=lambda name: report.sizes[name])
    return ok(
        "postgresql.size",
        f"{total / _MB:,.0f} MB in {len(report.sizes)} tables; "
        f"{report.sizes[largest] / _MB:,.0f} MB in {largest}",
    )


def _latency(round_trip_ms: float) -> Finding:
    said = f"{round_trip_ms:.2f} ms for a round trip (median)"
    if round_trip_ms > _SLOW_MS:
        return warn("postgresql.latency", said, "a submit takes several: bring it nearer")
    return ok("postgresql.latency", said)
