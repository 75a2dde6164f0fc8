"""Versions of clients in the guides: those that `make clients` and `make suites` run."""

from __future__ import annotations

import re

import pytest

from clients.catalogue import CLIENTS
from clients.suites import anthropic, openai
from tests.markdown import ROOT

VERSION = r"(\d+\.\d+\.\d+)"
# What the guides call a client, and its package.
NAMED = {
    "docs/gateway.md": {
        "rest of OpenAI's API, as in its SDK": "openai",
        "of Anthropic's, as in its SDK": "anthropic",
        "LangChain": "langchain",
        "Vercel's `ai`": "ai",
    },
    "docs/agents/README.md": {
        "SDK of OpenAI": "openai",
        "SDK of Anthropic": "anthropic",
        "SDK of Google": "google-genai",
        "Claude Code": "@anthropic-ai/claude-code",
        "Codex": "@openai/codex",
        "Gemini CLI": "@google/gemini-cli",
        "opencode": "opencode-ai",
        "Cline": "cline",
        "Continue": "@continuedev/cli",
    },
    "examples/README.md": {"langchain-openai": "langchain-openai"},
}


def pinned() -> dict[str, str]:
    """The version of each package; the first client that pins one counts."""
    found: dict[str, str] = {}
    for client in CLIENTS:
        for package in client.python:
            name, _, version = package.partition("==")
            found.setdefault(name.partition("[")[0], version)
        for name, version in client.node.items():
            found.setdefault(name, version)
    return found


@pytest.mark.parametrize("guide", NAMED)
def test_a_guide_names_the_versions_that_are_run(guide: str) -> None:
    text, pins = (ROOT / guide).read_text(encoding="utf-8"), pinned()
    named = {
        name: found[1] if (found := re.search(rf"{re.escape(name)} {VERSION}", text)) else None
        for name in NAMED[guide]
    }
    assert named == {name: pins[package] for name, package in NAMED[guide].items()}


def test_the_guide_to_the_tests_names_the_versions_of_the_suites() -> None:
    text = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    assert f"The SDK ({openai.VERSION}, with its tests)" in text
    assert f"the suite of anthropic-sdk-python ({anthropic.VERSION}," in text
