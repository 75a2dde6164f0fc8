"""Logging: names of all events, format of the lines, redaction of secrets.

Invariant: only this file spells the name of an event. A line is one event with fields; on a
terminal it is coloured text, short for requests and jobs, otherwise JSON. Secrets never reach a
line: values of fields with a secret's name are replaced, at any depth, and so are keys and
passwords within texts.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections import Counter, deque
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, Literal

import orjson
import structlog

# Variables by which a supervisor names a process among its children, and the folder of their
# metrics, as prometheus-client reads it.
NAMED = "TIDEGATE_CHILD"
SHARED = "PROMETHEUS_MULTIPROC_DIR"


class Log(StrEnum):
    """Event names. One line per request at most: `REQUEST_DONE` or `JOB_DONE`."""

    STARTED = "started"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DEMO_MODE = "demo_mode"
    REQUEST_DONE = "request_done"
    JOB_DONE = "job_done"
    JOB_RETRY = "job_retry"
    JOB_DEAD = "job_dead"
    JOB_REQUEUED = "job_requeued"
    JOBS_REQUEUED = "jobs_requeued"
    CALLS_LOST = "calls_lost"
    CALL_PREEMPTED = "call_preempted"
    RECONCILED = "reconciled"
    RECONCILE_FAILED = "reconcile_failed"
    JOB_DISCARDED = "job_discarded"
    JOBS_RETAKEN = "jobs_retaken"
    BATCH_CANCELLED = "batch_cancelled"
    BATCH_PAUSED = "batch_paused"
    BATCH_RESUMED = "batch_resumed"
    PROVIDER_BATCH_CREATED = "provider_batch_created"
    PROVIDER_BATCH_ENDED = "provider_batch_ended"
    BACKGROUND_ENDED = "background_ended"
    PROVIDER_BATCH_HELD = "provider_batch_held"
    PROVIDER_BATCH_LEFT = "provider_batch_left"
    WEBHOOK_GIVEN_UP = "webhook_given_up"
    WORKER_LOOP_FAILED = "worker_loop_failed"
    CLASSIFIER_FELL_BACK = "classifier_fell_back"
    LIMITS_CHANGED = "limits_changed"
    LIMITS_CONFLICT = "limits_conflict"
    LIVE_LIMITS_KEPT = "live_limits_kept"
    RECORDED_DAY_COUNTED = "recorded_day_counted"
    LIMIT_PAUSED = "limit_paused"
    LIMIT_RESUMED = "limit_resumed"
    SESSION_REVOKED = "session_revoked"
    REQUEST_CANCELLED = "request_cancelled"
    REQUEST_RETRIED = "request_retried"
    STORE_AWAY = "store_away"
    STORE_BACK = "store_back"
    BLOBS_AWAY = "blobs_away"
    JOURNAL_MISSING = "journal_missing"
    SPILLED = "spilled"
    SPILL_REPLAYED = "spill_replayed"
    AUDIT_DROPPED = "audit_dropped"
    MIGRATED = "migrated"
    PRUNED = "pruned"
    PARTITIONS_MISSING = "partitions_missing"
    RECORD_EXPORTED = "record_exported"
    DAILY_WORK_DONE = "daily_work_done"
    DAILY_WORK_FAILED = "daily_work_failed"
    ERASED = "erased"
    CHILD_STARTED = "child_started"
    CHILD_DIED = "child_died"
    RENEWING = "renewing"
    RENEWED = "renewed"
    RENEWAL_STOPPED = "renewal_stopped"
    EMBEDDED_STARTED = "embedded_started"
    INTERNAL_ERROR = "internal_error"
    UPSTREAM_KEY_DEAD = "upstream_key_dead"
    CREDENTIALS_FAILED = "credentials_failed"
    UPSTREAM_OUT = "upstream_out"
    UPSTREAM_BACK = "upstream_back"
    UPSTREAMS_CHANGED = "upstreams_changed"
    UPSTREAM_MISSING = "upstream_missing"
    LIVE_UPSTREAMS_KEPT = "live_upstreams_kept"
    NO_API_KEY = "no_api_key"
    ACTION_UNRECORDED = "action_unrecorded"
    ISSUER_AWAY = "issuer_away"
    ISSUER_BACK = "issuer_back"
    SIGNED_IN = "signed_in"
    SIGN_IN_REFUSED = "sign_in_refused"
    SIGN_OUT_UNRECORDED = "sign_out_unrecorded"
    TENANT_CHANGED = "tenant_changed"
    BUDGET_CHANGED = "budget_changed"
    BUDGET_ESTIMATED = "budget_estimated"
    BUDGET_UNWRITABLE = "budget_unwritable"
    BUDGETS_NOT_KEPT = "budgets_not_kept"
    KEY_MADE = "key_made"
    KEY_REVOKED = "key_revoked"
    KEY_LAPSED = "key_lapsed"
    SCRAPE_INCOMPLETE = "scrape_incomplete"
    WATCHED = "watched"
    COLLECTOR_AWAY = "collector_away"
    COLLECTOR_BACK = "collector_back"
    NO_OTEL = "no_otel"
    PROCESS_STATE = "process_state"
    LIMITER_STATE = "limiter_state"
    LIMITER = "limiter"


class GenAI(StrEnum):
    """Names of spans, metrics and attributes: by OpenTelemetry's conventions for generative AI
    (https://opentelemetry.io/docs/specs/semconv/gen-ai/) if defined there, otherwise our own."""

    OPERATION = "gen_ai.operation.name"
    PROVIDER = "gen_ai.provider.name"
    REQUEST_MODEL = "gen_ai.request.model"
    STREAM = "gen_ai.request.stream"
    RESPONSE_ID = "gen_ai.response.id"
    RESPONSE_MODEL = "gen_ai.response.model"
    FINISH_REASONS = "gen_ai.response.finish_reasons"
    RESPONSE_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
    INPUT = "gen_ai.usage.input_tokens"
    OUTPUT = "gen_ai.usage.output_tokens"
    CACHED = "gen_ai.usage.cache_read.input_tokens"
    CACHE_WRITES = "gen_ai.usage.cache_creation.input_tokens"
    THOUGHTS = "gen_ai.usage.reasoning.output_tokens"
    TOKEN_TYPE = "gen_ai.token.type"
    OPERATION_DURATION = "gen_ai.client.operation.duration"
    TOKEN_USAGE = "gen_ai.client.token.usage"
    FIRST_CHUNK = "gen_ai.client.operation.time_to_first_chunk"
    ERROR = "error.type"
    SERVER = "server.address"
    SERVER_PORT = "server.port"
    HTTP_STATUS = "http.response.status_code"
    CALL = "tidegate.call"
    QUEUE = "tidegate.queue"
    TENANT = "tidegate.tenant"
    SOURCE = "tidegate.source"
    REQUEST_ID = "tidegate.request_id"
    UPSTREAM = "tidegate.upstream"
    TRY = "tidegate.try"
    TRIES = "tidegate.tries"
    QUEUE_MS = "tidegate.queue_ms"


_STRUCTLOG_OWN = ("_record", "_from_structlog")
_OF_SEVERAL_LINES = ("event", "exception", "stack")
_SECRET_FIELD = re.compile(
    r"key$|secret|password|credential|authorization|cookie|(?:access|refresh|auth|id|admin)_token$",
    re.IGNORECASE,
)
# The beginning of a URL's password; not the digits of a port.
_PASSWORD = re.compile(r"://[^/\s:@'\"]*+:(?!\d++(?:[/?#\s'\",]|$))")
_WORD = re.compile(r"[^\s'\"]++")
_SECRET_IN_TEXT = re.compile(
    r"(?P<before>"
    r"[?&](?:key|api_?key|upload_id|access_token|tidegate_key|password)="
    r"|(?:x-(?:goog-)?api-key|authorization)['\"]?\s*[:=,]\s*(?:b?['\"])?(?:(?:bearer|basic)\s+)?"
    r")"
    # `tg_...` stands for any key in our own texts.
    r"(?!(?:(?:bearer|basic)\s+)?tg_\.)[^&\s'\"]+"
    r"|\bAIza[\w-]{30,}|\btg_[a-z0-9]{4,}_\w{8,}|\btgop_[\w-]{20,}"
    # Keys of OpenAI, Anthropic, OpenRouter and DeepSeek; Groq, xAI, Hugging Face, Perplexity,
    # NVIDIA.
    r"|(?<![\w-])(?:sk-|gsk_|xai-|hf_|pplx-|nvapi-)(?=[a-z_-]{0,40}\d)[\w-]{20,}",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return `text` without keys of providers and of this gateway, secrets in URLs, and values of
    secret headers. The time is linear, since a stranger's path is a text too."""
    if "@" in text and "://" in text:
        text = _WORD.sub(_without_password, text)
    return _SECRET_IN_TEXT.sub(lambda found: f"{found['before'] or ''}***", text)


def _without_password(found: re.Match[str]) -> str:
    """Return a word without the password of a URL: everything up to the last "@", since "/" and "@"
    are often not escaped in it."""
    word, end = found[0], found[0].rfind("@")
    begun = _PASSWORD.search(word)
    if begun is None or begun.end() > end:
        return word
    return f"{word[: begun.end()]}***{word[end:]}"


_redacted_path = lru_cache(1_000)(redact)  # most requests are for one of a few paths


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            name: "***" if _SECRET_FIELD.search(str(name)) else _redacted(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(repr(value) if isinstance(value, BaseException) else str(value))


def _redact_event(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    event.pop("color_message", None)  # uvicorn's second copy of its text, with terminal codes
    for name, value in event.items():
        if name in _STRUCTLOG_OWN:
            continue
        event[name] = "***" if _SECRET_FIELD.search(name) else _redacted(value)
    return event


def _to_json(event: Any, **_options: Any) -> str:
    return _as_plain_json(orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode())


# Characters that a terminal or a viewer may interpret: controls (C0, DEL, C1), line and paragraph
# separators, and marks that change the direction of the surrounding text.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _as_plain_json(line: str) -> str:
    """Return the same JSON with control characters escaped, which orjson leaves unescaped."""
    return line if line.isascii() and "\x7f" not in line else _OBEYED.sub(_escaped, line)


def _as_plain_lines(lines: list[str]) -> str:
    """Return several lines of JSON, escaped likewise; one check for all of them if they are
    ASCII."""
    together = "\n".join(lines) + "\n"
    if together.isascii() and "\x7f" not in together:
        return together
    return "".join([_as_plain_json(line) + "\n" for line in lines])


def _plain(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Escape control characters in the texts of an event, for a terminal. Line breaks are kept in
    fields with several lines of their own (messages of other libraries, exceptions), indented so
    that none of these lines can be taken for a line of the log."""
    for name, value in event.items():
        if not isinstance(value, str) or value.isprintable():
            continue
        if name in _OF_SEVERAL_LINES:
            event[name] = "\n    ".join(_OBEYED.sub(_escaped, line) for line in value.split("\n"))
        else:
            event[name] = _OBEYED.sub(_escaped, value)
    return event


def _remember(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    if event.get("level") in _SERIOUS:
        fields = {name: value for name, value in event.items() if name not in _STRUCTLOG_OWN}
        _problems.append({name: _shortened(value) for name, value in fields.items()})
        _counts[fields["event"] if fields.get("event") in _EVENTS else "other"] += 1
    return event


def _shortened(value: Any) -> Any:
    return value[-_LONGEST_SHOWN:] if isinstance(value, str) else value


def recent_problems() -> list[dict[str, Any]]:
    """Return the last lines of this process from the level `warning` on, redacted."""
    return list(_problems)


def problem_counts() -> Counter[str]:
    """Return how many such lines this process has written, by event."""
    return Counter(_counts)


# Events that alerts are based on.
UPKEEP_FAILURES = (
    *(Log.CREDENTIALS_FAILED.value, Log.PARTITIONS_MISSING.value),
    *(Log.DAILY_WORK_FAILED.value, Log.RECONCILE_FAILED.value, Log.WORKER_LOOP_FAILED.value),
)
_EVENTS = frozenset(one.value for one in Log)
_counts: Counter[str] = Counter()
_SERIOUS = ("warning", "error", "critical")
_LONGEST_SHOWN = 2_000
_problems: deque[dict[str, Any]] = deque(maxlen=50)

# Other libraries' lines for each request; some below `info` contain its content.
_NOISY = (
    *("httpx", "httpx2", "httpcore", "httpcore2", "google_genai"),
    *("aiohttp.access", "asyncio", "multipart", "python_multipart"),
)


# Events that the start-up page reports.
_ON_PAGE = frozenset({Log.STARTED, Log.STOPPING, Log.STOPPED, Log.MIGRATED, Log.DEMO_MODE})
# Lines of the limiter, which is a library with texts for any logger, and their fields as an event.
_OF_LIMITER = "tidegate.limiter"
_LIMITER_STATE = re.compile(
    r"limiter: (?P<state>up|away|recovering)(?:, was (?P<was>\w+))?(?: \((?P<reason>.*)\))?",
    re.DOTALL,
)
_FIRST_CONTACT = "limiter: up"
# A pool that Valkey does not know yet recovers first.
_RECOVERING = "limiter: recovering"


class _PageFilter(logging.Filter):
    """A filter that drops the lines of an ordinary start and end, which the start-up page
    reports."""

    def __init__(self) -> None:
        super().__init__()
        self._pools_seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.msg
        if isinstance(message, dict):
            return message.get("event") not in _ON_PAGE
        if record.name != _OF_LIMITER:
            return True
        pool = str(structlog.contextvars.get_contextvars().get("pool", ""))
        if pool in self._pools_seen:
            return True
        said = record.getMessage()
        if said != _RECOVERING:
            self._pools_seen.add(pool)
        return said not in {_FIRST_CONTACT, _RECOVERING}


def _name_event(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Give a line of the limiter the name of an event; its text becomes fields."""
    record, text = event["_record"], event["event"]
    if record.name != _OF_LIMITER or not text.startswith("limiter: "):
        return event
    changed = _LIMITER_STATE.fullmatch(text)
    if changed is None:
        event["event"], event["detail"] = Log.LIMITER, text.removeprefix("limiter: ")
    else:
        event["event"] = Log.LIMITER_STATE
        event.update((name, part) for name, part in changed.groupdict().items() if part)
    return event


_DIM, _BOLD, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
_RED, _YELLOW, _GREEN = "\x1b[31m", "\x1b[33m", "\x1b[32m"


def _short_line(event: Mapping[str, Any]) -> str:
    """Return the line of a request or a job for people: `200 POST /v1/messages acme gpt-5 688
    ms`."""
    if event["event"] == Log.REQUEST_DONE:
        status = event.get("status") or 0
        colour = _RED if status >= 500 else _YELLOW if status >= 400 or not status else _GREEN
        text = f"{status or 'left'} {event.get('method', '')} {event.get('path', '')}"
        took_ms = event.get("took_ms")
    else:
        code = event.get("code")
        colour, text = (_RED, f"job {code}") if code else (_GREEN, "job done")
        text += f" {event.get('type', '')}"
        took_ms = event.get("upstream_ms")
    queued_ms = event.get("queue_ms") or 0
    more = [str(event[name]) for name in ("tenant", "model", "upstream") if event.get(name)]
    more += [] if took_ms is None else [f"{took_ms:,.0f} ms"]
    more += [f"(queued {queued_ms:,.0f} ms)"] if queued_ms >= 1 else []
    first, _, rest = text.partition(" ")
    line = f"{_DIM}{event['timestamp']}{_PLAIN} {colour}{first}{_PLAIN} {_BOLD}{rest}{_PLAIN}"
    line += "".join(f" {one}" for one in more)
    request_id = event.get("request_id")
    return f"{line}  {_DIM}{request_id}{_PLAIN}" if request_id else line


class _ForPeople:
    """A renderer for people at a terminal: requests and jobs in short, all else as in structlog."""

    def __init__(self) -> None:
        self._others = structlog.dev.ConsoleRenderer(colors=True)

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
        if event.get("event") in (Log.REQUEST_DONE, Log.JOB_DONE):
            return _short_line(event)
        return self._others(logger, method, event)


def _renderers(for_people: bool, console: bool) -> list[Any]:
    if for_people:
        return [_plain, _ForPeople()]
    if console:
        return [_plain, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    return [structlog.processors.JSONRenderer(serializer=_to_json)]


def lines_with(**fields: str) -> AbstractContextManager[None]:
    """Add fields to all lines of this task within the block, and of tasks created there, also those
    of other libraries."""
    return structlog.contextvars.bound_contextvars(**fields)


def configure_logging(
    style: Literal["auto", "console", "json"], level: str, *, process: str, has_page: bool = False
) -> None:
    """Set up structlog and the standard library's loggers to write the same lines to stderr.

    has_page: at a terminal, leave out the lines that the start-up page reports.
    """

    def add_process(
        _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        # Not a context variable: separate threads, such as a heartbeat's, would not see it.
        event.setdefault("process", process)
        return event

    for_people = style == "auto" and sys.stderr.isatty()
    console = style == "console" or for_people
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        add_process,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper("%H:%M:%S", utc=False)
        if for_people
        else structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
        structlog.processors.format_exc_info,
        _redact_event,
        _remember,
    ]
    final = _renderers(for_people, console)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[_name_event, *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
    )
    global _lines
    is_verbose = not console and level.lower() in ("debug", "info")
    handler = logging.StreamHandler(sys.stderr)
    _lines = (handler, process) if is_verbose else None
    handler.setFormatter(formatter)
    if for_people and has_page:
        handler.addFilter(_PageFilter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


class FrequentLog:
    """The log line of each request or job, at a twentieth of a logger's cost: JSON lines are
    written directly to the stream, those of an iteration of the event loop together. Except for the
    path, its fields must not be able to contain a secret."""

    def __init__(self, event: Log) -> None:
        self._event = event
        self._name = event.value
        self._ready: list[str] = []

    @property
    def is_text(self) -> bool:
        """Return whether lines are text for people, which has more fields of a call than JSON."""
        return _lines is None

    def __call__(self, fields: dict[str, Any]) -> None:
        if _lines is None:
            get_logger().info(self._event, **fields)
            return
        if "path" in fields:
            fields["path"] = _redacted_path(fields["path"])
        fields["event"] = self._name
        fields["process"] = _lines[1]
        fields["level"] = "info"
        fields["timestamp"] = datetime.now(UTC)
        if not self._ready:
            asyncio.get_running_loop().call_soon(self._write)
        self._ready.append(orjson.dumps(fields, default=str, option=_STAMP).decode())

    def _write(self) -> None:
        lines, self._ready = self._ready, []
        if _lines is None:
            return
        try:
            _lines[0].stream.write(_as_plain_lines(lines))
            _lines[0].flush()
        except (OSError, ValueError):  # a closed stream must not fail a request
            return


# The handler and the process's name, while the lines of requests and jobs are logged as JSON.
_lines: tuple[logging.StreamHandler[Any], str] | None = None
_STAMP = orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS


def get_logger() -> structlog.stdlib.BoundLogger:
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    return logger
