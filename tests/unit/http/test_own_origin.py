"""The address by which a client reaches us, which only proxies in front of us know."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import Request

from tidegate.dashboard.routes import _cookie
from tidegate.http.guards import own_origin


@pytest.mark.parametrize(
    ("forwarded", "scheme", "expected"),
    [
        ([], "http", "http"),
        ([], "https", "https"),
        ([b"https"], "http", "https"),
        ([b"HTTPS "], "http", "https"),
        ([b"https, http"], "http", "https"),  # each proxy has added its own
        ([b"https,http"], "http", "https"),
        ([b"https", b"http"], "http", "https"),
        ([b"http, https"], "http", "http"),
        ([b"http"], "https", "http"),
        ([b""], "https", "https"),
        ([b"gopher"], "http", "http"),
    ],
)
def test_of_several_proxies_the_first_one_knows_the_scheme(
    forwarded: list[bytes], scheme: str, expected: str
) -> None:
    headers = [(b"host", b"gate.example"), *((b"x-forwarded-proto", one) for one in forwarded)]
    scope: dict[str, Any] = {"type": "http", "path": "/", "scheme": scheme, "headers": headers}
    assert own_origin(scope) == f"{expected}://gate.example"
    assert _cookie(Request(scope))["secure"] is (expected == "https")
