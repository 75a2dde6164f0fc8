"""One line of the log for each request, whatever route it takes; with its tenant and its trace."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.gateway import Opener
from tests.integration.observability.test_metrics import chat
from tests.integration.observability.test_traces import PARENT, TRACE
from tests.loglines import Lines, lines
from tests.waiting import wait_until

__all__ = ["lines"]
SECRET = "AIzaSyOfAClientThatIsSecret0123456789abc"
ID = "019abf3e-7c1e-7b52-9f0e-0e1f5a3c2d4b"


async def test_every_route_writes_one_line_and_no_secret(
    open_gateway: Opener, lines: Lines
) -> None:
    gateway = await open_gateway()
    async with gateway.http.get(f"{gateway.url}/openapi.json") as response:
        document = await response.json()
    asked: Counter[tuple[str, str]] = Counter()
    routes = [
        (method.upper(), path.replace("{request_id}", ID).replace("{limit_id}", "kind:text_only"))
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    ]
    native = [("POST", f"/v1/{path}") for path in ("chat/completions", "responses", "nothing")]
    native += [("GET", "/v1/models"), ("POST", "/v1beta/models/m:generateContent")]
    native += [("POST", "/v1/messages"), ("GET", "/v1/batches"), ("POST", "/v1/files")]
    headers = {"traceparent": PARENT, "x-goog-api-key": SECRET}
    for method, path in [*routes, *native, ("GET", "/nowhere")]:
        url = f"{gateway.url}{path}?key={SECRET}"
        body: Any = chat("Hi") if path.startswith("/v1") else {"data": f"hello {SECRET}"}
        sent = {} if method in ("GET", "DELETE") else {"json": body}
        async with gateway.http.request(method, url, headers=headers, **sent) as response:
            await response.read()
        asked[method, path] += 1

    def written() -> Counter[tuple[str, str]]:
        done = [line for line in lines() if line["event"] == "request_done"]
        return Counter((line["method"], line["path"]) for line in done)

    await wait_until(lambda: sum(written().values()) > sum(asked.values()), 20, "all lines")
    assert written() - asked == Counter({("GET", "/openapi.json"): 1})
    assert not asked - written()
    assert SECRET not in repr(lines())
    await wait_until(
        lambda: [line for line in lines() if line["event"] == "job_done"], 20, "the job's line"
    )
    of_trace = {
        line.get("path", line["event"]) for line in lines() if line.get("trace_id") == TRACE
    }
    assert {"/submit", "/stream", "/v1/chat/completions", "job_done"} <= of_trace
    up = [line for line in lines() if line["event"] == "limiter_state" and line["state"] == "up"]
    assert {line["pool"] for line in up} == {"gemini"}, "several pools say the same"
    (job,) = [line for line in lines() if line["event"] == "job_done"]
    assert job["tenant"] == "default"
