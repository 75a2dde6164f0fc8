"""Stored things of Gemini's API: interactions, cached contents, operations and their videos.

    https://ai.google.dev/gemini-api/docs/interactions
    https://ai.google.dev/gemini-api/docs/caching
    https://ai.google.dev/gemini-api/docs/video

Invariants: an interaction is kept unless `store` is false, with the text of those before it as the
input of the next; in the background it counts as in flight until it has ended, and so does an
operation; ids are as long as the real ones; a video's URI has Google's host, as the real one has.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from secrets import choice, token_urlsafe
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator.content import (
    Attached,
    Composed,
    Conversation,
    ModelRequest,
    Moment,
    Speaker,
    Tool,
    base64_bytes,
    compose,
)
from tidegate.emulator.counting import CallSize
from tidegate.emulator.delivery import (
    AnswerScript,
    ScriptStep,
    Served,
    broken_object,
    json_response,
    stream_steps,
    whole_steps,
)
from tidegate.emulator.dialect import Json, Refused
from tidegate.emulator.limits import Fault

_BAD_BODY = "Invalid JSON payload received. {}"
_GARBAGE = b'{"event_type": "step.delta", "ind'
_INTERACTIONS, _CACHES = "interactions", "cachedContents"
_VIDEOS, _OPERATIONS = "videos", "operations"
_REFUSED_PROMPT = "violence"  # of which no video is made
_TTL = re.compile(r"(\d{1,9})(?:\.\d+)?s")
_USUAL_TTL_S = 3_600
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


async def interactions(served: Served, steps: Sequence[str]) -> web.StreamResponse:
    """Serve what follows `interactions` in the path. Raises Refused."""
    kept = served.state.stored[_INTERACTIONS]
    match served.request.method, steps:
        case "POST", []:
            return await _create(served)
        case "GET", [name]:
            if served.request.query.get("stream") == "true":
                return await served.other(_INTERACTIONS, "", partial(_replay, served, name))
            return await served.other(_INTERACTIONS, "", lambda: _shown(_found(served, name)))
        case "DELETE", [name]:
            return await served.other(
                _INTERACTIONS, "", lambda: kept.pop(_found(served, name)["id"]) and {}
            )
        case "POST", [name, "cancel"]:
            return await served.other(_INTERACTIONS, "", lambda: _cancel(served, name))
    raise Refused(404, f"Not found: {served.request.method} {served.request.path}")


def _found(served: Served, name: str) -> Json:
    found = served.state.stored[_INTERACTIONS].get(name)
    if found is None:
        raise Refused(404, f"Interaction not found: {name}")
    return found


def _shown(interaction: Json) -> Json:
    """Without what is kept beside it."""
    return {name: value for name, value in interaction.items() if not name.startswith("_")}


async def _replay(served: Served, name: str) -> web.Response:
    shown = _shown(_found(served, name))
    event = _event({"interaction": shown, "event_type": "interaction.completed"})
    return web.Response(body=event, headers={"Content-Type": "text/event-stream"})


def _cancel(served: Served, name: str) -> Json:
    found = _found(served, name)
    if found["status"] != "in_progress":
        raise Refused(400, f"The interaction is {found['status']}.")
    found["_work"].cancel()
    found["status"] = "cancelled"
    return _shown(found)


async def _create(served: Served) -> web.StreamResponse:
    body = await served.json(_BAD_BODY)
    if not isinstance(body, dict):
        raise Refused(400, "Invalid JSON payload received. Expected an object.")
    asked = served.cached(_read(served, body))
    asked = served.in_tier(asked, body.get("service_tier"))
    answer = _Answer(served, body, asked)
    if body.get("background") is True:
        return answer.in_background()
    return await served.generate(asked, answer.script)


def _read(served: Served, body: Json) -> ModelRequest:
    """Raises Refused."""
    model = body.get("model") or body.get("agent")
    if not isinstance(model, str) or not model:
        raise Refused(400, "Either model or agent must be set.")
    conversation = Conversation()
    if isinstance(body.get("system_instruction"), str):
        conversation.add("system", body["system_instruction"])
    before = body.get("previous_interaction_id")
    if before is not None:
        for text in _found(served, str(before))["_texts"]:
            conversation.add("user", text)
    given = body.get("input")
    if isinstance(given, str):
        conversation.add("user", given)
    elif isinstance(given, dict | list):
        for one in given if isinstance(given, list) else [given]:
            _add(served, conversation, one)
    else:
        raise Refused(400, "input must be set.")
    named = body.get("tools") or []
    tools = [
        Tool(str(one.get("name")), one.get("parameters") or {})
        for one in named
        if isinstance(one, dict) and one.get("type") == "function"
    ]
    settings = body.get("generation_config") or {}
    most = settings.get("max_output_tokens") if isinstance(settings, dict) else None
    return conversation.request(
        model,
        schema=None,
        max_output_tokens=most if isinstance(most, int) and most > 0 else None,
        thinks="pro" in model,
        called=conversation.calls(tools, "auto"),
        streamed=body.get("stream") is True,
    )


def _add(served: Served, conversation: Conversation, given: Any) -> None:
    """Add a step, or a content of the user's."""
    if not isinstance(given, dict):
        raise Refused(400, "input: expected an object")
    kind = given.get("type")
    speaker: Speaker = "assistant" if kind in ("model_output", "thought") else "user"
    if kind in ("user_input", "model_output"):
        contents = given.get("content")
        for one in contents if isinstance(contents, list) else [contents]:
            conversation.add(speaker, *_content(served, one))
    elif kind == "function_call":
        conversation.called.append(str(given.get("name")))
    elif kind == "function_result":
        result = given.get("result")
        conversation.add("tool", result if isinstance(result, str) else str(result))
    elif kind != "thought":
        conversation.add(speaker, *_content(served, given))


def _content(served: Served, given: Any) -> tuple[str | None, Attached | None]:
    if isinstance(given, str):
        return given, None
    if not isinstance(given, dict):
        raise Refused(400, "content: expected an object")
    if isinstance(given.get("uri"), str):
        return None, served.state.files.look_up(given["uri"])
    if (size := base64_bytes(given.get("data"))) is not None:
        return None, Attached(str(given.get("mime_type")), size)
    return str(given.get("text", "")), None


class _Answer:
    """One interaction in the shapes of this API."""

    def __init__(self, served: Served, body: Json, asked: ModelRequest) -> None:
        self._served = served
        self._body = body
        self._asked = asked
        self._id = f"v1_{token_urlsafe(48)}"
        self._created = _time(datetime.now(UTC))

    def script(self, fault: Fault | None) -> AnswerScript:
        composed = compose(self._asked, self._served.behaviour, fault)
        self._keep(self._whole(composed))
        steps = self._stream(composed) if self._asked.streamed else self._one(composed)

        def broken(_: int, fault: Fault) -> bytes:
            data = broken_object(self._served.api, _GARBAGE, fault)
            return b"event: error\ndata: %s\n\n" % data if self._asked.streamed else data

        return AnswerScript(
            steps,
            broken,
            composed.thoughts_tokens,
            {"x-gemini-service-tier": self._asked.tier or "standard"},
        )

    def in_background(self) -> web.Response:
        """Answer immediately; the call goes on, and counts, for as long as its answer takes."""
        served, asked, state = self._served, self._asked, self._served.state
        script = self.script(None)
        whole = state.stored[_INTERACTIONS][self._id]
        stack = ExitStack()
        call = stack.enter_context(
            state.serving(
                served.request,
                kind=asked.kind,
                model=asked.model,
                method="background",
                prompt=asked.prompt,
                size=asked.size,
                goes_on=True,
            )
        )
        begun = self._head("in_progress")
        kept = begun | {"_texts": whole["_texts"]}
        state.stored[_INTERACTIONS][self._id] = kept
        takes_s = served.behaviour.first_byte(asked.kind).draw_ms(state.random) / 1000

        async def work() -> None:
            with stack:
                try:
                    await asyncio.sleep(takes_s)
                except asyncio.CancelledError:
                    state.ledger.end(call, "failed")
                    return
                tokens = script.steps[-1].output_tokens
                state.ledger.charge(call, asked.input_tokens, tokens, script.thoughts_tokens)
                state.made(call)
                kept.update(whole)

        kept["_work"] = state.work_on(work())
        return json_response(200, begun)

    def _keep(self, whole: Json) -> None:
        if self._body.get("store") is not False or self._body.get("background") is True:
            said = [
                content["text"]
                for step in whole["steps"]
                for content in step.get("content", ())
                if "text" in content
            ]
            kept = {"_texts": [self._asked.prompt, *said]}
            self._served.state.stored[_INTERACTIONS][self._id] = whole | kept

    def _head(self, status: str) -> Json:
        named = "agent" if "agent" in self._body else "model"
        return {
            "id": self._id,
            "status": status,
            "created": self._created,
            "updated": self._created,
            "object": "interaction",
            named: self._asked.model,
        }

    def _whole(self, composed: Composed) -> Json:
        return self._ended(composed) | {"steps": list(self._steps(composed))}

    def _ended(self, composed: Composed) -> Json:
        status = {"length": "incomplete", "calls": "requires_action", "blocked": "failed"}
        read, wrote = self._asked.input_tokens, composed.output_tokens
        modalities = self._asked.input_by_modality
        usage = {
            "total_tokens": read + wrote,
            "total_input_tokens": read,
            "input_tokens_by_modality": [
                {"modality": name.lower(), "tokens": count} for name, count in modalities.items()
            ],
            "total_cached_tokens": self._asked.cached_tokens,
            "total_output_tokens": wrote - composed.thoughts_tokens,
            "total_tool_use_tokens": 0,
            "total_thought_tokens": composed.thoughts_tokens,
        }
        head = self._head(status.get(composed.finish, "completed"))
        return head | {"usage": usage, "service_tier": self._asked.tier or "standard"}

    def _steps(self, composed: Composed) -> Iterator[Json]:
        yield {"type": "thought", "signature": "CiRlbXVsYXRlZA=="}
        for call in composed.blocks:
            if call is None:
                content = [{"type": "text", "text": composed.said or ""}]
                yield {"type": "model_output", "content": content}
            else:
                arguments = orjson.loads(call.arguments)
                yield {
                    "type": "function_call",
                    "id": call.id,
                    "name": call.name,
                    "arguments": arguments,
                }

    def _one(self, composed: Composed) -> list[ScriptStep]:
        return whole_steps(composed, self._whole(composed), composed.output_tokens)

    def _stream(self, composed: Composed) -> list[ScriptStep]:
        begun = self._head("in_progress")
        head = _event({"interaction": begun, "event_type": "interaction.created"})
        status = {"interaction_id": self._id, "status": "in_progress"}
        head += _event(status | {"event_type": "interaction.status_update"})
        pieces = [
            ScriptStep(self._piece(moment), moment.output_tokens) for moment in composed.moments()
        ]
        ended = {"interaction": self._ended(composed), "event_type": "interaction.completed"}
        tail = _event(ended) + b"event: done\ndata: [DONE]\n\n"
        return stream_steps(head, pieces or [ScriptStep(b"", composed.output_tokens)], tail)

    def _piece(self, moment: Moment) -> bytes:
        place, call, events = {"index": moment.block}, moment.call, b""
        if moment.opens:
            step: Json = {"type": "model_output"}
            if call is not None:
                step = {"type": "function_call", "id": call.id, "name": call.name, "arguments": {}}
            events = _event(place | {"step": step, "event_type": "step.start"})
        delta = {"type": "text", "text": moment.text}
        if call is not None:
            delta = {"type": "arguments_delta", "arguments": moment.text}
        events += _event(place | {"delta": delta, "event_type": "step.delta"})
        return events + (_event(place | {"event_type": "step.stop"}) if moment.closes else b"")


def _event(event: Json) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["event_type"].encode(), orjson.dumps(event))


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


async def caches(served: Served, steps: Sequence[str]) -> web.StreamResponse:
    """Serve what follows `cachedContents` in the path. Raises Refused."""
    answer: Any
    match served.request.method, steps:
        case "POST", []:
            body = await served.json(_BAD_BODY)
            answer = partial(_make_cache, served, body)
        case "GET", []:
            answer = partial(_list_caches, served)
        case "GET", [name]:
            answer = partial(find_cache, served, f"{_CACHES}/{name}")
        case "PATCH", [name]:
            body = await served.json(_BAD_BODY)
            answer = partial(_change_cache, served, f"{_CACHES}/{name}", body)
        case "DELETE", [name]:
            answer = partial(_delete_cache, served, f"{_CACHES}/{name}")
        case _:
            raise Refused(404, f"Not found: {served.request.method} {served.request.path}")
    return await served.other("caches", "", answer)


def find_cache(served: Served, name: str) -> Json:
    """A cached content by its name. Raises Refused (403), as Gemini does for one that is not."""
    found = served.state.stored[_CACHES].get(name)
    if found is None:
        raise Refused(403, "CachedContent not found (or permission denied)")
    return found


def _make_cache(served: Served, body: Any) -> Json:
    model = body.get("model") if isinstance(body, dict) else None
    if not isinstance(model, str) or not model.startswith("models/"):
        raise Refused(400, "* CreateCachedContentRequest.model: unexpected model name format")
    texts = [text for text in _texts(body.get("contents")) if text]
    now = datetime.now(UTC)
    name = f"{_CACHES}/{''.join(choice(_LETTERS) for _ in range(40))}"
    made = {
        "name": name,
        "model": model,
        "createTime": _precise(now),
        "updateTime": _precise(now),
        "expireTime": _precise(now + timedelta(seconds=_ttl_s(body))),
        "displayName": str(body.get("displayName", "")),
        "usageMetadata": {"totalTokenCount": sum(map(len, texts)) // 4},
    }
    served.state.stored[_CACHES][name] = made
    return made


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("text"), str):
            yield value["text"]
        value = list(value.values())
    for one in value if isinstance(value, list) else ():
        yield from _texts(one)


def _ttl_s(body: Json) -> int:
    found = _TTL.fullmatch(str(body.get("ttl", f"{_USUAL_TTL_S}s")))
    if found is None:
        raise Refused(400, "Invalid value at 'cached_content.ttl'")
    return int(found[1])


def _precise(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _change_cache(served: Served, name: str, body: Any) -> Json:
    found = find_cache(served, name)
    now = datetime.now(UTC)
    found["updateTime"] = _precise(now)
    found["expireTime"] = _precise(now + timedelta(seconds=_ttl_s(body)))
    return found


def _delete_cache(served: Served, name: str) -> Json:
    del served.state.stored[_CACHES][find_cache(served, name)["name"]]
    return {}


def _list_caches(served: Served) -> Json:
    names = sorted(served.state.stored[_CACHES])
    size = int(served.request.query.get("pageSize") or 50)
    later = [name for name in names if name > served.request.query.get("pageToken", "")]
    shown = [served.state.stored[_CACHES][name] for name in later[:size]]
    body: Json = {"cachedContents": shown} if shown else {}
    return body | ({"nextPageToken": later[size - 1]} if len(later) > size else {})


async def begin_video(served: Served, model: str, body: Any) -> web.Response:
    """Serve predictLongRunning: answer immediately; the operation goes on, and counts, for as long
    as a picture takes. Raises Refused."""
    prompt = _video_prompt(body)
    state, stack = served.state, ExitStack()
    call = stack.enter_context(
        state.serving(
            served.request,
            kind="image_generation",
            model=model,
            method="predictLongRunning",
            prompt=prompt,
            size=CallSize(),
            goes_on=True,
        )
    )
    settings = body.get("parameters") or {}
    count = settings.get("sampleCount", settings.get("numberOfVideos", 1))
    made: Json = {"name": f"models/{model}/{_OPERATIONS}/{_letters(12)}"}
    state.stored[_OPERATIONS][made["name"]] = made
    takes_s = served.behaviour.first_byte("image_generation").draw_ms(state.random) / 1000

    async def work() -> None:
        with stack:
            await asyncio.sleep(takes_s)
            state.ledger.charge(call, 0, 0)
            state.made(call)
            made.update(_ended_video(served, prompt, count))

    state.work_on(work())
    return json_response(200, dict(made))


def _video_prompt(body: Any) -> str:
    instances = body.get("instances") if isinstance(body, dict) else None
    first = instances[0] if isinstance(instances, list) and instances else None
    prompt = first.get("prompt") if isinstance(first, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise Refused(400, "`prompt` must be set in `instances[0]`.")
    return prompt


def _ended_video(served: Served, prompt: str, count: int) -> Json:
    answer: Json = {"@type": "type.googleapis.com/google.ai.generativelanguage.v1beta."}
    answer["@type"] += "PredictLongRunningResponse"
    if _REFUSED_PROMPT in prompt:
        reason = "Sorry, we can't create videos with this prompt."
        filtered = {"raiMediaFilteredCount": count, "raiMediaFilteredReasons": [reason]}
        return {"done": True, "response": answer | {"generateVideoResponse": filtered}}
    samples = []
    for _ in range(count):
        name = _letters(12)
        served.state.stored[_VIDEOS][name] = {"data": b"\0\0\0\x18ftypmp42" + prompt.encode()}
        uri = f"https://generativelanguage.googleapis.com/v1beta/files/{name}:download?alt=media"
        samples.append({"video": {"uri": uri}})
    return {
        "done": True,
        "response": answer | {"generateVideoResponse": {"generatedSamples": samples}},
    }


def _letters(count: int) -> str:
    return "".join(choice(_LETTERS) for _ in range(count))


async def operations(served: Served, model: str, name: str) -> web.StreamResponse:
    """Serve an operation of a model; without a name, the list of them. Raises Refused."""
    kept = served.state.stored[_OPERATIONS]
    prefix = f"models/{model}/{_OPERATIONS}/"
    if not name:
        found = [one for key, one in sorted(kept.items()) if key.startswith(prefix)]
        return await served.other(_OPERATIONS, "", lambda: {"operations": found} if found else {})
    return await served.other(_OPERATIONS, "", lambda: dict(_operation(kept, prefix + name)))


def _operation(kept: Json, name: str) -> Json:
    if name not in kept:
        raise Refused(404, "Requested entity was not found.")
    found: Json = kept[name]
    return found


async def video(served: Served, name: str) -> web.StreamResponse | None:
    """Serve the bytes of a video; None for a file that is none."""
    found = served.state.stored[_VIDEOS].get(name)
    if found is None:
        return None

    async def answer() -> web.Response:
        return web.Response(body=found["data"], headers={"Content-Type": "video/mp4"})

    return await served.other(_VIDEOS, "", answer)
