"""Default models of prompts: those of the first account whose key is set. Pure.

These are small and current models, which docs/gateway.md lists; a deployment can set others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr

# The value of GEMINI_API_KEY for the emulator.
EMULATORS_KEY = "the-emulator-takes-any-key"
OUR_KEY = "tg_"  # an SDK's variable may contain a key of this gateway

# For text, for files, for images, and for the classifier.
GEMINI = (
    "gemini-2.5-flash",
    "gemini-2.5-flash",
    "gemini-2.5-flash-image",
    "gemini-2.5-flash-lite",
)
_GPT, _CLAUDE = "gpt-6-luna", "claude-haiku-5-5"
# By the setting with the key, in this order. Claude generates no images: a prompt for an image gets
# that answer.
_BY_KEY = {
    "openai_api_key": (_GPT, _GPT, "gpt-image-2.5-flare", _GPT),
    "anthropic_api_key": (_CLAUDE, _CLAUDE, _CLAUDE, _CLAUDE),
}
_SETTINGS = ("text_model", "multi_modal_model", "image_model", "classifier_model")


def usual_models(values: Mapping[str, Any]) -> dict[str, str]:
    """Return models by setting, for the settings in `values`; empty with an account of Gemini, or
    without one."""
    if _key(values, "gemini_api_key") not in ("", EMULATORS_KEY):
        return {}
    for name, models in _BY_KEY.items():
        if (key := _key(values, name)) and not key.startswith(OUR_KEY):
            return dict(zip(_SETTINGS, models, strict=True))
    return {}


def _key(values: Mapping[str, Any], name: str) -> str:
    """Return a secret that is not validated yet; empty if there is none."""
    value = values.get(name)
    return str(value.get_secret_value() if isinstance(value, SecretStr) else value or "")
