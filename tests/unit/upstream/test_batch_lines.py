"""Lines of the providers' batches: which calls can be one, and whose a custom id is."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

import pytest

from tidegate import dialects
from tidegate.call import Kind
from tidegate.dialects.spec import Dialect
from tidegate.spine.batched import prompt_endpoint
from tidegate.spine.detached import endpoint_named
from tidegate.upstream.batch_api import OpenAIBatches, custom_id, line_of, takes

BATCH, OTHER = UUID(int=2**120 + 1), UUID(int=2**120 + 2)


@pytest.mark.parametrize(
    ("path", "is_taken"),
    [
        ("/v1/chat/completions", True),
        ("/v1/responses", True),
        ("/v1/embeddings", True),
        ("/v1/images/generations", False),
        ("/v1/messages", True),
        ("/v1beta/models/gemini-2.5-flash:generateContent", True),
        ("/v1beta/models/gemini-embedding-001:embedContent", False),
    ],
)
def test_which_calls_can_be_lines(path: str, is_taken: bool) -> None:
    assert takes(endpoint_named(path)) is is_taken


def test_the_endpoint_of_a_line_is_found_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialects, "DIALECTS", {})
    endpoints = [endpoint_named(path) for path in ("/v1/chat/completions", "/v1/messages")]
    assert [one.dialect for one in endpoints] == [Dialect.OPENAI, Dialect.ANTHROPIC]


def test_prompts_can_be_lines() -> None:
    endpoint = prompt_endpoint(Dialect.GEMINI, Kind.IMAGE_GENERATION, "gemini-2.5-flash")
    assert takes(endpoint)
    assert endpoint.path_for("m") == "/v1beta/models/m:generateContent"
    for dialect, path in (
        (Dialect.OPENAI, "/chat/completions"),
        (Dialect.ANTHROPIC, "/v1/messages"),
    ):
        endpoint = prompt_endpoint(dialect, Kind.MULTI_MODAL, "m")
        assert takes(endpoint)
        assert endpoint.path_for("m") == path
    assert not takes(prompt_endpoint(Dialect.OPENAI, Kind.IMAGE_GENERATION, "m"))


def test_a_custom_id_names_its_batch_and_line() -> None:
    named = custom_id(BATCH, 1_999)
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", named)  # Anthropic takes no others
    assert line_of(BATCH, named) == 1_999
    assert line_of(OTHER, named) is None
    for foreign in ("a", f"{BATCH.hex}-", f"{BATCH.hex}-x", f"{BATCH.hex}-1-2", None, 7):
        assert line_of(BATCH, foreign) is None


class _Account:
    """One that answers everything with the same report."""

    def __init__(self, report: dict[str, Any]) -> None:
        self._report = report

    async def json(self, method: str, path: str, **_: object) -> dict[str, Any]:
        return self._report

    def words(self, error: str) -> str:
        return error


@pytest.mark.parametrize("created_at", [1_764_547_200, 1_764_547_200_000, 1e300, "now", None])
@pytest.mark.parametrize("code", ["invalid_json", ["invalid_json"], None])
async def test_a_report_of_other_units_and_types_is_understood(
    created_at: object, code: object
) -> None:
    errors = {"data": [{"code": code, "message": "line 3 is no JSON"}]}
    report = {"id": "b", "status": "failed", "created_at": created_at, "errors": errors}
    account: Any = _Account(report)
    progress = await OpenAIBatches(account).poll("b")
    assert (progress.has_ended, progress.problem) == (True, "line 3 is no JSON")
