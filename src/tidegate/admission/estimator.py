"""Estimator of the tokens of a call, which learns from the usage of earlier calls. Pure.

A first guess comes from the pieces of a call: texts by script, files by the rules of its dialect.
Tracks correct it: one per tenant and model for input, one per tenant, model and kind for output. A
track is a diagonal Kalman filter in logarithms (Kalman, "A New Approach to Linear Filtering and
Prediction Problems", 1960). The reservation is a quantile of the track's recent errors among calls
of a similar size (Vovk, "Conditional Validity of Inductive Conformal Predictors", 2012).

Invariants: an estimate is a whole number of at least 1; the number of tracks and their size are
bounded; calls of one tenant never change the estimates of another; a media resolution that the
client requests lowers no estimate.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, exp, inf, log, sqrt

from tidegate.call import DEFAULT_TENANT, Media, Usage, tokens_of

_MOST_SEGMENTS = 200
# JPEG's start-of-frame markers, which contain the size; C4, C8 and CC in their range are others.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})


def dimensions(data: bytes) -> tuple[int, int] | None:
    """Return the width and height in pixels of a PNG, JPEG, GIF or WebP, or None."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _pixels(*struct.unpack_from(">II", data, 16))
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _pixels(*struct.unpack_from("<HH", data, 6))
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        return None  # the header is cut off
    return None


def _jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    for _ in range(_MOST_SEGMENTS):
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return _pixels(width, height)
        if marker not in _WITHOUT_LENGTH:
            at += struct.unpack_from(">H", data, at)[0]
        if data[at] != 0xFF:
            return None
    return None


def _webp(data: bytes) -> tuple[int, int] | None:
    form = data[12:16]
    if form == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return _pixels(width & 0x3FFF, height & 0x3FFF)
    if form == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return _pixels((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if form == b"VP8X" and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return _pixels(width, height)
    return None


def duration_s(data: bytes) -> float | None:
    """Return the duration of an MP4 or QuickTime file by its header, or None without one."""
    at = data.find(b"mvhd") + 4
    try:
        if at < 4 or data[at] > 1:
            return None
        form, times = (">II", at + 12) if data[at] == 0 else (">IQ", at + 20)
        scale, ticks = struct.unpack_from(form, data, times)
    except (struct.error, IndexError):
        return None
    return ticks / scale if scale else None


def _pixels(width: int, height: int) -> tuple[int, int] | None:
    return (width, height) if width and height else None


Size = tuple[int, int] | None  # width and height in pixels, None if unknown


@dataclass(frozen=True, slots=True)
class Rules:
    """Token counts of files and calls at one provider, or for one family of its models.

    picture: a function from a picture's size to its tokens. page: tokens of a page of a document.
    audio_second, video_second: tokens of a second. call: tokens that the provider adds to each
    call. tools: tokens of its own prompt for a client's tools.
    """

    picture: Callable[[Size], float]
    page: float
    audio_second: float
    video_second: float
    call: float
    tools: float


def _usual_tiles(size: Size) -> float:
    """Return Gemini's count: 258 for up to 384 pixels, else 258 for each tile of 768 pixels."""
    if size is None:
        return 4 * 258.0
    if max(size) <= 384:
        return 258.0
    return 258.0 * min(64, ceil(size[0] / 768) * ceil(size[1] / 768))


# Gemini's rules; other dialects replace the parts that differ.
USUAL_RULES = Rules(_usual_tiles, page=258, audio_second=32, video_second=295, call=2, tools=10)


class Modality(StrEnum):
    """Kinds of content, each estimated and learned separately.

    Text has three kinds, since scripts differ in tokens per letter.
    """

    LATIN = "latin"  # one byte a letter in UTF-8
    LETTERS = "letters"  # two: accents, Greek, Cyrillic, Hebrew, Arabic
    WIDE = "wide"  # three or four: Chinese, Japanese, Korean, Indian scripts, emoji
    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"
    DOCUMENT = "document"
    ANSWER = "answer"  # text of the answer
    PICTURE = "picture"  # images of the answer
    # Tokens that neither text nor files of the request show:
    CALL = "call"  # what the provider adds to every call
    TOOLS = "tools"  # the provider's own prompt for the client's tools
    HOSTED = "hosted"  # what the provider's own tools read for the model
    STATE = "state"  # what the provider keeps: a response, a conversation, cached content
    KEPT = "kept"  # the same, with its size taken from the record of those calls

    # Enum's own __hash__ is a Python call, made dozens of times for each request.
    __hash__ = str.__hash__


class Learning(StrEnum):
    """Groups of calls; the estimator learns from each group separately."""

    TEXT = ""
    HOSTED = "hosted"  # calls with tools that the provider runs
    STATE = "state"  # calls that refer to something the provider keeps
    FILES = "files"


Pieces = Mapping[Modality, float]
_NOTHING: Pieces = {}


class InputPieces(dict[Modality, float]):
    """The pieces of a request: its texts and files. Built by `input_pieces`.

    whole: these pieces and what the provider adds. learning: the group of calls it is learned with.
    tools: an identifier that is equal for two calls whose tools may be the same; 0 without tools.
    """

    __slots__ = ("learning", "tools", "whole")
    whole: Pieces
    learning: Learning
    tools: int


def input_pieces(
    content: Pieces, added: Pieces = _NOTHING, learning: Learning = Learning.TEXT, tools: int = 0
) -> InputPieces:
    """Return the pieces of a request's content together with what its provider adds."""
    pieces = InputPieces(content)
    pieces.whole = {**content, **added} if added else content
    pieces.learning = learning
    pieces.tools = tools
    return pieces


def with_stored(pieces: InputPieces, tokens: int) -> InputPieces:
    """Return the pieces of a request to which the provider adds `tokens` of earlier calls."""
    stored = {Modality.KEPT: float(tokens)}
    whole = {**pieces.whole, **stored}
    whole.pop(Modality.STATE, None)
    added = {name: count for name, count in whole.items() if name not in pieces}
    return input_pieces({**pieces, **stored}, added, pieces.learning, pieces.tools)


_TOKENS_A_LETTER = {Modality.LATIN: 0.25, Modality.LETTERS: 0.4, Modality.WIDE: 0.7}
_LATIN, _LATIN_TOKENS = Modality.LATIN, _TOKENS_A_LETTER[Modality.LATIN]
# Typical of compressed recordings, for files whose duration is unknown.
_BYTES_A_SECOND = {Modality.AUDIO: 16_000, Modality.VIDEO: 250_000}
_MOST_TIMES_USUAL = 20
_BYTES_A_PAGE = 50_000
_PAGE = re.compile(rb"/Type\s*/Page(?![A-Za-z])")
_TEXT_TYPES = re.compile(r"text/|application/(?:json|xml|yaml|toml|javascript|x-sh|csv|sql)\b")
_SAMPLE_BYTES = 65_536
_SEARCHED_BYTES = 1_000_000
_USUAL_FILE_BYTES = 200_000
_USUAL_DOCUMENT_TOKENS = 4 * 258.0  # of an unseen document: a page of Claude's, four of Gemini's
# Base64 and similar text has a token per 4/3 letters, other text one per 4. The scan for such runs
# is limited to texts with long words, and to samples of long texts.
_DENSE_TOKENS_A_LETTER = 0.75
_SHORTEST_RUN = 64
_DENSE = re.compile(rf"[A-Za-z0-9+/_=-]{{{_SHORTEST_RUN},}}")
_MARKED = bytes(_DENSE.fullmatch(_SHORTEST_RUN * chr(byte)) is not None for byte in range(256))
_LONG_RUN = _SHORTEST_RUN * b"\x01"
_LONG_WORDS_CHARS = 12
_SAMPLE_CHARS, _PLACES = 4_096, 4
_COUNTED_CHARS = 262_144

ANSWER_TOKENS = 800.0
PICTURE_TOKENS = 1_290.0


def pieces_of(prompt: str, media: Iterable[Media] = ()) -> dict[Modality, float]:
    """Return the pieces of a prompt with its files; never empty."""
    found = pieces_of_text(prompt)
    for file in media:
        for modality, tokens in pieces_of_file(file.mime_type, file.data, len(file.data)).items():
            found[modality] = found.get(modality, 0.0) + tokens
    return found or {Modality.LATIN: 1.0}


def answer_of(images: int) -> dict[Modality, float]:
    """Return the pieces of an answer: text, or `images` images."""
    if images:
        return {Modality.PICTURE: images * PICTURE_TOKENS}
    return {Modality.ANSWER: ANSWER_TOKENS}


def pieces_of_text(text: str) -> dict[Modality, float]:
    """Return the pieces of a text; an empty dict for an empty text."""
    return pieces_of_texts((text,))


def pieces_of_texts(texts: Sequence[str]) -> dict[Modality, float]:
    """Return the pieces of several texts together."""
    if sum(map(len, texts)) <= _COUNTED_CHARS:
        counted, dense = _letters_of(texts)
    else:  # in steps: no other Python thread runs while a text is copied or encoded
        counted, dense = dict.fromkeys(_TOKENS_A_LETTER, 0), 0.0
        for some in _steps_of(texts):
            letters, runs = _letters_of(some)
            dense += runs
            for modality, count in letters.items():
                counted[modality] += count
    found = {
        modality: max(1.0, count * _TOKENS_A_LETTER[modality])
        for modality, count in counted.items()
        if count
    }
    if dense:
        found[_LATIN] += dense * (_DENSE_TOKENS_A_LETTER - _LATIN_TOKENS)
    return found


def _steps_of(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts, long ones divided, in lists of a bounded size."""
    some: list[str] = []
    chars = 0
    for text in texts:
        for start in range(0, len(text), _COUNTED_CHARS):
            some.append(text[start : start + _COUNTED_CHARS])
            chars += len(some[-1])
            if chars >= _COUNTED_CHARS:
                yield some
                some, chars = [], 0
    yield some


def _letters_of(texts: Sequence[str]) -> tuple[dict[Modality, int], float]:
    """Return the number of letters of each sort, and about how many are in long unbroken runs."""
    text = "".join(texts)
    letters = len(text)
    dense = _dense_letters(text, texts) if letters >= _SHORTEST_RUN else 0.0
    return ({_LATIN: letters} if text.isascii() else _letters_in(text)), dense


def _letters_in(text: str) -> dict[Modality, int]:
    """Return the number of letters in a text, by how many bytes they have in UTF-8."""
    # Four encoded lengths give the number of letters of one, two and more bytes without a loop.
    letters = len(text)
    latin = len(text.encode("ascii", "ignore"))
    four = len(text.encode("utf-16-le", "surrogatepass")) // 2 - letters
    rest_bytes = len(text.encode("utf-8", "surrogatepass")) - latin - 4 * four
    two_or_three = letters - latin - four
    three = rest_bytes - 2 * two_or_three
    return {
        Modality.LATIN: latin,
        Modality.LETTERS: two_or_three - three,
        Modality.WIDE: three + four,
    }


def _dense_letters(text: str, texts: Sequence[str]) -> float:
    """Return about how many letters are in long unbroken runs of mixed letters and digits.

    A run has small and capital letters and digits without blanks between. `texts`: the texts that
    `text` consists of.
    """
    letters = len(text)
    sample, scale = text, 1.0
    if letters > _PLACES * _SAMPLE_CHARS:
        step = (letters - _SAMPLE_CHARS) // (_PLACES - 1)
        starts = range(0, letters - _SAMPLE_CHARS + 1, step)
        sample = " ".join(text[start : start + _SAMPLE_CHARS] for start in starts)
        scale = letters / len(sample)
    if len(sample) < _LONG_WORDS_CHARS * sample.count(" "):
        return 0.0
    if _LONG_RUN not in sample.encode("ascii", "replace").translate(_MARKED):
        return 0.0
    if scale == 1.0 and len(texts) > 1:  # separate the texts: no run spans two of them
        sample = " ".join(texts)
    return scale * sum(len(run) for run in _DENSE.findall(sample) if _is_mixed(run))


def _is_mixed(run: str) -> bool:
    return run.lower() != run != run.upper() and any(map(str.isdigit, run))


def pieces_of_file(
    mime_type: str, data: bytes, size_bytes: int, rules: Rules = USUAL_RULES
) -> dict[Modality, float]:
    """Return the pieces of a file of `size_bytes`; `data` is all of it or its beginning."""
    family = mime_type.partition("/")[0]
    if family == "image":
        return {Modality.IMAGE: rules.picture(dimensions(data))}
    if family == "audio":
        seconds = size_bytes / _audio_bytes_a_second(data)
        return {Modality.AUDIO: max(1.0, seconds) * rules.audio_second}
    if family == "video":
        seconds = size_bytes / _BYTES_A_SECOND[Modality.VIDEO]
        if (stated := duration_s(data)) is not None:  # a much shorter duration is wrong
            seconds = max(stated, seconds / _MOST_TIMES_USUAL)
        return {Modality.VIDEO: max(1.0, seconds) * rules.video_second}
    if _TEXT_TYPES.match(mime_type):
        return _text_file(data, size_bytes)
    return {Modality.DOCUMENT: rules.page * _pages(data, size_bytes)}


def unseen_file(mime_type: str, rules: Rules = USUAL_RULES) -> dict[Modality, float]:
    """Return the pieces of a file that is stored elsewhere, assuming a usual size."""
    found = pieces_of_file(mime_type, b"", _USUAL_FILE_BYTES, rules)
    if Modality.DOCUMENT in found:
        found[Modality.DOCUMENT] = max(_USUAL_DOCUMENT_TOKENS, rules.page)
    return found


def _audio_bytes_a_second(data: bytes) -> float:
    """Return the byte rate in a WAV's header, else a typical one."""
    if data.startswith(b"RIFF") and data[8:16] == b"WAVEfmt ":
        stated = int.from_bytes(data[28:32], "little")
        if stated >= 1_000:
            return stated
    return _BYTES_A_SECOND[Modality.AUDIO]


def _text_file(data: bytes, size_bytes: int) -> dict[Modality, float]:
    """Return the pieces of a text file; those of a long one are scaled from its beginning."""
    sample = data[:_SAMPLE_BYTES]
    scale = size_bytes / max(1, len(sample))
    return {
        modality: tokens * scale
        for modality, tokens in pieces_of_text(sample.decode("utf-8", "ignore")).items()
    } or {Modality.LATIN: 1.0}


def _pages(data: bytes, size_bytes: int) -> int:
    """Return the number of pages of a PDF if it lists them uncompressed, else guess by size."""
    named = len(_PAGE.findall(data, 0, _SEARCHED_BYTES)) if data.startswith(b"%PDF") else 0
    if named:
        searched_bytes = min(len(data), _SEARCHED_BYTES)
        return ceil(named * max(1.0, size_bytes / searched_bytes))
    return max(1, ceil(size_bytes / _BYTES_A_PAGE))


REMEMBERED = 64


class Window:
    """The last `REMEMBERED` figures, in order of time and of size."""

    __slots__ = ("_by_size", "by_time")

    def __init__(self, figures: Iterable[float] = ()) -> None:
        self.by_time: deque[float] = deque(maxlen=REMEMBERED)
        self._by_size: list[float] = []
        for figure in figures:
            self.add(figure)

    def __len__(self) -> int:
        return len(self.by_time)

    def add(self, figure: float) -> None:
        by_time, by_size = self.by_time, self._by_size
        if len(by_time) == REMEMBERED:
            del by_size[bisect_left(by_size, by_time[0])]
        by_time.append(figure)
        insort(by_size, figure)

    def upper(self, share: float) -> float:
        """Return the quantile `share`, estimated; the largest figure if they are few."""
        by_size = self._by_size
        above = (1 - share) * (len(by_size) + 1)
        whole = max(1, int(above))
        part = max(0.0, above - whole)
        return by_size[-whole] * (1 - part) + by_size[-whole - 1] * part if part else by_size[-1]


MOST_OFF = 1_000.0
MOST_TOOL_SETS = 64
# At most 5 % of calls may use more than is reserved. Later calls differ somewhat from those
# remembered, so one percent is kept as a margin.
QUANTILE = 0.96
# Before anything is learned a guess may be off by a factor of 2, and what a provider adds by 3: the
# upper estimate of a text is about 3 times its guess.
_CONSTANTS = frozenset((Modality.CALL, Modality.TOOLS, Modality.HOSTED, Modality.STATE))
_UNKNOWN_VARIANCE = log(2.0) ** 2
_UNKNOWN_CONSTANT = log(3.0) ** 2
_NOISE = 0.04
_NOISE_OF_OTHERS = 1.0  # of calls whose content is not in the request
_NOISE_TOKENS = 4.0  # a call of few tokens says little about a ratio
_GAIN = 0.1  # of a surprise, once a ratio is known: drift is followed within about 25 calls
_DRIFT = _GAIN * _GAIN * _NOISE / (1 - _GAIN)
_KNOWN = 0.1  # variance at which the middle counts as known; the errors cover it
_DOUBTED = 0.2  # variance above which errors do not count yet
_DEVIATIONS = 1.645  # of the 95th percentile
_DEVIATIONS_BESIDE = 1.2  # beside the quantile of errors, which covers part of the same doubt
_LARGEST_STEP = log(4.0)
# Errors needed for their quantile. The reservation for an unlearned call fades over ten calls.
_ENOUGH = 20
_FEW_CALLS = 10
_EARLY_ERROR = 8.0
_SIZES = 4  # below 128 tokens, 2,048, 32,768, and above
# For the tokens of a set of tools: the prior weighs as much as half a call, and after this many
# calls each new surprise counts for a tenth.
_USUAL_CALLS = 0.5
_STEADY_AFTER = 10
_LARGEST_CONSTANT = 2_000.0


class Ratio:
    """Actual tokens over guessed ones, and the variance of the logarithm's estimate."""

    __slots__ = ("log_ratio", "ratio", "variance")

    def __init__(self, log_ratio: float, variance: float) -> None:
        self.log_ratio = log_ratio
        self.ratio = exp(log_ratio)
        self.variance = variance


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted tokens of a call: `expected` is the middle, `upper` is rarely exceeded."""

    expected: float
    upper: float


_UNKNOWN = {
    modality: Ratio(0.0, _UNKNOWN_CONSTANT if modality in _CONSTANTS else _UNKNOWN_VARIANCE)
    for modality in Modality
}


class Track:
    """A filter for one figure, such as the input tokens of one model."""

    def __init__(self, *, is_noisy: bool = False) -> None:
        """`is_noisy`: the request alone predicts its tokens poorly."""
        self.calls = 0
        self.ratios: dict[Modality, Ratio] = {}
        self._noise = _NOISE_OF_OTHERS if is_noisy else _NOISE
        self._doubted = inf if is_noisy else _DOUBTED
        self._usual = 0.0  # moving average of the middle
        # actual / expected of the last calls, and whether they used more than was reserved.
        self._surprises: deque[float] = deque(maxlen=REMEMBERED)
        self._short: deque[bool] = deque(maxlen=REMEMBERED)
        # (actual - middle) / sqrt(middle): of the last calls, and of those of each size.
        self._errors = Window()
        self._errors_by_size: dict[int, Window] = {}  # while there is one size: the same object
        self._early_error = 0.0  # the largest error before the middle was known
        # By set of tools: the number of calls, and the tokens they used above the middle.
        self._tool_sets: OrderedDict[int, tuple[int, float]] = OrderedDict()

    @property
    def margin(self) -> float:
        """Factor on the middle that gives the upper estimate of a usual call with known pieces."""
        if not self._errors:
            return 1.0
        return 1.0 + max(0.0, self._errors.upper(QUANTILE)) / sqrt(self._usual)

    @property
    def error(self) -> float | None:
        """Mean absolute error of the middle relative to the actual tokens; None if unknown."""
        if not self._surprises:
            return None
        return sum(abs(1 / surprise - 1) for surprise in self._surprises) / len(self._surprises)

    @property
    def short(self) -> float | None:
        """Share of the last calls that used more than was reserved."""
        return sum(self._short) / len(self._short) if self._short else None

    def predict(self, pieces: Pieces, tools: int = 0) -> Prediction:
        """Return the predicted tokens; `tools` as in `InputPieces`."""
        middle, doubt = self._middle(pieces, self.ratios)
        upper = middle * exp(_DEVIATIONS_BESIDE * sqrt(max(0.0, doubt - _KNOWN)))
        constant = self._constant(tools)
        expected = max(1.0, middle + constant)
        known = len(self._errors)
        error = max(0.0, self._error(middle)) if known else 0.0
        if known < _ENOUGH:
            fading = max(0.0, 1 - self.calls / _FEW_CALLS)
            error = max(error, self._early_error * fading)
            upper = max(upper + error * sqrt(middle), _unlearned(pieces) * fading)
        else:
            upper += error * sqrt(middle)
        upper += constant
        return Prediction(expected, max(expected, upper))

    def learn(
        self, pieces: Pieces, actual_tokens: int, reserved_tokens: float, tools: int = 0
    ) -> None:
        """Learn from one call. A figure of 0 or less is ignored, since every call has tokens."""
        if actual_tokens <= 0:
            return
        middle, doubt = self._middle(pieces, self.ratios)
        constant = self._constant(tools)
        self.calls += 1
        self._short.append(actual_tokens > reserved_tokens)
        surprise = actual_tokens / max(1.0, middle + constant)
        self._surprises.append(min(max(surprise, 1 / MOST_OFF), MOST_OFF))
        self._usual += (middle - self._usual) * max(_GAIN, 1 / self.calls)
        error_tokens = min(actual_tokens, MOST_OFF * middle) - middle - constant
        self._note_error(middle, error_tokens / sqrt(middle), doubt)
        if tools:
            self._note_tools(tools, middle, actual_tokens - middle)
        spread = doubt + self._noise + _NOISE_TOKENS / max(1.0, middle)
        most = max(_LARGEST_STEP, 3 * sqrt(spread))
        step = min(max(log(actual_tokens / middle), -most), most) / spread
        ratios = self.ratios
        for modality, tokens in pieces.items():
            known = ratios.get(modality)
            if known is None:
                known = ratios[modality] = Ratio(0.0, _UNKNOWN[modality].variance)
            share = tokens * known.ratio / middle
            gain = known.variance * share
            known.log_ratio = _bounded(known.log_ratio + gain * step)
            known.ratio = exp(known.log_ratio)
            # Only the ratios of this call's pieces can have drifted.
            known.variance += share * (share * _DRIFT - gain * known.variance / spread)

    @staticmethod
    def _middle(pieces: Pieces, ratios: Mapping[Modality, Ratio]) -> tuple[float, float]:
        """Return the middle without the tools' constant, and the variance of its logarithm."""
        middle = doubt = 0.0
        for modality, tokens in pieces.items():
            known = ratios.get(modality) or _UNKNOWN[modality]
            part = tokens * known.ratio
            middle += part
            doubt += known.variance * part * part
        if not middle:  # a request without a body; every call has tokens
            return 1.0, 0.0
        return middle, doubt / (middle * middle)

    def _error(self, middle: float) -> float:
        """Return the quantile of the errors of calls of this size."""
        own = self._errors_by_size.get(_size(middle))
        if own is not None and len(own) >= _ENOUGH:
            return own.upper(QUANTILE)
        return self._errors.upper(QUANTILE)

    def _note_error(self, middle: float, error: float, doubt: float) -> None:
        if doubt > self._doubted:
            self._early_error = max(self._early_error, error)
            return
        size, by_size = _size(middle), self._errors_by_size
        own = by_size.get(size)
        if own is None:
            for other, errors in by_size.items():
                if errors is self._errors:
                    by_size[other] = Window(errors.by_time)
            own = by_size[size] = Window() if by_size else self._errors
        self._errors.add(error)
        if own is not self._errors:
            own.add(error)

    def _constant(self, tools: int) -> float:
        """Return the tokens that calls with the same tools use above the middle.

        After the first call, two thirds of its excess.
        """
        calls, over = self._tool_sets.get(tools, (0, 0.0))
        return over / (calls + _USUAL_CALLS)

    def _note_tools(self, tools: int, middle: float, over: float) -> None:
        most = _LARGEST_CONSTANT + 4 * middle
        over = min(max(over, -middle), most)
        calls, before = self._tool_sets.pop(tools, (0, 0.0))
        if calls < _STEADY_AFTER:
            self._tool_sets[tools] = (calls + 1, before + over)
        else:
            self._tool_sets[tools] = (calls, before + over - before / calls)
        if len(self._tool_sets) > MOST_TOOL_SETS:
            self._tool_sets.popitem(last=False)


def _unlearned(pieces: Pieces) -> float:
    """Return the reservation before anything is learned."""
    middle, doubt = Track._middle(pieces, _UNKNOWN)
    return middle * exp(_DEVIATIONS * sqrt(doubt)) + _EARLY_ERROR * sqrt(middle)


def _size(middle: float) -> int:
    return min(max(0, (int(middle).bit_length() >> 2) - 1), _SIZES - 1)


def _bounded(log_ratio: float) -> float:
    return min(max(log_ratio, -log(MOST_OFF)), log(MOST_OFF))


MOST_TRACKS = 4_096
MOST_TRACKS_OF_A_TENANT = 64  # models are named by clients
_INPUT = "input"
_UNPREDICTABLE = frozenset(f"{_INPUT}:{learning}" for learning in Learning if learning)
_UNTAUGHT = Track()
_NO_TRACKS: Mapping[tuple[str, str], Track] = {}


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated tokens of one call.

    input_tokens, output_tokens: to be reserved; rarely exceeded. expected_*: the middle. guessed_*:
    the first guess by the request alone, with nothing learned; of the output at most the call's own
    bound.
    """

    model: str
    kind: str
    tenant: str
    input_pieces: Pieces
    output_pieces: Pieces
    input_tokens: int
    output_tokens: int
    expected_input_tokens: int
    expected_output_tokens: int
    guessed_input_tokens: int
    guessed_output_tokens: int


@dataclass(frozen=True, slots=True)
class Learned:
    """The accuracy of the estimates of one track.

    tenant: the tenant whose calls trained the track; only its calls use it.
    part: `input`, `input:hosted`, `input:state`, `input:files`, or `output:<kind>`.
    calls: the number of calls it has learned from.
    error: mean absolute error of the middle over the last calls, relative to the actual tokens;
        None before the first.
    short: the share of the last calls that used more than was reserved for them.
    margin: the reservation over the middle.
    ratios: modality -> actual tokens over first guess.
    """

    tenant: str
    model: str
    part: str
    calls: int
    error: float | None
    short: float | None
    margin: float
    ratios: Mapping[str, float]


class Estimator:
    """All tracks of a process. No I/O."""

    def __init__(self) -> None:
        self._tracks: OrderedDict[str, OrderedDict[tuple[str, str], Track]] = OrderedDict()
        self._count = 0

    def of_pieces(
        self,
        model: str,
        kind: str,
        input_pieces: Pieces,
        *,
        images: int = 0,
        max_output_tokens: int | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Estimate:
        """Return the estimate of a call.

        `images`: the number of images in the answer. `max_output_tokens`: the call's own bound.
        """
        output_pieces = answer_of(images)
        own = self._tracks.get(tenant) or _NO_TRACKS
        part, whole, tools = _input(input_pieces)
        taken = _predict(own, model, part, whole, tools)
        output = _predict(own, model, _output(kind), output_pieces)
        most = inf if max_output_tokens is None else max(1, max_output_tokens)
        return Estimate(
            model=model,
            kind=kind,
            tenant=tenant,
            input_pieces=input_pieces,
            output_pieces=output_pieces,
            input_tokens=_whole(taken.upper),
            output_tokens=_whole(min(output.upper, most)),
            expected_input_tokens=_whole(taken.expected),
            expected_output_tokens=_whole(min(output.expected, most)),
            guessed_input_tokens=_whole(sum(input_pieces.values())),
            guessed_output_tokens=_whole(min(sum(output_pieces.values()), most)),
        )

    def learn(self, estimate: Estimate, usage: Usage) -> None:
        """Learn from the usage of a finished call.

        For an answer that was cut off, `usage` must contain no output figures: such a call teaches
        its input alone.
        """
        input_tokens, output_tokens = tokens_of(usage)
        if input_tokens is not None:
            part, whole, tools = _input(estimate.input_pieces)
            track = self._track(estimate.tenant, estimate.model, part)
            track.learn(whole, input_tokens, estimate.input_tokens, tools)
        if output_tokens is not None:
            track = self._track(estimate.tenant, estimate.model, _output(estimate.kind))
            track.learn(estimate.output_pieces, output_tokens, estimate.output_tokens)

    def error(self) -> tuple[Learned, ...]:
        """Return the accuracy of each track, the last used first."""
        return tuple(
            Learned(
                tenant=tenant,
                model=model,
                part=part,
                calls=track.calls,
                error=track.error,
                short=track.short,
                margin=track.margin,
                ratios={modality.value: one.ratio for modality, one in track.ratios.items()},
            )
            for tenant, own in reversed(self._tracks.items())
            for (model, part), track in reversed(own.items())
        )

    def _track(self, tenant: str, model: str, part: str) -> Track:
        known = (self._tracks.get(tenant) or _NO_TRACKS).get((model, part))
        return self._keep(tenant, model, part, known or Track(is_noisy=part in _UNPREDICTABLE))

    def _keep(self, tenant: str, model: str, part: str, track: Track) -> Track:
        own = self._tracks.get(tenant)
        if own is None:
            own = self._tracks[tenant] = OrderedDict()
        self._tracks.move_to_end(tenant)
        self._count += (model, part) not in own
        own[model, part] = track
        own.move_to_end((model, part))
        if len(own) > MOST_TRACKS_OF_A_TENANT:
            own.popitem(last=False)
            self._count -= 1
        while self._count > MOST_TRACKS:
            self._count -= len(self._tracks.popitem(last=False)[1])
        return track


def _predict(
    own: Mapping[tuple[str, str], Track], model: str, part: str, pieces: Pieces, tools: int = 0
) -> Prediction:
    return (own.get((model, part)) or _UNTAUGHT).predict(pieces, tools)


def _input(pieces: Pieces) -> tuple[str, Pieces, int]:
    """Return the track of an input, its pieces with what the provider adds, and its tools."""
    if type(pieces) is not InputPieces:
        return _INPUT, pieces, 0
    learning = pieces.learning
    return f"{_INPUT}:{learning}" if learning else _INPUT, pieces.whole, pieces.tools


def _whole(tokens: float) -> int:
    # An excess over a whole number by rounding errors alone is not one more token.
    return ceil(tokens * (1 - 1e-9))


def _output(kind: str) -> str:
    return f"output:{kind}"
