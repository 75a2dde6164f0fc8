"""Pairs of functions that differ only in names: `python scripts/near_duplicates.py`.

Two functions of more than ten lines are a pair if their syntax trees are equal once names,
attributes, arguments, constants, annotations and docstrings are blanked out. Prints each pair and
the count; nested functions count with the function that they are in.
"""

from __future__ import annotations

import argparse
import ast
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES_OF_A_SMALL_ONE = 10

Function = ast.FunctionDef | ast.AsyncFunctionDef


def outline_of(function: Function) -> tuple[type, ...]:
    """The types of its statements, two deep: equal for functions of one shape, and cheaper."""
    body = _body_of(function)
    inner = (getattr(statement, "body", ()) for statement in body)
    return (*map(type, body), *map(type, itertools.chain.from_iterable(inner)))


def _body_of(function: Function) -> list[ast.stmt]:
    """Without its docstring."""
    first, *others = function.body
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return others if is_docstring and others else function.body


def shape_of(function: Function) -> str:
    """The tree without what it may differ in, as text."""
    body = _body_of(function)
    arguments = len(function.args.posonlyargs + function.args.args + function.args.kwonlyargs)
    return f"{type(function).__name__} {arguments} {_shape(body)}"


def _shape(part: object) -> str:
    """Of a tree, a list of trees or a plain value, with a blank for what may differ."""
    match part:
        case list():
            return f"[{','.join(map(_shape, part))}]"
        case ast.Name() | ast.arg():
            return "_"
        case ast.Attribute():
            return f"{_shape(part.value)}._"
        case ast.Constant():
            return type(part.value).__name__
        case ast.keyword():
            return f"{'_' if part.arg else '**'}={_shape(part.value)}"
        case ast.AnnAssign():
            return f"AnnAssign({_shape(part.target)},{_shape(part.value)})"
        case ast.AST():
            fields = (_shape(getattr(part, name, None)) for name in part._fields)
            return f"{type(part).__name__}({','.join(fields)})"
    return repr(part)


def nodes(path: Path) -> Sequence[ast.AST]:
    """All that is in a file, outer before inner."""
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def functions_of(
    folder: Path, nodes: Callable[[Path], Sequence[ast.AST]] = nodes
) -> Iterator[tuple[str, Function]]:
    """Functions and methods of more than ten lines, with file, line and name."""
    for path in sorted(folder.rglob("*.py")):
        outer = [node for node in nodes(path) if isinstance(node, ast.Module | ast.ClassDef)]
        for node in itertools.chain.from_iterable(holder.body for holder in outer):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_LINES_OF_A_SMALL_ONE:
                    yield f"{path.relative_to(folder)}:{node.lineno} {node.name}", node


def pairs(
    folder: Path = ROOT / "src/tidegate", nodes: Callable[[Path], Sequence[ast.AST]] = nodes
) -> list[tuple[str, str]]:
    """The pairs of a folder's functions."""
    similar: dict[tuple[type, ...], list[tuple[str, Function]]] = defaultdict(list)
    for name, function in functions_of(folder, nodes):
        similar[outline_of(function)].append((name, function))
    alike: dict[str, list[str]] = defaultdict(list)
    for functions in similar.values():
        for name, function in functions if len(functions) > 1 else ():
            alike[shape_of(function)].append(name)
    return [pair for names in alike.values() for pair in itertools.combinations(names, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Count functions that differ only in names.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "src/tidegate")
    found = pairs(parser.parse_args().folder)
    for one, other in found:
        print(f"{one}  ~  {other}")
    print(len(found))


if __name__ == "__main__":
    main()
