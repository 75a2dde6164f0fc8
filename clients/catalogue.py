"""Which clients are tried, in which versions, and with which program.

Each has an environment of its own below `.bench/`, since some of them exclude one another.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.environments import node_modules_with, program, python_with

PROGRAMS = Path(__file__).with_name("programs")


@dataclass(frozen=True, slots=True)
class Client:
    """One client and the program that tries it, which is named as its file in `programs/`.

    `python` are packages of an environment of its own, `node` those of npm. The first names the
    version that is reported.
    """

    name: str
    program: str
    python: tuple[str, ...] = ()
    node: Mapping[str, str] = field(default_factory=dict)
    newest_python: tuple[int, int] = (3, 99)

    @property
    def version(self) -> str:
        named = self.python[0].partition("==")[2] if self.python else ""
        return named or next(iter(self.node.values()))

    def command(self) -> list[str | Path]:
        """What runs its cases. Installs it first; raises EnvironmentMissing."""
        if self.python:
            python = python_with(
                f"client-{self.name}", self.python, newest=self.newest_python, compiled=False
            )
            return [python, PROGRAMS / self.program]
        modules = node_modules_with(f"client-{self.name}", self.node, {})
        if self.program.endswith(".py"):  # it tries programs, and needs no packages
            return [sys.executable, PROGRAMS / self.program, modules]
        # An import is looked up from the file's own folder upwards.
        for name in (self.program, "cases.mjs"):
            shutil.copyfile(PROGRAMS / name, modules.parent / name)
        return [program("node", "nodejs"), modules.parent / self.program]


CLIENTS = (
    Client("openai", "openai_sdk.py", ("openai==3.57.0",)),
    Client("anthropic", "anthropic_sdk.py", ("anthropic==2.14.0",)),
    Client("bedrock", "bedrock_sdk.py", ("boto3==1.44.8", "anthropic==2.14.0")),
    Client("google-genai", "google_sdk.py", ("google-genai==3.6.1",)),
    Client("litellm", "litellm_sdk.py", ("litellm==1.110.2",)),
    Client(
        "langchain",
        "langchain_chat.py",
        (
            "langchain==1.5.2",
            "langchain-openai==1.7.4",
            "langchain-anthropic==1.7.10",
            "langchain-google-genai==4.4.3",
        ),
    ),
    Client(
        "llama-index",
        "llama_index_llms.py",
        (
            "llama-index-core==0.14.25",
            "llama-index-llms-openai-like==0.8.1",
            "llama-index-embeddings-openai-like==0.4.0",
            "llama-index-llms-google-genai==0.11.3",
            "llama-index-llms-anthropic==0.12.3",
            "anthropic==0.116.0",
        ),
    ),
    Client(
        "pydantic-ai",
        "pydantic_ai_agents.py",
        ("pydantic-ai-slim[openai,anthropic,google]==2.68.0",),
    ),
    Client(
        "instructor",
        "instructor_models.py",
        ("instructor==1.17.0", "google-genai==3.6.1", "anthropic==2.14.0", "jsonref==1.1.0"),
    ),
    Client("openai-agents", "openai_agents.py", ("openai-agents==0.24.0",)),
    Client("google-adk", "google_adk.py", ("google-adk==2.13.0",)),
    Client("dspy", "dspy_modules.py", ("dspy==3.4.1", "numpy==2.5.5")),
    Client(
        "haystack",
        "haystack_generators.py",
        ("haystack-ai==3.4.1", "anthropic-haystack==8.0.1", "google-genai-haystack==7.0.0"),
    ),
    Client("llm", "llm_models.py", ("llm==0.36",)),
    Client("smolagents", "smolagents_agents.py", ("smolagents[openai]==1.26.0",)),
    Client("crewai", "crewai_crew.py", ("crewai==1.15.30",)),
    Client("aider", "aider_chat.py", ("aider-chat==0.86.2",), newest_python=(3, 12)),
    Client("mem0", "mem0_memory.py", ("mem0ai==2.2.1",)),
    Client("npm openai", "openai.mjs", node={"openai": "7.59.0"}),
    Client("npm anthropic", "anthropic.mjs", node={"@anthropic-ai/sdk": "1.14.0"}),
    Client("npm google", "google.mjs", node={"@google/genai": "3.3.0"}),
    Client(
        "vercel",
        "vercel.mjs",
        node={
            "ai": "7.0.173",
            "@ai-sdk/openai": "4.0.118",
            "@ai-sdk/anthropic": "4.0.105",
            "@ai-sdk/google": "4.0.121",
            "@ai-sdk/openai-compatible": "3.0.92",
            "zod": "4.6.7",
        },
    ),
    Client("claude-code", "coding_agent.py", node={"@anthropic-ai/claude-code": "2.1.332"}),
    Client("codex", "coding_agent.py", node={"@openai/codex": "0.171.0"}),
    Client("gemini-cli", "coding_agent.py", node={"@google/gemini-cli": "0.61.0"}),
    Client("opencode", "coding_agent.py", node={"opencode-ai": "1.18.33"}),
    Client("continue", "coding_agent.py", node={"@continuedev/cli": "1.5.47"}),
    Client("cline", "coding_agent.py", node={"cline": "3.0.65"}),
)
