"""The headers of the Lua against the Python that calls it, and the names of all keys."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.resources import files

import pytest

from tidegate.limiter.keys import SHAPES, Keyspace
from tidegate.limiter.model import ACK_WINDOW
from tidegate.limiter.scripts import ScriptName, fragment, load, read_header
from tidegate.limiter.session import ACK_EARLY
from tidegate.limiter.wire import InspectReply, Renewal, RenewReply, SyncReply, SyncRequest

FRAGMENTS = sorted(
    entry.name.removesuffix(".lua")
    for entry in files("tidegate.limiter").joinpath("lua").iterdir()
    if entry.name.endswith(".lua")
)
WORDS = {"does", "keys", "args", "returns", "units"}


@pytest.mark.parametrize("name", FRAGMENTS)
def test_every_fragment_says_what_it_does(name: str) -> None:
    assert set(read_header(fragment(name))) >= WORDS


@pytest.mark.parametrize(
    ("name", "request_type", "reply_type"),
    [("sync", SyncRequest, SyncReply), ("renew", Renewal, RenewReply)],
)
def test_the_header_names_what_python_sends_and_reads(
    name: ScriptName, request_type: type, reply_type: type
) -> None:
    header = load(name).header
    assert set(header["request"].split()) == {field.name for field in fields(request_type)}
    returns = header["returns"].partition(";")[0].split()
    assert returns == list(reply_type._fields)  # type: ignore[attr-defined]


def test_what_inspect_returns_is_what_python_reads() -> None:
    assert load("inspect").header["returns"].split() == list(InspectReply._fields)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_lua_uses_no_field_of_the_request_that_python_does_not_send(name: str) -> None:
    used = set(re.findall(r"\bq\.([a-z_]+)", fragment(name)))
    assert used <= {field.name for field in fields(SyncRequest)}


def test_every_key_that_lua_builds_is_declared() -> None:
    built = set(re.findall(r"prefix \.\. '([a-z]+:?)'", fragment("keys"))) - {"grants:"}
    assert built | {"meta", "layout"} == {shape.name for shape in SHAPES}


def test_every_key_has_an_end_or_a_reason_for_none() -> None:
    for shape in SHAPES:
        assert shape.expires != shape.ttl.startswith("none: "), shape.name


def test_all_keys_of_a_pool_are_in_one_slot() -> None:
    keys = Keyspace("gemini")
    assert {re.findall(r"\{.*\}", key)[0] for key in (keys.meta, keys.layout, keys.channel("x"))}
    assert keys.shape_of(keys.meta) is not None
    assert keys.shape_of(f"{keys.prefix}unheard-of") is None


def test_the_windows_of_lua_and_python_fit() -> None:
    window = re.search(r"ACK_WINDOW = (\d+)", fragment("pump"))
    assert window is not None
    assert int(window[1]) == ACK_WINDOW
    assert ACK_EARLY * 2 == ACK_WINDOW


def test_a_clock_of_the_test_takes_the_place_of_the_real_one() -> None:
    script = load("sync", clock="local function wall_clock_ms() return 7 end")
    assert b"'TIME'" not in script.source
    assert script.sha != load("sync").sha
