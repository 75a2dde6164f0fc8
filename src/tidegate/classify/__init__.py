"""Classifier of prompts by keywords and grammar: text, text about files, or an image. Pure.

Files decide between text and multi-modal. A prompt asks for an image if it requests one and has
no file, or has an image among its files. The text is clipped, normalised and split into clauses;
the words of each clause are labelled by the vocabularies in `languages/`; the governing verb of a
clause and the head of its object decide; the verdict weighs all clauses.

Invariants: the same prompt gives the same result; the work is bounded whatever the length of the
prompt; every pattern is linear; a word that differs in meaning between languages counts only for
the languages of the text.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

from tidegate.call import Classification, ClassifiedBy, Kind

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


MIN_STEM_CHARS = 2
MAX_STEM_CHARS = 14
_VOCABULARY_PAUSE = re.compile(r"[.!?;:,\n]")
ACTIVE_SHARE = 0.5


class Label(StrEnum):
    """What a word does in a request."""

    COMMON = "common"  # only tells the language
    LEAD = "lead"  # may stand directly before a command: please, you, then
    JOIN = "join"  # and, then: may also stand before a command, and joins two wishes
    WISH = "wish"  # I want to: perhaps the writer means to do it
    ASK = "ask"  # wants words: explain, write, what, how
    COVER = "cover"  # wants words, and what follows is its material: translate, summarise
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
    FIGURATIVE = "figurative"  # what one draws without a pencil: conclusions
    ABSTRACT = "abstract"  # what one paints a picture of in words: the economy
    IDIOM = "idiom"  # paint a picture (of)
    FORMAT = "format"  # a drawing written as text: SVG, ASCII, Mermaid
    TOOL = "tool"  # a language or program, unless it is the thing drawn: Python
    ARTICLE = "article"  # a, two: opens a description
    PREP = "prep"  # ends the noun phrase that a verb governs
    NEGATION = "negation"
    STYLE = "style"  # how a picture looks: watercolour, bokeh
    VISUAL = "visual"  # what is often in a picture: dragon, sunset
    PERSON = "person"  # tells of somebody, which a picture's description rarely does: I, was


@dataclass(frozen=True, slots=True)
class Syntax:
    """Word order: which of several verbs governs, and where a noun phrase has its head."""

    verb_last: bool = False
    head_last: bool = False
    object_first: bool = False
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    parts: tuple[str, ...]
    language: str
    label: Label
    keeps_accents: bool
    width: int = field(init=False)
    exact: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", len(self.parts))
        object.__setattr__(self, "exact", not self.parts[-1].endswith("*"))


class Mark(NamedTuple):
    """A stretch of the text with what it may mean."""

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


class _Hit(NamedTuple):
    entry: Entry
    start: int
    end: int
    width: int  # tokens, or characters of an unspaced script
    exact: bool


def _load() -> _Table:
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
        for wrong in _misspellings(word):
            table.typos.setdefault(wrong, word)


def _add_word(table: _Table, flags: set[str], language: str, label: Label, word: str) -> None:
    keeps, unspaced = "keeps_accents" in flags, "unspaced" in flags
    shape = word if keeps or unspaced else plain(word)
    if unspaced and has_unspaced(shape):
        entry = Entry((shape.replace("_", " "),), language, label, keeps)
        table.unspaced[shape[0]].append(entry)
        return
    forms = [shape]
    if label in (Label.VISUAL, Label.STYLE) and len(shape) >= 4 and "_" not in shape:
        forms += [shape[:-1] + "*"] if "inflected" in flags else []
        forms += [shape + "*"] if "suffixed" in flags else []
    for form in forms:
        entry = Entry(tuple(form.split("_")), language, label, keeps)
        table.words[entry.parts[0]].append(entry)


def _misspellings(word: str) -> Iterator[str]:
    """One letter lost, doubled or swapped with its neighbour; the first letter is usually right."""
    for at in range(1, len(word)):
        yield word[:at] + word[at + 1 :]
        yield word[:at] + word[at] + word[at:]
        if at + 1 < len(word):
            yield word[:at] + word[at + 1] + word[at] + word[at + 2 :]


TABLE = _load()


@dataclass(frozen=True, slots=True)
class Marked:
    """A text with its tokens and marks, in order."""

    text: str
    tokens: tuple[Token, ...]
    marks: tuple[Mark, ...]
    language: str | None

    def syntax(self, language: str) -> Syntax:
        return TABLE.syntax[language]


def mark(text: str) -> Marked:
    """Finds the known words; the longest phrase wins where several begin."""
    words = tokens(text)
    hits = list(_word_hits(text, words))
    if has_unspaced(text):
        hits += _unspaced_hits(text)
    scores = _scores(hits)
    top = max(scores.values(), default=0.0)
    active = {language for language, score in scores.items() if score >= top * ACTIVE_SHARE}
    best = max(scores, key=lambda language: scores[language]) if scores else None
    return Marked(text, tuple(words), tuple(_chosen(hits, active, best)), best)


def _word_hits(text: str, words: list[Token]) -> Iterator[_Hit]:
    for at, token in enumerate(words):
        # Only words of an ordinary length are remembered: a stranger chooses them.
        find = _entries if len(token.kept) <= MAX_STEM_CHARS else _entries.__wrapped__
        for entry in find(token.plain, token.kept):
            width = entry.width
            if width == 1:
                yield _Hit(entry, token.start, token.end, 1, entry.exact)
            elif _follows(text, words, at, entry):
                yield _Hit(entry, token.start, words[at + width - 1].end, width, entry.exact)


@lru_cache(maxsize=20_000)
def _entries(plain_word: str, kept: str) -> tuple[Entry, ...]:
    """What may begin with this word, its misspellings corrected when nothing else does."""
    entries = tuple(
        entry
        for shape, keeps_accents in _shapes(plain_word, kept)
        for key in _keys(shape)
        for entry in TABLE.words.get(key, ())
        if entry.keeps_accents == keeps_accents
    )
    right = TABLE.typos.get(plain_word)
    if entries or right is None:
        return entries
    return tuple(entry for entry in TABLE.words[right] if len(entry.parts) == 1)


def _shapes(plain_word: str, kept: str) -> Iterator[tuple[str, bool]]:
    yield plain_word, False
    yield kept, True
    if len(plain_word) > 4 and plain_word.endswith("s") and plain_word not in TABLE.words:
        yield plain_word[:-1], False
        if plain_word.endswith("ies"):
            yield plain_word[:-3] + "y", False
    if "\u0600" <= plain_word[0] <= "\u06ff":
        for prefix in TABLE.arabic_prefixes:
            if plain_word.startswith(prefix) and len(plain_word) > len(prefix) + 2:
                yield plain_word[len(prefix) :], False
        for ending in TABLE.arabic_endings:
            if plain_word.endswith(ending) and len(plain_word) > 3:
                yield plain_word[: -len(ending)], False


def _keys(word: str) -> Iterator[str]:
    yield word
    for length in range(MIN_STEM_CHARS, min(len(word), MAX_STEM_CHARS) + 1):
        yield word[:length] + "*"


def _follows(text: str, words: list[Token], at: int, entry: Entry) -> bool:
    """Whether the rest of a phrase comes after its first word, with no pause between."""
    parts, end = entry.parts, at + entry.width
    if end > len(words):
        return False
    for step in range(1, entry.width):
        part, word = parts[step], words[at + step]
        shape = word.kept if entry.keeps_accents else word.plain
        if shape != part and not (part[-1] == "*" and shape.startswith(part[:-1])):
            return False
    return _VOCABULARY_PAUSE.search(text, words[at].end, words[end - 1].start) is None


def _unspaced_hits(text: str) -> Iterator[_Hit]:
    kana = re.search("[\u3040-\u30ff]", text) is not None
    absent = "zh" if kana else "ja"
    for at, char in enumerate(text):
        for entry in TABLE.unspaced.get(char, ()):
            word = entry.parts[0]
            if entry.language != absent and text.startswith(word, at):
                yield _Hit(entry, at, at + len(word), len(word), True)


def _scores(hits: list[_Hit]) -> dict[str, float]:
    seen: dict[tuple[str, int], float] = {}
    for hit in hits:
        worth = 1.0 if hit.exact else 0.6
        for step in range(hit.width if hit.width < 4 else 3):
            key = (hit.entry.language, hit.start + step)
            if worth > seen.get(key, 0.0):
                seen[key] = worth
    scores: defaultdict[str, float] = defaultdict(float)
    for (language, _), worth in seen.items():
        scores[language] += worth
    return dict(scores)


def _chosen(hits: list[_Hit], active: set[str], best: str | None) -> Iterator[Mark]:
    by_start: defaultdict[int, list[_Hit]] = defaultdict(list)
    for hit in hits:
        by_start[hit.start].append(hit)
    reach = 0
    for start in sorted(by_start):
        if start < reach:
            continue
        here = by_start[start]
        if len(here) == 1:
            only = here[0]
            if only.entry.language in active or only.exact:
                reach = only.end
                yield Mark(start, reach, frozenset((only.entry.label,)), only.entry.language)
            continue
        languages = {hit.entry.language for hit in here}
        usable = [h for h in here if h.entry.language in active]
        if not usable and len(languages) == 1:
            usable = [h for h in here if h.exact]
        if not usable:
            continue
        if any(h.entry.language == best for h in usable):
            usable = [h for h in usable if h.entry.language == best]
        rank = max((h.width, h.exact, len(h.entry.parts[0])) for h in usable)
        top = [h for h in usable if (h.width, h.exact, len(h.entry.parts[0])) == rank]
        reach = top[0].end
        labels = frozenset(h.entry.label for h in top)
        yield Mark(start, reach, labels, top[0].entry.language)


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


def by_rules(prompt: str, mime_types: Sequence[str], *, image_uri: bool = False) -> Classification:
    """Decides only when sure; otherwise `kind` is None and the reason says why."""
    kind, sure, reason = _decide(prompt, mime_types, image_uri)
    if not sure:
        return Classification(None, ClassifiedBy.RULES, f"not sure: {reason}")
    return Classification(kind, ClassifiedBy.RULES, reason)


def by_keywords(
    prompt: str, mime_types: Sequence[str], *, image_uri: bool = False
) -> Classification:
    """Always decides: the likelier kind."""
    kind, _, reason = _decide(prompt, mime_types, image_uri)
    return Classification(kind, ClassifiedBy.KEYWORDS, reason)


def _decide(prompt: str, mime_types: Sequence[str], image_uri: bool) -> tuple[Kind, bool, str]:
    images = [m for m in mime_types if m.strip().lower().startswith("image/")]
    with_image = image_uri or bool(images)
    if mime_types and not with_image:
        return Kind.MULTI_MODAL, True, "files are attached, and none is an image"
    rest = Kind.MULTI_MODAL if with_image else Kind.TEXT_ONLY
    verdict = judge(prompt, with_image=with_image)
    if not verdict.wants_image:
        return rest, verdict.sure, verdict.reason
    mixed = len(images) < len(mime_types)
    return Kind.IMAGE_GENERATION, verdict.sure and not mixed, verdict.reason
