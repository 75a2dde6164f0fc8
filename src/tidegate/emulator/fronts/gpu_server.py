"""Front of an emulated GPU server: OpenAI's chat completions and completions, and its own pages.

It requires no key, and accepts any name for its model. Its answers are those of OpenAI's front, at
the pace of its `Schedule`. A request whose client has disconnected continues, and counts as in
flight, until the server notices. Injected faults are not supported here. Messages of llama.cpp are
as measured at build b10434, those of the others as in their documents and sources; a `code` is a
number, unlike OpenAI's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

import orjson
from aiohttp import web

from tidegate.emulator.content import ModelRequest, compose
from tidegate.emulator.delivery import (
    EMULATED,
    JSON_TYPE,
    SSE_TYPE,
    AnswerScript,
    data_event,
    json_response,
)
from tidegate.emulator.dialect import Json, Refused
from tidegate.emulator.fronts import openai
from tidegate.emulator.gpu import (
    ContextExceeded,
    GpuSpec,
    Schedule,
    ServerBusy,
    Software,
    Work,
)
from tidegate.emulator.settings import Behaviour
from tidegate.emulator.state import EmulatorState, LoggedCall

MODEL = "local"
_STATE_NAME = "gpu"
_MOST_PIECES = 1_000
_GENERATING = ("/v1/chat/completions", "/v1/completions")


class GpuServer:
    """The server's clock, and the task that runs its schedule while there is work."""

    def __init__(self, spec: GpuSpec) -> None:
        self.schedule = Schedule(spec)
        self._stepping: asyncio.Task[None] | None = None
        self._started = time.monotonic()

    @property
    def spec(self) -> GpuSpec:
        return self.schedule.spec

    @property
    def now_s(self) -> float:
        return (time.monotonic() - self._started) * self.spec.speed

    @property
    def is_loading(self) -> bool:
        return self.now_s * 1e3 < self.spec.loading_ms

    def change(self, spec: GpuSpec) -> None:
        """Apply other settings; a different `loading_ms` counts as a restart."""
        if spec.loading_ms != self.spec.loading_ms:
            self._started = time.monotonic()
        self.schedule.spec = spec

    def add(self, work: Work) -> None:
        """Enqueue a request. Raises ContextExceeded and ServerBusy."""
        self.schedule.add(work)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())

    async def _step(self) -> None:
        now_s = self.now_s
        while (step := self.schedule.next_step()) is not None:
            now_s += step.duration_s
            await asyncio.sleep(max(0.0, now_s - self.now_s) / self.spec.speed)
            self.schedule.finish(step, now_s)


def server_of(state: EmulatorState, spec: GpuSpec) -> GpuServer:
    """Return the server that this emulator is."""
    server = state.kept.get(_STATE_NAME)
    if not isinstance(server, GpuServer):
        server = state.kept[_STATE_NAME] = GpuServer(spec)
    if server.spec is not spec:
        server.change(spec)
    return server


async def answer(state: EmulatorState, request: web.BaseRequest) -> web.StreamResponse:
    """Answer any request of a client, to its end."""
    behaviour = state.behaviour
    assert behaviour.gpu is not None
    server = server_of(state, behaviour.gpu)
    spec, path = server.spec, request.path
    if server.is_loading:
        return json_response(503, _error(spec, 503, "Loading model"))
    if request.method == "GET":
        return _page(server, path)
    if request.method != "POST" or path not in _GENERATING:
        if path == "/v1/embeddings" and spec.software == "llama.cpp":
            message = "This server does not support embeddings. Start it with `--embeddings`"
            return json_response(501, _error(spec, 501, message))
        return json_response(404, _error(spec, 404, "File Not Found"))
    try:
        parsed = _read(spec, await request.read(), path)
    except orjson.JSONDecodeError as broken:
        status = 500 if spec.software == "llama.cpp" else 400
        return json_response(
            status, _error(spec, status, f"[json.exception.parse_error.101] parse error: {broken}")
        )
    except Refused as refused:
        status = 422 if spec.software == "tgi" and refused.status == 400 else refused.status
        return json_response(status, _error(spec, status, refused.message))
    except web.HTTPRequestEntityTooLarge:
        return json_response(413, _error(spec, 413, "Payload too large"))
    return await _Reply(state, server, request, parsed, behaviour, path).serve()


def _page(server: GpuServer, path: str) -> web.Response:
    spec, schedule = server.spec, server.schedule
    match path:
        case "/health":
            return json_response(200, {"status": "ok"})
        case "/v1/models":
            listed = [openai.describe(MODEL)]
            return json_response(200, {"object": "list", "data": listed})
        case "/slots" if spec.software == "llama.cpp":
            return json_response(200, _slots(schedule))
        case "/props" if spec.software == "llama.cpp":
            return json_response(200, {"total_slots": spec.slots, "model_alias": MODEL})
        case "/metrics" if (text := _metrics(schedule)) is not None:
            return web.Response(text=text, headers=EMULATED)
    return json_response(404, _error(spec, 404, "File Not Found"))


def _read(spec: GpuSpec, data: bytes, path: str) -> ModelRequest:
    """Return the request, with the length of its reply. Raises Refused and JSONDecodeError."""
    body = orjson.loads(data)
    if not isinstance(body, dict):
        raise Refused(400, "the body is not an object")
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) == 0 and spec.software == "llama.cpp":
            body[name] = 1
    named = body.get("model")
    model = named if isinstance(named, str) and named else MODEL
    reads = openai.read_chat if path.endswith("/chat/completions") else openai.read_completions
    parsed = reads(body, model)
    most = parsed.max_output_tokens or spec.reply_tokens
    room = max(1, spec.context_tokens - parsed.input_tokens)
    return replace(parsed, max_output_tokens=min(most, room))


class _Reply:
    """A request, from its place in the queue to the last byte."""

    def __init__(
        self,
        state: EmulatorState,
        server: GpuServer,
        request: web.BaseRequest,
        parsed: ModelRequest,
        behaviour: Behaviour,
        path: str,
    ) -> None:
        self._state = state
        self._server = server
        self._request = request
        self._parsed = parsed
        self._chat = path.endswith("/chat/completions")
        most = parsed.max_output_tokens or 1
        text = behaviour.answer or " ".join(("word salad",) * (most // 2 + 1))
        self._behaviour = replace(behaviour, answer=text, chunks=min(most, _MOST_PIECES))
        self._changed = asyncio.Event()
        reply = compose(parsed, self._behaviour, None)
        self._work = Work(
            prompt="\n".join(parsed.texts),
            input_tokens=max(1, parsed.input_tokens),
            reply_tokens=max(1, reply.output_tokens * parsed.choices),
            streamed=parsed.streamed,
            arrived_s=server.now_s,
            is_lost=self._is_lost,
            changed=self._changed.set,
        )

    def _is_lost(self) -> bool:
        transport = self._request.transport
        return transport is None or transport.is_closing()

    async def serve(self) -> web.StreamResponse:
        parsed, spec = self._parsed, self._server.spec
        try:
            self._server.add(self._work)
        except ContextExceeded:
            status, body = _too_long(spec, parsed.input_tokens)
            return json_response(status, body)
        except ServerBusy:
            return self._busy()
        with self._state.serving(
            self._request,
            kind=parsed.kind,
            model=parsed.model,
            method="stream" if parsed.streamed else "generate",
            prompt=parsed.prompt,
            size=parsed.size,
            dialect="openai",
            outlives_client=True,
        ) as call:
            try:
                await self._made(1)
                if self._work.dropped:
                    return self._dropped(call)
                call.cached_tokens = self._work.cached_tokens
                if parsed.streamed:
                    return await self._stream(call)
                return await self._whole(call)
            except ConnectionError:
                return self._dropped(call)
            finally:
                self._server.schedule.drop(self._work)

    def _busy(self) -> web.Response:
        """Return the answer of a busy server; SGLang sends it within the stream, if one was
        requested."""
        status, body = _busy(self._server.spec)
        if self._server.spec.software != "sglang" or not self._parsed.streamed:
            return json_response(status, body)
        event = data_event(orjson.dumps({"error": body}))
        return web.Response(
            body=event + data_event(b"[DONE]"), headers=EMULATED | {"Content-Type": SSE_TYPE}
        )

    async def _made(self, tokens: int) -> None:
        """Wait until `tokens` tokens of the reply are generated, or it was dropped."""
        while self._work.made_tokens < tokens and not self._work.dropped:
            self._changed.clear()
            await self._changed.wait()

    def _dropped(self, call: LoggedCall) -> web.Response:
        """Return an answer for a disconnected client, which nothing reads."""
        self._server.schedule.drop(self._work)
        self._state.ledger.charge(call, self._work.input_tokens, self._work.made_tokens)
        self._state.ledger.end(call, "client_gone")
        return web.Response(status=500, headers=EMULATED)

    def _script(self) -> AnswerScript:
        parsed = replace(self._parsed, cached_tokens=self._work.cached_tokens)
        return openai.choices_script(parsed, self._behaviour, None, chat=self._chat)

    def _end(self, call: LoggedCall, sent_bytes: int) -> None:
        self._state.ledger.sent(call, sent_bytes)
        self._state.ledger.charge(call, self._work.input_tokens, self._work.made_tokens)
        self._state.ledger.end(call, "finished")

    async def _whole(self, call: LoggedCall) -> web.Response:
        await self._made(self._work.reply_tokens)
        if self._work.dropped:
            return self._dropped(call)
        data = self._timed(self._script().steps[-1].data)
        self._end(call, len(data))
        return web.Response(body=data, headers=EMULATED | {"Content-Type": JSON_TYPE})

    def _timed(self, data: bytes) -> bytes:
        if self._server.spec.software != "llama.cpp":
            return data
        body: Json = orjson.loads(data)
        return orjson.dumps(body | {"timings": _timings(self._work, self._server.now_s)})

    async def _stream(self, call: LoggedCall) -> web.StreamResponse:
        spec, steps = self._server.spec, self._script().steps
        headers = EMULATED | {"Content-Type": SSE_TYPE}
        if spec.closes_streams:
            headers["Keep-Alive"] = "timeout=5, max=100"
        response = web.StreamResponse(headers=headers)
        await response.prepare(self._request)
        for step in steps[:-1]:
            await self._made(step.output_tokens)
            if self._work.dropped:
                return self._dropped(call)
            self._state.ledger.charge(call, self._work.input_tokens, step.output_tokens)
            self._state.ledger.sent(call, len(step.data))
            await response.write(step.data)
        await self._made(self._work.reply_tokens)
        if self._work.dropped:
            return self._dropped(call)
        self._end(call, len(steps[-1].data))
        await response.write_eof(steps[-1].data)
        if spec.closes_streams and self._request.transport is not None:
            self._request.transport.close()
        return response


_TYPES: Mapping[Software, Mapping[int, str]] = {
    "llama.cpp": {
        400: "invalid_request_error",
        404: "not_found_error",
        500: "server_error",
        501: "not_supported_error",
        503: "unavailable_error",
    },
    "vllm": {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"},
    "sglang": {400: "BadRequest", 404: "NotFound", 503: "SERVICE_UNAVAILABLE"},
    "tgi": {422: "validation", 404: "not_found", 429: "overloaded", 503: "unhealthy"},
    "ollama": {400: "invalid_request_error", 404: "not_found_error", 503: "api_error"},
}
_BUSY: Mapping[Software, tuple[int, str]] = {
    "llama.cpp": (503, "no slot available"),
    "vllm": (503, "The request queue is full."),
    "sglang": (503, "The request queue is full."),
    "tgi": (429, "Model is overloaded"),
    "ollama": (503, "server busy, please try again.  maximum pending requests exceeded"),
}
_METRICS: Mapping[Software, tuple[str, str]] = {  # names of running and waiting requests
    "llama.cpp": ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
    "vllm": ("vllm:num_requests_running", "vllm:num_requests_waiting"),
    "sglang": ("sglang:num_running_reqs", "sglang:num_queue_reqs"),
    "tgi": ("tgi_batch_current_size", "tgi_queue_size"),
}
_BLOCK_TOKENS = 16


def _error(spec: GpuSpec, status: int, message: str, **more: object) -> Json:
    """Return the body of an error."""
    kind = _TYPES[spec.software].get(status, "server_error")
    match spec.software:
        case "llama.cpp":
            return {"error": {"code": status, "message": message, "type": kind, **more}}
        case "sglang":
            flat = {"object": "error", "message": message, "type": kind}
            return flat | {"param": None, "code": status}
        case "tgi":
            return {"error": message, "error_type": kind}
        case "ollama":
            inner = {"message": message, "type": kind, "param": None, "code": None}
            return {"error": inner}
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _busy(spec: GpuSpec) -> tuple[int, Json]:
    status, message = _BUSY[spec.software]
    return status, _error(spec, status, message)


def _too_long(spec: GpuSpec, tokens: int) -> tuple[int, Json]:
    """Return the refusal of a prompt that does not fit into a slot."""
    bound = min(spec.context_tokens, spec.most_kv_tokens)
    if spec.software == "llama.cpp":
        message = (
            f"request ({tokens} tokens) exceeds the available context size ({bound} tokens), "
            "try increasing it"
        )
        more = {"n_prompt_tokens": tokens, "n_ctx": bound}
        body = _error(spec, 400, message, **more)
        body["error"]["type"] = "exceed_context_size_error"
        return 400, body
    status = 422 if spec.software == "tgi" else 400
    message = (
        f"This model's maximum context length is {bound} tokens. However, your request has "
        f"{tokens} input tokens."
    )
    return status, _error(spec, status, message)


def _slots(schedule: Schedule) -> list[Json]:
    """Return the answer to `GET /slots`, in llama.cpp's form."""
    spec, running = schedule.spec, schedule.running
    return [
        {
            "id": place,
            "n_ctx": spec.context_tokens,
            "speculative": False,
            "is_processing": place < len(running),
        }
        for place in range(max(spec.slots, len(running)))
    ]


def _metrics(schedule: Schedule) -> str | None:
    """Return the answer to `GET /metrics`; None if the server has none."""
    spec, counts = schedule.spec, schedule.counts
    if (names := _METRICS.get(spec.software)) is None:
        return None
    label = "" if spec.software in ("llama.cpp", "tgi") else '{model_name="local"}'
    found: dict[str, float] = {
        f"{names[0]}{label}": len(schedule.running),
        f"{names[1]}{label}": len(schedule.waiting),
    }
    used = round(schedule.kv_tokens / spec.most_kv_tokens, 6)
    match spec.software:
        case "llama.cpp":
            found["llamacpp:prompt_tokens_total"] = counts.read_tokens
            found["llamacpp:tokens_predicted_total"] = counts.made_tokens
        case "vllm":
            blocks = spec.most_kv_tokens // _BLOCK_TOKENS
            found[f"vllm:kv_cache_usage_perc{label}"] = used
            found[
                f'vllm:cache_config_info{{block_size="{_BLOCK_TOKENS}",num_gpu_blocks="{blocks}"}}'
            ] = 1
        case "sglang":
            found[f"sglang:token_usage{label}"] = used
            found[f"sglang:max_total_num_tokens{label}"] = spec.most_kv_tokens
    lines = []
    for name, value in found.items():
        plain = name.partition("{")[0]
        kind = "counter" if plain.endswith("_total") else "gauge"
        lines += [f"# TYPE {plain} {kind}", f"{name} {value:g}"]
    return "\n".join(lines) + "\n"


def _timings(work: Work, now_s: float) -> Json:
    """Return how long a reply took, in llama.cpp's form."""
    first_s = work.first_token_s if work.first_token_s is not None else now_s
    read = work.input_tokens - work.cached_tokens
    return {
        "cache_n": work.cached_tokens,
        "prompt_n": read,
        "prompt_ms": round((first_s - work.arrived_s) * 1e3, 3),
        "predicted_n": work.made_tokens,
        "predicted_ms": round((now_s - first_s) * 1e3, 3),
    }
