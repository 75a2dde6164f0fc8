"""Accounts at two providers, which one emulator answers for, as upstreams of a policy's file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tidegate.emulator.server import Emulator, run_emulator

ADMIN_KEY = "sk-admin-very-secret"


def write_accounts(folder: Path, emulator: Emulator) -> Path:
    """The policy's file: OpenAI's account `oai`, and Anthropic's `ant`."""
    path = folder / "tidegate.toml"
    path.write_text(
        f"""
        [upstreams.oai]
        provider = "openai"
        base_url = "{emulator.url}/v1"
        key = "OPENAI_API_KEY"
        models = ["gpt-*", "text-embedding-*"]

        [upstreams.ant]
        provider = "anthropic"
        base_url = "{emulator.url}"
        key = "ANTHROPIC_API_KEY"
        models = ["claude-*"]
        """
    )
    return path


@pytest.fixture
async def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Emulator]:
    """The emulator, with keys of calls and admin keys in the environment, and `tidegate.toml` in
    the test's folder."""
    for name in ("OPENAI", "ANTHROPIC"):
        monkeypatch.setenv(f"{name}_API_KEY", "sk-of-calls")
        monkeypatch.setenv(f"{name}_ADMIN_KEY", ADMIN_KEY)
    async with run_emulator() as emulator:
        write_accounts(tmp_path, emulator)
        yield emulator
