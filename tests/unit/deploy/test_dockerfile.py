"""The image: small, without root, and built from what is pinned."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.unit.deploy.deployment import DEPLOY, ROOT, output

_FILE = DEPLOY / "Dockerfile"


def _instructions() -> list[tuple[str, str]]:
    """Each instruction with its words, comments and continuations undone."""
    lines = [line for line in _FILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.split("\n"))]


def _all(name: str) -> list[str]:
    return [rest for word, rest in _instructions() if word == name]


def test_hadolint_has_nothing_to_say() -> None:
    assert output(Path(sys.executable).with_name("hadolint"), _FILE) == ""


def test_everything_that_is_copied_is_there_and_is_sent_to_the_builder() -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for rest in _all("COPY"):
        if rest.startswith("--from"):
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in sent
    assert "*" in sent, "nothing else is sent: no data, no .env"


def test_the_image_has_no_servers_of_its_own_and_no_tools() -> None:
    syncs = [rest for rest in _all("RUN") if "/opt/tidegate uv sync" in rest.replace("  ", " ")]
    ours, demo = (sync.split("&&")[0] for sync in syncs)
    assert re.findall(r"--extra (\S+)", ours) == ["gateway", "otel"]
    for sync in (ours, demo):
        assert "--no-default-groups" in sync
        assert "--frozen" in sync


def test_the_servers_are_in_the_image_of_the_demonstration_alone() -> None:
    stages = re.split(r"^FROM ", _FILE.read_text(), flags=re.MULTILINE)[1:]
    named = {stage.partition("\n")[0].partition(" AS ")[2]: stage for stage in stages}
    assert [name for name, stage in named.items() if "--extra embedded" in stage] == ["build-demo"]
    assert [name for name, stage in named.items() if "build-demo " in stage] == ["demo"]
    assert "TIDEGATE_DEMO=1" in named["demo"]
    assert stages[-1].split() == ["service"], "which is built without a target"


def test_uv_is_the_one_that_bootstrap_uses_and_comes_by_hash() -> None:
    (version,) = re.findall(r"^UV_VERSION=(\S+)", (ROOT / "scripts/bootstrap.sh").read_text(), re.M)
    pinned = (DEPLOY / "uv.txt").read_text()
    assert pinned.startswith(f"uv=={version} ")
    assert pinned.count("--hash=sha256:") > 5
    assert any("--require-hashes" in rest for rest in _all("RUN"))


def test_it_runs_as_nobody_of_note_and_writes_to_two_folders() -> None:
    (user,) = _all("USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    (volumes,) = _all("VOLUME")
    assert json.loads(volumes) == ["/data", "/tmp"]
    (entry,) = _all("ENTRYPOINT")
    assert json.loads(entry) == ["tidegate"], "no shell between the engine's signals and us"
    assert _all("HEALTHCHECK")
