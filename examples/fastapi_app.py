"""FastAPI: one limiter for the life of the process; a caller that waits too long gets a 503.

uvicorn --workers 4 --app-dir examples fastapi_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse

from tidegate.limiter import AdmissionError, Limiter

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with Limiter.from_url(REDIS_URL, pool="example-fastapi", policy={"llm": 8}) as limiter:
        app.state.limiter = limiter
        yield


app = FastAPI(lifespan=lifespan)
# As a tenant may be called; a client that sends another name gets a 422.
Team = Annotated[str, Header(pattern=r"^[^\s|{}]{1,200}$")]


@app.exception_handler(AdmissionError)
async def refused(_request: Request, error: AdmissionError) -> JSONResponse:
    """`limit` says for what it waited, `retry_after_ms` when there is room."""
    headers = {"retry-after": str(-(-error.retry_after_ms // 1000))}
    return JSONResponse({"detail": str(error), "limit": error.limit}, 503, headers)


@app.get("/ask")
async def ask(request: Request, prompt: str, x_team: Team = "default") -> dict[str, str]:
    limiter: Limiter = request.app.state.limiter
    # Teams share what is free. FastAPI does not cancel this when its client disconnects: the call
    # stays in the queue, so its timeout is short.
    async with limiter.acquire("llm", tenant=x_team, timeout=10):
        return {"answer": f"You said: {prompt}"}  # one call to the provider
