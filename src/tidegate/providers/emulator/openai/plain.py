"""Embeddings, pictures and models: the calls without a conversation.

Invariant: a vector depends on its text alone; an embedding's usage is counted as it is told.
"""

from __future__ import annotations

import math
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from struct import pack
from typing import Any

import orjson

from tidegate.providers.emulator import answers
from tidegate.providers.emulator.answers import OUTPUT_PICTURE_TOKENS
from tidegate.providers.emulator.delivery import Script, Step, broken_object
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.faults import Fault, FaultName
from tidegate.providers.emulator.openai.errors import OPENAI, model_unknown, wrong
from tidegate.providers.emulator.pictures import draw
from tidegate.providers.emulator.reading import Asked, count_by_modality
from tidegate.providers.emulator.settings import Behaviour

MOST_PICTURES = 10
MOST_DIMENSIONS = 4096
MODELS: Mapping[str, str] = {  # with their owners
    "gemini-2.5-flash": "google",
    "gemini-2.5-flash-image": "google",
    "gemini-2.5-flash-lite": "google",
    "gemini-2.5-pro": "google",
    "gemini-embedding-001": "google",
    "gpt-4o": "openai",
    "gpt-4o-mini": "openai",
    "gpt-5": "openai",
    "gpt-image-1": "openai",
    "text-embedding-3-large": "openai",
    "text-embedding-3-small": "openai",
}
_DIMENSIONS = {"gemini-embedding-001": 768, "text-embedding-3-large": 3072}
_GARBAGE = b'{"created": 1, "data": [{"b64_'


def check_model(model: str, behaviour: Behaviour) -> None:
    """Raises OpenAIError (404) when models are strict and this is none of them."""
    if behaviour.strict_models and model.removeprefix("models/") not in MODELS:
        raise model_unknown(model)


def list_models() -> Json:
    return {"object": "list", "data": [describe(name) for name in MODELS]}


def describe(model: str) -> Json:
    owner = MODELS.get(model.removeprefix("models/"), "tidegate-emulator")
    return {"id": model, "object": "model", "created": 1_700_000_000, "owned_by": owner}


@dataclass(frozen=True, slots=True)
class Embedded:
    """What is to be embedded, and how the vectors are to come."""

    model: str
    texts: tuple[str, ...]
    input_tokens: int
    dimensions: int
    base64: bool

    def answer(self) -> Json:
        vectors = [answers.embedding(text, self.dimensions) for text in self.texts]
        data = [
            {"object": "embedding", "index": index, "embedding": self._encoded(vector)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": self.input_tokens, "total_tokens": self.input_tokens}
        return {"object": "list", "data": data, "model": self.model, "usage": usage}

    def _encoded(self, vector: list[float]) -> list[float] | str:
        return b64encode(pack(f"<{len(vector)}f", *vector)).decode() if self.base64 else vector


def read_embeddings(body: Json, model: str) -> Embedded:
    """Parse a body of embeddings: texts, or lists of the numbers of LLM tokens."""
    given = body.get("input")
    if isinstance(given, str) or _are_numbers(given):
        given = [given]
    if not isinstance(given, list) or not given:
        raise wrong("input", "Missing required parameter: 'input'.", "missing_required_parameter")
    tokens = 0
    for item in given:
        numbers = _are_numbers(item)
        if not numbers and not (isinstance(item, str) and item):
            raise wrong("input", "'$.input' is invalid: expected texts, none of them empty.")
        tokens += len(item) if numbers else math.ceil(len(item) / 4)
    dimensions = body.get("dimensions") or _DIMENSIONS.get(model.removeprefix("models/"), 1536)
    if not _is_number(dimensions) or not 1 <= dimensions <= MOST_DIMENSIONS:
        raise wrong("dimensions", f"Invalid 'dimensions': from 1 to {MOST_DIMENSIONS}.")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise wrong("encoding_format", "Supported values are: 'float' and 'base64'.")
    texts = tuple(item if isinstance(item, str) else str(item) for item in given)
    return Embedded(model, texts, tokens, dimensions, encoding == "base64")


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(item) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_pictures(body: Json, model: str) -> tuple[Asked, int]:
    """Parse a body of images/generations: what is asked, and how many pictures."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        message = "Missing required parameter: 'prompt'."
        raise wrong("prompt", message, "missing_required_parameter")
    wanted = body.get("n")
    wanted = 1 if wanted is None else wanted
    if not _is_number(wanted) or not 1 <= wanted <= MOST_PICTURES:
        raise wrong("n", f"Invalid 'n': from 1 to {MOST_PICTURES}.")
    if body.get("stream"):
        raise wrong("stream", "Pictures are not streamed here.", "unsupported_parameter")
    asked = Asked(
        kind="image_generation",
        model=model,
        prompt=prompt,
        last_text=prompt,
        attached=(),
        input_by_modality=count_by_modality(len(prompt), ()),
        wants_picture=True,
    )
    return asked, wanted


def pictures_script(asked: Asked, wanted: int, behaviour: Behaviour, fault: Fault | None) -> Script:
    empty = fault is not None and fault.fault in (FaultName.NO_IMAGE, FaultName.NO_CANDIDATES)
    count = 0 if empty else wanted
    # Pictures of one prompt differ by their number.
    pngs = [draw(f"{asked.prompt}\n{number}", behaviour.image_size) for number in range(count)]
    tokens = count * OUTPUT_PICTURE_TOKENS
    body = {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": "png",
        "data": [{"b64_json": b64encode(png).decode()} for png in pngs],
        "usage": {
            "input_tokens": asked.input_tokens,
            "input_tokens_details": {"text_tokens": asked.input_tokens, "image_tokens": 0},
            "output_tokens": tokens,
            "total_tokens": asked.input_tokens + tokens,
        },
    }
    return Script(
        [Step(orjson.dumps(body), tokens)],
        streamed=False,
        input_tokens=asked.input_tokens,
        broken=lambda _, fault: broken_object(OPENAI, _GARBAGE, fault),
    )
