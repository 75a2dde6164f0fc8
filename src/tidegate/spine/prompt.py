"""Prompts of `/stream` and of jobs: classified, then called by Google's SDK through the spine.

A prompt goes to an upstream of Gemini's dialect, as native calls of that dialect do.

Invariant: `run` is a coroutine that pushes events into a sink; when it returns, fails or is
cancelled, the upstream call is closed and its permit is on its way back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from uuid import UUID
from weakref import WeakValueDictionary

from tidegate.admission.charges import answer_charge, call_cost, never_sent
from tidegate.admission.demand import CallDemand
from tidegate.call import (
    DEFAULT_TENANT,
    NO_CHARGE,
    Attachment,
    Call,
    CallCost,
    Caller,
    Classification,
    ClassifiedBy,
    Delta,
    Event,
    Kind,
    Media,
    Picture,
    Sink,
)
from tidegate.classify import by_keywords, by_rules
from tidegate.dialects.spec import Dialect
from tidegate.errors import (
    DeadlineExceeded,
    EmptyAnswer,
    NotFound,
    PromptBlocked,
    TidegateError,
    UpstreamError,
)
from tidegate.limiter import Permit
from tidegate.record import JUDGE, CallListeners, CallRecord, Failure
from tidegate.settings import ClassifierMode, Config
from tidegate.spine.routing import Suspect, Target
from tidegate.spine.run import CallFailed, Lane, OnAdmitted, Spine, Terms
from tidegate.store.blobs import Blobs
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import Trail, address_of
from tidegate.upstream.fetch import ImageFetcher
from tidegate.upstream.gemini import MAX_JUDGE_TOKENS, MAX_JUDGED_CHARS, GeminiProcessor

_JUDGEMENTS_CACHED = 10_000
_LIMITERS_WORD_MS = 20
_JUDGE_BYTES = 4_000  # of the classifier's instructions and schema, and some

_NO_REQUEST = UUID(int=0)

log = get_logger()


@dataclass(frozen=True, slots=True)
class Ask:
    """What a caller wants, before its kind is settled and its files are loaded."""

    prompt: str
    attachments: tuple[Attachment, ...] = ()
    image_uri: str | None = None
    kind: Kind | None = None
    tenant_id: str = DEFAULT_TENANT

    @property
    def mime_types(self) -> tuple[str, ...]:
        return tuple(attachment.mime_type for attachment in self.attachments)


class PromptCalls:
    """Classifies prompts and makes their calls. One per process."""

    def __init__(
        self,
        *,
        config: Config,
        spine: Spine,
        processors: Mapping[str, GeminiProcessor],
        blobs: Blobs,
        fetcher: ImageFetcher,
        listeners: CallListeners,
    ) -> None:
        """`processors`: of each upstream of Gemini's dialect, by its name."""
        self._config = config
        self._spine = spine
        self._processors = processors
        self._blobs = blobs
        self._fetcher = fetcher
        self._listeners = listeners
        self._judgements: dict[bytes, Classification] = {}
        self._judging: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    def targets(self, model: str) -> list[Target]:
        """The upstreams for a prompt. Raises InvalidRequest where none takes prompts for it."""
        self._spine.targets.check_prompt(model)
        return self._spine.targets.of(Dialect.GEMINI, model)

    def first_look(self, ask: Ask) -> Classification:
        """The kind as far as it is known without asking anybody; `kind` is None while unsure."""
        if ask.kind is not None:
            return Classification(ask.kind, ClassifiedBy.CALLER, "the request names its type")
        has_uri = ask.image_uri is not None
        if self._config.classifier is ClassifierMode.LLM:
            return Classification(None, ClassifiedBy.RULES, "the LLM is always asked")
        ruled = by_rules(ask.prompt, ask.mime_types, image_uri=has_uri)
        if ruled.kind is None and self._config.classifier is ClassifierMode.KEYWORDS:
            return by_keywords(ask.prompt, ask.mime_types, image_uri=has_uri)
        return ruled

    async def decide(self, ask: Ask, *, within_ms: float | None = None) -> Classification:
        """The kind for certain: by the first look, else by the LLM, else by keywords.

        Takes at most `classifier_timeout_ms`, or `within_ms` where that is less. Raises none of our
        errors; cancellation closes the LLM's call.
        """
        first = self.first_look(ask)
        if first.kind is not None:
            return first
        key = self._judgement_key(ask)
        patience_ms = float(self._config.classifier_timeout_ms)
        if within_ms is not None:
            patience_ms = max(0.0, min(patience_ms, within_ms))
        asking = asyncio.Event()
        try:
            async with asyncio.timeout(patience_ms / 1000) as patience:
                # One question at a time about the same content: the others find its answer.
                lock = self._judging.setdefault(key, asyncio.Lock())
                async with lock:
                    if (known := self._judgements.get(key)) is None:
                        known = await self._judge(ask, asking, patience.when() or 0)
                        self._remember(key, known)
                    return known
        except TimeoutError:
            reason = "gave no answer in time" if asking.is_set() else "is over its limit"
        except DeadlineExceeded:
            reason = "is over its limit"
        except TidegateError as failed:
            reason = f"failed: {failed.code}"
        log.info(Log.CLASSIFIER_FELL_BACK, reason=reason)
        guess = by_keywords(ask.prompt, ask.mime_types, image_uri=ask.image_uri is not None)
        return Classification(guess.kind, guess.by, f"{guess.reason} (the LLM {reason})")

    def _remember(self, key: bytes, judged: Classification) -> None:
        if len(self._judgements) >= _JUDGEMENTS_CACHED:
            self._judgements.pop(next(iter(self._judgements)))
        self._judgements[key] = judged

    async def _judge(self, ask: Ask, asking: asyncio.Event, until: float) -> Classification:
        """Ask the LLM under its own limit; `asking` is set once it is admitted.

        `until` is the loop's time at which the caller gives up. The question is counted, and
        charged to nobody.
        """
        model = self._config.classifier_model
        targets = self.targets(model)
        types = [*ask.mime_types, *(["image/*"] if ask.image_uri else [])]
        left_ms = (until - asyncio.get_running_loop().time()) * 1000
        now = datetime.now(UTC)
        record = CallRecord(JUDGE, ask.tenant_id, now, kind="classifier")
        terms = Terms(
            # Nobody's request: it is not on record.
            request_id=_NO_REQUEST,
            caller=Caller(ask.tenant_id),
            received=time.monotonic(),
            # A little earlier than the caller: the limiter knows why it was not admitted.
            wait_ms=max(1, round(left_ms) - _LIMITERS_WORD_MS),
            repeats=False,
        )
        call = Call(_NO_REQUEST, ask.prompt, Kind.TEXT_ONLY, model, tenant_id=ask.tenant_id)
        question = PromptExchange(terms, self._processors, call, record, types=types)
        status, error = "failed", None

        async def admitted(_permit: Permit | None) -> None:
            asking.set()

        try:
            await self._spine.run(question, record, targets, admitted)
            status = "succeeded"
        except CallFailed as failed:
            error = failed.error
            raise error from None
        except asyncio.CancelledError:
            status = "cancelled"
            raise
        finally:
            if record.attempts:
                record.end(status, None if error is None else Failure.of(error))
                self._listeners.note(record)
        kind, reason = question.judgement
        if types and kind is Kind.TEXT_ONLY:
            kind = Kind.MULTI_MODAL  # the LLM is asked about pictures; files decide the rest
        if not types and kind is Kind.MULTI_MODAL:
            kind = Kind.TEXT_ONLY
        return Classification(kind, ClassifiedBy.LLM, reason)

    def _judgement_key(self, ask: Ask) -> bytes:
        parts = (self._config.classifier_model, *ask.mime_types, str(bool(ask.image_uri)))
        return sha256("\0".join((*parts, ask.prompt)).encode()).digest()

    async def media(self, ask: Ask) -> tuple[Media, ...]:
        """Load the files and fetch the `image_uri`.

        Raises FetchRefused, StoreUnavailable, or NotFound for a file whose bytes are gone.
        """
        loaded = []
        for stored in ask.attachments:
            try:
                data = await self._blobs.get(stored.blob_key)
            except NotFound:
                raise NotFound(f"the uploaded file {stored.name!r} was deleted") from None
            loaded.append(Media(stored.mime_type, data, stored.name))
        if ask.image_uri is not None:
            loaded.append(await self._fetcher.fetch(ask.image_uri))
        return tuple(loaded)

    def check_bounded(self, call: Call, terms: Terms, subject: str | None) -> None:
        """Raises BudgetUnbounded where `run` could do nothing else; files of a call are not looked
        at."""
        record = CallRecord("job", call.tenant_id, datetime.now(UTC))
        exchange = PromptExchange(terms, self._processors, call, record)
        self._spine.check_bounded(exchange, self.targets(call.model), subject)

    async def run(
        self,
        call: Call,
        terms: Terms,
        record: CallRecord,
        sink: Sink | None,
        on_admitted: OnAdmitted | None = None,
    ) -> None:
        """Make the call and fill `record`; events go to `sink`, where one is there.

        `on_admitted` is called before each try, under its permit. Raises InvalidRequest for a model
        that no upstream of Gemini's dialect serves, UpstreamError, and the rest of `Spine.run`.
        Cancellation leaves neither a waiter nor an open upstream call.
        """
        exchange = PromptExchange(terms, self._processors, call, record, sink)
        try:
            await self._spine.run(exchange, record, self.targets(call.model), on_admitted)
        except CallFailed as failed:
            raise failed.error from None


class PromptExchange:
    """A `CallExchange` by a prompt, or by the classifier's question about one.

    Events of an answer go to `sink`, where one is there. `types`: of the files that a question is
    about, None for a prompt; `judgement` is the answer to a question.
    """

    dialect = Dialect.GEMINI
    bills = True
    is_heard = True  # of what the SDK has received so far nothing is known here

    def __init__(
        self,
        terms: Terms,
        processors: Mapping[str, GeminiProcessor],
        call: Call,
        record: CallRecord,
        sink: Sink | None = None,
        types: list[str] | None = None,
    ) -> None:
        self.terms = terms
        self.started = False
        self.judgement: tuple[Kind, str]
        self._processors = processors
        self._call = call
        self._record = record
        self._sink = sink
        self._types = types

    def demand(self, target: Target, lane: Lane) -> CallDemand:
        call, policy = self._at(target), lane.limiter.policy
        if self._types is None:
            return lane.gate.bind(lane.demands.of(call, policy), target.model)
        question = lane.demands.of_question(
            call.prompt[:MAX_JUDGED_CHARS],
            target.model,
            policy,
            tenant=call.tenant_id,
            max_output_tokens=MAX_JUDGE_TOKENS,
        )
        return lane.gate.bind(question, target.model)

    def cost(self, target: Target, lane: Lane, demand: CallDemand, *, tier: str = "") -> CallCost:
        """`tier`: that the gateway itself has chosen."""
        if demand.estimate is None:
            return CallCost(None, None, unknown="it was not estimated")
        call, is_question, prices = self._call, self._types is not None, lane.demands.prices
        context_tokens, most_output = prices.most(target.model)
        return call_cost(
            prices.of(target.model, tier),
            demand.estimate,
            input_bytes=len(call.prompt.encode("utf-8", "replace")) + _JUDGE_BYTES * is_question,
            context_tokens=context_tokens,
            unseen="its files are not counted beforehand" if call.media else "",
            max_output_tokens=MAX_JUDGE_TOKENS if is_question else most_output,
            images=demand.images,
        )

    def suspect(self) -> Suspect:
        call = self._call
        is_ours = self._types is not None or call.tenant_id == DEFAULT_TENANT
        request = hash((call.model, call.prompt, len(call.media)))
        return Suspect(None if is_ours else call.tenant_id, request)

    async def make(self, target: Target, lane: Lane, demand: CallDemand, *, is_try: bool) -> None:
        is_news, sink = is_try or lane.gate.has_doubts, self._sink

        async def pass_on(event: Event) -> None:
            nonlocal is_news
            if is_news:
                is_news = False
                await lane.gate.worked(target.model, tried=is_try)
            assert sink is not None
            self.started = self.started or isinstance(event, Delta | Picture)
            await sink(event)

        processor, answer = self._processors[target.upstream.name], self._record.answer
        call = replace(self._at(target), traceparent=_began(self.terms.trail, target))
        self._record.sent = True
        try:
            if self._types is None:
                await processor.run(call, answer, None if sink is None else pass_on)
            else:
                self.judgement = await processor.judge(
                    call.prompt, self._types, model=call.model, answer=answer
                )
        except UpstreamError as error:
            raise CallFailed(error, target) from None
        if is_news:
            await lane.gate.worked(target.model, tried=is_try)

    def settle(
        self,
        target: Target,
        lane: Lane,
        demand: CallDemand,
        *,
        whole: bool,
        failed: CallFailed | None,
    ) -> int | None:
        record, error = self._record, None if failed is None else failed.error
        if error is not None and ((error.status or 0) >= 400 or never_sent(error)):
            record.charge = NO_CHARGE
        else:
            is_told = whole or isinstance(error, PromptBlocked | EmptyAnswer)
            details = record.answer.usage.details
            tier = "" if details is None or details.tier is None else details.tier
            rates = lane.demands.prices.of(target.model, tier)
            record.charge = answer_charge(rates, record.answer, demand.estimate, whole=is_told)
        return len(record.answer.pictures) if whole else None

    def _at(self, target: Target) -> Call:
        same = target.model == self._call.model
        return self._call if same else replace(self._call, model=target.model)


def _began(trail: Trail | None, target: Target) -> str | None:
    """The traceparent of a try."""
    if trail is None:
        return None
    address = address_of(target.upstream.base_urls[Dialect.GEMINI])
    return trail.begin(target.upstream.name, target.model, address)
