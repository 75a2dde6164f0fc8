"""Media of OpenAI's API: images, audio, moderations, and the reranking of compatible providers.

Answers have the fields that recordings of the providers show: `usage` of a transcription is in
seconds or in tokens, a translation has none, and speech only as a stream of events.
"""

from __future__ import annotations

import math
import time
import wave
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator.content import (
    OUTPUT_PICTURE_TOKENS,
    Attached,
    ModelRequest,
    count_by_modality,
    draw,
    new_response_id,
)
from tidegate.emulator.delivery import (
    AnswerScript,
    ScriptStep,
    Served,
    broken_object,
    data_event,
)
from tidegate.emulator.dialect import Fault, FaultName, Json, Refused

PATHS = frozenset(
    {
        *("images/edits", "images/variations", "audio/transcriptions", "audio/translations"),
        *("audio/speech", "moderations", "rerank", "responses/input_tokens", "responses/compact"),
        "decisions",
    }
)
MOST_PICTURES = 10
_GARBAGE = b'{"created": 1, "data": [{"b64_'
_DEFAULTS = {
    "images/edits": "gpt-image-1",
    "images/variations": "dall-e-2",
    "moderations": "omni-moderation-latest",
    "responses/input_tokens": "gpt-5",
}
_TRANSCRIPT = "The sun rises in the east and sets in the west."
_AUDIO_TOKENS_A_SECOND = 10
_BYTES_A_SECOND = 16_000
_LETTERS_A_SECOND, _SPEECH_TOKENS_A_SECOND = 15, 20
_SPEECH_BYTES_A_LETTER = 64
_DOCUMENTS_A_SEARCH = 100  # the unit of Cohere's prices
_CATEGORIES = ("harassment", "hate", "illicit", "self-harm", "sexual", "violence")
_TYPES = {"mp3": "audio/mpeg", "opus": "audio/opus", "wav": "audio/wav", "pcm": "audio/pcm"}


@dataclass(frozen=True, slots=True)
class MediaRequest:
    """A request to one of `PATHS`: the fields of its body, and the files of a form."""

    path: str
    model: str
    body: Mapping[str, Any]
    files: tuple[web.FileField, ...] = ()

    def text(self, name: str) -> str:
        """Return a field that must be a text. Raises Refused."""
        value = self.body.get(name)
        if not isinstance(value, str) or not value:
            raise missing(name)
        return value


def missing(param: str) -> Refused:
    """Return the 400 for a missing field."""
    message = f"Missing required parameter: '{param}'."
    return Refused(400, message, param=param, code="missing_required_parameter")


async def read(served: Served, path: str) -> MediaRequest:
    """Parse a body, which is JSON or a form. Raises Refused."""
    request = served.request
    files: tuple[web.FileField, ...] = ()
    if request.content_type == "multipart/form-data":
        form = await served.form()
        fields: dict[str, Any] = {name: form[name] for name in form}
        files = tuple(one for one in form.values() if isinstance(one, web.FileField))
        if fields.get("stream") is not None:
            fields["stream"] = fields["stream"] == "true"
        if isinstance(count := fields.get("n"), str) and count.isdecimal():
            fields["n"] = int(count[:9])
    else:
        fields = await served.json("We could not parse the JSON body of your request. ({})")
        if not isinstance(fields, dict):
            raise Refused(400, "The body of your request is not an object.")
    model = fields.get("model") or _DEFAULTS.get(path)
    if not isinstance(model, str):
        raise missing("model")
    if path.startswith("audio/t") and not files:
        raise missing("file")
    return MediaRequest(path, model, fields, files)


async def answer(served: Served, parsed: MediaRequest) -> web.StreamResponse:
    """Serve the request."""
    match parsed.path:
        case "images/edits" | "images/variations":
            made = read_pictures(
                {"prompt": "a variation", **parsed.body}, parsed.model, parsed.files
            )
            return await served.generate(made, partial(pictures_script, made, served))
        case "audio/transcriptions" | "audio/translations":
            return await _transcribe(served, parsed)
        case "audio/speech":
            return await _synthesize(served, parsed)
        case "moderations":
            return await served.other("moderate", parsed.model, partial(_judged, parsed))
        case "rerank":
            return await _rank(served, parsed)
        case "responses/input_tokens":
            tokens = _tokens(parsed.body)
            found = {"object": "response.input_tokens", "input_tokens": tokens}
            return await served.other("count", parsed.model, lambda: found)
        case "decisions":
            return await _decide(served, parsed)
    return await _compact(served, parsed)


def _request(
    parsed: MediaRequest, kind: str, prompt: str, attached: tuple[Attached, ...] = ()
) -> ModelRequest:
    return ModelRequest(
        kind=kind,
        model=parsed.model,
        prompt=prompt,
        last_text=prompt,
        attached=attached,
        input_by_modality=count_by_modality(len(prompt), attached),
        streamed=parsed.body.get("stream") is True or parsed.body.get("stream_format") == "sse",
    )


def _tokens(body: Mapping[str, Any]) -> int:
    return math.ceil(len(orjson.dumps(body.get("input"))) / 4)


def _broken(served: Served, _: int, fault: Fault) -> bytes:
    return broken_object(served.api, _GARBAGE, fault)


def seconds_of(file: web.FileField) -> int:
    """Return the length of a recording: of a WAV by its header, otherwise by its size."""
    data = file.file.read()
    try:
        with wave.open(BytesIO(data)) as sound:
            seconds = sound.getnframes() / sound.getframerate()
    except (wave.Error, EOFError, ZeroDivisionError):
        seconds = len(data) / _BYTES_A_SECOND
    return max(1, math.ceil(float(seconds)))


async def _transcribe(served: Served, parsed: MediaRequest) -> web.StreamResponse:
    seconds, body = sum(map(seconds_of, parsed.files)), parsed.body
    prompt = str(body.get("prompt") or "")
    request = _request(parsed, "multi_modal", prompt)
    by_tokens = "transcribe" in parsed.model
    audio, given = seconds * _AUDIO_TOKENS_A_SECOND, math.ceil(len(_TRANSCRIPT) / 4)
    usage: Json = {"type": "duration", "seconds": seconds}
    if by_tokens:
        usage = {
            "type": "tokens",
            "input_tokens": audio + request.input_tokens,
            "input_token_details": {"text_tokens": request.input_tokens, "audio_tokens": audio},
            "output_tokens": given,
            "total_tokens": audio + request.input_tokens + given,
        }
    kind, content_type = body.get("response_format") or "json", None
    whole: Json | str = {"text": _TRANSCRIPT, "usage": usage}
    if parsed.path == "audio/translations":
        whole = {"text": _TRANSCRIPT}
    elif kind == "verbose_json":
        whole = {"task": "transcribe", "language": "english", "duration": seconds - 0.25,
                 "text": _TRANSCRIPT, "segments": [], "usage": usage}  # fmt: skip
    elif kind in ("text", "srt", "vtt"):
        whole, content_type = f"{_TRANSCRIPT}\n", "text/plain; charset=utf-8"
    data = whole.encode() if isinstance(whole, str) else orjson.dumps(whole)
    steps = [ScriptStep(data, given)]
    if request.streamed:
        words = _TRANSCRIPT.split(" ")
        deltas = [{"type": "transcript.text.delta", "delta": f"{word} "} for word in words]
        done = {"type": "transcript.text.done", "text": _TRANSCRIPT, "usage": usage}
        steps = [_event(one, given * n // len(words)) for n, one in enumerate(deltas, 1)]
        steps.append(_event(done, given))
    script = AnswerScript(steps, partial(_broken, served))
    return await served.generate(request, lambda _: script, content_type)


def _event(event: Json, output_tokens: int) -> ScriptStep:
    return ScriptStep(data_event(orjson.dumps(event)), output_tokens)


async def _synthesize(served: Served, parsed: MediaRequest) -> web.StreamResponse:
    text = parsed.text("input")
    parsed.text("voice")
    request = _request(parsed, "text_only", text)
    sound = b"ID3" + b"\x00\xff" * (len(text) * _SPEECH_BYTES_A_LETTER // 2)
    tokens = math.ceil(len(text) / _LETTERS_A_SECOND * _SPEECH_TOKENS_A_SECOND)
    kind = _TYPES.get(str(parsed.body.get("response_format") or "mp3"), "audio/mpeg")
    steps, content_type = [ScriptStep(sound, tokens)], kind
    if request.streamed:
        usage = {
            "input_tokens": request.input_tokens,
            "output_tokens": tokens,
            "total_tokens": request.input_tokens + tokens,
        }
        delta = {"type": "speech.audio.delta", "audio": b64encode(sound).decode()}
        steps = [
            _event(delta, tokens),
            _event({"type": "speech.audio.done", "usage": usage}, tokens),
        ]
        content_type = "text/event-stream"
    script = AnswerScript(steps, partial(_broken, served))
    return await served.generate(request, lambda _: script, content_type)


def _judged(parsed: MediaRequest) -> Json:
    given = parsed.body.get("input")
    if not given:
        raise missing("input")
    inputs = given if isinstance(given, list) else [given]
    if all(isinstance(one, dict) for one in inputs):  # parts of one input
        inputs = [" ".join(str(part.get("text") or "") for part in inputs)]
    results = []
    for one in inputs:
        found = {name: "kill" in str(one) and name == "violence" for name in _CATEGORIES}
        scores = {name: 0.97 if is_so else 0.001 for name, is_so in found.items()}
        results.append(
            {"flagged": any(found.values()), "categories": found, "category_scores": scores}
        )
    return {"id": f"modr-{new_response_id()}", "model": parsed.model, "results": results}


async def _rank(served: Served, parsed: MediaRequest) -> web.StreamResponse:
    query, documents = parsed.text("query"), parsed.body.get("documents")
    if not isinstance(documents, list) or not documents:
        raise missing("documents")
    most, words = parsed.body.get("top_n"), set(query.lower().split())
    for param, is_invalid in (
        ("query", not words),
        ("documents", not all(isinstance(one, str | dict) for one in documents)),
        ("top_n", most is not None and (type(most) is not int or most < 1)),
    ):
        if is_invalid:
            raise Refused(400, f"Invalid '{param}'.", param=param, code="invalid_value")
    texts = [one if isinstance(one, str) else str(one.get("text")) for one in documents]
    scores = [len(words & set(text.lower().split())) / len(words) for text in texts]
    order = sorted(range(len(texts)), key=lambda index: -scores[index])
    results = [
        {"index": index, "relevance_score": scores[index], "document": {"text": texts[index]}}
        for index in order[: most or len(texts)]
    ]
    tokens = math.ceil((len(query) * len(texts) + sum(map(len, texts))) / 4)
    found: Json = {"id": f"rerank-{new_response_id()}", "results": results}
    if parsed.model.startswith("rerank-"):  # Cohere's
        searches = math.ceil(len(texts) / _DOCUMENTS_A_SEARCH)
        found["meta"] = {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": searches},
        }
    else:
        found |= {"model": parsed.model, "usage": {"total_tokens": tokens}}
    return await served.other("rerank", parsed.model, lambda: found, input_tokens=tokens)


async def _compact(served: Served, parsed: MediaRequest) -> web.StreamResponse:
    prompt = orjson.dumps(parsed.body.get("input")).decode()
    request = _request(parsed, "text_only", prompt)
    given = 40
    item = {
        "id": f"cmp_{new_response_id()}",
        "type": "compaction",
        "encrypted_content": b64encode(prompt.encode()[:200]).decode(),
    }
    body = {
        "id": f"resp_{new_response_id()}",
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [item],
        "usage": {
            "input_tokens": request.input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": given,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": request.input_tokens + given,
        },
    }
    script = AnswerScript([ScriptStep(orjson.dumps(body), given)], partial(_broken, served))
    return await served.generate(request, lambda _: script)


async def _decide(served: Served, parsed: MediaRequest) -> web.StreamResponse:
    """Answer questions about an input: yes to each predicate, the first choice, the first level."""
    questions = parsed.body.get("questions")
    if not isinstance(questions, list) or not questions:
        raise missing("questions")
    prompt = orjson.dumps([parsed.body.get("input"), questions]).decode()
    request = _request(parsed, "text_only", prompt)
    given = 4 * len(questions)
    body = {
        "model": parsed.model,
        "answers": [_decision(one) for one in questions],
        "usage": {
            "input_tokens": request.input_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": given,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": request.input_tokens + given,
        },
    }
    script = AnswerScript([ScriptStep(orjson.dumps(body), given)], partial(_broken, served))
    return await served.generate(request, lambda _: script)


def _decision(question: Json) -> Json:
    kind, name = question.get("type"), question.get("name")
    if kind == "choice":
        value = question["choices"][0]["value"]
        probabilities = [{"value": value, "probability": 1.0}]
        found: Json = {"choice": value, "confidence": 1.0, "probabilities": probabilities}
    elif kind == "score":
        label = question["levels"][0]["label"]
        probabilities = [{"label": label, "value": 0, "probability": 1.0}]
        found = {"score": 0.0, "confidence": 1.0, "probabilities": probabilities}
    else:
        found = {"probability": 1.0}
    return {"type": kind, "name": name, **found}


def read_pictures(
    body: Mapping[str, Any], model: str, files: tuple[web.FileField, ...] = ()
) -> ModelRequest:
    """Parse a body of images/generations, edits or variations: each choice is a picture."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise missing("prompt")
    count = body.get("n")
    count = 1 if count is None else count
    if type(count) is not int or not 1 <= count <= MOST_PICTURES:
        allowed = f"Invalid 'n': from 1 to {MOST_PICTURES}."
        raise Refused(400, allowed, param="n", code="invalid_value")
    if body.get("stream"):
        message = "Pictures are not streamed here."
        raise Refused(400, message, param="stream", code="unsupported_parameter")
    attached = tuple(Attached("image/png", None) for _ in files)
    return ModelRequest(
        kind="image_generation",
        model=model,
        prompt=prompt,
        last_text=prompt,
        attached=attached,
        input_by_modality=count_by_modality(len(prompt), attached),
        choices=count,
    )


def pictures_script(parsed: ModelRequest, served: Served, fault: Fault | None) -> AnswerScript:
    empty = fault is not None and fault.fault in (FaultName.NO_IMAGE, FaultName.NO_CANDIDATES)
    count = 0 if empty else parsed.choices
    # Pictures of one prompt differ by their number.
    size_px = served.behaviour.image_size
    pngs = [draw(f"{parsed.prompt}\n{number}", size_px) for number in range(count)]
    tokens = count * OUTPUT_PICTURE_TOKENS
    texts = parsed.input_by_modality.get("TEXT", 0)
    details = {"text_tokens": texts, "image_tokens": parsed.input_tokens - texts}
    body = {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": "png",
        "data": [{"b64_json": b64encode(png).decode()} for png in pngs],
        "usage": {
            "input_tokens": parsed.input_tokens,
            "input_tokens_details": details,
            "output_tokens": tokens,
            "total_tokens": parsed.input_tokens + tokens,
        },
    }
    return AnswerScript([ScriptStep(orjson.dumps(body), tokens)], partial(_broken, served))
