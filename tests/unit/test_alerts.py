"""Alerts, dashboard and their documents hold together, as Prometheus itself reads them.

What the metrics are called is compared with a real scrape in `integration/observability`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.markdown import ROOT, anchors, blocks, text_of
from tidegate.metrics.instruments import ALL, Spec
from tidegate.telemetry.logging import Log

ALERTS = ROOT / "deploy/prometheus/alerts.yml"
TESTS = ROOT / "deploy/prometheus/alerts.test.yml"
BOARD = ROOT / "deploy/grafana/tidegate.json"
_METRIC = re.compile(r"\b((?:tidegate|gen_ai)[a-z_]*_[a-z_]+)\b(?!:)(?:\{([^}]*)\})?")
_LABELS = {label for one in ALL for label in one.labels}
_OF_PROMETHEUS = {"instance", "job", "le"}


def promtool(*arguments: str | Path, cwd: Path | None = None) -> None:
    # Collecting what each of its many evaluations leaves is a third of what it costs.
    env = {**os.environ, "GOGC": "400", "GOMAXPROCS": "1"}
    done = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def rules() -> list[str]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def of_the_board() -> list[str]:
    panels = json.loads(BOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def known() -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for one in ALL:
        ends = ("_bucket", "_sum", "_count") if one.sort == "histogram" else ("",)
        found |= {one.name + end: one for end in ends}
    return found


@pytest.mark.slow
def test_promtool_takes_the_alerts_and_each_fires_when_it_should() -> None:
    promtool("check", "rules", ALERTS)
    promtool("test", "rules", TESTS.name, cwd=TESTS.parent)


def test_each_alert_is_tested_both_ways() -> None:
    tests = yaml.safe_load(TESTS.read_text())["tests"]
    quiet: set[str] = set()
    fired: set[str] = set()
    for case in (one for test in tests for one in test["alert_rule_test"]):
        (fired if case["exp_alerts"] else quiet).add(case["alertname"])
    assert quiet == fired == set(alerts())


def test_promtool_takes_all_that_the_dashboard_asks(tmp_path: Path) -> None:
    asked = [
        {"record": f"asked:{number}", "expr": _filled_in(expr)}
        for number, expr in enumerate(of_the_board())
    ]
    assert len(asked) > 40
    path = tmp_path / "asked.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": asked}]}))
    promtool("check", "rules", path)


def _filled_in(expr: str) -> str:
    return expr.replace("$__rate_interval", "5m").replace("$pool", ".*")


@pytest.mark.parametrize("expr", [*rules(), *of_the_board()])
def test_what_is_asked_for_is_there_with_its_labels(expr: str) -> None:
    metrics = known()
    asked = [found for found in _METRIC.findall(expr) if found[0] not in _LABELS]
    recorded = set(re.findall(r"tidegate:\w+(?::\w+)?", ALERTS.read_text()))
    assert asked or set(re.findall(r"tidegate:\w+(?::\w+)?", expr)) & recorded or "up{" in expr
    labels: set[str] = set()
    for name, matchers in asked:
        assert name in metrics, name
        own = set(metrics[name].labels)
        labels |= own
        assert set(re.findall(r"(\w+)\s*(?:=|!)", matchers)) <= own | _OF_PROMETHEUS, expr
    if asked:
        apart = re.findall(r"\bby \(([^)]*)\)", expr)
        by = {label.strip() for one in apart for label in one.split(",")}
        assert by <= labels | _OF_PROMETHEUS, expr


def test_each_alert_has_its_entry_in_the_runbook_and_each_entry_its_alert() -> None:
    entries = re.findall(r"^## (\w+)$", text_of("docs/runbook.md"), re.MULTILINE)
    assert entries == list(alerts())
    for name, rule in alerts().items():
        document, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert anchor in anchors(document), name
        assert rule["labels"]["severity"] in ("critical", "warning")
        body = text_of("docs/runbook.md").partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert "**Meaning**" in body
        assert "**Diagnosis" in body
        assert "Fix**" in body or "fix**" in body


def test_the_scrape_that_is_shown_is_one_that_prometheus_takes(tmp_path: Path) -> None:
    (block,) = [one for one in blocks("docs/observability.md") if one.language == "yaml"]
    token = tmp_path / "token"
    token.write_text("of-the-operator-alone")
    (tmp_path / "alerts.yml").write_bytes(ALERTS.read_bytes())
    config = block.text.replace("/etc/prometheus/tidegate-key", str(token))
    path = tmp_path / "prometheus.yml"
    path.write_text(config)
    promtool("check", "config", path)


def test_every_event_of_the_log_is_told() -> None:
    told = set(re.findall(r"`([a-z_]+)`", text_of("docs/observability.md")))
    assert {one.value for one in Log} - told == set()
