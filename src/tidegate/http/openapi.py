"""The API's description as it is true of us, from what FastAPI makes of the routes.

Invariant: an error is described as problem JSON, and only as that; FastAPI's own shape of invalid
input, which no client of ours ever sees, is not in it.
"""

from __future__ import annotations

from typing import Any

from tidegate.http.problems import MEDIA_TYPE

_SCHEMES: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, tg_..."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "x-goog-api-key": {"type": "apiKey", "in": "header", "name": "x-goog-api-key"},
    "key": {"type": "apiKey", "in": "query", "name": "key"},
}
_FOREIGN = ("HTTPValidationError", "ValidationError")


def described(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with its error responses put right; changed in place."""
    for path in schema["paths"].values():
        for operation in path.values():
            responses = operation["responses"]
            for status, response in list(responses.items()):
                content = response.get("content", {})
                if MEDIA_TYPE in content:
                    content.pop("application/json", None)
                elif "HTTPValidationError" in str(content):
                    del responses[status]
    for name in _FOREIGN:
        schema["components"]["schemas"].pop(name, None)
    schema["components"]["securitySchemes"] = _SCHEMES
    # Where AUTH asks for keys; an empty entry says that it may not.
    schema["security"] = [*({name: []} for name in _SCHEMES), {}]
    return schema
