"""Files of Anthropic by its SDK, between two tenants and two upstreams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Opener
from tests.integration.native.test_upstreams import second
from tests.integration.tenants.asking import key_of
from tidegate.emulator.server import Emulator

__all__ = ["second"]

POLICY = """
[upstreams.gemini]
models = ["claude-*"]
[upstreams.claude]
dialects = {{ anthropic = "{url}" }}
key = "SECOND_KEY"
models = ["claude-*"]
[[routes]]
model = "claude-elsewhere"
try = ["gemini"]
"""


def naming(file_id: str) -> list[dict[str, Any]]:
    source = {"type": "file", "file_id": file_id}
    return [{"role": "user", "content": [{"type": "document", "source": source}]}]


async def test_files_are_their_owner_s_alone_and_used_where_they_live(
    open_gateway: Opener, second: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anthropic import AsyncAnthropic, BadRequestError, NotFoundError  # 3,000 modules

    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY.format(url=second.url))
    gateway = await open_gateway(worker=False, auth="on", tidegate_policy=policy)
    keys = [await key_of(gateway, tenant) for tenant in ("mine", "theirs")]
    mine, theirs = [
        AsyncAnthropic(
            base_url=gateway.url,
            api_key=shown["Authorization"].removeprefix("Bearer "),
            max_retries=0,
        )
        for shown in keys
    ]
    async with mine, theirs:
        data = b"%PDF-1.4 " + b"x" * 300_000
        made = await mine.files.upload(file=("a.pdf", data, "application/pdf"))
        assert (made.filename, made.size_bytes) == ("a.pdf", len(data))
        rest = [await mine.files.upload(file=(f"{n}.txt", b"y", "text/plain")) for n in range(2)]
        other = await theirs.beta.files.upload(file=("b.txt", b"z", "text/plain"))
        ids = [one.id for one in (*reversed(rest), made)]
        assert [one.id async for one in mine.files.list(limit=2)] == ids
        assert [one.id async for one in mine.beta.files.list(limit=1)] == ids
        chosen = mine.files.list(ids=[made.id, other.id])
        assert [one.id async for one in chosen] == [made.id]
        assert [one.id async for one in theirs.files.list()] == [other.id]
        assert (await mine.files.retrieve_metadata(made.id)).id == made.id
        with pytest.raises(BadRequestError, match="is not downloadable"):
            await mine.files.download(made.id)
        asked: Any = {"model": "claude-x", "max_tokens": 50, "messages": naming(made.id)}
        assert (await mine.messages.create(**asked)).usage.output_tokens
        tool = {"type": "tool_use", "id": "t", "name": "open", "input": {"file_id": "a-word"}}
        said = [*naming(made.id), {"role": "assistant", "content": [tool]}]
        assert await mine.messages.create(**{**asked, "messages": said})
        assert await gateway.calls() == []
        with pytest.raises(BadRequestError, match="lives at the upstream 'claude'"):
            await mine.messages.create(**{**asked, "model": "claude-elsewhere"})
        for call in (
            theirs.messages.create(**asked),
            theirs.messages.count_tokens(model="claude-x", messages=asked["messages"]),
            theirs.files.retrieve_metadata(made.id),
            theirs.files.download(made.id),
            theirs.files.delete(made.id),
            mine.files.retrieve_metadata("file_of_nobody"),
        ):
            with pytest.raises(NotFoundError):
                await call
        # A field that stands twice: servers do not agree on which one is meant.
        twice = b'{"type":"file","file_id":"%b","file_id":"%b"}'
        source = twice % (made.id.encode(), other.id.encode())
        block = b'[{"role":"user","content":[{"type":"document","source":%b}]}]' % source
        body = b'{"model":"claude-x","max_tokens":5,"messages":%b}' % block
        url, shown = f"{gateway.url}/v1/messages", keys[1]
        async with gateway.http.post(url, data=body, headers=shown) as response:
            assert response.status == 404
        await mine.files.delete(made.id)
        with pytest.raises(NotFoundError):
            await mine.files.retrieve_metadata(made.id)
        assert [one.id async for one in mine.files.list()] == ids[:2]
