"""Realtime sessions: OpenAI's Realtime API and Gemini Live over WebSocket.

A turn answers the input since the last one, as text or as audio. Its input is the whole
conversation, of which all but the newest part counts as cached. With voice detection a second of
audio begins a turn by itself. Instructions in brackets in a text are executed: `[close 1011 words]`
closes the connection, `[error words]` reports an error, `[tokens 5000]` sets the length of the
output.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import orjson
from aiohttp import WSMsgType, web

from tidegate.emulator.counting import CallSize
from tidegate.emulator.delivery import EMULATED, Served, failed
from tidegate.emulator.dialect import EmulatedApi, FaultName, Json, Refused
from tidegate.emulator.fronts.gemini import GEMINI, check_key
from tidegate.emulator.fronts.openai import OPENAI, check_model, missing
from tidegate.emulator.state import LoggedCall

KIND = "realtime"
_MAX_BYTES = 16 * 1024 * 1024
_SECOND_CHARS = 64_000  # of base64, for 16-bit PCM at 24 kHz
_IN_A_SECOND, _OUT_A_SECOND = 10, 20  # tokens
_DIRECTIVE = re.compile(r"\[(close|error|tokens) ?(\d{4,6})? ?([^\]]*)\]")
_SOUND = b64encode(bytes(4_800)).decode()


@dataclass(slots=True)
class Talk:
    """The input of a session so far, in tokens, and the text of the newest part."""

    context_tokens: int = 0
    text: str = ""
    text_tokens: int = 0
    sound_chars: int = 0
    committed_chars: int = 0  # of the audio
    context_sound_tokens: int = 0
    total_input: int = 0
    total_output: int = 0
    turns: int = 0

    def take_text(self, text: str) -> None:
        self.text += text
        self.text_tokens += max(1, len(text) // 4)

    @property
    def sound_tokens(self) -> int:
        return -(-self.sound_chars * _IN_A_SECOND // _SECOND_CHARS)

    def answer(self, *, in_audio: bool) -> EmulatedTurn:
        """Return the next turn; the input that it answers is part of the context from then on."""
        reply = f"You said: {self.text}" if self.text else "I heard you."
        found = re.search(r"\[tokens (\d+)\]", self.text)
        output = int(found[1]) if found else max(1, len(reply) // 4)
        turn = EmulatedTurn(
            reply,
            self.context_tokens,
            self.context_sound_tokens,
            self.text_tokens,
            self.sound_tokens,
            output,
            in_audio,
            _DIRECTIVE.search(self.text),
        )
        self.context_tokens = turn.input_tokens + output
        self.context_sound_tokens += self.sound_tokens + (output if in_audio else 0)
        self.total_input += turn.input_tokens
        self.total_output += output
        self.turns += 1
        self.text, self.text_tokens = "", 0
        self.sound_chars = self.committed_chars = 0
        return turn

    def commit(self) -> int:
        """Return how much audio has come since the last call."""
        received, self.committed_chars = self.sound_chars - self.committed_chars, self.sound_chars
        return received


@dataclass(frozen=True, slots=True)
class EmulatedTurn:
    """An answer and its token counts."""

    reply: str
    cached_tokens: int
    cached_sound_tokens: int
    text_tokens: int
    sound_tokens: int
    output_tokens: int
    in_audio: bool
    directive: re.Match[str] | None

    @property
    def input_tokens(self) -> int:
        return self.cached_tokens + self.text_tokens + self.sound_tokens


@dataclass(slots=True)
class _Session:
    """A session of either API. `served` has the request, `call` its entry in the ledger."""

    served: Served
    socket: web.WebSocketResponse
    call: LoggedCall
    model: str
    talk: Talk = field(default_factory=Talk)

    async def events(self) -> AsyncIterator[Json | None]:
        """Yield the messages of the client until either side closes; None for a message that is not
        JSON."""
        async for message in self.socket:
            if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                return
            try:
                yield orjson.loads(message.data)
            except orjson.JSONDecodeError:
                yield None
            if self.socket.closed:
                return

    async def closes(self, turn: EmulatedTurn) -> bool:
        """Close the connection if the text of a turn requests it, and return whether it did."""
        found = turn.directive
        if found is None or found[1] != "close":
            return False
        await self.socket.close(code=int(found[2] or 1000), message=found[3].encode())
        return True

    def charge(self) -> None:
        ledger = self.served.state.ledger
        ledger.charge(self.call, self.talk.total_input, self.talk.total_output)

    async def pause(self) -> None:
        behaviour, random = self.served.behaviour, self.served.state.random
        if (delay_ms := behaviour.first_byte(KIND).draw_ms(random)) > 0:
            await asyncio.sleep(delay_ms / 1000)


async def _accepted(served: Served, protocols: tuple[str, ...]) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(protocols=protocols, max_msg_size=_MAX_BYTES, compress=False)
    socket.headers.update(EMULATED)
    await socket.prepare(served.request)
    return socket


def _is_upgrade(request: web.BaseRequest) -> bool:
    return request.headers.get("Upgrade", "").lower() == "websocket"


_OPENAI = re.compile(r"(?:/v1beta/openai|/openai/v1|/v1)/realtime")
_GEMINI = re.compile(r"/ws/google\.ai\.generativelanguage\.v1(?:alpha|beta)\.\w+\.Bidi\w+")


def api_of(request: web.BaseRequest) -> EmulatedApi | None:
    """Return the API whose realtime session a request opens; None for any other request."""
    if _OPENAI.fullmatch(request.path):
        return OPENAI
    return GEMINI if _GEMINI.fullmatch(request.path) else None


async def route(served: Served) -> web.StreamResponse:
    if served.api is OPENAI:
        return await _openai(served)
    check_key(served.request)
    return await _gemini(served)


# OpenAI's


async def _openai(served: Served) -> web.StreamResponse:
    """Serve `GET /v1/realtime?model=`. Raises Refused."""
    if not served.request.headers.get("Authorization", "").startswith("Bearer "):
        raise Refused(401, "Missing bearer or basic authentication in header")
    model, transcribes = served.request.query.get("model", ""), _transcribes(served.request)
    if transcribes and model:
        raise Refused(400, "You must not provide a model parameter for transcription sessions.")
    if not transcribes:
        if not model:
            raise missing("model")
        check_model(model, served.behaviour)
    if not _is_upgrade(served.request):
        raise Refused(400, "You must use the WebSocket protocol.", param=None)
    with served.state.serving(
        served.request,
        kind=KIND,
        model=model,
        method=KIND,
        prompt=model,
        size=CallSize(0),
        dialect="openai",
    ) as call:
        fault = served.state.faults.strike(KIND, model)
        if fault is not None:
            call.fault = fault.fault.value
            if fault.fault is FaultName.CUT:
                await served.cut(call)
            if (error := served.api.ordered(fault, model)) is not None:
                served.state.ledger.end(call, "failed")
                return failed(error)
        socket = await _accepted(served, ("realtime",))
        session = _OpenAISession(_Session(served, socket, call, model))
        await session.run()
        return socket


def _transcribes(request: web.BaseRequest) -> bool:
    return request.query.get("intent") == "transcription"


class _OpenAISession:
    def __init__(self, session: _Session) -> None:
        self._session = session
        self._socket = session.socket
        self._transcribes = _transcribes(session.served.request)
        kind = "transcription" if self._transcribes else "realtime"
        self._facts: Json = {
            "type": kind,
            "object": f"realtime.{kind}_session" if self._transcribes else "realtime.session",
            "id": f"sess_{uuid4().hex[:21]}",
            "model": session.model,
            "output_modalities": ["audio"],
            "audio": {"input": {"turn_detection": {"type": "server_vad"}}, "output": {}},
        }

    async def run(self) -> None:
        await self._send("session.created", session=self._facts)
        async for event in self._session.events():
            if event is None:
                await self._error("We could not parse the JSON body of the event.", None)
            else:
                await self._receive(event)

    async def _receive(self, event: Json) -> None:
        talk = self._session.talk
        match event.get("type"):
            case "session.update":
                changes = event.get("session", {})
                model = changes.get("model", self._session.model)
                if model != self._session.model:
                    await self._error("Cannot update a session's model.", event, "session.model")
                    return
                self._facts |= changes
                await self._send("session.updated", session=self._facts)
            case "conversation.item.create":
                item = {"id": f"item_{uuid4().hex[:21]}", **event.get("item", {})}
                for part in item.get("content") or ():
                    talk.take_text(str(part.get("text", "")))
                await self._send("conversation.item.added", item=item, previous_item_id=None)
            case "input_audio_buffer.append":
                talk.sound_chars += len(event.get("audio", ""))
                if self._detects() and talk.sound_chars >= _SECOND_CHARS:
                    await self._commit()
                    if self._transcribes:
                        talk.sound_chars = talk.committed_chars = 0
                    else:
                        await self._answer({})
            case "input_audio_buffer.commit":
                await self._commit()
            case "response.create" if self._transcribes:
                await self._error("A transcription session makes no response.", event, "type")
            case "response.create":
                await self._answer(event.get("response") or {})
            case "response.cancel":
                await self._error("Cancellation failed: no active response found", event)
            case other:
                await self._error(f"Invalid value: '{other}'.", event, "type")

    def _detects(self) -> bool:
        audio = self._facts.get("audio") or {}
        return (audio.get("input") or {}).get("turn_detection") is not None

    async def _commit(self) -> None:
        item_id, sound = f"item_{uuid4().hex[:21]}", self._session.talk.commit()
        await self._send("input_audio_buffer.committed", item_id=item_id, previous_item_id=None)
        audio = (self._facts.get("audio") or {}).get("input") or {}
        if audio.get("transcription"):
            usage = {"type": "duration", "seconds": sound / _SECOND_CHARS}
            kind, text = "conversation.item.input_audio_transcription", "as it was said"
            place = {"item_id": item_id, "content_index": 0}
            await self._send(f"{kind}.delta", delta=text, **place)
            await self._send(f"{kind}.completed", transcript=text, usage=usage, **place)

    async def _answer(self, options: Json) -> None:
        session, modalities = self._session, options.get("output_modalities")
        in_audio = "audio" in (modalities or self._facts.get("output_modalities") or ())
        turn = session.talk.answer(in_audio=in_audio)
        response: Json = {
            "id": f"resp_{uuid4().hex[:21]}",
            "object": "realtime.response",
            "status": "in_progress",
            "status_details": None,
            "output": [],
            "usage": None,
        }
        await session.pause()
        if turn.directive is not None and turn.directive[1] == "error":
            await self._error(turn.directive[3] or "an error on order", None)
            return
        await self._send("response.created", response=response)
        if await session.closes(turn):
            return
        item_id = f"item_{uuid4().hex[:21]}"
        place = {"response_id": response["id"], "item_id": item_id}
        place |= {"output_index": 0, "content_index": 0}
        part: Json = {"type": "output_text", "text": turn.reply}
        if in_audio:
            part = {"type": "output_audio", "transcript": turn.reply}
            for _ in range(max(1, turn.output_tokens // 50)):
                await self._send("response.output_audio.delta", delta=_SOUND, **place)
            await self._send("response.output_audio_transcript.delta", delta=turn.reply, **place)
        else:
            for word in turn.reply.split(" "):
                await self._send("response.output_text.delta", delta=f"{word} ", **place)
        item: Json = {"id": item_id, "object": "realtime.item", "type": "message"}
        item |= {"status": "completed", "role": "assistant", "content": [part]}
        await self._send("response.output_item.done", response_id=response["id"], item=item)
        session.charge()
        usage = _openai_usage(turn)
        whole = {**response, "status": "completed", "output": [item], "usage": usage}
        await self._send("response.done", response=whole)

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": f"event_{uuid4().hex[:21]}", **fields}
        await self._socket.send_str(orjson.dumps(event).decode())

    async def _error(self, message: str, about: Json | None, param: str | None = None) -> None:
        error: Json = {"type": "invalid_request_error", "code": "invalid_value", "message": message}
        error |= {"param": param, "event_id": None if about is None else about.get("event_id")}
        await self._send("error", error=error)


def _openai_usage(turn: EmulatedTurn) -> Json:
    audio = turn.output_tokens if turn.in_audio else 0
    audio_tokens = turn.cached_sound_tokens + turn.sound_tokens
    return {
        "total_tokens": turn.input_tokens + turn.output_tokens,
        "input_tokens": turn.input_tokens,
        "output_tokens": turn.output_tokens,
        "input_token_details": {
            "text_tokens": turn.input_tokens - audio_tokens,
            "audio_tokens": audio_tokens,
            "image_tokens": 0,
            "cached_tokens": turn.cached_tokens,
            "cached_tokens_details": {
                "text_tokens": turn.cached_tokens - turn.cached_sound_tokens,
                "audio_tokens": turn.cached_sound_tokens,
                "image_tokens": 0,
            },
        },
        "output_token_details": {
            "text_tokens": turn.output_tokens - audio,
            "audio_tokens": audio,
        },
    }


# Gemini's


async def _gemini(served: Served) -> web.StreamResponse:
    """Serve Gemini Live, whose model is in the first message. Raises Refused."""
    if not _is_upgrade(served.request):
        raise Refused(404, "Not found: a WebSocket is expected here.")
    socket = await _accepted(served, ())
    message = await socket.receive()
    try:
        setup = orjson.loads(message.data)["setup"]
        model = str(setup["model"]).removeprefix("models/")
    except (orjson.JSONDecodeError, KeyError, TypeError):
        await socket.close(code=1007, message=b"setup must be the first message")
        return socket
    with served.state.serving(
        served.request, kind=KIND, model=model, method=KIND, prompt=model, size=CallSize(0)
    ) as call:
        fault = served.state.faults.strike(KIND, model)
        if fault is not None:
            call.fault = fault.fault.value
            if (error := served.api.ordered(fault, model)) is not None:
                served.state.ledger.end(call, "failed")
                await socket.close(code=1011, message=str(error.status).encode())
                return socket
        modalities = (setup.get("generationConfig") or {}).get("responseModalities") or ["AUDIO"]
        session = _GeminiSession(_Session(served, socket, call, model), "AUDIO" in modalities)
        await session.run()
    return socket


class _GeminiSession:
    def __init__(self, session: _Session, in_audio: bool) -> None:
        self._session = session
        self._socket = session.socket
        self._in_audio = in_audio

    async def run(self) -> None:
        await self._send({"setupComplete": {}})
        async for event in self._session.events():
            if event is None:
                await self._socket.close(code=1007, message=b"Invalid JSON payload received.")
            else:
                await self._receive(event)

    async def _receive(self, event: Json) -> None:
        talk = self._session.talk
        if (content := event.get("clientContent", event.get("client_content"))) is not None:
            for turn in content.get("turns") or ():
                for part in turn.get("parts") or ():
                    talk.take_text(str(part.get("text", "")))
            if content.get("turnComplete", content.get("turn_complete")):
                await self._answer()
        elif (received := event.get("realtimeInput", event.get("realtime_input"))) is not None:
            talk.take_text(received["text"]) if "text" in received else None
            for name in ("audio", "video"):
                talk.sound_chars += len((received.get(name) or {}).get("data", ""))
            ends = received.get("audioStreamEnd") or "text" in received
            if ends or talk.sound_chars >= _SECOND_CHARS:
                await self._answer()
        elif "toolResponse" in event:
            talk.take_text("what the tool gave")
            await self._answer()
        else:
            await self._socket.close(code=1007, message=b"Request contains an invalid argument.")

    async def _answer(self) -> None:
        session = self._session
        turn = session.talk.answer(in_audio=self._in_audio)
        await session.pause()
        if await session.closes(turn):
            return
        if self._in_audio:
            part: Json = {"inlineData": {"mimeType": "audio/pcm;rate=24000", "data": _SOUND}}
            await self._send(_content([part]))
        else:
            for word in turn.reply.split(" "):
                await self._send(_content([{"text": f"{word} "}]))
        await self._send({"serverContent": {"generationComplete": True}})
        session.charge()
        usage = _gemini_usage(turn)
        await self._send({"serverContent": {"turnComplete": True}, "usageMetadata": usage})

    async def _send(self, event: Json) -> None:
        await self._socket.send_bytes(orjson.dumps(event))


def _content(parts: list[Json]) -> Json:
    return {"serverContent": {"modelTurn": {"role": "model", "parts": parts}}}


def _gemini_usage(turn: EmulatedTurn) -> Json:
    audio_tokens = turn.cached_sound_tokens + turn.sound_tokens
    return {
        "promptTokenCount": turn.input_tokens,
        "responseTokenCount": turn.output_tokens,
        "totalTokenCount": turn.input_tokens + turn.output_tokens,
        "promptTokensDetails": [
            {"modality": "TEXT", "tokenCount": turn.input_tokens - audio_tokens},
            {"modality": "AUDIO", "tokenCount": audio_tokens},
        ],
        "responseTokensDetails": [
            {"modality": "AUDIO" if turn.in_audio else "TEXT", "tokenCount": turn.output_tokens}
        ],
    }
