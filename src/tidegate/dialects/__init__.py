"""Dialects: the meaning of requests, answers and refusals of each provider.

`DIALECTS` lists them. The functions here find the dialect and the endpoint of a path.

Invariant: an unknown path is not relayed, so that only models, calls of models and files of an
account can be reached. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from tidegate.dialects.anthropic import ANTHROPIC
from tidegate.dialects.bedrock import BEDROCK
from tidegate.dialects.gemini import GEMINI
from tidegate.dialects.openai import OPENAI
from tidegate.dialects.spec import Dialect, DialectSpec, Endpoint, Operation
from tidegate.errors import ConfigError, Forbidden, NotFound, UpstreamMissing
from tidegate.policy.deployment import Deployment, Upstream
from tidegate.policy.providers import first_dialect_in

# In the order in which they are tried for a path; OpenAI's is the default.
DIALECTS: dict[str, DialectSpec] = {
    spec.name: spec for spec in (BEDROCK, GEMINI, ANTHROPIC, OPENAI)
}
_POSTED = {path: call for spec in DIALECTS.values() for path, call in spec.calls.items()}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_SLASHES = re.compile(r"/{2,}")
_ROOTS = ("/v1/", "/v1beta/", "/v1alpha/", "/upload/", "/download/")
# Paths of clients whose base URL differs by one segment: with a version too many, with a segment of
# another gateway or provider, or without any.
_STEPS_OFF = (
    ("/v1beta/openai/v1/", "/v1/"),
    ("/v1beta/openai/", "/v1/"),
    ("/api/v1/", "/v1/"),
    ("/inference/v1/", "/v1/"),
    ("/compatible-mode/v1/", "/v1/"),
    ("/v1/openai/", "/v1/"),
    ("/openai/v1/", "/v1/"),
    ("/anthropic/v1/", "/v1/"),
    ("/v1/v1/", "/v1/"),
    ("/v1beta/v1/", "/v1/"),
    ("/v1/v1beta/", "/v1beta/"),
    ("/v1beta/v1beta/", "/v1beta/"),
)
_WITHOUT_VERSION = re.compile(
    r"/(?:messages(?:/count_tokens|/batches(?:/[\w\-]{1,200}(?:/\w{1,20})?)?)?|chat/completions|completions|responses(?:/compact|/input_tokens)?|embeddings"
    r"|images/(?:generations|edits|variations)|audio/(?:transcriptions|translations|speech)"
    r"|moderations|rerank|decisions|models(?:/[^:]{1,400})?)"
)
_GEMINI_WITHOUT_VERSION = re.compile(r"/(?:models|tunedModels)/[^/]{1,400}:\w{1,100}")


# Paths of clients of Azure and Vertex.
_CLOUDS = ("/openai/", "/v1/projects/", "/v1beta1/", "/v1/publishers/")
_DEPLOYMENTS = "/openai/deployments/"
_OF_BEDROCK = "/model/"
_VERTEX = re.compile(
    r"/(?P<version>v1(?:beta1)?)(?P<project>/projects/[^/]+/locations/[^/]+)?"
    r"/(?:publishers/google(?P<models>/models(?:/.+)?)|endpoints/openapi(?P<openai>/.+)"
    r"|(?P<counting>publishers/anthropic/models/count-tokens:rawPredict))"
)


def _of_a_cloud(plain: str) -> str | None:
    """Return the path that a path of Azure's or Vertex's form means; None for any other."""
    if plain.startswith(_DEPLOYMENTS):
        return plain
    if plain.startswith("/openai/"):
        return f"/v1/{plain.removeprefix('/openai/')}"
    if (found := _VERTEX.fullmatch(plain)) is None:
        return None
    if found["counting"]:
        return "/v1/messages/count_tokens"
    if found["openai"]:
        return f"/v1{found['openai']}"
    version = "v1" if found["version"] == "v1" else "v1beta"
    return f"/{version}{found['models']}"


def native_path(path: str) -> str | None:
    """Return the native path that a request means, known or not; None if it means none."""
    if path in _POSTED:
        return path
    plain = _SLASHES.sub("/", path)
    plain = plain.rstrip("/") if plain.startswith(_ROOTS) else plain
    for misspelt, correct in _STEPS_OFF:
        if plain.startswith(misspelt):
            return correct + plain[len(misspelt) :]
    if plain.startswith(_CLOUDS) and (meant := _of_a_cloud(plain)) is not None:
        return meant
    if plain.startswith(_ROOTS):
        return plain
    if plain.startswith(_OF_BEDROCK):
        return plain.rstrip("/")
    bare = plain.rstrip("/")
    if _GEMINI_WITHOUT_VERSION.fullmatch(bare):
        return f"/v1beta{bare}"
    return f"/v1{bare}" if _WITHOUT_VERSION.fullmatch(bare) else None


def dialect_of(path: str, headers: Set[bytes], query: bytes) -> Dialect:
    """Return the likely dialect of a request: by its path, or by its key if several dialects share
    the path.

    headers: the names of its headers, in lower case.
    """
    for spec in DIALECTS.values():
        if spec.recognizes(path, headers, query):
            break
    return spec.name


def endpoint_in(
    method: str, path: str, headers: Iterable[tuple[bytes, bytes]], query: bytes
) -> tuple[Endpoint | None, Dialect]:
    """Return the endpoint of a request, or None if there is none, and its dialect."""
    endpoint = _POSTED.get(path) if method == "POST" else None  # these depend on the path alone
    if endpoint is None:
        hint = dialect_of(path, {name for name, _ in headers}, query)
        endpoint = endpoint_of(method, path, hint)
        if endpoint is None:
            return None, hint
    return endpoint, endpoint.dialect


def endpoint_of(method: str, path: str, dialect: Dialect) -> Endpoint | None:
    """Return the endpoint of a request, or None if there is none. `dialect`, as `dialect_of`
    returns it, decides where the path alone does not."""
    if method == "POST" and (endpoint := _POSTED.get(path)) is not None:
        return endpoint
    endpoint = DIALECTS[dialect].endpoint_of(method, path)
    if endpoint is None and method in ("POST", "PUT"):  # no two dialects share such a path
        tried = (spec.endpoint_of(method, path) for spec in DIALECTS.values())
        calls = (one for one in tried if one is not None and one.resource is None)
        endpoint = next(calls, None)
    return endpoint


# Administration of a provider's account, for which no tenant has a key.
ADMINISTRATION = ("/v1/organization", "/v1/organizations", "/v1/compliance")
# Not open to `passthrough`: administration, and paths that are partly known.
_KNOWN_ROOTS = (
    *ADMINISTRATION,
    *("/v1/models", "/v1/files", "/v1/batches"),
    "/v1/messages/batches",
    *("/v1beta/models", "/v1beta/tunedModels", "/v1beta/files", "/v1beta/batches"),
    "/v1beta/fileSearchStores",
)


def is_known(path: str) -> bool:
    """Return whether a path, or one below it, is relayed or rejected by its own rule, so that an
    upstream's `passthrough` must not name it. `path` may end with `/*`."""
    stem = path.removesuffix("/*")
    if stem.startswith(tuple(f"{root}/" for root in _KNOWN_ROOTS)) or stem in _KNOWN_ROOTS:
        return True
    if any(methods_at(stem, dialect) for dialect in Dialect):
        return True
    below = f"{stem}/"
    return path != stem and any(one.startswith(below) for one in (*_POSTED, *_KNOWN_ROOTS))


def check_passthrough(upstreams: Iterable[Upstream]) -> None:
    """Raise ConfigError if a `passthrough` names a path that Tidegate handles itself."""
    for one in upstreams:
        for pattern in one.passthrough:
            if is_known(pattern):
                allowed = "must be a path that Tidegate does not know itself, nor one below it"
                raise ConfigError(f"upstreams.{one.name}.passthrough", pattern, allowed)


# Each part begins with a letter, a digit or an underscore, so that none is `.` or `..`.
_PLAIN_PATH = re.compile(r"(?:/\w[\w.:@-]*)+", re.ASCII)


@dataclass(frozen=True, slots=True)
class _OpenedPaths:
    """The paths that an upstream's `passthrough` opens, and the tenants that may call them, all if
    empty. lacking: what this process lacks for the upstream; empty if it can use it."""

    upstream: str
    dialect: Dialect
    patterns: tuple[str, ...]
    tenants: tuple[str, ...]
    lacking: str = ""

    @classmethod
    def of(cls, one: Upstream) -> _OpenedPaths:
        dialect = Dialect(next(iter(one.base_urls)))
        return cls(one.name, dialect, one.passthrough, one.passthrough_tenants)

    @classmethod
    def missing(cls, name: str, table: Mapping[str, Any], lacking: str) -> _OpenedPaths:
        dialect = Dialect(first_dialect_in(name, table))
        opened, tenants = table.get("passthrough", ()), table.get("passthrough_tenants", ())
        return cls(name, dialect, tuple(opened), tuple(tenants), lacking)

    def has(self, path: str) -> bool:
        stems = ((one.removesuffix("/*"), one) for one in self.patterns)
        return any(
            path == stem or (stem != one and path.startswith(f"{stem}/")) for stem, one in stems
        )


class Passthrough:
    """The paths that upstreams open by `passthrough`, in the order of the upstreams, drained ones
    last. Immutable."""

    def __init__(self, deployment: Deployment) -> None:
        """Raises ConfigError for a path that Tidegate handles itself."""
        check_passthrough(deployment.upstreams)
        tables, drained = deployment.tables, deployment.drained | deployment.live.drained
        places = {name: at for at, name in enumerate(tables)}
        found = [_OpenedPaths.of(one) for one in deployment.upstreams]
        for name, wrong in deployment.missing.items():
            found.append(_OpenedPaths.missing(name, tables.get(name, {}), wrong.variable))
        found.sort(key=lambda one: (one.upstream in drained, places.get(one.upstream, 0)))
        self._opened = {one.upstream: one for one in found if one.patterns}

    def endpoint(self, path: str, spoken: Dialect) -> Endpoint | None:
        """Return the endpoint of a path; of several dialects the caller's own. None if no upstream
        opens it."""
        if not self._opened or _PLAIN_PATH.fullmatch(path) is None or is_known(path):
            return None
        found = [one for one in self._opened.values() if one.has(path)]
        if not found:
            return None
        dialects = [one.dialect for one in found]
        dialect = spoken if spoken in dialects else dialects[0]
        names = tuple(one.upstream for one in found if one.dialect is dialect)
        below = path.removeprefix("/v1") if dialect is Dialect.OPENAI else path
        return Endpoint(dialect, Operation.OTHER, below, upstreams=names)

    def upstream(self, endpoint: Endpoint, tenant_id: str) -> str:
        """Return the name of the upstream of a tenant's call: the first one that is open to it,
        since no other account has its objects. Raises UpstreamMissing if this process cannot use
        that one, Forbidden and NotFound."""
        left = [self._opened[name] for name in endpoint.upstreams if name in self._opened]
        if not left:
            raise NotFound("the upstream of this path is not configured any more")
        for one in left:
            if not one.tenants or tenant_id in one.tenants:
                if one.lacking:
                    raise UpstreamMissing("this path", {one.upstream: one.lacking})
                return one.upstream
        raise Forbidden(f"this path is not open to the tenant {tenant_id}")


def methods_at(path: str, dialect: Dialect) -> tuple[str, ...]:
    """Return the methods by which a path is relayed; none if it is unknown."""
    return tuple(one for one in METHODS if endpoint_of(one, path, dialect) is not None)
