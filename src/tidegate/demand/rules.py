"""What each provider's documents say of the LLM tokens of pictures, pages, sound and film. Pure.

Sources: ai.google.dev/gemini-api/docs, pages "tokens" and "media-resolution"; platform.openai.com/
docs/guides, pages "images-vision" and "audio"; platform.claude.com/docs, pages "vision",
"pdf-support" and "tool-use". Invariant: how closely a file is to be looked at is a client's word,
and lowers no figure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

Size = tuple[int, int] | None  # width and height in pixels, where they are known


@dataclass(frozen=True, slots=True)
class Rules:
    """Of one provider, or one family of its models.

    picture: the tokens of a picture. page: of a page of a document. audio_second, video_second.
    call: what the provider puts around any call; tools: its own prompt for a client's tools.
    """

    picture: Callable[[Size], float]
    page: float
    audio_second: float
    video_second: float
    call: float
    tools: float


def _gemini_tiles(size: Size) -> float:
    """A picture of up to 384 pixels is one tile of 258, a larger one is cut into tiles of 768."""
    if size is None:
        return 4 * 258.0
    if max(size) <= 384:
        return 258.0
    return 258.0 * min(64, ceil(size[0] / 768) * ceil(size[1] / 768))


def _openai_tiles(base: float, tile: float) -> Callable[[Size], float]:
    """Fitted into 2,048 pixels, then its shorter side to 768; so much a tile of 512."""

    def tokens(size: Size) -> float:
        width, height = size or (1024, 1024)
        scale = min(1.0, 2048 / max(width, height))
        scale = min(scale, 768 / min(width, height))
        return base + tile * ceil(width * scale / 512) * ceil(height * scale / 512)

    return tokens


def _openai_patches(each: float) -> Callable[[Size], float]:
    """So much a patch of 32 pixels, of which there are 1,536 at most."""

    def tokens(size: Size) -> float:
        width, height = size or (1024, 1024)
        return each * min(1536, ceil(width / 32) * ceil(height / 32))

    return tokens


def _claude(size: Size) -> float:
    """A token for 750 pixels, once the longer side fits into 1,568; 1,600 at most."""
    width, height = size or (1568, 1568)
    scale = min(1.0, 1568 / max(width, height))
    return max(1.0, min(1600.0, width * scale * height * scale / 750))


GEMINI = Rules(_gemini_tiles, page=258, audio_second=32, video_second=295, call=2, tools=10)
_GEMINI_3 = replace(GEMINI, picture=lambda _: 1120.0, page=560)
OPENAI = Rules(
    _openai_tiles(85, 170), page=258, audio_second=10, video_second=295, call=8, tools=40
)
# Of a page its text, 1,500 to 3,000, stands for its picture too. The prompt for tools has 159 to
# 804 tokens, by model and choice of tool.
ANTHROPIC = Rules(_claude, page=2_250, audio_second=32, video_second=295, call=8, tools=500)
_BY_DIALECT = {"gemini": GEMINI, "openai": OPENAI, "anthropic": ANTHROPIC}
_GEMINI_VERSION = re.compile(r"gemini-(\d+)")
# The first that a model's name holds.
_OPENAI_MODELS = (
    ("gpt-4o-mini", replace(OPENAI, picture=_openai_tiles(2833, 5667))),
    ("o4-mini", replace(OPENAI, picture=_openai_patches(1.72))),
    ("gpt-4.1-mini", replace(OPENAI, picture=_openai_patches(1.62))),
    ("gpt-5-mini", replace(OPENAI, picture=_openai_patches(1.62))),
    ("gpt-4.1-nano", replace(OPENAI, picture=_openai_patches(2.46))),
    ("gpt-5-nano", replace(OPENAI, picture=_openai_patches(2.46))),
)


@lru_cache(maxsize=512)
def rules_of(dialect: str, model: str) -> Rules:
    """Those of a model; of one that is not known, those of its dialect."""
    rules = _BY_DIALECT[dialect]
    if rules is OPENAI:
        return next((found for name, found in _OPENAI_MODELS if name in model), rules)
    if rules is GEMINI and (version := _GEMINI_VERSION.search(model)) and int(version[1]) >= 3:
        return _GEMINI_3
    return rules
