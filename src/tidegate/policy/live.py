"""Live changes of upstreams: set, added, drained and removed at run time. Pure.

    tables of the file and the environment ──► live changes over them ──► upstreams in force

The rules, in order:
- a key that was set live stays, whatever the file says later, until it is set again or the upstream
  is reset to the file;
- every other key is the file's, as of the start of a process;
- an upstream that was removed live stays removed; one that was added live stays, even if the file
  names it later;
- what was set live on an upstream that the file no longer names has no effect.

Invariants: a change returns a new value and never modifies one; a change contains no secret, only
the name of a variable or of a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tidegate.errors import ConfigError, NotFound
from tidegate.policy.access import CREDENTIALS

Table = Mapping[str, Any]
Tables = Mapping[str, Table]
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
# Keys of a table that form the policy of a pool, which has revisions of its own.
POLICY_KEYS = ("limits", "weights", "bands", "pool")
_TABLES = ("aliases", "headers", "query", "prices", "dialects", "preempt")
_FROM_VARIABLE = "env:"
_SECRET_HEADER = re.compile(r"auth|key|token|secret|password|cookie", re.IGNORECASE)
_HIDDEN = "(hidden)"
_LONGEST_SHOWN = 200


@dataclass(frozen=True, slots=True)
class LiveUpstream:
    """Changes to one upstream.

    set: keys with their values, None for a removed key. over: the file's values of these keys at
    that time. reads: how often its secrets were to be read again.
    """

    set: Table = field(default_factory=dict)
    over: Table = field(default_factory=dict)
    is_added: bool = False
    is_drained: bool = False
    is_removed: bool = False
    reads: int = 0

    def plain(self) -> dict[str, Any]:
        """Return the changes for the record, without defaults."""
        usual = LiveUpstream()
        names = ("set", "over", "is_added", "is_drained", "is_removed", "reads")
        return {
            name: value for name in names if (value := getattr(self, name)) != getattr(usual, name)
        }


@dataclass(frozen=True, slots=True)
class LiveChanges:
    """Changes to all upstreams, by name."""

    upstreams: Mapping[str, LiveUpstream] = field(default_factory=dict)

    def of(self, name: str) -> LiveUpstream:
        return self.upstreams.get(name, _UNCHANGED)

    def over(self, base: Tables) -> dict[str, dict[str, Any]]:
        """Return the tables in force, those of `base` first."""
        found = {}
        for name in (*base, *(one for one in self.upstreams if one not in base)):
            live = self.of(name)
            if live.is_removed or not (name in base or live.is_added):
                continue
            table = {**base.get(name, {}), **live.set}
            found[name] = {key: value for key, value in table.items() if value is not None}
        return found

    @property
    def drained(self) -> frozenset[str]:
        """Upstreams that take no new calls."""
        return frozenset(name for name, one in self.upstreams.items() if one.is_drained)

    def differing(self, base: Tables) -> list[str]:
        """Return a line for each live key whose value in the file has changed since it was set."""
        lines = []
        for name, live in sorted(self.upstreams.items()):
            for key in live.set:
                now, then = base.get(name, {}).get(key), live.over.get(key)
                if now != then and now != live.set[key]:
                    live_value = _text(key, live.set[key])
                    lines.append(
                        f"{name}.{key}: the file says {_text(key, now)}, {live_value} is kept"
                    )
        return lines

    def source(self, name: str, base: Tables) -> str:
        """Return in words where an upstream comes from."""
        live = self.of(name)
        if name not in base:
            return "live"
        keys = ", ".join(sorted(live.set))
        return f"deployment; live: {keys}" if keys else "deployment"

    def plain(self) -> dict[str, Any]:
        return {name: made for name, one in self.upstreams.items() if (made := one.plain())}


_UNCHANGED = LiveUpstream()
NO_CHANGES = LiveChanges()


def changes_of(plain: Mapping[str, Any]) -> LiveChanges:
    """Return the changes on record; fields of later versions are ignored."""
    names = ("set", "over", "is_added", "is_drained", "is_removed", "reads")
    return LiveChanges(
        {
            name: LiveUpstream(**{key: one[key] for key in names if key in one})
            for name, one in plain.items()
        }
    )


# -- edits: each returns new changes, from the current ones and the tables of the deployment

LiveEdit = Callable[[LiveChanges, Tables], LiveChanges]


def added(name: str, table: Table) -> LiveEdit:
    """Return an edit that adds an upstream, or restores a removed one. It raises ConfigError."""

    def edit(changes: LiveChanges, base: Tables) -> LiveChanges:
        if NAME.fullmatch(name) is None:
            raise ConfigError("name", name[:100], "must be lower-case letters, digits, - and _")
        if name in changes.over(base):
            allowed = "must be a new name: `tidegate upstreams set` changes an existing upstream"
            raise ConfigError("name", name, allowed)
        _check(name, table)
        over = _stated(base.get(name, {}), table)
        return _with(changes, name, LiveUpstream(dict(table), over, is_added=name not in base))

    return edit


def with_keys(name: str, values: Mapping[str, Any], remove: Sequence[str] = ()) -> LiveEdit:
    """Return an edit that sets and removes keys of an upstream.

    `aliases.fast` is one entry of a table. The edit raises ConfigError, and NotFound for a key to
    remove that does not exist.
    """

    def edit(changes: LiveChanges, base: Tables) -> LiveChanges:
        table = _table(changes, base, name)
        _check_removed(name, table, values, remove)
        live = changes.of(name)
        new = dict(live.set)
        for key, value in (*values.items(), *((one, None) for one in remove)):
            stem, _, entry = key.partition(".")
            if stem in POLICY_KEYS:
                allowed = f"is changed by `tidegate limits set --pool {name}`"
                raise ConfigError(f"upstreams.{name}.{key}", None, allowed)
            if not entry or stem not in _TABLES:
                new[key] = value
                continue
            inner = {**_inner(new.get(stem, table.get(stem))), entry: value}
            new[stem] = {one: setting for one, setting in inner.items() if setting is not None}
        _check(name, new)
        known = base.get(name, {})
        again = {key.partition(".")[0] for key in (*values, *remove)}  # compared with the file now
        before = {key: one for key, one in live.over.items() if key not in again}
        over = {**_stated(known, new), **before}
        # A value equal to the file's, or the removal of a missing key, is no change.
        new = {key: one for key, one in new.items() if key not in known or one != known[key]}
        new = {key: one for key, one in new.items() if one is not None or key in known}
        over = {key: one for key, one in over.items() if key in new}
        return _with(changes, name, replace(live, set=new, over=over))

    return edit


def _check_removed(
    name: str, table: Table, values: Mapping[str, Any], remove: Sequence[str]
) -> None:
    for key in remove:
        if key in values:
            raise ConfigError(f"upstreams.{name}.{key}", None, "can't be both set and removed")
        stem, _, entry = key.partition(".")
        is_there = entry in _inner(table.get(stem)) if entry and stem in _TABLES else key in table
        if not is_there and stem not in POLICY_KEYS:
            raise NotFound(f"upstream {name} has no {key} of its own", field="remove")


def _inner(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def as_deployed(name: str) -> LiveEdit:
    """Return an edit that resets an upstream to the file. It raises ConfigError.

    A drained upstream stays drained, since the file does not say whether it is.
    """

    def edit(changes: LiveChanges, base: Tables) -> LiveChanges:
        if name not in base:
            raise ConfigError("name", name, "must be an upstream of the file or the environment")
        live = changes.of(name)
        return _with(changes, name, LiveUpstream(is_drained=live.is_drained, reads=live.reads))

    return edit


def read_again(name: str) -> LiveEdit:
    """Return an edit that has every process read an upstream's secrets and files again.

    It raises NotFound.
    """

    def edit(changes: LiveChanges, base: Tables) -> LiveChanges:
        _table(changes, base, name)
        live = changes.of(name)
        return _with(changes, name, replace(live, reads=live.reads + 1))

    return edit


def drained(name: str, is_drained: bool = True) -> LiveEdit:
    """Return an edit that drains an upstream, or ends that. It raises NotFound."""

    def edit(changes: LiveChanges, base: Tables) -> LiveChanges:
        _table(changes, base, name)
        return _with(changes, name, replace(changes.of(name), is_drained=is_drained))

    return edit


def removed(name: str) -> LiveEdit:
    """Return an edit that removes an upstream.

    It raises NotFound, and ConfigError for the last upstream.
    """

    def edit(changes: LiveChanges, base: Tables) -> LiveChanges:
        _table(changes, base, name)
        if len(changes.over(base)) == 1:
            raise ConfigError("name", name, "is the last upstream, which can't be removed")
        one = LiveUpstream(is_removed=True) if name in base else _UNCHANGED
        return _with(changes, name, one)

    return edit


def as_at(plain: Mapping[str, Any]) -> LiveEdit:
    """Return an edit to the changes of an earlier revision.

    It raises ConfigError if no upstream would be left.
    """

    def edit(changes: LiveChanges, base: Tables) -> LiveChanges:
        then = changes_of(plain)
        if not then.over(base):
            raise ConfigError("revision", None, "must leave one upstream")
        return then

    return edit


def _with(changes: LiveChanges, name: str, one: LiveUpstream) -> LiveChanges:
    upstreams = {**changes.upstreams, name: one}
    return LiveChanges({name: one for name, one in upstreams.items() if one != _UNCHANGED})


def _table(changes: LiveChanges, base: Tables, name: str) -> Table:
    tables = changes.over(base)
    if name not in tables:
        known = ", ".join(sorted(tables))
        raise NotFound(f"there is no upstream {name[:100]}; known: {known}", field="name")
    return tables[name]


def _stated(table: Table, keys: Table) -> dict[str, Any]:
    return {key: table[key] for key in keys if key in table}


def _check(name: str, table: Table) -> None:
    """Raise ConfigError for a secret: a recorded change must not contain one."""
    path = f"upstreams.{name}"
    for header, value in _inner(table.get("headers")).items():
        is_secret = header.lower().encode() in CREDENTIALS or _SECRET_HEADER.search(header)
        if is_secret and not str(value).startswith(_FROM_VARIABLE):
            allowed = "must be env:VARIABLE, since it is kept on record"
            raise ConfigError(f"{path}.headers.{header}", _HIDDEN, allowed)
    for key, value in _inner(table.get("query")).items():
        if _SECRET_HEADER.search(key) and not str(value).startswith(_FROM_VARIABLE):
            allowed = "must be env:VARIABLE, since it is kept on record"
            raise ConfigError(f"{path}.query.{key}", _HIDDEN, allowed)
    proxy = table.get("proxy")
    if isinstance(proxy, str) and "@" in proxy:
        allowed = "must be env:VARIABLE, since it is kept on record and has a password"
        raise ConfigError(f"{path}.proxy", _HIDDEN, allowed)


# -- texts


def shown(table: Table) -> dict[str, Any]:
    """Return a table without values that may be secrets in the file."""
    found = dict(table)
    for key in ("headers", "query"):
        if key in found:
            found[key] = {name: _public(value) for name, value in _inner(found[key]).items()}
    if "@" in str(found.get("proxy", "")):
        found["proxy"] = _HIDDEN
    return found


def _public(value: Any) -> Any:
    return value if str(value).startswith(_FROM_VARIABLE) else _HIDDEN


def _text(key: str, value: Any) -> str:
    if value is None:
        return "none"
    printable = shown({key: value})[key]
    text = printable if isinstance(printable, str) else json.dumps(printable, ensure_ascii=False)
    return text[:_LONGEST_SHOWN]


def changed_lines(before: LiveChanges, after: LiveChanges) -> list[str]:
    """Return the differences, a line each: `openai.weight: 1 -> 3`."""
    lines = []
    for name in sorted(before.upstreams.keys() | after.upstreams.keys()):
        old, new = before.of(name), after.of(name)
        for flag in ("added", "drained", "removed"):
            was, now = getattr(old, f"is_{flag}"), getattr(new, f"is_{flag}")
            if was != now:
                lines.append(f"{name}: {flag}" if now else f"{name}: no longer {flag}")
        if old.is_added and not new.is_added:
            continue  # with all that was set of it
        # Of an upstream in the file, its value there holds instead.
        unset = "not set" if old.is_added and new.is_added else "not set live"
        for key in sorted(old.set.keys() | new.set.keys()):
            was, now = (_text(key, one.set[key]) if key in one.set else unset for one in (old, new))
            if was != now and new.is_added and not old.is_added:
                lines.append(f"{name}.{key}: {now}")
            elif was != now:
                lines.append(f"{name}.{key}: {was} -> {now}")
        if new.reads != old.reads:
            lines.append(f"{name}: secrets read again")
    return lines
