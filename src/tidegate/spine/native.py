"""Native calls: requests and answers in a provider's dialect, relayed byte for byte.

Bodies pass through unchanged except for the model's name; uploads and files are streamed. Output is
held back for at most `HELD_S` and `HELD_BYTES` until it has content, because a provider can answer
200 and fail before the first output: such a call is retried or moves to the next upstream.

Invariants: the usage that the provider reports in a complete answer is charged as it is; any other
charge is at least the estimated input and the visible output. Redirects are followed within the
upstream's base URL only. An upload URL that contains a key never reaches a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import ceil
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import orjson

from tidegate.admission.charges import (
    Prices,
    call_cost,
    charge_of,
    cut_charge,
    estimated_charge,
    is_complete,
    is_unknown,
    is_zero,
    without_zeros,
)
from tidegate.admission.demand import CallDemand, ConversationKey, Demands
from tidegate.admission.estimator import Estimate, Learning, with_stored
from tidegate.call import NO_CHARGE, OTHER_KIND, UNKNOWN_USAGE, CallCost, Charge
from tidegate.dialects import DIALECTS, answers, refusals
from tidegate.dialects.forms import is_prose
from tidegate.dialects.headers import (
    content_type_in,
    followed,
    is_unchanged,
    of_answer,
    requested_tier_in,
    tier_in,
    to_return,
)
from tidegate.dialects.parsing import LARGE_BYTES
from tidegate.dialects.requests import LONGEST_TIER, conversation_of, requested_tier
from tidegate.dialects.resources import Making, Reference
from tidegate.dialects.spec import (
    GOING_ON,
    NO_FACTS,
    WITHOUT_OUTPUT,
    AnswerFacts,
    Dialect,
    Endpoint,
    Headers,
    JsonObject,
    Operation,
    RequestFacts,
)
from tidegate.errors import NotFound, UpstreamError, UpstreamRejected
from tidegate.policy.access import Access, Paths
from tidegate.policy.deployment import ANY
from tidegate.policy.providers import OWN
from tidegate.prices.rates import STANDARD_TIERS, Rates
from tidegate.record import CallRecord, coding_of
from tidegate.spine.affinity import Home, conversation_key, lineage_in
from tidegate.spine.bodies import (
    NativeCall,
    aside,
    body_for,
    check_whole,
    has_several_answers,
    identity_of,
    read_to_its_end,
)
from tidegate.spine.hand_over import BackgroundHandOver
from tidegate.spine.models import (
    FURTHER_FIELDS,
    Models,
    among_fetching,
    check_model,
    facts_of_form,
    further_models,
    model_of_other,
    read_body,
    targets_for,
    why_unbounded,
)
from tidegate.spine.out import AttendedOut, Out
from tidegate.spine.resources import Keeping, Resources, is_absent, listed_in
from tidegate.spine.routing import Suspect, Target, Targets
from tidegate.spine.run import (
    CallFailed,
    OnAdmitted,
    Spine,
    UpstreamAccount,
    beginning_of,
    masked,
    refusal_of,
)
from tidegate.telemetry.tracing import HEADER
from tidegate.upstream.transport import (
    Exchange,
    RelayWire,
    RequestBody,
    RequestPlace,
    Timeouts,
)


class Relay:
    """Makes native calls through the spine. One per process."""

    def __init__(self, spine: Spine, wire: RelayWire, resources: Resources) -> None:
        self.spine = spine
        self.wire = wire
        self.resources = resources
        self._models = Models(wire)

    async def run(
        self,
        call: NativeCall,
        out: Out,
        record: CallRecord,
        on_admitted: OnAdmitted | None = None,
    ) -> None:
        """Make the call, relay its answer to `out` as it arrives, and fill `record`.

        Raises InvalidRequest, Forbidden, NotFound and what `Spine.run` raises; after `out.started`
        the client can only see a failure. Cancellation leaves no waiter and no open call.
        """
        endpoint, caller, raw = call.endpoint, call.terms.caller, call.body
        spec, use, is_large = DIALECTS[endpoint.dialect], endpoint.resource, len(raw) > LARGE_BYTES
        if not endpoint.is_counted and await self._answered_here(call, out, record):
            return
        body: dict[str, Any] = {}
        facts: RequestFacts | None = None
        making: Making | None = None
        references: Sequence[Reference] = ()
        if call.form is not None:
            body = dict(call.form.form.fields)
            facts = facts_of_form(call.form.form, endpoint, caller)
        elif endpoint.operation is Operation.OTHER:
            out = await self.resources.passed(out, call, record)
            record.model = await aside(len(raw), partial(model_of_other, call, raw)) or None
        elif endpoint.is_counted or (raw and use is None):
            read = partial(read_body, caller, endpoint, raw)
            body, facts, references, making = await aside(len(raw), read) if is_large else read()
        if facts is not None:
            record.model, record.streamed = facts.model, facts.streams
            record.prompt_head = facts.prompt_head
            record.kind = str(facts.kind) if endpoint.is_counted else None
        if use is not None:
            references = await aside(len(raw), partial(spec.references, {}, raw))
            targets = [await self.resources.target_of(caller, spec.name, use)]
        else:
            targets = self._targets(call, facts, record.model or "")
        if references:
            targets = await self._where_they_live(call, facts, references, targets)
        upstreams = [one.upstream for one in targets]
        if not all(ANY in one.media_hosts and one.provider not in OWN for one in upstreams):
            targets = await aside(len(raw), partial(among_fetching, body, targets))
        if (made := spec.made_by_tools) and (use or not made.fields.isdisjoint(body)):
            out = self.resources.noted(out, made, call, record) if made.may_make(use, body) else out
        exchange = NativeExchange(self.wire, self.spine.timeouts, call, body, facts, out, record)
        exchange.refers = bool(references)
        if making is not None or use is not None:
            exchange.keeping = Keeping(self.resources, call, making, references)
            await exchange.keeping.check()
        if making is not None and facts is not None and facts.runs_in_background:
            on_admitted = self._hand_over(exchange, record, making)
        home = None
        if facts is not None and endpoint.operation is Operation.INFER:
            before = await self.resources.continued(spec.name, references) if references else None
            tracing = partial(lineage_in, body, record.lineage, before)
            record.lineage = await aside(len(raw), tracing) if is_large else tracing()
            home = self._home(call, facts.model, record, targets) if len(targets) > 1 else None
        await self.spine.run(exchange, record, targets, on_admitted, home)

    async def _where_they_live(
        self,
        call: NativeCall,
        facts: RequestFacts | None,
        references: Sequence[Reference],
        targets: Sequence[Target],
    ) -> list[Target]:
        """Return the targets where all resources that the call refers to live, and add those
        resources' tokens to its input. Raises NotFound and InvalidRequest."""
        caller, dialect = call.terms.caller, call.endpoint.dialect
        if call.socket is not None:
            references, targets = call.socket.continued(references, facts, targets)
        left = await self.resources.among(caller, dialect, references, targets)
        if facts is not None and call.endpoint.is_counted:
            stored = await self.resources.stored_tokens(caller, dialect, references)
            if stored:
                facts.pieces = with_stored(facts.pieces, stored)
        return left

    def _hand_over(
        self, exchange: NativeExchange, record: CallRecord, making: Making
    ) -> OnAdmitted:
        """Set up the hand-over of a background call to the workers; return its `on_admitted`."""
        calls, journal = self.resources.background, self.spine.journal
        work = DIALECTS[exchange.dialect].works[making.kind]
        hand_over = BackgroundHandOver(calls, record, journal, making.kind, work.longest_ms)
        assert exchange.keeping is not None
        exchange.keeping.hand_over = exchange.hand_over = hand_over
        return hand_over.admitted

    def _home(
        self, call: NativeCall, model: str, record: CallRecord, targets: list[Target]
    ) -> Home | None:
        """Return the home of the call's conversation if its targets are equal ones, else None."""
        if not self.spine.targets.are_equivalent(call.endpoint.dialect, model):
            return None
        key = conversation_key(model, record.tenant_id, record.lineage.conversation)
        return self.spine.affinity.home(key, targets, (record.tenant_id, model))

    async def _answered_here(self, call: NativeCall, out: Out, record: CallRecord) -> bool:
        """Answer a call that needs no upstream; False if it needs one."""
        endpoint = call.endpoint
        if endpoint.operation is Operation.MODELS:
            return await self._listed(call, out, record)
        if endpoint.resource is None:
            return False
        caller, dialect = call.terms.caller, endpoint.dialect
        result = await self.resources.result(caller, dialect, endpoint.resource)
        if result is None:
            return False
        status, body = result
        record.keep(body)
        await out.whole(status, [_JSON], body)
        return True

    async def _listed(self, call: NativeCall, out: Out, record: CallRecord) -> bool:
        """Answer a list of models, or a model; False for what one upstream answers."""
        caller = call.terms.caller
        body = await self._models.answer(self.spine.targets, call.endpoint, caller, call.headers)
        if body is None:
            return False
        record.keep(body)
        length = (b"content-length", str(len(body)).encode())
        await out.start(200, [(b"content-type", b"application/json"), length])
        await out.body(body, False)
        return True

    def _targets(self, call: NativeCall, facts: RequestFacts | None, other: str) -> list[Target]:
        """Return the targets of a call. `other`: the model in the body of a `passthrough` path."""
        dialect, name = call.endpoint.dialect, call.endpoint.model
        if call.endpoint.upstreams:
            targets, tenant = self.spine.targets, call.terms.caller.tenant_id
            name = targets.passthrough.upstream(call.endpoint, tenant)
            return [Target(targets.upstreams[name], other)]
        if facts is not None:
            if (bound := call.terms.upstream) is not None:
                return targets_for(self.spine.targets, bound, dialect, facts.model)
            return _serving(self.spine.targets, call, facts.model)
        if call.endpoint.operation is Operation.MODELS and name is not None:
            check_model(call.terms.caller, name)
            return self.spine.targets.of(dialect, name)
        return [self.spine.first_of(dialect)]

    async def upload(
        self,
        call: NativeCall,
        body: RequestBody,
        own: Callable[[str], str],
        out: Out,
        record: CallRecord,
        at: str = "",
    ) -> None:
        """Relay one request of an upload. `own` returns the gateway's upload URL for a query. at:
        the name of the upstream where the upload has begun. Raises what `run` raises."""
        use, dialect = call.endpoint.resource, call.endpoint.dialect
        assert use is not None
        begun = None if use.resource_id else self.spine.targets.upstreams.get(at)
        if begun is not None and dialect in begun.base_urls:
            target = Target(begun, "")
        else:
            target = await self.resources.target_of(call.terms.caller, dialect, use)
        record.upstream, record.pool = target.upstream.name, target.upstream.pool
        record.attempts = 1
        try:
            timeouts = self.spine.timeouts[target.upstream.name]
            exchange = await _open(self.wire, timeouts, call, target, body)
            try:
                if exchange.status >= 300:
                    failed = await refusal_of(exchange, target, call.endpoint.dialect)
                    raise failed.named(0.0)
                record.http_status = exchange.status
                answer = await exchange.read(_UPLOADED_BYTES)
                await Keeping(self.resources, call, None).note(answer, target)
                upstream_headers = to_return(exchange.headers, target.upstream.key)
                headers = _own(
                    upstream_headers, lambda one: own(f"{one}&{AT_UPSTREAM}={target.upstream.name}")
                )
                headers += of_answer(target.upstream.name, 0.0)
                record.keep(answer)
                await out.start(exchange.status, headers)
                await out.body(answer, False)
            finally:
                exchange.close()
        except UpstreamError as error:
            raise CallFailed(error, target) from None


class NativeExchange:
    """A `CallExchange` of bytes. `body`: parsed; `facts`: what admission reads of it, or None."""

    def __init__(
        self,
        wire: RelayWire,
        timeouts: Mapping[str, Timeouts],
        call: NativeCall,
        body: dict[str, Any],
        facts: RequestFacts | None,
        out: Out,
        record: CallRecord,
    ) -> None:
        self.terms = call.terms
        self.dialect = call.endpoint.dialect
        self.bills = call.endpoint.is_counted or _may_cost(call)
        self._wire = wire
        self._timeouts = timeouts
        self._call = call
        self._body = body
        self._facts = facts
        self._out = out
        self._record = record
        self._served: str | None = None
        self._header_usage = UNKNOWN_USAGE  # in headers, for an answer that reports none
        self._sent: Exchange | None = None
        self.ended_alone = False
        self.keeping: Keeping | None = None  # of a resource that is made or used
        self.hand_over: BackgroundHandOver | None = None  # of a call in the background
        self.known_facts: AnswerFacts | None = None  # facts that are not in the answer alone
        self._read: answers.ReadAnswer | None = None  # of a large answer, read in a thread
        self._parsed: JsonObject | None = None  # a plain answer of moderate size
        self.refers = False  # to resources at one upstream

    @property
    def started(self) -> bool:
        return self._out.started

    @property
    def has_response(self) -> bool:
        return self._sent is not None and self._sent.has_response

    def serving(self, targets: Targets, model: str) -> list[Target]:
        is_other = self._call.endpoint.operation is Operation.OTHER
        return [] if is_other else _serving(targets, self._call, model)

    def elsewhere(self, targets: Targets) -> list[Target]:
        facts = self._facts
        return [] if facts is None or self.refers else self.serving(targets, facts.model)

    def demand(self, target: Target, account: UpstreamAccount) -> CallDemand:
        terms, facts, policy = self.terms, self._facts, account.limiter.policy
        tenant, priority, endpoint = terms.caller.tenant_id, terms.priority, self._call.endpoint
        if endpoint.operation is Operation.BATCH:
            demand = account.demands.of_batch(policy, tenant=tenant, priority=priority)
            return account.gate.bind(demand, target.model)
        counted = endpoint.is_counted and facts is not None
        demand = account.demands.of_native(
            target.model,
            facts.kind if counted and facts else OTHER_KIND,
            facts.pieces if facts else {},
            policy,
            tenant=tenant,
            priority=priority,
            tags=(terms.caller.key_id, terms.subject, terms.conversation),
            images=facts.images if facts else 0,
            max_output_tokens=facts.max_output_tokens if counted and facts else 1,
            conversation=self._conversation,
            measured=facts.measured if counted and facts else None,
            runs_model=counted or endpoint.operation.may_run_model,
        )
        follows = endpoint.resource is not None and endpoint.is_follow_up
        return account.gate.bind(demand, target.model, follows=follows)

    def _conversation(self) -> ConversationKey | None:
        if self._facts is None:
            return None
        key = conversation_of(self._body)
        return None if key is None else ConversationKey(*key)

    def cost(
        self, target: Target, account: UpstreamAccount, demand: CallDemand, *, tier: str = ""
    ) -> CallCost:
        facts, endpoint = self._facts, self._call.endpoint
        if facts is None or not endpoint.is_counted:
            return _COST_OF_OTHER if self.bills else CallCost(0, 0)
        prices, is_batch = account.demands.prices, endpoint.operation is Operation.BATCH
        # No other tier serves a batch, nor a call whose tier the gateway chose.
        is_chosen = bool(tier) or is_batch
        rates = prices.bound(target.model, tier or self._requested_tier(), is_chosen=is_chosen)
        context_tokens, most_output = prices.most(target.model)
        if is_batch and facts.calls > 1:
            context_tokens = context_tokens and context_tokens * facts.calls
            most_output = most_output and most_output * facts.calls
        if endpoint.operation in WITHOUT_OUTPUT:
            most_output = 0
        elif facts.max_output_tokens is not None or has_several_answers(self._body):
            most_output = facts.max_output_tokens
        return call_cost(
            rates,
            self._estimate(account.demands, demand, facts, target.model),
            input_bytes=self._call.body_bytes,
            context_tokens=context_tokens,
            unseen=_UNSEEN.get(facts.pieces.learning, ""),
            max_output_tokens=most_output,
            images=facts.images,
            draws_alone=endpoint.operation is Operation.IMAGES,
            writes=facts.cache_write or prices.unasked_write,
            tools=bool(facts.pieces.tools),
            unbounded=why_unbounded(self._body, facts, target.model),
            measured=facts.measured,
        )

    def suspect(self) -> Suspect:
        call, caller = self._call, self.terms.caller
        endpoint, tenant = call.endpoint, None if caller.key_id is None else caller.tenant_id
        body = identity_of(call.body) if call.form is None else call.form.identity
        request = hash((endpoint.path, endpoint.model, call.query, body))
        is_other = endpoint.operation is Operation.OTHER
        return Suspect(tenant, request, is_other, endpoint.path)

    def settle(
        self,
        target: Target,
        account: UpstreamAccount,
        demand: CallDemand,
        *,
        whole: bool,
        failed: CallFailed | None,
    ) -> int | None:
        record = self._record
        if record.handed_over:
            return None
        if record.pieces:
            self._read_answer(whole)
        images = None
        if demand.images and whole and not record.streamed:
            images = self._images()
        if failed is None or failed.status < 400:
            record.charge = self._charge(target, account.demands, demand, whole, images)
        return images

    def make(
        self, target: Target, account: UpstreamAccount, demand: CallDemand, *, is_try: bool
    ) -> Coroutine[Any, Any, None]:
        if self.hand_over is None and target.upstream.abandoned != "wait":
            return self._make(target, account, demand, is_try=is_try)
        making = partial(self._make, target, account, demand, is_try=is_try)
        if self.hand_over is not None:
            return self.hand_over.make(target, account, demand, making)
        return self._see_through(making)

    async def _see_through(self, making: Callable[[], Awaitable[None]]) -> None:
        """Make a call at a server that may continue when its client disconnects."""
        out, record = self._out, self._record
        if not isinstance(out, AttendedOut):
            self._out = out = AttendedOut(out, self.terms.left, record)
        try:
            await out.see_through(making, streams=record.streamed)
        finally:
            self.ended_alone = out.ended_alone

    async def _make(
        self, target: Target, account: UpstreamAccount, demand: CallDemand, *, is_try: bool
    ) -> None:
        call, record = self._call, self._record
        self._sent = self._read = self._parsed = None
        hides = bool(self._facts and self._facts.wants_usage and target.upstream.asks_usage)
        try:
            if self.keeping is not None and self.keeping.is_list:
                await self._list(target)
                return
            if call.endpoint.operation is Operation.OTHER:
                body: RequestBody = call.body or None
            elif call.form is None:
                args = call.body, call.endpoint, self._body, target
                making = partial(body_for, *args, request_usage=hides)
                is_large = len(call.body) > LARGE_BYTES
                body = await aside(len(call.body), making) if is_large else making()
            else:
                body = call.form.for_model(target.model)
            timeouts, sent = self._timeouts[target.upstream.name], self._note_sent
            exchange = await _open(
                self._wire, timeouts, call, target, body, sent, streamed=record.streamed
            )
            try:
                status = exchange.status
                if call.endpoint.is_counted and (status < 300 or status == 429):
                    account.gate.announced.take(target.model, exchange)
                if status >= 300 and not is_unchanged(status, call.headers):
                    dialect, tier = call.endpoint.dialect, self._requested_tier()
                    failed = await refusal_of(
                        exchange, target, dialect, tier, calls_model=call.endpoint.is_counted
                    )
                    raise self._with_headers(failed)
                coding, operation = coding_of(exchange.headers), call.endpoint.operation
                if call.endpoint.is_counted:
                    streams = record.streamed
                    first, value = await beginning_of(exchange, operation, coding, streams=streams)
                    if value is not None:
                        raise self._begun_with(value, exchange, target)
                else:  # such as a file, whose bytes may look like an error
                    first = await exchange.next()
                if is_try or account.gate.has_doubts:
                    await account.gate.worked(target.model, tried=is_try)
                await self._pass_on(exchange, first, coding, target, account, demand, hides)
                if record.answer_bytes > LARGE_BYTES:
                    await self.read_aside(whole=True)
            except BaseException:  # cancellation too: the partial answer is charged
                await self.read_aside(whole=False)
                raise
            finally:
                record.answer.first_byte_ms = exchange.first_byte_ms
                if not exchange.close():  # the transport closes in the loop's next round
                    await asyncio.sleep(0)
        except UpstreamError as error:
            raise CallFailed(error, target) from None

    def _note_sent(self, exchange: Exchange) -> None:
        self._record.sent, self._sent = True, exchange

    def _with_headers(self, failed: CallFailed) -> CallFailed:
        return failed.named(self._record.queue_ms or 0.0)

    async def _pass_on(
        self,
        exchange: Exchange,
        first: bytes,
        coding: bytes,
        target: Target,
        account: UpstreamAccount,
        demand: CallDemand,
        hides_usage: bool,
    ) -> None:
        record, out = self._record, self._out
        record.http_status = exchange.status
        record.coding = coding
        if self.dialect in (Dialect.GEMINI, Dialect.BEDROCK):
            self._served = tier_in(exchange.headers)
        if (reading := DIALECTS[self.dialect].usage_in) is not None:
            self._header_usage = reading(exchange.headers)
        hides_usage = hides_usage and not record.coding
        without = answers.WithoutUsageEvent() if hides_usage and _is_events(exchange) else None
        key = target.upstream.key
        headers = to_return(exchange.headers, key, same_length=without is None)
        if self._call.endpoint.operation is Operation.TRANSCRIBE:
            record.response_type = content_type_in(headers)
        headers += of_answer(target.upstream.name, record.queue_ms or 0.0)
        if left := account.remaining.of(demand.limits):
            headers.append((b"x-tidegate-remaining", left))
        if self.keeping is not None:
            first = await self.keeping.when_stored(exchange, first, target, record)
        record.keep(first)
        if without is None and exchange.at_end:
            self._parsed = await check_whole(record, self._call.endpoint)
            await out.whole(exchange.status, headers, first)
        else:
            await out.start(exchange.status, headers)
            await self._pieces(exchange, first, without)
        pieces, value = [record.text] if record.coding else record.pieces, None
        if record.streamed:
            value = refusals.error_at_end(pieces)
        elif record.answer_bytes <= LARGE_BYTES and self._call.endpoint.is_counted:
            value = refusals.error_of_choice(b"".join(pieces))
        if value is not None:
            raise CallFailed(self._stream_error(value, exchange, target), target, reported=True)

    def _begun_with(self, value: dict[str, Any], exchange: Exchange, target: Target) -> CallFailed:
        """Return the failure of an answer that begins with an error, before anything was sent."""
        headers = to_return(exchange.headers, target.upstream.key, same_length=False)
        return self._with_headers(
            CallFailed(
                self._stream_error(value, exchange, target),
                target,
                status=refusals.status_of(refusals.error_object(value) or {}),
                headers=refusals.own_headers(headers, value),
                body=masked(orjson.dumps(refusals.error_body(value)), target),
            )
        )

    async def _list(self, target: Target) -> None:
        """Answer a list of resources with those of the caller's tenant."""
        assert self.keeping is not None
        call, record = self._call, self._record

        async def read(at: Target, resource_id: str) -> dict[str, Any] | None:
            one = replace(
                call, endpoint=replace(call.endpoint, path=f"{call.endpoint.path}/{resource_id}")
            )
            one.query = ""
            exchange = await _open(self._wire, self._timeouts[at.upstream.name], one, at, None)
            try:
                if exchange.status == 404:
                    return None
                if exchange.status >= 300:
                    failed = await refusal_of(exchange, at, self.dialect)
                    # Google answers 403 for what does not exist; a refused key is a different 403.
                    if exchange.status == 403 and isinstance(failed.error, UpstreamRejected):
                        return None if is_absent(failed.body) else {}
                    raise failed
                return await listed_in(exchange)
            finally:
                exchange.close()

        body = await self.keeping.page(read)
        record.keep(body)
        head = [_JSON, *of_answer(target.upstream.name, record.queue_ms or 0.0)]
        await self._out.whole(200, head, body)

    def _stream_error(
        self, value: dict[str, Any], exchange: Exchange, target: Target
    ) -> UpstreamError:
        return refusals.stream_error(
            value,
            exchange.headers,
            secret=target.upstream.key,
            dialect=self._call.endpoint.dialect,
            tier=self._requested_tier(),
            is_own=target.upstream.is_own,
        )

    async def _pieces(
        self, exchange: Exchange, piece: bytes, without: answers.WithoutUsageEvent | None
    ) -> None:
        record, out = self._record, self._out
        if without is None:
            while more := not exchange.at_end:
                await out.body(piece, more)
                piece = await exchange.next()
                record.keep(piece)
            self._parsed = await check_whole(record, self._call.endpoint)
            await out.body(piece, more)
            return
        while piece:
            if visible := without.take(piece):
                await out.body(visible, True)
            if piece := await exchange.next():
                record.keep(piece)
        await out.body(without.rest(), False)

    def _read_answer(self, whole: bool) -> None:
        """Read usage, finish reason and ids from the answer. `whole`: the answer was completed."""
        record, answer = self._record, self._record.answer
        omitted, dialect = record.omitted_bytes > 0, DIALECTS[self.dialect]
        facts = self.known_facts or (self._read.facts if self._read is not None else None)
        is_transcript = self._call.endpoint.operation is Operation.TRANSCRIBE
        if facts is None and is_transcript and is_prose(record.response_type):
            facts = NO_FACTS
        facts = facts or dialect.answer_facts(
            record.text, omitted=omitted, cut=not whole, parsed=self._parsed
        )
        answer.usage, stated = facts.usage, self._header_usage
        if stated is not UNKNOWN_USAGE and not is_unknown(stated) and is_unknown(facts.usage):
            answer.usage = stated
        if self._served is not None:
            answer.usage = answers.with_tier(answer.usage, self._served)
        answer.finish_reason = facts.finish_reason
        answer.response_id, answer.model_version = facts.response_id, facts.model_version
        if facts.items and self.keeping is not None:
            self.keeping.note_items(facts.items, record)

    async def read_aside(self, *, whole: bool) -> None:
        """Parse a large answer in a thread before `settle`, which must not block the event loop."""
        if (record := self._record).answer_bytes > LARGE_BYTES:
            facts, dialect = self._facts, DIALECTS[self.dialect]
            counted, images = self._call.endpoint.is_counted, bool(facts and facts.images)
            how = {"whole": whole, "counted": counted, "images": images}
            reading = partial(answers.read_answer, dialect, record, **how)
            self._read = await read_to_its_end(record.answer_bytes, reading)

    def _images(self) -> int:
        images = None if self._read is None else self._read.images
        return DIALECTS[self.dialect].image_count(self._record.text) if images is None else images

    def _visible_output(self) -> answers.VisibleOutput:
        record, visible = self._record, None if self._read is None else self._read.visible
        return visible or answers.visible_output(
            DIALECTS[self.dialect], record.text, record.text_bytes
        )

    def _charge(
        self, target: Target, demands: Demands, demand: CallDemand, whole: bool, images: int | None
    ) -> Charge:
        """Return the charge of a call that an upstream may have begun to answer. `images`: None if
        they were not counted."""
        facts, record, endpoint = self._facts, self._record, self._call.endpoint
        if endpoint.operation is Operation.OTHER and not is_unknown(record.answer.usage):
            rates = self._rates(demands.prices, target.model, whole)
            return charge_of(rates, record.answer.usage, images, whole=whole)
        if facts is None or not record.sent or not endpoint.is_counted:
            return NO_CHARGE
        usage = record.answer.usage
        rates = self._rates(demands.prices, target.model, whole)
        if images is None and facts.images and record.streamed and _counts_images(endpoint):
            images = self._images()
        is_doubted = is_zero(usage) and endpoint.operation is Operation.INFER and not facts.images
        if is_doubted:  # but for an answer that returns the prompt
            is_doubted = not self._body.get("echo") and self._visible_output().tokens > 0
        if whole and not is_doubted and (is_complete(usage) or (images and is_unknown(usage))):
            return charge_of(rates, usage, images, whole=True)
        visible = self._visible_output()
        if facts.characters:  # speech, whose tokens are not visible
            visible.tokens = ceil(facts.characters * _SPOKEN_TOKENS_A_CHARACTER)
        is_coded = bool(record.coding) and not record.text  # as nothing here decodes
        if is_coded and endpoint.operation is Operation.INFER and not facts.images:
            visible.tokens = answers.tokens_by_size(record.answer_bytes)
        estimate = self._estimate(demands, demand, facts, target.model)
        usage = without_zeros(usage, visible.tokens, whole=whole)
        if is_doubted:
            record.answer.usage = usage  # neither limits nor estimates go by the zeros
        if is_unknown(usage):
            pictures = images or visible.images
            return estimated_charge(
                rates,
                estimate,
                visible.tokens,
                pictures,
                usage.details,
                facts.cache_write or demands.prices.unasked_write,
                measured=facts.measured,
            )
        return cut_charge(rates, usage, estimate, visible.tokens, images, whole=whole)

    def _rates(self, prices: Prices, model: str, whole: bool) -> Rates | None:
        """Return the prices of the tier that the answer reports, under the model's requested name
        or, if that has no price (such as a deployment's name), the reported one. An answer that was
        cut off may have been served in the requested tier."""
        answer = self._record.answer
        details = answer.usage.details
        names = (model, answer.model_version or "")
        if not FURTHER_FIELDS.isdisjoint(self._body) and further_models(self._body):
            names = names[::-1]
        if details is not None and details.tier is not None:
            return prices.of(names[0], details.tier) or prices.of(names[1], details.tier)
        tier = self._region() if whole else self._requested_tier()
        return prices.at_least(names[0], tier) or prices.at_least(names[1], tier)

    def _requested_tier(self) -> str:
        """Return the tier that the client requested, with what else changes its price."""
        body = self._body
        named = (self._facts.tier if self._facts else "") or requested_tier(body)
        named = requested_tier_in(self._call.headers, named)
        if body.get("speed") == "fast":
            named = "fast"
        if region := self._region():
            named = region if named in STANDARD_TIERS else f"{named} {region}"
        return named

    def _region(self) -> str:
        """Return Anthropic's `inference_geo`, a region with its own price; empty for global."""
        region = self._body.get("inference_geo", "")
        is_one = type(region) is str and len(region) <= LONGEST_TIER and region != "global"
        return region if is_one else ""

    def _estimate(
        self, demands: Demands, demand: CallDemand, facts: RequestFacts, model: str
    ) -> Estimate:
        if demand.estimate is not None:
            return demand.estimate
        return demands.estimator.of_pieces(
            model,
            facts.kind.value,
            facts.pieces,
            images=facts.images,
            max_output_tokens=facts.max_output_tokens,
            tenant=self.terms.caller.tenant_id,
        )


def _serving(targets: Targets, call: NativeCall, model: str) -> list[Target]:
    """Return the targets of a model. Work that continues after its answer must be readable by its
    id, which no path of Vertex's allows, so Vertex is left out. Raises NotFound, and for a call in
    a WebSocket WebSocketRefused."""
    endpoint, dialect = call.endpoint, call.endpoint.dialect
    found = targets.of(dialect, model)
    if call.socket is not None:
        found = call.socket.serving(found)
    if endpoint.operation in GOING_ON:
        found = [one for one in found if one.upstream.access(dialect).paths is not Paths.VERTEX]
    if not found:
        raise NotFound("no upstream with Gemini's own API serves this model; Vertex has others")
    return found


# A budget that accepts estimates admits it while it is not spent.
_COST_OF_OTHER = CallCost(None, None, 1, 1, "what a path costs that is known by its name alone")


def _may_cost(call: NativeCall) -> bool:
    """Whether a call of a `passthrough` path may run a model, so that it may cost something: any
    method but those that read or delete."""
    is_other = call.endpoint.operation is Operation.OTHER
    return is_other and call.method not in ("GET", "HEAD", "OPTIONS", "DELETE")


# The provider's documentation: a second of speech is 20 tokens, and about 15 characters.
_SPOKEN_TOKENS_A_CHARACTER = 4 / 3
_UNSEEN = {
    Learning.FILES: "the tokens of its files are not known beforehand",
    Learning.STATE: "the provider adds what it keeps of earlier calls",
}


def _counts_images(endpoint: Endpoint) -> bool:
    """Whether the images of a whole stream can be counted: other dialects send parts of images."""
    return endpoint.dialect is Dialect.GEMINI or endpoint.path == "/responses"


async def _open(
    wire: RelayWire,
    timeouts: Timeouts,
    call: NativeCall,
    target: Target,
    body: RequestBody,
    opened: Callable[[Exchange], None] | None = None,
    *,
    streamed: bool = False,
) -> Exchange:
    """Send the request to an upstream. `streamed`: its body requests a stream. Raises
    UpstreamError."""
    dialect, trail = call.endpoint.dialect, call.terms.trail
    access = target.upstream.access(dialect)
    streams = call.endpoint.streams or streamed
    path = call.endpoint.path
    if call.endpoint.model is not None:
        path = call.endpoint.path_for(target.model)
    place, headers = _place(access, path, call.query, target.model, streams), call.headers
    if trail is not None:
        traceparent = trail.begin(target.upstream.name, target.model, str(place.origin))
        headers = [*headers, (HEADER, traceparent.encode())]
    if call.socket is not None and isinstance(body, bytes):
        url = access.url(path, call.query, model=target.model)
        return await call.socket.open(target, url, headers, body, timeouts, opened)
    exchange = await wire.open(call.method, place, headers, body, None, timeouts, opened=opened)
    may_follow = call.method == "GET" and call.endpoint.operation is Operation.FILES
    if exchange.status not in REDIRECTS or not may_follow:
        return exchange
    for _ in range(MOST_REDIRECTS):
        onward = followed(exchange.headers, access.base)
        if onward is None:
            break
        try:
            await exchange.read(_REDIRECT_BYTES)
        finally:
            exchange.close()
        exchange = await wire.open("GET", wire.place(onward, access), headers, None, None, timeouts)
        if exchange.status not in REDIRECTS:
            break
    return exchange


@lru_cache(2_000)
def _place(access: Access, path: str, query: str, model: str, streams: bool) -> RequestPlace:
    """Return the address of a call. Cached, since nearly all calls go to a few addresses."""
    return RelayWire.place(access.url(path, query, model=model, streams=streams), access)


_REDIRECT_BYTES = 65_536
MOST_REDIRECTS = 3
REDIRECTS = frozenset((301, 302, 303, 307, 308))


def _is_events(exchange: Exchange) -> bool:
    """Whether the answer to a streaming call is a stream: so is one without a type."""
    kinds = [value.lower() for name, value in exchange.headers if name.lower() == b"content-type"]
    return not kinds or kinds[0].startswith(b"text/event-stream")


_JSON = (b"content-type", b"application/json")


AT_UPSTREAM = "tidegate_upstream"  # in an upload URL: the upstream where the upload continues
_UPLOADED_BYTES = 1_000_000  # of an upload's answer, which describes the file
MAX_BYTES = 2 * 1024**3  # https://ai.google.dev/gemini-api/docs/files
_URLS = (b"x-goog-upload-url", b"x-goog-upload-control-url")


def _own(headers: Headers, own: Callable[[str], str]) -> Headers:
    return [
        (name, own(_query_of(value.decode("latin-1"))).encode() if name in _URLS else value)
        for name, value in headers
    ]


def _query_of(url: str) -> str:
    """Return the query of an upstream's URL without its key."""
    pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    return urlencode([pair for pair in pairs if pair[0] != "key"])
