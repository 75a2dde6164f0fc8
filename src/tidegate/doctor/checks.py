"""Checks of settings, processes and machine: each returns a finding with a fix."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from shlex import quote

from tidegate.admission.charges import provider_of_upstream
from tidegate.embedded.servers import command_of
from tidegate.errors import ConfigError
from tidegate.limiter import Concurrency, PoolPolicy, Snapshot
from tidegate.operator_key import existing_operator_key, key_file
from tidegate.policy.deployment import Deployment, Upstream, doubtful, emulates
from tidegate.policy.format import digest, pause_in_words, to_plain, with_tenants
from tidegate.policy.live import NO_CHANGES, Tables, changed_lines
from tidegate.policy.rollout import Origin, differences, requested_before
from tidegate.prices.rates import ModelPrice, catalog
from tidegate.settings import SECRETS, Config, origins
from tidegate.store.provider.upstreams import UpstreamProcess
from tidegate.store.records import PolicyRecord
from tidegate.store.statistics import Total
from tidegate.store.tenants import Key
from tidegate.upstream.server_load import ServerLoad


class State(StrEnum):
    """State of a check. `skipped`: not possible or not needed; another finding gives the reason."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check: its stable name such as `valkey.reach`, a description, and a fix."""

    check: str
    state: State
    found: str
    fix: str = ""

    @property
    def room(self) -> str:
        return self.check.partition(".")[0]


def ok(check: str, found: str) -> Finding:
    return Finding(check, State.OK, found)


def warn(check: str, found: str, fix: str) -> Finding:
    return Finding(check, State.WARN, found, fix)


def fail(check: str, found: str, fix: str) -> Finding:
    return Finding(check, State.FAIL, found, fix)


def skipped(check: str, why: str) -> Finding:
    return Finding(check, State.SKIPPED, why)


PRICES_OVER = timedelta(days=30)  # the time whose calls are checked
_PRICES_OLD = timedelta(days=120)
_ALL_CALLS = "pool:total"


def judge_prices(
    upstreams: Sequence[Upstream], called: Sequence[Total], today: date, emulated: str = ""
) -> Iterator[Finding]:
    """Judge the prices of the models that were called in the last `PRICES_OVER`, given by day.
    emulated: the upstream whose answers are emulated, and cost nothing."""
    made_up = [one for one in upstreams if one.name == emulated]
    real = [one for one in upstreams if one.name != emulated]
    unpriced: dict[str, list[Total]] = {}
    for one in called:
        is_free = _serves(made_up, one) and not _serves(real, one)
        if one.model and one.unpriced and not is_free:
            unpriced.setdefault(one.model, []).append(one)
    if unpriced:
        calls = [
            _last_calls(totals, _without_price(real or made_up, model, today))
            for model, totals in unpriced.items()
        ]
        yield warn(
            "prices.models",
            f"called without a price: {_listed(calls)}",
            "state it in [upstreams.NAME.prices]: until then the cost of such calls is unknown",
        )
    else:
        models = {one.model for one in called}
        free = " or are emulated" if made_up else ""
        yield ok(
            "prices.models", f"all of {len(models)} models that were called have a price{free}"
        )
    rows = {
        id(row): row
        for one in called
        for upstream in upstreams
        if one.model and (row := _public_row(upstream, one.model, today)) is not None
    }
    old = sorted(
        f"{row.models[0]} ({row.checked})"
        for row in rows.values()
        if today - row.checked > _PRICES_OLD
    )
    if old:
        yield warn(
            "prices.age",
            f"public prices that were read long ago: {_listed(old)}",
            "compare them with the provider's page; state what differs in [upstreams.NAME.prices], "
            "or see `tidegate reconcile`",
        )
    else:
        found = "1 public price is" if len(rows) == 1 else f"{len(rows)} public prices are"
        yield ok("prices.age", f"{found} in use, none read long ago")


def judge_preempt(upstreams: Sequence[Upstream], emulated: str = "") -> Iterator[Finding]:
    """Judge the upstreams whose calls give way, if there are any. emulated: the upstream whose
    answers are emulated."""
    giving_way = [one for one in upstreams if one.preempt and one.name != emulated]
    hosted = [one for one in giving_way if provider_of_upstream(one) is not None]
    if hosted:
        yield warn(
            "settings.preempt",
            f"calls give way at hosted providers: {_listed(one.name for one in hosted)}; these "
            "may work on, and bill, after the connection is closed",
            "remove `preempt` there: it is for servers that abort a request whose client "
            "disconnects, see docs/batches.md",
        )
    elif giving_way:
        yield ok("settings.preempt", f"calls give way at {_listed(one.name for one in giving_way)}")


def judge_server(name: str, policy: PoolPolicy, load: ServerLoad) -> Finding:
    """Compare the limit on all calls of a self-hosted server with the server's own report."""
    check, limit = f"server.{name}", policy.limits.get(_ALL_CALLS)
    if not load.is_known:
        why = "it shows neither how many it computes at a time nor who waits"
        return skipped(check, f"{why} (llama.cpp: --metrics, SGLang: --enable-metrics)")
    finds_itself = isinstance(limit, Concurrency) and limit.adaptive is not None
    bound = policy.bound(_ALL_CALLS)
    if load.slots is not None and not finds_itself and not 0 < bound <= load.slots:
        stated = f"the limit is {bound}" if bound else "there is no limit on all of its calls"
        return warn(
            check,
            f"{stated}, and it computes {load.slots} at a time: what is more waits there, where no "
            "tenant has its share",
            f"tidegate limits set --pool {name} {_ALL_CALLS}={load.slots}",
        )
    if load.waiting:
        return warn(
            check,
            f"{load}: these wait there, where no tenant has its share",
            f"tidegate limits set --pool {name} {_ALL_CALLS}=N with a lower N, unless others call "
            "it too",
        )
    tokens = any(isinstance(one, Concurrency) and one.by_tokens for one in policy.limits.values())
    if load.kv_tokens is not None and not tokens:
        return ok(check, f'{load}; "tif:total" = {load.kv_tokens} would bind its cache')
    return ok(check, str(load))


def judge_live(
    revision: int, deployment: Deployment, base: Tables, processes: Sequence[UpstreamProcess]
) -> Iterator[Finding]:
    """Judge the live changes of upstreams. base: the tables in the file."""
    lines = changed_lines(NO_CHANGES, deployment.live)
    if lines:
        yield ok("upstreams.live", f"revision {revision} over the file: {'; '.join(lines)}")
    for line in deployment.live.differing(base):
        fix = "`tidegate upstreams set NAME --deployed` takes what the file says"
        yield warn("upstreams.live", f"the file has changed since: {line}", fix)
    for process in processes:
        for name, why in process.problems.items():
            fix = "give that process the variable or the file, or restart it"
            yield fail("upstreams.live", f"{process.instance_id} can't have {name}: {why}", fix)


def judge_workers(processes: Sequence[UpstreamProcess], ready: int) -> Finding:
    """Judge whether workers run for the jobs that are `ready` to begin."""
    workers = sum(one.role == "worker" for one in processes)
    if workers:
        return ok("jobs.workers", "1 runs" if workers == 1 else f"{workers} run")
    if not ready:
        return ok("jobs.workers", "none runs, and no job is ready to begin")
    jobs = "1 job" if ready == 1 else f"{ready} jobs"
    fix = "start one (`tidegate worker`), or see the log of the one that should run"
    return fail("jobs.workers", f"no worker runs or answers: {jobs} can't begin", fix)


def _serves(upstreams: Iterable[Upstream], called: Total) -> bool:
    return any(upstream.fit(called.model or "") for upstream in upstreams)


def _without_price(upstreams: Iterable[Upstream], model: str, today: date) -> list[str]:
    """Return the names of the upstreams that serve a model and know no price of it."""
    return [
        one.name
        for one in upstreams
        if one.fit(model) and one.price(model) is None and _public_row(one, model, today) is None
    ]


def _last_calls(totals: Sequence[Total], upstreams: Sequence[str]) -> str:
    """Return a model's calls without a price, the upstreams that know none, and the last day of the
    calls: a price stated since then has ended them."""
    days = [one.day for one in totals if one.day is not None]
    last = f", last on {max(days)}" if days else ""
    at = f" at {' or '.join(upstreams)}" if upstreams else ""
    return f"{totals[0].model} ({sum(one.unpriced for one in totals)} calls{at}{last})"


def _public_row(upstream: Upstream, model: str, today: date) -> ModelPrice | None:
    """Return the catalog's row for the price of a model; None if the price is stated."""
    provider = provider_of_upstream(upstream)
    if provider is None or not upstream.fit(model) or upstream.price(model) is not None:
        return None
    return catalog().row(provider, model, today)


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = len(found) - _MOST_MODELS_SHOWN
    return ", ".join(found[:_MOST_MODELS_SHOWN]) + (f" and {more} more" if more > 0 else "")


_MOST_MODELS_SHOWN = 10
_RIVALS_WITHIN = timedelta(hours=1)
_SHOWN = 3
_MOST_KEYS_SHOWN = 10
_PROCESS = re.compile(r"(?:api|worker)-(?P<host>.+)-\d+-[0-9a-f]{8}")


def judge_settings(config: Config) -> Iterator[Finding]:
    """Judge settings that are valid, but may be a mistake."""
    yield _demo(config)
    yield _webhooks(config)
    if doubts := doubtful(config):
        fix = "rename what is misspelt; what is of another program may stay"
        yield warn("settings.names", "; ".join(map(str, doubts)), fix)


def _demo(config: Config) -> Finding:
    parts = ["the bundled servers"] * config.embedded + ["made-up answers"] * emulates(config)
    if not parts:
        return ok("settings.demo", "your servers and your providers")
    enabled = " and ".join(parts)
    if config.is_loopback:
        return ok("settings.demo", f"{enabled}, for this machine alone")
    return warn(
        "settings.demo",
        f"{enabled}, for every client that reaches {config.host}",
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
    """Judge access. `any_key`: whether there are valid API keys. `unvouched`: keys without a
    recorded creator. None if unknown."""
    if not config.requires_keys:
        if config.is_loopback:
            yield ok("access.keys", "not asked for, and only this machine can call")
        else:
            yield warn(
                "access.keys",
                f"AUTH=off: every client that reaches {config.host} may call",
                "take AUTH away, unless something in front asks for you",
            )
    elif config.jwt_issuer and not any_key:
        yield ok("access.keys", f"asked for, or tokens of {config.jwt_issuer}")
    elif any_key is None:
        yield skipped("access.keys", "asked for; PostgreSQL has not told whether there are any")
    elif not any_key:
        yield fail(
            "access.keys",
            "asked for, and there are none: no client can call",
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
    except (OSError, ConfigError) as invalid:
        return fail(check, str(invalid), f"remove {path}, and start again: another is made")
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
    listed = ", ".join(f"{key.prefix} ({' '.join(key.scopes)})" for key in keys[:_MOST_KEYS_SHOWN])
    more = " ..." if len(keys) > _MOST_KEYS_SHOWN else ""
    problem = (
        f"{len(keys)} API keys that work, {admins} of them for /admin, were made while AUTH was "
        f"off, or before that was recorded: {listed}{more}"
    )
    fix = "those you know: tidegate keys keep PREFIX; all others: tidegate keys revoke PREFIX"
    return warn(check, problem, fix)


def judge_pool(
    pool: str, configured: PoolPolicy, snapshot: Snapshot, records: Sequence[PolicyRecord] | None
) -> Iterator[Finding]:
    """Judge a pool. `records` are its earlier policies, the newest first; None if unknown."""
    yield _policy(pool, configured, snapshot, records)
    yield _sessions(pool, snapshot)
    yield _paused(pool, snapshot)


def _policy(
    pool: str, configured: PoolPolicy, snapshot: Snapshot, records: Sequence[PolicyRecord] | None
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
            "processes fix this within 10 s while both servers answer; else see their logs",
        )
    plain, suffix = to_plain(configured), ""
    if newest.digest != digest(newest.policy):  # tenants have more than was deployed
        plain, suffix = (
            with_tenants(plain, newest.policy, requested_before(records)),
            ", beside what tenants were given since",
        )
    changes = differences(newest.policy, plain)
    if not changes:
        return ok(check, f"revision {newest.revision} is in force, as the settings say{suffix}")
    changed = "; ".join(changes[:_SHOWN]) + (" ..." if len(changes) > _SHOWN else "")
    deployed = f"tidegate limits set --deployed --pool {pool}"
    is_live = newest.origin == Origin.LIVE
    if is_live and any(one.digest == digest(to_plain(configured)) for one in records):
        return ok(
            check,
            f"revision {newest.revision}, set live by {newest.set_by}, is in force and stays, also "
            f"after restarts ({deployed} returns to the settings: {changed})",
        )
    since = ", and the settings were changed since" if is_live else ", and the settings differ"
    return warn(
        check,
        f"revision {newest.revision} ({newest.origin}, by {newest.set_by}) is in force{since}: "
        f"{changed}",
        f"{deployed} puts the settings in force; or write into them what is",
    )


def _rivals(records: Sequence[PolicyRecord]) -> str:
    """Return the processes that recently put different deployments' policies in force in turns."""
    since = datetime.now(UTC) - _RIVALS_WITHIN
    recent = [
        one
        for one in records
        if one.origin == Origin.DEPLOYMENT and one.created_at and one.created_at > since
    ]
    if len({one.digest for one in recent}) < 3:  # a deployment, and its change, are not a conflict
        return ""
    return " and ".join(sorted({one.set_by for one in recent})[:_SHOWN])


def _sessions(pool: str, snapshot: Snapshot) -> Finding:
    check = f"pool.{pool}.processes"
    if snapshot.recovering_ms:
        return warn(
            check,
            f"no permit is granted for {snapshot.recovering_ms} ms: Valkey lost its data",
            "wait; processes report again what they hold",
        )
    stuck = [one.name or one.sid for one in snapshot.processes if one.blocked]
    if stuck:
        return warn(
            check,
            f"{', '.join(stuck[:_SHOWN])}: accepts no permits: paused or disconnected",
            "look at it; `tidegate permits revoke` releases what a dead one holds",
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
    return warn(
        f"pool.{pool}.limits",
        f"{first.limit} is {pause_in_words(first.paused_by, first.paused_ms)}"
        + (f"; {len(paused) - 1} more" if len(paused) > 1 else ""),
        f"tidegate limits resume {quote(first.limit)} --pool {pool}, if it should not be",
    )


def hosts_of(snapshot: Snapshot) -> set[str]:
    """Return the machines of the processes in a pool, from the names of the processes."""
    found = (_PROCESS.fullmatch(one.name) for one in snapshot.processes)
    return {one["host"] for one in found if one is not None}


def judge_blobs(config: Config, snapshots: Mapping[str, Snapshot]) -> Finding:
    """Judge whether all machines can read the files that one machine stores."""
    hosts = set().union(*(hosts_of(one) for one in snapshots.values()))
    if not config.blob_url and len(hosts) > 1:
        return warn(
            "files.shared",
            f"{len(hosts)} machines, and uploads and pictures in a folder of each",
            "set BLOB_URL to a bucket, or put DATA_DIR on a file system that they share",
        )
    place = "in a bucket" if config.blob_url else "in DATA_DIR, on one machine"
    return ok("files.shared", place)


_OLDEST_PYTHON = (3, 11)
_NEED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(\[[^]]*\])?>=(?P<version>[0-9.]+)(?P<only>.*)")
_FEW_FILES, _TOO_FEW_FILES = 4_096, 1_024
_LITTLE_BYTES, _TOO_LITTLE_BYTES = 2_000_000_000, 200_000_000
_OWN_FOLDERS = ("blobs", "spill")
_GB = 1_000_000_000


def examine_machine(config: Config, dotenv: Path = Path(".env")) -> Iterator[Finding]:
    """Run all checks of the machine; they start and change nothing."""
    yield from _packages(config)
    yield _descriptors()
    yield _folder(config.data_dir)
    yield _disk(config.data_dir)
    yield _secret_files(dotenv)
    yield port(config)


def _packages(config: Config) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < _OLDEST_PYTHON:
        yield fail("machine.python", f"Python {version}", "it must be 3.11 or newer")
    else:
        yield ok("machine.python", f"Python {version}")
    extras = {"gateway"} | ({"embedded"} if config.embedded else set())
    missing, old, count = [], [], 0
    for need in metadata.requires("tidegate") or ():
        found = _NEED.match(need)
        if found is None or not _applies(found["only"], extras):
            continue
        count += 1
        try:
            there = metadata.version(found["name"])
        except metadata.PackageNotFoundError:
            missing.append(found["name"])
            continue
        if _numbers(there) < _numbers(found["version"]):
            old.append(f"{found['name']} {there} (needs {found['version']})")
    names = ",".join(sorted(extras))
    if missing or old:
        problem = ", ".join([f"{name} is missing" for name in missing] + [f"{one}" for one in old])
        yield fail("machine.packages", problem, f"pip install --upgrade 'tidegate[{names}]'")
    else:
        yield ok("machine.packages", f"{count} packages of tidegate[{names}] are new enough")


def _applies(condition: str, extras: set[str]) -> bool:
    if "sys_platform ==" in condition and f"== '{sys.platform}'" not in condition:
        return False
    named = re.search(r"extra == ['\"]([\w-]+)['\"]", condition)
    return named is None or named[1] in extras


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _descriptors() -> Finding:
    import resource

    from tidegate.supervisor.supervisor import MOST_FILES, open_files_of

    files = open_files_of(*resource.getrlimit(resource.RLIMIT_NOFILE))
    limit = f"{files} open files and connections a process (ulimit -Hn)"
    fix = f"ulimit -Hn {MOST_FILES}, or LimitNOFILE= in the unit"
    if files < _TOO_FEW_FILES:
        return fail("machine.descriptors", limit, fix)
    return (
        warn("machine.descriptors", limit, fix)
        if files < _FEW_FILES
        else ok("machine.descriptors", limit)
    )


def _folder(data_dir: Path) -> Finding:
    there, who = _nearest(data_dir), f"user {os.geteuid()}"
    for folder in (
        there,
        *(data_dir / name for name in _OWN_FOLDERS if _is_there(data_dir / name)),
    ):
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            return fail(
                "files.data_dir",
                f"{data_dir}: {who} may not write in {folder}",
                f"chown it, or set DATA_DIR to a folder of {who}",
            )
    if there != data_dir.absolute():
        return ok("files.data_dir", f"{data_dir} is made at the first start")
    if (data_dir / "blobs").is_dir() and (data_dir / "blobs").stat().st_mode & 0o077:
        return warn(
            "files.data_dir",
            f"other users of this machine may look into {data_dir / 'blobs'}",
            f"chmod 700 {data_dir / 'blobs'}",
        )
    return ok("files.data_dir", f"{data_dir} can be written")


def _disk(data_dir: Path) -> Finding:
    free = shutil.disk_usage(_nearest(data_dir)).free
    space = f"{free / _GB:,.1f} GB are free at {data_dir}"
    fix = "make room, or move DATA_DIR; spilled records and uploads need it"
    if free < _TOO_LITTLE_BYTES:
        return fail("files.disk", space, fix)
    return warn("files.disk", space, fix) if free < _LITTLE_BYTES else ok("files.disk", space)


def _nearest(path: Path) -> Path:
    """Return the folder, or its nearest existing parent that this user can see."""
    path = path.absolute()
    while not _is_there(path):
        path = path.parent
    return path


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return False


def _secret_files(dotenv: Path) -> Finding:
    secrets = {name: place for name, place in origins().items() if name in SECRETS}
    by_file = [name for name in secrets if os.environ.get(f"{name}_FILE", "").strip()]
    files = {name: Path(os.environ[f"{name}_FILE"]) for name in by_file}
    if dotenv.is_file() and str(dotenv) in secrets.values():
        files[".env"] = dotenv
    loose = [path for path in files.values() if path.exists() and path.stat().st_mode & 0o077]
    # Secrets mounted by a cluster belong to root and are read-only; the group may be this
    # process's.
    loose = [path for path in loose if path.stat().st_uid == os.geteuid()]
    if loose:
        names = " ".join(map(str, loose))
        return warn("files.secrets", f"others may read {names}", f"chmod 600 {names}")
    if not files:
        return ok("files.secrets", "no secret is read from a file")
    return ok("files.secrets", f"no other user may read the files with secrets ({len(files)})")


def port(config: Config) -> Finding:
    """Judge whether HOST and PORT are free, or which program uses them."""
    from tidegate.supervisor.supervisor import listen, serves_tidegate

    if config.port == 0:
        return skipped("machine.port", "PORT=0 takes any free one")
    place = f"{config.host} port {config.port}"
    try:
        listen(config).close()
    except ConfigError as refused:
        if refused.variable != "PORT":
            return fail(
                "machine.port",
                f"{refused.variable}={refused.value} {refused.allowed}",
                "set HOST to an address of this machine, 127.0.0.1 or 0.0.0.0",
            )
        if serves_tidegate(config.host, config.port):
            return ok("machine.port", f"{place}: a Tidegate serves there")
        pid, command = _owner_of(config.port)
        if _TIDEGATE.search(command):
            return fail(
                "machine.port",
                f"{place}: a Tidegate listens there and does not answer (pid {pid})",
                "see its log, and restart it",
            )
        who = f" ({Path(command.split(' ')[0]).name}, pid {pid})" if command else ""
        return fail(
            "machine.port",
            f"{place} {refused.allowed.partition(';')[0]}{who}",
            "stop that program, or set PORT",
        )
    return ok("machine.port", f"{place} is free")


_TIDEGATE = re.compile(r"(?:^|[ /])(?:tidegate|run_app\.py)(?: |$)")


def _owner_of(number: int) -> tuple[int, str]:
    """Return the pid and the command of the program that listens on a port; (0, '') if the system
    does not show it."""
    inodes = {inode for inode, listens_on in _listening() if listens_on == number}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = {os.readlink(one) for one in (process / "fd").iterdir()}
        except OSError:  # ended, or another user's
            continue
        if links & {f"socket:[{inode}]" for inode in inodes}:
            return int(process.name), command_of(int(process.name))
    return 0, ""


def _listening() -> Iterator[tuple[str, int]]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A":
                yield fields[9], int(fields[1].rpartition(":")[2], 16)
