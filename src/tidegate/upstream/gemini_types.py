"""Light types for requests to Gemini by the SDK.

The SDK's converters look every field of a model up by `name in model`. A pydantic model has no such
test, so that Python walks through all fields, finds nothing, and the SDK goes on to `getattr`: a
third of what a call cost. Invariant: these hold exactly what the dictionaries of `request` say, and
nobody changes them. Importing this file imports the SDK: only `GeminiProcessor.start` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from google.genai import types

from tidegate.upstream.gemini_transport import is_plain


class Settings(types.GenerateContentConfig):
    """Made once and used for any number of calls."""

    def __contains__(self, name: object) -> bool:
        return False

    @property
    def include_all_fields(self) -> bool:
        """Asked by the SDK for each chunk, which it else prunes of fields that it does not know:
        half of what reading one costs, and to no end where there can be none."""
        return is_plain()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Always a shallow one: the SDK asks for a deep one with every call, to be safe."""
        return super().model_copy(update=update)


class Turn(types.Content):
    def __contains__(self, name: object) -> bool:
        return False


class Piece(types.Part):
    def __contains__(self, name: object) -> bool:
        return False


# Copied: making one by its constructor checks every field that there is, absent ones too.
_TURN = Turn(role="user", parts=[])
_PIECE = Piece(text="")


def turn_of(content: Mapping[str, Any]) -> Turn:
    """One turn of `request`. Raises ValueError where the SDK's types do not allow it."""
    parts: Sequence[Mapping[str, Any]] = content["parts"]
    return _TURN.model_copy(update={"parts": [_piece_of(part) for part in parts]})


def _piece_of(part: Mapping[str, Any]) -> Piece:
    if part.keys() != {"text"}:
        return Piece(**part)
    part["text"].encode()  # raises for what is no Unicode, as the constructor does
    return _PIECE.model_copy(update=part)
