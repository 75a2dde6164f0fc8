"""Passwords of databases in what runs as a program of its own."""

from __future__ import annotations

import pytest

from tidegate.supervisor.maintenance import without_password


@pytest.mark.parametrize(
    ("url", "plain", "password"),
    [
        ("postgresql://u:p%40ss@db:5432/x", "postgresql://u@db:5432/x", "p@ss"),
        ("postgresql://u@db/x?sslmode=require", "postgresql://u@db/x?sslmode=require", None),
        ("postgresql://db/x?user=u&password=p%20q", "postgresql://db/x?user=u", "p q"),
        ("postgresql://u:a@db/x?password=b", "postgresql://u@db/x", "b"),
    ],
)
def test_a_password_leaves_the_url_wherever_it_stands(
    url: str, plain: str, password: str | None
) -> None:
    assert without_password(url) == (plain, password)
