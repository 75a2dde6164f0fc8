"""Large files in the body of a call that the SDK writes."""

from __future__ import annotations

from base64 import urlsafe_b64encode

import orjson
import pytest

from tidegate.call import Media
from tidegate.upstream.gemini_transport import CallScope
from tidegate.upstream.transport import RepeatableBody

SMALL = b"small \xfb\xff" * 100


def written(*files: bytes) -> bytes:
    """As the SDK writes it."""
    parts = [{"inlineData": {"data": urlsafe_b64encode(file).decode()}} for file in files]
    return orjson.dumps({"contents": [{"parts": [*parts, {"text": "What is it?"}]}]})


async def read(body: RepeatableBody) -> bytes:
    pieces = [piece async for piece in body.pieces()]
    assert max(map(len, pieces)) < 300_000, "no step of the event loop encodes a whole file"
    return b"".join(pieces)


@pytest.mark.parametrize("extra_bytes", [0, 1, 2])
async def test_a_large_file_is_sent_as_the_sdk_would_have_written_it(extra_bytes: int) -> None:
    scope = CallScope(1_000)
    files = [b"\xfb\xff\x01" * 200_000 + b"x" * extra_bytes, SMALL, bytes(300_000 + extra_bytes)]
    given = [scope.stand_in(Media("image/png", file, "a.png")) for file in files]
    assert [len(one.data) < 100 for one in given] == [True, False, True]
    body = scope.with_files(written(*(one.data for one in given)))
    assert isinstance(body, RepeatableBody)
    for _ in range(2):  # a request that crossed with the end of its connection is sent again
        assert await read(body) == written(*files)
    assert body.size_bytes == len(written(*files))
    assert scope.with_files(b"another body") == b"another body"
    assert scope.with_files(None) is None


async def test_small_files_go_by_the_sdk() -> None:
    scope = CallScope(1_000)
    given = scope.stand_in(Media("image/png", SMALL, "a.png"))
    assert given.data == SMALL
    assert scope.with_files(written(given.data)) == written(SMALL)
