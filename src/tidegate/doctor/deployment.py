"""What the settings come to, and whether what runs agrees with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from tidegate.config import Config, existing_operator_key, key_file
from tidegate.doctor.finding import Finding, fail, ok, skipped, warn
from tidegate.errors import ConfigError
from tidegate.limiter import PoolPolicy, Snapshot
from tidegate.policy import emulates
from tidegate.policy.file import doubtful
from tidegate.policy.plain import digest, to_plain
from tidegate.policy.revisions import Origin, differences
from tidegate.policy.tenancy import with_tenants
from tidegate.policy.words import pause_in_words
from tidegate.store.records import PolicyRecord
from tidegate.store.tenants import Key

_RIVALS_WITHIN = timedelta(hours=1)
_SHOWN = 3
_MOST_KEYS_SHOWN = 10
_PROCESS = re.compile(r"(?:api|worker)-(?P<host>.+)-\d+-[0-9a-f]{8}")


def judge_settings(config: Config) -> Iterator[Finding]:
    """Those that are sound, and may still be a mistake."""
    yield _demo(config)
    yield _webhooks(config)
    if doubts := doubtful(config):
        mend = "rename what is misspelt; what is of another program may stay"
        yield warn("settings.names", "; ".join(map(str, doubts)), mend)


def _demo(config: Config) -> Finding:
    parts = ["the bundled servers"] * config.embedded + ["made-up answers"] * emulates(config)
    if not parts:
        return ok("settings.demo", "your servers and your providers")
    said = " and ".join(parts)
    if config.is_loopback:
        return ok("settings.demo", f"{said}, for this machine alone")
    return warn(
        "settings.demo",
        f"{said}, for whoever reaches {config.host}",
        "set DATABASE_URL, REDIS_URL and the key of a provider, and take TIDEGATE_DEMO away",
    )


def _webhooks(config: Config) -> Finding:
    if config.webhook_secret is None:
        return ok("settings.webhooks", "off: no WEBHOOK_SECRET, so no webhook_url is taken")
    if config.webhook_allow_private:
        return warn(
            "settings.webhooks",
            "WEBHOOK_ALLOW_PRIVATE: callers may have private addresses called",
            "take it away where callers are not trusted with your network",
        )
    return ok("settings.webhooks", "signed, to public addresses")


def judge_access(
    config: Config, any_key: bool | None, unvouched: Sequence[Key] | None = None
) -> Iterator[Finding]:
    """`any_key`: whether there are API keys that work. `unvouched`: those of which nobody knows who
    made them. None where that is not known."""
    if not config.asks_for_keys:
        if config.is_loopback:
            yield ok("access.keys", "not asked for, and only this machine can call")
        else:
            yield warn(
                "access.keys",
                f"AUTH=off: whoever reaches {config.host} may call",
                "take AUTH away, unless something in front asks for you",
            )
    elif any_key is None:
        yield skipped("access.keys", "asked for; PostgreSQL has not told whether there are any")
    elif not any_key:
        yield fail(
            "access.keys",
            "asked for, and there are none: nobody can call",
            "KEY=$(tidegate keys create)",
        )
    else:
        yield ok("access.keys", "asked for, and there are some")
    yield _operator_key(config)
    yield _unvouched(unvouched)


def _operator_key(config: Config) -> Finding:
    check = "access.operator_key"
    if config.admin_token is not None:
        return ok(check, "ADMIN_TOKEN opens /admin, the dashboard and /metrics")
    path = key_file(config)
    try:
        mode = path.stat().st_mode & 0o777
        existing_operator_key(config)
    except FileNotFoundError:
        return ok(check, f"not made yet: the first process makes {path}")
    except (OSError, ConfigError) as wrong:
        return fail(check, str(wrong), f"remove {path}, and start again: another is made")
    if mode & 0o077:
        return warn(check, f"others may read {path} ({mode:o})", f"chmod 600 {path}")
    return ok(check, f"in {path}; it opens /admin, the dashboard and /metrics")


def _unvouched(keys: Sequence[Key] | None) -> Finding:
    check = "access.key_makers"
    if keys is None:
        return skipped(check, "PostgreSQL does not tell who made the API keys")
    if not keys:
        return ok(check, "it is on record who made each API key that works")
    admins = sum("admin" in key.scopes for key in keys)
    shown = ", ".join(f"{key.prefix} ({' '.join(key.scopes)})" for key in keys[:_MOST_KEYS_SHOWN])
    more = " ..." if len(keys) > _MOST_KEYS_SHOWN else ""
    said = (
        f"{len(keys)} API keys that work, {admins} of them for /admin, were made while nobody was "
        f"asked for a key, or before that was recorded: {shown}{more}"
    )
    mend = "those you know: tidegate keys keep PREFIX; all others: tidegate keys revoke PREFIX"
    return warn(check, said, mend)


def judge_pool(
    pool: str, wanted: PoolPolicy, snapshot: Snapshot, records: Sequence[PolicyRecord] | None
) -> Iterator[Finding]:
    """`records` are the policies that were in force, the newest first; None where not known."""
    yield _policy(pool, wanted, snapshot, records)
    yield _sessions(pool, snapshot)
    yield _paused(pool, snapshot)


def _policy(
    pool: str, wanted: PoolPolicy, snapshot: Snapshot, records: Sequence[PolicyRecord] | None
) -> Finding:
    check = f"pool.{pool}.policy"
    if records is None:
        return skipped(check, "PostgreSQL does not tell which policy is in force")
    if not records:
        return ok(check, "none is in force yet: the first process brings it")
    newest = records[0]
    if rivals := _rivals(records):
        return fail(
            check,
            f"deployments with different policies start against one another: {rivals}",
            "give all processes the same tidegate.toml and RATE_LIMITS",
        )
    if snapshot.revision and snapshot.revision != newest.revision:
        return warn(
            check,
            f"revision {newest.revision} is on record, {snapshot.revision} in force in Valkey",
            "processes mend this within 10 s while both servers answer; else see their logs",
        )
    plain, beside = to_plain(wanted), ""
    if newest.digest != digest(newest.policy):  # tenants were given more than was deployed
        plain, beside = with_tenants(plain, newest.policy), ", beside what tenants were given since"
    changes = differences(newest.policy, plain)
    if not changes:
        return ok(check, f"revision {newest.revision} is in force, as the settings say{beside}")
    shown = "; ".join(changes[:_SHOWN]) + (" ..." if len(changes) > _SHOWN else "")
    by = f"{newest.origin}, by {newest.set_by}"
    return warn(
        check,
        f"revision {newest.revision} ({by}) is in force, and the settings differ: {shown}",
        "write into them what is in force; or tidegate limits set --deployed puts them in force",
    )


def _rivals(records: Sequence[PolicyRecord]) -> str:
    """Who took turns in putting different deployments' policies in force lately."""
    since = datetime.now(UTC) - _RIVALS_WITHIN
    recent = [
        one
        for one in records
        if one.origin == Origin.DEPLOYMENT and one.created_at and one.created_at > since
    ]
    if len({one.digest for one in recent}) < 3:  # a deployment, and its change, are no fight
        return ""
    return " and ".join(sorted({one.set_by for one in recent})[:_SHOWN])


def _sessions(pool: str, snapshot: Snapshot) -> Finding:
    check = f"pool.{pool}.processes"
    if snapshot.recovering_ms:
        return warn(
            check,
            f"nobody is let in for {snapshot.recovering_ms} ms: Valkey lost its data",
            "wait; processes tell again what they hold",
        )
    stuck = [one.name or one.sid for one in snapshot.processes if one.blocked]
    if stuck:
        return warn(
            check,
            f"{', '.join(stuck[:_SHOWN])}: takes no grants, being paused or cut off",
            "look at it; `tidegate permits revoke` takes back what a dead one holds",
        )
    if not snapshot.processes:
        return ok(check, "none runs")
    hosts = hosts_of(snapshot)
    where = f" on {len(hosts)} machines" if len(hosts) > 1 else ""
    return ok(check, f"{len(snapshot.processes)} take part{where}")


def _paused(pool: str, snapshot: Snapshot) -> Finding:
    paused = [one for one in snapshot.limits.values() if one.paused_ms]
    if not paused:
        return ok(f"pool.{pool}.limits", f"none of {len(snapshot.limits)} is paused")
    first = paused[0]
    by = f" by {first.paused_by}" if first.paused_by else ""
    return warn(
        f"pool.{pool}.limits",
        f"{first.limit} is paused{by}, {pause_in_words(first.paused_ms)}"
        + (f"; {len(paused) - 1} more" if len(paused) > 1 else ""),
        f"tidegate limits resume {first.limit}, if it should not be",
    )


def hosts_of(snapshot: Snapshot) -> set[str]:
    """The machines whose processes take part, by the names that these give themselves."""
    found = (_PROCESS.fullmatch(one.name) for one in snapshot.processes)
    return {one["host"] for one in found if one is not None}


def judge_blobs(config: Config, snapshots: Mapping[str, Snapshot]) -> Finding:
    """Whether what one machine stores can be read by another."""
    hosts = set().union(*(hosts_of(one) for one in snapshots.values()))
    if not config.blob_url and len(hosts) > 1:
        return warn(
            "files.shared",
            f"{len(hosts)} machines, and uploads and pictures in a folder of each",
            "set BLOB_URL to a bucket, or put DATA_DIR on a file system that they share",
        )
    place = "in a bucket" if config.blob_url else "in DATA_DIR, on one machine"
    return ok("files.shared", place)
