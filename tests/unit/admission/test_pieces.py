"""First guesses of tokens: by script, by the size of a picture, by kind of file."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.admission.pictures import MAKERS, Maker, jpeg, png
from tidegate.admission.estimator import Modality, answer_of, dimensions, pieces_of
from tidegate.call import Media


@pytest.mark.parametrize("make", MAKERS)
def test_the_size_of_a_picture_is_read_from_its_head(make: Maker) -> None:
    assert dimensions(make(1234, 567)) == (1234, 567)
    assert dimensions(make(1234, 567) + b"\xff" * 100) == (1234, 567)


@given(st.sampled_from(MAKERS), st.data())
def test_a_picture_cut_or_spoilt_anywhere_is_no_error(make: Maker, data: st.DataObject) -> None:
    whole = bytearray(make(640, 480))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[at] = data.draw(st.integers(0, 255))
    found = dimensions(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    assert found is None or min(found) > 0


@given(st.binary(max_size=300))
def test_foreign_bytes_have_no_size_or_a_sound_one(data: bytes) -> None:
    found = dimensions(b"\xff\xd8" + data)
    assert found is None or min(found) > 0


def test_a_picture_counts_by_its_tiles() -> None:
    assert pieces_of("", [Media("image/png", png(384, 200))]) == {Modality.IMAGE: 258}
    assert pieces_of("", [Media("image/png", png(385, 200))]) == {Modality.IMAGE: 258}
    assert pieces_of("", [Media("image/jpeg", jpeg(1537, 768))]) == {Modality.IMAGE: 3 * 258}
    huge = pieces_of("", [Media("image/png", png(100_000, 100_000))])
    assert huge == {Modality.IMAGE: 64 * 258}
    unknown = pieces_of("", [Media("image/heic", b"whatever")])
    assert unknown == {Modality.IMAGE: 4 * 258}


def test_a_picture_of_many_bytes_counts_no_more_than_a_small_one_of_its_size() -> None:
    small, large = png(800, 600), png(800, 600) + bytes(2_000_000)
    assert pieces_of("", [Media("image/png", large)]) == pieces_of("", [Media("image/png", small)])


def test_scripts_differ() -> None:
    assert pieces_of("a" * 400, ()) == {Modality.LATIN: 100}
    assert pieces_of("ж" * 100, ()) == {Modality.LETTERS: 40}
    assert pieces_of("水" * 100, ()) == {Modality.WIDE: 70}
    assert pieces_of("😀" * 100, ()) == {Modality.WIDE: 70}


@given(st.text(min_size=1))
def test_every_letter_is_counted_once(text: str) -> None:
    """Against the plain loop that it is a quicker way of."""
    sizes = [len(letter.encode("utf-8", "surrogatepass")) for letter in text]
    plain = {
        Modality.LATIN: 0.25 * sizes.count(1),
        Modality.LETTERS: 0.4 * sizes.count(2),
        Modality.WIDE: 0.7 * (sizes.count(3) + sizes.count(4)),
    }
    expected = {key: max(1.0, tokens) for key, tokens in plain.items() if tokens}
    found = pieces_of(text, ())
    assert found.keys() == expected.keys()
    assert all(abs(found[key] - expected[key]) < 1e-6 for key in expected)


def test_nothing_at_all_is_something() -> None:
    assert pieces_of("", ()) == {Modality.LATIN: 1}


def test_a_wav_counts_by_its_own_rate_and_other_sound_by_what_is_typical() -> None:
    head = b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8_000, 8_000, 1, 8)
    wav = head + bytes(80_000 - len(head))
    assert pieces_of("", [Media("audio/wav", wav)]) == {Modality.AUDIO: 10 * 32}
    mp3 = Media("audio/mpeg", bytes(160_000))
    assert pieces_of("", [mp3]) == {Modality.AUDIO: 10 * 32}


def test_a_document_counts_by_its_pages() -> None:
    pdf = b"%PDF-1.7\n<< /Type /Pages /Count 3 >>" + b"<< /Type /Page >>" * 2 + b"<</Type/Page>>"
    assert pieces_of("", [Media("application/pdf", pdf)]) == {Modality.DOCUMENT: 3 * 258}
    packed = Media("application/pdf", b"%PDF-1.7\n" + bytes(120_000))
    assert pieces_of("", [packed]) == {Modality.DOCUMENT: 3 * 258}


def test_a_long_document_is_not_read_to_its_end() -> None:
    pdf = b"%PDF-1.7\n" + (b"<< /Type /Page >>" + bytes(983)) * 2_000
    found = pieces_of("", [Media("application/pdf", pdf)])[Modality.DOCUMENT]
    assert found == pytest.approx(2_000 * 258, rel=0.01)


def test_a_text_file_counts_as_text() -> None:
    long = Media("text/plain", b"word " * 100_000)
    assert pieces_of("", [long])[Modality.LATIN] == pytest.approx(125_000, rel=0.01)
    cut = Media("text/csv", "水".encode() * 100_000)
    assert pieces_of("", [cut])[Modality.WIDE] == pytest.approx(70_000, rel=0.01)
    assert pieces_of("", [Media("application/json", b"")]) == {Modality.LATIN: 1}


def test_files_add_up_with_the_prompt() -> None:
    files = [Media("image/png", png(100, 100)), Media("image/png", png(100, 100))]
    assert pieces_of("a" * 40, files) == {Modality.LATIN: 10, Modality.IMAGE: 516}


def test_an_answer_is_text_or_pictures() -> None:
    assert answer_of(0).keys() == {Modality.ANSWER}
    assert answer_of(3)[Modality.PICTURE] == 3 * answer_of(1)[Modality.PICTURE]
