"""Faults in a row of one upstream, who may have provoked them, what may be tried again. Pure.

Invariant: one request, however often it is made, and one tenant's requests, until very many have
failed, are never enough to put an upstream out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tidegate.errors import UpstreamError

FAULTS = 5
MOST_OF_ONE = FAULTS - 1
FAULTS_OF_ONE = 20
# Of the traffic may be tried again, and so many at once after a quiet time.
RETRY_SHARE = 0.2
RETRIES_AT_ONCE = 10.0


@dataclass(frozen=True, slots=True)
class Suspect:
    """A request that may have brought its fault upon itself. tenant: None where clients show no
    keys, and cannot be told apart. request: the same for the same request."""

    tenant: str | None
    request: int


def can_be_provoked(error: UpstreamError) -> bool:
    """Whether a request could be the cause of this fault."""
    return not error.of_upstream


@dataclass(slots=True)
class Faults:
    """The faults in a row that this process has seen of one upstream."""

    count: int = 0
    _plain: int = field(default=0)  # faults that no request can have provoked
    _suspects: set[Suspect] = field(default_factory=set)

    def clear(self) -> None:
        """It answered as it should."""
        self.count = self._plain = 0
        self._suspects.clear()

    def add(self, suspect: Suspect | None) -> bool:
        """Note a real fault, or one that may be the doing of `suspect`; True if it is another one
        than those before in this row."""
        self.count += 1
        if suspect is None:
            self._plain += 1
            return True
        if suspect in self._suspects:
            return False
        if len(self._suspects) >= FAULTS_OF_ONE:
            self._suspects.clear()
        self._suspects.add(suspect)
        return True

    @property
    def are_enough(self) -> bool:
        """Whether the upstream is to be out."""
        if len(self._suspects) >= FAULTS_OF_ONE:
            return True
        of_each = Counter(one.tenant for one in self._suspects)
        counted = sum(
            count if tenant is None else min(count, MOST_OF_ONE)
            for tenant, count in of_each.items()
        )
        return self._plain + counted >= FAULTS


@dataclass(slots=True)
class RetryBudget:
    """A bucket that each request fills by a share of a retry."""

    saved: float = RETRIES_AT_ONCE

    def earn(self) -> None:
        self.saved = min(RETRIES_AT_ONCE, self.saved + RETRY_SHARE)

    def spend(self) -> bool:
        """Whether one more may be tried again."""
        if self.saved < 1:
            return False
        self.saved -= 1
        return True
