"""Metrics of several processes on one machine, asked of any of them; and of a worker by itself."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from openai import AsyncOpenAI

from tests.batching import assert_all_succeeded, begin, content, end_of
from tests.forked import Forked, started
from tests.gateway import Gateway, Opener
from tests.integration.observability.test_metrics import Values, chat, of, values_in
from tests.waiting import wait_until
from tidegate.embedded.servers import free_port
from tidegate.metrics.instruments import forget
from tidegate.supervisor.supervisor import DailyWork, _count_failure
from tidegate.telemetry.logging import NAMED, SHARED

OWN = {"CLASSIFIER": "keywords", "LOG_FORMAT": "json", "SHUTDOWN_GRACE_MS": "1000"}


@contextmanager
def running(gateway: Gateway, folder: Path, *arguments: str, **settings: str) -> Iterator[Forked]:
    """A process of this deployment, with its log in `folder`."""
    config = gateway.config
    assert config.database_url is not None
    assert config.redis_url is not None
    env = {
        "PATH": "",
        "DATABASE_URL": config.database_url.get_secret_value(),
        "REDIS_URL": config.redis_url.get_secret_value(),
        "GEMINI_API_KEY": "k",
        "GEMINI_BASE_URL": config.gemini_base_url,
        "DATA_DIR": str(config.data_dir),
        **OWN,
        **settings,
    }
    with (folder / "log").open("ab") as log:
        process = started(["tidegate", *arguments], cwd=folder, env=env, stdout=log, stderr=log)
    assert isinstance(process, Forked)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


async def scraped(gateway: Gateway, url: str) -> Values:
    async with gateway.http.get(f"{url}/metrics") as response:
        assert response.status == 200, await response.text()
        return values_in(await response.text())


async def ready(gateway: Gateway, url: str) -> None:
    async def answers() -> bool:
        try:
            async with gateway.http.get(f"{url}/health/ready") as response:
                return response.status == 200
        except OSError:
            return False

    await wait_until(answers, 20, f"{url} is ready")


async def url_of_worker(folder: Path) -> str:
    """Where a worker that logs to `folder` answers."""

    def told() -> str | None:
        found = re.search(r'"url":"http://localhost:(\d+)"', (folder / "log").read_text())
        return f"http://127.0.0.1:{found[1]}" if found else None

    url: str = await wait_until(told, 20, "it says where it answers")
    return url


async def ask(gateway: Gateway, url: str) -> None:
    async with gateway.http.post(f"{url}/v1/chat/completions", json=chat("Hi")) as response:
        assert response.status == 200, await response.text()
        await response.read()


async def fail_twice(counts: Path) -> None:
    """The daily work of the supervisor of a family."""
    exits: list[int | None] = [1, None]

    async def run(_command: tuple[str, ...]) -> int:
        if (status := exits.pop(0)) is None:
            raise OSError(errno.ENOMEM, "no memory for a process")
        return status

    daily = DailyWork(
        lambda: [("prune",)],
        run,
        now=lambda: datetime(2026, 11, 29, 4, tzinfo=UTC),
        on_failed=lambda: _count_failure(str(counts)),
    )
    await daily.run_due()
    await daily.run_due()
    assert exits == []


async def test_any_of_a_family_tells_of_all_and_what_died_is_still_counted(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False)
    counts = tmp_path / "counts"
    counts.mkdir()
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]

    def named(place: int) -> dict[str, str]:
        return {SHARED: str(counts), NAMED: f"api-{place}", "PORT": str(ports[place])}

    def calls(values: Values) -> float:
        return of(values, "tidegate_calls_total", source="relay", status="succeeded")

    with running(gateway, tmp_path, "serve", **named(0)):
        with running(gateway, tmp_path, "serve", **named(1)) as doomed:
            for url, count in zip(urls, (2, 3), strict=True):
                await ready(gateway, url)
                for _ in range(count):
                    await ask(gateway, url)

            async def all_seen() -> bool:
                seen = [calls(await scraped(gateway, url)) for url in urls]
                return seen == [5, 5]

            await wait_until(all_seen, 20, "both tell of the calls of both")

            async def both_up() -> Values | None:
                values = await scraped(gateway, urls[0])
                up = of(values, "tidegate_limiter_processes", pool="gemini", state="up")
                queued = of(values, "tidegate_queue_seconds_count", source="relay")
                return values if (up, queued) == (2, 5) else None

            values = await wait_until(both_up, 20, "the limiter knows of both, and all is told")
            assert of(values, "tidegate_permits_held", process="api-1") == 0
            assert of(values, "tidegate_process_resident_memory_bytes", process="api-1") > 1e7
            # A page of a mapped file that finds no room on a full disk kills the process (SIGBUS).
            files = {one.name: one.stat() for one in counts.iterdir()}
            assert [name for name, one in files.items() if one.st_blocks * 512 < one.st_size] == []
            log = tmp_path / "log"
            doomed.send_signal(signal.SIGQUIT)
            await wait_until(lambda: '"event":"process_state"' in log.read_text(), 20, "its state")
            doomed.kill()
            doomed.wait(10)
        forget("api-1", str(counts))
        assert of(values, "tidegate_problems_total", event="daily_work_failed") == 0
        await fail_twice(counts)

        async def forgotten() -> Values | None:
            values = await scraped(gateway, urls[0])
            held = of(values, "tidegate_process_resident_memory_bytes", process="api-1")
            return values if not held else None

        values = await wait_until(forgotten, 20, "its gauges are gone")
        assert calls(values) == 5, "what it counted is not"
        assert of(values, "tidegate_problems_total", event="daily_work_failed") == 2
        with running(gateway, tmp_path, "serve", **named(1)):
            await ready(gateway, urls[1])
            await ask(gateway, urls[1])

            async def goes_on() -> bool:
                return calls(await scraped(gateway, urls[0])) == 6

            await wait_until(goes_on, 20, "its successor goes on counting")
            assert len(list(counts.glob("counter_api-*"))) == 2, "no new files for each start"


async def test_a_worker_by_itself_answers_on_a_port_of_its_own(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False)
    with running(gateway, tmp_path, "worker", WORKER_PORT="0"):
        url = await url_of_worker(tmp_path)
        await gateway.end_of(await gateway.submit(data="Explain the tide"))

        async def counted() -> Values | None:
            values = await scraped(gateway, url)
            jobs = of(values, "tidegate_calls_total", source="job", status="succeeded")
            return values if jobs == 1 else None

        values: Values = await wait_until(counted, 20, "the job is counted")
        assert of(values, "tidegate_workers") == 1
        assert of(values, "tidegate_event_loop_lag_seconds_count", process="worker") > 0
        async with gateway.http.get(f"{url}/submit") as response:
            assert response.status == 404


async def test_each_attempt_of_a_batch_line_is_counted_once_whatever_claims_it_took(
    open_gateway: Opener, tmp_path: Path
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_fault("internal", count=2)
    with running(gateway, tmp_path, "worker", WORKER_PORT="0"):
        url = await url_of_worker(tmp_path)
        async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="of-a-client") as client:
            done = await end_of(client, await begin(client, content(1)))
            await assert_all_succeeded(client, done, 1)

        async def counted() -> Values | None:
            values = await scraped(gateway, url)
            ended = of(values, "tidegate_calls_total", source="batch", status="succeeded")
            return values if ended else None

        values: Values = await wait_until(counted, 20, "the line is counted")
    assert len(await gateway.calls()) == 3
    assert of(values, "tidegate_calls_total", source="batch", status="retried") == 2
    assert of(values, "tidegate_attempts_total", source="batch") == 3
    assert of(values, "tidegate_retries_total", source="batch") == 2
    assert await gateway.database.fetchval("SELECT attempts FROM audit") == 3
