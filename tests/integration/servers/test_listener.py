"""The subscription stays where the link is."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.integration.servers.daemon import Daemon
from tests.waiting import wait_until
from tidegate.limiter.connection import Listener, ServerFacts
from tidegate.limiter.session import Clock, Lease


async def test_a_subscription_at_another_server_than_the_links_is_given_up(tmp_path: Path) -> None:
    with Daemon(tmp_path) as server:
        here = ServerFacts(server.say("INFO", "server")["run_id"], 0)
        linked_to: ServerFacts | None = None
        listener = Listener(
            f"redis://127.0.0.1:{server.port}",
            "tg:1:{x}:grants:me",
            Lease(300),
            lambda push: None,
            lambda: None,
            lambda: linked_to,
            Clock(),
        )
        task = asyncio.create_task(listener.run())
        await wait_until(lambda: listener.subscribed, what="a subscription before the link is up")
        linked_to = ServerFacts("another", 0)
        await wait_until(lambda: not listener.subscribed, what="the end of the subscription")
        linked_to = here
        await wait_until(lambda: listener.subscribed, what="a subscription where the link is")
        assert listener.run_id == here.run
        task.cancel()
        await asyncio.wait({task})
