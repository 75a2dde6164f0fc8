"""The pool, the processes and the time: a discrete-event loop over the executable model.

Invariant: the same arrivals, policy and setting give the same result. Nothing fails on this stage,
so that a lease has nothing to do here: it is as long as it can be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count, cycle

from tidegate.limiter.limits import MAX_LEASE_MS, PoolPolicy
from tidegate.limiter.model import PoolModel
from tidegate.limiter.wire import SyncReply, SyncRequest
from tidegate.rehearse.process import Process
from tidegate.rehearse.tally import Call, Tally
from tidegate.rehearse.trace import Arrival

# The rehearsal begins at this moment: midnight in Los Angeles, where most day quotas begin anew.
START_MS = 1_735_718_400_000
# The server has been up for long: nobody is waited for who may have lived before.
_UPTIME_MS = 10 * MAX_LEASE_MS
_RUN = "rehearsal"
_SETTLES_MS = 1000
_SAMPLES = 480
_MOST_SAMPLES = 4 * _SAMPLES


@dataclass(frozen=True, slots=True)
class Setting:
    """What of a deployment is neither load nor policy.

    processes: to which calls are dealt in turn. round_trip_ms: of one script call.
    hold_ms: how much longer than a call is open its permit is held.
    kinds_optional: a kind without a limit is not bound by one, as in pools of other upstreams.
    """

    processes: int = 2
    round_trip_ms: float = 0.6
    hold_ms: float = 1.0
    kinds_optional: bool = False


class Timer:
    """Something that is due. Cancelled, it does nothing."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Stage:
    """See the module. Times are ms from the start."""

    def __init__(self, policy: PoolPolicy, setting: Setting) -> None:
        self.policy = replace(policy, lease_ms=MAX_LEASE_MS)
        self.setting = setting
        self.now_ms = 0.0
        self.tally = Tally(self.policy)
        self.model = PoolModel()
        # Futures want a loop; nothing runs on it.
        self.loop = asyncio.new_event_loop()
        self._due: list[tuple[float, int, Timer]] = []
        self._numbers = count()
        self._processes: dict[str, Process] = {}
        self._alive = 0

    def after(self, in_ms: float, call: Callable[[], None]) -> Timer:
        """Do something in so many ms; what is due at one moment is done in the order it came."""
        timer = Timer(call)
        heappush(self._due, (self.now_ms + in_ms, next(self._numbers), timer))
        return timer

    def play(self, arrivals: Sequence[Arrival]) -> Tally:
        """Play a trace to the end of its last call."""
        with closing(self.loop):
            self._enter()
            self._alive = len(arrivals)
            self.tally.begin(arrivals[-1].time_ms if arrivals else 0.0)
            self._arrive(arrivals)
            self._sample()
            while self._alive:
                self._step()
        self.tally.end(self.now_ms)
        return self.tally

    def over(self, call: Call) -> None:
        """A call has ended or was refused."""
        self._alive -= 1

    def exchange(
        self, request: SyncRequest, *, tend: bool, answered: Callable[[SyncReply], None]
    ) -> None:
        """Carry a request to the pool and its answer back."""
        half_ms = self.setting.round_trip_ms / 2

        def arrived() -> None:
            wall_ms = START_MS + int(self.now_ms)
            reply = (self.model.tend if tend else self.model.sync)(request, wall_ms)
            for sid, push in self.model.pushed:
                heard = self._processes[sid].session.take_push
                self.after(half_ms, lambda heard=heard, push=push: heard(push))  # type: ignore[misc]
            self.model.pushed.clear()
            self.after(half_ms, lambda: answered(reply))

        self.after(half_ms, arrived)

    @property
    def run(self) -> tuple[str, int]:
        """What the server says of itself: its run, and for how long it is up."""
        return _RUN, _UPTIME_MS + int(self.now_ms)

    def held_up_by(self, sid: str, flow: str) -> str | None:
        """The limit at which a process's waiters of a flow stand."""
        session = self.model.sessions.get(sid)
        queue = session.queues.get(flow) if session else None
        return queue.at if queue else None

    def _enter(self) -> None:
        """All processes in the pool, and known to each other."""
        for number in range(self.setting.processes):
            process = Process(self, f"process-{number + 1}")
            self._processes[process.session.sid] = process
            self.model.subscribed.add(process.session.sid)
            process.session.refresh()
        while not all(process.ready for process in self._processes.values()):
            self._step()
        self._settle()

    def _settle(self) -> None:
        """Time begins when all that was to be said has been said."""
        while self._due and self._due[0][0] < self.now_ms + _SETTLES_MS:
            self._step()
        self.tally.since_ms = self.now_ms

    def _step(self) -> None:
        at_ms, _, timer = heappop(self._due)
        if timer.call is not None:
            self.now_ms = at_ms
            timer.call()

    def _arrive(self, arrivals: Sequence[Arrival]) -> None:
        """One arrival after another, so that only one is in the heap."""
        in_turn = cycle(self._processes.values())
        coming, began_ms = iter(arrivals), self.now_ms

        def next_one() -> None:
            arrival = next(coming, None)
            if arrival is None:
                return

            def ask() -> None:
                next(in_turn).ask(arrival)
                next_one()

            self.after(max(0.0, began_ms + arrival.time_ms - self.now_ms), ask)

        next_one()

    def _sample(self) -> None:
        every_ms = max(1.0, self.tally.span_ms / _SAMPLES)

        def look() -> None:
            self.tally.look(self.now_ms, self.model, START_MS + int(self.now_ms))
            # Beyond the load only its end is still to come, which may take days for a quota.
            if len(self.tally.samples) < _MOST_SAMPLES:
                self.after(every_ms, look)

        look()
