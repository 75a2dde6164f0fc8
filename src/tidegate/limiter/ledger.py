"""What this process waits for and holds: decided here, said by `outbox.py`, sent by `courier.py`.

Does no I/O. Invariants: a ticket is waiting, held or gone, and each is granted or given up once; a
permit that is passed on inside the process is never also given back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from heapq import nlargest
from itertools import count, islice
from math import inf

from tidegate.limiter.entries import Batch, Counts, Holding, Release, Transfer, Waiter
from tidegate.limiter.flow import UNITS, Flow
from tidegate.limiter.outbox import Outbox
from tidegate.limiter.rounds import Rounds
from tidegate.limiter.wire import OUTCOMES, USAGE_LATER, Hint

# Fences of one permit that is passed on inside a process; the server's are this far apart.
CHAIN = 1000
MAX_FLOWS = 10_000


def _count_down(counter: Counter[str], names: Iterable[str]) -> None:
    for name in names:
        left = counter[name] - 1
        if left:
            counter[name] = left
        else:
            del counter[name]


def _new_future() -> asyncio.Future[Holding]:
    return asyncio.get_running_loop().create_future()


class Ledger:
    """See the module. `recycling` is set while a freed permit may be passed on in the process
    whatever the server says, since it says nothing; `idle` while nobody waits in the whole pool.
    """

    def __init__(self, new_future: Callable[[], asyncio.Future[Holding]] | None = None) -> None:
        self._new_future = new_future or _new_future
        self.waiting: dict[int, Waiter] = {}
        self.held: dict[int, Holding] = {}
        self.held_of: Counter[str] = Counter()  # by limit, without those that have none
        self.waiting_of: Counter[str] = Counter()
        self.spent_since: Counter[str] = Counter()
        self.counts = Counts()
        self.recycling = False
        self.idle = False
        self.outbox = Outbox()
        self._tickets = count(1)
        self._flows: dict[tuple[int, str, tuple[str, ...]], Flow] = {}
        self._lanes: dict[tuple[int, tuple[str, ...]], dict[str, Flow]] = {}
        self._local_tags: Counter[str] = Counter()
        # Those that the last request asked hints for, and those that have one.
        self._wanting, self._hinted = list[Flow](), list[Flow]()
        self.rounds = Rounds(self._lanes)

    def __repr__(self) -> str:
        counts = f"waiting={len(self.waiting)} held={len(self.held)} unsaid={len(self.outbox)}"
        return f"<Ledger {counts}>"

    def flow(self, band: int, tenant: str, limits: tuple[str, ...]) -> Flow:
        """The flow of that name, one object for all that ask for it."""
        name = (band, tenant, limits)
        flow = self._flows.get(name)
        if flow is None:
            if len(self._flows) >= MAX_FLOWS:
                self._flows = {n: f for n, f in self._flows.items() if f.waiting or f.held}
            flow = self._flows[name] = Flow(band, tenant, limits)
        return flow

    def longest_queues(self, most: int) -> list[Flow]:
        """The flows with the most waiters here."""
        flows = (flow for lane in self._lanes.values() for flow in lane.values())
        return nlargest(most, flows, key=lambda flow: len(flow.waiting))

    # -- waiting

    def ask(
        self,
        flow: Flow,
        *,
        amounts: str = "",
        hard_ms: int,
        now_ms: float,
        deadline_ms: float,
        once: bool = False,
    ) -> Waiter:
        """A new waiter at the end of its flow; let in at once by a permit that is spare."""
        ticket, cost_ms = next(self._tickets), round(flow.cost_ms)
        member = f"{ticket}|{hard_ms}|{cost_ms}|{amounts}"
        waiter = Waiter(
            ticket, flow, member, hard_ms, cost_ms, now_ms, deadline_ms, self._new_future(), once
        )
        if not flow.waiting and self._take_spare(waiter, now_ms):
            return waiter
        if self.idle or not flow.waiting:
            self.outbox.urgent = True
        self.waiting[ticket] = waiter
        if not flow.waiting:
            self._lanes.setdefault(flow.lane, {})[flow.key] = flow
        flow.waiting[ticket] = waiter
        for name in flow.limits:
            self.waiting_of[name] += 1
        self.outbox.enqueue(waiter)
        return waiter

    def _take_spare(self, waiter: Waiter, now_ms: float) -> bool:
        release = self.outbox.take_spare(waiter.flow) if self.idle else None
        if release is None:
            return False
        heir = self._hold(waiter, release.epoch, release.seq + 1, now_ms)
        self.outbox.transfer(Transfer(release.ticket, heir, "", release.outcome, release.took_ms))
        self.counts.handed_on += 1
        return True

    def abandon(self, ticket: int, now_ms: float) -> None:
        """The waiter gave up. A grant that reached it already, or crosses this, is given back."""
        waiter = self._forget(ticket)
        if waiter is None:
            if ticket in self.held:
                self.release(ticket, outcome="ignored", actual="", now_ms=now_ms)
        elif waiter.sent:
            self.outbox.cancel(ticket, waiter.flow, waiter.member)

    def _forget(self, ticket: int) -> Waiter | None:
        waiter = self.waiting.pop(ticket, None)
        if waiter is not None:
            flow = waiter.flow
            del flow.waiting[ticket]
            _count_down(self.waiting_of, flow.limits)
            if not flow.waiting:
                flow.nobody_waits()
                lane = self._lanes[flow.lane]
                del lane[flow.key]
                if not lane:
                    del self._lanes[flow.lane]
            self.outbox.unqueue(ticket)
        return waiter

    def refuse(self, waiter: Waiter, error: Exception, now_ms: float) -> None:
        """End a wait with an error."""
        self.abandon(waiter.ticket, now_ms)
        if not waiter.future.done():
            waiter.future.set_exception(error)

    def refused(self, ticket: int) -> Waiter | None:
        """The server did not take a ticket: it is in no queue."""
        return self._forget(ticket)

    # -- giving back and passing on

    def release(
        self, ticket: int, *, outcome: str, actual: str, now_ms: float, usage_later: bool = False
    ) -> None:
        """Give a permit back, or pass it on to the next waiter here where that is fair."""
        holding = self.held.pop(ticket, None)
        if holding is None:
            return
        flow = holding.flow
        flow.held -= 1
        _count_down(self.held_of, flow.limits)
        took_ms = now_ms - holding.held_from_ms
        if outcome == "success":
            flow.learn(took_ms)
        said_ms = flow.whole_ms(took_ms)
        later = USAGE_LATER if usage_later else 0
        release = Release(
            ticket, flow, holding.epoch, holding.seq, OUTCOMES[outcome] + later, said_ms, actual
        )
        self.outbox.parting.add(ticket)
        if holding.fenced or not self._pass_on(release, now_ms):
            chain_goes_on = flow.plain and release.seq % CHAIN < CHAIN - 1
            spare = self.idle and chain_goes_on and not holding.fenced
            self.outbox.give(release, spare_since_ms=now_ms if spare else None)
            if not self.idle:
                self.outbox.urgent = True

    def _pass_on(self, release: Release, now_ms: float) -> bool:
        flow, heir = release.flow, None
        if release.seq % CHAIN < CHAIN - 1:  # else its fence would be the next permit's
            if self.recycling:
                heir = self._next_anyhow(flow)
            elif flow.plain:
                heir = self._next_by_hint(flow.lane)
        if heir is None:
            return False
        holding = self._hold(heir, release.epoch, release.seq + 1, now_ms)
        member = heir.member if heir.sent else ""  # in no queue yet
        self.outbox.transfer(
            Transfer(release.ticket, holding, member, release.outcome, release.took_ms)
        )
        if self.recycling:
            self.counts.recycled += 1
        else:
            self.counts.handed_on += 1
            # The last one that we know of: ask who comes next.
            if self._next_by_hint(flow.lane) is None:
                self.outbox.urgent = True
        return True

    def _next_by_hint(self, lane: tuple[int, tuple[str, ...]]) -> Waiter | None:
        """Whose turn it is; nobody is passed over whom only the server can let in."""
        best: tuple[int, Waiter | None] | None = None
        for flow in self._lanes.get(lane, {}).values():
            found = flow.next_by_hint()
            if found is not None and (best is None or found[0] < best[0]):
                best = found
        return best[1] if best else None

    def _next_anyhow(self, flow: Flow) -> Waiter | None:
        """Nobody can be asked: the fair order among our own waiters for the same limits."""
        if flow.rates:
            return None
        found = [
            (other.band, self._local_tags[other.tenant], waiter.asked_ms, waiter.ticket, waiter)
            for (_, limits), lane in self._lanes.items()
            if limits == flow.limits
            for other in lane.values()
            if (waiter := other.first()) is not None
        ]
        if not found:
            return None
        waiter = min(found)[4]
        chosen = waiter.flow
        self._local_tags[chosen.tenant] += waiter.cost_ms * UNITS // chosen.weight
        return waiter

    def recycle_unsent(self, now_ms: float) -> None:
        """Valkey is away: pass on what was freed but never said."""
        for release in self.outbox.unsent():
            if self._pass_on(release, now_ms):
                self.outbox.keep(release)

    def recycle_forgotten(self, now_ms: float) -> None:
        """The server lost its past: what it may have heard of counts as never said."""
        self.outbox.unsay_releases()
        self.recycle_unsent(now_ms)

    def start_recycling(self) -> None:
        """From now on the order of waiters is ours."""
        if not self.recycling:
            self._local_tags.clear()
        self.recycling = True

    def note_idle(self, idle: bool) -> None:
        """Whether anybody waits in the whole pool, as the server says."""
        self.idle = idle
        if not idle:
            self.outbox.forget_spare()

    def settle_later(self, ticket: int, actual: str) -> None:
        """The usage of a call whose permit was given back as `usage_later`."""
        self.outbox.settle(ticket, actual)

    # -- being let in

    def admit_locally(self, allows: Callable[[Waiter], bool], epoch: int, now_ms: float) -> None:
        """Valkey is away for longer than the lease: let in whom `allows` lets."""
        flows = [flow for lane in self._lanes.values() for flow in lane.values()]
        for flow in sorted(flows, key=lambda flow: flow.band):
            while (waiter := flow.first()) is not None and allows(waiter):
                self._hold(waiter, epoch, 0, now_ms)
                self.counts.local += 1

    def grant(
        self, ticket: int, epoch: int, seq: int, now_ms: float, admitted_ms: float | None = None
    ) -> None:
        """The server let a ticket in, not before `admitted_ms`. One that nobody waits for any more
        is given back."""
        waiter = self.waiting.get(ticket)
        if waiter is not None:
            self._hold(waiter, epoch, seq, now_ms, admitted_ms)
            return
        if ticket not in self.held and ticket not in self.outbox.parting:
            self.counts.strays += 1
            self.outbox.cancel(ticket, None, "")
        # Else it was let in here in the same moment: the server's permit is free when it hears so.
        self.outbox.urgent = True

    def _hold(
        self,
        waiter: Waiter,
        epoch: int,
        seq: int,
        now_ms: float,
        admitted_ms: float | None = None,
    ) -> Holding:
        self._forget(waiter.ticket)
        flow = waiter.flow
        holding = Holding(
            waiter.ticket,
            flow,
            epoch,
            seq,
            waiter.cost_ms,
            now_ms,
            now_ms if admitted_ms is None else admitted_ms,
            now_ms + waiter.hard_ms,
            now_ms - waiter.asked_ms,
        )
        self.held[waiter.ticket] = holding
        flow.held += 1
        for name in flow.limits:
            self.held_of[name] += 1
        if flow.rates:
            self.spent_since.update(flow.spends(waiter.amounts))
        self.counts.admitted += 1
        # A future that is done belongs to a task that is being cancelled: it will abandon.
        if not waiter.future.done():
            waiter.future.set_result(holding)
        return holding

    def stamp(self, waiters: Iterable[Waiter], stamps: Iterable[int]) -> None:
        """Where the server put the tickets of a batch."""
        for waiter, stamp in zip(waiters, stamps, strict=False):
            waiter.stamp = stamp

    def fence(self) -> int:
        """Our session is gone: cancel every body. They stay in the ledger until they have ended."""
        fenced = [holding for holding in self.held.values() if not holding.fenced]
        for holding in fenced:
            holding.fenced = True
            if holding.on_fence is not None:
                holding.on_fence()
        self.counts.fenced += len(fenced)
        self.outbox.forget_spare()
        return len(fenced)

    # -- batches

    def flows_to_hint(self, most: int) -> list[Flow]:
        """Flows that wait for what this process holds permits of, of those that may hand on."""
        held = {holding.flow.lane for holding in self.held.values() if holding.flow.plain}
        lanes = (self._lanes[lane] for lane in held if lane in self._lanes)
        self._wanting = list(islice((flow for lane in lanes for flow in lane.values()), most))
        return self._wanting

    def rounds_of(self, *, begin: bool) -> Rounds:
        """The rounds through all that waits; `begin` another."""
        if begin:
            self.rounds.begin()
        return self.rounds

    def take_hints(self, hints: Mapping[str, Hint]) -> None:
        """What the server lets us pass on from now on, of what `flows_to_hint` named last, by the
        key of the flow; nothing else."""
        for flow in self._hinted:
            flow.hint = None
        self._hinted = [flow for flow in self._wanting if flow.key in hints and flow.waiting]
        for flow in self._hinted:
            flow.hint = hints[flow.key]

    def drop_hints(self) -> None:
        self.take_hints({})

    def take(self, now_ms: float = inf) -> Batch:
        """The next batch to send."""
        return self.outbox.take(now_ms)

    def take_join(self) -> Batch:
        """The batch of a session that joins."""
        self.drop_hints()
        return self.outbox.take_join(self.waiting, self.held.values())

    def restore(self, batch: Batch) -> None:
        """The batch may or may not have arrived: say it again, before anything newer."""
        self.outbox.restore(batch, self.waiting)

    def reconcile(
        self,
        held: Iterable[tuple[int, int, int]],
        epoch: int,
        now_ms: float,
        here: Callable[[float], float],
        told: Collection[str] | None = None,
    ) -> None:
        """Take what the server says we hold, of the tickets asked after: grants whose push was
        lost, or is still to be read. `here` tells a moment of the server's by our clock, at the
        earliest. What we spent until now is in what it told: of the limits `told`, or of all."""
        for ticket, seq, until_ms in held:
            if ticket in self.held or ticket in self.outbox.parting:
                continue
            waiter = self.waiting.get(ticket)
            admitted_ms = here(until_ms - waiter.hard_ms) if waiter else None
            self.grant(ticket, epoch, seq, now_ms, admitted_ms)
            if waiter is not None and waiter.flow.waiting:
                self.rounds.ask_again(waiter.flow)
        if told is None:
            self.spent_since.clear()
        else:
            for name in told:
                self.spent_since.pop(name, None)
