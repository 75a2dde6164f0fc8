"""Changes to a policy, key by key."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.errors import ConfigError, NotFound, PolicyChanged
from tidegate.policy.format import edit
from tidegate.policy.tenants import share_edit

BEFORE: dict[str, Any] = {
    "limits": {"kind:text_only": 5, "rpm:m": 60},
    "weights": {"acme": 4},
}


@pytest.mark.parametrize(
    ("changes", "removed", "after"),
    [
        ({"kind:text_only": 7}, [], {"limits": {"kind:text_only": 7, "rpm:m": 60}}),
        (
            {"limits.rpm:m": {"bound": 9}},
            [],
            {"limits": {**BEFORE["limits"], "rpm:m": {"bound": 9}}},
        ),
        ({"rpm:gemini-2.5-flash": 1}, ["rpm:m"], None),
        ({"weights.other": 2}, ["weights.acme"], {"weights": {"other": 2}}),
        ({"pool.lease_ms": 900}, [], {"pool": {"lease_ms": 900}}),
        ({"bands": [{"name": "a"}]}, [], {"bands": [{"name": "a"}]}),
        ({"tenant:a.b": 1}, [], {"limits": {**BEFORE["limits"], "tenant:a.b": 1}}),
        ({}, [], {}),
    ],
)
def test_keys_are_set_and_removed(
    changes: dict[str, Any], removed: list[str], after: dict[str, Any] | None
) -> None:
    if after is None:
        after = {"limits": {"kind:text_only": 5, "rpm:gemini-2.5-flash": 1}}
    assert edit(changes, removed)(BEFORE) == {**BEFORE, **after}
    assert BEFORE["limits"] == {"kind:text_only": 5, "rpm:m": 60}, "the old one is left as it was"


@pytest.mark.parametrize("source", ["imported", "learned"])
def test_a_bound_that_a_person_changes_is_no_longer_the_providers(source: str) -> None:
    """The page, and a program, send back the table that they have read, with another bound."""
    table = {"bound": 500, "shape": "bucket", "source": source}
    change = edit({"rpm:gpt-5": {**table, "bound": 100}}, expected={"rpm:gpt-5": table})
    after = change({"limits": {"rpm:gpt-5": table}})
    assert after["limits"]["rpm:gpt-5"] == {"bound": 100, "shape": "bucket"}


def test_a_limit_that_is_sent_back_as_it_was_keeps_its_source() -> None:
    plain = {"limits": {"rpm:gpt-5": {"bound": 500, "source": "learned"}}}
    assert edit({"rpm:gpt-5": {"bound": 500, "source": "learned"}})(plain) == plain


def test_a_person_may_hand_a_limit_over_to_what_answers_report() -> None:
    after = edit({"rpm:m": {"bound": 60, "source": "learned"}})(BEFORE)
    assert after["limits"]["rpm:m"] == {"bound": 60, "source": "learned"}


@pytest.mark.parametrize("key", ["lease_ms", "limits", "weights.", "pool", "other.x", ""])
def test_a_key_that_cannot_be_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        edit({key: 1})(BEFORE)
    with pytest.raises(ConfigError):
        edit({}, [key])(BEFORE)


def test_what_is_not_there_cannot_be_removed() -> None:
    for key in ("rpm:x", "weights.other", "pool.lease_ms"):
        with pytest.raises(NotFound):
            edit({}, [key])(BEFORE)


@pytest.mark.parametrize(
    ("changes", "removed"),
    [
        ({"rpm:m": 6}, ["rpm:m"]),
        ({"limits.rpm:m": 6}, ["rpm:m"]),
        ({"rpm:m": 6, "limits.rpm:m": 7}, []),
        ({}, ["weights.acme", "weights.acme"]),
    ],
)
def test_a_key_that_is_named_twice_is_refused(changes: dict[str, Any], removed: list[str]) -> None:
    with pytest.raises(ConfigError, match="must be named once"):
        edit(changes, removed)(BEFORE)


def test_the_limit_of_a_kind_cannot_be_removed() -> None:
    for key in ("kind:text_only", "limits.kind:text_only"):
        with pytest.raises(ConfigError, match="0 admits no calls"):
            edit({}, [key])(BEFORE)


def test_a_change_of_what_is_not_in_force_any_more_is_refused() -> None:
    now: dict[str, Any] = {"limits": {"kind:text_only": 7, "rpm:total": {"bound": 60}}}
    wrong = {"kind:text_only": 5, "rpm:total": 60, "weights.acme": 2}
    for key, value in wrong.items():
        with pytest.raises(PolicyChanged) as refused:
            edit({"kind:text_only": 8}, expected={key: value})(now)
        assert refused.value.field in (key, f"limits.{key}")
    expected = {"kind:text_only": 7, "rpm:total": {"bound": 60}, "weights.acme": None}
    assert edit({"kind:text_only": 8}, expected=expected)(now)["limits"]["kind:text_only"] == 8


def test_a_limit_of_several_tenants_is_refused_unless_one_that_is_called_so_has_it() -> None:
    for key in ("tenant:*", "limits.tpm:tenant/team-*", "rpm:tenant/acme,other"):
        with pytest.raises(ConfigError, match="tidegate tenants set"):
            edit({key: 5})(BEFORE)
    changed = share_edit("team-*", limits={"tenant:team-*": 5})
    assert changed is not None
    assert edit({"tenant:team-*": 6})(changed(BEFORE))["limits"]["tenant:team-*"] == 6
