"""Route `/admin/conversations`: the calls of a conversation or of a trace, as a tree.

    thread ─ call, call, call         calls with the same beginning, or that continue an answer
               └── thread ─ call      calls that follow from that call

A thread's calls are in the order of their receipt. Its parent is the call of another thread whose
answer it continues, or whose span is its parent; otherwise the last earlier call of a thread that
continues after this one has ended, like an agent that waits for another agent.

Invariants: every call is in one thread, once; a thread is never below itself; a thread without a
parent is a root.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Annotated, Literal
from uuid import UUID

from fastapi import Query as FromQuery
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from tidegate.call import DEFAULT_TENANT, Status
from tidegate.errors import InvalidRequest
from tidegate.http.guards import admin_router
from tidegate.http.problems import problem_responses
from tidegate.http.services import services_of
from tidegate.http.views import view_of
from tidegate.store.requests import ConversationCall, FoundConversation

Why = Literal["answer", "trace", "time"]
_SPAN = 0xFFFF_FFFF_FFFF_FFFF  # the part of an id that is its span's id
_MOST_GAPS = 200  # searched for one thread


@dataclass(slots=True, eq=False)
class Thread:
    """Consecutive calls. under: the parent call, in another thread. by: how that was determined."""

    calls: list[ConversationCall]
    under: ConversationCall | None = None
    by: Why | None = None

    @property
    def first(self) -> ConversationCall:
        return self.calls[0]


def threads_of(calls: Sequence[ConversationCall]) -> list[Thread]:
    """Return threads in the order of their first calls. `calls` are in the order of their
    receipt."""
    threads: list[Thread] = []
    home: dict[UUID, Thread] = {}
    by_opening: dict[str, Thread] = {}
    called = {one.request_id: one for one in calls}
    spans = {f"{one.request_id.int & _SPAN:016x}": one for one in calls}
    for call in calls:
        before = _other(called.get(call.lineage.parent_id or call.request_id), call)
        opening = call.lineage.opening
        thread = None
        if before is not None and (found := home.get(before.request_id)) is not None:
            thread = found if found.calls[-1] is before else None
        elif opening is not None:
            thread = by_opening.get(opening)
            if thread is not None and _begins_again(thread, call):
                thread = None
        if thread is None:
            thread = Thread([])
            threads.append(thread)
            parent = _other(spans.get(call.lineage.parent_span or ""), call)
            if before is not None:
                thread.under, thread.by = before, "answer"
            elif parent is not None:
                thread.under, thread.by = parent, "trace"
        if opening is not None and before is None:
            by_opening[opening] = thread
        thread.calls.append(call)
        home[call.request_id] = thread
    _hang(threads)
    _cut_circles(threads, home)
    return threads


def _begins_again(thread: Thread, call: ConversationCall) -> bool:
    """Return whether a call sends no more input than the first one of its thread, which has grown
    since: then the same agent begins the same task again."""
    first, last = thread.first.usage.input_tokens, thread.calls[-1].usage.input_tokens
    now = call.usage.input_tokens
    return None not in (first, last, now) and now <= first < last  # type: ignore[operator]


def _other(found: ConversationCall | None, call: ConversationCall) -> ConversationCall | None:
    """Return a call unless it is the same request: a job that was queued again has several ends."""
    is_same = found is None or found.request_id == call.request_id
    return None if is_same else found


@dataclass(frozen=True, slots=True)
class _Gap:
    """The time between the end of a call and the receipt of the next one of its thread."""

    since: datetime
    until: datetime
    call: ConversationCall
    thread: Thread


def _hang(threads: Sequence[Thread]) -> None:
    """Assign parents to roots by time: of the gaps that contain a thread, the one that began
    last."""
    gaps, ended = list[_Gap](), dict[Thread, datetime]()
    for thread in threads:
        end = thread.first.finished_at
        for call, following in pairwise(thread.calls):
            end = max(end, call.finished_at)
            if following.submitted_at > end:
                gaps.append(_Gap(end, following.submitted_at, call, thread))
        ended[thread] = max(end, thread.calls[-1].finished_at)
    gaps.sort(key=lambda gap: gap.since)
    for thread in threads:
        if thread.under is not None:
            continue
        place = bisect_right(gaps, thread.first.submitted_at, key=lambda gap: gap.since)
        for gap in reversed(gaps[max(0, place - _MOST_GAPS) : place]):
            if gap.until >= ended[thread] and gap.thread is not thread:
                thread.under, thread.by = gap.call, "time"
                break


def _cut_circles(threads: Sequence[Thread], home: Mapping[UUID, Thread]) -> None:
    """Remove cycles: the clocks of several processes, and the spans that clients send, may be
    inconsistent."""
    sound: set[Thread] = set()
    for thread in threads:
        path: list[Thread] = []
        above = thread
        while above.under is not None and above not in sound and above not in path:
            path.append(above)
            above = home[above.under.request_id]
        if above in path:
            above.under = above.by = None
        sound.update(path, [above])


class CallView(BaseModel):
    """A call that has ended, in short."""

    request_id: str
    source: Literal["job", "stream", "relay", "batch"]
    status: Status
    endpoint: str | None = None
    model: str | None = None
    upstream: str | None = None
    conversation: str | None = Field(
        default=None, description="For a trace, which may have several conversations"
    )
    attempts: int
    submitted_at: datetime
    finished_at: datetime
    queue_ms: float | None = None
    upstream_ms: float | None = None
    first_byte_ms: float | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = Field(
        default=None, description="Input tokens that were read from a cache"
    )
    output_tokens: int | None = None
    usage_state: str | None = Field(
        default=None, description="told, partial, estimated, unknown or none"
    )
    cost_micros: int | None = None
    error_code: str | None = None


class ThreadView(BaseModel):
    """Calls with the same beginning, or that continue one another, in order of receipt."""

    opening: str | None = Field(
        default=None, description="Digest of the tools, the system prompt and the first message"
    )
    under: str | None = Field(default=None, description="The call from which the thread originated")
    by: Why | None = Field(
        default=None,
        description="Evidence: it continues the `answer`, is a child in the `trace`, or lies in "
        "`time` between that call and the next one of its thread",
    )
    calls: list[CallView]


class SumsView(BaseModel):
    """Totals of all calls in tokens, milliseconds and micro-dollars."""

    calls: int
    failed: int = Field(description="Calls that did not succeed")
    unpriced: int = Field(description="Calls of unknown cost")
    began_at: datetime
    ended_at: datetime
    queue_ms: float
    upstream_ms: float
    input_tokens: int
    cached_tokens: int
    cached_share: float | None = Field(
        default=None, description="Cached share of the input, of calls that report it"
    )
    output_tokens: int
    cost_micros: int


class ConversationView(BaseModel):
    """A conversation or a trace of one tenant."""

    tenant: str
    conversation: str | None = None
    trace: str | None = None
    sums: SumsView
    complete: bool = Field(description="Whether these are all calls; otherwise the last 2,000")
    threads: list[ThreadView] = Field(description="Ordered by their first calls")


class ConversationQuery(BaseModel):
    """The conversation or the trace to show."""

    model_config = ConfigDict(extra="forbid")

    tenant: str = Field(default=DEFAULT_TENANT, min_length=1, max_length=200)
    conversation: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="The conversation's name from a header, `prompt_cache_key` or the provider; "
        "`opening-` and a digest if it has none",
    )
    trace: str | None = Field(default=None, pattern="^[0-9a-f]{32}$", description="Its id")

    def named(self) -> tuple[str, bool]:
        """Return the name, and whether it is a trace's. Raises InvalidRequest."""
        named = [one for one in (self.conversation, self.trace) if one is not None]
        if len(named) != 1:
            allowed = "one of conversation and trace"
            raise InvalidRequest("conversation", f"{allowed} is required", allowed=allowed)
        return named[0], self.trace is not None


def conversation_view(query: ConversationQuery, found: FoundConversation) -> ConversationView:
    sums = found.sums
    share = round(sums.cached_tokens / sums.cached_of, 4) if sums.cached_of else None
    return ConversationView(
        tenant=query.tenant,
        conversation=query.conversation,
        trace=query.trace,
        sums=view_of(SumsView, sums, cached_share=share),
        complete=sums.calls <= len(found.calls),
        threads=[_thread(one) for one in threads_of(found.calls)],
    )


def _text_of(query: ConversationQuery, found: FoundConversation) -> str:
    return conversation_view(query, found).model_dump_json(exclude_none=True)


def _thread(thread: Thread) -> ThreadView:
    return ThreadView(
        opening=thread.first.lineage.opening,
        under=None if thread.under is None else str(thread.under.request_id),
        by=thread.by,
        calls=[_call(one) for one in thread.calls],
    )


def _call(one: ConversationCall) -> CallView:
    return view_of(
        CallView,
        one,
        conversation=one.lineage.conversation,
        input_tokens=one.usage.input_tokens,
        cached_tokens=one.usage.cached_tokens,
        output_tokens=one.usage.output_tokens,
        error_code=one.failure_code,
    )


router = admin_router(400, 503)


@router.get(
    "/conversations",
    response_model=ConversationView,
    responses=problem_responses(404),
    summary="The calls of a conversation or of a trace, as a tree",
)
async def conversation(
    request: Request, query: Annotated[ConversationQuery, FromQuery()]
) -> Response:
    """Calls that have ended, with their usage and cost."""
    name, is_trace = query.named()
    requests = services_of(request).store.requests
    found = await requests.conversation(query.tenant, name, is_trace=is_trace)
    text = await asyncio.to_thread(_text_of, query, found)  # for thousands of calls
    return Response(text, media_type="application/json")
