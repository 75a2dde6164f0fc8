"""Resources of tenants at providers: their owner, their account, and access to them.

    answer with a new id ──► noted (durable) ──► client      id in a request ──► owner ──► upstream

A request may only name resources of its own tenant. Any other is not found, with the same message
whether another tenant owns it or nobody does. A resource without an owner belongs to the tenant
that an upstream's `adopt` names, and lives at that upstream. A request that names a resource is
only sent where the resource lives: no failover leads to another account.

The row of a resource that its provider deletes by itself ends a month later. The provider may keep
it for longer; nobody reaches it then.

Invariants: no id reaches a client before its owner is durable; an id that has an owner keeps it,
whatever an upstream answers to others.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from typing import Any
from urllib.parse import quote
from uuid import UUID

import orjson

from tidegate.call import Caller
from tidegate.dialects import DIALECTS
from tidegate.dialects.parsing import parsed
from tidegate.dialects.resources import (
    LONGEST_ID,
    Act,
    MadeByTools,
    Making,
    Reference,
    ResourceUse,
    early_text,
    without_answers,
)
from tidegate.dialects.sandboxes import (
    AUDIO,
    CONTAINER,
    ITEM,
    SKILL,
    VECTOR_STORE,
    made_by_passed,
    passed_in,
)
from tidegate.dialects.spec import Dialect, OngoingWork
from tidegate.errors import (
    InvalidRequest,
    NotEnded,
    NotFound,
    PayloadTooLarge,
    StoreUnavailable,
    UpstreamError,
    UpstreamGarbled,
    UpstreamMissing,
)
from tidegate.policy.deployment import Upstream
from tidegate.policy.providers import PROVIDERS
from tidegate.record import KEPT_BYTES, CallRecord, coding_of, decoded
from tidegate.spine.bodies import NativeCall, Pieces, aside
from tidegate.spine.hand_over import BackgroundHandOver
from tidegate.spine.out import Named, NotingOut, Out
from tidegate.spine.routing import Target, Targets
from tidegate.spine.run import CallFailed, refusal_of
from tidegate.store.provider.background import BackgroundCalls
from tidegate.store.provider.resources import NewResource, ProviderResources, ResourceOwner
from tidegate.store.requests import Requests
from tidegate.upstream.transport import Exchange, RelayWire, Timeouts

# Kinds that are also made at the provider itself; without API keys, every caller may use them.
_MADE_ELSEWHERE = frozenset(("file", "cached_content", "message_batch", "file_search_store"))
# Kinds of which a provider may have some that no answer has named here: those without an owner are
# open to all callers.
_NOT_ALL_KNOWN = frozenset((CONTAINER, ITEM, AUDIO, VECTOR_STORE, SKILL))
# Kinds that jobs of all tenants may use before a row names the owner.
_OF_JOBS = frozenset(("file", "batch", "message_batch"))
_READ_AGAIN = frozenset(("response", "interaction", "cached_content"))
_CONTINUED = frozenset(("previous_response_id", "previous_interaction_id"))
_MOST_A_PAGE = 100  # each is a request to its provider
_MOST_READ = 300  # a filter may leave out any number of them
_ROWS_AT_ONCE = 100
# A row is deleted once its provider has not known the resource for this long: a proxy before a
# provider in an outage may answer 404 too. Meanwhile no list requests the resource again.
GONE_AFTER_S = 60.0
_MOST_MISSING = 20_000

_READ_AT_ONCE = 8
_INDENT_BYTES = 64  # before the first brace of a body

# How long the rows of these kinds last. No provider keeps a container for more than 30 days without
# use, nor a sound for more than an hour.
_ROWS_LAST = {
    CONTAINER: timedelta(days=90),
    ITEM: timedelta(days=90),
    AUDIO: timedelta(days=1),
}

# Reads a resource at its provider: empty for one that cannot be shown, None if there is none.
Read = Callable[[Target, str], Awaitable[dict[str, Any] | None]]
# Reads a resource of a kind in a dialect at an upstream; None if there is none.
Show = Callable[[Upstream, str, str, str], Awaitable[dict[str, Any] | None]]
_Place = tuple[str, str, str]  # dialect, kind and id
_Listed = tuple[str, ResourceOwner, Upstream]  # id, owner, and the upstream to read it from


def account_of(upstream: Upstream, dialect: str) -> bytes:
    """Return a digest that identifies an account: of its base URL, and its key or the credentials
    that replace the key."""
    base, identity = upstream.base_urls[Dialect(dialect)], upstream.identity(dialect)
    return sha256(f"{base}\n{identity}".encode()).digest()


@dataclass(frozen=True, slots=True)
class MadeBy:
    """The call that makes a resource."""

    caller: Caller
    dialect: str
    request_id: UUID
    subject: str | None = None
    conversation: str | None = None


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Resources:
    """The resources of all tenants, one object per process. Every method that looks up an owner
    raises StoreUnavailable. now: the clock by which rows end."""

    def __init__(
        self,
        store: ProviderResources,
        background: BackgroundCalls,
        targets: Targets,
        bodies: Requests,
        show: Show,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._show = show
        self.now = now
        self._store = store
        self._bodies = bodies
        self.background = background
        self._targets = targets
        self._missing: dict[_Place, float] = {}  # since when a provider does not have it

    # Stored results

    async def result(
        self, caller: Caller, dialect: Dialect, use: ResourceUse
    ) -> tuple[int, bytes] | None:
        """Return the status and the body of an answer for the caller's own work whose result its
        provider delivers only once, to a worker; None for any other work. Raises NotFound for a
        result that is not kept, or work that has failed."""
        work = DIALECTS[dialect].works.get(use.kind)
        if work is None or not work.is_read_once or use.resource_id is None:
            return None
        found = await self._store.owners(dialect, use.kind, [use.resource_id])
        owner = found.get(use.resource_id)
        if owner is None or owner.tenant_id != caller.tenant_id or owner.request_id is None:
            return None
        if await self.background.is_running(dialect, use.kind, use.resource_id):
            await self.background.hasten(dialect, use.kind, use.resource_id)
            return 202, b""
        body = await self._bodies.body(owner.request_id, caller.tenant_id, "response")
        if body.omitted_bytes:
            raise NotFound("the result is longer than what is kept")
        return 200, b"".join([piece async for piece in body.pieces])

    def noted(self, out: Out, tools: MadeByTools, call: NativeCall, record: CallRecord) -> Out:
        """Return the `out` of a call, which notes what the provider's tools make."""
        dialect, terms = call.endpoint.dialect, call.terms

        async def note(named: Named) -> None:
            target = Target(self._targets.upstreams[record.upstream or ""], "")
            by = MadeBy(terms.caller, dialect, terms.request_id, terms.subject)
            for kind, one in named:
                ends_at = self.now() + _ROWS_LAST[kind] if kind in _ROWS_LAST else None
                await self.note(self.made(by, target, kind, [one], ends_at))

        return NotingOut(out, tools, note)

    # Owners and accounts

    def note_items(self, by: MadeBy, upstream: str, ids: Sequence[str], *, is_kept: bool) -> None:
        """Record the owner of the items of an answer. is_kept: in a conversation."""
        if (at := self._targets.upstreams.get(upstream)) is not None:
            lasts = _row_lasts(at, "response") or _ROWS_LAST[ITEM]
            ends_at = None if is_kept else self.now() + lasts
            self._store.note_soon(self.made(by, Target(at, ""), ITEM, ids, ends_at))

    async def note(self, made: Sequence[NewResource]) -> None:
        """Record the owners of new resources; return once they are durable."""
        await self._store.note(made)
        for one in made:  # a client may reuse a name
            self._missing.pop((one.dialect, one.kind, one.resource_id), None)

    def made(
        self,
        call: MadeBy,
        target: Target,
        kind: str,
        ids: Iterable[str],
        expires_at: datetime | None = None,
    ) -> list[NewResource]:
        """Return rows that make the caller the owner of these ids at the target's account."""
        upstream = target.upstream
        account = account_of(upstream, call.dialect)
        owner = ResourceOwner(
            call.caller.tenant_id, upstream.name, account, call.request_id, call.conversation
        )
        return [
            NewResource(call.dialect, kind, one, owner, call.subject, expires_at) for one in ids
        ]

    async def _place(
        self, caller: Caller, dialect: str, kind: str, resource_id: str, field: str | None = None
    ) -> Upstream | None:
        """Return the upstream where a resource lives; None for one without an owner that any caller
        may use. Raises NotFound for any other that is not the caller's own, and for the caller's
        own if its account is no longer configured."""
        found = await self._store.owners(dialect, kind, [resource_id])
        owner = found.get(resource_id)
        if owner is None and kind in _NOT_ALL_KNOWN:
            return None
        if owner is not None and owner.tenant_id == caller.tenant_id:
            return self._upstream(owner, dialect, kind, resource_id, field)
        if owner is None and not (
            kind in _OF_JOBS and await self._store.is_of_jobs(dialect, resource_id)
        ):
            for one in self._targets.upstreams_of(Dialect(dialect)):
                if one.adopt == caller.tenant_id and await self._was_made_elsewhere(
                    one, dialect, kind, resource_id
                ):
                    return one
            if caller.key_id is None and kind in _MADE_ELSEWHERE:
                return None
        raise NotFound(missing(kind, resource_id), field=field)

    async def _was_made_elsewhere(
        self, upstream: Upstream, dialect: str, kind: str, resource_id: str
    ) -> bool:
        """Whether a resource without a row was not made here: one that is old enough may have had a
        row that has ended. Raises CallFailed."""
        if _row_lasts(upstream, kind) is None:
            return True
        shown = await self._show(upstream, dialect, kind, resource_id)
        made_at = None if shown is None else _made_at(shown)
        if made_at is None:
            return False
        ends_at = row_end(upstream, kind, shown, made_at)
        return ends_at is None or ends_at - _CLOCKS_DIFFER > self.now()

    def _upstream(
        self, owner: ResourceOwner, dialect: str, kind: str, resource_id: str, field: str | None
    ) -> Upstream:
        if (found := self._home_of(owner, dialect)) is not None:
            return found
        if (lacking := self._targets.deployment.missing.get(owner.upstream)) is not None:
            of = f"{kind} {resource_id}"
            raise UpstreamMissing(of, {owner.upstream: lacking.variable})
        message = f"{missing(kind, resource_id)} The upstream {owner.upstream!r}, where it lives, "
        raise NotFound(f"{message}is not configured any more.", field=field)

    def _home_of(self, owner: ResourceOwner, dialect: str) -> Upstream | None:
        """Return the upstream with the resource's account, whatever its name is now; else the one
        with the recorded name, whose key may have been renewed; None if neither exists."""
        upstreams = self._targets.upstreams_of(Dialect(dialect))
        for one in upstreams:
            if account_of(one, dialect) == owner.account:
                return one
        return next((one for one in upstreams if one.name == owner.upstream), None)

    async def forget(self, caller: Caller, dialect: str, kind: str, resource_id: str) -> None:
        """Delete the row of a resource that the caller has deleted at the provider."""
        await self._store.forget(caller.tenant_id, dialect, kind, resource_id)

    # Targets of calls

    async def target_of(self, caller: Caller, dialect: Dialect, use: ResourceUse) -> Target:
        """Return the target of a request on a resource. A request that names none goes to the
        dialect's own provider if that is an upstream, else to the upstream with the fewest
        dialects. Raises NotFound."""
        if use.resource_id is not None:
            upstream = await self._place(caller, dialect, use.kind, use.resource_id)
            if upstream is not None and upstream.keeps(use.kind):
                return Target(upstream, "")
        upstreams = [one for one in self._targets.in_service(dialect) if one.keeps(use.kind)]
        if not upstreams:
            raise NotFound(f"no upstream speaks the {dialect} dialect and has a {use.kind}")
        first = min(upstreams, key=lambda one: (one.provider != dialect, len(one.base_urls)))
        return Target(first, "")

    async def among(
        self,
        caller: Caller,
        dialect: Dialect,
        references: Sequence[Reference],
        targets: Sequence[Target],
    ) -> list[Target]:
        """Return the targets where all resources that a call refers to live. Raises NotFound for a
        resource that is not the caller's own, InvalidRequest if no target is left."""
        left = list(targets)
        unknown = await self._without_owner(dialect, references)
        for one in references:
            if one in unknown:
                continue
            upstream = await self._place(caller, dialect, one.kind, one.resource_id, one.field)
            if upstream is None:
                continue
            left = [target for target in left if target.upstream.name == upstream.name]
            if not left:
                message = f"the {one.kind} {one.resource_id!r} lives at the upstream "
                message += f"{upstream.name!r}, to which this call does not go"
                allowed = f"a model that {upstream.name!r} serves, and what lives there alone"
                raise InvalidRequest(one.field, message, allowed=allowed)
        return left

    async def _without_owner(
        self, dialect: Dialect, references: Sequence[Reference]
    ) -> set[Reference]:
        """Return those that are open to all callers, looked up at the same time: a conversation may
        be sent with all of its items."""
        found: set[Reference] = set()
        for kind in _NOT_ALL_KNOWN.intersection(one.kind for one in references):
            ids = [one.resource_id for one in references if one.kind == kind]
            owners = await self._store.owners(dialect, kind, ids)
            found.update(
                one for one in references if one.kind == kind and one.resource_id not in owners
            )
        return found

    async def passed(self, out: Out, call: NativeCall, record: CallRecord) -> Out:
        """Return the `out` of a call of a `passthrough` path, which notes what the call makes.
        Raises NotFound for what such a call of another tenant has made, and for another tenant's
        resource that the body names."""
        caller, dialect = call.terms.caller, call.endpoint.dialect
        named, of_body = passed_in(call.endpoint.path), list[tuple[str, str]]()
        if call.body[:_INDENT_BYTES].lstrip()[:1] == b"{":
            finding = partial(DIALECTS[dialect].references, {}, call.body)
            with suppress(InvalidRequest):  # the body may be anything but JSON
                found = await aside(len(call.body), finding)
                of_body = [(one.kind, one.resource_id) for one in found]
        for kind in dict.fromkeys(kind for kind, _ in (*named, *of_body)):
            ids = [one for of, one in (*named, *of_body) if of == kind]
            for one, owner in (await self._store.owners(dialect, kind, ids)).items():
                if owner.tenant_id != caller.tenant_id:
                    raise NotFound(missing(kind, one))
        if not named or call.method != "POST":
            return out
        return self.noted(out, made_by_passed(named), call, record)

    async def continued(
        self, dialect: Dialect, references: Sequence[Reference]
    ) -> ResourceOwner | None:
        """Return the row of the answer that a call continues; `references` have passed `among`."""
        before = None
        for one in references:
            if one.field in _CONTINUED:
                owners = await self._store.owners(dialect, one.kind, [one.resource_id])
                before = owners.get(one.resource_id)
        return before

    async def stored_tokens(
        self, caller: Caller, dialect: Dialect, references: Sequence[Reference]
    ) -> int:
        """Return about how many tokens of earlier calls the provider adds to a call with these
        references, which have passed `among`; 0 if unknown."""
        made_by, conversations = [], []
        for one in references:
            if one.kind == "conversation":
                conversations.append(one.resource_id)
            elif one.kind in _READ_AGAIN:
                found = await self._store.owners(dialect, one.kind, [one.resource_id])
                owner = found.get(one.resource_id)
                if owner is not None and owner.request_id is not None:
                    made_by.append(owner.request_id)
        if not made_by and not conversations:
            return 0
        with suppress(StoreUnavailable):
            return await self._store.tokens(caller.tenant_id, made_by, conversations)
        return 0

    # Lists

    async def page(
        self, caller: Caller, dialect: Dialect, use: ResourceUse, query: str, read: Read
    ) -> bytes:
        """Return a page of the caller's own resources, in the dialect's form: rows give the ids,
        each is read where it lives and shown as it is there. Resources of upstreams that are no
        longer configured are left out. Raises InvalidRequest and StoreUnavailable."""
        page_query = DIALECTS[dialect].page(use.kind, query)
        if page_query.only is not None:
            chosen = await self._chosen(caller, dialect, use, page_query.only, read)
            last = chosen[-1][0] if chosen else None
            return orjson.dumps(page_query.whole(chosen, False, last))
        found, absent = list[tuple[str, dict[str, Any]]](), list[str]()
        most = min(page_query.limit, _MOST_A_PAGE)
        after, examined, has_more = page_query.after, 0, True
        while has_more and len(found) <= most and examined < _MOST_READ:
            rows = await self._store.of_tenant(
                caller.tenant_id,
                dialect,
                use.kind,
                newest_first=page_query.newest_first,
                after=after,
                limit=_ROWS_AT_ONCE + 1,
            )
            has_more = len(rows) > _ROWS_AT_ONCE
            left = deque(rows[:_ROWS_AT_ONCE])
            while left:
                if len(found) > most or examined == _MOST_READ:
                    has_more = True
                    break
                needed, some = min(most + 1 - len(found), _MOST_READ - examined), list[_Listed]()
                while left and len(some) < min(needed, _READ_AT_ONCE):
                    after, owner = left.popleft()
                    home = self._home_of(owner, dialect)
                    if home is not None and not self._is_missing((dialect, use.kind, after)):
                        some.append((after, owner, home))
                examined += len(some)
                for (one_id, owner, home), one in zip(
                    some, await _read_all(some, read), strict=True
                ):
                    place = (dialect, use.kind, one_id)
                    if one is not None:
                        self._missing.pop(place, None)
                        found += [(one_id, one)] if one and page_query.matches(one) else []
                    elif self._has_none(place, is_same=account_of(home, dialect) == owner.account):
                        absent.append(one_id)
        listed = found[:most]
        has_more = most > 0 and (len(found) > most or has_more)
        last = listed[-1][0] if listed else None
        if has_more and len(found) <= most:
            last = after  # which is not shown
        for resource_id in absent:  # so that no later list reads years of absent resources first
            if resource_id != last:
                await self.forget(caller, dialect, use.kind, resource_id)
        return orjson.dumps(page_query.whole(listed, has_more, last))

    def _is_missing(self, place: _Place) -> bool:
        """Whether the provider did not have the resource a moment ago."""
        since = self._missing.get(place)
        return since is not None and time.monotonic() - since < GONE_AFTER_S

    def _has_none(self, place: _Place, *, is_same: bool) -> bool:
        """Record that a provider does not have a resource. Return whether that is final: the same
        account has not known it for a while."""
        if self._is_missing(place):  # another list has just read it
            return False
        if place in self._missing and is_same:
            del self._missing[place]
            return True
        if len(self._missing) >= _MOST_MISSING:
            self._missing.clear()
        self._missing[place] = time.monotonic()
        return False

    async def _chosen(
        self, caller: Caller, dialect: Dialect, use: ResourceUse, ids: Sequence[str], read: Read
    ) -> list[tuple[str, dict[str, Any]]]:
        """Return those of the ids that are the caller's own, with the same exception as `page`."""
        owners = await self._store.owners(dialect, use.kind, ids)
        own, found = list[_Listed](), list[tuple[str, dict[str, Any]]]()
        for one in ids:
            owner = owners.get(one)
            if owner is None or owner.tenant_id != caller.tenant_id:
                continue
            if (home := self._home_of(owner, dialect)) is not None:
                own.append((one, owner, home))
        for start in range(0, len(own), _READ_AT_ONCE):
            some = own[start : start + _READ_AT_ONCE]
            resources = zip(some, await _read_all(some, read), strict=True)
            found += [(one, resource) for (one, _, _), resource in resources if resource]
        return found


async def _read_all(some: Sequence[_Listed], read: Read) -> list[dict[str, Any] | None]:
    """Read resources from their providers, concurrently. Raises the first error; the other reads
    are then cancelled."""
    reads = [asyncio.ensure_future(read(Target(home, ""), one)) for one, _, home in some]
    try:
        return [await one for one in reads]
    finally:
        for one in reads:
            one.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


# Answers


def missing(kind: str, resource_id: str) -> str:
    """Return OpenAI's message for a resource that does not exist."""
    if kind == "response":
        return f"Response with id '{resource_id}' not found."
    name = kind.replace("_", " ").capitalize()
    return f"{name} with id '{resource_id}' not found."


_ABSENT = re.compile(rb"not found|may not exist", re.IGNORECASE)


def is_absent(refusal: bytes) -> bool:
    """Whether Google's 403 means that the resource may not exist."""
    return _ABSENT.search(refusal) is not None


def made_in(answer: bytes, making: Making) -> dict[str, Any] | None:
    """Return the object that an answer makes, None for none: from JSON, or its id alone if the JSON
    is cut off; from a stream, the object in the first event that has an id."""
    if answer.lstrip()[:1] == b"{":
        try:
            whole = orjson.loads(answer)
        except orjson.JSONDecodeError:  # too long to be kept in full, such as images
            found = early_text(answer, making.name)
            return {making.name: found} if found else None
        inner = None if making.within is None else whole.get(making.within)
        return next((one for one in (inner, whole) if _id_of(one, making) is not None), None)
    for line in answer.splitlines():
        if not line.startswith(b"data:"):
            continue
        try:
            event = orjson.loads(line[5:])
        except orjson.JSONDecodeError:  # an incomplete last event
            continue
        if not isinstance(event, dict):
            continue
        within = event if making.within is None else event.get(making.within)
        if isinstance(within, dict) and _id_of(within, making) is not None:
            return within
    return None


def _names_nothing(stream: bytes, making: Making) -> bool:
    """Whether a stream can no longer name what it makes: the event for that has passed, or enough
    others."""
    count = 0
    for line in stream.splitlines():
        if line.startswith(b"data:"):
            try:
                event = orjson.loads(line[5:])
            except orjson.JSONDecodeError:
                continue
            count += 1
            is_named = making.within is None or (isinstance(event, dict) and making.within in event)
            if is_named or count >= _MOST_EVENTS:
                return True
    return False


def _id_of(value: Any, making: Making) -> str | None:
    found = value.get(making.name) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found:
        return None
    found = found.rpartition(making.prefix)[2] if making.prefix else found
    if len(found) > LONGEST_ID or not found.isprintable():
        raise UpstreamGarbled("the answer names a resource by an invalid id")
    return found


_MOST_SHOWN_BYTES = 64_000_000  # a batch of Gemini's contains its answers


async def shown_at(
    wire: RelayWire,
    timeouts: Mapping[str, Timeouts],
    upstream: Upstream,
    dialect: str,
    kind: str,
    resource_id: str,
) -> dict[str, Any] | None:
    """Return a resource as its provider shows it; None if there is none, or none that can be read.
    Raises CallFailed."""
    target, access = Target(upstream, ""), upstream.access(Dialect(dialect))
    path = DIALECTS[Dialect(dialect)].works[kind].read.replace("{id}", quote(resource_id, safe=""))
    headers = [(b"accept", b"application/json")]
    try:
        place = wire.place(access.url(path, "", model="", streams=False), access)
        exchange = await wire.open("GET", place, headers, None, None, timeouts[upstream.name])
        try:
            if exchange.status == 404:
                return None
            if exchange.status >= 300:
                raise await refusal_of(exchange, target, dialect)
            answer = await Pieces.of(exchange, _MOST_SHOWN_BYTES)
        finally:
            exchange.close()
    except UpstreamError as error:
        raise CallFailed(error, target) from None
    try:
        shown = await answer.read(orjson.loads)
    except orjson.JSONDecodeError:
        return None
    return shown if isinstance(shown, dict) else None


async def listed_in(exchange: Exchange) -> dict[str, Any]:
    """Return an object of a list as its provider shows it, without a batch's answers. Raises
    UpstreamError."""

    def read(answer: bytes) -> dict[str, Any]:
        return without_answers(parsed(answer))

    answer = await Pieces.of(exchange, _MOST_SHOWN_BYTES)
    try:
        return await answer.read(read)
    except (InvalidRequest, PayloadTooLarge):
        raise UpstreamGarbled("the provider's answer is not an object that can be listed") from None


def _made_at(shown: Mapping[str, Any]) -> datetime | None:
    """Return when a resource was made, as its provider shows it: a response or an interaction."""
    unix, text = shown.get("created_at"), shown.get("created")
    if isinstance(unix, int | float) and 0 < unix < _MOST_UNIX:
        return datetime.fromtimestamp(unix, UTC)
    return _time_in(text) if isinstance(text, str) else None


# OpenAI keeps a response for at least its 30 days. A row outlives its resource by as much.
_ROW_OUTLIVES, _CLOCKS_DIFFER = timedelta(days=30), timedelta(days=1)


def _row_lasts(upstream: Upstream, kind: str) -> timedelta | None:
    """Return how long the row of a resource lasts that the provider deletes by itself."""
    preset = PROVIDERS.get(upstream.provider or "")
    days = None if preset is None else preset.kept_days.get(kind)
    return None if days is None else timedelta(days=days) + _ROW_OUTLIVES


def row_end(
    upstream: Upstream, kind: str, shown: Mapping[str, Any] | None, made_at: datetime
) -> datetime | None:
    """Return when the row of a resource ends that the provider deletes by itself; None if the
    provider keeps it: a response in a conversation, or one of which only the id was read."""
    lasts = _row_lasts(upstream, kind)
    if lasts is None or shown is None or len(shown) < 2 or shown.get("conversation") is not None:
        return None
    return made_at + lasts


_FILE_MARGIN, _MOST_UNIX = timedelta(days=1), 2**40
_IN_BACKGROUND = re.compile(rb'"background"\s*:\s*true')


def _end_of(made: dict[str, Any] | None) -> datetime | None:
    """Return when a file expires: at Gemini, whose client may then reuse its name; at OpenAI, whose
    ids are never reused, with a margin, as an upload in parts. None for no end."""
    if made is None:
        return None
    expiration, ends_at = made.get("expirationTime"), made.get("expires_at")
    is_file = made.get("object") in ("file", "upload")
    if is_file and isinstance(ends_at, int) and 0 < ends_at < _MOST_UNIX:
        return datetime.fromtimestamp(ends_at, UTC) + _FILE_MARGIN
    if not isinstance(expiration, str):
        return None
    if (end := _time_in(expiration)) is None:
        raise UpstreamGarbled("the answer has an invalid expiry time")
    return end


def _time_in(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


_MOST_EVENTS = 8  # before the event that names what a stream makes
_HEAD_BYTES = 262_144  # of an answer that names several resources


class Keeping:
    """Records the resources that one call makes, uses or deletes. making: what its answer makes,
    for a call that is not a request on a resource. references: to resources that the call uses.
    hand_over: for a call in the background."""

    def __init__(
        self,
        resources: Resources,
        call: NativeCall,
        making: Making | None,
        references: Sequence[Reference] = (),
    ) -> None:
        self.hand_over: BackgroundHandOver | None = None
        self._references = references
        self._resources = resources
        self._call = call
        self._use = use = call.endpoint.resource
        if making is None and use is not None:
            making = use.path.makes
        self.making = making

    @property
    def is_list(self) -> bool:
        return self._use is not None and self._use.act is Act.LIST

    async def page(self, read: Read) -> bytes:
        """Return the page of a list."""
        assert self._use is not None
        call = self._call
        return await self._resources.page(
            call.terms.caller, call.endpoint.dialect, self._use, call.query, read
        )

    async def when_stored(
        self, exchange: Exchange, first: bytes, target: Target, record: CallRecord
    ) -> bytes:
        """Return the beginning of a successful answer once the resources that it makes or deletes
        are durable. Raises UpstreamError and StoreUnavailable."""
        use, caller = self._use, self._call.terms.caller
        if use is not None and use.act is Act.DELETE and use.resource_id is not None:
            dialect = self._call.endpoint.dialect
            await self._resources.forget(caller, dialect, use.kind, use.resource_id)
            if use.kind in self._works:
                await self.hasten()
        elif use is not None and (use.act is Act.CANCEL or _IN_BACKGROUND.search(first)):
            await self.hasten()
        if self.making is None:
            return first
        first, made = await self.named(exchange, first, record)
        if use is None and self.hand_over is None and (made or {}).get("store") is False:
            return first  # OpenRouter and DeepSeek keep nothing, whatever a request says
        rows = self._rows(made, target, record.lineage.conversation)
        if self.hand_over is not None:
            work = self._works[self.making.kind]
            if made is not None and work.end_of(made) is None:
                await self.hand_over.taken(rows)
                return first
            await self.hand_over.not_accepted()
        await self._resources.note(rows)
        ongoing = None if use is None else self._works.get(use.kind)
        if ongoing is not None and made is not None and ongoing.end_of(made) is not None:
            await self.hasten()  # a worker may not have noticed the end yet
        return first

    @property
    def _works(self) -> Mapping[str, OngoingWork]:
        return DIALECTS[self._call.endpoint.dialect].works

    async def note(self, answer: bytes, target: Target) -> None:
        """Make the resources of a complete answer durable. Raises StoreUnavailable."""
        if self.making is not None:
            await self._resources.note(self._rows(made_in(answer, self.making), target))

    def _rows(
        self, made: dict[str, Any] | None, target: Target, conversation: str | None = None
    ) -> list[NewResource]:
        assert self.making is not None
        terms, call = self._call.terms, self._call
        dialect, request_id = call.endpoint.dialect, terms.request_id
        by = MadeBy(terms.caller, dialect, request_id, terms.subject, conversation)
        ids: Sequence[str]
        if self.making.each is not None:
            ids = self.making.each(made) if made is not None else ()
        else:
            named = _id_of(made, self.making)
            ids = [] if named is None else [named]
        kind, ends_at = self.making.kind, _end_of(made)
        if not any(one.kind == "conversation" for one in self._references):
            ends_at = ends_at or row_end(target.upstream, kind, made, self._resources.now())
        return self._resources.made(by, target, kind, ids, ends_at)

    def note_items(self, ids: Sequence[str], record: CallRecord) -> None:
        """Record the owner of the items that a provider stores with an answer."""
        terms, dialect = self._call.terms, self._call.endpoint.dialect
        by = MadeBy(terms.caller, dialect, terms.request_id, record.subject)
        is_kept = any(one.kind == "conversation" for one in self._references)
        self._resources.note_items(by, record.upstream or "", ids, is_kept=is_kept)

    async def hasten(self) -> None:
        """Have a worker soon poll the background call that this request concerns."""
        use, dialect = self._use, self._call.endpoint.dialect
        if use is not None and use.resource_id is not None:
            await self._resources.background.hasten(dialect, use.kind, use.resource_id)

    async def check(self) -> None:
        """Raises NotEnded for a resource that is still being made and must not be deleted."""
        use, dialect = self._use, self._call.endpoint.dialect
        if use is None or use.act is not Act.DELETE or use.resource_id is None:
            return
        if await self._resources.background.is_running(dialect, use.kind, use.resource_id):
            raise NotEnded(
                f"The {use.kind} {use.resource_id!r} is still being made, or its end is being "
                "recorded: cancel it, or repeat this in some seconds."
            )

    async def named(
        self, exchange: Exchange, first: bytes, record: CallRecord
    ) -> tuple[bytes, dict[str, Any] | None]:
        """Return the beginning of an answer and the object that it makes, None for none. An object
        is read in full; of a stream only the first events, which may repeat long instructions."""
        assert self.making is not None
        # An answer that names several is short, unless it contains answers and no files.
        coding, most = coding_of(exchange.headers), _HEAD_BYTES if self.making.each else KEPT_BYTES
        pieces, size_bytes, is_news = [first], len(first), True
        while True:
            is_whole = exchange.at_end or size_bytes > most
            if is_whole or (record.streamed and is_news):
                pieces = [first := b"".join(pieces)]
                content = decoded(first, coding) if coding else first
                found = await aside(len(content), partial(made_in, content, self.making))
                if is_whole or found is not None or _names_nothing(content, self.making):
                    return first, found
            pieces.append(await exchange.next())
            size_bytes += len(pieces[-1])
            is_news = bool(coding) or b"\n" in pieces[-1]  # an event may be complete
