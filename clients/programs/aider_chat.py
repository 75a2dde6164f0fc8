"""aider: one message, whole and streamed, in an empty repository."""

import os
import subprocess
import sys
from pathlib import Path

from cases import GPT, KEY, OPENAI_URL, QUESTION, answered, case, run

FLAGS = (
    *("--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--no-pretty"),
    *("--no-show-release-notes", "--analytics-disable", "--no-detect-urls", "--map-tokens", "0"),
)


def ask(*flags):
    environment = os.environ | {"OPENAI_API_KEY": KEY, "OPENAI_API_BASE": OPENAI_URL}
    aider = Path(sys.executable).with_name("aider")
    command = [aider, "--model", f"openai/{GPT}", *FLAGS, *flags, "--message", QUESTION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, (done.stderr or done.stdout).strip()[-300:]
    answered(" ".join(done.stdout.split()))


@case("text")
def _():
    ask("--no-stream")


@case("streamed")
def _():
    ask("--stream")


run()
