"""Learning of limits from answers, and detection of other programs on the same account.

    headers, and bounds that refusals state
       └──► readings ──► notes of the pool's sessions ──► shown: limits show, page, metrics
                                     │
                                     ▼ the leader, once a second
                    account's usage - usage that the pool counts = others ──► charge of the limit

Each process reads the last headers of each model once a second, never during a call, and shares
them with the pool. If a provider sends no such headers, the bounds that its refusals state are
read. The leader is the process whose session has the first name among those that share readings. It
charges limits with the usage of other programs, so that the remaining capacity fits the account. If
`learn` is `apply`, the leader also puts in force limits that no person has set.

Invariants: a call pays nothing for learning; limits that a person has set stay in force; a charge
ends with the window of its limit, and shrinks with the difference to the bound in force.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from math import inf
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeVar

import orjson

from tidegate.dialects.headers import RateStatus, answered_at, rate_statuses
from tidegate.errors import (
    AdmissionError,
    ConfigError,
    LimiterUnavailable,
    StatedBound,
    StoreUnavailable,
)
from tidegate.limiter import MAX_BOUND, LimitView, Quota, Rate, next_midnight_ms
from tidegate.policy.account import (
    LEAST_WINDOW_S,
    NEAR,
    READ_LATE_S,
    STATED_S,
    UNTOLD_WINDOWS,
    AccountUse,
    DayUse,
)
from tidegate.policy.deployment import Learn
from tidegate.policy.format import can_be_limited, plain_model
from tidegate.policy.imported import acceptance
from tidegate.policy.learned import (
    MOST_READERS,
    REFUSED_S,
    HeaderReading,
    LearnedLimit,
    LearnedNote,
    LimitMatch,
    OthersUse,
    RefusedLimit,
    learned_limits,
    newest,
    readings_of_days,
    unpacked_note,
)
from tidegate.policy.rollout import PolicyKeeper
from tidegate.store.notifications import next_beat_s
from tidegate.telemetry.logging import Log, get_logger

EVERY_S = 1.0
KEEP_NOTE_MS = 10_000
STABLE_S = 5.0
_SET_BY = "headers"
_REASON = "learned from the headers of answers"
_UNITS = {
    "requests": "r",
    "tokens": "t",
    "input_tokens": "it",
    "output_tokens": "ot",
    "images": "i",
}
_WINDOWS = {"second": "ps", "minute": "pm", "hour": "ph", "day": "pd"}
# Windows of providers whose headers name none, where it is not a minute.
_UNNAMED: Mapping[tuple[str, str], str] = {
    ("groq", "requests"): "day",
    ("together", "requests"): "second",
}
_LENGTHS_S = {"minute": 60.0, "hour": 3_600.0, "day": 86_400.0}
# Time zones in which the days of limits begin.
_ZONES = ("UTC", "America/Los_Angeles")
# Tolerance for the delay of headers and the rounding of their times.
_LATE_S = 1.5
# Pairs of answers that decide whether a limit is a bucket, and the most that are remembered.
_SURE, _MOST_VOTES = 2, 6
# The greatest bound in a header; a limit with six times the window, as at Azure, is six times it.
_MOST_BOUND = MAX_BOUND // 6
# Providers whose limits are fixed windows; those of others are token buckets.
_BEGIN_AGAIN = ("azure",)
# Providers whose refusals state when the window ends; those of others state when a call fits.
_STATE_RESETS = ("gemini",)

log = get_logger()

MOST_MODELS = 50
_MOST_HEADERS = 40
_COST = b"x-ratelimit-tokens-query-cost"  # Mistral's: the sum of the answer's usage

RawHeaders = Sequence[tuple[bytes, bytes]]
_Name = TypeVar("_Name")
_Stored = TypeVar("_Stored")


@dataclass(frozen=True, slots=True)
class Announcement:
    """The limits that one model's headers announce. at: their time in seconds since 1970, from
    which each `reset_ms` counts. heard_at: when the answer arrived."""

    model: str
    at: float
    limits: tuple[RateStatus, ...]
    heard_at: float

    def shown(self) -> dict[str, Any]:
        """Return the announcement as plain values, without absent fields."""
        limits = [
            {name: value for name, value in asdict(one).items() if value is not None}
            for one in self.limits
        ]
        at = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds")
        return {"model": self.model, "at": at, "limits": limits}


class AnswerHead(Protocol):
    """The head of an answer. sent_s: when its call was sent, by `perf_counter`."""

    status: int
    sent_s: float

    @property
    def headers(self) -> RawHeaders: ...


class _Head(NamedTuple):
    """Headers of an answer, their time and their arrival, in seconds since 1970."""

    headers: RawHeaders
    at: float
    heard_at: float


_OF_LOWER_BOUND = " The provider reports a bound of"


class Announced:
    """The limits that one upstream has announced to this process.

    Headers show the account at the time when the provider counted the call, as recordings show: on
    an otherwise unused account, one request less than the limit remains, and the reset is the time
    in which one request refills, however long the answer took. Headers that state the cost of the
    call, output included, show the time of the answer.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._heads: dict[str, _Head] = {}
        self._refused: dict[str, float] = {}  # model: until when the headers of its refusal stand
        self._served: set[str] = set()  # the models among them that were answered
        self._read: dict[str, tuple[_Head, Announcement | None]] = {}
        self._limits_refused: dict[str, RefusedLimit] = {}
        self._stated: dict[tuple[str, str, str], Announcement] = {}  # from refusals
        self.lower: Mapping[str, int] = {}  # limits in force with a lower bound at the provider

    def __contains__(self, model: str) -> bool:
        """Whether the upstream has lately answered for the model, so that the name is real."""
        return model in self._served

    def take(self, model: str, answer: AnswerHead) -> None:
        """Keep the headers of an answer, as `note` does. The headers must not be changed
        afterwards."""
        self.note(model, answer.headers, answer.status, perf_counter() - answer.sent_s)

    def note(self, model: str, headers: RawHeaders, status: int = 200, took_s: float = 0.0) -> None:
        """Keep the headers of an answer to a call that was sent `took_s` before, unless newer ones
        are known. Headers of a 429 stand for `REFUSED_S`. If there are too many models, those that
        were only refused are dropped first."""
        heads, received_at = self._heads, self._clock()
        at = received_at - took_s
        if model not in heads and len(heads) >= MOST_MODELS:
            evicted = next((one for one in heads if one not in self._served), None)
            if evicted is None:
                if status >= 300:
                    return
                evicted = next(iter(heads))
                self._served.discard(evicted)
            del heads[evicted]
            self._refused.pop(evicted, None)
        if status < 300:
            self._served.add(model)
        if status == 429:
            self._refused[model] = at + REFUSED_S
            if not _has_limits(headers) and model in heads:
                return
        # A refusal after a clock that was set back lies in the future, and does not stand.
        elif at < self._refused.get(model, 0.0) <= received_at + REFUSED_S:
            return
        known = heads.get(model)
        if known is None or at >= known.at or received_at < known.heard_at:
            heads[model] = _Head(headers, at, received_at)

    def refuse(
        self,
        limit: str,
        model: str = "",
        stated: Sequence[StatedBound] = (),
        reset_ms: int | None = None,
    ) -> None:
        """Record that the provider refused a call of a model: `limit` in force, empty for none; the
        bounds that the refusal stated; and the time until there is room, if it stated one. A
        refusal without a bound may have another cause than an exhausted limit."""
        now = self._clock()
        if limit:
            reset_s = reset_ms / 1000 if reset_ms and stated else None
            _store_last(self._limits_refused, limit, RefusedLimit(limit, now, reset_s))
        for one in sorted(stated, key=lambda each: -each.bound):  # it exceeded each bound of a unit
            announcement = Announcement(model, now, (RateStatus(*one),), now)
            _store_last(self._stated, (model, one.unit, one.window), announcement)

    def explain(self, error: AdmissionError) -> None:
        """Add to the message of a limit that is full for us that the provider has a lower bound, if
        it has: the difference is kept free, and counts as used."""
        bound = self.lower.get(error.limit or "")
        if bound is not None and _OF_LOWER_BOUND not in error.message:
            error.message += f"{_OF_LOWER_BOUND} {bound}, and the rest is kept free."
            error.args = (error.message,)

    def refusals(self) -> tuple[RefusedLimit, ...]:
        """Return the last refusal of each limit."""
        return tuple(self._limits_refused.values())

    def all(self) -> list[Announcement]:
        """Return the latest announcement of each model whose headers named a limit."""
        self._read = {model: self._of(model, head) for model, head in self._heads.items()}
        return [found for _, found in self._read.values() if found is not None]

    def stated(self) -> list[Announcement]:
        """Return the latest announcement of each limit that refusals stated, one limit each."""
        return list(self._stated.values())

    def _of(self, model: str, head: _Head) -> tuple[_Head, Announcement | None]:
        known = self._read.get(model)
        if known is not None and known[0] is head:
            return known
        of = head
        if any(name.lower() == _COST for name, _ in head.headers):
            of = head._replace(at=head.heard_at)
        limits = _limits_in(of)
        return head, Announcement(model, of.at, limits, of.heard_at) if limits else None


def _store_last(known: dict[_Name, _Stored], name: _Name, value: _Stored) -> None:
    """Store a value as the newest of at most `MOST_MODELS`."""
    known.pop(name, None)
    if len(known) >= MOST_MODELS:
        del known[next(iter(known))]
    known[name] = value


def _limits_in(head: _Head) -> tuple[RateStatus, ...]:
    """Return the limits in the headers, for each unit and window the one with the least
    remaining."""
    named = [(name.lower(), value) for name, value in head.headers]
    limit_headers = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in [pair for pair in named if b"ratelimit" in pair[0]][:_MOST_HEADERS]
    }
    found: dict[tuple[str, str | None], RateStatus] = {}
    date = next((value.decode("latin-1") for name, value in named if name == b"date"), "")
    answered = answered_at(date, datetime.fromtimestamp(head.heard_at, UTC))
    counted = answered - timedelta(seconds=head.heard_at - head.at)
    for one in rate_statuses(limit_headers, counted) if limit_headers else ():
        other = found.get((one.unit, one.window))
        if other is None or _left(one) < _left(other):
            found[one.unit, one.window] = one
    return tuple(found.values())


def _has_limits(headers: RawHeaders) -> bool:
    return any(b"ratelimit" in name.lower() for name, _ in headers)


def _left(status: RateStatus) -> float:
    return float("inf") if status.remaining is None else status.remaining


class _Reset(NamedTuple):
    """The reset of a limit as one answer reports it: at a time, in so many seconds since then."""

    at: float
    in_s: float
    cut_s: float = 0.0
    bound: int = 0
    remaining: int | None = None

    @property
    def used(self) -> int:
        return 0 if self.remaining is None else self.bound - self.remaining

    @property
    def rounded_by(self) -> float:
        """The possible error of `used`: Anthropic rounds the remaining tokens to thousands."""
        is_rounded = self.remaining is not None and not (self.bound % 1000 or self.remaining % 1000)
        return 500.0 if is_rounded else 0.0

    def is_midnight(self) -> bool:
        at_ms = self.at * 1000
        ends_ms = [next_midnight_ms(zone, at_ms) - at_ms for zone in _ZONES]
        return any(abs(each - self.in_s * 1000) <= _LATE_S * 1000 for each in ends_ms)


_NO_RESET = _Reset(float("-inf"), 0.0)


class ResetEvidence:
    """Evidence for the length of a limit's window, from its resets, if its headers do not name it.

    A fixed or sliding window resets within its length, and a fixed window at an instant that does
    not change until then. A token bucket resets later with each unit taken: after the same part of
    its window as is used of its bound. So the longest reset is a lower bound of the window. A
    bucket with a longer window and little use is recognised by answers whose resets move. After a
    single answer that resets within a minute the window is taken for a minute, unless a longer one
    is plausible; then it is unknown.
    """

    def __init__(self) -> None:
        self._last = self._first = _NO_RESET
        self._longest_s = 0.0
        self._crossed = False  # a reset has passed, and no longer one followed
        self._jump_s = inf  # the shortest time from one window's reset to a later one's
        self._votes = 0  # positive for a bucket, negative for a fixed window

    @property
    def begins_again(self) -> bool:
        return self._votes <= -_SURE

    @property
    def length_ms(self) -> float | None:
        """The length of a fixed window, once two consecutive ones were seen, else None."""
        is_next = self._longest_s > self._jump_s / 2 + _LATE_S
        return self._jump_s * 1000 if is_next else None

    def take(self, reset: _Reset) -> None:
        """Add an answer's reset as evidence. Ignores an answer that is not newer than the last, and
        a reset that is not longer than its rounding."""
        last = self._last
        if reset.at <= last.at or reset.in_s <= reset.cut_s:
            return
        self._last = reset
        # Less than nothing may remain: a bucket then resets later than after its window.
        in_s = reset.in_s / 2 if reset.remaining == 0 else reset.in_s
        if in_s > self._longest_s + _LATE_S:
            self._crossed = False
        elif last.in_s and reset.at > last.at + last.in_s + _LATE_S:
            self._crossed = True
        self._longest_s = max(self._longest_s, in_s)
        least_s = max(self._longest_s - _LATE_S, 2 * _LATE_S)  # a window lasts at least this long
        jump_s = reset.at + reset.in_s - last.at - last.in_s
        jumps = [each for each in (self._jump_s, jump_s) if each >= least_s]
        self._jump_s = min(jumps, default=inf)
        self._compare(reset)

    def _compare(self, reset: _Reset) -> None:
        """Vote for or against a bucket by this answer and an earlier one, before the earlier's
        reset."""
        first, vote = self._first, 0
        ends = first.at + first.in_s
        if first.used > 0 and reset.used > 0 and first.bound == reset.bound:
            moved_s, later_s = reset.at + reset.in_s - ends, abs(reset.in_s - first.in_s)
            unit_s, ratio = first.in_s / first.used, reset.used / first.used
            off_s = abs(reset.in_s - unit_s * reset.used)
            most_s = unit_s * (1 + reset.rounded_by + first.rounded_by * ratio)
            most_s += first.cut_s * max(1.0, ratio) + reset.cut_s
            fits = off_s <= most_s and moved_s >= unit_s - _LATE_S
            is_within = reset.at < ends - _LATE_S
            # A bucket that is used as fast as it refills resets later by the time that passes; if
            # nothing remains, the actual usage is unknown.
            is_separate = reset.at - first.at > 2 * _LATE_S
            is_conclusive = is_separate and 0 not in (first.remaining, reset.remaining)
            if fits and is_within and min(moved_s, later_s) > _LATE_S:
                vote = 1
            elif is_conclusive and not fits and abs(moved_s) <= _LATE_S:
                vote = -1
        self._votes = max(-_MOST_VOTES, min(self._votes + vote, _MOST_VOTES))
        if vote or reset.at >= ends - _LATE_S or first.bound != reset.bound or not first.used:
            self._first = reset

    def window(self) -> str | None:
        """Return the name of the window; None while it is unknown."""
        last = self._last
        fitting = (name for name, each in _LENGTHS_S.items() if self._longest_s <= each + _LATE_S)
        least = next(fitting, None)
        if least is None or not last.in_s:
            return least
        if last.used > 0 and not self.begins_again:
            # A part of the last unit used may have refilled.
            shortest_s = (last.in_s - last.cut_s) * last.bound / last.used
            longest_s = (last.in_s + last.cut_s) * last.bound / max(last.used - 1, 1)
            for name, length_s in _LENGTHS_S.items():
                if length_s > _LENGTHS_S[least] and (
                    shortest_s < length_s * NEAR and longest_s > length_s / NEAR
                ):
                    return name if self._votes >= _SURE else None
        is_sure = least == "day" or self._crossed
        return least if is_sure or (least == "minute" and not last.is_midnight()) else None


class HeaderReader:
    """Reads the limits of one upstream from headers, in the units and windows of policies."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._resets: dict[tuple[str, str], ResetEvidence] = {}

    def read(self, announcements: Iterable[Announcement]) -> list[HeaderReading]:
        """Return the latest reading of each limit and model. Leaves out limits whose window is
        unknown, and models whose names no limit can have."""
        known, self._resets, found = self._resets, {}, []
        for announced in announcements:
            model = plain_model(announced.model)
            if not can_be_limited(model):
                continue
            units = {one.unit for one in announced.limits}
            for one in announced.limits:
                # Anthropic's `tokens` are the sum of input and output.
                if one.unit == "tokens" and {"input_tokens", "output_tokens"} <= units:
                    continue
                key = announced.model, f"{one.unit} {one.window}"
                resets = self._resets[key] = known.get(key) or ResetEvidence()
                if (reading := self._reading(announced, one, resets)) is not None:
                    found.append(reading)
        return found

    def _reading(
        self, announced: Announcement, one: RateStatus, resets: ResetEvidence
    ) -> HeaderReading | None:
        if not one.limit or one.limit > _MOST_BOUND:  # such as "no limit", as some spell it
            return None
        reset_ms = one.reset_ms or 0
        cut_s = 0.001 if reset_ms % 1000 else 1.0
        resets.take(_Reset(announced.at, reset_ms / 1000, cut_s, one.limit, one.remaining))
        window = one.window or _UNNAMED.get((self._provider, one.unit)) or resets.window()
        if window not in _WINDOWS:
            return None
        scope = _UNITS[one.unit] + _WINDOWS[window]
        begins_again = self._provider in _BEGIN_AGAIN or resets.begins_again
        return HeaderReading(
            plain_model(announced.model),
            scope,
            one.limit,
            None if one.remaining is None else min(one.remaining, one.limit),
            announced.at,
            resets.length_ms if begins_again else _implied_ms(one),
            one.reset_ms if begins_again else None,
            announced.heard_at,
        )


def _implied_ms(one: RateStatus) -> float | None:
    """Return the window of a bucket: the time until it is full, divided by the part that is
    used."""
    if not one.limit or one.remaining is None or not one.reset_ms:
        return None
    used = one.limit - one.remaining
    return one.reset_ms * one.limit / used if used > 0 else None


class Confirmations:
    """Since when each limit is reported with the same bound, for the same bound in force."""

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s
        self._seen: dict[str, tuple[int, int | None, float]] = {}

    def take(self, one: LearnedLimit, now: float) -> bool:
        """Whether an answer at least `for_s` after the first with a bound still reports that bound.
        Answers from before a change of the limit in force are no reason to change it back."""
        at = datetime.fromisoformat(one.at).timestamp()
        bound, in_force, since = self._seen.get(one.limit, (0, None, now))
        if (bound, in_force) != (one.bound, one.in_force):
            self._seen[one.limit] = one.bound, one.in_force, max(now, at)
            return False
        return at - since >= self._for_s


class LimitLearner:
    """Learns the limits of one upstream in one process."""

    def __init__(
        self,
        keeper: PolicyKeeper,
        announced: Announced,
        learn: Learn,
        clock: Callable[[], float] = time.time,
        share: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
    ) -> None:
        """`share`: writes the process's note into the pool, for a note with more than learned
        limits."""
        self._keeper = keeper
        self._share = share or self._send_note
        self._limiter = keeper.limiter
        self._announced = announced
        self._reader = HeaderReader(keeper.provider)
        self._learn = learn
        self._clock = clock
        self._others: tuple[OthersUse, ...] = ()  # usage of others, while this process leads
        self._shares = False
        self._received: tuple[Mapping[str, OthersUse], float] = ({}, 0.0)  # the leader's, and when
        self._match: LimitMatch | None = None
        self._uses: dict[str, AccountUse] = {}
        self._days: dict[str, DayUse] = {}
        self._changed_at: dict[str, float] = {}  # when this process saw each bound change
        self._epoch = 0  # the pool's epoch in which the charges were made
        self._confirmations = Confirmations(STABLE_S)
        self._removed: dict[str, tuple[int, bool]] = {}  # as of a revision, whether by a person

    async def run(self) -> None:
        """Share readings, and as the leader act on them, once a second until cancelled."""
        while True:
            await asyncio.sleep(next_beat_s(EVERY_S))
            try:
                await self.look()
            except (LimiterUnavailable, StoreUnavailable) as error:
                log.debug(Log.STORE_AWAY, detail=error.message)
            except ConfigError as invalid:
                log.warning(Log.LIMITS_CONFLICT, reason=f"not learned: {invalid.message}")
            except Exception:  # the top of a task: logged, and the loop continues
                log.exception(Log.INTERNAL_ERROR, component="learning")

    async def look(self) -> None:
        """Share the readings of this process, and as the leader act on those of all processes.

        Does nothing while no answer has announced a limit and no call was refused for one. Raises
        LimiterUnavailable and, when a limit is to be put in force, StoreUnavailable.
        """
        limiter, announced = self._limiter, self._announced
        if limiter.state == "away":
            return
        refusals = announced.refusals()
        own = self._reader.read([*announced.all(), *announced.stated()])
        if not own and not refusals:
            announced.lower = {}
            return
        match = self._matched()
        own = [one for one in own if not self._is_over(one, match)]
        refused, shared = self._recent(refusals, match), self._shares
        self._shares = bool(own or refused)
        if not self._shares and not shared:
            return
        await self._share(asdict(LearnedNote(tuple(own), self._others, refused)))
        packed = await limiter.told(MOST_READERS)
        notes, own_sid = {sid: unpacked_note(raw) for sid, raw in packed.items()}, limiter.session
        others = [note.others for sid, note in notes.items() if sid != own_sid]
        received = {one.limit: one for each in others for one in each}
        readers = [sid for sid, one in notes.items() if one.readings or one.refusals]
        leads = bool(readers) and min(readers) == own_sid
        if leads:
            await self._lead(notes, match, {**self._recently_received(), **received})
        self._received = received, self._clock()
        announced.lower = self._lower(notes.values(), match)
        if not leads:
            self._others = ()
            self._uses.clear()
            self._days.clear()

    def _lower(self, notes: Iterable[LearnedNote], match: LimitMatch) -> dict[str, int]:
        """Return the bounds of the provider that are below those in force, by limit."""
        found = {}
        for name, reading in newest(notes, match).items():
            limit, bound = match.policy.limit(name), match.bound_for(reading, name)
            if limit is None or bound is None or self._is_old(reading, name):
                continue
            if bound < limit.bound:
                found[name] = bound
        return found

    def _recently_received(self) -> Mapping[str, OthersUse]:
        """Return the usage of others that the previous leader last shared. Its note ends with its
        session, before this process leads."""
        others, at = self._received
        return others if abs(self._clock() - at) * 1000 < KEEP_NOTE_MS else {}

    async def _send_note(self, note: dict[str, Any]) -> None:
        await self._limiter.tell(orjson.dumps(note), KEEP_NOTE_MS)

    def _matched(self) -> LimitMatch:
        policy, match = self._limiter.policy, self._match
        if match is None or match.policy is not policy:
            if match is not None:
                before, now = match.policy.rules, self._clock()
                for name, limit in policy.rules.items():
                    if name not in before or before[name].bound != limit.bound:
                        self._changed_at[name] = now
                        if name in self._uses:
                            self._uses[name].forgive()
                        if name in before:
                            self._end_charges(name, before[name].bound - limit.bound, now)
            match = self._match = LimitMatch(policy, self._keeper.provider)
        return match

    def _end_charges(self, name: str, by: int, now: float) -> None:
        """Reduce the charges of a limit whose bound fell by `by`, as the pool does."""
        if by > 0 and name in self._uses:
            self._uses[name].lower(by, now)
        elif by > 0 and name in self._days:
            self._days[name].lower(by)

    async def _lead(
        self,
        notes: Mapping[str, LearnedNote],
        match: LimitMatch,
        before: Mapping[str, OthersUse],
    ) -> None:
        """Compare the account's usage with the pool's, and charge the difference to the limits.
        before: the usage of others that the previous leader shared."""
        readings = newest(notes.values(), match)
        self._read(readings, match, before)
        days = readings_of_days(notes.values(), match, readings)
        for name, of_day in days.items():
            self._use_of(name, match, before, of_day)
        for name, rate in self._uses.items():
            rate.read_day(days.get(name))
        refusals = [one for note in notes.values() for one in note.refusals]
        self._take_refusals(refusals, match, before, readings)
        now = self._clock()
        since_ms = {
            name: round((now - use.since) * 1000)
            for name, use in self._uses.items()
            if use.since is not None
        }
        snapshot = await self._limiter.snapshot(since_ms=since_ms)
        if snapshot.epoch != self._epoch:
            self._epoch = snapshot.epoch
            self._lose_charges()
        if snapshot.recovering_ms:  # some processes have not reported their usage yet
            return
        found = []
        untold = [name for name, use in self._uses.items() if not use.is_reported]
        for name in dict.fromkeys((*readings, *untold)):
            view, reading = snapshot.limits.get(name), readings.get(name)
            use = await self._make_room(name, reading, match, view, before)
            if use is not None:
                found.append(use)
        self._others = tuple(found)
        if self._learn == "apply":
            await self._apply(learned_limits(list(notes.values()), match))

    def _lose_charges(self) -> None:
        """Forget charges that Valkey lost with its data, except those that processes report
        again."""
        self._others = ()
        self._days.clear()
        for use in self._uses.values():
            use.lose()

    def _read(
        self,
        readings: Mapping[str, HeaderReading],
        match: LimitMatch,
        before: Mapping[str, OthersUse],
    ) -> None:
        """Add new readings to each rate's usage."""
        for name, reading in readings.items():
            if self._is_old(reading, name):
                continue
            if (use := self._use_of(name, match, before, reading)) is None:
                continue
            use.read(reading)
            limit, bound = match.policy.limit(name), match.bound_for(reading, name)
            if reading.remaining is None and bound is not None and limit is not None:
                use.take_stated(bound, limit.bound, reading.at)

    def _use_of(
        self,
        name: str,
        match: LimitMatch,
        before: Mapping[str, OthersUse],
        reading: HeaderReading | None,
    ) -> AccountUse | None:
        """Return the usage of a rate at the account; None for a limit that is not compared. For a
        limit without readings of the remaining amount, an earlier leader's knowledge came from
        refusals."""
        limit = match.policy.limit(name)
        if not isinstance(limit, Rate) or limit.shadow:
            return None
        window_s, use = limit.window_ms / 1000, self._uses.get(name)
        if window_s < LEAST_WINDOW_S:
            return None
        if use is None or use.window_s != window_s:
            refills = self._keeper.provider not in _BEGIN_AGAIN
            use = AccountUse(window_s, window_s + limit.slack / 1000, refills)
            self._uses[name] = use
            if name in before and reading is not None and reading.remaining is not None:
                use.inherit(before[name], self._clock())
                if (bound := before[name].bound) is not None:
                    use.inherit_day(bound, limit.bound, reading)
            elif name in before:
                lower = min(limit.bound, self._bound(name, limit, reading, match) or limit.bound)
                use.inherit_refusals(before[name], lower, self._clock())
        return use

    def _take_refusals(
        self,
        refusals: Iterable[RefusedLimit],
        match: LimitMatch,
        before: Mapping[str, OthersUse],
        readings: Mapping[str, HeaderReading],
    ) -> None:
        """Add refusals to their limits' usage. Left out: a refusal from before a change of the
        bound, which may have caused it, and one in the future, from before the clock was set
        back."""
        latest = self._clock() + READ_LATE_S
        for one in sorted(refusals, key=lambda each: each.at):
            if self._changed_at.get(one.limit, 0.0) < one.at <= latest:
                reading = readings.get(one.limit)
                use = self._use_of(one.limit, match, before, reading)
                if use is not None:
                    states_reset = self._states_reset(one, reading, match)
                    use.refuse(one.at, one.reset_s if states_reset else None)

    def _states_reset(
        self, refused: RefusedLimit, reading: HeaderReading | None, match: LimitMatch
    ) -> bool:
        """Whether a refusal stated the bound of the limit in force itself, so that its retry time
        is the end of that limit's window. A refusal of another unit or window is assigned to the
        nearest limit in force, and says nothing about what remains of it."""
        if self._keeper.provider not in _STATE_RESETS or reading is None:
            return False
        is_stated = reading.remaining is None and reading.at >= refused.at
        return is_stated and match.bound_for(reading, refused.limit) is not None

    def _recent(
        self, refusals: Iterable[RefusedLimit], match: LimitMatch
    ) -> tuple[RefusedLimit, ...]:
        """Return the refusals that still count. The next leader may not know that a bound was
        changed."""
        now, found = self._clock(), []
        for one in refusals:
            limit = match.policy.limit(one.limit)
            if isinstance(limit, Rate) and not self._is_before_change(one.at, one.limit):
                for_s = UNTOLD_WINDOWS * limit.window_ms / 1000
                found += [one] if now - one.at < for_s else []
        return tuple(found)

    def _is_old(self, reading: HeaderReading, name: str) -> bool:
        """Whether a reading is older than the limit's last change: the account may have more
        now."""
        return self._is_before_change(reading.at, name)

    def _is_before_change(self, at: float, name: str) -> bool:
        """Whether `at` is before the limit's change. A change in the future was made before the
        clock was set back."""
        return at < self._changed_at.get(name, 0.0) <= self._clock()

    def _is_over(self, reading: HeaderReading, match: LimitMatch) -> bool:
        """Whether a reading that only states a bound, other than the one in force, has expired:
        after an hour, since no answer would correct a wrong one, or after a change of the limit, of
        which the next leader may not know."""
        if reading.remaining is not None:
            return False
        name = match.of(reading)
        limit = None if name is None else match.policy.limit(name)
        if name is None or limit is None:
            return self._is_late(reading)
        is_other = match.bound_for(reading, name) != limit.bound
        return is_other and (self._is_late(reading) or self._is_old(reading, name))

    def _is_late(self, reading: HeaderReading) -> bool:
        return self._clock() - reading.at > STATED_S

    async def _make_room(
        self,
        name: str,
        reading: HeaderReading | None,
        match: LimitMatch,
        view: LimitView | None,
        before: Mapping[str, OthersUse],
    ) -> OthersUse | None:
        """Charge a limit in force with the usage of others, and return it. None if there is none,
        if the bound was changed after the last answer, and while the pool and this process have
        different bounds."""
        limit = match.policy.limit(name)
        if limit is None or limit.shadow or view is None or view.bound != limit.bound:
            return None
        is_of_bound = reading is not None and reading.remaining is None
        if reading is not None and not is_of_bound and self._is_old(reading, name):
            return None
        if isinstance(limit, Quota):
            return None if reading is None else await self._of_day(limit, reading, view, before)
        now, use = self._clock(), self._uses.get(name)
        if not isinstance(limit, Rate) or use is None or view.sort != "r":
            return None
        bound = self._bound(name, limit, reading, match)
        if bound is None:
            return None
        by_day = use.by_day(limit.bound)
        bound = min(bound, by_day)
        ramp_ms = None
        if use.is_reported and limit.shape == "bucket" and use.since is None:
            amount = use.level_due(now, view.taken, view.used, limit.bound, bound)
        else:
            amount = use.due(now, view.taken, limit.bound, bound, recent=view.lately)
            ramp_ms = use.ramp_ms(now, view.used, limit.bound, view.waiting)
        await self._charge(name, amount, use, limit.bound)
        if ramp_ms is not None:  # renewed every second, so that unused capacity does not add up
            await self._limiter.penalise(name, for_ms=1, ramp_ms=ramp_ms, by=_SET_BY)
        charged = use.kept(now)
        others = use.taken_by_others(now, min(limit.bound, bound))
        tier = None if by_day == limit.bound else by_day
        return OthersUse(name, others, charged, tier) if others or charged or tier else None

    def _bound(
        self, name: str, limit: Rate, reading: HeaderReading | None, match: LimitMatch
    ) -> int | None:
        """Return the account's bound; None if the window of the reading is unknown. If the reading
        only states a bound, as a refusal does, and is old or of an unknown window, the bound in
        force is used, and later refusals correct it."""
        if reading is None:
            return limit.bound
        bound = match.bound_for(reading, name)
        if reading.remaining is not None:
            return bound
        is_over = self._is_late(reading) or self._is_old(reading, name)
        return limit.bound if is_over or bound is None else bound

    async def _of_day(
        self, limit: Quota, reading: HeaderReading, view: LimitView, before: Mapping[str, OthersUse]
    ) -> OthersUse | None:
        """Charge a day quota with the usage of others, and return it; None for none."""
        name, now = view.limit, self._clock()
        if view.sort != "q":
            return None
        if name not in self._days:
            self._days[name] = DayUse(before[name].kept if name in before else 0)
        use, left_ms = self._days[name], next_midnight_ms(limit.zone, now * 1000) - now * 1000
        amount = use.due(reading, view.used, limit.bound, left_ms, now)
        await self._charge(name, amount, use, limit.bound)
        return OthersUse(name, use.kept, use.kept) if use.kept else None

    async def _charge(
        self, name: str, amount: int, use: AccountUse | DayUse, in_force: int
    ) -> None:
        """Charge an amount; if that fails, the amount is due again a second later."""
        is_charged = not amount
        try:
            evenly = isinstance(use, AccountUse) and use.evenly
            charging = self._limiter.charge
            is_charged = is_charged or await charging(name, amount, evenly=evenly, bound=in_force)
        finally:
            if not is_charged:
                use.take_back(amount)
            elif amount and isinstance(use, AccountUse):
                use.note_charged(self._clock())

    async def _apply(self, found: list[LearnedLimit]) -> None:
        """Put limits in force that answers have confirmed for some seconds, and that no person has
        set or removed."""
        now = self._clock()
        sure = [one for one in found if self._confirmations.take(one, now)]
        new = [one.limit for one in sure if one.drift == "new"]
        names = [name for name in new if not await self._is_removed(name)]
        names += [
            one.limit
            for one in sure
            if one.drift not in ("new", "same") and one.model and one.source != "set"
        ]
        if names:
            change = acceptance(found, names, self._keeper.provider)
            await self._keeper.change(change, set_by=_SET_BY, reason=_REASON)

    async def _is_removed(self, name: str) -> bool:
        """Whether a person removed a limit that is not in force. Read once per revision."""
        revision = self._limiter.policy.revision
        if self._removed.get(name, (0, False))[0] != revision:
            removed = await self._keeper.removed_by_people([name])
            self._removed[name] = revision, name in removed
        return self._removed[name][1]
