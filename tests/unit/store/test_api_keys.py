"""API keys: their form, what is kept of them, and that no line of a log holds one."""

from __future__ import annotations

import re
from hashlib import sha256

import pytest

from tidegate.store.tenants import digest_of, is_same, make_key, prefix_in, prefix_of
from tidegate.telemetry.logging import redact


def test_a_key_has_its_form_and_is_kept_as_a_digest_alone() -> None:
    made = make_key()
    assert re.fullmatch(r"tg_[a-z0-9]{10}_[A-Za-z0-9]{43}", made.text)
    assert made.text.split("_")[1] == made.prefix == prefix_of(made.text.encode())
    assert made.digest == sha256(made.text.encode()).digest() == digest_of(made.text.encode())
    assert made.text not in repr(made)
    assert is_same(made.digest, digest_of(made.text.encode()))
    assert not is_same(made.digest, digest_of(b"tg_"))


def test_no_two_keys_are_alike() -> None:
    made = [make_key() for _ in range(500)]
    assert len({key.prefix for key in made}) == len({key.text for key in made}) == 500


def test_a_secret_is_worth_256_bits_and_uses_every_letter() -> None:
    letters = set("".join(make_key().text.rpartition("_")[2] for _ in range(200)))
    assert len(letters) == 62
    assert len(letters) ** 43 > 2**256


@pytest.mark.parametrize(
    "text",
    [
        *("", "tg_", "sk-abc", "tg_short_" + "a" * 43, "tg_ABCDEFGHIJ_" + "a" * 43),
        *("tg_abcdefghij_" + "a" * 42, "tg_abcdefghij_" + "a" * 44, "tg_abcdefghij_" + "-" * 43),
        *(" tg_abcdefghij_" + "a" * 43, "tg_abcdefghij_" + "a" * 43 + "\n"),
    ],
)
def test_what_is_no_key_has_no_prefix(text: str) -> None:
    assert prefix_of(text.encode()) is None


def test_a_person_may_name_a_key_by_its_prefix_or_by_the_whole() -> None:
    made = make_key()
    for text in (made.prefix, f"tg_{made.prefix}", f"tg_{made.prefix}_", f" {made.text} "):
        assert prefix_in(text) == made.prefix
    for text in ("", "tg_", "abc", "abcdefghij/../x", f"{made.prefix}x"):
        assert prefix_in(text) is None


@pytest.mark.parametrize(
    "text",
    [
        *("{}", "the key {} was shown", "['{}']", "Authorization: Bearer {}", "x-api-key: {}"),
        *("GET /v1beta/models?key={}&alt=sse", "[(b'x-api-key', b'{}')]", "{}."),
    ],
)
def test_a_key_in_a_text_is_never_logged(text: str) -> None:
    made = make_key()
    shown = redact(text.format(made.text))
    assert made.text.rpartition("_")[2] not in shown
    assert "***" in shown


def test_a_prefix_alone_may_be_logged() -> None:
    assert redact("the key tg_abcdefghij was revoked") == "the key tg_abcdefghij was revoked"
