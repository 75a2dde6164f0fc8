"""On whose behalf a change is recorded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from tidegate.errors import StoreUnavailable
from tidegate.store.database import Connections, T, Work
from tidegate.store.operator_actions import OperatorActions
from tidegate.store.records import ACTING, acting, record_action


class Connection:
    """Remembers the operators of the rows that it is given."""

    def __init__(self) -> None:
        self.operators: list[str] = []

    async def execute(self, query: str, *values: Any, **more: Any) -> str:
        self.operators.append(values[1])
        return "INSERT 0 1"


async def test_what_no_operator_does_is_not_recorded() -> None:
    ACTING.set(None)  # a command that another test has run in this process is by an operator
    connection = Connection()
    await record_action(connection, "limits.change", "gemini")
    assert connection.operators == []


async def test_work_that_outlives_its_request_is_not_the_operators() -> None:
    connection, later = Connection(), asyncio.Event()

    async def outlives() -> None:
        await record_action(connection, "limits.change", "gemini")
        await later.wait()
        await record_action(connection, "limits.change", "gemini")

    async def request(name: str) -> asyncio.Task[None]:
        with acting(name, "admin", "127.0.0.1"):
            task = asyncio.create_task(outlives())
            await record_action(connection, "key.create", "x")
            await asyncio.sleep(0)
            return task

    tasks = await asyncio.gather(request("ann"), request("bob"))
    assert sorted(connection.operators) == ["ann", "ann", "bob", "bob"]
    later.set()
    await asyncio.gather(*tasks)
    assert len(connection.operators) == 4


class Away(Connections):
    """PostgreSQL does not answer."""

    def __init__(self) -> None:
        pass

    async def run(self, work: Work[T], **options: Any) -> T:
        raise StoreUnavailable("PostgreSQL is away")


async def test_a_pause_does_not_wait_for_the_record_and_the_log_has_it() -> None:
    actions = OperatorActions(Away())
    with capture_logs() as lines, acting("ann", "operator", "127.0.0.1"):
        await actions.note("limit.pause", "rpm:total", after={"for_ms": 5})
        with pytest.raises(StoreUnavailable):
            await actions.write("job.retry", "1")
    (line,) = lines
    assert (line["event"], line["what"], line["target"], line["by"]) == (
        *("action_unrecorded", "limit.pause"),
        *("rpm:total", "ann"),
    )
