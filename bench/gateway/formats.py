"""Scenarios after two public benchmarks, by their descriptions, so that others can compare.

`gomodel` follows github.com/ENTERPILOT/ai-gateway-reproducible-benchmark: chat completions, plain
and streamed, at 10 connections with an upstream that answers immediately, then the most requests a
second of a sweep. The others follow github.com/BerriAI/ai-gateway-bench, a gateway as a coding
agent meets it: what a long prompt adds, how evenly the events of streams come, what a long prompt
does to short turns beside it, and what the way past a failing upstream costs. `docs/benchmarks.md`
says what differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.gateway.entries import Entry
from bench.gateway.programs import Figures, Upstream
from bench.gateway.scenarios import NotServing, Setting, Stage, await_ready

CONNECTIONS = 10
SWEEP = (32, 64, 128)
# Of a token there are four characters, as is usual.
PROMPT_TOKENS = {"1k": 1_000, "10k": 10_000, "100k": 100_000}
TOKEN_CHARS = 4
AGENTS = (16, 64)
EVENTS, GAP_MS = 50, 10.0
TURNS = 8
FAILOVER = "failover"


def gomodel(stage: Stage, setting: Setting) -> Figures:
    assert stage.gateway is not None
    stage.upstream.behave(chunks=EVENTS, gap_ms=0)
    seconds = setting.seconds / 2
    plain = stage.measure(lambda: stage.load(connections=CONNECTIONS, seconds=seconds))
    rates = [plain["per_s"]]
    peak_bytes = stage.gateway.resident_bytes()
    for connections in SWEEP:
        found = stage.load(connections=connections, seconds=seconds / 2).figures()
        if found["ok"] == found["sent"]:
            rates.append(found["in_time"] / found["seconds"])
        peak_bytes = max(peak_bytes, stage.gateway.resident_bytes())
    streamed = stage.load(stream=True, connections=CONNECTIONS, seconds=seconds).figures()
    return {
        "p50_ms": plain["p50_ms"],
        "p99_ms": plain["p99_ms"],
        "stream_p50_ms": streamed["p50_ms"],
        "stream_p99_ms": streamed["p99_ms"],
        "first_p50_ms": streamed["first_p50_ms"],
        "peak_per_s": max(rates),
        "peak_bytes": peak_bytes,
        "ready_s": stage.ready_s,
        "others": plain["others"],
    }


def large_context(stage: Stage, setting: Setting) -> Figures:
    """One request after another; what the gateway adds to the median, by the prompt's size."""
    stage.upstream.behave()
    found = {}
    for name, tokens in PROMPT_TOKENS.items():
        messages = _prompt(tokens)
        took = {}
        for direct in (True, False):
            figures = stage.load(
                direct=direct, messages=messages, connections=1, seconds=setting.seconds / 5
            ).figures()
            if not figures["ok"]:
                raise NotServing(f"a prompt of {name} tokens: {figures['said']}")
            took[direct] = figures["p50_ms"]
        found[f"added_{name}_ms"] = took[False] - took[True]
    return found


def concurrent_agents(stage: Stage, setting: Setting) -> Figures:
    """Streams whose events come 10 ms apart, at 16 and at 64 connections: times between reads of
    one stream, how many of the upstream's events come, and in how many reads."""
    stage.upstream.behave(chunks=EVENTS, gap_ms=GAP_MS)
    found: Figures = {}
    for connections in AGENTS:
        figures = stage.load(
            stream=True, connections=connections, seconds=setting.seconds * 0.6, events=1
        ).figures()
        if figures["ok"] < 0.99 * figures["sent"]:
            raise NotServing(f"{connections} streams: {figures['said']}")
        # The end of a stream is an event of its own.
        due = (EVENTS + 1) * figures["completed"]
        found |= {
            f"gap_p99_ms_{connections}": figures["gap_p99_ms"],
            f"first_p99_ms_{connections}": figures["first_p99_ms"],
            f"events_{connections}": figures["events"] / due,
            f"reads_{connections}": figures["reads"] / figures["completed"],
        }
    return found


def head_of_line(stage: Stage, setting: Setting) -> Figures:
    """Eight short streamed turns, alone and beside prompts of 100k tokens, one after another."""
    stage.upstream.behave(chunks=EVENTS, gap_ms=GAP_MS)
    seconds = setting.seconds * 0.6
    found: Figures = {}
    for name in ("alone", "beside"):
        large = None
        if name == "beside":
            large = stage.load(messages=_prompt(100_000), connections=1, seconds=seconds)
        turns = stage.load(stream=True, connections=TURNS, seconds=seconds, events=1).figures()
        if large is not None:
            found["large"] = large.figures()["ok"]
        if not turns["ok"]:
            raise NotServing(f"short turns {name}: {turns['said']}")
        found |= {f"{name}_{part}": turns[part] for part in ("first_p99_ms", "gap_p99_ms")}
    return found


def failover(entry: Entry, setting: Setting) -> Figures:
    """Ten connections while both upstreams answer, and while the first refuses with 500: what is
    served, what it takes, and how often the first is still asked. Raises NotServing."""
    if entry.second:
        raise NotServing(entry.second)
    with (
        tempfile.TemporaryDirectory() as folder,
        Upstream() as first,
        Upstream() as second,
        entry.start([first, second], Path(folder)) as gateway,
    ):
        stage = Stage(first, gateway, Path(folder))
        await_ready(stage)
        well = stage.load(connections=CONNECTIONS, seconds=setting.seconds / 2).figures()
        first.behave(status=500)
        second.behave()
        ill = stage.load(connections=CONNECTIONS, seconds=setting.seconds).figures()
        asked = first.stats()["requests"]
        if not second.stats()["requests"]:
            raise NotServing(f"does not go on to the second: {ill['said']}")
    return {
        "well_p50_ms": well["p50_ms"],
        "p50_ms": ill["p50_ms"],
        "p99_ms": ill["p99_ms"],
        "max_ms": ill["max_ms"],
        "served": ill["ok"] / ill["sent"],
        "asked": asked / ill["sent"],
    }


def _prompt(tokens: int) -> list[dict[str, object]]:
    words = "def read(path): return open(path).read() # "
    text = words * (tokens * TOKEN_CHARS // len(words))
    return [{"role": "user", "content": f"Ticket ##########\n{text}"}]


ON_ONE_UPSTREAM: dict[str, Callable[[Stage, Setting], Figures]] = {
    "gomodel": gomodel,
    "large_context": large_context,
    "concurrent_agents": concurrent_agents,
    "head_of_line": head_of_line,
}
SCENARIOS = (*ON_ONE_UPSTREAM, FAILOVER)
