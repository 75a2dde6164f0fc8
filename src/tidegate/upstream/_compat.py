"""Private names of google-genai that the processor uses.

google-genai >= 3.6, < 4. Guarded by `tests/contract/test_gemini_calls.py`.
"""

from __future__ import annotations

from operator import call
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.genai import Client


def make_requests_once(client: Client) -> None:
    """Have the SDK make each request by a plain call. It retries nothing, since it is given no
    options for that, by a loop of tenacity, which inspects the function that it calls each time: an
    eighth of what a call costs. An SDK that is built otherwise stays as it is."""
    api = client._api_client
    loop = getattr(api, "_async_retry", None)
    if getattr(getattr(loop, "stop", None), "max_attempt_number", None) == 1:
        api._async_retry = call  # type: ignore[assignment]
