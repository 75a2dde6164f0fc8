"""Google's dialect: generateContent and its siblings, and interactions. Pure.

Google's refusals have this wording in the other dialects that it offers, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set, Sized
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import unquote

import orjson

from tidegate.admission.estimator import USUAL_RULES, Rules
from tidegate.call import Usage, UsageDetails
from tidegate.dialects import gemini_work, interactions
from tidegate.dialects.answers import (
    HEAD_BYTES,
    LONGEST_READ_BYTES,
    MOST_TOKENS,
    AnswerForm,
    as_text,
    count_of,
    last_events,
    last_match,
    object_facts,
    object_of,
    objects_in,
    outermost,
    part_of,
    scanned_facts,
    short_text,
    tier_of,
    value_pattern,
    whole_object,
    with_searches,
    with_tier,
)
from tidegate.dialects.parsing import NOTHING_SHORTENED
from tidegate.dialects.requests import request_facts as facts_of_request
from tidegate.dialects.resources import (
    RESOURCE_ID,
    Act,
    Making,
    Reference,
    ResourcePath,
    ResourceUse,
    gemini_page,
    may_name,
    named_values,
    path_of,
    use_in,
)
from tidegate.dialects.sandboxes import MADE_BY_GOOGLE, googles_environment
from tidegate.dialects.spec import (
    AnswerFacts,
    Dialect,
    DialectSpec,
    Endpoint,
    ErrorAnswer,
    JsonObject,
    ModelList,
    OngoingWork,
    Operation,
    OutputEvents,
    RefusalFacts,
    RequestFacts,
    models_endpoint,
)
from tidegate.errors import NotFound, StatedBound, TidegateError

# A method that is not listed here is a future one: it counts as a call of a model.
_OPERATIONS = {
    "countTokens": Operation.COUNT,
    "computeTokens": Operation.COUNT,
    "embedContent": Operation.EMBED,
    "batchEmbedContents": Operation.EMBED,
    "predictLongRunning": Operation.VIDEO,
    "batchGenerateContent": Operation.BATCH,
    "asyncBatchEmbedContent": Operation.BATCH,
}
# Vertex's method to read any operation, of any owner; the one that gives away a tuned model of the
# account; and all other methods that start work which continues after the call, and can be neither
# admitted nor charged.
_NOT_RELAYED = re.compile(
    r"^(?:(?:fetchPredictOperation|transferOwnership)$|asyncBatch)|LongRunning$"
)
_CALL = re.compile(
    r"(?P<folder>/v1(?:alpha|beta)?/(?:models|tunedModels)/)(?P<model>[\w\-@][\w.\-@]{0,199}):(?P<do>\w+)",
    re.ASCII,
)
_MODELS = re.compile(r"/v1(?:alpha|beta)?/models(?:/[\w\-][\w.\-]*)?", re.ASCII)
_STORING = re.compile(r"/v1(?:alpha|beta)?/(?:interactions|cachedContents)", re.ASCII)
_FILE = Making("file", "name", "file", "files/")  # in the answer to an upload's last request
_VERSION_ROOT = "/v1(?:alpha|beta)?"
_ANY_MODEL = r"models/[\w\-@][\w.\-@]{0,199}"
_DOWNLOAD = rf"(?:/download)?{_VERSION_ROOT}/files/{{id}}:download"
_MADE_FILES = gemini_work.MADE_FILES
_STORE = "file_search_store"
_OF_STORE = "fileSearchStores/{id}"  # everything below a store belongs to the store's owner
_RESOURCES = tuple(
    path_of(method, f"{_VERSION_ROOT}/{below}" if below else _DOWNLOAD, kind, act, makes)
    for method, below, kind, act, makes in (
        ("GET", "", "file", Act.READ, None),
        ("GET", "files", "file", Act.LIST, None),
        ("GET", "files/{id}", "file", Act.READ, None),
        ("DELETE", "files/{id}", "file", Act.DELETE, None),
        ("GET", "cachedContents", "cached_content", Act.LIST, None),
        ("GET", "cachedContents/{id}", "cached_content", Act.READ, None),
        ("PATCH", "cachedContents/{id}", "cached_content", Act.CHANGE, None),
        ("DELETE", "cachedContents/{id}", "cached_content", Act.DELETE, None),
        ("GET", "interactions/{id}", "interaction", Act.READ, None),
        ("DELETE", "interactions/{id}", "interaction", Act.DELETE, None),
        ("POST", "interactions/{id}/cancel", "interaction", Act.CANCEL, None),
        ("GET", f"{_ANY_MODEL}/operations", "operation", Act.LIST, None),
        ("GET", _ANY_MODEL + "/operations/{id}", "operation", Act.READ, _MADE_FILES),
        ("DELETE", _ANY_MODEL + "/operations/{id}", "operation", Act.DELETE, None),
        ("POST", _ANY_MODEL + "/operations/{id}:cancel", "operation", Act.CANCEL, None),
        ("POST", _ANY_MODEL + "/operations/{id}:wait", "operation", Act.READ, _MADE_FILES),
        ("GET", "batches", "batch", Act.LIST, None),
        ("GET", "batches/{id}", "batch", Act.READ, _MADE_FILES),
        ("DELETE", "batches/{id}", "batch", Act.DELETE, None),
        ("POST", "batches/{id}:cancel", "batch", Act.CANCEL, None),
        ("POST", "batches/{id}:wait", "batch", Act.READ, _MADE_FILES),
        (
            *("POST", "fileSearchStores", _STORE, Act.CREATE),
            Making(_STORE, "name", prefix="fileSearchStores/"),
        ),
        ("GET", "fileSearchStores", _STORE, Act.LIST, None),
        ("GET", _OF_STORE, _STORE, Act.READ, None),
        ("DELETE", _OF_STORE, _STORE, Act.DELETE, None),
        ("POST", _OF_STORE + ":(?:importFile|uploadToFileSearchStore)", _STORE, Act.CHANGE, None),
        ("GET", _OF_STORE + "/documents", _STORE, Act.READ, None),
        ("GET", _OF_STORE + "/(?:documents|media)/{any}", _STORE, Act.READ, None),
        ("DELETE", _OF_STORE + "/documents/{any}", _STORE, Act.CHANGE, None),
        ("GET", _OF_STORE + "(?:/upload)?/operations/{any}", _STORE, Act.READ, None),
        (
            *("POST", _OF_STORE + "(?:/upload)?/operations/{any}:(?:cancel|wait)"),
            *(_STORE, Act.CHANGE, None),
        ),
    )
)
_UPLOAD = re.compile(
    r"/upload/v1(?:alpha|beta)?/"
    rf"(?:files|fileSearchStores/(?P<store>{RESOURCE_ID}):uploadToFileSearchStore)",
    re.ASCII,
)


def _recognizes(path: str, headers: Set[bytes], query: bytes) -> bool:
    return (
        not path.startswith(("/v1/", "/openai/"))
        or b"x-goog-api-key" in headers
        or b"key=" in query
    )


def endpoint_of(method: str, path: str) -> Endpoint | None:
    """Return the endpoint of a call, an upload, a file or a model."""
    if method == "POST" and (call := _CALL.fullmatch(path)) is not None:
        do = call["do"]
        if do not in _OPERATIONS and _NOT_RELAYED.search(do):
            return None
        draws = do == "predict" and call["model"].startswith("imagen")
        return Endpoint(
            Dialect.GEMINI,
            Operation.IMAGES if draws else _OPERATIONS.get(do, Operation.INFER),
            f"{call['folder']}{{model}}:{do}",
            model=call["model"],
            streams=do.startswith("stream"),
        )
    if method == "POST" and _STORING.fullmatch(path):
        makes_cache = path.endswith("/cachedContents")
        return Endpoint(Dialect.GEMINI, Operation.CACHE if makes_cache else Operation.INFER, path)
    if method in ("POST", "PUT") and (into := _UPLOAD.fullmatch(path)) is not None:
        row = ResourcePath(method, _UPLOAD, "file", Act.CREATE, _FILE)
        if into["store"] is not None:
            row = ResourcePath(method, _UPLOAD, _STORE, Act.CHANGE)
        upload = ResourceUse(row, into["store"])
        return Endpoint(Dialect.GEMINI, Operation.UPLOAD, path, resource=upload)
    if method == "GET" and _MODELS.fullmatch(path):
        return models_endpoint(Dialect.GEMINI, path)
    use = use_in(_RESOURCES, method, path)
    if use is None:
        return None
    operation = Operation.FILES if use.kind == "file" else Operation.RESOURCE
    return Endpoint(Dialect.GEMINI, operation, path, resource=use)


_REFERRING = (
    *(b"fileUri", b"file_uri", b'"uri"', b"cachedContent", b"cached_content"),
    *(b"inputConfig", b"input_config", b"fileSearchStoreNames", b"file_search_store_names"),
)
_INPUTS = frozenset(("fileName", "file_name"))  # of a batch
# Google accepts both spellings of a field.
_PREVIOUS = ("previous_interaction_id", "previousInteractionId")
_URIS = frozenset(("fileUri", "file_uri", "uri"))
_CACHES = frozenset(("cachedContent", "cached_content"))
_STORES = frozenset(("fileSearchStoreNames", "file_search_store_names"))
_REFERENCES = _URIS | _CACHES | _STORES | frozenset(_PREVIOUS)
# Arguments of calls of a client's function, and its results.
_OF_FUNCTIONS = frozenset(("args", "arguments"))
_OWN_FILE = re.compile(
    rf"(?:https?://[^/?#\s]+/v1(?:alpha|beta|main)?/|/?(?:v1(?:alpha|beta|main)?/)?)"
    rf"files/({RESOURCE_ID})",
    re.ASCII,
)
_CACHE = re.compile(rf"cachedContents/({RESOURCE_ID})", re.ASCII)
_STORE_NAME = re.compile(rf"fileSearchStores/({RESOURCE_ID})", re.ASCII)


def references(body: Mapping[str, Any], raw: bytes) -> list[Reference]:
    """Return the files, file stores, cached content, interaction and environment that a request
    names, with the field of each. Raises InvalidRequest and NotFound."""
    found = googles_environment(body, raw) if "environment" in body else []
    imports = not body and may_name(raw, b'"fileName"', b'"file_name"')
    if not imports and not may_name(raw, *_REFERRING, *map(str.encode, _PREVIOUS)):
        return found
    names = _REFERENCES | _INPUTS if imports or "batch" in body else _REFERENCES
    for one in named_values(raw, names, _OF_FUNCTIONS):
        if one.field in _INPUTS:
            if (own := _OWN_FILE.fullmatch(one.value)) is None:
                raise NotFound(f"there is no file {one.value[:200]!a}", field=one.field)
            found.append(Reference("file", own[1], one.field))
        elif one.field in _URIS:
            if (file_id := _file_named(one.field, one.value)) is not None:
                found.append(Reference("file", file_id, one.field))
        elif one.field in _CACHES or one.field in _STORES:
            is_cache = one.field in _CACHES
            named = (_CACHE if is_cache else _STORE_NAME).fullmatch(one.value)
            if named is None:
                raise NotFound(f"there is no {one.value[:100]!a}", field=one.field)
            kind = "cached_content" if is_cache else _STORE
            found.append(Reference(kind, named[1], one.field))
        else:
            found.append(Reference("interaction", one.value, _PREVIOUS[0]))
    return list(dict.fromkeys(found))


def _file_named(field: str, uri: str) -> str | None:
    """Return the id of the account's file that a URI names; None for a file stored elsewhere.
    Raises NotFound for a spelling that only Google might read as one of its files."""
    if (own := _OWN_FILE.fullmatch(uri)) is not None:
        return own[1]
    plain = unquote(uri).lower()
    is_relative = "://" not in plain and not plain.startswith("data:")
    if "generativelanguage" in plain or (is_relative and "files/" in plain):
        raise NotFound(f"there is no file {uri[:200]!a}", field=field)
    return None


_INTERACTION = Making("interaction", within="interaction")
_CACHED_CONTENT = Making("cached_content", "name", prefix="cachedContents/")


def made_by(path: str, body: Mapping[str, Any]) -> Making | None:
    """Return what a call creates: an interaction is stored unless the request declines."""
    if path.endswith("/interactions"):
        is_stored = body.get("store") is not False or body.get("background") is True
        return _INTERACTION if is_stored else None
    if path.endswith(":predictLongRunning"):
        return gemini_work.OPERATION
    if path.endswith((":batchGenerateContent", ":asyncBatchEmbedContent")):
        return gemini_work.BATCH
    return _CACHED_CONTENT if path.endswith("/cachedContents") else None


_OWN_TOOLS = frozenset(("functionDeclarations", "function_declarations"))


def _is_hosted(tool: JsonObject) -> bool:
    return not tool.keys() <= _OWN_TOOLS


def request_facts(
    endpoint: Endpoint, body: Mapping[str, Any], whole: Mapping[str, Sized] = NOTHING_SHORTENED
) -> RequestFacts:
    """Return the facts of a request. Raises InvalidRequest."""
    if endpoint.path.endswith("/interactions"):
        return interactions.request_facts(endpoint, body, whole, rules_of)
    if endpoint.operation is Operation.VIDEO and endpoint.model is not None:
        return gemini_work.video_request(endpoint.model, body)
    if endpoint.operation is Operation.IMAGES:
        return _drawing_facts(endpoint, body, whole)
    model = body.get("model")
    if endpoint.operation is Operation.CACHE and isinstance(model, str):
        body = {**body, "model": model.removeprefix("models/")}
    settings = body.get("generationConfig", body.get("generation_config"))
    facts = facts_of_request(
        endpoint,
        body,
        whole,
        rules_of=rules_of,
        is_hosted=_is_hosted,
        settings=settings if isinstance(settings, Mapping) else {},
    )
    if endpoint.operation is Operation.BATCH:
        embeds = endpoint.path.endswith(":asyncBatchEmbedContent")
        return gemini_work.batch_request(facts, body, embeds=embeds)
    return facts


_USUAL_DRAWN = 4  # of Imagen, if a request states no number


def _drawing_facts(
    endpoint: Endpoint, body: Mapping[str, Any], whole: Mapping[str, Sized]
) -> RequestFacts:
    """Return the facts of a request for pictures of Imagen. Raises InvalidRequest."""
    settings = body.get("parameters")
    settings = settings if isinstance(settings, Mapping) else {}
    named = settings.get("sampleCount", settings.get("sample_count", _USUAL_DRAWN))
    return facts_of_request(endpoint, {**body, "n": named}, whole, rules_of=rules_of, settings={})


_GEMINI_3_RULES = replace(USUAL_RULES, picture=lambda _: 1120.0, page=560)
_VERSION = re.compile(r"gemini-(\d+)")


@lru_cache(maxsize=512)
def rules_of(model: str) -> Rules:
    """Return the token counts of a model's files; ai.google.dev/gemini-api/docs, pages "tokens" and
    "media-resolution"."""
    version = _VERSION.search(model)
    return _GEMINI_3_RULES if version and int(version[1]) >= 3 else USUAL_RULES


# The index of audio, image and video, by name, and by number where Google writes enumerations as
# numbers.
_MODALITIES = ("audio", "image", "video")
_PLACES = {"AUDIO": 0, 4: 0, "IMAGE": 1, 2: 1, "VIDEO": 2, 3: 2}

_MOST_MODALITIES = 64
_MOST_QUERIES = 10_000


# cloud.google.com/vertex-ai/generative-ai/docs, "TrafficType"; ON_DEMAND is the usual one.
_TRAFFIC = {
    "ON_DEMAND_FLEX": "flex",
    "ON_DEMAND_PRIORITY": "priority",
    "PROVISIONED_THROUGHPUT": "provisioned",
}


def usage_of(raw: Mapping[str, Any]) -> Usage:
    """Return the usage that an answer reports; counts of 0 are missing in it."""
    input_tokens, total = count_of(raw, "promptTokenCount"), count_of(raw, "totalTokenCount")
    tools = count_of(raw, "toolUsePromptTokenCount")
    output_tokens, thoughts = (
        count_of(raw, "candidatesTokenCount"),
        count_of(raw, "thoughtsTokenCount"),
    )
    if output_tokens is None and total is not None and input_tokens is not None:
        # A count of 0 is missing.
        output_tokens = max(0, total - input_tokens - (thoughts or 0) - (tools or 0))
    usage = Usage(
        input_tokens=input_tokens
        if input_tokens is None or tools is None
        else input_tokens + tools,
        output_tokens=output_tokens,
        thoughts_tokens=thoughts,
        cached_tokens=count_of(raw, "cachedContentTokenCount"),
        total_tokens=total,
        details=_usage_details(raw),
    )
    return with_tier(usage, _tier_of(raw))


def _tier_of(raw: Mapping[str, Any]) -> str | None:
    """Return the processing tier. The Gemini API reports a tier, Vertex the type of traffic."""
    if "serviceTier" in raw:
        return tier_of({"service_tier": raw["serviceTier"]})
    traffic = raw.get("trafficType")
    return _TRAFFIC.get(traffic) if type(traffic) is str else None


def _usage_details(raw: Mapping[str, Any]) -> UsageDetails | None:
    prompt, candidates = raw.get("promptTokensDetails"), raw.get("candidatesTokensDetails")
    prompt = raw.get("promptTokenDetails") if prompt is None else prompt  # of an embedding
    by_tools = raw.get("toolUsePromptTokensDetails")
    if not (prompt or candidates or by_tools):
        return None
    if _is_text(prompt) and not by_tools and (not candidates or _is_text(candidates)):
        return None  # the usual case
    inputs = _by_modality([*_pairs(prompt), *_pairs(by_tools)])
    # Tokens read from a cache have one price: they are not counted by modality.
    cached = _by_modality(_pairs(raw.get("cacheTokensDetails")))
    fresh = [max(0, one - old) for one, old in zip(inputs, cached, strict=True)]
    parts = [tokens or None for tokens in (*fresh, *_by_modality(_pairs(candidates)))]
    if not any(parts):
        return None
    names = (f"{side}_{name}_tokens" for side in ("input", "output") for name in _MODALITIES)
    counts: dict[str, Any] = dict(zip(names, parts, strict=True))
    return UsageDetails(**counts)


def _is_text(rows: Any) -> bool:
    """Return whether a list of tokens by modality has only text."""
    if type(rows) is not list or len(rows) != 1:
        return False
    only = rows[0]
    return type(only) is dict and only.get("modality") == "TEXT"


def _pairs(rows: Any) -> list[tuple[Any, Any]]:
    counted = objects_in(rows)[:_MOST_MODALITIES]
    return [(one.get("modality"), one.get("tokenCount")) for one in counted]


def _by_modality(pairs: list[tuple[Any, Any]]) -> list[int]:
    sums = [0, 0, 0]
    for modality, tokens in pairs:
        place = _PLACES.get(modality) if type(modality) in (str, int) else None
        if place is not None and type(tokens) is int and 0 < tokens <= MOST_TOKENS:
            sums[place] += tokens
    return sums


def _event_usage(event: JsonObject) -> JsonObject:
    return part_of(event, "usageMetadata")


_FORM = AnswerForm(
    usage="usageMetadata",
    identity="responseId",
    version="modelVersion",
    finish="finishReason",
    choices="candidates",
    usage_of=usage_of,
    event_usage=_event_usage,
)
_TIERS = (b'"serviceTier"', b'"trafficType"')


def tier_at_end(tail: bytes) -> str | None:
    """Return the processing tier in an answer's usage, from its last bytes: whole events, or the
    end of a longer event or of an object."""
    if not any(name in tail for name in _TIERS):
        return None
    usage = next(filter(None, map(_event_usage, last_events(tail))), None)
    return _tier_of(usage or _event_usage(outermost("usageMetadata", b"{", tail)))


_SEARCHED = b'"webSearchQueries"'
_EMBEDDED = re.compile(rb'\s*\{\s*"embeddings?"\s*:')
_BLOCKED = value_pattern("blockReason")
_NUMBERED = re.compile(rb'"finishReason"\s*:\s*(\d{1,9})\b')


def answer_facts(
    answer: bytes,
    *,
    omitted: bool = False,
    cut: bool = False,
    parsed: JsonObject | None = None,
) -> AnswerFacts:
    """Return the facts of an answer, whole, as a list, or as a stream."""
    whole = whole_object(answer, parsed)
    if interactions.is_interaction(answer, whole):
        return interactions.answer_facts(answer, whole, omitted=omitted, cut=cut)
    if whole is not None:
        facts = object_facts(_FORM, whole)
        if str(whole.get("name", "")).startswith("cachedContents/"):
            # All of its tokens are input, which later calls read again.
            total = count_of(part_of(whole, "usageMetadata"), "totalTokenCount")
            facts.usage = Usage(input_tokens=total, output_tokens=0, total_tokens=total)
        if facts.finish_reason is None:
            facts.finish_reason = short_text(part_of(whole, "promptFeedback").get("blockReason"))
    else:
        facts = scanned_facts(_FORM, answer, omitted=omitted, cut=cut)
        if facts.finish_reason is None:
            facts.finish_reason = last_match(_NUMBERED, answer) or last_match(_BLOCKED, answer)
    usage = facts.usage
    if usage.output_tokens is None and usage.input_tokens is not None and _EMBEDDED.match(answer):
        facts.usage = replace(usage, output_tokens=0)  # it reports its input, but no total
    if answer.find(_SEARCHED) >= 0:
        queries = _queries_in(answer) if whole is None else _queries_of(whole)
        facts.usage = with_searches(facts.usage, len(queries))
    return facts


def _queries_in(answer: bytes) -> set[str]:
    """Return the web searches in an answer; a later piece may repeat those of an earlier one."""
    if answer[:HEAD_BYTES].lstrip()[:1] in (b"[", b"{"):
        texts = [answer]
    else:
        lines = (line for line in answer.split(b"\n") if _SEARCHED in line)
        texts = [line[5:] for line in lines if line.startswith(b"data:")]
    queries: set[str] = set()
    read_bytes = 0
    for text in texts:
        if (read_bytes := read_bytes + len(text)) > LONGEST_READ_BYTES:
            break
        with suppress(orjson.JSONDecodeError):  # cut off
            value = orjson.loads(text)
            for chunk in value if type(value) is list else (value,):
                queries |= _queries_of(object_of(chunk))
    return queries


def _queries_of(chunk: JsonObject) -> set[str]:
    queries: set[str] = set()
    for candidate in objects_in(chunk.get("candidates")):
        named = part_of(candidate, "groundingMetadata").get("webSearchQueries")
        if type(named) is list:
            queries.update(one for one in named[:_MOST_QUERIES] if type(one) is str and one)
    return queries


_INLINE = re.compile(rb'"inlineData"\s*:\s*\{|"bytesBase64Encoded"\s*:\s*"')


def image_count(answer: bytes) -> int:
    """Return how many images a whole answer holds."""
    if interactions.is_interaction(answer):
        return interactions.image_count(answer)
    return len(_INLINE.findall(answer))


def add_output(event: JsonObject, output: OutputEvents) -> None:
    if "event_type" in event:
        interactions.add_output(event, output)
        return
    for candidate in objects_in(event.get("candidates")):
        for part in objects_in(part_of(candidate, "content").get("parts")):
            for name, value in part.items():
                if name in ("inlineData", "inline_data"):
                    mime = str(object_of(value).get("mimeType", ""))
                    output.unnamed_images += not mime.startswith("audio/")
                elif name == "text" and type(value) is str:
                    output.texts.append(value)
                elif type(value) is dict:  # a function call, code, or the result of code
                    output.texts.append(as_text(value))


# Anchored at the start: a provider that repeats a client's text does so later.
_DEAD_KEY = re.compile(
    r"\W*(?:your )?api key (?:not valid|not found|expired|has been)", re.IGNORECASE
)
_NO_MONEY = re.compile(
    r"your (?:prepayment credits are depleted|"
    r"(?:project|billing account) has exceeded its (?:\w+ )?spending cap)",
    re.IGNORECASE,
)
# https://ai.google.dev/gemini-api/docs/troubleshooting, with the status FAILED_PRECONDITION
_NOT_SERVED_HERE = re.compile(r"user location is not supported", re.IGNORECASE)
# A 403 about a requested resource, such as a file that does not exist (Gemini's answer in that
# case) or a model that the account may not use: the key is valid, and serves other calls.
_ABOUT_A_THING = re.compile(r"\b(?:file|model|cached ?content)s?\b", re.IGNORECASE)


def refusal(answer: ErrorAnswer) -> RefusalFacts | None:
    """Classify a refusal; None if its wording is not of this dialect."""
    no_billing = any(detail.get("reason") == "BILLING_DISABLED" for detail in answer.details)
    if no_billing or _NO_MONEY.match(answer.message):
        return RefusalFacts("unpaid")
    if answer.status == 400 and _NOT_SERVED_HERE.match(answer.message):
        return RefusalFacts("of_place")
    if answer.status == 403 and _ABOUT_A_THING.search(answer.message):
        return RefusalFacts("of_thing")
    if answer.status == 400 and _dead_key(answer):
        return RefusalFacts("key")
    # https://ai.google.dev/gemini-api/docs/flex-inference: flex capacity is shed first
    if answer.status == 503 and answer.tier == "flex":
        return RefusalFacts("tier_busy")
    if answer.status != 429:
        return None
    quotas = _quota_ids(answer.details)
    if not quotas:
        return RefusalFacts("tier_busy") if answer.tier == "flex" else None
    of_day = [one for one in quotas if "perday" in one]
    return RefusalFacts(
        "throttled",
        unit=_unit_of(" ".join(of_day or quotas)),
        per_day=bool(of_day),
        day_quota=bool(of_day),
        of_account=not any("permodel" in one or "freetier" in one for one in quotas),
        stated=tuple(_stated_bounds(answer.details)),
    )


_MOST_STATED = 20
_WHOLE = re.compile("[0-9]{1,15}")


def _unit_of(quotas: str) -> Literal["requests", "tokens", "input_tokens"] | None:
    if "token" in quotas:
        return "input_tokens" if "inputtoken" in quotas else "tokens"
    return "requests" if "request" in quotas else None


def _quota_ids(details: list[JsonObject]) -> list[str]:
    """Return the ids of the exceeded quotas, such as
    generaterequestsperdayperprojectpermodel-freetier: in lower case, since their spelling
    varies."""
    return [str(one["quotaId"]).lower() for one in _violations(details)]


def _violations(details: list[JsonObject]) -> list[JsonObject]:
    return [
        violation
        for detail in details
        for violation in objects_in(detail.get("violations"))
        if "quotaId" in violation
    ]


def _stated_bounds(details: list[JsonObject]) -> Iterator[StatedBound]:
    """Yield the bounds of the model's own quotas, by minute and by day."""
    for violation in _violations(details)[:_MOST_STATED]:
        quota, value = str(violation["quotaId"]).lower(), str(violation.get("quotaValue", ""))
        unit, is_of_day = _unit_of(quota), "perday" in quota
        is_known = "permodel" in quota and (is_of_day or "perminute" in quota)
        if is_known and unit is not None and _WHOLE.fullmatch(value):
            yield StatedBound(unit, "day" if is_of_day else "minute", int(value))


def _dead_key(answer: ErrorAnswer) -> bool:
    if any(str(detail.get("reason")).startswith("API_KEY_") for detail in answer.details):
        return True
    return bool(_DEAD_KEY.match(answer.message))


# https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
_STATUS_NAMES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    409: "ABORTED",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_STATUSES = {
    "CANCELLED": 499,
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNKNOWN": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"
_BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"
_ERROR_INFO = "type.googleapis.com/google.rpc.ErrorInfo"


def problem(error: TidegateError, status: int, retry_after_ms: int | None) -> JsonObject:
    """Return the body of an answer with an error of ours."""
    domain = {"@type": _ERROR_INFO, "reason": error.code.upper(), "domain": "tidegate"}
    limit = getattr(error, "limit", None)
    metadata = {"limit": limit} if limit else {}
    if getattr(error, "is_estimate", False):
        metadata["is_estimate"] = "true"
    details: list[JsonObject] = [domain | ({"metadata": metadata} if metadata else {})]
    if retry_after_ms is not None:
        details.append({"@type": _RETRY_INFO, "retryDelay": f"{retry_after_ms / 1000:g}s"})
    field = getattr(error, "field", None)
    if field is not None:
        violation = {"field": field, "description": error.message_with_allowed}
        details.append({"@type": _BAD_REQUEST, "fieldViolations": [violation]})
    fallback = "INTERNAL" if status >= 500 else "INVALID_ARGUMENT"
    body = {
        "code": status,
        "message": error.message_with_allowed,
        "status": _STATUS_NAMES.get(status, fallback),
        "details": details,
    }
    return {"error": body}


GEMINI = DialectSpec(
    name=Dialect.GEMINI,
    endpoint_of=endpoint_of,
    recognizes=_recognizes,
    models=ModelList(
        "/v1beta/models",
        "models",
        "name",
        lambda models: {"models": models},
        prefix="models/",
        query="pageSize=1000",
    ),
    rules_of=rules_of,
    request_facts=request_facts,
    answer_facts=answer_facts,
    add_output=add_output,
    image_count=image_count,
    references=references,
    made_by_tools=MADE_BY_GOOGLE,
    made_by=made_by,
    page=gemini_page,
    works={
        "interaction": OngoingWork(
            Operation.INFER,
            "/v1beta/interactions",
            "/v1beta/interactions/{id}",
            "/v1beta/interactions/{id}/cancel",
            interactions.end_of,
        ),
        "operation": OngoingWork(
            Operation.VIDEO,
            "/v1beta/models/{model}:predictLongRunning",
            "/v1beta/models/{model}/operations/{id}",
            "",
            gemini_work.end_of,
            files=gemini_work.files_of,
            tally=gemini_work.VideoTally,
        ),
        "batch": OngoingWork(
            Operation.BATCH,
            "/v1beta/models/{model}:batchGenerateContent",
            "/v1beta/batches/{id}",
            "/v1beta/batches/{id}:cancel",
            gemini_work.end_of,
            results=gemini_work.results_path,
            files=gemini_work.files_of,
            tally=lambda shown, request: gemini_work.BatchTally(shown, request, usage_of),
            longest_ms=gemini_work.LONGEST_BATCH_MS,
        ),
    },
    statuses=_STATUSES,
    refusal=refusal,
    problem=problem,
    # Google's SDK fails on a comment, as on an answer that is not JSON, but ignores empty lines.
    keep_alive=b"\n\n",
    no_retry=(),
)
