"""What is said of what was found, where making it so for real would cost too much."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tidegate.call import Scope
from tidegate.doctor import checks as deployment
from tidegate.doctor import checks as machine
from tidegate.doctor import stores as postgresql
from tidegate.doctor import stores as valkey
from tidegate.doctor.checks import Finding, State
from tidegate.limiter import (
    Adaptive,
    Concurrency,
    LimitView,
    PoolPolicy,
    ServerReport,
    SessionView,
    Snapshot,
)
from tidegate.operator_key import key_file, operator_key
from tidegate.policy.deployment import Preempt, Upstream
from tidegate.policy.format import digest, to_plain
from tidegate.prices.rates import Price
from tidegate.settings import load
from tidegate.store.diagnostics import DatabaseReport
from tidegate.store.provider.upstreams import UpstreamProcess
from tidegate.store.records import PolicyRecord
from tidegate.store.statistics import COUNTS, Total
from tidegate.store.tenants import Key
from tidegate.supervisor import supervisor
from tidegate.upstream.server_load import ServerLoad

SERVER = ServerReport(
    facts={"valkey_version": "9.1.2", "redis_version": "7.2.4", "role": "master"},
    round_trip_ms=0.1,
    clock_ahead_ms=3.0,
    denied=(),
    pushes="",
    snapshot=None,
    unread="",
)
DATABASE = DatabaseReport(
    facts={
        "version": 180000,
        "version_text": "18.0",
        "is_replica": False,
        "read_only": "off",
        "encoding": "UTF8",
        "autovacuum": "on",
        "fsync": "on",
        "synchronous_commit": "on",
        "max_connections": 100,
        "reserved": 3,
        "connected": 5,
        "locks_each": 64,
        "lockers": 100,
        "partitions": 1_600,
        "schema": "public",
        "who": "tidegate",
        "may_create": True,
    },
    revision="0010",
    needed="0010",
    round_trip_ms=0.3,
    clock_ahead_ms=0.0,
    pooled=False,
    shares=False,
    old=(),
    sizes={"requests": 1_000_000},
    foreign=(),
    unusable=(),
)
POLICY = PoolPolicy({"kind:text_only": 5})
SOUND = Snapshot({}, 2, 1, 3, 0, "up")


def state_of(found: Any, check: str) -> State:
    by_check: dict[str, Finding] = {one.check: one for one in found}
    return by_check[check].state


@pytest.mark.parametrize(
    ("check", "change", "state"),
    [
        ("version", {}, State.OK),
        ("version", {"facts": {"valkey_version": "7.2.9"}}, State.FAIL),
        ("version", {"facts": {"redis_version": "7.0.15"}}, State.FAIL),
        ("version", {"facts": {"redis_version": "7.2.1"}}, State.OK),
        ("persistence", {"facts": {"loading": "1"}}, State.WARN),
        ("failover", {"facts": {"role": "slave"}}, State.FAIL),
        (
            "failover",
            {"facts": {"role": "master", "connected_slaves": "1", "min_slaves_good_slaves": "0"}},
            State.FAIL,
        ),
        ("latency", {"round_trip_ms": 6.0}, State.WARN),
        ("latency", {"round_trip_ms": 150.0}, State.FAIL),
        ("clock", {"clock_ahead_ms": -2_500.0}, State.WARN),
    ],
)
def test_servers_of_the_limiter(check: str, change: dict[str, Any], state: State) -> None:
    found = valkey.judge_valkey(replace(SERVER, **change), 3_000, embedded=False)
    assert state_of(found, f"valkey.{check}") is state


def test_the_way_out_of_a_pause_names_its_pool() -> None:
    view = LimitView("rpm:gpt-5*", "r", 6, 0, 0, 0, 6, 0, 90_000, "ann", 0)
    found = deployment.judge_pool("openai", POLICY, replace(SOUND, limits={view.limit: view}), [])
    (paused,) = [one for one in found if one.check == "pool.openai.limits"]
    command = "tidegate limits resume 'rpm:gpt-5*' --pool openai"
    assert paused.fix == f"{command}, if it should not be"


@pytest.mark.parametrize(
    ("check", "change", "state"),
    [
        ("version", {"version": 140011}, State.FAIL),
        ("rights", {"is_replica": True}, State.FAIL),
        ("rights", {"schema": None}, State.FAIL),
        ("rights", {"may_create": False}, State.WARN),
        ("connections", {"connected": 95}, State.WARN),
        ("locks", {"partitions": 1_601}, State.WARN),
        ("durability", {"synchronous_commit": "off"}, State.WARN),
        ("autovacuum", {"autovacuum": "off"}, State.FAIL),
    ],
)
def test_databases(check: str, change: dict[str, Any], state: State) -> None:
    report = replace(DATABASE, facts=DATABASE.facts | change)
    assert state_of(postgresql.judge(DATABASE, 2), f"postgresql.{check}") is State.OK
    assert state_of(postgresql.judge(report, 2), f"postgresql.{check}") is state


def test_slow_databases_and_wrong_clocks() -> None:
    report = replace(DATABASE, round_trip_ms=20.0, clock_ahead_ms=90_000.0)
    found = list(postgresql.judge(report, 2))
    assert state_of(found, "postgresql.latency") is State.WARN
    assert state_of(found, "postgresql.clock") is State.WARN


def record(number: int, at_once: int, set_by: str) -> PolicyRecord:
    plain = to_plain(PoolPolicy({"kind:text_only": at_once}))
    created_at = datetime.now(UTC) - timedelta(minutes=number)
    return PolicyRecord(number, "deployment", digest(plain), plain, set_by, "", created_at)


def test_policies_and_processes_of_a_pool() -> None:
    def found(snapshot: Snapshot, *records: PolicyRecord) -> dict[str, State]:
        judged = deployment.judge_pool("gemini", POLICY, snapshot, records)
        return {one.check.rpartition(".")[2]: one.state for one in judged}

    assert set(found(SOUND, record(3, 5, "a")).values()) == {State.OK}
    assert found(SOUND, record(4, 5, "a"))["policy"] is State.WARN, "not the one in force"
    fight = (record(3, 5, "api-a-1"), record(2, 6, "api-b-1"), record(1, 7, "api-a-1"))
    assert found(SOUND, *fight)["policy"] is State.FAIL
    stuck = SessionView("s", "worker-a-1-0123abcd", 900, 1, True)
    assert found(replace(SOUND, processes=(stuck,)))["processes"] is State.WARN
    assert found(replace(SOUND, recovering_ms=900))["processes"] is State.WARN


def test_what_tenants_were_given_is_as_the_settings_say() -> None:
    def found(in_force: PoolPolicy, asked: PoolPolicy) -> Finding:
        plain = to_plain(in_force)
        one = PolicyRecord(
            3, "deployment", digest(to_plain(asked)), plain, "ann", "", datetime.now(UTC)
        )
        return next(deployment.judge_pool("gemini", POLICY, SOUND, [one]))

    given = PoolPolicy({"kind:text_only": 5, "tenant:acme": 5}, weights={"acme": 4})
    assert found(given, POLICY).state is State.OK
    assert "tenants were given" in found(given, POLICY).found
    assert found(given, given).state is State.WARN, "by a file that these settings do not have"
    assert found(PoolPolicy({"kind:text_only": 9, "tenant:acme": 5}), POLICY).state is State.WARN


def test_what_was_set_live_is_no_fault_until_the_settings_change() -> None:
    now = datetime.now(UTC)

    def found(*records: tuple[str, int]) -> Finding:
        """Of revisions by origin and bound, the newest first."""
        history = []
        for place, (origin, at_once) in enumerate(records):
            plain = to_plain(PoolPolicy({"kind:text_only": at_once}))
            number = 3 - place
            history.append(PolicyRecord(number, origin, digest(plain), plain, "ann", "", now))
        return next(deployment.judge_pool("gemini", POLICY, SOUND, history))

    intended = found(("live", 9), ("deployment", 5))
    assert intended.state is State.OK
    assert "set live by ann" in intended.found
    assert (
        "limits set --deployed --pool gemini returns to the settings: limits.kind:text_only: 9 -> 5"
        in intended.found
    )
    ignored = found(("live", 9), ("deployment", 4))
    assert ignored.state is State.WARN
    assert "the settings were changed since" in ignored.found
    assert "limits set --deployed --pool gemini puts the settings in force" in ignored.fix
    assert found(("deployment", 9), ("deployment", 5)).state is State.WARN


def test_two_machines_must_share_what_they_store() -> None:
    config = load({}, None)
    names = ("api-one-17-0123abcd", "worker-two-b-8-0123abcd")
    views = tuple(SessionView(name, name, 900, 0, False) for name in names)
    both = {"gemini": replace(SOUND, processes=views)}
    assert deployment.hosts_of(both["gemini"]) == {"one", "two-b"}
    assert deployment.judge_blobs(config, both).state is State.WARN
    assert deployment.judge_blobs(load({"BLOB_URL": "s3://b"}, None), both).state is State.OK
    alone = {"gemini": replace(SOUND, processes=views[:1])}
    assert deployment.judge_blobs(config, alone).state is State.OK


def test_access_by_address_and_keys() -> None:
    open_to_all = {"HOST": "0.0.0.0", "TIDEGATE_DEMO": "1"}
    cases: list[tuple[dict[str, str], bool | None, State]] = [
        ({}, False, State.OK),
        (open_to_all, False, State.FAIL),
        (open_to_all, True, State.OK),
        (open_to_all, None, State.SKIPPED),
        (open_to_all | {"AUTH": "off"}, False, State.WARN),
    ]
    for settings, any_key, state in cases:
        found = deployment.judge_access(load(settings, None), any_key)
        assert state_of(found, "access.keys") is state, settings
    assert (
        state_of(deployment.judge_settings(load(open_to_all, None)), "settings.demo") is State.WARN
    )
    private = {"WEBHOOK_SECRET": "whsec_" + "A" * 32, "WEBHOOK_ALLOW_PRIVATE": "1"}
    found = deployment.judge_settings(load(private, None))
    assert state_of(found, "settings.webhooks") is State.WARN


def test_a_name_that_is_nearly_a_setting_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not [one for one in deployment.judge_settings(load()) if one.check == "settings.names"]
    monkeypatch.setenv("GEMINI_KEY", "k")
    (found,) = [one for one in deployment.judge_settings(load()) if one.check == "settings.names"]
    assert (found.state, "is GEMINI_API_KEY meant?" in found.found) == (State.WARN, True)


def test_keys_that_nobody_is_known_to_have_made_are_named() -> None:
    config = load({}, None)
    key = Key(
        prefix="abcdefghij",
        tenant_id="default",
        name="",
        scopes=(Scope.ADMIN,),
        created_at=datetime.now(UTC),
        expires_at=None,
        revoked_at=None,
        last_used_at=None,
        made_by=None,
    )
    for keys, state in ((None, State.SKIPPED), ([], State.OK), ([key], State.WARN)):
        found = list(deployment.judge_access(config, True, keys))
        assert state_of(found, "access.key_makers") is state
    (told,) = [one for one in found if one.check == "access.key_makers"]
    assert "abcdefghij (admin)" in told.found
    assert "tidegate keys revoke" in told.fix


def test_the_operators_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    config = load({"DATA_DIR": str(tmp_path)}, None)

    def state() -> State:
        return state_of(deployment.judge_access(config, True, []), "access.operator_key")

    assert state() is State.OK
    assert not key_file(config).exists()
    key = operator_key(config).get_secret_value()
    assert state() is State.OK
    key_file(config).chmod(0o644)
    assert state() is State.WARN
    key_file(config).write_text("no key")
    assert state() is State.FAIL
    given = load({"ADMIN_TOKEN": key}, None)
    assert state_of(deployment.judge_access(given, True, []), "access.operator_key") is State.OK


def test_folders_that_may_not_be_written_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    (data / "blobs").mkdir(parents=True)
    (data / "blobs").chmod(0o755)
    config = load({"DATA_DIR": str(data), "PORT": "0"}, None)
    assert state_of(machine.examine_machine(config), "files.data_dir") is State.WARN
    (data / "blobs").chmod(0o500)
    was = os.geteuid()
    if was == 0:
        tmp_path.chmod(0o755)
        data.chmod(0o755)
        os.seteuid(65_534)
    try:
        found = list(machine.examine_machine(config))
    finally:
        os.seteuid(was)
    assert state_of(found, "files.data_dir") is State.FAIL
    monkeypatch.setattr(machine, "_LITTLE_BYTES", 10**18)
    assert state_of(machine.examine_machine(config), "files.disk") is State.WARN


def test_old_and_missing_packages_and_few_descriptors_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load({"PORT": "0"}, None)
    monkeypatch.setattr(
        "tidegate.doctor.checks.metadata.requires",
        lambda _: ["rich>=999; extra == 'gateway'", "no-such-thing>=1", "other>=1; extra == 'x'"],
    )
    (found,) = [one for one in machine.examine_machine(config) if one.check == "machine.packages"]
    assert found.state is State.FAIL
    assert "no-such-thing is missing, rich " in found.found
    assert "other" not in found.found
    monkeypatch.setattr(machine, "_FEW_FILES", 10**9)
    assert state_of(machine.examine_machine(config), "machine.descriptors") is State.WARN


def test_calls_that_give_way_at_a_hosted_provider_are_named() -> None:
    def at(name: str, url: str, preempt: Preempt | None = None) -> Upstream:
        return Upstream(name, {"openai": url}, "k", preempt=preempt)

    hosted, own = "https://api.openai.com/v1", "http://gpu-1:8000/v1"
    assert list(deployment.judge_preempt([at("a", hosted), at("b", own)])) == []
    (found,) = deployment.judge_preempt([at("a", hosted), at("b", own, Preempt())])
    assert found.state is State.OK
    assert "b" in found.found
    both = [at("a", hosted, Preempt()), at("b", own, Preempt())]
    (found,) = deployment.judge_preempt(both)
    assert found.state is State.WARN
    assert "providers: a;" in found.found
    (found,) = deployment.judge_preempt(both, "a")
    assert found.state is State.OK


@pytest.mark.parametrize(
    ("limits", "load", "state", "said"),
    [
        ({"pool:total": 4}, ServerLoad(1, 0, 4), State.OK, "1 of 4 at work, 0 waiting"),
        ({"pool:total": 8}, ServerLoad(1, 0, 4), State.WARN, "limit is 8, and it computes 4"),
        ({}, ServerLoad(1, 0, 4), State.WARN, "no limit on all of its calls"),
        (
            {"pool:total": Concurrency(8, adaptive=Adaptive(2))},
            ServerLoad(1, 0, 4),
            State.OK,
            "1 of 4",
        ),
        ({"pool:total": 4}, ServerLoad(4, 3, 4), State.WARN, "3 waiting: these wait there"),
        ({"pool:total": 4}, ServerLoad(4, 0, None, 16_000), State.OK, '"tif:total" = 16000'),
        ({"pool:total": 4}, ServerLoad(), State.SKIPPED, "neither"),
    ],
)
def test_the_limit_of_a_server_of_ones_own_is_compared_with_what_it_says(
    limits: dict[str, Any], load: ServerLoad, state: State, said: str
) -> None:
    found = deployment.judge_server("gpu", PoolPolicy(limits), load)
    assert (found.check, found.state) == ("server.gpu", state)
    assert said in found.found


def used(model: str, *, requests: int = 5, unpriced: int = 0, day: date | None = None) -> Total:
    counts: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {"requests": requests, "unpriced": unpriced}
    return Total(tenant=None, model=model, day=day, **counts)


def test_models_without_a_price_and_prices_read_long_ago_are_named() -> None:
    upstream = Upstream(
        "openai", {"openai": "https://api.openai.com/v1"}, "k", prices={"own-*": Price(input=1)}
    )
    day = date(2026, 12, 1)

    def judged(*called: Total, today: date = day) -> dict[str, Finding]:
        return {one.check: one for one in deployment.judge_prices([upstream], called, today)}

    found = judged(used("gpt-6.2-sol"), used("own-model"), used(""))
    assert {one.state for one in found.values()} == {State.OK}
    found = judged(used("gpt-6.2-sol"), used("gpt-99", unpriced=3))
    assert found["prices.models"].state is State.WARN
    assert "gpt-99 (3 calls at openai)" in found["prices.models"].found
    other = replace(upstream, name="other", prices={"gpt-99": Price(input=1)})
    first, *_ = deployment.judge_prices([upstream, other], [used("gpt-99", unpriced=3)], day)
    assert "gpt-99 (3 calls at openai)" in first.found, "the other one's price is stated"
    # A price that was stated since then has ended them.
    days = (used("gpt-99", unpriced=n, day=date(2026, 11, n)) for n in (3, 9, 4))
    found = judged(*days, used("gpt-99", day=date(2026, 11, 30)))
    assert "gpt-99 (16 calls at openai, last on 2026-11-09)" in found["prices.models"].found
    found = judged(used("gpt-6.2-sol"), today=date(2027, 6, 1))
    assert found["prices.age"].state is State.WARN
    assert "gpt-6.2-sol (2026-11-18)" in found["prices.age"].found
    emulator = Upstream(
        "gemini", {"gemini": "http://127.0.0.1:9"}, "", models=("gemini-*", "gpt-99")
    )
    real = replace(upstream, models=("gpt-*",))
    made_up = [used("gemini-9", unpriced=2), used("gpt-99", unpriced=3)]
    for one, state in ((made_up[0], State.OK), (made_up[1], State.WARN)):
        both = list(deployment.judge_prices([real, emulator], [one], day, "gemini"))
        assert state_of(both, "prices.models") is state, "the other serves it too"
    alone = list(deployment.judge_prices([emulator], made_up, day, "gemini"))
    assert state_of(alone, "prices.models") is State.OK
    assert (
        state_of(deployment.judge_prices([emulator], made_up, day), "prices.models") is State.WARN
    )
    many = judged(*(used(f"gpt-{n}", unpriced=1) for n in range(100, 112)))
    assert "and 2 more" in many["prices.models"].found


def test_jobs_that_no_worker_begins_are_a_failure() -> None:
    api, worker = UpstreamProcess("api-1", "api"), UpstreamProcess("worker-1", "worker")
    idle = deployment.judge_workers([api], 0)
    assert (idle.state, idle.found) == ("ok", "none runs, and no job is ready to begin")
    assert deployment.judge_workers([api, worker], 7).found == "1 runs"
    stuck = deployment.judge_workers([api], 3)
    assert (stuck.state, stuck.found) == ("fail", "no worker runs or answers: 3 jobs can't begin")


def test_a_tidegate_that_does_not_answer_is_no_other_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "ANSWER_S", 0.01)
    code = (
        "import socket, sys; taken = socket.create_server(('127.0.0.1', 0)); "
        "print(taken.getsockname()[1], flush=True); sys.stdin.read()"
    )
    for words, said, fix in (
        (("tidegate", "up"), "a Tidegate listens there and does not answer", "restart it"),
        (("nginx",), "is in use by another program", "stop that program, or set PORT"),
    ):
        command = [sys.executable, "-c", code, *words]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            config = load({"PORT": other.stdout.readline().decode().strip()}, None)
            found = machine.port(config)
            other.kill()
        assert found.state == "fail"
        assert said in found.found
        assert f"pid {other.pid}" in found.found
        assert fix in found.fix
