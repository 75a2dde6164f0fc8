"""OpenAI's responses; stored ones, conversations and chat completions; work in the background.

    https://platform.openai.com/docs/api-reference/responses

A background response is answered immediately and counts as in flight for as long as the same answer
would have taken, with or without its client.

Invariants: an account has one list of each kind, shared by all clients with its key; every event of
a streamed response has the next `sequence_number`, and the last one is the whole response.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from secrets import token_hex
from typing import Any
from uuid import uuid4

import orjson
from aiohttp import web

from tidegate.emulator.content import (
    SIGNATURE,
    CalledFunction,
    Composed,
    ModelRequest,
    Moment,
    compose,
    new_response_id,
)
from tidegate.emulator.delivery import (
    EMULATED,
    AnswerScript,
    ScriptStep,
    Served,
    data_event,
    json_response,
    moment_steps,
    named_event,
    stream_steps,
    whole_steps,
)
from tidegate.emulator.dialect import Fault, FaultName, Json, Refused, listing
from tidegate.emulator.settings import Behaviour
from tidegate.emulator.state import EmulatorState

_NOT_JSON = "We could not parse the JSON body of your request."
_MOST_ITEMS = 100


GARBAGE = b'{"type": "response.output_text.delta", "del'
_ECHOED: Json = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
}


def response_script(
    broken: Callable[[Fault], bytes],
    body: Json,
    parsed: ModelRequest,
    behaviour: Behaviour,
    fault: Fault | None,
) -> AnswerScript:
    """Return the answer to a request with this `body`; `broken` returns the body of a fault."""
    answer = _ResponseObject(parsed, body, compose(parsed, behaviour, fault))
    steps = answer.stream() if parsed.streamed else answer.whole()

    def broken_event(index: int, fault: Fault) -> bytes:
        data = broken(fault)
        if fault.fault is FaultName.GARBAGE:
            return b"event: response.output_text.delta\n" + data_event(data)
        return answer.failed(steps[:index], orjson.loads(data)["error"])

    return AnswerScript(
        steps,
        broken_event if parsed.streamed else lambda _, fault: broken(fault),
        answer.composed.thoughts_tokens,
        {"x-request-id": answer.id},
    )


class _ResponseObject:
    """A response in the form of this API."""

    def __init__(self, parsed: ModelRequest, body: Json, composed: Composed) -> None:
        self._parsed = parsed
        self.composed = composed
        self.id = f"resp_{new_response_id()}"
        self._body = body
        self._first = 1 if composed.thoughts_tokens else 0  # the first item has the thoughts
        self._created = int(time.time())
        self._sequence = count()

    def whole(self) -> list[ScriptStep]:
        return whole_steps(self.composed, self._ended(), self.composed.output_tokens)

    def _begun(self) -> bytes:
        begun = self._response("in_progress", [], None)
        head = self._event("response.created", response=begun)
        return head + self._event("response.in_progress", response=begun)

    def failed(self, sent: Sequence[ScriptStep], error: Json) -> bytes:
        """Return the end of a stream that fails after these steps: the error, and the failed
        response."""
        self._sequence = count(sum(step.data.count(b"\n\n") for step in sent))
        error = error | {"code": error["code"] or error["type"]}
        events = (b"" if sent else self._begun()) + self._event("error", error=error)
        details = {"code": error["code"], "message": error["message"]}
        ended = self._response("failed", [], None) | {"error": details}
        return events + self._event("response.failed", response=ended)

    def stream(self) -> list[ScriptStep]:
        head = self._begun()
        thoughts = self.composed.thoughts_tokens
        pieces = [ScriptStep(self._reasoned(), thoughts)] if thoughts else []
        pieces += moment_steps(self.composed, self._piece)
        ended = self._ended()
        tail = self._event(f"response.{ended['status']}", response=ended)
        return stream_steps(head, pieces, tail, self.composed.output_tokens)

    def _piece(self, moment: Moment) -> bytes:
        events = b""
        if moment.opens:
            events += self._opened(moment)
        place = {"item_id": self._item_id(moment.block), "output_index": self._index(moment)}
        if moment.call is None:
            text = {**place, "content_index": 0, "delta": moment.text, "logprobs": []}
            events += self._event("response.output_text.delta", **text)
        else:
            name = "response.function_call_arguments.delta"
            events += self._event(name, **place, delta=moment.text)
        return events + (self._closed(moment) if moment.closes else b"")

    def _opened(self, moment: Moment) -> bytes:
        item = self._item(moment.block, moment.call, "in_progress")
        index = self._index(moment)
        events = self._event("response.output_item.added", output_index=index, item=item)
        if moment.call is None:
            events += self._event(
                "response.content_part.added", **self._content(moment), part=_text_part("")
            )
        return events

    def _closed(self, moment: Moment) -> bytes:
        if moment.call is None:
            text = self.composed.whole_text or ""
            events = self._event(
                "response.output_text.done", **self._content(moment), text=text, logprobs=[]
            )
            events += self._event(
                "response.content_part.done", **self._content(moment), part=_text_part(text)
            )
        else:
            events = self._event(
                "response.function_call_arguments.done",
                item_id=self._item_id(moment.block),
                output_index=self._index(moment),
                name=moment.call.name,
                arguments=moment.call.arguments,
            )
        item = self._item(moment.block, moment.call, self._status(moment.block))
        index = self._index(moment)
        return events + self._event("response.output_item.done", output_index=index, item=item)

    def _index(self, moment: Moment) -> int:
        return moment.block + self._first

    def _reasoning(self) -> Json:
        """Return the item of the thoughts, which are not shown, and encrypted only if that is
        requested."""
        item: Json = {"id": f"rs_{self.id}", "type": "reasoning", "summary": []}
        if "reasoning.encrypted_content" in (self._body.get("include") or ()):
            item["encrypted_content"] = SIGNATURE
        return item

    def _reasoned(self) -> bytes:
        item = self._reasoning()
        return b"".join(
            self._event(f"response.output_item.{name}", output_index=0, item=item)
            for name in ("added", "done")
        )

    def _content(self, moment: Moment) -> Json:
        item_id = self._item_id(moment.block)
        return {"item_id": item_id, "output_index": self._index(moment), "content_index": 0}

    def _item_id(self, block: int) -> str:
        return f"item_{self.id}_{block}"

    def _status(self, block: int) -> str:
        """Return the status of an ended item: the bound of the answer cuts the last one."""
        cut = self.composed.finish == "length" and block == len(self.composed.blocks) - 1
        return "incomplete" if cut else "completed"

    def _item(self, block: int, call: CalledFunction | None, status: str) -> Json:
        done = status != "in_progress"
        if call is not None:
            return {
                "id": self._item_id(block),
                "type": "function_call",
                "status": status,
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments if done else "",
            }
        return {
            "id": self._item_id(block),
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [_text_part(self.composed.whole_text or "")] if done else [],
        }

    def _ended(self) -> Json:
        reason = {"length": "max_output_tokens", "blocked": "content_filter"}.get(
            self.composed.finish
        )
        output = [self._reasoning()] if self._first else []
        output += [
            self._item(block, call, self._status(block))
            for block, call in enumerate(self.composed.blocks)
        ]
        status = "incomplete" if reason else "completed"
        ended = self._response(status, output, self._usage())
        return ended | {"incomplete_details": {"reason": reason} if reason else None}

    def _response(self, status: str, output: list[Json], usage: Json | None) -> Json:
        echoed = {name: self._body.get(name, value) for name, value in _ECHOED.items()}
        return echoed | {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._parsed.model,
            "service_tier": self._parsed.tier or "default",
            "output": output,
            "usage": usage,
        }

    def _event(self, name: str, /, **fields: object) -> bytes:
        return named_event({"type": name, "sequence_number": next(self._sequence), **fields})

    def _usage(self) -> Json:
        read, wrote = self._parsed.input_tokens, self.composed.output_tokens
        return {
            "input_tokens": read,
            "input_tokens_details": {
                "cached_tokens": self._parsed.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": wrote,
            "output_tokens_details": {"reasoning_tokens": self.composed.thoughts_tokens},
            "total_tokens": read + wrote,
        }


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


@dataclass(slots=True)
class StoredResponse:
    """A response, with its input items. `work`: the task that still generates it."""

    document: Json
    input_items: list[Json]
    work: asyncio.Task[None] | None = None


@dataclass(slots=True)
class StoredThings:
    """All stored objects of an account, in the order of their creation."""

    responses: dict[str, StoredResponse] = field(default_factory=dict)
    conversations: dict[str, Json] = field(default_factory=dict)
    items: dict[str, list[Json]] = field(default_factory=dict)
    completions: dict[str, Json] = field(default_factory=dict)
    messages: dict[str, list[Json]] = field(default_factory=dict)
    deferred: dict[str, bytes | None] = field(default_factory=dict)


def things_of(state: EmulatorState) -> StoredThings:
    found = state.kept.get("openai")
    if not isinstance(found, StoredThings):
        found = state.kept["openai"] = StoredThings()
    return found


# Storing the results of calls


def check_named(served: Served, body: Json) -> None:
    """Raise Refused for a response or a conversation that does not exist."""
    things = things_of(served.state)
    before = body.get("previous_response_id")
    if before is not None and str(before) not in things.responses:
        raise Refused(
            400,
            f"Previous response with id '{before}' not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    named = body.get("conversation")
    if (found := named.get("id") if isinstance(named, dict) else named) is not None:
        _conversation(things, str(found))


def keep_response(
    served: Served, body: Json, script: AnswerScript, fault: Fault | None
) -> AnswerScript:
    """Store a response, if requested, as its answer will end; the returned answer is unchanged."""
    if body.get("store") is False:
        return script
    if fault is None or fault.fault is not FaultName.ERROR_IN_STREAM:
        _store(served, body, _last_object(script.steps[-1].data))
    elif body.get("stream"):
        _store(served, body, _last_object(script.broken(0, fault)))
    return script


def keep_completion(served: Served, body: Json, script: AnswerScript) -> AnswerScript:
    """Store a chat completion if requested."""
    if body.get("store") is True and not body.get("stream"):
        document = orjson.loads(script.steps[-1].data)
        things, metadata = things_of(served.state), body.get("metadata") or {}
        things.completions[document["id"]] = document | {"metadata": metadata}
        things.messages[document["id"]] = [
            {"id": f"{document['id']}-{place}", **one} for place, one in enumerate(body["messages"])
        ]
    return script


def _last_object(data: bytes) -> Json:
    """Return the whole response at the end of an answer in one piece or as a stream."""
    if data.startswith(b"{"):
        found: Json = orjson.loads(data)
        return found
    last = data.rstrip().rpartition(b"data: ")[2]
    response: Json = orjson.loads(last)["response"]
    return response


def _store(served: Served, body: Json, document: Json) -> StoredResponse:
    things = things_of(served.state)
    entry = StoredResponse(document, _items_of(body.get("input"), "msg"))
    things.responses[document["id"]] = entry
    named = body.get("conversation")
    if (found := named.get("id") if isinstance(named, dict) else named) is not None:
        document["conversation"] = {"id": found}
        things.items[str(found)] += [*entry.input_items, *document["output"]]
    return entry


def _items_of(given: Any, prefix: str) -> list[Json]:
    if isinstance(given, str):
        content = [{"type": "input_text", "text": given}]
        given = [{"type": "message", "role": "user", "content": content}]
    items = given if isinstance(given, list) else []
    if not all(isinstance(one, dict) for one in items):
        raise Refused(400, "Invalid type for 'items': expected objects.", param="items")
    return [
        {"id": f"{prefix}_{token_hex(16)}", "status": "completed", "type": "message", **one}
        for one in items
    ]


# Background


async def in_background(
    served: Served, body: Json, parsed: ModelRequest, script: AnswerScript
) -> web.StreamResponse:
    """Answer immediately; the call continues, and counts, for as long as its answer takes."""
    state, whole = served.state, _last_object(script.steps[-1].data)
    begun = whole | {"status": "queued", "output": [], "usage": None, "background": True}

    def done() -> None:
        entry.document = whole | {"background": True, "completed_at": int(time.time())}
        entry.work = None

    pauses = len(script.steps) - 1
    call, work = served.in_background("background", parsed, done, script, pauses=pauses)
    entry = _store(served, body, begun)
    entry.work = work
    entry.document = begun | {"status": "in_progress"}
    headers = EMULATED | dict(script.headers)
    fault = state.faults.strike(parsed.kind, parsed.prompt)
    if fault is not None and fault.fault is FaultName.SLOW_FIRST_TOKEN:
        call.fault = fault.fault.value
        await asyncio.sleep(fault.delay_ms / 1000)
    if not parsed.streamed:
        return json_response(200, begun, headers)
    return await _streamed(served, entry, headers)


async def defer(served: Served, parsed: ModelRequest, script: AnswerScript) -> web.Response:
    """Answer with the id of a completion, which is returned only once when it is ready, as at
    xAI."""
    request_id, deferred = str(uuid4()), things_of(served.state).deferred
    served.in_background(
        "deferred", parsed, lambda: deferred.update({request_id: script.steps[-1].data}), script
    )
    deferred[request_id] = None
    return json_response(200, {"request_id": request_id})


async def _undeferred(served: Served, request_id: str) -> web.Response:
    deferred = things_of(served.state).deferred
    if request_id not in deferred:
        raise Refused(404, f"Deferred completion {request_id} was not found.")
    if deferred[request_id] is None:
        return web.Response(status=202, headers=EMULATED)
    headers = EMULATED | {"Content-Type": "application/json"}
    return web.Response(body=deferred.pop(request_id), headers=headers)


async def _streamed(
    served: Served, entry: StoredResponse, headers: dict[str, str], after: int = -1
) -> web.StreamResponse:
    """Serve the beginning of a stream, and its end once there is one; the work does not depend on a
    reader."""
    response = web.StreamResponse(headers=headers | {"Content-Type": served.api.stream_type})
    await response.prepare(served.request)
    for number, name in enumerate(("response.created", "response.queued")):
        if number > after:
            event = {"type": name, "sequence_number": number, "response": entry.document}
            await response.write(named_event(event))
    if entry.work is not None:
        await asyncio.wait({entry.work})
    name = f"response.{entry.document['status']}"
    event = {"type": name, "sequence_number": 2, "response": entry.document}
    await response.write_eof(named_event(event))
    return response


# Paths


def wants(method: str, name: str) -> bool:
    """Return whether a path below the version is that of a stored object."""
    folder, _, below = name.partition("/")
    if folder == "conversations":
        return True
    if folder == "responses":
        return below not in ("", "compact", "input_tokens")
    if name.startswith(("chat/completions/", "chat/deferred-completion/")):
        return True
    return (method, name) == ("GET", "chat/completions")


async def route(served: Served, name: str) -> web.StreamResponse:
    """Serve the paths that `wants` accepts. Raises Refused."""
    request = served.request
    body = (
        await served.json(_NOT_JSON) if request.method == "POST" and request.can_read_body else {}
    )
    if not isinstance(body, dict):
        raise Refused(400, _NOT_JSON)
    things, parts = things_of(served.state), name.split("/")
    if parts[:2] == ["chat", "deferred-completion"]:
        return await served.other("deferred", "", partial(_undeferred, served, parts[2]))
    if parts[0] == "responses":
        entry = things.responses.get(parts[1])
        if entry is None:
            raise Refused(404, f"Response with id '{parts[1]}' not found.")
        if request.method == "GET" and request.query.get("stream") == "true" and len(parts) == 2:
            named = "starting_after" in request.query
            after = _whole(request, "starting_after", "") if named else -1
            return await _streamed(served, entry, dict(EMULATED), after)
        answer: Callable[[], Json] = partial(_on_response, things, entry, request, parts[2:])
    elif parts[0] == "conversations":
        answer = partial(_on_conversation, things, request, parts[1:], body)
    else:
        answer = partial(_on_completion, things, request, parts[2:], body)
    return await served.other("stored", "", answer, label=served.called)


def _on_response(
    things: StoredThings, entry: StoredResponse, request: web.BaseRequest, below: list[str]
) -> Json:
    document = entry.document
    match request.method, below:
        case "GET", []:
            return document
        case "GET", ["input_items"]:
            return _listed(entry.input_items, request)
        case "POST", ["cancel"]:
            if not document.get("background"):
                raise Refused(400, "Cannot cancel a synchronous response.")
            if entry.work is not None:
                entry.work.cancel()
                entry.work = None
                entry.document = document = document | {"status": "cancelled"}
            return document
        case "DELETE", []:
            del things.responses[document["id"]]
            return {"id": document["id"], "object": "response", "deleted": True}
    raise Refused(404, f"Invalid URL ({request.method} {request.path})")


def _on_conversation(
    things: StoredThings, request: web.BaseRequest, below: list[str], body: Json
) -> Json:
    if (request.method, below) == ("POST", []):
        document: Json = {
            "id": f"conv_{token_hex(24)}",
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": body.get("metadata") or {},
        }
        things.conversations[document["id"]] = document
        things.items[document["id"]] = _items_of(body.get("items"), "msg")
        return document
    document = _conversation(things, below[0] if below else "")
    items = things.items[document["id"]]
    match request.method, below[1:]:
        case "GET", []:
            return document
        case "POST", []:
            document["metadata"] = body.get("metadata") or {}
            return document
        case "DELETE", []:
            del things.conversations[document["id"]]
            return {"id": document["id"], "object": "conversation.deleted", "deleted": True}
        case "GET", ["items"]:
            return _listed(items, request)
        case "POST", ["items"]:
            added = _items_of(body.get("items"), "msg")
            items += added
            return {"object": "list", **listing(added, _MOST_ITEMS)}
        case "GET", ["items", item_id]:
            return _item(items, item_id)
        case "DELETE", ["items", item_id]:
            items.remove(_item(items, item_id))
            return document
    raise Refused(404, f"Invalid URL ({request.method} {request.path})")


def _conversation(things: StoredThings, named: str) -> Json:
    if (found := things.conversations.get(named)) is None:
        raise Refused(404, f"Conversation with id '{named}' not found.")
    return found


def _item(items: list[Json], item_id: str) -> Json:
    for one in items:
        if one["id"] == item_id:
            return one
    raise Refused(404, f"Item with id '{item_id}' not found.")


def _on_completion(
    things: StoredThings, request: web.BaseRequest, below: list[str], body: Json
) -> Json:
    if (request.method, below) == ("GET", []):
        return _listed(list(things.completions.values()), request)
    document = things.completions.get(below[0] if below else "")
    if document is None:
        raise Refused(404, f"Completion with id '{below[0] if below else ''}' not found.")
    match request.method, below[1:]:
        case "GET", []:
            return document
        case "POST", []:
            document["metadata"] = body.get("metadata") or {}
            return document
        case "GET", ["messages"]:
            return _listed(things.messages[document["id"]], request)
        case "DELETE", []:
            del things.completions[document["id"]]
            return {"id": document["id"], "object": "chat.completion.deleted", "deleted": True}
    raise Refused(404, f"Invalid URL ({request.method} {request.path})")


def _whole(request: web.BaseRequest, name: str, usual: str) -> int:
    """Return a whole number of the query. Raises Refused (400)."""
    given = request.query.get(name, usual)
    if not given.isdecimal() or len(given) > 9:
        message = f"Invalid type for '{name}': expected an integer, but got a string instead."
        raise Refused(400, message, param=name, code="invalid_type")
    return int(given)


def _listed(items: list[Json], request: web.BaseRequest) -> Json:
    query = request.query
    after, limit = query.get("after"), min(_whole(request, "limit", "20"), _MOST_ITEMS)
    found = list(reversed(items)) if query.get("order") == "desc" else items
    if after is not None:
        places = [place for place, one in enumerate(found) if one["id"] == after]
        found = found[places[0] + 1 :] if places else []
    return {"object": "list", **listing(found, limit)}
