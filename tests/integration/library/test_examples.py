"""Every example of docs/library.md is run, and says what the document says that it says."""

from __future__ import annotations

import asyncio
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from tests.integration.library.upstream import Upstream
from tidegate.emulator.server import Emulator

DOCUMENT = Path(__file__).parents[3] / "docs" / "library.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Example:
    name: str
    code: str
    says: str | None


def examples() -> list[Example]:
    text = DOCUMENT.read_text(encoding="utf-8")
    found = []
    for block in _BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        heading = [*_HEADING.finditer(text, 0, block.start())][-1][1]
        found.append(Example(f"{heading}, line {line}", block[1], block[2]))
    return found


EXAMPLES = examples()
_POOL = re.compile(r'pool="([a-z0-9]+)"')


def run(example: Example) -> str:
    said = StringIO()
    with redirect_stdout(said):
        exec(compile(example.code, example.name, "exec"), {"__name__": "__main__"})
    return said.getvalue()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
async def test_an_example_runs_and_says_what_is_written(
    example: Example,
    valkey_url: str,
    pool: str,
    emulator: Emulator,
    upstream: Upstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    code = example.code
    for written, real in (
        ("redis://localhost:6379", valkey_url),
        ("https://generativelanguage.googleapis.com", emulator.url),
        ("https://api.openai.com", upstream.url),
    ):
        code = code.replace(written, real)
    code = _POOL.sub(f'pool="{pool}"', code)
    assert "https://" not in code
    said = await asyncio.to_thread(run, Example(example.name, code, None))
    assert said == (example.says or "")
    asked = (await emulator.control.stats())["text_only"].arrived + len(upstream.paths)
    assert bool(asked) == ("https://" in example.code)


def test_every_example_of_the_document_was_found() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(EXAMPLES) == text.count("```python") >= 12


def test_every_example_has_a_pool_of_its_own() -> None:
    """So that a reader can run one after another against one server."""
    pools = [pool for example in EXAMPLES for pool in sorted(set(_POOL.findall(example.code)))]
    assert len(pools) == len(set(pools)) == len(EXAMPLES)
