"""Private names of google-genai that the processor uses.

google-genai >= 3.6, < 4. Guarded by `tests/contract/test_gemini_calls.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from operator import call
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.genai import Client
    from google.genai.types import GenerateContentConfig

Converted = tuple[dict[str, Any], dict[str, Any]]
_CONVERT, _CHECK = "_GenerateContentConfig_to_mldev", "_check_field_type_mismatches"
_CONVERT_TAKES = ["api_client", "from_object", "parent_object", "root_object"]


def make_requests_once(client: Client) -> None:
    """Replace the SDK's retry wrapper by a plain call.

    The SDK gets no retry options, so that it retries nothing, but still runs each request through
    tenacity, which inspects the wrapped function each time: an eighth of the cost of a call. An SDK
    with another structure is left unchanged.
    """
    api = client._api_client
    loop = getattr(api, "_async_retry", None)
    if getattr(getattr(loop, "stop", None), "max_attempt_number", None) == 1:
        api._async_retry = call  # type: ignore[assignment]


def convert_once(settings: type[GenerateContentConfig]) -> None:
    """Have the SDK convert each instance of these settings once, which keeps the result in its slot
    `converted` and must not change.

    The SDK looks up each of some thirty fields for every call: a tenth of the cost of a call. An
    SDK with another structure is left unchanged.
    """
    from google.genai import models

    convert: Callable[..., dict[str, Any]] | None = getattr(models, _CONVERT, None)
    if convert is None or [*signature(convert).parameters] != _CONVERT_TAKES:
        return

    @wraps(convert)
    def converted(
        api_client: object, from_object: Any, parent_object: Any = None, root_object: Any = None
    ) -> dict[str, Any]:
        if type(from_object) is not settings or parent_object is None:
            return convert(api_client, from_object, parent_object, root_object)
        if (known := getattr(from_object, "converted", None)) is None:
            beside: dict[str, Any] = {}  # what belongs beside the generation settings
            known = convert(api_client, from_object, beside, root_object), beside
            object.__setattr__(from_object, "converted", known)
        within, beside = known
        parent_object.update(beside)
        return dict(within)

    setattr(models, _CONVERT, converted)


def skip_type_warnings() -> None:
    """Leave out a validator of the SDK that logs a warning for a model of another type in a field.

    It reads every field of each model that is built, from an answer too, which has no models in
    it. Only for models whose schema is not built yet, before they are first used.
    """
    from google.genai._common import BaseModel

    models: list[type[BaseModel]] = [BaseModel]
    for model in models:
        models.extend(model.__subclasses__())
        decorators = getattr(model, "__pydantic_decorators__", None)
        if decorators is not None and not model.__pydantic_complete__:
            decorators.model_validators.pop(_CHECK, None)
