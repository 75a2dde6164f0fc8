"""`make audit` and what it may be trusted for: the lock file, and the licences of what it pins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    *("Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT-0", "PSF-2.0"),
}
# Allowed beside those, each for its reason.
EXCEPTIONS = {
    "certifi": ("MPL-2.0", "a list of certificates, used as it comes"),
    "python-dateutil": ("Dual License", "Apache-2.0 or BSD-3-Clause, as one chooses"),
    "orjson": ("MPL-2.0", "binds changes of its own files alone, and we change none"),
}
# What distributions write that name no licence by its identifier.
SPELLED = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License": "ISC",
    "MIT License": "MIT",
}
# One that stands for pip-audit: what it says of the known bad release, and of all the others.
STAND_IN = """
import json, sys
path = sys.argv[sys.argv.index("-r") + 1]
pinned = open(path).read()
if "requests==2.19.0" in pinned:
    {canary}
assert "fastapi==" in pinned and "--hash=sha256:" in pinned and "pytest==" in pinned
{verdict}
"""
KNOWS = 'print(json.dumps({"dependencies": [{"name": "requests", "vulns": ["x"]}]})); sys.exit(1)'
FORGETFUL = 'print(json.dumps({"dependencies": [{"name": "requests", "vulns": []}]})); sys.exit(0)'
CUT_OFF = 'sys.exit("ConnectionError: no route to the database")'


def audited(folder: Path, canary: str, verdict: str) -> subprocess.CompletedProcess[str]:
    stand_in = folder / "pip_audit.py"
    stand_in.write_text(STAND_IN.replace("{canary}", canary).replace("{verdict}", verdict))
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "audit.py")],
        env={**os.environ, "PIP_AUDIT": f"{sys.executable} {stand_in}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("canary", "why"),
    [(FORGETFUL, "no record even of requests==2.19.0"), (CUT_OFF, "no route to the database")],
    ids=["forgetful", "cut off"],
)
def test_a_database_out_of_reach_is_no_pass(tmp_path: Path, canary: str, why: str) -> None:
    done = audited(tmp_path, canary, "sys.exit(0)")
    assert done.returncode == 3
    assert "NOT AUDITED: the advisory database was not reached" in done.stdout
    assert why in done.stdout


@pytest.mark.parametrize(("verdict", "code"), [("print('none')", 0), ("sys.exit('bad')", 1)])
def test_all_that_is_pinned_is_asked_for(tmp_path: Path, verdict: str, code: int) -> None:
    assert audited(tmp_path, KNOWS, verdict).returncode == code


def test_everything_in_the_lock_is_pinned_by_hash() -> None:
    packages = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    assert len(packages) > 80
    for package in packages:
        if package["source"] == {"editable": "."}:
            continue
        files = [*package.get("wheels", []), *filter(None, [package.get("sdist")])]
        assert files, package["name"]
        assert all(file["hash"].startswith("sha256:") for file in files), package["name"]


def runtime() -> list[PackageMetadata]:
    """Of each distribution that the product runs with, as far as it is for this platform."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        if (name := re.match(r"[\w.-]+(?===)", line)) is not None:
            try:
                found.append(metadata(name[0]))
            except PackageNotFoundError:
                assert ";" in line, f"{line} is not installed"
    return found


def licences_of(told: PackageMetadata) -> set[str]:
    """Identifiers, from the expression where there is one, else from the older fields."""
    if expression := told.get_all("License-Expression"):
        return set(re.findall(r"[\w.+-]+", expression[0])) - {"AND", "OR", "WITH"}
    text = (told.get_all("License") or [""])[0].strip()
    classes = [line.split(" :: ")[-1] for line in told.get_all("Classifier", [])]
    names = [text] if text and len(text) < 40 else []
    names += [] if names else [one for one in classes if "License" in one or "MPL" in one]
    words = [word for name in names for word in re.split(r" OR | AND ", name)]
    return {SPELLED.get(word, word) for word in words}


def test_licences_of_the_runtime_are_allowed() -> None:
    all_of_it = runtime()
    assert len(all_of_it) > 50
    excepted = set()
    for told in all_of_it:
        name, licences = told["Name"], licences_of(told)
        assert licences, f"{name} names no licence"
        if others := licences - ALLOWED:
            assert others == {EXCEPTIONS.get(name, ("", ""))[0]}, f"{name}: {others}"
            excepted.add(name)
    assert excepted == set(EXCEPTIONS), "an exception that is needed no more goes"
