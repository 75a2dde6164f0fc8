"""The real Lua on a real Valkey beside the executable model, through every fault we know of.

Two sorts of run. In the *strict* one clients give up in time (`on_lost = "cancel"`), clocks run
evenly and limits are only raised: then no fault, and no number of them, may ever let more calls
run than the limit. In the *loose* one clocks jump, limits fall, change their sort and vanish, and
living sessions are revoked: both worlds must still agree.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import ClassVar, Literal, get_args
from zlib import crc32

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from tests.property.policies import CONCURRENCIES, LEASE_MS, Shape, shapes
from tests.property.server import Server
from tests.property.traffic import HARD_MS, Flow, Traffic, clients, kinds_of_flow
from tests.property.world import Client, World
from tidegate import limiter
from tidegate.limiter import Rate
from tidegate.limiter.simulation import Paces, Waiter

STEPS = int(os.environ.get("TIDEGATE_MODEL_STEPS", "20000"))
WALKS = 4  # beside one another, where there are several test processes
STEPS_PER_RUN = 100
# From its eleventh run on, Hypothesis repeats most runs with one thing changed.
RUNS_OF_A_SEED = 10
_CODE = sorted(Path(limiter.__file__).parent.rglob("*.*"))
# The same walks until the code that they walk through changes: no run fails by chance.
SEED = int(os.environ.get("TIDEGATE_MODEL_SEED", "0")) or crc32(
    b"".join(file.read_bytes() for file in _CODE if file.suffix in (".py", ".lua"))
)

limits = st.sampled_from([*CONCURRENCIES, "rpm:x", "tpm:x", "model:m", "upstream:u"])
gates = st.sampled_from(["upstream:u", "upstream:u", "model:m", "kind:b"])
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


class PoolMachine(Traffic):
    """Steps the two worlds. `server` is set by the test; `steps` counts over all runs."""

    server: ClassVar[Server]
    steps: ClassVar[int] = 0

    @initialize(
        strict=st.booleans(),
        shape=shapes(),
        pace=st.builds(
            Paces,
            st.sampled_from([500, 500, 7]),
            st.sampled_from([8, 1, 2]),
            st.sampled_from([Paces().longest, Paces().longest, 10**9]),
            st.sampled_from([1000, 1, 2]),
            st.sampled_from([50, 1, 2]),
            st.sampled_from([2000, 1]),
            due_after_ms=st.sampled_from([600_000, 600_000, 5000]),
            latency_calls=st.sampled_from([8, 1, 2]),
            latency_rounds=st.sampled_from([20, 1, 2]),
            due_at_once=st.sampled_from([15, 15, 1, 2]),
            unblocked_at_once=st.sampled_from([10, 1, 2]),
            ended_at_once=st.sampled_from([20, 20, 1, 3]),
        ),
        settled=st.sampled_from([True, True, True, False]),
        kinds=st.lists(kinds_of_flow, min_size=1, max_size=4),
    )
    def begin(
        self, strict: bool, shape: Shape, pace: Paces, settled: bool, kinds: list[Flow]
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
            self.newcomers_come_second()
        elif what == "paused":
            # With "reuse", who stood still is over until he learns of it; nor can the server hold
            # what it has lost and was not told again.
            client.paused = self.shape.hold and not client.paused and self.is_known(client)
        elif what.startswith("server"):
            self.trouble_with_the_server(what)
        elif not self.strict and what == "clock jumped":
            world.jump(by_ms)
        elif not self.strict:
            world.revoke(client.sid if who else client.session.name)

    def is_known(self, client: Client) -> bool:
        """Whether the server knows of all that a client holds."""
        session = self.world.model.pool.sessions.get(client.sid)
        return session is not None and client.queue.held.keys() <= session.held.keys()

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
        self.newcomers_come_second()

    def newcomers_come_second(self) -> None:
        """A process that is new to a pool that was emptied can't know of the others: it must not
        be over only where one of those has come before it (docs/guarantees.md)."""
        known = [c for c in self.world.clients if c.session.lease.identity.epoch and not c.paused]
        if (
            self.strict
            and not self.world.model.pool.epoch
            and 0 < len(known) < len(self.world.clients)
        ):
            known[0].session.refresh()
            self.world.exchange(known[0], "ok")

    # -- what people do

    @rule(who=clients, shape=shapes())
    def change_the_policy(self, who: int, shape: Shape) -> None:
        world, client = self.world, self.client(who)
        if client.paused:
            return
        self.shape = self.shape.raised(shape) if self.strict else shape
        known = [c.session.policy.revision for c in world.clients]
        revision = max([*known, world.model.pool.revision]) + 1
        client.session.set_policy(self.shape.policy(revision), "somebody")

    @rule(
        name=limits,
        for_ms=st.sampled_from([0, 1000, 10_000, 50_000]),
        ramp_ms=st.sampled_from([1, 10_000]),
        after_ms=st.sampled_from([0, 0, LEASE_MS]),
    )
    def pause_a_limit_or_end_its_pause(
        self, name: str, for_ms: int, ramp_ms: int, after_ms: int
    ) -> None:
        self.world.advance(after_ms)
        if for_ms:
            self.world.pause(name, for_ms, ramp_ms)
        else:
            self.world.resume(name)

    @rule(
        name=gates,
        for_ms=st.sampled_from([1000, 1000, 12_000]),
        most_ms=st.sampled_from([8000, 8000, 60_000]),
        what=st.sampled_from(["close", "close", "failed", "open"]),
        after_ms=st.sampled_from([0, 0, 2000]),
    )
    def close_a_gate_or_open_it(
        self, name: str, for_ms: int, most_ms: int, what: str, after_ms: int
    ) -> None:
        self.world.advance(after_ms)
        if what == "open":
            self.world.open_gate(name, 10_000)
        else:
            self.world.close_gate(name, for_ms, most_ms, tried=what == "failed")

    @rule(
        name=limits,
        amount=st.sampled_from([1, 3, 100_000]),
        evenly=st.booleans(),
        beside=st.sampled_from(["no bound", "its bound", "its bound", "another"]),
        after_ms=st.sampled_from([0, 0, 2000]),
    )
    def charge_what_others_used(
        self, name: str, amount: int, evenly: bool, beside: str, after_ms: int
    ) -> None:
        self.world.advance(after_ms)
        bound = self.world.model.pool.limit(name).limit.bound + (beside == "another")
        self.world.charge(
            name, amount, evenly=evenly, bound=None if beside == "no bound" else bound
        )

    @rule(name=limits, amount=st.sampled_from([0, 2, 100_000]), after_ms=st.sampled_from([0, 2000]))
    def charge_what_is_on_record(self, name: str, amount: int, after_ms: int) -> None:
        self.world.advance(after_ms)
        self.world.charge(name, amount, recorded=True)

    @rule(
        name=limits,
        who=st.sampled_from(["background-1", "background-2"]),
        amount=st.integers(1, 20),
        for_ms=st.sampled_from([1, 2000, 60_000]),
        ends=st.booleans(),
    )
    def hold_for_a_call_without_a_process(
        self, name: str, who: str, amount: int, for_ms: int, ends: bool
    ) -> None:
        self.world.hold(who, name, amount, for_ms)
        if ends:
            self.world.revoke(who)

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
                for ticket in [t for t, h in client.queue.held.items() if h.fenced]:
                    self.end(client, ticket)
                self.world.admissions.check_fences(client.sid, client.queue.held.values())
        if self.strict and not self.shape.shadow:
            for name in CONCURRENCIES:
                policies = [client.session.policy for client in self.world.clients]
                top = max([self.world.model.pool.limit(name).limit.bound, self.shape_bound(name)])
                top = max([top, *(policy.bound(name) for policy in policies)])
                assert self.world.really_open(name) <= top, f"over {name}"

    def shape_bound(self, name: str) -> int:
        return self.shape.policy(1).bound(name)

    def expire(self, client: Client) -> None:
        """What the timers of the waiters do."""
        for waiter in list(client.queue.waiting.values()):
            if waiter.deadline_ms <= self.world.local_ms:
                client.queue.refuse(waiter, TimeoutError(), self.world.local_ms)

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
            for number, waiter in enumerate(list(client.queue.waiting.values())):
                # Rates and gates may keep many for long, a quota for another day.
                slow = number > 3 and (self.needs_a_rate(waiter) or self.meets_a_gate(waiter))
                if slow or "rpd:x" in waiter.flow.limits:
                    client.queue.refuse(waiter, TimeoutError(), world.local_ms)
        # A round lets in one at the least, but where a rate makes all wait for a window.
        for number in range(200 + 2 * len(self.all_waiting())):
            self.go_round(compare=number % 3 == 0)
            if not any(self.can_be_let_in(waiter) for _, waiter in self.all_waiting()):
                break
        for client, waiter in self.all_waiting():
            assert not self.can_be_let_in(waiter), "a waiter was forgotten"
            client.queue.refuse(waiter, TimeoutError(), world.local_ms)
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
            for ticket in list(client.queue.held):
                self.end(client, ticket)
            self.speak(client)
        self.time_passes_with_heartbeats(LEASE_MS // 3)

    def all_waiting(self) -> list[tuple[Client, Waiter]]:
        return [(c, waiter) for c in self.world.clients for waiter in c.queue.waiting.values()]

    def needs_a_rate(self, waiter: Waiter) -> bool:
        """By any policy that is or may come to be in force."""
        known = [client.session.policy for client in self.world.clients]
        policies = [*known, self.shape.policy(1), self.world.model.pool.policy]
        return any(
            isinstance(policy.limit(name), Rate)
            for policy in policies
            if policy is not None
            for name in waiter.flow.limits
        )

    def meets_a_gate(self, waiter: Waiter) -> bool:
        """Which lets one call at a time try."""
        pauses = [self.world.model.pool.limit(name).pause for name in waiter.flow.limits]
        return any(pause is not None and pause.gate is not None for pause in pauses)

    def can_be_let_in(self, waiter: Waiter) -> bool:
        found = [self.world.model.pool.limit(name) for name in waiter.flow.limits]
        return all(limit.limit.bound > 0 for limit in found)


@pytest.mark.slow
@pytest.mark.timeout(max(600, STEPS // 20))
@pytest.mark.parametrize("walk", range(WALKS))
def test_lua_does_what_the_model_says_through_all_faults(server: Server, walk: int) -> None:
    PoolMachine.server = server
    PoolMachine.steps = 0
    chosen = settings(
        max_examples=RUNS_OF_A_SEED,
        stateful_step_count=STEPS_PER_RUN,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        database=None,
    )
    for number in count(SEED + walk * 1_000_000):
        print(f"{PoolMachine.steps} steps; seed {number}")  # noqa: T201
        run_state_machine_as_test(seed(number)(PoolMachine), settings=chosen)
        if PoolMachine.steps >= STEPS / WALKS:
            break
