"""The Helm chart: the same objects as kustomize makes, Kubernetes' own schemas, and its values."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.unit.deploy.chart import CHART, rendered, values
from tests.unit.deploy.deployment import DEPLOY, as_config, output

pytestmark = pytest.mark.slow

_KUSTOMIZE = DEPLOY / "kubernetes"
_VERSIONS = ("1.30.0", "1.37.0")
_DIGEST = re.compile(r"(tidegate-(?:policy|settings))-[a-z0-9]{10}")
_FREE = ("settings", "resources", "annotations", "podLabels")  # whose keys are the user's
_OF_OPERATORS = ("ServiceMonitor", "PodMonitor", "ScaledObject")

_ROLE = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/tidegate"}
_EGRESS: list[dict[str, Any]] = [
    {"ports": [{"port": 8000, "protocol": "TCP"}]},
    {
        "to": [{"ipBlock": {"cidr": "169.254.170.23/32"}}],
        "ports": [{"port": 80, "protocol": "TCP"}],
    },
]
_OF_A_CLOUD: dict[str, Any] = {
    "serviceAccount": {"annotations": _ROLE},
    "podLabels": {"azure.workload.identity/use": "true"},
    "environmentSecretName": "bucket",
    "networkPolicy": {"egress": _EGRESS},
    "export": {"enabled": True},
}


def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"]["name"]): one for one in objects}


def without(value: Any, *keys: str) -> Any:
    """Less what only one of the two writes: namespaces, digests, and the number of a revision."""
    if isinstance(value, dict):
        return {name: without(one, *keys) for name, one in value.items() if name not in keys}
    if isinstance(value, list):
        return [without(one, *keys) for one in value]
    if isinstance(value, str):
        return _DIGEST.sub(r"\1", value.replace("tidegate-migrate-1", "tidegate-migrate"))
    return value


def same(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    kept = [one for one in objects if one["kind"] != "Namespace"]
    for one in kept:
        if one["kind"] == "ConfigMap":  # compared by what it says
            files = [name for name in one["data"] if name.endswith(".toml")]
            one["data"] |= {name: without_comments(one["data"][name]) for name in files}
        if one["kind"] in _OF_OPERATORS:  # a component's get no labels of the base
            one["metadata"].pop("labels", None)
    return by_name(without(kept, "namespace", "annotations"))


def without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line and not line.startswith("#"))


@pytest.mark.parametrize("monitored", [False, True])
def test_the_chart_and_kustomize_make_the_same(monitored: bool, tmp_path: Any) -> None:
    (tmp_path / "kubernetes").symlink_to(_KUSTOMIZE)
    (tmp_path / "overlay").mkdir()
    components = "../kubernetes/components"
    overlay = {
        "resources": ["../kubernetes"],
        "components": [
            f"{components}/{name}" for name in ("monitoring", "scale-on-work", "export")
        ],
    }
    (tmp_path / "overlay/kustomization.yaml").write_text(yaml.safe_dump(overlay))
    folder = tmp_path / "overlay" if monitored else _KUSTOMIZE
    wanted = same([*yaml.safe_load_all(output("kustomize", "build", folder))])
    scaling, export = {"adapter": monitored}, {"enabled": monitored}
    made = same(rendered(monitoring=monitored, scaleOnWork=scaling, export=export))
    assert made.keys() == wanted.keys()
    for name, one in wanted.items():
        assert made[name] == one, name


@pytest.mark.parametrize("version", _VERSIONS)
@pytest.mark.parametrize(
    "over",
    [
        *({}, {"scaleOnWork": {"adapter": True}}, {"monitoring": True}),
        {"export": {"enabled": True}},
        _OF_A_CLOUD,
    ],
)
def test_every_object_is_sound(version: str, over: dict[str, Any]) -> None:
    for one in rendered(**over):
        if one["kind"] not in _OF_OPERATORS:
            kubernetes_validate.validate(one, version, strict=True)


def test_the_settings_are_ours_and_the_policy_is_sound(tmp_path: Any) -> None:
    (tmp_path / "tidegate.toml").write_text(values()["policy"])
    config = as_config(values()["settings"], tmp_path, tmp_path / "tidegate.toml")
    assert config.requires_keys


def test_a_setting_that_is_given_as_a_number_is_text_to_kubernetes() -> None:
    """As `--set settings.LEAVE_MS=3000` gives it."""
    given = {"LEAVE_MS": 3_000_000, "RELAY_BODIES": True, "PORT": 8000, "LOG_LEVEL": 'a"b: \\'}
    made = by_name(rendered(settings=given))
    settings = made["ConfigMap", "tidegate-settings"]
    kubernetes_validate.validate(settings, _VERSIONS[0], strict=True)
    said = {name: settings["data"][name] for name in given}
    assert said == {
        "LEAVE_MS": "3000000",
        "RELAY_BODIES": "true",
        "PORT": "8000",
        "LOG_LEVEL": 'a"b: \\',
    }


def test_a_release_of_another_name_stands_beside_the_first() -> None:
    first, second = by_name(rendered()), by_name(rendered("llm"))
    assert not first.keys() & second.keys()
    for one in second.values():
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "llm"
    said = yaml.safe_dump([*second.values()])
    left = set(re.findall(r"\btidegate[\w-]*", said))
    assert left == {"tidegate", "tidegate-blobs"}, "a label, the program and a bucket"


@pytest.mark.parametrize("release", ["tidegate", "llm"])
def test_every_pod_is_scraped_by_the_job_that_the_alerts_expect(release: str) -> None:
    made = by_name(rendered(release, monitoring=True))
    worker = made["Deployment", f"{release}-worker"]["spec"]["template"]["metadata"]["labels"]
    service = made["Service", release]["metadata"]["labels"]
    # Prometheus' operator reads the name of the job from this label of the pod or the service.
    of_worker = made["PodMonitor", f"{release}-worker"]["spec"].get("jobLabel")
    of_api = made["ServiceMonitor", release]["spec"].get("jobLabel")
    assert (worker.get(of_worker), service.get(of_api)) == ("tidegate", "tidegate")
    alerts = (DEPLOY / "prometheus/alerts.yml").read_text()
    assert set(re.findall(r'up\{job="(.*?)"\}', alerts)) == {"tidegate"}


def test_keda_takes_the_place_of_the_autoscalers() -> None:
    kinds = [one["kind"] for one in rendered(scaleOnWork={"keda": True})]
    assert "HorizontalPodAutoscaler" not in kinds
    assert kinds.count("ScaledObject") == 2
    made = by_name(rendered(scaleOnWork={"keda": True, "permitsPerPod": 50}))
    api = made["ScaledObject", "tidegate-api"]["spec"]
    assert api["scaleTargetRef"]["name"] == "tidegate-api"
    assert ("Deployment", "tidegate-api") in made
    by_cpu, by_work = api["triggers"]
    assert (by_cpu["type"], by_cpu["metadata"]) == ("cpu", {"value": "70"})
    assert by_work["metadata"]["threshold"] == "50"
    query = 'sum(tidegate_permits_held{namespace="tidegate", pod=~"tidegate-api-.*"})'
    assert by_work["metadata"]["query"] == query


def test_a_change_of_settings_or_policy_rolls_the_pods() -> None:
    def sums(**over: Any) -> dict[str, str]:
        pod = by_name(rendered(**over))["Deployment", "tidegate-api"]["spec"]["template"]
        found: dict[str, str] = pod["metadata"]["annotations"]
        return found

    before = sums()
    assert sums() == before
    assert sums(settings={"LEAVE_MS": "4000"})["checksum/settings"] != before["checksum/settings"]
    assert sums(policy="[limits]\n")["checksum/policy"] != before["checksum/policy"]


def test_pods_get_a_role_of_their_cloud_and_keys_from_a_secret() -> None:
    made = rendered(**_OF_A_CLOUD)
    (account,) = [one for one in made if one["kind"] == "ServiceAccount"]
    assert account["metadata"]["annotations"] == _ROLE
    specs = [one["spec"] for one in made if one["kind"] in ("Deployment", "Job", "CronJob")]
    pods = [one.get("jobTemplate", {"spec": one})["spec"]["template"] for one in specs]
    assert len(pods) == 5
    for pod in pods:
        assert pod["metadata"]["labels"]["azure.workload.identity/use"] == "true"
        (container,) = pod["spec"]["containers"]
        assert {"secretRef": {"name": "bucket"}} in container["envFrom"]


def test_rules_of_ones_own_open_more_ports() -> None:
    (usual,) = [one for one in rendered() if one["kind"] == "NetworkPolicy"]
    (wider,) = [one for one in rendered(**_OF_A_CLOUD) if one["kind"] == "NetworkPolicy"]
    assert wider["spec"]["egress"] == [*usual["spec"]["egress"], *_EGRESS]


def test_the_ports_of_pods_are_those_of_the_settings() -> None:
    made = by_name(rendered(settings={"PORT": "9000", "WORKER_PORT": "9001"}))
    for part, port in (("api", 9000), ("worker", 9001)):
        (container,) = made["Deployment", f"tidegate-{part}"]["spec"]["template"]["spec"][
            "containers"
        ]
        assert [one["containerPort"] for one in container["ports"]] == [port]


def test_every_value_is_used_and_has_a_comment_or_speaks_for_itself() -> None:
    templates = "".join(one.read_text() for one in (CHART / "templates").glob("*.yaml"))

    def leaves(at: dict[str, Any], path: str) -> list[str]:
        return [
            one
            for name, value in at.items()
            for one in (
                leaves(value, f"{path}.{name}")
                if isinstance(value, dict) and name not in _FREE
                else [f"{path}.{name}"]
            )
        ]

    unused = [one for one in leaves(values(), ".Values") if one not in templates]
    assert unused == []
    # Ports of pods are settings too.
    named = {
        ".Values.settings" if one.startswith(".Values.settings.") else one
        for one in re.findall(r"\.Values[.\w]+", templates)
    }
    assert named == set(leaves(values(), ".Values"))


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    said = f'version = "{chart["version"]}"'
    assert said in (DEPLOY.parent / "pyproject.toml").read_text()
    assert values()["image"]["tag"] == chart["appVersion"] == chart["version"]
