"""What a pool is in Valkey, in the words of `state.py`.

A dump differs in a few keys from the one before it: only those are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import msgpack

from tests.property.state import State
from tidegate.limiter.simulation import BEHIND, Keyspace

# Every key, and where it is not as it was in the last dump, its type, whether its life has an end,
# and all that is in it. `DUMP` of a key costs a fraction of what reading it in Lua does.
DUMP = b"""#!lua name=walk
local known = {}
local function read(call, key, kind)
  if kind == 'hash' then return call('HGETALL', key)
  elseif kind == 'zset' then return call('ZRANGE', key, 0, -1, 'WITHSCORES')
  elseif kind == 'list' then return call('LRANGE', key, 0, -1) end
  return call('GET', key)
end
redis.register_function('dump', function()
  local call, found, now = redis.call, {}, {}
  for _, key in ipairs(call('KEYS', '*')) do
    local image, expires = call('DUMP', key), call('PTTL', key) >= 0
    now[key] = expires and image .. '.' or image
    found[#found + 1] = key
    if known[key] == now[key] then
      found[#found + 1] = false
    else
      local kind = call('TYPE', key).ok
      found[#found + 1] = { kind, expires, read(call, key, kind) }
    end
  end
  known = now
  return cmsgpack.pack(found)
end)
"""

Fields = dict[str, str]
NUMBERS = (
    *("epoch", "began", "recover_until", "clock", "seq", "parked", "starving", "roster", "empty"),
    *("vouched", "fresh", "changes"),
)
# The state's name for a key of which a pool has one, and for those of which it may have many.
ONE = {
    "sessions": "expiry",
    "spending": "spending",
    "restored": "restored",
    "local": "local",
    "paused": "paused",
    "lapsing": "lapsing",
    "carried": "carried",
    "timed": "timed",
    "starving": "starving",
    "seen": "seen",
    "fresh": "fresh",
    "expected": "expected",
}
MANY = {
    "queue:": "queues",
    "stalled:": "stalled",
    "owed:": "owed",
    "park:": "park",
    "line:": "line",
    "past:": "past",
    "order:": "order",
    "log:": "log",
    "rate:": "rate",
    "quota:": "quota",
    "charged:": "charged",
}
# Read apart, or of no consequence for what a script does next.
OTHERS = {"meta", "session:", "layout", "history", "note:", "progress:"}


class Reading:
    """Reads the dumps of one pool, one after the other. Fails on a key that nobody declared, or
    that lives on without a reason."""

    def __init__(self, keys: Keyspace) -> None:
        self._keys = keys
        self._known: dict[bytes, tuple[str, str, Any]] = {}

    def state(self, raw: bytes) -> State:
        """The state that a dump shows."""
        found = msgpack.unpackb(raw, raw=True)
        pairs = zip(found[::2], found[1::2], strict=True)
        self._known = {key: self._read(key, changed) for key, changed in pairs}
        families: dict[str, dict[str, Any]] = defaultdict(dict)
        for family, name, value in self._known.values():
            families[family][name] = value
        return _gathered(families)

    def _read(self, key: bytes, changed: Any) -> tuple[str, str, Any]:
        if not changed:
            return self._known[key]
        name = key.decode()
        shape = self._keys.shape_of(name)
        assert shape is not None, f"{name} is not declared"
        assert shape.name in ONE or shape.name in MANY or shape.name in OTHERS, f"{name} is unread"
        kind, expires, value = changed
        assert shape.type == kind.decode(), name
        assert shape.expires == expires, f"{name} has an end: {expires}"
        rest = name.removeprefix(self._keys.prefix).removeprefix(shape.name)
        return shape.name, rest, _value(shape.name, shape.type, value)


def _value(family: str, kind: str, value: Any) -> Any:
    if kind == "zset":
        return {member: _number(score) for member, score in _pairs(value)}
    if kind == "hash":
        fields = dict(_pairs(value))
        if family == "meta":
            return _of_meta(_grouped(fields))
        return _grouped(fields) if family == "session:" else fields
    return [int(at) for at in value] if family == "log:" else value


def _number(text: str) -> float:
    """A stamp may lie between two whole numbers."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _pairs(value: list[bytes]) -> Iterable[tuple[str, str]]:
    texts = [item.decode(errors="replace") for item in value or ()]
    return zip(texts[::2], texts[1::2], strict=True)


def _grouped(fields: Fields) -> dict[str, Fields]:
    """Fields by what stands before their colon; under "" those without one."""
    groups: dict[str, Fields] = defaultdict(dict)
    for field, text in fields.items():
        before, colon, after = field.partition(":")
        groups[before if colon else ""][after if colon else field] = text
    return groups


def _gathered(found: Mapping[str, Mapping[str, Any]]) -> State:
    meta = found["meta"].get("") or _of_meta(defaultdict(dict))
    sessions = found["session:"]
    state: State = {name: found[key].get("", {}) for key, name in ONE.items()}
    state |= {name: found[key] for key, name in MANY.items()}
    state |= meta
    state["expected"] = set(state["expected"])
    state["quota"] = {name: quota for name, quota in state["quota"].items() if int(quota["used"])}
    state["past"] = {
        where: ahead
        for where, tags in state["past"].items()
        if (ahead := {t: n for t, n in tags.items() if n > _virtual(state, where) - BEHIND})
    }
    state["sessions"] = {sid: parts[""] for sid, parts in sessions.items()}
    for name, part in (("held", "h"), ("places", "at")):
        state[name] = {sid: parts[part] for sid, parts in sessions.items() if part in parts}
    return state


def _virtual(state: State, where: str) -> int:
    figures = state["bands"].get(where)
    return figures[1] if figures else 0


def _of_meta(groups: Mapping[str, Fields]) -> State:
    plain = groups[""]

    def number(field: str) -> int:
        return int(plain.get(field, 0))

    def numbers(group: str) -> dict[str, int]:
        return {name: int(text) for name, text in groups[group].items()}

    def tuples(group: str) -> dict[str, tuple[int, ...]]:
        return {name: tuple(map(int, text.split("|"))) for name, text in groups[group].items()}

    return {
        "run": plain.get("run", ""),
        "numbers": {name: number(name) for name in NUMBERS},
        "noted": (number("sessions"), number("reap_at"), number("timed_at")),
        "used": numbers("u"),
        "bands": _bands(groups["w"]),
        "pauses": {name: text.split("|", 3) for name, text in groups["p"].items()},
        "gates": groups["g"],
        "cost_ms": numbers("e"),
        "adapted": groups["a"],
        "shadowed": numbers("x"),
        "pacing": {name: found for name, found in tuples("f").items() if any(found)},
        "buckets": tuples("k"),
        "asserted": numbers("b"),
        "kept": plain.get("kept", ""),
        "spent": numbers("s"),
        "tenants": {name: _tenant(text) for name, text in groups["n"].items()},
    }


def _tenant(text: str) -> tuple[int, int, dict[str, int]]:
    """How many wait, the last stamp, and when the last ones of each band are due."""
    waiting, stamp, *dues = text.split("|")
    found = dict(due.split("=") for due in dues)
    return int(waiting), int(stamp), {band: int(due) for band, due in found.items()}


def _bands(fields: Fields) -> dict[str, tuple[int, ...]]:
    """limit|band -> waits, virtual time, credit, and what it is owed of a rate from and to; without
    those that are as at the beginning."""
    found = {}
    for name, text in fields.items():
        for number, part in enumerate(text.split(","), 1):
            figures = tuple(map(int, part.split(":")))
            if any(figures):
                found[f"{name}|{number}"] = (*figures, *[0] * 6)[:9]
    return found
