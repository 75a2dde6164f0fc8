"""Live changes to upstreams over what the file says: which of them is in force."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.policy.test_upstreams import CONFIG, with_keys
from tidegate.errors import ConfigError, NotFound
from tidegate.policy.deployment import Deployment, deployment_of
from tidegate.policy.live import (
    NO_CHANGES,
    LiveChanges,
    LiveEdit,
    added,
    as_at,
    as_deployed,
    changed_lines,
    changes_of,
    drained,
    read_again,
    removed,
    shown,
)
from tidegate.policy.live import (
    with_keys as set_keys,
)

BASE: dict[str, dict[str, Any]] = {"openai": {"weight": 2, "models": ["gpt-*"]}, "local": {}}


def made(*edits: LiveEdit, base: Mapping[str, Any] = BASE) -> LiveChanges:
    changes = NO_CHANGES
    for edit in edits:
        changes = edit(changes, base)
    assert changes_of(changes.plain()) == changes, "as it is on record"
    return changes


def test_a_key_that_was_set_live_stays_and_the_others_are_the_files() -> None:
    changes = made(set_keys("openai", {"weight": 5}))
    later = {"openai": {"weight": 3, "models": ["o*"]}}
    assert changes.over(later)["openai"] == {"weight": 5, "models": ["o*"]}
    assert changes.differing(BASE) == []
    assert changes.differing(later) == ["openai.weight: the file says 3, 5 is kept"]
    assert changes.source("openai", later) == "deployment; live: weight"
    assert made(set_keys("openai", {"weight": 5}), as_deployed("openai")) == NO_CHANGES
    again = set_keys("openai", {"weight": 7})(changes, later)
    assert again.differing(later) == [], "it was set over what the file says by now"
    other = set_keys("openai", {"models": ["gpt-5"]})(changes, later)
    assert other.differing(later) == ["openai.weight: the file says 3, 5 is kept"]


@pytest.mark.parametrize("key", ["weigth", "aliases.fast", "headers"])
def test_a_key_that_is_not_there_cannot_be_taken_away(key: str) -> None:
    with pytest.raises(NotFound, match=f"upstream openai has no {key} of its own"):
        made(set_keys("openai", {}, [key]))


def test_a_key_is_not_both_set_and_taken_away() -> None:
    with pytest.raises(ConfigError, match=r"upstreams.openai.weight can't be both"):
        made(set_keys("openai", {"weight": 3}, ["weight"]))


def test_an_upstream_that_is_not_there_is_not_found() -> None:
    for edit in (set_keys("no", {"weight": 3}), drained("no"), removed("no"), read_again("no")):
        with pytest.raises(NotFound, match="there is no upstream no; known: local, openai"):
            made(edit)


def test_an_upstream_that_is_put_back_to_the_file_stays_drained() -> None:
    edits = (drained("openai"), set_keys("openai", {"weight": 5}), as_deployed("openai"))
    assert made(*edits) == made(drained("openai"))


def test_what_says_the_same_as_the_file_is_no_change() -> None:
    assert made(set_keys("openai", {"weight": 2})) == NO_CHANGES
    assert made(set_keys("openai", {"weight": 5}), set_keys("openai", {"weight": 2})) == NO_CHANGES
    assert made(drained("local"), drained("local", is_drained=False)) == NO_CHANGES


def test_keys_are_taken_away_and_entries_of_tables_are_set() -> None:
    changes = made(set_keys("openai", {"aliases.fast": "gpt-mini"}, ["models"]))
    assert changes.over(BASE)["openai"] == {"weight": 2, "aliases": {"fast": "gpt-mini"}}
    more = set_keys("openai", {"aliases.slow": "gpt-x"}, ["aliases.fast"])(changes, BASE)
    assert more.over(BASE)["openai"]["aliases"] == {"slow": "gpt-x"}


def test_upstreams_come_and_go_whatever_the_file_says_later() -> None:
    changes = made(added("groq", {"provider": "groq"}), removed("local"), drained("groq"))
    assert list(changes.over(BASE)) == ["openai", "groq"]
    assert changes.drained == {"groq"}
    named = {**BASE, "groq": {"weight": 9}}
    assert changes.over(named)["groq"] == {"weight": 9, "provider": "groq"}
    assert list(changes.over({"local": {}, "openai": {}})) == ["openai", "groq"]
    back = added("local", {"weight": 4})(changes, BASE)
    assert back.over(BASE)["local"] == {"weight": 4}
    assert removed("groq")(changes, BASE) == made(removed("local"))


def test_what_was_set_on_an_upstream_that_the_file_lost_has_no_effect() -> None:
    assert list(made(set_keys("openai", {"weight": 5})).over({"local": {}})) == ["local"]


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (added("openai", {}), "must be a new name"),
        (added("Open AI", {}), "lower-case letters"),
        (set_keys("openai", {"limits.rpm:total": 5}), "limits set --pool openai"),
        (set_keys("openai", {"headers.x-api-key": "sk-1"}), "env:VARIABLE"),
        (added("new", {"headers": {"x-secret": "s"}}), "env:VARIABLE"),
        (added("new", {"query": {"key": "s"}}), "env:VARIABLE"),
        (added("new", {"proxy": "http://me:secret@proxy:1"}), "env:VARIABLE"),
        (as_deployed("groq"), "of the file or the environment"),
    ],
)
def test_what_can_not_be_names_the_key_and_shows_no_secret(edit: LiveEdit, names: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        edit(NO_CHANGES, BASE)
    assert names in str(wrong.value)
    assert "sk-1" not in str(wrong.value)
    assert "secret@" not in str(wrong.value)


def test_one_upstream_is_always_left() -> None:
    with pytest.raises(ConfigError, match="last upstream"):
        made(removed("local"), removed("openai"))
    gone = made(removed("local"), added("groq", {}), removed("openai"))
    with pytest.raises(ConfigError, match="leave one upstream"):
        as_at({"local": {"is_removed": True}})(gone, {"local": {}})


def test_the_difference_is_a_line_for_each_key_without_secrets() -> None:
    before = made(set_keys("openai", {"weight": 5}))
    after = as_at({})(before, BASE)
    assert changed_lines(before, after) == ["openai.weight: 5 -> not set live"]
    groq = made(added("groq", {}))
    weighed = set_keys("groq", {"weight": 5})(groq, BASE)
    assert changed_lines(groq, weighed) == ["groq.weight: not set -> 5"]
    assert changed_lines(weighed, before) == [
        "groq: no longer added",
        "openai.weight: not set live -> 5",
    ]
    lines = changed_lines(before, made(added("groq", {"headers": {"x-team": "plain"}})))
    assert lines[:2] == ["groq: added", 'groq.headers: {"x-team": "(hidden)"}']
    assert "plain" not in "".join(lines)
    assert shown({"proxy": "http://a:b@c", "query": {"a": "env:B", "c": "d"}}) == {
        "proxy": "(hidden)",
        "query": {"a": "env:B", "c": "(hidden)"},
    }


# -- and what they make of the file


FILE = """
[upstreams.openai]
key = "OPENAI_API_KEY"
weight = 2

[upstreams.local]
base_url = "http://127.0.0.1:9000/v1"

[[routes]]
model = "smart"
try = ["local/big", "openai"]
"""


def deployment(
    live: LiveChanges,
    before: Deployment | None = None,
    /,
    key_folder: Path | None = None,
    text: str = FILE,
    **secrets: str,
) -> Deployment:
    known = {"OPENAI_API_KEY": "sk-1"} | secrets
    stated = tomllib.loads(text)
    config = with_keys(**({"key_folder": key_folder} if key_folder else {}))
    return deployment_of(stated, config, lambda one: known.get(one, ""), live, before)


def test_what_does_not_differ_stays_the_same_object() -> None:
    before = deployment(NO_CHANGES)
    now = deployment(made(set_keys("openai", {"weight": 5})), before)
    assert now.upstream("local") is before.upstream("local")
    assert now.upstream("openai") is not before.upstream("openai")
    again = deployment(now.live, now, OPENAI_API_KEY="sk-2")
    assert again.upstream("openai") is now.upstream("openai"), "secrets are read once"
    reread = deployment(read_again("openai")(now.live, BASE), now, OPENAI_API_KEY="sk-2")
    assert (found := reread.upstream("openai")) is not None
    assert found.key == "sk-2"


def test_a_process_without_the_key_misses_that_upstream_alone() -> None:
    live = made(added("groq", {"provider": "groq"}), drained("local"))
    now = deployment(live, deployment(NO_CHANGES))
    assert [one.name for one in now.upstreams] == ["openai", "local"]
    assert "GROQ_API_KEY" in str(now.missing["groq"])
    assert now.drained == {"local"}
    started = deployment(live)
    assert list(started.missing) == ["groq"], "a start goes on without it too"


def test_routes_lead_to_what_is_left() -> None:
    (route,) = deployment(made(removed("local"))).routes
    assert route.targets == (("openai", None),)


def test_the_last_alias_can_be_taken_away() -> None:
    edits = (set_keys("openai", {"aliases.fast": "m"}), set_keys("openai", {}, ["aliases.fast"]))
    found = deployment(made(*edits), deployment(NO_CHANGES)).upstream("openai")
    assert found is not None
    assert found.aliases == {}


def test_geminis_own_account_changes_as_others_do() -> None:
    live = made(set_keys("gemini", {"weight": 7}), base={"gemini": {}})
    found = deployment_of({}, CONFIG, lambda _: "", live).upstream("gemini")
    assert found is not None
    assert found.weight == 7


def test_a_key_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("gsk-1\n")
    live = made(added("groq", {"provider": "groq", "key_file": str(file)}))
    found = deployment(live, key_folder=tmp_path).upstream("groq")
    assert found is not None
    assert found.key == "gsk-1"
    for contents, names in (("", "must have a key in it"), ("a\nb", "printable ASCII")):
        file.write_text(contents)
        assert names in str(deployment(live, key_folder=tmp_path).missing["groq"])
    file.unlink()
    assert "readable file" in str(deployment(live, key_folder=tmp_path).missing["groq"])


@pytest.mark.parametrize("option", ["key_file", "credentials_file", "client_key"])
def test_a_live_change_names_no_file_but_of_the_folder_of_keys_and_of_the_file(
    tmp_path: Path, option: str
) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    (outside := tmp_path / "hostname").write_text("web-1\n")
    (inside := folder / "link").symlink_to(outside)
    for named in (outside, inside, folder / ".." / "hostname", tmp_path / "absent"):
        live = made(added("groq", {"provider": "groq", option: str(named)}))
        missing = deployment(live, key_folder=folder).missing["groq"]
        assert "must be a file below KEY_FOLDER" in str(missing), named
    assert "KEY_FOLDER" in str(deployment(live).missing["groq"]), "and without the setting"
    text = f'{FILE}\n[upstreams.first]\nprovider = "groq"\nkey_file = "{outside}"\n'
    live = made(added("groq", {"provider": "groq", "key_file": str(outside)}))
    found = deployment(live, key_folder=folder, text=text)
    assert [one.key for one in found.upstreams if one.provider == "groq"] == ["web-1"] * 2
