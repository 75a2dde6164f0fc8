"""The rights that the limiter needs, read from its scripts, and the line in the documentation."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

DOCUMENT = Path(__file__).parents[3] / "docs" / "servers.md"
# What the connections themselves say: facts about the server, the scripts, the subscription.
OF_THE_CONNECTIONS = {"client|setinfo", "info", "ping", "evalsha", "eval", "ssubscribe"}
_COMMAND = re.compile(r'\.command\(\s*\(\s*"(\w+)"')
_CALL = re.compile(r"\bp?call\(\s*'(\w+)'(?:,\s*'(SHARDNUMSUB)')?")


def of_the_limiter() -> set[str]:
    """Every command that a fragment in `lua/` calls, and those sent without a script."""
    found: set[str] = set()
    limiter = files("tidegate.limiter")
    for module in limiter.iterdir():
        if module.name.endswith(".py"):
            found |= {name.lower() for name in _COMMAND.findall(module.read_text("utf-8"))}
    lua = limiter.joinpath("lua")
    parts = [*lua.iterdir(), *lua.joinpath("lib").iterdir()]
    for fragment in (part for part in parts if part.name.endswith(".lua")):
        for command, inner in _CALL.findall(fragment.read_text(encoding="utf-8")):
            found.add(f"{command}|{inner}".lower() if inner else command.lower())
    return found


def documented() -> list[str]:
    """The rules of the ACL line in docs/servers.md, less the words that name the user."""
    line = re.search(r"^ACL SETUSER tidegate on >\S+ (.+)$", _text(), re.MULTILINE)
    assert line is not None
    return line[1].split()


def documented_for(where: str) -> str:
    """The rules of a row of the second table: what some kinds of place need besides."""
    row = re.search(rf"^\| {re.escape(where)} \| `([^`]+)` \|$", _text(), re.MULTILINE)
    assert row is not None, where
    return row[1].replace("\\|", "|")  # as a table has it


def _text() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


def of_a_cluster() -> str:
    return " ".join((*documented(), documented_for("every node of a Cluster")))


def of_sentinels() -> tuple[str, str]:
    """For the servers that they watch, and for the sentinels."""
    servers = " ".join((*documented(), documented_for("the servers that sentinels watch")))
    return servers, documented_for("the sentinels")
