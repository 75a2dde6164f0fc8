"""One clause of a marked text: its verbs, what each governs, and how much it describes.

The words of the grammar, without any judgement of what they ask for (`grammar.py`).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tidegate.classify.text import Span
from tidegate.classify.vocabulary import Label, Mark, Marked, Syntax

OBJECT_CHARS = 160
CLAUSE_MARKS = 60
SCENE_POINTS = 1.6  # for a prompt that only describes
MADE_POINTS = 1.2
GENERATED_POINTS = 0.6


class Lean(StrEnum):
    IMAGE = "image"
    TEXT = "text"
    NEITHER = "neither"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one clause asks for; `strong` when it says so in as many words."""

    lean: Lean
    reason: str
    strong: bool = False
    covers: bool = False  # what follows is material, not a further wish
    negated: bool = False


NAMES_TEXT = Reading(Lean.TEXT, "names a text")
NOTHING = Reading(Lean.NEITHER, "no request was recognised")

VERBS = (
    Label.ASK,
    Label.COVER,
    Label.DRAW,
    Label.MAKE,
    Label.WANT,
    Label.EDIT,
    Label.TURN,
    Label.IDIOM,
)
PICTORIAL = (Label.DRAW, Label.MAKE, Label.WANT, Label.EDIT, Label.TURN, Label.IDIOM)
HEADS = (Label.PICTURE, Label.TEXT, Label.FIGURATIVE)
CLOSED = re.compile(r"[:(\[|]| - ")
PHRASE_END = re.compile("[,:\u3001\uff0c،\uff1a(|]")
_PRONOUNS = frozenset({"me", "us", "mir", "uns", "moi", "nous", "mi", "ons", "it"})
_PAUSE = re.compile(r"[,:;\u2013\u2014\-(\n\[*#>/]")
_BEFORE_COMMAND = (Label.LEAD, Label.JOIN, Label.WISH, Label.WANT, Label.NEGATION)


@dataclass(frozen=True, slots=True)
class Clause:
    marked: Marked
    span: Span
    marks: tuple[Mark, ...]
    with_image: bool

    @property
    def text(self) -> str:
        return self.marked.text[self.span.start : self.span.end]

    def syntax(self, mark: Mark) -> Syntax:
        return self.marked.syntax(mark.language)

    def after(self, mark: Mark) -> list[Mark]:
        return [m for m in self.marks if mark.end <= m.start < mark.end + OBJECT_CHARS]

    def before(self, mark: Mark) -> list[Mark]:
        return [m for m in self.marks if m.end <= mark.start and mark.start - m.end < OBJECT_CHARS]

    def between(self, left: int, right: int) -> str:
        return self.marked.text[left:right]


def ends_of(marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
    """A clause of hundreds of known words is no sentence; its ends say enough."""
    if len(marks) <= CLAUSE_MARKS:
        return marks
    half = CLAUSE_MARKS // 2
    return marks[:half] + marks[-half:]


def opens(clause: Clause, mark: Mark) -> bool:
    return not clause.between(clause.span.start, mark.start).strip(' "¿,-*#>')


def commands(clause: Clause, mark: Mark) -> bool:
    """Whether a verb may be a command: in English, nouns and other people's verbs look alike."""
    asks = mark.has(Label.ASK, Label.COVER) and not mark.has(Label.TEXT)
    if asks or not clause.syntax(mark).strict:
        return True
    if opens(clause, mark) or (mark.has(Label.WANT) and " " in clause.between(*_ends(mark))):
        return True
    at = bisect_left(clause.marked.tokens, mark.start, key=lambda token: token.start)
    word = clause.marked.tokens[at - 1] if at else None
    if word is None or word.start < clause.span.start:
        return True
    if _PAUSE.search(clause.between(word.end, mark.start)):
        return True
    if word.plain.endswith("ly"):
        return True
    last = next((m for m in clause.marks if m.end == word.end), None)
    return last is not None and last.has(*_BEFORE_COMMAND)


def _ends(mark: Mark) -> tuple[int, int]:
    return mark.start, mark.end


def wished(clause: Clause, verb: Mark) -> bool:
    """ "I want to draw a cat": a wish for a picture, or for help with one."""
    return any(m.has(Label.WISH) and verb.start - m.end <= 1 for m in clause.before(verb))


def negated_verb(clause: Clause, mark: Mark) -> bool:
    """A negation up to two words before the verb, or after it where verbs come last."""
    syntax = clause.syntax(mark)
    for other in clause.marks:
        if not other.has(Label.NEGATION):
            continue
        if syntax.verb_last and mark.end <= other.start <= mark.end + 6:
            return True
        if other.end <= mark.start:
            gap = clause.between(other.end, mark.start)
            if len(gap.split()) <= 2 and not _PAUSE.search(gap):
                return True
        elif other.start >= mark.end and mark.has(Label.MAKE, Label.DRAW, Label.WANT):
            gap = clause.between(mark.end, other.start)
            if len(gap.split()) <= 1 and not gap.strip(" ,").endswith(","):
                return not _PAUSE.search(gap)
    return False


def object_of(clause: Clause, verb: Mark) -> tuple[Mark | None, list[Mark]]:
    """The head of what a verb governs, and all marks of its object."""
    syntax = clause.syntax(verb)
    if syntax.verb_last:
        marks = clause.before(verb)
        heads = [m for m in marks if m.has(*HEADS)]
        return (heads[-1] if heads else None), marks
    marks = clause.after(verb)
    head = _head(clause, verb, marks)
    if head is None and syntax.object_first:
        before = clause.before(verb)
        head = next((m for m in before if m.has(*HEADS)), None)
        marks = before + marks
    return head, marks


def _head(clause: Clause, verb: Mark, marks: Sequence[Mark]) -> Mark | None:
    """Of the noun phrase that ends at its first preposition: the last noun, or the first.

    "Draw for me a table": a preposition directly after the verb ends nothing.
    """
    syntax = clause.syntax(verb)
    heads: list[Mark] = []
    for mark in marks:
        if heads and _phrase_ended(clause, heads[-1], mark):
            break
        if mark.has(*HEADS):
            heads.append(mark)
        elif mark.has(Label.PREP):
            words = clause.between(verb.end, mark.start).split()
            if heads or _names_something(words):
                break
    if not heads:
        return None
    return heads[-1] if syntax.head_last else heads[0]


def _phrase_ended(clause: Clause, head: Mark, mark: Mark) -> bool:
    """Whether a noun phrase with a head is over before the mark: "and", a colon, a next verb."""
    if mark.has(Label.JOIN) or CLOSED.search(clause.between(head.end, mark.start)):
        return True
    return mark.has(*VERBS) and not mark.has(*HEADS) and commands(clause, mark)


def _names_something(words: Sequence[str]) -> bool:
    return len(words) > 1 or (len(words) == 1 and words[0] not in _PRONOUNS)


def asks_ability(clause: Clause, verb: Mark, head: Mark | None) -> bool:
    """ "Can you generate images?" asks what is possible; an article would make it a wish."""
    if not clause.span.question or clause.syntax(verb).verb_last:
        return False
    last = head or verb
    between = clause.between(verb.end, last.start) if head else ""
    rest = clause.between(last.end, clause.span.end)
    opened = clause.between(clause.span.start, verb.start).strip(' "¿')
    if head is None and len(opened.split()) > 2:
        return False
    return bool(opened) and not between.strip() and not rest.strip(' ?!"')


def participles(marked: Marked) -> int:
    """English words in -ing that are in no list: "an elephant balancing on a ball"."""
    if marked.language != "en" or any(m.has(Label.PERSON) for m in marked.marks):
        return 0
    known = {mark.start for mark in marked.marks}
    found = [t for t in marked.tokens if t.plain.endswith("ing") and len(t.plain) > 5]
    return min(2, sum(token.start not in known for token in found))


def scene_points(marks: Sequence[Mark]) -> float:
    """How much the words describe a picture: its style, its things, and nobody's story."""
    seen: set[tuple[int, int]] = set()
    points = 0.0
    for mark in marks:
        if (mark.start, mark.end) in seen:
            continue
        seen.add((mark.start, mark.end))
        if mark.has(Label.STYLE):
            points += 1.0
        elif mark.has(Label.VISUAL):
            points += 0.6
        elif mark.has(Label.PICTURE):
            points += 0.5
        elif mark.has(Label.PERSON):
            points -= 1.0
        elif mark.has(Label.TEXT) and not mark.has(Label.LETTERING):
            points -= 0.5
    return points
