"""What each gateway is put through. One function a scenario, which returns its figures.

Invariant: every load has an end in count and time, and each answer is looked at: what came with
another status than 200, or cut short, is told and never counted as served.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import machine
from bench.gateway.entries import Entry, Gateway
from bench.gateway.processes import await_rest, cpu_ns
from bench.gateway.programs import Figures, Load, LoadFailed, Upstream

CONNECTIONS = 64
UPSTREAM_MS = 50.0
PACE_PER_S = 1240.0
CHUNKS = 50
STREAMS = 8
BIG_BYTES = 20_000_000
BIG_CONNECTIONS = 2
SMALL_PER_S = 200.0
OPEN = 2000
OPEN_CHUNKS, OPEN_GAP_MS, OPEN_RAMP_S = 12, 1000.0, 4.0
MEMORY_WARM, MEMORY_REQUESTS = 20_000, 180_000
# Half of what the floors can do would be more than the load generator's share of two cores.
MOST_HALF_PER_S = 5000.0
MOST_CONNECTIONS = 2048
DRAIN_S = 5.0
# From its first answer on, until a process has what it imports at its start.
SETTLE_S = 1.0
READY_S = 90.0
# Until connections are open and loads run evenly.
START_S = 0.8
WARM_S = 1.5
_LOOK_S = 0.05
MESSAGES = [
    {"role": "system", "content": "You answer briefly, in plain English, and name your sources."},
    {"role": "user", "content": "Ticket ##########: the importance of cybersecurity for a firm."},
]


class NotServing(Exception):
    """A gateway does not answer as it should; the message says what it does."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How long each load is."""

    seconds: float = 5.0
    memory_requests: int = MEMORY_REQUESTS


@dataclass(frozen=True, slots=True)
class Stage:
    """A gateway in front of its upstream, and what is sent to it."""

    upstream: Upstream
    gateway: Gateway | None
    folder: Path
    ready_s: float = 0.0
    idle_bytes: int = 0
    _found: dict[str, float] = field(default_factory=dict)

    def load(
        self,
        *,
        stream: bool = False,
        direct: bool = False,
        messages: Sequence[Mapping[str, object]] = MESSAGES,
        **more: float,
    ) -> Load:
        """To the gateway, or past it to the upstream."""
        to = None if direct else self.gateway
        asked = {"model": to.model if to else "bench", **({"stream": True} if stream else {})}
        text = json.dumps({**asked, "messages": messages})
        body = self.folder / f"request-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if not body.exists():
            body.write_text(text)
        return Load(
            to.port if to else self.upstream.port,
            to.path if to else "/v1/chat/completions",
            body,
            headers=to.headers if to else (),
            tail="[DONE]" if stream else "}",
            **{"drain": DRAIN_S, **more},
        )

    def capacity_per_s(self, setting: Setting) -> float:
        """Of requests that the upstream answers immediately; measured once."""
        if not self._found:
            self.upstream.behave()
            found = self.load(connections=CONNECTIONS, seconds=setting.seconds / 2).figures()
            self._found["per_s"] = found["in_time"] / found["seconds"]
        return self._found["per_s"]

    def measure(self, load: Callable[[], Load]) -> Figures:
        """The figures of one load, with what it cost, per request, and what it left to do. Raises
        NotServing."""
        self._await_rest()
        before, began_s = self._costs(), time.monotonic()
        figures = load().figures()
        self._await_rest()
        after, took_s = self._costs(), time.monotonic() - began_s
        completed = figures["completed"]
        if figures["ok"] < 0.99 * figures["sent"] or not completed:
            raise NotServing(f"{figures['ok']} of {figures['sent']} served: {figures['said']}")
        spent = {name: after[name] - before[name] for name in after}
        busy_ns = spent.pop("machine")
        own_ns = sum(spent.pop(name) for name in ("all", "upstream", "harness"))
        own_ns += round(figures["cpu_s"] * 1e9)
        others = (busy_ns - own_ns) / (took_s * 1e9 * (os.cpu_count() or 1))
        return {
            **figures,
            "per_s": figures["in_time"] / figures["seconds"],
            "others": max(0.0, others),
            **{f"{name}_us": ns / completed / 1000 for name, ns in spent.items()},
        }

    def _await_rest(self) -> None:
        if (gateway := self.gateway) is not None:
            await_rest(lambda: gateway.cpu_ns()["all"])

    def _costs(self) -> dict[str, int]:
        return {
            **(self.gateway.cpu_ns() if self.gateway else {"all": 0}),
            "upstream": cpu_ns([self.upstream.pid]),
            "harness": time.process_time_ns(),
            "machine": machine.busy_ns(),
        }


@contextmanager
def standing(entry: Entry | None, upstream: Upstream, folder: Path) -> Iterator[Stage]:
    """A stage whose gateway answers and is warm; without an entry there is none between. Raises
    NotServing and EnvironmentMissing."""
    upstream.behave()
    if entry is None:
        yield Stage(upstream, None, folder)
        return
    with entry.start([upstream], folder) as gateway:
        ready_s = await_ready(Stage(upstream, gateway, folder))
        time.sleep(SETTLE_S)
        stage = Stage(upstream, gateway, folder, ready_s, gateway.proportional_bytes())
        stage.load(connections=CONNECTIONS, seconds=WARM_S).figures()
        stage.load(stream=True, connections=STREAMS, seconds=WARM_S / 2).figures()
        yield stage


def await_ready(stage: Stage) -> float:
    """How long after its start it has answered. Raises NotServing."""
    assert stage.gateway is not None
    deadline_s = time.monotonic() + READY_S
    said = ""
    while time.monotonic() < deadline_s:
        if not stage.gateway.program.alive:
            raise NotServing(f"it ended: {stage.gateway.program.said()}")
        try:
            figures = stage.load(requests=1, connections=1, seconds=1, drain=5).figures()
        except LoadFailed as failed:
            said = str(failed)
        else:
            said = str(figures["said"])
            if figures["ok"] == 1:
                return time.monotonic() - stage.gateway.program.began_s
            if said.startswith("404"):
                raise NotServing(f"it has no such path: {said}")
        time.sleep(_LOOK_S)
    raise NotServing(f"not ready within {READY_S:.0f} s: {said}")


def closed(stage: Stage, setting: Setting) -> Figures:
    """As much as 64 connections get, each with one request after another; no wait upstream."""
    stage.upstream.behave()
    return stage.measure(lambda: stage.load(connections=CONNECTIONS, seconds=setting.seconds))


def delayed(stage: Stage, setting: Setting) -> Figures:
    """The same where the upstream takes 50 ms; the connections begin one after another, or they
    would march in step. Times of the beginning are left out."""
    stage.upstream.behave(delay_ms=UPSTREAM_MS)
    return stage.measure(
        lambda: stage.load(
            connections=CONNECTIONS, seconds=setting.seconds + START_S, ramp=START_S, skip=START_S
        )
    )


def paced(stage: Stage, setting: Setting) -> Figures:
    """1,240 requests a second, evenly, whatever the answers do; 50 ms upstream."""
    if stage.gateway is not None and (most := stage.capacity_per_s(setting)) < PACE_PER_S:
        raise NotServing(f"takes {most:.0f} a second at most")
    return _at_pace(stage, setting, PACE_PER_S)


def half(stage: Stage, setting: Setting) -> Figures:
    """At half of its capacity, evenly, and at the same pace without it; 50 ms upstream."""
    rate = min(MOST_HALF_PER_S, max(1.0, stage.capacity_per_s(setting) / 2))
    figures = _at_pace(stage, setting, rate)
    direct = stage.load(direct=True, rate=rate, connections=MOST_CONNECTIONS, seconds=1.0).figures()
    added = {f"added_{part}_ms": figures[f"{part}_ms"] - direct[f"{part}_ms"] for part in PARTS}
    return {**figures, **added, "rate": rate}


def _at_pace(stage: Stage, setting: Setting, rate: float) -> Figures:
    stage.upstream.behave(delay_ms=UPSTREAM_MS)
    return stage.measure(
        lambda: stage.load(
            rate=rate,
            connections=MOST_CONNECTIONS,
            seconds=setting.seconds + START_S,
            skip=START_S,
        )
    )


def big(stage: Stage, setting: Setting) -> Figures:
    """Bodies of 20 MB, two concurrent ones, beside 200 small requests a second (a quarter of its
    capacity where that is less); and the small ones alone."""
    rate = min(SMALL_PER_S, max(1.0, stage.capacity_per_s(setting) / 4))
    stage.upstream.behave()
    small = partial(stage.load, rate=rate, connections=CONNECTIONS, seconds=setting.seconds)
    alone = small().figures()
    picture = {"url": "data:image/png;base64," + "iVBORw0KGgo=" * (BIG_BYTES // 12)}
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": picture}]
    large = stage.load(
        messages=[{"role": "user", "content": parts}],
        connections=BIG_CONNECTIONS,
        seconds=setting.seconds,
    )
    beside = small().figures()
    found = large.figures()
    if not found["ok"]:
        raise NotServing(f"bodies of 20 MB: {found['said'] or 'the connection ended'}")
    served = beside["ok"] / max(1, beside["sent"])
    return {
        "alone_p50_ms": alone["p50_ms"],
        "alone_p99_ms": alone["p99_ms"],
        "beside_p50_ms": beside["p50_ms"],
        "beside_p99_ms": beside["p99_ms"],
        "beside_served": served,
        "big_per_s": found["ok"] / found["all_seconds"],
        "big_refused": found["sent"] - found["ok"],
    }


def held(stage: Stage, _setting: Setting) -> Figures:
    """Memory of its processes once it is ready, and after all loads before this one."""
    assert stage.gateway is not None
    return {"idle_bytes": stage.idle_bytes, "used_bytes": stage.gateway.proportional_bytes()}


def streams(stage: Stage, setting: Setting) -> Figures:
    """Streams of 50 events that come 1 ms apart, eight at once: few enough to keep them apart."""
    stage.upstream.behave(chunks=CHUNKS, gap_ms=1.0)
    figures = stage.measure(
        lambda: stage.load(stream=True, connections=STREAMS, seconds=setting.seconds)
    )
    return {**figures, "reads_each": figures["reads"] / figures["completed"]}


def opened(stage: Stage, _setting: Setting) -> Figures:
    """2,000 streams that are open together, each with an event a second."""
    stage.upstream.behave(chunks=OPEN_CHUNKS, gap_ms=OPEN_GAP_MS)
    most_bytes = before_bytes = stage.gateway.resident_bytes() if stage.gateway else 0
    lasts_s = OPEN_RAMP_S + OPEN_CHUNKS * OPEN_GAP_MS / 1000
    load = stage.load(
        stream=True,
        connections=OPEN,
        requests=OPEN,
        ramp=OPEN_RAMP_S,
        seconds=OPEN_RAMP_S + 2,
        drain=lasts_s + 5,
    )
    most_held = 0
    deadline_s = time.monotonic() + OPEN_RAMP_S + 2 + lasts_s
    while time.monotonic() < deadline_s and (
        not most_held or stage.upstream.stats()["in_flight"] > 0
    ):
        most_held = max(most_held, stage.upstream.stats()["in_flight"])
        if stage.gateway is not None:
            most_bytes = max(most_bytes, stage.gateway.resident_bytes())
        time.sleep(_LOOK_S)
    figures = load.figures()
    return {
        "whole": figures["ok"] - figures["cut"],
        "most_open": figures["most_open"],
        "most_held": stage.upstream.stats()["max_in_flight"],
        "before_bytes": before_bytes,
        "most_bytes": most_bytes,
        "first_p99_ms": figures["first_p99_ms"],
        "said": figures["said"],
    }


def memory(stage: Stage, setting: Setting) -> Figures:
    """200,000 requests: what the process holds after the first tenth, and after the last."""
    assert stage.gateway is not None
    stage.upstream.behave()

    def send(count: int) -> int:
        assert stage.gateway is not None
        figures = stage.load(connections=CONNECTIONS, requests=count, seconds=200).figures()
        if figures["ok"] < count:
            raise NotServing(f"{figures['ok']} of {count} served: {figures['said']}")
        return stage.gateway.resident_bytes()

    warm = setting.memory_requests // 9
    early_bytes = send(warm)
    middle_bytes = send(setting.memory_requests // 2)
    late_bytes = send(setting.memory_requests - setting.memory_requests // 2)
    return {
        "requests": warm + setting.memory_requests,
        "early_bytes": early_bytes,
        "middle_bytes": middle_bytes,
        "late_bytes": late_bytes,
    }


PARTS = ("p50", "p99")
Measured = Callable[[Stage, Setting], Figures]
DIRECT: dict[str, Measured] = {"closed": closed, "paced": paced}
EACH_RUN: dict[str, Measured] = {
    "closed": closed,
    "paced": paced,
    "half": half,
    "streams": streams,
    "big": big,
    "held": held,
}
# In one run alone, and only where they are asked for or there are nine.
LONG: dict[str, Measured] = {"delayed": delayed, "opened": opened}
OURS_ONLY: dict[str, Measured] = {"memory": memory}
