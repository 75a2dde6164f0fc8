"""OpenAI's stored responses, conversations and chat completions, and work in the background.

    https://platform.openai.com/docs/api-reference/responses

A background response is answered immediately and counts as in flight for as long as the same answer
would have taken, whether its client is there or not.

Invariant: an account has one list of each kind, for all who have its key.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from secrets import token_hex
from typing import Any
from uuid import uuid4

import orjson
from aiohttp import web

from tidegate.emulator.content import ModelRequest
from tidegate.emulator.delivery import (
    EMULATED,
    SSE_TYPE,
    AnswerScript,
    Served,
    json_response,
    named_event,
)
from tidegate.emulator.dialect import Json, Refused
from tidegate.emulator.limits import FaultName
from tidegate.emulator.state import EmulatorState, LoggedCall

_NOT_JSON = "We could not parse the JSON body of your request."
_MOST_ITEMS = 100


@dataclass(slots=True)
class StoredResponse:
    """A response, with the items that it was asked. `work`: what still makes it."""

    shown: Json
    input_items: list[Json]
    work: asyncio.Task[None] | None = None


@dataclass(slots=True)
class StoredThings:
    """All that one account keeps, in the order of its making."""

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


# What calls leave behind


def check_named(served: Served, body: Json) -> None:
    """Raises Refused for a response or a conversation that is not there."""
    things = things_of(served.state)
    before = body.get("previous_response_id")
    if before is not None and before not in things.responses:
        raise Refused(
            400,
            f"Previous response with id '{before}' not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    named = body.get("conversation")
    if (found := named.get("id") if isinstance(named, dict) else named) is not None:
        _conversation(things, str(found))


def keep_response(served: Served, body: Json, script: AnswerScript) -> AnswerScript:
    """Keep a response that is to be stored; its answer goes on as it is."""
    if body.get("store") is not False:
        _keep(served, body, _last_object(script))
    return script


def keep_completion(served: Served, body: Json, script: AnswerScript) -> AnswerScript:
    """Keep a chat completion that is to be stored."""
    if body.get("store") is True and not body.get("stream"):
        shown = orjson.loads(script.steps[-1].data)
        things, metadata = things_of(served.state), body.get("metadata") or {}
        things.completions[shown["id"]] = shown | {"metadata": metadata}
        things.messages[shown["id"]] = [
            {"id": f"{shown['id']}-{place}", **one} for place, one in enumerate(body["messages"])
        ]
    return script


def _last_object(script: AnswerScript) -> Json:
    """The whole response, of an answer in one piece or a stream."""
    data = script.steps[-1].data
    if data.startswith(b"{"):
        found: Json = orjson.loads(data)
        return found
    last = data.rstrip().rpartition(b"data: ")[2]
    response: Json = orjson.loads(last)["response"]
    return response


def _keep(served: Served, body: Json, shown: Json) -> StoredResponse:
    things = things_of(served.state)
    kept = StoredResponse(shown, _items_of(body.get("input"), "msg"))
    things.responses[shown["id"]] = kept
    named = body.get("conversation")
    if (found := named.get("id") if isinstance(named, dict) else named) is not None:
        shown["conversation"] = {"id": found}
        things.items[str(found)] += [*kept.input_items, *shown["output"]]
    return kept


def _items_of(given: Any, prefix: str) -> list[Json]:
    if isinstance(given, str):
        content = [{"type": "input_text", "text": given}]
        given = [{"type": "message", "role": "user", "content": content}]
    items = given if isinstance(given, list) else []
    return [
        {"id": f"{prefix}_{token_hex(16)}", "status": "completed", "type": "message", **one}
        for one in items
    ]


# Background


async def in_background(
    served: Served, body: Json, asked: ModelRequest, script: AnswerScript
) -> web.StreamResponse:
    """Answer immediately; the call goes on, and counts, for as long as its answer takes."""
    state, behaviour = served.state, served.behaviour
    whole = _last_object(script)
    begun = whole | {"status": "queued", "output": [], "usage": None, "background": True}
    stack = ExitStack()
    call = stack.enter_context(
        state.serving(
            served.request,
            kind=asked.kind,
            model=asked.model,
            method="background",
            prompt=asked.prompt,
            size=asked.size,
            dialect=served.api.name,
            goes_on=True,
        )
    )
    kept = _keep(served, body, begun)
    delays = [behaviour.first_byte(asked.kind)]
    delays += [behaviour.between(asked.kind) for _ in script.steps[1:]]
    takes_s = sum(one.draw_ms(state.random) for one in delays) / 1000
    charge = partial(
        state.ledger.charge,
        call,
        asked.input_tokens,
        script.steps[-1].output_tokens,
        script.thoughts_tokens,
    )
    kept.work = state.work_on(_work(state, call, kept, whole, takes_s, charge, stack))
    headers = EMULATED | dict(script.headers)
    fault = state.faults.strike(asked.kind, asked.prompt)
    if fault is not None and fault.fault is FaultName.SLOW_FIRST_TOKEN:
        call.fault = fault.fault.value
        await asyncio.sleep(fault.delay_ms / 1000)
    if not asked.streamed:
        return json_response(200, begun, headers)
    return await _streamed(served, kept, headers)


async def defer(served: Served, asked: ModelRequest, script: AnswerScript) -> web.Response:
    """Answer with the id of a completion, which is given out once when it is ready, as by xAI."""
    state, stack = served.state, ExitStack()
    call = stack.enter_context(
        state.serving(
            served.request,
            kind=asked.kind,
            model=asked.model,
            method="deferred",
            prompt=asked.prompt,
            size=asked.size,
            dialect=served.api.name,
            goes_on=True,
        )
    )
    request_id, deferred = str(uuid4()), things_of(state).deferred
    deferred[request_id] = None
    takes_s = served.behaviour.first_byte(asked.kind).draw_ms(state.random) / 1000

    async def work() -> None:
        with stack:
            await asyncio.sleep(takes_s)
            tokens = script.steps[-1].output_tokens
            state.ledger.charge(call, asked.input_tokens, tokens, script.thoughts_tokens)
            state.made(call)
            deferred[request_id] = script.steps[-1].data

    state.work_on(work())
    return json_response(200, {"request_id": request_id})


async def _undeferred(served: Served, request_id: str) -> web.Response:
    deferred = things_of(served.state).deferred
    if request_id not in deferred:
        raise Refused(404, f"Deferred completion {request_id} was not found.")
    if deferred[request_id] is None:
        return web.Response(status=202, headers=EMULATED)
    headers = EMULATED | {"Content-Type": "application/json"}
    return web.Response(body=deferred.pop(request_id), headers=headers)


async def _work(
    state: EmulatorState,
    call: LoggedCall,
    kept: StoredResponse,
    whole: Json,
    takes_s: float,
    charge: Callable[[], None],
    stack: ExitStack,
) -> None:
    with stack:
        kept.shown = kept.shown | {"status": "in_progress"}
        try:
            await asyncio.sleep(takes_s)
        except asyncio.CancelledError:
            kept.shown = kept.shown | {"status": "cancelled"}
            state.ledger.end(call, "failed")
            return
        charge()
        state.made(call)
        kept.shown = whole | {"background": True, "completed_at": int(time.time())}
    kept.work = None


async def _streamed(
    served: Served, kept: StoredResponse, headers: dict[str, str], after: int = -1
) -> web.StreamResponse:
    """Its beginning, and the end once there is one; the work does not depend on a reader."""
    response = web.StreamResponse(headers=headers | {"Content-Type": SSE_TYPE})
    await response.prepare(served.request)
    for number, name in enumerate(("response.created", "response.queued")):
        if number > after:
            event = {"type": name, "sequence_number": number, "response": kept.shown}
            await response.write(named_event(event))
    if kept.work is not None:
        await asyncio.wait({kept.work})
    name = f"response.{kept.shown['status']}"
    event = {"type": name, "sequence_number": 2, "response": kept.shown}
    await response.write_eof(named_event(event))
    return response


# Paths


def wants(method: str, name: str) -> bool:
    """Whether a path below the version is of something stored."""
    folder, _, below = name.partition("/")
    if folder == "conversations":
        return True
    if folder == "responses":
        return below not in ("", "compact", "input_tokens")
    if name.startswith(("chat/completions/", "chat/deferred-completion/")):
        return True
    return (method, name) == ("GET", "chat/completions")


async def route(served: Served, name: str) -> web.StreamResponse:
    """Serve what `wants` says. Raises Refused."""
    request = served.request
    body = (
        await served.json(_NOT_JSON) if request.method == "POST" and request.can_read_body else {}
    )
    things, parts = things_of(served.state), name.split("/")
    if parts[:2] == ["chat", "deferred-completion"]:
        return await served.other("deferred", "", partial(_undeferred, served, parts[2]))
    if parts[0] == "responses":
        kept = things.responses.get(parts[1])
        if kept is None:
            raise Refused(404, f"Response with id '{parts[1]}' not found.")
        if request.method == "GET" and request.query.get("stream") == "true" and len(parts) == 2:
            after = int(request.query.get("starting_after", "-1"))
            return await _streamed(served, kept, dict(EMULATED), after)
        answer: Callable[[], Json] = partial(_on_response, things, kept, request, parts[2:])
    elif parts[0] == "conversations":
        answer = partial(_on_conversation, things, request, parts[1:], body)
    else:
        answer = partial(_on_completion, things, request, parts[2:], body)
    label = f"{request.method} {request.path}"
    return await served.other("stored", "", answer, label=label)


def _on_response(
    things: StoredThings, kept: StoredResponse, request: web.BaseRequest, below: list[str]
) -> Json:
    shown = kept.shown
    match request.method, below:
        case "GET", []:
            return shown
        case "GET", ["input_items"]:
            return _listed(kept.input_items, request)
        case "POST", ["cancel"]:
            if not shown.get("background"):
                raise Refused(400, "Cannot cancel a synchronous response.")
            if kept.work is not None:
                kept.work.cancel()
                kept.work = None
                kept.shown = shown = shown | {"status": "cancelled"}
            return shown
        case "DELETE", []:
            del things.responses[shown["id"]]
            return {"id": shown["id"], "object": "response", "deleted": True}
    raise Refused(404, f"Invalid URL ({request.method} {request.path})")


def _on_conversation(
    things: StoredThings, request: web.BaseRequest, below: list[str], body: Json
) -> Json:
    if (request.method, below) == ("POST", []):
        shown: Json = {
            "id": f"conv_{token_hex(24)}",
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": body.get("metadata") or {},
        }
        things.conversations[shown["id"]] = shown
        things.items[shown["id"]] = _items_of(body.get("items"), "msg")
        return shown
    shown = _conversation(things, below[0] if below else "")
    items = things.items[shown["id"]]
    match request.method, below[1:]:
        case "GET", []:
            return shown
        case "POST", []:
            shown["metadata"] = body.get("metadata") or {}
            return shown
        case "DELETE", []:
            del things.conversations[shown["id"]]
            return {"id": shown["id"], "object": "conversation.deleted", "deleted": True}
        case "GET", ["items"]:
            return _listed(items, request)
        case "POST", ["items"]:
            added = _items_of(body.get("items"), "msg")
            items += added
            return _page(added, len(added))
        case "GET", ["items", item_id]:
            return _item(items, item_id)
        case "DELETE", ["items", item_id]:
            items.remove(_item(items, item_id))
            return shown
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
    shown = things.completions.get(below[0] if below else "")
    if shown is None:
        raise Refused(404, f"Completion with id '{below[0] if below else ''}' not found.")
    match request.method, below[1:]:
        case "GET", []:
            return shown
        case "POST", []:
            shown["metadata"] = body.get("metadata") or {}
            return shown
        case "GET", ["messages"]:
            return _listed(things.messages[shown["id"]], request)
        case "DELETE", []:
            del things.completions[shown["id"]]
            return {"id": shown["id"], "object": "chat.completion.deleted", "deleted": True}
    raise Refused(404, f"Invalid URL ({request.method} {request.path})")


def _listed(items: list[Json], request: web.BaseRequest) -> Json:
    after, limit = request.query.get("after"), min(int(request.query.get("limit", "20")), 100)
    found = list(reversed(items)) if request.query.get("order") == "desc" else items
    if after is not None:
        places = [place for place, one in enumerate(found) if one["id"] == after]
        found = found[places[0] + 1 :] if places else []
    return _page(found, limit)


def _page(found: list[Json], limit: int) -> Json:
    shown = found[: min(limit, _MOST_ITEMS)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(found) > len(shown),
    }
