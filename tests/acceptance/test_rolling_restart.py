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
