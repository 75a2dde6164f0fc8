"""Turns a prompt into comparable words: clipped, normalised, cut into clauses and tokens.

Invariant: the work is bounded by a constant, whatever the length of the prompt, and every pattern
here is linear (no nested repetition).
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

HEAD_CHARS = 1600
TAIL_CHARS = 1000
MAX_WORDS = 420
NORMAL_CHARS = 3000  # compatibility forms may grow to many characters

_INVISIBLE = dict.fromkeys(
    [0x00AD, 0x0640, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFE0E, 0xFE0F, 0xFEFF]
)
_ALIKE = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u02bc": "'", "`": "`", "ł": "l", "ø": "o", "\u0131": "i"}
)
_LATIN_MARKS = re.compile("[\u0300-\u036f\u064b-\u065f\u0670]+")

# Scripts that write no spaces between words (or glue endings on): matched inside, not word by word.
UNSPACED = "\u0e00-\u0e7f\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(f"(?:[^\\W_{UNSPACED}]|[\u0900-\u0dff])+")
_UNSPACED_RUN = re.compile(f"[{UNSPACED}]")
_CLAUSE_END = re.compile(r"[!?;\n\u3002\u037e\u061f\u0964\u2026]+|\.(?=\s|$)|\.(?=\.)")

_INNER_APOSTROPHE = re.compile("(?<=[\u0400-\u04ff])['\u02bc\u2019](?=[\u0400-\u04ff])")

_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_QUOTES = [
    re.compile(f"{start}[^{start}{end}\n]{{2,400}}{end}")
    for start, end in ('""', "“”", "„“", "„”", "«»", "»«", "「」", "『』", "\u2039\u203a", "““")
]
_QUOTED = re.compile("[\"'`“”„«»「」『』\u2039\u203a]")
_SINGLE_QUOTE = re.compile(r"(?<![^\s(:,])'(?=\S)[^'\n]{2,400}'(?![^\W_])")


class Token(NamedTuple):
    """A word at `start:end` of the normalised text: with its accents, and without."""

    kept: str
    plain: str
    start: int
    end: int


class Span(NamedTuple):
    """One clause of the text, and whether a question mark ends it."""

    start: int
    end: int
    question: bool


def clip(prompt: str) -> str:
    """The beginning and the end, where an instruction stands; the middle is material."""
    if len(prompt) <= HEAD_CHARS + TAIL_CHARS:
        return prompt
    return prompt[:HEAD_CHARS] + "\n" + prompt[-TAIL_CHARS:]


def normalise(prompt: str) -> str:
    """Clipped, NFKC, case-folded, without invisible characters; accents are still there."""
    clipped = clip(prompt)
    if clipped.isascii():  # what follows would change nothing
        return clipped.casefold().strip()
    text = unicodedata.normalize("NFKC", clipped).translate(_INVISIBLE)
    text = unicodedata.normalize("NFC", text.casefold())[:NORMAL_CHARS]
    text = _INNER_APOSTROPHE.sub("", text)
    return text.replace("\u2019", "'").replace("\u2018", "'").strip()


def plain(word: str) -> str:
    """The word without the accents that people leave out; Indic vowel signs are no accents."""
    if word.isascii():
        return word.replace("`", "'")
    marks_off = _LATIN_MARKS.sub("", unicodedata.normalize("NFKD", word))
    return unicodedata.normalize("NFC", marks_off).translate(_ALIKE)


def without_quotations(text: str) -> tuple[str, str]:
    """The text with quoted words and code blocks blanked, and what was inside them."""
    if _QUOTED.search(text) is None:
        return text, ""
    text = _unwrapped(text)
    inside: list[str] = []

    def blank(match: re.Match[str]) -> str:
        inside.append(match.group()[1:-1])
        return ' "" '

    for pattern in (_FENCE, *_QUOTES, _SINGLE_QUOTE):
        text = pattern.sub(blank, text)
    return text, " ".join(inside)


def _unwrapped(text: str) -> str:
    """Quotation marks around the whole prompt quote nothing."""
    for start, end in ('""', "''", "“”", "«»", "「」", "„“"):
        body = text[1:-1]
        if text[:1] == start and text[-1:] == end and start not in body and end not in body:
            return body.strip()
    return text


def tokens(text: str) -> list[Token]:
    """The words in order; of a text of single letters only the first and last ones."""
    matches = list(_TOKEN.finditer(text))
    if len(matches) > MAX_WORDS:
        matches = matches[: MAX_WORDS // 2] + matches[-MAX_WORDS // 2 :]
    found = [(m.group(), m.start(), m.end()) for m in matches]
    return [Token(kept, plain(kept), start, end) for kept, start, end in found]


def has_unspaced(text: str) -> bool:
    return _UNSPACED_RUN.search(text) is not None


def clauses(text: str) -> list[Span]:
    """Sentences and lines, in order, without empty ones."""
    spans: list[Span] = []
    start = 0
    for match in _CLAUSE_END.finditer(text):
        if text[start : match.start()].strip():
            asked = any(mark in match.group() for mark in "?\u037e\u061f") and (
                match.group()[0] != ";"
            )
            spans.append(Span(start, match.end(), asked))
        start = match.end()
    if text[start:].strip():
        spans.append(Span(start, len(text), False))
    return spans
