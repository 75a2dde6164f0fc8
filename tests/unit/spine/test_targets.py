"""Who is asked for which model, and in which order."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.policy.test_waiting import QUEUED
from tidegate.call import Kind, Status
from tidegate.dialects.spec import Dialect
from tidegate.errors import ConfigError, Forbidden, InvalidRequest, NotFound, UpstreamMissing
from tidegate.policy.deployment import Deployment, Route, Upstream
from tidegate.policy.live import LiveChanges, LiveUpstream
from tidegate.prices.rates import Price
from tidegate.settings import Config
from tidegate.spine.affinity import Affinity
from tidegate.spine.models import among_fetching, targets_for_prompt
from tidegate.spine.prompt import dialect_at, form_at
from tidegate.spine.routing import RemainingCapacity, Target, Targets

GEMINI = Upstream("gemini", {"gemini": "http://g", "openai": "http://g/openai"}, "k")
OPENAI = Upstream("openai", {"openai": "http://o"}, "k", ("gpt-*",), {"fast": "gpt-mini"})
TWIN = Upstream("twin", {"openai": "http://t"}, "k", ("gpt-*",), weight=3)


def targets(*routes: Route) -> Targets:
    return Targets(Deployment((GEMINI, OPENAI, TWIN), routes), Random(1))


def names(found: Targets, model: str, dialect: Dialect = Dialect.OPENAI) -> list[tuple[str, str]]:
    return [(one.upstream.name, one.model) for one in found.of(dialect, model)]


def test_who_names_the_model_comes_before_who_takes_any() -> None:
    found = targets()
    assert {name for name, _ in names(found, "gpt-x")} == {"openai", "twin"}
    assert names(found, "gemini-x") == [("gemini", "gemini-x")]
    assert names(found, "models/gemini-x", Dialect.GEMINI) == [("gemini", "gemini-x")]


def test_a_model_of_one_letter_that_is_named_comes_before_who_takes_any() -> None:
    own = Upstream("own", {"openai": "http://own"}, "k", ("m",))
    found = Targets(Deployment((GEMINI, own)), Random(1))
    assert names(found, "m") == [("own", "m")]
    assert [one.upstream.name for one in found.of_prompt("m", Kind.TEXT_ONLY)] == ["own"]
    assert names(found, "n") == [("gemini", "n")]


def test_an_alias_names_the_upstreams_own_model() -> None:
    assert names(targets(), "fast") == [("openai", "gpt-mini")]


def test_equals_are_drawn_by_weight_and_all_stand_in() -> None:
    found = targets()
    firsts = Counter(names(found, "gpt-x")[0][0] for _ in range(4000))
    assert firsts["twin"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert len(names(found, "gpt-x")) == 2


def priced(name: str, usd: float, weight: int = 1) -> Upstream:
    price = Price(input=usd, output=4 * usd)
    return Upstream(name, {"openai": "http://o"}, "k", ("m",), weight=weight, prices={"*": price})


def test_of_equals_the_cheapest_is_asked_first_and_those_of_one_price_by_chance() -> None:
    found = Targets(Deployment((priced("a", 3), priced("b", 1), priced("c", 1))), Random(1))
    orders = Counter("".join(name for name, _ in names(found, "m")) for _ in range(1_000))
    assert orders.keys() == {"bca", "cba"}
    assert orders["bca"] == pytest.approx(500, abs=80)
    prompts = {"".join(one.upstream.name for one in found.of_prompt("m")) for _ in range(99)}
    assert prompts == orders.keys()
    chosen = {found_home(found, b"%d" % number).upstream.name for number in range(99)}
    assert chosen == {"b", "c"}, "a conversation begins at one of the cheapest"


def found_home(found: Targets, key: bytes) -> Target:
    home = Affinity(200).home(key, found.of(Dialect.OPENAI, "m"))
    assert home is not None
    return home.target


@pytest.mark.parametrize(
    "dear",
    [priced("dear", 3, weight=2), Upstream("dear", {"openai": "http://o"}, "k", ("m",))],
    ids=["weighted", "of unknown price"],
)
def test_a_weight_or_an_unknown_price_leaves_the_choice_to_chance(dear: Upstream) -> None:
    found = Targets(Deployment((dear, priced("b", 1))), Random(1))
    assert {names(found, "m")[0][0] for _ in range(99)} == {"dear", "b"}


def test_models_that_clients_think_of_leave_others_their_equals() -> None:
    twins = tuple(Upstream(name, {"openai": "http://o"}, "k") for name in ("one", "two"))
    found = Targets(Deployment(twins), Random(1))
    for number in range(1_500):
        names(found, f"made-up-{number}")
    names(found, "gpt-x")
    assert found.are_equivalent(Dialect.OPENAI, "gpt-x"), "its conversations stay where they are"
    assert len(found._known) <= 1_000


def test_a_route_is_a_chain_in_its_order() -> None:
    route = Route("smart*", (("openai", "gpt-x"), ("gemini", "gemini-pro"), ("twin", None)))
    found = targets(route)
    assert names(found, "smart-1") == [
        ("openai", "gpt-x"),
        ("gemini", "gemini-pro"),
        ("twin", "smart-1"),
    ]
    assert names(found, "smart-1", Dialect.GEMINI) == [("gemini", "gemini-pro")]


def test_a_model_that_nobody_serves_is_not_found() -> None:
    with pytest.raises(NotFound, match="'claude' in the anthropic dialect, but in: gemini, openai"):
        targets().of(Dialect.ANTHROPIC, "claude")
    with pytest.raises(NotFound, match=r"'claude' in the openai dialect$"):
        Targets(Deployment((OPENAI,), ())).of(Dialect.OPENAI, "claude")


def test_a_call_that_names_no_model_goes_to_who_speaks_that_dialect_first() -> None:
    assert {name for name, _ in names(targets(), "")} == {"openai", "twin"}
    assert names(targets(), "", Dialect.GEMINI) == [("gemini", "")]


CLAUDE = Upstream("claude", {"anthropic": "http://c"}, "k", ("claude-*",))
LOCAL = Upstream("local", {"openai": "http://l"}, "")
ALL = (GEMINI, OPENAI, TWIN, CLAUDE, LOCAL)
DRAWS = Kind.IMAGE_GENERATION


def of_prompt(model: str, *given: Any, routes: tuple[Route, ...] = ()) -> list[tuple[str, str]]:
    found = Targets(Deployment(ALL, routes), Random(1)).of_prompt(model, *given)
    return [(one.upstream.name, one.model) for one in found]


def test_a_prompt_is_of_no_dialect() -> None:
    assert of_prompt("claude-x") == [("claude", "claude-x")]
    assert of_prompt("fast") == [("openai", "gpt-mini")]
    assert sorted(of_prompt("gpt-x")) == [("openai", "gpt-x"), ("twin", "gpt-x")]
    chain = Route("smart", (("claude", "claude-x"), ("openai", "gpt-x"), ("gemini", "pro")))
    assert of_prompt("smart", routes=(chain,)) == [*chain.targets]


def test_a_model_that_nobody_names_is_geminis_for_a_prompt() -> None:
    for model in ("gemini-pro", "models/gemini-pro", "whatever"):
        assert of_prompt(model) == [("gemini", model.removeprefix("models/"))]
    without = Targets(Deployment((OPENAI, LOCAL)))
    assert [one.upstream.name for one in without.of_prompt("whatever")] == ["local"]


@pytest.mark.parametrize(
    ("kind", "files", "left"),
    [
        (DRAWS, (), ["openai", "gemini"]),
        (DRAWS, (("image/gif", 9),), ["gemini"]),
        (Kind.MULTI_MODAL, (("audio/wav", 9),), ["openai", "gemini"]),
        (Kind.MULTI_MODAL, (("video/mp4", 9),), ["gemini"]),
        (Kind.MULTI_MODAL, (("text/csv", 9), ("image/*", 0)), ["claude", "openai", "gemini"]),
        (Kind.MULTI_MODAL, (("application/pdf", 30_000_000),), ["openai", "gemini"]),
        (Kind.MULTI_MODAL, (("image/png", 7_500_001),), ["openai", "gemini"]),
        (Kind.MULTI_MODAL, (("image/png", 7_500_000),) * 2, ["claude", "openai", "gemini"]),
    ],
)
def test_only_upstreams_that_can_take_a_prompt_are_in_its_chain(
    kind: Kind, files: tuple[tuple[str, int], ...], left: list[str]
) -> None:
    chain = Route("smart", (("claude", "claude-x"), ("openai", "gpt-x"), ("gemini", "pro")))
    assert [name for name, _ in of_prompt("smart", kind, files, routes=(chain,))] == left


@pytest.mark.parametrize(
    ("dialects", "model", "spoken"),
    [
        (("openai", "anthropic", "bedrock"), "us.anthropic.claude-x-v1:0", Dialect.ANTHROPIC),
        (("openai", "anthropic", "bedrock"), "openai.gpt-oss", Dialect.OPENAI),
        (("gemini", "anthropic", "openai"), "claude-x@20990101", Dialect.ANTHROPIC),
        (("gemini", "anthropic", "openai"), "gemini-x", Dialect.GEMINI),
        (("openai",), "anthropic/claude-x", Dialect.OPENAI),
    ],
)
def test_a_prompt_for_a_claude_is_a_message_where_its_upstream_speaks_that(
    dialects: tuple[str, ...], model: str, spoken: Dialect
) -> None:
    cloud = Upstream("cloud", dict.fromkeys(dialects, "http://c"), "k", aliases={"smart": model})
    found = Targets(Deployment((cloud,)), Random(1))
    for target in (*found.of_prompt("smart"), *targets_for_prompt(found, "cloud", "smart")):
        assert dialect_at(target, Kind.TEXT_ONLY, ()) is spoken
    for bound in (None, "cloud"):
        if spoken is Dialect.ANTHROPIC:
            with pytest.raises(InvalidRequest, match="makes no images"):
                targets_for_prompt(found, bound, "smart", DRAWS)


@pytest.mark.parametrize(
    ("url", "own", "provider"),
    [
        ("https://api.openai.com/v1", True, "openai"),
        ("https://api.x.ai/v1", False, "xai"),
        ("https://api.together.xyz/v1", False, "together"),
        ("https://openrouter.ai/api/v1", False, "openrouter"),
        ("https://api.mistral.ai/v1", False, "mistral"),
        ("http://127.0.0.1:8000/v1", False, None),
    ],
)
def test_a_prompt_is_written_as_its_provider_reads_it(
    url: str, own: bool, provider: str | None
) -> None:
    prices = SimpleNamespace(most=lambda model: (None, None))
    lane: Any = SimpleNamespace(demands=SimpleNamespace(prices=prices))
    form = form_at(Target(Upstream("one", {"openai": url}, "k"), "m"), lane, streams=True)
    assert (form.streams, form.own, form.provider) == (True, own, provider)


@pytest.mark.parametrize(
    ("model", "given", "field", "said", "allowed"),
    [
        ("claude-x", (DRAWS,), "model", "'claude-x' makes no images", "a model that makes images"),
        (
            *("claude-x", (Kind.MULTI_MODAL, (("audio/wav", 9),)), "files"),
            *("takes no audio/wav", "PNG, JPEG, WebP, GIF, PDF and text, 24 MB in all"),
        ),
        (
            *("fast", (Kind.MULTI_MODAL, (("video/mp4", 9),)), "files"),
            *("'openai' of the model 'fast' takes no video/mp4", "PNG, JPEG, WebP, GIF, PDF, WAV"),
        ),
    ],
)
def test_a_prompt_that_nobody_can_take_is_told_why(
    model: str, given: tuple[Any, ...], field: str, said: str, allowed: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        of_prompt(model, *given)
    assert refused.value.field == field
    assert said in refused.value.message
    assert str(refused.value.allowed).startswith(allowed)


def test_an_upstream_of_bedrocks_dialect_alone_takes_no_prompts() -> None:
    cloud = Targets(Deployment((Upstream("cloud", {"bedrock": "http://b"}, "k"),)))
    for bound in (None, "cloud"):
        with pytest.raises(InvalidRequest, match="speaks the bedrock dialect alone") as refused:
            targets_for_prompt(cloud, bound, "amazon.nova-pro-v1:0", Kind.TEXT_ONLY)
        assert str(refused.value.allowed).startswith("an upstream that speaks OpenAI's")


def test_a_prompt_for_a_model_that_nobody_serves_is_told_what_there_is() -> None:
    with pytest.raises(InvalidRequest, match="no upstream serves the model") as no:
        Targets(Deployment((OPENAI,))).of_prompt("gemini-2.5-flash")
    assert (no.value.field, no.value.allowed) == ("model", "openai: gpt-*")


@pytest.mark.parametrize(
    ("model", "pools"),
    [
        *(("gpt-x", ["openai", "twin"]), ("gpt-mini", ["openai", "twin"]), ("x", ["gemini"])),
        ("gpt-routed", ["openai", "twin"]),
        ("pro", ["gemini", "openai"]),  # the route's own name for it, at openai
    ],
)
def test_a_limit_on_a_model_belongs_to_the_pools_that_call_it(model: str, pools: list[str]) -> None:
    found = targets(Route("smart", (("openai", "pro"), ("twin", "gpt-routed"))))
    assert found.pools_for(model) == pools


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({"model": "fast"}, [("openai", "gpt-mini")]),
        ({"model": "models/gemini-x"}, [("gemini", "gemini-x")]),
        ({"model": "smart"}, [("twin", "gpt-x"), ("gemini", "smart")]),
        ({"model": "smart", "kind": None}, [("openai", "gpt-mini")]),  # for the classifier
        ({"model": None}, [("gemini", "gemini-text")]),
        ({"model": "gpt-x", "status": Status.RUNNING, "upstream": "twin"}, [("twin", "gpt-x")]),
    ],
)
def test_a_job_of_one_queue_waits_for_limits_of_the_pools_that_its_model_is_called_in(
    changes: dict[str, Any], places: list[tuple[str, str]]
) -> None:
    config = Config(text_model="gemini-text", classifier_model="fast")
    found = targets(Route("smart", (("twin", "gpt-x"), ("gemini", None))))
    seen = found.places_of(replace(QUEUED, **changes), config)
    assert [(one.pool, one.model) for one in seen] == places


def passing(*patterns: str) -> Targets:
    upstream = Upstream("new", {"openai": "http://n/v1"}, "k", passthrough=patterns)
    return Targets(Deployment((GEMINI, upstream)), Random(1))


@pytest.mark.parametrize(
    ("path", "below"),
    [
        ("/v1/new-thing", "/new-thing"),
        ("/v1/evals", "/evals"),
        ("/v1/evals/e_1/runs", "/evals/e_1/runs"),
        ("/v1/evalsx", None),
        ("/v1/new-thing/below", None),
        ("/v1/evals/../models", None),
        ("/v1/evals/%2e%2e/models", None),
        ("/v1/evals//x", None),
        ("/v1/chat/completions", None),
    ],
)
def test_a_path_that_an_upstream_passes_through_goes_there(path: str, below: str | None) -> None:
    found = passing("/v1/new-thing", "/v1/evals/*").passthrough.endpoint(path, Dialect.OPENAI)
    assert (found and (found.path, found.upstreams)) == (below and (below, ("new",)))
    assert targets().passthrough.endpoint(path, Dialect.OPENAI) is None


def test_of_upstreams_that_pass_a_path_each_tenant_has_the_first_that_is_open_to_it() -> None:
    def account(name: str, *tenants: str, dialect: str = "openai") -> Upstream:
        paths = ("/v1/evals/*",)
        urls = {dialect: "http://n"}
        return Upstream(name, urls, "k", passthrough=paths, passthrough_tenants=tenants)

    of_a, of_claude = account("one", "a", "b"), account("three", "c", dialect="anthropic")
    found = Targets(Deployment((of_a, account("two", "b", "d"), of_claude)), Random(1))
    endpoint = found.passthrough.endpoint("/v1/evals/e", Dialect.OPENAI)
    assert endpoint is not None
    given = {tenant: found.passthrough.upstream(endpoint, tenant) for tenant in "abd"}
    assert given == {"a": "one", "b": "one", "d": "two"}
    with pytest.raises(Forbidden, match="not open to the tenant c"):
        found.passthrough.upstream(endpoint, "c")
    spoken = {dialect: found.passthrough.endpoint("/v1/evals/e", dialect) for dialect in Dialect}
    names = {dialect: one.upstreams for dialect, one in spoken.items() if one is not None}
    assert names.pop(Dialect.ANTHROPIC) == ("three",)
    assert set(names.values()) == {("one", "two")}


def test_a_path_belongs_to_its_first_upstream_also_where_that_one_is_missing() -> None:
    paths = ("/v1/evals/*",)
    usable = Upstream("two", {"openai": "http://n"}, "k", passthrough=paths)
    table = {"base_url": "http://m", "passthrough": list(paths), "passthrough_tenants": ["a"]}
    tables = {"one": table, "two": {"base_url": "http://n", "passthrough": list(paths)}}
    missing = {"one": ConfigError("KEY", "(not set)", "must be set")}
    found = Targets(Deployment((usable,), missing=missing, tables=tables), Random(1))
    endpoint = found.passthrough.endpoint("/v1/evals/e", Dialect.OPENAI)
    assert endpoint is not None
    assert found.passthrough.upstream(endpoint, "b") == "two"
    with pytest.raises(UpstreamMissing, match="this path: one lacks KEY"):
        found.passthrough.upstream(endpoint, "a")
    drained = LiveChanges({"one": LiveUpstream(is_drained=True)})
    after = Targets(Deployment((usable,), missing=missing, tables=tables, live=drained), Random(1))
    endpoint = after.passthrough.endpoint("/v1/evals/e", Dialect.OPENAI)
    assert endpoint is not None
    assert after.passthrough.upstream(endpoint, "a") == "two"


@pytest.mark.parametrize(
    "pattern",
    [
        *("/v1/chat/completions", "/v1/chat/*", "/v1/images/*", "/v1/models", "/v1/models/x"),
        *("/v1/organization", "/v1/organization/costs", "/v1/organization/*", "/v1/files/*"),
        *("/v1/batches", "/v1beta/models/*", "/v1/responses/resp_1", "/v1/audio/speech"),
    ],
)
def test_no_path_that_is_known_can_be_passed_through(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"upstreams\.new\.passthrough"):
        passing(pattern)


def test_a_drained_upstream_is_a_target_only_where_no_other_one_would_be() -> None:
    route = Route("smart", (("openai", "gpt-x"), ("twin", "gpt-x")))
    upstreams = (GEMINI, OPENAI, TWIN)
    found = Targets(Deployment(upstreams, (route,), drained=frozenset({"openai"})), Random(1))
    assert names(found, "gpt-x") == [("twin", "gpt-x")]
    assert names(found, "smart") == [("twin", "gpt-x")]
    assert names(found, "fast") == [("gemini", "fast")], "one that takes any model"
    assert [one.name for one in found.in_service(Dialect.OPENAI)] == ["gemini", "twin"]
    found.replace(Deployment(upstreams, (route,), drained=frozenset({"openai", "twin", "gemini"})))
    assert {name for name, _ in names(found, "gpt-x")} == {"openai", "twin"}
    assert len(found.in_service(Dialect.OPENAI)) == 3
    found.replace(Deployment((GEMINI,)))
    assert names(found, "gpt-x") == [("gemini", "gpt-x")]


def test_upstreams_that_can_not_be_leave_those_that_there_were() -> None:
    found = targets()
    wrong = Upstream("new", {"openai": "http://n"}, "k", passthrough=("/v1/chat/completions",))
    with pytest.raises(ConfigError, match="passthrough"):
        found.replace(Deployment((wrong,)))
    assert "twin" in found.upstreams


async def test_what_remains_is_read_of_the_limits_that_calls_come_under() -> None:
    asked = []

    async def snapshot(*, limits: list[str]) -> Any:
        asked.append(list(limits))
        view = SimpleNamespace(bound=5, current=5, used=2)
        return SimpleNamespace(limits=dict.fromkeys(limits, view))

    limiter: Any = SimpleNamespace(snapshot=snapshot)
    remaining = RemainingCapacity(limiter)
    assert remaining.of(("tenant:a", "rpm:a")) == b""
    await asyncio.sleep(0)
    assert asked == [["tenant:a", "rpm:a"]], "and not the whole pool"
    assert remaining.of(("tenant:a", "rpm:a")) == b"tenant:a=3, rpm:a=3"


BUCKETS = ("gs://acme-media", "gs://team-*", "s3://acme", "*.example.com")
READS_BUCKETS = Target(Upstream("vertex", {"gemini": "http://v"}, "k", media_hosts=BUCKETS), "m")


def _naming(uri: str) -> list[dict[str, Any]]:
    return [
        {"contents": [{"parts": [{"fileData": {"fileUri": uri}}]}]},
        {"instances": [{"prompt": "A wave", "image": {"gcsUri": uri}}]},
        {"instances": [{"prompt": "A wave"}], "parameters": {"storageUri": uri}},
        {"messages": [{"content": [{"document": {"source": {"s3Location": {"uri": uri}}}}]}]},
    ]


@pytest.mark.parametrize(
    "uri",
    ["gs://acme-media/a.png", "gs://team-a/b/c.pdf", "s3://acme/a", "https://a.example.com/b"],
)
def test_a_bucket_that_an_upstream_names_may_be_read(uri: str) -> None:
    for body in _naming(uri):
        assert among_fetching(body, [READS_BUCKETS]) == [READS_BUCKETS]


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "gs://other/a.png",
            "gs://acme-media.evil/a",
            "s3://acme-media/a",
            "gs://a.example.com/b",
        ),
        *("GS://acme-media/a", " gs://acme-media/a", "gs://acme-media", "gs:acme-media/a"),
    ],
)
def test_no_other_bucket_may_be_read_or_written(uri: str) -> None:
    for body in _naming(uri):
        with pytest.raises(InvalidRequest):
            among_fetching(body, [READS_BUCKETS])
