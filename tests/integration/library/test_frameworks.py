"""Every program in examples/: those whose framework is installed run, in any order and twice,
against one Valkey; the others are read, and use what the library has."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock, patch

import pytest
from fastapi.testclient import TestClient

import tidegate.limiter
from tests.integration.library.upstream import Upstream
from tidegate.emulator.server import Emulator
from tidegate.errors import LimiterUnavailable, QueueFull

EXAMPLES = Path(__file__).parents[3] / "examples"
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
POOL = re.compile(r'pool="([\w-]+)"')
SAYS = {
    "openai_sdk": "assistant\n",
    "anthropic_sdk": "assistant\n",
    "google_sdk": "8 answered\n",
}


@pytest.fixture(autouse=True)
def _nothing_leaks() -> None:
    """The pools of the examples are none of this test's."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAYS))
async def test_an_sdk_of_others_runs_under_the_limiter(
    name: str, valkey_url: str, emulator: Emulator, upstream: Upstream
) -> None:
    keys = dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"), "k")
    urls = {
        "REDIS_URL": valkey_url,
        "OPENAI_BASE_URL": f"{upstream.url}/v1",
        "ANTHROPIC_BASE_URL": emulator.url,
        "GOOGLE_GEMINI_BASE_URL": emulator.url,
    }
    for _ in range(2):
        done = await asyncio.to_thread(run, name, keys | urls)
        assert (done.returncode, done.stdout) == (0, SAYS[name]), done.stderr


def run(name: str, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_service_of_fastapi_answers_and_refuses(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", valkey_url)
    app = runpy.run_path(str(EXAMPLES / "fastapi_app.py"))["app"]
    with TestClient(app) as client:
        answer = client.get("/ask", params={"prompt": "hello"}, headers={"x-team": "acme"})
        assert answer.json() == {"answer": "You said: hello"}
        misnamed = client.get("/ask", params={"prompt": "hello"}, headers={"x-team": "a b"})
        assert misnamed.status_code == 422
        client.portal.call(pause, app.state.limiter)  # type: ignore[union-attr]
        refused = client.get("/ask", params={"prompt": "hello"})
        assert (refused.status_code, refused.json()["limit"]) == (503, "llm")
        assert 3_000 < int(refused.headers["retry-after"]) <= 3_600
        client.portal.call(app.state.limiter.resume, "llm")  # type: ignore[union-attr]


async def pause(limiter: tidegate.limiter.Limiter) -> None:
    await limiter.penalise("llm", for_ms=3_600_000)


class _Signal:
    def connect(self, function: Any) -> Any:
        return function


def _celery() -> dict[str, ModuleType]:
    """As much of Celery as the example uses, so that its own lines run."""
    celery, signals = ModuleType("celery"), ModuleType("celery.signals")

    class Celery:
        def __init__(self, *_: object, **__: object) -> None: ...

        def task(self, **_: object) -> Any:
            return lambda function: function

    celery.Celery = Celery  # type: ignore[attr-defined]
    signals.worker_process_init = _Signal()  # type: ignore[attr-defined]
    signals.worker_process_shutdown = _Signal()  # type: ignore[attr-defined]
    return {"celery": celery, "celery.signals": signals}


def test_a_task_of_celery_waits_or_is_retried(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", valkey_url)

    class Retried(Exception):
        pass

    class Task:
        def retry(self, countdown: float) -> Exception:
            return Retried(countdown)

    with patch.dict(sys.modules, _celery()):
        tasks = runpy.run_path(str(EXAMPLES / "celery_tasks.py"))
    tasks["open_limiter"]()
    limiter = tasks["open_limiter"].__globals__["limiter"]
    try:
        assert tasks["ask"](Task(), "hello") == "You said: hello"
        limiter.penalise("llm", for_ms=3_600_000)
        with pytest.raises(Retried) as retried:
            tasks["ask"](Task(), "hello")
        assert 3_000 < retried.value.args[0] <= 3_600
        limiter.resume("llm")
        for refusal in (LimiterUnavailable, QueueFull):
            refused = refusal("not now", limit="llm", retry_after_ms=2_000)
            monkeypatch.setattr(limiter, "acquire", Mock(side_effect=refused))
            with pytest.raises(Retried) as retried:
                tasks["ask"](Task(), "hello")
            assert retried.value.args[0] == 2
    finally:
        tasks["close_limiter"]()


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example_uses_what_there_is(name: str) -> None:
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "it says what it limits"
    taken = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "tidegate.limiter"
        for alias in node.names
    ]
    assert taken
    assert [one for one in taken if one not in tidegate.limiter.__all__] == []


def test_every_example_has_a_pool_of_its_own_and_is_listed() -> None:
    texts = {name: (EXAMPLES / f"{name}.py").read_text(encoding="utf-8") for name in PROGRAMS}
    pools = [pool for text in texts.values() for pool in POOL.findall(text)]
    assert len(pools) == len(set(pools)) == len(PROGRAMS)
    listed = re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == PROGRAMS
