"""Probe under verification that requests permits without end: `python -m tidegate.verify.probe`.

Orders come as one line of JSON on stdin, since they hold URLs with passwords. What happens is told
on stdout, a line each and at once, so that a kill loses nothing:

    MONOTONIC_NS WHAT CALL TENANT EPOCH

where WHAT is ask, begin, end, leave, lost (a lease), over (the provider refused) or failed (it gave
no answer, or another), and EPOCH is that of the permit at its begin. SIGTERM ends it in good order,
and so does the end of stdin: it does not outlive whoever started it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from tidegate.emulator.client import Caller
from tidegate.errors import AdmissionError, LeaseLost
from tidegate.limiter import Limiter, PoolPolicy
from tidegate.policy.format import of_plain
from tidegate.telemetry import logging as telemetry
from tidegate.verify.processes import on_end, read_orders

# A refusal is quick: the permit is held on for about as long as a call takes, so that the load
# stays what it was said to be.
_REFUSED_S = 0.12


@dataclass(frozen=True, slots=True)
class Orders:
    """`policy` is plain, as in a file; `tasks` of each tenant. mark: in every prompt."""

    url: str
    pool: str
    upstream: str
    name: str
    policy: dict[str, object]
    tenants: Sequence[str]
    tasks: int
    limit: str
    mark: str

    def pool_policy(self) -> PoolPolicy:
        return of_plain(self.policy)


class Probe:
    """The tasks of this process."""

    def __init__(self, limiter: Limiter, caller: Caller, orders: Orders) -> None:
        self._limiter = limiter
        self._caller = caller
        self._orders = orders
        self._numbers = count(1)

    async def want(self, tenant: str) -> None:
        """One call after the other, for ever."""
        while True:
            number = next(self._numbers)
            tell("ask", number, tenant)
            begun = False
            try:
                async with self._limiter.acquire(self._orders.limit, tenant=tenant) as permit:
                    await permit.confirm()
                    begun = True
                    tell("begin", number, tenant, permit.fence[0])
                    try:
                        status = await self._caller.call(f"{self._orders.mark} {number}")
                        if status != 200:
                            tell("over" if status == 429 else "failed", number, tenant)
                            await asyncio.sleep(_REFUSED_S)
                    finally:
                        tell("end", number, tenant)
            except LeaseLost:
                tell("lost", number, tenant)
            except AdmissionError:
                await asyncio.sleep(0.05)
            finally:
                if not begun:
                    tell("leave", number, tenant)


def tell(what: str, number: int, tenant: str, epoch: int = 0) -> None:
    os.write(1, f"{time.monotonic_ns()} {what} {number} {tenant} {epoch}\n".encode())


async def main(orders: Orders) -> None:
    """Until SIGTERM or the end of stdin."""
    me = asyncio.current_task()
    assert me is not None
    on_end(me.cancel)
    telemetry.configure_logging("json", "error", process=orders.name)
    limiter = Limiter.from_url(
        orders.url,
        pool=orders.pool,
        policy=orders.pool_policy(),
        instance_id=orders.name,
        on_conflict="keep",
    )
    with suppress(asyncio.CancelledError):
        async with Caller(orders.upstream) as caller, limiter:
            probe = Probe(limiter, caller, orders)
            async with asyncio.TaskGroup() as group:
                for tenant in orders.tenants:
                    for _ in range(orders.tasks):
                        group.create_task(probe.want(tenant))


if __name__ == "__main__":
    asyncio.run(main(Orders(**read_orders())))
