"""Every process is replaced under a steady load of strict clients, and not one request fails."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.balanced import Balanced, balanced, checkout_before, forget_checkout
from tests import product
from tests.fleet import LIMITS, ROOT
from tests.scenarios import SLOW
from tests.steady import Steady, steady_load
from tests.waiting import wait_until
from tidegate.emulator.client import EmulatorControl
from tidegate.store.database import HEAD, migrate

_VERSIONS = "src/tidegate/store/migrations"


def _say(line: str) -> None:
    sys.stdout.write(f"\n  {line}\n")


def _told(load: Steady, since: float) -> None:
    took_s = time.monotonic() - since
    _say(f"{sum(load.done.values())} requests in {took_s:.0f} s, {len(load.failed)} failed")


@pytest.fixture
def older(tmp_path: Path) -> Iterator[Path]:
    """The code as it was before the newest migration."""
    newest = max((ROOT / _VERSIONS).glob("r0*.sql")).name
    folder = checkout_before(f"{_VERSIONS}/{newest}", tmp_path / "older")
    yield folder
    forget_checkout(folder)


async def _replace_all(both: Balanced, load: Steady, code: Path) -> None:
    for slot in (0, 1):
        await both.replace_api(slot, code)
        await load.more(3)
    await both.replace_worker(code)
    await load.more(3)


async def test_behind_haproxy_one_after_another(tmp_path: Path) -> None:
    async with balanced(tmp_path) as both:
        await migrate(both.fleet.postgres.url())
        await both.fleet.control.set_behaviour(**SLOW)
        for slot in (0, 1):
            await both.start_api(slot, ROOT)
        both.start_worker(ROOT)
        await both.answers()
        began = time.monotonic()
        async with steady_load(both.url, "roll") as load:
            await load.more(3)
            for _ in range(3):
                await _replace_all(both, load, ROOT)
            _told(load, began)
        await load.assert_called_once(both.fleet.control, "roll")
        await both.fleet.assert_never_over()


async def test_an_upgrade_with_a_migration_and_a_rollback(tmp_path: Path, older: Path) -> None:
    """The older version serves before, beside and after the newer one, on the newer schema."""
    async with balanced(tmp_path) as both:
        url = both.fleet.postgres.url()
        program = "import asyncio, sys; from tidegate.store.database import migrate; "
        code = f"{program} print(asyncio.run(migrate(sys.argv[1])))"
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", code, url],
            env={"PYTHONPATH": str(older / "src")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip().endswith(f"{int(HEAD) - 1:04}")
        await both.fleet.control.set_behaviour(**SLOW)
        for slot in (0, 1):
            await both.start_api(slot, older)
        both.start_worker(older)
        await both.answers()
        began = time.monotonic()
        async with steady_load(both.url, "up") as load:
            await load.more(3)
            assert await migrate(url) == HEAD
            await load.more(3)
            _say("the older version serves on the newer schema")
            await _replace_all(both, load, ROOT)
            _say("upgraded")
            await _replace_all(both, load, older)
            _say("rolled back")
            _told(load, began)
        await load.assert_called_once(both.fleet.control, "up")
        await both.fleet.assert_never_over()


def test_up_renews_two_and_two_again_and_again(tmp_path: Path) -> None:
    with product.started(tmp_path, "--api", "2", "--workers", "2") as running:
        asyncio.run(_renewed_again_and_again(running))


async def _renewed_again_and_again(running: product.Product) -> None:
    def renewed() -> int:
        return running.said().count('"event":"renewed"')

    def more_than(before: int) -> Callable[[], bool]:
        return lambda: renewed() > before or bool(load.failed)

    port = (running.data_dir / "embedded/emulator/port").read_text().strip()
    async with EmulatorControl(f"http://127.0.0.1:{port}") as upstream:
        await upstream.set_behaviour(**SLOW)
        began = time.monotonic()
        async with steady_load(running.base_url, "again") as load:
            for _ in range(3):
                await load.more(3)
                before = renewed()
                running.process.send_signal(signal.SIGUSR2)
                await wait_until(more_than(before), 120)
            await load.more(3)
            _told(load, began)
        await load.assert_called_once(upstream, "again")
        stats = await upstream.stats()
        assert stats["text_only"].max_in_flight <= LIMITS["text_only"]
