"""Multipart bodies: files kept whole, limits in force on the way, and nothing left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect

from tests.unit.http.asgi import (
    BOUNDARY,
    MULTIPART,
    PDF,
    PNG,
    Part,
    Sender,
    file,
    files_under,
    multipart,
    request,
    settings,
    text,
)
from tests.waiting import wait_until
from tidegate.call import Kind
from tidegate.errors import InvalidRequest, PayloadTooLarge, StoreUnavailable, UnsupportedMedia
from tidegate.http.body import MEMORY_BYTES
from tidegate.http.submission import discard, read_submission
from tidegate.settings import Config
from tidegate.store.blobs import Blobs

LARGE = b"line of text\n" * (MEMORY_BYTES // 4)


class FailingBlobs(Blobs):
    """A real store whose second put fails after it has written."""

    puts = 0

    async def put(self, key: str, source: bytes | Path) -> None:
        await super().put(key, source)
        self.puts += 1
        if self.puts == 2:
            raise StoreUnavailable("the disk is full")


class SlowBlobs(Blobs):
    """A real store whose puts wait for `go`, as on a slow network."""

    def hold(self) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def put(self, key: str, source: bytes | Path) -> None:
        self.begun.set()
        await self.go.wait()
        await super().put(key, source)


async def test_texts_and_files_come_out_whole(config: Config, blobs: Blobs, tmp_path: Path) -> None:
    body = multipart(
        text("text", "describe é"),
        file(PDF, "paper.pdf", "application/pdf"),
        ("files", LARGE, "notes.md", "application/octet-stream"),
        text("type", "multi_modal"),
        text("priority", " -5 "),
        text("model", ""),
    )
    got = await read_submission(request(body, MULTIPART), config, blobs)
    assert (got.prompt, got.kind, got.priority) == ("describe é", Kind.MULTI_MODAL, -5)
    assert got.model is None
    assert [(a.name, a.mime_type, a.size_bytes) for a in got.attachments] == [
        ("paper.pdf", "application/pdf", len(PDF)),
        ("notes.md", "text/markdown", len(LARGE)),
    ]
    assert [await blobs.get(a.blob_key) for a in got.attachments] == [PDF, LARGE]
    assert files_under(tmp_path / "tmp") == []
    await discard(got, blobs)
    assert files_under(tmp_path) == []


async def test_a_file_alone_is_enough(config: Config, blobs: Blobs) -> None:
    got = await read_submission(request(multipart(file(PNG, "a.png")), MULTIPART), config, blobs)
    assert (got.prompt, got.attachments[0].mime_type) == ("", "image/png")


async def test_a_file_input_left_empty_in_a_browser_is_ignored(
    config: Config, blobs: Blobs
) -> None:
    nothing = file(b"", "", "application/octet-stream")
    body = multipart(text("data", "x"), nothing, nothing)
    got = await read_submission(request(body, MULTIPART), config, blobs)
    assert got.attachments == ()


async def test_a_file_name_cannot_lead_elsewhere(config: Config, blobs: Blobs) -> None:
    body = multipart(file(b"x", "../../etc/pass\twd%22.txt"))
    got = await read_submission(request(body, MULTIPART), config, blobs)
    assert got.attachments[0].name == 'passwd".txt'


PARTS = st.one_of(
    st.builds(text, st.sampled_from(["data", "type", "priority", "colour"]), st.text(max_size=20)),
    st.builds(
        file,
        st.one_of(
            st.binary(max_size=300),
            st.just(b"\r\n--frontie\r\n--front\r--frontier\r\n-"),
            st.just(PNG),
        ),
        st.sampled_from(["a.txt", "b.png", ""]),
        st.sampled_from([None, "text/plain", "image/png"]),
    ),
)


@examples(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(PARTS, max_size=4), cuts=st.lists(st.integers(1, 60), min_size=1), end=st.data()
)
async def test_the_pieces_in_which_a_body_arrives_do_not_matter(
    parts: list[Part], cuts: list[int], end: st.DataObject, tmp_path: Path
) -> None:
    whole = multipart(*parts)
    whole = whole[: end.draw(st.sampled_from([len(whole), len(whole) - 7]))]
    pieces: list[bytes] = []
    at = 0
    while at < len(whole):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(whole[at : at + size])
        at += size
    config, blobs = settings(tmp_path), Blobs.from_url("", tmp_path)
    assert await outcome([whole], config, blobs) == await outcome(pieces, config, blobs)
    assert files_under(tmp_path) == []


async def outcome(pieces: list[bytes], config: Config, blobs: Blobs) -> object:
    try:
        got = await read_submission(request(Sender(pieces), MULTIPART), config, blobs)
    except InvalidRequest as refusal:
        return type(refusal), refusal.field, refusal.allowed
    files = [(a.name, a.mime_type, await blobs.get(a.blob_key)) for a in got.attachments]
    await discard(got, blobs)
    return got.prompt, got.kind, got.priority, files


@pytest.mark.parametrize("space", ["\x1f", "\xa0", "\u2003"])
async def test_a_number_may_have_any_space_around_it(
    space: str, config: Config, blobs: Blobs
) -> None:
    body = multipart(text("data", "x"), text("priority", f"{space}7{space}"))
    got = await read_submission(request(body, MULTIPART), config, blobs)
    assert got.priority == 7


async def test_multipart_without_a_boundary_is_refused(config: Config, blobs: Blobs) -> None:
    with pytest.raises(InvalidRequest, match="without a boundary") as refusal:
        await read_submission(request(b"x", "multipart/form-data"), config, blobs)
    assert refusal.value.field == "Content-Type"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "empty"),
        (multipart(text("data", "x"))[:-6], "ends before"),
        (multipart(text("data", "x"), file(PNG))[:120], "ends before"),
        (b"--other\r\n\r\n", "malformed"),
        (b'{"data": "x"}', "malformed"),
        (f"--{BOUNDARY}\r\nno header\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(), "malformed"),
        (f"--{BOUNDARY}\r\nX-A: b\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(), "no name"),
        (f"--{BOUNDARY}\r\nX-A: {'b' * 9000}\r\n\r\nx\r\n".encode(), "malformed"),
        (f"--{BOUNDARY}\r\nX-A: b\r\n".encode() + b"X-A: b\r\n" * 20, "malformed"),
    ],
)
async def test_a_malformed_multipart_body_is_refused(
    body: bytes, said: str, config: Config, blobs: Blobs, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await read_submission(request(body, MULTIPART), config, blobs)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    ("part", "field", "said"),
    [
        (("file", b"hello", None, None), "file", "must be a file"),
        (("file\"; filename*=\"UTF-8''a.txt", b"x", None, None), "file", "only in filename."),
        (("data", b"hello", "prompt.txt", None), "data", "not a file"),
        (text("data", "again"), "data", "more than once"),
        (text("colour", "red"), "colour", "no field"),
        (("type", b"\xff", None, None), "type", "UTF-8"),
        (text("priority", "high"), "priority", "whole number"),
        (text("type", "poem"), "type", "no type"),
    ],
)
async def test_a_wrong_part_is_refused_by_its_name(
    part: Part, field: str, said: str, config: Config, blobs: Blobs, tmp_path: Path
) -> None:
    body = multipart(file(PNG, "a.png"), text("data", "x"), part)
    with pytest.raises(InvalidRequest, match=said) as refusal:
        await read_submission(request(body, MULTIPART), config, blobs)
    assert refusal.value.field == field
    assert files_under(tmp_path) == []


async def test_no_prompt_and_no_file_is_refused_in_a_form_too(config: Config, blobs: Blobs) -> None:
    with pytest.raises(InvalidRequest, match="neither a prompt nor a file"):
        await read_submission(request(multipart(text("data", " ")), MULTIPART), config, blobs)


async def test_a_file_over_the_limit_is_refused_while_it_arrives(
    blobs: Blobs, tmp_path: Path
) -> None:
    config = settings(tmp_path, max_file_bytes=1_000_000)
    head, tail = multipart(file(b"@", "a.txt")).split(b"@")
    sender = Sender([head, *(b"x" * 100_000 for _ in range(500)), tail])
    with pytest.raises(PayloadTooLarge, match=r"'a\.txt' is larger than 1000000 bytes"):
        await read_submission(request(sender, MULTIPART), config, blobs)
    assert sender.taken == 12
    assert files_under(tmp_path) == []


async def test_a_body_over_the_limit_is_refused_by_its_announced_length(
    blobs: Blobs, tmp_path: Path
) -> None:
    config = settings(tmp_path, max_body_bytes=1_000)
    sender = Sender([b"x"])
    announced = request(sender, MULTIPART, headers=[("content-length", "1001")])
    with pytest.raises(PayloadTooLarge, match="larger than 1000 bytes"):
        await read_submission(announced, config, blobs)
    assert sender.taken == 0


async def test_a_body_over_the_limit_is_refused_while_it_arrives(
    blobs: Blobs, tmp_path: Path
) -> None:
    config = settings(tmp_path, max_body_bytes=100_000)
    sender = Sender([multipart(file(b"x" * 10_000, f"{n}.txt"))[:-16] for n in range(100)])
    with pytest.raises(PayloadTooLarge, match="larger than 100000 bytes"):
        await read_submission(request(sender, MULTIPART), config, blobs)
    assert sender.taken == 10
    assert files_under(tmp_path) == []


async def test_more_files_than_allowed_are_refused_while_they_arrive(
    blobs: Blobs, tmp_path: Path
) -> None:
    config = settings(tmp_path, max_files=2)
    pieces = [multipart(file(PNG, f"{n}.png"))[: -len(BOUNDARY) - 6] for n in range(50)]
    sender = Sender(pieces)
    with pytest.raises(PayloadTooLarge, match="more than 2 files"):
        await read_submission(request(sender, MULTIPART), config, blobs)
    assert sender.taken == 3
    assert files_under(tmp_path) == []


async def test_countless_parts_in_one_piece_are_refused(config: Config, blobs: Blobs) -> None:
    body = multipart(*(file(b"", "", None) for _ in range(500)))
    with pytest.raises(PayloadTooLarge, match="files"):
        await read_submission(request(body, MULTIPART), config, blobs)


@pytest.mark.parametrize(("char", "fits"), [("x", 10), ("🦊", 10)])
async def test_a_prompt_over_the_limit_is_refused_while_it_arrives(
    char: str, fits: int, blobs: Blobs, tmp_path: Path
) -> None:
    config = settings(tmp_path, max_prompt_chars=fits)
    body = multipart(text("text", char * fits))
    assert (await read_submission(request(body, MULTIPART), config, blobs)).prompt == char * fits
    long = multipart(text("text", char * (fits + 1)))
    with pytest.raises(PayloadTooLarge, match="longer than 10 characters"):
        await read_submission(request(long, MULTIPART), config, blobs)
    sender = Sender([multipart(text("text", "x"))[:-17], *(b"x" * 100 for _ in range(50))])
    with pytest.raises(PayloadTooLarge, match="longer than 10 characters"):
        await read_submission(request(sender, MULTIPART), config, blobs)
    assert sender.taken <= 3


async def test_a_file_of_the_wrong_type_is_refused_by_its_first_bytes(
    config: Config, blobs: Blobs, tmp_path: Path
) -> None:
    head, tail = multipart(file(b"@", "photo.png", "image/png")).split(b"@")
    sender = Sender([head, *(b"just some text\n" * 1000 for _ in range(100)), tail])
    with pytest.raises(UnsupportedMedia, match=r"'photo\.png' was sent as image/png"):
        await read_submission(request(sender, MULTIPART), config, blobs)
    assert sender.taken == 2
    assert files_under(tmp_path) == []


async def test_a_client_that_leaves_leaves_nothing_behind(
    config: Config, blobs: Blobs, tmp_path: Path
) -> None:
    sender = Sender([multipart(file(LARGE, "a.txt"), file(LARGE, "b.txt"))[:-100]], then="leave")
    with pytest.raises(ClientDisconnect):
        await read_submission(request(sender, MULTIPART), config, blobs)
    assert files_under(tmp_path) == []


async def test_a_blob_store_that_fails_leaves_nothing_behind(
    config: Config, tmp_path: Path
) -> None:
    body = multipart(file(PNG, "a.png"), file(PNG, "b.png"), file(LARGE, "c.txt"))
    with pytest.raises(StoreUnavailable):
        await read_submission(request(body, MULTIPART), config, FailingBlobs.from_url("", tmp_path))
    assert files_under(tmp_path) == []


async def test_cancelled_while_a_file_is_put_away_nothing_is_left_behind(
    config: Config, tmp_path: Path
) -> None:
    blobs = SlowBlobs.from_url("", tmp_path)
    assert isinstance(blobs, SlowBlobs)
    blobs.hold()
    body = multipart(file(LARGE, "a.txt"), file(PNG, "b.png"))
    reading = asyncio.create_task(read_submission(request(body, MULTIPART), config, blobs))
    await blobs.begun.wait()
    reading.cancel()
    asyncio.get_running_loop().call_later(0.05, blobs.go.set)
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert files_under(tmp_path) == []


async def test_cancelled_while_a_file_arrives_nothing_is_left_behind(
    config: Config, blobs: Blobs, tmp_path: Path
) -> None:
    sender = Sender([multipart(file(LARGE, "a.txt"))[:-100]], then="silence")
    reading = asyncio.create_task(read_submission(request(sender, MULTIPART), config, blobs))
    await wait_until(lambda: files_under(tmp_path / "tmp"), what="the file is being spooled")
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert files_under(tmp_path) == []
