"""The floor of the harness for limiters that block a thread for each task."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.limiter.orders import Orders


@contextmanager
def opened(orders: Orders) -> Iterator[Callable[[int], threading.Semaphore]]:
    permits = threading.Semaphore(orders.part_of_bound)
    yield lambda _: permits
