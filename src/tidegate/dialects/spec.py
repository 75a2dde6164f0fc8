"""Dialect interface: what each provider's API defines, and the types of a request and its answer.

A dialect is one module that fills one `DialectSpec`; `tidegate.dialects` lists them. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from math import ceil
from typing import Any, Literal, Protocol

from tidegate.admission.charges import CacheWrite
from tidegate.admission.estimator import InputPieces, Rules, input_pieces
from tidegate.call import UNKNOWN_USAGE, Kind, Status, Usage, UsageDetails
from tidegate.dialects.resources import (
    Making,
    PageQuery,
    Reference,
    ResourcePath,
    ResourceUse,
    nothing_made,
    nothing_referred,
    openai_page,
)
from tidegate.errors import StatedBound, TidegateError

Headers = list[tuple[bytes, bytes]]
JsonObject = dict[str, Any]
NOTHING_SHORTENED: Mapping[str, Sized] = {}


class Dialect(StrEnum):
    """Names of the dialects, as settings and the record have them."""

    OPENAI = "openai"
    GEMINI = "gemini"
    ANTHROPIC = "anthropic"
    BEDROCK = "bedrock"

    # An enumeration's own is a call of Python, and each request looks up several tables.
    __hash__ = str.__hash__


class Operation(StrEnum):
    """Operation of a call, as admission and accounting distinguish them.

    INFER requests text or images of a model, EMBED vectors, IMAGES images alone, TRANSCRIBE the
    text of a recording, SPEAK a recording of a text, MODERATE a judgement on one, RERANK the order
    of some, CACHE the keeping of an input, VIDEO videos, BATCH many calls of a model. COUNT,
    MODELS, FILES, RESOURCE and UPLOAD run no model: their kind has a limit only where there is one
    for `kind:other`, and they take none of a model's and no tokens. OTHER, a path that an
    upstream's `passthrough` names, is of that kind too, and may run one.
    RESOURCE is all that concerns something which lives at a provider.
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
        """Whether it runs a model."""
        return self in _COUNTED

    @property
    def may_run_model(self) -> bool:
        """Whether the limits of its model bind it."""
        return self in _COUNTED or self is Operation.OTHER

    @property
    def has_body(self) -> bool:
        """Whether a body is part of the call. Google's SDK for JavaScript deletes a file with an
        empty object, which means nothing."""
        return self not in (Operation.MODELS, Operation.FILES)


_COUNTED = frozenset(
    {
        *(Operation.INFER, Operation.EMBED, Operation.IMAGES, Operation.TRANSCRIBE),
        *(Operation.SPEAK, Operation.MODERATE, Operation.RERANK, Operation.CACHE),
        *(Operation.VIDEO, Operation.BATCH),
    }
)
# Whose work goes on after the answer.
GOING_ON = frozenset({Operation.VIDEO, Operation.BATCH})
# Whose answer holds no text of the model's own, and no image.
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
    """A native path. path: below the upstream's base URL, beginning with a slash, with `{model}`
    where the model stands. model: as the client's path has it; None where the body names it. Where
    `path` has no place for it, the body names it to the upstream. streams: the
    path alone says that the answer is a stream. takes_form: a body may be multipart/form-data.
    resource: what lives at a provider that it is about. upstreams: the only ones that have the
    path, by their `passthrough`."""

    dialect: Dialect
    operation: Operation
    path: str
    model: str | None = None
    streams: bool = False
    takes_form: bool = False
    resource: ResourceUse | None = None
    upstreams: tuple[str, ...] = ()
    # In the semantic conventions of telemetry; holds no model's name.
    name: str = field(init=False, compare=False)
    is_counted: bool = field(init=False, compare=False)  # as the operation's
    model_in_path: bool = field(init=False, compare=False)  # of an upstream too

    def __post_init__(self) -> None:
        infers_at_gemini = (self.dialect, self.operation) == (Dialect.GEMINI, Operation.INFER)
        name = "generate_content" if infers_at_gemini else _NAMES[self.operation]
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "is_counted", self.operation.is_counted)
        in_path = self.model is not None and "{model}" in self.path
        object.__setattr__(self, "model_in_path", in_path)

    @property
    def is_follow_up(self) -> bool:
        """Whether it concerns one thing that lives at a provider already."""
        return self.resource is not None and self.resource.resource_id is not None

    def path_for(self, model: str) -> str:
        """The path of a call of `model`."""
        if self.model is None:
            return self.path
        return self.path.replace("{model}", model.replace("/", "%2F"))


# No name begins with a dot: ".." would lead elsewhere. It may hold slashes, as at OpenRouter and
# vLLM.
_MODELS = re.compile(
    r"/v1/models(?:/[\w\-@][\w.\-:@]{0,199}(?:/[\w\-@][\w.\-:@]{0,199}){0,3})?", re.ASCII
)


def listed_models(dialect: Dialect, path: str, root: str = "") -> Endpoint | None:
    """The list of models, or one of them, in the dialects of OpenAI and Anthropic. `root`: what
    of the path is in the base URL."""
    if _MODELS.fullmatch(path) is None:
        return None
    return models_endpoint(dialect, path.removeprefix(root))


def models_endpoint(dialect: Dialect, path: str) -> Endpoint:
    """The list of models, or one of them."""
    folder, below, model = path.partition("/models/")
    if not below:
        return Endpoint(dialect, Operation.MODELS, path)
    return Endpoint(dialect, Operation.MODELS, f"{folder}/models/{{model}}", model=model)


@dataclass(slots=True)
class RequestFacts:
    """Facts of a native request for admission. model: as the client names it; empty where it
    leaves that to the provider. kind: which limits apply. images: how many it generates. pieces: of
    its input, with a first estimate of their tokens. wants_usage: whether a stream reports its
    usage only if the gateway requests it. audio_seconds: of recordings in its input, about.
    characters: of a text that is to be spoken. video_seconds: of all videos that it makes together.
    goes_on: the provider makes it in the background. calls: how many of the model it holds, 0 where
    nobody knows. tier: the processing tier that is requested elsewhere than in a field of that
    name. cache_write: to which cache its input is to be written. prompt_head: how the text begins
    that its user said last."""

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
    goes_on: bool = False
    calls: int = 1
    tier: str = ""
    cache_write: CacheWrite | None = None
    prompt_head: str = ""

    @property
    def measured(self) -> UsageDetails | None:
        """What is known beforehand of the usage, beside tokens and images; None for nothing."""
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
    """Facts that an answer reports. model_version: of the model that answered, which may differ
    from the requested one. is_estimate: some of several answers do not report their part of the
    usage, which is estimated."""

    usage: Usage
    finish_reason: str | None = None
    response_id: str | None = None
    model_version: str | None = None
    is_estimate: bool = False


NO_FACTS = AnswerFacts(UNKNOWN_USAGE)


class WorkTally(Protocol):
    """Sum of what a piece of work has used, over the answers that it holds."""

    def add(self, row: JsonObject) -> None:
        """Count one more answer, of a file of them."""

    def skim(self, text: bytes, *, is_last: bool) -> int:
        """Count the answers in a part of an object that is too long to be parsed. How many bytes of
        it have been read: the rest, and what follows it, is the next part."""

    def facts(self) -> AnswerFacts:
        """Facts of all."""


@dataclass(frozen=True, slots=True)
class OngoingWork:
    """Work that goes on at a provider under an id.

    operation, path: of the call that makes it, below the base URL. read, cancel: the paths of
    reading it and of ending it, with `{id}` and `{model}`; an empty one is none that the provider
    has. end_of: how it has ended, by its object; None while it goes on. results: the path of the
    file of its answers, if it has one. files: the ids of all files that it has made. tally: of its
    object at its end and of the request; without it the object is an answer like any other.
    longest_ms: how long it may take, where that is more than any other call may. is_read_once: the
    provider gives its result out once, so that a worker takes it and clients have it from here.
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
    """Output in the events of a stream so far. `repeated`: texts that repeat earlier deltas as a
    whole. `images`: ids of those that have one."""

    texts: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    images: set[str] = field(default_factory=set)
    unnamed_images: int = 0


# throttled: too much for now. unpaid: the account has no money left. key: the key is dead.
# busy: a self-hosted server has no room at the moment, which is no fault. never: the same request
# would be refused again. of_thing: about a resource that the request names. tier_busy: the
# requested processing tier has no capacity at the moment, which others have. fault: the model has
# failed, whatever the status says.
RefusalReason = Literal[
    "throttled", "unpaid", "key", "busy", "never", "of_thing", "tier_busy", "fault"
]


@dataclass(frozen=True, slots=True)
class RefusalFacts:
    """A classified refusal. unit: what there was too much of. wait_ms: a wait that only this
    dialect reports. per_day: too much for a day. day_quota: for the day until midnight.
    of_account: whether it applies to more than the requested model. stated: limits with their
    bounds."""

    reason: RefusalReason
    unit: str | None = None
    wait_ms: int | None = None
    per_day: bool = False
    day_quota: bool = False
    of_account: bool = False
    stated: tuple[StatedBound, ...] = ()


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """A provider's error as it came: the error object of the body, headers in lower case. now: by
    the provider's clock. tier: the processing tier that was requested of it in the answering
    dialect, if any."""

    status: int
    error: Mapping[str, Any]
    headers: Mapping[str, str]
    now: datetime
    tier: str = ""

    @property
    def message(self) -> str:
        """Its text, cut to a bound."""
        return str(self.error.get("message", ""))[:4_000]

    @property
    def words(self) -> frozenset[str]:
        """Its type and code."""
        return frozenset(str(self.error.get(name)) for name in ("type", "code"))

    @property
    def details(self) -> list[JsonObject]:
        """Google's list; empty where the details are something else."""
        found = self.error.get("details")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


@dataclass(frozen=True, slots=True)
class ModelList:
    """List of models. path: where it is, below the base URL, with `query`; key: of the list;
    id_key: of a model's name, which begins with `prefix`. whole: the body of an answer with these
    models. required: what clients of the dialect need of a model besides, by its name and owner,
    where nothing more is known of it."""

    path: str
    key: str
    id_key: str
    whole: Callable[[list[JsonObject]], JsonObject]
    prefix: str = ""
    query: str = ""
    required: Callable[[str, str], JsonObject] = lambda _name, _owner: {}

    def entry(self, name: str, owner: str, known: Mapping[str, Any]) -> JsonObject:
        """A model by this name, with what is known of it, in the form that clients expect."""
        return {**known, self.id_key: f"{self.prefix}{name}"} | {
            key: value for key, value in self.required(name, owner).items() if key not in known
        }

    def read(self, body: Any) -> list[JsonObject]:
        """The models of an answer, as the dialect has them: Together's answer is the list itself,
        Vertex names each below its publisher, and Google's servers leave out a list of none.
        Raises KeyError, TypeError and AttributeError for what is no list of models."""
        if isinstance(body, dict) and (not body or _PUBLISHED in body):
            names = (one["name"].rpartition("/")[2] for one in body.get(_PUBLISHED, ()))
            return [{self.id_key: f"{self.prefix}{name}"} for name in names]
        found = body if isinstance(body, list) else body[self.key]
        return [one for one in found if isinstance(one[self.id_key], str)]


_PUBLISHED = "publisherModels"


def wait_comment(shown: bytes) -> bytes:
    """The comment in server-sent events that shows the place of a call."""
    return b": wait %b\n\n" % shown


def _ends_with_event(piece: bytes) -> bool:
    return not piece or piece.endswith((b"\n\n", b"\r\n\r\n"))


@dataclass(frozen=True, slots=True, eq=False)
class DialectSpec:
    """Functions and constants of one dialect.

    Paths: `calls` are those that are matched as they are, by POST; `endpoint_of(method, path)`
    reads the others, None for one that it does not have. `is_spoken(path, headers, query)` decides
    whose a path is that several dialects have, by the names of the headers. `example` is a call.

    Requests: `request_facts(endpoint, body, whole)`, where `whole` has the texts for which shorter
    ones stand in the body, if there are any; raises InvalidRequest. `rules_of(model)` are the token
    counts of files. `headers` are what a call needs that no client has made.

    Resources: `resource_paths` are those of what lives at a provider; `references(body, raw)` are
    the resources that a call refers to, and `made_by(path, body)` is what its answer makes, if
    anything; both are asked of each call. `page(kind, query)` reads what a list is asked for.
    `works` is what goes on after its answer, by the kind of resource that it is.

    Answers: `answer_facts(answer, omitted=False, cut=False)` reads what was kept of one, where
    `omitted` says that its middle is missing, and `cut` that it may not have come to its end;
    `add_output(event, output)` collects visible output; `image_count(answer)` counts the images of
    a whole answer.

    Errors: `statuses` are HTTP statuses of error objects by their type, code or status; `refusal`
    classifies an upstream's error, None for one that is not in this dialect's words;
    `problem(error, status, retry_after_ms)` is the body of one of ours, `error_event` begins the
    event in which a stream reports it; or `error_frame(body)` is it. `no_retry` are headers that
    stop the retries of its SDKs.
    paused_status: of a call whose budget is paused until a person resumes it.
    `keep_alive` is what a stream of `stream_type` sends while it waits, `wait_event(shown)` with
    its place, which is JSON: what SDKs pass over. `ends_whole(piece)` says
    whether an event can follow what was sent last. `usage_in(headers)` is what those of an answer
    report.
    """

    name: Dialect
    example: str
    endpoint_of: Callable[[str, str], Endpoint | None]
    is_spoken: Callable[[str, Set[bytes], bytes], bool]
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
    resource_paths: tuple[ResourcePath, ...] = ()
    references: Callable[[Mapping[str, Any], bytes], Sequence[Reference]] = nothing_referred
    made_by: Callable[[str, Mapping[str, Any]], Making | None] = nothing_made
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
    """A number as the most lenient server reads it, such as Google's: in a text too, and with a
    point; None for what is none."""
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
