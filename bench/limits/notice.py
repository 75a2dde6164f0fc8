"""When a change of an account shows: in what an operator sees of its limits, and in refusals."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import aiohttp

from bench.limits.figures import Book
from bench.limits.stage import OPERATORS_KEY
from tidegate.policy.account import NOTICED


@dataclass(frozen=True, slots=True)
class SeenLimit:
    """A limit as `GET /admin/limits` reports it of the provider: its bound over the one in force,
    None where nothing is reported, and the share that others take."""

    bound_share: float | None = None
    others_share: float = 0.0

    def shows_less(self, before: SeenLimit) -> bool:
        """Whether it shows that others take more, or that the bound is lower, than `before`: by as
        much as the product acts on."""
        was = 1.0 if before.bound_share is None else before.bound_share
        has_fallen = self.bound_share is not None and was - self.bound_share >= NOTICED
        return has_fallen or self.others_share - before.others_share >= NOTICED


@dataclass(frozen=True, slots=True)
class Noticed:
    """Of a limit, seconds from the change until it showed, and until the provider's first refusal;
    None where that did not come. refused: when calls were refused, and how many."""

    after_s: float | None = None
    refused_after_s: float | None = None
    refused: tuple[tuple[float, int], ...] = ()


async def seen_limits(session: aiohttp.ClientSession, url: str) -> dict[str, SeenLimit]:
    """What the gateway shows of the limits of its only upstream."""
    headers = {"authorization": f"Bearer {OPERATORS_KEY}"}
    async with session.get(f"{url}/admin/limits", headers=headers) as answer:
        answer.raise_for_status()
        learned = (await answer.json())["learned"]
    return {
        one["limit"]: SeenLimit(
            one["bound"] / one["in_force"] if one["in_force"] else None, one["others_share"]
        )
        for one in learned
    }


@dataclass(slots=True)
class Watch:
    """Looks when a change of an account shows, from its beginning on.

    limits: the account's name of each, by that of our policy. before: what was seen until then.
    refused: by the account's book, as it began.
    """

    limits: Mapping[str, str]
    before: Mapping[str, SeenLimit]
    refused: Mapping[str, int]
    _began_s: float = field(default_factory=time.monotonic)
    _found: dict[str, Noticed] = field(default_factory=dict)

    def look(self, seen: Mapping[str, SeenLimit], book: Book) -> None:
        now_s, refused = time.monotonic() - self._began_s, refused_of(book)
        for ours, theirs in self.limits.items():
            found = self._found.get(ours, Noticed())
            before = self.before.get(ours, SeenLimit())
            if found.after_s is None and seen.get(ours, SeenLimit()).shows_less(before):
                found = replace(found, after_s=now_s)
            known = self.refused[theirs] + sum(count for _, count in found.refused)
            if more := refused[theirs] - known:
                first_s = now_s if found.refused_after_s is None else found.refused_after_s
                refusals = (*found.refused, (round(now_s, 1), more))
                found = replace(found, refused_after_s=first_s, refused=refusals)
            self._found[ours] = found

    def found(self) -> dict[str, dict[str, Any]]:
        return {limit: asdict(one) for limit, one in self._found.items()}


def refused_of(book: Book) -> dict[str, int]:
    return {limit["name"]: limit["refused"] for limit in book["limits"]}
