"""What a process has its pool look at, some in one call: all flows that wait have their turn.

Pure. Invariant: a round that began has every flow that waited then in one of its calls; one that
begins before the last has ended has first what that one left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from tidegate.limiter.flow import Flow

Lanes = Mapping[tuple[int, tuple[str, ...]], Mapping[str, Flow]]


class _Round:
    """Flows that are still to come, by their key."""

    def __init__(self) -> None:
        self._left: dict[str, Flow] = {}

    def __len__(self) -> int:
        return len(self._left)

    def add(self, flows: Iterable[Flow]) -> None:
        for flow in flows:
            self._left[flow.key] = flow

    def take(self, most: int) -> list[Flow]:
        """The next ones, of those that still wait."""
        taken = [self._left.pop(key) for key in list(islice(self._left, most))]
        return [flow for flow in taken if flow.waiting]


class Rounds:
    """See the module. In one round the server looks whether anybody could be admitted under the
    limits of a flow; in the other it says which of the first tickets of a flow it has admitted
    already: the news of that may have been lost. It admits each flow's in their order."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._looks, self._asks = _Round(), _Round()

    def begin(self) -> None:
        """Another round of both."""
        waiting = [flow for lane in self._lanes.values() for flow in lane.values()]
        self._looks.add(waiting)
        self._asks.add(waiting)

    @property
    def has_to_look(self) -> bool:
        return len(self._looks) > 0

    @property
    def has_to_ask(self) -> bool:
        return len(self._asks) > 0

    def flows_to_look_at(self, most: int) -> list[Flow]:
        return self._looks.take(most)

    def tickets_to_ask_after(self, most: int) -> list[int]:
        """The first tickets of the next flows: the fewer flows there are, the more of each."""
        each = max(1, most // max(1, len(self._asks)))
        return [
            waiter.ticket
            for flow in self._asks.take(most)
            for waiter in islice(flow.waiting.values(), each)
            if waiter.sent
        ]

    def ask_again(self, flow: Flow) -> None:
        """One of its tickets was admitted: perhaps the next one too."""
        self._asks.add([flow])
