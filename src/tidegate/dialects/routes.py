"""Routes and headers of the native APIs: dialect, operation and model of a path. Pure.

Invariants: an unknown path is not relayed, so that nothing of an account is reachable but models,
calls of models and files; headers of one connection, of the client's browser, of its address and
of its key never pass; unknown headers do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from enum import StrEnum


class Dialect(StrEnum):
    """Whose words a client speaks."""

    OPENAI = "openai"
    GEMINI = "gemini"
    ANTHROPIC = "anthropic"


class Operation(StrEnum):
    """What a call does, as far as admission and accounting see it.

    INFER asks a model for text or pictures, EMBED for vectors, IMAGES for pictures alone; COUNT,
    MODELS, FILES and UPLOAD ask for nothing of it, and take a limit only where there is one for
    `kind:other`.
    """

    INFER = "infer"
    EMBED = "embed"
    IMAGES = "images"
    COUNT = "count"
    MODELS = "models"
    FILES = "files"
    UPLOAD = "upload"

    @property
    def is_counted(self) -> bool:
        return self in (Operation.INFER, Operation.EMBED, Operation.IMAGES)

    @property
    def has_body(self) -> bool:
        """Whether a body is part of the call. Google's SDK for JavaScript deletes a file with an
        empty object, which means nothing."""
        return self not in (Operation.MODELS, Operation.FILES)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A native path. path: below the upstream's base URL, beginning with a slash, with `{model}`
    where the model stands. model: as the path has it; None where the body names it. streams: the
    path alone says that the answer is a stream."""

    dialect: Dialect
    operation: Operation
    path: str
    model: str | None = None
    streams: bool = False
    is_counted: bool = field(init=False, compare=False)  # as the operation's

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_counted", self.operation.is_counted)

    @property
    def name(self) -> str:
        """What it does, in the words of the conventions for telemetry; holds no model's name."""
        return _NAMES.get((self.dialect, self.operation)) or _NAMED[self.operation]

    def path_for(self, model: str) -> str:
        """Its path when the call goes to `model`."""
        if self.model is None:
            return self.path
        return self.path.replace("{model}", model.replace("/", "%2F"))


_NAMED = {
    Operation.INFER: "chat",
    Operation.EMBED: "embeddings",
    Operation.IMAGES: "generate_images",
    Operation.COUNT: "count_tokens",
    Operation.MODELS: "models",
    Operation.FILES: "files",
    Operation.UPLOAD: "upload",
}
_NAMES = {(Dialect.GEMINI, Operation.INFER): "generate_content"}
_OPENAI_CALLS = {
    "/chat/completions": Operation.INFER,
    "/completions": Operation.INFER,
    "/responses": Operation.INFER,
    "/embeddings": Operation.EMBED,
    "/images/generations": Operation.IMAGES,
}
_ANTHROPIC_CALLS = {
    "/v1/messages": Operation.INFER,
    "/v1/messages/count_tokens": Operation.COUNT,
}
_POSTED = {
    **{f"/v1{path}": Endpoint(Dialect.OPENAI, do, path) for path, do in _OPENAI_CALLS.items()},
    **{path: Endpoint(Dialect.ANTHROPIC, do, path) for path, do in _ANTHROPIC_CALLS.items()},
}
# A method that is not named here is one of the future: it asks a model for something.
_GEMINI_OPERATIONS = {
    "countTokens": Operation.COUNT,
    "computeTokens": Operation.COUNT,
    "embedContent": Operation.EMBED,
    "batchEmbedContents": Operation.EMBED,
}
# Begins work that goes on after the call, which can be neither admitted nor accounted.
_STARTS_WORK = re.compile(r"^(?:batchGenerate|asyncBatch)|LongRunning$")
_GEMINI_CALL = re.compile(
    r"(?P<folder>/v1(?:alpha|beta)?/(?:models|tunedModels)/)(?P<model>[\w\-@][\w.\-@]{0,199}):(?P<do>\w+)",
    re.ASCII,
)
_GEMINI_MODELS = re.compile(r"/v1(?:alpha|beta)?/models(?:/[\w\-][\w.\-]*)?", re.ASCII)
_GEMINI_FILES = re.compile(r"/v1(?:alpha|beta)?/files(?:/[\w-]+(?::download)?)?", re.ASCII)
_GEMINI_UPLOAD = re.compile(r"/upload/v1(?:alpha|beta)?/files", re.ASCII)
# No name begins with a dot: ".." would lead elsewhere.
# Of OpenAI's dialect it may hold slashes, as at OpenRouter and vLLM.
_MODELS = re.compile(r"/v1/models(?:/[\w\-@][\w.\-:@]{0,199}(?:/[\w\-@][\w.\-:@]{0,199}){0,3})?",
                     re.ASCII)  # fmt: skip
_METHODS = ("GET", "POST", "PUT", "DELETE")
_SLASHES = re.compile(r"/{2,}")
_ROOTS = ("/v1/", "/v1beta/", "/v1alpha/", "/upload/")
# What clients come to whose base URL is one step off: with a version too many, with one of another
# gateway's or provider's, or without any.
_STEPS_OFF = (
    ("/v1beta/openai/", "/v1/"),
    ("/openai/v1/", "/v1/"),
    ("/v1/v1/", "/v1/"),
    ("/v1beta/v1/", "/v1/"),
    ("/v1/v1beta/", "/v1beta/"),
    ("/v1beta/v1beta/", "/v1beta/"),
)
_WITHOUT_VERSION = re.compile(
    r"/(?:chat/completions|completions|responses|embeddings|images/generations"
    r"|messages(?:/count_tokens)?|models(?:/[^:]{1,400})?)"
)
_GEMINI_WITHOUT_VERSION = re.compile(r"/(?:models|tunedModels)/[^/]{1,400}:\w{1,100}")


def native_path(path: str) -> str | None:
    """The path of a native front that a request means, known or not; None where it means none."""
    if path in _POSTED:
        return path
    plain = _SLASHES.sub("/", path)
    plain = plain.rstrip("/") if plain.startswith(_ROOTS) else plain
    for wrong, right in _STEPS_OFF:
        if plain.startswith(wrong):
            return right + plain[len(wrong) :]
    if plain.startswith(_ROOTS):
        return plain
    bare = plain.rstrip("/")
    if _GEMINI_WITHOUT_VERSION.fullmatch(bare):
        return f"/v1beta{bare}"
    return f"/v1{bare}" if _WITHOUT_VERSION.fullmatch(bare) else None


def is_native(path: str) -> bool:
    """Whether a path belongs to a native front, known or not: its errors are in that dialect."""
    return native_path(path) is not None


def dialect_of(path: str, headers: Set[bytes], query: bytes) -> Dialect:
    """Whose words a request is likely in: by its path, and where two share it by its key.

    `headers`: the names that it bears, in lower case.
    """
    if not path.startswith("/v1/") or b"x-goog-api-key" in headers or b"key=" in query:
        return Dialect.GEMINI
    if b"anthropic-version" in headers or path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    return Dialect.OPENAI


def meant_by(
    method: str, path: str, headers: Iterable[tuple[bytes, bytes]], query: bytes
) -> tuple[Endpoint | None, Dialect]:
    """The endpoint of a request, None where it is none, and whose words it is in."""
    endpoint = _POSTED.get(path) if method == "POST" else None  # the path alone says it all
    if endpoint is None:
        hint = dialect_of(path, {name for name, _ in headers}, query)
        endpoint = endpoint_of(method, path, hint)
        if endpoint is None:
            return None, hint
    return endpoint, endpoint.dialect


def endpoint_of(method: str, path: str, dialect: Dialect) -> Endpoint | None:
    """The endpoint of a request, or None where it is none. `dialect` is what `dialect_of` says: it
    decides where the path alone does not."""
    if method == "POST":
        if (endpoint := _POSTED.get(path)) is not None:
            return endpoint
        if (call := _GEMINI_CALL.fullmatch(path)) is not None:
            return _gemini_call(call)
    if method in ("POST", "PUT") and _GEMINI_UPLOAD.fullmatch(path):
        return Endpoint(Dialect.GEMINI, Operation.UPLOAD, path)
    if method == "DELETE" and dialect is Dialect.GEMINI and _GEMINI_FILES.fullmatch(path):
        return Endpoint(Dialect.GEMINI, Operation.FILES, path) if path.count("/") == 3 else None
    return _listed(path, dialect) if method == "GET" else None


def methods_at(path: str, dialect: Dialect) -> tuple[str, ...]:
    """By which methods a path is relayed; none where it is not known."""
    return tuple(one for one in _METHODS if endpoint_of(one, path, dialect) is not None)


def _gemini_call(call: re.Match[str]) -> Endpoint | None:
    do = call["do"]
    if _STARTS_WORK.search(do):
        return None
    return Endpoint(
        Dialect.GEMINI,
        _GEMINI_OPERATIONS.get(do, Operation.INFER),
        f"{call['folder']}{{model}}:{do}",
        model=call["model"],
        streams=do.startswith("stream"),
    )


def _listed(path: str, dialect: Dialect) -> Endpoint | None:
    if dialect is Dialect.GEMINI:
        if _GEMINI_MODELS.fullmatch(path):
            return _models(dialect, path)
        return Endpoint(dialect, Operation.FILES, path) if _GEMINI_FILES.fullmatch(path) else None
    if _MODELS.fullmatch(path) is None:
        return None
    return _models(dialect, path.removeprefix("/v1") if dialect is Dialect.OPENAI else path)


def _models(dialect: Dialect, path: str) -> Endpoint:
    """The list, or one of them."""
    folder, below, model = path.partition("/models/")
    if not below:
        return Endpoint(dialect, Operation.MODELS, path)
    return Endpoint(dialect, Operation.MODELS, f"{folder}/models/{{model}}", model=model)


Headers = list[tuple[bytes, bytes]]

# RFC 9110, section 7.6.1, and what Connection itself names.
_HOP_BY_HOP = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate"),
        *(b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    )
)
_OURS = b"x-tidegate-"
_NOT_SENT = _HOP_BY_HOP | frozenset(
    (
        *(b"host", b"content-length", b"expect", b"accept-encoding", b"cookie", b"idempotency-key"),
        *(b"authorization", b"x-api-key", b"x-goog-api-key", b"api-key"),
        *(b"openai-organization", b"openai-project", b"x-goog-user-project"),
        *(b"forwarded", b"via", b"x-real-ip", b"origin", b"referer"),
        # Some servers take these for the method or the path that is really meant.
        *(b"x-http-method-override", b"x-http-method", b"x-method-override"),
        *(b"x-original-url", b"x-rewrite-url"),
        # Some begin work for them that goes on after their answer, under no permit.
        *(b"prefer", b"x-dashscope-async"),
        # Google leaves out what these do not name, such as the usage; and encodes the answer.
        *(b"x-goog-fieldmask", b"x-goog-encode-response-if-executable"),
    )
)
_NOT_SENT_PREFIXES = (_OURS, b"x-forwarded-", b"sec-", b"proxy-")
# What has a say over the client's browser, our origin or our connections, and what our own server
# says. Of a redirect: an upstream's address is none of ours, and a client that followed it would
# show its key there.
_NOT_RETURNED = _HOP_BY_HOP | frozenset(
    (
        *(b"date", b"server", b"via", b"x-powered-by", b"alt-used", b"priority"),
        *(b"location", b"content-location", b"refresh", b"link"),
        *(b"set-cookie", b"set-cookie2", b"clear-site-data", b"set-login", b"p3p"),
        *(b"www-authenticate", b"authentication-info", b"activate-storage-access"),
        *(b"alt-svc", b"strict-transport-security", b"public-key-pins", b"expect-ct"),
        *(b"public-key-pins-report-only", b"early-data", b"http2-settings"),
        *(b"content-security-policy", b"content-security-policy-report-only"),
        *(b"permissions-policy", b"feature-policy", b"document-policy", b"referrer-policy"),
        *(b"x-frame-options", b"x-xss-protection", b"x-permitted-cross-domain-policies"),
        *(b"x-dns-prefetch-control", b"x-download-options", b"x-ua-compatible"),
        *(
            b"origin-agent-cluster",
            b"origin-trial",
            b"service-worker-allowed",
            b"speculation-rules",
        ),
        *(b"supports-loading-mode", b"no-vary-search", b"sourcemap", b"x-sourcemap"),
        *(b"nel", b"report-to", b"reporting-endpoints", b"timing-allow-origin", b"tk"),
        *(b"accept-ch", b"accept-ch-lifetime", b"critical-ch", b"use-as-dictionary"),
    )
)
_NOT_RETURNED_PREFIXES = (_OURS, b"access-control-", b"cross-origin-", b"sec-", b"proxy-")
_SHORTEST_SECRET_BYTES = 8  # a shorter one, such as `none`, opens nothing
_NO_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def to_send(given: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers of a client that go on to the upstream. Names are in lower case, as ASGI gives
    them."""
    found, named = [], b""
    for pair in given:
        name = pair[0]
        if name in _NOT_SENT:
            if name == b"connection":  # there may be several
                named = b"%b,%b" % (named, pair[1].lower()) if named else pair[1].lower()
        elif not name.startswith(_NOT_SENT_PREFIXES):
            found.append(pair)
    if named and named not in (b"keep-alive", b"close"):
        dropped = {one.strip() for one in named.split(b",")}
        found = [pair for pair in found if pair[0] not in dropped]
    # A compressed answer could not be read for its usage.
    found.append((b"accept-encoding", b"identity"))
    return found


def with_key(headers: Headers, dialect: Dialect, key: str) -> Headers:
    """The same with the upstream's key, as the dialect shows it; without one where it is empty."""
    if not key:
        return headers
    if dialect is Dialect.OPENAI:
        return [*headers, (b"authorization", b"Bearer " + key.encode())]
    name = b"x-goog-api-key" if dialect is Dialect.GEMINI else b"x-api-key"
    return [*headers, (name, key.encode())]


def to_return(
    given: Iterable[tuple[bytes, bytes]], key: str = "", *, same_length: bool = True
) -> Headers:
    """The headers of an upstream's answer that go back to the client. Where they repeat the
    upstream's `key` it is masked."""
    found, named = [], b""
    for raw_name, value in given:
        name = raw_name.lower()
        if name == b"connection":
            named = b"%b,%b" % (named, value.lower()) if named else value.lower()
        if name in _NOT_RETURNED or (name == b"content-length" and not same_length):
            continue
        if not name.startswith(_NOT_RETURNED_PREFIXES) or name == b"x-tidegate-emulator":
            found.append((name, value))
    values = b"".join([value for _, value in found])
    if (secret := key.encode()) in values and len(secret) >= _SHORTEST_SECRET_BYTES:
        found = [(name, value.replace(secret, b"***")) for name, value in found]
    if _NO_VALUE.search(values):  # our server would not send it
        found = [pair for pair in found if not _NO_VALUE.search(pair[1])]
    if named and named not in (b"keep-alive", b"close"):
        dropped = {one.strip() for one in named.split(b",")}
        found = [pair for pair in found if pair[0] not in dropped]
    return found


def content_type_in(headers: Headers) -> str | None:
    """None where none is told."""
    for name, value in headers:
        if name == b"content-type":
            return value.decode("latin-1")
    return None


def of_answer(upstream: str, queue_ms: float) -> Headers:
    """What every answer bears that an upstream gave, its refusals too: who gave it, and how long
    the call waited for its turn."""
    return [
        (b"x-tidegate-queue-ms", b"%.1f" % queue_ms),
        (b"x-tidegate-upstream", upstream.encode()),
    ]
