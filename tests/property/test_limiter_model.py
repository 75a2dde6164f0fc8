"""The real Lua on a real Valkey beside the executable model, through every fault we know of.

Two sorts of run. In the *strict* one clients give up in time (`on_lost = "cancel"`), clocks run
evenly and limits are only raised: then no fault, and no number of them, may ever let more calls
run than the limit. In the *loose* one clocks jump, limits fall, change their sort and vanish, and
living sessions are revoked: both worlds must still agree.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import ClassVar, Literal, get_args

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.property.idle import free_but_waiting
from tests.property.policies import CONCURRENCIES, LANES, LEASE_MS, TENANTS, Shape, shapes
from tests.property.world import Client, Fate, Pace, World
from tidegate.errors import DemandImpossible
from tidegate.limiter.entries import Waiter
from tidegate.limiter.flow import Tokens

HARD_MS = 10_000_000
STEPS = int(os.environ.get("TIDEGATE_MODEL_STEPS", "7200"))
STEPS_PER_RUN = 60

clients = st.integers(0, 2)
some = st.integers(0, 20)
fates: st.SearchStrategy[Fate] = st.sampled_from(
    ["ok", "ok", "ok", "reply lost", "request lost", "twice"]
)
limits = st.sampled_from([*CONCURRENCIES, "rpm:x", "tpm:x"])
# A run has a few flows, so that waiters meet.
flows = st.integers(0, 3)
kinds_of_flow = st.tuples(
    st.sampled_from([1, 2, 2, 2, 3]), st.sampled_from(TENANTS), st.sampled_from(LANES)
)
Flow = tuple[int, str, tuple[str, ...]]
Deed = Literal["ask", "say", "hear", "end", "next", "give up", "tell", "tend"]
often: list[Deed] = ["ask", "say", "say", "hear", "end", "next"]
deeds: st.SearchStrategy[tuple[int, Deed]] = st.tuples(
    clients, st.sampled_from([*(often * 3), "give up", "tell", "tend"])
)
Misfortune = Literal[
    "lost pushes",
    "lost subscription",
    "killed",
    "killed and revoked",
    "paused",
    "server restarted",
    "server emptied",
    "server restarted empty",
    "clock jumped",
    "revoked",
]
jumps = st.sampled_from([-100_000, -20_000, -1000, 7000, 16_000, 100_000])
misfortunes: st.SearchStrategy[Misfortune] = st.sampled_from(
    ["lost pushes", "lost subscription", "lost subscription", *get_args(Misfortune)]
)


class PoolMachine(RuleBasedStateMachine):
    """Steps the two worlds. `server` is set by the test; `steps` counts over all runs."""

    server: ClassVar[redis.Redis]
    steps: ClassVar[int] = 0

    @initialize(
        strict=st.booleans(),
        shape=shapes(),
        pace=st.builds(Pace, st.sampled_from([500, 500, 7]), st.sampled_from([8, 1, 2])),
        settled=st.sampled_from([True, True, True, False]),
        kinds=st.lists(kinds_of_flow, min_size=1, max_size=4),
    )
    def begin(
        self, strict: bool, shape: Shape, pace: Pace, settled: bool, kinds: list[Flow]
    ) -> None:
        self.strict = strict
        self.kinds = kinds
        if strict:
            shape = replace(shape, cancel=True, reap_closed_ms=0, wild="")
        self.shape = shape
        self.world = World(self.server, shape.policy(1), pace)
        for _ in range(3):
            self.world.new_client()
        if settled:
            for _ in range(2):
                self.a_third_of_a_lease_passes_and_everybody_compares_all()

    def client(self, index: int) -> Client:
        return self.world.clients[index]

    # -- what users do

    @rule(
        who=clients,
        flow=flows,
        tokens=st.sampled_from([0, 100, 400, 900]),
        left_ms=st.sampled_from([0, 0, 5000, 100_000]),
        times=st.sampled_from([1, 1, 2, 5]),
    )
    def ask(self, who: int, flow: int, tokens: int, left_ms: int, times: int) -> None:
        self.ask_in(who, self.kinds[flow % len(self.kinds)], tokens, left_ms, times)

    def ask_in(self, who: int, flow: Flow, tokens: int, left_ms: int, times: int) -> None:
        client, at = self.client(who), self.world.local_ms
        if client.paused:
            return
        kind = client.ledger.flow(*flow)
        try:
            kind.refresh(client.session.policy)
        except DemandImpossible:
            return
        deadline_ms = at + left_ms if left_ms else float("inf")
        amounts = kind.amounts(Tokens(tokens), 1)
        for _ in range(times):
            client.asked.append(
                client.ledger.ask(
                    kind, amounts=amounts, hard_ms=HARD_MS, now_ms=at, deadline_ms=deadline_ms
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

    def do(self, who: int, deed: Deed, flow: int, which: int) -> None:
        client = self.client(who)
        if client.paused:
            return
        if deed == "ask":
            self.ask(who, flow, 100, 0, 2)
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
        waiting = list(client.ledger.waiting.values())
        if waiting and not client.paused:
            waiter = waiting[which % len(waiting)]
            waiter.future.cancel()
            client.ledger.abandon(waiter.ticket, self.world.local_ms)

    @rule(
        who=clients,
        which=some,
        outcome=st.sampled_from(["success", "success", "ignored", "dropped"]),
        used=st.sampled_from([None, 0, 100, 1500]),
        later=st.booleans(),
    )
    def end_a_call(self, who: int, which: int, outcome: str, used: int | None, later: bool) -> None:
        client = self.client(who)
        held = list(client.ledger.held)
        if held and not client.paused:
            self.end(client, held[which % len(held)], outcome, used, later)

    def end_a_call_and_ask_for_the_next(self, who: int, which: int) -> None:
        client = self.client(who)
        held = list(client.ledger.held.values())
        if held and not client.paused:
            flow = held[which % len(held)].flow
            self.end(client, held[which % len(held)].ticket)
            self.ask_in(who, (flow.band, flow.tenant, flow.limits), 100, 0, 1)

    def end(
        self,
        client: Client,
        ticket: int,
        outcome: str = "success",
        used: int | None = None,
        later: bool = False,
    ) -> None:
        flow = client.ledger.held[ticket].flow
        actual = flow.actual(None if used is None else Tokens(used), None)
        if later:
            client.usage_due.append((ticket, actual))
        client.ledger.release(
            ticket,
            outcome=outcome,
            actual="" if later else actual,
            now_ms=self.world.local_ms,
            usage_later=later,
        )

    def tell_the_usage_of_a_call_that_ended(self, who: int, which: int) -> None:
        client = self.client(who)
        if client.usage_due and not client.paused:
            ticket, actual = client.usage_due.pop(which % len(client.usage_due))
            client.ledger.settle_later(ticket, actual)

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
        while any(client.mailbox or client.session.something_to_say() for client in listening):
            for client in listening:
                self.speak(client)
        if all(client.subscribed and not client.paused for client in self.world.clients):
            waiting = free_but_waiting(self.world.model)
            assert not waiting, "waits though all it needs is free"

    def speak(self, client: Client) -> None:
        """As its courier does: as long as there is something to hear or to say."""
        self.hear_pushes(client)
        if client.session.something_to_say():
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
        for client in self.world.clients:
            if not client.paused:
                self.world.renew(client)

    # -- what goes wrong

    @rule(what=misfortunes, who=clients, by_ms=jumps)
    def a_misfortune(self, what: Misfortune, who: int, by_ms: int) -> None:
        world, client = self.world, self.client(who)
        if what == "lost pushes":
            client.mailbox.clear()
        elif what == "lost subscription":
            self.lose_the_subscription_or_find_it_again(client)
        elif what in ("killed", "killed and revoked"):
            world.kill(client)
            world.new_client()
            if what == "killed and revoked":
                world.revoke(client.sid)
        elif what == "paused":
            # With "reuse", who stood still is over until he learns of it.
            client.paused = self.shape.hold and not client.paused
        elif what.startswith("server"):
            self.trouble_with_the_server(what)
        elif not self.strict and what == "clock jumped":
            world.jump(by_ms)
        elif not self.strict:
            world.revoke(client.sid if who else client.session.name)

    def lose_the_subscription_or_find_it_again(self, client: Client) -> None:
        if client.subscribed:
            self.world.unsubscribe(client)
        else:
            self.world.subscribe(client)

    def trouble_with_the_server(self, what: Misfortune) -> None:
        if any(client.paused for client in self.world.clients):
            return
        if what != "server restarted":
            self.world.flush()
        if what != "server emptied":
            self.world.restart()

    # -- what people do

    @rule(who=clients, shape=shapes())
    def change_the_policy(self, who: int, shape: Shape) -> None:
        world, client = self.world, self.client(who)
        if client.paused:
            return
        self.shape = self.shape.raised(shape) if self.strict else shape
        known = [c.session.policy.revision for c in world.clients]
        revision = max([*known, world.model.revision]) + 1
        client.session.set_policy(self.shape.policy(revision), "somebody")

    @rule(
        name=limits,
        for_ms=st.sampled_from([0, 1000, 10_000, 50_000]),
        ramp_ms=st.sampled_from([1, 10_000]),
    )
    def pause_a_limit_or_end_its_pause(self, name: str, for_ms: int, ramp_ms: int) -> None:
        if for_ms:
            self.world.pause(name, for_ms, ramp_ms)
        else:
            self.world.resume(name)

    # -- what must hold

    @invariant()
    def nobody_is_over(self) -> None:
        if not hasattr(self, "world"):
            return
        type(self).steps += 1
        for client in self.world.clients:
            if not client.paused:
                client.session.check_lapse()
                self.expire(client)
                for ticket in [t for t, h in client.ledger.held.items() if h.fenced]:
                    self.end(client, ticket)
                self.world.admissions.check_fences(client.sid, client.ledger.held.values())
        if self.strict and not self.shape.shadow:
            for name in CONCURRENCIES:
                policies = [client.session.policy for client in self.world.clients]
                top = max([self.world.model.limit(name).limit.bound, self.shape_bound(name)])
                top = max([top, *(policy.bound(name) for policy in policies)])
                assert self.world.really_open(name) <= top, f"over {name}"

    def shape_bound(self, name: str) -> int:
        return self.shape.policy(1).bound(name)

    def expire(self, client: Client) -> None:
        """What the timers of the waiters do."""
        for waiter in list(client.ledger.waiting.values()):
            if waiter.deadline_ms <= self.world.local_ms:
                client.ledger.refuse(waiter, TimeoutError(), self.world.local_ms)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.drain()
        finally:
            self.world.close()

    def drain(self) -> None:
        """When all is well again every waiter gets its turn, once, and nothing is left."""
        world = self.world
        world.advance(2 * HARD_MS)  # what was held over for the dead is free
        for client in world.clients:
            client.paused = False
            client.mailbox.clear()
            client.session.check_lapse()
            if not client.subscribed:
                world.subscribe(client)
            for number, waiter in enumerate(list(client.ledger.waiting.values())):
                # Rates may keep many for long, a quota for another day.
                slow = number > 3 and (
                    "rpm:x" in waiter.flow.limits or "tpm:x" in waiter.flow.limits
                )
                if slow or "rpd:x" in waiter.flow.limits:
                    client.ledger.refuse(waiter, TimeoutError(), world.local_ms)
        for number in range(200):
            self.go_round(compare=number % 3 == 0)
            if not any(self.can_be_let_in(waiter) for _, waiter in self.all_waiting()):
                break
        for client, waiter in self.all_waiting():
            assert not self.can_be_let_in(waiter), "a waiter was forgotten"
            client.ledger.refuse(waiter, TimeoutError(), world.local_ms)
        for client in world.clients:
            assert all(waiter.future.done() for waiter in client.asked)
            client.session.leave()
            world.exchange(client, "ok")
        assert world.leftovers() == []
        for client in world.clients:
            for waiter in client.asked:
                if not waiter.future.cancelled():
                    waiter.future.exception()  # looked at, so that asyncio does not complain

    def go_round(self, *, compare: bool) -> None:
        """Everybody says what there is to say, and ends all calls; then time passes."""
        for client in self.world.clients:
            self.expire(client)
            if compare:
                client.session.refresh()
            self.speak(client)
            for ticket in list(client.ledger.held):
                self.end(client, ticket)
            self.speak(client)
        self.time_passes_with_heartbeats(LEASE_MS // 3)

    def all_waiting(self) -> list[tuple[Client, Waiter]]:
        return [(c, waiter) for c in self.world.clients for waiter in c.ledger.waiting.values()]

    def can_be_let_in(self, waiter: Waiter) -> bool:
        found = [self.world.model.limit(name) for name in waiter.flow.limits]
        return all(limit.limit.bound > 0 for limit in found)


def test_lua_does_what_the_model_says_through_all_faults(valkey_url: str) -> None:
    PoolMachine.server = redis.Redis.from_url(valkey_url)
    PoolMachine.steps = 0
    chosen = settings(
        max_examples=STEPS // STEPS_PER_RUN + 1,
        stateful_step_count=STEPS_PER_RUN,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(PoolMachine, settings=chosen)
    print(f"{PoolMachine.steps} steps; {chosen}")  # noqa: T201
    assert PoolMachine.steps >= 5000
