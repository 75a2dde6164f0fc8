"""Parts of messages: text, pictures, sound and files, in the words of both of OpenAI's APIs.

Invariant: a file's size is that of its bytes, never of their base64; what is only a URL or an id
has no known size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.openai.errors import wrong
from tidegate.providers.emulator.reading import Attached

_TEXT = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_ANYTHING = "application/octet-stream"


def read_content(content: Any, param: str) -> Iterator[tuple[str | None, Attached | None]]:
    """Each part of a message's content as a text or a file. Raises OpenAIError (400)."""
    if content is None:
        return
    if isinstance(content, str):
        yield content, None
        return
    if not isinstance(content, list):
        raise wrong(param, f"Invalid type for '{param}': expected a string or a list.")
    for index, part in enumerate(content):
        place = f"{param}[{index}]"
        if not isinstance(part, dict):
            raise wrong(place, f"Invalid type for '{place}': expected an object.", "invalid_type")
        yield _read_part(part, place)


def _read_part(part: Json, place: str) -> tuple[str | None, Attached | None]:
    kind = part.get("type")
    if kind in _TEXT:
        text = part.get(_TEXT[kind])
        if not isinstance(text, str):
            raise wrong(f"{place}.text", f"Invalid type for '{place}.text': expected a string.")
        return text, None
    match kind:
        case "image_url" | "input_image":
            return None, _picture(part, place)
        case "input_audio":
            sound = part.get("input_audio")
            if not isinstance(sound, dict):
                raise wrong(place, f"Missing required parameter: '{place}.input_audio'.")
            size = _size(sound.get("data"), f"{place}.input_audio.data")
            return None, Attached(f"audio/{sound.get('format') or 'wav'}", size)
        case "file" | "input_file":
            file = part.get("file") if kind == "file" else part
            if not isinstance(file, dict):
                raise wrong(place, f"Missing required parameter: '{place}.file'.")
            return None, _file(file, place)
    raise wrong(f"{place}.type", f"Invalid value: '{kind}'. It is none of the supported types.")


def _picture(part: Json, place: str) -> Attached:
    url = part.get("image_url")
    if isinstance(url, dict):
        url = url.get("url")
    if isinstance(url, str) and url:
        return _at(url, f"{place}.image_url", "image/*")
    if isinstance(part.get("file_id"), str):
        return Attached("image/*", None, part["file_id"])
    raise wrong(f"{place}.image_url", f"Missing required parameter: '{place}.image_url'.")


def _file(file: Json, place: str) -> Attached:
    data = file.get("file_data")
    if isinstance(data, str):
        if data.startswith("data:"):
            return _at(data, f"{place}.file_data", _ANYTHING)
        return Attached(_ANYTHING, _size(data, f"{place}.file_data"))
    for name in ("file_url", "file_id"):
        if isinstance(file.get(name), str):
            return Attached(_ANYTHING, None, file[name])
    raise wrong(f"{place}.file_data", f"Missing required parameter: '{place}.file_data'.")


def _at(url: str, place: str, mime_type: str) -> Attached:
    """What stands behind a URL: a `data:` URL holds it, any other only names it."""
    if not url.startswith("data:"):
        if not url.startswith(("http://", "https://")):
            raise wrong(place, f"Invalid '{place}'. Expected a valid URL.")
        return Attached(mime_type, None, url)
    head, comma, data = url[5:].partition(",")
    if not comma:
        raise wrong(place, f"Invalid '{place}'. Expected a base64-encoded data URL.")
    declared = head.partition(";")[0] or mime_type
    if head.endswith(";base64"):
        return Attached(declared, _size(data, place))
    return Attached(declared, len(unquote(data).encode("utf-8", "replace")))


def _size(data: Any, place: str) -> int:
    if not isinstance(data, str) or len(data.rstrip("=")) % 4 == 1:
        raise wrong(place, f"Invalid '{place}'. Expected base64-encoded data.")
    return len(data.rstrip("=")) * 3 // 4
