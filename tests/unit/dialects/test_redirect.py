"""Which redirects of an upstream are followed."""

from __future__ import annotations

import pytest

from tidegate.dialects.headers import followed

BASE = "https://generativelanguage.googleapis.com"
INSIDE = f"{BASE}/download/v1beta/files/f1:download?alt=media"


@pytest.mark.parametrize(
    ("location", "leads_to"),
    [
        (INSIDE, INSIDE),
        ("/download/v1beta/files/f1:download?alt=media", INSIDE),
        (f"{INSIDE}#part", INSIDE),
        ("HTTPS://generativelanguage.GOOGLEAPIS.com/x", f"{BASE}/x"),
    ],
)
def test_a_redirect_of_the_upstreams_own_is_followed(location: str, leads_to: str) -> None:
    assert followed([(b"Location", location.encode())], BASE) == leads_to


@pytest.mark.parametrize(
    "location",
    [
        *("http://generativelanguage.googleapis.com/x", "https://evil.example/x", "//evil.example"),
        *(f"{BASE}.evil.example/x", f"{BASE}:8443/x", f"{BASE}:443/x", f"{BASE}@evil.example/x"),
        *("https://user@generativelanguage.googleapis.com/x", "https://169.254.169.254/latest"),
        *("/\\evil.example", "\\\\evil.example\\x", "https:\\\\evil.example"),
        *("/a/../b", "/a/%2E%2e/b"),
        *("javascript:alert(1)", "file:///etc/passwd", "https:///x", "https://[::1", ""),
        *("/x\r\nhost: evil.example", "/x y", "/\u00e9", "/%00", f"/{'x' * 9_000}"),
    ],
)  # fmt: skip
def test_no_other_is(location: str) -> None:
    assert followed([(b"location", location.encode("utf-8"))], BASE) is None


def test_it_stays_below_the_path_of_the_base_url() -> None:
    base = "http://proxy:8080/gemini"
    for location, is_followed in (
        ("/gemini/download/f1", True),
        ("f1:other", False),  # a scheme of its own
        ("./f1", False),
        ("http://proxy:8080/gemini/x", True),
        ("http://proxy:8080/x", False),
        ("/geminix", False),
        ("/admin", False),
        ("http://proxy/gemini/x", False),
    ):
        found = followed([(b"location", location.encode())], base)
        assert (found is not None) is is_followed, location


def test_a_redirect_without_a_place_or_with_two_is_not_followed() -> None:
    there = (b"location", INSIDE.encode())
    assert followed([], BASE) is None
    assert followed([there, there], BASE) is None
