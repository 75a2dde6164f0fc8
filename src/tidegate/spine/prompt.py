"""Prompts of streams and jobs: classify, prepare, admit, call, settle.

Invariant: a permit is held exactly while its upstream call is open. `run` is a coroutine that
pushes events into a sink; when it returns, fails or is cancelled, the upstream call is closed and
the permit is on its way back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from math import inf
from weakref import WeakValueDictionary

from tidegate.admission.demand import Demand, Demands, Prices, answer_charge, foreseen, never_sent
from tidegate.admission.estimator import Learned
from tidegate.call import (
    DEFAULT_TENANT,
    NO_BUDGETS,
    NO_CHARGE,
    Admitted,
    Answer,
    Attachment,
    Call,
    Caller,
    Charge,
    Classification,
    ClassifiedBy,
    Kind,
    Media,
    Outcome,
    Sink,
)
from tidegate.classify import by_keywords, by_rules
from tidegate.errors import (
    BudgetReserved,
    DeadlineExceeded,
    DemandImpossible,
    EmptyAnswer,
    NotFound,
    PromptBlocked,
    TidegateError,
    UpstreamError,
    UpstreamThrottled,
)
from tidegate.limiter import Acquisition, Limiter, Permit
from tidegate.settings import ClassifierMode, Config
from tidegate.spine.record import Attempt
from tidegate.spine.routing import Gate, NotWorthWaiting, Patience, Suspect
from tidegate.store.audit import of_question
from tidegate.store.blobs import Blobs
from tidegate.store.quotas import BudgetGate
from tidegate.telemetry.events import Observers
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import address_of
from tidegate.upstream.fetch import ImageFetcher
from tidegate.upstream.gemini import MAX_JUDGE_TOKENS, MAX_JUDGED_CHARS, GeminiProcessor

_JUDGEMENTS_CACHED = 10_000
_LIMITERS_WORD_MS = 20
_HARD_MARGIN_MS = 5_000  # closing and recording, after the call's own total time

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


class Pipeline:
    """Everything between an accepted request and its recorded end."""

    def __init__(
        self,
        *,
        config: Config,
        limiter: Limiter,
        processor: GeminiProcessor | None,
        blobs: Blobs,
        fetcher: ImageFetcher,
        observers: Observers,
        budgets: BudgetGate,
        check_model: Callable[[str], None],
        prices: Prices | None = None,
        gate: Gate | None = None,
    ) -> None:
        """`processor`: None where there is no account of Gemini. `check_model` raises
        InvalidRequest for a model that is not its. `gate`: the one that native calls to the same
        upstream pass."""
        self._check_model = check_model
        self._budgets = budgets
        self._config = config
        self._limiter = limiter
        self._processor = processor
        self._blobs = blobs
        self._fetcher = fetcher
        self._observers = observers
        self._demands = Demands(prices=prices)
        self._upstream = limiter.pool
        self._hard_ms = config.total_timeout_ms + _HARD_MARGIN_MS
        self._gate = gate or Gate(limiter.pool, limiter)
        self._judgements: dict[bytes, Classification] = {}
        self._judging: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    def at_once(self, kind: Kind) -> int:
        """How many calls of a kind may run at once, over all processes, as is in force now."""
        return self._limiter.policy.bound(kind.limit)

    def estimates(self) -> tuple[Learned, ...]:
        """How good this process's estimates of LLM tokens are."""
        return self._demands.estimator.error()

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
        """Ask the LLM under its own limit; `asking` is set once it is let in.

        `until` is the loop's time at which the caller gives up.
        """
        self._check_model(self._config.classifier_model)
        types = [*ask.mime_types, *(["image/*"] if ask.image_uri else [])]
        left_ms = (until - asyncio.get_running_loop().time()) * 1000
        model = self._config.classifier_model
        demand = self._demands.of_question(
            ask.prompt[:MAX_JUDGED_CHARS],
            model,
            self._limiter.policy,
            tenant=ask.tenant_id,
            max_output_tokens=MAX_JUDGE_TOKENS,
        )
        # A little earlier than the caller: the limiter knows why nobody was let in.
        deadline_ms = max(1, round(left_ms) - _LIMITERS_WORD_MS)
        hard_ms = self._config.classifier_timeout_ms + _HARD_MARGIN_MS
        demand = self._gate.bind(demand, model)
        self._gate.check(demand, deadline_ms)
        async with self._admission(demand, deadline_ms, hard_ms) as permit:
            asking.set()
            kind, reason = await self._put(ask, types, model, permit, demand)
        if types and kind is Kind.TEXT_ONLY:
            kind = Kind.MULTI_MODAL  # the LLM is asked about pictures; files decide the rest
        if not types and kind is Kind.MULTI_MODAL:
            kind = Kind.TEXT_ONLY
        return Classification(kind, ClassifiedBy.LLM, reason)

    async def _put(
        self, ask: Ask, types: list[str], model: str, permit: Permit, demand: Demand
    ) -> tuple[Kind, str]:
        """The question itself, under its permit. It is told to those who count calls; charged to
        nobody."""
        assert self._processor is not None
        started, answer = time.monotonic(), Answer()
        outcome, status, error = Outcome.IGNORED, "failed", None
        try:
            judged = await self._processor.judge(ask.prompt, types, model=model, answer=answer)
            outcome, status = Outcome.SUCCESS, "succeeded"
            return judged
        except UpstreamError as failed:
            error, outcome = failed, Outcome.DROPPED
            if isinstance(failed, UpstreamThrottled):
                await self._gate.throttled(failed, model, demand)
            raise
        except asyncio.CancelledError:
            status = "cancelled"
            raise
        finally:
            charge = self._charge(model, demand, answer, error, whole=outcome is Outcome.SUCCESS)
            self._settle(permit, outcome, demand, answer, charge)
            upstream_ms = (time.monotonic() - started) * 1000
            self._observers.note(
                of_question(
                    *(ask.tenant_id, self._upstream, model, status),
                    error=error,
                    answer=answer,
                    charge=charge,
                    queue_ms=permit.waited_ms,
                    upstream_ms=upstream_ms,
                )
            )

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
                raise NotFound(f"the uploaded file {stored.name!r} is not there any more") from None
            loaded.append(Media(stored.mime_type, data, stored.name))
        if ask.image_uri is not None:
            loaded.append(await self._fetcher.fetch(ask.image_uri))
        return tuple(loaded)

    async def run(
        self,
        call: Call,
        attempt: Attempt,
        sink: Sink | None,
        caller: Caller,
        deadline_ms: int | None,
        on_admitted: Callable[[Permit], Awaitable[None]] | None = None,
    ) -> None:
        """Admit the call, make it, and fill `attempt`; events go to `sink`, where one is there.

        `deadline_ms` bounds the wait for admission. `on_admitted` runs under the permit before
        the call; what it raises ends the run with no call made. `caller`: whose budget it spends.
        Raises InvalidRequest for a model that is not for it, AdmissionError, QuotaExceeded,
        LeaseLost and UpstreamError. Cancellation leaves
        neither a waiter nor an open upstream call.
        """
        self._check_model(call.model)
        gate, asked_at, hard_ms = self._gate, time.monotonic(), self._hard_ms
        while True:
            policy, left_ms, wait_ms = self._limiter.policy, deadline_ms, inf
            if deadline_ms is not None:
                left_ms = deadline_ms - round((time.monotonic() - asked_at) * 1000)
                wait_ms = inf if on_admitted else left_ms  # a job waits: a pause may be ended
            demand = gate.bind(self._demands.of(call, policy), call.model)
            attempt.limits = demand.limits
            gate.check(demand, wait_ms)
            try:
                admission = self._admission(demand, left_ms, hard_ms)
                payer = None if caller.budgets is NO_BUDGETS else caller
                waiting = (admission, gate, demand, call.model, wait_ms, self._budgets, payer)
                async with Patience(*waiting) as permit:
                    permit.settle(Outcome.IGNORED, tokens=0, images=0)  # until there is a call
                    async with self._held(call, demand, attempt, caller):
                        attempt.admitted_at = datetime.now(UTC)
                        waited = attempt.admitted_at - attempt.waiting_since
                        attempt.queue_ms = max(0.0, waited.total_seconds() * 1000)
                        attempt.fence = permit.fence
                        if on_admitted is not None:
                            await on_admitted(permit)
                        if sink is not None:
                            await sink(Admitted(waited_ms=attempt.queue_ms))
                        await permit.confirm()
                        await self._call(call, attempt, sink, permit, demand)
                return
            except NotWorthWaiting:
                continue  # something that binds it was paused meanwhile
            except BudgetReserved:
                if left_ms is not None and left_ms <= 0:
                    raise
                await self._budgets.room(caller, (left_ms or 1_000) / 1000)
            except DeadlineExceeded as over:
                raise (None if on_admitted else gate.out()) or over from None
            except DemandImpossible:
                # A limit was taken away while it waited: it asks for what binds it now.
                if self._limiter.policy is policy:
                    raise

    def _held(
        self, call: Call, demand: Demand, attempt: Attempt, caller: Caller
    ) -> AbstractAsyncContextManager[None]:
        """What the call will cost, reserved of its caller's budget until it is charged."""
        rates, estimate = self._demands.prices.of(call.model), demand.estimate
        price = (0, 0) if estimate is None else foreseen(rates, estimate, demand.images)
        return self._budgets.held(caller, call.request_id, price, lambda: attempt.charge)

    async def _call(
        self, call: Call, attempt: Attempt, sink: Sink | None, permit: Permit, demand: Demand
    ) -> None:
        assert self._processor is not None
        started, gate = time.monotonic(), self._gate
        tried = gate.is_try(demand)
        attempt.upstream = self._upstream
        outcome, error = Outcome.IGNORED, None
        if (trail := attempt.trail) is not None:
            address = address_of(self._config.gemini_base_url)
            call = replace(call, traceparent=trail.begin(self._upstream, call.model, address))
        try:
            await self._processor.run(call, attempt.answer, sink)
            outcome = Outcome.SUCCESS
            if tried or gate.has_doubts:
                await gate.worked(call.model, tried=tried)
        except UpstreamError as failed:
            error = failed
            outcome = Outcome.DROPPED if failed.retryable else Outcome.IGNORED
            if isinstance(failed, UpstreamThrottled):
                await gate.throttled(failed, call.model, demand)
            await gate.failed(failed, call.model, suspect=_suspect_of(call), tried=tried)
            raise
        finally:
            attempt.upstream_ms = (time.monotonic() - started) * 1000
            attempt.finished_at = datetime.now(UTC)
            if trail is not None:
                trail.end(error, worked=outcome is Outcome.SUCCESS)
            whole = outcome is Outcome.SUCCESS or isinstance(error, PromptBlocked | EmptyAnswer)
            attempt.charge = self._charge(call.model, demand, attempt.answer, error, whole=whole)
            self._settle(permit, outcome, demand, attempt.answer, attempt.charge)

    def _admission(self, demand: Demand, deadline_ms: int | None, hard_ms: int) -> Acquisition:
        return self._limiter.acquire_for(demand.to_admit(deadline_ms, hard_ms))

    def _charge(
        self,
        model: str,
        demand: Demand,
        answer: Answer,
        error: UpstreamError | None,
        *,
        whole: bool,
    ) -> Charge:
        if error is not None and ((error.status or 0) >= 400 or never_sent(error)):
            return NO_CHARGE
        rates = self._demands.prices.of(model)
        return answer_charge(rates, answer, demand.estimate, whole=whole)

    def _settle(
        self, permit: Permit, outcome: Outcome, demand: Demand, answer: Answer, charge: Charge
    ) -> None:
        """Tell the limiter what a call used, as far as is known, and learn from it."""
        whole = outcome is Outcome.SUCCESS
        images = len(answer.pictures) if whole else None
        used = demand.used(answer.usage, charge.usage, whole=whole)
        permit.settle(outcome, tokens=used, images=images)
        self._demands.learn(demand, answer.usage, charge.usage, whole=whole)


def _suspect_of(call: Call) -> Suspect:
    """Who a fault is laid to that the request may have brought about."""
    tenant = None if call.tenant_id == DEFAULT_TENANT else call.tenant_id
    return Suspect(tenant, hash((call.model, call.prompt, len(call.media))))
