"""Models: which a caller may request, also within a body, and the list of models.

Invariant: a caller can use only the models that its tenant allows, also for tools and fallbacks.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import orjson

from tidegate.admission.estimator import Learning
from tidegate.call import Caller, Kind
from tidegate.dialects import DIALECTS
from tidegate.dialects.forms import MediaForm, with_files
from tidegate.dialects.gemini_work import named_in_batch, requests_in
from tidegate.dialects.headers import to_send
from tidegate.dialects.parsing import (
    MOST_WALKED,
    count_folded,
    holds,
    matches_in,
    shorten,
    skimmed,
)
from tidegate.dialects.prompts import Files, dialect_for
from tidegate.dialects.requests import cache_write_of, check_named_once, check_spelling
from tidegate.dialects.resources import Making, Reference
from tidegate.dialects.spec import (
    Dialect,
    Endpoint,
    Headers,
    ModelList,
    Operation,
    RequestFacts,
)
from tidegate.errors import (
    FetchRefused,
    Forbidden,
    InvalidRequest,
    NotFound,
    UpstreamError,
    UpstreamGarbled,
)
from tidegate.policy.access import Access
from tidegate.policy.deployment import ANY, Upstream
from tidegate.policy.format import plain_model
from tidegate.policy.providers import LIST_BASE_MODELS, LISTED_OTHERWISE, serving
from tidegate.spine.bodies import NativeCall
from tidegate.spine.routing import Target, Targets
from tidegate.spine.run import CallFailed, refusal_of
from tidegate.upstream.fetch import NO_LIST, check_uri
from tidegate.upstream.transport import RelayWire

_MOST_VALUES = 100_000
# Fields that name models, beside any that ends in `_model`.
_NAMES = frozenset(
    (
        *("model", "models", "modelname", "model_name", "fallbacks", "fallback_models"),
        *("allowed_models", "fallbackmodels", "allowedmodels"),
    )
)
# Fields of content, within which `model` is an ordinary word or a field name of a schema.
_CONTENT = frozenset(
    (
        *("messages", "input", "contents", "content", "parts", "prompt", "metadata", "system"),
        *("instructions", "systeminstruction", "system_instruction", "user", "stop", "logit_bias"),
        *("schema", "json_schema", "input_schema", "parametersjsonschema", "properties"),
        *("responseschema", "response_schema", "responsejsonschema", "input_examples"),
        *("functiondeclarations", "function_declarations", "labels"),
    )
)
# Models of tools that a provider runs, when a request names none.
_DEFAULT_MODELS = {"image_generation": "gpt-image-1"}
_OF_CLIENTS = ("function", "custom")  # tools that the client runs itself
# Of `fallbacks` without the letters that have other forms: a long s is an s, a Kelvin sign a k.
_MAYBE_NAME = (b"model", b"fallbac")
_ESCAPE = re.compile(rb"\\u00[4-7]")  # of a letter or an underscore
_ESCAPE_BYTES = 6
_MAYBE_TOOL = tuple(map(str.encode, _DEFAULT_MODELS))
_TOOLS = re.compile(r"(?:.*\.)?tools")


def targets_for(targets: Targets, bound: str | None, dialect: Dialect, model: str) -> list[Target]:
    """Return the targets of a call in a dialect: the upstreams of the model, or the one that the
    call is `bound` to. Raises NotFound if none serves the model, and InvalidRequest if the bound
    one does not."""
    if bound is None:
        return targets.of(dialect, model)
    upstream = _bound_upstream(targets, bound)
    if dialect not in upstream.base_urls:
        message = f"the upstream {bound!r} does not speak the {dialect} dialect"
        raise InvalidRequest("upstream", message, allowed=_names(targets.upstreams_of(dialect)))
    with suppress(NotFound):
        found = [one for one in targets.of(dialect, model) if one.upstream.name == bound]
        if found:
            return found
    return [_bound_target(targets, upstream, model)]


def targets_for_prompt(
    targets: Targets,
    bound: str | None,
    model: str,
    kind: Kind | None = None,
    files: Files = (),
) -> list[Target]:
    """Return the targets of a prompt, which has no dialect. Raises InvalidRequest if there are
    none."""
    if bound is None:
        return targets.of_prompt(model, kind, files)
    upstream = _bound_upstream(targets, bound)
    plain = plain_model(model)
    named = upstream.aliases.get(plain, plain)
    dialect, why = dialect_for(upstream.base_urls, named, kind, files)
    if dialect is None and why is not None:
        message = f"the upstream {bound!r} {why.reason}"
        raise InvalidRequest("upstream", message, allowed=why.allowed)
    with suppress(InvalidRequest, NotFound):
        found = [one for one in targets.of_prompt(model, kind, files) if one.upstream is upstream]
        if found:
            return found
    return [_bound_target(targets, upstream, model)]


def is_lacking(targets: Targets, model: str) -> bool:
    """Whether an upstream that this process could not set up, such as without its key, serves a
    model. Other processes may have the key."""
    now = targets.deployment
    if not now.missing:
        return False
    plain = plain_model(model)
    emptied = any(fnmatchcase(plain, one.model) for one in now.routes if not one.targets)
    return emptied or bool(serving(plain, now.tables, now.missing))


def _bound_upstream(targets: Targets, bound: str) -> Upstream:
    upstream = targets.upstreams.get(bound)
    if upstream is None:
        allowed = _names(targets.upstreams.values())
        raise InvalidRequest("upstream", f"there is no upstream {bound!r}", allowed=allowed)
    return upstream


def _bound_target(targets: Targets, upstream: Upstream, model: str) -> Target:
    plain = plain_model(model)
    if upstream.fit(plain):
        return Target(upstream, upstream.aliases.get(plain, plain))
    serving = [one for one in targets.upstreams.values() if one.fit(plain)]
    message = f"the upstream {upstream.name!r} does not serve the model {plain!r}"
    raise InvalidRequest("upstream", message, allowed=_names(serving))


def _names(upstreams: Iterable[Upstream]) -> str:
    return ", ".join(one.name for one in upstreams) or "none"


def check_model(caller: Caller, model: str, field: str = "model") -> None:
    """Raises Forbidden for a model that the caller's tenant may not use."""
    if not caller.may_ask(model):
        allowed = ", ".join(caller.models or ()) or "no model"
        named = f"the model {model[:200]}" if model else "without naming a model"
        raise Forbidden(
            f"tenant {caller.tenant_id} is not allowed to use {named}; allowed: {allowed}",
            field=field,
            allowed=allowed,
        )


def check_body(caller: Caller, endpoint: Endpoint, body: Mapping[str, Any]) -> None:
    """Raises Forbidden for a model within a body that the caller may not use, and InvalidRequest if
    a body in Gemini's dialect names a different model than its path."""
    if endpoint.operation is Operation.BATCH:
        _check_batch(caller, body)
    if endpoint.model_in_path:
        for field, named in _named_again(body):
            if named.rpartition("/")[2] != endpoint.model:
                raise InvalidRequest(
                    field,
                    f"{field} names another model than the path",
                    allowed=f"models/{endpoint.model}",
                )
    if caller.models is not None:
        prefix = "models/" if endpoint.dialect is Dialect.GEMINI else ""
        for field, model in _models_in(body):
            check_model(caller, model.removeprefix(prefix), field)


def _check_batch(caller: Caller, body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for a batch with its requests in a file, if tenants have keys: the file
    is not read here, and might name another tenant's files."""
    if caller.key_id is not None and requests_in(body) is None:
        field = "batch.inputConfig.fileName"
        message = "requests in a file are not supported, since they may name another tenant's files"
        allowed = "inputConfig.requests, or a batch of /v1/batches"
        raise InvalidRequest(field, message, allowed=allowed)


def check_names(caller: Caller, raw: bytes) -> None:
    """Raises InvalidRequest if an object of a body has a field for models twice, or the type of a
    tool with a model: parsers disagree on which one counts, so that the provider might use a model
    that was not checked."""
    if caller.models is None:
        return
    may_name = matches_in(raw, _ESCAPE, _ESCAPE_BYTES) or holds(raw, *_MAYBE_TOOL)
    if not may_name and count_folded(raw, *_MAYBE_NAME) < 2:
        return

    def check(pairs: list[tuple[str, Any]]) -> None:
        named = [name for name, _ in pairs if _names_models(name.casefold())]
        if any(name == "type" and str(value) in _DEFAULT_MODELS for name, value in pairs):
            named += [name for name, _ in pairs if name == "type"]
        for name in named:
            if named.count(name) > 1:
                message = f"{name} is named more than once in an object"
                raise InvalidRequest(name, message, allowed=f"one {name}")

    try:
        json.loads(raw, object_pairs_hook=check, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "the body is nested too deeply") from None


def _names_models(folded: str) -> bool:
    return folded in _NAMES or folded.endswith("_model")


def _named_again(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the models in bodies of Gemini's dialect that repeat the path's model."""
    if type(named := body.get("model")) is str:
        yield "model", named
    for name in ("generateContentRequest", "generate_content_request"):
        request = body.get(name)
        if type(request) is dict and type(named := request.get("model")) is str:
            yield f"{name}.model", named
    if "batch" in body:
        yield from named_in_batch(body)
    requests = body.get("requests")
    for request in requests if type(requests) is list else ():
        if type(request) is dict and type(named := request.get("model")) is str:
            yield "requests.model", named


def _models_in(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every model that a body names, with its field. Not recursive, since a client controls
    the depth of its body. Raises InvalidRequest for a body with too many values."""
    left: list[tuple[str, Any]] = [("", body)]
    for _ in range(_MOST_VALUES):
        if not left:
            return
        path, value = left.pop()
        if type(value) is list:
            left += [(path, one) for one in value]
        elif isinstance(value, Mapping) and not _is_of_client(path, value):
            if _TOOLS.fullmatch(path) is not None and value.get("model") is None:
                default = _DEFAULT_MODELS.get(str(value.get("type")))
                if default is not None:
                    yield f"{path}.model", default
            for name, inner in value.items():
                folded = name.casefold()
                if folded in _CONTENT:
                    continue
                field = f"{path}.{name}" if path else name
                if _names_models(folded):
                    for one in inner if type(inner) is list else (inner,):
                        if type(one) is str:
                            yield field, one
                        else:
                            left.append((field, one))
                elif type(inner) in (dict, list):
                    left.append((field, inner))
    raise InvalidRequest("body", "the body holds too many values beside its content")


# Fields of models that a provider asks if the first one fails.
FURTHER_FIELDS = frozenset(("models", "fallbacks", "fallback_models"))


def further_models(body: Mapping[str, Any]) -> set[str]:
    """Return the models that may answer a body instead of its own."""
    lists = map(body.get, FURTHER_FIELDS)
    listed = (one for found in lists if type(found) is list for one in found)
    names = (one.get("model") if type(one) is dict else one for one in listed)
    return {one for one in names if type(one) is str and one != body.get("model")}


def _is_compacted(body: Mapping[str, Any]) -> bool:
    """Return whether the provider may summarize the context first, in a call of its own: Anthropic
    by `edits`, OpenAI by a list."""
    asked = body.get("context_management")
    edits = asked.get("edits") if type(asked) is dict else asked
    types = (one.get("type") for one in edits if type(one) is dict) if type(edits) is list else ()
    return any(type(one) is str and one.startswith("compact") for one in types)


def why_unbounded(body: Mapping[str, Any], facts: RequestFacts, model: str) -> str:
    """Return why no bound on the tokens of a call bounds its cost; empty if one does."""
    if not facts.calls:
        return "its requests are in a file"
    if further_models(body):
        return "another model that it names may answer"
    if _is_compacted(body):
        return "a compaction by the provider is billed beside it"
    searches = facts.pieces.learning is Learning.HOSTED or "search" in model
    return "tools that the provider runs read more for it" if searches else ""


def _is_of_client(path: str, value: Mapping[str, Any]) -> bool:
    """Whether an object is a tool that the client runs. Outside of `tools` the same `type` has
    another meaning."""
    return value.get("type") in _OF_CLIENTS and _TOOLS.fullmatch(path) is not None


# Fields whose URL a server fetches, and objects within which such a field is an ordinary word.
_FETCHED = frozenset(
    (
        *("url", "image_url", "video_url", "audio_url", "file_url", "document_url", "server_url"),
        *("uri", "fileUri", "file_uri", "file", "file_data", "data", "mask", "input_audio"),
        *("image", "images", "video", "videos", "audio", "audios"),
        *("gcsUri", "gcs_uri", "storageUri", "storage_uri"),  # Vertex AI's, also to write to
    )
)
_NOT_FETCHED = frozenset(
    (
        *("metadata", "args", "arguments", "parameters", "input", "response", "schema"),
        *("input_schema", "inputSchema", "json_schema", "properties"),
    )
)
_MAYBE_LINK = re.compile(r"\s*(?!data:)[A-Za-z][A-Za-z0-9+.-]*:")
_OF_VIDEO = "parameters"  # of a whole request: of a picture or a video, and of no function
# An object that the account's own role can read, by its bucket.
_BUCKET = re.compile(r"((?:gs|s3)://[a-z0-9][a-z0-9._-]*)/\S*")
# Strict, since parsers disagree on backslashes, spaces and a user before the host.
_LINK = re.compile(r"https?://([a-z0-9.-]+)(?::\d{1,5})?(?:[/?#][^\s\\]*)?", re.IGNORECASE)


def among_fetching(body: Mapping[str, Any], targets: Sequence[Target]) -> list[Target]:
    """Return the targets whose `media_hosts` allow every URL that the server would fetch for a
    body. Raises InvalidRequest if there are none."""
    left = list(targets)
    for field, link in _links_in(body):
        found = _LINK.fullmatch(link) or _BUCKET.fullmatch(link)
        host = "" if found is None else found[1].lower()
        allowed = [one for one in left if _may_fetch(one.upstream, link, host)]
        if not allowed:
            hosts = sorted({named for one in left for named in one.upstream.media_hosts})
            hosts = ["* (public ones)" if named == ANY else named for named in hosts]
            message = f"{left[0].upstream.name} may not fetch {field} from {host or 'such a URL'}"
            named = f"a data: URL, or a host in media_hosts: {', '.join(hosts) or 'none'}"
            raise InvalidRequest(field, message, allowed=named)
        left = allowed
    return left


def _may_fetch(upstream: Upstream, link: str, host: str) -> bool:
    """Return whether an upstream may fetch a URL. host: or a bucket, which only a pattern with its
    scheme names. A server of one's own is inside a network: even `*` names no private address
    there."""
    scheme = host.partition("://")[0] if "://" in host else ""
    named = (one.lower() for one in upstream.media_hosts if one != ANY)
    if any(
        host and fnmatchcase(host, one) and one.startswith(f"{scheme}://" if scheme else "")
        for one in named
    ):
        return True
    return ANY in upstream.media_hosts and (not upstream.is_own or _is_public(link))


def _is_public(link: str) -> bool:
    """Return whether a URL names a public host, by the rules for URLs that are fetched here."""
    try:
        check_uri(link)
    except FetchRefused:
        return False
    return True


def _links_in(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every URL that a server fetches for a body, with its field. Raises InvalidRequest for a
    body with too many values."""
    left: list[Any] = [body]
    for _ in range(MOST_WALKED):
        if not left:
            return
        value = left.pop()
        if type(value) is list:
            left += [one for one in value if type(one) in (dict, list)]
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                if name in _FETCHED:
                    for one in inner if type(inner) is list else (inner,):
                        if type(one) is str and _MAYBE_LINK.match(one):
                            yield name, one
                is_word = name in _NOT_FETCHED and not (value is body and name == _OF_VIDEO)
                is_object = type(inner) is dict and not is_word
                if is_object or type(inner) is list:
                    left.append(inner)
    raise InvalidRequest("body", "the body holds too many values to find its URLs")


class ReadBody(NamedTuple):
    """A counted call's body: its fields, facts for admission, references to resources, and the
    resource that the provider is to keep."""

    body: dict[str, Any]
    asked: RequestFacts
    references: Sequence[Reference]
    making: Making | None


def read_body(caller: Caller, endpoint: Endpoint, content: bytes) -> ReadBody:
    """Parse and check a body; 20 MB of text take a tenth of a second, and are shortened in the
    result. Raises InvalidRequest, PayloadTooLarge and Forbidden."""
    raw, body, whole = skimmed(content)
    spec = DIALECTS[endpoint.dialect]
    facts = spec.request_facts(endpoint, body, whole)
    if raw is not content:  # what follows looks at names, and takes digests of texts
        shorten(body)
    facts.cache_write = cache_write_of(raw, body)
    check_named_once(raw, body)
    references, making = spec.references(body, raw), spec.made_by(endpoint.path, body)
    if caller.models is not None or endpoint.model is not None:
        check_model(caller, facts.model)
        check_body(caller, endpoint, body)
        check_names(caller, raw)
    return ReadBody(body, facts, references, making)


def unchecked_facts(endpoint: Endpoint, content: bytes) -> tuple[dict[str, Any], RequestFacts]:
    """Return the fields and facts of a body that was checked before. Raises what `read_body`
    raises."""
    raw, body, whole = skimmed(content)
    facts = DIALECTS[endpoint.dialect].request_facts(endpoint, body, whole)
    facts.cache_write = cache_write_of(raw, body)
    return body, facts


def model_of_other(call: NativeCall, raw: bytes) -> str:
    """Return the model in the body of a `passthrough` path; empty for none. Raises Forbidden for a
    model that the caller may not use, or for none if it may use only some, and InvalidRequest if
    servers could read a different one."""
    body: dict[str, Any] = {}
    caller, model = call.terms.caller, ""
    with suppress(InvalidRequest):  # the body may be anything but JSON
        body = skimmed(raw).body if raw else {}
    if body:
        check_spelling(body)
        check_named_once(raw, body)
    if type(named := body.get("model")) is str and 1 <= len(named) <= 200 and named.isprintable():
        model = named
    if caller.models is not None:
        check_model(caller, model)
        check_body(caller, call.endpoint, body)
        check_names(caller, raw)
    return model


def facts_of_form(form: MediaForm, endpoint: Endpoint, caller: Caller) -> RequestFacts:
    """Return the facts of a form after its models are checked. Raises InvalidRequest and
    Forbidden."""
    spec = DIALECTS[endpoint.dialect]
    facts = spec.request_facts(endpoint, form.fields)
    if caller.models is not None:
        check_model(caller, facts.model)
        check_body(caller, endpoint, form.fields)
    return with_files(facts, form, endpoint, spec.rules_of(facts.model))


_KEPT_S = 60.0
_LONGEST_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class _Listed:
    at: float
    access: Access
    models: list[dict[str, Any]]


class Models:
    """Lists of models, one object per process; each upstream's list is cached for a minute."""

    def __init__(self, wire: RelayWire) -> None:
        self._wire = wire
        self._lists: dict[tuple[str, Dialect], _Listed] = {}

    async def answer(
        self, targets: Targets, endpoint: Endpoint, caller: Caller, headers: Headers
    ) -> bytes | None:
        """Return the body of a list that combines several upstreams, or of a model that the gateway
        defines; None for what one upstream answers. Raises Forbidden, NotFound, UpstreamMissing,
        and CallFailed if no upstream returned a list."""
        dialect = endpoint.dialect
        routes = targets.named_by_routes(dialect)
        if endpoint.model is not None:
            check_model(caller, endpoint.model)
            return await self._defined(targets, dialect, endpoint.model, headers, routes)
        upstreams = targets.in_service(dialect)
        is_list = endpoint.path.endswith("/models") and bool(upstreams)
        if not is_list or _is_plain(caller, upstreams, routes):
            return None
        return await self._listed(dialect, caller, headers, upstreams, routes)

    async def _defined(
        self,
        targets: Targets,
        dialect: Dialect,
        name: str,
        headers: Headers,
        routes: Mapping[str, Target],
    ) -> bytes | None:
        """Return the model of a route, an alias or a deployment, as lists have it; None for one of
        an upstream. A list that cannot be read leaves out what only the upstream knows."""
        shape, places = DIALECTS[dialect].models, list(targets.upstreams)
        found = targets.of(dialect, name)
        first = routes.get(name) or min(found, key=lambda one: places.index(one.upstream.name))
        upstream = first.upstream
        is_deployment = upstream.provider in LIST_BASE_MODELS and name in upstream.named
        if name not in routes and first.model == name and not is_deployment:
            return None
        known: dict[str, Any] = {}
        with suppress(CallFailed):
            for one in await self._of(dialect, headers, upstream):
                if one[shape.id_key] == f"{shape.prefix}{first.model}":
                    known = one
        return orjson.dumps(shape.entry(name, upstream.name, known))

    async def _listed(
        self,
        dialect: Dialect,
        caller: Caller,
        headers: Headers,
        upstreams: list[Upstream],
        routes: Mapping[str, Target],
    ) -> bytes:
        """`routes`: the names that only routes define, with their first targets."""
        shape = DIALECTS[dialect].models
        found = await asyncio.gather(
            *(self._of(dialect, headers, one) for one in upstreams), return_exceptions=True
        )
        models: dict[str, dict[str, Any]] = {}
        failure: BaseException | None = None
        for upstream, result in zip(upstreams, found, strict=True):
            if isinstance(result, BaseException):
                failure = result
                continue
            for model in _visible(shape, upstream, result):
                models.setdefault(str(model[shape.id_key]), model)
        if failure is not None and len(models) == 0:
            raise failure
        for name, target in routes.items():
            known = models.get(f"{shape.prefix}{target.model}", {})
            models[f"{shape.prefix}{name}"] = shape.entry(name, target.upstream.name, known)
        allowed = [one for name, one in models.items() if caller.may_ask(name)]
        return orjson.dumps(shape.whole(allowed))

    async def _of(
        self, dialect: Dialect, headers: Headers, upstream: Upstream
    ) -> list[dict[str, Any]]:
        known = self._lists.get((upstream.name, dialect))
        access = upstream.access(dialect)
        is_old = known is None or time.monotonic() - known.at > _KEPT_S
        if known is None or is_old or known.access is not access:
            models = await self._read(dialect, headers, upstream)
            known = _Listed(time.monotonic(), access, models)
            self._lists[upstream.name, dialect] = known
        return known.models

    async def _read(
        self, dialect: Dialect, headers: Headers, upstream: Upstream
    ) -> list[dict[str, Any]]:
        target, shape = Target(upstream, ""), DIALECTS[dialect].models
        access = upstream.access(dialect)
        versions = [pair for pair in headers if pair[0] == b"anthropic-version"]
        own = [*versions, *to_send([])]
        try:
            exchange = await self._wire.open(
                "GET", self._wire.place(access.url(shape.path, shape.query), access), own, None
            )
            try:
                if exchange.status in NO_LIST and (upstream.named or upstream.aliases):
                    return []
                if exchange.status >= 300:
                    failed = await refusal_of(exchange, target, dialect)
                    raise failed.named(0.0)
                models = shape.read(orjson.loads(await exchange.read(_LONGEST_BYTES)))
            finally:
                exchange.close()
        except UpstreamError as error:
            raise CallFailed(error, target) from None
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise CallFailed(
                UpstreamGarbled("the provider's list of models is not valid"), target
            ) from None
        return models


def _is_plain(caller: Caller, upstreams: list[Upstream], routes: Mapping[str, Target]) -> bool:
    """Whether the list of the only upstream can be relayed unchanged to clients of the dialect."""
    only = upstreams[0]
    if len(upstreams) > 1 or routes or only.provider in LISTED_OTHERWISE:
        return False
    return caller.models is None and only.models == ("*",) and not only.aliases


def _visible(
    shape: ModelList, upstream: Upstream, models: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the models that may be requested by their own name, the aliases, and those that the
    upstream's table names but its list lacks: Azure lists base models, while calls name
    deployments."""
    by_name = {one[shape.id_key].removeprefix(shape.prefix): one for one in models}
    found = {name: one for name, one in by_name.items() if upstream.fit(name)}
    found |= {alias: by_name.get(name, {}) for alias, name in upstream.aliases.items()}
    found |= {name: {} for name in upstream.named if name not in by_name}
    return [shape.entry(name, upstream.name, known) for name, known in found.items()]
