"""The systemd units, as systemd itself reads them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.unit.deploy.deployment import DEPLOY, ROOT, as_config, output, seconds
from tidegate.limiter import STALLED_S
from tidegate.supervisor.supervisor import daily_commands

_FOLDER = DEPLOY / "systemd"
_PROCESSES = (
    *("tidegate-api@1.service", "tidegate-worker@1.service"),
    *("tidegate-migrate.service", "tidegate-prune.service", "tidegate-export.service"),
)
_TIMERS = ("tidegate-prune.timer", "tidegate-export.timer")
_MOST_EXPOSED = 1.3  # of 10, as `systemd-analyze security` counts


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the units, whose program is one that is on this machine."""
    folder = tmp_path_factory.mktemp("systemd") / "system"
    shutil.copytree(_FOLDER, folder)
    for file in folder.glob("*.service"):
        file.write_text(file.read_text().replace("/opt/tidegate/bin/tidegate ", "/bin/true "))
    return folder


def _analysed(units: Path, *arguments: str) -> str:
    path = f"{units}:/usr/lib/systemd/system"
    return output("systemd-analyze", *arguments, env={**os.environ, "SYSTEMD_UNIT_PATH": path})


def _lines(file: Path) -> list[tuple[str, str]]:
    lines = [line for line in file.read_text().splitlines() if line and line[0] not in "#["]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def _environment(unit: str) -> dict[str, str]:
    own = _FOLDER / unit.replace("@1", "@")
    assigned = [
        *_lines(_FOLDER / "tidegate-.service.d/settings.conf"),
        *_lines(own),
    ]
    pairs = [pair for name, value in assigned if name == "Environment" for pair in value.split()]
    return {
        name: value.replace("%d", "/run/c") for name, _, value in (p.partition("=") for p in pairs)
    }


def test_systemd_finds_nothing_wrong(units: Path) -> None:
    others = ("tidegate.socket", "tidegate.target", *_TIMERS)
    paths = [str(units / name) for name in (*_PROCESSES, *others)]
    for template in ("api", "worker"):
        shutil.copy(
            units / f"tidegate-{template}@.service", units / f"tidegate-{template}@1.service"
        )
    assert _analysed(units, "verify", "--man=no", "--recursive-errors=no", *paths) == ""


@pytest.mark.parametrize("unit", _PROCESSES)
def test_a_process_can_reach_little_of_the_machine(unit: str, units: Path) -> None:
    shown = _analysed(units, "security", "--offline=yes", "--json=short", str(units / unit))
    exposed = sum(float(row["exposure"] or 0) for row in json.loads(shown))
    assert exposed <= _MOST_EXPOSED, [row for row in json.loads(shown) if row["exposure"]]


@pytest.mark.parametrize("unit", _PROCESSES)
def test_the_settings_are_ours(unit: str, tmp_path: Path) -> None:
    settings = _environment(unit)
    assert not as_config(settings, tmp_path, ROOT / "tidegate.example.toml").migrate_at_start
    shared = _lines(_FOLDER / "tidegate-.service.d/settings.conf")
    loaded = {value.partition(":")[0] for name, value in shared if name == "LoadCredential"}
    files = {Path(value).name for name, value in settings.items() if name.endswith("_FILE")}
    assert files == loaded


@pytest.mark.parametrize("unit", _PROCESSES[:2])
def test_a_process_is_drained_before_it_is_killed(unit: str, tmp_path: Path) -> None:
    config = as_config(_environment(unit), tmp_path, ROOT / "tidegate.example.toml")
    drain_s = (config.leave_ms + config.shutdown_grace_ms) / 1000
    stop_s = seconds(dict(_lines(_FOLDER / unit.replace("@1", "@")))["TimeoutStopSec"])
    assert drain_s + 10 <= stop_s


@pytest.mark.parametrize("unit", _PROCESSES[:2])
def test_a_loop_that_stands_still_is_ended_after_its_lease(unit: str) -> None:
    watchdog_s = seconds(dict(_lines(_FOLDER / unit.replace("@1", "@")))["WatchdogSec"])
    assert watchdog_s >= 2 * STALLED_S, "its permits and jobs are others' already"


def test_every_command_of_a_day_has_its_timer() -> None:
    commands = {
        dict(_lines(_FOLDER / name.replace("timer", "service")))["ExecStart"].partition(" ")[2]
        for name in _TIMERS
    }
    # Those of `tidegate up`, whose format of an export is a setting here too.
    found = daily_commands({"RECORD_EXPORT": "jsonl"})
    daily = {" ".join(command).partition(" --format")[0] for command in found}
    assert commands == daily == {"prune", "export record"}
    for name in _TIMERS:
        timer = dict(_lines(_FOLDER / name))
        assert (timer["Persistent"], timer["WantedBy"]) == ("true", "timers.target"), name


def test_the_api_gets_the_socket_that_stays_open() -> None:
    socket = dict(_lines(_FOLDER / "tidegate.socket"))
    api = dict(_lines(_FOLDER / "tidegate-api@.service"))
    assert api["Sockets"] == "tidegate.socket"
    assert api["ExecStart"].endswith("serve --fd 3"), "the first that systemd hands on"
    assert _environment("tidegate-api@1.service")["PORT"] == socket["ListenStream"]
    assert api["Type"] == dict(_lines(_FOLDER / "tidegate-worker@.service"))["Type"] == "notify"


def test_what_is_enabled_as_documented_starts_with_the_machine(tmp_path: Path) -> None:
    folder = tmp_path / "etc/systemd/system"
    shutil.copytree(_FOLDER, folder)
    document = (ROOT / "docs/operating.md").read_text()
    found = re.findall(r"systemctl enable --now ([^`#\n]+)", document)
    units = list(dict.fromkeys(" ".join(found).split()))
    assert "tidegate-worker@1" in units
    output("systemctl", f"--root={tmp_path}", "--quiet", "enable", *units)
    begun, names = set(), ["multi-user.target", "sockets.target", "timers.target"]
    for name in names:  # which grows
        begun.add(name)
        names += [one.name for one in folder.glob(f"{name}.wants/*") if one.name not in begun]
    assert {unit if "." in unit else f"{unit}.service" for unit in units} <= begun
