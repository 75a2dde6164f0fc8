"""In which encoding the bodies of native calls are kept."""

from __future__ import annotations

import zlib
from base64 import b64encode
from random import Random

import pytest

from tidegate.store.audit import unpack
from tidegate.store.blobs import as_kept


@pytest.mark.parametrize("text", [b"Say again " * 100_000, b"Say it once"])
def test_text_is_compressed(text: bytes) -> None:
    encoding, data = as_kept(text)
    assert (encoding, zlib.decompress(data)) == ("zlib-raw", text)


def test_a_large_file_in_base64_stays_as_it_is() -> None:
    body = b'{"model":"m","file":"%b"}' % b64encode(Random(1).randbytes(1_000_000))
    assert as_kept(body) == ("raw", body)
    assert unpack("raw", body) == body.decode()
