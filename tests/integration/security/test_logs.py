"""No key of ours or of a client is in any line of the log, whatever fails: all that is written in
a session of every route and every failure, at its most talkative, is searched for marked keys."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from io import StringIO
from typing import Any, Literal

import aiohttp
import pytest
import structlog
from yarl import URL

from tests.gateway import Gateway, Opener
from tests.integration.rivals.routes import NATIVE, OWN, Route
from tests.integration.tenants.asking import key_of
from tests.waiting import wait_until
from tidegate.spine.native import Relay
from tidegate.telemetry.logging import configure_logging

OURS = "plain-secret-of-the-upstream-0001"  # of a shape that no pattern knows
ADMIN = "plain-secret-of-the-admin-0002"
WEBHOOKS = "whsec_bWFya2VkLXNlY3JldC1vZi13ZWJob29rcw=="
THEIRS = "sk-secret-of-a-client-0003"
COOKIE = "secret-of-a-browser-0004"
PROMPT = "Say hello"
# A job whose key the provider refused is tried again after a minute.
SOON = "UPDATE requests SET not_before = now() WHERE not_before > now()"
FAULTS = ("forbidden", "unauthorized", "internal", "cut", "garbage", "error_in_stream", "throttled")


@pytest.fixture(params=["json", "console"])
def written(request: pytest.FixtureRequest) -> Iterator[StringIO]:
    """All that is logged, from level debug on."""
    root, text = logging.getLogger(), StringIO()
    level, style = root.level, request.param
    chosen: Literal["json", "console"] = "json" if style == "json" else "console"
    configure_logging(chosen, "debug", process="test")
    (handler,) = root.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(text)
    yield text
    root.removeHandler(handler)
    root.setLevel(level)
    structlog.reset_defaults()


async def _was_tried(gateway: Gateway, written: StringIO, request_id: str) -> bool:
    """A line names it beside its request's, or it waits for the upstream."""
    if written.getvalue().count(request_id) >= 2:
        return True
    waits = "SELECT not_before IS NOT NULL FROM requests WHERE id = $1::uuid"
    if await gateway.database.fetchval(waits, request_id):
        return True
    # An earlier one may have come back and found the key refused, for a minute, or been throttled.
    await _end_pauses(gateway)
    return False


async def _end_pauses(gateway: Gateway) -> None:
    """End what holds calls up: the upstream's gate, and pauses of limits."""
    await gateway.services.spine.health["gemini"].open()
    for limit in ("kind:text_only", *gateway.services.limiter.pauses()):
        await gateway.services.limiter.resume(limit)


async def ask(gateway: Gateway, route: Route, shown: dict[str, Any]) -> None:
    """With the keys in `shown`; only what is logged matters here."""
    headers = {**route.headers, "x-tidegate-deadline-ms": "50", **shown["headers"]}
    url = gateway.url + route.path
    url += ("&" if "?" in url else "?") + shown["query"]
    try:
        async with gateway.http.request(
            route.method, url, headers=headers, **route.payload()
        ) as answer:
            seen = await answer.read()
            assert OURS.encode() not in seen
    except aiohttp.ClientError:
        return


@pytest.mark.slow
async def test_no_key_is_in_any_line_whatever_fails(
    open_gateway: Opener, written: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(
        auth="on",
        gemini_api_key=OURS,
        admin_token=ADMIN,
        webhook_secret=WEBHOOKS,
        max_attempts=1,
        semaphore_timeout=5,
        claim_lease_ms=5_000,
    )
    made = await key_of(gateway, "acme")
    key = made["Authorization"].removeprefix("Bearer ")
    secrets = (OURS, ADMIN, WEBHOOKS, THEIRS, COOKIE, key[:-1], key.rpartition("_")[2])
    ways = [
        {"headers": {**made, "Cookie": f"a={COOKIE}"}, "query": "a=b"},
        {"headers": {"x-api-key": key}, "query": f"key={key}"},
        {"headers": {"x-goog-api-key": key, "api-key": THEIRS}, "query": f"access_token={THEIRS}"},
        {"headers": {"Authorization": f"Bearer {THEIRS}"}, "query": f"api_key={THEIRS}"},
        {"headers": {"Authorization": f"Bearer {key[:-1]}"}, "query": "a=b"},
    ]
    routes = (*NATIVE, *OWN)
    for number, fault in enumerate(("", *FAULTS)):
        if fault:
            await gateway.upstream.set_fault(fault)
            await gateway.upstream.set_fault(fault, kind="other")
        for route in routes[number % 2 :: 2]:
            await ask(gateway, route, ways[number % len(ways)])
            await _end_pauses(gateway)
        async with gateway.http.post(
            f"{gateway.url}/submit?key={key}", json={"data": PROMPT, "type": "text_only"}
        ) as response:
            answer = await response.json()
            assert response.status == 202
        await wait_until(partial(_was_tried, gateway, written, answer["request_id"]), 20)
        await gateway.upstream.clear_faults()
        await gateway.stop_worker()  # the next one knows of no upstream that is out
        gateway.start_worker()
    await gateway.stop_worker()
    await gateway.database.execute(SOON)
    gateway.start_worker()
    await wait_until(lambda: written.getvalue().count("job_done") > len(FAULTS), 60)
    for path in (f"/{key}", f"/v1/{key}", f"/v1/models/{key}", f"/status/{key}", "/admin/keys"):
        async with gateway.http.get(
            gateway.url + path, headers={"Authorization": f"Bearer {ADMIN}"}
        ):
            pass

    async def fails(*_given: Any, **named: Any) -> None:
        raise RuntimeError(f"key={key} x-goog-api-key: {OURS} authorization: Bearer {THEIRS}")

    monkeypatch.setattr(Relay, "run", fails)
    for way in ways:
        await ask(gateway, routes[0], way)
    await wait_until(lambda: "internal_error" in written.getvalue(), 20)
    said = written.getvalue()
    assert said.count("request_done") > 100
    assert said.count("job_done") >= len(FAULTS)
    found = {
        secret: [line[:400] for line in said.splitlines() if secret in line][:3]
        for secret in secrets
        if secret in said
    }
    assert found == {}
    assert PROMPT not in said, "nor what people ask"


async def test_no_key_is_in_the_record(open_gateway: Opener) -> None:
    """Neither the row of a call nor its bodies hold one."""
    gateway = await open_gateway(worker=False, auth="on", gemini_api_key=OURS)
    made = await key_of(gateway, "acme")
    key = made["Authorization"].removeprefix("Bearer ")
    await gateway.upstream.set_fault("unauthorized", count=1)
    for _ in range(2):
        async with gateway.http.post(
            f"{gateway.url}{NATIVE[0].path}?key={key}", json=NATIVE[0].body, headers=made
        ) as response:
            await response.read()
            request_id = response.headers["x-tidegate-request-id"]
        row = await gateway.audit(request_id)
        assert key.rpartition("_")[2] not in str(row)
        assert OURS not in str(row)
        await gateway.services.spine.health["gemini"].open()


async def test_no_escape_sequence_of_a_stranger_reaches_a_line(
    open_gateway: Opener, written: StringIO
) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    ends = ("%1b[31mRED%1b[0m", "%C2%9B2J", "%E2%80%AEtxt", "%E2%81%A6", "%0d%0a%1b]0;t%07")
    for path in ("/", "/v1/", "/status/", "/v1beta/models/"):
        for end in ends:
            url = URL(f"{gateway.url}{path}x{end}", encoded=True)
            async with gateway.http.get(url) as answer:
                assert answer.status in (401, 404, 422)
    lines = written.getvalue

    def all_there() -> bool:
        return lines().count("request_done") >= 4 * len(ends)

    await wait_until(all_there, 20, "the lines")
    assert [mark for mark in "\x1b\x07\x9b\u202e\u2066\r" if mark in lines()] == []
    assert "RED" in lines()
