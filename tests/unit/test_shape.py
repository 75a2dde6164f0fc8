"""Shape of the code: rooms, modules, classes and calls.

What does not yet keep a rule stands in `shrinking.json`, which may only shrink: a new offender
fails, and so does an entry that is no longer needed. `python -m tests.unit.test_shape` writes it.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from scripts.near_duplicates import pairs
from tests.unit.prose import found
from tests.unit.trees import nodes, parsed

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/tidegate"
LISTS = Path(__file__).with_name("shrinking.json")
MOST_MODULES_OF_A_ROOM = 20
LEAST_LINES_OF_ONE_IMPORTER = 150
MOST_NEAR_DUPLICATES = 100
# What a module's first line does not begin with: it names what the module owns, or what it does.
NO_NOUN = re.compile(
    r"(?:what|who|how|where|when|why|whether|which|it|this|that|these|those|one|all|everything"
    r"|nothing|nobody|everybody|here|there|make|get|return|give|say|tell|let|do|to|so|as|if|for)\b",
    re.I,
)
FORBIDDEN = {
    "whoever": r"whoever",
    "those who": r"those who",
    "anew": r"anew",
    "mend": r"mend(?:s|ed|ing)?",
    "lest": r"lest",
    "let in": r"lets? (?:\w+ )?in|letting (?:\w+ )?in",
    "hand in": r"hand(?:s|ed|ing)? in",
    "hand back": r"hand(?:s|ed|ing)? (?:\w+ )?back",
    "heed": r"heed(?:s|ed|ing)?",
    "give back": r"giv(?:e|es|en|ing) (?:\w+ )?back|gave (?:\w+ )?back",
    "at once": r"at once",
    "is told": r"(?:is|are|was|were|be|been) told",
    "goes over to": r"go(?:es|ing)? over to|went over to",
    "stands in for": r"(?:stand|stands|stood|standing) in for",
}


def crowded_rooms() -> Iterator[str]:
    for folder in {path.parent for path in modules()}:
        count = sum(path.parent == folder for path in modules())
        if count > MOST_MODULES_OF_A_ROOM:
            yield folder.relative_to(SOURCE).as_posix()


def small_modules_of_one_importer() -> Iterator[str]:
    """Of less than 150 lines, and imported by one module only, of the same room. What holds
    private names of a package (`_compat.py`) is apart on purpose."""
    importers = importers_of()
    for path in modules():
        if path.name in ("__init__.py", "__main__.py", "_compat.py"):
            continue
        lines = len(path.read_text(encoding="utf-8").splitlines())
        users = importers[dotted(path)]
        if lines < LEAST_LINES_OF_ONE_IMPORTER and len(users) == 1:
            (user,) = users
            if user.parent == path.parent and user.name != "__init__.py":
                yield path.relative_to(SOURCE).as_posix()


def classes_of_one_name() -> Iterator[str]:
    names = Counter(
        node.name
        for path in modules()
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
    )
    yield from (name for name, count in names.items() if count > 1)


def modules_of_one_name() -> Iterator[str]:
    """Within a room with its folders."""
    names = Counter(
        f"{path.relative_to(SOURCE).parts[0]}/{path.stem}"
        for path in modules()
        if path.parent != SOURCE and path.stem not in ("__init__", "__main__")
    )
    yield from (name for name, count in names.items() if count > 1)


def classes_that_inherit() -> Iterator[str]:
    """From a class of ours that is neither an error nor a protocol."""
    for path in modules():
        if path.name == "__main__.py":
            continue  # importing it runs it
        module = import_module(dotted(path))
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == module.__name__ == dotted(path):
                if issubclass(value, BaseException):
                    continue
                ours = [base for base in value.__bases__ if base.__module__.startswith("tidegate.")]
                if not all(getattr(base, "_is_protocol", False) for base in ours):
                    yield f"{path.relative_to(SOURCE).as_posix()}: {name}"


def star_tuple_calls() -> Iterator[str]:
    for path in modules():
        for node in nodes(path):
            if isinstance(node, ast.Call) and any(
                isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple)
                for argument in node.args
            ):
                yield path.relative_to(SOURCE).as_posix()


def first_lines_without_a_noun() -> Iterator[str]:
    for path in modules():
        if NO_NOUN.match(ast.get_docstring(parsed(path)) or ""):
            yield path.relative_to(SOURCE).as_posix()


@cache
def forbidden_words() -> tuple[str, ...]:
    """As `file: words`, with the number of lines."""
    patterns = {words: _words(pattern) for words, pattern in FORBIDDEN.items()}
    counts: Counter[str] = Counter()
    for path, line in found(_words("|".join(FORBIDDEN.values()))):
        counts.update(f"{path}: {words}" for words, one in patterns.items() if one.search(line))
    return tuple(f"{name} x{count}" for name, count in counts.items())


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{pattern})\b", re.I)


Rule = Callable[[], Iterator[str]]
RULES: list[Rule] = [
    crowded_rooms,
    small_modules_of_one_importer,
    classes_of_one_name,
    modules_of_one_name,
    classes_that_inherit,
    star_tuple_calls,
    first_lines_without_a_noun,
]


@cache
def modules() -> tuple[Path, ...]:
    return tuple(sorted(SOURCE.rglob("*.py")))


def dotted(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported_by(path: Path) -> set[str]:
    """The modules that a module imports outside of its functions, for types too."""
    known = {dotted(one) for one in modules()} - {dotted(path)}
    found: set[str] = set()
    blocks: list[ast.AST] = [parsed(path)]
    while blocks:
        node = blocks.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names} & known
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            blocks += ast.iter_child_nodes(node)
    return found


@cache
def importers_of() -> dict[str, set[Path]]:
    """The modules that import each module, `TYPE_CHECKING` and functions included."""
    known = {dotted(path) for path in modules()}
    importers: dict[str, set[Path]] = defaultdict(set)
    for path in modules():
        for node in nodes(path):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in known else node.module for name in names]
            else:
                continue
            for name in known & set(names):
                importers[name].add(path)
    return importers


@cache
def listed() -> dict[str, list[str]]:
    lists: dict[str, list[str]] = json.loads(LISTS.read_text(encoding="utf-8"))
    return lists


@cache
def broken(rule: Rule) -> frozenset[str]:
    return frozenset(rule())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_nothing_new_breaks_the_rule(rule: Rule) -> None:
    assert sorted(broken(rule) - set(listed().get(rule.__name__, []))) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_list_names_nothing_that_keeps_the_rule(rule: Rule) -> None:
    assert sorted(set(listed().get(rule.__name__, [])) - broken(rule)) == []


def test_no_prose_has_a_forbidden_word_more_often_than_listed() -> None:
    now, allowed = counted(forbidden_words()), counted(listed()["forbidden_words"])
    assert {name: count for name, count in now.items() if count > allowed.get(name, 0)} == {}


def test_no_forbidden_word_is_listed_more_often_than_it_is_there() -> None:
    now, allowed = counted(forbidden_words()), counted(listed()["forbidden_words"])
    assert {name: count for name, count in allowed.items() if count > now.get(name, 0)} == {}


def counted(entries: Iterable[str]) -> dict[str, int]:
    return {name: int(count) for name, _, count in (entry.rpartition(" x") for entry in entries)}


def test_import_contracts_count_imports_for_types() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    linter = settings["tool"]["importlinter"]
    assert not linter.get("exclude_type_checking_imports", False)
    assert all(not contract.get("ignore_imports") for contract in linter["contracts"])


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = {dotted(path): imported_by(path) for path in modules()}
    circle: list[str] = []
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle == []


@pytest.mark.slow
def test_few_functions_differ_only_in_names() -> None:
    found_pairs = pairs(SOURCE, nodes)
    assert len(found_pairs) <= MOST_NEAR_DUPLICATES, found_pairs[:20]


@pytest.mark.parametrize(
    ("words", "seen", "passed"),
    [
        ("let in", ["is let in by turn", "lets nobody in"], ["let us", "lets the rest in turn"]),
        ("give back", ["gives it back", "given back"], ["gives a way back"]),
        ("is told", ["be told"], ["has told", "told apart"]),
        ("stands in for", ["stands in for it"], ["stands in `tidegate.toml`"]),
    ],
)
def test_the_patterns_see_what_they_are_for(words: str, seen: list[str], passed: list[str]) -> None:
    pattern = _words(FORBIDDEN[words])
    assert all(pattern.search(line) for line in seen)
    assert not any(pattern.search(line) for line in passed[:1])


if __name__ == "__main__":
    lists = {rule.__name__: sorted(broken(rule)) for rule in RULES}
    lists |= {"forbidden_words": sorted(forbidden_words())}
    LISTS.write_text(json.dumps(lists, indent=2) + "\n", encoding="utf-8")
