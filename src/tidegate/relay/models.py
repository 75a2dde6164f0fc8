"""The list of models, as all upstreams of a dialect together have it.

Invariant: a caller sees the models that it may ask here, under the names by which it may ask them;
an upstream that gives no list leaves out its own, and spoils nobody else's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from tidegate.call import Caller
from tidegate.errors import UpstreamError, UpstreamGarbled
from tidegate.policy.upstreams import Upstream
from tidegate.providers.relay import RelayWire
from tidegate.relay.call import CallFailed, NativeCall
from tidegate.relay.headers import to_send, with_key
from tidegate.relay.paths import Dialect
from tidegate.relay.refusal import refusal_of
from tidegate.relay.targets import Target

_KEPT_S = 60.0
_LONGEST_BYTES = 4_000_000
# path, key of the list, key of a model's name
_SHAPES = {
    Dialect.OPENAI: ("/models", "data", "id"),
    Dialect.ANTHROPIC: ("/v1/models?limit=1000", "data", "id"),
    Dialect.GEMINI: ("/v1beta/models?pageSize=1000", "models", "name"),
}
_FOLDER = "models/"


@dataclass(frozen=True, slots=True)
class _Listed:
    at: float
    models: list[dict[str, Any]]


class Models:
    """One per process; each upstream's list is kept for a minute."""

    def __init__(self, wire: RelayWire) -> None:
        self._wire = wire
        self._lists: dict[tuple[str, Dialect], _Listed] = {}

    async def listed(
        self, call: NativeCall, upstreams: list[Upstream], routes: Mapping[str, Target]
    ) -> bytes:
        """The body of the answer; `routes` are the names that routes give, and whom each leads to.
        Raises CallFailed where no upstream gave a list."""
        dialect = call.endpoint.dialect
        found = await asyncio.gather(
            *(self._of(call, one) for one in upstreams), return_exceptions=True
        )
        models: dict[str, dict[str, Any]] = {}
        failure: BaseException | None = None
        for upstream, result in zip(upstreams, found, strict=True):
            if isinstance(result, BaseException):
                failure = result
                continue
            for model in _shown(dialect, upstream, result):
                models.setdefault(str(model[_SHAPES[dialect][2]]), model)
        if failure is not None and len(models) == 0:
            raise failure
        for name, target in routes.items():
            models[_named(dialect, name)] = _as(
                dialect, name, models.get(_named(dialect, target.model), {})
            )
        allowed = [one for name, one in models.items() if call.caller.may_ask(name)]
        return orjson.dumps(_whole(dialect, allowed))

    async def _of(self, call: NativeCall, upstream: Upstream) -> list[dict[str, Any]]:
        dialect = call.endpoint.dialect
        known = self._lists.get((upstream.name, dialect))
        if known is None or time.monotonic() - known.at > _KEPT_S:
            models = await self._asked(call, upstream)
            known = self._lists[upstream.name, dialect] = _Listed(time.monotonic(), models)
        return known.models

    async def _asked(self, call: NativeCall, upstream: Upstream) -> list[dict[str, Any]]:
        dialect, target = call.endpoint.dialect, Target(upstream, "")
        path, key, name = _SHAPES[dialect]
        url = f"{upstream.base_urls[dialect]}{path}"
        given = [pair for pair in call.headers if pair[0] == b"anthropic-version"]
        headers = with_key([*given, *to_send([])], dialect, upstream.key)
        try:
            exchange = await self._wire.open("GET", self._wire.place(url), headers, None)
            try:
                if exchange.status >= 300:
                    raise await refusal_of(exchange, target, dialect)
                body = orjson.loads(await exchange.read(_LONGEST_BYTES))
                models = [one for one in body[key] if isinstance(one[name], str)]
            finally:
                exchange.close()
        except UpstreamError as error:
            raise CallFailed(error, target) from None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise CallFailed(UpstreamGarbled("the list of models is not one"), target) from None
        return models


def is_plain(caller: Caller, upstreams: list[Upstream], routes: Mapping[str, Target]) -> bool:
    """Whether the only upstream's own list says it all."""
    only = upstreams[0]
    alone = len(upstreams) == 1 and not routes
    return alone and caller.models is None and only.models == ("*",) and not only.aliases


def _shown(
    dialect: Dialect, upstream: Upstream, models: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Those that may be asked by their own name, and the aliases."""
    key = _SHAPES[dialect][2]
    folder = _named(dialect, "")
    found = [one for one in models if upstream.fit(one[key].removeprefix(folder))]
    by_name = {one[key].removeprefix(folder): one for one in models}
    for alias, name in upstream.aliases.items():
        found.append(_as(dialect, alias, by_name.get(name, {})))
    return found


def _named(dialect: Dialect, model: str) -> str:
    return f"{_FOLDER}{model}" if dialect is Dialect.GEMINI else model


def _as(dialect: Dialect, name: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """A model by another name."""
    return {**model, _SHAPES[dialect][2]: _named(dialect, name)}


def _whole(dialect: Dialect, models: list[dict[str, Any]]) -> dict[str, Any]:
    if dialect is Dialect.GEMINI:
        return {"models": models}
    if dialect is Dialect.ANTHROPIC:
        ends = [models[0]["id"], models[-1]["id"]] if models else [None, None]
        return {"data": models, "has_more": False, "first_id": ends[0], "last_id": ends[1]}
    return {"object": "list", "data": models}
