"""`tidegate ...` in this process.

Typer's own runner makes all commands from their functions again for each call, which takes 40 ms.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from contextvars import copy_context
from functools import cache
from typing import Any

import pytest
import typer.main

from tidegate.cli import app


def invoke(*arguments: str) -> tuple[int, str]:
    """Run a command; its exit status, and all that it writes. An error of ours goes through."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as ended:
        # A command says for its whole process who acts, and on which pool.
        copy_context().run(_command().main, args=list(arguments), prog_name="tidegate")
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.getvalue()


@cache
def _command() -> Any:
    return typer.main.get_command(app)
