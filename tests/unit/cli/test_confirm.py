"""Questions before what cannot be undone: where they are asked, and what ends them."""

from __future__ import annotations

from contextvars import copy_context
from io import StringIO

import pytest
import typer

from tidegate.cli import main
from tidegate.cli.terminal import confirm


class Interrupted:
    """A terminal on which a person presses Ctrl-C."""

    def readline(self) -> str:
        raise KeyboardInterrupt


@pytest.mark.parametrize("typed", ["y\n", "YES\n", "perhaps\ny\n"])
def test_a_question_leaves_standard_output_to_the_data(
    typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO(typed))
    confirm("Remove it?")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("Remove it? [y/N]: ")
    assert ("Answer y or n." in shown.err) is ("perhaps" in typed)


@pytest.mark.parametrize("typed", ["\n", "n\n", "No\n", ""])
def test_nothing_but_yes_goes_on(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", StringIO(typed))
    with pytest.raises(typer.Abort):
        confirm("Remove it?")


def test_where_no_answer_can_be_typed_the_option_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO(""))
    with pytest.raises(typer.Abort):
        confirm("Remove it?")
    assert "pass --yes" in capsys.readouterr().err


@pytest.mark.parametrize(("terminal", "code"), [(Interrupted(), 130), (StringIO(""), 1)])
@pytest.mark.parametrize(
    "command", ["budgets remove x", "tenants remove x", "permits revoke x", "erase --tenant x"]
)
def test_ctrl_c_at_a_question_ends_as_it_does_anywhere(
    command: str,
    terminal: object,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.argv", ["tidegate", *command.split(), "--json"])
    with pytest.raises(SystemExit) as ended:
        copy_context().run(main)
    assert (ended.value.code, capsys.readouterr().out) == (code, "")
