"""How far back a search for what is due has to look.

Entries of what was dealt with stay in an index for as long as any transaction may see them, and all
of them are due: a search from the beginning walks past them. So it begins shortly before the last
one that found all there was, and from the very beginning now and then.

Invariant: searches from the beginning take at most a fiftieth of the time, and each goes back over
all that came since the last one and `MARGIN_S` more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

MARGIN_S = 15.0  # longer than any transaction of ours, and than clocks differ
ALL_S = 1e9
AT_ONCE = 500  # what one search finds at most
_WHOLE_EVERY_S = 1.0
_SHARE = 50
_HURRIED_S = 0.005
_UNKNOWN_S = 5.0


@dataclass(frozen=True, slots=True)
class Look:
    """One search, which goes back `back_s` seconds."""

    back_s: float
    began: float
    is_whole: bool


class Lookback:
    """One for each kind of search in a process; several may be under way."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._done: float | None = None
        self._whole_at = 0.0  # when the last one from the beginning was begun
        self._whole_took_s = 0.0

    def begin(self, *, hurried: bool = False) -> Look:
        """A `hurried` search begins at the very beginning only where that was quick last time."""
        now = self._clock()
        due = now - self._whole_at >= max(_WHOLE_EVERY_S, _SHARE * self._whole_took_s)
        if self._done is None or (due and not (hurried and self._whole_took_s > _HURRIED_S)):
            # Until it has ended well it counts as long: one that fails is not begun again at once.
            self._whole_at, self._whole_took_s = now, _UNKNOWN_S
            return Look(ALL_S, now, True)
        return Look(now - self._done + MARGIN_S, now, False)

    def end(self, look: Look, *, complete: bool) -> None:
        """It ended well; `complete` if there was no more to find than it took."""
        if look.is_whole:
            self._whole_took_s = self._clock() - look.began
        if complete and (self._done is None or look.began > self._done):
            self._done = look.began
