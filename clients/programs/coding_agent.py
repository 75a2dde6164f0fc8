"""Coding agents of npm, each with one question and no tools. Runs in our own Python.

The argument is the folder of their packages; which one is there says which agent is tried.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cases import GPT, KEY, OPENAI_URL, QUESTION, URL, answered, case, run

PACKAGES = Path(sys.argv[1])
LONGEST_S = 100
SPENT, PAUSED = "spent", "is paused"
# No script of a package runs as it is installed: two are called where their packages hold them.
PROGRAMS = {
    "claude": "@anthropic-ai/claude-code-linux-*/claude",
    "codex": ".bin/codex",
    "gemini": ".bin/gemini",
    "opencode": "opencode-linux-*/bin/opencode",
    "continue": "@continuedev/cli/dist/cn.js",
    "cline": "@cline/cli-linux-*/bin/cline",
}
AGENTS = {
    name: found for name, place in PROGRAMS.items() if (found := sorted(PACKAGES.glob(place)))
}


def ask(name, *arguments, **variables):
    """Its answer to the question; of a model whose budget is paused, that it says so, which takes
    no longer than an answer."""
    done = subprocess.run(
        [AGENTS[name][0], *arguments],
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    told = f"{done.stdout.strip()[-800:]} {done.stderr.strip()[-2_000:]}"
    if SPENT in " ".join([*arguments, *_configured()]):
        assert PAUSED in " ".join(f"{done.stdout} {done.stderr}".split()), told[-500:]
        return
    assert not done.returncode, told[-500:]
    answered(" ".join(done.stdout.split()))


def _configured():
    """The files that name a model."""
    return [path.read_text() for path in map(Path, ("config.yaml",)) if path.exists()]


def claude(model):
    ask(
        *("claude", "-p", QUESTION, "--model", model),
        ANTHROPIC_BASE_URL=URL,
        ANTHROPIC_API_KEY=KEY,
    )


def codex(model=GPT):
    provider = {"name": "here", "base_url": OPENAI_URL, "wire_api": "responses", "env_key": "KEY"}
    settings = [
        f"model_providers.here.{name}={json.dumps(value)}" for name, value in provider.items()
    ]
    flags = [word for one in [*settings, 'model_provider="here"'] for word in ("-c", one)]
    ask("codex", "exec", "--skip-git-repo-check", "-m", model, *flags, QUESTION, KEY=KEY)


def gemini(*model):
    settings = Path.home() / ".gemini" / "settings.json"
    settings.parent.mkdir(exist_ok=True)
    chosen = {"security": {"auth": {"selectedType": "gemini-api-key"}}}
    settings.write_text(json.dumps(chosen))
    ask(
        *("gemini", "--skip-trust", "-p", QUESTION, *model),
        GOOGLE_GEMINI_BASE_URL=URL,
        GEMINI_API_KEY=KEY,
    )


def opencode(provider, package, url, model):
    options = {"baseURL": url, "apiKey": KEY}
    here = {"npm": package, "options": options, "models": {model: {}}}
    Path("opencode.json").write_text(json.dumps({"provider": {provider: here}}))
    ask("opencode", "run", "-m", f"{provider}/{model}", QUESTION)


def continue_cli(provider, url, model):
    here = {"name": "here", "provider": provider, "model": model, "apiBase": url, "apiKey": KEY}
    config = {"name": "here", "version": "0.0.1", "schema": "v1", "models": [here]}
    Path("config.yaml").write_text(json.dumps(config))  # JSON is YAML
    quiet = {"CONTINUE_TELEMETRY_ENABLED": "0", "GOOGLE_GEMINI_BASE_URL": URL}
    ask("continue", "--config", "config.yaml", "-p", QUESTION, **quiet)


def cline(model=GPT):
    known = ("--data-dir", str(Path("state").resolve()))
    provider = ("-p", "openai", "-k", KEY, "-m", model, "-b", OPENAI_URL)
    subprocess.run(
        [AGENTS["cline"][0], "auth", *provider, *known],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LONGEST_S,
        check=True,
    )
    ask("cline", *known, "-P", "openai", "-m", model, "-p", QUESTION)


if "claude" in AGENTS:
    for name in ("sonnet", "opus", "haiku"):
        case(name)(lambda name=name: claude(name))
    case("paused budget")(lambda: claude("claude-spent-5"))
elif "codex" in AGENTS:
    case("responses")(codex)
    case("paused budget")(lambda: codex("gpt-spent"))
elif "gemini" in AGENTS:
    case("default model")(gemini)
    case("gemini-2.5-flash")(lambda: gemini("-m", "gemini-2.5-flash"))
    case("paused budget")(lambda: gemini("-m", "gemini-spent"))
elif "opencode" in AGENTS:
    WAYS = (
        ("openai", "@ai-sdk/openai", OPENAI_URL, GPT),
        ("anthropic", "@ai-sdk/anthropic", OPENAI_URL, "claude-sonnet-4-5"),
        ("google", "@ai-sdk/google", f"{URL}/v1beta", "gemini-2.5-flash"),
        ("compatible", "@ai-sdk/openai-compatible", OPENAI_URL, GPT),
    )
    for way in WAYS:
        case(way[0])(lambda way=way: opencode(*way))
    case("paused budget")(lambda: opencode(*WAYS[0][:3], "gpt-spent"))
elif "continue" in AGENTS:
    PLACES = (
        ("openai", OPENAI_URL, GPT),
        ("anthropic", f"{OPENAI_URL}/", "claude-sonnet-4-5"),
        ("gemini", f"{URL}/v1beta/", "gemini-2.5-flash"),
    )
    for place in PLACES:
        case(place[0])(lambda place=place: continue_cli(*place))
    case("paused budget")(lambda: continue_cli("openai", OPENAI_URL, "gpt-spent"))
elif "cline" in AGENTS:
    case("openai")(cline)
    case("paused budget")(lambda: cline("gpt-spent"))
assert shutil.which("node"), "node is not installed"
run()
