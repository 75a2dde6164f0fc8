"""Default models of prompts: those of the first account whose key is set. Pure.

Small and current ones, which docs/gateway.md lists; a deployment sets its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr

# The value of GEMINI_API_KEY where the emulator answers.
EMULATORS_KEY = "the-emulator-takes-any-key"
OUR_KEY = "tg_"  # an SDK's variable may hold a key of this gateway

# Text alone, files, images, the classifier's questions.
GEMINI = (
    "gemini-2.5-flash",
    "gemini-2.5-flash",
    "gemini-2.5-flash-image",
    "gemini-2.5-flash-lite",
)
_GPT, _CLAUDE = "gpt-6-luna", "claude-haiku-5-5"
# By the setting that has the key, in this order. Claude draws nothing, which a prompt for an image
# is answered with.
_BY_KEY = {
    "openai_api_key": (_GPT, _GPT, "gpt-image-2.5-flare", _GPT),
    "anthropic_api_key": (_CLAUDE, _CLAUDE, _CLAUDE, _CLAUDE),
}
_SETTINGS = ("text_model", "multi_modal_model", "image_model", "classifier_model")


def usual_models(given: Mapping[str, Any]) -> dict[str, str]:
    """By setting, for the settings that are `given`; empty with an account of Gemini, or none."""
    if _key(given, "gemini_api_key") not in ("", EMULATORS_KEY):
        return {}
    for name, models in _BY_KEY.items():
        if (key := _key(given, name)) and not key.startswith(OUR_KEY):
            return dict(zip(_SETTINGS, models, strict=True))
    return {}


def _key(given: Mapping[str, Any], name: str) -> str:
    """A secret that is not checked yet; empty where there is none."""
    value = given.get(name)
    return str(value.get_secret_value() if isinstance(value, SecretStr) else value or "")
