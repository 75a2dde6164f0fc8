"""llm: the command, with a model of `extra-openai-models.yaml`, as its documents say."""

import json
import os
import subprocess
import sys
from pathlib import Path

from cases import GPT, KEY, OPENAI_URL, QUESTION, TOOL_QUESTION, answered, case, run, told

FOLDER = Path.home() / "llm"
FOLDER.mkdir()
MODELS = [
    {"model_id": "here", "model_name": GPT, "api_base": OPENAI_URL, "supports_tools": True}
    | {"supports_schema": True},
    {"model_id": "old", "model_name": "gpt-3.5-turbo-instruct", "api_base": OPENAI_URL}
    | {"completion": True},
]
(FOLDER / "extra-openai-models.yaml").write_text(json.dumps(MODELS))
TOOL = f"def get_weather(city: str) -> str:\n    return {json.dumps('22 degrees')}\n"


def ask(*arguments):
    environment = os.environ | {"LLM_USER_PATH": str(FOLDER), "OPENAI_API_KEY": KEY}
    done = subprocess.run(
        [Path(sys.executable).with_name("llm"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr.strip()[-300:]
    return done.stdout


@case("streamed")
def _():
    answered(ask("-m", "here", QUESTION))


@case("text")
def _():
    answered(ask("-m", "here", "--no-stream", QUESTION))


@case("tools")
def _():
    told(ask("-m", "here", "--functions", TOOL, TOOL_QUESTION))


@case("structured")
def _():
    assert "name" in json.loads(ask("-m", "here", "--schema", "name, age int", QUESTION))


@case("completions")
def _():
    assert ask("-m", "old", QUESTION).strip()


run()
