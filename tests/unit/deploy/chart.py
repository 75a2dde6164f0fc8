"""Renders the chart in deploy/helm as Helm does, as far as its templates go.

Knows of Go's templates: values, `not`, `if` to `end` on lines of their own, `range` over one line
that has each value as text, and the functions `quote`, `toYaml`, `nindent` and `sha256sum`.
Anything else is an error, so that a template can't go beyond what is checked here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import reduce
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from tests.unit.deploy.deployment import DEPLOY

CHART = DEPLOY / "helm/tidegate"
_ACTION = re.compile(r"(\s*)\{\{(-?) (.*?) (-?)\}\}")
_BLOCK = re.compile(r"^\s*\{\{- (if (not )?(\S+)|end) \}\}$")

_EACH = re.compile(
    r"^ *\{\{- range \$name, \$value := (\S+) \}\}\n"
    r"( *)\{\{ \$name \}\}: "
    r'\{\{ ternary \$value \(toJson \$value\) \(kindIs "string" \$value\) \| quote \}\}'
    r"\n *\{\{- end \}\}$",
    re.MULTILINE,
)


def values() -> dict[str, Any]:
    """The values of the chart."""
    read: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return read


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm lays the values of a user over those of a chart."""
    found = deepcopy(dict(base))
    for name, value in over.items():
        is_free = name.isupper() or "/" in name  # a setting, or a label or annotation
        assert name in found or is_free, f"{name} is no value of the chart"
        old = found.get(name)
        found[name] = merged(old, value) if isinstance(old, dict) else value
    return found


def rendered(release: str = "tidegate", **over: Any) -> list[dict[str, Any]]:
    """All objects of the chart under these values."""
    scope = {
        "Values": merged(values(), over),
        "Release": {"Name": release, "Namespace": "tidegate", "Revision": 1},
    }
    found = []
    for template in sorted((CHART / "templates").glob("*.yaml")):
        found += [one for one in yaml.safe_load_all(_text(template, scope)) if one]
    return found


def _text(template: Path, scope: Mapping[str, Any]) -> str:
    lines, shown = [], [True]
    text = _EACH.sub(lambda found: _each(found, scope), template.read_text())
    for line in text.splitlines():
        block = _BLOCK.match(line)
        if block is None:
            if shown[-1]:
                lines.append(_ACTION.sub(lambda found: _of(found, scope), line))
        elif block[1] == "end":
            shown.pop()
        else:
            shown.append(shown[-1] and bool(_value(block[3], scope)) is not bool(block[2]))
    assert shown == [True], f"{template.name}: if without end"
    return "\n".join(lines)


def _each(found: re.Match[str], scope: Mapping[str, Any]) -> str:
    lines = []
    for name, value in sorted(_value(found[1], scope).items()):
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"{found[2]}{name}: {json.dumps(text)}")
    return "\n".join(lines)


def _of(found: re.Match[str], scope: Mapping[str, Any]) -> str:
    before, trims, pipeline, trims_after = found.groups()
    assert not trims_after, pipeline
    first, *functions = pipeline.split(" | ")
    value = _value(first.removeprefix("toYaml "), scope)
    if first.startswith("toYaml "):
        value = yaml.safe_dump(value, width=10_000).rstrip("\n")
    for function in functions:
        name, _, argument = function.partition(" ")
        value = _FUNCTIONS[name](value, argument)
    return f"{'' if trims else before}{value}"


def _value(name: str, scope: Mapping[str, Any]) -> Any:
    assert name.startswith("."), f"{name} is no value"
    return reduce(lambda at, part: at[part], name.removeprefix(".").split("."), scope)


def _nindent(value: str, argument: str) -> str:
    return "\n" + "\n".join(f"{' ' * int(argument)}{line}" for line in value.splitlines())


_FUNCTIONS: dict[str, Callable[[Any, str], str]] = {
    "quote": lambda value, _: json.dumps(str(value)),
    "nindent": _nindent,
    "sha256sum": lambda value, _: sha256(value.encode()).hexdigest(),
}
