"""Containers and environments in requests and answers, however they are written."""

from __future__ import annotations

import orjson
import pytest

from tidegate.dialects import DIALECTS
from tidegate.dialects.resources import Reference
from tidegate.dialects.sandboxes import made_by_claude, made_by_google, made_by_openai


def named(dialect: str, raw: bytes) -> list[Reference]:
    return list(DIALECTS[dialect].references(orjson.loads(raw), raw))


@pytest.mark.parametrize(
    ("dialect", "raw", "ids"),
    [
        ("anthropic", b'{"container": "a", "container": "b"}', ["a", "b"]),
        ("anthropic", b'{"container": {"id": "a", "id": "b", "skills": []}}', ["a", "b"]),
        ("anthropic", b'{"container": null, "messages": [{"container": "a"}]}', []),
        ("anthropic", rb'{"conta\u0069ner": "a"}', ["a"]),
        ("openai", b'{"tools": [{"container": "a", "container": "b"}]}', ["a", "b"]),
        ("openai", b'{"tools": [{"environment": {"container_id": "a"}}]}', ["a"]),
        ("openai", rb'{"tools": [{"conta\u0069ner": "a"}]}', ["a"]),
        ("openai", b'{"tools": [{"parameters": {"container": "a"}}]}', []),
        ("openai", b'{"input": [{"type": "shell_call", "container_id": "a"}]}', []),
        ("gemini", b'{"environment": "remote", "environment": "a"}', ["a"]),
        ("gemini", b'{"environment": {"environment_id": "a", "environment_id": null}}', ["a"]),
        ("gemini", b'{"environment": {"type": "remote", "environmentId": "a"}}', ["a"]),
        ("gemini", b'{"environment": {"type": "remote"}, "input": {"environment": "a"}}', []),
    ],
)
def test_both_values_of_a_field_are_read_where_a_server_reads_one(
    dialect: str, raw: bytes, ids: list[str]
) -> None:
    assert [one.resource_id for one in named(dialect, raw)] == ids


def test_an_answer_names_a_sandbox_only_where_the_provider_writes_it() -> None:
    said = {"type": "message", "container_id": "c", "content": [{"container_id": "c"}]}
    ran = {"type": "code_interpreter_call", "container_id": "cntr_1"}
    assert made_by_openai({"output": [said, ran]}) == [("container", "cntr_1")]
    assert made_by_openai({"type": "response.output_item.done", "item": ran}) == [
        ("container", "cntr_1")
    ]
    assert made_by_openai({"response": {"output": [said]}, "item": said}) == []
    assert made_by_claude({"content": [{"type": "tool_use", "container": {"id": "a"}}]}) == []
    assert made_by_claude({"delta": {"container": {"id": "a"}}}) == [("container", "a")]
    assert made_by_claude({"container": {"id": "../a"}}) == []
    assert made_by_google({"interaction": {"environment_id": "e"}}) == [("environment", "e")]
    assert made_by_google({"steps": [{"environment_id": "e"}]}) == []
