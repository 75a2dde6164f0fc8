"""FastAPI: one limiter for the life of the process; a caller that waits too long gets a 503.

uvicorn --workers 4 --app-dir examples fastapi_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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


@app.exception_handler(AdmissionError)
async def refused(_request: Request, error: AdmissionError) -> JSONResponse:
    """`limit` says for what it waited, `retry_after_ms` when there is room."""
    headers = {"retry-after": str(-(-error.retry_after_ms // 1000))}
    return JSONResponse({"detail": str(error), "limit": error.limit}, 503, headers)


@app.get("/ask")
async def ask(request: Request, prompt: str, x_team: str = Header("default")) -> dict[str, str]:
    limiter: Limiter = request.app.state.limiter
    # Teams share what is free; a client that disconnects leaves the queue.
    async with limiter.acquire("llm", tenant=x_team, timeout=10):
        return {"answer": f"You said: {prompt}"}  # one call to the provider
