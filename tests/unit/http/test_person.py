"""A person's cookie: for how long it counts, and what ends it."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.call import OperatorRole, role_by, role_rules
from tidegate.errors import ConfigError
from tidegate.http.browsers import PERSON_S, Person, RefusedSignIns, SignIn, make_session
from tidegate.settings import load

KEY = "tgop_" + "k" * 43
ANN = Person("ann@example.com", "u-1", OperatorRole.OPERATOR)


def signing(**changes: str) -> SignIn:
    settings = {
        "OIDC_ISSUER": "https://issuer.example",
        "OIDC_CLIENT_ID": "tidegate",
        "OIDC_ROLES": '{"groups=oncall": "operator"}',
    }
    return SignIn(load(settings | changes, dotenv=None), KEY)


def test_a_role_that_was_taken_away_ends_within_the_hour() -> None:
    cookie = signing().cookie(ANN, now=1_000)
    assert signing().person(cookie, now=1_000 + PERSON_S - 1) == ANN
    assert signing().person(cookie, now=1_000 + PERSON_S) is None


def test_changed_rules_and_another_key_end_every_session() -> None:
    cookie = signing().cookie(ANN)
    assert signing().person(cookie) == ANN
    for change in (
        {"OIDC_ROLES": '{"groups=oncall": "viewer"}'},
        {"OIDC_ISSUER": "https://other.example"},
        {"OIDC_CLIENT_ID": "another"},
    ):
        assert signing(**change).person(cookie) is None
    config = load(
        {
            "OIDC_ISSUER": "https://issuer.example",
            "OIDC_CLIENT_ID": "tidegate",
            "OIDC_ROLES": '{"groups=oncall": "operator"}',
        },
        dotenv=None,
    )
    assert SignIn(config, "tgop_" + "x" * 43).person(cookie) is None


def test_whatever_is_changed_makes_it_worthless() -> None:
    cookie = signing().cookie(ANN)
    admin = signing().cookie(ANN._replace(role=OperatorRole.ADMIN))
    coded, _, mac = cookie.partition(".")
    for bad in (
        *(admin.partition(".")[0] + "." + mac, coded, f"{coded}.", f".{mac}", "", "."),
        *(f"{coded}.\xff", f"\xff.{mac}", f"{coded}.{mac}0", "A" * 10_000, make_session(KEY)),
    ):
        assert signing().person(bad) is None, bad
    for at in range(0, len(cookie), 7):
        flipped = "A" if cookie[at] != "A" else "B"
        assert signing().person(f"{cookie[:at]}{flipped}{cookie[at + 1 :]}") is None


def test_a_cookie_has_one_spelling() -> None:
    """Signing out ends it by its text, so that no other text may mean the same session."""
    coded, _, mac = signing().cookie(ANN).partition(".")
    for other in (f"~{coded}", f"{coded[:9]}!{coded[9:]}", f"{coded}~", f"{coded}===="):
        assert signing().person(f"{other}.{mac}") is None, other


@pytest.mark.parametrize(
    "wrong", ["[]", "{", '{"groups": "admin"}', '{"groups=x": "root"}', '{"=x": "admin"}', "5"]
)
def test_rules_that_cannot_be_are_refused(wrong: str) -> None:
    settings = {"OIDC_ROLES": wrong}
    with pytest.raises(ConfigError, match="must be a JSON object"):
        load(settings, dotenv=None)


def test_an_issuer_needs_a_client_and_roles() -> None:
    with pytest.raises(ConfigError, match="OIDC_CLIENT_ID"):
        load({"OIDC_ISSUER": "https://issuer.example"}, dotenv=None)
    with pytest.raises(ConfigError, match="OIDC_ROLES"):
        load({"OIDC_ISSUER": "https://issuer.example", "OIDC_CLIENT_ID": "x"}, dotenv=None)


def test_the_highest_role_that_fits_counts() -> None:
    rules: Any = role_rules(
        {"groups=a*": "viewer", "groups=admins": "admin", "hd=x.org": "operator"}
    )
    assert role_by(rules, {"groups": ["all", "admins"]}) is OperatorRole.ADMIN
    assert role_by(rules, {"groups": ["all"], "hd": "x.org"}) is OperatorRole.OPERATOR
    assert role_by(rules, {"groups": [], "hd": "x.org.evil"}) is None
    assert role_by(rules, {}) is None


def test_a_claim_of_another_kind_or_of_letters_that_look_alike_gives_no_role() -> None:
    rules: Any = role_rules(
        {"email=Karl@x.org": "admin", "email=*[[]*": "admin", "ops=True": "admin", "ops=1": "admin"}
    )
    for email, role in (
        ("KARL@X.org", OperatorRole.ADMIN),
        ("\N{KELVIN SIGN}arl@x.org", None),
        (["karl@x.org"], None),
    ):
        assert role_by(rules, {"email": email, "email_verified": True}) is role
    for flag in (True, 1, [True, 1], {"True": True}):
        assert role_by(rules, {"ops": flag}) is None


def test_refused_sign_ins_have_a_rate_for_each_network() -> None:
    now = 100.0
    tries = RefusedSignIns(lambda: now)
    assert [tries.take("2001:db8::1") for _ in range(31)] == [True] * 30 + [False]
    assert not tries.take("2001:db8::2"), "the same network"
    assert tries.take("2001:db8:0:1::1")
    for mapped in ("::ffff:192.0.2.1", "192.0.2.2", "no address"):
        assert all(tries.take(mapped) for _ in range(30))
        assert not tries.take(mapped)
    assert tries.take("::ffff:192.0.2.3")
    now += 2.5
    assert [tries.take("2001:db8::3") for _ in range(3)] == [True, True, False]
    for _ in range(40):
        tries.put_back("2001:db8::4")
    assert [tries.take("2001:db8::1") for _ in range(31)] == [True] * 30 + [False]
    for number in range(20_000):
        tries.take(f"10.0.{number // 250}.{number % 250}")
    assert tries.take("2001:db8::1"), "the oldest are forgotten"
