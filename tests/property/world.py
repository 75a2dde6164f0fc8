"""A pool in real Valkey and its model, stepped side by side, with clients that may be cut off.

The clients are the product's own `Session` and `LocalQueue`; only the network and the clocks are
ours.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import count
from typing import Any, Literal

import msgpack

from tests.property.admissions import Admissions
from tests.property.dump import Reading
from tests.property.server import Server, Words
from tests.property.state import of_model
from tidegate.limiter import Observer, PoolPolicy, Quota
from tidegate.limiter.simulation import (
    Keyspace,
    Lease,
    LocalQueue,
    MessageBatch,
    Paces,
    PoolModel,
    Push,
    Renewal,
    RenewReply,
    ScriptName,
    Session,
    SyncReply,
    SyncRequest,
    Waiter,
    fragment,
    load,
    pack,
    pack_request,
    unpack_reply,
)

# Keys must not expire by the server's own clock while a test is stepped slowly.
CLOCK = """
function T.wall_clock_ms() return tonumber(ARGV[2]) end
T.OURS = cmsgpack.unpack(ARGV[3])
local by_its_clock = call
local function call(name, ...)
  if name ~= 'PEXPIRE' then return by_its_clock(name, ...) end
  local key, ms = ...
  return by_its_clock(name, key, ms + 3600000, select(3, ...))
end
"""
START_MS = 1_700_000_000_000
USUAL = Paces()
Fate = Literal["ok", "reply lost", "request lost", "twice"]
# Figures of the scripts that a run chooses, by their names in Lua and in `Paces`.
CHOSEN = (
    (b"\nT.AT_ONCE", "at_once"),
    (b"T.DUE_AT_ONCE", "due_at_once"),
    (b"T.UNBLOCKED_AT_ONCE", "unblocked_at_once"),
    (b"T.STARVES", "starves"),
    (b"T.LATENCY_CALLS", "latency_calls"),
    (b"T.LATENCY_ROUNDS", "latency_rounds"),
    (b"T.LONGEST", "longest"),
    (b"T.MOST_TOLD", "on_page"),
    (b"T.MOST_ON_PAGE", "on_page"),
    (b"T.LOOKED_AT", "looked_at"),
    (b"T.ENDED_AT_ONCE", "ended_at_once"),
    (b"T.MOST_OWED", "most_owed"),
    (b"T.DUE_AFTER", "due_after_ms"),
)


@cache
def lua_figure(part: str, name: str) -> int:
    """A figure that may be tuned; a unit test compares it with the model's."""
    [value] = re.findall(rf"^T\.{name} = (\d+)$", fragment(part), re.MULTILINE)
    return int(value)


@cache
def script_source(name: ScriptName) -> bytes:
    """A script that is told the time and its pace: the same one in all runs, for each script that
    a server knows makes every other slower."""
    source = load(name, clock=CLOCK).source
    if name in ("renew", "position", "inspect"):
        return source
    for figure, place in CHOSEN:
        usual = b"%s = %d\n" % (figure, getattr(USUAL, place))
        whole, ends = usual.startswith((b"T.MOST", b"T.LOOKED")), usual.startswith(b"T.ENDED")
        assert source.count(usual) == (name == "tend" or not (whole or (ends and name == "sync")))
        source = source.replace(usual, b"%s = T.OURS.%s\n" % (figure, place.encode()))
    return source


@dataclass(eq=False)
class Client:
    """One process: its session, its queue, its mailbox of pushes, and what it has yet to tell."""

    session: Session
    queue: LocalQueue
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

    def __init__(self, server: Server, policy: PoolPolicy, pace: Paces) -> None:
        self.server = server
        self.policy = policy
        self.keys = Keyspace("walk")
        self._reading = Reading(self.keys)
        self._pace = pack(asdict(pace))
        self.model = PoolModel(replace(pace, ahead_ms=lua_figure("hints", "AHEAD_MS")))
        self.loop = asyncio.new_event_loop()
        self.clients: list[Client] = []
        # Clients are told nothing about a wait that was refused: nobody looks at its future.
        self.loop.set_exception_handler(lambda loop, context: None)
        self.local_ms = 1000.0
        self.wall_ms = START_MS
        self.old_requests: list[SyncRequest] = []
        self.admissions = Admissions(self.model)
        self._started_ms = START_MS - 1_000_000
        self._runs, self._sids = count(1), count(1)
        self.run = "run-0"

    # -- time and faults of the server

    def advance(self, by_ms: int) -> None:
        self.local_ms += by_ms
        self.wall_ms += by_ms

    def jump(self, by_ms: int) -> None:
        """The server's clock alone."""
        self.wall_ms += by_ms
        if by_ms < 0:
            self.admissions.clock_was_set_back()

    def flush(self) -> None:
        self.advance(1)  # an epoch is named by the millisecond in which it began
        self.server.wipe()
        self.model.flush()
        self.admissions.all_was_lost()

    def restart(self) -> None:
        """Another run of the server over the same data."""
        self.run = f"run-{next(self._runs)}"
        self._started_ms = self.wall_ms

    # -- clients

    def new_client(self) -> Client:
        queue = LocalQueue(self.loop.create_future)
        lease = Lease(self.policy.lease_ms, lambda: self.local_ms)
        session = Session(
            self.policy,
            queue,
            Observer(),
            lease,
            name=f"process-{len(self.clients)}",
            wake=_nothing,
            alarm=lambda name, in_ms: None,
        )
        session.sid = f"s{next(self._sids):03}"  # by which ties are broken: the same in every run
        client = Client(session, queue)
        self.clients.append(client)
        self.subscribe(client)
        return client

    def subscribe(self, client: Client) -> None:
        self.server.subscribe(self.keys.channel(client.sid))
        client.subscribed = True
        self.model.pool.subscribed.add(client.sid)
        client.session.refresh()

    def unsubscribe(self, client: Client) -> None:
        self.server.unsubscribe(self.keys.channel(client.sid))
        client.subscribed = False
        self.model.pool.subscribed.discard(client.sid)

    def kill(self, client: Client) -> None:
        if client.subscribed:
            self.unsubscribe(client)
        self.clients.remove(client)

    def close(self) -> None:
        for client in list(self.clients):
            self.kill(client)
        self.server.wipe()
        self.server.take_heard()
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
        self.admissions.check_fences(client.sid, client.queue.held.values())

    def _unanswered(self, client: Client, batch: MessageBatch) -> None:
        client.session.unanswered(batch)
        client.session.failed("cut off")

    def call(self, request: SyncRequest, *, tend: bool) -> SyncReply:
        """In both worlds, which must agree."""
        raw, dump = self._run("tend" if tend else "sync", pack_request(request))
        real = _sorted(unpack_reply(raw))
        self.admissions.hear(request)
        if tend:
            expected = self.model.tend(request, self.wall_ms)
        else:
            expected = self.model.sync(request, self.wall_ms)
        _assert_same(real._asdict(), _sorted(expected)._asdict())
        granted = [(request.sid, real.epoch, grant) for grant in real.grants]
        for sid, push in self._collect_pushes():
            granted += [(sid, push.epoch, grant) for grant in push.grants]
        self._check_state(dump)
        self.admissions.check(granted, real)
        self.admissions.note_refusals(request, real)
        return real

    def renew(self, clients: Sequence[Client]) -> None:
        """The heartbeats of these clients, one after the other."""
        script = self.server.load(script_source("renew"))
        requests = [
            Renewal(client.sid, identity.gen, identity.epoch, self.run)
            for client in clients
            for identity in [client.session.lease.identity]
        ]
        replies = self.server.run_all(script, [self._words(q.pack()) for q in requests])
        for client, request, reply in zip(clients, requests, replies, strict=True):
            real = RenewReply.unpack(reply)
            assert real == self.model.renew(request, self.wall_ms)
            if real.status == "ok":
                client.session.lease.renewed(self.local_ms, real.lease_ms)
            else:
                client.session.refresh()

    def look(self, client: Client, ticket: int) -> None:
        """At the place of a ticket, which changes nothing."""
        request = {"sid": client.sid, "ticket": str(ticket), "limit": "", "band": 0, "tenant": ""}
        raw, dump = self._run("position", pack(request))
        assert msgpack.unpackb(raw) == self.model.position(client.sid, ticket, self.wall_ms)
        self._check_state(dump)

    def look_back(self, name: str, age_ms: int) -> int:
        """What was taken of a rate in so much time until now, in which both worlds agree."""
        request = {"permits": False, "of": "limits", "limits": [name], "since": {name: age_ms}}
        raw, dump = self._run("inspect", pack(request))
        pool = self.model.pool
        pool.now, pool.resets = max(self.wall_ms, self.model.clock), {}
        limit, spending = pool.limit(name).limit, pool.limit(name).spending
        if isinstance(limit, Quota):  # a day that is over stays there for the next call
            spending = deepcopy(spending)
        spending.look(limit, pool.now, 0)
        taken = spending.taken_since(limit, pool.now - age_ms)
        [row] = msgpack.unpackb(raw)[7]
        assert row[15] == taken, f"{name} in {age_ms} ms"
        self._check_state(dump)
        return taken

    def pause(self, name: str, for_ms: int, ramp_ms: int) -> None:
        request = {"verb": "pause", "limit": name, "for_ms": for_ms, "ramp_ms": ramp_ms}
        done = self.model.pause(name, for_ms, ramp_ms, "by|me", run=self.run, wall=self.wall_ms)
        self._act({**request, "said": "by|me"}, done)

    def resume(self, name: str) -> None:
        self.admissions.ended(name)
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

    def charge(
        self,
        name: str,
        amount: int,
        *,
        evenly: bool = False,
        bound: int | None = None,
        recorded: bool = False,
    ) -> None:
        how: Any = {"evenly": evenly, "bound": bound, "recorded": recorded}
        done = self.model.charge(name, amount, **how, run=self.run, wall=self.wall_ms)
        self._act({"verb": "charge", "limit": name, "amount": amount, **how}, done)

    def hold(self, who: str, name: str, amount: int, for_ms: int) -> None:
        done = self.model.hold(who, (name,), [amount], for_ms, run=self.run, wall=self.wall_ms)
        request = {"verb": "hold", "sid": who, "lane": name, "amounts": [amount]}
        self._act({**request, "for_ms": for_ms}, done)

    def revoke(self, who: str) -> None:
        done = self.model.revoke(who, run=self.run, wall=self.wall_ms)
        self._act({"verb": "revoke", "sid": who}, done)

    def _act(self, request: dict[str, Any], done: int) -> None:
        raw, dump = self._run("admin", pack({**request, "run": self.run}))
        assert raw == pack([done])
        granted = [
            (sid, push.epoch, grant)
            for sid, push in self._collect_pushes()
            for grant in push.grants
        ]
        self._check_state(dump)
        self.admissions.check(granted, None)

    def _run(self, name: ScriptName, packed: bytes) -> tuple[bytes, bytes]:
        """The reply, and what is in Valkey after it."""
        script = self.server.load(script_source(name))
        return self.server.run(script, *self._words(packed))

    def _words(self, packed: bytes) -> Words:
        return self.keys.meta, self.keys.layout, packed, self.wall_ms, self._pace

    def _collect_pushes(self) -> list[tuple[str, Push]]:
        """All that was pushed: in the order of the model, for it means nothing between sessions."""
        heard: dict[str, list[Push]] = defaultdict(list)
        for channel, text in self.server.take_heard():
            push = Push.unpack(text)
            heard[channel].append(push._replace(grants=[(t, seq) for t, seq in push.grants]))
        expected: dict[str, list[Push]] = defaultdict(list)
        by_sid = {client.sid: client for client in self.clients}
        pushed = list(self.model.pool.pushed)
        self.model.pool.pushed.clear()
        for sid, push in pushed:
            expected[self.keys.channel(sid)].append(push)
            by_sid[sid].mailbox.append(push)
        _assert_same(heard, expected)
        return pushed

    def _check_state(self, dump: bytes) -> None:
        """What Lua counted and kept is what the model derives."""
        _assert_same(self._reading.state(dump), of_model(self.model))

    def really_open(self, limit: str) -> int:
        """Calls that are running, over all processes, as an upstream would count them."""
        return sum(client.queue.held_of[limit] for client in self.clients)

    def leftovers(self) -> list[str]:
        """Keys that should have gone with the last session."""
        live_on = (
            "meta",
            "layout",
            "history",
            "timed",
            "spending",
            "restored",
            "paused",
            "past:",
            "log:",
            "rate:",
            "quota:",
            "charged:",
            "progress:",
            "expected",  # of those that died before they came back
        )
        return [n for n in self.server.names() if not n.split("}:", 1)[1].startswith(live_on)]


def _sorted(reply: SyncReply) -> SyncReply:
    """Lists whose order means nothing, in one order; the others as lists of tuples."""
    whole = reply.whole
    if whole is not None:
        whole = whole._replace(
            held=sorted((t, s, u) for t, s, u in whole.held),
            lapsing=sorted((m, x, c) for m, x, c in whole.lapsing),
            spent=sorted((n, x) for n, x in whole.spent),
            pauses=sorted((n, x, r, s) for n, x, r, s in whole.pauses),
            roster=(whole.roster[0], whole.roster[1] and sorted(whole.roster[1])),
        )
    return reply._replace(
        grants=[(ticket, seq) for ticket, seq in reply.grants],
        barred=list(reply.barred),
        outlook=list(reply.outlook),
        stamps=list(reply.stamps),
        refused=list(reply.refused),
        whole=whole,
    )


def _assert_same(real: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if real == expected:
        return
    differing = [
        f"{name}: {real.get(name)} is not {expected.get(name)}"
        for name in {**real, **expected}
        if real.get(name) != expected.get(name)
    ]
    assert not differing, "\n".join(differing)


def _nothing() -> None:
    """Nobody needs to be woken: the machine decides who speaks."""
