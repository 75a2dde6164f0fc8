"""The headers of the Lua against the Python that calls it, and the names of all keys."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.resources import files

import pytest

from tidegate.limiter import flow, session
from tidegate.limiter import policy as limits
from tidegate.limiter.messages import (
    LAYOUT,
    SHAPES,
    InspectReply,
    Keyspace,
    Renewal,
    RenewReply,
    ScriptName,
    SyncReply,
    SyncRequest,
    Whole,
    fragment,
    load,
    read_header,
)
from tidegate.limiter.model import capacity, queues, state
from tidegate.limiter.model import pool as roster
from tidegate.limiter.model import pool as telling
from tidegate.limiter.model import rates as spending
from tidegate.limiter.model.pump import ACK_WINDOW, ACK_WITHIN_MS
from tidegate.limiter.model.state import Paces

FRAGMENTS = sorted(
    entry.name.removesuffix(".lua")
    for folder in ("lua", "lua/lib")
    for entry in files("tidegate.limiter").joinpath(folder).iterdir()
    if entry.name.endswith(".lua")
)
LUA = "\n".join(fragment(name) for name in FRAGMENTS)
SCRIPTS: tuple[ScriptName, ...] = (
    *("sync", "tend", "renew", "inspect", "position", "admin", "acl", "notes"),
)
WORDS = {"does", "keys", "args", "returns", "units"}


@pytest.mark.parametrize("name", FRAGMENTS)
def test_every_fragment_says_what_it_does(name: str) -> None:
    assert set(read_header(fragment(name))) >= WORDS


def test_every_fragment_is_part_of_a_script() -> None:
    used: set[str] = set()
    for name in SCRIPTS:
        header = load(name).header
        used |= {name, *header["uses"].split(), *header.get("later", "").split()}
    assert used == set(FRAGMENTS)


@pytest.mark.parametrize(
    ("name", "request_type", "reply_type"),
    [
        ("sync", SyncRequest, SyncReply),
        ("tend", SyncRequest, SyncReply),
        ("renew", Renewal, RenewReply),
    ],
)
def test_the_header_names_what_python_sends_and_reads(
    name: ScriptName, request_type: type, reply_type: type
) -> None:
    header = load(name).header
    assert header["request"].split() == [field.name for field in fields(request_type)]
    assert header["returns"].split() == list(reply_type._fields)  # type: ignore[attr-defined]


def test_what_else_the_scripts_return_is_what_python_reads() -> None:
    assert load("inspect").header["returns"].split() == list(InspectReply._fields)
    assert load("tend").header["whole"].split() == list(Whole._fields)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_lua_uses_no_field_of_a_request_that_no_header_names(name: str) -> None:
    used = set(re.findall(r"\bq\.([a-z_]+)", fragment(name)))
    named = {field for script in SCRIPTS for field in load(script).header["request"].split()}
    assert used <= named


def test_every_key_that_lua_builds_is_declared() -> None:
    built = set(re.findall(r"prefix \.\. '([a-z]+:?)'", LUA)) - {"grants:"}
    built |= set(re.findall(r"'(log:|rate:|quota:)'", LUA))
    assert built | {"meta", "layout"} == {shape.name for shape in SHAPES}


def test_every_key_has_an_end_or_a_reason_for_none() -> None:
    for shape in SHAPES:
        assert shape.expires != shape.ttl.startswith("none: "), shape.name


def test_all_keys_of_a_pool_are_in_one_slot() -> None:
    keys = Keyspace("gemini")
    tags = {re.findall(r"\{.*\}", key)[0] for key in (keys.meta, keys.layout, keys.channel("x"))}
    assert tags == {"{gemini}"}
    assert keys.shape_of(keys.meta) is not None
    assert keys.shape_of(f"{keys.prefix}unheard-of") is None


def test_the_layout_is_the_same_in_both_languages() -> None:
    assert re.findall(r"call\('SET', KEYS\[2\], '(\d+)'\)", fragment("join")) == [str(LAYOUT)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACK_WINDOW", ACK_WINDOW),
        ("ACK_WINDOW", 2 * session.ACK_EARLY),
        ("ACK_WITHIN_MS", ACK_WITHIN_MS),
        ("AT_ONCE", Paces().at_once),
        ("DUE_AT_ONCE", Paces().due_at_once),
        ("UNBLOCKED_AT_ONCE", Paces().unblocked_at_once),
        ("ENDED_AT_ONCE", Paces().ended_at_once),
        ("AHEAD_MS", Paces().ahead_ms),
        ("STARVES", Paces().starves),
        ("UNITS", state.VIRTUAL_UNITS),
        ("UNITS", flow.VIRTUAL_UNITS),
        ("CALL_USE", limits.CALL_USE),
        ("TICKET_UNITS", state.TICKET_UNITS),
        ("DUE_AFTER", Paces().due_after_ms),
        ("DUE_AFTER", flow.DUE_AFTER_MS),
        ("DUE_APART", state.DUE_APART_MS),
        ("DUE_STEPS", state.DUE_STEPS),
        ("LONGEST", Paces().longest),
        ("BEHIND", queues.BEHIND),
        ("RAMP_BOUND", capacity.RAMP_BOUND),
        ("UNBOUNDED", limits.MAX_BOUND),
        ("ADAPT_CALLS", state.ADAPT_CALLS),
        ("ADAPT_PAUSE_MS", state.ADAPT_PAUSE_MS),
        ("LATENCY_FIRST", state.LATENCY_FIRST),
        ("LATENCY_PART", state.LATENCY_PART),
        ("LATENCY_CALLS", Paces().latency_calls),
        ("LATENCY_ROUNDS", Paces().latency_rounds),
        ("DAY_MS", spending.DAY_MS),
        ("MOST_TO_ANNOUNCE", roster.MOST_TO_ANNOUNCE),
        ("MOST_AT_ONCE", roster.MOST_AT_ONCE),
        ("MOST_ON_ROSTER", roster.MOST_ON_ROSTER),
        ("MOST_TOLD", Paces().on_page),
        ("MOST_ON_PAGE", Paces().on_page),
        ("LOOKED_AT", Paces().looked_at),
        ("FOR_EVER", telling.FOR_EVER),
        ("MOST_OWED", Paces().most_owed),
    ],
)
def test_figures_are_the_same_in_lua_and_in_the_model(name: str, value: int) -> None:
    assert re.findall(rf"^T\.{name} = (\d+)$", LUA, re.MULTILINE) == [str(value)]


def test_a_clock_of_the_test_takes_the_place_of_the_real_one() -> None:
    script = load("sync", clock="function T.wall_clock_ms() return 7 end")
    assert b"'TIME'" not in script.source
    assert script.sha != load("sync").sha
