"""From Gemini's response chunks to events and the answer. Pure.

Invariant: the answer holds a piece before its event is given out, so that whatever interrupts the
call, what was received is kept. What the end of an answer means is decided in `finish` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tidegate.call import Answer, Delta, Event, Kind, Media, Picture, Usage, UsageReport
from tidegate.dialects.usage_details import modality_details, with_searches
from tidegate.errors import EmptyAnswer, PromptBlocked, UpstreamGarbled, UpstreamUnavailable

if TYPE_CHECKING:
    from google.genai.types import (
        Candidate,
        GenerateContentResponse,
        ModalityTokenCount,
        Part,
    )


class Reading:
    """Reads the chunks of one answer into `answer`.

    chunk  --take-->  events, in order       end of stream  --finish-->  fine, or an UpstreamError
    """

    def __init__(self, kind: Kind, answer: Answer) -> None:
        self._kind = kind
        self._answer = answer
        self._block_reason: str | None = None
        self._chunks = 0
        self._blanks = 0
        self._candidates = 0
        self._queries: set[str] = set()

    def take(self, chunk: GenerateContentResponse) -> list[Event]:
        """The chunk's events: text and pictures, then the usage when it has changed."""
        if not chunk.model_fields_set - {"sdk_http_response"}:
            # JSON, but nothing of ours in it: the SDK reads `null`, text and lists like that.
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
        usage = with_searches(usage_of(chunk, answer.usage), len(self._queries))
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
        """The stream has ended. Raises PromptBlocked, EmptyAnswer, UpstreamGarbled when nothing in
        it was an answer, or UpstreamUnavailable when it was cut: an answer ends with a finish
        reason, so content without one is only a part.
        """
        answer = self._answer
        if self._blanks and not self._chunks:
            raise UpstreamGarbled("the provider's answer is not what its protocol says")
        content = bool(answer.text or answer.pictures)
        if self._block_reason is not None and not content:
            raise PromptBlocked(
                f"the provider refused the prompt ({self._block_reason})",
                reason=self._block_reason,
            )
        if answer.finish_reason is None and (content or self._candidates or not self._chunks):
            raise UpstreamUnavailable("the provider's answer broke off before its end")
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
        return Picture(Media(mime_type=str(blob.mime_type), data=blob.data))
    return None


def usage_of(chunk: GenerateContentResponse, before: Usage) -> Usage:
    """The usage so far: figures that a chunk leaves out keep their last value."""
    said = chunk.usage_metadata
    if said is None:
        return before
    return Usage(
        input_tokens=_later(said.prompt_token_count, before.input_tokens),
        output_tokens=_later(said.candidates_token_count, before.output_tokens),
        thoughts_tokens=_later(said.thoughts_token_count, before.thoughts_tokens),
        cached_tokens=_later(said.cached_content_token_count, before.cached_tokens),
        total_tokens=_later(said.total_token_count, before.total_tokens),
        details=modality_details(
            [*_counts(said.prompt_tokens_details), *_counts(said.tool_use_prompt_tokens_details)],
            _counts(said.candidates_tokens_details),
        )
        or before.details,
    )


def _counts(details: list[ModalityTokenCount] | None) -> list[tuple[str, int | None]]:
    return [(word(one.modality), one.token_count) for one in details or ()]


def _later(said: int | None, before: int | None) -> int | None:
    return before if said is None or said < 0 else said


def word(reason: Any) -> str:
    """The provider's own word, also where the SDK's enumeration does not know it."""
    return str(getattr(reason, "value", reason))[:100]
