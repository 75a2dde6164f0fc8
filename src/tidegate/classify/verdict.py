"""Weighs the clauses of a prompt into one verdict: is a picture wanted, and how sure is that?"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tidegate.classify.clause import (
    NAMES_TEXT,
    SCENE_POINTS,
    Lean,
    Reading,
    participles,
    scene_points,
)
from tidegate.classify.grammar import read_clause
from tidegate.classify.text import clauses, normalise, without_quotations
from tidegate.classify.vocabulary import Label, Marked, mark

FIRST_CLAUSES = 5
LAST_CLAUSES = 4
SURE_IMAGE_CHARS = 500
SURE_TEXT_CHARS = 2500
DESCRIBED_POINTS = 1.2
SURE_POINTS = 3.0

# Parameters that only image generators have: "--ar 16:9", "/imagine", "<lora:x:0.8>".
_PARAMETER = re.compile(
    r"(?:^|\s)--(?:ar|aspect|v|niji|stylize|s|q|chaos|seed|no|style|tile|iw|sref|cref)\s+[\w:.]+"
    r"|(?:^|\s)/imagine\b|<lora:|\(\w[\w ]{0,40}:1\.\d\)"
)
_OPTICS = re.compile(
    r"\b\d{2,3} ?mm\b|\bf ?/ ?\d|\b(?:4|8|16) ?k\b|\b(?:16:9|9:16|4:3|3:2|2:3|21:9|1:1)\b"
    r"|\b\d{3,4} ?[x\u00d7] ?\d{3,4}\b|\biso ?\d{2,4}\b"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`sure` is set only where the rules may decide without asking a model."""

    wants_image: bool
    sure: bool
    reason: str


def judge(prompt: str, *, with_image: bool) -> Verdict:
    """Whether the prompt asks for a picture to be made (or, `with_image`, to be changed)."""
    text = normalise(prompt)
    if not text:
        return Verdict(False, True, "there is no prompt")
    outside, quoted = without_quotations(text)
    marked = mark(outside)
    readings = _readings(marked, with_image)
    verdict = _weigh(marked, readings, with_image)
    if quoted and all(r.lean is Lean.NEITHER for r in readings) and not verdict.wants_image:
        whole = mark(text.replace('"', " "))
        again = _weigh(whole, _readings(whole, with_image), with_image)
        return Verdict(again.wants_image, False, again.reason)
    return verdict


def _readings(marked: Marked, with_image: bool) -> list[Reading]:
    spans = clauses(marked.text)
    if len(spans) > FIRST_CLAUSES + LAST_CLAUSES:
        spans = spans[:FIRST_CLAUSES] + spans[-LAST_CLAUSES:]
    found: list[Reading] = []
    for span in spans:
        reading = read_clause(marked, span, with_image=with_image)
        found.append(reading)
        if reading.covers:
            break
    return found


def _weigh(marked: Marked, readings: list[Reading], with_image: bool) -> Verdict:
    wishes = [r for r in readings if r.lean is Lean.IMAGE]
    texts = [r for r in readings if r.lean is Lean.TEXT]
    strong = next((r for r in wishes if r.strong), None)
    if readings and readings[0].covers:
        return _text(marked, readings, readings[0].reason, with_image)
    if strong is not None:
        later = readings[readings.index(strong) + 1 :]
        refused = next((r for r in later if r.negated), None)
        if refused is not None:
            return Verdict(False, False, refused.reason)
        markup = next((r for r in texts if "markup" in r.reason), None)
        if markup is not None:
            return Verdict(False, False, markup.reason)
        return Verdict(True, _sure_image(marked, readings), strong.reason)
    asked = any(r.strong for r in texts) and not marked.text.startswith("/")
    if _PARAMETER.search(marked.text) and not asked:
        return Verdict(True, not texts, "has an image generator's parameters")
    only_named = all(r is NAMES_TEXT for r in texts) and "?" not in marked.text
    if texts and not only_named:
        return _text(marked, readings, texts[0].reason, with_image)
    points = _points(marked)
    if texts and points < SURE_POINTS:
        return _text(marked, readings, texts[0].reason, with_image)
    if wishes:
        return Verdict(True, _sure_image(marked, readings), wishes[0].reason)
    if points >= _points_needed(marked, with_image):
        sure = points >= SURE_POINTS and _sure_image(marked, readings)
        return Verdict(True, sure, "reads like the description of a picture")
    return _text(marked, readings, "nothing asks for a picture", with_image)


def _points(marked: Marked) -> float:
    points = scene_points(marked.marks) + len(_OPTICS.findall(marked.text))
    return points + 0.6 * participles(marked) if points > 0 else points


def _points_needed(marked: Marked, with_image: bool) -> float:
    if with_image:
        return 1.0
    first = marked.marks[0] if marked.marks else None
    described = first is not None and first.has(Label.ARTICLE) and first.start == 0
    return DESCRIBED_POINTS if described and "?" not in marked.text else SCENE_POINTS


def _sure_image(marked: Marked, readings: list[Reading]) -> bool:
    doubts = (
        Label.ASK,
        Label.COVER,
        Label.TEXT,
        Label.FIGURATIVE,
        Label.ABSTRACT,
        Label.FORMAT,
        Label.TOOL,
        Label.NEGATION,
        Label.IDIOM,
    )
    plain = not any(m.has(*doubts) and not m.has(Label.PICTURE) for m in marked.marks)
    agreed = all(r.lean is not Lean.TEXT for r in readings)
    return plain and agreed and len(marked.text) <= SURE_IMAGE_CHARS


def _text(marked: Marked, readings: list[Reading], reason: str, with_image: bool) -> Verdict:
    """Sure when words are asked for and nothing pictorial is said."""
    asked = bool(readings) and readings[0].lean is Lean.TEXT and readings[0].strong
    short = len(marked.text) <= SURE_TEXT_CHARS
    if asked and _opens_with_question(marked) and all(r.lean is not Lean.IMAGE for r in readings):
        return Verdict(False, short and scene_points(marked.marks) < SURE_POINTS, reason)
    pictorial = [Label.DRAW, Label.STYLE, Label.IDIOM]
    pictorial += [Label.EDIT, Label.TURN, Label.MAKE, Label.WANT] if with_image else []
    hinted = any(m.has(*pictorial) and not m.has(Label.ASK, Label.COVER) for m in marked.marks)
    makes = any(m.has(Label.MAKE, Label.WANT) for m in marked.marks)
    pictures = any(m.has(Label.PICTURE) for m in marked.marks)
    depicts = sum(m.has(Label.VISUAL) for m in marked.marks) > 1
    sure = (
        asked
        and short
        and not hinted
        and not (makes and depicts)
        and not (makes and pictures and not with_image)
    )
    return Verdict(False, sure, reason)


def _opens_with_question(marked: Marked) -> bool:
    """Whether the first word that says anything asks for words."""
    fillers = (Label.LEAD, Label.COMMON, Label.PREP, Label.OPENER)
    first = next((m for m in marked.marks if not m.has(*fillers) or m.has(Label.ASK)), None)
    return first is not None and first.has(Label.ASK, Label.COVER) and not first.has(Label.DRAW)
