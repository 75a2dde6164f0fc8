"""Changes to a policy, key by key. Pure.

A key is the path that a mistake is told with: `limits.kind:text_only` (or `kind:text_only`),
`weights.acme`, `pool.lease_ms`, `bands`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from tidegate.errors import ConfigError, NotFound, PolicyChanged
from tidegate.policy.plain import Plain

_SECTIONS = ("limits", "weights", "pool")
Edit = Callable[[Plain], Plain]


def edit(
    set_: Mapping[str, Any], remove: Iterable[str] = (), expected: Mapping[str, Any] | None = None
) -> Edit:
    """The change that sets and removes keys, of a policy that has the `expected` values of some.

    Called on a policy it raises PolicyChanged where one has another value, NotFound for a key to
    remove that is not there, and ConfigError for a key that can't be, or the limit of a kind, which
    every call needs. Whether the values are sound is seen when the policy is read.
    """
    removed = list(remove)

    def change(plain: Plain) -> Plain:
        _check(plain, expected or {})
        changed = deepcopy(plain)
        for key in removed:
            section, name = _place(key)
            if name.startswith("kind:"):
                raise ConfigError(key, "(removed)", "every kind needs its limit; 0 lets nobody in")
            if name not in changed.get(section, {}):
                raise NotFound(f"there is no {section}.{name}")
            del changed[section][name]
        for key, value in set_.items():
            if key == "bands":
                changed["bands"] = value
                continue
            section, name = _place(key)
            changed.setdefault(section, {})[name] = value
        return changed

    return change


def _check(plain: Plain, expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        section, name = _place(key)
        if (now := plain.get(section, {}).get(name)) != value:
            raise PolicyChanged(f"{section}.{name}", now)


def _place(key: str) -> tuple[str, str]:
    """The section and the name in it."""
    if ":" in key.partition(".")[0]:
        return "limits", key
    section, _, name = key.partition(".")
    if section not in _SECTIONS or not name:
        allowed = "must be a limit's id, weights.<tenant>, pool.<option> or bands"
        raise ConfigError(key, "(key)", allowed)
    return section, name
