"""Every program in examples/ runs against one Valkey, in any order: with its framework, or where
that is not installed, with as much of it as the program uses."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
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


def _ray(loop: asyncio.AbstractEventLoop) -> ModuleType:
    """As much of Ray: actors in one process, whose methods run concurrently."""
    ray = ModuleType("ray")

    class Method:
        def __init__(self, function: Any) -> None:
            self._function = function

        def remote(self, *values: object) -> Future[Any]:
            return asyncio.run_coroutine_threadsafe(self._function(*values), loop)

    class Actor:
        def __init__(self, inner: object) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Method:
            return Method(getattr(self._inner, name))

    class ActorClass:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def remote(self) -> Actor:
            return Actor(self._inner())

    vars(ray).update(
        init=lambda: None,
        remote=lambda **_: ActorClass,
        get=lambda futures: [one.result(30) for one in futures],
    )
    return ray


def test_actors_of_ray_share_one_limit(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_URL", valkey_url)
    loop = asyncio.new_event_loop()
    actors = Thread(target=loop.run_forever)
    actors.start()
    try:
        with patch.dict(sys.modules, {"ray": _ray(loop)}):
            for _ in range(2):
                runpy.run_path(str(EXAMPLES / "ray_remote.py"), run_name="__main__")
    finally:
        loop.call_soon_threadsafe(loop.stop)
        actors.join()
        loop.close()
    assert capsys.readouterr().out == "100 answered\n" * 2


def _airflow(returned: list[Any]) -> dict[str, ModuleType]:
    """As much of Airflow: mapped tasks run one after another, and return into `returned`."""
    airflow: Any = ModuleType("airflow")
    sdk: Any = ModuleType("airflow.sdk")

    class Task:
        def __init__(self, function: Any) -> None:
            self._function = function

        def __call__(self) -> Any:
            return self._function()

        def expand(self, **mapped: list[Any]) -> None:
            ((name, values),) = mapped.items()
            returned.extend(self._function(**{name: value}) for value in values)

    sdk.dag = lambda **_: lambda function: function
    sdk.task = lambda function=None, **_: Task if function is None else Task(function)
    return {"airflow": airflow, "airflow.sdk": sdk}


def test_mapped_tasks_of_airflow_take_a_permit_each(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", valkey_url)
    summaries: list[Any] = []
    with patch.dict(sys.modules, _airflow(summaries)):
        runpy.run_path(str(EXAMPLES / "airflow_dag.py"))
    assert summaries == [f"Summary of document {number}" for number in range(100)]


def _langchain(url: str) -> ModuleType:
    """As much of LangChain: a batch of calls by the client that it is given."""
    langchain = ModuleType("langchain_openai")

    class ChatOpenAI:
        def __init__(self, *, model: str, http_async_client: Any, max_retries: int) -> None:
            assert max_retries == 0  # each try takes a permit of its own
            self._model, self._client = model, http_async_client

        async def abatch(self, prompts: list[str]) -> list[Any]:
            return list(await asyncio.gather(*map(self._answer, prompts)))

        async def _answer(self, prompt: str) -> Any:
            body = {"model": self._model, "messages": [{"role": "user", "content": prompt}]}
            answer = await self._client.post(f"{url}/v1/chat/completions", json=body)
            return answer.raise_for_status().json()

    vars(langchain)["ChatOpenAI"] = ChatOpenAI
    return langchain


async def test_a_batch_of_langchain_runs_under_the_limiter(
    valkey_url: str,
    upstream: Upstream,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REDIS_URL", valkey_url)
    program = str(EXAMPLES / "langchain_chat.py")
    with patch.dict(sys.modules, {"langchain_openai": _langchain(upstream.url)}):
        for _ in range(2):
            await asyncio.to_thread(runpy.run_path, program, run_name="__main__")
    assert capsys.readouterr().out == "8 answered\n" * 2
    assert upstream.peak <= 5


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
