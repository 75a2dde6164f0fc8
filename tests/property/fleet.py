"""Some processes of one pool that count tokens, requests and a day."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.property.policies import LEASE_MS
from tests.property.world import Client, World
from tidegate.limiter import CallUse, Demand, PoolPolicy, Quota, Rate, Tokens

TOKENS, REQUESTS, DAY = "tpm:x", "rpm:x", "rpd:x"
HOUR_MS = 3_600_000
LANE = (TOKENS, REQUESTS, DAY)
POLICY = PoolPolicy(
    {
        TOKENS: Rate(10_000, HOUR_MS, "tokens"),
        REQUESTS: Rate(100, HOUR_MS),
        DAY: Quota(1000),
    },
    lease_ms=LEASE_MS,
    revision=1,
)


@dataclass
class Fleet:
    """Some processes of one pool."""

    world: World
    clients: list[Client] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clients = [self.world.new_client() for _ in range(3)]
        self.settle()

    def settle(self) -> None:
        """Wait until all know of one another, and the quiet time after a loss is over."""
        for _ in range(4):
            for client in self.clients:
                self.compare(client)
            self.world.advance(LEASE_MS // 3)
            self.world.renew(self.clients)
        for client in self.clients:
            self.compare(client)

    def compare(self, client: Client) -> None:
        client.session.refresh()
        self.say(client)

    def say(self, client: Client) -> None:
        for push in client.mailbox:
            client.session.take_push(push)
        client.mailbox.clear()
        while client.session.is_request_due():
            self.world.exchange(client, "ok")

    def ask(self, client: Client, tokens: int) -> int:
        """Return the ticket of a call that is admitted."""
        ticket = self.request(client, tokens)
        self.say(client)
        assert ticket in client.queue.held
        return ticket

    def request(self, client: Client, tokens: int) -> int:
        """Return the ticket of a call that waits."""
        flow = client.queue.flow(1, "t", LANE)
        flow.refresh(client.session.policy)
        waiter = client.queue.ask(
            flow,
            amounts=flow.amounts(Demand(LANE, tokens=Tokens(tokens))),
            hard_ms=1_000_000,
            now_ms=self.world.local_ms,
            deadline_ms=float("inf"),
        )
        return waiter.ticket

    def end(self, client: Client, ticket: int, used: int) -> None:
        actual = client.queue.held[ticket].flow.actual(CallUse(Tokens(used)))
        client.queue.release(ticket, outcome="success", actual=actual, now_ms=self.world.local_ms)

    def spent(self, name: str = TOKENS) -> int:
        return self.world.model.capacity.spent(self.world.model.pool.limit(name))


def counts(fleet: Fleet) -> tuple[int, int, int]:
    return fleet.spent(TOKENS), fleet.spent(REQUESTS), fleet.spent(DAY)
