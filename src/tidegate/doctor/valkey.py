"""What a server of the limiter's should be, against what it says of itself. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tidegate.doctor.finding import Finding, fail, ok, skipped, warn
from tidegate.errors import ConfigError, TidegateError
from tidegate.limiter.checkup import ServerReport, commands

_OLDEST = {"Valkey": (8, 0), "Redis": (7, 2)}
_SLOW_MS = 5.0
_CLOCK_MS = 1_000.0
_NEARLY_FULL = 0.8
_MB = 1_000_000


def judge(report: ServerReport, lease_ms: int, *, embedded: bool) -> Iterator[Finding]:
    """`lease_ms` is SEMAPHORE_TIMEOUT; an embedded server has no replicas, and need not."""
    facts = report.facts
    yield _version(facts)
    yield _rights(report)
    yield _memory(facts)
    yield _persistence(facts)
    yield skipped("valkey.failover", "bundled: it has no replica") if embedded else _failover(facts)
    yield _cluster(facts)
    yield _pushes(report)
    yield _latency(report.round_trip_ms, lease_ms)
    yield _clock(report.clock_ahead_ms)


def judge_absence(failed: TidegateError) -> Finding:
    """What it means that the server could not be looked at at all."""
    said = str(failed)
    if isinstance(failed, ConfigError) and failed.variable == "maxmemory-policy":
        return _evicting(failed.value)
    if re.search("NOPERM|no permissions|NOAUTH|Authentication|WRONGPASS|username-password", said):
        mend = "see REDIS_URL's user and password, and docs/servers.md, 'A user of its own'"
        return fail("valkey.acl", said, mend)
    mend = "start it, and see whether the address and TLS in REDIS_URL are right"
    return fail("valkey.reach", said, mend)


def _evicting(policy: str) -> Finding:
    return fail(
        "valkey.memory",
        f"maxmemory-policy is {policy}: permits may be evicted, and be given twice",
        "CONFIG SET maxmemory-policy noeviction, and the same in its configuration file",
    )


def _version(facts: dict[str, str]) -> Finding:
    kind = "Valkey" if "valkey_version" in facts else "Redis"
    text = facts.get("valkey_version") or facts.get("redis_version", "")
    found = re.match(r"(\d+)\.(\d+)", text)
    said = f"{kind} {text or 'of an unknown version'}"
    if found is None or (int(found[1]), int(found[2])) < _OLDEST[kind]:
        return fail(
            "valkey.version",
            said,
            "sharded publish and subscribe in scripts need Valkey 8 or Redis 7.2, or newer",
        )
    return ok("valkey.version", said)


def _rights(report: ServerReport) -> Finding:
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
            "raise maxmemory, or find what else fills it: nobody can wait once it is full",
        )
    bound = f"of {most / _MB:.0f} MB" if most else "without a bound"
    return ok("valkey.memory", f"noeviction; {used / _MB:.0f} MB used {bound}")


def _persistence(facts: dict[str, str]) -> Finding:
    if facts.get("loading", "0") == "1":
        return warn("valkey.persistence", "it still loads its data", "wait")
    kept = "append-only file" if facts.get("aof_enabled") == "1" else "none, and none is needed"
    return ok("valkey.persistence", kept)


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
        return ok("valkey.failover", "no replica: while it is away WHEN_VALKEY_AWAY decides")
    if "min_slaves_good_slaves" not in facts:
        return warn(
            "valkey.failover",
            f"{replicas} replica{'s' * (replicas > 1)}, but min-replicas-to-write is 0: "
            "after a split both sides let in up to the limits",
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


def _latency(round_trip_ms: float, lease_ms: int) -> Finding:
    said = f"{round_trip_ms:.2f} ms for a round trip (median)"
    if round_trip_ms > lease_ms / 30:
        return fail(
            "valkey.latency",
            f"{said}, of a lease of {lease_ms} ms",
            "bring Valkey nearer, or raise SEMAPHORE_TIMEOUT: living processes will lose it",
        )
    if round_trip_ms > _SLOW_MS:
        return warn("valkey.latency", said, "each admission waits for one: bring Valkey nearer")
    return ok("valkey.latency", said)


def _clock(ahead_ms: float) -> Finding:
    return clock("valkey.clock", ahead_ms, "limits go by its clock alone; records would differ")


def clock(check: str, ahead_ms: float, why: str) -> Finding:
    """How far a server's clock is from ours."""
    if abs(ahead_ms) < _CLOCK_MS:
        return ok(check, "agrees with ours within a second")
    side = "ahead of" if ahead_ms > 0 else "behind"
    said = f"{abs(ahead_ms) / 1000:.1f} s {side} ours"
    return warn(check, said, f"set both by NTP: {why}")
