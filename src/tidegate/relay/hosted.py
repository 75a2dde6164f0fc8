"""What a provider itself brings to a call: tools that it runs, and what it keeps of earlier calls.

Pure. How much of either a model will read no request says, so that such calls are learned from
apart. Invariant: a tool of a name that is not known here is the client's only where it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from tidegate.demand.pieces import Learning, Modality
from tidegate.relay.paths import Dialect

TOOLS = frozenset(("tools", "functions"))
# A page that a tool finds has about 2,500 LLM tokens (platform.claude.com/docs/en/agents-and-tools/
# tool-use/web-fetch-tool); what is worth keeping at a provider has as many at least.
ADDED_TOKENS = 2_500.0
ADDED_BY = {Learning.HOSTED: Modality.HOSTED, Learning.STATE: Modality.STATE}
_MOST_TOOLS = 1_000  # no provider takes as many
_OWN = frozenset(("function", "custom", "namespace"))
_OWN_OF_GEMINI = frozenset(("functionDeclarations", "function_declarations"))
_HOSTED = frozenset(
    ("web_search_options", "search_parameters", "search_settings", "plugins", "mcp_servers")
)
_STATE = frozenset(
    (
        *("previous_response_id", "conversation", "cachedContent", "cached_content"),
        *("context_management", "container"),
    )
)
_TELLING = TOOLS | _HOSTED | _STATE | {"prompt"}


def tools_in(body: Mapping[str, Any]) -> list[Any]:
    """All tools that a request names."""
    if TOOLS.isdisjoint(body):
        return []
    found: list[Any] = []
    for name in TOOLS:
        some = body.get(name)
        if some:
            found += some if type(some) is list else (some,)
    return found


def learning_of(dialect: Dialect, body: Mapping[str, Any], tools: list[Any]) -> Learning:
    """With which calls a request is to be learned from, its files aside."""
    if _TELLING.isdisjoint(body):
        return Learning.TEXT
    for tool in islice(tools, _MOST_TOOLS):
        if _is_hosted(dialect, tool):
            return Learning.HOSTED
    if not _HOSTED.isdisjoint(body) and any(map(body.get, _HOSTED)):
        return Learning.HOSTED
    if not _STATE.isdisjoint(body) and any(map(body.get, _STATE)):
        return Learning.STATE
    # A prompt that is an object is one that the provider keeps.
    return Learning.STATE if type(body.get("prompt")) is dict else Learning.TEXT


def _is_hosted(dialect: Dialect, tool: Any) -> bool:
    if type(tool) is not dict:
        return False
    if dialect is Dialect.GEMINI:
        return not tool.keys() <= _OWN_OF_GEMINI
    kind = tool.get("type")
    return type(kind) is str and kind not in _OWN
