"""Prompts in the dialects of OpenAI and Anthropic: requests with files, and their answers.

A prompt belongs to no dialect: it becomes a chat completion or a message at the upstream that is
called, or an images call if it requests an image. In Gemini's dialect it is sent by Google's SDK
(`upstream/gemini.py`).

Invariants: only text and images of the answer itself are read, never thoughts; an answer without
its end is incomplete; files that a dialect does not accept are rejected before they are sent, with
the name of the field. Pure.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

import orjson

from tidegate.admission.estimator import Learning, input_pieces, pieces_of
from tidegate.call import Answer, Call, Delta, Event, Kind, Media, Picture, Tier
from tidegate.classify import (
    MAX_ANSWER_TOKENS,
    judge_instruction,
    judge_kinds,
    judge_texts,
)
from tidegate.dialects.answers import object_of, objects_in
from tidegate.dialects.spec import Dialect, Endpoint, Operation, RequestFacts
from tidegate.errors import (
    EmptyAnswer,
    PromptBlocked,
    UpstreamError,
    UpstreamGarbled,
    UpstreamUnavailable,
)

# Types and sizes in bytes of files; a type may be a pattern while it is unknown.
Files = Sequence[tuple[str, int]]

ANY_IMAGE = "image/*"
MOST_ANSWER_BYTES = 64_000_000
# Anthropic requires a bound on the output: enough for a long answer, and within the limits of every
# served model.
USUAL_OUTPUT_TOKENS = 16_000
# A model's thoughts count towards this bound too.
_JUDGE_OUTPUT_TOKENS = 4 * MAX_ANSWER_TOKENS

_PNG, _JPEG, _WEBP, _GIF = "image/png", "image/jpeg", "image/webp", "image/gif"
_PICTURES = frozenset((_PNG, _JPEG, _WEBP, _GIF))
_EDITED = frozenset((_PNG, _JPEG, _WEBP))  # GPT image models accept no GIF
_PDF = "application/pdf"
_SOUNDS = {"audio/wav": "wav", "audio/mpeg": "mp3"}
_TEXTUAL = frozenset(("application/json", "application/xml"))

_CHAT = Endpoint(Dialect.OPENAI, Operation.INFER, "/chat/completions")
_GENERATIONS = Endpoint(Dialect.OPENAI, Operation.IMAGES, "/images/generations")
_EDITS = Endpoint(Dialect.OPENAI, Operation.IMAGES, "/images/edits")
_DRAWS = Endpoint(Dialect.OPENAI, Operation.IMAGES, "/images")
_MESSAGES = Endpoint(Dialect.ANTHROPIC, Operation.INFER, "/v1/messages")
_JSON = b"application/json"

_BY_SDK = (Dialect.GEMINI,)  # accepts every file that a request may have


@dataclass(frozen=True, slots=True)
class _Accepted:
    """Files that a dialect accepts for one kind of prompt: types besides text, the largest total
    size, the same in words, and the largest size of a picture, if that is smaller."""

    types: frozenset[str]
    most_bytes: int
    text: bool
    words: str
    most_picture_bytes: int | None = None


# developers.openai.com/api/docs/guides/file-inputs and /images: 50 MB; platform.claude.com/docs,
# "Request size limits": 32 MB, and "Vision": 10 MB a picture, both in base64.
_OPENAI_BYTES, _ANTHROPIC_BYTES, _ANTHROPIC_PICTURE_BYTES = 50_000_000, 24_000_000, 7_500_000
_ACCEPTED: Mapping[tuple[Dialect, bool], _Accepted] = {
    (Dialect.OPENAI, False): _Accepted(
        _PICTURES | {_PDF} | _SOUNDS.keys(),
        _OPENAI_BYTES,
        text=True,
        words="PNG, JPEG, WebP, GIF, PDF, WAV, MP3 and text, 50 MB in all",
    ),
    (Dialect.OPENAI, True): _Accepted(
        _EDITED, _OPENAI_BYTES, text=False, words="PNG, JPEG and WebP, 50 MB in all"
    ),
    (Dialect.ANTHROPIC, False): _Accepted(
        _PICTURES | {_PDF},
        _ANTHROPIC_BYTES,
        text=True,
        words="PNG, JPEG, WebP, GIF, PDF and text, 24 MB in all, 7.5 MB a picture",
        most_picture_bytes=_ANTHROPIC_PICTURE_BYTES,
    ),
}


@dataclass(frozen=True, slots=True)
class NotAccepted:
    """Why a dialect does not accept a prompt. field: of the request. allowed: what it accepts."""

    field: str
    reason: str
    allowed: str


def dialect_for(
    dialects: Iterable[str], model: str, kind: Kind | None, files: Files
) -> tuple[Dialect | None, NotAccepted | None]:
    """Return the dialect in which an upstream takes a prompt: Gemini's, otherwise the first that
    can; None with the reason if none can. model: the upstream's name of it. kind: None while it is
    undecided."""
    supported = [Dialect(one) for one in dialects]
    if Dialect.ANTHROPIC in supported and "claude" in model.lower():
        supported = [Dialect.ANTHROPIC]  # the only one for these at Bedrock, Vertex and Foundry
    refused = None
    for dialect in sorted(supported, key=lambda one: one not in _BY_SDK):
        why = not_accepted(dialect, kind, files)
        if why is None:
            return dialect, None
        refused = refused or why
    return None, refused


def not_accepted(dialect: Dialect, kind: Kind | None, files: Files) -> NotAccepted | None:
    """Return why a dialect does not accept a prompt; None if it does."""
    if dialect in _BY_SDK:
        return None
    draws = kind is Kind.IMAGE_GENERATION
    if (dialect, False) not in _ACCEPTED:
        allowed = "an upstream that speaks OpenAI's, Anthropic's or Gemini's"
        return NotAccepted("model", f"speaks the {dialect} dialect alone", allowed)
    taken = _ACCEPTED.get((dialect, draws))
    if taken is None:
        return NotAccepted("model", "makes no images", "a model that makes images")
    for mime_type, size_bytes in files:
        if mime_type in _PICTURES and size_bytes > (taken.most_picture_bytes or size_bytes):
            return NotAccepted("files", "takes no picture of that size", taken.words)
        if mime_type == ANY_IMAGE or mime_type in taken.types:
            continue
        if not (taken.text and is_text(mime_type)):
            reason = f"takes no {mime_type} for an image" if draws else f"takes no {mime_type}"
            return NotAccepted("files", reason, taken.words)
    if sum(size for _, size in files) > taken.most_bytes:
        return NotAccepted("files", "does not take that much", taken.words)
    return None


def is_text(mime_type: str) -> bool:
    return mime_type.startswith("text/") or mime_type in _TEXTUAL


def endpoint_for(dialect: Dialect, *, draws: bool) -> Endpoint:
    """Return the endpoint of a prompt without files."""
    if dialect is Dialect.ANTHROPIC:
        return _MESSAGES
    return _GENERATIONS if draws else _CHAT


@dataclass(frozen=True, slots=True)
class PromptCall:
    """A call in a dialect. asked: its facts, if the body is not JSON. The model's name is as the
    body has it."""

    endpoint: Endpoint
    body: bytes
    content_type: bytes = _JSON
    facts: RequestFacts | None = None


@dataclass(frozen=True, slots=True)
class CallForm:
    """Options of an upstream. streams: the answer is read as a stream. asks_usage: it knows
    `stream_options`. most_output_tokens: of its model, if known. own: it is OpenAI itself, whose
    field names have changed. provider: whose own fields may be used."""

    streams: bool
    asks_usage: bool = True
    most_output_tokens: int | None = None
    own: bool = False
    provider: str | None = None


def prompt_call(dialect: Dialect, call: Call, form: CallForm) -> PromptCall:
    """Return the call of a prompt, whose model is the upstream's name for it."""
    if call.kind is Kind.IMAGE_GENERATION:
        return _images(call, form.provider)
    if dialect is Dialect.ANTHROPIC:
        content = [*map(_block, call.media), *_text_blocks(call.prompt)]
        body = _message(call.model, content, form, USUAL_OUTPUT_TOKENS)
        return PromptCall(_MESSAGES, orjson.dumps(body))
    part_of = _part_at_mistral if form.provider == "mistral" else _part
    parts = [*map(part_of, call.media), *_text_blocks(call.prompt)]
    user_content: Any = parts if call.media else call.prompt
    body = {"model": call.model, "messages": [{"role": "user", "content": user_content}]}
    if form.streams:
        body["stream"] = True
        if form.asks_usage:
            body["stream_options"] = {"include_usage": True}
    if call.tier is Tier.FLEX:
        body["service_tier"] = call.tier.value
    return PromptCall(_CHAT, orjson.dumps(body))


def question_call(
    dialect: Dialect, call: Call, mime_types: Sequence[str], form: CallForm
) -> PromptCall:
    """Return the classifier's question about a prompt, to be answered by its schema."""
    texts = judge_texts(call.prompt, mime_types)
    content = [{"type": "text", "text": text} for text in texts]
    schema = {
        "type": "object",
        "properties": {
            "kind": {"type": "string", "enum": judge_kinds(mime_types)},
            "reason": {"type": "string"},
        },
        "required": ["kind", "reason"],
        "additionalProperties": False,
    }
    instruction = judge_instruction(mime_types)
    if dialect is Dialect.ANTHROPIC:
        body = _message(call.model, content, form, _JUDGE_OUTPUT_TOKENS)
        body["system"] = instruction
        body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        return PromptCall(_MESSAGES, orjson.dumps(body))
    bound = "max_completion_tokens" if form.own else "max_tokens"
    body = {
        "model": call.model,
        "messages": [
            {"role": "system", "content": instruction},
            {"role": "user", "content": content},
        ],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "kind_of_request", "strict": True, "schema": schema},
        },
        bound: _JUDGE_OUTPUT_TOKENS,
    }
    return PromptCall(_CHAT, orjson.dumps(body))


def _message(model: str, content: list[Any], form: CallForm, output_tokens: int) -> dict[str, Any]:
    body = {
        "model": model,
        "max_tokens": min(output_tokens, form.most_output_tokens or output_tokens),
        "messages": [{"role": "user", "content": content}],
    }
    return {**body, "stream": True} if form.streams else body


def _text_blocks(prompt: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": prompt}] if prompt else []


def _part(media: Media) -> dict[str, Any]:
    """Return a file as a part of a chat completion; text files become plain text."""
    kind = media.mime_type
    if kind in _PICTURES:
        return {"type": "image_url", "image_url": {"url": _data_url(media)}}
    if kind in _SOUNDS:
        data = b64encode(media.data).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": _SOUNDS[kind]}}
    if kind == _PDF:
        file = {"filename": media.name or "file.pdf", "file_data": _data_url(media)}
        return {"type": "file", "file": file}
    return {"type": "text", "text": f"{media.name or 'A file'}:\n\n{_text_of(media)}"}


def _part_at_mistral(media: Media) -> dict[str, Any]:
    """Return a file as a part for Mistral: docs.mistral.ai/api, "DocumentURLChunk" and
    "AudioChunk"."""
    if media.mime_type == _PDF:
        named = {"document_name": media.name} if media.name else {}
        return {"type": "document_url", "document_url": _data_url(media), **named}
    if media.mime_type in _SOUNDS:
        return {"type": "input_audio", "input_audio": b64encode(media.data).decode()}
    return _part(media)


def _block(media: Media) -> dict[str, Any]:
    """Return a file as a block of a message."""
    kind = media.mime_type
    if kind in _PICTURES or kind == _PDF:
        data = b64encode(media.data).decode()
        source = {"type": "base64", "media_type": kind, "data": data}
        block = {"type": "document" if kind == _PDF else "image", "source": source}
    else:
        source = {"type": "text", "media_type": "text/plain", "data": _text_of(media)}
        block = {"type": "document", "source": source}
    return {**block, "title": media.name} if media.name and kind not in _PICTURES else block


def _text_of(media: Media) -> str:
    return media.data.decode("utf-8", "replace")


def _data_url(media: Media) -> str:
    return f"data:{media.mime_type};base64,{b64encode(media.data).decode()}"


def _images(call: Call, provider: str | None) -> PromptCall:
    if provider == "openrouter":
        return _at_openrouter(call)
    if not call.media:
        return _generations(call, provider)
    return _edits_in_json(call) if provider == "xai" else _edits(call)


def _generations(call: Call, provider: str | None) -> PromptCall:
    body: dict[str, Any] = {"model": call.model, "prompt": call.prompt}
    if _gives_urls(call.model):  # docs.together.ai/reference/post-images-generations
        body["response_format"] = "base64" if provider == "together" else "b64_json"
    return PromptCall(_GENERATIONS, orjson.dumps(body))


def _at_openrouter(call: Call) -> PromptCall:
    """Return an images call of OpenRouter's, which generates and edits by one path, and returns
    bytes: openrouter.ai/blog/tutorials/image-generation."""
    body: dict[str, Any] = {"model": call.model, "prompt": call.prompt}
    if call.media:
        urls = map(_data_url, call.media)
        body["input_references"] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    return PromptCall(_DRAWS, orjson.dumps(body))


def _gives_urls(model: str) -> bool:
    """Return whether an images model answers with URLs unless bytes are requested. OpenAI's never
    do, and reject the field."""
    return "gpt-image" not in model and "chatgpt-image" not in model


def _edits(call: Call) -> PromptCall:
    """Return an edit of images as multipart (RFC 7578), which all servers except xAI's accept."""
    fields = {"model": call.model, "prompt": call.prompt}
    if _gives_urls(call.model):
        fields["response_format"] = "b64_json"
    mark = token_hex(16)
    pieces = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    several = "image[]" if len(call.media) > 1 else "image"
    for number, media in enumerate(call.media):
        file = f"image-{number}.{media.mime_type.partition('/')[2]}"
        head = f'form-data; name="{several}"; filename="{file}"'
        opening = f"--{mark}\r\nContent-Disposition: {head}\r\nContent-Type: {media.mime_type}"
        pieces += (f"{opening}\r\n\r\n".encode(), media.data, b"\r\n")
    pieces.append(f"--{mark}--\r\n".encode())
    content_type = f"multipart/form-data; boundary={mark}".encode()
    return PromptCall(_EDITS, b"".join(pieces), content_type, _facts_of_edits(call))


def _edits_in_json(call: Call) -> PromptCall:
    """Return an edit of images in JSON: docs.x.ai/developers/rest-api-reference, "Image edits"."""
    images = [{"type": "image_url", "url": _data_url(one)} for one in call.media]
    body = {"model": call.model, "prompt": call.prompt, "response_format": "b64_json"}
    named = {"images": images} if len(images) > 1 else {"image": images[0]}
    return PromptCall(_EDITS, orjson.dumps(body | named), facts=_facts_of_edits(call))


def _facts_of_edits(call: Call) -> RequestFacts:
    content = input_pieces(pieces_of(call.prompt, call.media), learning=Learning.FILES)
    return RequestFacts(call.model, Kind.IMAGE_GENERATION, images=1, pieces=content)


# Answers

_BLOCKED = frozenset(("content_filter", "refusal"))
# Codes of refusals about the prompt: OpenAI's, and of Azure's filter.
_BLOCKED_CODES = frozenset(
    (
        *("moderation_blocked", "content_filter", "content_policy_violation", "invalid_prompt"),
        *("image_content_policy_violation", "bio_policy", "misalignment_policy_violation"),
    )
)
# By wording alone, anchored at the start: Anthropic's, and xAI's with the check that failed.
_BLOCKED_WORDS = re.compile(
    r"Output blocked by (?P<filter>content filtering policy)|"
    r"Content violates usage guidelines(?:.*\b(?P<check>SAFETY_CHECK_TYPE_\w{1,60}))?",
    re.DOTALL,
)
_REFUSED_STATUSES = (400, 403)
_DATA_URL = re.compile(r"data:image/[\w.+-]{1,62};base64,")  # xAI's begin with it
_PICTURE_TYPE = re.compile(r"image/[a-z0-9][a-z0-9.+-]{0,62}")
_MAGIC = ((b"\x89PNG", _PNG), (b"\xff\xd8\xff", _JPEG), (b"GIF8", _GIF))


def blocked_by(status: int, error: Mapping[str, Any]) -> PromptBlocked | None:
    """Return the error of a refusal that is about the prompt; None if it is about something
    else."""
    if status not in _REFUSED_STATUSES:
        return None
    for code in (error.get("code"), error.get("type")):
        if isinstance(code, str) and code in _BLOCKED_CODES:
            return _blocked(code)
    if "flagged_input" in object_of(error.get("metadata")):  # OpenRouter's
        return _blocked("moderation")
    message = error.get("message")
    if isinstance(message, str) and (found := _BLOCKED_WORDS.match(message)) is not None:
        return _blocked(found["filter"] or found["check"] or "usage guidelines")
    return None


def _blocked(reason: str) -> PromptBlocked:
    return PromptBlocked(f"the provider refused the prompt ({reason})", reason=reason)


@dataclass(slots=True)
class _AnswerPart:
    """The content of one object of an answer, whole or an event."""

    texts: list[str]
    pictures: list[Media]
    refusal: str = ""
    finish: str | None = None
    ends: bool = False


class PromptAnswer:
    """Reads the answer to a prompt into `answer`.

    bytes  --take-->  events, in order       end  --finish-->  success, or an error
    """

    def __init__(self, dialect: Dialect, kind: Kind, answer: Answer, *, streams: bool) -> None:
        self._read = _of_message if dialect is Dialect.ANTHROPIC else _of_completion
        self._kind = kind
        self._answer = answer
        self._streams = streams
        self._rest: list[bytes] = []
        self._size_bytes = 0
        self._refusals: list[str] = []
        self._objects = 0
        self._ended = False

    def take(self, piece: bytes) -> list[Event]:
        """Return the events that a piece completes; none for an answer that is not a stream. Raises
        UpstreamGarbled for an answer that is too long."""
        if not self._size_bytes and piece.lstrip()[:1] == b"{":
            self._streams = False  # some servers do not support streams
        self._size_bytes += len(piece)
        if self._size_bytes > MOST_ANSWER_BYTES:
            raise UpstreamGarbled(f"the answer is longer than {MOST_ANSWER_BYTES} bytes")
        self._rest.append(piece)
        if not self._streams or b"\n" not in piece:
            return []
        data = b"".join(self._rest)
        whole, _, rest = data.rpartition(b"\n")
        self._rest = [rest]
        return list(self._events(whole.split(b"\n")))

    def finish(self) -> list[Event]:
        """Return the last events. Raises PromptBlocked, EmptyAnswer, UpstreamGarbled if nothing was
        an answer, or UpstreamUnavailable if the answer was cut."""
        rest, self._rest = b"".join(self._rest), []
        events = list(self._events(rest.split(b"\n")) if self._streams else self._whole(rest))
        if (problem := self._problem()) is not None:
            raise problem
        return events

    def _events(self, lines: Iterable[bytes]) -> Iterator[Event]:
        for line in lines:
            text = line[5:].strip() if line.startswith(b"data:") else b""
            if text == b"[DONE]":
                self._ended = True
            elif text:
                with suppress(orjson.JSONDecodeError):  # cut, which the missing end shows
                    yield from self._take(self._read(object_of(orjson.loads(text))))

    def _whole(self, text: bytes) -> Iterator[Event]:
        with suppress(orjson.JSONDecodeError):  # not an object: not an answer
            value = orjson.loads(text)
            self._ended = True
            yield from self._take(self._read(_whole_of(object_of(value))))

    def _take(self, part: _AnswerPart | None) -> Iterator[Event]:
        if part is None:
            return
        self._objects += 1
        self._ended = self._ended or part.ends
        answer = self._answer
        answer.finish_reason = part.finish or answer.finish_reason
        if part.refusal:
            self._refusals.append(part.refusal)
        for text in part.texts:
            answer.text.append(text)
            yield Delta(text)
        for picture in part.pictures:
            answer.pictures.append(picture)
            yield Picture(picture)

    def _problem(self) -> UpstreamError | None:
        answer = self._answer
        finish, content = answer.finish_reason, bool(answer.text or answer.pictures)
        if not self._objects:
            if self._size_bytes and not self._streams:
                return UpstreamGarbled("the provider's answer violates its protocol")
            return UpstreamUnavailable("the provider's answer was cut off before its end")
        if not self._ended and finish is None:
            return UpstreamUnavailable("the provider's answer was cut off before its end")
        if not content and (self._refusals or finish in _BLOCKED):
            return _blocked(finish if finish in _BLOCKED else "refusal")
        if not content or (self._kind is Kind.IMAGE_GENERATION and not answer.pictures):
            missing = "picture" if self._kind is Kind.IMAGE_GENERATION else "content"
            return EmptyAnswer(
                f"the provider's answer has no {missing} ({finish or 'no reason'})",
                finish_reason=finish,
            )
        return None


def _whole_of(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a whole answer without the last piece of a stream, which Perplexity repeats in it."""
    if not isinstance(value.get("choices"), list):
        return value
    choices = [
        {name: part for name, part in one.items() if name != "delta" or "message" not in one}
        for one in objects_in(value["choices"])
    ]
    return {**value, "choices": choices}


def _of_completion(value: Mapping[str, Any]) -> _AnswerPart | None:
    """Read a chat completion, a chunk of one, or the answer of an images call; None for anything
    else."""
    if isinstance(value.get("data"), list):
        return _AnswerPart([], [*_pictures(value["data"])], ends=True)
    if not isinstance(value.get("choices"), list):
        return None
    choice = next(iter(objects_in(value["choices"])), {})
    # In a stream Perplexity also repeats all earlier text, as `message`.
    delta = choice.get("delta")
    message = object_of(choice.get("message") if delta is None else delta)
    refusal = message.get("refusal")
    return _AnswerPart(
        _texts(message.get("content")),
        [],
        refusal if isinstance(refusal, str) else "",
        _word(choice.get("finish_reason")),
    )


def _of_message(value: Mapping[str, Any]) -> _AnswerPart | None:
    """Read a message, or an event of one; None for anything else."""
    kind = value.get("type")
    if kind == "message":
        texts = [text for one in objects_in(value.get("content")) for text in _block_text(one)]
        return _AnswerPart(texts, [], finish=_word(value.get("stop_reason")))
    if kind == "content_block_start":
        return _AnswerPart(_block_text(object_of(value.get("content_block"))), [])
    if kind == "content_block_delta":
        delta = object_of(value.get("delta"))
        is_text = delta.get("type") == "text_delta"
        return _AnswerPart(_texts(delta.get("text")) if is_text else [], [])
    if kind == "message_delta":
        return _AnswerPart([], [], finish=_word(object_of(value.get("delta")).get("stop_reason")))
    return _AnswerPart([], [], ends=kind == "message_stop") if isinstance(kind, str) else None


def _block_text(block: Mapping[str, Any]) -> list[str]:
    return _texts(block.get("text")) if block.get("type") == "text" else []


def _texts(content: Any) -> list[str]:
    """Return the texts of a content: a string, or at some servers a list of parts."""
    if isinstance(content, str):
        return [content] if content else []
    return [text for one in objects_in(content) for text in _block_text(one)]


def _word(value: Any) -> str | None:
    return value[:100] if isinstance(value, str) and value else None


def _pictures(data: list[Any]) -> Iterator[Media]:
    for one in objects_in(data):
        if isinstance(text := one.get("b64_json"), str):
            if (found := _DATA_URL.match(text)) is not None:
                text = text[found.end() :]
            with suppress(NotBase64, ValueError):  # not a picture: the answer is empty
                raw = b64decode(text, validate=True)
                yield Media(_type_of(raw), raw)


def picture_type_of(stated: str, picture: bytes) -> str:
    """Return the type of an answer's picture as its provider states it, without parameters; by its
    first bytes if the stated type is not one of an image file."""
    kind = stated.partition(";")[0].strip().lower()
    return kind if _PICTURE_TYPE.fullmatch(kind) else _type_of(picture)


def _type_of(picture: bytes) -> str:
    """Return the type of a picture by its first bytes, since answers do not always state it."""
    if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        return _WEBP
    return next((kind for magic, kind in _MAGIC if picture.startswith(magic)), _PNG)
