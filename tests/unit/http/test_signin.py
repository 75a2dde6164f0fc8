"""The one-time code of the dashboard's address, and the cookie that it becomes."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode

from tidegate.http.browsers import CODE_S, SESSION_S, checked, cookie_name, make_code, make_session

KEY, OTHER = "tgop_" + "k" * 43, "tgop_" + "o" * 43
NOW = 1_800_000_000.0


def test_a_code_is_good_until_it_ends_and_for_its_key_alone() -> None:
    code = make_code(KEY, NOW)
    found = checked("code", KEY, code, NOW)
    assert found is not None
    assert found.ends_at == NOW + CODE_S
    assert checked("code", KEY, code, NOW + CODE_S) is None
    assert checked("code", OTHER, code, NOW) is None
    assert make_code(KEY, NOW) != code


def test_a_code_is_no_session_and_a_session_no_code() -> None:
    assert checked("session", KEY, make_code(KEY, NOW), NOW) is None
    session = make_session(KEY, NOW)
    assert checked("code", KEY, session, NOW) is None
    assert checked("session", KEY, session, NOW + SESSION_S - 1) is not None
    assert checked("session", KEY, session, NOW + SESSION_S) is None


def test_whatever_is_changed_makes_it_worthless() -> None:
    raw = bytearray(urlsafe_b64decode(make_session(KEY, NOW)))
    for at in range(len(raw)):
        raw[at] ^= 1
        assert checked("session", KEY, urlsafe_b64encode(bytes(raw)).decode(), NOW) is None
        raw[at] ^= 1
    assert checked("session", KEY, urlsafe_b64encode(bytes(raw)).decode(), NOW) is not None
    for junk in ("", "x", "é" * 72, "=" * 72, "A" * 72, "A" * 100_000):
        assert checked("session", KEY, junk, NOW) is None


def test_a_session_has_one_spelling() -> None:
    """Signing out ends it by its text, so that no other text may mean the same session."""
    session = make_session(KEY, NOW)
    for other in (f"~{session}", f"{session[:9]}!{session[9:]}", f"{session}.", f"{session}===="):
        assert checked("session", KEY, other, NOW) is None, other


def test_neither_tells_the_key_and_two_deployments_on_one_host_keep_apart() -> None:
    assert KEY not in make_code(KEY) + make_session(KEY) + cookie_name(KEY)
    assert cookie_name(KEY) != cookie_name(OTHER)
