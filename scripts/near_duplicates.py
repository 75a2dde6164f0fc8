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
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES_OF_A_SMALL_ONE = 10

Function = ast.FunctionDef | ast.AsyncFunctionDef


class _Blank(ast.NodeTransformer):
    """Blanks what two functions may differ in."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(id="_", ctx=node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        return ast.Attribute(value=node.value, attr="_", ctx=node.ctx)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant(value=type(node.value).__name__)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(arg="_", annotation=None)

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        return ast.keyword(arg="_" if node.arg else None, value=node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        node.annotation = ast.Name(id="_", ctx=ast.Load())
        return node


def shape_of(function: Function) -> str:
    """The tree without what it may differ in, as text."""
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:] or body
    blank = _Blank().visit(deepcopy(ast.Module(body=list(body), type_ignores=[])))
    kind = type(function).__name__
    arguments = len(function.args.posonlyargs + function.args.args + function.args.kwonlyargs)
    return f"{kind} {arguments} {ast.dump(blank)}"


def functions_of(folder: Path) -> Iterator[tuple[str, Function]]:
    """Functions and methods of more than ten lines, with file, line and name."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        outer: list[ast.Module | ast.ClassDef] = [tree]
        outer += [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for node in itertools.chain.from_iterable(holder.body for holder in outer):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_LINES_OF_A_SMALL_ONE:
                    yield f"{path.relative_to(folder)}:{node.lineno} {node.name}", node


def pairs(folder: Path = ROOT / "src/tidegate") -> list[tuple[str, str]]:
    """The pairs of a folder's functions."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, function in functions_of(folder):
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
