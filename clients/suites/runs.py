"""Runs of an SDK's own tests, directly and through a gateway, and how they differ.

A suite is what one SDK needs for that: its tests, an environment for them, a mock of the API, and
the policy of a gateway in front of the mock.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen
from xml.etree import ElementTree

from bench.environments import CACHE, run

READY_WITHIN_S = 60
LONGEST_RUN_S = 3_600
_KEPT = ("PATH", "LANG", "HOME")
# What both SDKs' tests run on, pinned: a report names what it was made with.
PYTEST = ("pytest==9.2.0", "pytest-asyncio==1.5.0", "pytest-xdist==3.8.0", "pytest-timeout==2.4.0")
_POLICY = """
[upstreams.{name}]
provider = "{name}"
dialects = {{ {name} = "{mock}" }}
key = "MOCK_KEY"
models = ["*"]
adopt = "default"
passthrough = [{passthrough}]
"""


class SuiteFailed(Exception):
    """The tests could not be run; the message has the last of what was written."""


def policy_of(name: str, passthrough: Sequence[str], mock: str) -> str:
    """The policy of a gateway in front of a mock: what it does not know by itself, it relays."""
    named = ", ".join(f'"{one}"' for one in passthrough)
    return _POLICY.format(name=name, mock=mock, passthrough=named)


@dataclass(frozen=True, slots=True)
class Suite:
    """One SDK's tests.

    folder: from where they are run. python: the interpreter that has what they need. tests: files
    and folders below `folder`. environment: what their run needs, beside `url_variable`, which
    names the API. options: of pytest. ignored: what is left out. mock: the API's, while it is open,
    and its URL. policy: of a gateway in front of a mock. below: what the base URL at the gateway
    has behind its host. reasons: why tests may fail through it, by a pattern of their names. bar:
    the least share that has to pass. least: how many tests have to pass directly, so that a mock
    that answers wrong is seen.
    """

    name: str
    version: str
    folder: Path
    python: Path
    tests: tuple[str, ...]
    url_variable: str
    mock: Callable[[], AbstractContextManager[str]]
    policy: Callable[[str], str]
    below: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ("--timeout=60",)
    ignored: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    bar: float = 1.0
    least: int = 1

    def reason(self, test: str) -> str:
        """Why a test may fail through the gateway; empty where nobody knows."""
        found = (why for pattern, why in self.reasons.items() if re.search(pattern, test))
        return next(found, "")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one test: `passed`, `failed` or `skipped`. said: how it failed, in a line."""

    status: str
    said: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What passes directly, and what becomes of it through the gateway."""

    suite: Suite
    direct: Mapping[str, Outcome]
    through: Mapping[str, Outcome]

    @property
    def counted(self) -> list[str]:
        return [name for name, one in self.direct.items() if one.status == "passed"]

    @property
    def lost(self) -> dict[str, Outcome]:
        """Tests that pass directly, and not through the gateway."""
        missing = Outcome("failed", "it was not run")
        found = {name: self.through.get(name, missing) for name in self.counted}
        return {name: one for name, one in found.items() if one.status != "passed"}

    @property
    def share(self) -> float:
        return 1 - len(self.lost) / len(self.counted) if self.counted else 0.0

    @property
    def is_good(self) -> bool:
        """Whether enough passes, and each of the rest has a reason."""
        if len(self.counted) < self.suite.least or self.share < self.suite.bar:
            return False
        return all(map(self.suite.reason, self.lost))

    def lines(self) -> Iterator[str]:
        """A table by resource, and each test that is lost."""
        direct, lost = Counter(map(resource_of, self.counted)), self.lost
        of_lost = Counter(map(resource_of, lost))
        yield f"{self.suite.name} {self.suite.version}"
        yield f"{'resource':<36} {'direct':>7} {'through':>8}"
        for resource, count in sorted(direct.items()):
            yield f"{resource:<36} {count:>7} {count - of_lost[resource]:>8}"
        whole = len(self.counted)
        yield f"{'all':<36} {whole:>7} {whole - len(lost):>8}  {self.share:.2%}"
        if lost:
            yield ""
        for name, one in sorted(lost.items()):
            yield f"{name}: {self.suite.reason(name) or 'NO REASON KNOWN'}: {one.said}"

        others = Counter(one.status for one in self.direct.values())
        yield ""
        yield (
            f"not counted: {others['failed']} that fail on the mock directly, "
            f"{others['skipped']} that are skipped"
        )

    def json(self) -> dict[str, Any]:
        lost = {
            name: {"reason": self.suite.reason(name), "said": one.said}
            for name, one in sorted(self.lost.items())
        }
        return {
            "suite": self.suite.name,
            "version": self.suite.version,
            "direct": len(self.counted),
            "failed_directly": sum(one.status == "failed" for one in self.direct.values()),
            "through": len(self.counted) - len(lost),
            "share": round(self.share, 4),
            "lost": lost,
        }


def compare(
    suite: Suite,
    gateway: Callable[[str], AbstractContextManager[str]],
    folder: Path,
    only: Sequence[str] = (),
    processes: int = 2,
) -> Comparison:
    """Run the tests twice. `gateway` opens one under a policy, and gives its URL; `folder` takes
    the reports. Raises SuiteFailed."""
    with suite.mock() as mock:
        direct = outcomes(suite, mock, folder / "direct", only, processes)
        with gateway(suite.policy(mock)) as url:
            through = outcomes(suite, f"{url}{suite.below}", folder / "through", only, processes)
    return Comparison(suite, direct, through)


def outcomes(
    suite: Suite, url: str, folder: Path, only: Sequence[str], processes: int
) -> dict[str, Outcome]:
    """What becomes of each test, by its name, with the API at a URL. Raises SuiteFailed."""
    folder.mkdir()
    report = folder / "report.xml"
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    options = ["-q", "-n", str(processes), "-p", "no:cacheprovider", "--tb=line"]
    options += [
        *suite.options,
        f"--junitxml={report}",
        *(f"--ignore={one}" for one in suite.ignored),
    ]
    with (folder / "log").open("wb") as log:
        done = subprocess.run(
            [suite.python, "-m", "pytest", *options, *(only or suite.tests)],
            cwd=suite.folder,
            env=kept | dict(suite.environment) | {suite.url_variable: url},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
            timeout=LONGEST_RUN_S,
        )
    if done.returncode not in (0, 1) or not report.exists():
        last = (folder / "log").read_text(encoding="utf-8", errors="replace")[-1_000:]
        raise SuiteFailed(f"pytest ended with {done.returncode}: {last}")
    return read_report(report)


def read_report(path: Path) -> dict[str, Outcome]:
    """The outcomes in a report in JUnit's form, as pytest writes it."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        status, said = "passed", ""
        for mark in case:
            if mark.tag in ("failure", "error"):
                status = "failed"
                said = (mark.get("message") or "").strip().partition("\n")[0][:300]
            elif mark.tag == "skipped":
                status = "skipped"
        found[name] = Outcome(status, said)
    return found


_RESOURCE = re.compile(r"tests\.api_resources\.(?P<path>(?:\w+\.)*?)test_(?P<name>\w+)\.")


def resource_of(test: str) -> str:
    """Which resource of the API a test is about, such as `chat/completions`."""
    found = _RESOURCE.search(test)
    return test if found is None else f"{found['path'].replace('.', '/')}{found['name']}"


def sources_of(package: str, version: str) -> Path:
    """The source distribution of an SDK, with its tests, unpacked. Raises EnvironmentMissing."""
    folder = CACHE / f"suite-{package}-sdk"
    found = folder / f"{package}-{version}"
    if not (found / "tests").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        only = ("--no-deps", "--no-binary", package, "--quiet", "--dest", str(folder))
        run([sys.executable, "-m", "pip", "download", *only, f"{package}=={version}"], folder)
        with tarfile.open(folder / f"{package}-{version}.tar.gz") as packed:
            packed.extractall(folder, filter="data")
    return found


@contextmanager
def served(command: Sequence[str | Path], health: str, log: Path) -> Iterator[None]:
    """A server, while it is open, from when its health URL answers on. Raises SuiteFailed."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent
        )
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while not _answers(health):
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(encoding="utf-8", errors="replace")[-1_000:]
                raise SuiteFailed(f"{command[0]} does not serve {health}: {last}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def write_json(comparison: Comparison, path: Path) -> None:
    path.write_text(json.dumps(comparison.json(), indent=1) + "\n", encoding="utf-8")
