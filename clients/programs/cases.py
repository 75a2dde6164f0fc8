"""Cases of one client: each prints a line of JSON, and one that fails stops no other.

Runs in the client's own environment, which has nothing of ours.
"""

import asyncio
import inspect
import json
import logging
import os

URL = os.environ["TIDEGATE_URL"]
OPENAI_URL = f"{URL}/v1"
GEMINI_URL = f"{URL}/v1beta"
KEY = "no-key-is-needed"
GPT, GEMINI, CLAUDE = "gpt-4o-mini", "gemini-2.5-flash", "claude-sonnet-5-5"
EMBEDDER = "text-embedding-3-small"
QUESTION = "Why is the sky blue?"
TOOL_QUESTION = "Please call get weather for Oslo"
RESULT = "22 degrees"
_cases = []


def case(name):
    def add(function):
        _cases.append((name, function))
        return function

    return add


def get_weather(city: str) -> str:
    """Get the weather of a city.

    Args:
        city: The name of the city.
    """
    assert city
    return RESULT


def answered(text):
    """The emulator's answer to QUESTION, or the failure that it is not."""
    assert "emulated answer" in str(text), f"not the answer: {text!r}"


def told(text):
    """The answer after a call of the tool, which quotes what the tool returned."""
    assert RESULT in str(text), f"the tool's result is not in the answer: {text!r}"


def run():
    logging.disable(logging.ERROR)
    for name, function in _cases:
        try:
            made = function()
            if inspect.isawaitable(made):
                asyncio.run(_awaited(made))
        except Exception as error:
            failed = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        else:
            failed = None
        print(json.dumps({"case": name, "failed": failed}), flush=True)


async def _awaited(made):
    await made
