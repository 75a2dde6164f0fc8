"""Delivery of answers in any dialect: pace, counting, and faults in mid-answer.

Invariant: a call counts as in flight until just before its last bytes are passed to the kernel, so
that a client that has read the whole answer is never counted as still being served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from inspect import isawaitable
from typing import Any, Literal, NoReturn

import orjson
from aiohttp import web
from aiohttp.http import HttpProcessingError

from tidegate.emulator.account import AccountSpec
from tidegate.emulator.batches import LineAnswer, LineWork
from tidegate.emulator.content import Composed, ModelRequest, Moment
from tidegate.emulator.counting import CallSize
from tidegate.emulator.dialect import (
    BREAKS_OFF,
    MID_ANSWER,
    EmulatedApi,
    ErrorResponse,
    Fault,
    FaultName,
    Json,
    Refused,
)
from tidegate.emulator.settings import Behaviour, Distribution
from tidegate.emulator.state import EmulatorState, LoggedCall
from tidegate.prices.rates import STANDARD_TIERS, catalog

EMULATOR_HEADER = "x-tidegate-emulator"
EMULATED = {EMULATOR_HEADER: "1"}
JSON_TYPE = "application/json"
SSE_TYPE = "text/event-stream"
EXHAUSTED = "Resource has been exhausted (e.g. check quota)."
UNAVAILABLE = "The service is currently unavailable."


@dataclass(frozen=True, slots=True)
class ScriptStep:
    """Bytes that are sent together, and the answer's tokens sent by then."""

    data: bytes
    output_tokens: int


@dataclass(frozen=True, slots=True)
class AnswerScript:
    """An answer in steps. An answer that is not streamed is the data of the last step.

    `broken` returns the bytes of a fault in place of the step of that number.
    """

    steps: Sequence[ScriptStep]
    broken: Callable[[int, Fault], bytes]
    thoughts_tokens: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


Scripted = Callable[[Fault | None], AnswerScript]


def json_response(status: int, body: Any, headers: Mapping[str, str] | None = None) -> web.Response:
    whole = EMULATED | {"Content-Type": JSON_TYPE} | dict(headers or {})
    return web.Response(status=status, body=orjson.dumps(body), headers=whole)


def failed(error: ErrorResponse) -> web.Response:
    return json_response(error.status, error.body, error.headers)


def broken_object(api: EmulatedApi, garbage: bytes, fault: Fault) -> bytes:
    """Return bytes in place of JSON: half of it, or an error object."""
    if fault.fault is FaultName.GARBAGE:
        return garbage
    message = EXHAUSTED if fault.code == 429 else UNAVAILABLE
    return orjson.dumps(api.error(fault.code, message).body)


def whole_steps(composed: Composed, body: Json, output_tokens: int) -> list[ScriptStep]:
    """Return the steps of an answer that is not streamed: as many as it would have as a stream."""
    waits = max(len(composed.moments()) - 1, 0)
    return [ScriptStep(b"", 0)] * waits + [ScriptStep(orjson.dumps(body), output_tokens)]


def moment_steps(composed: Composed, piece: Callable[[Moment], bytes]) -> list[ScriptStep]:
    """Return the pieces of a stream, each in the format of its API."""
    return [ScriptStep(piece(moment), moment.output_tokens) for moment in composed.moments()]


def stream_steps(
    head: bytes, pieces: Iterable[ScriptStep], tail: bytes, output_tokens: int
) -> list[ScriptStep]:
    """Return the steps of a stream: `head` is sent with the first piece, `tail` with the last.
    Without any piece they are one step of `output_tokens`."""
    found = list(pieces) or [ScriptStep(b"", output_tokens)]
    found[0] = ScriptStep(head + found[0].data, found[0].output_tokens)
    found[-1] = ScriptStep(found[-1].data + tail, found[-1].output_tokens)
    return found


def line_work(parsed: ModelRequest, scripted: Scripted) -> LineWork:
    """Return the work of a batch's line; `parsed` is not streamed, and `scripted` composes its
    answer."""

    def answer() -> LineAnswer:
        script = scripted(None)
        step = script.steps[-1]
        return LineAnswer(orjson.loads(step.data), step.output_tokens, script.thoughts_tokens)

    return LineWork(parsed.kind, parsed.model, parsed.prompt, parsed.input_tokens, answer)


def data_event(data: bytes) -> bytes:
    return b"data: %s\n\n" % data


def named_event(event: Json) -> bytes:
    """Return an SSE event that is named by its type."""
    return b"event: %s\ndata: %s\n\n" % (str(event["type"]).encode(), orjson.dumps(event))


@dataclass(frozen=True, slots=True)
class Served:
    """A request and the API that serves it."""

    state: EmulatorState
    request: web.BaseRequest
    api: EmulatedApi

    @property
    def behaviour(self) -> Behaviour:
        return self.state.behaviour

    @property
    def called(self) -> str:
        """Return the method and path."""
        return f"{self.request.method} {self.request.path}"

    def not_found(self) -> Refused:
        """Return the refusal of an unknown path, in the wording of Google and Anthropic."""
        return Refused(404, f"Not found: {self.called}")

    async def json(self, complaint: str) -> Any:
        """Return the body. Raises Refused (400) with `complaint`, where `{}` is replaced by the
        reason."""
        try:
            return orjson.loads(await self.request.read())
        except orjson.JSONDecodeError as broken:
            raise Refused(400, complaint.format(broken)) from None

    async def form(self) -> Mapping[str, Any]:
        """Return the fields and files of a form. Raises Refused (400) for a malformed form, or a
        text that cannot be decoded."""
        try:
            return await self.request.post()
        except (ValueError, LookupError, HttpProcessingError) as broken:
            raise Refused(400, f"We could not parse the form of your request. ({broken})") from None

    def cached(self, parsed: ModelRequest) -> ModelRequest:
        """Return the request with the part of its input that is in the account's prompt cache.

        Anthropic's dialect also reports tokens written to the cache: all others, as if each request
        asked for caching.
        """
        account = self.state.account_of(self.api.name)
        if account is None or account.spec.cache is None:
            return parsed
        cached = account.cached_tokens(parsed.model, parsed.texts, parsed.input_tokens)
        rest = parsed.input_tokens - cached
        writes = self.api.name == "anthropic" and account.spec.cache == "prefix"
        if not writes or parsed.input_tokens < account.spec.cache_min_tokens:
            rest = 0
        return replace(parsed, cached_tokens=cached, cache_write_tokens=rest)

    def in_tier(self, parsed: ModelRequest, tier: Any) -> ModelRequest:
        """Return the request in the processing tier that its body names. Raises Refused (400) for a
        tier in which its model has no public price."""
        if tier is None or (isinstance(tier, str) and tier.lower() in STANDARD_TIERS):
            return parsed
        today = datetime.now(UTC).date()
        if not isinstance(tier, str) or not catalog().find(
            self.api.name, parsed.model, today, tier.lower()
        ):
            raise Refused(400, f"Unsupported service_tier for {parsed.model}: {str(tier)[:40]}")
        return replace(parsed, tier=tier.lower())

    def rate_limits(self, page: Callable[[AccountSpec], Json]) -> web.Response:
        """Return a page of the rate-limit API. Raises Refused (404) without an account."""
        account = self.state.account_of(self.api.name)
        if account is None:
            raise Refused(404, "This emulator has no account with limits.")
        return json_response(200, page(account.spec))

    async def generate(
        self, parsed: ModelRequest, scripted: Scripted, content_type: str | None = None
    ) -> web.StreamResponse:
        """Serve a call that generates; `scripted` composes its answer, given its fault."""
        method = "stream" if parsed.streamed else "generate"
        with self._serving(parsed.kind, parsed.model, method, parsed.prompt, parsed.size) as (
            call,
            fault,
        ):
            self.state.keep_prompt(call, parsed.texts)
            call.tier = parsed.tier
            if (early := await self._early_fault(call, fault)) is not None:
                return early
            if parsed.tier == "flex" and (busy := await self._flex(call)) is not None:
                return busy
            content_type = content_type or (
                self.api.stream_type if parsed.streamed else self.api.json_type
            )
            behaviour = self.behaviour
            try:
                script = scripted(fault)
            except orjson.JSONEncodeError:  # what it repeats of the request can't be written
                raise Refused(400, "The request body is nested too deeply.") from None
            headers = EMULATED | {"Content-Type": content_type} | dict(script.headers)
            headers |= self.state.rate_limit_headers(call)
            return await _Answering(self, call, parsed, script, fault, headers, behaviour).run()

    def in_background(
        self,
        method: str,
        parsed: ModelRequest,
        done: Callable[[], None],
        script: AnswerScript | None = None,
        *,
        pauses: int = 0,
    ) -> tuple[LoggedCall, asyncio.Task[None]]:
        """Begin a call that continues, and counts as in flight, with or without its client.

        It takes as long as an answer with `pauses` pauses; then it is charged for the script's
        tokens, and `done` is called. If cancelled, it has failed. Raises as
        `EmulatorState.serving`.
        """
        state, behaviour, stack = self.state, self.behaviour, ExitStack()
        call = stack.enter_context(
            state.serving(
                self.request,
                kind=parsed.kind,
                model=parsed.model,
                method=method,
                prompt=parsed.prompt,
                size=parsed.size,
                dialect=self.api.name,
                outlives_client=True,
            )
        )
        delays = [behaviour.first_byte(parsed.kind)] + [behaviour.between(parsed.kind)] * pauses
        takes_s = sum(one.draw_ms(state.random) for one in delays) / 1000

        async def work() -> None:
            with stack:
                try:
                    await asyncio.sleep(takes_s)
                except asyncio.CancelledError:
                    state.ledger.end(call, "failed")
                    return
                output_tokens = 0 if script is None else script.steps[-1].output_tokens
                thoughts_tokens = 0 if script is None else script.thoughts_tokens
                state.ledger.charge(call, parsed.input_tokens, output_tokens, thoughts_tokens)
                state.made(call)
                done()

        return call, state.work_on(work())

    async def other(
        self,
        method: str,
        model: str,
        answer: Callable[[], Json | Awaitable[web.Response]],
        *,
        input_tokens: int = 0,
        label: str = "",
    ) -> web.StreamResponse:
        """Serve a call that generates nothing; it counts as the kind `other`.

        Its prompt in the log, which a fault's `match` is compared with, is `label`, by default its
        path.
        """
        size, label = CallSize(input_tokens), label or self.request.path
        with self._serving("other", model, method, label, size) as (call, fault):
            if (early := await self._early_fault(call, fault)) is not None:
                return early
            ledger, headers = self.state.ledger, self.state.rate_limit_headers(call)
            delay_ms = self.behaviour.first_byte("other").draw_ms(self.state.random)
            if fault is not None and fault.fault is FaultName.SLOW_FIRST_TOKEN:
                delay_ms += fault.delay_ms
            if delay_ms > 0:
                await asyncio.sleep(delay_ms / 1000)
            found = answer()
            response = await found if isawaitable(found) else json_response(200, found)
            response.headers.update(headers)
            if fault is not None and fault.fault is FaultName.ANSWER_LOST:
                await self.cut(call)
            if fault is not None and fault.fault is FaultName.CUT_MID_STREAM:
                await self._cut_body(call, response)
            if fault is not None and fault.fault is FaultName.GARBAGE:
                response.body = b'{"broken": ['
                ledger.end(call, "failed")
            ledger.charge(call, input_tokens, 0)
            if isinstance(response.body, bytes):
                ledger.sent(call, len(response.body))
            return response

    async def _cut_body(self, call: LoggedCall, answer: web.Response) -> NoReturn:
        """Send half of an answer with its full length in the head, then close the connection."""
        data = answer.body if isinstance(answer.body, bytes) else b""
        response = web.StreamResponse(headers=answer.headers)
        response.content_length = len(data)
        await response.prepare(self.request)
        self.state.ledger.sent(call, len(data) // 2)
        await response.write(data[: len(data) // 2])
        await self.cut(call)

    @contextmanager
    def _serving(
        self, kind: str, model: str, method: str, prompt: str, size: CallSize
    ) -> Iterator[tuple[LoggedCall, Fault | None]]:
        """Count the call until the block ends, and select its fault."""
        with self.state.serving(
            self.request,
            kind=kind,
            model=model,
            method=method,
            prompt=prompt,
            size=size,
            dialect=self.api.name,
        ) as call:
            yield call, self.state.faults.strike(kind, prompt)

    async def _early_fault(self, call: LoggedCall, fault: Fault | None) -> web.Response | None:
        """Carry out a fault that ends the call before its answer; return None for any other."""
        if fault is None:
            return None
        call.fault = fault.fault.value
        if fault.fault is FaultName.HANG:
            await _forever()
        if fault.fault is FaultName.CUT:
            await self.cut(call)
        if (error := self.api.ordered(fault, call.model)) is not None:
            self.state.ledger.end(call, "failed")
            return failed(error)
        return None

    async def _flex(self, call: LoggedCall) -> web.Response | None:
        """Wait as a call of the flex tier does; return the refusal of a call without capacity."""
        pace, random = self.behaviour.flex, self.state.random
        if self.api.no_capacity is not None and random.random() < pace.busy_share:
            call.fault = "flex_busy"
            self.state.ledger.end(call, "failed")
            return failed(self.api.no_capacity)
        await asyncio.sleep(pace.delay_ms.draw_ms(random) / 1000)
        return None

    async def cut(self, call: LoggedCall) -> NoReturn:
        """Close the connection; its loss then cancels this task."""
        self.state.ledger.end(call, "failed")
        if self.request.transport is not None:
            self.request.transport.close()
        await _forever()


async def _forever() -> NoReturn:
    """Wait until cancelled, which happens when the client disconnects or the server stops."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("no code sets this future")


@dataclass(frozen=True, slots=True)
class _Answering:
    """The sending of an answer."""

    _served: Served
    _call: LoggedCall
    _parsed: ModelRequest
    _script: AnswerScript
    _fault: Fault | None
    _headers: Mapping[str, str]
    _behaviour: Behaviour  # that of the call's arrival

    async def run(self) -> web.StreamResponse:
        await self._pause(self._behaviour.first_byte(self._call.kind))
        if self._fault is not None and self._fault.fault is FaultName.SLOW_FIRST_TOKEN:
            await asyncio.sleep(self._fault.delay_ms / 1000)
        if self._fault is not None and self._fault.fault is FaultName.ANSWER_LOST:
            self._charge(self._script.steps[-1])
            await self._served.cut(self._call)
        in_mid_answer = self._fault is not None and self._fault.fault in MID_ANSWER
        fault = self._fault if in_mid_answer else None
        if self._parsed.streamed:
            return await self._send_stream(fault)
        for _ in self._script.steps[1:]:
            await self._between()
        return await self._send_whole(fault)

    async def _pause(self, delays: Distribution) -> None:
        if (delay_ms := delays.draw_ms(self._served.state.random)) > 0:
            await asyncio.sleep(delay_ms / 1000)

    async def _between(self) -> None:
        await self._pause(self._behaviour.between(self._call.kind))

    async def _send_whole(self, fault: Fault | None) -> web.StreamResponse:
        step = self._script.steps[-1]
        data = step.data
        if fault is not None and fault.fault in BREAKS_OFF:
            response = web.StreamResponse(headers=self._headers)
            response.content_length = len(data)
            await response.prepare(self._served.request)
            self._charge(step)
            await self._write(response, data[: len(data) // 2])
            await self._break_off(fault)
        if fault is not None:
            data = self._script.broken(0, fault)
        else:
            self._charge(step)
        self._end("finished" if fault is None else "failed", len(data))
        return web.Response(body=data, headers=self._headers)

    async def _send_stream(self, fault: Fault | None) -> web.StreamResponse:
        steps = self._script.steps
        response = web.StreamResponse(headers=self._headers)
        await response.prepare(self._served.request)
        for index, step in enumerate(steps):
            if index:
                await self._between()
            if fault is not None and index >= min(fault.after_chunks, len(steps) - 1):
                return await self._fail(response, fault, index)
            self._charge(step)
            if index < len(steps) - 1:
                await self._write(response, step.data)
        self._end("finished", len(steps[-1].data))
        await response.write_eof(steps[-1].data)
        return response

    async def _fail(
        self, response: web.StreamResponse, fault: Fault, index: int
    ) -> web.StreamResponse:
        if fault.fault in BREAKS_OFF:
            await self._break_off(fault)
        data = self._script.broken(index, fault)
        self._end("failed", len(data))
        await response.write_eof(data)
        return response

    async def _break_off(self, fault: Fault) -> NoReturn:
        if fault.fault is FaultName.CUT_MID_STREAM:
            await self._served.cut(self._call)
        await _forever()

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        self._served.state.ledger.sent(self._call, len(data))
        await response.write(data)

    def _charge(self, step: ScriptStep) -> None:
        state = self._served.state
        state.ledger.charge(
            self._call, self._parsed.input_tokens, step.output_tokens, self._script.thoughts_tokens
        )
        state.made(self._call)

    def _end(self, outcome: Literal["finished", "failed"], last_bytes: int) -> None:
        state = self._served.state
        state.ledger.sent(self._call, last_bytes)
        state.ledger.end(self._call, outcome)
        state.settle(self._call)
