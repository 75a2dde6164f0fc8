"""The rate-limit APIs of providers: our reader against answers as documented, and odd ones."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from tests.contract.test_usage_api import of_anthropic, of_openai, server, wire
from tidegate.errors import UpstreamGarbled
from tidegate.policy.imported import ModelClass, limits_of, one_class_each
from tidegate.upstream.transport import RelayWire
from tidegate.upstream.usage_api import reported_limits

__all__ = ["wire"]

MODELS = ("claude-opus-5", "claude-opus-5-1")


def group(models: tuple[str, ...], **bounds: int | None) -> dict[str, Any]:
    limits = [{"type": name, "value": value} for name, value in bounds.items()]
    return {"type": "rate_limit", "group_type": "model_group", "models": models, "limits": limits}


async def classes(
    wire: RelayWire, own: dict[str, Any], of_workspace: dict[str, Any] | None = None
) -> tuple[ModelClass, ...]:
    async def handle(request: web.Request) -> web.Response:
        found = of_workspace if "workspaces" in request.path else own
        return web.json_response({"data": [found], "next_page": None})

    workspace = None if of_workspace is None else "wrkspc_1"
    async with server(handle) as base:
        return (await reported_limits(wire, of_anthropic(base), workspace=workspace)).classes


@pytest.mark.parametrize(
    ("overridden", "bound"),
    [
        (group(MODELS, requests_per_minute=20), 20),
        # A higher one is stored, and the organization's is enforced.
        (group(MODELS, requests_per_minute=90), 50),
        # Names in another order, and an alias that the organization's entry does not have.
        (group((*MODELS[::-1], "claude-opus-latest"), requests_per_minute=20), 20),
        (group(MODELS, requests_per_minute=None), 50),
        (group(MODELS, requests_per_minute=0), 50),
        (group(("claude-haiku-5",), requests_per_minute=20), 50),
        (group(MODELS), 50),
    ],
)
async def test_of_a_workspace_the_lower_bound_counts(
    wire: RelayWire, overridden: dict[str, Any], bound: int
) -> None:
    own = group(MODELS, requests_per_minute=50)
    assert await classes(wire, own, overridden) == (ModelClass(MODELS, {"rpm": bound}),)


async def test_a_bound_of_nothing_is_no_limit_of_that_unit(wire: RelayWire) -> None:
    own = group(MODELS, requests_per_minute=50, output_tokens_per_minute=0)
    assert await classes(wire, own) == (ModelClass(MODELS, {"rpm": 50}),)
    nothing = group(MODELS, output_tokens_per_minute=0)
    assert await classes(wire, nothing) == (ModelClass(MODELS, {}),)
    of_workspace = group(MODELS, output_tokens_per_minute=7)
    assert await classes(wire, nothing, of_workspace) == (ModelClass(MODELS, {"otpm": 7}),)


async def test_no_pattern_matches_a_model_that_the_account_does_not_limit(wire: RelayWire) -> None:
    fast = ("claude-opus-5-fast",)
    groups = [group(MODELS, requests_per_minute=50), group(fast, requests_per_minute=0)]
    models = {"gpt-5": 500, "gpt-5-2026-08-07": 500, "gpt-5-mini": 0}
    rows = [{"model": model, "max_requests_per_1_minute": rpm} for model, rpm in models.items()]

    async def handle(request: web.Request) -> web.Response:
        if "projects" in request.path:
            return web.json_response({"data": rows, "has_more": False})
        return web.json_response({"data": groups, "next_page": None})

    async with server(handle) as base:
        anthropic = await reported_limits(wire, of_anthropic(base))
        openai = await reported_limits(wire, of_openai(base), project="proj_1")
    named = limits_of(one_class_each(anthropic.classes, ()), "anthropic")
    assert list(named) == ["rpm:claude-opus-5,claude-opus-5-1"]
    named = limits_of(one_class_each(openai.classes, ()), "openai")
    assert list(named) == ["rpm:gpt-5,gpt-5-2*"]


async def test_input_with_cache_reads_and_without_are_two_limits(wire: RelayWire) -> None:
    own = group(MODELS, input_tokens_per_minute=900_000, input_tokens_per_minute_cache_aware=40_000)
    limits = limits_of(await classes(wire, own), "anthropic")
    found = {name: (value["bound"], value.get("unit")) for name, value in limits.items()}
    whom = "claude-opus-5*"
    assert found == {f"itpm:{whom}": (900_000, "input_tokens"), f"uitpm:{whom}": (40_000, None)}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"data": None},
        {"object": "error", "message": "try later"},
        {"data": [{"id": "rl-m", "model": "m", "max_requests_per_1_minute": 5}], "has_more": True},
    ],
)
async def test_a_list_that_is_not_whole_takes_no_limit_away(wire: RelayWire, body: Any) -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.json_response(body)

    async with server(handle) as base:
        with pytest.raises(UpstreamGarbled, match="rate-limit API"):
            await reported_limits(wire, of_openai(base), project="proj_1")


@pytest.mark.parametrize("models", ["claude-opus-5", 5, [{"id": "claude-opus-5"}], {"a": 1}])
async def test_models_that_are_no_list_of_names_are_refused(wire: RelayWire, models: Any) -> None:
    with pytest.raises(UpstreamGarbled, match="rate-limit API has models"):
        await classes(wire, {**group(MODELS, requests_per_minute=50), "models": models})


async def test_an_answer_that_nests_too_deep_is_refused(wire: RelayWire) -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(text="[" * 100_000)

    async with server(handle) as base:
        with pytest.raises(UpstreamGarbled, match="did not answer with JSON"):
            await reported_limits(wire, of_openai(base), project="proj_1")


async def test_a_bound_that_no_limit_can_have_is_no_limit_of_that_unit(wire: RelayWire) -> None:
    own = group(MODELS, requests_per_minute=50, output_tokens_per_minute=2**63 - 1)
    assert await classes(wire, own) == (ModelClass(MODELS, {"rpm": 50}),)


@pytest.mark.parametrize("model", ["gpt 5", "gpt-5|x", "*", "a,b", "total", "tenant/acme"])
async def test_a_model_that_no_id_can_name_keeps_no_other_from_being_imported(
    wire: RelayWire, model: str
) -> None:
    row = {"max_requests_per_1_minute": 5}

    async def handle(request: web.Request) -> web.Response:
        if "projects" in request.path:
            rows = [{"model": model, **row}, {"model": "gpt-5", **row}]
            return web.json_response({"data": rows, "has_more": False})
        own = [group((model, "claude-opus-5"), requests_per_minute=5)]
        return web.json_response({"data": own, "next_page": None})

    async with server(handle) as base:
        openai = await reported_limits(wire, of_openai(base), project="proj_1")
        anthropic = await reported_limits(wire, of_anthropic(base))
    assert openai.skipped == anthropic.skipped == (model,)
    assert list(limits_of(openai.classes, "openai")) == ["rpm:gpt-5"]
    assert list(limits_of(anthropic.classes, "anthropic")) == ["rpm:claude-opus-5"]


async def test_a_limit_that_two_pages_list_differently_is_the_lower_one(wire: RelayWire) -> None:
    """As where it is changed between the two."""

    async def handle(request: web.Request) -> web.Response:
        bound = 90 if "after" in request.query or "page" in request.query else 50
        if "projects" in request.path:
            row = {"id": "rl-5", "model": "gpt-5", "max_requests_per_1_minute": bound}
            more = {"has_more": bound == 50, "last_id": "rl-5"}
            return web.json_response({"data": [row], **more})
        own = [group(("claude-opus-5",), requests_per_minute=bound)]
        return web.json_response({"data": own, "next_page": "2" if bound == 50 else None})

    async with server(handle) as base:
        openai = await reported_limits(wire, of_openai(base), project="proj_1")
        anthropic = await reported_limits(wire, of_anthropic(base))
    for reported, name in ((openai, "gpt-5"), (anthropic, "claude-opus-5")):
        for classes in (reported.classes, reported.classes[::-1]):
            found = limits_of(one_class_each(classes, []), "")
            assert {limit: one["bound"] for limit, one in found.items()} == {f"rpm:{name}": 50}


@pytest.mark.parametrize("more", [{"next_page": "p1"}, {"last_id": "rl-9"}])
async def test_a_page_that_names_itself_as_the_next_ends_the_list(
    wire: RelayWire, more: dict[str, str]
) -> None:
    asked = 0

    async def handle(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response({"data": [], "has_more": True, **more})

    async with server(handle) as base:
        with pytest.raises(UpstreamGarbled, match="rate-limit API names one page twice"):
            await reported_limits(wire, of_openai(base), project="proj_1")
    assert asked == 2
