"""Stored objects of Gemini's API: interactions, cached contents, videos, and batches.

    https://ai.google.dev/gemini-api/docs/interactions
    https://ai.google.dev/gemini-api/docs/caching
    https://ai.google.dev/gemini-api/docs/video
    https://ai.google.dev/api/batch-api

Invariants: an interaction is stored unless `store` is false, and the text of earlier ones is input
of the next; in the background it counts as in flight until it has ended, and so does an operation;
ids have the length of real ones; a video's URI has Google's host. Requests of a batch come inline
or as an uploaded file of JSON lines, and their results in the same form, in the order of the
requests; a batch that expires has no results.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from secrets import choice, token_hex, token_urlsafe
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator.batches import (
    ENDED,
    BatchState,
    JsonLinesFile,
    LineWork,
    ProviderBatch,
    ProviderBatchLine,
)
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
    gemini_thinks,
    get,
)
from tidegate.emulator.delivery import (
    EMULATED,
    AnswerScript,
    ScriptStep,
    Served,
    broken_object,
    json_response,
    moment_steps,
    stream_steps,
    whole_steps,
)
from tidegate.emulator.dialect import Fault, Json, Refused, rfc3339
from tidegate.emulator.state import StoredFile

_BAD_BODY = "Invalid JSON payload received. {}"
_GARBAGE = b'{"event_type": "step.delta", "ind'
_INTERACTIONS, _CACHES, _STORES = "interactions", "cachedContents", "fileSearchStores"
_VIDEOS, _OPERATIONS, _WORK = "videos", "operations", "work"
_REFUSED_PROMPT = "violence"  # no video is made for such a prompt
_TTL = re.compile(r"(\d{1,9})(?:\.\d+)?s")
_USUAL_TTL_S = 3_600
_MOST_CACHES = 1_000  # on a page
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


async def interactions(served: Served, steps: Sequence[str]) -> web.StreamResponse:
    """Serve what follows `interactions` in the path. Raises Refused."""
    stored = served.state.stored[_INTERACTIONS]
    match served.request.method, steps:
        case "POST", []:
            return await _create(served)
        case "GET", [name]:
            if served.request.query.get("stream") == "true":
                return await served.other(_INTERACTIONS, "", partial(_replay, served, name))
            return await served.other(_INTERACTIONS, "", lambda: _public(_found(served, name)))
        case "DELETE", [name]:
            return await served.other(
                _INTERACTIONS, "", lambda: stored.pop(_found(served, name)["id"]) and {}
            )
        case "POST", [name, "cancel"]:
            return await served.other(_INTERACTIONS, "", lambda: _cancel(served, name))
    raise served.not_found()


def _found(served: Served, name: str) -> Json:
    found = served.state.stored[_INTERACTIONS].get(name)
    if found is None:
        raise Refused(404, f"Interaction not found: {name}")
    return found


def _public(interaction: Json) -> Json:
    """Return an interaction without its internal fields."""
    return {name: value for name, value in interaction.items() if not name.startswith("_")}


async def _replay(served: Served, name: str) -> web.Response:
    interaction = _public(_found(served, name))
    event = _event({"interaction": interaction, "event_type": "interaction.completed"})
    return web.Response(body=event, headers={"Content-Type": "text/event-stream"})


def _cancel(served: Served, name: str) -> Json:
    found = _found(served, name)
    if found["status"] != "in_progress":
        raise Refused(400, f"The interaction is {found['status']}.")
    found["_work"].cancel()
    found["status"] = "cancelled"
    return _public(found)


async def _create(served: Served) -> web.StreamResponse:
    body = await served.json(_BAD_BODY)
    if not isinstance(body, dict):
        raise Refused(400, "Invalid JSON payload received. Expected an object.")
    parsed = served.cached(_read(served, body))
    parsed = served.in_tier(parsed, body.get("service_tier"))
    answer = _Answer(served, body, parsed)
    if body.get("background") is True:
        return answer.in_background()
    return await served.generate(parsed, answer.script)


def _read(served: Served, body: Json) -> ModelRequest:
    """Parse a request. Raises Refused."""
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
    named = body.get("tools")
    tools = [
        Tool(str(one.get("name")), one.get("parameters") or {})
        for one in (named if isinstance(named, list) else [])
        if isinstance(one, dict) and one.get("type") == "function"
    ]
    settings = body.get("generation_config") or {}
    most = settings.get("max_output_tokens") if isinstance(settings, dict) else None
    return conversation.request(
        model,
        schema=None,
        max_output_tokens=most if isinstance(most, int) and most > 0 else None,
        thinks=gemini_thinks(model),
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
    """An interaction in the form of this API."""

    def __init__(self, served: Served, body: Json, parsed: ModelRequest) -> None:
        self._served = served
        self._body = body
        self._parsed = parsed
        self._id = f"v1_{token_urlsafe(48)}"
        self._created = _time(datetime.now(UTC))

    def script(self, fault: Fault | None) -> AnswerScript:
        composed = compose(self._parsed, self._served.behaviour, fault)
        self._store(self._whole(composed))
        steps = self._stream(composed) if self._parsed.streamed else self._one(composed)

        def broken(_: int, fault: Fault) -> bytes:
            data = broken_object(self._served.api, _GARBAGE, fault)
            return b"event: error\ndata: %s\n\n" % data if self._parsed.streamed else data

        return AnswerScript(
            steps,
            broken,
            composed.thoughts_tokens,
            {"x-gemini-service-tier": self._parsed.tier or "standard"},
        )

    def in_background(self) -> web.Response:
        """Answer immediately; the call continues, and counts, for as long as its answer takes."""
        served, parsed = self._served, self._parsed
        script = self.script(None)
        stored = served.state.stored[_INTERACTIONS]
        whole, begun = stored[self._id], self._head("in_progress")
        entry = stored[self._id] = begun | {"_texts": whole["_texts"]}
        _, entry["_work"] = served.in_background(
            "background", parsed, partial(entry.update, whole), script
        )
        return json_response(200, begun)

    def _store(self, whole: Json) -> None:
        if self._body.get("store") is not False or self._body.get("background") is True:
            texts = [
                content["text"]
                for step in whole["steps"]
                for content in step.get("content", ())
                if "text" in content
            ]
            internal = {"_texts": [self._parsed.prompt, *texts]}
            self._served.state.stored[_INTERACTIONS][self._id] = whole | internal

    def _head(self, status: str) -> Json:
        named = "agent" if "agent" in self._body else "model"
        return {
            "id": self._id,
            "status": status,
            "created": self._created,
            "updated": self._created,
            "object": "interaction",
            named: self._parsed.model,
        }

    def _whole(self, composed: Composed) -> Json:
        return self._ended(composed) | {"steps": list(self._steps(composed))}

    def _ended(self, composed: Composed) -> Json:
        status = {"length": "incomplete", "calls": "requires_action", "blocked": "failed"}
        read, wrote = self._parsed.input_tokens, composed.output_tokens
        modalities = self._parsed.input_by_modality
        usage = {
            "total_tokens": read + wrote,
            "total_input_tokens": read,
            "input_tokens_by_modality": [
                {"modality": name.lower(), "tokens": count} for name, count in modalities.items()
            ],
            "total_cached_tokens": self._parsed.cached_tokens,
            "total_output_tokens": wrote - composed.thoughts_tokens,
            "total_tool_use_tokens": 0,
            "total_thought_tokens": composed.thoughts_tokens,
        }
        head = self._head(status.get(composed.finish, "completed"))
        return head | {"usage": usage, "service_tier": self._parsed.tier or "standard"}

    def _steps(self, composed: Composed) -> Iterator[Json]:
        """Yield the steps of an answer. If its bound has cut the last call, that is not JSON, and
        left out."""
        yield {"type": "thought", "signature": "CiRlbXVsYXRlZA=="}
        whole = composed.blocks[:-1] if composed.finish == "length" else composed.blocks
        for call in composed.blocks:
            if call is None:
                content = [{"type": "text", "text": composed.whole_text or ""}]
                yield {"type": "model_output", "content": content}
            elif call in whole:
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
        pieces = moment_steps(composed, self._piece)
        ended = {"interaction": self._ended(composed), "event_type": "interaction.completed"}
        tail = _event(ended) + b"event: done\ndata: [DONE]\n\n"
        return stream_steps(head, pieces, tail, composed.output_tokens)

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
            raise served.not_found()
    return await served.other("caches", "", answer)


async def file_search_stores(served: Served, steps: Sequence[str]) -> web.StreamResponse:
    """Serve what follows `fileSearchStores` in the path. Raises Refused."""
    stored, answer = served.state.stored[_STORES], partial(served.other, _STORES, "")
    match served.request.method, steps:
        case "POST", []:
            body = await served.json(_BAD_BODY)
            return await answer(partial(_make_store, served, body))
        case "GET", []:
            return await answer(lambda: {_STORES: list(map(_public, stored.values()))})
        case "GET", [name]:
            return await answer(lambda: _public(find_store(served, name)))
        case "DELETE", [name]:
            return await answer(lambda: stored.pop(find_store(served, name)["_id"]) and {})
        case "POST", [call] if call.endswith(":importFile"):
            body = await served.json(_BAD_BODY)
            return await answer(partial(_import, served, call.partition(":")[0], body))
        case "GET", [name, "documents"]:
            return await answer(
                lambda: {"documents": [*find_store(served, name)["_documents"].values()]}
            )
        case method, [name, *below]:
            path = "/".join(below)
            return await answer(partial(_below_store, served, name, path, ends=method == "DELETE"))
    raise Refused(404, f"Not found: {served.request.method} {served.request.path}")


def find_store(served: Served, name: str) -> Json:
    """Return a store. Raises Refused (403), as Gemini does for a missing one."""
    found = served.state.stored[_STORES].get(name)
    if found is None:
        raise Refused(403, f"You do not have permission to access the FileSearchStore {name}.")
    return found


def _make_store(served: Served, body: Any) -> Json:
    label = str(body.get("displayName", "")) if isinstance(body, dict) else ""
    name, now = f"{label.lower().replace(' ', '')[:20]}-{_letters(12)}", _precise(datetime.now(UTC))
    made = {"name": f"{_STORES}/{name}", "displayName": label, "createTime": now, "updateTime": now}
    served.state.stored[_STORES][name] = made | {"_id": name, "_documents": {}, "_operations": {}}
    return made


def _import(served: Served, store: str, body: Any) -> Json:
    named = body.get("fileName") if isinstance(body, dict) else None
    return index(served, store, "", served.state.files.find(str(named)))


def index(served: Served, store: str, below: str, file: StoredFile) -> Json:
    """Create a document from a file, by an operation that has ended when it is first read."""
    found, document, operation = find_store(served, store), _letters(12), _letters(12)
    parent = f"{_STORES}/{store}"
    made = {"name": f"{parent}/documents/{document}", "displayName": file.display_name}
    found["_documents"][f"documents/{document}"] = made | {"sizeBytes": str(file.size_bytes)}
    name = f"{parent}/{below}operations/{operation}"
    response = {"parent": parent, "documentName": made["name"]}
    found["_operations"][f"{below}operations/{operation}"] = {
        "name": name,
        "done": True,
        "response": response,
    }
    return {"name": name}


def _below_store(served: Served, store: str, below: str, *, ends: bool) -> Json:
    found = find_store(served, store)
    for objects in (found["_documents"], found["_operations"]):
        if below in objects:
            document: Json = objects.pop(below) if ends else objects[below]
            return {} if ends else document
    raise Refused(404, "Requested entity was not found.")


def find_cache(served: Served, name: str) -> Json:
    """Return a cached content by its name. Raises Refused (403), as Gemini does for a missing
    one."""
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
    name = f"{_CACHES}/{_letters(40)}"
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
    given = get(served.request.query, "pageSize") or "50"
    if not given.isdecimal() or not 1 <= int(given[:9]) <= _MOST_CACHES:
        raise Refused(400, f"* ListCachedContentsRequest.page_size: from 1 to {_MOST_CACHES}")
    size = int(given)
    later = [name for name in names if name > served.request.query.get("pageToken", "")]
    listed = [served.state.stored[_CACHES][name] for name in later[:size]]
    body: Json = {"cachedContents": listed} if listed else {}
    return body | ({"nextPageToken": later[size - 1]} if len(later) > size else {})


async def begin_video(served: Served, model: str, body: Any) -> web.Response:
    """Serve predictLongRunning: answer immediately; the operation continues, and counts, for as
    long as a picture takes. Raises Refused."""
    prompt = _video_prompt(body)
    settings = parameters_of(body)
    count = settings.get("sampleCount", settings.get("numberOfVideos", 1))
    if not isinstance(count, int):
        raise Refused(400, "Invalid JSON payload received. `sampleCount` must be a number.")
    made: Json = {"name": f"models/{model}/{_OPERATIONS}/{_letters(12)}"}
    parsed = ModelRequest("image_generation", model, prompt, prompt, (), {}, choices=0)
    _, work = served.in_background(
        "predictLongRunning", parsed, lambda: made.update(_ended_video(served, prompt, count))
    )
    served.state.stored[_WORK][made["name"]] = {"task": work}
    served.state.stored[_OPERATIONS][made["name"]] = made
    return json_response(200, dict(made))


def parameters_of(body: Any) -> Json:
    """Return the parameters of a request for pictures or videos. Raises Refused."""
    found = body.get("parameters") or {}
    if not isinstance(found, dict):
        raise Refused(400, "Invalid JSON payload received. `parameters` must be an object.")
    return found


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
    """Serve an operation of a model, or without a name the list of them. None can be cancelled.
    Raises Refused."""
    stored, method = served.state.stored[_OPERATIONS], served.request.method
    prefix = f"models/{model}/{_OPERATIONS}/"
    if method == "POST":
        name, _, act = name.partition(":")
        found = _operation(stored, prefix + name)
        if act != "wait":
            raise Refused(501, "Operation is not implemented, or supported, or enabled.")
        await asyncio.wait({served.state.stored[_WORK][found["name"]]["task"]})
    if method == "DELETE":
        key = prefix + name
        return await served.other(
            _OPERATIONS, "", lambda: stored.pop(_operation(stored, key)["name"]) and {}
        )
    if not name:
        of_model = [one for key, one in sorted(stored.items()) if key.startswith(prefix)]
        return await served.other(
            _OPERATIONS, "", lambda: {"operations": of_model} if of_model else {}
        )
    return await served.other(_OPERATIONS, "", lambda: dict(_operation(stored, prefix + name)))


def _operation(stored: Json, name: str) -> Json:
    if name not in stored:
        raise Refused(404, "Requested entity was not found.")
    found: Json = stored[name]
    return found


async def video(served: Served, name: str) -> web.StreamResponse | None:
    """Serve the bytes of a video; return None for any other file."""
    found = served.state.stored[_VIDEOS].get(name)
    if found is None:
        return None

    async def answer() -> web.Response:
        return web.Response(body=found["data"], headers={"Content-Type": "video/mp4"})

    return await served.other(_VIDEOS, "", answer)


WINDOW_S = 48 * 3600.0
MOST_INLINE_BYTES = 20 * 1024 * 1024
_BATCH_TYPE = "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch"
_STATES: dict[BatchState, str] = {
    "validating": "BATCH_STATE_PENDING",
    "in_progress": "BATCH_STATE_RUNNING",
    "cancelling": "BATCH_STATE_RUNNING",
    "finalizing": "BATCH_STATE_RUNNING",
    "completed": "BATCH_STATE_SUCCEEDED",
    "failed": "BATCH_STATE_FAILED",
    "cancelled": "BATCH_STATE_CANCELLED",
    "expired": "BATCH_STATE_EXPIRED",
}
_INPUT_CONFIG = "* BatchGenerateContentRequest.batch.input_config"

LineParser = Callable[[str, Any], LineWork]  # a model and a request; raises Refused


async def create_batch(
    served: Served, model: str, body: Any, work: LineParser
) -> web.StreamResponse:
    """Serve batchGenerateContent. Raises Refused."""
    return await served.other(
        "batches", model, partial(_create_batch, served, model, body, work), label=served.called
    )


async def batches(served: Served, steps: Sequence[str]) -> web.StreamResponse:
    """Serve what follows `batches` in the path. Raises Refused."""
    answer: Callable[[], Json]
    match served.request.method, steps:
        case "GET", []:
            answer = partial(_list_batches, served)
        case "POST", [call] if call.endswith(":cancel"):
            answer = partial(_cancel_batch, served, call.removesuffix(":cancel"))
        case "GET", [name]:
            answer = partial(_retrieve_batch, served, name)
        case "DELETE", [name]:
            answer = partial(_delete_batch, served, name)
        case _:
            raise served.not_found()
    return await served.other("batches", "", answer, label=served.called)


async def download(served: Served, name: str) -> web.StreamResponse:
    """Serve the content of a file of results. Raises Refused."""
    return await served.other("files", "", partial(_download, served, name), label=served.called)


def results_file(served: Served, name: str) -> Json | None:
    """Return a file of results in the form of the Files API."""
    file = served.state.batches.file(f"files/{name}")
    if file is None:
        return None
    return {
        "name": file.id,
        "displayName": file.filename,
        "mimeType": "application/jsonl",
        "sizeBytes": str(len(file.data)),
        "createTime": rfc3339(file.created_ns),
        "state": "ACTIVE",
        "source": "GENERATED",
        "downloadUri": f"http://{served.request.host}/v1beta/{file.id}:download?alt=media",
    }


async def _download(served: Served, name: str) -> web.Response:
    file = served.state.batches.file(f"files/{name}")
    if file is None:
        raise Refused(
            403, f"You do not have permission to access the File {name} or it may not exist."
        )
    return web.Response(body=file.data, headers=EMULATED | {"Content-Type": "application/jsonl"})


async def _create_batch(served: Served, model: str, body: Any, work: LineParser) -> web.Response:
    batch = get(body, "batch") if isinstance(body, dict) else None
    batch = batch if isinstance(batch, dict) else {}
    name, source = get(batch, "displayName"), get(batch, "inputConfig")
    if not isinstance(source, dict):
        raise Refused(400, f"{_INPUT_CONFIG}: must be set")
    file_name, inline = get(source, "fileName"), get(source, "requests")
    if isinstance(file_name, str):
        given: Any = list(_of_file(served, file_name))
    else:
        given = get(inline, "requests") if isinstance(inline, dict) else None
        if not isinstance(given, list) or not given:
            raise Refused(400, f"{_INPUT_CONFIG}: requests or a file name must be set")
        if len(await served.request.read()) > MOST_INLINE_BYTES:
            raise Refused(400, "Request payload size exceeds the limit: 20971520 bytes.")
    lines = [_line(index, item, model, work) for index, item in enumerate(given)]
    _check_room(served, model, lines)
    facts = {"displayName": str(name or ""), "fileName": file_name}
    created = served.state.batches.create(
        "batches/", "gemini", model, lines, served.behaviour.batches, WINDOW_S, facts
    )
    served.state.batches.advance()
    return json_response(200, _show_batch(served, created))


def _of_file(served: Served, name: str) -> Iterator[Any]:
    data = served.state.files.find(name).content
    if data is None:
        raise Refused(
            400, f"{_INPUT_CONFIG}.file_name: {name} is not of the type application/jsonl"
        )
    for number, text in enumerate(data.splitlines(), 1):
        if not text.strip():
            continue
        try:
            yield orjson.loads(text)
        except orjson.JSONDecodeError as broken:
            raise Refused(400, f"Invalid JSON in line {number} of {name}: {broken}") from None


def _line(index: int, item: Any, model: str, work: LineParser) -> ProviderBatchLine:
    item = item if isinstance(item, dict) else {}
    metadata = item.get("metadata")
    key = str(item.get("key") or index)
    given = metadata if isinstance(metadata, dict) else None
    return ProviderBatchLine.of(key, partial(work, model, item.get("request")), given)


def _check_room(served: Served, model: str, lines: Sequence[ProviderBatchLine]) -> None:
    """Raise Refused (429) if a limit of batches is exceeded."""
    pace = served.behaviour.batches
    open_batches = list(served.state.batches.open("gemini"))
    tokens = sum(batch.enqueued_tokens(model) for batch in open_batches)
    tokens += sum(line.input_tokens for line in lines)
    full = pace.open_batches is not None and len(open_batches) >= pace.open_batches
    if full or (pace.enqueued_tokens is not None and tokens > pace.enqueued_tokens):
        raise Refused(429, "Resource has been exhausted (e.g. check quota).")


def _found_batch(served: Served, name: str) -> ProviderBatch:
    missing = "Requested entity was not found."
    return served.state.batches.find(f"batches/{name}", "gemini", missing)


def _retrieve_batch(served: Served, name: str) -> Json:
    return _show_batch(served, _found_batch(served, name))


def _list_batches(served: Served) -> Json:
    query = served.request.query
    size, token = get(query, "pageSize") or "50", get(query, "pageToken") or "0"
    if not size.isdecimal() or not token.isdecimal() or int(size) < 1:
        raise Refused(400, "* ListBatchesRequest: page_size or page_token is invalid")
    batches = served.state.batches.newest("gemini")
    begin, end = int(token), int(token) + int(size)
    page: Json = {"operations": [_show_batch(served, batch) for batch in batches[begin:end]]}
    return page | ({"nextPageToken": str(end)} if end < len(batches) else {})


def _cancel_batch(served: Served, name: str) -> Json:
    served.state.batches.cancel(_found_batch(served, name))
    return {}


def _delete_batch(served: Served, name: str) -> Json:
    served.state.batches.delete(_found_batch(served, name))
    return {}


def _show_batch(served: Served, batch: ProviderBatch) -> Json:
    ended = batch.state in ENDED
    metadata: Json = {
        "@type": _BATCH_TYPE,
        "name": batch.id,
        "model": f"models/{batch.model}",
        "displayName": batch.facts["displayName"],
        "state": _STATES[batch.state],
        "createTime": rfc3339(batch.created_ns),
        "updateTime": rfc3339(batch.ended_ns or batch.processed_ns or batch.created_ns),
        "batchStats": _batch_stats(batch),
    }
    if file_name := batch.facts["fileName"]:
        metadata["inputConfig"] = {"fileName": file_name}
    operation: Json = {"name": batch.id, "metadata": metadata}
    if not ended:
        return operation
    operation["done"] = True
    metadata["endTime"] = rfc3339(batch.ended_ns)
    if batch.state == "completed":
        metadata["output"] = _batch_output(served, batch)
        operation["response"] = metadata["output"] | {"@type": f"{_BATCH_TYPE}Output"}
    else:
        messages = {"cancelled": "The batch was cancelled.", "expired": "The batch has expired."}
        code = 1 if batch.state == "cancelled" else 4
        operation["error"] = {"code": code, "message": messages[batch.state]}
    return operation


def _batch_stats(batch: ProviderBatch) -> Json:
    """Return counts in the API's form: as strings, and without zeros."""
    counts = {
        "requestCount": len(batch.lines),
        "successfulRequestCount": batch.count("succeeded"),
        "failedRequestCount": batch.count("errored", "expired", "canceled"),
        "pendingRequestCount": batch.count("processing"),
    }
    return {name: str(count) for name, count in counts.items() if count}


def _batch_output(served: Served, batch: ProviderBatch) -> Json:
    if not batch.facts["fileName"]:
        inlined = [_result(served, line) for line in batch.lines]
        embeds = any(line.work is not None and line.work.method == "embed" for line in batch.lines)
        name = "inlinedEmbedContentResponses" if embeds else "inlinedResponses"
        return {name: {"inlinedResponses": inlined}}
    if "output" not in batch.files:
        results = ({"key": line.custom_id} | _result(served, line) for line in batch.lines)
        data = b"".join(orjson.dumps(result) + b"\n" for result in results)
        file_id = f"files/batch-{token_hex(8)}"
        label = f"{batch.id.removeprefix('batches/')}.jsonl"
        served.state.batches.keep(
            JsonLinesFile(file_id, label, "batch_output", data, batch.ended_ns)
        )
        batch.files["output"] = file_id
    return {"responsesFile": batch.files["output"]}


def _result(served: Served, line: ProviderBatchLine) -> Json:
    result: Json = {} if line.metadata is None else {"metadata": line.metadata}
    if line.answered is not None:
        return result | {"response": line.answered.body}
    assert line.refused is not None  # all other lines of a completed batch have an answer
    code = 3 if line.refused.status == 400 else 13  # INVALID_ARGUMENT, INTERNAL
    return result | {"error": {"code": code, "message": line.refused.message}}
