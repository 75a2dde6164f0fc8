"""Access to an upstream: its paths, its authentication, its headers and query, its network.

Invariants: a secret is the value of a variable, never part of the file, and is in no message and no
`repr`; what the operator sets for an upstream replaces what a client sends under the same name.
"""

from __future__ import annotations

import re
import ssl
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode
from urllib.request import getproxies_environment, proxy_bypass

from tidegate.errors import ConfigError
from tidegate.settings import Config, split_url

Pairs = tuple[tuple[bytes, bytes], ...]
ReadSecret = Callable[[str], str]


class Paths(StrEnum):
    """How an upstream's paths are built.

    PLAIN: as in the dialect. PERPLEXITY: some of them below a version. DEPLOYMENTS: Azure's, with
    the model in the path. VERTEX: below a project, a location and a publisher.
    """

    PLAIN = "plain"
    PERPLEXITY = "perplexity"
    DEPLOYMENTS = "deployments"
    VERTEX = "vertex"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy. authorization: the value of its header, empty without a user. url: with the user."""

    host: str
    port: int
    authorization: bytes = field(default=b"", repr=False)
    url: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Network:
    """How connections are made, if not in the usual way.

    ca_file: the only trusted root certificates. certificate, certificate_key: the client's.
    """

    proxy: Proxy | None = None
    ca_file: str = ""
    certificate: str = ""
    certificate_key: str = ""

    def tls_context(self) -> ssl.SSLContext:
        """Return a TLS context. Raises OSError and ssl.SSLError for unusable files."""
        context = ssl.create_default_context(cafile=self.ca_file or None)
        context.set_alpn_protocols(["http/1.1"])
        if self.certificate:
            context.load_cert_chain(self.certificate, self.certificate_key or None)
        return context


@dataclass(frozen=True, slots=True)
class Authentication:
    """How requests authenticate.

    kind: `none`, `key` (in the dialect's header), `bearer`, `header`, or by renewed credentials:
    `google`, `entra`, `aws`. header: its name, for `header`. options: of the credentials, such as
    a file or a region. content: a digest of that file. network: used to request credentials.
    """

    kind: str = "key"
    header: str = ""
    options: tuple[tuple[str, str], ...] = ()
    content: str = ""
    network: Network | None = None

    @property
    def is_renewed(self) -> bool:
        return self.kind in RENEWED

    def option(self, name: str) -> str:
        """Return an option's value; "" if it is not set."""
        return dict(self.options).get(name, "")


RENEWED = ("google", "entra", "aws")
NETWORK_KEYS = ("proxy", "ca_file", "client_certificate", "client_key")
KINDS = ("none", "key", "bearer", "header:NAME", *RENEWED)
# The header of a key in each dialect, and the text before the key.
KEY_HEADERS: Mapping[str, tuple[bytes, bytes]] = {
    "openai": (b"authorization", b"Bearer "),
    "gemini": (b"x-goog-api-key", b""),
    "anthropic": (b"x-api-key", b""),
    "bedrock": (b"authorization", b"Bearer "),
}
# Headers that are removed from every client's request.
CREDENTIALS = frozenset((b"authorization", b"x-api-key", b"x-goog-api-key", b"api-key"))


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """How one upstream is reached in one dialect; compared by identity.

    base: its URL without a trailing slash. headers: its own, the key among them. replaced: names of
    these that a client may send too. query: its own parameters. authentication: set if credentials
    are renewed. connect_ms: the connect timeout; None for the usual one.
    """

    base: str
    headers: Pairs = field(default=(), repr=False)
    replaced: frozenset[bytes] = frozenset()
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    network: Network | None = None
    authentication: Authentication | None = None
    paths: Paths = Paths.PLAIN
    prefix: str = ""
    dialect: str = ""
    connect_ms: int | None = None

    def url(self, path: str, query: str = "", *, model: str = "", streams: bool = False) -> str:
        """Return the URL of a path of the dialect; some paths depend on the call's model and
        `streams`.
        """
        if self.paths is not Paths.PLAIN:
            path = self._path(path, model, streams)
        if self.query:
            query = self._with_own(query)
        return f"{self.base}{path}?{query}" if query else f"{self.base}{path}"

    def _path(self, path: str, model: str, streams: bool) -> str:
        if self.paths is Paths.PERPLEXITY:
            return path if _BELOW_VERSION.fullmatch(path) is None else f"/v1{path}"
        if self.paths is Paths.DEPLOYMENTS:
            named = model and path in OF_DEPLOYMENTS
            return f"/deployments/{quote(model, safe='')}{path}" if named else path
        if path == "/v1/messages":
            verb = "streamRawPredict" if streams else "rawPredict"
            return f"/v1{self.prefix}/publishers/anthropic/models/{quote(model, safe='@')}:{verb}"
        if path == "/v1/messages/count_tokens":
            return f"/v1{self.prefix}/publishers/anthropic/models/count-tokens:rawPredict"
        if (found := _MODELS.fullmatch(path)) is None:
            return _LIVE if path.startswith("/ws/") else path
        publisher = "anthropic" if self.dialect == "anthropic" else "google"
        if ":" not in (below := found["below"]):  # models are the publisher's, calls the project's
            return f"/v1beta1/publishers/{publisher}/models{below}"
        version = "v1" if found["version"] == "v1" else "v1beta1"
        return f"/{version}{self.prefix}/publishers/{publisher}/models{below}"

    def live_model(self, model: str) -> str:
        """Return the name of a model in the setup of a session of Gemini Live."""
        if self.paths is Paths.VERTEX:
            return f"{self.prefix.removeprefix('/')}/publishers/google/models/{model}"
        return f"models/{model}"

    def _with_own(self, query: str) -> str:
        pairs = parse_qsl(query, keep_blank_values=True)
        others = [pair for pair in pairs if pair[0] not in self.query]
        own = urlencode(self.query)
        if len(others) == len(pairs):
            return f"{query}&{own}" if query else own
        return f"{urlencode(others)}&{own}" if others else own

    def dressed(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return `headers`, in lower case, with the upstream's own in place of those of the same
        name.
        """
        if self.replaced:
            headers = [pair for pair in headers if pair[0] not in self.replaced]
        return [*headers, *self.headers]


# Paths of OpenAI's SDK for Azure that are below a deployment; its other paths are not.
OF_DEPLOYMENTS = frozenset(
    (
        *("/completions", "/chat/completions", "/embeddings", "/audio/transcriptions"),
        *("/audio/translations", "/audio/speech", "/images/generations", "/images/edits"),
    )
)
# Paths at Perplexity below a version; chat completions and searches are not.
_BELOW_VERSION = re.compile(r"/(?:models|embeddings|responses)(?:/.*)?")
_LIVE = "/ws/google.cloud.aiplatform.v1beta1.LlmBidiService/BidiGenerateContent"
_MODELS = re.compile(r"/(?P<version>v1(?:alpha|beta)?)/models(?P<below>(?:/.+)?)")


@dataclass(frozen=True, slots=True)
class AccessOptions:
    """What the table of an upstream states about access.

    paths: of dialects that have their own. prefix: the project and location in Vertex's paths.
    """

    authentication: Authentication = Authentication()
    of_dialects: Mapping[str, Authentication] = field(default_factory=dict)
    headers: Pairs = field(default=(), repr=False)
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    networks: Mapping[str, Network | None] = field(default_factory=dict)
    paths: Mapping[str, Paths] = field(default_factory=dict)
    prefix: str = ""
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def access(self, dialect: str, base: str, key: str, connect_ms: int | None = None) -> Access:
        """Return the access in one dialect. `key`: empty if there is none."""
        authentication = self.of_dialects.get(dialect, self.authentication)
        own = dict(self.headers)
        if key and (header := _key_header(authentication, dialect)) is not None:
            own[header[0]] = header[1] + key.encode()
        replaced = frozenset(own) - CREDENTIALS
        network = self.networks.get(dialect)
        renewed = replace(authentication, network=network) if authentication.is_renewed else None
        return Access(
            base,
            tuple(own.items()),
            replaced,
            self.query,
            network,
            renewed,
            self.paths.get(dialect, Paths.PLAIN),
            self.prefix,
            dialect,
            connect_ms,
        )


def _key_header(authentication: Authentication, dialect: str) -> tuple[bytes, bytes] | None:
    match authentication.kind:
        case "key":
            return KEY_HEADERS[dialect]
        case "bearer":
            return b"authorization", b"Bearer "
        case "header":
            return authentication.header.encode(), b""
    return None


# -- the policy file

_HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,100}")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]{0,4000}")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_FROM_VARIABLE = "env:"
_MOST = 50
# Headers that the connection or the authentication sets.
_NOT_SET_BY_HAND = frozenset(
    (
        *("host", "content-length", "transfer-encoding", "connection", "accept-encoding", "te"),
        *("upgrade", "expect", "trailer", "keep-alive", "proxy-authorization", "content-encoding"),
    )
)


def authentication_of(path: str, text: object, options: Mapping[str, str]) -> Authentication:
    """Return the authentication that the file names; `options`: of credentials. Raises
    ConfigError.
    """
    allowed = f"must be one of {', '.join(KINDS)}"
    if not isinstance(text, str):
        raise ConfigError(path, str(text)[:100], allowed)
    kind, _, name = text.partition(":")
    if kind == "header":
        name = name.lower()
        if _HEADER_NAME.fullmatch(name) is None or name in _NOT_SET_BY_HAND:
            raise ConfigError(path, text[:100], "must be header:NAME with the name of a header")
        return Authentication("header", name)
    if text not in KINDS:
        raise ConfigError(path, text[:100], allowed)
    if kind not in RENEWED:
        return Authentication(kind)
    file = options.get("credentials_file")
    content = sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return Authentication(kind, options=tuple(options.items()), content=content)


def value_of(path: str, value: object, secret: ReadSecret) -> tuple[str, bool]:
    """Return a text and whether it is a secret; `env:NAME` reads a variable, which is.

    Raises ConfigError.
    """
    if not isinstance(value, str):
        raise ConfigError(path, str(value)[:100], "must be a text, or env:VARIABLE")
    if not value.startswith(_FROM_VARIABLE):
        return value, False
    variable = value.removeprefix(_FROM_VARIABLE)
    if _VARIABLE.fullmatch(variable) is None:
        raise ConfigError(path, "(hidden)", "must be env:VARIABLE with the name of a variable")
    found = secret(variable)
    if not found:
        raise ConfigError(variable, "(not set)", f"must be set: {path} has its value from it")
    return found, True


def headers_of(path: str, table: Mapping[str, Any], secret: ReadSecret) -> tuple[Pairs, list[str]]:
    """Return the headers of a table, and the secrets among their values. Raises ConfigError."""
    pairs, secrets = [], []
    if len(table) > _MOST:
        raise ConfigError(path, f"({len(table)} headers)", f"must be at most {_MOST} headers")
    for name, value in table.items():
        lower = name.lower()
        if _HEADER_NAME.fullmatch(lower) is None:
            raise ConfigError(path, name[:100], "must be names of headers")
        if lower in _NOT_SET_BY_HAND or lower.startswith("x-tidegate-"):
            raise ConfigError(f"{path}.{name}", "(set)", "is a header that the gateway sets itself")
        text, is_secret = value_of(f"{path}.{name}", value, secret)
        if _HEADER_VALUE.fullmatch(text) is None:
            allowed = "must be printable ASCII of at most 4000 characters"
            raise ConfigError(f"{path}.{name}", "(hidden)", allowed)
        pairs.append((lower.encode(), text.encode()))
        secrets += [text] if is_secret else []
    return tuple(pairs), secrets


def query_of(
    path: str, table: Mapping[str, Any], secret: ReadSecret
) -> tuple[dict[str, str], list[str]]:
    """Return the query of a table, and the secrets among its values. Raises ConfigError."""
    found, secrets = {}, []
    if len(table) > _MOST:
        raise ConfigError(path, f"({len(table)} names)", f"must be at most {_MOST} names")
    for name, value in table.items():
        text, is_secret = value_of(f"{path}.{name}", value, secret)
        found[name] = text
        secrets += [text] if is_secret else []
    return found, secrets


def network_of(path: str, table: Mapping[str, Any], url: str, secret: ReadSecret) -> Network | None:
    """Return the network for an upstream at `url`; None for the usual one. Raises ConfigError."""
    files = {
        name: _file(f"{path}.{name}", table[name])
        for name in ("ca_file", "client_certificate", "client_key")
        if name in table
    }
    if "client_key" in files and "client_certificate" not in files:
        allowed = "needs client_certificate, which is not set"
        raise ConfigError(f"{path}.client_key", "(set)", allowed)
    network = Network(
        _proxy(path, table, url, secret),
        files.get("ca_file", ""),
        files.get("client_certificate", ""),
        files.get("client_key", ""),
    )
    if network == Network():
        return None
    if files:
        _check_tls(path, network)
    return network


def _check_tls(path: str, network: Network) -> None:
    for name, tried in (
        ("ca_file", Network(ca_file=network.ca_file)),
        ("client_certificate", network),
    ):
        try:
            tried.tls_context()
        except OSError as error:  # includes ssl.SSLError
            reason = error.strerror or type(error).__name__
            allowed = f"must be a file of certificates in PEM form: {reason}"
            raise ConfigError(f"{path}.{name}", getattr(network, _FIELDS[name]), allowed) from None


_FIELDS = {"ca_file": "ca_file", "client_certificate": "certificate"}


def _file(path: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(path, str(value)[:100], "must be the path of a file")
    try:
        with Path(value).open("rb"):
            return value
    except OSError as unreadable:
        allowed = f"must be a readable file: {unreadable.strerror}"
        raise ConfigError(path, value[:200], allowed) from None


readable_file = _file


def _proxy(path: str, table: Mapping[str, Any], url: str, secret: ReadSecret) -> Proxy | None:
    """Return the table's proxy, else the environment's, which never applies to loopback."""
    if "proxy" in table:
        if table["proxy"] == "none":
            return None
        text, _ = value_of(f"{path}.proxy", table["proxy"], secret)
        return _proxy_at(f"{path}.proxy", text)
    parts = split_url(url)
    host = parts.hostname or ""
    if _is_loopback(host):
        return None
    proxies = getproxies_environment()
    text = proxies.get(parts.scheme, "") or proxies.get("all", "")
    if not text or proxy_bypass(f"{host}:{parts.port}" if parts.port else host):
        return None
    name = parts.scheme if parts.scheme in proxies else "all"
    variable = f"{name.upper()}_PROXY"
    return _proxy_at(variable, text, f'http://HOST:PORT; {path}.proxy = "none" goes without')


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _proxy_at(path: str, text: str, forms: str = "http://HOST:PORT, env:VARIABLE, none") -> Proxy:
    allowed = f"must be the http:// URL of a proxy: {forms}"
    parts = split_url(text if "://" in text else f"http://{text}")
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ConfigError(path, "(hidden)", allowed)
    authorization = b""
    if parts.username is not None:
        authorization = _basic(unquote(parts.username), unquote(parts.password or ""))
    return Proxy(parts.hostname, parts.port or 80, authorization, parts.geturl())


def _basic(user: str, password: str) -> bytes:
    return b"Basic " + b64encode(f"{user}:{password}".encode())


OWN_SECRETS = (
    *("DATABASE_URL", "REDIS_URL", "ADMIN_TOKEN", "WEBHOOK_SECRET"),
    *("OIDC_CLIENT_SECRET", "ALERT_WEBHOOK_URL"),
)
STAYS_HERE = "must be another: it is a secret of this gateway's own, which goes to no provider"
_SECRET_FILES = ("key_file", "credentials_file", "client_key")


def check_secret_files(
    path: str,
    table: Mapping[str, Any],
    base: Mapping[str, Mapping[str, Any]],
    config: Config,
    secret: ReadSecret,
) -> None:
    """Raise ConfigError for a file with this gateway's own secrets, and for one that neither the
    tables of the policy file (`base`) name nor KEY_FOLDER contains: permission to change upstreams
    must not include sending any file of this machine to an address."""
    if not (named := _secret_files(table)):
        return
    data = config.data_dir.resolve()
    folder = (config.key_folder or data / "keys").resolve()
    own = [Path(one).resolve() for name in OWN_SECRETS if (one := secret(f"{name}_FILE"))]
    deployed = {file for one in base.values() for _, file in _secret_files(one)}
    for name, file in named:
        if file in (*own, data / "operator.key") or file.is_relative_to(data / "embedded"):
            raise ConfigError(f"{path}.{name}", table[name][:200], STAYS_HERE)
        if file not in deployed and not file.is_relative_to(folder):
            allowed = f"must be a file below KEY_FOLDER ({folder}), or one that tidegate.toml names"
            raise ConfigError(f"{path}.{name}", table[name][:200], allowed)


def _secret_files(table: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """Return the files of a table with secrets, by key; links are followed."""
    named = ((name, table.get(name)) for name in _SECRET_FILES)
    return [(name, Path(one).resolve()) for name, one in named if isinstance(one, str) and one]
