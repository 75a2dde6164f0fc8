"""How the code looks, as far as it can be counted.

Each rule lists who breaks it; each exception has its reason, and goes when it is no longer needed.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.unit.trees import nodes, parsed

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "chaos", "bench", "clients", "scripts")
CODE = {".py", ".lua", ".sql", ".sh", ".zsh", ".js", ".mjs", ".css", ".html"}
NOT_OURS = ("static/vendor",)
MOST_LINES = 900
MOST_LINES_OF_A_FUNCTION = 60
BANNED_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical"}
BROAD = {"Exception", "BaseException"}
LARGE = {"anthropic"}  # of thousands of modules
SKIPS = {"skip", "skipif", "xfail", "importorskip"}
UNDONE_WORDS = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")
LEFT_UNDONE = re.compile(rf"\b(?:{'|'.join(UNDONE_WORDS)})\b")
MACHINE_FOLDERS = ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/Us" + "ers/")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)/")
BANNER = re.compile(r"^\s*(?:#|--|//|/\*)\s*[-=#*~_+]{3,}")
MAYBE_BANNER = re.compile(r"(?:#|--|//|/\*)\s*[-=#*~_+]{3,}")

EXCEPTIONS: dict[str, dict[str, str]] = {
    "long_files": {},
    "skipped_tests": {
        "tests/integration/spine/test_ways.py": "Python 3.11 has no sys.monitoring to trace with",
        "tests/integration/native/test_event_loop.py": "Python 3.11 has no sys.monitoring",
    },
    "sleeping_tests": {
        "tests/waiting.py": "the one place that polls: everybody else waits by it",
    },
}


@cache
def files() -> tuple[Path, ...]:
    return tuple(
        sorted(
            path
            for folder in FOLDERS
            for path in (ROOT / folder).rglob("*")
            if path.suffix in CODE
            and path.is_file()
            and not any(part in path.as_posix() for part in NOT_OURS)
        )
    )


def python(*folders: str, words: Iterable[str] = ("",)) -> Iterator[tuple[Path, ast.Module]]:
    """Those that hold any of the words, which the others are not parsed for."""
    for path in files():
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders:
            text = path.read_text(encoding="utf-8")
            if any(word in text for word in words):
                yield path, parsed(path)


def long_files() -> Iterator[tuple[Path, str]]:
    for path in files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines >= MOST_LINES:
            yield path, f"{lines} lines"


def long_functions() -> Iterator[tuple[Path, str]]:
    for path, _ in python("src"):
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines >= MOST_LINES_OF_A_FUNCTION:
                    yield path, f"{node.name} has {lines} lines"


def names_that_say_nothing() -> Iterator[tuple[Path, str]]:
    for path in files():
        named = {path.stem, *path.relative_to(ROOT).parts[:-1]}
        words = {word for name in named for word in name.lower().split("_")}
        if words & BANNED_NAMES:
            yield path, "name the one noun that it holds"


def banners() -> Iterator[tuple[Path, str]]:
    for path in files():
        # A comment in Python is found by its tokens, where a line may have one.
        if not MAYBE_BANNER.search(path.read_text(encoding="utf-8")):
            continue
        for number, line in comments(path):
            if BANNER.match(line):
                yield path, f"line {number}: {line.strip()}"


def comments(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), start=1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def modules_without_a_docstring() -> Iterator[tuple[Path, str]]:
    for path, tree in python("src"):
        # An empty __init__.py only makes its folder a package.
        if tree.body and not ast.get_docstring(tree):
            yield path, "say what it owns, and its invariant"


def sleeping_tests() -> Iterator[tuple[Path, str]]:
    for path, _ in python("tests", words=("sleep",)):
        for node in nodes(path):
            if isinstance(node, ast.Call) and called(node) == "sleep":
                waits = node.args[0] if node.args else None
                if not (isinstance(waits, ast.Constant) and waits.value == 0):
                    yield path, f"line {node.lineno} sleeps: wait for a condition"


def large_imports_of_tests() -> Iterator[tuple[Path, str]]:
    """A module of tests is imported by each process of a run, whichever tests it takes."""
    for path, tree in python("tests", words=LARGE):
        for node in tree.body:
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.partition(".")[0] in LARGE for name in names):
                yield path, f"line {node.lineno}: import it in the test"


def skipped_tests() -> Iterator[tuple[Path, str]]:
    for path, _ in python("tests", "chaos", words=SKIPS):
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and node.attr in SKIPS:
                yield path, f"line {node.lineno}: missing means failed"


def left_undone() -> Iterator[tuple[Path, str]]:
    for path in files():
        yield from lines_with(LEFT_UNDONE, UNDONE_WORDS, path)


def lines_with(
    pattern: re.Pattern[str], words: Iterable[str], path: Path
) -> Iterator[tuple[Path, str]]:
    """Each line that the pattern matches, of a file that has one of the words."""
    text = path.read_text(encoding="utf-8")
    if any(word in text for word in words):
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                yield path, f"line {number}: {line.strip()}"


def machine_paths() -> Iterator[tuple[Path, str]]:
    documents = [ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
    for path in (*files(), *documents, *(ROOT / "docs").rglob("*.md")):
        yield from lines_with(MACHINE_PATH, MACHINE_FOLDERS, path)


def log_events_spelled_outside_telemetry() -> Iterator[tuple[Path, str]]:
    # Libraries for others too: they may not import telemetry.
    libraries = {ROOT / "src/tidegate/limiter", ROOT / "src/tidegate/integrations"}
    for path, _ in python("src", words=LOG_METHODS):
        if libraries & set(path.parents):
            continue
        for node in nodes(path):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LOG_METHODS
                and "log" in ast.unparse(node.func.value).lower()
                and node.args
                and isinstance(node.args[0], ast.Constant | ast.JoinedStr)
            ):
                yield path, f"line {node.lineno}: use a member of telemetry.Log"


def broad_excepts_without_a_reason() -> Iterator[tuple[Path, str]]:
    for path, _ in python("src", words=BROAD):
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in nodes(path):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.walk(node.type) if node.type is not None else ()
            if node.type is None or any(isinstance(n, ast.Name) and n.id in BROAD for n in caught):
                beside, below = lines[node.lineno - 1 : node.lineno + 1]
                if "#" not in beside and not below.lstrip().startswith("#"):
                    yield path, f"line {node.lineno}: say in a comment why, or narrow it"


def raises_in_except_star() -> Iterator[tuple[Path, str]]:
    """Python 3.11 wraps what is raised there in an ExceptionGroup, which no caller expects."""
    for path, _ in python("src", words=("except*",)):
        for node in nodes(path):
            if isinstance(node, ast.TryStar):
                raised = (each for one in node.handlers for each in ast.walk(one))
                if any(isinstance(each, ast.Raise) for each in raised):
                    yield path, f"line {node.lineno}: catch the ExceptionGroup and split it"


def called(node: ast.Call) -> str:
    """The last word of what is called: `sleep` for `asyncio.sleep(1)` and for `sleep(1)`."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


RULES: list[Callable[[], Iterator[tuple[Path, str]]]] = [
    long_files,
    long_functions,
    names_that_say_nothing,
    banners,
    modules_without_a_docstring,
    sleeping_tests,
    large_imports_of_tests,
    skipped_tests,
    left_undone,
    machine_paths,
    log_events_spelled_outside_telemetry,
    broad_excepts_without_a_reason,
    raises_in_except_star,
]


@cache
def broken(rule: Callable[[], Iterator[tuple[Path, str]]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, what in rule():
        found.setdefault(path.relative_to(ROOT).as_posix(), []).append(what)
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_nobody_breaks_the_rule_but_its_exceptions(
    rule: Callable[[], Iterator[tuple[Path, str]]],
) -> None:
    excepted = EXCEPTIONS.get(rule.__name__, {})
    offenders = {path: what for path, what in broken(rule).items() if path not in excepted}
    assert offenders == {}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_exception_is_still_needed_and_has_a_reason(
    rule: Callable[[], Iterator[tuple[Path, str]]],
) -> None:
    excepted = EXCEPTIONS.get(rule.__name__, {})
    assert set(excepted) <= set(broken(rule))
    assert all(len(reason.split()) > 3 for reason in excepted.values())


def test_exceptions_are_those_of_known_rules() -> None:
    assert set(EXCEPTIONS) <= {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(
    ("pattern", "seen", "passed"),
    [
        (
            BANNER,
            ["# ----", "  # === Limits", "-- ======", "// ****"],
            ["# - a list", "-- name: x"],
        ),
        (
            MACHINE_PATH,
            ["cd /" + "work/main", "at /" + "root/x", "/home" + "/me/x", "/Users" + "/me/x"],
            ["under a 0700 home", "src/work/x.py", "https://host/homework/"],
        ),
        (LEFT_UNDONE, ["# TO" + "DO: later", "FIX" + "ME"], ["todo list", "a hackathon"]),
    ],
)
def test_the_patterns_see_what_they_are_for(
    pattern: re.Pattern[str], seen: list[str], passed: list[str]
) -> None:
    assert all(pattern.search(line) for line in seen)
    assert not any(pattern.search(line) for line in passed)
