"""The manifests, as kustomize makes them: Kubernetes' own schemas, and what they promise."""

from __future__ import annotations

from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.markdown import blocks
from tests.unit.deploy.deployment import DEPLOY, as_config, output
from tidegate.http import server as watched

_FOLDER = DEPLOY / "kubernetes"
_VERSIONS = ("1.30.0", "1.37.0")  # the oldest and the newest that are checked


@cache
def _made(overlay: Path = _FOLDER) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(output("kustomize", "build", overlay)))


def _of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in _made() if one["kind"] == kind}


def _pods() -> dict[str, dict[str, Any]]:
    """Every pod's spec, by the name of what makes it."""
    found = {name: one["spec"]["template"] for name, one in _of_kind("Deployment").items()}
    found |= {name: one["spec"]["template"] for name, one in _of_kind("Job").items()}
    for name, one in _of_kind("CronJob").items():
        found[name] = one["spec"]["jobTemplate"]["spec"]["template"]
    return found


def _settings() -> dict[str, str]:
    maps = _of_kind("ConfigMap")
    (name,) = [name for name in maps if name.startswith("tidegate-settings")]
    data: dict[str, str] = maps[name]["data"]
    return data


@pytest.mark.parametrize("version", _VERSIONS)
def test_every_manifest_is_sound(version: str) -> None:
    assert len(_made()) == 14
    for one in _made():
        kubernetes_validate.validate(one, version, strict=True)


def test_the_settings_are_ours_and_the_policy_is_sound(tmp_path: Path) -> None:
    config = as_config(_settings(), tmp_path, _FOLDER / "tidegate.toml")
    assert config.requires_keys
    assert config.blob_url.startswith("s3://"), "pods have no folder in common"
    assert not config.migrate_at_start, "the Job does it"


def test_a_pod_is_drained_before_it_is_killed(tmp_path: Path) -> None:
    config = as_config(_settings(), tmp_path, _FOLDER / "tidegate.toml")
    for name in ("tidegate-api", "tidegate-worker"):
        spec = _pods()[name]["spec"]
        (container,) = spec["containers"]
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        pre_stop_s = int(hook[1]) if hook else 0
        drain_s = (config.leave_ms + config.shutdown_grace_ms) / 1000
        assert pre_stop_s < drain_s
        assert pre_stop_s + drain_s + 10 <= spec["terminationGracePeriodSeconds"]
        assert bool(hook) == (name == "tidegate-api")


def test_every_pod_is_closed(tmp_path: Path) -> None:
    assert set(_pods()) == {"tidegate-api", "tidegate-worker", "tidegate-migrate", "tidegate-prune"}
    for pod in _pods().values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        mounted = {mount["mountPath"]: mount.get("readOnly") for mount in container["volumeMounts"]}
        assert {path for path, read_only in mounted.items() if not read_only} == {"/data", "/tmp"}
        assert not container.get("env"), "secrets are files, and all else is in the one map"


def test_probes_ask_what_they_should() -> None:
    for pod, name, setting in (("api", "http", "PORT"), ("worker", "watch", "WORKER_PORT")):
        (container,) = _pods()[f"tidegate-{pod}"]["spec"]["containers"]
        asked = {
            probe: container[f"{probe}Probe"]["httpGet"]
            for probe in ("liveness", "readiness", "startup")
        }
        assert asked == {
            "liveness": {"path": "/health/live", "port": name},
            "readiness": {"path": "/health/ready", "port": name},
            "startup": {"path": "/health/live", "port": name},
        }
        (port,) = container["ports"]
        assert (port["name"], str(port["containerPort"])) == (name, _settings()[setting])
    waits_s = container["readinessProbe"]["timeoutSeconds"]
    assert waits_s * 1000 > 2 * watched.DEADLINE_MS, "it hears which store is away"


def test_a_rollout_never_has_fewer_pods_and_they_are_spread() -> None:
    for name, one in _of_kind("Deployment").items():
        rolling = one["spec"]["strategy"]["rollingUpdate"]
        assert rolling == {"maxUnavailable": 0, "maxSurge": 1}, name
        assert "replicas" not in one["spec"], "how many there are is the scaler's to say"
        spread = one["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert [each["topologyKey"] for each in spread] == [
            "kubernetes.io/hostname",
            "topology.kubernetes.io/zone",
        ]
        assert _of_kind("PodDisruptionBudget")[name]["spec"]["maxUnavailable"] == 1


def test_scaling_is_by_processor_and_never_by_what_waits() -> None:
    for name, one in _of_kind("HorizontalPodAutoscaler").items():
        assert one["spec"]["scaleTargetRef"]["name"] == name
        assert one["spec"]["minReplicas"] >= 2
        assert [metric["type"] for metric in one["spec"]["metrics"]] == ["Resource"]


def test_the_overlay_of_the_document_fits_on_top(tmp_path: Path) -> None:
    """With all components: an image, another policy, another bucket."""
    (text,) = [block.text for block in blocks("docs/operating.md") if block.language == "yaml"]
    overlay = yaml.safe_load(text)
    (base,) = overlay["resources"]
    (tmp_path / "tidegate/deploy").mkdir(parents=True)
    (tmp_path / base.removeprefix("../")).symlink_to(_FOLDER)
    more = ("scale-on-work", "export")
    overlay["components"] += [f"{base}/components/{name}" for name in more]
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay/tidegate.toml").write_text('[limits]\n"kind:text_only" = 50\n')
    (tmp_path / "overlay/kustomization.yaml").write_text(yaml.safe_dump(overlay))
    made = _made(tmp_path / "overlay")
    for one in made:
        if one["kind"] == "NetworkPolicy":
            kubernetes_validate.validate(one, _VERSIONS[0], strict=True)
            assert one["spec"]["egress"][-1] == {"ports": [{"port": 8000, "protocol": "TCP"}]}
        if one["kind"] == "ServiceAccount":
            assert list(one["metadata"]["annotations"]) == ["eks.amazonaws.com/role-arn"]
        if one["kind"] == "HorizontalPodAutoscaler":
            kubernetes_validate.validate(one, _VERSIONS[0], strict=True)
            assert [metric["type"] for metric in one["spec"]["metrics"]] == ["Resource", "Pods"]
        if one["kind"] == "Deployment":
            (container,) = one["spec"]["template"]["spec"]["containers"]
            assert container["image"] == "registry.example/tidegate:0.1.0"
    jobs = {one["metadata"]["name"]: one for one in made if one["kind"] == "CronJob"}
    assert set(jobs) == {"tidegate-prune", "tidegate-export"}
    specs = [jobs[name]["spec"]["jobTemplate"]["spec"]["template"] for name in sorted(jobs)]
    export, prune = (one["spec"]["containers"][0] for one in specs)
    assert export["args"] == ["export", "record"]
    # The names of the maps with their digests, the overlay's image, and the network policy's label.
    assert {**export, "name": "prune", "args": ["prune"]} == prune
    assert specs[0]["metadata"]["labels"].keys() == specs[1]["metadata"]["labels"].keys()
    assert specs[0]["metadata"]["labels"]["app.kubernetes.io/name"] == "tidegate"
    (pods,) = [one for one in made if one["kind"] == "PodMonitor"]
    worker = _pods()["tidegate-worker"]
    assert pods["spec"]["selector"]["matchLabels"].items() <= worker["metadata"]["labels"].items()
    (endpoint,) = pods["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == worker["spec"]["containers"][0]["ports"][0]["name"]
    (monitor,) = [one for one in made if one["kind"] == "ServiceMonitor"]
    (service,) = [one for one in made if one["kind"] == "Service"]
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    found = (worker["metadata"]["labels"], service["metadata"]["labels"])
    jobs_scraped = [
        labels[one["spec"]["jobLabel"]] for one, labels in zip((pods, monitor), found, strict=True)
    ]
    assert jobs_scraped == ["tidegate"] * 2, "the alerts expect that job"
    (settings,) = [
        one["data"] for one in made if one["metadata"]["name"].startswith("tidegate-settings")
    ]
    assert settings["BLOB_URL"] == "s3://mine"
    assert settings["LEAVE_MS"] == _settings()["LEAVE_MS"], "merged, not replaced"


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",  # AWS, Google, Azure, Oracle and most others
        "169.254.170.2",  # AWS, of a container
        "168.63.129.16",  # Azure's host
        "100.100.100.200",  # Alibaba
        "192.0.0.192",  # Oracle's earlier one
        "fd00:ec2::254",  # AWS
        "fd20:ce::254",  # Google
    ],
)
def test_no_pod_reaches_what_tells_a_machine_its_clouds_secrets(address: str) -> None:
    (open_to,) = [
        rule["to"]
        for rule in _of_kind("NetworkPolicy")["tidegate"]["spec"]["egress"]
        if "to" in rule
    ]
    meant = ip_address(address)
    for block in (one["ipBlock"] for one in open_to):
        within = [ip_network(block["cidr"]), *map(ip_network, block["except"])]
        holds = [meant in network for network in within if network.version == meant.version]
        assert not holds or any(holds[1:])


def test_every_selector_finds_its_pods_and_no_others() -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in _pods().items()}

    def selected(selector: dict[str, str]) -> set[str]:
        return {name for name, has in labels.items() if selector.items() <= has.items()}

    assert selected(_of_kind("Service")["tidegate"]["spec"]["selector"]) == {"tidegate-api"}
    for name, one in (_of_kind("Deployment") | _of_kind("PodDisruptionBudget")).items():
        assert selected(one["spec"]["selector"]["matchLabels"]) == {name}
    policy = _of_kind("NetworkPolicy")["tidegate"]["spec"]
    assert selected(policy["podSelector"]["matchLabels"]) == set(labels)
    containers = [pod["spec"]["containers"][0] for pod in _pods().values()]
    opened = {port["name"] for one in containers for port in one.get("ports", ())}
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == opened


def test_every_name_that_a_pod_uses_is_there() -> None:
    maps = set(_of_kind("ConfigMap"))
    for pod in _pods().values():
        spec = pod["spec"]
        assert spec["serviceAccountName"] in _of_kind("ServiceAccount")
        used = {source["configMapRef"]["name"] for source in spec["containers"][0]["envFrom"]}
        for volume in spec["volumes"]:
            if "configMap" in volume:
                used.add(volume["configMap"]["name"])
            elif "secret" in volume:
                assert volume["secret"]["secretName"] == "tidegate"
        assert used <= maps
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == volumes
