"""Private names of uvicorn that the HTTP protocol uses.

uvicorn >= 0.35, < 0.55. Guarded by `tests/integration/http_input/test_uvicorn_internals.py`.
"""

from __future__ import annotations

from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    Scope,
)
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

__all__ = [
    "STATUS_LINE",
    "ASGI3Application",
    "ASGIReceiveCallable",
    "ASGISendCallable",
    "ASGISendEvent",
    "HttpToolsProtocol",
    "RequestResponseCycle",
    "Scope",
]
