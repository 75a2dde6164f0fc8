"""GeminiProcessor: one call of Gemini by Google's `google-genai` SDK.

The SDK's own loops (automatic function calling and continuation) are switched off: one request, one
attempt. The request is built of light types, because the SDK's converters are slow on pydantic
models.

Invariants: `run` ends only after its upstream responses are closed, so that a permit around `run`
covers the whole call; it raises only UpstreamErrors, the sink's own exception and cancellation; a
piece is part of `answer` before its event is emitted; uploaded files are always deleted; the upload
URL, which contains the key, is never logged. Only `GeminiProcessor.start` imports the SDK.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tidegate.call import (
    Answer,
    Call,
    Delta,
    Event,
    Kind,
    Media,
    Picture,
    Sink,
    Tier,
    UsageReport,
)
from tidegate.classify import (
    MAX_ANSWER_TOKENS,
    judge_instruction,
    judge_kinds,
    judge_texts,
    judgement,
)
from tidegate.dialects.answers import with_searches, with_tier
from tidegate.dialects.gemini import usage_of
from tidegate.dialects.prompts import picture_type_of
from tidegate.errors import (
    EmptyAnswer,
    PromptBlocked,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from tidegate.policy.access import Access, AccessOptions, Authentication
from tidegate.telemetry.logging import Log, get_logger
from tidegate.upstream._compat import make_requests_once
from tidegate.upstream.transport import Signer, Timeouts

if TYPE_CHECKING:
    import httpx2
    from google.genai.client import AsyncClient
    from google.genai.types import (
        Candidate,
        File,
        GenerateContentResponse,
        GenerateContentResponseUsageMetadata,
        Part,
    )

    from tidegate.upstream.gemini_transport import CallScope, SdkClient, Settings


class AnswerReader:
    """Reads the chunks of an answer into `answer`.

    chunk  --take-->  events, in order       end of stream  --finish-->  success, or an error
    """

    def __init__(self, kind: Kind, answer: Answer) -> None:
        self._kind = kind
        self._answer = answer
        self._block_reason: str | None = None
        self._chunks = 0
        self._blanks = 0
        self._candidates = 0
        self._queries: set[str] = set()
        self._reported: dict[str, Any] = {}  # keeps fields that a later chunk lacks

    def take(self, chunk: GenerateContentResponse) -> list[Event]:
        """Add a chunk to the answer. Return its events: text and pictures, then the usage if it
        changed."""
        if not chunk.model_fields_set - {"sdk_http_response"}:
            # JSON without any known field: the SDK parses `null`, text and lists as that.
            self._blanks += 1
            return []
        self._chunks += 1
        answer = self._answer
        answer.model_version = chunk.model_version or answer.model_version
        answer.response_id = chunk.response_id or answer.response_id
        feedback = chunk.prompt_feedback
        if feedback is not None and feedback.block_reason is not None:
            self._block_reason = word(feedback.block_reason)
        events: list[Event] = []
        if chunk.candidates:
            self._candidates += 1
            events += self._take_candidate(chunk.candidates[0])
        if chunk.usage_metadata is not None:
            self._reported |= _reported(chunk.usage_metadata)
        usage = with_searches(usage_of(self._reported), len(self._queries))
        if usage != answer.usage:
            answer.usage = usage
            events.append(UsageReport(usage))
        return events

    def _take_candidate(self, candidate: Candidate) -> list[Event]:
        if candidate.finish_reason is not None:
            self._answer.finish_reason = word(candidate.finish_reason)
        grounding = candidate.grounding_metadata
        if grounding is not None:
            self._queries.update(filter(None, grounding.web_search_queries or ()))
        content = candidate.content
        events: list[Event] = []
        for part in (content.parts if content is not None else None) or ():
            event = _event_of(part)
            if isinstance(event, Delta):
                self._answer.text.append(event.text)
            elif isinstance(event, Picture):
                self._answer.pictures.append(event.media)
            if event is not None:
                events.append(event)
        return events

    def finish(self) -> None:
        """Check the answer at the end of the stream.

        Raises PromptBlocked, EmptyAnswer, UpstreamGarbled if nothing in the stream was an answer,
        or UpstreamUnavailable if the stream was cut: an answer ends with a finish reason, so
        content without one is incomplete.
        """
        answer = self._answer
        if self._blanks and not self._chunks:
            raise UpstreamGarbled("the provider's answer violates its protocol")
        content = bool(answer.text or answer.pictures)
        if self._block_reason is not None and not content:
            answer.finish_reason = answer.finish_reason or self._block_reason
            raise PromptBlocked(
                f"the provider refused the prompt ({self._block_reason})",
                reason=self._block_reason,
            )
        if answer.finish_reason is None and (content or self._candidates or not self._chunks):
            raise UpstreamUnavailable("the provider's answer was cut off before its end")
        if not content or (self._kind is Kind.IMAGE_GENERATION and not answer.pictures):
            missing = "picture" if self._kind is Kind.IMAGE_GENERATION else "content"
            raise EmptyAnswer(
                f"the provider's answer has no {missing} ({answer.finish_reason or 'no reason'})",
                finish_reason=answer.finish_reason,
            )


def _event_of(part: Part) -> Delta | Picture | None:
    if part.thought:
        return None
    if part.text:
        return Delta(part.text)
    blob = part.inline_data
    if blob is not None and blob.data and (blob.mime_type or "").startswith("image/"):
        return Picture(Media(picture_type_of(str(blob.mime_type), blob.data), blob.data))
    return None


def _reported(usage: GenerateContentResponseUsageMetadata) -> dict[str, Any]:
    """Return a usage by the provider's names, without negative numbers."""
    raw = usage.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {name: one for name, one in raw.items() if not isinstance(one, int) or one >= 0}


def word(reason: Any) -> str:
    """Return the provider's name of an enumerated value, also one that the SDK does not know."""
    return str(getattr(reason, "value", reason))[:100]


ONE_ATTEMPT: Mapping[str, Any] = {
    "automatic_continuation": False,
    "automatic_function_calling": {"disable": True},
}
_MODELS_KEPT = 256
_MODEL = re.compile(r"(?:(?:models|tunedModels)/)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@lru_cache(_MODELS_KEPT)
def model_path(model: str) -> str:
    """Return `model` as part of a URL. Raises UpstreamRejected for anything but a plain name."""
    if not _MODEL.fullmatch(model) or ".." in model:
        raise UpstreamRejected("the name of the model is not valid at the provider")
    return model


def settings_of(kind: Kind, tier: Tier = Tier.LIVE) -> dict[str, Any]:
    """Return the generation settings of a call."""
    settings = dict(ONE_ATTEMPT)
    if kind is Kind.IMAGE_GENERATION:
        settings["response_modalities"] = ["TEXT", "IMAGE"]
    if tier is Tier.FLEX:
        settings["service_tier"] = tier.value
    return settings


def turn(prompt: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a user turn: the files, then the prompt if there is one."""
    text = [{"text": prompt}] if prompt else []
    return {"role": "user", "parts": [*parts, *text]}


def inline(media: Media) -> dict[str, Any]:
    return {"inline_data": {"data": media.data, "mime_type": media.mime_type}}


def too_large_for_inline(media: Sequence[Media], inline_max_bytes: int) -> set[int]:
    """Return the indexes of the files to upload first: the largest ones, until the rest fits
    inline."""
    if not media:
        return set()
    rest_bytes = sum(len(item.data) for item in media)
    chosen: set[int] = set()
    for index in sorted(range(len(media)), key=lambda index: -len(media[index].data)):
        if rest_bytes <= inline_max_bytes:
            break
        chosen.add(index)
        rest_bytes -= len(media[index].data)
    return chosen


def judge_question(prompt: str, mime_types: Sequence[str]) -> list[dict[str, Any]]:
    """Return the classification question as a user turn."""
    parts = [{"text": text} for text in judge_texts(prompt, mime_types)]
    return [{"role": "user", "parts": parts}]


def judge_settings(mime_types: Sequence[str]) -> dict[str, Any]:
    """Return settings for structured output that can name only kinds which the attachments
    allow."""
    return {
        **ONE_ATTEMPT,
        "system_instruction": judge_instruction(mime_types),
        "temperature": 0.0,
        "max_output_tokens": MAX_ANSWER_TOKENS,
        "response_mime_type": "application/json",
        "response_schema": {
            "type": "OBJECT",
            "properties": {
                "kind": {"type": "STRING", "enum": judge_kinds(mime_types)},
                "reason": {"type": "STRING"},
            },
            "required": ["kind", "reason"],
            "property_ordering": ["kind", "reason"],
        },
    }


POLL_FIRST_MS = 100
POLL_LONGEST_MS = 2_000
READY_WITHIN_MS = 120_000


async def upload(client: AsyncClient, media: Media, names: list[str]) -> dict[str, Any]:
    """Upload a file and return its request part; its name is appended to `names`.

    Raises UpstreamRejected if the provider cannot process the file, UpstreamTimeout if it is not
    usable within 120 s, and the SDK's errors.
    """
    config: dict[str, Any] = {"mime_type": media.mime_type}
    if media.name:
        config["display_name"] = media.name[:512]
    file = await client.files.upload(file=io.BytesIO(media.data), config=config)  # type: ignore[arg-type]
    if not file.name:
        raise UpstreamGarbled("the provider gave an uploaded file no name")
    names.append(file.name)
    file = await _usable(client, file, file.name)
    return {"file_data": {"file_uri": file.uri, "mime_type": file.mime_type or media.mime_type}}


async def _usable(client: AsyncClient, file: File, name: str) -> File:
    wait_ms = POLL_FIRST_MS
    try:
        async with asyncio.timeout(READY_WITHIN_MS / 1000) as limit:
            while (state := str(getattr(file.state, "value", file.state))) == "PROCESSING":
                await asyncio.sleep(wait_ms / 1000)
                wait_ms = min(wait_ms * 2, POLL_LONGEST_MS)
                file = await client.files.get(name=name)
    except TimeoutError:
        if limit.expired():
            raise UpstreamTimeout(
                f"the provider had not processed a file after {READY_WITHIN_MS} ms", phase="total"
            ) from None
        raise
    if state == "FAILED":
        raise UpstreamRejected("the provider could not process an uploaded file")
    if not file.uri:
        raise UpstreamGarbled("the provider gave an uploaded file no address")
    return file


MAX_ANSWER_BYTES = 64_000_000
API_VERSION = "v1beta"
_NO_KEY = "none"  # the SDK requires a key; the transport sends the upstream's
FORGET_WITHIN_MS = 10_000
CLOSE_WITHIN_S = 2.0


@dataclass(frozen=True, slots=True)
class _Sdk:
    """The imported SDK, connected to this package's transport."""

    client: AsyncClient
    connections: SdkClient
    faults: tuple[type[Exception], ...]
    settings: Mapping[tuple[Kind, Tier], Settings]


class GeminiProcessor:
    """Calls Gemini. `start` imports the SDK (half a second of CPU, in a thread, and 25 MB);
    otherwise the first call does. One processor per event loop, for any number of concurrent calls.
    """

    def __init__(
        self,
        *,
        api_key: str,
        base_url: str,
        timeouts: Timeouts,
        inline_max_bytes: int = 20_000_000,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        access: Access | None = None,
        signers: Mapping[Authentication, Signer] | None = None,
    ) -> None:
        """`base_url` may have a path; the version (`v1beta`) is appended unless the URL ends with
        it. Files are sent inline up to `inline_max_bytes` in total, and uploaded through the Files
        API above that. access: that of the upstream, if it has more than an address and a key.
        signers: hold its credentials."""
        self._api_key = api_key
        self._base_url = base_url.rstrip("/").removesuffix(f"/{API_VERSION}")
        self._access = access or AccessOptions().access("gemini", self._base_url, api_key)
        self._signers = signers or {}
        self._timeouts = timeouts
        self._inline_max_bytes = inline_max_bytes
        self._max_answer_bytes = max_answer_bytes
        self._sdk: _Sdk | None = None
        self._starting = asyncio.Lock()
        self._chores: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<GeminiProcessor {self._base_url} open_calls={self.open_calls}>"

    @property
    def open_calls(self) -> int:
        """Return the number of open HTTP exchanges with the provider, housekeeping included."""
        return len(self._sdk.connections.open_exchanges) if self._sdk is not None else 0

    async def aclose(self) -> None:
        """Wait up to 2 s for deletions of uploaded files, then close all connections."""
        if self._chores:
            _, late = await asyncio.wait(self._chores, timeout=CLOSE_WITHIN_S)
            for chore in late:
                chore.cancel()
        if self._sdk is not None:
            await self._sdk.connections.aclose()

    async def run(self, call: Call, answer: Answer, sink: Sink | None) -> None:
        """Make the call and fill `answer`; push Delta, Picture and UsageReport events into `sink`
        as they arrive. `answer` keeps what was received also if this raises or is cancelled.
        Without a sink the answer is parsed once at its end, which costs a fraction of parsing many
        small events.

        Raises subclasses of UpstreamError, and exceptions of `sink` unchanged. Cancellation at any
        point closes the upstream connection before this returns.
        """
        from tidegate.upstream.gemini_transport import CallScope, turn_of

        sdk = self._sdk or await self.start()
        model = model_path(call.model)
        uploaded: list[str] = []
        scope = CallScope(
            self._timeouts.total_ms,
            gathers=sink is None,
            traceparent=call.traceparent,
            tier="" if call.tier is Tier.LIVE else call.tier,
        )
        try:
            async with scope:
                parts = await self._parts(sdk, scope, call, uploaded) if call.media else []
                reading = AnswerReader(call.kind, answer)
                chunks = None
                while True:
                    # Only around the SDK's awaits: the sink's exceptions are raised unchanged.
                    try:
                        if chunks is None:
                            # Images are streamed too: idle time can then be measured, and text
                            # arrives early.
                            chunks = await sdk.client.models.generate_content_stream(
                                model=model,
                                contents=turn_of(turn(call.prompt, parts)),
                                config=sdk.settings[call.kind, call.tier],
                            )
                        chunk = await anext(chunks, None)
                        events = reading.take(chunk) if chunk is not None else None
                    except sdk.faults as failure:
                        raise scope.error_of(failure, self._api_key) from None
                    if events is None:
                        break
                    if sink is not None:
                        for event in events:
                            await sink(event)
                self._finish(reading, scope)
        finally:
            answer.first_byte_ms = scope.first_byte_ms
            answer.usage = with_tier(answer.usage, scope.served_tier)
            if uploaded:
                self._forget_later(sdk, uploaded)

    async def judge(
        self, prompt: str, mime_types: Sequence[str], *, model: str, answer: Answer
    ) -> tuple[Kind, str]:
        """Classify the request by an LLM and return its kind and a short reason. The prompt is
        passed as data, cut to 4,000 characters; `answer` is filled with the answer. Raises
        subclasses of UpstreamError. The caller sets the time limit and cancels."""
        from tidegate.upstream.gemini_transport import CallScope

        sdk = await self.start()
        async with CallScope(self._timeouts.total_ms) as scope:
            with self._translated(sdk, scope):
                response = await sdk.client.models.generate_content(
                    model=model_path(model),
                    contents=judge_question(prompt, mime_types),
                    config=judge_settings(mime_types),  # type: ignore[arg-type]
                )
                reading = AnswerReader(Kind.TEXT_ONLY, answer)
                reading.take(response)
            answer.usage = with_tier(answer.usage, scope.served_tier)
            if not answer.text:
                self._finish(reading, scope)
                raise EmptyAnswer(
                    "the classifier's model gave no answer", finish_reason=answer.finish_reason
                )
            return judgement(answer.whole_text, mime_types)

    async def _parts(
        self, sdk: _Sdk, scope: CallScope, call: Call, uploaded: list[str]
    ) -> list[dict[str, Any]]:
        large: set[int] = set()
        if call.kind is not Kind.IMAGE_GENERATION:
            large = too_large_for_inline(call.media, self._inline_max_bytes)
        parts = []
        for index, media in enumerate(call.media):
            if index not in large:
                parts.append(inline(scope.stand_in(media)))
                continue
            with self._translated(sdk, scope):
                parts.append(await upload(sdk.client, media, uploaded))
        return parts

    @contextmanager
    def _translated(self, sdk: _Sdk, scope: CallScope) -> Iterator[None]:
        try:
            yield
        except sdk.faults as failure:
            raise scope.error_of(failure, self._api_key) from None

    def _finish(self, reading: AnswerReader, scope: CallScope) -> None:
        try:
            reading.finish()
        except UpstreamError:
            # The SDK recognises an error object only as the first key of its chunk.
            if (hidden := scope.error_in_answer(self._api_key)) is not None:
                raise hidden from None
            raise

    def _forget_later(self, sdk: _Sdk, names: Sequence[str]) -> None:
        """Delete files in a task of its own, so that the permit is not held meanwhile; `aclose`
        awaits it."""
        chore = asyncio.create_task(self._forget(sdk, tuple(names)))
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    async def _forget(self, sdk: _Sdk, names: Sequence[str]) -> None:
        from tidegate.upstream.gemini_transport import CallScope

        for name in names:
            try:
                async with CallScope(FORGET_WITHIN_MS) as scope:
                    with self._translated(sdk, scope):
                        await sdk.client.files.delete(name=name)
            except UpstreamError as failure:
                get_logger().warning(
                    Log.INTERNAL_ERROR, what="uploaded file not deleted", error=str(failure)
                )

    async def start(self) -> _Sdk:
        """Import the SDK and build its client. Further calls do nothing."""
        if self._sdk is None:
            async with self._starting:
                if self._sdk is None:
                    self._sdk = await asyncio.to_thread(self._connect)
        return self._sdk

    def _connect(self) -> _Sdk:
        import httpx2
        from google import genai
        from google.genai import errors, types

        from tidegate.upstream.gemini_transport import SdkClient, Settings, tls_context

        # These loggers log whole URLs, and an upload's URL contains the key.
        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # An unknown finish reason must not put a warning into our log.
        warnings.filterwarnings("ignore", message=".* is not a valid [A-Z]", category=UserWarning)
        connections = SdkClient(
            self._timeouts, self._max_answer_bytes, (self._base_url, self._access), self._signers
        )
        client = genai.Client(
            vertexai=False,
            api_key=_NO_KEY,
            http_options=types.HttpOptions(
                base_url=self._base_url,
                api_version=API_VERSION,
                httpx_async_client=connections,
                # For websockets, which are not used: without it the SDK loads certificates again.
                async_client_args={"ssl": tls_context()},
                # Never used; without it the SDK would build one, with its own certificates and
                # proxies.
                httpx_client=httpx2.Client(transport=httpx2.MockTransport(_no_sync_calls)),
            ),
        )
        make_requests_once(client)
        wire_faults = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError)
        # The SDK raises these on answers of an unexpected shape.
        shape_faults = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
        known_faults = (UpstreamError, errors.APIError, *wire_faults, *shape_faults)
        settings = {
            (kind, tier): Settings(**settings_of(kind, tier))
            for kind in Kind
            for tier in (Tier.LIVE, Tier.FLEX)
        }
        return _Sdk(client.aio, connections, known_faults, settings)


def _no_sync_calls(request: httpx2.Request) -> httpx2.Response:
    raise RuntimeError("only the SDK's async client is connected")
