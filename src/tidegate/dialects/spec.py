"""Dialect interface: what each provider's API defines, and the types of a request and its answer.

A dialect is a module that fills one `DialectSpec`; `tidegate.dialects` lists them. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from math import ceil
from typing import Any, Literal, Protocol

from tidegate.admission.charges import CacheWrite
from tidegate.admission.estimator import InputPieces, Rules, input_pieces
from tidegate.call import UNKNOWN_USAGE, Kind, Status, Usage, UsageDetails
from tidegate.dialects.resources import (
    MadeByTools,
    Making,
    PageQuery,
    Reference,
    ResourceUse,
    nothing_made,
    nothing_referred,
    openai_page,
)
from tidegate.errors import StatedBound, TidegateError

Headers = list[tuple[bytes, bytes]]
JsonObject = dict[str, Any]


class Dialect(StrEnum):
    """Names of the dialects, as in settings and in the record."""

    OPENAI = "openai"
    GEMINI = "gemini"
    ANTHROPIC = "anthropic"
    BEDROCK = "bedrock"

    # The enumeration's own hash is a Python function, and each request looks up several tables.
    __hash__ = str.__hash__


class Operation(StrEnum):
    """The operation of a call, as admission and accounting distinguish them.

    INFER requests text or images of a model, EMBED vectors, IMAGES only images, TRANSCRIBE the text
    of a recording, SPEAK a recording of a text, MODERATE a judgement of a text, RERANK an order of
    texts, CACHE the caching of an input, VIDEO videos, BATCH many calls of a model. COUNT, MODELS,
    FILES, RESOURCE and UPLOAD run no model: their kind has a limit only if there is one for
    `kind:other`, and they use no limit of a model and no tokens. OTHER, a path that an upstream's
    `passthrough` names, has that kind too, and may run a model. RESOURCE is every call about
    something stored at a provider.
    """

    INFER = "infer"
    EMBED = "embed"
    IMAGES = "images"
    TRANSCRIBE = "transcribe"
    SPEAK = "speak"
    MODERATE = "moderate"
    RERANK = "rerank"
    CACHE = "cache"
    VIDEO = "video"
    BATCH = "batch"
    COUNT = "count"
    MODELS = "models"
    FILES = "files"
    RESOURCE = "resource"
    UPLOAD = "upload"
    OTHER = "other"

    @property
    def is_counted(self) -> bool:
        """Return whether the operation runs a model."""
        return self in _COUNTED

    @property
    def may_run_model(self) -> bool:
        """Return whether the limits of its model apply."""
        return self in _COUNTED or self is Operation.OTHER

    @property
    def has_body(self) -> bool:
        """Return whether a body is part of the call. Google's SDK for JavaScript deletes a file
        with an empty object, which has no meaning."""
        return self not in (Operation.MODELS, Operation.FILES)


_COUNTED = frozenset(
    {
        *(Operation.INFER, Operation.EMBED, Operation.IMAGES, Operation.TRANSCRIBE),
        *(Operation.SPEAK, Operation.MODERATE, Operation.RERANK, Operation.CACHE),
        *(Operation.VIDEO, Operation.BATCH),
    }
)
# Operations whose work continues after the answer.
GOING_ON = frozenset({Operation.VIDEO, Operation.BATCH})
# Operations whose answer has no text of a model and no image.
WITHOUT_OUTPUT = frozenset(
    {
        *(Operation.EMBED, Operation.MODERATE, Operation.RERANK, Operation.CACHE),
        Operation.VIDEO,
    }
)
_NAMES = {
    Operation.INFER: "chat",
    Operation.EMBED: "embeddings",
    Operation.IMAGES: "generate_images",
    Operation.TRANSCRIBE: "transcription",
    Operation.SPEAK: "speech",
    Operation.MODERATE: "moderation",
    Operation.RERANK: "rerank",
    Operation.CACHE: "create_cache",
    Operation.VIDEO: "generate_videos",
    Operation.BATCH: "batch",
    Operation.COUNT: "count_tokens",
    Operation.MODELS: "models",
    Operation.FILES: "files",
    Operation.RESOURCE: "resource",
    Operation.UPLOAD: "upload",
    Operation.OTHER: "other",
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A native path.

    path: below the upstream's base URL, beginning with a slash, with `{model}` in the model's
    place. model: from the client's path; None if the body names it. If `path` has no place for the
    model, the body names it to the upstream. streams: the path alone requests a stream. takes_form:
    a body may be multipart/form-data. resource: the stored thing that it is about. upstreams: the
    only ones that have the path, by their `passthrough`.
    """

    dialect: Dialect
    operation: Operation
    path: str
    model: str | None = None
    streams: bool = False
    takes_form: bool = False
    resource: ResourceUse | None = None
    upstreams: tuple[str, ...] = ()
    # For telemetry, by the semantic conventions; without a model's name.
    name: str = field(init=False, compare=False)
    is_counted: bool = field(init=False, compare=False)  # that of the operation
    model_in_path: bool = field(init=False, compare=False)  # in the upstream's path too

    def __post_init__(self) -> None:
        infers_at_gemini = (self.dialect, self.operation) == (Dialect.GEMINI, Operation.INFER)
        name = "generate_content" if infers_at_gemini else _NAMES[self.operation]
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "is_counted", self.operation.is_counted)
        in_path = self.model is not None and "{model}" in self.path
        object.__setattr__(self, "model_in_path", in_path)

    @property
    def is_follow_up(self) -> bool:
        """Return whether the call is about an object that is stored at a provider already."""
        return self.resource is not None and self.resource.resource_id is not None

    def path_for(self, model: str) -> str:
        """Return the path of a call of `model`."""
        if self.model is None:
            return self.path
        return self.path.replace("{model}", model.replace("/", "%2F"))


# A name never begins with a dot: ".." would lead to another path. It may contain slashes, as at
# OpenRouter and vLLM.
_MODELS = re.compile(
    r"/v1/models(?:/[\w\-@][\w.\-:@]{0,199}(?:/[\w\-@][\w.\-:@]{0,199}){0,3})?", re.ASCII
)


def listed_models(dialect: Dialect, path: str, root: str = "") -> Endpoint | None:
    """Return the endpoint of a list of models, or of one model, in the dialects of OpenAI and
    Anthropic; None for any other path. `root`: the part of the path that is in the base URL."""
    if _MODELS.fullmatch(path) is None:
        return None
    return models_endpoint(dialect, path.removeprefix(root))


def models_endpoint(dialect: Dialect, path: str) -> Endpoint:
    """Return the endpoint of a list of models, or of one model."""
    folder, below, model = path.partition("/models/")
    if not below:
        return Endpoint(dialect, Operation.MODELS, path)
    return Endpoint(dialect, Operation.MODELS, f"{folder}/models/{{model}}", model=model)


@dataclass(slots=True)
class RequestFacts:
    """Facts of a native request, for admission.

    model: as the client names it; empty if it leaves the choice to the provider. kind: which limits
    apply. images: number of images that it generates. pieces: of its input, with a first estimate
    of their tokens. wants_usage: a stream reports its usage only if the gateway requests it.
    audio_seconds: estimated length of recordings in its input. characters: of a text to be spoken.
    video_seconds: of all videos that it makes. runs_in_background: it continues at the provider
    after its first answer. calls: number of model calls in it, 0 if unknown. tier: the processing
    tier, if another field than the tier's requests it. cache_write: the cache that its input is
    written to. prompt_head: the beginning of the user's last text.
    """

    model: str
    kind: Kind
    streams: bool = False
    images: int = 0
    pieces: InputPieces = field(default_factory=lambda: input_pieces({}))
    max_output_tokens: int | None = None
    wants_usage: bool = False
    audio_seconds: int = 0
    characters: int = 0
    video_seconds: int = 0
    runs_in_background: bool = False
    calls: int = 1
    tier: str = ""
    cache_write: CacheWrite | None = None
    prompt_head: str = ""

    @property
    def measured(self) -> UsageDetails | None:
        """Return the part of the usage that is known beforehand, besides tokens and images; None
        for nothing."""
        if not (self.audio_seconds or self.characters or self.video_seconds):
            return None
        return UsageDetails(
            input_audio_seconds=self.audio_seconds or None,
            input_characters=self.characters or None,
            output_video_seconds=self.video_seconds or None,
            tier=self.tier or None if self.video_seconds else None,
        )


# Mutable, for speed: each call makes one.
@dataclass(slots=True, unsafe_hash=True)
class AnswerFacts:
    """Facts that an answer reports.

    model_version: of the model that answered, which may differ from the requested one. is_estimate:
    some of several answers do not report their usage, which is then estimated. items: the ids of
    the items that a provider stores with the answer.
    """

    usage: Usage
    finish_reason: str | None = None
    response_id: str | None = None
    model_version: str | None = None
    is_estimate: bool = False
    items: tuple[str, ...] = ()


NO_FACTS = AnswerFacts(UNKNOWN_USAGE)


class WorkTally(Protocol):
    """The sum of the usage of background work, over all answers in it."""

    def add(self, row: JsonObject) -> None:
        """Add an answer from a file of answers."""

    def skim(self, text: bytes, *, is_last: bool) -> int:
        """Add the answers in a part of an object that is too long to parse. Return how many bytes
        were read: the next part begins with the remaining ones."""

    def facts(self) -> AnswerFacts:
        """Return the facts of all answers."""


@dataclass(frozen=True, slots=True)
class OngoingWork:
    """Work that continues at a provider under an id.

    operation, path: of the call that starts it, below the base URL. read, cancel: the paths that
    read it and cancel it, with `{id}` and `{model}`; empty if the provider has none. end_of:
    returns how it has ended, from its object; None while it runs. results: returns the path of the
    file of its answers, if it has one. files: returns the ids of all files that it has made. tally:
    makes the tally of its final object and its request; without it the object is an ordinary
    answer. longest_ms: its longest duration, if that exceeds that of other calls. is_read_once: the
    provider returns the result only once, so that a worker fetches it and clients get it from the
    gateway.
    """

    operation: Operation
    path: str
    read: str
    cancel: str
    end_of: Callable[[JsonObject], Status | None]
    results: Callable[[JsonObject], str] = lambda _: ""
    files: Callable[[JsonObject], Sequence[str]] = lambda _: ()
    tally: Callable[[JsonObject, bytes], WorkTally] | None = None
    longest_ms: int = 0
    is_read_once: bool = False


@dataclass(slots=True)
class OutputEvents:
    """The output in the events of a stream so far. `repeated`: texts that repeat earlier deltas as
    a whole. `images`: ids of the events that have an image."""

    texts: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    images: set[str] = field(default_factory=set)
    unnamed_images: int = 0


# throttled: a limit is exceeded for now. unpaid: the account has no money left. too_expensive: it
# has money, but not enough for this request. key: the key is invalid. busy: a self-hosted server
# has no capacity at the moment, which is not a failure. never: the same request would be refused
# again. of_thing: about a resource that the request names. of_place: the provider does not serve
# this gateway's location. tier_busy: the requested processing tier has no capacity at the moment,
# other tiers have. fault: the model has failed, whatever the status is.
RefusalReason = Literal[
    "throttled",
    "unpaid",
    "too_expensive",
    "key",
    "busy",
    "never",
    "of_thing",
    "of_place",
    "tier_busy",
    "fault",
]


@dataclass(frozen=True, slots=True)
class RefusalFacts:
    """A classified refusal.

    unit: of the exceeded limit. wait_ms: a wait that only this dialect reports. per_day: the limit
    is one of a day. day_quota: it is the quota of the day until midnight. of_account: it applies to
    more than the requested model. stated: limits that it states, with their bounds.
    """

    reason: RefusalReason
    unit: str | None = None
    wait_ms: int | None = None
    per_day: bool = False
    day_quota: bool = False
    of_account: bool = False
    stated: tuple[StatedBound, ...] = ()


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """A provider's error as received: the error object of the body, headers in lower case. now: by
    the provider's clock. tier: the processing tier requested in the answering dialect, if any."""

    status: int
    error: Mapping[str, Any]
    headers: Mapping[str, str]
    now: datetime
    tier: str = ""

    @property
    def message(self) -> str:
        """Return the message, cut to a bound."""
        return str(self.error.get("message", ""))[:4_000]

    @property
    def words(self) -> frozenset[str]:
        """Return the type and the code."""
        return frozenset(str(self.error.get(name)) for name in ("type", "code"))

    @property
    def details(self) -> list[JsonObject]:
        """Return Google's list of details; empty if the details are anything else."""
        found = self.error.get("details")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


@dataclass(frozen=True, slots=True)
class ModelList:
    """A list of models.

    path: its path below the base URL, with `query`. key: the field of the list. id_key: the field
    of a model's name, which begins with `prefix`. whole: returns the body of an answer with these
    models. required: returns fields that clients of the dialect require, from a model's name and
    owner, if nothing more is known of it.
    """

    path: str
    key: str
    id_key: str
    whole: Callable[[list[JsonObject]], JsonObject]
    prefix: str = ""
    query: str = ""
    required: Callable[[str, str], JsonObject] = lambda _name, _owner: {}

    def entry(self, name: str, owner: str, known: Mapping[str, Any]) -> JsonObject:
        """Return the entry of a model, with the known facts about it, in the form that clients
        expect."""
        return {**known, self.id_key: f"{self.prefix}{name}"} | {
            key: value for key, value in self.required(name, owner).items() if key not in known
        }

    def read(self, body: Any) -> list[JsonObject]:
        """Return the models of an answer, in the dialect's form. Together's answer is the list
        itself, Vertex names each model below its publisher, and Google's servers omit an empty
        list. Raises KeyError, TypeError and AttributeError for anything else than a list of
        models."""
        if isinstance(body, dict) and (not body or _PUBLISHED in body):
            names = (one["name"].rpartition("/")[2] for one in body.get(_PUBLISHED, ()))
            return [{self.id_key: f"{self.prefix}{name}"} for name in names]
        found = body if isinstance(body, list) else body[self.key]
        return [one for one in found if isinstance(one[self.id_key], str)]


_PUBLISHED = "publisherModels"


def wait_comment(text: bytes) -> bytes:
    """Return the comment in server-sent events that shows a call's place in the queue."""
    return b": wait %b\n\n" % text


def _ends_with_event(piece: bytes) -> bool:
    return not piece or piece.endswith((b"\n\n", b"\r\n\r\n"))


@dataclass(frozen=True, slots=True, eq=False)
class DialectSpec:
    """Functions and constants of a dialect.

    Paths: `calls` are those that match exactly, by POST; `endpoint_of(method, path)` returns the
    endpoint of any other, None for an unknown one. `recognizes(path, headers, query)` decides
    between dialects that share a path, by the names of the headers.

    Requests: `request_facts(endpoint, body, whole)`, where `whole` has the full texts of
    placeholders in the body; raises InvalidRequest. `rules_of(model)` returns the token counts of
    files. `headers` are required in calls that no client has made.

    Resources: `references(body, raw)` returns the resources that a call refers to, and
    `made_by(path, body)` what its answer creates, if anything; both are called for each call.
    `made_by_tools` is what the provider's tools make during a call.
    `page(kind, query)` reads the query of a list. `works` is the work that continues after its
    answer, by the kind of its resource.

    Answers: `answer_facts(answer, omitted=False, cut=False, parsed=None)` reads the kept bytes of
    an answer: `omitted` if its middle is missing, `cut` if it may be incomplete, `parsed` if it is
    an object that was parsed before. `add_output(event, output)` collects visible output;
    `image_count(answer)` counts the images of a whole answer.

    Errors: `statuses` are HTTP statuses of error objects by their type, code or status. `refusal`
    classifies an upstream's error, None if its wording is not of this dialect. `problem(error,
    status, retry_after_ms)` is the body of an error of ours; `error_event` begins the event in
    which a stream reports it, or `error_frame(body)` is that event. `no_retry` are headers that
    stop the retries of its SDKs. paused_status: of a call whose budget is paused until a person
    resumes it. `keep_alive` is sent in a stream of `stream_type` while it waits,
    `wait_event(shown)` with its place as JSON: both are ignored by SDKs. `ends_whole(piece)`
    returns whether an event may follow the bytes that were sent last. `usage_in(headers)` returns
    the usage in the headers of an answer.
    """

    name: Dialect
    endpoint_of: Callable[[str, str], Endpoint | None]
    recognizes: Callable[[str, Set[bytes], bytes], bool]
    models: ModelList
    rules_of: Callable[[str], Rules]
    request_facts: Callable[..., RequestFacts]
    answer_facts: Callable[..., AnswerFacts]
    add_output: Callable[[JsonObject, OutputEvents], None]
    image_count: Callable[[bytes], int]
    statuses: Mapping[str, int]
    refusal: Callable[[ErrorAnswer], RefusalFacts | None]
    problem: Callable[[TidegateError, int, int | None], JsonObject]
    calls: Mapping[str, Endpoint] = field(default_factory=dict)
    headers: tuple[tuple[bytes, bytes], ...] = ()
    no_retry: tuple[tuple[bytes, bytes], ...] = ((b"x-should-retry", b"false"),)
    paused_status: int = 403
    error_event: bytes = b""
    references: Callable[[Mapping[str, Any], bytes], Sequence[Reference]] = nothing_referred
    made_by: Callable[[str, Mapping[str, Any]], Making | None] = nothing_made
    made_by_tools: MadeByTools | None = None
    page: Callable[[str, str], PageQuery] = openai_page
    works: Mapping[str, OngoingWork] = field(default_factory=dict)
    keep_alive: bytes = b": waiting for admission\n\n"
    wait_event: Callable[[bytes], bytes] = wait_comment
    stream_type: bytes = b"text/event-stream"
    ends_whole: Callable[[bytes], bool] = _ends_with_event
    error_frame: Callable[[JsonObject], bytes] | None = None
    usage_in: Callable[[Headers], Usage] | None = None


_MOST_STATED, _LONGEST_NUMBER = 10**12, 40


def whole_in(value: object) -> int | None:
    """Return a number as the most lenient server reads it, such as Google's: also from a string,
    and with a decimal point; None for anything else."""
    text = value.strip().lstrip("0+")[:_LONGEST_NUMBER] or "0" if type(value) is str else value
    if type(text) not in (int, float, str):
        return None
    try:
        number = float(text)  # type: ignore[arg-type]
    except ValueError:
        return None
    except OverflowError:
        number = _MOST_STATED
    return None if number != number else ceil(max(-1, min(number, _MOST_STATED)))
