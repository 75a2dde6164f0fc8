"""The documents hold together: links lead somewhere, and every example is run by a test."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent

import pytest
import typer

from tests.documents import (
    ELSEWHERE,
    NOT_RUN,
    OF_A_STORY,
    READ_ANYWHERE,
    STORIES,
    Elsewhere,
    NotRun,
    elsewhere,
)
from tests.integration.servers.certificates import Authority
from tests.markdown import (
    ROOT,
    Block,
    anchors,
    blocks,
    code_words,
    documents,
    links,
    text_of,
)
from tests.shapes import differences, lines_that_differ, streamed
from tidegate import call
from tidegate.cli import app
from tidegate.http import native
from tidegate.policy.deployment import deployed, deployed_upstreams
from tidegate.policy.providers import PROVIDERS
from tidegate.rehearse.load import TokenPace, Usual, load_of
from tidegate.settings import Config, load

ALL = tuple(block for document in documents() for block in blocks(document))
# What an example of upstreams leaves out, since the page has said it before.
_DEFINED_BEFORE = '[upstreams.openai]\nprovider = "openai"\nkey = "OPENAI_API_KEY"\n'
_KEYS = dict.fromkeys(
    ("OPENAI_API_KEY", "SECOND_OPENAI_KEY", "LOCAL_KEY", "ANTHROPIC_API_KEY"), "k"
)


def known(block: Block) -> bool:
    return (
        block.language in READ_ANYWHERE
        or elsewhere(block) is not None
        or (block.document in STORIES and block.language in OF_A_STORY)
    )


def test_every_block_is_known_to_a_test() -> None:
    unknown = [
        f"{block.name} ({block.language or 'no language'})" for block in ALL if not known(block)
    ]
    assert unknown == [], "say in tests/documents.py who runs them"


def test_every_exception_is_one_block_and_its_test_is_there() -> None:
    answered = Counter(id(elsewhere(block)) for block in ALL)
    exceptions: list[Elsewhere | NotRun] = [*ELSEWHERE, *NOT_RUN]
    for exception in exceptions:
        blocks_of_it = answered[id(exception)]
        if not exception.words:  # the whole document, or all of a language
            assert blocks_of_it >= 1, exception
        else:
            assert blocks_of_it == 1, exception
    for test in {one.test for one in ELSEWHERE}:
        text = (ROOT / test).read_text(encoding="utf-8")
        assert any(Path(one.document).name in text for one in ELSEWHERE if one.test == test), test
    assert all(len(one.reason.split()) > 3 for one in NOT_RUN)


@pytest.mark.parametrize("document", documents())
def test_every_link_leads_somewhere(document: str) -> None:
    lost = []
    for link in links(document):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(ROOT / document / ".." / path)) if path else ROOT / document
        named = target.relative_to(ROOT).as_posix()
        if not target.exists() or (anchor and anchor not in anchors(named)):
            lost.append(link)
    assert lost == []


def test_every_header_of_ours_is_in_the_tables_of_headers() -> None:
    """Those of requests and answers by their names in the code, and all that native calls read."""
    page = text_of("docs/http-api.md")
    tables = re.findall(r"\| header of an? \w+ \|.*\n(?:\|.*\n)+", page)
    assert len(tables) == 2
    requests, answers = (set(re.findall(r"`([\w-]+)[^`]*`", table.lower())) for table in tables)
    assert {name.decode() for name in native._READ} - requests == set()
    named = set()
    for file in sorted((ROOT / "src" / "tidegate").rglob("*.py")):
        if "emulator" not in file.parts:
            named |= set(
                re.findall(r'"(x-tidegate-[a-z-]+[a-z])"', file.read_text("utf-8").lower())
            )
    assert len(named) > 10
    assert named - requests - answers == set()


OF_A_LOAD = "[[arrivals]]"
TOML = [block for block in ALL if block.language == "toml"]


@pytest.mark.parametrize(
    "block", [one for one in TOML if OF_A_LOAD in one.text], ids=lambda block: block.name
)
def test_a_load_that_is_shown_is_sound(block: Block) -> None:
    assert load_of(tomllib.loads(block.text)).draw(Usual({}, TokenPace()), 1)


@pytest.mark.parametrize(
    "block",
    [one for one in TOML if OF_A_LOAD not in one.text and elsewhere(one) is None],
    ids=lambda block: block.name,
)
def test_a_policy_that_is_shown_is_sound(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _KEYS.items():
        monkeypatch.setenv(name, value)
    text = _with_files(block.text, tmp_path, monkeypatch)
    if "[upstreams.openai." in text and "[upstreams.openai]" not in text:
        text = _DEFINED_BEFORE + text
    path = tmp_path / "tidegate.toml"
    path.write_text(text, encoding="utf-8")
    config = load({"TIDEGATE_POLICY": str(path), "GEMINI_API_KEY": "k", **_KEYS}, dotenv=None)
    deployed(config)
    assert "gemini" in {upstream.name for upstream in deployed_upstreams(config).upstreams}


def _with_files(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A policy whose files are there, and whose providers' keys are set."""
    for name in _KEYS_OF_OTHERS:
        monkeypatch.setenv(name, "k")
    monkeypatch.chdir(folder)
    authority = Authority(folder / "tls")
    certificate, key = authority.sign("client")
    (folder / "account.json").write_text("{}", encoding="utf-8")
    text = text.replace("/etc/ssl/corp.pem", str(authority.ca))
    return text.replace('"client.pem"', f'"{certificate}"').replace('"client-key.pem"', f'"{key}"')


# Of the providers that have one, and of the examples.
_KEYS_OF_OTHERS = frozenset(
    (*(one.key for one in PROVIDERS.values() if one.key), "TEAM_TOKEN", "EXAMPLE_API_KEY")
)


def commands(group: typer.Typer) -> set[str]:
    """`limits show` and the like, of all that the command line has."""
    found = {
        one.name or one.callback.__name__.replace("_", "-")
        for one in group.registered_commands
        if one.callback is not None
    }
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        found.add(str(inner.name))
        found |= {f"{inner.name} {name}" for name in commands(inner.typer_instance)}
    return found


def test_every_command_that_is_named_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known_here = commands(app)
    lost = []
    for document in documents():
        typed = "\n".join(block.text for block in blocks(document) if block.language == "sh")
        for words in (*code_words(document), *typed.splitlines()):
            lost += [f"{document}: {name}" for name in missing(words, known_here, makefile)]
    assert lost == []


def test_the_runbook_needs_the_operators_key_alone() -> None:
    """Where callers show API keys, that key opens nothing that is a tenant's own."""
    lines = [line for one in blocks("docs/runbook.md") for line in one.text.splitlines()]
    own = re.compile(
        r"tidegate (?:submit|requests|batch run|status \S)"
        r"|^/(?:status|requests)/|localhost:8000/(?:status|requests|usage|submit|stream)\b"
    )
    typed = [*code_words("docs/runbook.md"), *lines]
    assert any("/admin/requests" in line for line in typed)
    assert [line for line in typed if own.search(line)] == []


def missing(words: str, known_here: set[str], makefile: str) -> list[str]:
    """Of a line as it would be typed, the commands that are not there."""
    line = re.sub(r"^(?:[A-Z_]+=\S+ )+|^KEY=\$\(", "", words.removeprefix(".venv/bin/"))
    if found := re.match(r"make ([a-z-]+)", line):
        return [] if re.search(rf"^{found[1]}:", makefile, re.MULTILINE) else [found[0]]
    if found := re.match(r"(?:\.venv/bin/)?python3? -m ([a-z_.]+)", line):
        return [] if find_spec(found[1]) else [found[0]]
    if found := re.match(r"tidegate ([a-z]+)(?: ([a-z]+))?", line):
        first, second = found[1], f"{found[1]} {found[2]}"
        group = any(name.startswith(f"{first} ") for name in known_here)
        wanted = second if group and found[2] else first
        return [] if wanted in known_here else [found[0]]
    if found := re.match(r"(?:python3? )?((?:scripts/\S+|run_\w+\.py))", line):
        return [] if (ROOT / found[1]).exists() else [found[0]]
    return []


@pytest.mark.parametrize(
    ("line", "lost"),
    [
        ("make run", []),
        ("make nothing", ["make nothing"]),
        ("tidegate limits show --json", []),
        ("tidegate limits shown", ["tidegate limits shown"]),
        ("KEY=$(tidegate keys create)", []),
        ("AUTH=on tidegate upp", ["tidegate upp"]),
        ("python -m chaos.nothing", ["python -m chaos.nothing"]),
        ("scripts/none.sh", ["scripts/none.sh"]),
    ],
)
def test_a_command_that_is_not_there_is_seen(line: str, lost: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert missing(line, commands(app), makefile) == lost


def test_every_setting_that_is_named_is_there() -> None:
    settings = {field.upper() for field in Config.model_fields}
    lost = [
        f"{document}: {found[1]}"
        for document in documents()
        for words in code_words(document)
        if (found := re.fullmatch(r"([A-Z]{3,}(?:_[A-Z]+)+)(?:=.*)?", words))
        and found[1].removesuffix("_FILE") not in settings | NOT_OURS | _KEYS_OF_OTHERS
        and not found[1].startswith(OF_OTHERS)
    ]
    assert lost == []


# What is written like a setting: statuses of Gemini's, a secret in general, providers' admin
# keys, base URLs of their SDKs, those of compose.yaml.
NOT_OURS = {
    *("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "NAME"),
    *("OPENAI_ADMIN_KEY", "ANTHROPIC_ADMIN_KEY", "ANTHROPIC_CUSTOM_HEADERS"),
    "GEMINI_CLI_CUSTOM_HEADERS",
    *("OPENAI_BASE_URL", "OPENAI_API_BASE", "ANTHROPIC_BASE_URL"),
    *("HTTP_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("TIDEGATE_PORT", "TIDEGATE_IMAGE", "TIDEGATE_MODEL_STEPS", "TIDEGATE_MODEL_SEED"),
}
OF_OTHERS = ("AWS_", "AZURE_", "GOOGLE_", "HTTPS_", "OLLAMA_", "OTEL_", "SSL_")


_PAGE_OF = {"continue_cli": "continue", "claude": "claude-code", "gemini": "gemini-cli"}
_OF_THE_TRIAL_ALONE = {"--data-dir"}  # keeps its state out of the home folder


@pytest.mark.parametrize(
    "agent", ["claude", "codex", "gemini", "opencode", "continue_cli", "cline"]
)
def test_the_page_of_an_agent_has_the_options_that_its_trial_needs(agent: str) -> None:
    tree = ast.parse((ROOT / "clients" / "programs" / "coding_agent.py").read_text("utf-8"))
    (tried,) = (one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == agent)
    words = {one.value for one in ast.walk(tried) if isinstance(one, ast.Constant)}
    options = {word for word in words if isinstance(word, str) and word.startswith("--")}
    page = text_of(f"docs/agents/{_PAGE_OF.get(agent, agent)}.md")
    assert {one for one in options - _OF_THE_TRIAL_ALONE if f"{one} " not in page} == set()


def test_the_index_leads_to_every_document() -> None:
    led_to = {link.partition("#")[0] for link in links("docs/README.md")}
    here = {path.removeprefix("docs/") for path in documents() if path.startswith("docs/")}
    alone = {path for path in here if "/" not in path} - {"README.md"}
    assert alone - led_to == set(), "docs/README.md does not lead to them"


def test_the_states_are_drawn_in_concepts_md_as_in_the_code() -> None:
    (drawn,) = [block.text for block in blocks("docs/concepts.md") if block.language == "text"]
    assert indent(drawn, "    ") in (call.__doc__ or "")


def test_the_glossary_of_concepts_md_has_the_words_in_order() -> None:
    table = text_of("docs/concepts.md").partition("## Glossary")[2]
    words = [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("| ")][1:]
    assert words == sorted(words, key=str.lower)
    assert set(words) >= {
        *("pool", "limit", "demand", "permit", "session", "waiter", "ticket", "lane", "tenant"),
        *("settle", "reap", "attempt", "outcome", "deadline", "timeout"),
    }


def test_shapes_are_told_apart() -> None:
    assert differences({"a": 1, "b": None}, {"a": 2.5, "b": "x"}) == []
    assert differences({"a": 1, "...": "..."}, {"a": 2, "b": 3}) == []
    assert differences({"a": [{"b": 1}]}, {"a": [{"b": 2}, {}]}) == []
    assert differences({"a": 1}, {"a": 1, "b": 2}) == ["it.b is not shown"]
    assert differences({"a": 1, "b": 1}, {"a": "x"}) == ["it.a is a text, not a number", "no it.b"]
    assert differences([1], []) != []
    assert differences({"a": True}, {"a": 1}) == ["it.a is a number, not a boolean"]
    events = 'event: a\ndata: {"x": 1}\n\nevent: a\ndata: {"x": 2}\n\nevent: done\ndata: {}\n\n'
    assert differences(streamed(events), streamed(events.replace("2", "3"))) == []
    assert differences(streamed(events), streamed(events.replace("done", "end"))) != []
    assert lines_that_differ("done 20 of 20\nby ...", "x\ndone   3 of 7\nby me") == []
    assert lines_that_differ("done 20 of 20", "done three of 7") == ["nothing like: done 20 of 20"]
