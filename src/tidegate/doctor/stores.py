"""Checks of PostgreSQL and Valkey: their reports against the needs of Tidegate. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from tidegate.doctor.checks import Finding, fail, ok, skipped, warn
from tidegate.errors import ConfigError, TidegateError
from tidegate.limiter import ServerReport, commands, format_span
from tidegate.store.database import FIRST, START_EMPTY, UNRELEASED
from tidegate.store.diagnostics import DatabaseReport, lacks_room

_VALKEY_OLDEST = {"Valkey": (8, 0), "Redis": (7, 2)}
_VALKEY_SLOW_MS = 5.0
_CLOCK_MS = 1_000.0
_NEARLY_FULL = 0.8


def judge_valkey(report: ServerReport, lease_ms: int, *, embedded: bool) -> Iterator[Finding]:
    """Judge a Valkey server. `lease_ms` is SEMAPHORE_TIMEOUT; an embedded server needs no
    replicas."""
    facts = report.facts
    yield _version_of_valkey(facts)
    yield _rights_in_valkey(report)
    yield _memory(facts)
    yield _persistence(facts)
    yield skipped("valkey.failover", "bundled: it has no replica") if embedded else _failover(facts)
    yield _cluster(facts)
    yield _pushes(report)
    yield _latency_of_valkey(report.round_trip_ms, lease_ms)
    yield _clock(report.clock_ahead_ms)


_SAVES_AGAIN = (
    "make room on its disk, or turn its snapshots off, which Tidegate does not need: "
    "CONFIG SET save ''"
)


def judge_absence(failed: TidegateError) -> Finding:
    """Return the finding for a server that could not be examined."""
    message = str(failed)
    if isinstance(failed, ConfigError) and failed.variable == "maxmemory-policy":
        return _evicting(str(failed.value))
    if re.search(
        "NOPERM|no permissions|NOAUTH|Authentication|WRONGPASS|username-password", message
    ):
        fix = "see REDIS_URL's user and password, and docs/servers.md, 'A user of its own'"
        return fail("valkey.acl", message, fix)
    if "MISCONF" in message:
        return fail("valkey.persistence", message, _SAVES_AGAIN)
    fix = "start it, and see whether the address and TLS in REDIS_URL are right"
    return fail("valkey.reach", message, fix)


def _evicting(policy: str) -> Finding:
    return fail(
        "valkey.memory",
        f"maxmemory-policy is {policy}: permits may be evicted, and be given twice",
        "CONFIG SET maxmemory-policy noeviction, and the same in its configuration file",
    )


def _version_of_valkey(facts: dict[str, str]) -> Finding:
    kind = "Valkey" if "valkey_version" in facts else "Redis"
    text = facts.get("valkey_version") or facts.get("redis_version", "")
    found = re.match(r"(\d+)\.(\d+)", text)
    version = f"{kind} {text or 'of an unknown version'}"
    if found is None or (int(found[1]), int(found[2])) < _VALKEY_OLDEST[kind]:
        return fail(
            "valkey.version",
            version,
            "sharded publish and subscribe in scripts need Valkey 8 or Redis 7.2, or newer",
        )
    return ok("valkey.version", version)


def _rights_in_valkey(report: ServerReport) -> Finding:
    if report.unread:
        return fail(
            "valkey.acl",
            f"scripts do not run: {report.unread}",
            "give the user the rights in docs/servers.md, 'A user of its own'",
        )
    if report.denied:
        return fail(
            "valkey.acl",
            f"this user may not run {', '.join(report.denied)}",
            f"ACL SETUSER ... {' '.join('+' + name for name in report.denied)}, "
            "or the whole line of docs/servers.md",
        )
    return ok("valkey.acl", f"all {len(commands())} commands that are needed may be run")


def _memory(facts: dict[str, str]) -> Finding:
    most, used = int(facts.get("maxmemory", 0)), int(facts.get("used_memory", 0))
    policy = facts.get("maxmemory_policy", "noeviction")
    if most and policy != "noeviction":
        return _evicting(policy)
    if most and used > _NEARLY_FULL * most:
        return warn(
            "valkey.memory",
            f"{used / _MB:.0f} of {most / _MB:.0f} MB are used",
            "raise maxmemory, or find what else fills it: Tidegate still writes when it is full, "
            "so that the server grows beyond its bound",
        )
    bound = f"of {most / _MB:.0f} MB" if most else "without a bound"
    return ok("valkey.memory", f"noeviction; {used / _MB:.0f} MB used {bound}")


def _persistence(facts: dict[str, str]) -> Finding:
    if facts.get("loading", "0") == "1":
        return warn("valkey.persistence", "it still loads its data", "wait")
    if facts.get("rdb_last_bgsave_status", "ok") != "ok":
        found = "its last save to disk failed, after which a server may refuse writes"
        return warn("valkey.persistence", found, _SAVES_AGAIN)
    persistence = (
        "append-only file" if facts.get("aof_enabled") == "1" else "none, and none is needed"
    )
    return ok("valkey.persistence", persistence)


def _failover(facts: dict[str, str]) -> Finding:
    if facts.get("role") != "master":
        return fail(
            "valkey.failover",
            f"it is a {facts.get('role', 'server of an unknown role')}, which refuses writes",
            "let REDIS_URL lead to the master, or name the sentinels: redis+sentinel://",
        )
    replicas = int(facts.get("connected_slaves", 0))
    if facts.get("min_slaves_good_slaves") == "0":
        return fail(
            "valkey.failover",
            "min-replicas-to-write is set, and no replica is good: writes are refused",
            "bring a replica back, or lower min-replicas-to-write",
        )
    if not replicas:
        return ok("valkey.failover", "no replica: while it is unavailable WHEN_VALKEY_AWAY decides")
    if "min_slaves_good_slaves" not in facts:
        return warn(
            "valkey.failover",
            f"{replicas} replica{'s' * (replicas > 1)}, but min-replicas-to-write is 0: "
            "after a split both sides admit up to the limits",
            "set min-replicas-to-write 1: docs/servers.md, 'Failover'",
        )
    return ok("valkey.failover", f"{replicas} replicas, and min-replicas-to-write is set")


def _cluster(facts: dict[str, str]) -> Finding:
    if facts.get("cluster_enabled") != "1":
        return ok("valkey.cluster", "not a cluster")
    return ok("valkey.cluster", "a cluster: each pool is one slot")


def _pushes(report: ServerReport) -> Finding:
    if report.pushes:
        return fail(
            "valkey.pushes",
            f"sharded publish and subscribe do not work: {report.pushes}",
            "allow the channels tg:* (resetchannels &tg:*), and take no proxy that lacks them",
        )
    return ok("valkey.pushes", "a message came back by sharded publish and subscribe")


def _latency_of_valkey(round_trip_ms: float, lease_ms: int) -> Finding:
    latency = f"{round_trip_ms:.2f} ms for a round trip (median)"
    if round_trip_ms > lease_ms / 30:
        return fail(
            "valkey.latency",
            f"{latency}, of a lease of {lease_ms} ms",
            "bring Valkey nearer, or raise SEMAPHORE_TIMEOUT: living processes will lose it",
        )
    if round_trip_ms > _VALKEY_SLOW_MS:
        return warn("valkey.latency", latency, "each admission waits for one: bring Valkey nearer")
    return ok("valkey.latency", latency)


def _clock(ahead_ms: float) -> Finding:
    return clock("valkey.clock", ahead_ms, "limits go by its clock alone; records would differ")


def clock(check: str, ahead_ms: float, why: str) -> Finding:
    """Judge the difference between a server's clock and ours."""
    if abs(ahead_ms) < _CLOCK_MS:
        return ok(check, "agrees with ours within a second")
    side = "ahead of" if ahead_ms > 0 else "behind"
    difference = f"{abs(ahead_ms) / 1000:.1f} s {side} ours"
    return warn(check, difference, f"set both by NTP: {why}")


_OLDEST = 150_000
_SLOW_MS = 10.0
_MB = 1_000_000
CONNECTIONS_A_PROCESS = 12
_SHOWN = 3
_FULL_SCANS = 4


def judge(report: DatabaseReport, processes: int | None) -> Iterator[Finding]:
    """Judge a PostgreSQL server. `processes` is the number of those in the pool, None if
    unknown."""
    facts = report.facts
    yield _version(facts)
    yield _pooler(report)
    yield _rights(report)
    yield _schema(report)
    yield _connections(report, processes)
    yield _locks(facts)
    yield _durable(facts)
    yield _encoding(facts)
    yield _autovacuum(facts)
    yield _transactions(report)
    yield _size(report)
    yield _latency(report.round_trip_ms)
    yield clock("postgresql.clock", report.clock_ahead_ms, "deadlines and retries go by its clock")


def judge_no_answer(failed: TidegateError) -> Finding:
    """Judge why a database cannot be used: it is full, or something is wrong with its URL."""
    fix = "start it, and see whether DATABASE_URL, its user, password and database are right"
    if lacks_room(failed):
        fix = "raise max_connections: each process needs 12; or put PgBouncer before it"
    return fail("postgresql.reach", str(failed), fix)


def _version(facts: dict[str, object]) -> Finding:
    version = f"PostgreSQL {facts['version_text']}"
    if int(str(facts["version"])) < _OLDEST:
        return fail("postgresql.version", version, "it must be 15 or newer")
    return ok("postgresql.version", version)


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
        what = (
            f"does not own {_named(report.foreign)}" if report.foreign else "may not create tables"
        )
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
    if found < FIRST:
        return fail("postgresql.schema", UNRELEASED.format(found), START_EMPTY)
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
    usage = f"{used} of {room} in use"
    if report.pooled:
        return skipped("postgresql.connections", f"{usage}; the pooler's, who has its own bound")
    needed = CONNECTIONS_A_PROCESS * (processes or 0)
    if needed > room:
        return warn(
            "postgresql.connections",
            f"{usage}; {processes} processes may want {needed}",
            "raise max_connections, or put PgBouncer in between: docs/servers.md",
        )
    if used > 0.9 * room:
        return warn("postgresql.connections", usage, "see who has them: pg_stat_activity")
    return ok("postgresql.connections", usage)


def _locks(facts: dict[str, object]) -> Finding:
    """Judge the lock table: a statement without a day locks each partition with its indexes until
    it ends."""
    needed, lockers = int(str(facts["partitions"])), int(str(facts["lockers"]))
    room = lockers * int(str(facts["locks_each"]))
    capacity = f"room for {room:,}; a statement on all days takes {needed:,}"
    if _FULL_SCANS * needed > room:
        least = math.ceil(_FULL_SCANS * needed / lockers)
        return warn(
            "postgresql.locks",
            f"{capacity}: {_FULL_SCANS} concurrent ones may fail with `out of shared memory`",
            f"set max_locks_per_transaction = {least} or more and restart PostgreSQL, or keep "
            "the record for fewer days: RETENTION_DAYS",
        )
    return ok("postgresql.locks", capacity)


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
        f"{len(report.old)} of more than 5 minutes; the oldest {format_span(first.age_s * 1000)}"
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
    latency = f"{round_trip_ms:.2f} ms for a round trip (median)"
    if round_trip_ms > _SLOW_MS:
        return warn("postgresql.latency", latency, "a submit takes several: bring it nearer")
    return ok("postgresql.latency", latency)
