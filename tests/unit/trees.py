"""Python files as trees, each parsed and walked once in a test process.

The garbage collector leaves them alone: to look through half a million nodes takes longer than to
parse them.
"""

from __future__ import annotations

import ast
import gc
from functools import cache
from pathlib import Path


@cache
def parsed(path: Path) -> ast.Module:
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    finally:
        gc.freeze()
        gc.enable()


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All that is in a file, outer before inner."""
    return tuple(ast.walk(parsed(path)))
