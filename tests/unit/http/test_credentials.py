"""What a request shows: a key from wherever SDKs put it, and never one too many."""

from __future__ import annotations

import pytest

from tidegate.http.auth import Shown, shown_in

KEY = b"tg_abcdefghij_" + b"a" * 43
OTHER = b"tg_abcdefghij_" + b"b" * 43


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ([(b"authorization", b"Bearer " + KEY)], b""),
        ([(b"authorization", b"bearer  " + KEY + b" ")], b""),
        ([(b"x-api-key", KEY)], b""),
        ([(b"api-key", KEY)], b""),
        ([(b"x-goog-api-key", b" " + KEY)], b""),
        ([], b"key=" + KEY),
        ([], b"alt=sse&key=" + KEY + b"&wait=1"),
        ([], b"key=" + KEY.replace(b"_", b"%5F")),
        ([(b"x-goog-api-key", KEY), (b"authorization", b"Bearer " + KEY)], b"key=" + KEY),
        # Credentials of others' do no harm, in whatever order.
        ([(b"authorization", b"Basic dXNlcjpwYXNz"), (b"x-api-key", KEY)], b""),
        ([(b"authorization", b"Bearer eyJhbGciOi"), (b"x-api-key", KEY)], b""),
        ([(b"x-api-key", KEY), (b"authorization", b"Bearer eyJhbGciOi")], b""),
    ],
)
def test_a_key_is_found_wherever_it_may_be(
    headers: list[tuple[bytes, bytes]], query: bytes
) -> None:
    assert shown_in([(b"host", b"h"), *headers], query) == Shown(KEY, None, False)


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ([], b""),
        ([(b"authorization", b"Bearer")], b""),
        ([(b"authorization", KEY)], b""),
        ([(b"authorization", b"Basic " + KEY)], b""),
        ([(b"x-api-key", b" ")], b"key="),
        ([(b"cookie", b"key=" + KEY)], b"monkey=" + KEY),
    ],
)
def test_nothing_shown_is_nothing_found(headers: list[tuple[bytes, bytes]], query: bytes) -> None:
    assert shown_in(headers, query) == Shown(None, None, False)


def test_two_keys_that_differ_are_one_too_many() -> None:
    assert shown_in([(b"x-api-key", KEY), (b"x-goog-api-key", OTHER)], b"").several
    assert shown_in([(b"x-api-key", KEY), (b"x-api-key", OTHER)], b"").several
    assert shown_in([(b"authorization", b"Bearer " + KEY)], b"key=" + OTHER).several


def test_a_tenant_is_named_once() -> None:
    named = (b"x-tidegate-tenant", b"acme")
    assert shown_in([named, named], b"").tenant == b"acme"
    assert shown_in([named, (b"x-tidegate-tenant", b"other")], b"").tenant == b""
