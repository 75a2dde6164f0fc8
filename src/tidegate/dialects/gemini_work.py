"""Background work at Gemini: videos, batches, and their results. Pure.

A video is an operation below its model, a batch an operation of its own; both report `done`. An
operation that has ended names its results: files at the provider, or the answers themselves.

    https://ai.google.dev/gemini-api/docs/video
    https://ai.google.dev/gemini-api/docs/batch-api
    https://ai.google.dev/api/batch-api

Invariants: a batch names no model but that of its path; if a body states a length or a resolution
twice, the more expensive value counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import orjson

from tidegate.call import Kind, Status, Usage, UsageDetails
from tidegate.dialects.answers import (
    MOST_TOKENS,
    object_of,
    objects_in,
    part_of,
    short_text,
    with_searches,
)
from tidegate.dialects.resources import RESOURCE_ID, Making
from tidegate.dialects.spec import NO_FACTS, AnswerFacts, JsonObject, RequestFacts, whole_in
from tidegate.errors import InvalidRequest

_INLINE = ("inlinedResponses", "inlinedEmbedContentResponses")
OPERATION = Making("operation", "name", prefix="/operations/")
BATCH = Making("batch", "name", prefix="batches/")
# A batch expires after 48 hours; an hour is added for its end.
LONGEST_BATCH_MS = 49 * 3_600_000
_BATCH_TIER = "batch"
_FILE = re.compile(rf"(?:^|/)files/({RESOURCE_ID})(?=[:?]|$)", re.ASCII)
_STATES = {
    "SUCCEEDED": Status.SUCCEEDED,
    "FAILED": Status.FAILED,
    "EXPIRED": Status.FAILED,
    "CANCELLED": Status.CANCELLED,
}


def end_of(body: JsonObject) -> Status | None:
    """Return how an operation has ended; None while it runs."""
    state = str(part_of(body, "metadata").get("state"))
    ended = next((end for name, end in _STATES.items() if state.endswith(f"_{name}")), None)
    if ended is not None:
        return ended
    if body.get("done") is not True:
        return None
    error = part_of(body, "error")
    if error:
        return Status.CANCELLED if error.get("code") == 1 else Status.FAILED
    return Status.SUCCEEDED


# Results of operations


def files_of(body: Mapping[str, Any]) -> Sequence[str]:
    """Return the ids of the files that an operation has made. Only the fields in which Google puts
    its own files are read, not those that repeat a client's text."""
    response = part_of(body, "response")
    output = part_of(part_of(body, "metadata"), "output")
    named = [one.get("responsesFile") for one in (response, output)]
    named += [video.get("uri") for video in _videos(response)]
    found = (_FILE.search(one) for one in named if type(one) is str)
    return tuple(dict.fromkeys(one[1] for one in found if one is not None))


MADE_FILES = Making("file", "name", each=files_of)


def _videos(response: JsonObject) -> Iterator[JsonObject]:
    for name in ("generateVideoResponse", "generatedVideos"):
        for sample in objects_in(part_of(response, name).get("generatedSamples")):
            yield part_of(sample, "video")


def results_path(body: JsonObject) -> str:
    """Return the path of the file with a batch's answers; empty if the batch itself contains
    them."""
    response = part_of(body, "response") or part_of(part_of(body, "metadata"), "output")
    named = response.get("responsesFile")
    found = _FILE.search(named) if type(named) is str else None
    return "" if found is None else f"/v1beta/files/{found[1]}:download?alt=media"


# Videos

_USUAL_SECONDS, _MOST_SECONDS, _MOST_VIDEOS = 8, 600, 100
_SECONDS = frozenset(("durationSeconds", "duration_seconds"))
_VIDEOS = frozenset(("sampleCount", "sample_count", "numberOfVideos", "number_of_videos"))
_USUAL_RESOLUTION = "720p"
_SIZE = re.compile(r"(\d{1,5})([pk])")


def video_request(model: str, body: Mapping[str, Any]) -> RequestFacts:
    """Return the facts of a request for videos. Raises InvalidRequest."""
    if not isinstance(body.get("instances"), list):
        allowed = "a list of objects, each with a prompt"
        raise InvalidRequest("instances", "instances is missing", allowed=allowed)
    raw = orjson.dumps(body)
    seconds, videos = video_seconds(raw), max(1, _most(_VIDEOS, raw))
    if seconds > _MOST_SECONDS:
        allowed = f"at most {_MOST_SECONDS}"
        raise InvalidRequest("parameters.durationSeconds", "a video is too long", allowed=allowed)
    if videos > _MOST_VIDEOS:
        allowed = f"at most {_MOST_VIDEOS}"
        raise InvalidRequest("parameters.sampleCount", "videos are too many", allowed=allowed)
    return RequestFacts(
        model,
        Kind.IMAGE_GENERATION,
        video_seconds=seconds * videos * max(1, len(body["instances"])),
        max_output_tokens=1,
        runs_in_background=True,
        tier=resolution(raw),
    )


def video_seconds(raw: bytes) -> int:
    """Return the requested length of each video, in seconds."""
    return _most(_SECONDS, raw) or _USUAL_SECONDS


def resolution(raw: bytes) -> str:
    """Return the resolution of the videos, which prices treat as a tier; empty for the usual
    one."""
    texts = [one.lower() for one in _stated(frozenset(("resolution",)), raw) if type(one) is str]
    sizes = [(size[2] == "k", int(size[1])) for size in map(_SIZE.fullmatch, texts) if size]
    is_wide, lines = max(sizes, default=(False, 0))
    named = f"{lines}k" if is_wide else f"{lines}p"
    return "" if not sizes or named == _USUAL_RESOLUTION else named


def _most(names: frozenset[str], raw: bytes) -> int:
    """Return the largest number stated under one of these names, rounded up; 0 for none."""
    most = 0
    for value in _stated(names, raw):
        if type(value) in (int, float, str):
            with suppress(ValueError, OverflowError):  # not a number
                most = max(most, ceil(float(value)))
    return most


def _stated(names: frozenset[str], raw: bytes) -> list[Any]:
    """Return all values of these names in a body, including duplicates within an object."""
    found: list[Any] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        found.extend(value for name, value in pairs if name in names)

    with suppress(ValueError, RecursionError):  # the provider cannot parse it either
        json.loads(raw, object_pairs_hook=note)
    return found


@dataclass(slots=True)
class VideoTally:
    """Counts the seconds of the videos that a request has produced: Google charges for no
    others."""

    operation: JsonObject
    request: bytes
    is_unread: bool = False

    def add(self, row: JsonObject) -> None:
        """Do nothing: an operation of videos has no file of answers."""

    def skim(self, text: bytes, *, is_last: bool) -> int:
        self.is_unread = True
        return len(text)

    def facts(self) -> AnswerFacts:
        """Return the facts of all videos; without any, a usage of zero."""
        if self.is_unread:
            return NO_FACTS
        videos = sum(1 for _ in _videos(part_of(self.operation, "response")))
        if not videos:
            return AnswerFacts(Usage(input_tokens=0, output_tokens=0))
        seconds = min(videos * video_seconds(self.request), MOST_TOKENS)
        tier = resolution(self.request) or None
        details = UsageDetails(output_video_seconds=seconds, tier=tier)
        return AnswerFacts(Usage(details=details), finish_reason="done")


# Batches


def requests_in(body: Mapping[str, Any]) -> list[JsonObject] | None:
    """Return the requests of a batch; None if they are in a file. Raises InvalidRequest."""
    batch = part_of(body, "batch")
    config = part_of(batch, "inputConfig") or part_of(batch, "input_config")
    inline = config.get("requests")
    if type(inline) is dict:
        found = inline.get("requests")
        if type(found) is list and found:
            return [part_of(object_of(one), "request") for one in found]
    elif type(config.get("fileName", config.get("file_name"))) is str:
        return None
    allowed = "inputConfig.requests.requests, or inputConfig.fileName"
    raise InvalidRequest("batch.inputConfig", "a batch has no requests", allowed=allowed)


_MODEL_FIELD = "batch.inputConfig.requests.requests.request.model"


def named_in_batch(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the fields in which a batch names a model again, with the names."""
    batch = part_of(body, "batch")
    if type(named := batch.get("model")) is str:
        yield "batch.model", named
    config = part_of(batch, "inputConfig") or part_of(batch, "input_config")
    for one in objects_in(part_of(config, "requests").get("requests")):
        for inner in (one, part_of(one, "request")):
            if type(named := inner.get("model")) is str:
                yield _MODEL_FIELD, named


_BOUNDS = ("maxOutputTokens", "max_output_tokens")
_COUNTS_OF_ANSWERS = ("candidateCount", "candidate_count")


def batch_request(facts: RequestFacts, body: Mapping[str, Any], *, embeds: bool) -> RequestFacts:
    """Return the facts of a batch, given those of its whole body. Raises InvalidRequest."""
    found = requests_in(body)
    bounds = [_bound(one) for one in found or ()]
    known = bool(bounds) and None not in bounds
    most = sum(one or 0 for one in bounds) if known else None
    return replace(
        facts,
        streams=False,
        images=0,
        max_output_tokens=1 if embeds else most,
        runs_in_background=True,
        calls=0 if found is None else len(found),
        tier=_BATCH_TIER,
    )


def _bound(request: JsonObject) -> int | None:
    """Return the bound of all answers to a request, in tokens; None if only the model bounds
    them."""
    both = [part_of(request, name) for name in ("generationConfig", "generation_config")]
    bounds = [value for one in both for name in _BOUNDS if (value := one.get(name)) is not None]
    named = [bound for value in bounds if (bound := whole_in(value)) is not None]
    counts = [whole_in(one.get(name)) or 1 for one in both for name in _COUNTS_OF_ANSWERS]
    if len(named) < len(bounds) or max(named, default=0) < 1:
        return None
    return max(named) * max(1, *counts)


class BatchTally:
    """Sums the usage that the answers of a batch report. `usage_of` reads the usage of one answer.
    An answer that does not report a figure counts as the largest one of the others."""

    def __init__(
        self, batch: JsonObject, request: bytes, usage_of: Callable[[JsonObject], Usage]
    ) -> None:
        self._usage_of = usage_of
        self._batch, self._request = batch, request
        self._skimmed: list[JsonObject] = []
        self._sums: dict[str, int] = {}
        self._details: dict[str, int] = {}
        self._versions: set[str] = set()
        self._answers = 0
        self._silent = self._lacking_input = 0  # counts of answers
        self._largest = {"input_tokens": 0, "output_tokens": 0}
        output = part_of(batch, "response") or part_of(part_of(batch, "metadata"), "output")
        for name in _INLINE:
            for row in objects_in(part_of(output, name).get("inlinedResponses")):
                self.add(row)

    def add(self, row: JsonObject) -> None:
        """Add an answer; one that was refused used nothing."""
        answer = part_of(row, "response")
        if not answer:
            return
        self._answers += 1
        if version := short_text(answer.get("modelVersion")):
            self._versions.add(version)
        raw = part_of(answer, "usageMetadata")
        tokens = None if raw else _whole(answer.get("tokenCount"))
        usage = Usage(tokens, 0) if tokens is not None else self._usage_of(raw)
        if usage.output_tokens is None:
            self._silent += 1
            return
        self._lacking_input += usage.input_tokens is None
        usage = with_searches(usage, _searches(answer))
        for name in ("input_tokens", "output_tokens", "thoughts_tokens", "cached_tokens"):
            self._sums[name] = self._sums.get(name, 0) + (getattr(usage, name) or 0)
        most, output = self._largest, (usage.output_tokens or 0) + (usage.thoughts_tokens or 0)
        most["input_tokens"] = max(most["input_tokens"], usage.input_tokens or 0)
        most["output_tokens"] = max(most["output_tokens"], output)
        if usage.details is not None:
            for name in _COUNTS:
                more = getattr(usage.details, name) or 0
                self._details[name] = self._details.get(name, 0) + more

    def skim(self, text: bytes, *, is_last: bool) -> int:
        """Add answers of a long text by the usage beside each. A match within an answer is
        impossible: there the quotes of the field's name are escaped."""
        end = len(text) if is_last else max(0, len(text) - _LONGEST_USAGE_BYTES)
        at = 0
        while (found := _TOLD.search(text, at)) is not None and found.start() < end:
            at = found.end()
            if found["tokens"] is not None:
                self._skimmed.append({"tokenCount": found["tokens"].decode()})
                continue
            piece = text[at - 1 : at + _LONGEST_USAGE_BYTES].decode("utf-8", "replace")
            with suppress(ValueError, RecursionError):  # otherwise the next match counts by itself
                usage, length = _DECODER.raw_decode(piece)
                self._skimmed.append({"usageMetadata": usage})
                at += length - 1
        if is_last:
            for answer in self._once():
                self.add({"response": answer})
            self._silent += not self._answers
        return max(at, end)

    def _once(self) -> list[JsonObject]:
        """Return the skimmed answers without repetition: an operation may show them twice, as its
        result and as its output."""
        found, half = self._skimmed, len(self._skimmed) // 2
        with suppress(orjson.JSONDecodeError, InvalidRequest):
            requested = len(requests_in(object_of(orjson.loads(self._request))) or ())
            if len(found) > requested and found[:half] == found[half:]:
                return found[:half]
        return found

    def facts(self) -> AnswerFacts:
        """Return the facts of all answers. The input is unknown if no answer reports any. The usage
        is unknown if no answer reports one, or if a batch shows no answers but counts some as
        successful."""
        stats = part_of(part_of(self._batch, "metadata"), "batchStats")
        succeeded = str(stats.get("successfulRequestCount", "0"))
        version = self._versions.pop() if len(self._versions) == 1 else None
        reported = self._answers - self._silent
        if (self._silent or succeeded not in ("0", "")) and reported <= 0:
            unknown = Usage(details=UsageDetails(tier=_BATCH_TIER))
            return AnswerFacts(unknown, model_version=version)
        sums: dict[str, Any] = {name: self._sums.get(name, 0) for name in ("input_tokens",)}
        sums["output_tokens"] = self._sums.get("output_tokens", 0)
        lacking = dict.fromkeys(self._largest, self._silent)
        lacking["input_tokens"] += self._lacking_input
        for name, answers in lacking.items():
            sums[name] += answers * self._largest[name]
        for name in ("thoughts_tokens", "cached_tokens"):
            sums[name] = self._sums.get(name) or None
        counts: dict[str, Any] = {name: count or None for name, count in self._details.items()}
        if reported and self._lacking_input == reported:  # then its details are unknown too
            sums["input_tokens"] = sums["cached_tokens"] = None
            counts = {name: n for name, n in counts.items() if not name.startswith("input_")}
        details = UsageDetails(**counts, tier=_BATCH_TIER)
        state = short_text(part_of(self._batch, "metadata").get("state"))
        usage, is_estimate = Usage(**sums, details=details), any(lacking.values())
        return AnswerFacts(usage, state, model_version=version, is_estimate=is_estimate)


_LONGEST_USAGE_BYTES = 16_384
_TOLD = re.compile(rb'"usageMetadata"\s*:\s*\{|"tokenCount"\s*:\s*"?(?P<tokens>\d{1,12})')
_DECODER = json.JSONDecoder()
_COUNTS = (
    *("input_audio_tokens", "input_image_tokens", "input_video_tokens"),
    *("output_audio_tokens", "output_image_tokens", "output_video_tokens", "searches"),
)


def _whole(value: Any) -> int | None:
    """Return a count, which Google may write as a string; None for anything else."""
    if type(value) is str and value.isascii() and value.isdecimal():
        value = int(value[:12])
    return value if type(value) is int and value >= 0 else None


def _searches(answer: JsonObject) -> int:
    queries: set[str] = set()
    for candidate in objects_in(answer.get("candidates")):
        named = part_of(candidate, "groundingMetadata").get("webSearchQueries")
        if type(named) is list:
            queries.update(one for one in named if type(one) is str and one)
    return len(queries)
