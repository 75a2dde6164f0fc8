"""One process under test: `python -m bench.limiter.worker '{"adapter": "ours", ...}'`.

Runs in the environment of the limiter under test, so that it may import nothing but the standard
library, its adapter, and uvloop if it is told to. Runs until it is killed. A limiter's error ends
no task: it is recorded, its first of each kind is told on stderr, and the task asks again.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from importlib import import_module
from typing import Any

from bench.limiter.calllog import CallLog, Kind
from bench.limiter.orders import Orders

PAUSE_AFTER_ERROR_S = 0.01
BATCHES = 5


class Errors:
    """Tells each kind of error once."""

    def __init__(self, log: CallLog) -> None:
        self._log = log
        self._seen: set[type[BaseException]] = set()

    def note(self, error: Exception, task: int) -> None:
        self._log.add(Kind.FAILED, task)
        if type(error) not in self._seen:
            self._seen.add(type(error))
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)


async def _call_for_ever(
    adapter: Any, acquire: Any, orders: Orders, log: CallLog, task: int
) -> None:
    before_call = getattr(adapter, "before_call", None)
    weighed = getattr(adapter, "WEIGHED", False)
    errors = Errors(log)
    while True:
        try:
            async with acquire(task) as permit:
                if orders.jitter_ms:
                    await asyncio.sleep(random.uniform(0, orders.jitter_ms / 1000))
                if before_call is not None:
                    await before_call(permit)
                log.add(Kind.BEGAN, permit if weighed else task)
                try:
                    if orders.call_ms:
                        await asyncio.sleep(orders.call_s())
                finally:
                    log.add(Kind.ENDED, task)
        except Exception as error:  # noqa: BLE001  # limiters differ in what they raise
            errors.note(error, task)
            await asyncio.sleep(PAUSE_AFTER_ERROR_S)


async def _tasks(adapter: Any, orders: Orders) -> None:
    log = CallLog(orders.log)
    async with adapter.opened(orders) as acquire, asyncio.TaskGroup() as group:
        for task in range(orders.tasks):
            group.create_task(_call_for_ever(adapter, acquire, orders, log, task))
        await asyncio.sleep(0)
        log.add(Kind.READY)


def _block_for_ever(acquire: Any, orders: Orders, log: CallLog, task: int) -> None:
    errors = Errors(log)
    while True:
        try:
            with acquire(task):
                log.add(Kind.BEGAN, task)
                try:
                    time.sleep(orders.call_s())
                finally:
                    log.add(Kind.ENDED, task)
        except Exception as error:  # noqa: BLE001  # limiters differ in what they raise
            errors.note(error, task)
            time.sleep(PAUSE_AFTER_ERROR_S)


def _threads(adapter: Any, orders: Orders) -> None:
    log = CallLog(orders.log)
    threading.stack_size(256 * 1024)
    with adapter.opened(orders) as acquire:
        threads = [
            threading.Thread(target=_block_for_ever, args=(acquire, orders, log, task), daemon=True)
            for task in range(orders.tasks)
        ]
        for thread in threads:
            thread.start()
        log.add(Kind.READY)
        threads[0].join()


async def _rounds(adapter: Any, orders: Orders) -> list[float]:
    took_s = []
    async with adapter.opened(orders) as acquire:
        for _ in range(BATCHES):
            began_s = time.perf_counter()
            for _ in range(orders.rounds):
                async with acquire(0):
                    pass
            took_s.append(time.perf_counter() - began_s)
    return took_s


def _blocking_rounds(adapter: Any, orders: Orders) -> list[float]:
    took_s = []
    with adapter.opened(orders) as acquire:
        for _ in range(BATCHES):
            began_s = time.perf_counter()
            for _ in range(orders.rounds):
                with acquire(0):
                    pass
            took_s.append(time.perf_counter() - began_s)
    return took_s


def main(orders: Orders) -> None:
    adapter = import_module(f"bench.peers.{orders.adapter}")
    if orders.threads:
        if orders.rounds:
            print(json.dumps(_blocking_rounds(adapter, orders)))
        else:
            _threads(adapter, orders)
        return
    factory = import_module("uvloop").new_event_loop if orders.uvloop else None
    with asyncio.Runner(loop_factory=factory) as runner:
        if orders.rounds:
            print(json.dumps(runner.run(_rounds(adapter, orders))))
        else:
            runner.run(_tasks(adapter, orders))


if __name__ == "__main__":
    main(Orders(**json.loads(sys.argv[1])))
