"""Prompts of `/stream` and of jobs: classified, then called through the spine.

A prompt has no dialect. At an upstream with Gemini's dialect, Google's SDK makes the call; at any
other, a native call is built from the prompt (`dialects/prompts.py`), with that call's demand, cost
and charge.

Invariant: `run` is a coroutine that pushes events into a sink; when it returns, fails or is
cancelled, the upstream call is closed and its permit is being released.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from typing import Any
from uuid import UUID
from weakref import WeakValueDictionary

from tidegate.admission.charges import (
    answer_charge,
    call_cost,
    is_unknown,
    never_sent,
    provider_of_upstream,
)
from tidegate.admission.demand import CallDemand
from tidegate.call import (
    DEFAULT_TENANT,
    NO_CHARGE,
    Answer,
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
from tidegate.classify import (
    MAX_ANSWER_TOKENS,
    MAX_ASKED_CHARS,
    by_keywords,
    by_rules,
    judgement,
)
from tidegate.dialects import DIALECTS
from tidegate.dialects.parsing import LARGE_BYTES
from tidegate.dialects.prompts import (
    ANY_IMAGE,
    CallForm,
    Files,
    PromptAnswer,
    PromptCall,
    blocked_by,
    dialect_for,
    prompt_call,
    question_call,
)
from tidegate.dialects.refusals import error_of_refusal_in, status_of, tail_of
from tidegate.dialects.spec import Dialect, Headers, RequestFacts
from tidegate.errors import (
    DeadlineExceeded,
    EmptyAnswer,
    InvalidRequest,
    NotFound,
    PromptBlocked,
    TidegateError,
    UpstreamError,
)
from tidegate.limiter import Permit
from tidegate.record import JUDGE, CallListeners, CallRecord, Failure
from tidegate.settings import ClassifierMode, Config
from tidegate.spine.bodies import NativeCall, aside
from tidegate.spine.models import targets_for_prompt, unchecked_facts
from tidegate.spine.native import NativeExchange, Relay
from tidegate.spine.out import AttendedOut, NothingOut, Out
from tidegate.spine.routing import Suspect, Target, Targets
from tidegate.spine.run import CallFailed, OnAdmitted, Spine, Terms, UpstreamAccount
from tidegate.store.blobs import Blobs
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import Trail, address_of
from tidegate.upstream.fetch import ImageFetcher
from tidegate.upstream.gemini import GeminiProcessor
from tidegate.upstream.transport import RelayWire, Timeouts

_JUDGEMENTS_CACHED = 10_000
_LIMITERS_WORD_MS = 20
# Providers whose chat completions use the newer field names.
_OWN_NAMES = ("openai", "azure")
_JUDGE_BYTES = 4_000  # an upper bound of the classifier's instructions and schema

_NO_REQUEST = UUID(int=0)

log = get_logger()


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A prompt as submitted, before its kind is decided and its files are loaded."""

    prompt: str
    attachments: tuple[Attachment, ...] = ()
    image_uri: str | None = None
    kind: Kind | None = None
    tenant_id: str = DEFAULT_TENANT

    @property
    def mime_types(self) -> tuple[str, ...]:
        return tuple(attachment.mime_type for attachment in self.attachments)

    @property
    def files(self) -> Files:
        return files_known(self.attachments, self.image_uri)


def files_known(attachments: Sequence[Attachment], image_uri: str | None) -> Files:
    """Return type and size of a request's files before they are loaded; an `image_uri` is an
    image."""
    uri = [] if image_uri is None else [(ANY_IMAGE, 0)]
    return [*((one.mime_type, one.size_bytes) for one in attachments), *uri]


def files_of(media: Sequence[Media]) -> Files:
    """Return type and size of loaded files."""
    return [(one.mime_type, len(one.data)) for one in media]


class PromptCalls:
    """Classifies prompts and makes their calls. One per process."""

    def __init__(
        self,
        *,
        config: Config,
        relay: Relay,
        processors: Mapping[str, GeminiProcessor],
        blobs: Blobs,
        fetcher: ImageFetcher,
        listeners: CallListeners,
    ) -> None:
        """`processors`: by name, for each upstream with Gemini's dialect."""
        self._config = config
        self._spine = relay.spine
        self._ways = PromptWays(processors, relay.wire, relay.spine.timeouts)
        self._blobs = blobs
        self._fetcher = fetcher
        self._listeners = listeners
        self._judgements: dict[bytes, Classification] = {}
        self._judging: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._questions: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Cancel classifier calls that no request waits for any more."""
        for question in self._questions:
            question.cancel()
        await asyncio.gather(*self._questions, return_exceptions=True)

    def targets(
        self, model: str, kind: Kind | None = None, files: Files = (), bound: str | None = None
    ) -> list[Target]:
        """Return the targets for a prompt, or the one that it is bound to. Raises InvalidRequest if
        none can take it."""
        return targets_for_prompt(self._spine.targets, bound, model, kind, files)

    def classify_by_rules(self, request: PromptRequest) -> Classification:
        """Return the classification without a call; its `kind` is None if the rules are unsure."""
        if request.kind is not None:
            return Classification(request.kind, ClassifiedBy.CALLER, "the request names its type")
        has_uri = request.image_uri is not None
        if self._config.classifier is ClassifierMode.LLM:
            return Classification(None, ClassifiedBy.RULES, "the LLM is always asked")
        ruled = by_rules(request.prompt, request.mime_types, image_uri=has_uri)
        if ruled.kind is None and self._config.classifier is ClassifierMode.KEYWORDS:
            return by_keywords(request.prompt, request.mime_types, image_uri=has_uri)
        return ruled

    async def decide(
        self, request: PromptRequest, *, within_ms: float | None = None
    ) -> Classification:
        """Return a certain classification: by the rules, else by the LLM, else by keywords.

        Takes at most `classifier_timeout_ms`, or half of `within_ms` if that is less: the other
        half remains for the request's own wait. Raises no TidegateError. Cancellation closes the
        LLM's call.
        """
        first = self.classify_by_rules(request)
        if first.kind is not None:
            return first
        key = self._judgement_key(request)
        patience_ms = float(self._config.classifier_timeout_ms)
        if within_ms is not None:
            patience_ms = max(0.0, min(patience_ms, within_ms / 2))
        asking = asyncio.Event()
        try:
            async with asyncio.timeout(patience_ms / 1000) as patience:
                # One question at a time about the same content: the others read its cached answer.
                lock = self._judging.setdefault(key, asyncio.Lock())
                async with lock:
                    if (known := self._judgements.get(key)) is None:
                        known = await self._judge(request, asking, patience.when() or 0)
                        self._remember(key, known)
                    return known
        except TimeoutError:
            reason = "gave no answer in time" if asking.is_set() else "is over its limit"
        except DeadlineExceeded:
            reason = "is over its limit"
        except TidegateError as failed:
            reason = f"failed: {failed.code}"
        log.info(Log.CLASSIFIER_FELL_BACK, reason=reason)
        guess = by_keywords(
            request.prompt, request.mime_types, image_uri=request.image_uri is not None
        )
        return Classification(guess.kind, guess.by, f"{guess.reason} (the LLM {reason})")

    def _remember(self, key: bytes, judged: Classification) -> None:
        if len(self._judgements) >= _JUDGEMENTS_CACHED:
            self._judgements.pop(next(iter(self._judgements)))
        self._judgements[key] = judged

    async def _judge(
        self, request: PromptRequest, asking: asyncio.Event, until: float
    ) -> Classification:
        """Ask the LLM under its own limit; `asking` is set once the call is admitted.

        `until`: the loop's time at which the caller stops waiting. The call is counted, and charged
        to the budgets of its tenant and of all. Cancellation closes it; at a server that would
        continue (`abandoned = "wait"`) it is read to its end under its permit, without delaying the
        caller.
        """
        model = self._config.classifier_model
        targets = self.targets(model)
        types = [one for one, _ in request.files]
        left_ms = (until - asyncio.get_running_loop().time()) * 1000
        now = datetime.now(UTC)
        record = CallRecord(JUDGE, request.tenant_id, now, kind="classifier")
        terms = Terms(
            # No request's id: the call is not stored.
            request_id=_NO_REQUEST,
            caller=Caller(request.tenant_id),
            received=time.monotonic(),
            # A little before the caller's own timeout, so that the limiter's reason arrives.
            wait_ms=max(1, round(left_ms) - _LIMITERS_WORD_MS),
            repeats=False,
        )
        call = Call(_NO_REQUEST, request.prompt, Kind.TEXT_ONLY, model, tenant_id=request.tenant_id)
        question = PromptExchange(terms, self._ways, call, record, types=types)

        async def admitted(_permit: Permit | None) -> None:
            asking.set()

        await self._ways.open(targets)
        await self._attended(self._run_question(question, record, targets, admitted), terms)
        kind, reason = question.judgement
        if types and kind is Kind.TEXT_ONLY:
            kind = Kind.MULTI_MODAL  # the LLM judges images; files decide the rest
        if not types and kind is Kind.MULTI_MODAL:
            kind = Kind.TEXT_ONLY
        return Classification(kind, ClassifiedBy.LLM, reason)

    async def _attended(self, asking: Coroutine[Any, Any, None], terms: Terms) -> None:
        """Wait for a classifier call in its own task; if cancelled, until the call is closed or
        continues alone."""
        is_given_up, continues = False, asyncio.Event()

        def left() -> bool:
            if is_given_up:
                continues.set()  # read where a call continues because its client has left
            return is_given_up

        terms.left = left
        question = asyncio.create_task(asking)
        self._questions.add(question)
        question.add_done_callback(self._has_ended)
        try:
            await asyncio.shield(question)
        except asyncio.CancelledError:
            is_given_up = True
            question.cancel()
            going_on = asyncio.create_task(continues.wait())
            await asyncio.wait({question, going_on}, return_when=asyncio.FIRST_COMPLETED)
            going_on.cancel()
            raise

    def _has_ended(self, question: asyncio.Task[None]) -> None:
        self._questions.discard(question)
        if not question.cancelled():
            question.exception()  # a waiter receives the exception too

    async def _run_question(
        self,
        question: PromptExchange,
        record: CallRecord,
        targets: list[Target],
        admitted: OnAdmitted,
    ) -> None:
        status, error = "failed", None
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

    def _judgement_key(self, request: PromptRequest) -> bytes:
        parts = (self._config.classifier_model, *request.mime_types, str(bool(request.image_uri)))
        return sha256("\0".join((*parts, request.prompt)).encode()).digest()

    async def media(
        self, request: PromptRequest, arrived: Callable[[int], None] | None = None
    ) -> tuple[Media, ...]:
        """Load the files and fetch the `image_uri`; `arrived` is called with the bytes read so far.

        Raises FetchRefused and FetchFailed, StoreUnavailable, or NotFound for a deleted file.
        """
        loaded = []
        for stored in request.attachments:
            try:
                data = await self._blobs.get(stored.blob_key)
            except NotFound:
                raise NotFound(f"the uploaded file {stored.name!r} was deleted") from None
            loaded.append(Media(stored.mime_type, data, stored.name))
        if request.image_uri is not None:
            loaded.append(await self._fetcher.fetch(request.image_uri, request.tenant_id, arrived))
        return tuple(loaded)

    def check_bounded(self, call: Call, terms: Terms) -> None:
        """Raises BudgetUnbounded if `run` could only do so; the files of a call are not
        considered."""
        record = CallRecord("job", call.tenant_id, datetime.now(UTC))
        exchange = PromptExchange(terms, self._ways, call, record)
        self._spine.check_bounded(exchange, self.targets(call.model, call.kind))

    async def run(
        self,
        call: Call,
        terms: Terms,
        record: CallRecord,
        sink: Sink | None,
        on_admitted: OnAdmitted | None = None,
    ) -> None:
        """Make the call and fill `record`; events go to `sink`, if there is one.

        `on_admitted` is called before each attempt, under its permit. Raises InvalidRequest for a
        model that no upstream serves for this prompt, UpstreamError, and the rest of `Spine.run`.
        Cancellation leaves neither a waiter nor an open upstream call.
        """
        exchange = PromptExchange(terms, self._ways, call, record, sink)
        targets = self.targets(call.model, call.kind, files_of(call.media), terms.upstream)
        await self._ways.open(targets)
        await exchange.plan(targets, self._spine)
        try:
            await self._spine.run(exchange, record, targets, on_admitted)
        except CallFailed as failed:
            raise failed.error from None


@dataclass(frozen=True, slots=True)
class PromptWays:
    """How prompts are sent: by an SDK at the upstreams of `processors`, else over the wire."""

    processors: Mapping[str, GeminiProcessor]
    wire: RelayWire
    timeouts: Mapping[str, Timeouts]

    async def open(self, targets: Sequence[Target]) -> None:
        """Import the SDK if it is needed, while no permit is held."""
        for target in targets:
            if (processor := self.processors.get(target.upstream.name)) is not None:
                await processor.start()


@dataclass(frozen=True, slots=True)
class _Plan:
    """A prompt as a native call at one target. body: parsed."""

    call: NativeCall
    body: dict[str, Any]
    facts: RequestFacts


class PromptExchange:
    """A `CallExchange` of a prompt, or of the classifier's question about one.

    Events of the answer go to `sink`, if there is one. `types`: MIME types of the files that a
    question is about, None for a prompt; `judgement`: the answer to a question.
    """

    bills = True

    def __init__(
        self,
        terms: Terms,
        ways: PromptWays,
        call: Call,
        record: CallRecord,
        sink: Sink | None = None,
        types: list[str] | None = None,
    ) -> None:
        self.terms = terms
        self.ended_alone = False
        self.judgement: tuple[Kind, str]
        self._ways = ways
        self._call = call
        self._record = record
        self._sink = sink
        self._types = types
        self._plans: dict[tuple[str, str], _Plan] = {}
        self._native: tuple[NativeExchange, CallRecord] | None = None  # of this attempt
        self._shows = False  # a part of the answer went to `sink`

    @property
    def started(self) -> bool:
        return self._shows or self._record.went_on_ms is not None

    @property
    def has_response(self) -> bool:
        """Whether an answer may have begun; the SDK does not show that, so True for its calls."""
        return self._native is None or self._native[0].has_response

    async def plan(self, targets: Sequence[Target], spine: Spine) -> None:
        """Build the calls of these targets in a thread if files are large, since `demand` is called
        in the event loop. Raises InvalidRequest."""
        size_bytes = sum(len(one.data) for one in self._call.media)
        if size_bytes > LARGE_BYTES:
            for target in targets:
                await aside(size_bytes, partial(self._plan, target, spine.account(target)))

    def serving(self, targets: Targets, model: str) -> list[Target]:
        return targets.of_prompt(model, self._call.kind, files_of(self._call.media))

    def elsewhere(self, targets: Targets) -> list[Target]:
        return self.serving(targets, self._call.model)

    def demand(self, target: Target, account: UpstreamAccount) -> CallDemand:
        call, policy = self._at(target), account.limiter.policy
        if self._types is None:
            if (native := self._native_at(target, account)) is not None:
                return native.demand(target, account)
            terms = self.terms
            tags = (terms.caller.key_id, terms.subject, terms.conversation)
            return account.gate.bind(account.demands.of(call, policy, tags), target.model)
        of_question = account.demands.of_question(
            call.prompt[:MAX_ASKED_CHARS],
            target.model,
            policy,
            tenant=call.tenant_id,
            max_output_tokens=MAX_ANSWER_TOKENS,
        )
        return account.gate.bind(of_question, target.model)

    def cost(
        self, target: Target, account: UpstreamAccount, demand: CallDemand, *, tier: str = ""
    ) -> CallCost:
        """Return the cost. `tier`: chosen by the gateway."""
        if (native := self._native_at(target, account)) is not None:
            return native.cost(target, account, demand, tier=tier)
        if demand.estimate is None:
            return CallCost(None, None, unknown="it was not estimated")
        call, is_question, prices = self._call, self._types is not None, account.demands.prices
        context_tokens, most_output = prices.most(target.model)
        return call_cost(
            prices.bound(target.model, tier, is_chosen=True),
            demand.estimate,
            input_bytes=len(call.prompt.encode("utf-8", "replace")) + _JUDGE_BYTES * is_question,
            context_tokens=context_tokens,
            unseen="the tokens of its files are not known beforehand" if call.media else "",
            max_output_tokens=MAX_ANSWER_TOKENS if is_question else most_output,
            images=demand.images,
        )

    def suspect(self) -> Suspect:
        call = self._call
        is_own = self._types is not None or call.tenant_id == DEFAULT_TENANT
        request = hash((call.model, call.prompt, len(call.media)))
        return Suspect(None if is_own else call.tenant_id, request)

    async def make(
        self, target: Target, account: UpstreamAccount, demand: CallDemand, *, is_try: bool
    ) -> None:
        self._native = None
        try:
            if (plan := self._plan(target, account)) is not None:
                await self._relayed(plan, target, account, demand, is_try=is_try)
            else:
                await self._by_sdk(target, account, is_try=is_try)
        except UpstreamError as error:
            raise CallFailed(error, target) from None

    async def _by_sdk(self, target: Target, account: UpstreamAccount, *, is_try: bool) -> None:
        is_news, sink = is_try or account.gate.has_doubts, self._sink
        out = AttendedOut(NothingOut(), self.terms.left, self._record)

        async def pass_on(event: Event) -> None:
            nonlocal is_news
            await out.start(200, [])
            if out.is_alone:
                return
            out.started = True
            if is_news:
                is_news = False
                await account.gate.worked(target.model, tried=is_try)
            await self._pass_on([event])

        processor, answer = self._ways.processors[target.upstream.name], self._record.answer
        call = replace(self._at(target), traceparent=_began(self.terms.trail, target))
        self._record.dialect, self._record.operation = Dialect.GEMINI, "generate_content"
        self._record.sent = True

        async def make() -> None:
            if self._types is None:
                await processor.run(call, answer, None if sink is None else pass_on)
            else:
                self.judgement = await processor.judge(
                    call.prompt, self._types, model=call.model, answer=answer
                )

        if target.upstream.abandoned == "wait":
            try:
                await out.see_through(make, streams=sink is not None)
            finally:
                self.ended_alone = out.ended_alone
        else:
            await make()
        if is_news:
            await account.gate.worked(target.model, tried=is_try)

    async def _relayed(
        self,
        plan: _Plan,
        target: Target,
        account: UpstreamAccount,
        demand: CallDemand,
        *,
        is_try: bool,
    ) -> None:
        """Make a native call with a record of its own; `settle` copies the result into the call's
        record."""
        record, endpoint = self._record, plan.call.endpoint
        streams = plan.facts.streams
        of_call = CallRecord(record.source, record.tenant_id, record.received_at, streamed=streams)
        dialect, answer = endpoint.dialect, record.answer
        reading = PromptAnswer(dialect, self._call.kind, answer, streams=streams)
        out = _ReadingOut(reading, of_call, self._pass_on)
        exchange = self._exchange(plan, out, of_call)
        self._native = exchange, of_call
        record.dialect, record.operation, record.sent = dialect, endpoint.name, True
        try:
            await exchange.make(target, account, demand, is_try=is_try)
        except CallFailed as failed:
            received = [of_call.text] if of_call.coding else of_call.pieces
            error = error_of_refusal_in(failed.body or tail_of(received))
            status = failed.status or status_of(error)
            if (blocked := blocked_by(status, error)) is not None:
                failed.error = blocked
            raise
        finally:
            answer.first_byte_ms = of_call.answer.first_byte_ms
            self.ended_alone, record.went_on_ms = exchange.ended_alone, of_call.went_on_ms
        if of_call.coding:  # compressed pieces were not read as they arrived
            await self._pass_on(reading.take(of_call.text))
        await self._pass_on(reading.finish())
        if self._types is not None:
            self.judgement = judgement(answer.whole_text, self._types)

    async def _pass_on(self, events: Sequence[Event]) -> None:
        if self._sink is not None:
            for event in events:
                self._shows = self._shows or isinstance(event, Delta | Picture)
                await self._sink(event)

    def settle(
        self,
        target: Target,
        account: UpstreamAccount,
        demand: CallDemand,
        *,
        whole: bool,
        failed: CallFailed | None,
    ) -> int | None:
        record, error = self._record, None if failed is None else failed.error
        is_final = whole or isinstance(error, PromptBlocked | EmptyAnswer)
        if self._native is not None:
            exchange, of_call = self._native
            exchange.settle(target, account, demand, whole=is_final, failed=failed)
            self._take_over(of_call)
        elif error is not None and (_is_refused(error, record.answer) or never_sent(error)):
            record.charge = NO_CHARGE
        else:
            details, prices = record.answer.usage.details, account.demands.prices
            tier = "" if details is None or details.tier is None else details.tier
            # The requested name may be an alias without a price.
            names = (target.model, record.answer.model_version or "")
            rates = prices.of(names[0], tier) or prices.of(names[1], tier)
            record.charge = answer_charge(rates, record.answer, demand.estimate, whole=is_final)
        return len(record.answer.pictures) if whole else None

    def _take_over(self, of_call: CallRecord) -> None:
        record, inner = self._record, of_call.answer
        answer = record.answer
        answer.usage, answer.finish_reason = (
            inner.usage,
            answer.finish_reason or inner.finish_reason,
        )
        answer.response_id, answer.model_version = inner.response_id, inner.model_version
        record.charge, record.sent = of_call.charge, of_call.sent

    # As a native call

    def _native_at(self, target: Target, account: UpstreamAccount) -> NativeExchange | None:
        """Return the exchange for demand and cost at a target; None if an SDK makes the call."""
        plan = self._plan(target, account)
        return None if plan is None else self._exchange(plan, NothingOut(), self._record)

    def _exchange(self, plan: _Plan, out: Out, record: CallRecord) -> NativeExchange:
        wire, timeouts = self._ways.wire, self._ways.timeouts
        return NativeExchange(wire, timeouts, plan.call, plan.body, plan.facts, out, record)

    def _plan(self, target: Target, account: UpstreamAccount) -> _Plan | None:
        """Return the call at a target, built once; None if an SDK makes it."""
        place = target.upstream.name, target.model
        if (known := self._plans.get(place)) is not None:
            return known
        call = self._at(target)
        dialect = dialect_at(target, call.kind, files_of(call.media))
        if dialect is Dialect.GEMINI:
            return None
        form = form_at(target, account, streams=self._sink is not None)
        if self._types is None:
            made = prompt_call(dialect, call, form)
        else:
            made = question_call(dialect, call, self._types, form)
        plan = self._plans[place] = _planned(made, self.terms, call)
        return plan

    def _at(self, target: Target) -> Call:
        same = target.model == self._call.model
        return self._call if same else replace(self._call, model=target.model)


def dialect_at(target: Target, kind: Kind | None, files: Files) -> Dialect:
    """Return the dialect in which a target takes a prompt. Raises InvalidRequest if it takes
    none."""
    if Dialect.GEMINI in target.upstream.base_urls and "claude" not in target.model.lower():
        return Dialect.GEMINI  # this dialect takes every prompt
    dialect, why = dialect_for(target.upstream.base_urls, target.model, kind, files)
    if dialect is None:
        assert why is not None
        message = (
            f"the upstream {target.upstream.name!r} of the model {target.model!r} {why.reason}"
        )
        raise InvalidRequest(why.field, message, allowed=why.allowed)
    return dialect


def form_at(target: Target, account: UpstreamAccount, *, streams: bool) -> CallForm:
    _, most_output_tokens = account.demands.prices.most(target.model)
    provider = provider_of_upstream(target.upstream)
    return CallForm(
        streams,
        target.upstream.asks_usage,
        most_output_tokens,
        own=provider in _OWN_NAMES,
        provider=provider,
    )


def _planned(made: PromptCall, terms: Terms, call: Call) -> _Plan:
    spec = DIALECTS[made.endpoint.dialect]
    headers = [(b"content-type", made.content_type), *spec.headers]
    native = NativeCall(terms, made.endpoint, "POST", "", headers, made.body, datetime.now(UTC))
    if made.facts is not None:
        return _Plan(native, {"model": made.facts.model}, made.facts)
    body, facts = unchecked_facts(made.endpoint, made.body)
    # Text files are files too, though the body contains them as text.
    facts.kind, facts.images = call.kind, int(call.kind is Kind.IMAGE_GENERATION)
    return _Plan(native, body, facts)


def _is_refused(error: UpstreamError, answer: Answer) -> bool:
    """Whether the provider refused a call before it answered anything."""
    has_begun = bool(answer.text or answer.pictures) or not is_unknown(answer.usage)
    return (error.status or 0) >= 400 and not has_begun


class _ReadingOut:
    """Parses an answer as it arrives, and passes its events on."""

    def __init__(
        self,
        reading: PromptAnswer,
        record: CallRecord,
        pass_on: Callable[[Sequence[Event]], Awaitable[None]],
    ) -> None:
        self.started = False
        self._reading = reading
        self._record = record
        self._pass_on = pass_on

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True

    async def body(self, piece: bytes, more: bool) -> None:
        if not self._record.coding:
            await self._pass_on(self._reading.take(piece))

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        await self.start(status, headers)
        await self.body(body, False)


def _began(trail: Trail | None, target: Target) -> str | None:
    """Begin an attempt's span and return its traceparent."""
    if trail is None:
        return None
    address = address_of(target.upstream.base_urls[Dialect.GEMINI])
    return trail.begin(target.upstream.name, target.model, address)
