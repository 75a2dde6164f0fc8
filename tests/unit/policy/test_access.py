"""Access to upstreams as the policy's file states it: presets, headers, query, proxies, files."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.unit.policy.test_upstreams import CONFIG
from tidegate.errors import ConfigError
from tidegate.policy.access import Access, Network, Paths, Proxy
from tidegate.policy.deployment import Upstream, deployment_of
from tidegate.policy.providers import PROVIDERS

SECRETS = {
    "KEY": "sk-own-key-1",
    "TEAM": "team-secret-7",
    "PROXY": "http://me:pass%20word@proxy.corp:3128",
    **{one.key: f"key-of-{name}" for name, one in PROVIDERS.items() if one.key},
}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def upstream(table: str, name: str = "one") -> Upstream:
    text = f"[upstreams.{name}]\n{table}"
    found = deployment_of(tomllib.loads(text), CONFIG, lambda one: SECRETS.get(one, ""))
    return next(one for one in found.upstreams if one.name == name)


def wrong(table: str) -> str:
    with pytest.raises(ConfigError) as refused:
        upstream(table)
    assert "\n" not in str(refused.value)
    return str(refused.value)


CHAT = "/chat/completions"


@pytest.mark.parametrize(
    ("table", "dialect", "path", "url", "header"),
    [
        ('provider = "groq"', "openai", CHAT, "https://api.groq.com/openai/v1", "bearer"),
        ('provider = "mistral"', "openai", CHAT, "https://api.mistral.ai/v1", "bearer"),
        ('provider = "xai"', "openai", CHAT, "https://api.x.ai/v1", "bearer"),
        ('provider = "deepseek"', "openai", CHAT, "https://api.deepseek.com", "bearer"),
        (
            'provider = "deepseek"',
            *("anthropic", "/v1/messages", "https://api.deepseek.com/anthropic", "x-api-key"),
        ),
        ('provider = "openrouter"', "openai", CHAT, "https://openrouter.ai/api/v1", "bearer"),
        ('provider = "together"', "openai", CHAT, "https://api.together.xyz/v1", "bearer"),
        (
            'provider = "fireworks"',
            *("openai", CHAT, "https://api.fireworks.ai/inference/v1", "bearer"),
        ),
        (
            'provider = "fireworks"',
            *("anthropic", "/v1/messages", "https://api.fireworks.ai/inference", "bearer"),
        ),
        (
            'provider = "openrouter"',
            *("anthropic", "/v1/messages", "https://openrouter.ai/api", "bearer"),
        ),
        ('provider = "cerebras"', "openai", CHAT, "https://api.cerebras.ai/v1", "bearer"),
        ('provider = "perplexity"', "openai", CHAT, "https://api.perplexity.ai", "bearer"),
        ('provider = "moonshot"', "openai", CHAT, "https://api.moonshot.ai/v1", "bearer"),
        (
            'provider = "moonshot"',
            *("anthropic", "/v1/messages", "https://api.moonshot.ai/anthropic", "bearer"),
        ),
        ('provider = "ollama"', "openai", CHAT, "http://127.0.0.1:11434/v1", ""),
        ('provider = "ollama"', "anthropic", "/v1/messages", "http://127.0.0.1:11434", ""),
        ('provider = "vllm"\nkey = "KEY"', "openai", CHAT, "http://127.0.0.1:8000/v1", "bearer"),
        (
            'provider = "vllm"\nbase_url = "http://gpu:9000/v1"',
            *("anthropic", "/v1/messages", "http://gpu:9000", ""),
        ),
        *(
            (
                f'provider = "{name}"\nkey = "KEY"',
                *("anthropic", "/v1/messages", f"http://127.0.0.1:{port}", "bearer"),
            )
            for name, port in {
                "vllm": 8000,
                "ollama": 11434,
                "llama.cpp": 8080,
                "sglang": 30000,
                "lmstudio": 1234,
            }.items()
        ),
        (
            'provider = "vllm"\nkey = "KEY"\nauth = "key"',
            *("anthropic", "/v1/messages", "http://127.0.0.1:8000", "x-api-key"),
        ),
        ('provider = "sglang"', "openai", CHAT, "http://127.0.0.1:30000/v1", ""),
        ('provider = "tgi"', "openai", CHAT, "http://127.0.0.1:3000/v1", ""),
        ('provider = "llama.cpp"', "openai", CHAT, "http://127.0.0.1:8080/v1", ""),
        ('provider = "lmstudio"', "openai", CHAT, "http://127.0.0.1:1234/v1", ""),
        (
            'provider = "azure"\nresource = "acme"',
            *("openai", CHAT, "https://acme.openai.azure.com/openai/v1", "api-key"),
        ),
        (
            'provider = "azure"\nbase_url = "https://acme.openai.azure.com/"',
            *("openai", CHAT, "https://acme.openai.azure.com/openai/v1", "api-key"),
        ),
        (
            'provider = "bedrock"\nregion = "us-east-1"',
            *("openai", CHAT, "https://bedrock-runtime.us-east-1.amazonaws.com/openai/v1"),
            "bearer",
        ),
        (
            'provider = "bedrock"\nregion = "us-east-1"',
            *("bedrock", "/model/m/converse", "https://bedrock-runtime.us-east-1.amazonaws.com"),
            "bearer",
        ),
        (
            'provider = "bedrock"\nregion = "us-east-1"',
            *("anthropic", "/v1/messages", "https://bedrock-mantle.us-east-1.api.aws/anthropic"),
            "bearer",
        ),
        (
            'provider = "vertex"\nproject = "p"\nlocation = "europe-west4"',
            *("openai", CHAT, "https://europe-west4-aiplatform.googleapis.com/v1/projects/p"),
            "",
        ),
    ],
)
def test_a_preset_knows_where_and_under_which_header(
    table: str, dialect: str, path: str, url: str, header: str
) -> None:
    found = upstream(table)
    access = found.access(dialect)
    expected = {
        "bearer": (b"authorization", b"Bearer " + found.key.encode()),
        "x-api-key": (b"x-api-key", found.key.encode()),
        "api-key": (b"api-key", found.key.encode()),
    }
    assert access.url(path).startswith(url)
    assert access.url(path).endswith(path)
    assert access.headers == ((expected[header],) if header else ())
    assert bool(found.key) == bool(header)


def test_some_paths_of_perplexity_have_a_version() -> None:
    """docs.perplexity.ai, "OpenAI SDK Compatibility" of Sonar and of the Agent API."""
    for base in (
        "",
        'base_url = "https://api.perplexity.ai"',
        'base_url = "https://api.perplexity.ai/v1"',
    ):
        access = upstream(f'provider = "perplexity"\n{base}').access("openai")
        host = "https://api.perplexity.ai"
        assert access.url(CHAT) == f"{host}/chat/completions"
        for path in ("/models", "/embeddings", "/responses", "/responses/resp_1"):
            assert access.url(path, "a=b") == f"{host}/v1{path}?a=b"
        assert access.url("/search") == f"{host}/search"
    assert upstream("", name="perplexity").fit("pplx-embed-v1-4b")


def test_a_name_of_a_provider_is_its_preset() -> None:
    found = upstream("", name="xai")
    assert (found.provider, found.models, found.key) == ("xai", ("grok-*",), "key-of-xai")
    assert upstream("", name="together").models == ("*",)


def test_azure_has_its_models_in_the_path_of_deployments() -> None:
    found = upstream('provider = "azure"\nresource = "acme"\npaths = "deployments"')
    access = found.access("openai")
    base = "https://acme.openai.azure.com/openai"
    assert access.url(CHAT, model="gpt 4o") == (
        f"{base}/deployments/gpt%204o/chat/completions?api-version=2024-10-21"
    )
    assert access.url("/responses", model="m") == f"{base}/responses?api-version=2024-10-21"
    newer = upstream(
        'provider = "azure"\nresource = "acme"\npaths = "deployments"\n'
        'query = { api-version = "2025-04-01-preview" }'
    )
    url = newer.access("openai").url(CHAT, "api-version=of-a-client&x=1", model="m")
    assert url.endswith("/deployments/m/chat/completions?x=1&api-version=2025-04-01-preview")


@pytest.mark.parametrize(
    ("path", "streams", "expected"),
    [
        (
            "/v1beta/models/g-1:generateContent",
            False,
            "v1beta1/P/google/models/g-1:generateContent",
        ),
        ("/v1/models/g-1:countTokens", False, "v1/P/google/models/g-1:countTokens"),
        ("/v1beta/models", False, "v1beta1/publishers/google/models"),
        ("/v1/models/g-1", False, "v1beta1/publishers/google/models/g-1"),
        ("/v1/messages", False, "v1/P/anthropic/models/m@1:rawPredict"),
        ("/v1/messages", True, "v1/P/anthropic/models/m@1:streamRawPredict"),
        ("/v1/messages/count_tokens", False, "v1/P/anthropic/models/count-tokens:rawPredict"),
    ],
)
def test_vertex_has_its_paths_below_a_project(path: str, streams: bool, expected: str) -> None:
    found = upstream('provider = "vertex"\nproject = "p-1"')
    assert found.access_options.paths["gemini"] is Paths.VERTEX
    access = found.access("anthropic" if "messages" in path else "gemini")
    below = expected.replace("P", "projects/p-1/locations/global/publishers", 1)
    host = "https://aiplatform.googleapis.com"
    assert access.url(path, model="m@1", streams=streams) == f"{host}/{below}"
    assert access.authentication is not None
    assert access.authentication.kind == "google"


def test_own_headers_and_query_replace_those_of_a_client() -> None:
    found = upstream(
        'base_url = "https://host/v1"\nkey = "KEY"\nauth = "header:X-Key"\n'
        'headers = { X-Team = "env:TEAM", x-b = "2" }\norganization = "org-1"\nproject = "proj_1"\n'
        'query = { tier = "gold" }'
    )
    access = found.access("openai")
    sent = access.dressed([(b"x-team", b"mine"), (b"x-key", b"mine"), (b"x-other", b"1")])
    assert sorted(sent) == [
        (b"openai-organization", b"org-1"),
        (b"openai-project", b"proj_1"),
        (b"x-b", b"2"),
        (b"x-key", b"sk-own-key-1"),
        (b"x-other", b"1"),
        (b"x-team", b"team-secret-7"),
    ]
    assert access.url("/models", "tier=mine&a=b") == "https://host/v1/models?a=b&tier=gold"
    assert found.secrets == ("sk-own-key-1", "team-secret-7")
    for one in (found, found.access_options, access):
        assert "secret-7" not in repr(one)
        assert "sk-own" not in repr(one)


BASE = 'base_url = "https://host/v1"\n'


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('provider = "grok"', "upstreams.one.provider=grok: must be one of openai, anthropic"),
        ('provider = "azure"', "upstreams.one.resource=(not set): must be set for this provider"),
        ('provider = "vertex"', "upstreams.one.project=(not set): must be set for this provider"),
        ('provider = "gemini"', 'must be the name of the variable that has the key, or auth = "no'),
        (BASE + 'key = "ABSENT"', "ABSENT=(not set): must be set: upstreams.one has its key from"),
        (BASE + 'auth = "basic"', "upstreams.one.auth=basic: must be one of none, key, bearer, he"),
        (BASE + 'auth = "bearer"', "upstreams.one.key=(not set): must be the name of the variable"),
        (BASE + 'auth = "none"\nkey = "KEY"', "is not for auth = none, which sends no key"),
        (BASE + 'auth = "header:a b"', "must be header:NAME with the name of a header"),
        (BASE + 'headers = { "x y" = "1" }', "upstreams.one.headers=x y: must be names of header"),
        (BASE + "headers = { x = 1 }", "upstreams.one.headers.x=1: must be a text, or env:VARIA"),
        (BASE + 'headers = { Host = "a" }', "headers.Host=(set): is a header that the gateway s"),
        (BASE + 'headers = { x = "env:NOPE" }', "NOPE=(not set): must be set: upstreams.one.head"),
        (BASE + 'headers = { x = "a\\r\\nb: c" }', "headers.x=(hidden): must be printable ASCII"),
        (BASE + 'proxy = "socks5://a:1"', "upstreams.one.proxy=(hidden): must be the http:// URL"),
        (BASE + 'ca_file = "/no/such.pem"', "ca_file=/no/such.pem: must be a readable file: No s"),
        (BASE + 'client_key = "/dev/null"', "client_key=(set): needs client_certificate, which"),
        (BASE + 'credentials_file = "x"', "credentials_file=(set): is for auth = google"),
        (BASE + 'auth = "google"\ncredentials_file = "/no"', "credentials_file=/no: must be a rea"),
        (BASE + 'auth = "aws"', "upstreams.one.region=(not set): must be set for auth = aws"),
        (BASE + 'paths = "vertex"', "upstreams.one.paths=vertex: must be one of plain, deploymen"),
        (BASE + "organization = 7", "upstreams.one.organization=7: must be a name of letters"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(table: str, said: str) -> None:
    assert said in wrong(table)


def test_a_file_that_holds_no_certificates_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "roots.pem"
    file.write_text("no certificate")
    said = wrong(f'{BASE}ca_file = "{file}"')
    assert f"upstreams.one.ca_file={file}: must be a file of certificates in PEM form" in said


def network(url: str, more: str = "") -> Network | None:
    return upstream(f'base_url = "{url}"\n{more}').access("openai").network


def test_the_proxy_of_the_file_or_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network("https://host/v1") is None
    named = network("https://host/v1", 'proxy = "env:PROXY"')
    assert named is not None
    assert named.proxy is not None
    assert str(named.proxy) == "proxy.corp:3128"
    assert named.proxy.authorization == b"Basic bWU6cGFzcyB3b3Jk"
    assert "pass" not in repr(named)
    monkeypatch.setenv("HTTPS_PROXY", "http://env.corp:8080")
    monkeypatch.setenv("NO_PROXY", "inside.corp,.local")
    assert network("https://host/v1") == Network(
        Proxy("env.corp", 8080, url="http://env.corp:8080")
    )
    for reached in ("https://a.inside.corp", "https://b.local", "http://host", "https://127.0.0.1"):
        assert network(reached) is None
    assert network("https://host/v1", 'proxy = "none"') is None
    monkeypatch.setenv("HTTPS_PROXY", "socks5://env.corp:1080")
    said = wrong(BASE)
    assert "HTTPS_PROXY=(hidden): must be the http:// URL of a proxy" in said
    assert 'upstreams.one.proxy = "none" goes without' in said


def test_an_access_without_anything_costs_nothing() -> None:
    access = Access("https://host")
    headers: list[Any] = [(b"a", b"b")]
    assert (access.url("/v1/x", "a=b"), access.dressed(headers)) == (
        "https://host/v1/x?a=b",
        headers,
    )
