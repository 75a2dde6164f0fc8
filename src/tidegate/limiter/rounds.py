"""What a process has its pool look at, some in one call: all flows that wait have their turn.

Pure. Invariant: a round that began has every flow that waited then in one of its calls; one that
begins before the last has ended has first what that one left.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from tidegate.limiter.flow import Flow

Lanes = Mapping[tuple[int, tuple[str, ...]], Mapping[str, Flow]]


def _take(left: dict[str, Flow], most: int) -> list[Flow]:
    """The next ones, of those that still wait."""
    if not left:
        return []
    taken = [left.pop(key) for key in list(islice(left, most))]
    return [flow for flow in taken if flow.waiting]


class Rounds:
    """See the module. In one round the server looks whether anybody could be admitted under the
    limits of a flow; in the other it says which of the first tickets of a flow it has admitted
    already: the news of that may have been lost. It admits each flow's in their order. `looks` and
    `asks` are the flows that are still to come, by their key."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.looks: dict[str, Flow] = {}
        self.asks: dict[str, Flow] = {}

    def begin(self) -> None:
        """Another round of both."""
        for lane in self._lanes.values():
            self.looks |= lane
            self.asks |= lane

    def flows_to_look_at(self, most: int) -> list[Flow]:
        return _take(self.looks, most)

    def tickets_to_ask_after(self, most: int) -> list[int]:
        """The first tickets of the next flows: the fewer flows there are, the more of each."""
        each = max(1, most // max(1, len(self.asks)))
        return [
            waiter.ticket
            for flow in _take(self.asks, most)
            for waiter in islice(flow.waiting.values(), each)
            if waiter.sent
        ]

    def ask_again(self, flow: Flow) -> None:
        """One of its tickets was admitted: perhaps the next one too."""
        self.asks[flow.key] = flow
