"""Private names of google-genai that the processor uses.

google-genai >= 3.6, < 4. Guarded by `tests/contract/test_gemini_calls.py`.
"""

from __future__ import annotations

from operator import call
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.genai import Client


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
