"""Worker under verification, in a pool of its own: `python -m tidegate.verify.jobber`.

Everything in it is the product's, but for what it is pointed at: the pool and the emulator of the
verification, and a folder of its own for what it would keep on disk. It claims no job of another
pool and no batch, and sends no webhook.

Settings come as environment variables, the rest as one line of JSON on stdin. SIGTERM and the end
of stdin end it in order.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tidegate.policy.format import of_plain
from tidegate.settings import load
from tidegate.telemetry import logging as telemetry
from tidegate.verify.processes import on_end, read_orders


@dataclass(frozen=True, slots=True)
class Orders:
    """`policy` is plain, as in a file."""

    pool: str
    name: str
    policy: dict[str, object]


async def main(orders: Orders) -> None:
    from tidegate.app import run_worker_of

    stop = asyncio.Event()
    on_end(stop.set)
    config = load()
    telemetry.configure_logging(config.log_format, "error", process=orders.name)
    await run_worker_of(orders.pool, of_plain(orders.policy), config, orders.name, stop)


if __name__ == "__main__":
    asyncio.run(main(Orders(**read_orders())))
