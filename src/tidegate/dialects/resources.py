"""Resource paths: what lives at a provider after a call, and how requests name it. Pure.

A dialect has a table of `ResourcePath`s and two functions: which resources of which kinds a body
refers to, and what an answer makes. The rest follows from them: whose a resource is, where its
calls go, and what a list shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# No slash and no dot, which would lead elsewhere.
RESOURCE_ID = r"[A-Za-z0-9_\-]{1,200}"
LONGEST_ID = 400


class Act(StrEnum):
    """Act on a resource. CREATE makes one, which the answer names; LIST shows those of the caller;
    DELETE ends it; CANCEL ends its work; READ and CHANGE are all others that name it."""

    CREATE = "create"
    LIST = "list"
    READ = "read"
    CHANGE = "change"
    CANCEL = "cancel"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Making:
    """What the answer to a call makes. name: the field that names it, in an answer or, within the
    object `within` if there is one, in an event of its stream. prefix: of an id there, such as
    `files/`, which is not kept, nor what precedes it. each: the ids of all that an object makes,
    where that may be none or several."""

    kind: str
    name: str = "id"
    within: str | None = None
    prefix: str = ""
    each: Callable[[Mapping[str, Any]], Sequence[str]] | None = None


@dataclass(frozen=True, slots=True)
class ResourcePath:
    """A path of resources. pattern: the whole path, with a group `id` where it names one. makes:
    what its answer makes."""

    method: str
    pattern: re.Pattern[str]
    kind: str
    act: Act
    makes: Making | None = None


@dataclass(frozen=True, slots=True)
class ResourceUse:
    """What a request does to which resource."""

    path: ResourcePath
    resource_id: str | None = None

    @property
    def kind(self) -> str:
        return self.path.kind

    @property
    def act(self) -> Act:
        return self.path.act


@dataclass(frozen=True, slots=True)
class Reference:
    """A resource that the body of a call refers to, in this field."""

    kind: str
    resource_id: str
    field: str


def path_of(
    method: str, pattern: str, kind: str, act: Act, makes: Making | None = None
) -> ResourcePath:
    """A row of a table; `{id}` stands for the id, `{any}` for that of something below it. What
    CREATE makes is of its own kind, unless `makes` says more."""
    if makes is None and act is Act.CREATE:
        makes = Making(kind)
    named = pattern.replace("{id}", f"(?P<id>{RESOURCE_ID})").replace("{any}", RESOURCE_ID)
    return ResourcePath(method, re.compile(named, re.ASCII), kind, act, makes)


def use_in(table: Sequence[ResourcePath], method: str, path: str) -> ResourceUse | None:
    """What a request does to a resource, by the first row that its path matches."""
    for row in table:
        if row.method == method and (found := row.pattern.fullmatch(path)) is not None:
            return ResourceUse(row, found.groupdict().get("id"))
    return None


def nothing_referred(body: Mapping[str, Any], raw: bytes) -> Sequence[Reference]:
    """Of a dialect whose bodies refer to nothing."""
    return ()


def nothing_made(path: str, body: Mapping[str, Any]) -> Making | None:
    """Of a dialect whose calls leave nothing behind."""
    return None
