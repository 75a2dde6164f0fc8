"""What a call consists of, each piece with a first guess of its LLM tokens. Pure.

The guesses are rules of thumb, for files those of a provider (`rules`); what they are off by,
`estimator` learns.
Invariant: a guess costs no more than a look at the head of a file and a few passes over a text in
C, and is never 0 for a piece that is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from math import ceil

from tidegate.call import Media
from tidegate.demand.dimensions import dimensions, duration_s
from tidegate.demand.rules import GEMINI, Rules


class Modality(StrEnum):
    """What is guessed and learned apart. Text comes in three: scripts differ in tokens a letter."""

    LATIN = "latin"  # one byte a letter in UTF-8
    LETTERS = "letters"  # two: accents, Greek, Cyrillic, Hebrew, Arabic
    WIDE = "wide"  # three or four: Chinese, Japanese, Korean, Indian scripts, emoji
    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"
    DOCUMENT = "document"
    ANSWER = "answer"  # what comes back as text
    PICTURE = "picture"  # what comes back as an image
    # What no text or file of the request is the measure of.
    CALL = "call"  # what the provider puts around every call
    TOOLS = "tools"  # its own prompt for the client's tools
    HOSTED = "hosted"  # what its own tools read for the model
    STATE = "state"  # what it keeps of earlier calls: a response, a conversation, cached content

    # An enumeration's own is a call of Python, and there are dozens of them for each request.
    __hash__ = str.__hash__


class Learning(StrEnum):
    """Which calls are learned from together, apart from all others."""

    TEXT = ""
    HOSTED = "hosted"  # with tools that the provider runs
    STATE = "state"  # with something that the provider keeps
    FILES = "files"


Pieces = Mapping[Modality, float]
_NOTHING: Pieces = {}


class InputPieces(dict[Modality, float]):
    """The pieces of a request: its texts and files. Made by `input_pieces`.

    whole: the same with what the provider adds. learning: the calls that it is learned with.
    tools: says of two calls that their tools may be the same; 0 without any.
    """

    __slots__ = ("learning", "tools", "whole")
    whole: Pieces
    learning: Learning
    tools: int


def input_pieces(
    content: Pieces, added: Pieces = _NOTHING, learning: Learning = Learning.TEXT, tools: int = 0
) -> InputPieces:
    """Those of a request's content, and of what its provider adds."""
    pieces = InputPieces(content)
    pieces.whole = {**content, **added} if added else content
    pieces.learning = learning
    pieces.tools = tools
    return pieces


_TOKENS_A_LETTER = {Modality.LATIN: 0.25, Modality.LETTERS: 0.4, Modality.WIDE: 0.7}
_LATIN, _LATIN_TOKENS = Modality.LATIN, _TOKENS_A_LETTER[Modality.LATIN]
# Typical of a compressed recording, where the file does not say how long it is.
_BYTES_A_SECOND = {Modality.AUDIO: 16_000, Modality.VIDEO: 250_000}
_MOST_TIMES_USUAL = 20
_BYTES_A_PAGE = 50_000
_PAGE = re.compile(rb"/Type\s*/Page(?![A-Za-z])")
_TEXT_TYPES = re.compile(r"text/|application/(?:json|xml|yaml|toml|javascript|x-sh|csv|sql)\b")
_SAMPLE_BYTES = 65_536
_SEARCHED_BYTES = 1_000_000
_USUAL_FILE_BYTES = 200_000
_USUAL_DOCUMENT_TOKENS = 4 * 258.0  # of one that is not seen: a page of Claude's, four of Gemini's
# Of base64 and the like a LLM token has 4 letters in 3, and not 4. It is looked for where words are
# long, and only in parts of a long text.
_DENSE_TOKENS_A_LETTER = 0.75
_SHORTEST_RUN = 64
_DENSE = re.compile(rf"[A-Za-z0-9+/_=-]{{{_SHORTEST_RUN},}}")
_MARKED = bytes(_DENSE.fullmatch(_SHORTEST_RUN * chr(byte)) is not None for byte in range(256))
_LONG_RUN = _SHORTEST_RUN * b"\x01"
_LONG_WORDS_CHARS = 12
_LOOKED_AT_CHARS, _PLACES = 4_096, 4

ANSWER_TOKENS = 800.0
PICTURE_TOKENS = 1_290.0


def pieces_of(prompt: str, media: Iterable[Media]) -> dict[Modality, float]:
    """The pieces of a prompt with its files; never empty."""
    found = pieces_of_text(prompt)
    for file in media:
        for modality, tokens in pieces_of_file(file.mime_type, file.data, len(file.data)).items():
            found[modality] = found.get(modality, 0.0) + tokens
    return found or {Modality.LATIN: 1.0}


def answer_of(images: int) -> dict[Modality, float]:
    """The pieces of an answer: text, or so many images with a word to them."""
    if images:
        return {Modality.PICTURE: images * PICTURE_TOKENS}
    return {Modality.ANSWER: ANSWER_TOKENS}


def pieces_of_text(text: str) -> dict[Modality, float]:
    """The pieces of a text; none of an empty one."""
    return pieces_of_texts((text,))


def pieces_of_texts(texts: Sequence[str]) -> dict[Modality, float]:
    """Those of several together."""
    text = "".join(texts)
    letters = len(text)
    dense = _dense_letters(text, texts) if letters >= _SHORTEST_RUN else 0.0
    dense *= _DENSE_TOKENS_A_LETTER - _LATIN_TOKENS
    if text.isascii():
        return {_LATIN: max(1.0, letters * _LATIN_TOKENS) + dense} if letters else {}
    # Four lengths tell how many letters take one, two and more bytes, without a loop.
    latin = len(text.encode("ascii", "ignore"))
    four = len(text.encode("utf-16-le", "surrogatepass")) // 2 - letters
    rest_bytes = len(text.encode("utf-8", "surrogatepass")) - latin - 4 * four
    two_or_three = letters - latin - four
    three = rest_bytes - 2 * two_or_three
    counted = {
        Modality.LATIN: latin,
        Modality.LETTERS: two_or_three - three,
        Modality.WIDE: three + four,
    }
    found = {
        modality: max(1.0, count * _TOKENS_A_LETTER[modality])
        for modality, count in counted.items()
        if count
    }
    if dense:
        found[_LATIN] += dense
    return found


def _dense_letters(text: str, texts: Sequence[str]) -> float:
    """About how many letters are in long runs of small and capital letters and digits, without a
    blank between them. `texts`: what `text` is made of."""
    letters = len(text)
    looked_at, scale = text, 1.0
    if letters > _PLACES * _LOOKED_AT_CHARS:
        step = (letters - _LOOKED_AT_CHARS) // (_PLACES - 1)
        starts = range(0, letters - _LOOKED_AT_CHARS + 1, step)
        looked_at = " ".join(text[start : start + _LOOKED_AT_CHARS] for start in starts)
        scale = letters / len(looked_at)
    if len(looked_at) < _LONG_WORDS_CHARS * looked_at.count(" "):
        return 0.0
    if _LONG_RUN not in looked_at.encode("ascii", "replace").translate(_MARKED):
        return 0.0
    if scale == 1.0 and len(texts) > 1:  # no run goes on from one text to the next
        looked_at = " ".join(texts)
    return scale * sum(len(run) for run in _DENSE.findall(looked_at) if _is_mixed(run))


def _is_mixed(run: str) -> bool:
    return run.lower() != run != run.upper() and any(map(str.isdigit, run))


def pieces_of_file(
    mime_type: str, data: bytes, size_bytes: int, rules: Rules = GEMINI
) -> dict[Modality, float]:
    """The pieces of a file of `size_bytes`, of which `data` is all or the beginning."""
    family = mime_type.partition("/")[0]
    if family == "image":
        return {Modality.IMAGE: rules.picture(dimensions(data))}
    if family == "audio":
        seconds = size_bytes / _audio_bytes_a_second(data)
        return {Modality.AUDIO: max(1.0, seconds) * rules.audio_second}
    if family == "video":
        seconds = size_bytes / _BYTES_A_SECOND[Modality.VIDEO]
        if (said := duration_s(data)) is not None:  # a head that says too little lies
            seconds = max(said, seconds / _MOST_TIMES_USUAL)
        return {Modality.VIDEO: max(1.0, seconds) * rules.video_second}
    if _TEXT_TYPES.match(mime_type):
        return _text_file(data, size_bytes)
    return {Modality.DOCUMENT: rules.page * _pages(data, size_bytes)}


def unseen_file(mime_type: str, rules: Rules = GEMINI) -> dict[Modality, float]:
    """The pieces of a file that is somewhere else: as of one of a usual size."""
    found = pieces_of_file(mime_type, b"", _USUAL_FILE_BYTES, rules)
    if Modality.DOCUMENT in found:
        found[Modality.DOCUMENT] = max(_USUAL_DOCUMENT_TOKENS, rules.page)
    return found


def _audio_bytes_a_second(data: bytes) -> float:
    """What a WAV says of itself, else what is typical."""
    if data.startswith(b"RIFF") and data[8:16] == b"WAVEfmt ":
        said = int.from_bytes(data[28:32], "little")
        if said >= 1_000:
            return said
    return _BYTES_A_SECOND[Modality.AUDIO]


def _text_file(data: bytes, size_bytes: int) -> dict[Modality, float]:
    """As text; of a long file its beginning speaks for the rest."""
    sample = data[:_SAMPLE_BYTES]
    scale = size_bytes / max(1, len(sample))
    return {
        modality: tokens * scale
        for modality, tokens in pieces_of_text(sample.decode("utf-8", "ignore")).items()
    } or {Modality.LATIN: 1.0}


def _pages(data: bytes, size_bytes: int) -> int:
    """Pages of a PDF that names them in the clear, else by its size."""
    named = len(_PAGE.findall(data, 0, _SEARCHED_BYTES)) if data.startswith(b"%PDF") else 0
    if named:
        searched_bytes = min(len(data), _SEARCHED_BYTES)
        return ceil(named * max(1.0, size_bytes / searched_bytes))
    return max(1, ceil(size_bytes / _BYTES_A_PAGE))
