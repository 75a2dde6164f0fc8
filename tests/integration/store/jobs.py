"""Jobs and results to put into a store."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tidegate.call import Attachment, Classification, ClassifiedBy, Kind, Usage, new_id
from tidegate.store.records import AttemptResult, NewJob, OutputFile


def now() -> datetime:
    return datetime.now(UTC)


TEXT = Classification(Kind.TEXT_ONLY, ClassifiedBy.RULES, "no file and no word of a picture")
UNSURE = Classification(None, ClassifiedBy.RULES, "the words could mean either")


def new_job(prompt: str = "Why is the sky blue?", **overrides: Any) -> NewJob:
    values: dict[str, Any] = {
        "request_id": new_id(),
        "created_at": now(),
        "prompt": prompt,
        "classification": TEXT,
    }
    return NewJob(**{**values, **overrides})


def upload(name: str = "page.pdf") -> Attachment:
    return Attachment(new_id(), name, "application/pdf", 1234, f"2025-01-01/{new_id()}")


def result(text: str = "Because of Rayleigh.", **overrides: Any) -> AttemptResult:
    values: dict[str, Any] = {
        "model": "gemini-test",
        "fence": (1, 7),
        "admitted_at": now(),
        "finished_at": now(),
        "queue_ms": 12.5,
        "upstream_ms": 340.0,
        "text": text,
        "usage": Usage(input_tokens=5, output_tokens=9, total_tokens=14),
        "finish_reason": "STOP",
        "model_version": "gemini-test-001",
        "response_id": "r1",
    }
    return AttemptResult(**{**values, **overrides})


def picture() -> OutputFile:
    return OutputFile(new_id(), "image/png", 99, f"2025-01-01/{new_id()}")
