"""The map of the code, docs/code.md: its head by hand, its tables from the modules' docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src/tidegate"
HEAD = Path(__file__).with_name("code_head.md")
_DOCSTRING = re.compile(r'(?:\s|#.*\n)*[rR]?"""(?:[^"\\]|\\.|"(?!""))*"""', re.DOTALL)
FOLDERS = (
    *("cli", "doctor", "verify", "supervisor", "", "dashboard", "http", "http/admin"),
    *("http/anthropic", "http/realtime", "jobs", "metrics", "realtime", "spine", "rehearse"),
    *("upstream", "dialects", "admission", "policy", "integrations", "limiter", "limiter/model"),
    *("store", "store/provider", "emulator", "emulator/fronts", "embedded"),
    *("classify", "telemetry", "prices"),
)


def code_document() -> str:
    """The whole text of docs/code.md."""
    text = HEAD.read_text(encoding="utf-8").rstrip() + "\n"
    for folder in FOLDERS:
        modules = list(_modules(folder))
        title = f"`{folder}/`" if folder else "`src/tidegate/`"
        package = SOURCE / folder / "__init__.py"
        said = f": {first_line(package)}" if folder and package.exists() else ""
        text += f"\n### {title}\n"
        text += f"\n{said.removeprefix(': ')}\n" if said else ""
        text += "\n| module | holds |\n|---|---|\n"
        for path in modules:
            name = path.relative_to(SOURCE / folder).as_posix()
            text += f"| `{name}` | {first_line(path)} |\n"
    return text


def shown() -> set[Path]:
    """All modules that the document has."""
    return {path for folder in FOLDERS for path in _modules(folder)}


def _modules(folder: str) -> Iterator[Path]:
    for path in sorted((SOURCE / folder).glob("*.py")):
        if path.name != "__init__.py" or not folder:
            yield path


def first_line(path: Path) -> str:
    """What a module holds, as its docstring begins. Only the docstring is parsed."""
    docstring = _DOCSTRING.match(path.read_text(encoding="utf-8"))
    said = (ast.get_docstring(ast.parse(docstring[0])) if docstring else None) or ""
    return said.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
