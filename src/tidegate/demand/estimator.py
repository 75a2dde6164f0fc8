"""Estimates the LLM tokens of a call before it is made, and learns from what it used. Pure.

Owns a bounded number of tracks: per model the input, and per model and kind the output. Invariant:
an estimate is a whole number of at least 1; an unknown actual figure changes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from tidegate.call import Media, Usage
from tidegate.demand.pieces import Pieces, answer_of, pieces_of
from tidegate.demand.track import Prediction, Track

MOST_TRACKS = 256
_INPUT = "input"


@dataclass(frozen=True, slots=True)
class Estimate:
    """The tokens of one call: `input_tokens` and `output_tokens` are what to reserve, rarely too
    few; the `expected` ones are the middle."""

    model: str
    kind: str
    input_pieces: Pieces
    output_pieces: Pieces
    input_tokens: int
    output_tokens: int
    expected_input_tokens: int
    expected_output_tokens: int


@dataclass(frozen=True, slots=True)
class Learned:
    """How good the estimates of one track are.

    part: `input`, or `output:<kind>`.
    calls: how many calls it has learned from.
    error: mean absolute error of the middle over the last calls, in parts of the actual tokens;
        None before it can be said.
    short: the share of the last calls that used more than was reserved for them.
    margin: what is reserved over the middle.
    ratios: modality -> actual tokens over first guess.
    """

    model: str
    part: str
    calls: int
    error: float | None
    short: float | None
    margin: float
    ratios: Mapping[str, float]


class Estimator:
    """One per process. No I/O; `export` and `restore` are for sharing what was learned."""

    def __init__(self) -> None:
        self._tracks: OrderedDict[tuple[str, str], Track] = OrderedDict()

    def estimate(
        self,
        model: str,
        kind: str,
        prompt: str,
        media: Sequence[Media] = (),
        *,
        images: int = 0,
        max_output_tokens: int | None = None,
    ) -> Estimate:
        """`images`: how many the answer will hold. `max_output_tokens`: the call's own bound."""
        pieces = pieces_of(prompt, media)
        return self.of_pieces(
            model, kind, pieces, images=images, max_output_tokens=max_output_tokens
        )

    def of_pieces(
        self,
        model: str,
        kind: str,
        input_pieces: Pieces,
        *,
        images: int = 0,
        max_output_tokens: int | None = None,
    ) -> Estimate:
        """The same for an input whose pieces are known."""
        output_pieces = answer_of(images)
        taken = self._predict(model, _INPUT, input_pieces)
        given = self._predict(model, _output(kind), output_pieces)
        most = given.upper if max_output_tokens is None else max(1, max_output_tokens)
        return Estimate(
            model=model,
            kind=kind,
            input_pieces=input_pieces,
            output_pieces=output_pieces,
            input_tokens=_whole(taken.upper),
            output_tokens=_whole(min(given.upper, most)),
            expected_input_tokens=_whole(taken.expected),
            expected_output_tokens=_whole(min(given.expected, most)),
        )

    def learn(self, estimate: Estimate, usage: Usage) -> None:
        """Take in what a finished call used. One that was cut teaches its input alone: leave its
        output figures out."""
        input_tokens, output_tokens = tokens_of(usage)
        if input_tokens is not None:
            track = self._track(estimate.model, _INPUT)
            track.learn(estimate.input_pieces, input_tokens, estimate.input_tokens)
        if output_tokens is not None:
            track = self._track(estimate.model, _output(estimate.kind))
            track.learn(estimate.output_pieces, output_tokens, estimate.output_tokens)

    def error(self) -> tuple[Learned, ...]:
        """How good the estimates are, for each track, the last used one first."""
        return tuple(
            Learned(
                model=model,
                part=part,
                calls=track.calls,
                error=track.error,
                short=track.short,
                margin=track.margin,
                ratios=track.shown(),
            )
            for (model, part), track in reversed(self._tracks.items())
        )

    def export(self) -> list[dict[str, Any]]:
        """All that was learned, as plain values for JSON."""
        return [
            {"model": model, "part": part, **track.export()}
            for (model, part), track in self._tracks.items()
        ]

    def restore(self, exported: Sequence[Mapping[str, Any]]) -> None:
        """Take over tracks that have learned from more calls than ours.

        Raises ValueError, TypeError or KeyError for what `export` has not made; nothing is changed
        then.
        """
        read = {(str(one["model"]), str(one["part"])): Track.restore(one) for one in exported}
        for (model, part), track in read.items():
            known = self._tracks.get((model, part))
            if known is None or known.calls < track.calls:
                self._keep(model, part, track)

    def _predict(self, model: str, part: str, pieces: Pieces) -> Prediction:
        return (self._tracks.get((model, part)) or Track()).predict(pieces)

    def _track(self, model: str, part: str) -> Track:
        return self._keep(model, part, self._tracks.get((model, part)) or Track())

    def _keep(self, model: str, part: str, track: Track) -> Track:
        self._tracks[model, part] = track
        self._tracks.move_to_end((model, part))
        if len(self._tracks) > MOST_TRACKS:
            self._tracks.popitem(last=False)
        return track


def tokens_of(usage: Usage) -> tuple[int | None, int | None]:
    """The input and output tokens of a call, thinking counted as output; None where unknown."""
    output_tokens = usage.output_tokens
    if output_tokens is not None:
        output_tokens += usage.thoughts_tokens or 0
    elif usage.total_tokens is not None and usage.input_tokens is not None:
        output_tokens = max(0, usage.total_tokens - usage.input_tokens)
    return usage.input_tokens, output_tokens


def _whole(tokens: float) -> int:
    # What only rounding has put above a whole number is not one token more.
    return ceil(tokens * (1 - 1e-9))


def _output(kind: str) -> str:
    return f"output:{kind}"
