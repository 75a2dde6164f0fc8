"""Processes that keep a modelled pool busy: for judging whose turn comes, without any server.

Each process hears of its grants at once and acknowledges them; calls end in the order in which
they began, each after the same time.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import count

from tidegate.limiter import PoolPolicy
from tidegate.limiter.simulation import Join, PoolModel, SyncReply, SyncRequest, flow_of

HARD_MS = 1_000_000
RUN = "run"


@dataclass(slots=True)
class Call:
    """A call that is waiting or running. `use` is what it is taken to use, `cost` what it costs."""

    ticket: int
    flow: str
    member: str
    took_ms: int
    use: int
    cost: int


@dataclass(slots=True)
class Process:
    """One session, with what it waits for."""

    sid: str
    gen: int = 0
    epoch: int = 0
    batch: int = 0
    ack: int = 0
    waiting: dict[int, Call] = field(default_factory=dict)


class Crowd:
    """A pool and its processes. `admitted` are the calls let in, in their order."""

    def __init__(self, policy: PoolPolicy, processes: int = 1) -> None:
        self.model = PoolModel()
        self.now_ms = 1_000_000
        self.policy = policy
        self.running: deque[tuple[Process, Call]] = deque()
        self.admitted: list[Call] = []
        self._tickets = count(1)
        self.processes = [Process(f"s{number}") for number in range(processes)]
        for process in self.processes:
            self.model.pool.subscribed.add(process.sid)
            join = Join(policy, "test", process.sid, [], [])
            reply = self._say(process, join=join, full=True)
            process.gen, process.epoch = reply.gen, reply.epoch
        self.now_ms += policy.lease_ms // 2
        for process in self.processes:
            self.compare(process)

    def _say(self, process: Process, **fields: object) -> SyncReply:
        process.batch += 1
        request = SyncRequest(
            sid=process.sid,
            gen=process.gen,
            epoch=process.epoch,
            run=RUN,
            uptime_ms=1_000_000,
            lease_ms=self.policy.lease_ms,
            revision=1,
            batch=process.batch,
            ack=process.ack,
            **fields,  # type: ignore[arg-type]
        )
        ordinary = not (request.full or request.join)
        reply = self.model.sync(request, self.now_ms) if ordinary else None
        if reply is None or reply.status == "tend":
            process.batch += 1
            reply = self.model.tend(request, self.now_ms)
        assert reply.status == "ok"
        for ticket, _ in reply.grants:
            self._let_in(process, ticket)
        for sid, push in self.model.pool.pushed:
            other = next(each for each in self.processes if each.sid == sid)
            other.ack = push.sent
            for ticket, _ in push.grants:
                self._let_in(other, ticket)
        self.model.pool.pushed.clear()
        return reply

    def compare(self, process: Process) -> None:
        """A process compares all with the pool, as it does from time to time."""
        self._say(process, full=True)

    def cancel(self, process: Process, call: Call) -> None:
        del process.waiting[call.ticket]
        self._say(process, flows=[call.flow], cancels=[(call.ticket, 1, call.member)])

    def _let_in(self, process: Process, ticket: int) -> None:
        call = process.waiting.pop(ticket)
        self.admitted.append(call)
        self.running.append((process, call))

    def _new(
        self, process: Process, tenant: str, lane: tuple[str, ...], band: int, took_ms: int,
        amounts: str, use: int, cost: int,
    ) -> Call:  # fmt: skip
        ticket = next(self._tickets)
        member = f"{ticket}|{HARD_MS}|{use}|{amounts}"
        call = Call(ticket, flow_of(band, tenant, lane), member, took_ms, use, cost)
        process.waiting[ticket] = call
        return call

    def ask(
        self,
        process: Process,
        tenant: str,
        *lane: str,
        band: int = 2,
        took_ms: int = 1000,
        amounts: str = "",
        use: int = 0,
        cost: int = 0,
        due_ms: int = 0,
        times: int = 1,
    ) -> list[Call]:
        of = (process, tenant, lane, band, took_ms, amounts, use or took_ms, cost)
        calls = [self._new(*of) for _ in range(times)]
        self._say(
            process,
            flows=[calls[0].flow],
            enqueues=[(1, call.member) for call in calls],
            dues=[due_ms] * times,
        )
        return calls

    def end_one(self, *, ask_again: bool = False) -> None:
        """The call that runs longest ends; with `ask_again` its process asks for the like of it in
        the same breath."""
        process, call = self.running.popleft()
        release = (call.ticket, 1, 0, call.took_ms, "")
        enqueues = []
        if ask_again:
            band, tenant, lane = call.flow.split("|", 2)
            amounts = call.member.rpartition("|")[2]
            names = tuple(lane.split(" "))
            again = self._new(
                process, tenant, names, int(band), call.took_ms, amounts, call.use, call.cost
            )
            enqueues = [(1, again.member)]
        uses = [(call.ticket, call.cost)] if call.cost else []
        self._say(process, flows=[call.flow], releases=[release], enqueues=enqueues, uses=uses)

    def change(self, policy: PoolPolicy) -> None:
        """Put another policy in force, by the last process, which is to have no calls."""
        process = self.processes[-1]
        join = Join(policy, "test", process.sid, [], [])
        process.gen = self._say(process, join=join, full=True).gen

    def run(self, admissions: int) -> list[Call]:
        """Keep everybody busy until so many more were let in, and return those."""
        before = len(self.admitted)
        while len(self.admitted) < before + admissions:
            self.end_one(ask_again=True)
        return self.admitted[before : before + admissions]


def tenants_of(calls: list[Call]) -> Counter[str]:
    return Counter(call.flow.split("|")[1] for call in calls)


def bands_of(calls: list[Call]) -> Counter[int]:
    return Counter(int(call.flow.split("|")[0]) for call in calls)
