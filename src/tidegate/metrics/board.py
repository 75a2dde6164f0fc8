"""What each process tells the others: the calls that it has open, and how it finds the upstreams.

    every process -- each second, its note --> Valkey --> whoever is asked, about all of them

Invariants: a note is bounded, and forgotten seconds after its process is gone; however many ask, a
process reads the notes twice a second; with Valkey away its own part is still told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cache
from typing import Any

import orjson

from tidegate.errors import LimiterUnavailable
from tidegate.limiter import Limiter
from tidegate.relay.under_way import CallUnderWay, UnderWay
from tidegate.spine.routing import Gate, State
from tidegate.telemetry import Log, get_logger

TELL_EVERY_S = 1.0
KEEP_MS = 5_000
FRESH_S = 0.5
READ_WITHIN_S = 1.0
MOST_CALLS = 200
MOST_PROCESSES = 100

log = get_logger()


@dataclass(frozen=True, slots=True)
class UpstreamFound:
    """An upstream as one process finds it; see `Gate`."""

    state: State
    key_refused: bool = False
    faults: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """What a process tells. `calls` are the oldest of the `under_way`."""

    process: str
    under_way: int = 0
    calls: tuple[CallUnderWay, ...] = ()
    upstreams: Mapping[str, UpstreamFound] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Notes:
    """`reached`: whether Valkey has told those of the other processes."""

    notes: list[Note]
    reached: bool

    @property
    def whole(self) -> bool:
        """Whether every call that is under way is in it."""
        return self.reached and all(len(one.calls) >= one.under_way for one in self.notes)


class Board:
    """One per process. `limiter` is that of the pool in which all processes are."""

    def __init__(
        self,
        limiter: Limiter,
        instance_id: str,
        under_way: UnderWay,
        health: Mapping[str, Gate],
    ) -> None:
        self.under_way = under_way
        self.process = instance_id
        self._limiter = limiter
        self._health = health
        self._others: tuple[float, list[Note] | None] = (float("-inf"), None)
        self._reading = asyncio.Lock()

    async def run(self) -> None:
        """Tell the others, for ever."""
        while True:
            try:
                if not self._is_away():
                    await self._limiter.tell(packed(self.own()), KEEP_MS)
            except LimiterUnavailable as away:
                log.debug(Log.SCRAPE_INCOMPLETE, of="processes", detail=away.message)
            except Exception:  # the top of a task: logged, and it goes on
                log.exception(Log.INTERNAL_ERROR, where="board")
            await asyncio.sleep(TELL_EVERY_S)

    def _is_away(self) -> bool:
        return self._limiter.state == "away"

    def own(self) -> Note:
        """What this process has to tell, as of now."""
        return Note(
            self.process,
            len(self.under_way),
            tuple(self.under_way.oldest(MOST_CALLS)),
            {
                name: UpstreamFound(one.state, one.key_dead, one.faults, one.why)
                for name, one in self._health.items()
            },
        )

    async def notes(self) -> Notes:
        """Of all processes: the own one as of now, the others as of a second or two ago."""
        async with self._reading:
            at, others = self._others
            if time.monotonic() - at > FRESH_S:
                others = await self._read()
                self._others = (time.monotonic(), others)
        return Notes([self.own(), *(others or ())], others is not None)

    async def _read(self) -> list[Note] | None:
        """None while Valkey does not tell."""
        if self._is_away():
            return None
        try:
            async with asyncio.timeout(READ_WITHIN_S):
                told = await self._limiter.told(MOST_PROCESSES)
        except (LimiterUnavailable, TimeoutError) as away:
            log.debug(Log.SCRAPE_INCOMPLETE, of="processes", detail=repr(away))
            return None
        notes = [unpacked(each) for each in told.values()]
        return sorted(
            (one for one in notes if one.process != self.process), key=lambda one: one.process
        )


def packed(note: Note) -> bytes:
    return orjson.dumps(note)


def unpacked(raw: bytes) -> Note:
    """What another version has added is passed over."""
    told: dict[str, Any] = orjson.loads(raw)
    upstreams = {
        name: UpstreamFound(**_known(UpstreamFound, one)) for name, one in told["upstreams"].items()
    }
    calls = tuple(_call(one) for one in told["calls"])
    return Note(told["process"], told["under_way"], calls, upstreams)


def _call(told: dict[str, Any]) -> CallUnderWay:
    known = _known(CallUnderWay, told)
    for name in ("received_at", "admitted_at"):
        if known.get(name) is not None:
            known[name] = datetime.fromisoformat(known[name])
    known["limits"] = tuple(known.get("limits", ()))
    return CallUnderWay(**known)


def _known(kind: type, told: dict[str, Any]) -> dict[str, Any]:
    names = _names(kind)
    return told if told.keys() <= names else {name: told[name] for name in told.keys() & names}


@cache
def _names(kind: Any) -> frozenset[str]:
    return frozenset(each.name for each in fields(kind))
