"""The providers' own examples of what files count."""

from __future__ import annotations

import struct

import pytest

from tests.unit.admission.pictures import png
from tidegate.admission.estimator import Modality, Rules, duration_s, pieces_of_file, unseen_file
from tidegate.dialects import DIALECTS

GEMINI, GEMINI_3 = (DIALECTS["gemini"].rules_of(f"gemini-{version}") for version in ("2.5", "3"))
OPENAI, ANTHROPIC = (DIALECTS[dialect].rules_of("any") for dialect in ("openai", "anthropic"))


@pytest.mark.parametrize(
    ("dialect", "model", "size", "tokens"),
    [
        ("openai", "gpt-4o", (1024, 1024), 765),
        ("openai", "gpt-4o", (2048, 4096), 1105),
        ("openai", "any-other", (512, 512), 255),
        ("openai", "openai/gpt-4o-mini-2024-07-18", (1024, 1024), 2833 + 4 * 5667),
        ("openai", "gpt-4.1-mini", (1024, 1024), 1024 * 1.62),
        ("openai", "gpt-5-nano", (8000, 8000), 1536 * 2.46),
        ("anthropic", "claude-x", (1000, 1000), 1334),
        ("anthropic", "claude-x", (8000, 8000), 1600),
        ("anthropic", "claude-x", (200, 200), 54),
        ("gemini", "gemini-2.5-flash", (384, 384), 258),
        ("gemini", "gemini-2.5-flash", (1537, 768), 3 * 258),
        ("gemini", "gemini-3-pro-preview", (384, 384), 1120),
        ("gemini", "gemini-10", (384, 384), 1120),
    ],
)
def test_a_picture_counts_as_its_provider_counts(
    dialect: str, model: str, size: tuple[int, int], tokens: float
) -> None:
    rules = DIALECTS[dialect].rules_of(model)
    found = pieces_of_file("image/png", png(*size), 1_000_000, rules)[Modality.IMAGE]
    assert found == pytest.approx(tokens, abs=1)


@pytest.mark.parametrize("rules", [GEMINI, OPENAI, ANTHROPIC, GEMINI_3])
def test_no_size_is_beyond_a_rule(rules: Rules) -> None:
    for size in ((1, 1), (1, 100_000), (2**31, 2**31), None):
        assert 0 < rules.picture(size) <= 64 * 258


def test_a_page_and_a_second_count_as_their_provider_counts() -> None:
    pdf = b"%PDF-1.7\n" + b"<< /Type /Page >>" * 3
    pages = {rules.page: rules for rules in (GEMINI, ANTHROPIC, GEMINI_3)}
    assert pages.keys() == {258, 2_250, 560}
    for page, rules in pages.items():
        found = pieces_of_file("application/pdf", pdf, len(pdf), rules)
        assert found == {Modality.DOCUMENT: 3 * page}
    assert unseen_file("application/pdf", ANTHROPIC) == {Modality.DOCUMENT: 2_250}
    assert unseen_file("application/pdf", OPENAI) == {Modality.DOCUMENT: 4 * 258}
    for rules, tokens in ((GEMINI, 320), (OPENAI, 100)):
        assert pieces_of_file("audio/mpeg", b"", 160_000, rules) == {Modality.AUDIO: tokens}


def film(version: int, scale: int, ticks: int) -> bytes:
    form, times = (">II", 8) if version == 0 else (">IQ", 16)
    head = b"mvhd" + bytes([version, 0, 0, 0]) + bytes(times)
    return b"\0\0\0\x18ftypmp42" + head + struct.pack(form, scale, ticks) + bytes(40)


@pytest.mark.parametrize("version", [0, 1])
def test_a_film_says_how_long_it_is(version: int) -> None:
    data = film(version, 600, 7_200)
    assert duration_s(data) == 12
    assert pieces_of_file("video/mp4", data, len(data)) == {Modality.VIDEO: 12 * 295}
    # One that claims to last for no time is as long as its bytes may be, at the least.
    assert pieces_of_file("video/mp4", film(version, 600, 1), 50_000_000) == {
        Modality.VIDEO: 10 * 295
    }
    for end in range(len(data)):
        assert duration_s(data[:end]) in (None, 12)
    assert duration_s(film(version, 0, 5)) is None
    assert duration_s(film(7, 600, 600)) is None
