"""Reads one clause: does it ask for a picture, for words, or neither?

The first verb that stands as a command governs (the last one in verb-final languages); what it
governs is judged by the head of its object. Nothing here depends on one language.
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


NOTHING = Reading(Lean.NEITHER, "no request was recognised")

_VERBS = (
    Label.ASK,
    Label.COVER,
    Label.DRAW,
    Label.MAKE,
    Label.WANT,
    Label.EDIT,
    Label.TURN,
    Label.IDIOM,
)
_PICTORIAL = (Label.DRAW, Label.MAKE, Label.WANT, Label.EDIT, Label.TURN, Label.IDIOM)
_HEADS = (Label.PICTURE, Label.TEXT, Label.FIGURATIVE)
_CLOSED = re.compile(r"[:(\[|]| - ")
_PHRASE_END = re.compile("[,:、，،：(|]")
_PRONOUNS = frozenset({"me", "us", "mir", "uns", "moi", "nous", "mi", "ons", "it"})
_PAUSE = re.compile(r"[,:;—–\-(\n\[*#>/]")
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


def read_clause(marked: Marked, span: Span, *, with_image: bool) -> Reading:
    marks = _ends_of(tuple(m for m in marked.marks if span.start <= m.start < span.end))
    clause = Clause(marked, span, marks, with_image)
    if _wants_markup(clause):
        return Reading(Lean.TEXT, "asks for code, markup or characters", strong=True)
    verbs = [m for m in marks if m.has(*_VERBS) and _commands(clause, m)]
    opened = bool(marks) and marks[0].has(Label.OPENER) and _opens(clause, marks[0])
    if opened and span.question and not any(v.has(Label.DRAW, Label.MAKE) for v in verbs):
        return Reading(Lean.TEXT, "is a question", strong=True)
    if not verbs:
        return _read_phrase(clause)
    if all(clause.syntax(v).verb_last for v in verbs):
        return _read_verb_last(clause, verbs)
    return _read_verb_first(clause, verbs)


def _ends_of(marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
    """A clause of hundreds of known words is no sentence; its ends say enough."""
    if len(marks) <= CLAUSE_MARKS:
        return marks
    half = CLAUSE_MARKS // 2
    return marks[:half] + marks[-half:]


def _wants_markup(clause: Clause) -> bool:
    for at, mark in enumerate(clause.marks):
        if mark.has(Label.FORMAT):
            return True
        if mark.has(Label.TOOL):
            before = clause.marks[at - 1] if at else None
            gap = clause.between(before.end, mark.start) if before else "x"
            if before and before.has(Label.PREP) and not gap.strip():
                return True
    return False


def _opens(clause: Clause, mark: Mark) -> bool:
    return not clause.between(clause.span.start, mark.start).strip(' "¿,-*#>')


def _commands(clause: Clause, mark: Mark) -> bool:
    """Whether a verb may be a command: in English, nouns and other people's verbs look alike."""
    asks = mark.has(Label.ASK, Label.COVER) and not mark.has(Label.TEXT)
    if asks or not clause.syntax(mark).strict:
        return True
    if _opens(clause, mark) or (mark.has(Label.WANT) and " " in clause.between(*_ends(mark))):
        return True
    at = bisect_left(clause.marked.tokens, mark.start, key=lambda token: token.start)
    word = clause.marked.tokens[at - 1] if at else None
    if word is None or word.start < clause.span.start:
        return True
    if _PAUSE.search(clause.between(word.end, mark.start)):
        return True
    last = next((m for m in clause.marks if m.end == word.end), None)
    return last is not None and last.has(*_BEFORE_COMMAND)


def _ends(mark: Mark) -> tuple[int, int]:
    return mark.start, mark.end


def _wished(clause: Clause, verb: Mark) -> bool:
    """ "I want to draw a cat": a wish for a picture, or for help with one."""
    return any(m.has(Label.WISH) and verb.start - m.end <= 1 for m in clause.before(verb))


def _negated(clause: Clause, mark: Mark) -> bool:
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


def _read_verb_first(clause: Clause, verbs: Sequence[Mark]) -> Reading:
    reading = NOTHING
    for at, verb in enumerate(verbs):
        if verb.has(Label.ASK, Label.COVER) and not verb.has(*_PICTORIAL):
            if _negated(clause, verb):
                continue
            later = _later_wish(clause, verb, verbs[at + 1 :])
            if later is not None:
                return later
            return Reading(Lean.TEXT, "asks for words", strong=True, covers=verb.has(Label.COVER))
        if _negated(clause, verb):
            if verb.has(Label.DRAW, Label.MAKE, Label.WANT):
                reading = Reading(Lean.TEXT, "refuses a picture", negated=True)
            continue
        found = _read_command(clause, verb)
        if found.lean is not Lean.NEITHER:
            return found
        if reading is NOTHING:
            reading = found
    return reading if reading.lean is not Lean.NEITHER else _read_phrase(clause)


def _later_wish(clause: Clause, ask: Mark, verbs: Sequence[Mark]) -> Reading | None:
    """ "Write a haiku, and then generate an image of it": a second command, with its picture."""
    if ask.has(Label.COVER) or any(m.has(Label.TEXT) for m in clause.before(ask)):
        return None
    for verb in verbs:
        if not verb.has(Label.MAKE, Label.DRAW) or verb.has(Label.ASK):
            continue
        before = clause.before(verb)
        joined = bool(before) and before[-1].has(Label.JOIN) and before[-1].start > ask.end
        gap = clause.between(before[-1].end, verb.start) if before else "x"
        if joined and not gap.strip(" ,"):
            found = _read_command(clause, verb)
            pictured = any(m.has(Label.PICTURE) for m in clause.after(verb))
            apart = not any(m.has(Label.DRAW) for m in before if m.start > ask.end)
            pictured = pictured or (verb.has(Label.DRAW) and apart and not clause.span.question)
            if found.lean is Lean.IMAGE and found.strong and pictured:
                return found
    return None


def _read_verb_last(clause: Clause, verbs: Sequence[Mark]) -> Reading:
    verb = verbs[-1]
    if verb.has(Label.WANT) and len(verbs) > 1 and verbs[-2].has(*_VERBS):
        gap = clause.between(verbs[-2].end, verb.start)
        verb = verbs[-2] if len(gap.strip()) <= 3 else verb
    if verb.has(Label.ASK, Label.COVER) and not verb.has(*_PICTORIAL):
        return Reading(Lean.TEXT, "asks for words", strong=True, covers=verb.has(Label.COVER))
    asked = [m for m in clause.before(verb) if m.has(Label.ASK) and not m.has(*_PICTORIAL)]
    if asked and clause.span.question:
        return Reading(Lean.TEXT, "is a question", strong=True)
    if _negated(clause, verb):
        return Reading(Lean.TEXT, "refuses a picture", negated=True)
    found = _read_command(clause, verb)
    return found if found.lean is not Lean.NEITHER else _read_phrase(clause)


def _object(clause: Clause, verb: Mark) -> tuple[Mark | None, list[Mark]]:
    """The head of what a verb governs, and all marks of its object."""
    syntax = clause.syntax(verb)
    if syntax.verb_last:
        marks = clause.before(verb)
        heads = [m for m in marks if m.has(*_HEADS)]
        return (heads[-1] if heads else None), marks
    marks = clause.after(verb)
    head = _head(clause, verb, marks)
    if head is None and syntax.object_first:
        before = clause.before(verb)
        head = next((m for m in before if m.has(*_HEADS)), None)
        marks = before + marks
    return head, marks


def _head(clause: Clause, verb: Mark, marks: Sequence[Mark]) -> Mark | None:
    """Of the noun phrase that ends at its first preposition: the last noun, or the first.

    "Draw for me a table": a preposition directly after the verb ends nothing.
    """
    syntax = clause.syntax(verb)
    heads: list[Mark] = []
    for mark in marks:
        words = clause.between(verb.end, mark.start).split()
        if heads and (
            mark.has(Label.JOIN) or _CLOSED.search(clause.between(heads[-1].end, mark.start))
        ):
            break
        if mark.has(*_HEADS):
            heads.append(mark)
        elif mark.has(Label.PREP) and (heads or _names_something(words)):
            break
        elif heads and mark.has(*_VERBS):
            break
    if not heads:
        return None
    return heads[-1] if syntax.head_last else heads[0]


def _names_something(words: Sequence[str]) -> bool:
    return len(words) > 1 or (len(words) == 1 and words[0] not in _PRONOUNS)


def _read_command(clause: Clause, verb: Mark) -> Reading:
    head, marks = _object(clause, verb)
    if verb.has(Label.IDIOM):
        return _read_idiom(marks)
    if verb.has(Label.DRAW):
        if _asks_ability(clause, verb, head):
            return Reading(Lean.TEXT, "asks what can be drawn", strong=True)
        if head is not None and not head.has(Label.PICTURE, Label.LETTERING):
            kind = "figurative" if head.has(Label.FIGURATIVE) else "a text"
            return Reading(Lean.TEXT, f"what it draws is {kind}", strong=True)
        return Reading(Lean.IMAGE, "asks to draw something", strong=not _wished(clause, verb))
    if clause.with_image:
        return _read_change(clause, verb, head, marks)
    if verb.has(Label.TURN):
        return _read_turn(clause, verb, marks)
    if verb.has(Label.EDIT) and not verb.has(Label.MAKE, Label.WANT):
        return NOTHING
    asked = next((m for m in marks if m.has(Label.ASK, Label.COVER)), None)
    if asked is not None and (head is None or verb.end <= asked.start < head.start):
        return Reading(Lean.TEXT, "asks for words", strong=True)
    if head is not None and head.has(Label.PICTURE):
        if _asks_ability(clause, verb, head):
            return Reading(Lean.TEXT, "asks what can be made", strong=True)
        weak = verb.has(Label.WANT) or _wished(clause, verb)
        return Reading(Lean.IMAGE, "asks for a picture", strong=not weak)
    if head is not None:
        return Reading(Lean.TEXT, "asks for a text", strong=verb.has(Label.MAKE))
    if scene_points(marks) >= (GENERATED_POINTS if verb.has(Label.GENERATE) else MADE_POINTS):
        return Reading(Lean.IMAGE, "asks to make what reads like a scene")
    return NOTHING


def _read_turn(clause: Clause, verb: Mark, marks: Sequence[Mark]) -> Reading:
    """No image is there: "turn this poem into a painting"."""
    into = next((m for m in marks if m.has(Label.PREP)), verb)
    head = next((m for m in marks if m.start >= into.end and m.has(*_HEADS)), None)
    if head is not None and head.has(Label.PICTURE) and into is not verb:
        return Reading(Lean.IMAGE, "asks to turn something into a picture", strong=True)
    return NOTHING


def _asks_ability(clause: Clause, verb: Mark, head: Mark | None) -> bool:
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


def _read_idiom(marks: Sequence[Mark]) -> Reading:
    """ "Paint a picture of" life in 1900 with words, of a fox with paint."""
    if any(m.has(Label.ABSTRACT, Label.ASK, Label.TEXT, Label.FIGURATIVE) for m in marks):
        return Reading(Lean.TEXT, "paints its picture in words")
    return Reading(Lean.IMAGE, "asks to paint a picture", strong=True)


def _read_change(clause: Clause, verb: Mark, head: Mark | None, marks: Sequence[Mark]) -> Reading:
    """A verb about an attached image: a change of it, or a text out of it."""
    if verb.has(Label.TURN) and not clause.syntax(verb).verb_last:
        into = next((m for m in marks if m.has(Label.PREP)), None)
        if into is not None:
            head = next((m for m in marks if m.start >= into.end and m.has(*_HEADS)), head)
    if verb.has(Label.TURN, Label.WANT):
        text = next((m for m in marks if m.has(Label.TEXT)), None)
        picture = [m for m in marks if m.has(Label.PICTURE, Label.STYLE, Label.VISUAL)]
        if text is not None and not (head is not None and head.has(Label.PICTURE)):
            return Reading(Lean.TEXT, "asks for a text from the image")
        alone = not clause.between(verb.end, clause.span.end).strip(" .!")
        if verb.has(Label.WANT) and not verb.has(Label.TURN) and not (picture or alone):
            return NOTHING
        return Reading(Lean.IMAGE, "asks to change the image", strong=True)
    if head is not None and head.has(Label.TEXT, Label.FIGURATIVE):
        if not (verb.has(Label.EDIT) and head.has(Label.LETTERING)):
            return Reading(Lean.TEXT, "asks for a text about the image")
    return Reading(Lean.IMAGE, "asks to make or change the image", strong=True)


def _read_phrase(clause: Clause) -> Reading:
    """No verb: "logo for a coffee shop" names a picture, "logo design tips" a text."""
    marks = clause.marks
    if any(m.has(Label.NEGATION) for m in marks[:1]):
        pictures = [m for m in marks[1:3] if m.has(Label.PICTURE)]
        return Reading(Lean.TEXT, "refuses a picture", negated=True) if pictures else NOTHING
    if clause.with_image:
        return NOTHING
    phrase, end = _leading_phrase(clause)
    head = _phrase_head(clause, phrase)
    if head is None or head.has(Label.FIGURATIVE):
        return NOTHING
    if head.has(Label.TEXT):
        return Reading(Lean.TEXT, "names a text")
    lead = clause.between(clause.span.start, head.start).split()
    if len(lead) > 8 or any(m.has(Label.PERSON, Label.OPENER) for m in marks):
        return NOTHING
    tail = clause.between(head.end, end).split()
    phrase_word = " " in clause.between(head.start, head.end)
    if len(tail) > 2 and clause.syntax(head).head_last and not phrase_word:
        return NOTHING
    return Reading(Lean.IMAGE, "names a picture")


def _leading_phrase(clause: Clause) -> tuple[list[Mark], int]:
    marks = clause.marks
    said = next((m.start for m in marks if not m.has(Label.LEAD, Label.COMMON)), clause.span.start)
    comma = _PHRASE_END.search(clause.marked.text, said, clause.span.end)
    end = comma.start() if comma else clause.span.end
    phrase: list[Mark] = []
    for mark in clause.marks:
        if mark.start >= end:
            break
        if mark.has(Label.PREP) and phrase:
            return phrase, mark.start
        phrase.append(mark)
    return phrase, end


def _phrase_head(clause: Clause, phrase: Sequence[Mark]) -> Mark | None:
    heads = [m for m in phrase if m.has(*_HEADS)]
    if not heads:
        return None
    syntax = clause.syntax(heads[0])
    return heads[-1] if syntax.head_last or syntax.verb_last else heads[0]


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
