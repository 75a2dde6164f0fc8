"""The documents about the settings say what the settings say."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from dotenv import dotenv_values

from tidegate.settings import ALLOWED, SECTIONS, Config, load

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate_docs.py"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_documents_are_up_to_date(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out) == (0, "")


def test_an_error_that_comes_with_a_time_may_succeed_later(generator: ModuleType) -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| 50[34] \|.*\| (yes|no) \|$", generator.errors_reference(), re.M
    )
    assert len(rows) > 10
    assert [code for code, again in rows if again == "no"] == []
    too_early = re.findall(r"^\| `not_ended` .*\| (\w+) \|$", generator.errors_reference(), re.M)
    assert too_early == ["yes"]


def test_the_check_names_a_document_that_was_changed_by_hand(
    generator: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--check"])
    (tmp_path / "docs").mkdir()
    documents = generator.documents()
    monkeypatch.setattr(generator, "documents", lambda: documents)
    for path, text in documents.items():
        (tmp_path / path).write_text(text)
    assert (generator.main(), capsys.readouterr().out) == (0, "")
    changed = tmp_path / "docs" / "configuration.md"
    changed.write_text(changed.read_text().replace("8000", "9000"))
    (tmp_path / ".env.example").unlink()
    assert generator.main() == 1
    said = capsys.readouterr().out
    assert [line.partition(" is out of date")[0] for line in said.splitlines()] == [
        ".env.example",
        "docs/configuration.md",
    ]


def test_every_setting_is_in_both_documents() -> None:
    example = (ROOT / ".env.example").read_text()
    reference = (ROOT / "docs" / "configuration.md").read_text()
    for field in Config.model_fields:
        assert re.search(rf"^#{field.upper()}=", example, re.MULTILINE), field
        assert f"| `{field.upper()}` |" in reference


def test_the_example_with_its_lines_uncommented_is_the_default_configuration(
    tmp_path: Path,
) -> None:
    dotenv = tmp_path / ".env"
    example = (ROOT / ".env.example").read_text()
    dotenv.write_text(re.sub(r"^#([A-Z_]+=)", r"\1", example, flags=re.MULTILINE))
    assert len(dotenv_values(dotenv)) == len(Config.model_fields)
    assert load({}, dotenv) == load({}, None)


def test_the_tables_beside_the_fields_name_fields_only() -> None:
    assert set(SECTIONS) <= set(Config.model_fields)
    assert set(ALLOWED) <= set(Config.model_fields)
    assert next(iter(Config.model_fields)) in SECTIONS
