"""What users do and what the network does: the part of the property test where nothing goes wrong
but what always may.
"""

from __future__ import annotations

from typing import Literal

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.property.idle import free_but_waiting
from tests.property.policies import LANES, LEASE_MS, TENANTS
from tests.property.world import Client, Fate, World
from tidegate.errors import DemandImpossible
from tidegate.limiter import CallUse, Demand, Tokens

HARD_MS = 10_000_000
MOST_ROUNDS = 1000

clients = st.integers(0, 2)
some = st.integers(0, 20)
fates: st.SearchStrategy[Fate] = st.sampled_from(
    ["ok", "ok", "ok", "reply lost", "request lost", "twice"]
)
# A run has a few flows, so that waiters meet.
flows = st.integers(0, 3)
kinds_of_flow = st.tuples(
    st.sampled_from([1, 2, 2, 2, 3]), st.sampled_from(TENANTS), st.sampled_from(LANES)
)
Flow = tuple[int, str, tuple[str, ...]]
Deed = Literal["ask", "say", "hear", "end", "next", "give up", "tell", "tend"]
often: list[Deed] = ["ask", "say", "say", "hear", "end", "next"]
deeds: st.SearchStrategy[tuple[int, Deed]] = st.sampled_from(
    [(who, deed) for deed in [*(often * 3), "give up", "tell", "tend"] for who in range(3)]
)


class Traffic(RuleBasedStateMachine):
    """Three clients in a world, which ask for permits of a few `kinds`."""

    world: World
    kinds: list[Flow]

    def client(self, index: int) -> Client:
        return self.world.clients[index]

    # -- what users do

    @rule(
        who=clients,
        flow=flows,
        tokens=st.sampled_from([0, 100, 400, 900]),
        left_ms=st.sampled_from([0, 0, 5000, 5000, 100_000]),
        times=st.sampled_from([1, 1, 2, 5]),
        due=st.booleans(),
    )
    def ask(self, who: int, flow: int, tokens: int, left_ms: int, times: int, due: bool) -> None:
        self.ask_in(who, self.kinds[flow % len(self.kinds)], tokens, left_ms, times, due)

    def ask_in(
        self, who: int, flow: Flow, tokens: int, left_ms: int, times: int, due: bool
    ) -> None:
        client, at = self.client(who), self.world.local_ms
        if client.paused:
            return
        kind = client.queue.flow(*flow)
        demand = Demand(kind.limits, tokens=Tokens(tokens), images=1)
        try:
            kind.refresh(client.session.policy)
            amounts = kind.amounts(demand)
        except DemandImpossible:
            return
        deadline_ms = at + left_ms if left_ms else float("inf")
        for _ in range(times):
            client.asked.append(
                client.queue.ask(
                    kind,
                    amounts=amounts,
                    use=kind.use_of(demand),
                    hard_ms=HARD_MS,
                    now_ms=at,
                    deadline_ms=deadline_ms,
                    by_estimate=times != 2,
                    due=due and left_ms > 0,
                )
            )

    @rule(flow=flows, done=st.lists(deeds, min_size=6, max_size=20), which=some)
    def work(self, flow: int, done: list[tuple[int, Deed]], which: int) -> None:
        """Ordinary traffic of a flow, over several processes."""
        for number, (who, deed) in enumerate(done):
            self.do(who, deed, flow, which + number)

    @rule(flow=flows, other=flows, done=st.lists(deeds, min_size=6, max_size=20), which=some)
    def work_in_two_flows(
        self, flow: int, other: int, done: list[tuple[int, Deed]], which: int
    ) -> None:
        for number, (who, deed) in enumerate(done):
            self.do(who, deed, other if number % 3 == 0 else flow, which + number)

    @rule(flow=flows, who=clients, done=st.lists(deeds, min_size=6, max_size=20), which=some)
    def work_in_one_process(
        self, flow: int, who: int, done: list[tuple[int, Deed]], which: int
    ) -> None:
        """Where permits are passed on without asking anybody."""
        for number, (_, deed) in enumerate(done):
            self.do(who, deed, flow, which + number)

    @rule(who=clients, which=some)
    def look_at_a_place(self, who: int, which: int) -> None:
        tickets = [ticket for ticket, one in self.client(who).queue.waiting.items() if one.sent]
        self.world.look(self.client(who), tickets[which % len(tickets)] if tickets else which)

    @rule(which=some, age_ms=st.integers(0, 90_000))
    def look_back(self, which: int, age_ms: int) -> None:
        limits = self.world.model.pool.limits
        rates = sorted(name for name, one in limits.items() if one.is_rate and one.is_named)
        if rates:
            self.world.look_back(rates[which % len(rates)], age_ms)

    def do(self, who: int, deed: Deed, flow: int, which: int) -> None:
        client = self.client(who)
        if client.paused:
            return
        if deed == "ask":
            left_ms = (0, 0, 5000, 20_000, 6000)[which % 5]
            self.ask(who, flow, 100, left_ms, 2, which % 2 == 0)
        elif deed == "say":
            self.world.exchange(client, "ok")
        elif deed == "tend":
            self.world.exchange(client, "ok", tend=True)
        elif deed == "hear":
            self.hear_pushes(client)
        elif deed == "end":
            used = (None, 0, 100, 1500)[which % 4]
            self.end_a_call(who, which, "success", used, which % 3 == 0)
        elif deed == "next":
            self.end_a_call_and_ask_for_the_next(who, which)
        elif deed == "tell":
            self.tell_the_usage_of_a_call_that_ended(who, which)
        else:
            self.give_up(who, which)

    def give_up(self, who: int, which: int) -> None:
        client = self.client(who)
        waiting = list(client.queue.waiting.values())
        if waiting and not client.paused:
            waiter = waiting[which % len(waiting)]
            waiter.future.cancel()
            client.queue.abandon(waiter.ticket, self.world.local_ms)

    @rule(
        who=clients,
        which=some,
        outcome=st.sampled_from(["success", "success", "ignored", "dropped"]),
        used=st.sampled_from([None, 0, 100, 1500]),
        later=st.booleans(),
    )
    def end_a_call(self, who: int, which: int, outcome: str, used: int | None, later: bool) -> None:
        client = self.client(who)
        held = list(client.queue.held)
        if held and not client.paused:
            self.end(client, held[which % len(held)], outcome, used, later)

    def end_a_call_and_ask_for_the_next(self, who: int, which: int) -> None:
        client = self.client(who)
        held = list(client.queue.held.values())
        if held and not client.paused:
            flow = held[which % len(held)].flow
            used = (None, 100, 1500, 0)[which % 4]
            self.end(client, held[which % len(held)].ticket, used=used, later=which % 5 == 0)
            self.ask_in(who, (flow.band, flow.tenant, flow.limits), 100, 0, 1, False)

    def end(
        self,
        client: Client,
        ticket: int,
        outcome: str = "success",
        used: int | None = None,
        later: bool = False,
    ) -> None:
        flow = client.queue.held[ticket].flow
        first_ms = None if used is None else 1 + used % 350 * ticket
        use = CallUse(first_ms=first_ms)
        if used is not None:
            use = CallUse(Tokens(used), 2, cost_micros=used * 30, first_ms=first_ms)
        actual = flow.actual(use)
        if later:
            client.usage_due.append((ticket, actual))
        client.queue.release(
            ticket,
            outcome=outcome,
            actual="" if later else actual,
            now_ms=self.world.local_ms,
            usage_later=later,
            use=None if later else flow.cost_of(use),
            first=flow.first_of(use),
        )

    def tell_the_usage_of_a_call_that_ended(self, who: int, which: int) -> None:
        client = self.client(who)
        if client.usage_due and not client.paused:
            ticket, actual = client.usage_due.pop(which % len(client.usage_due))
            client.queue.settle_later(ticket, actual)

    # -- what the network does, and time

    @rule(who=clients, fate=fates, tend=st.sampled_from([False, False, True]))
    def exchange(self, who: int, fate: Fate, tend: bool) -> None:
        if not self.client(who).paused:
            self.world.exchange(self.client(who), fate, tend=tend)

    @rule()
    def a_third_of_a_lease_passes_and_everybody_compares_all(self) -> None:
        """As it happens again and again while all is well."""
        self.time_passes_with_heartbeats(LEASE_MS // 3)
        self.everybody_compares_all()

    def everybody_compares_all(self) -> None:
        listening = [client for client in self.world.clients if not client.paused]
        for _ in range(2):
            for client in listening:
                client.session.check_lapse()
                client.session.refresh()
                self.speak(client)
        rounds = 0
        while any(client.mailbox or client.session.is_request_due() for client in listening):
            for client in listening:
                self.speak(client)
            rounds += 1
            assert rounds < MOST_ROUNDS, "there is no end of what they have to say"
        if all(client.subscribed and not client.paused for client in self.world.clients):
            waiting = free_but_waiting(self.world.model)
            assert not waiting, "waits though all it needs is free"

    def speak(self, client: Client) -> None:
        """As its exchange loop does: as long as there is something to hear or to say."""
        self.hear_pushes(client)
        if client.session.is_request_due():
            self.world.exchange(client, "ok")

    @rule(which=some, tend=st.booleans())
    def a_delayed_request_arrives(self, which: int, tend: bool) -> None:
        old = self.world.old_requests
        alive = {client.sid for client in self.world.clients}
        if old:
            request = old.pop(which % len(old))
            if request.sid in alive:
                ordinary = not (request.full or request.leave or request.join)
                self.world.call(request, tend=tend or not ordinary)

    def hear_pushes(self, client: Client) -> None:
        for push in client.mailbox:
            client.session.take_push(push)
        client.mailbox.clear()

    @rule(by_ms=st.sampled_from([1, 100, 1000, 5000, 5000, 20_000, 2 * LEASE_MS]))
    def time_passes(self, by_ms: int) -> None:
        self.world.advance(by_ms)

    @rule(by_ms=st.sampled_from([100, 1000, 5000, 20_000]))
    def time_passes_with_heartbeats(self, by_ms: int) -> None:
        self.world.advance(by_ms)
        self.world.renew([client for client in self.world.clients if not client.paused])
