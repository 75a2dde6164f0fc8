"""All that the emulator knows while it runs, and the one door through which a call comes in.

Invariant: every call that is served goes through `serving`, which checks all limits, counts it, and
counts its end exactly once, however it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any

from aiohttp import web

from tidegate.providers.emulator.dialect import LimitReached
from tidegate.providers.emulator.faults import Faults
from tidegate.providers.emulator.files import Files
from tidegate.providers.emulator.ledger import Ledger, LoggedCall
from tidegate.providers.emulator.limits import Gate, Refusal
from tidegate.providers.emulator.presence import Presence
from tidegate.providers.emulator.settings import EmulatorSettings

_LONGEST_TRACEPARENT = 100


class State:
    def __init__(
        self, settings: EmulatorSettings, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.settings = settings
        self.clock_ns = clock_ns
        self.ledger = Ledger(settings.log_size)
        self.presence = Presence()
        self.files = Files()
        self.random = Random(settings.seed)
        self.behaviour = settings.behaviour
        self.faults = Faults(settings.faults, self.random)
        self._gate = Gate(self.behaviour.concurrency, self.behaviour.rates)
        self._in_flight: dict[int, LoggedCall] = {}
        self._call_on: dict[object, LoggedCall] = {}  # aiohttp's protocol of a connection -> call

    def reset(self) -> None:
        """As at the start: counters, log, windows, files, faults, behaviour, random numbers."""
        self.ledger.reset()
        self.files.clear()
        self.random.seed(self.settings.seed)
        self.behaviour = self.settings.behaviour
        self.faults.replace(self.settings.faults)
        self._gate = Gate(self.behaviour.concurrency, self.behaviour.rates)

    def change_behaviour(self, changes: Mapping[str, Any]) -> None:
        """Replace some fields; windows start anew only when a limit is among them."""
        self.behaviour = self.behaviour.changed(changes)
        if changes.keys() & {"concurrency", "rates"}:
            self._gate = Gate(self.behaviour.concurrency, self.behaviour.rates)

    @contextmanager
    def serving(
        self,
        request: web.BaseRequest,
        *,
        kind: str,
        model: str,
        method: str,
        prompt: str,
        input_tokens: int = 0,
        dialect: str = "gemini",
    ) -> Iterator[LoggedCall]:
        """Count a call in, and out again at the end. Raises LimitReached when a limit says no."""
        self._notice_departed()
        call = self.ledger.arrive(kind, model, method, prompt, dialect)
        call.traceparent = request.headers.get("traceparent", "")[:_LONGEST_TRACEPARENT]
        refusal = self._refusal(kind, input_tokens)
        if refusal is not None:
            self.ledger.refuse(call, refusal.limit, over=refusal.rate is None)
            raise LimitReached(refusal, model)
        self.ledger.start(call)
        self._in_flight[call.id] = call
        protocol = request.protocol
        self._call_on[protocol] = call
        fd = self.presence.watch(request, call.id)
        try:
            yield call
        except (asyncio.CancelledError, ConnectionError):
            self.ledger.end(call, "client_gone")
            raise
        except BaseException:
            self.ledger.end(call, "failed")
            raise
        finally:
            self.ledger.end(call, "finished")
            self.presence.forget(fd, call.id)
            del self._in_flight[call.id]
            self._call_on.pop(protocol, None)

    def connection_lost(self, protocol: object) -> None:
        """The server has just seen this connection end."""
        if protocol in self._call_on:
            self.ledger.end(self._call_on[protocol], "client_gone")

    def _refusal(self, kind: str, input_tokens: int) -> Refusal | None:
        in_flight = self.ledger.of(kind).in_flight
        full = self._gate.full(kind, in_flight, self.ledger.in_flight_total)
        return full or self._gate.spend(kind, input_tokens, self.clock_ns())

    def _notice_departed(self) -> None:
        for call_id in self.presence.departed():
            if call_id in self._in_flight:
                self.ledger.end(self._in_flight[call_id], "client_gone")
