"""Functions on offer, in any dialect, and which of them an answer calls.

Invariant: the same conversation gets the same calls. A function is called when its name stands in
the question or when one must be called, and never twice for one question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tidegate.providers.emulator.dialect import Json

Choice = Literal["auto", "required", "none"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function on offer; `schema` is that of its parameters."""

    name: str
    schema: Json


@dataclass(slots=True)
class Turn:
    """What a reader finds behind the last question: the calls, and whether results came."""

    called: list[str] = field(default_factory=list)
    answered: bool = False

    def question(self) -> None:
        self.called.clear()
        self.answered = False

    def result(self) -> None:
        self.answered = True

    def calls(
        self, tools: Sequence[Tool], choice: Choice | Tool, question: str, *, several: bool
    ) -> tuple[Tool, ...]:
        """The functions that the answer calls: those the question names, else one that it must."""
        if choice == "none" or (self.answered and (choice == "auto" or not self.called)):
            return ()
        left = [tool for tool in tools if not self.answered or tool.name not in self.called]
        if isinstance(choice, Tool):
            return (choice,) if choice in left else ()
        named = [] if self.answered else _named(left, question)
        if not named and choice == "required":
            named = left[:1]
        return tuple(named if several else named[:1])


def _named(tools: Sequence[Tool], question: str) -> list[Tool]:
    words = f" {_spoken(question)} "
    return [tool for tool in tools if f" {_spoken(tool.name)} " in words]


def _spoken(text: str) -> str:
    return " ".join(re.split(r"\W+|_", text.lower())).strip()
