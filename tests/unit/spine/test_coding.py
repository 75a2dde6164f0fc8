"""Answers that an upstream compressed unasked."""

from __future__ import annotations

import gzip
import zlib

import pytest

from tidegate.record import MOST_DECODED_BYTES, PieceDecoder, coding_of, decoded

TEXT = b'{"usage": {"prompt_tokens": 5}}' * 100


def raw(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        (b"gzip", gzip.compress(TEXT)),
        (b"x-gzip", gzip.compress(TEXT)),
        (b"deflate", zlib.compress(TEXT)),
        (b"deflate", raw(TEXT)),
        (b"gzip", b"".join(gzip.compress(TEXT[at : at + 310]) for at in range(0, 3_100, 310))),
    ],
    # What gzip writes has the time in it: test processes that collect it in different seconds
    # would not have the same tests.
    ids=["gzip", "x-gzip", "deflate", "deflate without a head", "gzip in ten members"],
)
def test_it_is_read_and_so_is_as_much_as_came_of_it(coding: bytes, data: bytes) -> None:
    assert decoded(data, coding) == TEXT
    assert TEXT.startswith(decoded(data[:-9], coding))


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        (b"br", TEXT),
        (b"gzip", TEXT),
        (b"gzip", b""),
        (b"gzip", gzip.compress(bytes(MOST_DECODED_BYTES + 1))),
        (b"gzip", bytes(5_000_000)),
        (b"gzip", gzip.compress(bytes(MOST_DECODED_BYTES // 2 + 1)) * 2),
        (b"gzip", gzip.compress(b"") * 20_000),
    ],
    ids=["another coding", "no gzip", "nothing", "too much", "zeros", "too much in two", "no end"],
)
def test_what_cannot_be_read_is_nothing(coding: bytes, data: bytes) -> None:
    assert decoded(data, coding) == b""


def test_what_follows_the_last_member_hides_nothing() -> None:
    assert decoded(gzip.compress(TEXT) + bytes(512), b"gzip") == TEXT


def test_which_coding_it_is_in() -> None:
    assert coding_of([(b"Content-Encoding", b" GZIP ")]) == b"gzip"
    assert coding_of([(b"content-encoding", b"identity")]) == b""
    assert coding_of([(b"content-type", b"gzip")]) == b""
    assert coding_of([(b"content-encoding", b"gzip, identity")]) == b"gzip"
    assert coding_of([(b"content-encoding", b"Identity , deflate,GZIP")]) == b"deflate, gzip"


def test_codings_are_undone_from_the_last_to_the_first() -> None:
    assert decoded(gzip.compress(zlib.compress(TEXT)), b"deflate, gzip") == TEXT
    assert decoded(gzip.compress(TEXT), b"br, gzip") == b""
    assert decoded(gzip.compress(gzip.compress(gzip.compress(TEXT))), b"gzip, gzip, gzip") == b""


@pytest.mark.parametrize("size_bytes", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("coding", "data"),
    [
        (b"gzip", gzip.compress(TEXT, mtime=0)),
        (b"deflate", zlib.compress(TEXT)),
        (b"deflate", raw(TEXT)),
        (b"gzip", gzip.compress(b"", mtime=0) + gzip.compress(TEXT, mtime=0)),
    ],
    ids=["gzip", "deflate", "deflate without a head", "gzip behind an empty member"],
)
def test_a_beginning_is_read_piece_by_piece(coding: bytes, data: bytes, size_bytes: int) -> None:
    reader = PieceDecoder(coding)
    pieces = [data[at : at + size_bytes] for at in range(0, len(data), size_bytes)]
    assert b"".join(map(reader.take, pieces)) == TEXT
    assert reader.reads


def test_a_beginning_that_cannot_be_read_is_given_up() -> None:
    for coding, data in (
        (b"br", TEXT),
        (b"gzip", TEXT),
        (b"deflate", TEXT),
        (b"gzip", gzip.compress(bytes(5_000_000), mtime=0)),
        (b"gzip", gzip.compress(bytes(900_000), mtime=0) * 2),
        (b"gzip", gzip.compress(b"", mtime=0) * 200),
    ):
        reader = PieceDecoder(coding)
        reader.take(data)
        assert not reader.reads
        assert reader.take(b"more") == b""
