"""Reads one clause: does it ask for a picture, for words, or neither?

The first verb that stands as a command governs (the last one in verb-final languages); what it
governs is judged by the head of its object. Nothing here depends on one language.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.classify.clause import (
    GENERATED_POINTS,
    HEADS,
    MADE_POINTS,
    NAMES_TEXT,
    NOTHING,
    PHRASE_END,
    PICTORIAL,
    VERBS,
    Clause,
    Lean,
    Reading,
    asks_ability,
    commands,
    ends_of,
    negated_verb,
    object_of,
    opens,
    scene_points,
    wished,
)
from tidegate.classify.text import Span
from tidegate.classify.vocabulary import Label, Mark, Marked


def read_clause(marked: Marked, span: Span, *, with_image: bool) -> Reading:
    marks = ends_of(tuple(m for m in marked.marks if span.start <= m.start < span.end))
    clause = Clause(marked, span, marks, with_image)
    if _wants_markup(clause):
        return Reading(Lean.TEXT, "asks for code, markup or characters", strong=True)
    verbs = [m for m in marks if m.has(*VERBS) and commands(clause, m)]
    opened = bool(marks) and marks[0].has(Label.OPENER) and opens(clause, marks[0])
    if opened and span.question and not any(v.has(Label.DRAW, Label.MAKE) for v in verbs):
        return Reading(Lean.TEXT, "is a question", strong=True)
    if not verbs:
        return _read_phrase(clause)
    if all(clause.syntax(v).verb_last for v in verbs):
        return _read_verb_last(clause, verbs)
    return _read_verb_first(clause, verbs)


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


def _read_verb_first(clause: Clause, verbs: Sequence[Mark]) -> Reading:
    reading = NOTHING
    for at, verb in enumerate(verbs):
        if verb.has(Label.ASK, Label.COVER) and not verb.has(*PICTORIAL):
            if negated_verb(clause, verb):
                continue
            later = _later_wish(clause, verb, verbs[at + 1 :])
            if later is not None:
                return later
            return Reading(Lean.TEXT, "asks for words", strong=True, covers=verb.has(Label.COVER))
        if negated_verb(clause, verb):
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
    if verb.has(Label.WANT) and len(verbs) > 1 and verbs[-2].has(*VERBS):
        gap = clause.between(verbs[-2].end, verb.start)
        verb = verbs[-2] if len(gap.strip()) <= 3 else verb
    if verb.has(Label.ASK, Label.COVER) and not verb.has(*PICTORIAL):
        return Reading(Lean.TEXT, "asks for words", strong=True, covers=verb.has(Label.COVER))
    asked = [m for m in clause.before(verb) if m.has(Label.ASK) and not m.has(*PICTORIAL)]
    if asked and clause.span.question:
        return Reading(Lean.TEXT, "is a question", strong=True)
    if negated_verb(clause, verb):
        return Reading(Lean.TEXT, "refuses a picture", negated=True)
    found = _read_command(clause, verb)
    return found if found.lean is not Lean.NEITHER else _read_phrase(clause)


def _read_command(clause: Clause, verb: Mark) -> Reading:
    head, marks = object_of(clause, verb)
    if verb.has(Label.WANT) and _wants_you_to(clause, verb):
        return NOTHING
    if verb.has(Label.IDIOM):
        return _read_idiom(marks)
    if verb.has(Label.DRAW):
        if asks_ability(clause, verb, head):
            return Reading(Lean.TEXT, "asks what can be drawn", strong=True)
        if head is not None and not head.has(Label.PICTURE, Label.LETTERING):
            kind = "figurative" if head.has(Label.FIGURATIVE) else "a text"
            return Reading(Lean.TEXT, f"what it draws is {kind}", strong=True)
        return Reading(Lean.IMAGE, "asks to draw something", strong=not wished(clause, verb))
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
        if asks_ability(clause, verb, head):
            return Reading(Lean.TEXT, "asks what can be made", strong=True)
        weak = verb.has(Label.WANT) or wished(clause, verb)
        return Reading(Lean.IMAGE, "asks for a picture", strong=not weak)
    if head is not None:
        return Reading(Lean.TEXT, "asks for a text", strong=verb.has(Label.MAKE))
    if scene_points(marks) >= (GENERATED_POINTS if verb.has(Label.GENERATE) else MADE_POINTS):
        return Reading(Lean.IMAGE, "asks to make what reads like a scene")
    return NOTHING


def _read_turn(clause: Clause, verb: Mark, marks: Sequence[Mark]) -> Reading:
    """No image is there: "turn this poem into a painting"."""
    into = next((m for m in marks if m.has(Label.PREP)), verb)
    head = next((m for m in marks if m.start >= into.end and m.has(*HEADS)), None)
    if head is not None and head.has(Label.PICTURE) and into is not verb:
        return Reading(Lean.IMAGE, "asks to turn something into a picture", strong=True)
    return NOTHING


def _wants_you_to(clause: Clause, verb: Mark) -> bool:
    """ "I want you to": what is wanted is the next verb."""
    following = next((m for m in clause.marks if m.start >= verb.end), None)
    if following is None or not following.has(Label.LEAD):
        return False
    return not clause.between(verb.end, following.start).strip()


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
            head = next((m for m in marks if m.start >= into.end and m.has(*HEADS)), head)
    if verb.has(Label.TURN, Label.WANT):
        text = next((m for m in marks if m.has(Label.TEXT)), None)
        picture = [m for m in marks if m.has(Label.PICTURE, Label.STYLE, Label.VISUAL)]
        if text is not None and not (head is not None and head.has(Label.PICTURE)):
            return Reading(Lean.TEXT, "asks for a text from the image")
        alone = not clause.between(verb.end, clause.span.end).strip(" .!")
        if verb.has(Label.WANT) and not verb.has(Label.TURN) and not (picture or alone):
            return NOTHING
        return Reading(Lean.IMAGE, "asks to change the image", strong=True)
    lettering = head is not None and verb.has(Label.EDIT) and head.has(Label.LETTERING)
    if head is not None and head.has(Label.TEXT, Label.FIGURATIVE) and not lettering:
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
        return NAMES_TEXT
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
    comma = PHRASE_END.search(clause.marked.text, said, clause.span.end)
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
    heads = [m for m in phrase if m.has(*HEADS)]
    if not heads:
        return None
    syntax = clause.syntax(heads[0])
    return heads[-1] if syntax.head_last or syntax.verb_last else heads[0]
