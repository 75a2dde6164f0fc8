"""Logging: the names of all log events, and how a line looks.

Invariant: this is the only file that spells an event's name. A line is one event with fields; on a
terminal it is coloured text, elsewhere JSON. Secrets never reach a line: values of fields whose
name says that they are secret are replaced, and so is a key inside a URL.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from enum import StrEnum
from typing import Any, Literal

import structlog


class Log(StrEnum):
    """Event names. One line per request at most: `REQUEST_DONE` or `JOB_DONE`."""

    STARTED = "started"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DEMO_MODE = "demo_mode"
    REQUEST_DONE = "request_done"
    REQUEST_FAILED = "request_failed"
    JOB_DONE = "job_done"
    JOB_RETRY = "job_retry"
    JOB_DEAD = "job_dead"
    JOBS_RETAKEN = "jobs_retaken"
    WORKER_LOOP_FAILED = "worker_loop_failed"
    CLASSIFIER_FELL_BACK = "classifier_fell_back"
    LIMITER_STATE = "limiter_state"
    STORE_AWAY = "store_away"
    STORE_BACK = "store_back"
    SPILLED = "spilled"
    SPILL_REPLAYED = "spill_replayed"
    AUDIT_DROPPED = "audit_dropped"
    MIGRATED = "migrated"
    PRUNED = "pruned"
    CHILD_STARTED = "child_started"
    CHILD_DIED = "child_died"
    EMBEDDED_STARTED = "embedded_started"
    INTERNAL_ERROR = "internal_error"
    UPSTREAM_KEY_DEAD = "upstream_key_dead"


_SECRET_FIELD = re.compile(r"key$|secret|password|authorization|api_key|cookie", re.IGNORECASE)
_SECRET_IN_TEXT = re.compile(
    r"(?P<before>[?&](?:key|api_key|upload_id|access_token)=|://[^/\s:@]*:|x-goog-api-key:\s*)"
    r"[^&\s@'\"]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` without keys in query strings and passwords in URLs."""
    return _SECRET_IN_TEXT.sub(lambda found: f"{found['before']}***", text)


def _redact_event(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if _SECRET_FIELD.search(name):
            event[name] = "***"
        elif isinstance(value, str):
            event[name] = redact(value)
    return event


def configure_logging(
    style: Literal["auto", "console", "json"], level: str, *, process: str
) -> None:
    """Set up structlog and the standard library's loggers to write the same lines to stderr."""
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
        structlog.processors.format_exc_info,
        _redact_event,
    ]
    final: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if console
        else structlog.processors.JSONRenderer()
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, final],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpx2", "google_genai", "alembic", "aiohttp.access", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)


def get_logger() -> structlog.stdlib.BoundLogger:
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    return logger
