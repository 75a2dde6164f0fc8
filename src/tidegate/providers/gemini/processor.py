"""GeminiProcessor: one call to Gemini, on Google's `google-genai` SDK.

Invariants: one attempt, never a retry; `run` returns or raises only after its upstream responses
are really closed, so a permit held around it covers the whole upstream call; only UpstreamErrors,
the sink's own exception and cancellation come out.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidegate.call import Answer, Call, Kind, Sink
from tidegate.errors import EmptyAnswer, UpstreamError, UpstreamGarbled
from tidegate.providers.gemini import faults, request, uploads
from tidegate.providers.gemini.reading import Reading
from tidegate.providers.gemini.timeouts import Timeouts
from tidegate.telemetry import Log, get_logger

if TYPE_CHECKING:
    import httpx2
    from google.genai.client import AsyncClient

    from tidegate.providers.gemini.typed import Settings
    from tidegate.providers.gemini.wire import Scope, Wire

MAX_ANSWER_BYTES = 64_000_000
API_VERSION = "v1beta"
FORGET_WITHIN_MS = 10_000
CLOSE_WITHIN_S = 2.0


@dataclass(frozen=True, slots=True)
class _Sdk:
    """The SDK, once imported and connected to our transport."""

    client: AsyncClient
    wire: Wire
    faults: tuple[type[Exception], ...]
    settings: Mapping[Kind, Settings]


class GeminiProcessor:
    """Calls Gemini. `start` imports the SDK (1 to 2 s of CPU, in a thread); without it the first
    call does. One processor per event loop; any number of calls at once.
    """

    def __init__(
        self,
        *,
        api_key: str,
        base_url: str,
        timeouts: Timeouts,
        inline_max_bytes: int = 20_000_000,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        """`base_url` may have a path; the version (`v1beta`) is appended unless it ends with it.
        Files go inline up to `inline_max_bytes` in all, beyond that through the Files API.
        """
        self._api_key = api_key
        self._base_url = base_url.rstrip("/").removesuffix(f"/{API_VERSION}")
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
        """HTTP exchanges with the provider that are open now, housekeeping included."""
        return len(self._sdk.wire.open_exchanges) if self._sdk is not None else 0

    async def start(self) -> None:
        """Import the SDK and build its client. Repeating it does nothing."""
        await self._started()

    async def aclose(self) -> None:
        """Give deletions of uploaded files up to 2 s, then close every connection."""
        if self._chores:
            _, late = await asyncio.wait(self._chores, timeout=CLOSE_WITHIN_S)
            for chore in late:
                chore.cancel()
        if self._sdk is not None:
            await self._sdk.wire.aclose()

    async def run(self, call: Call, answer: Answer, sink: Sink | None) -> None:
        """Make the call, push Delta, Picture and UsageReport events into `sink` as they arrive and
        fill `answer`, which keeps what was received also when this raises or is cancelled. Without
        a sink the answer is read at its end, for a fraction of what many small events cost.

        Raises UpstreamError's subclasses, and whatever `sink` raises, unchanged. Cancellation at
        any point closes the upstream connection before it comes out of here.
        """
        from tidegate.providers.gemini.typed import turn_of
        from tidegate.providers.gemini.wire import Scope

        sdk = self._sdk or await self._started()
        model = request.model_path(call.model)
        uploaded: list[str] = []
        scope = Scope(self._timeouts.total_ms, gathers=sink is None, traceparent=call.traceparent)
        try:
            async with scope:
                parts = await self._parts(sdk, scope, call, uploaded) if call.media else []
                reading = Reading(call.kind, answer)
                chunks = None
                while True:
                    # Round SDK awaits only: the sink's exceptions must come out as they are.
                    try:
                        if chunks is None:
                            # Images are streamed too: idle time is then seen, and text comes early.
                            chunks = await sdk.client.models.generate_content_stream(
                                model=model,
                                contents=turn_of(request.turn(call.prompt, parts)),
                                config=sdk.settings[call.kind],
                            )
                        chunk = await anext(chunks, None)
                        events = reading.take(chunk) if chunk is not None else None
                    except sdk.faults as failure:
                        raise self._ours(failure, scope) from None
                    if events is None:
                        break
                    if sink is not None:
                        for event in events:
                            await sink(event)
                self._finish(reading, scope)
        finally:
            answer.first_byte_ms = scope.first_byte_ms
            if uploaded:
                self._forget_later(sdk, uploaded)

    async def judge(
        self, prompt: str, mime_types: Sequence[str], *, model: str, answer: Answer
    ) -> tuple[Kind, str]:
        """Ask an LLM what the request wants: its kind and a short reason. The prompt is data, cut
        to 4,000 characters; `answer` is filled with what came. Raises UpstreamError's subclasses;
        the caller bounds and cancels it.
        """
        from tidegate.providers.gemini.wire import Scope

        sdk = await self._started()
        async with Scope(self._timeouts.total_ms) as scope:
            with self._translated(sdk, scope):
                response = await sdk.client.models.generate_content(
                    model=request.model_path(model),
                    contents=request.judge_question(prompt, mime_types),
                    config=request.judge_settings(mime_types),  # type: ignore[arg-type]
                )
                reading = Reading(Kind.TEXT_ONLY, answer)
                reading.take(response)
            if not answer.text:
                self._finish(reading, scope)
                raise EmptyAnswer("the judge said nothing", finish_reason=answer.finish_reason)
            return request.judgement(answer.whole_text, mime_types)

    async def count_tokens(self, call: Call) -> int:
        """LLM tokens of the call's input, files inline. Raises UpstreamError's subclasses."""
        from tidegate.providers.gemini.wire import Scope

        sdk = await self._started()
        parts = [request.inline(media) for media in call.media]
        async with Scope(self._timeouts.total_ms) as scope:
            with self._translated(sdk, scope):
                response = await sdk.client.models.count_tokens(
                    model=request.model_path(call.model),
                    contents=request.turn(call.prompt, parts),
                )
            self._raise_hidden_error(scope, response.total_tokens is None)
            if response.total_tokens is None or response.total_tokens < 0:
                raise UpstreamGarbled("the provider gave no number of tokens")
            return response.total_tokens

    async def _parts(
        self, sdk: _Sdk, scope: Scope, call: Call, uploaded: list[str]
    ) -> list[dict[str, Any]]:
        large: set[int] = set()
        if call.kind is not Kind.IMAGE_GENERATION:
            large = request.too_large_for_inline(call.media, self._inline_max_bytes)
        parts = []
        for index, media in enumerate(call.media):
            if index not in large:
                parts.append(request.inline(media))
                continue
            with self._translated(sdk, scope):
                parts.append(await uploads.upload(sdk.client, media, uploaded))
        return parts

    @contextmanager
    def _translated(self, sdk: _Sdk, scope: Scope) -> Iterator[None]:
        try:
            yield
        except sdk.faults as failure:
            raise self._ours(failure, scope) from None

    def _ours(self, failure: Exception, scope: Scope) -> UpstreamError:
        """To be raised `from None`: the SDK's texts hold whole foreign bodies, and may hold the
        upload URL."""
        return faults.translate(failure, scope.wreck(), secret=self._api_key)

    def _finish(self, reading: Reading, scope: Scope) -> None:
        try:
            reading.finish()
        except UpstreamError:
            # The SDK sees an error object only when it is the first key of its chunk.
            self._raise_hidden_error(scope, True)
            raise

    def _raise_hidden_error(self, scope: Scope, suspected: bool) -> None:
        wreck = scope.wreck()
        error = faults.error_in(wreck.tail) if suspected and wreck is not None else None
        if error is not None and wreck is not None:
            code = faults.code_of(error)
            raise faults.from_status(code, error, wreck.headers, secret=self._api_key)

    def _forget_later(self, sdk: _Sdk, names: Sequence[str]) -> None:
        """Deleting must not hold up the permit: a task of its own, awaited by `aclose`."""
        chore = asyncio.create_task(self._forget(sdk, tuple(names)))
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    async def _forget(self, sdk: _Sdk, names: Sequence[str]) -> None:
        from tidegate.providers.gemini.wire import Scope

        for name in names:
            try:
                async with Scope(FORGET_WITHIN_MS) as scope:
                    with self._translated(sdk, scope):
                        await sdk.client.files.delete(name=name)
            except UpstreamError as failure:
                get_logger().warning(
                    Log.INTERNAL_ERROR, what="uploaded file not deleted", error=str(failure)
                )

    async def _started(self) -> _Sdk:
        if self._sdk is None:
            async with self._starting:
                if self._sdk is None:
                    self._sdk = await asyncio.to_thread(self._connect)
        return self._sdk

    def _connect(self) -> _Sdk:
        import httpx2
        from google import genai
        from google.genai import errors, types

        from tidegate.providers.gemini.typed import Settings
        from tidegate.providers.gemini.wire import Wire

        # These loggers' lines show whole URLs, and an upload's URL holds the key.
        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # A finish reason that the SDK does not know yet is no reason for a warning in our log.
        warnings.filterwarnings("ignore", message=".* is not a valid [A-Z]", category=UserWarning)
        wire = Wire(self._timeouts, self._max_answer_bytes)
        client = genai.Client(
            vertexai=False,
            api_key=self._api_key,
            http_options=types.HttpOptions(
                base_url=self._base_url,
                api_version=API_VERSION,
                httpx_async_client=wire,
                # Never used, but the SDK would build one, with certificates and proxies of its own.
                httpx_client=httpx2.Client(transport=httpx2.MockTransport(_no_sync_calls)),
            ),
        )
        wire_faults = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError)
        # The SDK fails with these on answers of a wrong shape.
        shape_faults = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
        known_faults = (UpstreamError, errors.APIError, *wire_faults, *shape_faults)
        settings = {kind: Settings(**request.settings_of(kind)) for kind in Kind}
        return _Sdk(client.aio, wire, known_faults, settings)


def _no_sync_calls(request: httpx2.Request) -> httpx2.Response:
    raise RuntimeError("only the SDK's async client is connected")
