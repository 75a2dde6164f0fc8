"""Private names of google-genai that the processor uses.

google-genai >= 3.6, < 4. Guarded by `tests/contract/test_gemini_calls.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from operator import call
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.genai import Client

# Takes the SDK's client, settings, the body that they are a part of, and the whole request.
Convert = Callable[[Any, Any, dict[str, Any] | None, Any], dict[str, Any]]
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


def replace_conversion(replacement: Callable[[Convert], Convert]) -> None:
    """Have the SDK write settings into a request by `replacement` of its own function.

    An SDK whose function takes other arguments is left unchanged.
    """
    from google.genai import models

    convert: Convert | None = getattr(models, _CONVERT, None)
    if convert is not None and [*signature(convert).parameters] == _CONVERT_TAKES:
        setattr(models, _CONVERT, replacement(convert))


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
