"""A file of prompts worked through: so many handed in at a time, each followed to its end.

Each line is a job, handed in under a key of its own, so nothing is lost with this process and
nothing is asked twice. Why not a batch of `/v1/batches`: that gives its results at its end only.

Invariant: a line's result is written before another takes its place in the window.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tidegate.cli.batch_file import Line, Prompts
from tidegate.cli.batch_results import SUCCEEDED, Results, row_of
from tidegate.cli.client import ENDS, Gateway, is_passing
from tidegate.errors import ConfigError, GatewayRefused, GatewayUnreachable

AWAY_S = 600.0
NEVER_THERE_S = 60.0  # where it has not answered once: the address may be wrong
_PAUSE_S = 1.0
_TOO_SOON_S = 0.1
_ASK_WHY_S = 1.0
_RATE_OVER_S = 20.0
_STOPPING = ("unauthenticated", "budget_exceeded")


@dataclass
class Tally:
    """How far a run is. `earlier` lines had ended before it began. `waiting` says for what."""

    total: int
    earlier: int = 0
    done: int = 0
    failed: int = 0
    handed_in: int = 0
    tokens: int = 0
    cost_micros: int = 0
    waiting: str = ""
    began: float = field(default_factory=time.monotonic)
    ends: deque[float] = field(default_factory=deque)

    @property
    def ended(self) -> int:
        return self.earlier + self.done

    @property
    def per_second(self) -> float:
        """Over the last seconds."""
        now = time.monotonic()
        while self.ends and now - self.ends[0] > _RATE_OVER_S:
            self.ends.popleft()
        span_s = min(_RATE_OVER_S, now - self.began)
        return len(self.ends) / span_s if span_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Until all have ended, at the present rate; None where it can't be told."""
        rate = self.per_second
        return None if rate <= 0 else (self.total - self.ended) / rate

    def count(self, row: dict[str, Any]) -> None:
        self.done += 1
        self.failed += row["status"] != SUCCEEDED
        self.tokens += (row["usage"] or {}).get("total_tokens") or 0
        self.cost_micros += row["cost_micros"] or 0
        self.ends.append(time.monotonic())


class Run:
    """One run. `tally` is for whoever shows it."""

    def __init__(
        self,
        gateway: Gateway,
        prompts: Prompts,
        results: Results,
        *,
        window: int,
        retry_failed: bool,
    ) -> None:
        self._gateway = gateway
        self._prompts = prompts
        self._results = results
        self._window = window
        self._queued: dict[int, str] = {}  # request ids by line, of those that wait
        self._heard_at = time.monotonic()
        self._patience_s = NEVER_THERE_S
        self._left = self._what_is_left(retry_failed)
        self.tally = Tally(len(prompts.lines), len(prompts.lines) - len(self._left))

    def _what_is_left(self, retry_failed: bool) -> list[tuple[Line, str]]:
        """The lines that are still to be asked, with their keys. Raises ConfigError for a file
        with results of something else."""
        succeeded: set[int] = set()
        failures: dict[int, int] = {}
        start = f"batch-{self._prompts.digest}-"
        for row in self._results.read():
            if not row["key"].startswith(start):
                allowed = "has results of other prompts or options: choose another file"
                raise ConfigError("--output", str(self._results.path), allowed)
            if row["status"] == SUCCEEDED:
                succeeded.add(row["line"])
            else:
                failures[row["line"]] = failures.get(row["line"], 0) + 1
        self.failed_earlier = 0 if retry_failed else len(failures.keys() - succeeded)
        return [
            (line, self._prompts.key(line, failures.get(line.number, 0)))
            for line in self._prompts.lines
            if line.number not in succeeded and (retry_failed or line.number not in failures)
        ]

    async def run(self) -> None:
        """Until all lines have ended. Raises GatewayRefused where no line would be taken,
        GatewayUnreachable after AWAY_S without an answer, NEVER_THERE_S where there was none at
        all, and OSError for a result that can't be written. Cancelled, it leaves what is handed in
        to its own end, where the next run finds it.
        """
        lines = iter(self._left)
        asking = asyncio.create_task(self._ask_why())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._window, len(self._left))):
                    group.create_task(self._work(lines))
        except* (GatewayRefused, GatewayUnreachable, OSError) as failed:
            raise failed.exceptions[0] from None
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            self.tally.waiting = ""

    async def _work(self, lines: Iterator[tuple[Line, str]]) -> None:
        for line, key in lines:
            view = await self._ended(line, key)
            row = row_of(line.prompt_id, line.number, key, view)
            self._results.add(row)
            self.tally.count(row)

    async def _ended(self, line: Line, key: str) -> dict[str, Any]:
        """Hand a line in and follow it to its end; a refusal of this line alone is its result."""
        request_id = None
        try:
            accepted = await self._patiently(lambda: self._gateway.submit(line.fields, key=key))
            request_id = accepted["request_id"]
            self.tally.handed_in += 1
            view = await self._followed(line.number, request_id)
        except GatewayRefused as refused:
            if refused.problem in _STOPPING:
                raise
            error = {"code": refused.problem, "message": refused.message, "retryable": False}
            view = {"status": "refused", "error": error, "request_id": request_id}
        # Not where this is cancelled: what is handed in goes on without us.
        self.tally.handed_in -= request_id is not None
        self._queued.pop(line.number, None)
        return view

    async def _followed(self, number: int, request_id: str) -> dict[str, Any]:
        before = "queued"
        self._queued[number] = request_id
        while True:
            asked_at = time.monotonic()
            view: dict[str, Any] = await self._patiently(
                lambda: self._gateway.get(f"/status/{request_id}", wait="60")
            )
            if view["status"] in ENDS:
                return view
            if view["status"] == "running":
                self._queued.pop(number, None)
            if view["status"] == before and time.monotonic() - asked_at < _TOO_SOON_S:
                await asyncio.sleep(_PAUSE_S)  # the server has too many that wait
            before = view["status"]

    async def _patiently(self, call: Any) -> Any:
        """Call until there is an answer: the server may be restarting, or have a cap reached."""
        while True:
            try:
                answer = await call()
            except (GatewayRefused, GatewayUnreachable) as failed:
                if not is_passing(failed):
                    raise
                if isinstance(failed, GatewayRefused) and failed.problem == "quota_exceeded":
                    self._hear()
                if time.monotonic() - self._heard_at > self._patience_s:
                    raise
                self.tally.waiting = failed.message
                await asyncio.sleep(_PAUSE_S)
                continue
            self._hear()
            return answer

    def _hear(self) -> None:
        self._heard_at, self._patience_s = time.monotonic(), AWAY_S

    async def _ask_why(self) -> None:
        """Now and then, what the line that has waited longest waits for."""
        while True:
            await asyncio.sleep(_ASK_WHY_S)
            if not self._queued:
                self.tally.waiting = ""
                continue
            oldest = self._queued[min(self._queued)]
            try:
                why = await self._gateway.get(f"/requests/{oldest}/why")
            except (GatewayRefused, GatewayUnreachable) as failed:
                self.tally.waiting = failed.message
                continue
            if why["status"] == "queued":
                self.tally.waiting = re.sub("^waits", "waiting", why["sentence"])
