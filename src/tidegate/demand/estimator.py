"""Estimates the LLM tokens of a call before it is made, and learns from what it used. Pure.

Owns a bounded number of tracks: per tenant and model the input (apart where the provider runs
tools, keeps something, or is given files), and per tenant, model and kind the output. Invariants:
an estimate is a whole number of at least 1; an unknown actual figure changes nothing; what the
calls of one tenant teach changes no estimate of another tenant.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from tidegate.call import DEFAULT_TENANT, Media, Usage
from tidegate.demand.pieces import InputPieces, Learning, Pieces, answer_of, pieces_of
from tidegate.demand.track import Prediction, Track

MOST_TRACKS = 4_096
MOST_TRACKS_OF_A_TENANT = 64  # models are named by clients
_INPUT = "input"
_TOLD_LITTLE = frozenset(f"{_INPUT}:{learning}" for learning in Learning if learning)
_UNTAUGHT = Track()
_NO_TRACKS: Mapping[tuple[str, str], Track] = {}


@dataclass(frozen=True, slots=True)
class Estimate:
    """The tokens of one call: `input_tokens` and `output_tokens` are what to reserve, rarely too
    few; the `expected` ones are the middle. The `guessed` ones are by the request alone, with
    nothing learned: its first guess, and of the output no more than its own bound."""

    model: str
    kind: str
    tenant: str
    input_pieces: Pieces
    output_pieces: Pieces
    input_tokens: int
    output_tokens: int
    expected_input_tokens: int
    expected_output_tokens: int
    guessed_input_tokens: int
    guessed_output_tokens: int


@dataclass(frozen=True, slots=True)
class Learned:
    """How good the estimates of one track are.

    tenant: whose calls it has learned from, and whom it serves.
    part: `input`, `input:hosted`, `input:state`, `input:files`, or `output:<kind>`.
    calls: how many calls it has learned from.
    error: mean absolute error of the middle over the last calls, in parts of the actual tokens;
        None before it can be said.
    short: the share of the last calls that used more than was reserved for them.
    margin: what is reserved over the middle.
    ratios: modality -> actual tokens over first guess.
    """

    tenant: str
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
        self._tracks: OrderedDict[str, OrderedDict[tuple[str, str], Track]] = OrderedDict()
        self._count = 0

    def estimate(
        self,
        model: str,
        kind: str,
        prompt: str,
        media: Sequence[Media] = (),
        *,
        images: int = 0,
        max_output_tokens: int | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Estimate:
        """`images`: how many the answer will hold. `max_output_tokens`: the call's own bound."""
        pieces = pieces_of(prompt, media)
        return self.of_pieces(
            *(model, kind, pieces),
            images=images,
            max_output_tokens=max_output_tokens,
            tenant=tenant,
        )

    def of_pieces(
        self,
        model: str,
        kind: str,
        input_pieces: Pieces,
        *,
        images: int = 0,
        max_output_tokens: int | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Estimate:
        """The same for an input whose pieces are known."""
        output_pieces = answer_of(images)
        own = self._tracks.get(tenant) or _NO_TRACKS
        part, whole, tools = _input(input_pieces)
        taken = _predict(own, model, part, whole, tools)
        given = _predict(own, model, _output(kind), output_pieces)
        most = inf if max_output_tokens is None else max(1, max_output_tokens)
        return Estimate(
            model=model,
            kind=kind,
            tenant=tenant,
            input_pieces=input_pieces,
            output_pieces=output_pieces,
            input_tokens=_whole(taken.upper),
            output_tokens=_whole(min(given.upper, most)),
            expected_input_tokens=_whole(taken.expected),
            expected_output_tokens=_whole(min(given.expected, most)),
            guessed_input_tokens=_whole(sum(input_pieces.values())),
            guessed_output_tokens=_whole(min(sum(output_pieces.values()), most)),
        )

    def learn(self, estimate: Estimate, usage: Usage) -> None:
        """Take in what a finished call used. One that was cut teaches its input alone: leave its
        output figures out."""
        input_tokens, output_tokens = tokens_of(usage)
        if input_tokens is not None:
            part, whole, tools = _input(estimate.input_pieces)
            track = self._track(estimate.tenant, estimate.model, part)
            track.learn(whole, input_tokens, estimate.input_tokens, tools)
        if output_tokens is not None:
            track = self._track(estimate.tenant, estimate.model, _output(estimate.kind))
            track.learn(estimate.output_pieces, output_tokens, estimate.output_tokens)

    def error(self) -> tuple[Learned, ...]:
        """How good the estimates are, for each track, the last used one first."""
        return tuple(
            Learned(
                tenant=tenant,
                model=model,
                part=part,
                calls=track.calls,
                error=track.error,
                short=track.short,
                margin=track.margin,
                ratios=track.shown(),
            )
            for tenant, own in reversed(self._tracks.items())
            for (model, part), track in reversed(own.items())
        )

    def export(self) -> list[dict[str, Any]]:
        """All that was learned, as plain values for JSON."""
        return [
            {"tenant": tenant, "model": model, "part": part, **track.export()}
            for tenant, own in self._tracks.items()
            for (model, part), track in own.items()
        ]

    def restore(self, exported: Sequence[Mapping[str, Any]]) -> None:
        """Take over tracks that have learned from more calls than ours.

        Raises ValueError, TypeError or KeyError for what `export` has not made; nothing is changed
        then.
        """
        read = {
            (str(one["tenant"]), str(one["model"]), str(one["part"])): Track.restore(
                one, is_told_little=str(one["part"]) in _TOLD_LITTLE
            )
            for one in exported
        }
        for (tenant, model, part), track in read.items():
            known = (self._tracks.get(tenant) or _NO_TRACKS).get((model, part))
            if known is None or known.calls < track.calls:
                self._keep(tenant, model, part, track)

    def _track(self, tenant: str, model: str, part: str) -> Track:
        known = (self._tracks.get(tenant) or _NO_TRACKS).get((model, part))
        return self._keep(tenant, model, part, known or Track(is_told_little=part in _TOLD_LITTLE))

    def _keep(self, tenant: str, model: str, part: str, track: Track) -> Track:
        own = self._tracks.get(tenant)
        if own is None:
            own = self._tracks[tenant] = OrderedDict()
        self._tracks.move_to_end(tenant)
        self._count += (model, part) not in own
        own[model, part] = track
        own.move_to_end((model, part))
        if len(own) > MOST_TRACKS_OF_A_TENANT:
            own.popitem(last=False)
            self._count -= 1
        while self._count > MOST_TRACKS:
            self._count -= len(self._tracks.popitem(last=False)[1])
        return track


def _predict(
    own: Mapping[tuple[str, str], Track], model: str, part: str, pieces: Pieces, tools: int = 0
) -> Prediction:
    return (own.get((model, part)) or _UNTAUGHT).predict(pieces, tools)


def _input(pieces: Pieces) -> tuple[str, Pieces, int]:
    """The track of an input, its pieces with what the provider adds, and its tools."""
    if type(pieces) is not InputPieces:
        return _INPUT, pieces, 0
    learning = pieces.learning
    return f"{_INPUT}:{learning}" if learning else _INPUT, pieces.whole, pieces.tools


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
