"""`make profile`, or `python -m bench.profile --only call --functions 40`.

CPU time of a relayed call, of a stream of 50 events, of a job and of a line of a batch, by package
of `src/tidegate`, with limits and record on. Each load runs four times, with the sampler off, on,
off and on: the cost is measured without the sampler, and the samples distribute it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import grid, machine
from bench.gateway import jobs
from bench.gateway.product import Product
from bench.gateway.programs import Load, Upstream
from bench.gateway.scenarios import CHUNKS, CONNECTIONS, MESSAGES, STREAMS, UPSTREAM_MS
from bench.profile.samples import BETWEEN, Sampler, Samples

TURNS = (False, True, False, True)
SMALL = 0.005
PACED_PER_S, PACED_CONNECTIONS = 400, 1_000
HEADERS = ("package", "self us", "share", "total us, with what it calls")


@dataclass(frozen=True, slots=True)
class Stage:
    product: Product
    upstream: Upstream
    folder: Path
    seconds: float

    def call(self) -> float:
        self.upstream.behave()
        return self._relay(stream=False, connections=CONNECTIONS)

    def paced(self) -> float:
        """Far below what it could take, so that few calls are at the same step."""
        self.upstream.behave(delay_ms=UPSTREAM_MS)
        return self._relay(stream=False, connections=PACED_CONNECTIONS, rate=PACED_PER_S)

    def stream(self) -> float:
        self.upstream.behave(chunks=CHUNKS, gap_ms=1.0)
        return self._relay(stream=True, connections=STREAMS)

    def job(self) -> float:
        """As many as are done in about the time of a load."""
        body = self.folder / "job.json"
        body.write_text(json.dumps(jobs.BODY))
        count = round(300 * self.seconds)
        self.upstream.behave(chunks=jobs.CHUNKS, gap_ms=0)
        jobs.submit(self.product, body, count)
        jobs.await_calls(self.product, self.upstream, count)
        return count

    def batch(self) -> float:
        """A batch of as many lines, with its upload."""
        count = round(600 * self.seconds)
        self.upstream.behave(chunks=jobs.CHUNKS, gap_ms=0)
        jobs.of_batch(self.product, jobs.uploaded(self.product, jobs.CALL, count), count)
        return count

    def await_ready(self) -> None:
        body = self.folder / "job.json"
        body.write_text(json.dumps(jobs.BODY))
        jobs.await_ready(self.product, body)

    def _relay(self, *, stream: bool, connections: int, rate: float = 0) -> float:
        body = self.folder / "body.json"
        body.write_text(json.dumps({"model": "bench", "messages": MESSAGES, "stream": stream}))
        figures = Load(
            self.product.port,
            "/v1/chat/completions",
            body,
            tail="[DONE]" if stream else "}",
            seconds=self.seconds,
            connections=connections,
            rate=rate,
        ).figures()
        if figures["ok"] < 0.99 * figures["sent"]:
            raise SystemExit(f"{figures['ok']} of {figures['sent']} served: {figures['said']}")
        return float(figures["completed"])


LOADS: dict[str, tuple[str, Callable[[Stage], float], tuple[str, ...]]] = {
    "call": ("a relayed call, 64 connections", Stage.call, ("serve",)),
    "paced": (f"a relayed call, {PACED_PER_S} a second", Stage.paced, ("serve",)),
    "stream": ("a stream of 50 events, 8 concurrently", Stage.stream, ("serve",)),
    "job": ("a job, submitted at full speed", Stage.job, ("serve", "worker")),
    "batch": ("a line of a batch, with its upload", Stage.batch, ("serve", "worker")),
}


@dataclass(slots=True)
class Costs:
    """Of the processes of one role, over all turns of a kind."""

    main_ns: int = 0
    all_ns: int = 0
    done: float = 0.0

    def us(self, ns: float) -> float:
        return ns / self.done / 1000


def profile(stage: Stage, sampler: Sampler, name: str, functions: int) -> list[grid.Grid]:
    said, load, roles = LOADS[name]
    load(replace(stage, seconds=stage.seconds / 3))  # warm
    stage.product.await_rest()
    costs = {(role, on): Costs() for role in roles for on in (False, True)}
    samples: dict[str, Samples] = {role: Samples() for role in roles}
    for on in TURNS:
        pids = {role: stage.product.pids(role) for role in roles}
        everyone = [pid for ones in pids.values() for pid in ones]
        before = {role: _cpu_ns(pids[role]) for role in roles}
        if on:
            sampler.begin(everyone)
        done = load(stage)
        stage.product.await_rest()
        if on:
            for role in roles:
                samples[role].add(sampler.end(pids[role]))
        for role in roles:
            after = _cpu_ns(pids[role])
            cost = costs[role, on]
            cost.all_ns += after[0] - before[role][0]
            cost.main_ns += after[1] - before[role][1]
            cost.done += done
    found = []
    for role in roles:
        off, taken = costs[role, False], samples[role]
        one_us, threads_us = off.us(off.main_ns), off.us(off.all_ns - off.main_ns)
        title = f"{said}: {one_us + threads_us:.0f} us of {role}"
        found.append(_rooms(title, taken, one_us, threads_us))
        if functions:
            found.append(_functions(title, taken, one_us, functions))
        with_it = costs[role, True]
        print(
            f"{title}; {taken.count:,} samples; sampling took "
            f"{taken.sampler_ns / with_it.main_ns:.1%} of its time, and with it a request cost "
            f"{with_it.us(with_it.all_ns) / off.us(off.all_ns) - 1:+.1%}"
        )
    return found


def _cpu_ns(pids: Sequence[int]) -> tuple[int, int]:
    """Of all threads, and of the main ones."""
    main = sum(
        int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) for pid in pids
    )
    return sum(machine.cpu_ns(pid) for pid in pids), main


def _rooms(title: str, samples: Samples, one_us: float, threads_us: float) -> grid.Grid:
    """Our rooms, then others' packages, those that take most first; small ones in one row."""
    each = one_us / samples.count
    names = sorted({*samples.own, *samples.called}, key=lambda name: -_whole(samples, name))
    small = {name for name in names if _whole(samples, name) < SMALL * samples.count}
    rows = []
    for kind, ours in (("rooms", True), ("packages", False)):
        of_kind = [name for name in names if _is_ours(name) == ours]
        kept = [([name], name) for name in of_kind if name not in small]
        rest = [name for name in of_kind if name in small]
        for group, label in (*kept, *([(rest, f"{len(rest)} other {kind}")] if rest else [])):
            own = sum(samples.own[name] for name in group)
            whole = sum(_whole(samples, name) for name in group) if ours else 0
            share, us = f"{own / samples.count:.1%}", f"{own * each:.1f}"
            rows.append([label, us, share, f"{whole * each:.1f}" if ours else ""])
    rows.append(["other threads", f"{threads_us:.1f}", "", ""])
    return grid.Grid(title, HEADERS, rows)


def _whole(samples: Samples, room: str) -> int:
    return samples.own[room] + (samples.called[room] if _is_ours(room) else 0)


def _is_ours(room: str) -> bool:
    return room.startswith("tidegate/") or room == BETWEEN


def _functions(title: str, samples: Samples, one_us: float, most: int) -> grid.Grid:
    each = one_us / samples.count
    whole = samples.functions_own + samples.functions_called
    rows = [
        [name, f"{samples.functions_own[name] * each:.1f}", f"{count * each:.1f}"]
        for name, count in whole.most_common(most)
    ]
    return grid.Grid(title, ("function", *HEADERS[1::2]), rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--only", action="append", choices=LOADS, default=[])
    parser.add_argument("--seconds", type=float, default=2.5, help="of each load; there are four")
    parser.add_argument("--functions", type=int, default=0, help="so many that take most")
    arguments = parser.parse_args()
    about = machine.describe("limits and record on", ["python -m bench.profile", *sys.argv[1:]])
    with (
        tempfile.TemporaryDirectory() as folder,
        Upstream() as upstream,
    ):
        sampler = Sampler(Path(folder))
        with Product(upstream.url, apis=1, workers=1, settings=sampler.settings) as product:
            stage = Stage(product, upstream, Path(folder), arguments.seconds)
            stage.await_ready()
            for name in arguments.only or LOADS:
                grid.show(profile(stage, sampler, name, arguments.functions))
    print("\n".join(about))


if __name__ == "__main__":
    main()
