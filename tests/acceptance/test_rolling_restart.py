"""All processes of a running product are replaced under load, and no client notices."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fleet import LIMITS
from tests.steady import steady_load
from tests.waiting import wait_until
from tidegate.emulator.client import EmulatorControl
from tidegate.telemetry.logging import NAMED

if TYPE_CHECKING:
    from tests.product import Product

pytestmark = pytest.mark.slow

pytest_plugins = ["tests.product"]

# Eight clients at once, most of whose time passes at the provider: the processes that start share
# the machine with them.
_SLOW = {"first_byte_ms": {"*": {"uniform": [150, 300]}, "classifier": 20}, "between_ms": 10}


def _emulator(data_dir: Path) -> EmulatorControl:
    port = (data_dir / "embedded" / "emulator" / "port").read_text().strip()
    return EmulatorControl(f"http://127.0.0.1:{port}")


async def test_sigusr2_replaces_every_process_and_no_request_fails(product: Product) -> None:
    async with _emulator(product.data_dir) as upstream:
        await upstream.set_behaviour(**_SLOW)
        try:
            async with steady_load(product.base_url, "roll") as load:
                await load.more(5)  # jobs too: the worker has started
                started = product.said().count('"event":"started"')
                renewed = product.said().count('"event":"renewed"')
                product.process.send_signal(signal.SIGUSR2)
                await wait_until(
                    lambda: product.said().count('"event":"renewed"') > renewed or load.failed, 60
                )
                await load.more(5)
            stats = await upstream.stats()
            assert stats["text_only"].max_in_flight == LIMITS["text_only"], "used, and never over"
            await load.assert_called_once(upstream, "roll")
        finally:
            await upstream.set_behaviour(first_byte_ms={}, between_ms=0)
    said = product.said()
    assert said.count('"event":"started"') == started + 2, "one API, one worker"
    assert not re.search(r'"event":"child_died"', said)


def _children(supervisor: int) -> dict[int, str]:
    """The supervised processes, with their environments."""
    pids = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    found = {int(pid): _variables(pid) for pid in pids}
    return {pid: variables for pid, variables in found.items() if f"\0{NAMED}=" in variables}


def _variables(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return ""


async def test_a_renewal_reads_the_settings_and_stops_at_what_is_wrong(product: Product) -> None:
    pid, settings = product.process.pid, product.log.parent / ".env"

    async def renewal(event: str, written: str) -> str:
        settings.write_text(written)
        count = product.said().count(f'"event":"{event}"')
        product.process.send_signal(signal.SIGUSR2)
        await wait_until(lambda: product.said().count(f'"event":"{event}"') > count, 60)
        return product.said().rpartition(f'"event":"{event}"')[0].rpartition("\n")[2]

    try:
        before = _children(pid).keys()
        assert "MAX_ATTEMPTS=many" in await renewal("renewal_stopped", "MAX_ATTEMPTS=many")
        changed = await renewal("renewal_stopped", "GEMINI_API_KEY=another-key-of-some-length")
        assert "GEMINI_API_KEY=(another): was changed, for which" in changed
        assert _children(pid).keys() == before
        await renewal("renewed", "IDLE_TIMEOUT_MS=599000")
        renewed = _children(pid)
        assert len(renewed) == len(before)
        assert all("\0IDLE_TIMEOUT_MS=599000\0" in variables for variables in renewed.values())
    finally:
        settings.unlink()
