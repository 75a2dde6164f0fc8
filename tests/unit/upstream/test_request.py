"""What is asked of Gemini, without sending it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.call import Media
from tidegate.errors import UpstreamRejected
from tidegate.upstream import gemini as request


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 200))
def test_what_stays_inline_fits_and_no_file_is_uploaded_needlessly(
    sizes: list[int], inline_max_bytes: int
) -> None:
    media = [Media("image/png", bytes(size)) for size in sizes]
    chosen = request.too_large_for_inline(media, inline_max_bytes)
    rest = sum(size for index, size in enumerate(sizes) if index not in chosen)
    assert rest <= inline_max_bytes
    if chosen:
        smallest = min(sizes[index] for index in chosen)
        assert rest + smallest > inline_max_bytes


@pytest.mark.parametrize("model", ["gemini-2.5-flash", "models/gemini-2.5-pro", "tunedModels/a_b"])
def test_a_plain_model_name_stands_as_it_is(model: str) -> None:
    assert request.model_path(model) == model


@pytest.mark.parametrize("model", ["a..b", "a/b", "models/", "files/x", "m\n", "é", "x" * 200])
def test_any_other_model_name_is_rejected(model: str) -> None:
    with pytest.raises(UpstreamRejected):
        request.model_path(model)


def test_a_prompt_of_files_alone_has_no_empty_text() -> None:
    part = request.inline(Media("image/png", b"x"))
    assert request.turn("", [part]) == {"role": "user", "parts": [part]}
