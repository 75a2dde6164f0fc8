"""Completions, the API before chat: whole, and as a stream of chunks.

Invariant: every prompt gets `n` choices, each of them charged for.
"""

from __future__ import annotations

import time
from typing import Any

import orjson

from tidegate.providers.emulator import answers, conversation
from tidegate.providers.emulator.conversation import Heard, compose, stream_steps, whole_steps
from tidegate.providers.emulator.delivery import Script, Step, broken_object
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.faults import Fault
from tidegate.providers.emulator.openai.errors import OPENAI, wrong
from tidegate.providers.emulator.openai.reading import MOST_CHOICES, Wanted, flag, whole
from tidegate.providers.emulator.settings import Behaviour

DEFAULT_MOST_TOKENS = 16
_GARBAGE = b'{"id": "cmpl-emulated", "choices": [{"te'
_DONE = b"data: [DONE]\n\n"
_FINISH = {"length": "length", "blocked": "content_filter", "unknown": "something_new"}


def read_completions(body: Json, model: str) -> Wanted:
    """Parse a body of completions. Raises OpenAIError (400)."""
    prompts = _prompts(body.get("prompt"))
    heard = Heard()
    for prompt in prompts:
        heard.hear("user", prompt)
    asked = heard.asked(
        model,
        schema=None,
        max_output_tokens=whole(body, "max_tokens") or DEFAULT_MOST_TOKENS,
        thinks=False,
    )
    choices = (whole(body, "n") or 1) * len(prompts)
    if choices > MOST_CHOICES:
        raise wrong("n", f"Invalid 'n': more than {MOST_CHOICES} choices in all.")
    options = body.get("stream_options")
    return Wanted(
        asked,
        choices,
        streamed=flag(body, "stream"),
        with_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _prompts(given: Any) -> list[str]:
    """Texts, or the numbers of LLM tokens, one prompt or several."""
    one = isinstance(given, str) or (isinstance(given, list) and given[:1] and _number(given[0]))
    prompts = [given] if one else given
    if not isinstance(prompts, list) or not prompts:
        message = "Missing required parameter: 'prompt'."
        raise wrong("prompt", message, "missing_required_parameter")
    if not all(isinstance(prompt, str | list) for prompt in prompts):
        raise wrong("prompt", "Invalid type for 'prompt': expected texts or lists of numbers.")
    return [prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) for prompt in prompts]


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def script(wanted: Wanted, behaviour: Behaviour, fault: Fault | None) -> Script:
    composed = compose(wanted.asked, behaviour, fault)
    identity: Json = {
        "id": f"cmpl-{answers.new_response_id()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": wanted.asked.model,
    }
    finish = _FINISH.get(composed.finish, "stop")
    choices = range(0 if composed.finish == "nothing" else wanted.choices)
    written = composed.output_tokens * len(choices)
    usage = {
        "prompt_tokens": wanted.asked.input_tokens,
        "completion_tokens": written,
        "total_tokens": wanted.asked.input_tokens + written,
    }

    def choice(index: int, text: str, reason: str | None) -> Json:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}

    def event(found: list[Json], told: Json | None = None) -> bytes:
        extra = {"usage": told} if wanted.with_usage else {}
        return b"data: " + orjson.dumps(identity | {"choices": found} | extra) + b"\n\n"

    def events(text: str, reason: str | None = None) -> bytes:
        return b"".join(event([choice(index, text, reason)]) for index in choices)

    if wanted.streamed:
        pieces = [
            Step(events(moment.text), moment.output_tokens * len(choices))
            for moment in composed.moments()
        ]
        tail = events("", finish) + (event([], usage) if wanted.with_usage else b"") + _DONE
        steps = stream_steps(b"", pieces or [Step(b"", written)], tail)
    else:
        found = [choice(index, composed.said or "", finish) for index in choices]
        steps = whole_steps(composed, identity | {"choices": found, "usage": usage}, written)
    return conversation.script(
        wanted.asked,
        composed,
        steps,
        streamed=wanted.streamed,
        broken=lambda _, fault: _framed(broken_object(OPENAI, _GARBAGE, fault), wanted.streamed),
        headers={"x-request-id": identity["id"]},
    )


def _framed(data: bytes, streamed: bool) -> bytes:
    return b"data: " + data + b"\n\n" if streamed else data
