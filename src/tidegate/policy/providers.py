"""Presets of providers: addresses, authentication, and how they count limits. Pure.

`docs/decisions/0021-upstreams-are-data.md` and `0018-how-providers-count.md` contain the facts and
their sources. A counting preset fills in what a limit does not state; the recorded policy states
everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, Literal
from urllib.parse import urlsplit

from tidegate.errors import ConfigError
from tidegate.policy.access import (
    NETWORK_KEYS,
    RENEWED,
    AccessOptions,
    Authentication,
    Paths,
    ReadSecret,
    authentication_of,
    headers_of,
    network_of,
    query_of,
    readable_file,
)
from tidegate.policy.format import MEASURES, is_of_tenant, table_at
from tidegate.prices.rates import provider_of

Abandoned = Literal["release", "wait"]
ABANDONED = ("release", "wait")
DIALECTS = ("openai", "gemini", "anthropic", "bedrock")
ALL_MODELS = ("*",)


@dataclass(frozen=True, slots=True)
class Provider:
    """The preset of a provider.

    urls: by dialect, with `{name}` in place of an option of the table. key: the usual variable.
    models: its own models by name. auth: as in the policy file. others: `auth` of single dialects.
    is_own: a self-hosted server, which needs no key. is_rebased: `base_url` replaces only the
    origin; the paths stay. paths: by dialect, where they differ from the dialect's. options: those
    that the table must contain, with their defaults, None for none. abandoned: as of an upstream.
    kept_days: for how many days it keeps a resource of a kind that it deletes by itself.
    has_responses_socket: it also speaks the Responses API over WebSocket.
    """

    urls: Mapping[str, str]
    key: str | None = None
    models: tuple[str, ...] = ALL_MODELS
    auth: str = "key"
    others: Mapping[str, str] = field(default_factory=dict)
    is_own: bool = False
    is_rebased: bool = False
    paths: Mapping[str, Paths] = field(default_factory=dict)
    options: Mapping[str, str | None] = field(default_factory=dict)
    abandoned: Abandoned = "release"
    kept_days: Mapping[str, int] = field(default_factory=dict)
    has_responses_socket: bool = False


def _own(port: int, *others: str, abandoned: Abandoned = "release") -> Provider:
    """Return the preset of a self-hosted server, which also has the dialects `others`.

    In all of them the key is a bearer token: vLLM and SGLang accept no other header.
    """
    origin = f"http://127.0.0.1:{port}"
    return Provider(
        {"openai": f"{origin}/v1", **dict.fromkeys(others, origin)},
        others=dict.fromkeys(others, "bearer"),
        is_own=True,
        is_rebased=True,
        abandoned=abandoned,
    )


PROVIDERS: Mapping[str, Provider] = {
    "openai": Provider(
        {"openai": "https://api.openai.com/v1"},
        "OPENAI_API_KEY",
        (
            *("gpt-*", "chatgpt-*", "o1*", "o3*", "o4*", "codex-*", "ft:*", "text-embedding-3-*"),
            *("text-embedding-ada-*", "dall-e-*", "omni-moderation-*", "whisper-*", "tts-*"),
            *("sora-*", "babbage-002", "davinci-002", "text-moderation-*", "computer-use-*"),
        ),
        kept_days={"response": 30},
        has_responses_socket=True,
    ),
    "anthropic": Provider(
        {"anthropic": "https://api.anthropic.com"}, "ANTHROPIC_API_KEY", ("claude-*",)
    ),
    "gemini": Provider(
        {
            "gemini": "https://generativelanguage.googleapis.com",
            "openai": "https://generativelanguage.googleapis.com/v1beta/openai",
        },
        kept_days={"interaction": 55},
    ),
    "azure": Provider(
        {"openai": "https://{resource}.openai.azure.com/openai/v1"},
        "AZURE_OPENAI_API_KEY",
        auth="header:api-key",
        others={"anthropic": "key"},
        is_rebased=True,
        options={"resource": None},
        kept_days={"response": 30},
    ),
    "vertex": Provider(
        {
            "gemini": "https://{host}",
            "anthropic": "https://{host}",
            "openai": (
                "https://{host}/v1/projects/{project}/locations/{location}/endpoints/openapi"
            ),
        },
        auth="google",
        is_rebased=True,
        paths={"gemini": Paths.VERTEX, "anthropic": Paths.VERTEX},
        options={"project": None, "location": "global"},
    ),
    "bedrock": Provider(
        {
            "openai": "https://bedrock-runtime.{region}.amazonaws.com/openai/v1",
            "anthropic": "https://bedrock-mantle.{region}.api.aws/anthropic",
            "bedrock": "https://bedrock-runtime.{region}.amazonaws.com",
        },
        "AWS_BEARER_TOKEN_BEDROCK",
        auth="bearer",
        is_rebased=True,
        options={"region": None},
    ),
    "groq": Provider({"openai": "https://api.groq.com/openai/v1"}, "GROQ_API_KEY"),
    "mistral": Provider(
        {"openai": "https://api.mistral.ai/v1"},
        "MISTRAL_API_KEY",
        (
            *("mistral-*", "ministral-*", "magistral-*", "codestral-*", "devstral-*"),
            *("voxtral-*", "pixtral-*", "open-mistral-*", "open-mixtral-*", "labs-*"),
        ),
    ),
    "xai": Provider(
        {"openai": "https://api.x.ai/v1"},
        "XAI_API_KEY",
        ("grok-*",),
        kept_days={"response": 30},
    ),
    "deepseek": Provider(
        {"openai": "https://api.deepseek.com", "anthropic": "https://api.deepseek.com/anthropic"},
        "DEEPSEEK_API_KEY",
        ("deepseek-*",),
    ),
    "openrouter": Provider(
        {"openai": "https://openrouter.ai/api/v1", "anthropic": "https://openrouter.ai/api"},
        "OPENROUTER_API_KEY",
        others={"anthropic": "bearer"},
    ),
    "together": Provider({"openai": "https://api.together.xyz/v1"}, "TOGETHER_API_KEY"),
    "fireworks": Provider(
        {
            "openai": "https://api.fireworks.ai/inference/v1",
            "anthropic": "https://api.fireworks.ai/inference",
        },
        "FIREWORKS_API_KEY",
        others={"anthropic": "bearer"},
    ),
    "cerebras": Provider({"openai": "https://api.cerebras.ai/v1"}, "CEREBRAS_API_KEY"),
    "perplexity": Provider(
        {"openai": "https://api.perplexity.ai"},
        "PERPLEXITY_API_KEY",
        ("perplexity/*", "sonar*", "pplx-*"),
        is_rebased=True,
        paths={"openai": Paths.PERPLEXITY},
    ),
    "moonshot": Provider(
        {
            "openai": "https://api.moonshot.ai/v1",
            "anthropic": "https://api.moonshot.ai/anthropic",
        },
        "MOONSHOT_API_KEY",
        ("kimi-*", "moonshot-v1-*"),
        others={"anthropic": "bearer"},
    ),
    "ollama": _own(11434, "anthropic"),
    "vllm": _own(8000, "anthropic"),
    "sglang": _own(30000, "anthropic"),
    "tgi": _own(3000),
    "llama.cpp": _own(8080, "anthropic", abandoned="wait"),
    "lmstudio": _own(1234, "anthropic"),
}


def has_responses_socket(provider: str | None) -> bool:
    """Whether a provider speaks the Responses API over WebSocket."""
    preset = PROVIDERS.get(provider or "")
    return preset is not None and preset.has_responses_socket


# Providers that report the usage of streams unasked, and reject `stream_options` with 422.
_REPORT_USAGE = frozenset(("mistral",))
# Providers with models that answer at `/v1/conversations`: no limit would apply to such a call.
_ANSWER_IN_CONVERSATIONS = frozenset(("mistral",))
# Providers whose list of models has another form than their dialect's.
LISTED_OTHERWISE = frozenset(("together", "vertex"))
# Providers whose list has base models, while calls name deployments.
LIST_BASE_MODELS = frozenset(("azure",))
# Keys of a table besides the URLs and the key.
HEADER_KEYS = ("headers", "query", "organization")
ACCESS_KEYS = (
    *("auth", "paths", "project", "location", "region", "resource", "credentials_file"),
    *("aws_profile", "aws_service", "scope", *HEADER_KEYS, *NETWORK_KEYS),
)
_NAMED = re.compile(r"[A-Za-z0-9][\w.:-]{0,99}", re.ASCII)
# Options of credentials that are renewed.
_CREDENTIAL_OPTIONS = {
    "google": ("credentials_file",),
    "entra": ("scope",),
    "aws": ("region", "aws_profile", "aws_service"),
}
_ENTRA_SCOPE = "https://cognitiveservices.azure.com/.default"
# The service that a signature names, by the dialect of a Bedrock endpoint.
_AWS_SERVICES = {"openai": "bedrock", "anthropic": "bedrock-mantle", "bedrock": "bedrock"}
# The last general version of Azure's deployment paths.
_API_VERSION = "2024-10-21"


def urls_of(path: str, provider: Provider, table: Mapping[str, Any]) -> dict[str, str]:
    """Return the base URLs of a preset by dialect.

    Empty if the table lacks one of its options but has `dialects` of its own. Raises ConfigError.
    """
    stated = {name: _option(path, table, name) for name in provider.options if name in table}
    values = {name: stated.get(name, usual) or "" for name, usual in provider.options.items()}
    base = table.get("base_url")
    for name, value in values.items():
        if not value and not (base is not None and name in ("resource", "region")):
            if "dialects" in table and base is None:
                return {}
            raise ConfigError(f"{path}.{name}", "(not set)", "must be set for this provider")
    values["host"] = _vertex_host(values.get("location", ""))
    urls = {dialect: url.format_map(values) for dialect, url in provider.urls.items()}
    if base is not None:
        urls = _rebased(str(base), urls)
    if table.get("paths") == Paths.DEPLOYMENTS:
        urls = {dialect: url.removesuffix("/v1") for dialect, url in urls.items()}
    return urls


# Variables that point the providers' own SDKs at another server.
_URLS_OF_SDKS = {
    "openai": ("OPENAI_BASE_URL", "OPENAI_API_BASE"),
    "anthropic": ("ANTHROPIC_BASE_URL",),
}


def other_urls(names: Sequence[str], environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield base URLs in the environment that SDKs use but upstreams do not.

    These are upstreams `names` without a base URL of their own. Each item has the variable, the
    setting that replaces it, and where calls go instead.
    """
    for name in names:
        for variable in _URLS_OF_SDKS.get(name, ()):
            (url,) = PROVIDERS[name].urls.values()
            stated = environ.get(variable, "").strip().rstrip("/").removesuffix("/v1")
            if stated and stated != url.removesuffix("/v1"):
                message = f"calls of {name} go to {url} unless {{near}} says otherwise"
                yield variable, f"base_url in [upstreams.{name}]", message


def _rebased(base: str, urls: Mapping[str, str]) -> dict[str, str]:
    """Return the same paths at another origin; `base` may already end with one of them."""
    paths = {dialect: urlsplit(url).path for dialect, url in urls.items()}
    origin = base.rstrip("/")
    for known in sorted((*paths.values(), "/openai", "/v1"), key=len, reverse=True):
        if known and origin.endswith(known):
            origin = origin.removesuffix(known)
            break
    return {dialect: f"{origin}{below}" for dialect, below in paths.items()}


# Presets of servers of one's own.
OWN = frozenset(name for name, preset in PROVIDERS.items() if preset.is_own)


def _vertex_host(location: str) -> str:
    if location == "global":
        return "aiplatform.googleapis.com"
    if location in ("us", "eu"):
        return f"aiplatform.{location}.rep.googleapis.com"
    return f"{location}-aiplatform.googleapis.com"


def _option(path: str, table: Mapping[str, Any], name: str) -> str:
    value = table[name]
    if not isinstance(value, str) or _NAMED.fullmatch(value) is None:
        allowed = "must be a name of letters, digits, dots, colons, - and _"
        raise ConfigError(f"{path}.{name}", str(value)[:100], allowed)
    return value


def access_options_of(
    path: str,
    name: str | None,
    table: Mapping[str, Any],
    urls: Mapping[str, str],
    secret: ReadSecret,
) -> AccessOptions:
    """Return how the upstream of a table is reached; `name`: its provider. Raises ConfigError."""
    provider = PROVIDERS.get(name or "")
    authentication, of_dialects = _authentications(path, provider, table)
    headers, secrets = headers_of(
        f"{path}.headers", table_at(f"{path}.headers", table.get("headers", {})), secret
    )
    named = {
        header: _option(path, table, option).encode()
        for option, header in (
            ("organization", b"openai-organization"),
            ("project", b"openai-project"),
        )
        if option in table and not (provider and option in provider.options)
    }
    query, more = query_of(
        f"{path}.query", table_at(f"{path}.query", table.get("query", {})), secret
    )
    paths = _paths(path, provider, table, urls)
    if Paths.DEPLOYMENTS in paths.values():
        query.setdefault("api-version", _API_VERSION)
    prefix = ""
    if Paths.VERTEX in paths.values():
        location = table.get("location", "global")
        prefix = f"/projects/{table['project']}/locations/{location}"
    networks = {dialect: network_of(path, table, url, secret) for dialect, url in urls.items()}
    return AccessOptions(
        authentication,
        of_dialects,
        tuple({**named, **dict(headers)}.items()),
        query,
        networks,
        paths,
        prefix,
        (*secrets, *more),
    )


def _authentications(
    path: str, provider: Provider | None, table: Mapping[str, Any]
) -> tuple[Authentication, dict[str, Authentication]]:
    """Return the upstream's authentication, and that of dialects with their own."""
    stated = table.get("auth", provider.auth if provider else "key")
    kind = stated if isinstance(stated, str) else ""
    _check_installed(f"{path}.auth", kind)
    known = _CREDENTIAL_OPTIONS.get(kind, ())
    is_used = {*known, *(provider.options if provider else ())}
    for names in _CREDENTIAL_OPTIONS.values():
        for option in names:
            if option in table and option not in is_used:
                others = [one for one in RENEWED if option in _CREDENTIAL_OPTIONS[one]]
                allowed = f"is for auth = {', '.join(others)}"
                raise ConfigError(f"{path}.{option}", "(set)", allowed)
    options = {option: _credential(path, table, option) for option in known if option in table}
    if kind == "entra":
        options.setdefault("scope", _ENTRA_SCOPE)
    found = authentication_of(f"{path}.auth", stated, options)
    of_dialects = {}
    if kind == "aws":
        if not options.get("region"):
            raise ConfigError(f"{path}.region", "(not set)", "must be set for auth = aws")
        for dialect, service in _AWS_SERVICES.items():
            whole = {"aws_service": service, **options}
            of_dialects[dialect] = authentication_of(f"{path}.auth", stated, whole)
    elif provider is not None and "auth" not in table:
        of_dialects = {
            dialect: authentication_of(f"{path}.auth", text, {})
            for dialect, text in provider.others.items()
        }
    return found, of_dialects


# Libraries that read credentials, and the extras that install them.
_LIBRARIES = {"aws": "botocore", "entra": "azure.identity"}
_EXTRAS = {"aws": "aws", "entra": "azure"}


def _check_installed(path: str, kind: str) -> None:
    library = _LIBRARIES.get(kind)
    try:
        is_there = library is None or find_spec(library) is not None
    except ModuleNotFoundError:  # the parent package is missing
        is_there = False
    if not is_there:
        allowed = f"needs {library}: pip install 'tidegate[{_EXTRAS[kind]}]'"
        raise ConfigError(path, kind, allowed)


def _credential(path: str, table: Mapping[str, Any], option: str) -> str:
    if option == "credentials_file":
        return readable_file(f"{path}.{option}", table[option])
    if option == "scope":
        value = table[option]
        if not isinstance(value, str) or not value.startswith(("https://", "api://")):
            raise ConfigError(f"{path}.scope", str(value)[:100], "must be a scope, https://...")
        return value
    return _option(path, table, option)


def _paths(
    path: str, provider: Provider | None, table: Mapping[str, Any], urls: Mapping[str, str]
) -> dict[str, Paths]:
    stated = table.get("paths")
    if stated is None:
        return dict(provider.paths) if provider else {}
    allowed = (Paths.PLAIN, Paths.DEPLOYMENTS)
    if stated not in allowed:
        names = ", ".join(allowed)
        raise ConfigError(f"{path}.paths", str(stated)[:100], f"must be one of {names}")
    if stated == Paths.DEPLOYMENTS and "openai" not in urls:
        raise ConfigError(f"{path}.paths", stated, "needs an upstream of OpenAI's dialect")
    return {"openai": Paths(stated)}


def may_ask_usage(provider: str | None, urls: Iterable[str]) -> bool:
    """Return whether streams may be asked for usage at this provider, or at `urls`."""
    return _REPORT_USAGE.isdisjoint({provider} if provider else map(provider_of, urls))


def keeps(kind: str, provider: str | None, urls: Iterable[str]) -> bool:
    """Return whether resources of a kind in OpenAI's dialect can be kept at this provider, or at
    `urls`."""
    names = {provider} if provider else set(map(provider_of, urls))
    return kind != "conversation" or _ANSWER_IN_CONVERSATIONS.isdisjoint(names)


def own_models(name: str) -> Sequence[str]:
    """Return the models that a provider is known by; `*` if it hosts those of others."""
    return PROVIDERS[name].models


def serving(
    model: str, tables: Mapping[str, Mapping[str, Any]], names: Iterable[str], others: Sized = ()
) -> list[str]:
    """Return which of the upstreams `names` serve a model, by their tables alone.

    If `others` serve it too, only those that name it by more than `*`.
    """
    found = []
    for name in names:
        fits = [one for one in _patterns(name, tables[name]) if fnmatchcase(model, one)]
        if any(one != "*" for one in fits) or (fits and not others):
            found.append(name)
    return found


def _patterns(name: str, table: Mapping[str, Any]) -> Iterator[str]:
    yield from table.get("models") or (own_models(name) if _is_preset(name, table) else ALL_MODELS)
    yield from table.get("aliases", {})


def _is_preset(name: str, table: Mapping[str, Any]) -> bool:
    return name in PROVIDERS and not {"provider", "base_url", "dialects"} & table.keys()


def provider_in(name: str, table: Mapping[str, Any]) -> Any:
    """Return the provider that a table names, by `provider` or by its own name."""
    return name if _is_preset(name, table) else table.get("provider")


def first_dialect_in(name: str, table: Mapping[str, Any]) -> str:
    """Return the first dialect of an upstream, by its valid table alone."""
    provider = provider_in(name, table)
    preset = PROVIDERS.get(provider or "")
    if "base_url" in table and (preset is None or not preset.is_rebased or "dialect" in table):
        return str(table.get("dialect", provider if provider in DIALECTS else DIALECTS[0]))
    return next(iter(preset.urls if preset else table.get("dialects", {})), DIALECTS[0])


_REFILLS = {"shape": "bucket"}
# For a minute. Providers check short spans too: 60 a minute may be 10 in 10 s, then one a second.
_SMOOTHED = {**_REFILLS, "pace_ms": 10_000}
# A window of its own: 60 a minute are at most 10 in any 10 s.
_CHECKED_MS = 10_000
_MINUTE_MS = 60_000
_AT_THE_START = {"reserve": "larger", "settles": False}

# By the unit that a limit's scope counts.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "openai": {"requests": _SMOOTHED, "tokens": {**_AT_THE_START, **_REFILLS}},
    "azure": {"requests": {"window_ms": _CHECKED_MS}, "tokens": _AT_THE_START},
    "anthropic": {
        "requests": _SMOOTHED,
        "input_tokens": {"unit": "uncached_input_tokens", **_REFILLS},
        "output_tokens": _REFILLS,
    },
    "bedrock": {"tokens": {"reserve": "max_tokens", "weights": {"cached": 0, "output": 5}}},
    "gemini": {},
    "groq": {"tokens": {"weights": {"cached": 0}, **_REFILLS}},
    "cerebras": {"requests": _REFILLS, "tokens": {"reserve": "bound", **_REFILLS}},
    "moonshot": {"tokens": {"reserve": "bound", "settles": False}},
    "xai": {"requests": {"pace_ms": 1_000}},
}


def filled(
    limits: Mapping[str, Any], provider: str, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return `limits` by id, with the provider's preset applied to those new or changed.

    Changed means different from `before`. A limit that names its unit, or that was a plain number,
    states itself how it counts and is left alone, as are limits on a tenant, key, user or
    conversation, which no provider has. In a changed table, options of the preset that it did not
    have before stay unset.
    """
    preset, old = PRESETS.get(provider, {}), before or {}
    return {
        name: value
        if name in old and (old[name] == value or not isinstance(old[name], Mapping))
        else _filled(preset, name, value, old.get(name))
        for name, value in limits.items()
    }


def _filled(preset: Mapping[str, Mapping[str, Any]], limit_id: str, value: Any, before: Any) -> Any:
    measure = MEASURES.get(limit_id.partition(":")[0])
    usual = preset.get(measure.unit) if measure else None
    if usual and isinstance(before, Mapping) and isinstance(value, Mapping):
        usual = {key: one for key, one in usual.items() if key in before}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if measure is None or not usual or not (is_number or isinstance(value, Mapping)):
        return value
    if is_of_tenant(limit_id):
        return value
    table = {"bound": value} if is_number else value
    if "unit" in table or "type" in table:
        return value
    window_ms, bound = table.get("window_ms", measure.window_ms), table.get("bound")
    of_rates = ("pace_ms", "window_ms", "shape")
    counting = {key: one for key, one in usual.items() if key not in of_rates}
    if not isinstance(window_ms, int) or not isinstance(bound, int):
        return {**counting, **table} if counting else value  # such as a calendar day
    if "shape" in usual:
        counting["shape"] = usual["shape"]
    if "pace_ms" in usual:
        counting["pace_ms"] = max(1, usual["pace_ms"] * window_ms // _MINUTE_MS)
    if "window_ms" in usual and "window_ms" not in table:
        checked_ms = usual["window_ms"] * window_ms // _MINUTE_MS
        table = {**table, "bound": bound and max(1, bound * checked_ms // window_ms)}
        counting["window_ms"] = checked_ms
    return {**counting, **table} if counting else value


def texts_of(path: str, value: object) -> tuple[str, ...]:
    """Return a list of names in a file. Raises ConfigError."""
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ConfigError(path, str(value)[:100], "must be a list of texts, not empty")
    for one in value:
        if not 1 <= len(one) <= 200:
            raise ConfigError(path, one[:100], "each must have 1 to 200 characters")
    return tuple(value)
