"""Lines of providers' batches: requests built from jobs, and answers read into their records.

A line is the request that the call would send: a native body with the upstream's name for the
model, or a prompt as a body of its upstream's dialect. A line costs the price of the provider's
tier `batch`, and takes none of the gateway's limits on calls.

Invariant: a call becomes a line only if the batch price of its model is known.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import orjson

from tidegate.admission.charges import charge_of, cut_charge, is_complete, is_unknown
from tidegate.call import (
    UNKNOWN_CHARGE,
    Call,
    CallCost,
    Charge,
    Kind,
    Media,
    Tier,
    Usage,
    UsageDetails,
)
from tidegate.dialects import DIALECTS
from tidegate.dialects.answers import visible_output
from tidegate.dialects.parsing import Skimmed, skimmed
from tidegate.dialects.prompts import (
    Files,
    PromptAnswer,
    endpoint_for,
    picture_type_of,
    prompt_call,
)
from tidegate.dialects.requests import cache_write_of, check_named_once
from tidegate.dialects.spec import Dialect, Endpoint, Operation, RequestFacts
from tidegate.errors import EmptyAnswer, InvalidRequest, NotFound, PromptBlocked, UpstreamGarbled
from tidegate.prices.rates import Rates
from tidegate.record import KEPT_BYTES, CallRecord
from tidegate.spine.bodies import NativeCall, body_for
from tidegate.spine.native import NativeExchange, Relay
from tidegate.spine.out import NothingOut
from tidegate.spine.prompt import PromptExchange, PromptWays, dialect_at, files_of, form_at
from tidegate.spine.routing import Target
from tidegate.spine.run import Terms
from tidegate.upstream.batch_api import takes

MOST_MEDIA_BYTES = 12_000_000  # of a prompt's files, which are sent inline
_TIER = Tier.BATCH.value
_MOST_WORD = 100
PROMPTS = "/v1beta/models/{model}:generateContent"


@dataclass(frozen=True, slots=True)
class BatchableCall:
    """A call as a line of a batch. cost: None if there are no budgets."""

    target: Target
    body: bytes
    cost: CallCost | None


def prompt_endpoint(dialect: Dialect, kind: Kind, model: str) -> Endpoint:
    """Return the native endpoint that a prompt calls."""
    if dialect is Dialect.GEMINI:
        return Endpoint(dialect, Operation.INFER, PROMPTS, model=model)
    return endpoint_for(dialect, draws=kind is Kind.IMAGE_GENERATION)


class BatchedCalls:
    """Builds lines and reads their answers. One per process."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._spine = relay.spine

    def target(self, endpoint: Endpoint, model: str) -> Target | None:
        """Return the upstream whose batches take a call; None if there is none."""
        if not takes(endpoint):
            return None
        try:
            targets = self._spine.targets.of(endpoint.dialect, model)
        except NotFound:
            return None
        return next((one for one in targets if self._takes_part(one)), None)

    def prompt_target(self, model: str, kind: Kind, files: Files) -> tuple[Endpoint, Target] | None:
        """Return the endpoint and the upstream whose batches take a prompt; None if there is
        none."""
        try:
            targets = self._spine.targets.of_prompt(model, kind, files)
        except (InvalidRequest, NotFound):
            return None
        for target in targets:
            endpoint = prompt_endpoint(dialect_at(target, kind, files), kind, model)
            if takes(endpoint) and self._takes_part(target):
                return endpoint, target
        return None

    def _takes_part(self, target: Target) -> bool:
        """Whether a target has a known batch price and takes new calls."""
        is_drained = self._spine.account(target).gate.drained
        return not is_drained and self._rates(target, target.model) is not None

    def _rates(self, target: Target, model: str) -> Rates | None:
        return self._spine.account(target).demands.prices.of(model, _TIER)

    def of_native(self, call: NativeCall, target: Target, record: CallRecord) -> BatchableCall:
        """Return a native call as a line. Raises InvalidRequest and PayloadTooLarge."""
        read, facts = _read(call)
        spec = DIALECTS[call.endpoint.dialect]
        check_named_once(read.raw, read.body)
        if references := spec.references(read.body, read.raw):
            message = f"{references[0].field} names what only a call of its own may reach"
            raise InvalidRequest(references[0].field, message)
        body = body_for(call.body, call.endpoint, read.body, target, request_usage=False) or b"{}"
        if b"\n" in body:  # a line of a file must not contain a line end
            body = orjson.dumps(orjson.loads(body))
        cost = None
        if self._spine.budgets.any:
            exchange = NativeExchange(
                self._relay.wire, self._spine.timeouts, call, read.body, facts, NothingOut(), record
            )
            account = self._spine.account(target)
            cost = exchange.cost(target, account, exchange.demand(target, account), tier=_TIER)
        return BatchableCall(target, body, cost)

    def of_prompt(
        self, call: Call, terms: Terms, target: Target, record: CallRecord
    ) -> BatchableCall:
        """Return a prompt as a line. Raises InvalidRequest for files that are too large."""
        if sum(len(one.data) for one in call.media) > MOST_MEDIA_BYTES:
            raise InvalidRequest(
                "files",
                "the files are too large for a provider's batch",
                allowed=f"at most {MOST_MEDIA_BYTES} bytes",
            )
        account = self._spine.account(target)
        dialect = dialect_at(target, call.kind, files_of(call.media))
        if dialect is Dialect.GEMINI:
            body = orjson.dumps(_generate(call))
        else:
            form = form_at(target, account, streams=False)
            body = prompt_call(dialect, replace(call, model=target.model), form).body
        cost = None
        if self._spine.budgets.any:
            ways = PromptWays({}, self._relay.wire, self._spine.timeouts)
            exchange = PromptExchange(terms, ways, call, record)
            cost = exchange.cost(target, account, exchange.demand(target, account), tier=_TIER)
        return BatchableCall(target, body, cost)

    # Answers

    def read(
        self,
        record: CallRecord,
        endpoint: Endpoint,
        target: Target,
        answer: bytes,
        kind: Kind | None,
    ) -> None:
        """Read a successful answer into the record, with its charge. `kind`: of a prompt, None for
        a native call. Raises UpstreamGarbled, and for a prompt EmptyAnswer and PromptBlocked, which
        are charged too."""
        spec = DIALECTS[endpoint.dialect]
        facts = spec.answer_facts(answer)
        record.http_status = 200
        result = record.answer
        result.usage, result.finish_reason = _in_batch(facts.usage), facts.finish_reason
        result.response_id, result.model_version = facts.response_id, facts.model_version
        images = spec.image_count(answer) or None
        record.charge = self._charge(target, result.usage, result.model_version, images)
        if len(answer) > KEPT_BYTES:
            raise UpstreamGarbled(f"the answer is longer than {KEPT_BYTES} bytes")
        if kind is None:
            record.keep(answer)
        elif endpoint.dialect is Dialect.GEMINI:
            _read_prompt(record, answer, kind)
        else:
            reading = PromptAnswer(endpoint.dialect, kind, result, streams=False)
            reading.take(answer)
            reading.finish()

    def lacks_usage(self, record: CallRecord) -> bool:
        """Whether an answer reported only a part of its usage."""
        usage = record.answer.usage
        return not (is_unknown(usage) or is_complete(usage) or record.charge.images)

    def estimate_usage(
        self, record: CallRecord, call: NativeCall, target: Target, answer: bytes
    ) -> None:
        """Charge such an answer, with an estimate of the missing usage as outside of a batch."""
        _, facts = _read(call)
        spec, result = DIALECTS[call.endpoint.dialect], record.answer
        estimate = self._spine.account(target).demands.estimator.of_pieces(
            target.model,
            facts.kind.value,
            facts.pieces,
            max_output_tokens=facts.max_output_tokens,
            tenant=record.tenant_id,
        )
        visible = visible_output(spec, answer, len(answer)).tokens
        rates = self._rates(target, target.model) or self._rates(target, result.model_version or "")
        record.charge = cut_charge(rates, result.usage, estimate, visible, None, whole=True)

    def _charge(
        self, target: Target, usage: Usage, version: str | None, images: int | None
    ) -> Charge:
        if is_unknown(usage) and not images:
            return UNKNOWN_CHARGE
        rates = self._rates(target, target.model) or self._rates(target, version or "")
        return charge_of(rates, usage, images, whole=True)


def _read(call: NativeCall) -> tuple[Skimmed, RequestFacts]:
    read = skimmed(call.body)
    facts_of = DIALECTS[call.endpoint.dialect].request_facts
    facts = facts_of(call.endpoint, read.body, read.whole)
    facts.cache_write = cache_write_of(read.raw, read.body)
    return read, facts


def _in_batch(usage: Usage) -> Usage:
    """Return usage in the tier `batch`, which not every answer names."""
    return replace(usage, details=replace(usage.details or UsageDetails(), tier=_TIER))


def _generate(call: Call) -> dict[str, Any]:
    """Return a prompt as a body in Gemini's dialect."""
    parts: list[dict[str, Any]] = [_inline(one) for one in call.media]
    if call.prompt:
        parts.append({"text": call.prompt})
    body: dict[str, Any] = {"contents": [{"role": "user", "parts": parts}]}
    if call.kind is Kind.IMAGE_GENERATION:
        body["generationConfig"] = {"responseModalities": ["TEXT", "IMAGE"]}
    return body


def _inline(media: Media) -> dict[str, Any]:
    data = b64encode(media.data).decode()
    return {"inlineData": {"mimeType": media.mime_type, "data": data}}


def _read_prompt(record: CallRecord, raw: bytes, kind: Kind) -> None:
    """Read text and images of Gemini's answer, as `AnswerReader` reads those of a stream."""
    value = orjson.loads(raw)
    candidates = value.get("candidates")
    first = candidates[0] if isinstance(candidates, list) and candidates else {}
    answer = record.answer
    for part in _parts(first):
        if isinstance(text := part.get("text"), str) and text:
            answer.text.append(text)
        elif (picture := _picture(part.get("inlineData"))) is not None:
            answer.pictures.append(picture)
    if answer.text or answer.pictures:
        if kind is Kind.IMAGE_GENERATION and not answer.pictures:
            raise EmptyAnswer("the provider's answer has no picture", finish_reason=_why(record))
        return
    feedback = value.get("promptFeedback")
    reason = feedback.get("blockReason") if isinstance(feedback, dict) else None
    if isinstance(reason, str):
        reason = reason[:_MOST_WORD]
        raise PromptBlocked(f"the provider refused the prompt ({reason})", reason=reason)
    why = _why(record) or "no reason"
    raise EmptyAnswer(f"the provider's answer has no content ({why})", finish_reason=_why(record))


def _why(record: CallRecord) -> str | None:
    return record.answer.finish_reason


def _parts(candidate: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of an answer except its thoughts."""
    content = candidate.get("content") if isinstance(candidate, dict) else None
    parts = content.get("parts") if isinstance(content, dict) else None
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict) and not part.get("thought"):
            yield part


def _picture(blob: Any) -> Media | None:
    if not isinstance(blob, dict):
        return None
    kind, data = blob.get("mimeType"), blob.get("data")
    if not isinstance(kind, str) or not isinstance(data, str) or not kind.startswith("image/"):
        return None
    try:
        raw = b64decode(data, validate=True)
    except (NotBase64, ValueError):
        return None
    return Media(picture_type_of(kind, raw), raw)
