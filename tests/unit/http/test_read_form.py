"""Forms of native calls: what admission reads of them, and which are refused."""

from __future__ import annotations

import wave
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.http.asgi import files_under
from tidegate.call import Kind
from tidegate.dialects import DIALECTS, endpoint_of
from tidegate.dialects.forms import MOST_PARTS, MediaForm, recording_seconds, with_files
from tidegate.dialects.spec import Dialect, RequestFacts
from tidegate.errors import InvalidRequest, PayloadTooLarge
from tidegate.http.body import BodyBudget, BodyMemory, MemoryBound, Spool, read_form
from tidegate.spine.bodies import FormBody
from tidegate.upstream.transport import RepeatableBody

TYPE = b"multipart/form-data; boundary=line"


def part(name: str, content: bytes | str, more: str = "", *headers: str) -> bytes:
    lines = [f'Content-Disposition: form-data; name="{name}"{more}', *headers]
    content = content.encode() if isinstance(content, str) else content
    return b"--line\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + content + b"\r\n"


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--line--\r\n"


def recording(seconds: int, *, rate: int = 8_000) -> bytes:
    file = BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes(b"\0\0" * rate * seconds)
    return file.getvalue()


FILE = part("file", b"\r\n--lin" * 9, '; filename="a.wav"', "Content-Type: audio/wav")
MODEL = part("model", "whisper-1")


async def read(
    raw: bytes,
    folder: Path,
    *,
    step: int = 65_536,
    content_types: tuple[bytes, ...] = (TYPE,),
    digests: bool = False,
) -> tuple[MediaForm, FormBody]:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(raw), step):
            yield raw[at : at + step]

    spool = Spool(folder, memory_bytes=1_000)
    hold = BodyBudget(BodyMemory(), MemoryBound(10**9, 10**9, shared=False), "t")
    try:
        form = await read_form(
            list(content_types), pieces(), spool, hold, records=True, digests=digests
        )
        if spool.path is None:
            return form, FormBody(form, data=spool.data)
        kept = folder / "kept"
        kept.write_bytes(spool.path.read_bytes())
        return form, FormBody(form, path=kept)
    finally:
        await spool.close()


async def sent(form: FormBody, model: str) -> bytes:
    found = form.for_model(model)
    if isinstance(found, bytes):
        return found
    assert isinstance(found, RepeatableBody)
    for _ in range(2):  # each time from its beginning
        whole = b"".join([piece async for piece in found.pieces()])
        assert len(whole) == found.size_bytes
    return whole


def facts(form: MediaForm, path: str = "/v1/audio/transcriptions") -> RequestFacts:
    endpoint = endpoint_of("POST", path, Dialect.OPENAI)
    assert endpoint is not None
    spec = DIALECTS[Dialect.OPENAI]
    asked = spec.request_facts(endpoint, form.fields)
    return with_files(asked, form, endpoint, spec.rules_of(asked.model))


@pytest.mark.parametrize("step", [1, 7, 65_536])
@pytest.mark.parametrize("model_first", [True, False])
async def test_the_model_is_found_wherever_it_stands_and_alone_renamed(
    tmp_path: Path, step: int, model_first: bool
) -> None:
    file = part("file", b"\r\n--lin\r\n-" * 200, '; filename="model"')
    parts = [MODEL, file] if model_first else [file, MODEL]
    raw = body(*parts, part("stream", "true"), part("temperature", "0.2"))
    form, whole = await read(raw, tmp_path, step=step)
    asked = facts(form)
    assert (asked.model, asked.streams, asked.kind) == ("whisper-1", True, Kind.MULTI_MODAL)
    assert form.fields["temperature"] == "0.2"
    assert await sent(whole, "whisper-1") == raw == await sent(whole, "")
    assert await sent(whole, "other/é") == raw.replace(b"whisper-1", "other/é".encode())


async def test_a_form_without_a_model_gets_one_before_all_parts(tmp_path: Path) -> None:
    form, whole = await read(body(FILE), tmp_path)
    assert facts(form, "/v1/images/variations").model == ""
    assert await sent(whole, "m") == part("model", "m").replace(b'; name="m"', b"") + body(FILE)


async def test_lists_files_and_numbers_are_as_in_a_body_of_json(tmp_path: Path) -> None:
    images = [part("image[]", b"\x89PNG", f'; filename="{one}.png"') for one in "ab"]
    several = [part("timestamp_granularities[]", one) for one in ("word", "segment")]
    form, _ = await read(body(*images, *several, part("n", "3"), MODEL), tmp_path)
    assert form.fields["timestamp_granularities[]"] == ["word", "segment"]
    assert [file.field for file in form.files] == ["image[]", "image[]"]
    asked = facts(form, "/v1/images/edits")
    assert (asked.images, asked.kind) == (3, Kind.IMAGE_GENERATION)


REFUSED: dict[str, tuple[bytes, str]] = {
    "a model twice": (body(MODEL, FILE, part("model", "gpt-5")), "more than once"),
    "another case": (body(FILE, part("Model", "gpt-5")), "another spelling"),
    "a list": (body(FILE, MODEL, part("model[]", "gpt-5")), "another spelling"),
    "an object": (body(FILE, MODEL, part("model[x]", "gpt-5")), "another spelling"),
    "escaped": (body(FILE, MODEL, part("%6dodel", "gpt-5")), "another spelling"),
    "a file": (body(FILE, part("model", "gpt-5", '; filename="x"')), "is a file"),
    "a file*": (body(FILE, part("model", "m", "; filename*=utf-8''x")), "is a file"),
    "two names": (body(FILE, part("model", "m", '; name="x"')), "missing or not valid"),
    "an escape": (body(FILE, part('x"; name="model', "m")), "missing or not valid"),
    "in a file's name": (
        body(MODEL, part("file", "x", '; filename="a\\"; name="model"; x="')),
        "missing or not valid",
    ),
    "name*": (body(FILE, MODEL, part("x", "m", "; name*=utf-8''model")), "missing or not valid"),
    "no name": (body(FILE, b"--line\r\nContent-Type: text/plain\r\n\r\nx\r\n"), "missing"),
    "no form-data": (
        body(b'--line\r\nContent-Disposition: attachment; name="model"\r\n\r\nx\r\n'),
        "missing or not valid",
    ),
    "two dispositions": (
        body(FILE, part("x", "m", "", 'content-disposition: form-data; name="model"')),
        "header 'content-disposition' twice",
    ),
    "nested": (
        body(MODEL, part("file", "x", "", "Content-Type: multipart/mixed; boundary=x")),
        "of its own",
    ),
    "encoded": (
        body(FILE, part("model", "Z3B0", "", "Content-Transfer-Encoding: base64")),
        "encoded",
    ),
    "a charset": (body(FILE, part("model", "m", "", "Content-Type: text/plain; charset=utf-7"))
                  , "UTF-8"),
    "_charset_": (body(part("_charset_", "utf-16"), MODEL, FILE), "UTF-8"),
    "bytes": (body(FILE, part("model", b"\xff\xfe")), "UTF-8"),
    "blanks": (body(FILE, part("model", "m\r\n")), "invalid model name"),
    "no boolean": (body(FILE, MODEL, part("stream", "1")), "neither true nor false"),
    "no end": (body(MODEL, FILE)[:-8], "closing boundary"),
    "cut in a part": (body(MODEL, FILE)[:-40], "closing boundary"),
    "nothing": (b"", "empty"),
    "before": (b"\r\nx" + body(MODEL, FILE), "boundary"),
    "behind": (body(MODEL, FILE) + MODEL, "boundary"),
    "a text behind": (body(MODEL, FILE) + b"x", "boundary"),
    "line feeds": (
        body(MODEL, part("x", b'\n--line\nContent-Disposition: form-data; name="model"\n\ny')),
        "within a part",
    ),
    "a carriage return": (
        body(MODEL, part("x", b"\r" + part("model", "y"))),
        "within a part",
    ),
    "a header behind a line feed": (
        body(MODEL, part("x", "y", "", 'X-A: b\nContent-Disposition: form-data; name="model"')),
        "control character",
    ),
    "a line feed in a file's name": (
        body(MODEL, part("x", "y", '; filename="a\nContent-Type: text/html; b="')),
        "control character",
    ),
    "a longer boundary": (body(MODEL, part("x", b"\r\n--liner\r\n\r\n")), "within a part"),
    "many headers": (body(MODEL, part("x", "y", "", *(f"X-{n}: 1" for n in range(9)))), "header"),
    "a long header": (body(MODEL, part("x", "y", "", "X: " + "a" * 5_000)), "header"),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
async def test_a_form_that_servers_could_read_in_two_ways_is_refused(
    tmp_path: Path, which: str
) -> None:
    raw, why = REFUSED[which]
    for step in (1, 65_536):
        with pytest.raises(InvalidRequest, match=why):
            await read(raw, tmp_path, step=step)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    "content_types",
    [
        (b"multipart/form-data",),
        (b"multipart/form-data; boundary=",),
        (b"multipart/form-data; boundary=line; boundary=other",),
        (b"multipart/form-data; boundary=line, multipart/form-data; boundary=other",),
        (b"multipart/mixed; boundary=line",),
        (b'multipart/form-data; boundary="line',),
        (b"multipart/form-data; boundary=" + b"a" * 71,),
        (TYPE, TYPE),
    ],
)
async def test_a_content_type_with_one_plain_boundary_is_required(
    tmp_path: Path, content_types: tuple[bytes, ...]
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await read(body(MODEL, FILE), tmp_path, content_types=content_types)
    assert refused.value.field == "Content-Type"
    assert refused.value.allowed


@pytest.mark.parametrize(
    "content_type", [b'Multipart/Form-Data; boundary="line"', TYPE + b"; charset=utf-8", TYPE]
)
async def test_usual_content_types_are_taken(tmp_path: Path, content_type: bytes) -> None:
    form, _ = await read(body(MODEL, FILE), tmp_path, content_types=(content_type,))
    assert form.fields["model"] == "whisper-1"


async def test_what_is_kept_of_a_form_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(PayloadTooLarge, match="too many parts"):
        await read(body(*[part("x", "")] * (MOST_PARTS + 1)), tmp_path)
    with pytest.raises(PayloadTooLarge, match="text fields"):
        await read(body(part("prompt", "x" * 3_000_000)), tmp_path)
    large = [part("image[]", b"x" * 200_000, '; filename="x"') for _ in range(40)]
    form, _ = await read(body(*large, MODEL), tmp_path)
    assert sum(len(file.head) for file in form.files) <= 16 * 65_536


async def test_the_same_form_has_the_same_digest_whatever_its_boundary(tmp_path: Path) -> None:
    raw = body(MODEL, FILE)
    digests = [
        (await read(one, tmp_path, content_types=(kind,), digests=True))[0].digest
        for one, kind in (
            (raw, TYPE),
            (raw.replace(b"line", b"mine"), TYPE.replace(b"line", b"mine")),
            (raw.replace(b"whisper-1", b"whisper-2"), TYPE),
            (body(FILE, MODEL), TYPE),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        (recording(3), 3),
        (recording(2, rate=44_100), 2),
        (b"\x1a\x45\xdf\xa3" + b"x" * 39_996, 10),  # WebM
        (b"", 1),
        (b"ID3" + b"\0" * 639_997, 160),
        # A head that says less than its bytes allow.
        (recording(3)[:24] + (2**30).to_bytes(4, "little") * 2 + b"\2\0\x10\0data"
         + (10**7).to_bytes(4, "little") + b"\0" * 6_000_000, 11),
    ],
)  # fmt: skip
def test_a_recording_is_as_long_as_its_head_says_and_its_bytes_allow(
    content: bytes, seconds: int
) -> None:
    file = BytesIO(b"before" + content + b"behind" * 1_000)
    assert recording_seconds(file, 6, 6 + len(content)) == seconds


@given(st.sampled_from([b"RIFF", b"ID3", b"OggS", b"fLaC", b"\0\0\0\x18ftypM4A "]), st.binary())
def test_no_file_is_a_fault(head: bytes, rest: bytes) -> None:
    content = head + rest
    assert 1 <= recording_seconds(BytesIO(content), 0, len(content)) <= 7 * 86_400


async def test_the_seconds_of_recordings_are_of_the_call(tmp_path: Path) -> None:
    files = [part("file", recording(3), '; filename="a.wav"'), part("b", b"x", '; filename="b"')]
    form, _ = await read(body(MODEL, *files), tmp_path)
    asked: Any = facts(form)
    assert asked.audio_seconds == 4
    assert asked.pieces["audio"] == 40  # by OpenAI's rule of 10 tokens a second


@pytest.mark.parametrize("other_bytes", [0, 5_000])  # in memory, and in a file
async def test_an_empty_recording_goes_to_the_provider_which_refuses_it(
    tmp_path: Path, other_bytes: int
) -> None:
    empty, other = (
        part("file", b"x" * size, '; filename="a.wav"', "Content-Type: audio/wav")
        for size in (0, other_bytes)
    )
    raw = body(empty, MODEL, other)
    form, whole = await read(raw, tmp_path)
    assert [(one.size_bytes, one.seconds) for one in form.files] == [
        (0, 1),
        (other_bytes, max(1, -(-other_bytes // 4_000))),
    ]
    assert await sent(whole, "") == raw
