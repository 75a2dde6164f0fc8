"""Deployment policy: `tidegate.toml` over the environment over the defaults; upstreams and routes.

Upstreams come from `[upstreams.NAME]` and `[[routes]]`; GEMINI_API_KEY, OPENAI_API_KEY and
ANTHROPIC_API_KEY each define one. Each upstream is a pool of the limiter.

Invariants: a mistake is one ConfigError that names the file and the key; the file names the
variable of a key, never the key itself.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import SecretStr

from tidegate.call import CLASSIFIER_LIMIT, DEFAULT_POOL, Kind
from tidegate.errors import ConfigError
from tidegate.limiter import PoolPolicy, check_tenant
from tidegate.policy.access import (
    NETWORK_KEYS,
    OWN_SECRETS,
    STAYS_HERE,
    Access,
    AccessOptions,
    check_secret_files,
    readable_file,
)
from tidegate.policy.format import (
    SECTIONS,
    check_keys,
    check_tenants,
    of_plain,
    table_at,
    unknown,
)
from tidegate.policy.live import NAME, NO_CHANGES, POLICY_KEYS, LiveChanges, Table, Tables
from tidegate.policy.providers import (
    ABANDONED,
    ACCESS_KEYS,
    ALL_MODELS,
    DIALECTS,
    HEADER_KEYS,
    PROVIDERS,
    Abandoned,
    access_options_of,
    filled,
    keeps,
    may_ask_usage,
    other_urls,
    own_models,
    provider_in,
    texts_of,
    urls_of,
)
from tidegate.prices.rates import Price, price_of
from tidegate.settings import (
    SECRETS,
    Client,
    Config,
    from_dotenv,
    is_plain_url,
    origins,
    secret,
    split_url,
)
from tidegate.usual_models import OUR_KEY

ORIGINS = "SETTING_ORIGINS"  # for children, whose supervisor passes every setting
# Each of these keys in the environment defines an upstream.
_KEY_OF = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
_EMULATED_MODELS = (
    *("gemini-*", "gemma-*", "imagen-*", "veo-*", "embedding-001", "text-embedding-0*"),
)
_GOOGLE = PROVIDERS["gemini"].urls["gemini"]
USUAL_AT_ONCE = 64
# How limits in headers of answers are used: as proposals, or put in force if none is set.
Learn = Literal["propose", "apply"]
_LEARN: tuple[Learn, ...] = get_args(Learn)
ANY = "*"  # of `media_hosts`: every host
CONNECT_TIMEOUT = "connect_timeout_ms"
TIMEOUTS = (CONNECT_TIMEOUT, "first_byte_timeout_ms", "idle_timeout_ms", "total_timeout_ms")
_OWN_KEYS = (
    *("models", "aliases", "weight", "prices", "asks_usage", "learn", "preempt", "passthrough"),
    *("passthrough_tenants", "adopt", "abandoned", "media_hosts", *TIMEOUTS),
)
_OF_GEMINI = (*_OWN_KEYS, *HEADER_KEYS, *NETWORK_KEYS)
_KEYS = (
    *("provider", "base_url", "dialect", "dialects", "key", "key_file", *_OWN_KEYS, *ACCESS_KEYS),
    *POLICY_KEYS,
)
_PASSTHROUGH = re.compile(r"/v1(?:alpha|beta)?(?:/\w[\w.:-]*)+(?:/\*)?", re.ASCII)
_LONGEST_MS = 86_400_000
_LONGEST_KEY_BYTES = 8_192
_MOST_TIMES = 100

_IS_FROM_IT = "has its key from it"
# Keys about reaching an upstream; the cost of calls does not depend on them.
_OF_ACCESS = {
    *("key", "key_file", "credentials_file", "aws_profile", "aws_service", "scope"),
    *(*HEADER_KEYS, *NETWORK_KEYS),
}

ReadSecret = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Preempt:
    """A rule by which a call of a job or batch line without any answer yet gives way: if a call of
    a higher band has waited for `after_ms`. times: how often one job or line may give way."""

    after_ms: int = 1_000
    times: int = 3


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Upstream:
    """One account at a provider. base_urls: by dialect, without a trailing slash. key: empty if
    none is needed. models: patterns of the models it serves. aliases: a client's name of a
    model -> the provider's. weight: its share if several upstreams serve a model. prices:
    pattern -> price; they precede the public prices of `provider`, or of the provider of its
    hosts. asks_usage: whether streams are asked for usage by `stream_options`. timeouts:
    those of `TIMEOUTS` that differ from the settings. learn: how limits in headers of its
    answers are used. preempt: None if no call gives way. passthrough: paths that it has and
    Tidegate does not know, such as `/v1/new-thing`, or `/v1/new/*` for all below.
    passthrough_tenants: tenants that may call these, all if empty. adopt: the tenant that may
    use objects there that no call through this gateway created; None for none. abandoned:
    what happens to the permit of a call whose client left: `release` it, or `wait` for the
    end of the answer if the server continues. media_hosts: patterns of the hosts that a request
    may have it fetch from, `*` for all, or with `is_own` for all public ones. is_made_up: the
    built-in emulator answers. access_options: how it is reached."""

    name: str
    base_urls: Mapping[str, str]
    key: str = field(repr=False)
    models: tuple[str, ...] = ("*",)
    aliases: Mapping[str, str] = field(default_factory=dict)
    weight: int = 1
    prices: Mapping[str, Price] = field(default_factory=dict)
    asks_usage: bool = True
    timeouts: Mapping[str, int] = field(default_factory=dict)
    provider: str | None = None
    learn: Learn = "propose"
    preempt: Preempt | None = None
    passthrough: tuple[str, ...] = ()
    passthrough_tenants: tuple[str, ...] = ()
    adopt: str | None = None
    abandoned: Abandoned = "release"
    media_hosts: tuple[str, ...] = (ANY,)
    is_made_up: bool = False
    access_options: AccessOptions = field(default_factory=AccessOptions)
    _accesses: dict[str, Access] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def access(self, dialect: str) -> Access:
        """Return how the upstream is reached in one of its dialects."""
        found = self._accesses.get(dialect)
        if found is None:
            base, connect_ms = self.base_urls[dialect], self.timeouts.get(CONNECT_TIMEOUT)
            found = self.access_options.access(dialect, base, self.key, connect_ms)
            self._accesses[dialect] = found
        return found

    @property
    def secrets(self) -> tuple[str, ...]:
        """Secrets that no answer to a client may contain."""
        return (self.key, *self.access_options.secrets)

    def identity(self, dialect: str | None = None) -> str:
        """Return what distinguishes its account from others at the same URL, itself a secret: its
        key, else its renewed credentials and other secrets. `dialect`: None for all."""
        if self.key:
            return self.key
        options = self.access_options
        authentication = options.of_dialects.get(dialect or "", options.authentication)
        renewed: list[str] = []
        if authentication.is_renewed:
            named = (f"{name}={value}" for name, value in sorted(authentication.options))
            renewed = [authentication.kind, *named, options.prefix]
        return "\n".join((*renewed, *options.secrets))

    @property
    def pool(self) -> str:
        return self.name

    @property
    def is_own(self) -> bool:
        """Whether it is a self-hosted server, as its provider's preset says."""
        preset = PROVIDERS.get(self.provider or "")
        return preset is not None and preset.is_own

    def keeps(self, kind: str) -> bool:
        """Return whether resources of a kind can be kept there."""
        return keeps(kind, self.provider, self.base_urls.values())

    @property
    def named(self) -> list[str]:
        """The models that it serves by name, not by a pattern."""
        return [one for one in self.models if not set(one) & set("*?[")]

    def fit(self, model: str) -> int:
        """Return how closely it names `model`: 0 not at all, more for anything more than `*`."""
        if model in self.aliases:
            return 1_000
        fits = [len(one) + (one != "*") for one in self.models if fnmatchcase(model, one)]
        return max(fits, default=0)

    def price(self, model: str) -> Price | None:
        """Return the price whose pattern names `model` most closely."""
        fits = [one for one in self.prices if fnmatchcase(model, one)]
        return self.prices[max(fits, key=lambda one: (one == model, len(one)))] if fits else None


@dataclass(frozen=True, slots=True)
class Route:
    """A chain for the models that match `model`: each target `(upstream, its model or None)` is
    tried if those before it are throttled or unavailable."""

    model: str
    targets: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a policy file states besides the limits of the pool `gemini`, with live changes.
    drained: upstreams that take no new calls. missing: upstreams that this process cannot create,
    and why. tables: the tables of all upstreams, with the changes of `live`."""

    upstreams: tuple[Upstream, ...]
    routes: tuple[Route, ...] = ()
    policies: Mapping[str, PoolPolicy] = field(default_factory=dict)
    drained: frozenset[str] = frozenset()
    missing: Mapping[str, ConfigError] = field(default_factory=dict)
    tables: Tables = field(default_factory=dict)
    live: LiveChanges = NO_CHANGES

    def upstream(self, name: str) -> Upstream | None:
        return next((one for one in self.upstreams if one.name == name), None)


def deployment_of(
    stated: Mapping[str, Any],
    config: Config,
    secret: ReadSecret,
    live: LiveChanges = NO_CHANGES,
    before: Deployment | None = None,
) -> Deployment:
    """Return the deployment. `secret`: returns the value of a variable, "" if not set. `before`:
    the deployment in force with other changes, whose unchanged upstreams are reused as
    objects. Raises ConfigError, but not for what `live` has changed."""
    base = base_tables(stated, config)
    keys = {variable: _key_in(config, variable) for variable in _KEY_OF.values()}
    tables = live.over(base)

    def read(variable: str) -> str:
        if variable in OWN_SECRETS:
            raise ConfigError(variable, "(hidden)", STAYS_HERE)
        return keys.get(variable) or secret(variable)

    made: dict[str, Upstream] = {}
    missing: dict[str, ConfigError] = {}
    policies = {}
    for name, table in tables.items():
        path = _path(name)
        if NAME.fullmatch(name) is None:
            raise ConfigError(path, name, "must be lower-case letters, digits, - and _")
        reused = _unchanged(name, table, live, before)
        try:
            if name != DEFAULT_POOL:
                check_secret_files(path, table, base, config, secret)
                made[name] = reused or _upstream(name, table, read)
                policies[name] = _policy(path, table, stated, made[name].provider or "")
        except ConfigError as error:
            if before is None and name not in live.upstreams:
                raise
            made.pop(name, None)
            missing[name] = error
    found = list(made.values())
    if DEFAULT_POOL in tables:
        own = _of_environment(tables[DEFAULT_POOL], config, found, secret)
        was = None if before is None else before.upstream(DEFAULT_POOL)
        is_same = own == was and _unchanged(DEFAULT_POOL, tables[DEFAULT_POOL], live, before) is was
        found.insert(0, was if was is not None and is_same else own)
    if before is None:
        check_adopted(found)
    routes = _routes(stated.get("routes", []), {*base, *(one.name for one in found)})
    there = {one.name for one in found}
    routes = tuple(
        Route(one.model, tuple(target for target in one.targets if target[0] in there))
        for one in routes
    )
    drained = live.drained & there
    return Deployment(tuple(found), routes, policies, drained, missing, tables, live)


def _stated_tables(stated: Mapping[str, Any]) -> dict[str, Table]:
    found = table_at("upstreams", stated.get("upstreams", {}))
    return {name: table_at(f"upstreams.{name}", value) for name, value in found.items()}


def base_tables(stated: Mapping[str, Any], config: Config) -> dict[str, Table]:
    """Return the upstreams' tables by the file and the environment. Raises ConfigError."""
    tables = _stated_tables(stated)
    own = tables.pop(DEFAULT_POOL, None)
    keys = {variable: _key_in(config, variable) for variable in _KEY_OF.values()}
    tables |= {name: {} for name in _of_keys(tables, keys)}
    if config.gemini_api_key is not None or (
        config.emulated and (not tables or config.embedded or config.tidegate_demo)
    ):
        return {DEFAULT_POOL: own or {}, **tables}
    if own is not None:
        allowed = f"must be set: {_path(DEFAULT_POOL)} {_IS_FROM_IT}"
        raise ConfigError("GEMINI_API_KEY", "(not set)", allowed)
    return tables


def _unchanged(
    name: str, table: Table, live: LiveChanges, before: Deployment | None
) -> Upstream | None:
    """Return the upstream of the earlier deployment, if nothing of it has changed since."""
    if before is None or before.tables.get(name) != table:
        return None
    return before.upstream(name) if before.live.of(name).reads == live.of(name).reads else None


def _path(name: str) -> str:
    return f"upstreams.{name}"


def _key_in(config: Config, variable: str) -> str:
    key = getattr(config, variable.lower())
    return "" if key is None else str(key.get_secret_value())


def _of_keys(tables: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str]) -> list[str]:
    """Return the upstreams that keys in the environment define, unless the file uses those keys."""
    found = []
    for name, variable in _KEY_OF.items():
        is_used = name in tables or any(
            one.get("provider") == name or one.get("key") == variable for one in tables.values()
        )
        if keys[variable] and not keys[variable].startswith(OUR_KEY) and not is_used:
            found.append(name)
    return found


def _of_environment(
    table: Mapping[str, Any], config: Config, others: Sequence[Upstream], secret: ReadSecret
) -> Upstream:
    """Return the account of GEMINI_API_KEY, whose limits are those at the top of the file. Beside
    other upstreams, the emulator serves only names like Gemini's models, and models of prompts that
    no other upstream serves."""
    path = _path(DEFAULT_POOL)
    for key in table:
        if key not in _OF_GEMINI:
            allowed = f"can't be set for the upstream of GEMINI_*; known: {', '.join(_OF_GEMINI)}"
            raise ConfigError(f"{path}.{key}", "(set)", allowed)
    base = config.gemini_base_url.removesuffix("/v1beta")
    key = config.gemini_api_key.get_secret_value() if config.gemini_api_key else ""
    urls = {"gemini": base, "openai": f"{base}/v1beta/openai"}
    if config.emulated or not config.gemini_base_url.startswith(_GOOGLE):
        urls |= {"anthropic": base, "bedrock": base}  # the emulator has these dialects too
    options = _options(path, table)
    if config.is_made_up and others:
        models = (config.text_model, config.multi_modal_model, config.image_model)
        needed = dict.fromkeys((*models, config.classifier_model))
        more = [one for one in needed if not any(other.fit(one) for other in others)]
        options.setdefault("models", (*_EMULATED_MODELS, *more))
    options["access_options"] = access_options_of(path, None, table, urls, secret)
    _check_preempt(path, options)
    return Upstream(DEFAULT_POOL, urls, key, is_made_up=config.is_made_up, **options)


def _upstream(name: str, table: Mapping[str, Any], secret: ReadSecret) -> Upstream:
    path = _path(name)
    for key in table:
        if key not in _KEYS:
            raise ConfigError(f"{path}.{key}", None, unknown(key, _KEYS))
    options = _options(path, table)
    provider = provider_in(name, table)
    if provider is not None and "provider" not in table and own_models(name) != ALL_MODELS:
        options.setdefault("models", own_models(name))
    if provider is not None and (not isinstance(provider, str) or provider not in PROVIDERS):
        raise ConfigError(
            f"{path}.provider", str(provider)[:100], f"must be one of {', '.join(PROVIDERS)}"
        )
    if provider is not None:
        options.setdefault("abandoned", PROVIDERS[provider].abandoned)
        options.setdefault("media_hosts", () if PROVIDERS[provider].is_own else (ANY,))
    _check_preempt(path, options)
    urls = _urls(path, provider, table)
    options.setdefault("asks_usage", may_ask_usage(provider, urls.values()))
    access = access_options_of(path, provider, table, urls, secret)
    key = _key(path, provider, table, access, secret)
    return Upstream(name, urls, key, provider=provider, access_options=access, **options)


def _urls(path: str, provider: str | None, table: Mapping[str, Any]) -> dict[str, str]:
    """Return the base URLs by dialect: the table's `base_url` replaces the provider's, so that the
    key is sent nowhere else."""
    urls = {}
    preset = PROVIDERS.get(provider or "")
    rebases = preset is not None and preset.is_rebased and "dialect" not in table
    if "base_url" in table:
        dialect = table.get("dialect", provider if provider in DIALECTS else DIALECTS[0])
        if dialect not in DIALECTS:
            raise ConfigError(
                f"{path}.dialect", str(dialect)[:100], f"must be one of {', '.join(DIALECTS)}"
            )
        base = _base_url(f"{path}.base_url", dialect, table["base_url"])
        if not rebases:
            urls[dialect] = _rooted(dialect, base)
    elif "dialect" in table:
        raise ConfigError(f"{path}.dialect", None, "needs base_url, which is not set")
    if preset is not None and (rebases or "base_url" not in table):
        urls |= urls_of(path, preset, table)
    for dialect, url in table_at(f"{path}.dialects", table.get("dialects", {})).items():
        urls[dialect] = _base_url(f"{path}.dialects.{dialect}", dialect, url)
    if not urls:
        raise ConfigError(f"{path}.base_url", "(not set)", "must be set, or provider or dialects")
    return urls


def _key(
    path: str,
    provider: str | None,
    table: Mapping[str, Any],
    access: AccessOptions,
    secret: ReadSecret,
) -> str:
    """Return the key: the value of the named variable, else of the provider's usual one; "" for a
    server that needs none."""
    authentication = access.authentication
    if authentication.kind == "none" or authentication.is_renewed:
        for name in ("key", "key_file"):
            if name in table:
                allowed = f"is not for auth = {authentication.kind}, which sends no key"
                raise ConfigError(f"{path}.{name}", "(hidden)", allowed)
        return ""
    if "key_file" in table:
        return _key_in_file(path, table)
    preset = PROVIDERS.get(provider or "")
    variable = table.get("key", preset.key if preset else None)
    if variable is None and authentication.kind == "key" and (preset is None or preset.is_own):
        return ""
    if variable is None:
        allowed = 'must be the name of the variable that has the key, or auth = "none"'
        raise ConfigError(f"{path}.key", "(not set)", allowed)
    if not isinstance(variable, str) or re.fullmatch(r"[A-Z][A-Z0-9_]*", variable) is None:
        raise ConfigError(f"{path}.key", "(hidden)", "must be the name of the variable that has it")
    value = secret(variable)
    if not value:
        raise ConfigError(variable, "(not set)", f"must be set: {path} {_IS_FROM_IT}")
    if not (value.isascii() and value.isprintable()):  # no header can carry it
        raise ConfigError(variable, "(hidden)", "must be printable ASCII")
    return value


def _key_in_file(path: str, table: Table) -> str:
    if "key" in table:
        raise ConfigError(f"{path}.key_file", "(set)", "can't be set together with key")
    name = readable_file(f"{path}.key_file", table["key_file"])
    with Path(name).open("rb") as file:
        value = file.read(_LONGEST_KEY_BYTES + 1).strip()
    is_plain = value.isascii() and value.decode("ascii").isprintable()
    if not value or len(value) > _LONGEST_KEY_BYTES or not is_plain:
        allowed = f"must have a key in it, in printable ASCII of at most {_LONGEST_KEY_BYTES} bytes"
        raise ConfigError(f"{path}.key_file", name[:200], allowed)
    return value.decode()


def _rooted(dialect: str, url: str) -> str:
    """Return the URL that the relay's paths are appended to: with a version in OpenAI's dialect,
    without one in the others."""
    if dialect != "openai":
        return re.sub(r"/v1(?:beta)?$", "", url)
    return url if split_url(url).path else f"{url}/v1"


def _options(path: str, table: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "models" in table:
        found["models"] = texts_of(f"{path}.models", table["models"])
    if "aliases" in table:
        if aliases := table_at(f"{path}.aliases", table["aliases"]):
            texts_of(f"{path}.aliases", list(aliases.values()))
        found["aliases"] = dict(aliases)
    if "weight" in table:
        weight = table["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int) or not 1 <= weight <= 1000:
            raise ConfigError(
                f"{path}.weight", str(weight), "must be a whole number from 1 to 1000"
            )
        found["weight"] = weight
    if "asks_usage" in table:
        if not isinstance(table["asks_usage"], bool):
            raise ConfigError(
                f"{path}.asks_usage", str(table["asks_usage"]), "must be true or false"
            )
        found["asks_usage"] = table["asks_usage"]
    if "learn" in table:
        if table["learn"] not in _LEARN:
            allowed = f"must be one of {', '.join(_LEARN)}"
            raise ConfigError(f"{path}.learn", str(table["learn"])[:100], allowed)
        found["learn"] = table["learn"]
    if "abandoned" in table:
        if table["abandoned"] not in ABANDONED:
            allowed = f"must be one of {', '.join(ABANDONED)}"
            raise ConfigError(f"{path}.abandoned", str(table["abandoned"])[:100], allowed)
        found["abandoned"] = table["abandoned"]
    if "media_hosts" in table:
        hosts = table["media_hosts"]
        found["media_hosts"] = texts_of(f"{path}.media_hosts", hosts) if hosts != [] else ()
    if "preempt" in table:
        found["preempt"] = preempt_of(f"{path}.preempt", table["preempt"])
    if "passthrough" in table:
        found["passthrough"] = texts_of(f"{path}.passthrough", table["passthrough"])
        for one in found["passthrough"]:
            if _PASSTHROUGH.fullmatch(one) is None:
                allowed = "must be a path such as /v1/new-thing, or /v1/new/* for all below"
                raise ConfigError(f"{path}.passthrough", one, allowed)
    if "adopt" in table:
        found["adopt"] = _tenant(f"{path}.adopt", table["adopt"])
    if "passthrough_tenants" in table:
        named = texts_of(where := f"{path}.passthrough_tenants", table["passthrough_tenants"])
        if "passthrough" not in found:
            raise ConfigError(where, None, "needs passthrough, which is not set")
        found["passthrough_tenants"] = tuple(_tenant(where, one) for one in named)
    found["timeouts"] = {
        name: _milliseconds(f"{path}.{name}", table[name]) for name in TIMEOUTS if name in table
    }
    if "prices" in table:
        prices = table_at(f"{path}.prices", table["prices"])
        found["prices"] = {
            str(model): price_of(where := f"{path}.prices.{model}", table_at(where, price))
            for model, price in prices.items()
        }
    return found


def _tenant(path: str, value: object) -> str:
    allowed = "must be a tenant: 1 to 200 characters without spaces, | { or }"
    if not isinstance(value, str):
        raise ConfigError(path, str(value)[:100], allowed)
    try:
        check_tenant(value)
    except ConfigError:
        raise ConfigError(path, value[:100], allowed) from None
    return value


def check_adopted(upstreams: Sequence[Upstream]) -> None:
    """Raise ConfigError if it is ambiguous at which account a tenant's unknown ids exist."""
    first: dict[tuple[str, str], str] = {}
    for one in upstreams:
        for dialect in one.base_urls if one.adopt is not None else ():
            name = first.setdefault((str(one.adopt), dialect), one.name)
            if name != one.name:
                allowed = f"must be of one upstream of the {dialect} dialect: {_path(name)} has it"
                raise ConfigError(f"{_path(one.name)}.adopt", one.adopt, allowed)


def _check_preempt(path: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError if a call that gave way would continue at the server."""
    if options.get("preempt") and options.get("abandoned") == "wait":
        allowed = 'needs abandoned = "release", for a server that stops when its client leaves'
        raise ConfigError(f"{path}.preempt", "(set)", allowed)


def preempt_of(path: str, value: object) -> Preempt | None:
    if isinstance(value, bool):
        return Preempt() if value else None
    if not isinstance(value, dict):
        allowed = "must be true, false or a table of after_ms and times"
        raise ConfigError(path, str(value)[:100], allowed)
    usual = Preempt()
    check_keys(path, value, ("after_ms", "times"))
    times = value.get("times", usual.times)
    if isinstance(times, bool) or not isinstance(times, int) or not 1 <= times <= _MOST_TIMES:
        allowed = f"must be a whole number from 1 to {_MOST_TIMES}"
        raise ConfigError(f"{path}.times", str(times)[:100], allowed)
    after_ms = _milliseconds(f"{path}.after_ms", value.get("after_ms", usual.after_ms))
    return Preempt(after_ms, times)


def _milliseconds(path: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LONGEST_MS:
        allowed = f"must be a whole number of milliseconds from 1 to {_LONGEST_MS}"
        raise ConfigError(path, str(value), allowed)
    return value


def _policy(
    path: str, table: Mapping[str, Any], stated: Mapping[str, Any], provider: str
) -> PoolPolicy:
    plain = {key: table[key] for key in POLICY_KEYS if key in table}
    plain.setdefault("limits", {"pool:total": USUAL_AT_ONCE})
    plain["limits"] = filled(table_at(f"{path}.limits", plain["limits"]), provider)
    for key in ("weights", "bands"):  # stated once for all pools
        if key in stated:
            plain.setdefault(key, stated[key])
    try:
        check_tenants(plain["limits"])
        return of_plain(plain)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error.variable}", error.value, error.allowed) from None


def _routes(value: object, names: set[str]) -> tuple[Route, ...]:
    if not isinstance(value, list):
        raise ConfigError("routes", str(value)[:100], "must be a list of tables, [[routes]]")
    found = []
    for place, item in enumerate(value):
        path = f"routes[{place}]"
        table = table_at(path, item)
        if set(table) != {"model", "try"}:
            raise ConfigError(path, ", ".join(table), "must have `model` and `try`")
        (model,) = texts_of(f"{path}.model", [table["model"]])
        targets = []
        for target in texts_of(f"{path}.try", table["try"]):
            upstream, _, of_it = target.partition("/")
            if upstream not in names:
                allowed = (
                    f"must be an upstream, or upstream/model; known: {', '.join(sorted(names))}"
                )
                raise ConfigError(f"{path}.try", target, allowed)
            targets.append((upstream, of_it or None))
        found.append(Route(model, tuple(targets)))
    return tuple(found)


def _base_url(path: str, dialect: str, url: object) -> str:
    if dialect not in DIALECTS:
        raise ConfigError(path, None, unknown(dialect, DIALECTS))
    if not isinstance(url, str) or not is_plain_url(url):
        raise ConfigError(
            path,
            "(hidden)",
            "must be an http:// or https:// URL without a user, query, fragment or blank",
        )
    return url.rstrip("/")


USUAL_FILE = Path("tidegate.toml")
_NOT_OF_THE_POOL = ("upstreams", "routes")
_LONGEST_BYTES = 1_000_000
_ANY_ONE = (
    "must be set when HOST is not loopback (HOST={host}), or OPENAI_API_KEY, or ANTHROPIC_API_KEY, "
    "or an upstream in tidegate.toml; TIDEGATE_DEMO=1 allows the emulated provider"
)


def deployed(config: Config) -> PoolPolicy:
    """Return the policy that this deployment requests for the pool `gemini`, as revision 1. Raises
    ConfigError."""
    path = policy_file(config)
    return of_plain(_filled({}, config)) if path is None else from_file(path, config)


def from_file(path: Path, config: Config) -> PoolPolicy:
    """Return the policy of a file, completed from `config`. Raises ConfigError."""
    read = _read(path)
    stated = {key: value for key, value in read.items() if key not in _NOT_OF_THE_POOL}
    try:
        check_keys("", read, (*SECTIONS, *_NOT_OF_THE_POOL))
        of_plain(stated)  # checked alone first, so that errors are attributed to the file
        check_tenants(stated.get("limits", {}))
        return of_plain(_filled(stated, config))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.variable}", error.value, error.allowed) from None


@dataclass(frozen=True, slots=True)
class Stated:
    """The contents of the policy file, read once: later edits take effect at the next start."""

    contents: Mapping[str, Any]
    path: Path | None
    config: Config

    def deployment(
        self, live: LiveChanges = NO_CHANGES, before: Deployment | None = None
    ) -> Deployment:
        """Return the deployment, as `deployment_of`."""
        with self._named():
            return deployment_of(self.contents, self.config, secret, live, before)

    def upstreams_without_access(self) -> tuple[Upstream, ...]:
        """Return the upstreams of the file and the environment, for their prices: the keys and
        files to reach them need not be present. Raises ConfigError."""
        with self._named():
            tables = {
                name: {key: value for key, value in table.items() if key not in _OF_ACCESS}
                | ({} if name == DEFAULT_POOL else {"auth": "none"})
                for name, table in _stated_tables(self.contents).items()
            }
            config = self.config
            if DEFAULT_POOL in tables and config.gemini_api_key is None:
                config = config.model_copy(update={"gemini_api_key": SecretStr("-")})
            contents = {**self.contents, "upstreams": tables}
            return deployment_of(contents, config, secret).upstreams

    def pool(self, name: str, live: LiveChanges) -> tuple[PoolPolicy, str] | None:
        """Return the pool policy of a live upstream, and its provider or "", whether or not this
        process has its key. None if there is no such upstream. Raises ConfigError."""
        table = live.over(self.tables()).get(name)
        if table is None:
            return None
        provider = provider_in(name, table) or ""
        with self._named():
            return _policy(_path(name), table, self.contents, provider), provider

    def tables(self) -> dict[str, Table]:
        """Return the tables, as `base_tables`."""
        with self._named():
            return base_tables(self.contents, self.config)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            if self.path is None:
                raise
            name = f"{self.path}: {error.variable}"
            raise ConfigError(name, error.value, error.allowed) from None


def stated_by(config: Config) -> Stated:
    """Return what the policy file states. Raises ConfigError for an unreadable file."""
    path = policy_file(config)
    return Stated({} if path is None else _read(path), path, config)


def deployed_upstreams(config: Config, live: LiveChanges = NO_CHANGES) -> Deployment:
    """Return this deployment's upstreams with their policies. Raises ConfigError."""
    found = stated_by(config).deployment(live)
    if not found.upstreams:
        raise ConfigError("GEMINI_API_KEY", "(not set)", _ANY_ONE.format(host=config.host))
    return found


def emulates(config: Config) -> bool:
    """Return whether the built-in emulator acts as Gemini: without Gemini's key, on loopback or in
    a demonstration; beside other upstreams only with the bundled servers. Raises ConfigError."""
    names = {one.name for one in deployed_upstreams(config).upstreams} if config.emulated else ()
    return DEFAULT_POOL in names


def default_pool(config: Config) -> str:
    """Return the pool of a command that names none: Gemini's, or the first upstream's without an
    account of Gemini."""
    try:
        names = list(stated_by(config).tables())
    except ConfigError:
        return DEFAULT_POOL
    return DEFAULT_POOL if DEFAULT_POOL in names or not names else names[0]


# Admin keys of providers, read by the commands that need them.
_OF_COMMANDS = ("OPENAI_ADMIN_KEY", "ANTHROPIC_ADMIN_KEY")
_NEAR = 0.82  # a missing letter or two swapped ones, not another account's key
_SAME_WORD = 0.5


class Doubt(NamedTuple):
    """A name that may be a misspelt setting: where it is set, the likely setting, and a remark."""

    name: str
    place: str
    near: str
    remark: str = "is {near} meant?"

    def __str__(self) -> str:
        return f"{self.place}: {self.name} is not a setting; {self.remark.format(near=self.near)}"


def misspelt(
    environ: Mapping[str, str] | None = None, dotenv: Path = Path(".env")
) -> tuple[Doubt, ...]:
    """Return names in the environment and in `.env` that resemble a setting's."""
    places = _places(os.environ if environ is None else environ, dotenv)
    names = [name.upper() for model in (Config, Client) for name in model.model_fields]
    known = dict.fromkeys([*names, *(f"{name}_FILE" for name in names if name in SECRETS)])
    of_commands = {*_OF_COMMANDS, *(f"{name}_FILE" for name in _OF_COMMANDS)}
    strange = sorted(places.keys() - known.keys() - of_commands)
    near = {name: found for name in strange if (found := _nearly(name.upper(), known))}
    return tuple(Doubt(name, places[name][0], meant) for name, meant in near.items())


def _places(environ: Mapping[str, str], dotenv: Path = Path(".env")) -> dict[str, tuple[str, str]]:
    """Return where each variable is set, and its value."""
    found = {name: (str(dotenv), value) for name, value in from_dotenv(dotenv).items()}
    return found | {name: ("the environment", value) for name, value in environ.items()}


def _nearly(name: str, known: Iterable[str]) -> str | None:
    """Return the setting that `name` may mean, by its letters. Not if one of its words is another
    (OPENAI_API_BASE), or if a word precedes it (AZURE_OPENAI_API_KEY)."""
    for near in get_close_matches(name, known, n=3, cutoff=_NEAR):
        pairs = [*zip(name.split("_"), near.split("_"), strict=False)]
        is_as_long = name.count("_") == near.count("_")
        is_another = is_as_long and any(
            SequenceMatcher(None, one, other).ratio() < _SAME_WORD for one, other in pairs
        )
        if not is_another and not name.endswith(f"_{near}"):
            return near
    return None


def doubtful(config: Config) -> list[Doubt]:
    """Return variables that resemble a setting's name, and base URLs of SDKs. Variables that the
    policy file mentions are left out: another account's key is no mistake. Raises ConfigError."""
    path, places = policy_file(config), _places(os.environ)
    policy_text = "" if path is None else path.read_text(errors="replace")
    tables = stated_by(config).tables()
    usual = [name for name, table in tables.items() if not {"base_url", "dialects"} & table.keys()]
    others = other_urls(usual, {name: value for name, (_, value) in places.items()})
    urls = (Doubt(name, places[name][0], *details) for name, *details in others)
    return [*(one for one in misspelt() if one.name not in policy_text), *urls]


HIDDEN = "(hidden)"


@dataclass(frozen=True, slots=True)
class StatedSetting:
    """A setting for display, never a secret. value: None if it is not set. origin: where it comes
    from, in words; None for the default."""

    name: str
    value: str | None
    origin: str | None


def stated_settings(config: Config) -> list[StatedSetting]:
    """Return all settings in the order of the documentation."""
    passed, found = os.environ.get(ORIGINS), list[StatedSetting]()
    places: Mapping[str, str] = json.loads(passed) if passed else origins()
    for field_name, value in config:
        name, text = field_name.upper(), None
        if value is not None:
            plain = int(value) if isinstance(value, bool) else value
            text = json.dumps(value) if isinstance(value, dict) else str(plain)
            text = HIDDEN if name in SECRETS else text
        found.append(StatedSetting(name, text, places.get(name)))
    return found


def policy_file(config: Config) -> Path | None:
    """Return the file that states the policy, or None."""
    if config.tidegate_policy is not None:
        return config.tidegate_policy
    # A path that is no file, such as a folder made by a container's mount, is an error, not absent.
    return USUAL_FILE if USUAL_FILE.exists() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        if len(data) > _LONGEST_BYTES:
            allowed = f"must be a file of at most {_LONGEST_BYTES} bytes"
            raise ConfigError(str(path), f"({len(data)} bytes)", allowed)
        return tomllib.loads(data.decode("utf-8-sig"))  # editors on Windows may write a BOM
    except OSError as unreadable:
        allowed = f"must be a readable file: {unreadable.strerror}"
        raise ConfigError(str(path), "(file)", allowed) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), "(file)", "must be UTF-8 text") from None
    except (ValueError, RecursionError) as broken:
        raise ConfigError(str(path), "(file)", f"must be TOML: {broken}") from None


def _filled(stated: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return `stated`, completed from the environment."""
    kinds = {Kind(kind).limit: limit for kind, limit in config.rate_limits.items()}
    pool = {
        "lease_ms": config.lease_ms,
        "when_away": config.when_valkey_away,
        "on_lost": config.on_lost,
        "on_expiry": config.on_expiry,
    }
    limits = {**kinds, CLASSIFIER_LIMIT: config.classifier_limit}
    return {
        **stated,
        "limits": limits | stated.get("limits", {}),
        "pool": pool | stated.get("pool", {}),
    }
