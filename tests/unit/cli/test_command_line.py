"""The command line that a process builds for its own arguments."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from contextvars import copy_context
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.core import TyperGroup
from typer.main import get_command

from tests.unit.invoked import invoke
from tidegate.cli import app, command_line, main
from tidegate.cli.terminal import chosen_pool_or
from tidegate.errors import ConfigError, GatewayUnreachable, StoreUnavailable
from tidegate.telemetry.logging import Log, configure_logging, get_logger


def commands_of(line: Typer) -> dict[str, Any]:
    built = get_command(line)
    assert isinstance(built, TyperGroup)
    return dict(built.commands)


def test_a_command_is_built_alone_and_as_in_the_whole_command_line() -> None:
    whole = commands_of(app)
    assert {"serve", "limits", "config"} <= set(whole)
    for name, command in whole.items():
        (alone,) = commands_of(command_line([name, "--help"])).values()
        assert (alone.name, alone.help) == (name, command.help)
        assert [one.name for one in alone.params] == [one.name for one in command.params]


def test_what_names_no_command_gets_the_whole_command_line() -> None:
    for arguments in ([], ["--help"], ["--version"], ["serv"], ["Usage"]):
        assert command_line(arguments) is app


@pytest.mark.parametrize(
    "arguments",
    [
        "limits show --json --pool other",
        "--json --pool other limits show",
        "--pool=other limits --json show",
        "limits --pool other show --json",
    ],
)
def test_options_may_stand_before_a_command(
    arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(_work: object) -> dict[str, object]:
        return {"pool": chosen_pool_or(None)}

    monkeypatch.setattr("tidegate.cli.limits.in_pool", ask)
    code, said = invoke(*arguments.split())
    assert (code, json.loads(said)) == (0, {"pool": "other"})


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ("--colour limits show", "--colour"),
        ("--json limit show", "limit"),
        ("--url http://localhost:1 limits show", "--url"),
        ("--url", "--url"),
    ],
)
def test_what_is_no_command_and_no_option_is_named(arguments: str, wrong: str) -> None:
    code, said = invoke(*arguments.split())
    assert code == 2
    assert f"No such {'option' if wrong.startswith('-') else 'command'}" in said
    assert wrong in said


def test_an_option_takes_a_value_wherever_it_is_one() -> None:
    """Else one before a command could not be told from the command's name."""
    takes: dict[str, set[bool]] = defaultdict(set)

    def look(command: Any) -> None:
        for one in command.params:
            for name in (*one.opts, *one.secondary_opts):
                takes[name].add(one.is_flag if one.param_type_name == "option" else False)
        for inner in getattr(command, "commands", {}).values():
            look(inner)

    look(get_command(app))
    assert [name for name, kinds in takes.items() if len(kinds) > 1] == []


def test_no_help_text_has_brackets_that_a_terminal_takes_for_marks() -> None:
    """`a key of [upstreams.NAME]` was shown as `a key of `."""
    texts: dict[str, str] = {}

    def look(command: Any, path: str) -> None:
        texts[path] = f"{command.help} {command.short_help}"
        for one in command.params:
            texts[f"{path} {one.name}"] = f"{getattr(one, 'help', '')} {one.metavar}"
        for name, inner in getattr(command, "commands", {}).items():
            look(inner, f"{path} {name}")

    look(get_command(app), "tidegate")
    assert {path: text for path, text in texts.items() if re.search(r"\[[a-z#/@]", text)} == {}


def test_the_url_of_an_option_is_called_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_URL", "http://localhost:2")
    for arguments in ("--url http://localhost:1 status", "status --url http://localhost:1"):
        with pytest.raises(GatewayUnreachable, match=r"http://localhost:1 \(--url\) does not"):
            invoke(*arguments.split())
    with pytest.raises(ConfigError, match="--url=nonsense: must be an http:// or https:// URL"):
        invoke("--url", "nonsense", "upstreams", "list")


@pytest.mark.parametrize("place", ["missing/report.md", "."])
def test_a_report_that_cannot_be_written_is_refused_before_the_verification(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def verify(*_: object) -> None:
        raise AssertionError("it was begun")

    monkeypatch.setattr("tidegate.verify.run.verify", verify)
    with pytest.raises(ConfigError, match="must be a file that can be written"):
        invoke("verify", "--markdown", str(tmp_path / place))


def test_an_export_that_each_night_would_fail_is_refused_before_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def up(*_: object) -> None:
        raise AssertionError("it was begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tidegate.supervisor.up.up", up)
    monkeypatch.setenv("RECORD_EXPORT", "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="RECORD_EXPORT=parquet: needs pyarrow"):
        invoke("up")


def test_a_drain_has_no_end_so_that_its_time_needs_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_URL", "http://localhost:1")
    with pytest.raises(ConfigError, match="--for=10m: needs --wait") as refused:
        invoke("upstreams", "drain", "groq", "--for", "10m")
    assert "stays drained until it is resumed" in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ("weight=3 --weight 4", "weight"),
        ("key=A --key A", "key"),
        ("limits={} --limit rpm:total=6", "limits"),
    ],
)
def test_an_upstream_is_not_added_with_two_values_of_one_key(arguments: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"upstreams add must name {key} once"):
        invoke("upstreams", "add", "groq", *arguments.split())


def test_the_list_of_upstreams_says_why_one_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def upstream(name: str, state: str, detail: str, **problems: str) -> dict[str, Any]:
        shown = {"name": name, "state": state, "in_progress": 0, "waiting": 0, "table": {}}
        return {**shown, "source": "live", "problems": problems, "health": {"detail": detail}}

    found = {
        "revision": 1,
        "processes": [],
        "differing": [],
        "upstreams": [
            upstream("broke", "out", "You exceeded your current quota."),
            upstream("well", "in service", "an old fault"),
            upstream("keyless", "missing", "", api="GROQ must be set") | {"key": "GROQ_API_KEY"},
        ],
    }
    monkeypatch.setattr("tidegate.cli.upstreams._call", lambda *_: found)
    monkeypatch.setenv("COLUMNS", "200")
    _, said = invoke("upstreams", "list")
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert rows["broke"].endswith("You exceeded your current quota.")
    assert rows["keyless"].endswith("api: GROQ must be set")
    assert "GROQ_API_KEY" in rows["keyless"], "that of its preset, which its table does not name"
    assert "an old fault" not in said


def run_main(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr("sys.argv", ["tidegate", *arguments])
    with pytest.raises(SystemExit) as ended:
        copy_context().run(main)
    return ended.value.code


@pytest.mark.parametrize("command", ["keys list", "rehearse --from-record 1h"])
@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("PostgreSQL is gone.", "PostgreSQL is gone; `tidegate doctor` looks at both servers"),
        ("it is old; `tidegate migrate` helps", "it is old; `tidegate migrate` helps"),
    ],
)
def test_a_server_that_is_away_leaves_standard_output_to_the_data(
    command: str,
    why: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def away(*_: object) -> None:
        get_logger().warning(Log.STORE_AWAY, reason="as a connection logs it")
        raise StoreUnavailable(why)

    monkeypatch.setattr("tidegate.supervisor.services.with_record", away)
    assert run_main(command.split(), monkeypatch) == 4
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"tidegate: {said}\n")


def test_an_output_that_cannot_show_a_character_gets_its_escape(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEXT_MODEL", "模型")
    written = BytesIO()
    monkeypatch.setattr("sys.stdout", TextIOWrapper(written, encoding="latin-1"))
    assert run_main(["config", "check"], monkeypatch) == 0
    assert rb"\u6a21\u578b" in written.getvalue()


@pytest.mark.parametrize(
    "arguments",
    ["keys create --name n\udcff", "requeue --since 1h --tenant \udcff", "budgets resume \udcff"],
)
def test_an_argument_that_is_not_text_is_refused_in_one_line(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://localhost:1/none")
    monkeypatch.setenv("REDIS_URL", "redis://localhost:1")
    assert run_main(arguments.split(), monkeypatch) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert r"\udcff': must be text in UTF-8" in shown.err


def test_a_file_may_have_a_name_that_is_not_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = tmp_path / "n\udcff.jsonl"
    name.touch()
    assert run_main(["batch", "run", str(name)], monkeypatch) == 2
    assert "at least one prompt" in capsys.readouterr().err


def test_a_prompt_from_standard_input_that_is_not_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert run_main(["submit", "-"], monkeypatch) == 2
    assert capsys.readouterr().err == "tidegate: TEXT=-: must be text in UTF-8\n"


@pytest.mark.parametrize("turn", range(2))
def test_a_command_in_this_process_leaves_logging_as_it_was(
    turn: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The turns may come in either order, one after the other."""
    get_logger().error(Log.INTERNAL_ERROR, turn=turn)
    assert f"turn={turn}" in capsys.readouterr().out
    configure_logging("console", "error", process="command")
