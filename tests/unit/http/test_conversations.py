"""Names of conversations in the headers of native calls: ours, and those of agents."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from tidegate.call import ANYBODY, new_id
from tidegate.dialects.spec import Dialect, Endpoint, Operation
from tidegate.http.native import call_of
from tidegate.telemetry.tracing import Tracing

CHAT = Endpoint(Dialect.OPENAI, Operation.INFER, "/chat/completions")
MESSAGES = Endpoint(Dialect.ANTHROPIC, Operation.INFER, "/v1/messages")


def named(
    *headers: tuple[bytes, bytes], endpoint: Endpoint = CHAT, body: bytes = b"{}"
) -> str | None:
    scope: dict[str, Any] = {"method": "POST", "query_string": b"", "headers": list(headers)}
    call = call_of(
        scope,
        endpoint,
        body,
        ANYBODY,
        request_id=new_id(),
        received=(time.monotonic(), datetime.now(UTC)),
        usual_wait_ms=1_000,
        tracing=Tracing(),
    )
    return call.terms.conversation


@pytest.mark.parametrize(
    "header",
    [
        *(b"x-claude-code-session-id", b"x-session-id", b"x-session-affinity", b"session_id"),
        *(b"session-id", b"conversation_id", b"x-parent-session-id"),
        *(b"x-litellm-session-id", b"x-litellm-trace-id"),
    ],
)
def test_an_agents_session_is_a_conversation(header: bytes) -> None:
    assert named((b"accept", b"*/*"), (header, b" 0f7a-12 ")) == "0f7a-12"


def test_our_header_counts_before_an_agents_and_one_of_these_before_the_next() -> None:
    session, claude = (b"session_id", b"codex"), (b"x-claude-code-session-id", b"claude")
    assert named(session, claude) == named(claude, session) == "claude"
    assert named(claude, (b"x-tidegate-conversation", b"mine")) == "mine"


def test_a_subagent_of_opencode_spends_of_its_parents_session() -> None:
    own = ((b"x-session-affinity", b"ses_sub"), (b"x-session-id", b"ses_sub"))
    assert named(*own, (b"x-parent-session-id", b"ses_root")) == "ses_root"
    assert named(*own) == "ses_sub"


@pytest.mark.parametrize("value", [b"", b"  ", b"two\nlines", b"x" * 201])
def test_an_agents_header_that_is_no_name_is_passed_over(value: bytes) -> None:
    assert named((b"x-session-id", value)) is None


SESSION = "54c1eb09-bc4c-4d2f-98eb-6d2ab2d5e2fe"


@pytest.mark.parametrize(
    "user_id",
    [
        f"user_{'0a' * 32}_account__session_{SESSION}",
        f"user_{'0a' * 32}_account_{SESSION[::-1]}_session_{SESSION}",
        orjson.dumps({"device_id": "d", "account_uuid": "", "session_id": SESSION}).decode(),
    ],
)
def test_an_older_claude_code_names_its_session_in_its_body(user_id: str) -> None:
    said = {"role": "user", "content": f'"user_id": "user_0_account__session_{"1" * 36}"'}
    body = orjson.dumps({"messages": [said], "metadata": {"user_id": user_id}, "stream": True})
    assert named(endpoint=MESSAGES, body=body) == SESSION
    spaced = body.replace(b'"user_id":', b'"user_id" : ')
    assert named(endpoint=MESSAGES, body=spaced) == SESSION
    assert named(body=body) is None, "of another dialect"
    header = (b"x-claude-code-session-id", b"in a header")
    assert named(header, endpoint=MESSAGES, body=body) == "in a header"


@pytest.mark.parametrize("user_id", ["ann", "user_1", f"session_{SESSION}", '{"session_id":1}'])
def test_any_other_user_of_anthropics_is_no_session(user_id: str) -> None:
    body = orjson.dumps({"metadata": {"user_id": user_id}, "messages": []})
    assert named(endpoint=MESSAGES, body=body) is None
