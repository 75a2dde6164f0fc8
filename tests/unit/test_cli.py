"""The command line: one clear line for what is wrong, and no wait for what is not needed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ran
from tidegate import __version__
from tidegate import settings as config
from tidegate.policy.deployment import stated_settings
from tidegate.supervisor.services import Ground, environment_of

_ROOT = Path(__file__).parents[2]

# The first of them waits for a process that has imported all of ours.
pytestmark = pytest.mark.slow


def _run(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    done = asyncio.run(ran(*arguments, cwd=folder, env={**os.environ, **settings}))
    return subprocess.CompletedProcess(arguments, done.code, done.said, done.complained)


@pytest.mark.parametrize("command", [("up",), ("serve",), ("worker",), ("config", "check")])
def test_a_wrong_setting_is_told_in_one_line(command: tuple[str, ...], tmp_path: Path) -> None:
    done = _run(tmp_path, *command, PORT="abc")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "tidegate: PORT=abc: must be a whole number from 0 to 65535\n"


@pytest.mark.parametrize(
    "command", [("up",), ("serve",), ("worker",), ("prune",), ("export", "record")], ids=" ".join
)
@pytest.mark.parametrize("blobs", ["", "s3://bucket"], ids=["a folder", "a bucket"])
def test_a_folder_that_cannot_be_made_is_told_in_one_line(
    command: tuple[str, ...], blobs: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    away = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1"}
    keys = {"ADMIN_TOKEN": "t" * 32, "GEMINI_API_KEY": "k", "AWS_REGION": "r", "PORT": "0"}
    done = _run(tmp_path, *command, **away, **keys, BLOB_URL=blobs, DATA_DIR="file/data")
    assert done.stderr == (
        "tidegate: DATA_DIR=file/data: cannot be used: Not a directory; "
        "it must be a folder that this user may write to\n"
    )
    assert (done.returncode, done.stdout) == (2, "")


def test_a_socket_that_was_not_inherited_is_told_in_one_line(tmp_path: Path) -> None:
    done = _run(tmp_path, "serve", "--fd", "99", PORT="0")
    said = "must be a listening socket that was inherited: Bad file descriptor"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"tidegate: --fd=99: {said}\n"


def test_a_collector_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("OTEL_EXPORTER_OTLP_ENDPOINT=nonsense\n")
    for command in (("config", "check"), ("up",)):
        done = _run(tmp_path, *command)
        assert (done.returncode, done.stdout) == (2, "")
        said = "must be http:// or https:// and a host"
        assert done.stderr == f"tidegate: OTEL_EXPORTER_OTLP_ENDPOINT=nonsense: {said}\n"


@pytest.mark.parametrize("command", [("up",), ("worker",), ("config", "check")])
def test_a_nightly_reconciliation_that_workers_could_not_do_is_told_in_one_line(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    settings = {"PORT": "0", "OPENAI_API_KEY": "k", "OPENAI_ADMIN_KEY": ""}
    done = _run(tmp_path, *command, **settings, RECONCILE="openai")
    said = "tidegate: OPENAI_ADMIN_KEY=(not set): must be set to an admin key of the account\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert list(tmp_path.iterdir()) == [], "no server has begun"


def test_what_only_routing_knows_is_checked_before_the_settings_are_called_sound(
    tmp_path: Path,
) -> None:
    upstream = "[upstreams.a]\nprovider = 'vllm'\nbase_url = 'http://x'\n"
    (tmp_path / "tidegate.toml").write_text(f"{upstream}passthrough = ['/v1/models']\n")
    done = _run(tmp_path, "config", "check")
    said = "upstreams.a.passthrough=/v1/models: must be a path that Tidegate does not know itself"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"tidegate: {said}, nor one below it\n"


@pytest.mark.parametrize(
    ("command", "url", "said"),
    [
        *(
            (
                command,
                "redis://:sesame@127.0.0.1:1/0?colour=red",
                "=redis://(hidden): has the unknown option colour",
            )
            for command in ("serve", "config check")
        ),
        (
            "serve",
            "rediss://:sesame@127.0.0.1:1/0?ssl_ca_certs=/nowhere/ca.crt",
            " can't be used: ssl_ca_certs names /nowhere/ca.crt, which cannot be read",
        ),
    ],
)
def test_a_url_of_valkey_that_cannot_be_right_is_told_in_one_line(
    command: str, url: str, said: str, tmp_path: Path
) -> None:
    away = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "MIGRATE_AT_START": "0", "PORT": "0"}
    done = _run(tmp_path, *command.split(), **away, REDIS_URL=url)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"tidegate: REDIS_URL{said}\n")


@pytest.mark.parametrize("command", [("up",), ("serve",), ("worker",), ("config", "check")])
def test_a_mistake_in_the_policy_file_is_told_in_one_line(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "tidegate.toml").write_text('[limits]\n"rpm:m" = "60"\n')
    done = _run(tmp_path, *command)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "tidegate: tidegate.toml: limits.rpm:m=60: must be a whole number or a table\n"
    )


@pytest.mark.parametrize(
    ("command", "text", "line"),
    [
        *(
            (command, "[upstreams.a]\nprovider = 'nobody'\n", "upstreams.a.provider=nobody: must")
            for command in ("up", "serve", "run_worker.py")
        ),
        (
            *("up", "[upstreams.a]\nprovider = 'openai'\nkey = 'A_KEY'\n"),
            "A_KEY=(not set): must be set: upstreams.a has its key from it",
        ),
        ("up", "[[routes]]\nmodel = 'x'\ntry = ['nobody/x']\n", "routes[0].try=nobody/x: must"),
    ],
)
def test_a_mistake_in_an_upstream_or_route_stops_the_start_before_any_server(
    command: str, text: str, line: str, tmp_path: Path
) -> None:
    (tmp_path / "tidegate.toml").write_text(text)
    if command.endswith(".py"):
        done = subprocess.run(
            [sys.executable, str(_ROOT / command)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    else:
        done = _run(tmp_path, command, PORT="0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"tidegate: tidegate.toml: {line}")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tidegate.toml"], "no server has begun"


def test_a_wrong_secret_is_never_shown(tmp_path: Path) -> None:
    done = _run(tmp_path, "config", "check", DATABASE_URL="mysql://me:sesame@host/x", REDIS_URL="x")
    assert done.returncode == 2
    assert done.stderr.startswith("tidegate: DATABASE_URL=(hidden): must be ")
    assert "sesame" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_address_that_is_not_ours_is_told_in_one_line_and_a_doubtful_name_in_another(
    tmp_path: Path,
) -> None:
    settings = {"HOST": "192.0.2.1", "PORT": "0", "TIDEGATE_DEMO": "1", "RATE_LIMIT": "5"}
    done = _run(tmp_path, "serve", **settings)
    assert done.returncode == 2
    doubtful, wrong = done.stderr.splitlines()
    assert doubtful.endswith("RATE_LIMIT is not a setting; is RATE_LIMITS meant?")
    assert wrong.startswith("tidegate: HOST=192.0.2.1: must be an address of this machine")


def test_a_custom_provider_without_a_key_is_not_answered_by_the_emulator(tmp_path: Path) -> None:
    done = _run(tmp_path, "worker", GEMINI_BASE_URL="http://localhost:1")
    assert done.returncode == 2
    assert done.stderr.startswith("tidegate: GEMINI_API_KEY=(not set): GEMINI_BASE_URL is set")


def test_check_starts_nothing_and_shows_what_the_settings_come_to(tmp_path: Path) -> None:
    done = _run(tmp_path, "config", "check", RATE_LIMITS='{"text_only": 7}')
    assert done.returncode == 0
    assert "kind:text_only        7 concurrent" in done.stdout
    assert "emulated" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_full_disk_is_told_in_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tidegate", "config", "check", *arguments],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr == "tidegate: output or files cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", [("limits", "show"), ("keys", "list")], ids=" ".join)
def test_a_command_begins_no_empty_deployment_where_none_is(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    done = _run(tmp_path, *command, HOST="127.0.0.1")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("tidegate: no deployment is in data (DATA_DIR): `tidegate up` ")
    assert list(tmp_path.iterdir()) == []


def test_a_gateway_that_does_not_answer_is_told_with_the_ways_out(tmp_path: Path) -> None:
    here = _run(tmp_path, "status", PORT="1")
    assert here.returncode == 4
    assert here.stderr == (
        "tidegate: http://localhost:1 (the default) does not answer: Connection refused; "
        "`tidegate up` starts one here, and TIDEGATE_URL or --url says where one runs\n"
    )


def test_the_version_is_shown(tmp_path: Path) -> None:
    done = _run(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"tidegate {__version__}\n")


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = {"fastapi", "uvicorn", "asyncpg", "google.genai", "pydantic"}
    heavy |= {"aiohttp", "redis", "orjson", "rich.console", "tidegate.settings", "tidegate.limiter"}
    program = f"import sys, tidegate.cli; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_the_end_of_a_command_looks_for_no_garbage() -> None:
    """It would look through all that the start imported: a fifth of a short command's time."""
    program = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print(len(gc.get_objects()), gc.get_freeze_count()))\n"
        "sys.argv[1:] = ['--version']\n"
        "from tidegate.__main__ import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    left, kept = done.stdout.splitlines()[1].split()
    assert int(left) < 100 < 10_000 < int(kept)


def test_check_says_where_each_value_comes_from_and_hides_secrets(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=1234\nLOG_LEVEL=debug\nTIDEGATE_API_KEY=tg_sesame\n")
    (tmp_path / "secret").write_text("a-token-of-some-length\n")
    (tmp_path / "tidegate.toml").write_text('[limits]\n"model:m" = 3\n')
    given = {"LOG_LEVEL": "error", "ADMIN_TOKEN_FILE": str(tmp_path / "secret")}
    shown = _run(tmp_path, "config", "check", **given)
    assert shown.returncode == 0, shown.stderr
    assert "limits              tidegate.toml" in shown.stdout
    told = _run(tmp_path, "config", "check", "--json", **given)
    settings = json.loads(told.stdout)["settings"]
    assert settings["PORT"] == {"value": "1234", "from": ".env"}
    assert settings["LOG_LEVEL"] == {"value": "error", "from": "the environment"}
    assert settings["TIDEGATE_API_KEY"] == {"value": "(hidden)", "from": ".env"}
    hidden = {"value": "(hidden)", "from": "the file of ADMIN_TOKEN_FILE, from the environment"}
    assert settings["ADMIN_TOKEN"] == hidden
    assert "HOST" not in settings
    for text in (shown.stdout, told.stdout):
        assert "sesame" not in text
        assert "a-token" not in text


def test_check_asks_what_is_meant_by_a_name_that_is_nearly_a_setting(tmp_path: Path) -> None:
    lines = ("TEXT_MODLE=m", "RATE_LIMIT={}", "ADMIN_TOKEN_FIEL=a", "GEMINI_API_KEY_2=k", "PATHS=x")
    upstream = '[upstreams.two]\nprovider = "gemini"\nkey = "GEMINI_API_KEY_2"\n'
    (tmp_path / "tidegate.toml").write_text(upstream + "[upstreams.two.limits]\n")
    (tmp_path / ".env").write_text("\n".join(lines))
    others = {"AZURE_OPENAI_API_KEY": "k", "OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"}
    done = _run(tmp_path, "config", "check", GEMINI_KEY="k", IMAGE_MODEL="claude-x", **others)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "tidegate: .env: ADMIN_TOKEN_FIEL is not a setting; is ADMIN_TOKEN_FILE meant?",
        "tidegate: the environment: GEMINI_KEY is not a setting; is GEMINI_API_KEY meant?",
        "tidegate: .env: RATE_LIMIT is not a setting; is RATE_LIMITS meant?",
        "tidegate: .env: TEXT_MODLE is not a setting; is TEXT_MODEL meant?",
        "tidegate: IMAGE_MODEL: the upstream 'anthropic' of the model 'claude-x' makes no images",
    ]
    told = _run(tmp_path, "config", "check", "--json")
    assert json.loads(told.stdout)["doubtful"]["RATE_LIMIT"] == "RATE_LIMITS"


def test_a_base_url_that_sdks_would_follow_and_a_key_alone_does_not_is_named(
    tmp_path: Path,
) -> None:
    (tmp_path / ".env").write_text("ANTHROPIC_BASE_URL=http://localhost:8/\n")
    keys = {"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"}
    urls = {"OPENAI_BASE_URL": "http://localhost:9/v1", "OPENAI_API_BASE": "https://api.openai.com"}
    done = _run(tmp_path, "config", "check", **keys, **urls)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "tidegate: the environment: OPENAI_BASE_URL is not a setting; calls of openai go to "
        "https://api.openai.com/v1 unless base_url in [upstreams.openai] says otherwise",
        "tidegate: .env: ANTHROPIC_BASE_URL is not a setting; calls of anthropic go to "
        "https://api.anthropic.com unless base_url in [upstreams.anthropic] says otherwise",
    ]
    # Where the file states the upstream, where it goes is known; without a key there is none.
    stated = '[upstreams.openai]\nprovider = "openai"\nbase_url = "http://localhost:9/v1"\n'
    (tmp_path / "tidegate.toml").write_text(stated)
    done = _run(tmp_path, "config", "check", OPENAI_API_KEY="k", **urls)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_import_of_one_of_two_accounts_names_the_option_that_it_has(tmp_path: Path) -> None:
    accounts = [f'[upstreams.{name}]\nprovider = "openai"\n' for name in ("one", "two")]
    (tmp_path / "tidegate.toml").write_text("".join(accounts))
    keys = {"OPENAI_API_KEY": "k", "OPENAI_ADMIN_KEY": "sk-admin"}
    done = _run(tmp_path, "limits", "import", "openai", **keys)
    assert done.returncode == 2
    assert done.stderr == "tidegate: --pool=(not set): must be one of one, two\n"


def test_a_section_that_is_not_known_is_told_with_all_that_are(tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text('[upstream.a]\nkey = "A_KEY"\n')
    done = _run(tmp_path, "config", "check")
    assert done.returncode == 2
    assert done.stderr.endswith("known: limits, weights, bands, pool, upstreams, routes\n")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_learn_to_complete_commands(shell: str, tmp_path: Path) -> None:
    commands = str(Path(sys.executable).parent)
    env = {"PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    complete = {
        "bash": 'eval "$script"; COMP_WORDS=(tidegate lim); COMP_CWORD=1; '
        '_tidegate_completion tidegate; echo "${COMPREPLY[@]}"',
        # What its function evaluates: zsh itself completes only at a prompt.
        "zsh": '[[ $script == "#compdef tidegate"* ]] && '
        '_TYPER_COMPLETE_ARGS="tidegate lim" _TIDEGATE_COMPLETE=complete_zsh tidegate',
    }
    done = subprocess.run(
        [shell, "-c", f"script=$(tidegate --show-completion; true); {complete[shell]}"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "limits" in done.stdout
    assert "tenants" not in done.stdout


def test_children_read_exactly_the_settings_of_their_supervisor(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("PORT=1\nJOB_DEADLINE_MS=5\nDATABASE_URL_FILE=/nowhere\n")
    given = {
        "DATABASE_URL": "postgresql://me:secret@localhost/x",
        "REDIS_URL": "redis://localhost",
        "GEMINI_API_KEY": "key",
        "RATE_LIMITS": '{"text_only": 7}',
        "CLASSIFIER": "keywords",
        "TIDEGATE_DEMO": "1",
        "DATA_DIR": str(tmp_path / "data"),
        "SEMAPHORE_TIMEOUT": "1.5",
    }
    whole = config.load(given, dotenv=None)
    ground = Ground(whole, lease=None, embedded=False, emulated=False)
    assert config.load(environment_of(ground), dotenv) == whole


def test_children_know_where_the_settings_of_their_supervisor_come_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEXT_MODEL", "gemini-2.5-flash")
    monkeypatch.setenv("MAX_ATTEMPTS", "")
    whole = config.load({"DATA_DIR": str(tmp_path)}, dotenv=None)
    bundled = Ground(whole, lease=None, embedded=True, emulated=True)
    for name, value in environment_of(bundled).items():
        monkeypatch.setenv(name, value)
    found = {one.name: one.origin for one in stated_settings(whole) if one.origin}
    assert found == {
        **dict.fromkeys(("DATABASE_URL", "REDIS_URL"), "the bundled servers"),
        **dict.fromkeys(("GEMINI_API_KEY", "GEMINI_BASE_URL"), "the built-in emulator"),
        "TEXT_MODEL": "the environment",
    }


def test_the_settings_check_shows_upstreams_and_misses_their_keys(tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text(
        '[upstreams.openai]\nprovider = "openai"\nkey = "OPENAI_API_KEY"\nmodels = ["gpt-*"]\n'
        '[upstreams.openai.limits]\n"pool:total" = 7\n'
    )
    missing = _run(tmp_path, "config", "check")
    assert missing.returncode != 0
    assert "OPENAI_API_KEY=(not set)" in missing.stderr
    found = _run(tmp_path, "config", "check", OPENAI_API_KEY="sk-a-secret")
    assert "upstream openai: gpt-* (openai at https://api.openai.com/v1)" in found.stdout
    assert "7 concurrent" in found.stdout
    assert "sk-a-secret" not in found.stdout


def test_check_says_by_which_models_prompts_are_answered(tmp_path: Path) -> None:
    done = _run(tmp_path, "config", "check", OPENAI_API_KEY="k")
    assert "  prompts             by gpt-6-luna, gpt-image-2.5-flare\n" in done.stdout
    assert done.stderr == ""
    done = _run(tmp_path, "config", "check", ANTHROPIC_API_KEY="k")
    assert "  prompts             by claude-haiku-5-5\n" in done.stdout
    said = "IMAGE_MODEL: the upstream 'anthropic' of the model 'claude-haiku-5-5' makes no images"
    assert done.stderr == f"tidegate: {said}\n"
