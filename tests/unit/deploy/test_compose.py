"""compose.yaml, as Compose itself reads it, and the balancer's file as HAProxy does."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.deploy.deployment import DEPLOY, ROOT, as_config, output, seconds
from tidegate.settings import Config


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a copy of the folder comes to, with secrets made by its own script."""
    root = tmp_path_factory.mktemp("compose")
    shutil.copytree(DEPLOY, root / "deploy")
    shutil.copy(ROOT / "tidegate.example.toml", root)
    output(root / "deploy/compose/secrets.sh", env={**os.environ, "OPENAI_API_KEY": "sk-mine"})
    secrets = [one for one in (root / "deploy/compose/secrets").rglob("*") if one.is_file()]
    before = {path: path.read_text() for path in secrets}
    output(root / "deploy/compose/secrets.sh", env=dict(os.environ))
    assert {path: path.read_text() for path in before} == before, "what is there stays"
    assert len(before) == 8
    assert (root / "deploy/compose/secrets").stat().st_mode & 0o777 == 0o700
    command = ("docker-compose", "-f", root / "deploy/compose.yaml", "--profile", "*", "config")
    found: dict[str, Any] = json.loads(output(*command, "--format", "json"))
    for secret in found["secrets"].values():
        assert Path(secret["file"]).read_text(), "every secret is there"
    for config in found["configs"].values():
        assert Path(config["file"]).is_file()
    return found


def _ours(composed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: one for name, one in composed["services"].items() if one["image"] == "tidegate:latest"
    }


def _settings(service: dict[str, Any]) -> dict[str, str]:
    """Those that are the same whoever the provider is."""
    return {k: v for k, v in service["environment"].items() if k != "OPENAI_API_KEY_FILE"}


def test_every_service_is_closed_and_bounded(composed: dict[str, Any]) -> None:
    assert set(composed["services"]) == {
        *("balancer", "api-1", "api-2", "worker", "migrate", "prune", "export", "valkey"),
        *("postgres", "prometheus", "grafana"),
    }
    for name, one in composed["services"].items():
        assert one["read_only"] is True, name
        assert one["cap_drop"] == ["ALL"]
        assert one["security_opt"] == ["no-new-privileges:true"]
        assert one["user"] not in ("", "root", "0")
        assert {"cpus", "memory"} <= set(one["deploy"]["resources"]["limits"])
        assert "healthcheck" in one, name
    worker = composed["services"]["worker"]
    probe = f"http://127.0.0.1:{worker['environment']['WORKER_PORT']}/health/ready"
    assert probe in worker["healthcheck"]["test"][-1]


def test_only_the_balancer_has_a_port_and_the_stores_no_way_out(composed: dict[str, Any]) -> None:
    with_ports = {name for name, one in composed["services"].items() if one.get("ports")}
    assert with_ports == {"balancer", "grafana"}
    (port,) = composed["services"]["grafana"]["ports"]
    assert port["host_ip"] == "127.0.0.1"
    assert composed["networks"]["inside"]["internal"] is True
    for name in ("valkey", "postgres", "prometheus"):
        assert set(composed["services"][name]["networks"]) == {"inside"}


def test_the_settings_are_ours_and_secrets_are_files(
    composed: dict[str, Any], tmp_path: Path
) -> None:
    for name, one in _ours(composed).items():
        settings, key = _settings(one), one["environment"]["OPENAI_API_KEY_FILE"]
        config = as_config(settings, tmp_path, ROOT / "tidegate.example.toml")
        assert not config.migrate_at_start
        (folder,) = [volume for volume in one["volumes"] if volume["type"] == "bind"]
        assert folder["read_only"], name
        assert (Path(folder["source"]) / Path(key).name).read_text() == "sk-mine"
        assert str(Path(key).parent) == folder["target"]
        mounted = {f"/run/secrets/{secret['source']}" for secret in one["secrets"]}
        files = {value for key, value in settings.items() if key.endswith("_FILE")}
        assert files == mounted, name


def test_a_container_is_drained_before_it_is_killed(
    composed: dict[str, Any], tmp_path: Path
) -> None:
    for one in _ours(composed).values():
        config = as_config(_settings(one), tmp_path, ROOT / "tidegate.example.toml")
        drain_s = (config.leave_ms + config.shutdown_grace_ms) / 1000
        minutes = re.fullmatch(r"(?:(\d+)m)?(\d+)s", one["stop_grace_period"])
        assert minutes is not None
        assert drain_s + 10 <= int(minutes[1] or 0) * 60 + int(minutes[2])


def test_the_balancer_notices_a_leaving_process_before_it_ends(
    composed: dict[str, Any], tmp_path: Path
) -> None:
    file = DEPLOY / "haproxy/haproxy.cfg"
    balancer = composed["services"]["balancer"]
    env = {**os.environ, "LISTEN": "127.0.0.1:1", "API_1": "127.0.0.1:2", "API_2": "127.0.0.1:3"}
    assert set(balancer["environment"]) == {"LISTEN", "API_1", "API_2"}
    for name in ("API_1", "API_2"):
        assert balancer["environment"][name].partition(":")[0] in _ours(composed)
    output("haproxy", "-c", "-f", file, env={**env, "PATH": f"{env['PATH']}:/usr/sbin"})
    found = re.search(r"inter (\S+) fastinter \S+ fall (\d+)", file.read_text())
    assert found is not None
    settings = _settings(_ours(composed)["api-1"])
    config = as_config(settings, tmp_path, ROOT / "tidegate.example.toml")
    assert seconds(found[1]) * int(found[2]) * 2 <= config.leave_ms / 1000


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("haproxy/haproxy.cfg", r"timeout server (\S+)"),
        ("nginx/tidegate.conf", r"proxy_read_timeout (\S+);"),
    ],
)
def test_no_balancer_ends_a_call_that_may_still_begin_its_answer(file: str, said: str) -> None:
    found = re.search(said, (DEPLOY / file).read_text())
    assert found is not None
    usual = Config.model_fields
    longest_ms = usual["first_byte_timeout_ms"].default + usual["stream_wait_ms"].default
    assert seconds(found[1]) * 1000 >= longest_ms


def test_valkey_evicts_nothing(composed: dict[str, Any]) -> None:
    (script,) = [word for word in composed["services"]["valkey"]["command"] if "\n" in word]
    assert "maxmemory-policy noeviction" in script


def test_monitoring_comes_by_its_profile_and_scrapes_every_process(
    composed: dict[str, Any], tmp_path: Path
) -> None:
    services = composed["services"]
    by_profile = {name for name, one in services.items() if one.get("profiles") == ["monitoring"]}
    assert by_profile == {"prometheus", "grafana"}
    files = {
        config["target"]: Path(composed["configs"][config["source"]]["file"])
        for name in by_profile
        for config in services[name]["configs"]
    }
    scrapes = yaml.safe_load(files["/etc/prometheus/prometheus.yml"].read_text())
    assert scrapes["rule_files"] == ["/etc/prometheus/alerts.yml"]
    (job,) = scrapes["scrape_configs"]
    assert job["job_name"] == "tidegate", "the alerts expect it"
    (hosts,) = [one["targets"] for one in job["static_configs"]]
    ports = {"api-1": "8000", "api-2": "8000", "worker": _worker_port(composed)}
    assert hosts == [f"{host}:{port}" for host, port in ports.items()]
    token = job["authorization"]["credentials_file"]
    assert token in {f"/run/secrets/{one['source']}" for one in services["prometheus"]["secrets"]}
    (tmp_path / "alerts.yml").write_text(files["/etc/prometheus/alerts.yml"].read_text())
    checked = scrapes | {"rule_files": [str(tmp_path / "alerts.yml")]}
    job["authorization"]["credentials_file"] = composed["secrets"]["admin_token"]["file"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(checked))
    output("promtool", "check", "config", tmp_path / "prometheus.yml")
    (source,) = yaml.safe_load(
        files["/etc/grafana/provisioning/datasources/tidegate.yml"].read_text()
    )["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (board,) = yaml.safe_load(
        files["/etc/grafana/provisioning/dashboards/tidegate.yml"].read_text()
    )["providers"]
    assert f"{board['options']['path']}/tidegate.json" in files


def _worker_port(composed: dict[str, Any]) -> str:
    port: str = composed["services"]["worker"]["environment"]["WORKER_PORT"]
    return port
