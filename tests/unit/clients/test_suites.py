"""What the run of an SDK's own tests counts: what passes directly, and through the gateway too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from clients.suites import anthropic, openai
from clients.suites.runs import Comparison, Outcome, Suite, SuiteFailed, compare, served
from tidegate.dialects.spec import Dialect
from tidegate.policy.deployment import Deployment, Upstream
from tidegate.spine.routing import Targets

GATEWAY = Path(__file__).parents[3] / "docs" / "gateway.md"
TESTS = """import os
def test_good(): pass
def test_lost():
    assert os.environ["THE_URL"] == "http://mock"
def test_known():
    assert os.environ["THE_URL"] == "http://mock"
def test_mocks_own():
    assert False
"""


@contextmanager
def giving(url: str) -> Iterator[str]:
    yield url


def suite_in(folder: Path, **options: object) -> Suite:
    folder.mkdir(exist_ok=True)
    return Suite(
        name="one-sdk",
        version="1",
        folder=folder,
        python=Path(sys.executable),
        tests=("tests/api_resources",),
        url_variable="THE_URL",
        mock=lambda: giving("http://mock"),
        policy=lambda mock: f"to {mock}",
        environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # to import all takes half of the time
        options=("-p", "xdist"),
        **options,  # type: ignore[arg-type]
    )


def test_what_is_lost_on_the_way_is_counted_and_needs_a_reason(tmp_path: Path) -> None:
    tests = tmp_path / "sdk" / "tests" / "api_resources" / "chat"
    tests.mkdir(parents=True)
    (tests / "test_things.py").write_text(TESTS)
    (tmp_path / "sdk" / "pytest.ini").write_text("[pytest]\n")
    policies = []

    def gateway(policy: str) -> object:
        policies.append(policy)
        return giving("http://gateway")

    suite = suite_in(tmp_path / "sdk", below="/v1", reasons={"known": "by design"}, bar=0.3)
    found = compare(suite, gateway, tmp_path, processes=0)  # type: ignore[arg-type]
    assert policies == ["to http://mock"]
    assert {name.rpartition(".")[2] for name in found.lost} == {"test_lost", "test_known"}
    lines = list(found.lines())
    assert lines[2].split() == ["chat/things", "3", "1"]
    assert lines[3].split() == ["all", "3", "1", "33.33%"]
    assert "test_known: by design: AssertionError" in lines[5]
    assert "test_lost: NO REASON KNOWN: AssertionError" in lines[6]
    assert not found.is_good, "one has no reason"
    assert found.json()["lost"]["tests.api_resources.chat.test_things.test_known"]["reason"]


@pytest.mark.parametrize(
    ("through", "bar", "is_good"),
    [
        ({"a": "passed", "b": "passed"}, 1.0, True),
        ({"a": "passed", "b": "skipped"}, 0.5, True),
        ({"a": "passed"}, 0.5, True),
        ({"a": "passed"}, 0.6, False),
        ({"c": "passed"}, 0.5, False),
    ],
)
def test_a_test_that_is_not_run_through_the_gateway_has_not_passed(
    tmp_path: Path, through: dict[str, str], bar: float, is_good: bool
) -> None:
    direct = {"a": Outcome("passed"), "b": Outcome("passed"), "c": Outcome("failed")}
    suite = suite_in(tmp_path, reasons={"b": "known", "a": "known"}, bar=bar)
    seen = {name: Outcome(status) for name, status in through.items()}
    assert Comparison(suite, direct, seen).is_good is is_good


def test_a_mock_on_which_few_tests_pass_is_no_success(tmp_path: Path) -> None:
    both = {"a": Outcome("passed"), "b": Outcome("failed")}
    assert Comparison(suite_in(tmp_path, least=1), both, both).is_good
    few = Comparison(suite_in(tmp_path, least=2), both, both)
    assert not few.is_good
    assert [*few.lines()][-1].startswith("not counted: 1 that fail on the mock directly, 0 that")
    assert few.json()["failed_directly"] == 1


def test_nothing_that_passes_directly_is_no_success(tmp_path: Path) -> None:
    assert not Comparison(suite_in(tmp_path), {"a": Outcome("failed")}, {}).is_good


def test_a_mock_that_ends_is_told_with_what_it_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such file')"]
    with (
        pytest.raises(SuiteFailed, match="no such file"),
        served(command, "http://127.0.0.1:1/health", tmp_path / "log"),
    ):
        raise AssertionError("it does not serve")


@pytest.mark.parametrize("suite", [anthropic, openai])
def test_the_paths_that_a_suite_opens_are_those_of_the_documents(suite: ModuleType) -> None:
    account = Upstream("one", {"openai": "http://o/v1"}, "k", passthrough=suite.PASSTHROUGH)
    found = Targets(Deployment((account,)))
    text = GATEWAY.read_text(encoding="utf-8")
    for pattern in suite.PASSTHROUGH:
        assert f'"{pattern}"' in text
        assert found.passthrough.endpoint(pattern.replace("*", "an-id"), Dialect.OPENAI) is not None


def test_the_mock_of_openai_s_specification_makes_its_objects_today() -> None:
    spec = """    Response:
      properties:
        created_at:
          type: number
          format: unixtime
          description: When it was created.
        created_at_text:
          type: string
"""
    changed = openai.made_at(spec, 1_800_000_000)
    assert changed.splitlines()[4:7] == [
        "          format: unixtime",
        "          minimum: 1800000000",
        "          maximum: 1800000001",
    ]
    assert changed.count("minimum") == 1
