"""Batches and files as OpenAI's SDK reads them. Pure."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from tidegate.store.batches import Batch, BatchFile

_TIMES = (
    *("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at"),
    *("failed_at", "expired_at", "cancelling_at", "cancelled_at"),
)


def file_view(file: BatchFile) -> dict[str, Any]:
    return {
        "id": f"file-{file.file_id.hex}",
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at.timestamp()) if file.created_at else 0,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def batch_view(batch: Batch) -> dict[str, Any]:
    errors = None
    if batch.errors is not None:
        errors = {"object": "list", "data": batch.errors}
    return {
        "id": f"batch_{batch.batch_id.hex}",
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": _file_id(batch.input_file_id),
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": _file_id(batch.output_file_id),
        "error_file_id": _file_id(batch.error_file_id),
        **{
            name: int(batch.times[name].timestamp()) if name in batch.times else None
            for name in _TIMES
        },
        "request_counts": {
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed,
        },
        "metadata": batch.metadata,
    }


def page(found: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list of at most `limit`, out of one more where there are more."""
    shown = found[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(found) > limit,
    }


def _file_id(file_id: UUID | None) -> str | None:
    return None if file_id is None else f"file-{file_id.hex}"
