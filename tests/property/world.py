"""A pool in real Valkey and its model, stepped side by side, with clients that may be cut off.

The clients are the product's own `Session` and `Ledger`; only the network and the clocks are ours.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any, Literal
from uuid import uuid4

import redis

from tests.property.admissions import Admissions
from tests.property.state import DUMP, of_model, of_valkey
from tidegate.limiter.entries import Batch, Waiter
from tidegate.limiter.keys import Keyspace
from tidegate.limiter.lease import Lease
from tidegate.limiter.ledger import Ledger
from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.model import PoolModel
from tidegate.limiter.model.places import LONGEST
from tidegate.limiter.observer import Observer
from tidegate.limiter.scripts import ScriptName, fragment, load
from tidegate.limiter.session import Session
from tidegate.limiter.wire import Push, Renewal, RenewReply, SyncReply, SyncRequest, pack

CLOCK = """
function T.wall_clock_ms() return tonumber(call('GET', T.prefix .. 'testclock')) end
"""
START_MS = 1_700_000_000_000
Fate = Literal["ok", "reply lost", "request lost", "twice"]


@dataclass(frozen=True, slots=True)
class Pace:
    """After how many steps a script leaves the rest to the next, after how many moves from limit
    to limit a ticket is taken to starve, when virtual time begins again, and how much of a list one
    call tells: all seldom come to pass as they are."""

    at_once: int = 500
    starves: int = 8
    longest: int = LONGEST
    on_page: int = 1000
    looked_at: int = 50
    most_owed: int = 2000


@cache
def lua_figure(part: str, name: str) -> int:
    """A figure that may be tuned; a unit test compares it with the model's."""
    [value] = re.findall(rf"^T\.{name} = (\d+)$", fragment(part), re.MULTILINE)
    return int(value)


@cache
def script_source(name: ScriptName, pace: Pace) -> bytes:
    """A script that reads our clock and goes at our pace."""
    source = load(name, clock=CLOCK).source
    if name == "renew":
        return source
    for usual, ours in (
        (b"T.AT_ONCE = 500", b"T.AT_ONCE = %d" % pace.at_once),
        (b"T.STARVES = 8", b"T.STARVES = %d" % pace.starves),
        (b"T.LONGEST = %d" % LONGEST, b"T.LONGEST = %d" % pace.longest),
        (b"T.MOST_TOLD = 1000", b"T.MOST_TOLD = %d" % pace.on_page),
        (b"T.MOST_ON_PAGE = 1000", b"T.MOST_ON_PAGE = %d" % pace.on_page),
        (b"T.LOOKED_AT = 50", b"T.LOOKED_AT = %d" % pace.looked_at),
        (b"T.MOST_OWED = 2000", b"T.MOST_OWED = %d" % pace.most_owed),
    ):
        whole = usual.startswith((b"T.MOST", b"T.LOOKED"))
        assert source.count(usual) == (name == "tend" or not whole)
        source = source.replace(usual, ours)
    return source


@dataclass(eq=False)
class Client:
    """One process: its session, its ledger, its mailbox of pushes, and what it has yet to tell."""

    session: Session
    ledger: Ledger
    listener: Any
    subscribed: bool = False
    paused: bool = False
    mailbox: list[Push] = field(default_factory=list)
    asked: list[Waiter] = field(default_factory=list)
    usage_due: list[tuple[int, str]] = field(default_factory=list)

    @property
    def sid(self) -> str:
        return self.session.sid


class World:
    """Valkey, the model, the clients and the time."""

    def __init__(self, server: redis.Redis, policy: PoolPolicy, pace: Pace) -> None:
        self.server: Any = server
        self.policy = policy
        self.pool = f"p{uuid4().hex[:12]}"
        self.keys = Keyspace(self.pool)
        self.pace = pace
        self.model = PoolModel()
        self.model.at_once, self.model.starves = pace.at_once, pace.starves
        self.model.longest = pace.longest
        self.model.on_page, self.model.looked_at = pace.on_page, pace.looked_at
        self.model.most_owed = pace.most_owed
        self.model.ahead_ms = lua_figure("hints", "AHEAD_MS")
        self.loop = asyncio.new_event_loop()
        self.clients: list[Client] = []
        # Clients are told nothing about a wait that was refused: nobody looks at its future.
        self.loop.set_exception_handler(lambda loop, context: None)
        self.local_ms = 1000.0
        self.wall_ms = START_MS
        self.old_requests: list[SyncRequest] = []
        self.admissions = Admissions(self.model)
        self._shas: dict[str, str] = {}
        self._started_ms = START_MS - 1_000_000
        self._runs, self._sids = count(1), count(1)
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
        self.wall_ms += by_ms
        if by_ms < 0:
            self.admissions.clock_was_set_back()
        self._set_clock()

    def flush(self) -> None:
        self.advance(1)  # an epoch is named by the millisecond in which it began
        self.wipe()
        self._set_clock()
        self.model.flush()
        self.admissions.all_was_lost()

    def wipe(self) -> None:
        names = self.server.keys(f"*{{{self.pool}}}*")
        if names:
            self.server.delete(*names)

    def restart(self) -> None:
        """Another run of the server over the same data."""
        self.run = f"run-{next(self._runs)}"
        self._started_ms = self.wall_ms

    # -- clients

    def new_client(self) -> Client:
        ledger = Ledger(self.loop.create_future)
        lease = Lease(self.policy.lease_ms, lambda: self.local_ms)
        session = Session(
            self.policy,
            ledger,
            Observer(),
            lease,
            name=f"process-{len(self.clients)}",
            wake=_nothing,
            alarm=lambda name, in_ms: None,
            settled=_nothing,
        )
        session.sid = f"s{next(self._sids):03}"  # by which ties are broken: the same in every run
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
        self.wipe()
        self.loop.close()

    # -- steps that both worlds take

    def exchange(self, client: Client, fate: Fate, *, tend: bool = False) -> None:
        """One request of a client; `fate` says what the network does to it."""
        batch, request = client.session.prepare(self.run, self.wall_ms - self._started_ms)
        tend = tend or not client.session.is_ordinary(request)
        if fate == "request lost":
            self._unanswered(client, batch)
            self.old_requests.append(request)
            return
        reply = self.call(request, tend=tend)
        if fate == "reply lost":
            self._unanswered(client, batch)
            self.old_requests.append(request)
            return
        if fate == "twice":
            self.call(request, tend=tend)
        client.session.answered(batch, request, reply, self.local_ms)
        self.admissions.check_fences(client.sid, client.ledger.held.values())

    def _unanswered(self, client: Client, batch: Batch) -> None:
        client.session.unanswered(batch)
        client.session.failed("cut off")

    def call(self, request: SyncRequest, *, tend: bool) -> SyncReply:
        """In both worlds, which must agree."""
        name: ScriptName = "tend" if tend else "sync"
        real = _sorted(SyncReply.unpack(self._run(name, request.pack())))
        self.admissions.hear(request)
        if tend:
            expected = self.model.tend(request, self.wall_ms)
        else:
            expected = self.model.sync(request, self.wall_ms)
        _assert_same(real._asdict(), _sorted(expected)._asdict())
        granted = [(request.sid, real.epoch, grant) for grant in real.grants]
        for sid, push in self._collect_pushes():
            granted += [(sid, push.epoch, grant) for grant in push.grants]
        self.check_state()
        self.admissions.check(granted, real)
        return real

    def renew(self, client: Client) -> None:
        identity, lease = client.session.lease.identity, client.session.lease
        request = Renewal(client.sid, identity.gen, identity.epoch, self.run)
        real = RenewReply.unpack(self._run("renew", request.pack()))
        assert real == self.model.renew(request, self.wall_ms)
        if real.status == "ok":
            lease.renewed(self.local_ms, real.lease_ms)
        else:
            client.session.refresh()

    def pause(self, name: str, for_ms: int, ramp_ms: int) -> None:
        request = {"verb": "pause", "limit": name, "for_ms": for_ms, "ramp_ms": ramp_ms}
        done = self.model.pause(name, for_ms, ramp_ms, "by|me", run=self.run, wall=self.wall_ms)
        self._act({**request, "said": "by|me"}, done)

    def resume(self, name: str) -> None:
        done = self.model.resume(name, run=self.run, wall=self.wall_ms)
        self._act({"verb": "resume", "limit": name, "said": ""}, done)

    def close_gate(self, name: str, for_ms: int, most_ms: int, *, tried: bool) -> None:
        done = self.model.close(
            name, for_ms, most_ms, "by|me", tried=tried, run=self.run, wall=self.wall_ms
        )
        request = {"verb": "close", "limit": name, "for_ms": for_ms, "most_ms": most_ms}
        self._act({**request, "tried": tried, "said": "by|me"}, done)

    def open_gate(self, name: str, ramp_ms: int) -> None:
        done = self.model.open(name, ramp_ms, run=self.run, wall=self.wall_ms)
        self._act({"verb": "open", "limit": name, "ramp_ms": ramp_ms}, done)

    def revoke(self, who: str) -> None:
        done = self.model.revoke(who, run=self.run, wall=self.wall_ms)
        self._act({"verb": "revoke", "sid": who}, done)

    def _act(self, request: dict[str, Any], done: int) -> None:
        raw = self._run("act", pack({**request, "run": self.run}))
        assert raw == pack([done])
        granted = [
            (sid, push.epoch, grant)
            for sid, push in self._collect_pushes()
            for grant in push.grants
        ]
        self.check_state()
        self.admissions.check(granted, None)

    def _run(self, name: ScriptName, packed: bytes) -> bytes:
        sha = self._shas.get(name)
        if sha is None:
            sha = self.server.script_load(script_source(name, self.pace))
            self._shas[name] = sha
        raw = self.server.evalsha(sha, 2, self.keys.meta, self.keys.layout, packed)
        assert isinstance(raw, bytes)
        return raw

    def _collect_pushes(self) -> list[tuple[str, Push]]:
        seen = []
        by_sid = {client.sid: client for client in self.clients}
        for sid, expected in self.model.pushed:
            message = _expect(by_sid[sid].listener, "smessage")
            push = Push.unpack(message["data"])
            push = push._replace(grants=[(ticket, seq) for ticket, seq in push.grants])
            assert push == expected
            by_sid[sid].mailbox.append(push)
            seen.append((sid, push))
        self.model.pushed.clear()
        return seen

    def check_state(self) -> None:
        """What Lua counted and kept is what the model derives."""
        raw = self.server.eval(DUMP, 0, f"*{{{self.pool}}}*")
        real, expected = of_valkey(raw, self.keys), of_model(self.model)
        _assert_same(real, expected)

    def really_open(self, limit: str) -> int:
        """Calls that are running, over all processes, as an upstream would count them."""
        return sum(client.ledger.held_of[limit] for client in self.clients)

    def leftovers(self) -> list[str]:
        """Keys that should have gone with the last session."""
        live_on = (
            "meta",
            "layout",
            "history",
            "timed",
            "spending",
            "paused",
            "past:",
            "log:",
            "rate:",
            "quota:",
        )
        names = [name.decode() for name in self.server.keys(f"*{{{self.pool}}}*")]
        return [n for n in names if not n.split("}:", 1)[1].startswith((*live_on, "testclock"))]


def _sorted(reply: SyncReply) -> SyncReply:
    """Lists whose order means nothing, in one order; the others as lists of tuples."""
    whole = reply.whole
    if whole is not None:
        whole = whole._replace(
            held=sorted((t, s, u) for t, s, u in whole.held),
            lapsing=sorted((m, x) for m, x in whole.lapsing),
            spent=sorted((n, x) for n, x in whole.spent),
            pauses=sorted((n, x, r, s) for n, x, r, s in whole.pauses),
            roster=(whole.roster[0], whole.roster[1] and sorted(whole.roster[1])),
        )
    return reply._replace(
        grants=[(ticket, seq) for ticket, seq in reply.grants],
        stamps=list(reply.stamps),
        refused=list(reply.refused),
        whole=whole,
    )


def _assert_same(real: dict[str, Any], expected: dict[str, Any]) -> None:
    differing = [
        f"{name}: {real[name]} is not {expected[name]}"
        for name in expected
        if real[name] != expected[name]
    ]
    assert not differing, "\n".join(differing)


def _nothing() -> None:
    """Nobody needs to be woken: the machine decides who speaks."""


def _expect(listener: Any, kind: str) -> dict[str, Any]:
    """The next message of a subscription, which must be of this kind."""
    message: dict[str, Any] | None = listener.get_message(timeout=5)
    assert message is not None, f"no {kind} within 5 s"
    assert message["type"] == kind
    return message
