"""Vocabulary of the classifier: the words of a prompt, labelled in 18 languages. Pure.

The text is clipped, normalised and split into clauses; `languages/` holds one file of labelled
words per language.

Invariants: the work is bounded whatever the length of the prompt; every pattern is linear; a word
whose meaning differs between languages only counts for the languages of the text.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

HEAD_CHARS = 1600
TAIL_CHARS = 1000
MAX_WORDS = 420
NORMAL_CHARS = 3000  # compatibility forms may expand to many characters

_INVISIBLE = dict.fromkeys(
    [0x00AD, 0x0640, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFE0E, 0xFE0F, 0xFEFF]
)
_EQUIVALENT = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u02bc": "'", "`": "`", "ł": "l", "ø": "o", "\u0131": "i"}
)
_LATIN_MARKS = re.compile("[\u0300-\u036f\u064b-\u065f\u0670]+")

# Scripts without spaces between words, or with attached endings: searched within the text.
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
    """A word at `start:end` of the normalised text, with and without its accents."""

    original: str
    plain: str
    start: int
    end: int


class Bounds(NamedTuple):
    """One clause of the text, and whether a question mark ends it."""

    start: int
    end: int
    question: bool


def clip(prompt: str) -> str:
    """Return the beginning and the end, which contain the instruction; the middle is material."""
    if len(prompt) <= HEAD_CHARS + TAIL_CHARS:
        return prompt
    return prompt[:HEAD_CHARS] + "\n" + prompt[-TAIL_CHARS:]


def normalise(prompt: str) -> str:
    """Return the text clipped, in NFKC, case-folded, without invisible characters, with accents."""
    clipped = clip(prompt)
    if clipped.isascii():  # no step below would change it
        return clipped.casefold().strip()
    text = unicodedata.normalize("NFKC", clipped).translate(_INVISIBLE)
    text = unicodedata.normalize("NFC", text.casefold())[:NORMAL_CHARS]
    text = _INNER_APOSTROPHE.sub("", text)
    return text.replace("\u2019", "'").replace("\u2018", "'").strip()


def plain(word: str) -> str:
    """Return the word without the accents that writers omit; Indic vowel signs are no accents."""
    if word.isascii():
        return word.replace("`", "'")
    marks_off = _LATIN_MARKS.sub("", unicodedata.normalize("NFKD", word))
    return unicodedata.normalize("NFC", marks_off).translate(_EQUIVALENT)


def without_quotations(text: str) -> tuple[str, str]:
    """Return the text with quoted words and code blocks blanked, and the quoted contents."""
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
    """Remove quotation marks around the whole prompt."""
    for start, end in ('""', "''", "“”", "«»", "「」", "„“"):
        body = text[1:-1]
        if text[:1] == start and text[-1:] == end and start not in body and end not in body:
            return body.strip()
    return text


def tokens(text: str) -> list[Token]:
    """Return the words in order; of more than `MAX_WORDS`, only the first and last ones."""
    matches = list(_TOKEN.finditer(text))
    if len(matches) > MAX_WORDS:
        matches = matches[: MAX_WORDS // 2] + matches[-MAX_WORDS // 2 :]
    if text.isascii():  # no word has accents
        return [Token(word := match.group(), word, *match.span()) for match in matches]
    return [Token(word := match.group(), plain(word), *match.span()) for match in matches]


def has_unspaced(text: str) -> bool:
    return _UNSPACED_RUN.search(text) is not None


def clauses(text: str) -> list[Bounds]:
    """Return the non-empty sentences and lines, in order."""
    spans: list[Bounds] = []
    start = 0
    for match in _CLAUSE_END.finditer(text):
        if text[start : match.start()].strip():
            is_question = any(mark in match.group() for mark in "?\u037e\u061f") and (
                match.group()[0] != ";"
            )
            spans.append(Bounds(start, match.end(), is_question))
        start = match.end()
    if text[start:].strip():
        spans.append(Bounds(start, len(text), False))
    return spans


MIN_STEM_CHARS = 2
MAX_STEM_CHARS = 14
_VOCABULARY_PAUSE = re.compile(r"[.!?;:,\n]")
ACTIVE_SHARE = 0.5


class Label(StrEnum):
    """Role of a word in a request."""

    COMMON = "common"  # only tells the language
    LEAD = "lead"  # may stand directly before a command: please, you, then
    JOIN = "join"  # and, then: may also stand before a command, and joins two wishes
    WISH = "wish"  # I want to: perhaps the writer means to do it
    ASK = "ask"  # wants words: explain, write, what, how
    COVER = "cover"  # wants words, and the rest is its material: translate, summarise
    OPENER = "opener"  # a question when it opens one: is, does
    DRAW = "draw"  # makes pictures by itself: draw, paint
    MAKE = "make"  # makes anything: create, generate
    GENERATE = "generate"  # makes, by an image model's word
    WANT = "want"  # asks for a thing: show me, I need
    EDIT = "edit"  # changes a picture, if there is one
    TURN = "turn"  # changes a thing into another: convert, turn
    PICTURE = "picture"  # a thing that an image model makes: photo, logo
    TEXT = "text"  # a thing that a text model makes: code, contract, caption
    LETTERING = "lettering"  # words that can be on a picture: title, text
    FIGURATIVE = "figurative"  # drawn without a pencil: conclusions
    ABSTRACT = "abstract"  # a picture of it is painted in words: the economy
    IDIOM = "idiom"  # paint a picture (of)
    FORMAT = "format"  # a drawing written as text: SVG, ASCII, Mermaid
    TOOL = "tool"  # a language or program, unless it is the thing drawn: Python
    ARTICLE = "article"  # a, two: opens a description
    PREP = "prep"  # ends the noun phrase that a verb governs
    NEGATION = "negation"
    STYLE = "style"  # how a picture looks: watercolour, bokeh
    VISUAL = "visual"  # often in a picture: dragon, sunset
    PERSON = "person"  # tells a story, which a picture's description rarely does: I, was


@dataclass(frozen=True, slots=True)
class Syntax:
    """Word order: which of several verbs governs, and where a noun phrase has its head."""

    verb_last: bool = False
    head_last: bool = False
    object_first: bool = False
    strict: bool = False


# Of several entries at one place the greatest wins: its width in tokens (or in characters of an
# unspaced script), whether it is exact, and the length of its first word.
_Rank = tuple[int, bool, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One or several words, with their label. An ending `*` matches any ending."""

    parts: tuple[str, ...]
    language: str
    label: Label
    keeps_accents: bool
    width: int = field(init=False)
    exact: bool = field(init=False)
    rank: _Rank = field(init=False)
    labels: frozenset[Label] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", len(self.parts))
        object.__setattr__(self, "exact", not self.parts[-1].endswith("*"))
        object.__setattr__(self, "rank", (self.width, self.exact, len(self.parts[0])))
        object.__setattr__(self, "labels", frozenset((self.label,)))


class Word(NamedTuple):
    """A part of the text with its possible labels."""

    start: int
    end: int
    labels: frozenset[Label]
    language: str

    def has(self, *labels: Label) -> bool:
        return not self.labels.isdisjoint(labels)


@dataclass(slots=True)
class _Table:
    words: defaultdict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    unspaced: defaultdict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    syntax: dict[str, Syntax] = field(default_factory=dict)
    typos: dict[str, str] = field(default_factory=dict)
    arabic_prefixes: list[str] = field(default_factory=list)
    arabic_endings: list[str] = field(default_factory=list)


# An entry at `start:end` of the text. A plain tuple: a prompt of a page has some hundred.
_Hit = tuple[Entry, int, int, _Rank]


@cache
def vocabulary() -> _Table:
    """Return all languages, read at the first classification: many processes never classify."""
    table = _Table()
    for path in sorted(files("tidegate.classify").joinpath("languages").iterdir(), key=str):
        if path.name.endswith(".toml"):
            _add(table, path.name.removesuffix(".toml"), path.read_text(encoding="utf-8"))
    for entries in table.unspaced.values():
        entries.sort(key=lambda entry: len(entry.parts[0]), reverse=True)
    return table


def _add(table: _Table, language: str, source: str) -> None:
    data = tomllib.loads(source)
    flags = set(data.get("syntax", []))
    order = flags & {field.name for field in fields(Syntax)}
    table.syntax[language] = Syntax(**dict.fromkeys(order, True))
    for name, words in data["words"].items():
        label = Label(name)
        for word in words.split():
            _add_word(table, flags, language, label, word.casefold())
    table.arabic_prefixes += data.get("prefixes", "").split()
    table.arabic_endings += data.get("endings", "").split()
    for word in data.get("typos", "").split():
        for misspelt in _misspellings(word):
            table.typos.setdefault(misspelt, word)


def _add_word(table: _Table, flags: set[str], language: str, label: Label, word: str) -> None:
    keeps_accents, unspaced = "keeps_accents" in flags, "unspaced" in flags
    shape = word if keeps_accents or unspaced else plain(word)
    if unspaced and has_unspaced(shape):
        entry = Entry((shape.replace("_", " "),), language, label, keeps_accents)
        table.unspaced[shape[0]].append(entry)
        return
    forms = [shape]
    if label in (Label.VISUAL, Label.STYLE) and len(shape) >= 4 and "_" not in shape:
        forms += [shape[:-1] + "*"] if "inflected" in flags else []
        forms += [shape + "*"] if "suffixed" in flags else []
    for form in forms:
        entry = Entry(tuple(form.split("_")), language, label, keeps_accents)
        table.words[entry.parts[0]].append(entry)


def _misspellings(word: str) -> Iterator[str]:
    """Yield the word with one letter missing, doubled or swapped; the first letter is usually
    right."""
    for at in range(1, len(word)):
        yield word[:at] + word[at + 1 :]
        yield word[:at] + word[at] + word[at:]
        if at + 1 < len(word):
            yield word[:at] + word[at + 1] + word[at] + word[at + 2 :]


@dataclass(frozen=True, slots=True)
class Marked:
    """A text with its tokens and marks, in order."""

    text: str
    tokens: tuple[Token, ...]
    marks: tuple[Word, ...]
    language: str | None


def label_words(text: str) -> Marked:
    """Label the known words; of several phrases at one place the longest wins."""
    words = tokens(text)
    hits = _word_hits(text, words)
    if has_unspaced(text):
        hits += _unspaced_hits(text)
    scores = _scores(hits)
    top = max(scores.values(), default=0)
    active = {language for language, score in scores.items() if score >= top * ACTIVE_SHARE}
    best = max(scores, key=lambda language: scores[language]) if scores else None
    return Marked(text, tuple(words), tuple(_chosen(hits, active, best)), best)


def _word_hits(text: str, words: list[Token]) -> list[_Hit]:
    hits: list[_Hit] = []
    for at, (original, plain_word, start, end) in enumerate(words):
        # Only words of ordinary length are cached: a client chooses them.
        find = _entries if len(original) <= MAX_STEM_CHARS else _entries.__wrapped__
        for entry in find(plain_word, original):
            width = entry.width
            if width == 1:
                hits.append((entry, start, end, entry.rank))
            elif _follows(text, words, at, entry):
                hits.append((entry, start, words[at + width - 1].end, entry.rank))
    return hits


@lru_cache(maxsize=20_000)
def _entries(plain_word: str, original: str) -> tuple[Entry, ...]:
    """Return entries that begin with this word, or with its corrected spelling if there are
    none."""
    entries = tuple(
        entry
        for shape, keeps_accents in _shapes(plain_word, original)
        for key in _keys(shape)
        for entry in vocabulary().words.get(key, ())
        if entry.keeps_accents == keeps_accents
    )
    corrected = vocabulary().typos.get(plain_word)
    if entries or corrected is None:
        return entries
    return tuple(entry for entry in vocabulary().words[corrected] if len(entry.parts) == 1)


def _shapes(plain_word: str, original: str) -> Iterator[tuple[str, bool]]:
    yield plain_word, False
    yield original, True
    if len(plain_word) > 4 and plain_word.endswith("s") and plain_word not in vocabulary().words:
        yield plain_word[:-1], False
    if "\u0600" <= plain_word[0] <= "\u06ff":
        for prefix in vocabulary().arabic_prefixes:
            if plain_word.startswith(prefix) and len(plain_word) > len(prefix) + 2:
                yield plain_word[len(prefix) :], False
        for ending in vocabulary().arabic_endings:
            if plain_word.endswith(ending) and len(plain_word) > 3:
                yield plain_word[: -len(ending)], False


def _keys(word: str) -> Iterator[str]:
    yield word
    for length in range(MIN_STEM_CHARS, min(len(word), MAX_STEM_CHARS) + 1):
        yield word[:length] + "*"


def _follows(text: str, words: list[Token], at: int, entry: Entry) -> bool:
    """Whether the rest of a phrase follows its first word without a pause."""
    parts, end = entry.parts, at + entry.width
    if end > len(words):
        return False
    for step in range(1, entry.width):
        part, word = parts[step], words[at + step]
        shape = word.original if entry.keeps_accents else word.plain
        if shape != part and not (part[-1] == "*" and shape.startswith(part[:-1])):
            return False
    return _VOCABULARY_PAUSE.search(text, words[at].end, words[end - 1].start) is None


def _unspaced_hits(text: str) -> Iterator[_Hit]:
    kana = re.search("[\u3040-\u30ff]", text) is not None
    absent = "zh" if kana else "ja"
    for at, char in enumerate(text):
        for entry in vocabulary().unspaced.get(char, ()):
            word = entry.parts[0]
            if entry.language != absent and text.startswith(word, at):
                chars = len(word)
                yield entry, at, at + chars, (chars, True, chars)


def _scores(hits: list[_Hit]) -> dict[str, int]:
    """Return how many places of the text each language explains; a long phrase counts as three."""
    scores: dict[str, int] = {}  # in order of the text, which breaks ties between languages
    counted: set[tuple[str, int]] = set()
    for entry, start, _, (width, _, _) in hits:
        language = entry.language
        for at in range(start, start + min(width, 3)):
            if (language, at) not in counted:
                counted.add((language, at))
                scores[language] = scores.get(language, 0) + 1
    return scores


def _chosen(hits: list[_Hit], active: set[str], best: str | None) -> Iterator[Word]:
    by_start: defaultdict[int, list[_Hit]] = defaultdict(list)
    for hit in hits:
        by_start[hit[1]].append(hit)
    reach = 0
    for start in sorted(by_start):
        if start < reach:
            continue
        here = by_start[start]
        usable = [hit for hit in here if hit[0].language in active]
        if not usable and len({hit[0].language for hit in here}) == 1:
            usable = [hit for hit in here if hit[3][1]]
        if not usable:
            continue
        if len(usable) > 1:
            usable = [hit for hit in usable if hit[0].language == best] or usable
            rank = max([hit[3] for hit in usable])
            usable = [hit for hit in usable if hit[3] == rank]
        entry, _, reach, _ = usable[0]
        labels = entry.labels
        if len(usable) > 1:
            labels = frozenset([hit[0].label for hit in usable])
        yield Word(start, reach, labels, entry.language)
