"""What a call consists of, each piece with a first guess of its LLM tokens. Pure.

The guesses are a provider's published rules of thumb; what they are off by, `estimator` learns.
Invariant: a guess costs no more than a look at the head of a file and a few passes over a text in
C, and is never 0 for a piece that is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from math import ceil

from tidegate.call import Media
from tidegate.demand.dimensions import dimensions


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


Pieces = Mapping[Modality, float]

_TOKENS_A_LETTER = {Modality.LATIN: 0.25, Modality.LETTERS: 0.4, Modality.WIDE: 0.7}
_LATIN, _LATIN_TOKENS = Modality.LATIN, _TOKENS_A_LETTER[Modality.LATIN]
# https://ai.google.dev/gemini-api/docs/tokens: a picture of up to 384 pixels is one tile, a larger
# one is cut into tiles of 768; a page of a document counts as a picture.
_TILE_TOKENS = 258
_SMALL_PIXELS = 384
_TILE_PIXELS = 768
_MOST_TILES = 64
_UNKNOWN_PICTURE_TOKENS = 4 * _TILE_TOKENS
_TOKENS_A_SECOND = {Modality.AUDIO: 32, Modality.VIDEO: 295}
# Typical of a compressed recording, where the file does not say how long it is.
_BYTES_A_SECOND = {Modality.AUDIO: 16_000, Modality.VIDEO: 250_000}
_BYTES_A_PAGE = 50_000
_PAGE = re.compile(rb"/Type\s*/Page(?![A-Za-z])")
_TEXT_TYPES = re.compile(r"text/|application/(?:json|xml|yaml|toml|javascript|x-sh|csv|sql)\b")
_SAMPLE_BYTES = 65_536
_SEARCHED_BYTES = 1_000_000
_USUAL_FILE_BYTES = 200_000

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
    letters = len(text)
    if text.isascii():
        return {_LATIN: max(1.0, letters * _LATIN_TOKENS)} if letters else {}
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
    return {
        modality: max(1.0, count * _TOKENS_A_LETTER[modality])
        for modality, count in counted.items()
        if count
    }


def pieces_of_file(mime_type: str, data: bytes, size_bytes: int) -> dict[Modality, float]:
    """The pieces of a file of `size_bytes`, of which `data` is all or the beginning."""
    family = mime_type.partition("/")[0]
    if family == "image":
        return {Modality.IMAGE: _image(data)}
    if family == "audio":
        return {Modality.AUDIO: _timed(Modality.AUDIO, size_bytes / _audio_bytes_a_second(data))}
    if family == "video":
        return {
            Modality.VIDEO: _timed(Modality.VIDEO, size_bytes / _BYTES_A_SECOND[Modality.VIDEO])
        }
    if _TEXT_TYPES.match(mime_type):
        return _text_file(data, size_bytes)
    return {Modality.DOCUMENT: float(_TILE_TOKENS * _pages(data, size_bytes))}


def unseen_file(mime_type: str) -> dict[Modality, float]:
    """The pieces of a file that is somewhere else: as of one of a usual size."""
    return pieces_of_file(mime_type, b"", _USUAL_FILE_BYTES)


def _image(data: bytes) -> float:
    size = dimensions(data)
    if size is None:
        return _UNKNOWN_PICTURE_TOKENS
    if max(size) <= _SMALL_PIXELS:
        return _TILE_TOKENS
    tiles = ceil(size[0] / _TILE_PIXELS) * ceil(size[1] / _TILE_PIXELS)
    return _TILE_TOKENS * min(tiles, _MOST_TILES)


def _timed(modality: Modality, seconds: float) -> float:
    return max(1.0, seconds) * _TOKENS_A_SECOND[modality]


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
