"""A pool in real Valkey and its model, stepped side by side, with clients that may be cut off.

The clients are the product's own `Session` and `Ledger`; only the network and the clocks are ours.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

import redis

from tidegate.limiter.keys import Keyspace
from tidegate.limiter.lease import Lease
from tidegate.limiter.ledger import Batch, Ledger, Waiter
from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.model import PoolModel
from tidegate.limiter.observer import Observer
from tidegate.limiter.scripts import Script, load
from tidegate.limiter.session import Session
from tidegate.limiter.wire import Push, Renewal, RenewReply, SyncReply, SyncRequest

CLOCK = """
local function wall_clock_ms() return tonumber(redis.call('GET', prefix .. 'testclock')) end
"""
SYNC, RENEW = load("sync", clock=CLOCK), load("renew", clock=CLOCK)
LIMITS = ("kind:a", "kind:b")
START_MS = 1_700_000_000_000


@dataclass(eq=False)
class Client:
    """One process: its session, its ledger, its mailbox of pushes."""

    session: Session
    ledger: Ledger
    listener: Any
    subscribed: bool = False
    paused: bool = False
    mailbox: list[Push] = field(default_factory=list)
    asked: list[Waiter] = field(default_factory=list)

    @property
    def sid(self) -> str:
        return self.session.sid


class World:
    """Valkey, the model, the clients and the time."""

    def __init__(self, server: redis.Redis, policy: PoolPolicy) -> None:
        self.server: Any = server
        self.policy = policy
        self.pool = f"p{uuid4().hex[:12]}"
        self.keys = Keyspace(self.pool)
        self.model = PoolModel()
        self.loop = asyncio.new_event_loop()
        self.clients: list[Client] = []
        # Clients are told nothing about a wait that was refused: nobody looks at its future.
        self.loop.set_exception_handler(lambda loop, context: None)
        self.local_ms = 1000.0
        self.wall_ms = START_MS
        self.old_requests: list[SyncRequest] = []
        self.last_fence = (0, 0)
        # A server that loses its data and whose clock is set back can't know what it gave before.
        self.set_back = False
        self._runs = count(1)
        self.run = "run-0"
        self._set_clock()

    # -- time and faults of the server

    def _set_clock(self) -> None:
        self.server.set(f"{self.keys.prefix}testclock", self.wall_ms)

    def advance(self, by_ms: int) -> None:
        self.local_ms += by_ms
        self.wall_ms += by_ms
        self._set_clock()

    def jump(self, by_ms: int) -> None:
        """The server's clock alone."""
        self.set_back |= by_ms < 0
        self.wall_ms += by_ms
        self._set_clock()

    def flush(self) -> None:
        names = list(self.server.scan_iter(match=f"*{{{self.pool}}}*", count=1000))
        if names:
            self.server.delete(*names)
        self._set_clock()
        self.model.flush()

    def restart(self) -> None:
        """Another run of the server over the same data."""
        self.run = f"run-{next(self._runs)}"

    # -- clients

    def new_client(self) -> Client:
        ledger = Ledger(self.loop.create_future)
        lease = Lease(self.policy.lease_ms, lambda: self.local_ms)
        session = Session(
            self.policy,
            ledger,
            Observer(),
            lease,
            wake=_nothing,
            alarm=lambda name, in_ms: None,
            settled=_nothing,
        )
        client = Client(session, ledger, self.server.pubsub())
        self.clients.append(client)
        self.subscribe(client)
        return client

    def subscribe(self, client: Client) -> None:
        client.listener.ssubscribe(self.keys.channel(client.sid))
        _expect(client.listener, "ssubscribe")
        client.subscribed = True
        self.model.subscribed.add(client.sid)
        client.session.refresh()

    def unsubscribe(self, client: Client) -> None:
        client.listener.sunsubscribe(self.keys.channel(client.sid))
        _expect(client.listener, "sunsubscribe")
        client.subscribed = False
        self.model.subscribed.discard(client.sid)

    def kill(self, client: Client) -> None:
        if client.subscribed:
            self.unsubscribe(client)
        client.listener.close()
        self.clients.remove(client)

    def close(self) -> None:
        for client in list(self.clients):
            self.kill(client)
        self.loop.close()

    # -- steps that both worlds take

    def exchange(self, client: Client, fate: str) -> None:
        """One sync of a client; `fate` says what the network does to it."""
        batch, request = client.session.prepare(self.run, 0)
        if fate == "request lost":
            self._unanswered(client, batch)
            self.old_requests.append(request)
            return
        reply = self.sync(request)
        if fate == "reply lost":
            self._unanswered(client, batch)
            self.old_requests.append(request)
            return
        if fate == "twice":
            self.sync(request)
        client.session.answered(batch, request, reply, self.local_ms)

    def _unanswered(self, client: Client, batch: Batch) -> None:
        client.session.unanswered(batch)
        client.session.failed("cut off")

    def sync(self, request: SyncRequest) -> SyncReply:
        """In both worlds, which must agree; in no world is anybody let in over the limit."""
        raw = SyncReply.unpack(self._run(SYNC, request.pack()))
        real = raw._replace(
            grants=[(ticket, seq) for ticket, seq in raw.grants],
            held=None if raw.held is None else sorted((t, s) for t, s in raw.held),
            lapsing=None if raw.lapsing is None else sorted((m, x) for m, x in raw.lapsing),
        )
        expected = self.model.sync(request, self.wall_ms)
        assert real == expected
        pushed = self._collect_pushes()
        fences = [(real.epoch, seq) for _, seq in real.grants]
        fences += [(push.epoch, seq) for push in pushed for _, seq in push.grants]
        self._check_grants(request.sid, real, pushed, sorted(fences))
        return real

    def renew(self, client: Client) -> None:
        identity, lease = client.session.lease.identity, client.session.lease
        request = Renewal(client.sid, identity.gen, identity.epoch, self.run, 0, lease.lease_ms)
        real = RenewReply.unpack(self._run(RENEW, request.pack()))
        assert real == self.model.renew(request, self.wall_ms)
        if real.status == "ok":
            lease.renewed(self.local_ms, real.lease_ms)
        else:
            client.session.refresh()

    def _run(self, script: Script, packed: bytes) -> bytes:
        keys = (self.keys.meta, self.keys.layout)
        try:
            raw = self.server.evalsha(script.sha, 2, *keys, packed)
        except redis.exceptions.NoScriptError:
            raw = self.server.eval(script.source, 2, *keys, packed)
        assert isinstance(raw, bytes)
        return raw

    def _collect_pushes(self) -> list[Push]:
        seen = []
        by_sid = {client.sid: client for client in self.clients}
        for sid, expected in self.model.pushed:
            message = _expect(by_sid[sid].listener, "smessage")
            push = Push.unpack(message["data"])
            push = push._replace(grants=[(ticket, seq) for ticket, seq in push.grants])
            assert push == expected
            by_sid[sid].mailbox.append(push)
            seen.append(push)
        self.model.pushed.clear()
        return seen

    def _check_grants(
        self, sid: str, reply: SyncReply, pushed: list[Push], fences: list[tuple[int, int]]
    ) -> None:
        if not fences:
            return
        assert reply.recovering_ms == 0, "let in during the quiet time"
        assert fences[0] > self.last_fence or self.set_back, "a fence that is not younger"
        assert len(set(fences)) == len(fences)
        self.last_fence = fences[-1]
        sequences = {seq for _, seq in fences}
        lanes = {
            held.limit
            for session in self.model.sessions.values()
            for held in session.held.values()
            if held.seq in sequences
        }
        for lane in lanes:
            assert self.model.used(lane) <= self.model.bound(lane), "let in over the limit"

    def check_state(self) -> None:
        """What Lua counted is what the model derives."""
        raw = self.server.hgetall(f"{self.keys.prefix}used")
        used = {limit.decode(): int(number) for limit, number in raw.items()}
        assert used == {x: self.model.used(x) for x in LIMITS if self.model.used(x)}

    def really_open(self, limit: str) -> int:
        """Calls that are running, over all processes, as an upstream would count them."""
        return sum(client.ledger.held_of[limit] for client in self.clients)

    def leftovers(self) -> list[str]:
        known = {"meta", "layout", "limits", "testclock"}
        names = self.server.scan_iter(match=f"*{{{self.pool}}}*", count=1000)
        return [n for n in (name.decode() for name in names) if n.rsplit(":", 1)[-1] not in known]


def _nothing() -> None:
    """Nobody needs to be woken: the machine decides who speaks."""


def _expect(listener: Any, kind: str) -> dict[str, Any]:
    """The next message of a subscription, which must be of this kind."""
    message: dict[str, Any] | None = listener.get_message(timeout=5)
    assert message is not None, f"no {kind} within 5 s"
    assert message["type"] == kind
    return message
