"""The real Lua on a real Valkey beside the executable model, through every fault we know of.

Two sorts of run. In the *strict* one clients give up in time (`on_lost = "cancel"`), clocks run
evenly and limits are only raised: then no fault, and no number of them, may ever let more calls
run than the limit. In the *loose* one clocks jump and limits fall: both worlds must still agree.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.property.world import LIMITS, Client, World
from tidegate.limiter.limits import PoolPolicy

LEASE_MS = 3000
HARD_MS = 1_000_000
STEPS = int(os.environ.get("TIDEGATE_MODEL_STEPS", "7200"))
STEPS_PER_RUN = 60

clients = st.integers(0, 2)
fates = st.sampled_from(["ok"] * 6 + ["reply lost", "request lost", "twice"])


class PoolMachine(RuleBasedStateMachine):
    """Steps the two worlds. `server` is set by the test; `steps` counts over all runs."""

    server: ClassVar[redis.Redis]
    steps: ClassVar[int] = 0

    @initialize(
        strict=st.booleans(), hold=st.booleans(), bound=st.integers(0, 3), cancel=st.booleans()
    )
    def begin(self, strict: bool, hold: bool, bound: int, cancel: bool) -> None:
        self.strict = strict
        self.hold = hold
        fields: dict[str, Any] = {
            "on_expiry": "hold" if hold else "reuse",
            "on_lost": "cancel" if strict or cancel else "finish",
        }
        limits = {"kind:a": bound, "kind:b": 2}
        self.world = World(self.server, PoolPolicy(limits, lease_ms=LEASE_MS, **fields))
        for _ in range(3):
            self.world.new_client()

    def client(self, index: int) -> Client:
        return self.world.clients[index]

    # -- what users do

    @rule(who=clients, limit=st.sampled_from(LIMITS), left_ms=st.sampled_from([0, 500, 20_000]))
    def ask(self, who: int, limit: str, left_ms: int) -> None:
        client, at = self.client(who), self.world.local_ms
        if client.paused:
            return
        deadline = at + left_ms if left_ms else float("inf")
        waiter = client.ledger.ask(limit, hard_ms=HARD_MS, now_ms=at, deadline_ms=deadline)
        client.asked.append(waiter)

    @rule(who=clients, which=st.integers(0, 20))
    def give_up(self, who: int, which: int) -> None:
        client = self.client(who)
        waiting = list(client.ledger.waiting.values())
        if waiting and not client.paused:
            waiter = waiting[which % len(waiting)]
            waiter.future.cancel()
            client.ledger.abandon(waiter.ticket, self.world.local_ms)

    @rule(who=clients, which=st.integers(0, 20))
    def end_a_call(self, who: int, which: int) -> None:
        client = self.client(who)
        held = list(client.ledger.held)
        if held and not client.paused:
            self.end(client, held[which % len(held)])

    def end(self, client: Client, ticket: int) -> None:
        client.ledger.release(ticket, outcome="success", tokens=None, now_ms=self.world.local_ms)

    # -- what the network and the servers do

    @rule(who=clients, fate=fates)
    def exchange(self, who: int, fate: str) -> None:
        if not self.client(who).paused:
            self.world.exchange(self.client(who), fate)

    @rule(who=clients)
    def compare_all(self, who: int) -> None:
        if not self.client(who).paused:
            self.client(who).session.refresh()
            self.world.exchange(self.client(who), "ok")

    @rule(which=st.integers(0, 20))
    def a_delayed_request_arrives(self, which: int) -> None:
        old = self.world.old_requests
        alive = {client.sid for client in self.world.clients}
        if old:
            request = old.pop(which % len(old))
            if request.sid in alive:
                self.world.sync(request)

    @rule(who=clients)
    def deliver_a_push(self, who: int) -> None:
        client = self.client(who)
        if client.mailbox and not client.paused:
            client.session.take_push(client.mailbox.pop(0))

    @rule(who=clients)
    def lose_the_pushes(self, who: int) -> None:
        self.client(who).mailbox.clear()

    @rule(who=clients)
    def heartbeat(self, who: int) -> None:
        if not self.client(who).paused:
            self.world.renew(self.client(who))

    @rule(who=clients)
    def lose_the_subscription_or_find_it_again(self, who: int) -> None:
        client = self.client(who)
        if client.subscribed:
            self.world.unsubscribe(client)
        else:
            self.world.subscribe(client)

    @rule(who=clients)
    def kill_a_process(self, who: int) -> None:
        self.world.kill(self.client(who))
        self.world.new_client()

    @rule(by_ms=st.sampled_from([1, 100, 400, 1000, 2000, LEASE_MS, 2 * LEASE_MS]))
    def time_passes(self, by_ms: int) -> None:
        self.world.advance(by_ms)

    def somebody_is_paused(self) -> bool:
        return any(client.paused for client in self.world.clients)

    @precondition(lambda self: not self.somebody_is_paused())
    @rule()
    def the_server_restarts_with_its_data(self) -> None:
        self.world.restart()

    @precondition(lambda self: not self.somebody_is_paused())
    @rule(same_run=st.booleans())
    def the_server_loses_everything(self, same_run: bool) -> None:
        self.world.flush()
        if not same_run:
            self.world.restart()

    @precondition(lambda self: self.hold)
    @rule(who=clients)
    def pause_a_process_or_let_it_go_on(self, who: int) -> None:
        self.client(who).paused = not self.client(who).paused

    @precondition(lambda self: not self.strict)
    @rule(by_ms=st.sampled_from([-10_000, -2000, -100, 700, 1600, 10_000]))
    def the_clock_of_the_server_jumps(self, by_ms: int) -> None:
        self.world.jump(by_ms)

    @rule(who=clients, bound=st.integers(0, 4))
    def change_a_limit(self, who: int, bound: int) -> None:
        world, client = self.world, self.client(who)
        old = client.session.policy
        now = world.model.bound("kind:a")
        if client.paused or (self.strict and bound < max(now, old.limits["kind:a"])):
            return
        limits = {**old.limits, "kind:a": bound}
        revision = max(old.revision, world.model.revision) + 1
        client.session.set_policy(
            PoolPolicy(limits, old.lease_ms, old.when_away, old.on_lost, old.on_expiry, revision)
        )

    # -- what must hold

    @invariant()
    def both_worlds_agree_and_nobody_is_over(self) -> None:
        if not hasattr(self, "world"):
            return
        type(self).steps += 1
        for client in self.world.clients:
            if not client.paused:
                client.session.check_lapse()
                self.expire(client)
                for ticket in [t for t, h in client.ledger.held.items() if h.fenced]:
                    self.end(client, ticket)
        self.world.check_state()
        if self.strict:
            for limit in LIMITS:
                top = max(
                    [self.world.model.bound(limit)]
                    + [client.session.policy.limits[limit] for client in self.world.clients]
                )
                assert self.world.really_open(limit) <= top, f"over {limit}"

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
        for _ in range(200):
            for client in world.clients:
                self.expire(client)
                client.session.refresh()
                world.exchange(client, "ok")
                for push in client.mailbox:
                    client.session.take_push(push)
                client.mailbox.clear()
                for ticket in list(client.ledger.held):
                    self.end(client, ticket)
            world.advance(LEASE_MS // 3)
            if not any(self.can_be_let_in(client) for client in world.clients):
                break
        for client in world.clients:
            assert not self.can_be_let_in(client), "a waiter was forgotten"
            for waiter in list(client.ledger.waiting.values()):
                client.ledger.refuse(waiter, TimeoutError(), world.local_ms)
            assert all(waiter.future.done() for waiter in client.asked)
            client.session.leave()
            world.exchange(client, "ok")
        world.check_state()
        assert world.leftovers() == []
        for client in world.clients:
            for waiter in client.asked:
                if not waiter.future.cancelled():
                    waiter.future.exception()  # looked at, so that asyncio does not complain

    def can_be_let_in(self, client: Client) -> bool:
        bound = self.world.model.bound
        return any(bound(waiter.limit) > 0 for waiter in client.ledger.waiting.values())


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
