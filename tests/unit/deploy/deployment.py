"""The files under `deploy/`, and what they set, as the product itself reads it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tidegate.policy.deployment import deployed, deployed_upstreams, emulates
from tidegate.settings import PROVIDER_KEYS, SECRETS, Config, load

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
# Variables of others that ours may stand beside.
_OF_OTHERS = {"AWS_REGION"}


def output(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    """What a command that must succeed has said."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
        env=env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def as_config(settings: Mapping[str, str], folder: Path, policy: Path) -> Config:
    """The configuration that these variables make, with secrets of ours; its policy is read too."""
    names = {field.upper() for field in Config.model_fields}
    unknown = {name for name in settings if name.removesuffix("_FILE") not in names | _OF_OTHERS}
    assert not unknown, "no setting of ours"
    values = {
        "DATABASE_URL": "postgresql://u:p@db/x",
        "REDIS_URL": "redis://:p@valkey",
        "ADMIN_TOKEN": "t" * 32,
    }
    assert set(values) <= set(SECRETS)
    assert not {f"{name}_FILE" for name in PROVIDER_KEYS} & settings.keys(), "none must be there"
    found = dict(settings) | {"OPENAI_API_KEY": "k"}
    for name, value in values.items():
        assert settings[f"{name}_FILE"].startswith("/"), f"{name} is a file"
        (folder / name).write_text(value)
        found[f"{name}_FILE"] = str(folder / name)
    config = load(found | {"TIDEGATE_POLICY": str(policy)}, dotenv=None)
    deployed(config)
    assert [one.name for one in deployed_upstreams(config).upstreams] == ["openai"]
    assert not config.embedded
    assert not emulates(config)
    return config


def seconds(text: str) -> float:
    """Of `75`, `75s`, `500ms` or `30min`."""
    found = re.fullmatch(r"(\d+)(ms|s|min|h)?", text)
    assert found is not None, text
    return int(found[1]) * {"ms": 0.001, "s": 1, None: 1, "min": 60, "h": 3600}[found[2]]
