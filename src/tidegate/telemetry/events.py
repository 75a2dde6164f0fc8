"""Events of finished calls, delivered to subscribers apart from the path of calls.

Invariant: whoever listens can neither fail nor delay a call: ends are told in batches, by a timer
or by what writes the record behind, and an error of a listener is logged and goes no further.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import Trail

Source = Literal["relay", "stream", "job", "batch", "judge"]
JUDGE: Source = "judge"
REFUSED, RETRIED = "refused", "retried"
_TELL_AFTER_S = 0.1
_MOST_WAITING = 500

log = get_logger()


# Not frozen, as all else of its kind: that would cost each call more than counting it does.
@dataclass(slots=True)
class Observed:
    """One call as it ended; nobody changes it. What is None is not known, or was not reached.

    source: who asked: a native call, `/stream`, a job, a line of a batch, or the classifier, whose
    question (`JUDGE`) is no request of the tenant's and charged to nobody. status: `succeeded`,
    `failed`, `cancelled`, `expired`, `dead`; `retried` for an attempt after which a job or a line
    of a batch goes back into its queue; `refused` for what was turned away before there was
    anything to record, such as a wrong key, a budget that is spent or a body that is too large.
    kind: None while unsure, `other` for what asks no model. dialect: `gemini`, `openai`,
    `anthropic`. operation: `generate_content`, `chat`, `embeddings` and the like, never with a
    name in it. http_status: what the client was told, 0 where nobody waited or nothing was said.
    code: of the failure. queue_ms: from receipt to admission. upstream_ms: length of the last call
    upstream, None where there was none. first_byte_ms: from sending it to the first bytes of its
    body. attempts: calls made upstream for this end; throttled: those of them that were answered
    with 429. LLM tokens are those charged for; cost_micros: in millionths of money, None where the
    price or the usage is unknown. trail: its place in a trace, where it has one.
    """

    source: Source
    status: str
    tenant_id: str
    finished_at: datetime
    pool: str = ""
    kind: str | None = None
    model: str | None = None
    upstream: str | None = None
    dialect: str = "gemini"
    operation: str = "generate_content"
    streamed: bool = False
    http_status: int = 0
    code: str | None = None
    queue_ms: float | None = None
    upstream_ms: float | None = None
    first_byte_ms: float | None = None
    attempts: int = 0
    throttled: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    thoughts_tokens: int | None = None
    cost_micros: int | None = None
    request_id: UUID | None = None
    received_at: datetime | None = None
    response_id: str | None = None
    finish_reason: str | None = None
    trail: Trail | None = None
    cache_write_tokens: int | None = None
    model_version: str | None = None


Listener = Callable[[Sequence[Observed]], None]


class Observers:
    """One per process. Whoever counts calls is called with batches of them, in the event loop: it
    must be quick, and must not wait."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._waiting: list[Observed] = []
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Observers listeners={len(self._listeners)} waiting={len(self._waiting)}>"

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every batch from now on."""
        self._listeners.append(listener)

    def tell(self, batch: Sequence[Observed]) -> None:
        """Tell a batch at once: for what is off the path of calls already."""
        if not batch:
            return
        for listener in self._listeners:
            try:
                listener(batch)
            except Exception:  # logged: counting must not fail what it counts
                log.exception(Log.INTERNAL_ERROR, where="an observer of calls")

    def note(self, one: Observed) -> None:
        """Tell an end within a tenth of a second, together with others."""
        if not self._listeners:
            return
        self._waiting.append(one)
        if len(self._waiting) >= _MOST_WAITING:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TELL_AFTER_S, self.flush)

    def flush(self) -> None:
        """Tell what is waiting; at the end of a process too."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        self.tell(waiting)
